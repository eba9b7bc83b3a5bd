"Toy features, heads of several embeddings, and tables of labels for their tests."

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from hiermetric.images.features import Features, toy_features
from hiermetric.heads.contract import create_head
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xy' for s in '123'})
TOY = toy_features(TAX, per_leaf=30, noise=2.0)
SMALL = dict(
    diva=dict(dim=8, decorrelate=10.0),
    divide_conquer=dict(dim=24, learners=3),
    bier=dict(sizes=(4, 8, 12), decorrelate=1.0),
    sndl=dict(dim=16),
)
X, T = TOY.of('train')


def made(name, **kw):
    torch.manual_seed(0)
    head = create_head(name, X.shape[1], TAX, **SMALL[name] | kw)
    head.prepare(X, T)
    head.refresh(X, T)
    return head


def settled(name, **kw):
    "Without chance, so that a loop can follow"
    return made(name, dropout=0.0, **kw)


def slow_parts(head, x):
    out, at = [], 0
    for size in head.sizes:
        layer = head.project.layers[1]
        out.append([F.normalize(layer.weight[at : at + size] @ row + layer.bias[at : at + size], dim=0) for row in x])
        at += size
    return out


def hinge(d_ap, d_an, m):
    return max(0.0, d_ap - d_an + m)


def above(values):
    good = [v for v in values if v > 0]
    return sum(good) / max(len(good), 1)


def dist(a, b):
    return float((a - b).norm())


def slow_epshn(p, t, margin=0.1):
    "Easy positive, semi-hard negative, triplet by triplet, with Euclidean distances of unit vectors"
    out, n = [], len(t)
    for a in range(n):
        good = [dist(p[a], p[i]) for i in range(n) if i != a and t[i] == t[a]]
        if not good:
            continue
        bad = [d for d in (dist(p[a], p[i]) for i in range(n) if t[i] != t[a]) if d > min(good)]
        if bad:
            out.append(hinge(min(good), min(bad), margin))
    return above(out)


def batch(n=18):
    t = torch.as_tensor(TAX.leaves[np.arange(n) // 3 % 6].copy()).long()
    torch.manual_seed(1)
    return torch.randn(n, X.shape[1]), t


LABELS = ['sand', 'water', 'boat', 'a/b', 'übrig']


def scenes(n=500, C=3, seed=0, noise=0.5):
    "Features that are sums of their labels' directions, some without any label"
    rng = np.random.default_rng(seed)
    y = (rng.random((n, C)) < 0.4).astype(int)
    x = (y @ rng.normal(size=(C, 16)) + noise * rng.normal(size=(n, 16))).astype(np.float16)
    return Features(
        x,
        np.zeros(n, dtype=int),
        np.resize(['train', 'train', 'train', 'val', 'test'], n),
        TAX,
        paths=np.array([f'/photos/{i % 7}/{i}.jpg' for i in range(n)]),
    ), y


def written(folder, y, names, labels=LABELS):
    pd.DataFrame(y, names, labels[: np.shape(y)[1]]).to_csv(folder / 'labels.csv')
    return folder / 'labels.csv'
