"Random ragged trees with probabilities and labels, and slow metrics."

import math
import numpy as np, pytest
from hypothesis import settings, strategies as st
from hiermetric.judging.metrics import METRICS
from hiermetric.trees.taxonomy import Taxonomy

slowly = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw, inner=True):
    "A random ragged tree, coherent node probabilities with ties and zeros, truths (leaf or internal)"
    n = draw(st.integers(2, 40))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    back = draw(st.sampled_from([1, 2, 5, 40]))
    tax = Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - back), i)}' if i else None for i in range(n)})
    b = int(r.integers(1, 12))
    p = r.dirichlet(np.full(tax.n_leaves, r.choice([0.05, 0.3, 3.0])), b)
    if draw(st.booleans()):
        p = np.round(p * 4)
        p[p.sum(1) == 0] = 1
        p /= p.sum(1, keepdims=True)  # many ties and zeros
    t = r.integers(0, n, b) if inner else r.choice(tax.leaves, b)
    return tax, tax.node_probs(p), np.asarray(t, np.int64), r


def path(tax, v):  # v and its ancestors, root last
    out = [int(v)]
    while tax.parents[out[-1]] >= 0:
        out.append(int(tax.parents[out[-1]]))
    return out


def height(tax, v):  # longest way down
    kids = [i for i in range(len(tax)) if tax.parents[i] == v]
    return 1 + max(height(tax, o) for o in kids) if kids else 0


def slow_d(tax, a, t):
    if int(t) in path(tax, a):
        return 0
    return height(tax, next(o for o in path(tax, a) if o in path(tax, t)))


def bits(tax, v):
    return math.log2(sum(int(v) in path(tax, j) for j in range(len(tax)) if j in tax.leaves) / len(tax.leaves)) * -1


def slow_information(tax, a, t):  # correct, precision, recall
    a = (
        int(t) if int(t) in path(tax, a) else int(a)
    )  # below an internal truth nothing can be confirmed, and nothing is charged
    shared = bits(tax, next(o for o in path(tax, a) if o in path(tax, t)))
    return (
        float(a in path(tax, t)),
        shared / bits(tax, a) if bits(tax, a) else 1.0,
        shared / bits(tax, t) if bits(tax, t) else 1.0,
    )


def slow_rank(scores):
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def assert_same(got, want):
    assert set(got) == set(want) == set(METRICS)
    for k in want:
        assert got[k] == pytest.approx(want[k], abs=1e-6, nan_ok=True), k


def flat(n):
    return Taxonomy.from_parents({'root': None} | {f'c{i:03}': 'root' for i in range(n)})


TREE = {'root': None, 'a': 'root', 'b': 'root', 'a1': 'a', 'a2': 'a', 'b1': 'b', 'b2': 'b', 'c': 'root'}
