"Lowest common ancestors and distances against climbing"

import os
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pytest, torch
from hypothesis import given
from hiermetric.trees.taxonomy import Taxonomy
from slow_trees import slow_trees, random_tree


def pairs_of(slow):
    return [(a, b) for a in slow.order for b in slow.order][:: max(1, len(slow.order) ** 2 // 200)]


@given(slow_trees())
def test_pairwise_queries(slow):
    tax, ab = Taxonomy.from_parents(slow.parent), pairs_of(slow)
    u, v = tax.index([a for a, _ in ab]), tax.index([b for _, b in ab])
    meet = [slow.lca(a, b) for a, b in ab]
    expected = {
        'lca': [slow.order.index(m) for m in meet],
        'edge_distance': [slow.up(a).index(m) + slow.up(b).index(m) for (a, b), m in zip(ab, meet)],
        'lca_height': [slow.height(m) for m in meet],
        'lca_depth_cost': [slow.height(slow.root) - slow.depth(m) for m in meet],
        'is_ancestor': [a in slow.up(b) for a, b in ab],
    }
    for name, want in expected.items():
        ask = getattr(tax, name)
        assert ask(u, v).tolist() == want, name
        got = ask(torch.tensor(u), torch.tensor(v))
        assert isinstance(got, torch.Tensor) and got.tolist() == want, name
        assert ask(*ab[-1]) == want[-1] and type(ask(int(u[0]), int(v[0]))) in (int, bool)
        assert ask(u[:, None], v[None]).shape == (len(u), len(v))


@given(slow_trees())
def test_cost_matrix_and_multi_hot(slow):
    tax = Taxonomy.from_parents(slow.parent)
    for cost in ('lca_height', 'lca_depth_cost', 'edge_distance'):
        assert (tax.cost_matrix(cost) == getattr(tax, cost)(tax.leaves[:, None], tax.leaves)).all() and tax.cost_matrix(
            cost
        ).shape == (tax.n_leaves,) * 2
    want = [[o in slow.up(n) for o in slow.order] for n in slow.order]
    assert (
        tax.multi_hot(np.arange(len(tax))).tolist() == want and tax.multi_hot(torch.arange(len(tax))).tolist() == want
    )
    assert tax.multi_hot(slow.order[:1]).tolist() == want[:1]


@pytest.fixture(scope='module')
def large():
    return random_tree(20_000, np.random.default_rng(1))


def climb(tax, u, v):
    while (m := u != v).any():
        lift_u = m & (tax.depths[u] >= tax.depths[v])
        lift_v = m & (tax.depths[v] >= tax.depths[u])
        u, v = np.where(lift_u, tax.parents[u], u), np.where(lift_v, tax.parents[v], v)
    return u


def test_lca_of_many_pairs(large):
    u, v = np.random.default_rng(2).integers(0, len(large), (2, 300_001))
    want = climb(large, u, v)
    for a, b in ((u, v), (u.astype(np.int32), v), (u.astype(np.uint16), v), (u[::-1][::-1], v)):
        assert (large.lca(a, b) == want).all()
    assert (large.lca(torch.tensor(u), torch.tensor(v)).numpy() == want).all() and large.lca(u, v).dtype == np.int64
    assert (large.lca(u[:500, None], v[:600]) == climb(large, *np.broadcast_arrays(u[:500, None], v[:600]))).all()


def test_lca_from_many_threads(large):
    u, v = np.random.default_rng(3).integers(0, len(large), (2, 200_000))
    fresh = Taxonomy(large.names, large.parents)  # nothing cached yet
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: fresh.lca(u, v), range(16)))
    assert all((o == results[0]).all() for o in results) and (results[0] == climb(large, u, v)).all()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork here')
def test_lca_after_fork(large):
    u, v = np.random.default_rng(4).integers(0, len(large), (2, 200_000))
    want = large.lca(u, v)
    pid = os.fork()
    if not pid:
        os._exit(0 if (large.lca(u, v) == want).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
