"Exact neighbours, k-means and votes against slow loops (hiermetric.similarity.search)"

import itertools
import math
import subprocess
import sys
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from galleries import data, random_tree, slow_neighbours, slowly
from hiermetric.core import HiermetricError
from hiermetric.trees.geometry import DISTANCES, unit
from hiermetric.similarity import search
from hiermetric.similarity.index import Index
from hiermetric.similarity.search import Neighbours, kmeans, neighbours, vote_probs
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('metric', DISTANCES)
@pytest.mark.parametrize('own', [None, 'some'])
@pytest.mark.parametrize('block', [7, 2**16])
def test_neighbours_are_those_of_the_loop(metric, own, block, monkeypatch):
    "Also where gallery and queries are cut into many blocks"
    rows = search.row_chunks
    monkeypatch.setattr(
        search,
        'row_chunks',
        lambda n, width, cells=2**22: rows(n, width, min(cells, block) if width == 1 else min(cells, block * 11)),
    )
    x, *_, r = data(3)
    q = x[:31] + 0.1 * torch.randn(31, 12, generator=torch.Generator().manual_seed(0))
    o = None if own is None else r.integers(-1, len(x), 31)
    rows_, d = slow_neighbours(q, x, 9, metric, o)
    near = neighbours(q, x, 9, metric, own=o)
    assert (near.rows.numpy() == rows_).all() and np.allclose(near.distances, d, atol=1e-5)


def test_distance_and_labels_belong_together():
    """Each distance is that to the very row that is named, for both metrics (known mistake: one looked up with the
    other's places)"""
    x, *_ = data(1)
    for m in DISTANCES:
        near = neighbours(x[:20], x, 5, m, own=list(range(20)))
        for i, j in itertools.product(range(20), range(5)):
            u, v = x[i].double(), x[near.rows[i, j]].double()
            assert math.isclose(
                near.distances[i, j], 1 - u @ v / u.norm() / v.norm() if m == 'cosine' else (u - v).norm(), abs_tol=1e-5
            )
    assert (neighbours(x[:20], x, 5).rows != neighbours(x[:20], x, 5, 'euclidean').rows).any()


def test_near_duplicates_keep_their_order_far_from_the_origin():
    "Squares would round a distance of 0.01 away at 1,000 from the origin"
    g = torch.tensor([[1000.0, 0], [1000.01, 0], [1000.03, 0]])
    assert torch.allclose(neighbours(g[:1], g, 3, 'euclidean').distances, (g[:1] - g).norm(dim=1)[None], atol=1e-4)


def test_a_gallery_as_float16_on_disk_serves(tmp_path):
    x, *_ = data(2)
    np.save(tmp_path / 'x.npy', x.half().numpy())
    g = np.load(tmp_path / 'x.npy', mmap_mode='r')
    assert (neighbours(x[:5].half().float(), g, 1).rows[:, 0] == torch.arange(5)).all()


def test_arrays_that_may_only_be_read_serve_without_a_warning(tmp_path):
    "torch warns once a process, so in a process of its own, where a warning is an error"
    x, t, tax, _ = data(6)
    np.save(tmp_path / 'x.npy', x.numpy())
    np.save(tmp_path / 't.npy', t)
    tax.save(tmp_path / 'tax.npz')
    code = f"""
import numpy as np
from hiermetric.trees.geometry import DISTANCES
from hiermetric.similarity import Index, evaluate_retrieval, kmeans, neighbours, vote_probs
from hiermetric.trees import Taxonomy
tax = Taxonomy.load({str(tmp_path / 'tax.npz')!r})
x, t = (np.load({str(tmp_path)!r} + o, mmap_mode='r') for o in ('/x.npy', '/t.npy'))
before = x.copy()
hot = tax.multi_hot(t); hot.flags.writeable = False
for m in DISTANCES:
    own = np.arange(9); own.flags.writeable = False
    vote_probs(neighbours(x[:9], x, 3, m, own=own), t, tax)
    i = Index(x, t, tax, m); i.add(x[:3], t[:3]); i.search(x, 2)
    o = Index.load(i.save({str(tmp_path / 'i')!r})); o.search(x, 2)
    [(o.classify(x, 'leaf', r), o.node_probs(x, r)) for r in ('majority', 'mean')]
    evaluate_retrieval(x, t, tax=tax, metric=m, clusters=True); evaluate_retrieval(x, hot, metric=m); kmeans(x, 3, m)
assert (x == before).all(); print('fine')"""
    run = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], capture_output=True, text=True)
    assert run.stdout.strip() == 'fine', run.stderr


@slowly
@given(st.integers(0, 10**6))
def test_the_largest_lie_in_the_columns_of_the_largest(seed):
    "`_top` beside topk: any width, equal numbers, rows left out"
    r = np.random.default_rng(seed)
    n, k = int(r.integers(1, 700)), int(r.integers(1, 40))
    k = min(k, n)
    s = torch.as_tensor(r.integers(0, int(r.integers(1, 3000)), (5, n))).float()
    s[torch.as_tensor(r.random((5, n)) < 0.2)] = -math.inf
    best, at = search._top(s, k)
    assert (
        torch.equal(best, s.topk(k, 1).values)
        and torch.equal(s.gather(1, at), best)
        and all(len(set(o)) == k for o in at.tolist())
    )


def test_memory_does_not_grow_with_the_square():
    "20,000 against 20,000 would be 1.6 GB; the process may not take 300 MB more"
    code = """
import resource, sys, torch
from hiermetric.similarity import neighbours
x = torch.randn(20000, 16); neighbours(x[:10], x, 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; near = neighbours(x, x, 5, own=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024)"""
    assert int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout) < 300


@pytest.mark.parametrize('offset', [0, 1e3, 5e3, 1e6])
def test_exact_neighbours_far_from_the_origin(offset):
    "The same float32 numbers, in scikit-learn's float64"
    from sklearn.neighbors import NearestNeighbors

    r = np.random.default_rng(0)
    x = (r.normal(size=(3000, 24)) * (1 + offset / 1e3) + offset).astype(np.float32)
    q = (x[::30] + r.normal(size=(100, 24)) * 0.3 * (1 + offset / 1e3)).astype(np.float32)
    d, want = NearestNeighbors(n_neighbors=5, algorithm='brute').fit(x.astype(float)).kneighbors(q.astype(float))
    near = neighbours(q, x, 5, 'euclidean')
    assert (near.rows.numpy() == want).all() and np.allclose(near.distances, d, rtol=1e-3)
    tax = Taxonomy.from_paths({f'c{i}': None for i in range(6)})
    t = np.repeat(tax.leaves, 500)
    assert (Index(x, t, tax, 'euclidean').search(q, 5).rows.numpy() == want).all()
    centres = kmeans(x, 4, seed=1)[1].double()
    near_centre = torch.cdist(torch.from_numpy(x).double(), centres)
    assert (kmeans(x, 4, seed=1)[0] == near_centre.argmin(1)).float().mean() > 0.999


@slowly
@given(st.integers(0, 10**6), st.sampled_from(['nearest', 'majority', 'weighted']))
def test_votes_are_those_of_the_loop(seed, rule):
    "Labels at leaves and inner nodes, places without a neighbour"
    r = np.random.default_rng(seed)
    tax = random_tree(r)
    targets = r.integers(0, len(tax), 30)
    K = int(r.integers(1, 8))
    rows = torch.as_tensor(r.integers(0, 30, (4, K)))
    d = torch.as_tensor(np.sort(r.random((4, K)), 1)).float()
    if K > 2:
        rows[0, -1], d[0, -1] = -1, math.inf
    p = vote_probs(Neighbours(rows, d), targets, tax, rule)
    for b in range(4):
        votes = np.zeros(len(tax))
        for j in range(K):
            if rows[b, j] < 0 or (rule == 'nearest' and j):
                continue
            v = targets[rows[b, j]]
            while v >= 0:
                votes[v] += 1 / (float(d[b, j]) + 1e-6) if rule == 'weighted' else 1
                v = tax.parents[v]
        assert np.allclose(p[b], votes / votes[0], atol=1e-4 if rule == 'majority' else 1e-6)


def test_kmeans_is_seeded_and_assigns_the_nearest_centre():
    x, *_ = data(4)
    a, c = kmeans(x, 6)
    assert torch.equal(a, kmeans(x, 6)[0]) and torch.equal(a, torch.cdist(x, c).argmin(1))


def test_spherical_kmeans_is_a_fixed_point_and_as_good_as_scikit_learn():
    from sklearn.cluster import KMeans

    x = unit(data(4)[0])
    cluster, centres = kmeans(x, 6, 'cosine', iterations=50)
    assert torch.equal(cluster, (x @ centres.T).argmax(1)) and torch.allclose(
        centres.norm(dim=1), torch.ones(6), atol=1e-5
    )
    for k in range(6):
        assert torch.allclose(unit(x[cluster == k].sum(0)), centres[k], atol=0.02)
    theirs = KMeans(6, n_init=10, random_state=0).fit(x.numpy())
    assert ((x - torch.stack([x[cluster == k].mean(0) for k in range(6)])[cluster]) ** 2).sum() < 1.05 * theirs.inertia_


@pytest.mark.parametrize('metric', DISTANCES)
def test_kmeans_does_not_mind_copies_zeros_or_as_many_clusters_as_rows(metric):
    for x, k in ((torch.ones(9, 4), 3), (torch.zeros(5, 4), 2), (torch.randn(4, 3), 4), (torch.randn(4, 3), 1)):
        cluster, centres = kmeans(x, k, metric)
        assert centres.isfinite().all() and len(cluster) == len(x) and 0 <= cluster.min() and cluster.max() < k
    with pytest.raises(HiermetricError, match='NaN'):
        kmeans(x * math.nan, 1, metric)
