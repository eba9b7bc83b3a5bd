"Every metric against a slow and obvious version, on random ragged trees, with leaf and internal truths."

import itertools, math
import numpy as np, pandas as pd, pytest, sklearn.metrics, torch
from hypothesis import given, settings, strategies as st
from hiclass import metrics as hiclass_metrics
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from hiermetric.core import HiermetricError
from hiermetric import metrics
from hiermetric.metrics import (
    METRICS,
    TreeMetric,
    accuracy,
    aurc,
    average_correctness,
    brier_score,
    correctness,
    distance_floor,
    evaluate,
    exact_path,
    expected_calibration_error,
    haurc,
    hierarchical_distance,
    hierarchical_f1,
    information_scores,
    macro_accuracy,
    mistake_height,
    mistake_severity,
    negative_log_likelihood,
    node_counts,
    operating_curve,
    per_sample,
    plot_operating_curve,
    rank_accuracy,
    rank_leaves,
    recall_at,
    risk_coverage,
    summarise,
    topk_accuracy,
    violation_rate,
)
from hiermetric.arithmetic import leaf_distribution
from hiermetric.taxonomy import Taxonomy

slowly = settings(max_examples=60, deadline=None)


# ---- trees, and everything said of them by walking up ----------------------------------------------------------------
@st.composite
def cases(draw, inner=True):
    "A random ragged tree, coherent node probabilities with ties and zeros, truths (leaf or internal)"
    n = draw(st.integers(2, 40))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    back = draw(st.sampled_from([1, 2, 5, 40]))
    tax = Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - back), i)}' if i else None for i in range(n)})
    b = int(r.integers(1, 12))
    p = r.dirichlet(np.full(tax.n_leaves, r.choice([0.05, 0.3, 3.0])), b)
    if draw(st.booleans()):
        p = np.round(p * 4)
        p[p.sum(1) == 0] = 1
        p /= p.sum(1, keepdims=True)  # many ties and zeros
    t = r.integers(0, n, b) if inner else r.choice(tax.leaves, b)
    return tax, tax.node_probs(p), np.asarray(t, np.int64), r


def path(tax, v):  # v and its ancestors, root last
    out = [int(v)]
    while tax.parents[out[-1]] >= 0:
        out.append(int(tax.parents[out[-1]]))
    return out


def height(tax, v):  # longest way down
    kids = [i for i in range(len(tax)) if tax.parents[i] == v]
    return 1 + max(height(tax, o) for o in kids) if kids else 0


def slow_d(tax, a, t):
    if int(t) in path(tax, a):
        return 0
    return height(tax, next(o for o in path(tax, a) if o in path(tax, t)))


def bits(tax, v):
    return math.log2(sum(int(v) in path(tax, j) for j in range(len(tax)) if j in tax.leaves) / len(tax.leaves)) * -1


def slow_information(tax, a, t):  # correct, precision, recall
    a = (
        int(t) if int(t) in path(tax, a) else int(a)
    )  # below an internal truth nothing can be confirmed, and nothing is charged
    shared = bits(tax, next(o for o in path(tax, a) if o in path(tax, t)))
    return (
        float(a in path(tax, t)),
        shared / bits(tax, a) if bits(tax, a) else 1.0,
        shared / bits(tax, t) if bits(tax, t) else 1.0,
    )


def slow_rank(scores):
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def slow_evaluate(tax, P, T, nodes=None, ranking=None):
    L = len(tax.leaves)
    Q = P[:, tax.leaves] / P[:, tax.leaves].sum(1, keepdims=True)
    order = [slow_rank(o) for o in (Q if ranking is None else ranking)]
    A = [tax.leaves[o[0]] for o in order] if nodes is None else nodes
    d = [slow_d(tax, a, t) for a, t in zip(A, T)]
    wrong = [o for o in d if o]
    D = [[slow_d(tax, tax.leaves[j], t) for j in o] for o, t in zip(order, T)]
    out = {
        'n': len(T),
        'top1': np.mean([o == 0 for o in d]),
        'exact': np.mean([a == t for a, t in zip(A, T)]),
        'severity': np.mean(wrong) if wrong else math.nan,
        'hd@1': np.mean(d),
        'top5': np.mean([0 in o[:5] for o in D]),
        'hd@5': np.mean([np.mean(o[:5]) for o in D]),
        'hd@20': np.mean([np.mean(o[:20]) for o in D]),
        'macro_top1': np.mean([np.mean([o == 0 for o, t in zip(d, T) if t == c]) for c in set(T.tolist())]),
    }
    for k in 5, 20:
        out[f'hd@{k}_floor'] = np.mean([np.mean(sorted(slow_d(tax, j, t) for j in tax.leaves)[:k]) for t in T])
    sets = [(set(path(tax, a)[:-1]), set(path(tax, t)[:-1])) for a, t in zip(A, T)]
    div = lambda a, b: a / b if b else 1.0
    both, said, true = (sum(o) for o in zip(*[(len(a & t), len(a), len(t)) for a, t in sets]))
    out |= {
        'hp': div(both, said),
        'hr': div(both, true),
        'hf1': div(2 * both, said + true),
        'macro_hp': np.mean([div(len(a & t), len(a)) for a, t in sets]),
        'macro_hr': np.mean([div(len(a & t), len(t)) for a, t in sets]),
        'macro_hf1': np.mean([div(2 * len(a & t), len(a) + len(t)) for a, t in sets]),
    }
    out |= dict(
        zip(
            ('correct', 'info_precision', 'info_recall'),
            np.mean([slow_information(tax, a, t) for a, t in zip(A, T)], 0),
        )
    )
    out['nll'] = np.mean(
        [
            -math.log(max(sum(q[j] for j in range(L) if int(t) in path(tax, tax.leaves[j])), 1.1754944e-38))
            for q, t in zip(Q, T)
        ]
    )
    leaf = [(q, list(tax.leaves).index(t)) for q, t in zip(Q, T) if t in tax.leaves]
    out['n_leaf'] = len(leaf)
    out['brier'] = np.mean([sum((q[j] - (j == t)) ** 2 for j in range(L)) for q, t in leaf]) if leaf else math.nan
    bins = {}
    for q, t in leaf:
        bins.setdefault(min(14, max(0, math.ceil(q.max() * 15) - 1)), []).append((q.max(), int(q.argmax() == t)))
    out['ece'] = (
        sum(abs(sum(c for c, _ in o) - sum(h for _, h in o)) for o in bins.values()) / len(leaf) if leaf else math.nan
    )
    return out


def assert_same(got, want):
    assert set(got) == set(want) == set(METRICS)
    for k in want:
        assert got[k] == pytest.approx(want[k], abs=1e-6, nan_ok=True), k


@given(cases())
@slowly
def test_evaluate_is_the_slow_version(case):
    tax, P, T, r = case
    assert_same(evaluate(P, T, tax), slow_evaluate(tax, P, T))


@given(cases())
@slowly
def test_evaluate_with_a_rules_answers(case):
    tax, P, T, r = case
    nodes, ranking = r.integers(0, len(tax), len(T)), np.round(r.normal(size=(len(T), tax.n_leaves)), 1)
    assert_same(evaluate(P, T, tax, nodes=nodes, ranking=ranking), slow_evaluate(tax, P, T, nodes, ranking))


@given(cases(), st.sampled_from([1, 2, 5, 20, 1000]))
@slowly
def test_pure_functions_are_the_slow_version(case, k):
    tax, P, T, r = case
    scores = P[:, tax.leaves]
    D = [[slow_d(tax, tax.leaves[j], t) for j in slow_rank(o)[:k]] for o, t in zip(scores, T)]
    assert topk_accuracy(scores, T, tax, k) == pytest.approx(np.mean([0 in o for o in D]))
    assert hierarchical_distance(scores, T, tax, k) == pytest.approx(np.mean(D))
    best = [np.mean(sorted(slow_d(tax, j, t) for j in tax.leaves)[:k]) for t in T]
    np.testing.assert_allclose(distance_floor(T, tax, k), best)
    assert hierarchical_distance(scores, T, tax, k) >= np.mean(best) - 1e-9
    A = r.integers(0, len(tax), len(T))
    slow = slow_evaluate(tax, P, T, A)
    assert accuracy(A, T, tax) == pytest.approx(slow['top1']) and exact_path(A, T) == pytest.approx(slow['exact'])
    assert macro_accuracy(A, T, tax) == pytest.approx(slow['macro_top1']) and mistake_severity(
        A, T, tax
    ) == pytest.approx(slow['severity'], nan_ok=True)
    for average in 'micro', 'macro':
        assert hierarchical_f1(A, T, tax, average) == pytest.approx(
            [slow[('macro_' if average == 'macro' else '') + o] for o in ('hp', 'hr', 'hf1')]
        )
    assert correctness(A, T, tax) == pytest.approx(slow['correct']) and information_scores(A, T, tax) == pytest.approx(
        [slow['info_precision'], slow['info_recall']]
    )


@given(cases())
@slowly
def test_a_perfect_ranker_reaches_the_floor(case):
    tax, P, T, r = case
    perfect = -np.array([[slow_d(tax, j, t) for j in tax.leaves] for t in T], float)
    e = evaluate(P, T, tax, ranking=perfect)
    assert (
        e['hd@5'] == pytest.approx(e['hd@5_floor'])
        and e['hd@20'] == pytest.approx(e['hd@20_floor'])
        and e['top1'] == 1
        and e['hd@1'] == 0
        and math.isnan(e['severity'])
    )


@given(cases())
@slowly
def test_the_table_holds_what_the_functions_say(case):
    tax, P, T, r = case
    q, table = leaf_distribution(torch.as_tensor(P), tax), per_sample(P, T, tax)
    leaf = tax.leaf_column[T] >= 0
    np.testing.assert_allclose(table.nll, negative_log_likelihood(q, T, tax))
    np.testing.assert_allclose(table.brier, brier_score(q, T, tax))
    np.testing.assert_array_equal(table.brier.notna(), leaf)
    if leaf.any():
        assert expected_calibration_error(table.confidence[leaf], table.hit[leaf]) == pytest.approx(
            evaluate(P, T, tax)['ece']
        )
    np.testing.assert_array_equal(table['hd@1'], mistake_height(table.node, T, tax))
    assert (table['hd@5'] >= table['hd@5_floor'] - 1e-9).all() and (table['hd@20'] >= table['hd@20_floor'] - 1e-9).all()


# ---- rank by rank ----------------------------------------------------------------------------------------------------
def slow_ranks(tax, A, T, ranks):
    "Image by image, rank by rank: is the truth's node of that rank above the answer too?"
    out = {}
    for r in dict.fromkeys(o for o in ranks[1:] if o is not None):
        rows = [(v, v in path(tax, a)) for a, t in zip(A, T) for v in path(tax, t)[:-1] if ranks[v] == r]
        each = [np.mean([h for v, h in rows if v == node]) for node in {v for v, _ in rows}]
        out[r] = (
            sum(o == r for o in ranks[1:]),
            len(rows),
            np.mean([h for _, h in rows]) if rows else math.nan,
            np.mean(each) if rows else math.nan,
        )
    return out


@given(cases(), st.booleans())
@slowly
def test_ranks_are_the_slow_version(case, named):
    tax, P, T, r = case
    A = r.integers(0, len(tax), len(T))
    ranks = (
        [f'rank{d}' if d and r.random() < 0.7 else None for d in tax.depths] if named else [int(o) for o in tax.depths]
    )
    got, want = (
        (rank_accuracy(A, T, tax.with_ranks(ranks), 'rank') if named else rank_accuracy(A, T, tax)),
        slow_ranks(tax, A, T, ranks),
    )
    assert set(got.index) == set(want) and list(got.columns) == ['nodes', 'n', 'accuracy', 'macro']
    for k, v in want.items():
        assert tuple(got.loc[k]) == pytest.approx(v, nan_ok=True), k
    assert got.index.tolist() == sorted(want, key=lambda o: int(str(o).removeprefix('rank')))
    at = node_counts(A, T, tax)
    for v in range(len(tax)):
        assert at[:, v].tolist() == [
            sum(v in path(tax, t) for t in T),
            sum(v in path(tax, a) for a in A),
            sum(v in path(tax, t) and v in path(tax, a) for a, t in zip(A, T)),
        ]


@given(cases())
@slowly
def test_depths_average_to_hr(case):
    tax, P, T, r = case
    A = r.integers(0, len(tax), len(T))
    d = rank_accuracy(A, T, tax)
    assert (d.accuracy.fillna(0) * d.n).sum() == pytest.approx(hierarchical_f1(A, T, tax)[1] * tax.depths[T].sum())


def test_ranks_that_are_none_are_named():
    tax = Taxonomy.from_parents(TREE)
    T = tax.leaves
    with pytest.raises(HiermetricError, match='There are 2 ranks for 8 nodes'):
        tax.with_ranks(['x', None])
    with pytest.raises(HiermetricError, match="'a1' and a node above it are both of the rank 'x'"):
        rank_accuracy(T, T, tax.with_ranks([{'a': 'x', 'a1': 'x', 'c': 'y'}.get(o) for o in tax.names]))
    got = rank_accuracy(T, T, tax.with_ranks([{'a': 'upper', 'b1': 'lower', 'c': ''}.get(o) for o in tax.names]))
    assert got.index.tolist() == ['upper', 'lower'] and got.n.tolist() == [2, 1] and got.accuracy.tolist() == [1, 1]


# ---- every threshold -------------------------------------------------------------------------------------------------
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
    rows = metrics.row_chunks
    monkeypatch.setattr(metrics, 'row_chunks', lambda n, width: rows(n, width, 7 * width))
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


# ---- other people's implementations ----------------------------------------------------------------------------------
def labels(tax, nodes):  # for hiclass: the path below the root, one label a level
    return [[f'{o}' for o in path(tax, v)[:-1][::-1]] + [''] * (tax.height - len(path(tax, v)) + 1) for v in nodes]


@given(cases())
@slowly
def test_hf_equals_hiclass(case):
    tax, P, T, r = case
    A = r.integers(1, len(tax), len(T))
    T = np.maximum(T, 1)  # hiclass divides by zero for the root
    for average in 'micro', 'macro':
        want = [
            getattr(hiclass_metrics, o)(
                labels(tax, T),
                labels(tax, A),
                average=average,
                **({'zero_division': 0.0} if o == 'f1' and average == 'micro' else {}),
            )
            for o in ('precision', 'recall')
        ]
        assert hierarchical_f1(A, T, tax, average)[:2] == pytest.approx(want)
    hp, hr, hf = hierarchical_f1(A, T, tax)
    if hp:
        assert hf == pytest.approx(hiclass_metrics.f1(labels(tax, T), labels(tax, A)))


# the examples of hiclass's own docstrings and tests: lists of labels a level, true and predicted
HICLASS = [
    ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [6, 7, 8]]),
    ([[1, 2, 3, 4], [1, 2, 5, 6]], [[1, 2, 5, 6], [1, 2, 3, 4]]),
    ([[1, 2], [1, 2]], [[1, 2, 5, 6], [1, 2, 3, 4]]),
    ([[1, 2, 5, 6], [1, 2, 3, 4]], [[1, 2], [1, 2]]),
]


@pytest.mark.parametrize('true,pred', HICLASS)
@pytest.mark.parametrize('average', ['micro', 'macro'])
def test_hf_on_the_examples_of_hiclass(true, pred, average):
    tax = Taxonomy.from_edges(sorted({(str(a), str(b)) for o in true + pred for a, b in zip(['root', *o], o)}))
    nodes = lambda rows: np.array([tax.index(str(o[-1])) for o in rows])
    want = [getattr(hiclass_metrics, f)(true, pred, average=average) for f in ('precision', 'recall', 'f1')]
    assert hierarchical_f1(nodes(pred), nodes(true), tax, average) == pytest.approx(want)


def flat(n):
    return Taxonomy.from_parents({'root': None} | {f'c{i:03}': 'root' for i in range(n)})


def test_leaf_measures_equal_torchmetrics_and_sklearn():
    tax, r = flat(12), np.random.default_rng(0)
    p = torch.as_tensor(r.dirichlet(np.ones(12) * 0.4, 500))
    y = torch.as_tensor(r.integers(0, 12, 500))
    y[:300] = p[:300].argmax(1)
    e = evaluate(tax.node_probs(p), tax.tensor('leaves')[y], tax)
    assert e['top1'] == pytest.approx(multiclass_accuracy(p, y, 12, average='micro').item())
    assert e['top5'] == pytest.approx(multiclass_accuracy(p, y, 12, average='micro', top_k=5).item())
    assert e['macro_top1'] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert e['ece'] == pytest.approx(multiclass_calibration_error(p, y, 12, n_bins=15, norm='l1').item(), abs=1e-6)
    assert e['nll'] == pytest.approx(torch.nn.functional.nll_loss(p.log(), y).item())
    assert e['severity'] == 1 and e['hd@1'] == pytest.approx(1 - e['top1'])  # in a flat tree all mistakes cost 1
    assert e['hd@5_floor'] == pytest.approx(4 / 5) and e['hd@20_floor'] == pytest.approx(11 / 12)


# ---- the stateful twin -----------------------------------------------------------------------------------------------
@given(cases())
@settings(max_examples=25, deadline=None)
def test_stateful_equals_functional_whatever_the_batches(case):
    tax, P, T, r = case
    if tax.height < 4:
        tax = tax.with_ranks([int(o) % 3 or None for o in tax.depths])
    whole = evaluate(P, T, tax)
    every = {k: TreeMetric(tax, k) for k in ('top1', 'macro_top1', 'severity', 'hd@20', 'hf1', 'ece')}
    m = TreeMetric(tax)
    cuts = sorted(r.integers(0, len(T) + 1, 3))
    parts = [o for o in np.split(np.arange(len(T)), cuts) if len(o)]
    for o in parts:
        m.update(torch.as_tensor(P[o]), torch.as_tensor(T[o]))
        for e in every.values():
            e.update(P[o], T[o])
    assert_same(m.compute(), whole)
    pd.testing.assert_frame_equal(
        m.by_rank(), rank_accuracy(per_sample(P, T, tax).node.to_numpy(), T, tax), check_dtype=False
    )
    for k, e in every.items():
        assert float(e.compute()) == pytest.approx(whole[k], abs=1e-6, nan_ok=True)
    m.reset()
    m.update(P[:1], T[:1])
    assert_same(m.compute(), evaluate(P[:1], T[:1], tax))


def test_forward_gives_the_batch_and_keeps_the_sum():
    tax = flat(4)
    P = tax.node_probs(np.eye(4))
    m = TreeMetric(tax, 'top1')
    assert (
        float(m(P[:2], tax.leaves[[0, 0]])) == 0.5
        and float(m(P[2:], tax.leaves[[2, 3]])) == 1.0
        and float(m.compute()) == 0.75
    )
    assert float(m.clone().compute()) == 0.75
    assert TreeMetric(tax)(P, tax.leaves)['hf1'] == 1.0


def test_rows_of_a_table_may_be_drawn():
    "What a paired bootstrap does: the metrics of drawn rows are those of the drawn images"
    tax, r = flat(6), np.random.default_rng(1)
    P, T = tax.node_probs(r.dirichlet(np.ones(6), 40)), r.choice(tax.leaves, 40)
    table = per_sample(P, T, tax)
    draw = r.integers(0, 40, 40)
    assert_same(summarise(table.iloc[draw]), evaluate(P[draw], T[draw], tax))


# ---- known mistakes of METHODS §9 ------------------------------------------------------------------------------------
TREE = {'root': None, 'a': 'root', 'b': 'root', 'a1': 'a', 'a2': 'a', 'b1': 'b', 'b2': 'b', 'c': 'root'}


def test_distances_belong_to_the_leaf_that_is_named():
    """not: the nearest leaf's distance looked up with the index of the most similar one, or similarities printed as
    distances"""
    tax = Taxonomy.from_parents(TREE)
    P = tax.node_probs(np.array([[0, 0.1, 0.7, 0.2, 0]]))
    t = np.array([tax.index('a1')])
    row = per_sample(P, t, tax).iloc[0]
    assert (
        list(tax.leaf_names) == ['a1', 'a2', 'b1', 'b2', 'c'] and tax.names[int(row.node)] == 'b1' and row['hd@1'] == 2
    )
    ranking = 1 - P[:, tax.leaves]  # the reverse order: another answer and other distances, the same probabilities
    other = per_sample(P, t, tax, ranking=ranking).iloc[0]
    assert (
        tax.names[int(other.node)] == 'a1'
        and other['hd@1'] == 0
        and other.confidence == row.confidence
        and other.nll == row.nll
    )
    assert row['hd@5'] == other['hd@5'] == (0 + 1 + 2 + 2 + 2) / 5


def test_precision_does_not_depend_on_classes_that_are_not_there():
    "not: hierarchical precision divided by a sum over all classes"
    big = Taxonomy.from_parents(TREE | {f'x{i}': 'b' for i in range(50)} | {f'y{i}': 'x0' for i in range(50)})
    small = Taxonomy.from_parents(TREE)
    for names, want in [
        ((['a1', 'b1'], ['a1', 'b1']), (1, 1, 1)),
        ((['a1', 'b1'], ['a2', 'b']), (2 / 4, 2 / 3, 4 / 7)),
    ]:
        for tax in small, big:
            assert hierarchical_f1(*(np.array(tax.index(o)) for o in names), tax) == pytest.approx(want)


def test_an_image_is_judged_alone():
    "not: results that depend on the other samples of the batch"
    tax, r = Taxonomy.from_parents(TREE), np.random.default_rng(0)
    P, T = tax.node_probs(r.dirichlet(np.ones(5), 30)), r.integers(0, len(tax), 30)
    whole = per_sample(P, T, tax)
    for i in range(30):
        np.testing.assert_array_equal(per_sample(P[i : i + 1], T[i : i + 1], tax).values[0], whole.values[i])


def test_a_shallow_leaf_keeps_its_probability():
    tax = Taxonomy.from_parents(TREE)
    P = tax.node_probs(np.array([[0.1, 0.1, 0.1, 0.1, 0.6]]))
    e = evaluate(P, np.array([tax.index('c')]), tax)
    assert e['top1'] == 1 and e['nll'] == pytest.approx(-math.log(0.6))


def test_namesakes_under_two_parents_are_two_nodes():
    tax = Taxonomy.from_paths([('a', 'other'), ('a', 'x'), ('b', 'other'), ('b', 'y')])
    one, two = [int(o) for o in tax.leaves if tax.names[o].split('/')[-1] == 'other']
    assert mistake_height(one, two, tax) == 2 and mistake_severity(np.array([one]), np.array([two]), tax) == 2


def test_k_beyond_the_number_of_leaves_averages_them_all():
    tax = Taxonomy.from_parents(TREE)
    s = np.random.default_rng(0).random((4, 5))
    t = tax.leaves[[0, 1, 2, 3]]
    assert (
        hierarchical_distance(s, t, tax, 20)
        == hierarchical_distance(s, t, tax, 5)
        == pytest.approx((0 + 1 + 2 + 2 + 2) / 5)
        == distance_floor(t, tax, 20).mean()
    )


# ---- odd trees, types, violations, errors ----------------------------------------------------------------------------
def test_one_node_and_chains():
    one = Taxonomy.from_parents({'only': None})
    e = evaluate(np.ones((3, 1)), np.zeros(3, int), one)
    assert e['top1'] == 1 and e['hd@20'] == 0 and e['hf1'] == 1 and e['nll'] == 0 and math.isnan(e['severity'])
    chain = Taxonomy.from_parents({'a': None, 'b': 'a', 'c': 'b'})
    e = evaluate(np.ones((1, 3)), np.array([1]), chain)
    assert (
        e['top1'] == 1
        and e['exact'] == 0
        and e['hp'] == 0.5
        and e['hr'] == 1
        and e['n_leaf'] == 0
        and math.isnan(e['brier'])
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype):
    tax, r = flat(6), np.random.default_rng(0)
    P = torch.as_tensor(tax.node_probs(r.dirichlet(np.ones(6), 9)))
    t = torch.as_tensor(r.choice(tax.leaves, 9))
    want, got = evaluate(P, t, tax), evaluate(P.to(dtype), t.int(), tax)
    assert (
        got['nll'] == pytest.approx(want['nll'], rel=0.02)
        and got['brier'] == pytest.approx(want['brier'], rel=0.02)
        and all(isinstance(o, float) for o in got.values())
    )


def test_ties_go_to_the_first_leaf_of_the_tree_on_every_path():
    for L in 3, 30, 3000:
        s = torch.zeros(2, L)
        s[1, 2] = 1
        assert rank_leaves(s, 3).tolist() == [[0, 1, 2], [2, 0, 1]]


def test_independent_outputs_gain_nothing_by_shouting():
    tax = flat(4)
    loud = evaluate(np.ones((2, 5)), tax.leaves[:2], tax)
    assert loud['nll'] == pytest.approx(math.log(4)) and loud['brier'] == pytest.approx(0.75)


def test_violations_are_counted():
    tax = Taxonomy.from_parents(TREE)
    r = np.random.default_rng(0)
    p = r.random((50, len(tax)))
    p[:, 0] = 1
    edges = [(i, tax.parents[i]) for i in range(1, len(tax))]
    for threshold in None, 0.5:
        bad = [
            [p[b, c] > p[b, q] + 1e-3 if threshold is None else p[b, c] > 0.5 >= p[b, q] for c, q in edges]
            for b in range(50)
        ]
        assert violation_rate(p, tax, threshold) == pytest.approx((np.mean(np.any(bad, 1)), np.mean(bad)))


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda P, t: (P * np.nan, t), "node_probs is nan for image 0 at 'root'"),
        (lambda P, t: (P[:, :-1], t), r'shape \(3, 6\), but this tree needs \(images, 7\)'),
        (lambda P, t: (P[0], t), 'shape'),
        (lambda P, t: (P * 9 - 4, t), 'Are these logits'),
        (lambda P, t: (P * 0.5, t), 'must be 1 at the root'),
        (lambda P, t: (np.ones((3, 7)) - np.eye(7)[[1]] * 0.5, t), "and its parent 'a' only 0.5"),
        (lambda P, t: (P, t + 99), "target of image 0 is 10[0-9], outside the tree's node ids 0…6"),
        (lambda P, t: (P, -t), 'outside the tree'),
        (lambda P, t: (P, t[:2]), '2 targets for 3 images'),
        (lambda P, t: (P, t.astype(float)), 'integers'),
        (lambda P, t: (P[:0], t[:0]), 'no images'),
    ],
)
def test_bad_input_is_named(change, message):
    tax = Taxonomy.from_parents({'root': None, 'a': 'root', 'a1': 'a', 'a2': 'a', 'b': 'root', 'b1': 'b', 'b2': 'b'})
    P = tax.node_probs(np.full((3, 4), 0.25))
    t = tax.leaves[:3].astype(int)
    with pytest.raises(HiermetricError, match=message):
        evaluate(*change(P, t), tax)


def test_bad_answers_and_rankings_are_named():
    tax = flat(4)
    P, t = tax.node_probs(np.eye(4)), tax.leaves
    with pytest.raises(HiermetricError, match='answer of image 1 is 77'):
        evaluate(P, t, tax, nodes=np.array([1, 77, 1, 1]))
    with pytest.raises(HiermetricError, match=r'ranking has shape \(4, 5\)'):
        evaluate(P, t, tax, ranking=P)
    with pytest.raises(HiermetricError, match='score of image 2 for a leaf is NaN'):
        evaluate(P, t, tax, ranking=np.where(np.eye(4) * np.arange(4) == 2, np.nan, P[:, 1:]))
    with pytest.raises(HiermetricError, match="no metric 'hd5'.*Did you mean"):
        TreeMetric(tax, 'hd5')
