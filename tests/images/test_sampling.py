"Samplers: what an epoch holds, and how often a class comes."

import pickle
import numpy as np, pytest
from hiermetric.images.sampling import SAMPLERS, create_sampler
from hiermetric.core import HiermetricError
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {
        'cod': 'animal/fish',
        'eel': 'animal/fish',
        'ray': 'animal/fish',
        'krill': 'animal/crustacean',
        'crab': 'animal/crustacean/decapod',
        'shrimp': 'animal/crustacean/decapod',
        'kelp': 'plant',
    }
)


LEAVES = np.asarray(TAX.leaves)


def inner(x, k=9):
    return x[..., k:-k, k:-k].float()  # away from the rim, where the two pad differently


LONG = np.repeat(LEAVES, [300, 120, 50, 20, 7, 2, 1])


@pytest.mark.parametrize('name', list(SAMPLERS))
def test_sampler_contract(name):
    targets = np.random.default_rng(1).permutation(LONG)
    for batch in (1, 16, 64, 10_000):
        if name == 'm_per_class' and batch < 4:
            continue  # refused, see below
        rows = create_sampler(name)(targets, TAX, batch, np.random.default_rng(0))
        size = min(batch, len(targets))
        assert (
            rows.dtype == np.int64
            and rows.shape == (len(targets) // size, size)
            and rows.min() >= 0
            and rows.max() < len(targets)
        )
        assert np.array_equal(rows, create_sampler(name)(targets, TAX, batch, np.random.default_rng(0)))
        if batch == 16:
            assert not np.array_equal(rows, create_sampler(name)(targets, TAX, batch, np.random.default_rng(1)))
    assert np.array_equal(
        pickle.loads(pickle.dumps(create_sampler(name)))(targets, TAX, 16, np.random.default_rng(0)),
        create_sampler(name)(targets, TAX, 16, np.random.default_rng(0)),
    )
    with pytest.raises(HiermetricError):
        create_sampler(name)(targets[:0], TAX, 8, np.random.default_rng(0))
    with pytest.raises(HiermetricError):
        create_sampler(name)(targets, TAX, 0, np.random.default_rng(0))


def slow_tree_share(v, labels):
    "Walk down from the root; at every fork choose evenly"
    p, node = 1.0, int(v)
    while True:
        children = [
            c for c in range(len(TAX)) if c and TAX.parents[c] == node and any(TAX.is_ancestor(c, y) for y in labels)
        ]
        p /= max(len(children) + (node in labels), 1)
        if node == 0:
            return p
        node = int(TAX.parents[node])


@pytest.mark.parametrize(
    'name,kw,share',
    [
        ('shuffle', {}, lambda n, v, labels: n),
        ('balanced', {}, lambda n, v, labels: 1),
        ('power', dict(q=0.5), lambda n, v, labels: n**0.5),
        ('power', dict(q=-0.5), lambda n, v, labels: n**-0.5),
        ('tree', {}, lambda n, v, labels: slow_tree_share(v, labels)),
        ('tree', dict(q=0.4), lambda n, v, labels: n**0.4 * slow_tree_share(v, labels) ** 0.6),
    ],
)
@pytest.mark.parametrize('inner', [False, True])
def test_classes_get_their_share(name, kw, share, inner):
    targets = np.concatenate([LONG, TAX.index(['fish', 'decapod', 'decapod'])]) if inner else LONG
    rows = create_sampler(name, **kw)(targets, TAX, 10, np.random.default_rng(0)).ravel()
    labels, n = np.unique(targets, return_counts=True)
    want = np.array([share(k, v, set(labels.tolist())) for v, k in zip(labels, n)], dtype=float)
    want *= len(rows) / want.sum()
    got = np.array([(targets[rows] == v).sum() for v in labels])
    assert (np.abs(got - want) <= (1 if name != 'shuffle' else 10)).all()
    for v in labels:  # no image again before all of its class have come
        times = np.bincount(rows, minlength=len(targets))[targets == v]
        assert np.ptp(times) <= 1


def test_draws_are_spread_over_the_epoch():
    "Batches of a balanced epoch are balanced as chance allows, not sorted"
    rows = create_sampler('balanced')(LONG, TAX, 50, np.random.default_rng(0))
    assert all(len(np.unique(LONG[r])) == 7 for r in rows)


@pytest.mark.parametrize('m,batch', [(2, 8), (4, 12), (3, 21)])
def test_m_per_class_beside_pytorch_metric_learning(m, batch):
    samplers = pytest.importorskip('pytorch_metric_learning.samplers')
    LONG = np.repeat(LEAVES, [1500, 600, 250, 100, 35, 10, 1])
    ours = create_sampler('m_per_class', m=m)(LONG, TAX, batch, np.random.default_rng(0))
    theirs = np.array(list(samplers.MPerClassSampler(LONG, m, batch, length_before_new_iter=len(LONG)))).reshape(
        -1, batch
    )
    assert ours.shape[1] == batch == theirs.shape[1]
    for rows in (ours, theirs):
        for r in rows:
            assert set(np.unique(LONG[r], return_counts=True)[1]) == {m} and len(np.unique(LONG[r])) == batch // m
    count = [np.bincount(np.searchsorted(LEAVES, LONG[r].ravel()), minlength=7) / r.size for r in (ours, theirs)]
    assert np.abs(count[0] - 1 / 7).max() < 0.07 and np.abs(count[1] - 1 / 7).max() < 0.07  # both draw classes evenly
    for r in ours:
        for v in np.unique(LONG[r]):
            assert len(set(r[LONG[r] == v])) == min(m, (LONG == v).sum())  # no repetition but of necessity


def test_m_per_class_with_few_classes():
    for r in create_sampler('m_per_class', m=4)(
        LONG, TAX, 63, np.random.default_rng(0)
    ):  # seven classes of four, twice, and seven more
        assert sorted(np.unique(LONG[r], return_counts=True)[1]) == [8, 8, 8, 8, 8, 11, 12]
    with pytest.raises(HiermetricError, match='m must be in'):
        create_sampler('m_per_class', m=0)(LONG, TAX, 64, np.random.default_rng(0))
