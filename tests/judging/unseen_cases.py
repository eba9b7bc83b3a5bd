"Random trees of which some leaves are known, and outputs over them."

import math
import numpy as np, torch
from hypothesis import settings, strategies as st
from hiermetric.images.features import Features
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.known import Outputs

slowly = settings(max_examples=40, deadline=None)


def random_tree(n, back, r):
    return Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - back), i)}' if i else None for i in range(n)})


def up(tax, v):
    return [v, *up(tax, int(tax.parents[v]))] if v else [0]


def under(tax, v):
    return [j for j in range(len(tax)) if v in up(tax, j)]


def dist(tax, a, b):
    return len(set(up(tax, a)) ^ set(up(tax, b)))


def outputs(tax, n, r, dim=5, known=None):
    "Random outputs, some rows flat and some saturated"
    z = torch.as_tensor(r.normal(size=(n, tax.n_leaves)) * r.choice([0.1, 2.0, 30.0], (n, 1)), dtype=torch.float32)
    if known is not None:
        z[:, ~torch.as_tensor(known)] = -math.inf
    return Outputs(torch.as_tensor(r.normal(size=(n, dim)), dtype=torch.float32), z, tax.node_probs(z.softmax(1)))


@st.composite
def cases(draw, least=3):
    "A tree, some of its leaves known, training images of all known leaves, other images"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tax = random_tree(draw(st.integers(least, 40)), draw(st.sampled_from([1, 3, 40])), r)
    known = r.random(tax.n_leaves) < 0.7
    known[r.integers(tax.n_leaves)] = True
    t = np.concatenate([tax.leaves[known], r.choice(tax.leaves[known], 12)]).astype(np.int64)
    return tax, known, outputs(tax, len(t), r, known=known), t, outputs(tax, int(r.integers(1, 12)), r, known=known), r


def features(r, tax, per=6):
    t = np.repeat(tax.leaves, per)
    return Features(
        r.normal(size=(len(t), 4)).astype(np.float32),
        t,
        np.tile(['train', 'train', 'train', 'val', 'test', 'test'], tax.n_leaves),
        tax,
        {'dataset': 'toy'},
    )


def slow_protos(emb, t, tax):
    e = emb.double().numpy()
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    out = np.zeros((len(tax), e.shape[1]))
    mean = {c: (lambda s: s / np.linalg.norm(s))(e[t == c].sum(0)) for c in np.unique(t)}
    for v in range(len(tax)):
        m = [mean[c] for c in mean if v in up(tax, int(c))]
        if m:
            s = np.sum(m, 0)
            out[v] = s / np.linalg.norm(s)
    return out
