"Decision rules against slow and obvious versions, on random ragged trees."

import json
import numpy as np, pytest, torch, warnings
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.judging.calibration import (
    Calibration,
    LevelTemperatures,
    NodeIsotonic,
    TemperatureScaling,
    rank_confidence,
)
from hiermetric.judging.rules import Rule, create_rule, expected_heights, list_rules, register_rule
from hiermetric.trees.taxonomy import Taxonomy
from rule_cases import cases, first_best, parents_of, path, random_tree, slowly, under

RULES = 'argmax', 'crm', 'hie'


VAGUE = 'threshold', 'climb', 'maxinfo'


LEARNED = [
    ('guarantee', {}),
    ('guarantee', dict(at='clade')),
    ('guarantee', dict(at='rank')),
    ('guarantee', dict(score='probability', sure=0.9)),
    ('conformal_set', {}),
]


def slow_height(tax, u, v):  # of the lowest common ancestor, by walking up
    up = [u, *parents_of(tax, u)]
    common = next(o for o in up if o == v or o in parents_of(tax, v))
    kids = [i for i in range(len(tax)) if common in parents_of(tax, i)]
    return max((len(parents_of(tax, i)) for i in kids), default=len(parents_of(tax, common))) - len(
        parents_of(tax, common)
    )


@given(cases())
@settings(max_examples=40, deadline=None)
def test_crm_is_the_matrix_product(case):
    tax, p, r = case
    C = np.array([[slow_height(tax, int(u), int(v)) for v in tax.leaves] for u in tax.leaves])
    P, cost = tax.node_probs(p), p @ C.T
    np.testing.assert_allclose(expected_heights(torch.as_tensor(P), tax), cost, atol=1e-9)
    rule = create_rule('crm').fit(tax=tax)
    np.testing.assert_allclose(rule.rank(P), -cost, atol=1e-9)
    chosen = tax.leaf_column[rule(P)]
    assert np.allclose(cost[np.arange(len(p)), chosen], cost.min(1), atol=1e-9)
    single = rule(P.astype(np.float32))
    assert np.allclose(cost[np.arange(len(p)), tax.leaf_column[single]], cost.min(1), atol=1e-4)


@given(cases())
@slowly
def test_crm_keeps_a_leaf_above_one_half(case):
    tax, p, r = case
    sure = p.max(1) > 0.5 + 1e-6
    assert (create_rule('crm').fit(tax=tax)(tax.node_probs(p))[sure] == tax.leaves[p.argmax(1)][sure]).all()


@given(cases())
@slowly
def test_hie_and_argmax_by_hand(case):
    tax, p, r = case
    P = tax.node_probs(p)
    fork = lambda v: next(
        (o for o in parents_of(tax, v) if len(tax.children(o)) > 1), 0
    )  # a parent of one child says nothing new
    want = np.array(
        [[p[b, j] * (P[b, fork(int(v))] if v else 1) for j, v in enumerate(tax.leaves)] for b in range(len(p))]
    )
    np.testing.assert_allclose(create_rule('hie').fit(tax=tax).rank(P), want, atol=1e-12)
    np.testing.assert_array_equal(
        create_rule('argmax').fit(tax=tax)(P), [tax.leaves[list(o).index(max(o))] for o in P[:, tax.leaves]]
    )


@given(cases(), st.sampled_from(RULES))
@slowly
def test_an_answer_does_not_depend_on_its_neighbours(case, name):
    tax, p, r = case
    P = tax.node_probs(p)
    rule = create_rule(name).fit(P, tax.leaves[p.argmax(1)], tax)
    for x in P, torch.as_tensor(P), torch.as_tensor(P).float():
        all_, order = rule(x), r.permutation(len(p))
        assert type(all_) is type(x) and type(rule.rank(x)) is type(x) and tuple(rule.rank(x).shape) == p.shape
        np.testing.assert_array_equal(rule(x[order]), all_[order])
        np.testing.assert_array_equal(rule.rank(x[order]), rule.rank(x)[order])
        for i in range(len(p)):
            np.testing.assert_array_equal(rule.rank(x[i : i + 1])[0], rule.rank(x)[i])
        np.testing.assert_array_equal(all_, tax.leaves[np.asarray(rule.rank(x)).argmax(1)])


@pytest.mark.parametrize('name', RULES)
def test_more_rows_than_a_chunk(name):
    "Rows are worked off in chunks of about four million numbers; the seams must not show"
    r = np.random.default_rng(0)
    tax = random_tree(3000, 300, r)
    z = torch.as_tensor(r.normal(size=(1500, tax.n_leaves))).float() * 3
    P = tax.node_probs(z.softmax(1))
    assert P.numel() > 2**22
    rule = create_rule(name).fit(tax=tax)
    whole = rule.rank(P)
    for i in 0, 1397, 1398, 1399, 1499:
        torch.testing.assert_close(rule.rank(P[i : i + 1])[0], whole[i], rtol=0, atol=0)


def test_a_shallow_leaf_keeps_its_probability():
    tax = Taxonomy.from_parents(
        {'root': None, 'lone': 'root', 'a': 'root', 'a1': 'a', 'a2': 'a', 'aa': 'a', 'aa1': 'aa', 'aa2': 'aa'}
    )
    P = tax.node_probs(np.array([{'lone': 0.6}.get(o, 0.1) for o in tax.leaf_names])[None])
    for name in RULES:
        assert tax.names[create_rule(name).fit(tax=tax)(P)[0]] == 'lone'
    assert create_rule('hie').fit(tax=tax).rank(P).max() == pytest.approx(0.6)  # its parent is the root


def test_incoherent_leaves_still_have_a_cost():
    "Node heads: leaves need not add up to their parents; the cost is then the one of the node probabilities"
    tax = Taxonomy.from_parents({'root': None, 'a': 'root', 'b': 'root', 'a1': 'a', 'a2': 'a'})
    P = np.zeros((1, 5))
    P[0, tax.index(['root', 'a', 'a1', 'a2', 'b'])] = 1, 0.9, 0.5, 0.1, 0.3
    got = dict(zip(tax.leaf_names, expected_heights(torch.as_tensor(P), tax)[0].tolist()))
    assert got == pytest.approx({'a1': 0.1 + 0.5, 'a2': 0.1 + 0.9, 'b': 2 * 0.7})


def test_a_rule_of_ones_own():
    class Root(Rule):
        "always the root"

        def __call__(self, node_probs):
            return np.zeros(len(node_probs), int)

    if 'root' not in list_rules().index:
        register_rule('root', Root, 'always the root')
    assert create_rule('root')([[1.0]]).tolist() == [0] and list_rules().loc['root', 'about'] == 'always the root'
    with pytest.raises(HiermetricError, match='exists already'):
        register_rule('crm', Root)


def test_no_images_no_answers():
    tax = random_tree(9, 3, np.random.default_rng(0))
    for name in RULES:
        rule = create_rule(name).fit(tax=tax)
        assert rule(np.ones((0, 9))).shape == (0,) and rule.rank(np.ones((0, 9))).shape == (0, tax.n_leaves)


def test_mistakes_are_named():
    tax = random_tree(9, 3, np.random.default_rng(0))
    P = tax.node_probs(np.full((2, tax.n_leaves), 1 / tax.n_leaves))
    with pytest.raises(HiermetricError, match="no rule 'argmix'.*Did you mean 'argmax'"):
        create_rule('argmix')
    with pytest.raises(HiermetricError, match='CRM has not been fitted'):
        create_rule('crm')(P)
    with pytest.raises(HiermetricError, match='HiE needs the tree'):
        create_rule('hie').fit(P, tax.leaves)
    rule = create_rule('crm').fit(tax=tax)
    with pytest.raises(HiermetricError, match='node_probs is nan for image 1'):
        rule(np.where(np.arange(2)[:, None] == 1, np.nan, P))
    with pytest.raises(HiermetricError, match='shape'):
        rule(P[:, 1:])
    with pytest.raises(HiermetricError, match='and its parent'):
        rule(np.where(np.arange(9) == 8, 1.001 + 0.0, P * 0.5 + (np.arange(9) == 0) * 0.5))


def slow_answer(name, tax, P, c):
    nodes = range(len(tax))
    sure = [v for v in nodes if P[v] >= c] or [0]
    if name == 'threshold':
        return first_best(sure, lambda v: (len(parents_of(tax, v)), P[v]))
    if name == 'maxinfo':
        return first_best(sure, lambda v: (-len(under(tax, v)), P[v], len(parents_of(tax, v))))
    if name == 'climb':
        return next((v for v in path(tax, first_best(map(int, tax.leaves), lambda v: P[v])) if P[v] >= c), 0)
    v = 0  # topdown
    while kids := [k for k in nodes if k and tax.parents[k] == v]:
        v = first_best(kids, lambda k: P[k])
    return v


@given(cases(), st.sampled_from([0.01, 0.3, 0.5, 0.8, 0.999]))
@settings(max_examples=50, deadline=None)
def test_vague_rules_by_hand(case, c):
    tax, p, r = case
    P = tax.node_probs(p)
    for name in *VAGUE, 'topdown':
        rule = create_rule(name, **({} if name == 'topdown' else {'confidence': c})).fit(tax=tax)
        np.testing.assert_array_equal(rule(P), [slow_answer(name, tax, o, c) for o in P], err_msg=name)


@given(cases(), st.sampled_from([0.0, 0.05, 0.3, 1.2]))
@settings(max_examples=15, deadline=None)
def test_expected_cost_by_hand(case, price):
    tax, p, r = case

    def cost(a, leaf):
        return (0 if a in path(tax, int(leaf)) else slow_height(tax, a, int(leaf))) + price * tax.heights[a]

    C = np.array([[cost(a, leaf) for leaf in tax.leaves] for a in range(len(tax))])
    want = p @ C.T
    said = create_rule('expected_cost', price=price).fit(tax=tax)(tax.node_probs(p))
    np.testing.assert_allclose(want[np.arange(len(p)), said], want.min(1), atol=1e-9)
    if price == 0:
        assert np.allclose(want[:, 0], want.min(1))
    if price > 1:
        assert (tax.heights[said] == 0).all()


@given(cases())
@slowly
def test_above_one_half_all_that_is_sure_lies_on_one_path(case):
    tax, p, r = case
    P = tax.node_probs(p)
    for b, said in enumerate(create_rule('maxinfo', confidence=0.51).fit(tax=tax)(P)):
        assert all(
            v in path(tax, int(said))
            or tax.leaf_stop[v] - tax.leaf_start[v] == tax.leaf_stop[said] - tax.leaf_start[said]
            for v in np.flatnonzero(P[b] >= 0.51)
        )


@given(cases(), st.integers(0, len(LEARNED) + len(VAGUE) + 1))
@slowly
def test_vague_answers_do_not_depend_on_their_neighbours(case, k):
    tax, p, r = case
    P = tax.node_probs(p)
    name, kw = [*LEARNED, *((o, dict(confidence=0.6)) for o in VAGUE), ('expected_cost', {}), ('topdown', {})][k]
    t = tax.leaves[r.integers(tax.n_leaves, size=60)].astype(int)
    Q = tax.node_probs(r.dirichlet(np.ones(tax.n_leaves) * 0.3, 60))
    rule = create_rule(name, **kw).fit(Q, t, tax)
    again = Rule.restore(json.loads(json.dumps(rule.state(), allow_nan=False)), tax)
    for x in P, torch.as_tensor(P), torch.as_tensor(P).float():
        all_, order = rule(x), r.permutation(len(p))
        assert type(all_) is type(x) and tuple(all_.shape) == (len(p),)
        np.testing.assert_array_equal(rule(x[order]), all_[order])
        np.testing.assert_array_equal(np.concatenate([rule(x[i : i + 1]) for i in range(len(p))]), all_)
        np.testing.assert_array_equal(again(x), all_)
        assert tuple(rule.rank(x).shape) == p.shape
    assert rule(P[:0]).shape == (0,)
    if name == 'conformal_set':
        sets = rule.sets(P)
        np.testing.assert_array_equal(again.sets(P), sets)
        for b in range(len(p)):
            order = np.argsort(-p[b], kind='stable')
            want = {int(j) for k, j in enumerate(order) if p[b][order[:k]].sum() <= rule.limits[0] + 1e-12}
            maybe = {int(j) for k, j in enumerate(order) if p[b][order[:k]].sum() <= rule.limits[0] - 1e-12}
            got = set(np.flatnonzero(sets[b]).tolist())
            assert maybe <= got <= want and got
            common = set.intersection(*(set(path(tax, int(tax.leaves[j]))) for j in got))
            assert rule(P)[b] == max(common, key=lambda v: len(parents_of(tax, v)))


def test_shallow_leaves_and_missing_ranks():
    "Null ranks: a species straight under the root is as good an answer as one five levels down"
    tax = Taxonomy.from_paths({'lone': None, 'a': ['x', None, 'g1'], 'b': ['x', 'f', 'g1b'], 'c': ['x', 'f', 'g1b']})
    q = np.array([[0.97 if o == 'lone' else 0.01 for o in tax.leaf_names]])
    t = np.repeat(tax.index('lone'), 60)
    P = tax.node_probs(np.repeat(q, 60, 0))
    for name, kw in *LEARNED, *((o, {}) for o in VAGUE), ('expected_cost', {}), ('topdown', {}):
        assert tax.names[create_rule(name, **kw).fit(P, t, tax)(P)[0]] == 'lone', name
    for cal in TemperatureScaling, LevelTemperatures, NodeIsotonic:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert (
                cal().fit(P, np.where(np.arange(60) < 59, t, tax.index('a')), tax).scale(P)[0, tax.index('lone')] > 0.9
            )


@pytest.mark.parametrize(
    'make,message',
    [
        (lambda P, t, x: create_rule('climb', confidence=95), 'between 0 and 1'),
        (lambda P, t, x: create_rule('guarantee', confidence=1.0), 'between 0 and 1'),
        (lambda P, t, x: create_rule('threshold', confidence='high'), 'between 0 and 1'),
        (lambda P, t, x: create_rule('climb', tau=0.9), "'climb' does not take the settings"),
        (lambda P, t, x: create_rule('expected_cost', price=-0.1), 'price of vagueness'),
        (lambda P, t, x: create_rule('guarantee')(P), 'Guarantee has not been fitted'),
        (lambda P, t, x: create_rule('guarantee').fit(tax=x), 'learns its promise from validation data'),
        (lambda P, t, x: create_rule('guarantee').fit(P[:0], t[:0], x), 'calibration set of Guarantee is empty'),
        (lambda P, t, x: create_rule('conformal_set').fit(P[:0], t[:0], x), 'is empty'),
        (lambda P, t, x: create_rule('guarantee').fit(P, t[1:], x), '29 targets for 30 images'),
        (lambda P, t, x: create_rule('guarantee').fit(P, t + 1000, x), "outside the tree's node ids"),
        (lambda P, t, x: create_rule('guarantee', at='family'), "no group of images 'family'"),
        (lambda P, t, x: create_rule('guarantee', clades=['n1']), "go with at='clade'"),
        (lambda P, t, x: create_rule('guarantee', at='clade', clades=['n99']).fit(P, t, x), "no 'n99'"),
        (lambda P, t, x: create_rule('guarantee', at='rank').fit(P, t, x.with_ranks([None])), '1 ranks for'),
        (lambda P, t, x: create_rule('guarantee').fit(P, t, x, weights=np.ones(3)), 'shape (3,) for 30 images'),
        (lambda P, t, x: create_rule('guarantee').fit(P, t, x, weights=-np.ones(30)), 'weight of image 0 is -1'),
        (
            lambda P, t, x: create_rule('guarantee').fit(P, t, x, weights=np.ones(30))(P),
            'give those of these images too',
        ),
        (lambda P, t, x: create_rule('guarantee').fit(P, t, x)(P, np.ones(30)), 'takes none'),
        (lambda P, t, x: create_rule('guarantee', at='rank').fit(P, t, x, class_weights=np.ones(len(x))), "at='clade'"),
        (lambda P, t, x: create_rule('guarantee', at='clade').fit(P, t, x, weights=np.ones(30)), "at='all'"),
        (
            lambda P, t, x: Rule.restore(
                create_rule('guarantee').fit(P, t, x).state(), random_tree(12, 3, np.random.default_rng(7))
            ),
            'fitted on another tree',
        ),
        (
            lambda P, t, x: Calibration.restore(
                {'calibration': 'temprature', 'learned': {}, 'taxonomy': x.fingerprint}, x
            ),
            "Did you mean 'temperature'",
        ),
        (lambda P, t, x: LevelTemperatures().scale(P), 'LevelTemperatures has not been fitted'),
        (lambda P, t, x: NodeIsotonic().fit(P[:0], t[:0], x), 'no images'),
        (lambda P, t, x: rank_confidence(P, t, x, 77), 'No node has the rank 77'),
    ],
)
def test_mistakes_say_what_to_do(make, message):
    r = np.random.default_rng(0)
    tax = random_tree(12, 3, r)
    P = tax.node_probs(r.dirichlet(np.ones(tax.n_leaves), 30))
    t = tax.leaves[r.integers(tax.n_leaves, size=30)].astype(int)
    with pytest.raises(HiermetricError) as e:
        make(P, t, tax)
    assert message in str(e.value)


CHAINS = Taxonomy.from_paths(
    {'a': 'o1/f1/g1', 'b': 'o1/f2/g2', 'c': 'o1/f2/g2', 'd': 'o2/f3/g3', 'e': None, 'f': 'o3', 'g': 'o3'}
)


def drawn(tax, n, seed):
    r = np.random.default_rng(seed)
    p = r.dirichlet(np.full(tax.n_leaves, 0.25), n)
    return tax.node_probs(p), tax.leaves[(p.cumsum(1) < r.random((n, 1))).sum(1).clip(max=tax.n_leaves - 1)]


@pytest.mark.parametrize('name', list(list_rules().index))
def test_of_nodes_with_one_probability_the_deepest_is_the_answer(name):
    rule = create_rule(name).fit(*drawn(CHAINS, 400, 0), CHAINS)
    answers = np.asarray(rule(drawn(CHAINS, 400, 1)[0]))
    assert (CHAINS.heirs[answers] == answers).all() and len(set(answers.tolist())) > 3


@given(cases())
@slowly
def test_hie_and_argmax_do_not_see_chains(case):
    tax, p, r = case
    P, Q = tax.node_probs(p), tax.chainless.node_probs(p)
    for name in ('hie', 'argmax'):
        np.testing.assert_allclose(
            create_rule(name).fit(tax=tax).rank(P), create_rule(name).fit(tax=tax.chainless).rank(Q), atol=1e-12
        )
