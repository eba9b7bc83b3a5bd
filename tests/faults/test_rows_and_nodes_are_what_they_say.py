"Rows, node ids and counts are whole numbers in range, masks are masks, and everything else is refused in one sentence"

import numpy as np, pandas as pd, pytest, torch
from hiermetric import judging as metrics
from hiermetric.core import HiermetricError
from hiermetric.judging.rules import create_rule
from hiermetric.trees.ranks import lift
from hiermetric.seeing.layouts import plot_neighbours
from hiermetric.seeing.maps import toward_node
from hiermetric.images.features import Features
from hiermetric.heads.model import EmbeddingNet
from hiermetric.heads.contract import create_head
from hiermetric.judging.metrics import evaluate
from hiermetric.trees.arithmetic import leaf_counts, truth_probability
from hiermetric.similarity.index import Index
from hiermetric.similarity.search import Neighbours, kmeans, neighbours, vote_probs
from hiermetric.similarity.scores import ideal_gains, ranking_scores, retrieval_scores
from hiermetric.similarity.protocol import unseen_protocol
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.known import Outputs, draw_species, hold_out, placement_scores
from hiermetric.judging.detectors import create_detector, node_prototypes
from hiermetric.judging.placements import create_placement

TREE = Taxonomy.from_paths(
    [('an', 'mam', 'cat'), ('an', 'mam', 'dog'), ('an', 'bird', 'owl'), ('an', 'bird', 'auk'), ('pl', 'oak')]
)
N, LEAVES, RNG = len(TREE), TREE.leaves.astype(np.int64), np.random.default_rng(0)
LABELS = np.repeat(LEAVES, 4)
X = RNG.normal(size=(len(LABELS), 6)).astype('f4')
PROBS = TREE.node_probs(RNG.dirichlet(np.ones(TREE.n_leaves), len(LABELS)))
FEATURES = Features(X, LABELS, np.tile(['train', 'train', 'val', 'test'], TREE.n_leaves), TREE, {})


def refused(call, *words):
    with pytest.raises(HiermetricError) as e:
        call()
    said = str(e.value)
    assert '\n' not in said and all(o in said for o in words), said


NO_NODES = {
    'fraction': [1.7],
    'whole fraction': [2.0],
    'boolean': [True],
    'negative': [-1],
    'too large': [N],
    'far too large': [2**70],
    'nothing': [None],
    'fraction among names': ['cat', 1.7],
    'boolean among names': ['cat', True],
    'NaN': [float('nan')],
}


@pytest.mark.parametrize('what', NO_NODES)
@pytest.mark.parametrize(
    'ask',
    [
        lambda o: TREE.lca(o, 0),
        lambda o: TREE.is_ancestor(0, o),
        lambda o: TREE.edge_distance(o, o),
        lambda o: TREE.multi_hot(o),
        lambda o: TREE.subset(o),
        lambda o: TREE.spanning(o),
        lambda o: TREE.prune(keep=o),
        lambda o: TREE.cost_matrix(rows=o),
        lambda o: TREE.ancestors(o[-1]),
        lambda o: TREE.children(o[-1]),
        lambda o: TREE.path(o[-1]),
        lambda o: TREE.rank(o[-1]),
        lambda o: hold_out(FEATURES, o),
        lambda o: draw_species(FEATURES, 1, exclude=o),
        lambda o: Index(X, LABELS, TREE).remove(nodes=o),
        lambda o: TREE.at(o),
        lambda o: unseen_protocol((X, X), (X, X), LABELS, LABELS, TREE, o),
        lambda o: lift(TREE, o),
        lambda o: toward_node(create_head('classifier', 6, TREE), o[-1]),
    ],
)
def test_what_is_no_node_is_refused(what, ask):
    refused(lambda: ask(NO_NODES[what]))


def test_a_mask_is_no_list_of_nodes_and_shapes_must_go_together():
    mask = TREE.heights == 0
    for ask in (
        lambda: TREE.subset(mask),
        lambda: TREE.multi_hot(torch.as_tensor(mask)),
        lambda: hold_out(FEATURES, mask),
        lambda: lift(TREE, mask),
        lambda: TREE.at(mask),
        lambda: TREE.at(True),
    ):
        refused(ask)
    refused(lambda: TREE.lca([1, 2, 3], [1, 2]), '(3,) and (2,)')
    refused(lambda: TREE.lca([[1], [2, 3]], 0))
    refused(lambda: TREE.path([1, 2]), 'One node')
    refused(lambda: TREE.ancestors([]), 'One node')


def test_nodes_by_any_integer_by_name_or_by_both():
    owl = TREE.index('owl')
    for o in (owl, np.int64(owl), np.uint8(owl), 'owl', torch.tensor(owl)):
        assert TREE.path(o) == 'root/an/bird/owl' and TREE.ancestors(o)[-1] == owl
    assert list(TREE.lca([owl, 'cat'], 'owl')) == [owl, TREE.index('an')] and TREE.subset([owl, 'cat']).n_leaves == 2
    assert list(TREE.lca(pd.Series([owl, 1], dtype='Int64'), 'owl')) == [owl, 1 if TREE.is_ancestor(1, owl) else 0]
    numbered = Taxonomy.from_paths([('a', '1'), ('a', '2'), ('b', '3')])
    assert (
        numbered.path(1) == 'root/a' and numbered.path('1') == 'root/a/1'
    )  # a number is an id, also where a node is called so
    assert numbered.lca(np.array([1, 1], object), 1).tolist() == [1, 1]


NO_LABELS = {
    'fraction': LABELS + 0.5,
    'float': LABELS.astype(float),
    'mask': LABELS > 3,
    'negative': LABELS - 99,
    'outside': LABELS + N,
    'table': LABELS[:, None],
    'few': LABELS[1:],
    'none': LABELS[:0],
    'names': np.array(['cat'] * len(LABELS)),
}
Q = torch.as_tensor(PROBS)[:, LEAVES]


@pytest.mark.parametrize('what', NO_LABELS)
@pytest.mark.parametrize(
    'ask',
    [
        lambda o: evaluate(PROBS, o, TREE),
        lambda o: evaluate(PROBS, LABELS, TREE, nodes=o),
        lambda o: metrics.topk_accuracy(Q, o, TREE),
        lambda o: metrics.accuracy(o, LABELS, TREE),
        lambda o: metrics.accuracy(LABELS, o, TREE),
        lambda o: metrics.macro_accuracy(o, LABELS, TREE),
        lambda o: metrics.mistake_severity(LABELS, o, TREE),
        lambda o: metrics.hierarchical_f1(o, LABELS, TREE),
        lambda o: metrics.correctness(LABELS, o, TREE),
        lambda o: metrics.information_scores(o, LABELS, TREE),
        lambda o: metrics.node_counts(LABELS, o, TREE),
        lambda o: truth_probability(Q, o, TREE),
        lambda o: metrics.negative_log_likelihood(Q, o, TREE),
        lambda o: metrics.brier_score(Q, o, TREE),
        lambda o: create_rule('guarantee').fit(PROBS, o, TREE),
        lambda o: create_rule('conformal_set').fit(PROBS, o, TREE),
        lambda o: Index(X, o, TREE),
        lambda o: Index(X, LABELS, TREE).add(X, o),
        lambda o: node_prototypes(torch.as_tensor(X), o, TREE),
        lambda o: retrieval_scores(X, o, tax=TREE),
        lambda o: placement_scores(o, LABELS, TREE, np.ones(TREE.n_leaves, bool)),
        lambda o: create_placement('blend').fit(Outputs(X, Q, PROBS), o, TREE),
    ],
)
def test_what_is_no_label_is_refused(what, ask):
    refused(lambda: ask(NO_LABELS[what]))


@pytest.mark.parametrize('what', [o for o in NO_LABELS if o not in ('few', 'none', 'table')])
@pytest.mark.parametrize(
    'ask',
    [
        lambda o: metrics.distance_floor(o, TREE, 5),
        lambda o: vote_probs(neighbours(X, X, 3), o, TREE),
        lambda o: ideal_gains(LABELS, o, TREE, 3),
        lambda o: ideal_gains(o, LABELS, TREE, 3),
    ],
)
def test_what_is_no_label_is_refused_where_any_number_will_do(what, ask):
    refused(lambda: ask(NO_LABELS[what]))


@pytest.mark.parametrize('bad', [LABELS - 99, LABELS + N, LABELS + 0.5, LABELS > 3])
def test_counting_leaves(bad):
    refused(lambda: leaf_counts(torch.as_tensor(bad), TREE))


def test_answers_and_truths_must_be_as_many():
    for f in (metrics.exact_path,):
        refused(lambda: f(LABELS, LABELS[1:]))
        refused(lambda: f([], []))
    refused(lambda: metrics.topk_accuracy(PROBS, LABELS, TREE), 'one score for each of')
    refused(
        lambda: metrics.negative_log_likelihood(PROBS, LABELS, TREE), 'one score'
    )  # a column a node is no column a leaf


# ---- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'own',
    [
        np.arange(20) + 0.7,
        np.arange(20).astype(float),
        np.ones(20, bool),
        np.arange(20) - 2,
        np.arange(20) + 1,
        np.arange(19),
    ],
)
def test_own_rows(own):
    for find in (lambda: neighbours(X, X, 3, own=own), lambda: Index(X, LABELS, TREE).search(X, 3, own=own)):
        refused(find, 'own must hold')


def test_own_rows_of_any_integer_type():
    want = neighbours(X, X, 3, own=True).rows
    for o in (np.arange(20), np.arange(20, dtype=np.int16), torch.arange(20), list(range(20))):
        assert torch.equal(neighbours(X, X, 3, own=o).rows, want)
    assert torch.equal(neighbours(X, X, 3, own=np.full(20, -1)).rows[:, 0], torch.arange(20))


def test_neighbours_of_another_gallery():
    for rows in ([[0, 20]], [[0, -2]]):
        refused(
            lambda: vote_probs(Neighbours(torch.tensor(rows), torch.zeros(1, 2)), LABELS, TREE),
            'the gallery has 20 labels',
        )
    for nearest in ([[0, 20]], [[0.5, 1]], [0, 1], [[True, False]]):
        refused(lambda: plot_neighbours([None], [None] * 20, np.array(nearest), LABELS[:1], LABELS, TREE))


@pytest.mark.parametrize('bad', [0, -1, 1.5, 2.0, True, np.True_, np.float64(3), '3', None])
@pytest.mark.parametrize(
    'ask',
    [
        lambda k: neighbours(X, X, k),
        lambda k: Index(X, LABELS, TREE).search(X, k),
        lambda k: Index(X, LABELS, TREE, effort=k),
        lambda k: kmeans(X, k),
        lambda k: ranking_scores(np.ones((2, 3), bool), np.ones(2, int), k=(k,)),
        lambda k: retrieval_scores(X, LABELS, tax=TREE, k=[1, k]),
        lambda k: metrics.rank_leaves(Q, k),
        lambda k: metrics.topk_accuracy(Q, LABELS, TREE, k),
        lambda k: metrics.distance_floor(LABELS, TREE, k),
        lambda k: metrics.calibration_bins([0.5], [1], k),
        lambda k: create_detector('knn', k=k),
        lambda k: create_placement('steps', steps=k),
        lambda k: draw_species(FEATURES, k),
        lambda k: create_head('classifier', k, TREE),
        lambda k: EmbeddingNet(k, 3),
        lambda k: EmbeddingNet(3, k),
        lambda k: create_head('semantic', k, TREE),
    ],
)
def test_counts_are_whole_numbers(bad, ask):
    refused(lambda: ask(bad), 'must be 1, 2, 3, …')


@pytest.mark.parametrize('k', [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_counts_of_any_integer_type(k):
    assert torch.equal(neighbours(X, X, k).rows, neighbours(X, X, 3).rows) and torch.equal(
        Index(X, LABELS, TREE).search(X, k).rows, neighbours(X, X, 3).rows
    )
    assert (
        kmeans(X, k)[1].shape == (3, 6)
        and metrics.rank_leaves(Q, k).shape == (len(Q), 3)
        and create_detector('knn', k=k).k == 3
        and create_placement('steps', steps=k).steps == 3
        and len(draw_species(FEATURES, k)) == 3
    )
    a, b = (retrieval_scores(X, LABELS, tax=TREE, k=o)['leaf'] for o in ((k,), (3,)))
    assert list(a) == list(b) and a.equals(b)
    assert create_head('classifier', k, TREE).in_features == 3 and metrics.calibration_bins([0.5], [1], k).shape == (
        3,
        3,
    )
    assert retrieval_scores(X, LABELS, tax=TREE, at=(np.int64(1),)).keys() == {1, 'graded'}


def test_no_k_at_all():
    for ask in (
        lambda: retrieval_scores(X, LABELS, tax=TREE, k=()),
        lambda: ranking_scores(np.ones((2, 3), bool), np.ones(2, int), k=[]),
    ):
        refused(ask, 'needs a k')
    refused(lambda: ranking_scores(np.full((2, 3), 0.3), np.ones(2, int)), 'true or false')


# ---- held out twice --------------------------------------------------------------------------------------------------
def test_holding_out_twice_keeps_both():
    once = hold_out(FEATURES, ['cat'])
    twice = hold_out(once, [TREE.index('owl')])
    again = hold_out(twice, 'cat')
    for o in (twice, again):
        assert o.meta['held_out'] == ['root/an/mam/cat', 'root/an/bird/owl']
        assert (
            set(o.targets[o.split == 'unseen']) == set(TREE.index(['cat', 'owl']))
            and not np.isin(TREE.index(['cat', 'owl']), o.targets[o.split != 'unseen']).any()
        )
