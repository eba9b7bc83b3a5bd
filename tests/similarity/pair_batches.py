"Trees, batches and losses for the tests of losses on pairs."

import math
import torch
from hiermetric.similarity.losses import create_loss
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {f'c{i}': f'g{i % 4}' if i < 12 else '' for i in range(15)}
)  # ragged: three leaves hang on the root
FLAT = Taxonomy.from_paths({f'c{i}': '' for i in range(15)})
L, D, B = 15, 16, 32


def batch(tax=TAX, n=B, seed=0, inner=0, dim=D):
    g = torch.Generator().manual_seed(seed)
    t = tax.tensor('leaves')[torch.randint(0, 8, (n,), generator=g)]
    for i in range(inner):
        t[3 * i] = tax.tensor('parents')[t[3 * i]]  # known to the genus only
    return torch.randn(n, dim, generator=g), t


def make(name, tax=TAX, dim=D, **kw):
    torch.manual_seed(0)
    return create_loss(name, tax, dim, **kw)


VIEWS = ('simclr', 'moco')


def slow_grade(u, v, by, tax=TAX):
    "From paths, with sets: what two labels surely share, and what they may share at most"
    up = lambda k: [k] + (up(int(tax.parents[k])) if tax.parents[k] >= 0 else [])
    common = next(k for k in up(u) if k in up(v))
    below = [int(leaf) for leaf in tax.leaves if common in up(int(leaf))]

    def height(k):
        return max((1 + height(int(c)) for c in range(len(tax)) if tax.parents[c] == k), default=0)

    g = 1 - math.log(len(below)) / math.log(tax.n_leaves) if by == 'information' else 1 - height(common) / height(0)
    return g, 1.0 if common in (u, v) else g


def multi_hot(n=14, C=6, seed=0):
    return (torch.rand(n, C, generator=torch.Generator().manual_seed(seed)) < 0.35).float()


def jaccard(a, b):
    A, B_ = ({i for i, o in enumerate(v.tolist()) if o} for v in (a, b))
    return len(A & B_) / max(len(A | B_), 1)
