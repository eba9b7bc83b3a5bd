"Random trees and galleries for the tests of neighbours, indices and scores."

import numpy as np
import torch
from hypothesis import settings
from hiermetric.trees.taxonomy import Taxonomy

slowly = settings(max_examples=40, deadline=None)


def random_tree(r, n=25):
    return Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - 6), i)}' if i else None for i in range(n)})


def data(seed=0, n=240, dim=12, classes=9, noise=1.0):
    r = np.random.default_rng(seed)
    tax = random_tree(r, 30)
    t = r.choice(tax.leaves[:classes], n)
    centre = r.normal(size=(len(tax), dim))
    return torch.as_tensor(centre[t] + noise * r.normal(size=(n, dim))).float(), t.astype(np.int64), tax, r


def slow_neighbours(q, g, k, metric, own):
    "Every pair, sorted"
    out = []
    for i, u in enumerate(np.asarray(q, np.float64)):
        d = [
            (1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v) if metric == 'cosine' else np.linalg.norm(u - v), j)
            for j, v in enumerate(np.asarray(g, np.float64))
            if own is None or own[i] != j
        ]
        out.append(sorted(d)[:k])
    return np.array([[j for _, j in o] for o in out]), np.array([[d for d, _ in o] for o in out])
