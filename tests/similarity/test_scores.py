"Scores of rankings against slow loops and against pytorch-metric-learning (hiermetric.similarity.scores)"

import math
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import normalized_mutual_info_score
from galleries import data, random_tree, slow_neighbours, slowly
from hiermetric.core import HiermetricError
from hiermetric.trees.geometry import DISTANCES
from hiermetric.similarity.scores import (
    evaluate_retrieval,
    graded_scores,
    ideal_gains,
    nmi,
    ranking_scores,
    retrieval_scores,
    tree_gains,
)
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')
# the first case of pytorch-metric-learning's tests/utils/test_calculate_accuracies.py: labels of five queries, labels
# of their neighbours, how many of the gallery match
CASE = (
    np.array([1, 1, 2, 3, 4]),
    np.array([[0, 1, 1, 2, 2], [1, 0, 1, 1, 3], [4, 4, 4, 4, 2], [3, 1, 3, 1, 3], [0, 0, 4, 2, 2]]),
    {1: 3, 2: 5, 3: 4, 4: 5},
)


def test_their_test_cases():
    "The numbers that their test expects, written out"
    y, knn, size = CASE
    s = ranking_scores(knn == y[:, None], [size[o] for o in y], k=(1, 2))
    assert s['precision@1'].mean() == 0.4
    assert np.allclose(s['r_precision'], [2 / 3, 2 / 3, 1 / 5, 2 / 4, 1 / 5])
    assert np.allclose(s['map@r'], [(1 / 2 + 2 / 3) / 3, (1 + 2 / 3) / 3, (1 / 5) / 5, (1 + 2 / 3) / 4, (1 / 3) / 5])
    own = ranking_scores(
        knn[:, 1:] == y[:, None], [size[o] - 1 for o in y]
    )  # the query itself was in the gallery and is left out
    assert own['precision@1'].mean() == 0.2
    assert np.allclose(own['r_precision'], [1, 1 / 2, 1 / 4, 1 / 3, 1 / 4]) and np.allclose(
        own['map@r'], [1, (1 / 2) / 2, (1 / 4) / 4, (1 / 2) / 3, (1 / 2) / 4]
    )
    by = pd.DataFrame({k: np.asarray(v) for k, v in own.items()}).groupby(y).mean().mean()
    assert np.isclose(by['precision@1'], (0.5 + 0 + 0 + 0) / 4)


def test_their_case_through_a_search():
    "Points on a line in their order: the reference holds the queries, every second label is 1"
    flat = Taxonomy.from_paths({f'c{i}': '' for i in range(10)})
    x = torch.arange(10.0)[:, None]
    t = flat.leaves.astype(np.int64)
    s = evaluate_retrieval(x, t, x, t, flat, metric='euclidean', graded=None, k=(1,))
    assert (s.loc['leaf', ['precision@1', 'r_precision', 'map@r']] == 1).all()


def theirs(q, t, g=None, tg=None, **kw):
    kw = dict(k='max_bin_count') | kw
    return AccuracyCalculator(
        device=torch.device('cpu'), exclude=('AMI', 'mean_reciprocal_rank', 'mean_average_precision'), **kw
    ).get_accuracy(
        q,
        torch.as_tensor(t),
        *(() if g is None else (g, torch.as_tensor(tg))),
        **({} if g is None else {'ref_includes_query': False}),
    )


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('average', ['images', 'classes'])
@pytest.mark.parametrize('own', [True, False])
def test_equal_to_pytorch_metric_learning(seed, average, own):
    "Random clusters of uneven size, classes of one image and classes that the gallery lacks among them"
    x, t, tax, r = data(seed, noise=2.0)
    t[:3] = np.setdiff1d(tax.leaves, t)[:3] if len(np.setdiff1d(tax.leaves, t)) > 2 else t[:3]
    args = (x, t) if own else (x[:80], t[:80], x[80:], t[80:])
    ours = evaluate_retrieval(
        *args, tax=tax, metric='euclidean', graded=None, average=average, clusters=own, k=(1,)
    ).loc['leaf']
    want = theirs(*args, avg_of_avgs=average == 'classes')
    assert np.isclose(ours['precision@1'], want['precision_at_1'], atol=1e-6)
    assert np.isclose(ours['r_precision'], want['r_precision'], atol=1e-6) and np.isclose(
        ours['map@r'], want['mean_average_precision_at_r'], atol=1e-6
    )
    if own:
        assert np.isclose(ours['nmi'], want['NMI'], atol=1e-6)  # the same k-means, on the same seed


def test_map_at_r_does_not_depend_on_k():
    """Known mistake: with k below the size of a class, something else was called MAP@R; theirs warns, ours fetches what
    is needed"""
    x, t, tax, _ = data(9, n=300, classes=3)
    assert np.bincount(t).max() > 60
    a, b = (evaluate_retrieval(x, t, tax=tax, metric='euclidean', graded=g, k=(1,)).loc['leaf'] for g in (None, 3))
    full = theirs(x, t)
    assert a['map@r'] == b['map@r'] and np.isclose(a['map@r'], full['mean_average_precision_at_r'])
    assert not np.isclose(
        theirs(x, t, k=5)['mean_average_precision_at_r'], full['mean_average_precision_at_r'], atol=0.05
    )
    with pytest.raises(HiermetricError, match='need the first'):
        ranking_scores(torch.ones(2, 5, dtype=torch.bool), [7, 3])


@slowly
@given(st.integers(0, 10**6))
def test_scores_are_those_of_the_loop(seed):
    r = np.random.default_rng(seed)
    B, n = 5, int(r.integers(2, 30))
    rel = r.random((B, n)) < 0.4
    R = rel.sum(1)
    s = ranking_scores(rel, R, k=(1, 3))
    for b in range(B):
        if not R[b]:
            assert all(math.isnan(v[b]) for v in s.values())
            continue
        assert s['precision@1'][b] == rel[b, 0] and s['recall@3'][b] == rel[b, :3].any()
        assert math.isclose(s['r_precision'][b], rel[b, : R[b]].sum() / R[b])
        assert math.isclose(
            s['map@r'][b], sum(rel[b, : i + 1].sum() / (i + 1) for i in range(R[b]) if rel[b, i]) / R[b], abs_tol=1e-12
        )


@slowly
@given(st.integers(0, 10**6), st.booleans())
def test_graded_scores_are_those_of_the_loop(seed, own):
    "The ideal ranking by sorting all gains, truths at leaves and inner nodes"
    r = np.random.default_rng(seed)
    tax = random_tree(r)
    g = r.integers(0, len(tax), 20)
    q = g[:6] if own else r.integers(0, len(tax), 6)
    k = int(r.integers(1, 25))
    gain = lambda u, v: 1.0 if u == v else 1 - tax.heights[tax.lca(int(u), int(v))] / tax.height
    ideal = ideal_gains(q, g, tax, k, own)
    for i, u in enumerate(q):
        best = sorted((gain(u, v) for j, v in enumerate(g) if not (own and i == j)), reverse=True)[:k]
        assert np.allclose(ideal[i, : len(best)], best) and (ideal[i, len(best) :] == 0).all()
    found = r.choice(g, (6, 4))
    got = tree_gains(q, found, tax)
    assert np.allclose(got, [[gain(u, v) for v in row] for u, row in zip(q, found)])
    s = graded_scores(got, ideal_gains(q, g, tax, 4), k=4)
    for i in range(6):
        best = sorted((gain(q[i], v) for v in g), reverse=True)
        assert (
            math.isclose(
                s['ahp@4'][i],
                np.mean([got[i, :j].sum() / sum(best[:j]) for j in range(1, 5) if sum(best[:j]) > 0] or [math.nan]),
                abs_tol=1e-9,
            )
            or sum(best[:4]) == 0
        )


@pytest.mark.parametrize('metric', DISTANCES)
def test_every_rank_and_several_labels_against_the_loop(metric):
    x, t, tax, r = data(11, n=90)
    order, _ = slow_neighbours(x, x, 89, metric, np.arange(90))
    scores = retrieval_scores(x, t, tax=tax, at=('leaf', 1, 2), metric=metric, graded=20)
    for at in ('leaf', 1, 2):
        c = tax.at(at)[t]
        for i in range(90):
            rel = (c[order[i]] == c[i]) & (c[i] >= 0)
            R = rel.sum()
            row = scores[at].iloc[i]
            if not R:
                assert row.isna().all()
                continue
            assert (
                row['precision@1'] == rel[0]
                and row['recall@10'] == rel[:10].any()
                and np.isclose(row['r_precision'], rel[:R].mean())
            )
    hot = r.random((90, 6)) < 0.3
    hot[0] = False  # one image without any label
    several = retrieval_scores(x, hot, metric=metric, graded=20)['labels']
    for i in range(90):
        both, either = (hot[order[i]] & hot[i]).sum(1), (hot[order[i]] | hot[i]).sum(1)
        rel, R = both > 0, (both > 0).sum()
        row = several.iloc[i]
        if not R:
            assert row.isna().all()
            continue
        assert (
            row['precision@1'] == rel[0]
            and np.isclose(row['r_precision'], rel[:R].mean())
            and np.isclose(row['map@r'], sum(rel[: j + 1].mean() for j in range(R) if rel[j]) / R)
        )
        g = both / np.maximum(either, 1)
        best = np.sort(g)[::-1]
        assert np.isclose(row['ahp@20'], np.mean([g[:j].sum() / best[:j].sum() for j in range(1, 21)]))


@slowly
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_nmi_is_scikit_learns(pairs):
    a, b = map(list, zip(*pairs))
    assert math.isclose(nmi(a, b), normalized_mutual_info_score(a, b), abs_tol=1e-9)
