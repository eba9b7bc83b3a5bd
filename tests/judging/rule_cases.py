"Random ragged trees with probabilities, and what is slow and obvious about them."

import numpy as np, torch
from hypothesis import settings, strategies as st
from hiermetric.trees.taxonomy import Taxonomy

slowly = settings(max_examples=60, deadline=None)


def random_tree(n, back, r):
    return Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - back), i)}' if i else None for i in range(n)})


@st.composite
def cases(draw):
    "A random ragged tree with leaf distributions from flat to saturated"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tax = random_tree(draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 5, 60])), r)
    p = r.dirichlet(np.full(tax.n_leaves, draw(st.sampled_from([0.02, 0.3, 5.0]))), int(r.integers(1, 9)))
    return tax, p / p.sum(1, keepdims=True), r


def parents_of(tax, v):
    return [] if v == 0 else [int(tax.parents[v]), *parents_of(tax, int(tax.parents[v]))]


def labelled(true_t, n=3000, classes=12, seed=0):
    "Labels drawn from softmax(z), and a model that says softmax(z·T)"
    r = np.random.default_rng(seed)
    tax = random_tree(30, 8, r)
    z = torch.as_tensor(r.normal(size=(n, tax.n_leaves)) * 1.5)
    q = z.softmax(1).numpy()
    return tax, (z * true_t).softmax(1), tax.leaves[[r.choice(tax.n_leaves, p=o / o.sum()) for o in q]].astype(int), r


def under(tax, v):
    return [j for j, leaf in enumerate(tax.leaves) if leaf == v or v in parents_of(tax, int(leaf))]


def path(tax, v):
    return [v, *parents_of(tax, v)]  # upwards


def first_best(nodes, key):
    nodes = list(nodes)
    best = max(map(key, nodes))
    return next(v for v in nodes if key(v) == best)


@st.composite
def bags(draw):
    "A tree, exchangeable images with many ties, labels that may be inner nodes, and a confidence"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tax = random_tree(draw(st.integers(2, 14)), draw(st.sampled_from([1, 3, 14])), r)
    n = draw(st.sampled_from([1, 2, 4, 9, 25]))
    q = r.integers(0, draw(st.sampled_from([2, 4, 100])), (n, tax.n_leaves)) + 0.01
    q = q / q.sum(1, keepdims=True)
    t = tax.leaves[[r.choice(tax.n_leaves, p=o) for o in q]].astype(int)
    if draw(st.booleans()):
        t = np.where(
            np.arange(n) < (n > 2) * 2 + (r.random(n) < 0.2) * n, np.maximum(tax.parents[t], 0), t
        )  # two at least: that inner labels occur must be known without the new image
    return tax, tax.node_probs(q), t, draw(st.sampled_from([0.3, 0.5, 0.75, 0.8, 0.9])), r
