"""How `predictor`, `predictor-features.npy` and the answers lying here were made, by hiermetric as of commit 74f931e,
when ranks stood beside the tree: run it there, never here."""

from pathlib import Path
import numpy as np
from hiermetric.running.predictor import Predictor
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.running.sources import split_tensors
from hiermetric.images.features import toy_features

here = Path(__file__).parent
tree = Taxonomy.from_paths({f'{k}{i}{j}': f'{k}/{k}{i}' for k in 'ab' for i in range(2) for j in range(2)}, root='life')
f = toy_features(tree, per_leaf=60, dim=16, noise=1.0, seed=0)
run = fit(f, epochs=100, embed_dim=4, lr=0.01, device='cpu')
p = Predictor.from_model(run.model, f, ranks='order,family,species', most=15 * 60)
p.save_pretrained(here / 'predictor')
x = split_tensors(f, 'test')[0][::4]
np.save(here / 'predictor-features.npy', x.numpy())
for name, kw in dict(all={}, family=dict(rank='family'), by_rank=dict(at='rank')).items():
    p.ask(0.7, **kw)(*p.look(x)).to_csv(here / f'predictor-{name}.csv', index=False)
