"Miners against the library and against slow loops (hiermetric.similarity.miners)"

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import miners as pmm, distances as pmd
from hypothesis import given, settings, strategies as st
from pair_batches import D, FLAT, TAX, batch, jaccard, multi_hot
from hiermetric.similarity.graded import as_triplets, grades
from hiermetric.similarity.losses import relation
from hiermetric.similarity.miners import MINERS, create_miner


@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
@pytest.mark.parametrize(
    'name,theirs',
    [
        ('epshn', lambda d: pmm.BatchEasyHardMiner(distance=d)),
        ('hard', lambda d: pmm.BatchHardMiner(distance=d)),
        ('semi_hard', lambda d: pmm.TripletMarginMiner(margin=0.2, type_of_triplets='semihard', distance=d)),
        ('multi_similarity', lambda d: pmm.MultiSimilarityMiner(distance=d)),
    ],
)
def test_miners_equal_library(name, theirs, distance):
    x, t = batch()
    x = F.normalize(x)
    a = create_miner(name, TAX, distance)(x, t)
    b = theirs(pmd.CosineSimilarity() if distance == 'cosine' else pmd.LpDistance())(x, t)
    rows = lambda found: (
        [set(zip(*(o.tolist() for o in found[i : i + 2]))) for i in (0, 2)]
        if len(found) == 4
        else set(zip(*(o.tolist() for o in found)))
    )
    assert rows(a) == rows(b) and len(a[0])


@pytest.mark.parametrize('name', list(MINERS))
def test_miners_find_only_what_is_known(name):
    x, t = batch(inner=4)
    torch.manual_seed(0)
    same, different = relation(t, t, TAX)
    found = create_miner(name, TAX)(F.normalize(x), t)
    assert len(found[0])
    if name in ('tree', 'multi_label'):
        low, high = grades(t, t, TAX)
        a, p, n = found
        assert (low[a, p] > high[a, n]).all() and (a != p).all()
        return
    if name == 'intra_class':
        assert all(same[a, b] and a != b for a, *o in zip(*(o.tolist() for o in found)) for b in o)
        return
    assert same[found[0], found[1]].all() and different[found[-2] if len(found) == 4 else found[0], found[-1]].all()


def test_distance_weighted_draws_far_ones_too():
    x, t = batch(n=200, dim=D)
    torch.manual_seed(0)
    x = F.normalize(x)
    a, p, n = create_miner('distance_weighted', TAX)(x, t)
    d = (x[a] - x[n]).norm(dim=1)
    assert d.max() <= 1.4 and d.min() < 0.9 and len(a) >= 200


def test_on_a_flat_tree_the_tree_miner_is_epshn():
    for seed in range(5):
        x, t = batch(FLAT, seed=seed)
        a, b = (
            set(zip(*(o.tolist() for o in as_triplets(create_miner(k, FLAT)(F.normalize(x), t)))))
            for k in ('tree', 'epshn')
        )
        assert a == b and a


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_tree_miner_slow(seed):
    x, t = batch(n=16, seed=seed, inner=3)
    x = F.normalize(x)
    d = 1 - x @ x.T
    y = t.tolist()
    want = set()
    up = lambda k: [k] + (up(int(TAX.parents[k])) if TAX.parents[k] >= 0 else [])
    meet = [[next(k for k in up(i) if k in up(j)) for j in y] for i in y]
    for a in range(16):
        for k in up(y[a])[:-1]:
            near = [(d[a, i].item(), i) for i in range(16) if i != a and meet[a][i] == k]
            if not near:
                continue
            dp, p = min(near)
            far = [
                (d[a, j].item(), j)
                for j in range(16)
                if j != a and meet[a][j] not in (y[a], y[j]) and meet[a][j] in up(k)[1:] and d[a, j] > dp
            ]
            if far:
                want.add((a, p, min(far)[1]))
    assert set(zip(*(o.tolist() for o in create_miner('tree', TAX)(x, t)))) == want


def test_multi_label_miner_slow():
    m, (x, _) = multi_hot(), batch(n=14)
    x = F.normalize(x)
    d = 1 - x @ x.T
    n = range(14)
    J = [[jaccard(a, b) for b in m] for a in m]
    found = create_miner('multi_label', TAX, margin=0.3, gap=0.2)(x, m)
    assert set(zip(*(o.tolist() for o in found))) == {
        (a, p, q)
        for a in n
        for p in n
        for q in n
        if a != p and J[a][p] > J[a][q] + 0.2 and 0 < d[a, q] - d[a, p] <= 0.3
    } and len(found[0])


def test_random_triplets_are_even():
    x, t = batch(n=9)
    t = TAX.tensor('leaves')[torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])]
    torch.manual_seed(0)
    a, p, n = create_miner('random', TAX, k=2000)(x, t)
    count = torch.zeros(9, 9).index_put_((a, n), torch.ones(len(a)), accumulate=True)
    assert (count[0, 3:] - 2000 / 6).abs().max() < 80 and count[0, :3].sum() == 0 and (torch.bincount(a) == 2000).all()
