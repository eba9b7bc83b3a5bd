"""Heads with a logit for every node: decodings and counts against slow loops, coherence on random trees
(hiermetric.heads.node_head)"""

import itertools, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.trees.arithmetic import (
    closure,
    leaf_distribution,
    leaf_sums,
    path_sums,
    path_targets,
    sibling_log_softmax,
)
from hiermetric.trees.checks import check_node_probs
from hiermetric.heads.node_head import DECODES, LEAF_SCORES, VETO, decode_nodes, node_frequency, tree_prior
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {
        'lynx': 'mammal/cat/wild',
        'tiger': 'mammal/cat/wild',
        'tabby': 'mammal/cat',
        'wolf': 'mammal/dog',
        'fox': 'mammal/dog',
        'owl': 'bird',
        'wren': 'bird',
        'stone': '',
    }
)
N, D = len(TAX), 16
LEAVES = TAX.tensor('leaves')


@st.composite
def trees(draw, most=14):
    "Any rooted tree of 2 … `most` nodes"
    n = draw(st.integers(2, most))
    return Taxonomy([str(i) for i in range(n)], [-1] + [draw(st.integers(0, i - 1)) for i in range(1, n)])


def up(tax, i):
    "Nodes from `i` to just below the root, by the definition of a parent"
    out = []
    while i > 0:
        out.append(i)
        i = int(tax.parents[i])
    return out


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# targets


@settings(max_examples=50, deadline=None)
@given(tax=trees(), data=st.data())
def test_path_targets_are_the_slow_ones(tax, data):
    t = data.draw(st.lists(st.integers(0, len(tax) - 1), min_size=1, max_size=6))
    positive, known = path_targets(torch.tensor(t), tax)
    assert (known is None) == all(tax.heights[v] == 0 for v in t)
    for b, v in enumerate(t):
        for i in range(1, len(tax)):
            assert positive[b, i - 1] == (i in up(tax, v))
            if known is not None:
                assert known[b, i - 1] == (i == v or v not in [*up(tax, i), 0])


# decodings


def slow_scores(how, z, tax):
    "The table of the chapter, leaf by leaf, from (N−1,) logits"
    z = z.tolist()
    sig = lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    logsig = lambda x: -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    def family(i):
        kin = [j for j in range(1, len(tax)) if tax.parents[j] == tax.parents[i]]
        top = max(z[j - 1] for j in kin)
        return z[i - 1] - top - math.log(sum(math.exp(z[j - 1] - top) for j in kin))

    out = []
    for leaf in tax.leaves.tolist():
        path = up(tax, leaf)
        above = path[1:]
        out.append(
            {
                'leaves': lambda: z[leaf - 1],
                'sigmoid': lambda: logsig(z[leaf - 1]),
                'path': lambda: sum(z[i - 1] for i in path),
                'product': lambda: sum(logsig(z[i - 1]) for i in path),
                'mean': lambda: sum(logsig(z[i - 1]) for i in path) / len(path),
                'siblings': lambda: sum(map(family, path)),
                'veto': lambda: (
                    z[leaf - 1] + (VETO * sum(logsig(z[i - 1]) for i in above) / len(above) if above else 0.0)
                ),
            }[how]()
        )
    return out


@settings(max_examples=40, deadline=None)
@given(tax=trees(), seed=st.integers(0, 999), size=st.sampled_from([0.1, 3.0, 30.0]))
def test_decodings_are_the_slow_ones(tax, seed, size):
    z = size * randn(3, len(tax) - 1, seed=seed)
    for how in DECODES:
        p = decode_nodes(z, tax, how)
        assert p.shape == (3, len(tax)) and p.dtype == torch.float64
        for b in range(3):
            if how in LEAF_SCORES:
                s = np.array(slow_scores(how, z[b], tax))
                leaf = np.exp(s - s.max())
                leaf /= leaf.sum()
                want = [sum(q for q, l in zip(leaf, tax.leaves) if i <= l <= tax.last[i]) for i in range(len(tax))]
            elif how == 'closure':
                want = [1.0] + [
                    max(torch.sigmoid(z[b, j - 1]).item() for j in range(1, len(tax)) if i in up(tax, j))
                    for i in range(1, len(tax))
                ]
            else:
                want = [math.prod(torch.sigmoid(z[b, j - 1]).item() for j in up(tax, i)) for i in range(len(tax))]
            assert p[b].tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(tax=trees(), seed=st.integers(0, 999))
def test_sums_and_maxima_are_the_slow_ones(tax, seed):
    "Of the root, too, and of more than two dimensions"
    x = randn(2, 3, len(tax), seed=seed)
    got = closure(x, tax)
    sums = path_sums(x, tax)
    for i in range(len(tax)):
        assert torch.equal(got[..., i], x[..., i : tax.last[i] + 1].amax(-1))
    for i in range(len(tax)):
        assert torch.allclose(sums[..., i], x[..., 0] + sum(x[..., j] for j in up(tax, i)))


@settings(max_examples=60, deadline=None)
@given(
    tax=trees(30),
    seed=st.integers(0, 999),
    size=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_decodings_are_coherent_on_any_tree(tax, seed, size, dtype):
    "Also for absurd logits: finite, in [0, 1], root 1, no child above its parent"
    z = size * randn(5, len(tax) - 1, seed=seed, dtype=dtype)
    z[0] = size
    z[1] = -size
    for how in DECODES:
        p = decode_nodes(z, tax, how)
        assert p.dtype == dtype and p.isfinite().all()
        check_node_probs(p, tax, tol=1e-6)
        if how in LEAF_SCORES:
            assert torch.allclose(p[:, tax.tensor('leaves')].sum(1), torch.ones(5, dtype=dtype), atol=1e-5)


def test_path_is_independent_answers_conditioned_on_a_path():
    "Every combination of answers, weighed by the independent probabilities; only root paths are kept"
    z = 2 * randn(4, N - 1)
    combos = torch.tensor([*itertools.product([False, True], repeat=N - 1)])
    paths = {tuple(i in up(TAX, leaf) for i in range(1, N)): c for c, leaf in enumerate(TAX.leaves.tolist())}
    kept = torch.zeros(4, TAX.n_leaves, dtype=torch.float64)
    for o in combos:
        if tuple(o.tolist()) in paths:
            kept[:, paths[tuple(o.tolist())]] = torch.where(o, z.sigmoid(), 1 - z.sigmoid()).prod(1)
    assert torch.allclose(decode_nodes(z, TAX, 'path')[:, LEAVES], kept / kept.sum(1, keepdim=True))


def test_closure_and_conditional_rank_leaves_as_sigmoid_and_product():
    z = 3 * randn(20, N - 1)
    for how, same in (('closure', 'sigmoid'), ('conditional', 'product')):
        assert torch.allclose(leaf_distribution(decode_nodes(z, TAX, how), TAX), decode_nodes(z, TAX, same)[:, LEAVES])
    own = z[:, LEAVES - 1].argmax(1)
    for how in ('leaves', 'sigmoid', 'closure'):
        assert torch.equal(decode_nodes(z, TAX, how)[:, LEAVES].argmax(1), own)


def test_tree_sums_maxima_and_families_have_right_gradients():
    z = randn(2, N - 1).requires_grad_()
    x = randn(2, N, seed=1).requires_grad_()
    assert (
        torch.autograd.gradcheck(lambda o: path_sums(o, TAX), x)
        and torch.autograd.gradcheck(lambda o: leaf_sums(o, TAX), z)
        and torch.autograd.gradcheck(lambda o: sibling_log_softmax(o, TAX), z)
        and torch.autograd.gradcheck(lambda o: closure(o, TAX), x)
    )
    for how in DECODES:
        assert torch.autograd.gradcheck(lambda o: decode_nodes(o, TAX, how), z)


@settings(max_examples=40, deadline=None)
@given(tax=trees(), data=st.data())
def test_node_frequency_is_the_slow_count(tax, data):
    t = data.draw(st.lists(st.integers(0, len(tax) - 1), min_size=1, max_size=30))
    got = node_frequency(t, tax)
    share = tree_prior(tax)
    for i in range(1, len(tax)):
        yes = sum(i == v or i in up(tax, v) for v in t)
        tells = sum(i == v or v not in [*up(tax, i), 0] for v in t)
        assert got[i - 1].item() == pytest.approx((yes + 1) / (tells + 2), rel=1e-5)
        assert share[i - 1].item() == pytest.approx(
            sum(i == l or i in up(tax, l) for l in tax.leaves.tolist()) / tax.n_leaves
        )
