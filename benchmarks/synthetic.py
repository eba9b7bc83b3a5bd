"""How hard the synthetic organisms are: leaf accuracy of a linear head on frozen EfficientNet-Lite0 features, and where
its mistakes land.

    python benchmarks/synthetic.py [seed of the fauna …]
"""

import sys
import numpy as np, torch
from hiermetric.images.named import load_dataset
from hiermetric.images.features import extract
from hiermetric.running.fitting import fit

for fauna in map(int, sys.argv[1:] or ['0']):
    table = load_dataset('synthetic-taxa', seed=fauna)
    features = extract(table, progress=False)
    tax = features.taxonomy
    x, y = features.of('test')
    y = y.numpy()
    for head in 'classifier', 'arcface':
        rows = []
        for seed in range(5):
            model = fit(features, head, seed=seed).model.eval()
            with torch.no_grad():
                answer = tax.leaves[model.leaf_probs(x).argmax(1).numpy()]
            wrong = answer != y
            meet = tax.lca(answer[wrong], y[wrong])
            rows.append(
                [
                    np.mean(~wrong),
                    np.mean([np.mean(answer[y == c] == c) for c in np.unique(y)]),
                    np.mean(meet == tax.parents[y[wrong]]),
                    np.mean(tax.depths[meet] >= 2),
                ]
            )
        print(
            f'fauna {fauna}, {len(table)} images, {tax.n_leaves} species, {head}, 5 seeds: '
            + ', '.join(
                f'{k} {100 * m:.1f} ± {100 * s:.1f} %'
                for k, m, s in zip(
                    ('accuracy', 'macro', 'mistakes with the same parent', 'mistakes in the same order'),
                    np.mean(rows, 0),
                    np.std(rows, 0, ddof=1),
                )
            )
        )
