"Decision rules and calibration against slow and obvious versions, on random ragged trees."

import json
import numpy as np, pandas as pd, pytest, torch, warnings
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.decisions import (
    PRIOR,
    Calibration,
    LevelTemperatures,
    NodeIsotonic,
    Rule,
    TemperatureScaling,
    _fewest,
    _order,
    _pools,
    bits_per_mistake,
    class_ratios,
    create_rule,
    expected_heights,
    list_rules,
    plot_reliability,
    rank_calibration,
    rank_confidence,
    register_rule,
    temper,
)
from hiermetric.metrics import evaluate, expected_calibration_error, negative_log_likelihood, operating_curve
from hiermetric.taxonomy import Taxonomy

slowly = settings(max_examples=60, deadline=None)
RULES = 'argmax', 'crm', 'hie'
VAGUE = 'threshold', 'climb', 'maxinfo'
LEARNED = [
    ('guarantee', {}),
    ('guarantee', dict(at='clade')),
    ('guarantee', dict(at='rank')),
    ('guarantee', dict(score='probability', sure=0.9)),
    ('conformal_set', {}),
]


def random_tree(n, back, r):
    return Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - back), i)}' if i else None for i in range(n)})


@st.composite
def cases(draw):
    "A random ragged tree with leaf distributions from flat to saturated"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tax = random_tree(draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 5, 60])), r)
    p = r.dirichlet(np.full(tax.n_leaves, draw(st.sampled_from([0.02, 0.3, 5.0]))), int(r.integers(1, 9)))
    return tax, p / p.sum(1, keepdims=True), r


def parents_of(tax, v):
    return [] if v == 0 else [int(tax.parents[v]), *parents_of(tax, int(tax.parents[v]))]


def slow_height(tax, u, v):  # of the lowest common ancestor, by walking up
    up = [u, *parents_of(tax, u)]
    common = next(o for o in up if o == v or o in parents_of(tax, v))
    kids = [i for i in range(len(tax)) if common in parents_of(tax, i)]
    return max((len(parents_of(tax, i)) for i in kids), default=len(parents_of(tax, common))) - len(
        parents_of(tax, common)
    )


# ---- the rules -------------------------------------------------------------------------------------------------------
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


# ---- temperature -----------------------------------------------------------------------------------------------------
def labelled(true_t, n=3000, classes=12, seed=0):
    "Labels drawn from softmax(z), and a model that says softmax(z·T)"
    r = np.random.default_rng(seed)
    tax = random_tree(30, 8, r)
    z = torch.as_tensor(r.normal(size=(n, tax.n_leaves)) * 1.5)
    q = z.softmax(1).numpy()
    return tax, (z * true_t).softmax(1), tax.leaves[[r.choice(tax.n_leaves, p=o / o.sum()) for o in q]].astype(int), r


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


# ---- rules that may be vague -----------------------------------------------------------------------------------------
def under(tax, v):
    return [j for j, leaf in enumerate(tax.leaves) if leaf == v or v in parents_of(tax, int(leaf))]


def path(tax, v):
    return [v, *parents_of(tax, v)]  # upwards


def first_best(nodes, key):
    nodes = list(nodes)
    best = max(map(key, nodes))
    return next(v for v in nodes if key(v) == best)


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


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_order_is_that_of_the_best_trade(seed, K, whole):
    "At every price the deepest node above it is a maximiser of information − price · risk"
    r = np.random.default_rng(seed)
    draw = lambda: np.append(0.0, (r.integers(0, 3, K - 1) if whole else r.exponential(size=K - 1)).cumsum())
    risk, info = draw() / 10, draw()
    s = bits_per_mistake(torch.tensor(risk)[None], torch.tensor(info)[None])[0].numpy()
    assert (np.diff(s[np.isfinite(s)]) <= 1e-9).all() and (s >= 0).all()
    for price in np.concatenate([[0.01], s[np.isfinite(s)] * 1.001, s[np.isfinite(s)] * 0.999]):
        if price <= 0:
            continue
        k = 0
        while k + 1 < K and s[k + 1] > price:
            k += 1
        assert info[k] - price * risk[k] >= (info - price * risk).max() - 1e-9 * max(1, price)


# ---- the guarantee ---------------------------------------------------------------------------------------------------
@st.composite
def bags(draw):
    "A tree, exchangeable images with many ties, labels that may be inner nodes, and a confidence"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tax = random_tree(draw(st.integers(2, 14)), draw(st.sampled_from([1, 3, 14])), r)
    n = draw(st.sampled_from([1, 2, 4, 9, 25]))
    q = r.integers(0, draw(st.sampled_from([2, 4, 100])), (n, tax.n_leaves)) + 0.01
    q = q / q.sum(1, keepdims=True)
    t = tax.leaves[[r.choice(tax.n_leaves, p=o) for o in q]].astype(int)
    if draw(st.booleans()):
        t = np.where(
            np.arange(n) < (n > 2) * 2 + (r.random(n) < 0.2) * n, np.maximum(tax.parents[t], 0), t
        )  # two at least: that inner labels occur must be known without the new image
    return tax, tax.node_probs(q), t, draw(st.sampled_from([0.3, 0.5, 0.75, 0.8, 0.9])), r


def leave_one_out(tax, P, t, make, **kw):  # was each image answered safely by the rule of the others; their groupings
    safe = np.zeros(len(t), bool)
    for i in range(len(t)):
        rest = np.arange(len(t)) != i
        if not rest.any():
            continue  # a single image: no calibration set at all
        rule = make().fit(
            P[rest], t[rest], tax, **{k: v[rest] if len(v) == len(t) and k == 'weights' else v for k, v in kw.items()}
        )
        said = rule(P[i : i + 1], kw['weights'][i : i + 1]) if 'weights' in kw else rule(P[i : i + 1])
        safe[i] = tax.is_ancestor(int(said[0]), int(t[i]))
    return safe


@given(bags(), st.sampled_from(['bits', 'probability']))
@settings(max_examples=60, deadline=None)
def test_the_promise_is_exact(bag, score):
    """Exchangeability says: of any n+1 images each is equally likely the new one. So of all n+1 ways at least 1−α must
    be safe, not about, but always"""
    tax, P, t, c, r = bag
    if len(t) > 1:
        assert leave_one_out(tax, P, t, lambda: create_rule('guarantee', confidence=c, score=score)).mean() >= c - 1e-9


@given(bags())
@settings(max_examples=30, deadline=None)
def test_the_promise_of_sets_is_exact(bag):
    tax, P, t, c, r = bag
    if len(t) < 2:
        return
    held = [
        create_rule('conformal_set', confidence=c)
        .fit(np.delete(P, i, 0), np.delete(t, i), tax)
        .sets(P[i : i + 1])[0, tax.leaf_start[v] : tax.leaf_stop[v]]
        .all()
        for i, v in enumerate(t)
    ]
    assert np.mean(held) >= c - 1e-9


@given(bags(), st.sampled_from(['clade', 'rank']))
@settings(max_examples=60, deadline=None)
def test_the_promise_is_exact_in_every_group(bag, at):
    "The same within the groups as they stand after joining, which the n+1 images decide together"
    tax, P, t, c, r = bag
    if len(t) < 3:
        return
    named = (
        dict(clades=[int(o) for o in r.choice(len(tax), min(3, len(tax) - 1), replace=False)])
        if at == 'clade' and r.random() < 0.5
        else {}
    )
    if named:
        named = dict(clades=[tax.path(o) for o in named['clades']])
    make = lambda: create_rule('guarantee', confidence=c, at=at, **named)
    safe = leave_one_out(tax, P, t, make)
    rule = make().fit(P, t, tax)
    names, above, group = rule.grouping
    of = group[rule._plain(*rule._path(torch.as_tensor(P))[:2]).numpy() if at == 'rank' else t]
    pool = _pools(np.bincount(of, minlength=len(names)), above, _fewest(c, None))[of]
    for g in np.unique(pool):
        assert safe[pool == g].mean() >= c - 1e-9, (g, safe[pool == g])


@given(bags(), st.sampled_from(['weights', 'class_weights']))
@settings(max_examples=60, deadline=None)
def test_the_weighted_promise_is_exact(bag, kind):
    "With likelihood ratios w the new image is the i-th with probability in proportion to w_i"
    tax, P, t, c, r = bag
    if len(t) < 3:
        return
    w = r.choice([0.0, 0.5, 1.0, 4.0], len(t) if kind == 'weights' else len(tax))
    own = w if kind == 'weights' else w[t]
    if not own.sum():
        return
    safe = leave_one_out(tax, P, t, lambda: create_rule('guarantee', confidence=c), **{kind: w})
    assert (own * safe).sum() / own.sum() >= c - 1e-9


def slow_guarantee(tax, P, t, new, c, of=lambda v: 0, joined=None):
    """By sets: a label stays possible unless its own score is above the limit of its group; the answer is the lowest
    node of the path above all that are"""

    def scores(o):  # from the leaf up, bits per mistake by the definition of the hull
        nodes = path(tax, first_best(map(int, tax.leaves), lambda v: o[v]))
        info = [np.log2(tax.n_leaves / len(under(tax, v))) for v in nodes]
        risk = [1 - o[v] for v in nodes]
        s = []
        for j in range(len(nodes) - 1):
            ratio = lambda i, k: (
                np.inf
                if info[k] == info[i] and risk[k] > risk[i]
                else 0.0
                if info[k] == info[i]
                else (risk[k] - risk[i]) / (info[k] - info[i])
            )
            s.append(max(min(ratio(i, k) for k in range(j + 1)) for i in range(j + 1, len(nodes))))
        return nodes, [1 / o if o > 0 else np.inf for o in np.maximum.accumulate(s[::-1])[::-1]] + [np.inf]

    def E(o, v):
        nodes, s = scores(o)
        return max([s[k] for k, a in enumerate(nodes) if a not in path(tax, v)], default=-np.inf)

    e = [(E(o, int(v)), of(int(v))) for o, v in zip(P, t)]
    inner = any(len(under(tax, int(v))) > 1 or v not in tax.leaves for v in t)

    def limit(g):
        own = sorted(x for x, h in e if h == g)
        k = int(np.ceil((len(own) + 1) * c - 1e-9))
        return own[k - 1] if k <= len(own) else np.inf

    out = []
    for o in new:
        left = [v for v in range(len(tax)) if (inner or v in tax.leaves) and E(o, v) <= limit(of(v))]
        out.append(next(a for a in scores(o)[0] if all(a in path(tax, v) for v in left)))
    return out


@given(bags())
@settings(max_examples=40, deadline=None)
def test_the_guarantee_by_sets(bag):
    tax, P, t, c, r = bag
    new = tax.node_probs(r.dirichlet(np.ones(tax.n_leaves) * 0.5, 4))
    got, want = create_rule('guarantee', confidence=c).fit(P, t, tax)(new), slow_guarantee(tax, P, t, new, c)
    for end in tax.leaf_start, tax.leaf_stop:
        np.testing.assert_array_equal(end[got], end[want])  # an only child and its parent are one as sets


@given(bags())
@settings(max_examples=40, deadline=None)
def test_clades_by_sets(bag):
    "With groups large enough not to join, each label is judged by the limit of its own clade"
    tax, P, t, c, r = bag
    P, t = np.tile(P, (8, 1)), np.tile(t, 8)
    new = tax.node_probs(r.dirichlet(np.ones(tax.n_leaves) * 0.5, 4))
    rule = create_rule('guarantee', confidence=c, at='clade').fit(P, t, tax)
    counts = rule.groups.images.to_numpy()
    if ((counts + 1 < _fewest(c, None)) & np.isin(np.arange(len(counts)), rule.grouping[2])).any():
        return
    np.testing.assert_array_equal(rule(new), slow_guarantee(tax, P, t, new, c, of=lambda v: int(rule.grouping[2][v])))


def test_too_few_images_say_the_root():
    tax, q, t, r = labelled(1.0, 200)
    P = tax.node_probs(q)
    for c, n in (0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99):
        few, enough = (
            (create_rule('guarantee', confidence=c).fit(P[:k], t[:k], tax) for k in (n - 1, n))
            if n > 1
            else (None, create_rule('guarantee', confidence=c).fit(P[:n], t[:n], tax))
        )
        assert np.isfinite(enough.limits).all() and (
            few is None or (not few(P).any() and few.groups.limit.tolist() == [np.inf])
        )


def test_being_sure_over_calibration_sets():
    "Uniform scores: the long-run correctness of a calibration set is its threshold"
    r = np.random.default_rng(0)
    n, c, sure = 60, 0.9, 0.95
    k = int(_order(n, c, sure))
    u = np.sort(r.random((20000, n)), 1)
    assert (u[:, k - 1] >= c).mean() >= sure - 0.006 and (u[:, k - 2] >= c).mean() < sure  # and no smaller k will do
    assert _order(10, c, sure) > 10 and _fewest(c, sure) == 1 + next(m for m in range(1, 99) if 1 - c**m >= sure)


def test_groups_that_join():
    tax = Taxonomy.from_paths({'a1': 'a', 'a2': 'a', 'b1': 'b', 'b2': 'b', 'c1': 'c', 'c2': 'c'})
    r = np.random.default_rng(0)
    t = tax.index(['a1', 'a2'] * 20 + ['b1'] * 3 + ['c1'] * 4)
    P = tax.node_probs(r.dirichlet(np.ones(6), len(t)))
    g = create_rule('guarantee', confidence=0.8, at='clade').fit(P, t, tax).groups
    assert (
        g.images.tolist() == [0, 40, 3, 4]
        and g.pooled[['a', 'b']].tolist() == [40, 7]
        and g.loc['b', 'with'] == 'c'
        and g.loc['a', 'with'] == ''
    )
    assert g.pooled['c'] == 7  # b cannot stand alone, and needs c
    g = create_rule('guarantee', confidence=0.8, at='clade', clades=['a', 'c']).fit(P, t, tax).groups
    assert g.pooled.tolist() == [47 - 40, 40, 7]
    g = (
        create_rule('guarantee', confidence=0.8, at='clade', clades=['a', 'c'])
        .fit(P[[*range(40), *range(43, 47)]], t[[*range(40), *range(43, 47)]], tax)
        .groups
    )
    assert g.pooled['c'] == 4  # with one more image of its own c has the five that 80 % take, and stands alone


def test_weights_repair_a_shift():
    "Calibration images half easy and half hard, new images hard: without ratios the promise breaks, with them it holds"
    r = np.random.default_rng(0)
    tax = Taxonomy.from_paths({f's{i}': f'o{i % 3}/f{i % 9}' for i in range(27)})

    def images(n, hard):
        y = r.integers(27, size=n)
        z = r.normal(size=(n, 27))
        z[np.arange(n), y] += np.where(hard, 1.5, 6.0)
        return tax.node_probs(torch.as_tensor(z * 2).softmax(1)), tax.leaves[y].astype(int)

    hard = np.arange(4000) % 2 == 0
    P, t = images(4000, hard)
    new, y = images(4000, np.ones(4000, bool))
    make = lambda: create_rule('guarantee', confidence=0.9)
    safe = lambda nodes: tax.is_ancestor(nodes.numpy(), y).mean()
    assert (
        safe(make().fit(P, t, tax)(new)) < 0.87
        and abs(safe(make().fit(P, t, tax, weights=hard * 2.0)(new, np.full(4000, 2.0))) - 0.9) < 0.02
    )


def test_class_weights_repair_a_mix():
    r = np.random.default_rng(0)
    tax = Taxonomy.from_paths({f's{i}': f'o{i % 2}' for i in range(10)})
    bad = np.arange(10) < 3

    def images(n, mix):
        y = r.choice(10, n, p=mix / mix.sum())
        z = r.normal(size=(n, 10))
        z[np.arange(n), y] += np.where(bad[y], 0.5, 5.0)
        return tax.node_probs(torch.as_tensor(z * 2).softmax(1)), tax.leaves[y].astype(int)

    old, new = np.where(bad, 1.0, 10.0), np.where(bad, 10.0, 1.0)
    (P, t), (Q, y) = images(4000, old), images(4000, new)
    w = np.zeros(len(tax))
    w[tax.leaves] = (new / new.sum()) / (old / old.sum())
    safe = lambda rule: tax.is_ancestor(rule(Q).numpy(), y).mean()
    make = lambda **kw: create_rule('guarantee', confidence=0.9).fit(P, t, tax, **kw)
    assert (
        safe(make()) < 0.8
        and 0.88 < safe(make(class_weights=w))
        and safe(
            create_rule('guarantee', confidence=0.9, at='clade', clades=[f's{i}' for i in range(10)]).fit(P, t, tax)
        )
        > 0.88
    )


@given(bags())
@settings(max_examples=30, deadline=None)
def test_the_curve_is_what_the_rule_does(bag):
    tax, P, t, c, r = bag
    rule = create_rule('guarantee', confidence=c).fit(P, t, tax)
    curve = operating_curve(P, t, tax, rule=rule.choices)
    for _, row in curve.iterrows():
        if tax.n_leaves == 1 or not 0 < row.threshold < np.inf:
            continue
        rule.limits = np.array([row.threshold])
        said = rule(P)
        lca = tax.lca(said, t)
        assert row.correct == pytest.approx(((lca == said) | (lca == t)).mean()) and row.coverage * max(
            np.log2(tax.n_leaves), 1e-9
        ) == pytest.approx(tax.information[said].mean(), abs=1e-9)


def test_class_ratios_are_found():
    r = np.random.default_rng(0)
    tax = random_tree(16, 5, r)
    q = torch.as_tensor(r.normal(size=(6000, tax.n_leaves)) * 4).softmax(1).numpy()
    t = tax.leaves[[r.choice(tax.n_leaves, p=o / o.sum()) for o in q]].astype(int)
    P = tax.node_probs(q)
    w = np.exp(r.normal(size=tax.n_leaves))
    chance = w[tax.leaf_column[t[3000:]]]
    new = 3000 + r.choice(3000, 3000, p=chance / chance.sum())
    got = class_ratios(P[new], t[:3000], tax)[tax.leaves]
    true = np.bincount(tax.leaf_column[t[new]], minlength=tax.n_leaves) / np.bincount(
        tax.leaf_column[t[:3000]], minlength=tax.n_leaves
    )
    assert np.abs(np.log(got / true)).mean() < 0.25 < np.abs(np.log(true)).mean()
    assert class_ratios(P[:3000], t[:3000], tax)[0] == pytest.approx(1)


# ---- all rules -------------------------------------------------------------------------------------------------------
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


def test_large_sets_are_sorted_whole():
    "A few thousand leaves are looked at first; a set that needs more, or ends among ties, is the same"
    r = np.random.default_rng(0)
    tax = Taxonomy.from_parents({'root': None} | {f'l{i}': 'root' for i in range(9000)})
    q = np.stack([r.dirichlet(np.ones(9000)), np.full(9000, 1 / 9000), r.dirichlet(np.full(9000, 0.001))])
    P = tax.node_probs(q)
    rule = create_rule('conformal_set', confidence=0.5).fit(P, tax.leaves[[5, 5, 5]].astype(int), tax)
    rule.limits = np.array([0.6])
    got = rule.sets(P)
    order = np.argsort(-q, 1, kind='stable')
    before = np.take_along_axis(q, order, 1).cumsum(1)
    want = np.zeros_like(got)
    np.put_along_axis(want, order, np.pad(before, ((0, 0), (1, 0)))[:, :-1] <= 0.6, 1)
    assert (got != want).sum() <= 1 and got[1].sum() > 5000 and got[1].argmin() == got[1].sum()  # ties in tree order


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


# ---- calibration of nodes --------------------------------------------------------------------------------------------
def conditionals(tax, P):
    return np.stack([P[:, v] / P[:, tax.parents[v]] for v in range(1, len(tax))], 1)


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


def test_a_promise_by_rank_reads_the_tree_and_needs_it_no_more():
    "The limits stand at the nodes, so that a fitted rule answers the same on an equal tree that knows other ranks"
    tax, q, t, r = labelled(3.0, 500)
    P = tax.node_probs(q)
    ranks = [None if not d else 'upper' if d < 2 else 'lower' for d in tax.depths]
    rule = create_rule('guarantee', confidence=0.8, at='rank').fit(P, t, tax.with_ranks(ranks))
    by_depth = create_rule('guarantee', confidence=0.8, at='rank').fit(P, t, tax)
    assert rule.groups.index.tolist() == [tax.names[0], 'upper', 'lower'] and rule.limits.shape == (len(tax),)
    assert by_depth.groups.index.tolist() == [f'depth {d}' for d in range(tax.height + 1)]
    assert (rule(P) != by_depth(P)).any()
    for known in (tax, tax.with_ranks(ranks), tax.with_ranks(['x'] * len(tax))):
        np.testing.assert_array_equal(Rule.restore(json.loads(json.dumps(rule.state())), known)(P), rule(P))


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


# ---- chains ----------------------------------------------------------------------------------------------------------
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
