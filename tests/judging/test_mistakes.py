"Costs, rankings and answers against slow and obvious versions, on random ragged trees."

import math
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from hiclass import metrics as hiclass_metrics
from hiermetric.core import HiermetricError
from hiermetric.judging.metrics import evaluate
from hiermetric.judging.mistakes import (
    distance_floor,
    hierarchical_distance,
    hierarchical_f1,
    mistake_height,
    mistake_severity,
    node_counts,
    rank_accuracy,
    rank_leaves,
)
from hiermetric.trees.taxonomy import Taxonomy
from metric_cases import TREE, cases, path, slow_d, slowly


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


def test_ties_go_to_the_first_leaf_of_the_tree_on_every_path():
    for L in 3, 30, 3000:
        s = torch.zeros(2, L)
        s[1, 2] = 1
        assert rank_leaves(s, 3).tolist() == [[0, 1, 2], [2, 0, 1]]
