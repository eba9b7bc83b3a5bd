"Calibration against slow and obvious versions, on random ragged trees."

import numpy as np, pandas as pd, pytest, torch, warnings
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.judging.calibration import (
    PRIOR,
    LevelTemperatures,
    NodeIsotonic,
    TemperatureScaling,
    plot_reliability,
    rank_calibration,
    rank_confidence,
    temper,
)
from hiermetric.judging.metrics import evaluate, expected_calibration_error, negative_log_likelihood
from hiermetric.trees.taxonomy import Taxonomy
from rule_cases import cases, first_best, labelled, parents_of, path, slowly


@pytest.mark.parametrize('true_t', [0.3, 1.0, 2.5, 8.0])
@pytest.mark.parametrize('inner', [False, True])
def test_a_known_temperature_is_found(true_t, inner):
    tax, q, t, r = labelled(true_t)
    P = tax.node_probs(q)
    if inner:
        t = np.where((r.random(len(t)) < 0.3) & (tax.parents[t] > 0), tax.parents[t], t)
    ts = TemperatureScaling().fit(P, t, tax)
    assert ts.temperature == pytest.approx(true_t, rel=0.12)
    nll = lambda T: float(negative_log_likelihood(temper(q, T), t, tax).mean())
    grid = np.exp(np.linspace(np.log(0.1), np.log(15), 60))
    assert nll(ts.temperature) <= min(map(nll, grid)) + 1e-6  # no point of a fine grid is better


def test_scaling_changes_confidence_and_no_ranking():
    tax, q, t, r = labelled(3.0)
    P = tax.node_probs(q)
    ts = TemperatureScaling().fit(P[:2000], t[:2000], tax)
    S = ts.scale(P[2000:])
    before, after = evaluate(P[2000:], t[2000:], tax), evaluate(S, t[2000:], tax)
    for k in 'top1', 'top5', 'hd@1', 'hd@20', 'macro_top1':
        assert before[k] == after[k]
    assert after['nll'] < before['nll'] and after['ece'] < 0.5 * before['ece'] and after['brier'] < before['brier']
    assert isinstance(ts.scale(P[:3].numpy()), np.ndarray)
    torch.testing.assert_close(ts.scale(P[:1])[0], ts.scale(P[:7])[0], rtol=0, atol=0)


def test_zeros_stay_zero_and_sharp_models_stay_finite():
    z = torch.tensor([[200.0, 0, -200], [0, 0, -300]])
    q = z.softmax(1)
    for T in 0.05, 1.0, 20.0:
        p = temper(q, T)
        assert p.isfinite().all() and (p[q == 0] == 0).all()
        torch.testing.assert_close(p.sum(1), torch.ones(2))
    torch.testing.assert_close(temper(q, 1.0), q)


def test_temperature_that_the_data_do_not_tell():
    tax = Taxonomy.from_parents({'root': None, 'a': 'root', 'b': 'root'})
    P = tax.node_probs(np.array([[0.7, 0.3]] * 5))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (
            TemperatureScaling().fit(P, np.full(5, tax.leaves[0]), tax).temperature == 1
        )  # five that are right say little
        assert (
            TemperatureScaling().fit(np.repeat(P, 40, 0), np.repeat(tax.leaves[[0, 0, 0, 1, 1]], 40), tax).temperature
            > 1
        )


def test_temperature_wants_validation_data():
    tax, q, t, r = labelled(1.0, 20)
    P = tax.node_probs(q)
    with pytest.raises(TypeError):
        TemperatureScaling().fit(P)
    with pytest.raises(HiermetricError, match='not been fitted'):
        TemperatureScaling().scale(P)
    with pytest.raises(HiermetricError, match='19 targets for 20 images'):
        TemperatureScaling().fit(P, t[:-1], tax)
    with pytest.raises(HiermetricError, match='no images'):
        TemperatureScaling().fit(P[:0], t[:0], tax)


def test_reliability_diagram_shows_the_ece():
    import matplotlib

    matplotlib.use('Agg', force=False)
    tax, q, t, r = labelled(3.0, 500)
    P = tax.node_probs(q)
    ax = plot_reliability({'raw': P, 'half': tax.node_probs(temper(q, 2.0))}, t, tax)
    assert [o.get_text() for o in ax.get_legend().get_texts()][
        0
    ] == f"raw (ECE {evaluate(P, t, tax)['ece']:.1%})" and len(ax.collections) == 2


@given(cases(), st.floats(0.3, 4))
@settings(max_examples=40, deadline=None)
def test_level_temperatures_by_hand(case, T):
    tax, p, r = case
    P = tax.node_probs(p * 0.99 + 0.01 / tax.n_leaves)
    cal = LevelTemperatures()
    cal.tax, cal.temperatures = tax, [T * (d + 1) for d in range(tax.height)]
    want = np.ones_like(P)
    for v in range(1, len(tax)):
        kids = [k for k in range(1, len(tax)) if tax.parents[k] == tax.parents[v]]
        soft = {k: (P[:, k] / P[:, tax.parents[v]]) ** (1 / cal.temperatures[tax.depths[v] - 1]) for k in kids}
        want[:, v] = want[:, tax.parents[v]] * soft[v] / sum(soft.values())
    got = cal.scale(P)
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(got[:, tax.leaves].sum(1), 1, atol=1e-9)


@pytest.mark.parametrize('cal', [TemperatureScaling, LevelTemperatures, NodeIsotonic])
@pytest.mark.parametrize('inner', [False, True])
def test_calibration_helps_and_stays_coherent(cal, inner):
    tax, q, t, r = labelled(3.0)
    P = tax.node_probs(q)
    fit_t = np.where((r.random(len(t)) < 0.3) & (tax.parents[t] > 0), tax.parents[t], t) if inner else t
    c = cal().fit(P[:2000], fit_t[:2000], tax)
    S = c.scale(P[2000:])
    before, after = (evaluate(o, t[2000:], tax) for o in (P[2000:], S))
    assert after['nll'] < before['nll'] and after['ece'] < 0.6 * before['ece']
    up = torch.as_tensor(tax.parents[1:].astype(int))
    assert (S[:, 1:] <= S[:, up] + 1e-6).all()
    torch.testing.assert_close(S[:, torch.as_tensor(tax.leaves.astype(int))].sum(1), torch.ones(len(S), dtype=S.dtype))
    torch.testing.assert_close(S[:, 0], torch.ones(len(S), dtype=S.dtype))
    single = c.scale(P[2000:2004].float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), S[:4], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.cat([c.scale(P[i : i + 1]) for i in range(2000, 2004)]), S[:4], rtol=0, atol=0)
    assert isinstance(c.scale(P[:2].numpy()), np.ndarray)


def test_level_temperatures_are_the_best_of_a_grid():
    tax, q, t, r = labelled(2.0)
    P = tax.node_probs(q).numpy()
    cal = LevelTemperatures().fit(P, t, tax)
    log = lambda d, T: None

    def cost(temps):
        c = LevelTemperatures()
        c.tax, c.temperatures = tax, temps
        return evaluate(c.scale(P), t, tax)['nll'] + PRIOR * np.abs(np.log(temps)).sum() / len(t)

    best = cost(cal.temperatures)
    for d in range(tax.height):
        for f in 0.7, 0.9, 0.97, 1.03, 1.1, 1.4:
            assert best <= cost([T * f if k == d else T for k, T in enumerate(cal.temperatures)]) + 1e-9


def test_isotonic_is_monotone_and_never_zero():
    tax, q, t, r = labelled(3.0)
    c = NodeIsotonic().fit(tax.node_probs(q), t, tax)
    for x, y in c.knots:
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all() and 0 < min(y) and max(y) <= 1
    hard = np.zeros((1, tax.n_leaves))
    hard[0, 0] = 1
    S = c.scale(tax.node_probs(hard))
    assert np.isfinite(S).all() and (S > 0).all()


@given(cases())
@slowly
def test_rank_confidence_by_hand(case):
    tax, p, r = case
    P = tax.node_probs(p)
    t = r.integers(len(tax), size=len(p))
    ranks = [None if o < 0.3 else 'high' if d < 2 else 'low' for o, d in zip(r.random(len(tax)), tax.depths)]
    for rank, known in (
        *((d, None) for d in range(1, tax.height + 1)),
        *((o, ranks) for o in ('high', 'low') if o in ranks),
    ):
        nodes = [v for v in range(len(tax)) if (tax.depths[v] if known is None else known[v]) == rank]
        conf, hit = rank_confidence(P, t, tax if known is None else tax.with_ranks(known), rank)
        for b in range(len(p)):
            best = first_best(nodes, lambda v: P[b, v])
            told = not any(int(t[b]) in parents_of(tax, v) for v in nodes)
            assert conf[b] == pytest.approx(P[b, best]) and (
                np.isnan(hit[b]) if not told else hit[b] == (best in path(tax, int(t[b])))
            )


def test_tables_by_rank_ask_the_tree_and_can_be_told_to_ask_depths():
    tax, q, t, r = labelled(3.0, 500)
    P, named = tax.node_probs(q), tax.with_ranks([f'r{d}' if d else None for d in tax.depths])
    by_depth, by_rank = rank_calibration(P, t, tax), rank_calibration(P, t, named)
    assert by_rank.index.tolist() == [f'r{d}' for d in by_depth.index] and by_rank.index.name == 'rank'
    np.testing.assert_array_equal(by_rank, by_depth)
    pd.testing.assert_frame_equal(rank_calibration(P, t, named, 'depth'), by_depth)


def test_rank_calibration_is_the_ece_of_each_depth():
    tax, q, t, r = labelled(3.0, 500)
    table = rank_calibration(tax.node_probs(q), t, tax)
    conf, hit = rank_confidence(tax.node_probs(q), t, tax, 2)
    assert (
        table.ece[2] == pytest.approx(expected_calibration_error(conf, hit))
        and table.accuracy[2] == pytest.approx(hit.mean())
        and (table.images == 500).all()
        and list(table.index) == list(range(1, tax.height + 1))
    )
