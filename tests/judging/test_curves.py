"Curves over every threshold against slow and obvious versions."

import itertools, math
import numpy as np, pandas as pd, pytest, sklearn.metrics, torch
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.judging import curves
from hiermetric.judging.metrics import evaluate
from hiermetric.judging.curves import (
    aurc,
    average_correctness,
    haurc,
    operating_curve,
    plot_operating_curve,
    recall_at,
    risk_coverage,
)
from hiermetric.trees.taxonomy import Taxonomy
from metric_cases import TREE, bits, cases, flat, path, slow_d, slow_information, slow_rank, slowly


def slow_answer(tax, p, tau, rule):
    """Of the nodes above the threshold the most informative, then the most probable, then the first in the tree (of an
    only child and its parent the child); the root where there is none"""
    size = [sum(v in path(tax, j) for j in tax.leaves) for v in range(len(tax))]
    first = [min(j for j in tax.leaves if v in path(tax, j)) for v in range(len(tax))]
    best = tax.leaves[slow_rank(p[tax.leaves])[0]]
    may = {'information': range(len(tax)), 'climb': path(tax, best), 'leaf': [int(best)]}[rule]
    return min(
        (v for v in may if v and p[v] > tau), key=lambda v: (size[v], -p[v], first[v], -tax.depths[v]), default=0
    )


def slow_point(tax, P, T, tau, rule):
    rows = []
    for p, t in zip(P, T):
        a = slow_answer(tax, p, tau, rule)
        correct, precision, recall = slow_information(tax, a, t)
        rows.append(
            [
                correct,
                1 - correct,
                a == t,
                precision,
                recall,
                bits(tax, a) / math.log2(len(tax.leaves)) if len(tax.leaves) > 1 else 1.0,
                0 if correct else slow_d(tax, a, t),
            ]
        )
    return np.mean(rows, 0)


RULES = st.sampled_from(['information', 'climb', 'leaf'])


@given(cases(), RULES)
@settings(max_examples=40, deadline=None)
def test_operating_curve_is_the_slow_version_at_every_threshold(case, rule):
    tax, P, T, r = case
    c = operating_curve(P, T, tax, rule)
    assert (
        list(c.columns) == ['threshold', 'correct', 'wrong', 'exact', 'precision', 'recall', 'coverage', 'height']
        and c.threshold.iloc[-1] == 0
        and (c.threshold.diff().dropna() < 0).all()
    )
    assert (c.iloc[0][['correct', 'coverage']] == [1, 0]).all() or tax.n_leaves == 1
    assert (c.coverage.diff().dropna() > -1e-9).all()  # a lower threshold never says less
    for row in c.iloc[np.unique(np.linspace(0, len(c) - 1, 8).astype(int))].to_numpy():
        np.testing.assert_allclose(row[1:], slow_point(tax, P, T, row[0], rule), atol=1e-9)
    for tau in r.random(3):
        np.testing.assert_allclose(
            c[c.threshold <= tau].iloc[0, 1:], slow_point(tax, P, T, tau, rule), atol=1e-9
        )  # between two rows nothing happens


@given(cases(), RULES)
@slowly
def test_sums_of_a_curve(case, rule):
    tax, P, T, r = case
    c = operating_curve(P, T, tax, rule)
    points = list(zip(c.recall, c.correct))
    ends = sorted({0.0, *c.recall})
    assert average_correctness(c) == pytest.approx(
        sum((b - a) * max(y for x, y in points if x >= b) for a, b in itertools.pairwise(ends))
    )
    assert average_correctness(c) == pytest.approx(
        average_correctness(c, 'recall', 'correct')
    )  # the same region, seen from the other side
    for q in (0.5, 0.9, 0.95):
        assert recall_at(c, q) == max(x for x, y in points if y >= q)
    for risk in 'wrong', 'height':
        assert haurc(c, risk) == pytest.approx(
            sklearn.metrics.auc(np.maximum.accumulate(c.coverage), c[risk]) if len(c) > 1 else 0, abs=1e-9
        )


@given(cases())
@settings(max_examples=25, deadline=None)
def test_a_curve_ends_where_evaluate_stands(case):
    "with the threshold at 0 every rule answers with the best leaf"
    tax, P, T, r = case
    e = evaluate(P, T, tax)
    for rule in 'information', 'climb', 'leaf':
        end = operating_curve(P, T, tax, rule).iloc[-1]
        assert (end.correct, end.exact, end.precision, end.recall, end.height) == pytest.approx(
            (e['correct'], e['exact'], e['info_precision'], e['info_recall'], e['hd@1'])
        )


def test_curves_of_valmadres_tests():
    "the staircase of hiercls/metrics_test.py: dominated points change nothing"
    c = pd.DataFrame({'recall': [0.05, 0.1, 0.15, 0.2, 0.7, 0.8], 'correct': [0.8, 0.9, 0.5, 0.5, 0.1, 0.3]})
    assert (
        average_correctness(c) == pytest.approx(0.32)
        and average_correctness(c.iloc[[1, 3, 5]]) == pytest.approx(0.32)
        and average_correctness(c, 'recall', 'correct') == pytest.approx(0.32)
    )


def test_a_curve_does_not_depend_on_the_chunks(monkeypatch):
    tax, r = Taxonomy.from_parents(TREE), np.random.default_rng(0)
    P, T = tax.node_probs(r.dirichlet(np.ones(5) * 0.3, 50)), r.integers(0, len(tax), 50)
    whole = [operating_curve(P, T, tax, o) for o in ('information', 'climb', 'leaf')]
    rows = curves.row_chunks
    monkeypatch.setattr(curves, 'row_chunks', lambda n, width: rows(n, width, 7 * width))
    for a, b in zip(whole, [operating_curve(P, T, tax, o) for o in ('information', 'climb', 'leaf')]):
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_curves_of_other_types(dtype):
    tax, r = Taxonomy.from_parents(TREE), np.random.default_rng(0)
    P = torch.as_tensor(tax.node_probs(r.dirichlet(np.ones(5), 200)))
    T = torch.as_tensor(r.integers(0, len(tax), 200))
    want, got = operating_curve(P, T, tax), operating_curve(P.to(dtype), T.int(), tax)
    assert (
        average_correctness(got) == pytest.approx(average_correctness(want), abs=0.01)
        and haurc(got) == pytest.approx(haurc(want), abs=0.01)
        and not got.isna().any().any()
    )


def test_small_trees_have_curves():
    one = operating_curve(np.ones((3, 1)), np.zeros(3, int), Taxonomy.from_parents({'only': None}))
    assert len(one) == 1 and one.correct.iloc[0] == 1 and haurc(one) == 0 and recall_at(one) == 1
    chain = operating_curve(np.ones((1, 3)), np.array([2]), Taxonomy.from_parents({'a': None, 'b': 'a', 'c': 'b'}))
    assert chain.exact.iloc[-1] == 1  # the deepest of equals


def test_no_such_rule():
    with pytest.raises(HiermetricError, match="no rule 'jump'"):
        operating_curve(np.ones((1, 5)), np.ones(1, int), flat(4), 'jump')


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6))
@slowly
def test_risk_coverage_is_the_mean_over_all_orders_of_equals(pairs):
    c, l = np.array(pairs, float).T
    orders = [o for o in itertools.permutations(range(len(c))) if all(c[i] >= c[j] for i, j in itertools.pairwise(o))]
    want = np.mean([[np.mean(l[list(o[: i + 1])]) for i in range(len(c))] for o in orders], 0)
    got = risk_coverage(c, l)
    np.testing.assert_allclose(got.risk, want)
    np.testing.assert_allclose(got.coverage, (np.arange(len(c)) + 1) / len(c))
    assert aurc(c, l) == pytest.approx(want.mean())


def test_risk_coverage_refuses_what_it_cannot_sort():
    with pytest.raises(HiermetricError, match=r'one loss an image, not shapes \(2,\) and \(3,\)'):
        risk_coverage([0.1, 0.2], [0, 1, 1])
    with pytest.raises(HiermetricError, match='image 1 is NaN'):
        aurc([0.1, np.nan], [0, 1])


def test_plot_of_curves():
    tax, r = Taxonomy.from_parents(TREE), np.random.default_rng(0)
    P, T = tax.node_probs(r.dirichlet(np.ones(5), 3000)), r.choice(tax.leaves, 3000)
    c = operating_curve(P, T, tax)
    ax = plot_operating_curve({'mine': c}, 'coverage', 'wrong')
    line, dot = ax.lines
    assert (
        len(line.get_xdata()) <= 1000 < len(c)
        and line.get_xdata()[-1] == c.coverage.iloc[-1]
        and [o.get_text() for o in ax.get_legend().get_texts()] == ['mine']
    )
    np.testing.assert_allclose(
        [dot.get_xdata()[0], dot.get_ydata()[0]], c[c.threshold <= 0.5].iloc[0][['coverage', 'wrong']].astype(float)
    )
