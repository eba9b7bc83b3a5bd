"All metrics against a slow and obvious version, on random ragged trees."

import math
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from hiermetric.core import HiermetricError
from hiermetric.judging.metrics import (
    brier_score,
    evaluate,
    expected_calibration_error,
    negative_log_likelihood,
    per_sample,
    summarise,
    violation_rate,
)
from hiermetric.judging.tree_metric import TreeMetric
from hiermetric.judging.mistakes import (
    accuracy,
    correctness,
    distance_floor,
    exact_path,
    hierarchical_distance,
    hierarchical_f1,
    information_scores,
    macro_accuracy,
    mistake_height,
    mistake_severity,
    topk_accuracy,
)
from hiermetric.trees.arithmetic import leaf_distribution
from hiermetric.trees.taxonomy import Taxonomy
from metric_cases import TREE, assert_same, cases, flat, path, slow_d, slow_information, slow_rank, slowly


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


def test_rows_of_a_table_may_be_drawn():
    "What a paired bootstrap does: the metrics of drawn rows are those of the drawn images"
    tax, r = flat(6), np.random.default_rng(1)
    P, T = tax.node_probs(r.dirichlet(np.ones(6), 40)), r.choice(tax.leaves, 40)
    table = per_sample(P, T, tax)
    draw = r.integers(0, 40, 40)
    assert_same(summarise(table.iloc[draw]), evaluate(P[draw], T[draw], tax))


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
