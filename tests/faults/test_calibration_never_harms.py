"Calibration on few images leaves the model at least as good as it was, and on many it is the best there is"

import warnings
import numpy as np, pytest, torch
from hiermetric.judging.calibration import PRIOR, LevelTemperatures, NodeIsotonic, TemperatureScaling, temper
from hiermetric.trees.arithmetic import leaf_distribution
from hiermetric.judging.metrics import negative_log_likelihood
from hiermetric.trees.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(
    {
        'sponge': None,
        **{o: 'vertebrate/bird' for o in ('owl', 'swift', 'gull')},
        **{o: 'vertebrate/mammal' for o in ('cat', 'dog')},
    }
)
ALL = TemperatureScaling, LevelTemperatures, NodeIsotonic


def world(spread, loud, n=3000, seed=0):
    "A model that says softmax(loud·z) where the labels are drawn from softmax(z)"
    rng = np.random.default_rng(seed)
    z = torch.as_tensor(rng.normal(size=(n, TREE.n_leaves)) * spread)
    labels = TREE.leaves[(z.softmax(1).cumsum(1).numpy() > rng.random((n, 1))).argmax(1)].astype(int)
    return TREE.node_probs((loud * z).softmax(1)), labels


def nll(P, t):
    return float(negative_log_likelihood(leaf_distribution(P, TREE), t, TREE).mean())


def harm(kind, spread, loud, n, draws, seed=1):
    "Mean test NLL after calibration on n images, over that before it, less 1"
    P, t = world(spread, loud)
    half, rng = len(t) // 2, np.random.default_rng(seed)
    after = []
    for _ in range(draws):
        few = rng.choice(half, n, replace=False)
        after.append(nll(kind().fit(P[few], t[few], TREE).scale(P[half:]), t[half:]))
    return np.mean(after) / nll(P[half:], t[half:]) - 1


@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize('spread,loud', [(2.0, 1.0), (5.0, 1.0), (2.0, 0.7)])
@pytest.mark.parametrize('n', [5, 20])
def test_few_images_do_no_harm(kind, spread, loud, n):
    assert harm(kind, spread, loud, n, draws=12) < 0.02


@pytest.mark.long
@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize(
    'spread,loud', [(1.0, 1.0), (2.0, 1.0), (5.0, 1.0), (9.0, 1.0), (2.0, 0.7), (2.0, 1.4), (5.0, 0.6), (5.0, 2.0)]
)
@pytest.mark.parametrize('n', [5, 10, 20, 50])
def test_few_images_do_no_harm_in_200_draws(kind, spread, loud, n):
    assert harm(kind, spread, loud, n, draws=200) < 0.02


def test_a_loud_model_is_still_softened_by_few_images():
    for n, gain in (20, 0.05), (50, 0.08):
        assert harm(TemperatureScaling, 2.0, 2.0, n, draws=20) < -gain
    assert (
        harm(LevelTemperatures, 2.0, 2.0, 50, draws=10) < -0.05 and harm(NodeIsotonic, 2.0, 2.0, 50, draws=10) < -0.02
    )


@pytest.mark.parametrize('loud', [0.5, 1.0, 2.0, 4.0])
def test_many_images_give_the_temperature_of_maximum_likelihood(loud):
    P, t = world(2.0, loud)
    train, test = slice(1000), slice(1500, None)
    q = leaf_distribution(P, TREE)
    grid = np.exp(np.linspace(np.log(0.2), np.log(8), 400))
    likely = grid[np.argmin([float(negative_log_likelihood(temper(q[train], T), t[train], TREE).sum()) for T in grid])]
    mine, best = (
        float(negative_log_likelihood(temper(q[test], T), t[test], TREE).mean())
        for T in (TemperatureScaling().fit(P[train], t[train], TREE).temperature, likely)
    )
    assert mine / best - 1 < 0.001


def test_ten_images_that_are_all_right_change_nothing():
    P, t = world(2.0, 1.0)
    right = np.flatnonzero(TREE.leaves[leaf_distribution(P, TREE).argmax(1).numpy()] == t)[:10]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert TemperatureScaling().fit(P[right], t[right], TREE).temperature == 1
        assert LevelTemperatures().fit(P[right], t[right], TREE).temperatures == [1] * TREE.height


@pytest.mark.parametrize(
    'leaf_probs',
    [np.full((60, TREE.n_leaves), 1 / TREE.n_leaves), np.eye(TREE.n_leaves)[np.arange(60) % TREE.n_leaves]],
)
def test_where_no_temperature_is_better_it_is_one(leaf_probs):
    P = TREE.node_probs(leaf_probs)
    t = TREE.leaves[np.arange(60) % TREE.n_leaves]
    assert (
        TemperatureScaling().fit(P, t, TREE).temperature == 1
        and LevelTemperatures().fit(P, t, TREE).temperatures == [1] * TREE.height
    )


def test_every_level_has_the_least_cost_of_a_grid():
    P, t = world(3.0, 0.4, n=120, seed=3)
    few = slice(60)
    found = LevelTemperatures().fit(P[few], t[few], TREE).temperatures

    def cost(temperatures):
        c = LevelTemperatures()
        c.tax, c.temperatures = TREE, list(temperatures)
        return 60 * nll(c.scale(P[few]), t[few]) + PRIOR * np.abs(np.log(temperatures)).sum()

    least = cost(found)
    assert least <= cost([1.0] * TREE.height) + 1e-9
    for d in range(TREE.height):
        for T in np.exp(np.linspace(np.log(0.06), np.log(16), 60)):
            assert least <= cost([T if k == d else o for k, o in enumerate(found)]) + 1e-6


@pytest.mark.parametrize('kind', [TemperatureScaling, LevelTemperatures])
def test_the_warning_names_the_temperature_that_is_used(kind):
    owl = TREE.index('owl')
    q = np.where(TREE.leaves == owl, 1.05, 1.0)
    P = TREE.node_probs(np.repeat(q[None] / q.sum(), 4000, 0))  # hardly an owl, and always one
    with pytest.warns(UserWarning, match='limit of the search') as said:
        c = kind().fit(P, np.repeat(owl, 4000), TREE)
    used = [c.temperature] if kind is TemperatureScaling else c.temperatures
    assert min(used) < 0.051 and any(f'search, {min(used):.3g}:' in str(w.message) for w in said)


def test_a_level_without_labels_stays_as_it_is():
    P, t = world(2.0, 1.0)
    high = np.where(TREE.depths[t] > 1, TREE.index('vertebrate'), t)  # nothing is known below depth 1
    for kind in LevelTemperatures, NodeIsotonic:
        S = kind().fit(P[:200], high[:200], TREE).scale(P)
        below = [i for i in range(1, len(TREE)) if TREE.depths[i] > 1]
        up = TREE.parents[below].astype(int)
        torch.testing.assert_close(S[:, below] / S[:, up], P[:, below] / P[:, up], atol=1e-6, rtol=1e-4)
