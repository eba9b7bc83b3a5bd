"Probabilities of nodes and weights of levels against their definitions"

import re
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.trees import probabilities
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError
from slow_trees import slow_trees, random_tree


@given(slow_trees(), st.integers(0, 2**32 - 1))
def test_node_probs(slow, seed):
    tax = Taxonomy.from_parents(slow.parent)
    p = np.random.default_rng(seed).dirichlet(np.ones(tax.n_leaves), (2, 3))
    want = np.stack(
        [sum((p[..., tax.leaf_names.index(o)] for o in slow.leaves(n)), np.zeros((2, 3))) for n in slow.order], -1
    )
    np.testing.assert_allclose(tax.node_probs(p), want, atol=1e-14)
    np.testing.assert_allclose(tax.node_probs(torch.tensor(p)).numpy(), want, atol=1e-14)
    assert tax.node_probs(p[0, 0].astype(np.float32)).dtype == np.float32 and tax.node_probs(p[0, 0]).shape == (
        len(tax),
    )


floats = st.one_of(
    st.floats(0, 1),
    st.floats(0, 1e-30),
    st.sampled_from([0.0, 1.0, 5e-324, 1e-320, 2**-53, 2**-52, 1 - 2**-53, 1 / 3, 1e300]),
)


@given(slow_trees(), st.data())
def test_node_probs_are_coherent_for_any_input(slow, data):
    tax = Taxonomy.from_parents(slow.parent)
    p = np.array(data.draw(st.lists(floats, min_size=tax.n_leaves, max_size=tax.n_leaves)))
    with np.errstate(over='ignore'):
        for q in (
            tax.node_probs(p),
            tax.node_probs(p.clip(0, 1e30).astype(np.float32)),
            tax.node_probs(p.clip(0, 1).astype(np.float16)),
            tax.node_probs(torch.tensor(p)).numpy(),
            tax.node_probs(torch.tensor(p.clip(0, 1)).bfloat16()).float().numpy(),
        ):
            assert (q[1:] <= q[tax.parents[1:]]).all() and (q >= 0).all()


def test_node_probs_are_coherent_at_scale():
    rng = np.random.default_rng(0)
    tax = random_tree(50_000, rng)
    p = rng.exponential(size=(4, tax.n_leaves)).astype(np.float32) ** 12
    p /= p.sum(-1, keepdims=True)
    for q in (tax.node_probs(p), tax.node_probs(torch.tensor(p)).numpy()):
        assert (q[:, 1:] <= q[:, tax.parents[1:]]).all()
        np.testing.assert_allclose(q[:, 0], p.astype(float).sum(-1), rtol=1e-6)


@given(slow_trees(12))
@settings(max_examples=15)
def test_node_probs_gradient(slow):
    tax = Taxonomy.from_parents(slow.parent)
    p = torch.rand(2, tax.n_leaves, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tax.node_probs, (p,))
    weight = torch.randn(len(tax), dtype=torch.float64)
    (tax.node_probs(p) @ weight).sum().backward()
    by_hand = torch.tensor(tax.multi_hot(tax.leaves), dtype=torch.float64) @ weight
    torch.testing.assert_close(p.grad, by_hand.expand(2, -1))


@pytest.mark.parametrize(
    'bad, message',
    [
        (np.ones((2, 3)), 'Leaf probabilities have the shape (2, 3); the last size must be 2, the number of leaves.'),
        (torch.ones(2, 3), 'Leaf probabilities have the shape (2, 3); the last size must be 2, the number of leaves.'),
        (np.float64(1.0), 'Leaf probabilities have the shape (); the last size must be 2, the number of leaves.'),
        (np.array([0.5, np.nan]), 'Leaf probabilities hold NaN or a negative number.'),
        (torch.tensor([1.5, -0.5]), 'Leaf probabilities hold NaN or a negative number.'),
    ],
)
def test_node_probs_refuses(bad, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_paths({'a': '', 'b': ''}).node_probs(bad)


@given(slow_trees(), st.sampled_from(['uniform', 'balanced', 'deep', 'shallow']))
def test_level_weights(slow, scheme):
    tax = Taxonomy.from_parents(slow.parent)
    w = tax.level_weights(scheme)
    assert w[0] == 0 and w.sum() == pytest.approx(len(tax) - 1)
    for d in range(1, tax.height + 1):
        assert len(set(w[tax.depths == d].tolist())) == 1
    totals = [w[tax.depths == d].sum() for d in range(1, tax.height + 1)]
    if scheme == 'balanced' and totals:
        assert totals == pytest.approx([totals[0]] * len(totals))
    if scheme == 'deep':
        assert all(np.diff([w[tax.depths == d][0] for d in range(1, tax.height + 1)]) > 0)


@pytest.mark.parametrize(
    'scheme, message',
    [
        ([1, 2, 3], 'Level weights are 2 numbers, one for each level below the root'),
        ([0, 0], 'not all zero'),
        ([1, -1], 'none negative'),
        ([np.nan, 1], 'none negative'),
        ('deap', "There is no scheme 'deap'; there are uniform, balanced, deep, shallow. Did you mean 'deep'"),
    ],
)
def test_level_weights_refuse(scheme, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_paths({'a': 'b'}).level_weights(scheme)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(-2, 2)), min_size=1, max_size=50))
def test_parallel_sums_are_made_to_ascend(steps):
    c = np.cumsum([o for o, _ in steps]) + 0.5
    noisy = torch.tensor(
        c * (1 + 2**-52 * np.array([k for _, k in steps])), requires_grad=True
    )  # some units in the last place away
    out = probabilities.ascending(noisy)
    assert (out.diff() >= 0).all() and out.tolist() == np.maximum.accumulate(noisy.detach().numpy()).tolist()
    out.sum().backward()
    assert (noisy.grad == 1).all()
