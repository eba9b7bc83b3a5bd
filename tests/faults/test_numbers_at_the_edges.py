"""At the edges of what numbers can be (a bin's edge, one image, one class, no image, half precision, arrays) the right
value comes out, or one sentence"""

from fractions import Fraction
import numpy as np, pytest, torch
from hiermetric import judging as metrics
from hiermetric.core import HiermetricError
from hiermetric.judging.calibration import LevelTemperatures, NodeIsotonic, TemperatureScaling
from hiermetric.judging.guarantee import class_ratios
from hiermetric.judging.rules import create_rule, list_rules
from hiermetric.seeing.embedding_plots import cophenetic_correlation, overlap, pair_distances, prototype_linkage
from hiermetric.seeing.layouts import embedding_map, umap_layout
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.judging.metrics import calibration_bins, evaluate, expected_calibration_error
from hiermetric.trees.arithmetic import leaf_counts, leaf_distribution, truth_probability
from hiermetric.heads.paths import semantic_vectors
from hiermetric.similarity.scores import nmi
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.known import Outputs, balanced, model_outputs
from hiermetric.judging.detectors import auroc, create_detector, list_detectors, node_prototypes
from hiermetric.judging.placements import create_placement, list_placements


def random_tree(n, seed):
    "n nodes, each below any of those before it"
    rng = np.random.default_rng(seed)
    return Taxonomy.from_parents({'n0': None, **{f'n{i}': f'n{rng.integers(i)}' for i in range(1, n)}})


TREES = [
    Taxonomy.from_parents({'life': None}),
    Taxonomy.from_parents({'life': None, 'a': 'life'}),
    Taxonomy.from_paths({'a': 'x/y'}),
    Taxonomy.from_paths([('an', 'mam', 'cat'), ('an', 'mam', 'dog'), ('an', 'bird', 'owl'), ('pl', 'oak')]),
    random_tree(20, 1),
    random_tree(40, 2),
]
TREE = TREES[3]


def refused(call, *words):
    with pytest.raises(HiermetricError) as e:
        call()
    said = str(e.value)
    assert '\n' not in said and all(o in said for o in words), said


# ---- bins ------------------------------------------------------------------------------------------------------------
def exact_bin(c, bins):
    return max(-(-c.numerator * bins // c.denominator) - 1, 0)  # right-closed, in whole numbers


@pytest.mark.parametrize('bins', [1, 7, 10, 15, 100, 1000])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_a_confidence_on_an_edge_falls_into_the_bin_that_it_closes(bins, dtype):
    said = [Fraction(k, bins) for k in range(bins + 1)] + [Fraction(k, 1000) for k in range(1001)]
    n = calibration_bins(np.array([float(o) for o in said]).astype(dtype), np.zeros(len(said)), bins)[0]
    np.testing.assert_array_equal(n, np.bincount([exact_bin(o, bins) for o in said], minlength=bins))


def test_bins_refuse_what_they_cannot_hold():
    for bins in (0, -1, 2.5, True):
        refused(lambda: expected_calibration_error([0.5], [1], bins), 'number of bins')
    for c, hit in (
        ([np.nan], [1]),
        ([1.2], [1]),
        ([-0.1], [1]),
        ([0.5], [np.nan]),
        ([0.5], [2]),
        ([0.5, 0.5], [1]),
        (0.5, 1),
    ):
        refused(lambda: calibration_bins(c, hit))
    refused(lambda: expected_calibration_error([], []), 'no images')
    assert calibration_bins([], [], 3).tolist() == [[0] * 3] * 3


# ---- nothing, or too little ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'ask',
    [
        lambda: nmi([], []),
        lambda: nmi([1], [1, 2]),
        lambda: nmi(np.ones((2, 2)), np.ones((2, 2))),
        lambda: auroc([], [1.0]),
        lambda: auroc([np.nan, 1.0], [2.0]),
        lambda: balanced([], []),
        lambda: balanced([1.0, 2.0], [0]),
        lambda: class_ratios(np.zeros((0, len(TREE))), TREE.leaves, TREE),
        lambda: create_rule('expected_cost', price=float('nan')),
        lambda: create_rule('expected_cost', price=float('inf')),
        lambda: create_rule('expected_cost', price='low'),
        lambda: overlap(np.array([]), np.array([1.0])),
        lambda: overlap(np.array([np.nan]), np.array([1.0])),
        lambda: overlap(np.array([0.0]), np.array([1.0]), bins=0),
        lambda: prototype_linkage(torch.ones(1, 3)),
        lambda: pair_distances(torch.ones(4, 2), TREE.leaves, TREE, pairs=0),
        lambda: cophenetic_correlation(torch.randn(TREE.n_leaves, 3), TREE, shuffles=-1),
        lambda: umap_layout(np.ones((5, 3), 'f4'), neighbours=5),
        lambda: umap_layout(np.ones((5, 3), 'f4'), neighbours=1),
        lambda: embedding_map(np.full((4, 2), np.nan), TREE.leaves.astype(int), TREE),
        lambda: embedding_map(np.zeros((4, 3)), TREE.leaves.astype(int), TREE),
        lambda: embedding_map(np.zeros((4, 2)), TREE.leaves.astype(int), TREE, split=['train']),
        lambda: metrics.accuracy([], [], TREE),
        lambda: semantic_vectors(TREE, 0),
        lambda: metrics.rank_leaves(np.zeros(4), 1),
        lambda: evaluate(np.zeros((0, len(TREE))), np.zeros(0, int), TREE),
    ],
)
def test_too_little_is_said_in_a_sentence(ask):
    refused(ask)


def test_labels_that_agree_or_have_nothing_to_do_with_each_other():
    assert (
        nmi([1, 1, 2], ['b', 'b', 'a']) == pytest.approx(1)
        and nmi([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0)
        and nmi([3], [4]) == 1
    )


@pytest.mark.long  # half a minute of compiling
def test_maps_of_few_points():
    pytest.importorskip('umap')
    for n in (3, 5):
        assert np.isfinite(
            umap_layout(np.random.default_rng(0).normal(size=(n, 4)).astype('f2'), neighbours=np.int64(2))
        ).all()


# ---- what a mistake costs --------------------------------------------------------------------------------------------
def slow_cost(tax, a, t, cost):
    up = lambda v: [v] + (up(int(tax.parents[v])) if v else [])
    if t in up(a):
        return 0
    c = next(o for o in up(a) if o in up(t))
    below = [len(up(v)) - len(up(c)) for v in range(len(tax)) if c in up(v)]
    return {
        'lca_height': max(below),
        'lca_depth_cost': max(len(up(v)) for v in range(len(tax))) - len(up(c)),
        'edge_distance': up(a).index(c) + up(t).index(c),
    }[cost]


@pytest.mark.parametrize('tax', TREES)
@pytest.mark.parametrize('cost', metrics.COSTS)
def test_costs_by_hand_and_their_floors(tax, cost):
    rng = np.random.default_rng(0)
    t, a = rng.integers(len(tax), size=(2, 25))
    D = np.array([[slow_cost(tax, int(j), int(i), cost) for j in tax.leaves] for i in t])
    np.testing.assert_array_equal(metrics.mistake_cost(tax.leaves, t[:, None], tax, cost), D)
    np.testing.assert_array_equal(
        metrics.mistake_cost(a, t, tax, cost), [slow_cost(tax, i, j, cost) for i, j in zip(a.tolist(), t.tolist())]
    )
    for k in (1, 3, 99):
        np.testing.assert_allclose(metrics.distance_floor(t, tax, k, cost), np.sort(D, 1)[:, :k].mean(1))
    P = tax.node_probs(rng.dirichlet(np.ones(tax.n_leaves), 25))
    e = evaluate(P, t, tax, ranking=-D.astype(float), cost=cost)
    for k in (5, 20):
        assert e[f'hd@{k}'] == pytest.approx(e[f'hd@{k}_floor'])
    free = evaluate(P, t, tax, cost=cost)
    assert all(
        free[k] == pytest.approx(v, nan_ok=True)
        for k, v in evaluate(P, t, tax).items()
        if not k.startswith('hd@') and k != 'severity'
    )
    q = leaf_distribution(P, tax)
    assert free['hd@1'] == pytest.approx(metrics.hierarchical_distance(q, t, tax, 1, cost)) and free[
        'severity'
    ] == pytest.approx(metrics.mistake_severity(tax.leaves[q.argmax(1).numpy()].astype(int), t, tax, cost), nan_ok=True)
    m = metrics.TreeMetric(tax, cost=cost)
    m.update(P[:9], t[:9])
    m.update(P[9:], t[9:])
    assert m.compute()['hd@5'] == pytest.approx(free['hd@5'])


def test_heights_and_depths_agree_on_the_levelled_tree():
    for tax in TREES[2:]:
        flat = tax.level_leaves()
        a, b = (
            metrics.mistake_cost(flat.leaves[:, None], flat.leaves, flat, o) for o in ('lca_height', 'lca_depth_cost')
        )
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            b, metrics.mistake_cost(tax.leaves[:, None], tax.leaves, tax, 'lca_depth_cost')
        )  # no levelling is needed for it
    refused(lambda: evaluate(TREE.node_probs(np.eye(4)), TREE.leaves.astype(int), TREE, cost='edges'), 'edge_distance')


# ---- rules -----------------------------------------------------------------------------------------------------------
def fitted(name, tax, seed=0):
    rng = np.random.default_rng(seed)
    V = tax.node_probs(rng.dirichlet(np.ones(tax.n_leaves), 30))
    t = tax.leaves[rng.integers(tax.n_leaves, size=30)].astype(int)
    return create_rule(name).fit(V, t, tax)


@pytest.mark.parametrize('name', list_rules().index)
@pytest.mark.parametrize('tax', TREES)
def test_rules_at_the_edges(name, tax):
    L, rng, rule = tax.n_leaves, np.random.default_rng(1), fitted(name, tax)
    for q in (
        rng.dirichlet(np.ones(L), 1),
        rng.dirichlet(np.full(L, 0.05), 6),
        np.eye(L),
        np.full((2, L), 1 / L),
        np.zeros((0, L)),
    ):
        P = tax.node_probs(q)
        want, ranked = rule(P), rule.rank(P)
        assert (
            want.shape == (len(P),)
            and ranked.shape == (len(P), L)
            and ((want >= 0) & (want < len(tax))).all()
            and np.isfinite(ranked).all()
        )
        for i in range(len(P)):
            assert rule(P[i : i + 1])[0] == want[i]  # one image is as good as many
        for o in (torch.as_tensor(P), torch.as_tensor(P).float()):
            assert torch.is_tensor(rule(o)) and rule(o).shape == want.shape
        for o in (P.astype('f2'), P.astype('f4')):
            assert rule(o).shape == want.shape  # any float type
        for o in (torch.as_tensor(P).half(), torch.as_tensor(P).bfloat16()):
            assert rule(o).shape == want.shape
    sure = rule(tax.node_probs(np.eye(L)))
    if name == 'conformal_set':
        assert tax.is_ancestor(sure, tax.leaves).all()
    elif name not in ('guarantee', 'rank_flags'):
        np.testing.assert_array_equal(sure, tax.leaves)
    if name in ('argmax', 'crm') and tax in TREES[:4]:
        assert (
            rule(torch.as_tensor(tax.node_probs(np.full((1, L), 1 / L))).float())[0] == tax.leaves[0]
        )  # ties in tree order


@pytest.mark.parametrize('name', list_rules().index)
def test_rules_refuse_what_is_no_probability(name):
    rule, P = fitted(name, TREE), TREE.node_probs(np.full((3, 4), 0.25))
    for bad in (np.nan, np.inf, -np.inf, -0.5, 1.5):
        Q = P.copy()
        Q[1, 3] = bad
        refused(lambda: rule(Q), 'image 1')
        refused(lambda: rule.rank(torch.as_tensor(Q)), 'image 1')
    refused(lambda: rule(P[:, 1:]), 'shape')
    refused(lambda: rule(P[0]), 'shape')


# ---- float types, arrays as well as tensors --------------------------------------------------------------------------
KINDS = {
    'double': lambda x: x.double(),
    'half': lambda x: x.half(),
    'bfloat16': lambda x: x.bfloat16(),
    'array': lambda x: x.numpy(),
    'double array': lambda x: x.double().numpy(),
    'half array': lambda x: x.half().numpy(),
}
X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
T = torch.as_tensor(np.resize(TREE.leaves, 24).astype(np.int64))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'head',
    [
        'classifier',
        'arcface',
        'path_softmax',
        'conditional',
        'arcface_levels',
        'attention',
        'semantic',
        'hxe',
        'hace',
        'soft_labels',
        'simple_hierarchy',
        'soft_max_margin',
        'logit_adjusted',
        'sphere_multi',
        'sphere_hier',
    ],
)
def test_models_take_any_float_type_and_arrays(kind, head):
    torch.manual_seed(0)
    model, x = Model(EmbeddingNet(8, 8, 'none'), create_head(head, 8, TREE)).eval(), KINDS[kind](X)
    with torch.no_grad():
        for f in ('embed', 'represent', 'node_probs', 'leaf_probs', '__call__'):
            torch.testing.assert_close(getattr(model, f)(x).float(), getattr(model, f)(X).float(), atol=0.1, rtol=0.1)
        torch.testing.assert_close(model.loss(x, T.numpy()).float(), model.loss(X, T).float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('cal', [TemperatureScaling, LevelTemperatures, NodeIsotonic])
def test_calibrations_take_any_float_type_and_arrays(kind, cal):
    P = TREE.node_probs((2 * X[:, :4]).double().softmax(1))
    want, got = (cal().fit(o, T, TREE).scale(o) for o in (P, KINDS[kind](P)))
    np.testing.assert_allclose(torch.as_tensor(got).double(), want, atol=0.03)
    for n in (1, 2):
        assert np.isfinite(cal().fit(P[:n], T[:n], TREE).scale(P).numpy()).all()


def outputs(kind):
    z = X[:, :4]
    return Outputs(*(KINDS[kind](o) if kind else o for o in (X, z, TREE.node_probs(z.softmax(1)))))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', [o for o in list_detectors().index if o != 'rehearsed'])
def test_detectors_take_any_float_type_and_arrays(kind, name):
    want, got = (create_detector(name).fit(o, T.numpy(), TREE).score(o) for o in (outputs(None), outputs(kind)))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', list_placements().index)
def test_placements_take_any_float_type_and_arrays(kind, name):
    want, got = (create_placement(name).fit(o, T, TREE).calibrate(o, T) for o in (outputs(None), outputs(kind)))
    assert (got(outputs(kind)) == want(outputs(None))).mean() > 0.9


def test_the_rest_takes_arrays():
    P = TREE.node_probs(X[:, :4].double().softmax(1))
    q = leaf_distribution(P, TREE)
    np.testing.assert_array_equal(leaf_distribution(P.numpy(), TREE), q)
    for f in (truth_probability, metrics.negative_log_likelihood, metrics.brier_score):
        np.testing.assert_array_equal(f(q.numpy(), T.numpy(), TREE), f(q, T, TREE))
    assert (
        metrics.topk_accuracy(q.numpy(), T.numpy(), TREE, 2) == metrics.topk_accuracy(q, T, TREE, 2)
        and metrics.accuracy(T, T, TREE) == 1
    )
    np.testing.assert_array_equal(node_prototypes(X.numpy(), T.numpy(), TREE), node_prototypes(X, T, TREE))
    np.testing.assert_array_equal(leaf_counts(T.numpy(), TREE), leaf_counts(T, TREE))
    model = Model(EmbeddingNet(8, 8, 'none'), create_head('classifier', 8, TREE))
    a, b = model_outputs(model, X.numpy()), model_outputs(model, X)
    assert torch.equal(a.node_probs, b.node_probs)


# ---- where the class vectors scale -----------------------------------------------------------------------------------
def test_a_root_with_one_child_changes_no_class_vector():
    bare = Taxonomy.from_paths({'cat': 'mam', 'dog': 'mam', 'owl': None})
    hung = Taxonomy.from_paths({'cat': ['life', 'mam'], 'dog': ['life', 'mam'], 'owl': ['life']})
    a, b = (semantic_vectors(o, 4)[o.leaves.astype(int)] for o in (bare, hung))
    torch.testing.assert_close(a @ a.T, b @ b.T)
    assert b[hung.leaf_names.index('owl')] @ b[hung.leaf_names.index('cat')] == pytest.approx(0, abs=1e-9)
