"Decision rules and calibration against slow and obvious versions, on random ragged trees."
import numpy as np, pytest, torch, warnings
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.decisions import Rule, TemperatureScaling, create_rule, expected_heights, list_rules, plot_reliability, register_rule, temper
from hiermetric.metrics import evaluate, negative_log_likelihood
from hiermetric.taxonomy import Taxonomy

slowly = settings(max_examples=60, deadline=None)
RULES = 'argmax', 'crm', 'hie'

def random_tree(n, back, r): return Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i-back), i)}' if i else None for i in range(n)})

@st.composite
def cases(draw):
    "A random ragged tree with leaf distributions from flat to saturated"
    r = np.random.default_rng(draw(st.integers(0, 2**32-1))); tax = random_tree(draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 5, 60])), r)
    p = r.dirichlet(np.full(tax.n_leaves, draw(st.sampled_from([.02, .3, 5.]))), int(r.integers(1, 9)))
    return tax, p/p.sum(1, keepdims=True), r

def parents_of(tax, v): return [] if v == 0 else [int(tax.parents[v]), *parents_of(tax, int(tax.parents[v]))]

def slow_height(tax, u, v): # of the lowest common ancestor, by walking up
    up = [u, *parents_of(tax, u)]; common = next(o for o in up if o == v or o in parents_of(tax, v)); kids = [i for i in range(len(tax)) if common in parents_of(tax, i)]
    return max((len(parents_of(tax, i)) for i in kids), default=len(parents_of(tax, common))) - len(parents_of(tax, common))

# ---- the rules ---------------------------------------------------------------------------------------------------------------------------------------------------
@given(cases())
@settings(max_examples=40, deadline=None)
def test_crm_is_the_matrix_product(case):
    tax, p, r = case; C = np.array([[slow_height(tax, int(u), int(v)) for v in tax.leaves] for u in tax.leaves])
    P, cost = tax.node_probs(p), p@C.T
    np.testing.assert_allclose(expected_heights(torch.as_tensor(P), tax), cost, atol=1e-9)
    rule = create_rule('crm').fit(tax=tax); np.testing.assert_allclose(rule.rank(P), -cost, atol=1e-9)
    chosen = tax.leaf_column[rule(P)]; assert np.allclose(cost[np.arange(len(p)), chosen], cost.min(1), atol=1e-9)
    single = rule(P.astype(np.float32)); assert np.allclose(cost[np.arange(len(p)), tax.leaf_column[single]], cost.min(1), atol=1e-4)

@given(cases())
@slowly
def test_crm_keeps_a_leaf_above_one_half(case):
    tax, p, r = case; sure = p.max(1) > .5 + 1e-6
    assert (create_rule('crm').fit(tax=tax)(tax.node_probs(p))[sure] == tax.leaves[p.argmax(1)][sure]).all()

@given(cases())
@slowly
def test_hie_and_argmax_by_hand(case):
    tax, p, r = case; P = tax.node_probs(p)
    want = np.array([[p[b,j]*(P[b, parents_of(tax, int(v))[0]] if v else 1) for j, v in enumerate(tax.leaves)] for b in range(len(p))])
    np.testing.assert_allclose(create_rule('hie').fit(tax=tax).rank(P), want, atol=1e-12)
    np.testing.assert_array_equal(create_rule('argmax').fit(tax=tax)(P), [tax.leaves[list(o).index(max(o))] for o in P[:,tax.leaves]])

@given(cases(), st.sampled_from(RULES))
@slowly
def test_an_answer_does_not_depend_on_its_neighbours(case, name):
    tax, p, r = case; P = tax.node_probs(p); rule = create_rule(name).fit(P, tax.leaves[p.argmax(1)], tax)
    for x in P, torch.as_tensor(P), torch.as_tensor(P).float():
        all_, order = rule(x), r.permutation(len(p))
        assert type(all_) is type(x) and type(rule.rank(x)) is type(x) and tuple(rule.rank(x).shape) == p.shape
        np.testing.assert_array_equal(rule(x[order]), all_[order]); np.testing.assert_array_equal(rule.rank(x[order]), rule.rank(x)[order])
        for i in range(len(p)): np.testing.assert_array_equal(rule.rank(x[i:i+1])[0], rule.rank(x)[i])
        np.testing.assert_array_equal(all_, tax.leaves[np.asarray(rule.rank(x)).argmax(1)])

@pytest.mark.parametrize('name', RULES)
def test_more_rows_than_a_chunk(name):
    "Rows are worked off in chunks of about four million numbers; the seams must not show"
    r = np.random.default_rng(0); tax = random_tree(3000, 300, r); z = torch.as_tensor(r.normal(size=(1500, tax.n_leaves))).float()*3; P = tax.node_probs(z.softmax(1)); assert P.numel() > 2**22
    rule = create_rule(name).fit(tax=tax); whole = rule.rank(P)
    for i in 0, 1397, 1398, 1399, 1499: torch.testing.assert_close(rule.rank(P[i:i+1])[0], whole[i], rtol=0, atol=0)

def test_a_shallow_leaf_keeps_its_probability():
    tax = Taxonomy.from_parents({'root': None, 'lone': 'root', 'a': 'root', 'a1': 'a', 'a2': 'a', 'aa': 'a', 'aa1': 'aa', 'aa2': 'aa'})
    P = tax.node_probs(np.array([{'lone': .6}.get(o, .1) for o in tax.leaf_names])[None])
    for name in RULES: assert tax.names[create_rule(name).fit(tax=tax)(P)[0]] == 'lone'
    assert create_rule('hie').fit(tax=tax).rank(P).max() == pytest.approx(.6)   # its parent is the root

def test_incoherent_leaves_still_have_a_cost():
    "Node heads: leaves need not add up to their parents; the cost is then the one of the node probabilities"
    tax = Taxonomy.from_parents({'root': None, 'a': 'root', 'b': 'root', 'a1': 'a', 'a2': 'a'}); P = np.zeros((1, 5)); P[0, tax.index(['root', 'a', 'a1', 'a2', 'b'])] = 1, .9, .5, .1, .3
    got = dict(zip(tax.leaf_names, expected_heights(torch.as_tensor(P), tax)[0].tolist()))
    assert got == pytest.approx({'a1': .1 + .5, 'a2': .1 + .9, 'b': 2*.7})

def test_a_rule_of_ones_own():
    class Root(Rule):
        "always the root"
        def __call__(self, node_probs): return np.zeros(len(node_probs), int)
    if 'root' not in list_rules().index: register_rule('root', Root, 'always the root')
    assert create_rule('root')([[1.]]).tolist() == [0] and list_rules().loc['root', 'about'] == 'always the root'
    with pytest.raises(HiermetricError, match='exists already'): register_rule('crm', Root)

def test_no_images_no_answers():
    tax = random_tree(9, 3, np.random.default_rng(0))
    for name in RULES: rule = create_rule(name).fit(tax=tax); assert rule(np.ones((0, 9))).shape == (0,) and rule.rank(np.ones((0, 9))).shape == (0, tax.n_leaves)

def test_mistakes_are_named():
    tax = random_tree(9, 3, np.random.default_rng(0)); P = tax.node_probs(np.full((2, tax.n_leaves), 1/tax.n_leaves))
    with pytest.raises(HiermetricError, match="no rule 'argmix'.*Did you mean 'argmax'"): create_rule('argmix')
    with pytest.raises(HiermetricError, match='CRM has not been fitted'): create_rule('crm')(P)
    with pytest.raises(HiermetricError, match='HiE needs the tree'): create_rule('hie').fit(P, tax.leaves)
    rule = create_rule('crm').fit(tax=tax)
    with pytest.raises(HiermetricError, match='node_probs is nan for image 1'): rule(np.where(np.arange(2)[:,None] == 1, np.nan, P))
    with pytest.raises(HiermetricError, match='shape'): rule(P[:,1:])
    with pytest.raises(HiermetricError, match='and its parent'): rule(np.where(np.arange(9) == 8, 1.001 + .0, P*.5 + (np.arange(9) == 0)*.5))

# ---- temperature -------------------------------------------------------------------------------------------------------------------------------------------------
def labelled(true_t, n=3000, classes=12, seed=0):
    "Labels drawn from softmax(z), and a model that says softmax(z·T)"
    r = np.random.default_rng(seed); tax = random_tree(30, 8, r); z = torch.as_tensor(r.normal(size=(n, tax.n_leaves))*1.5); q = z.softmax(1).numpy()
    return tax, (z*true_t).softmax(1), tax.leaves[[r.choice(tax.n_leaves, p=o/o.sum()) for o in q]].astype(int), r

@pytest.mark.parametrize('true_t', [.3, 1., 2.5, 8.])
@pytest.mark.parametrize('inner', [False, True])
def test_a_known_temperature_is_found(true_t, inner):
    tax, q, t, r = labelled(true_t); P = tax.node_probs(q)
    if inner: t = np.where((r.random(len(t)) < .3) & (tax.parents[t] > 0), tax.parents[t], t)
    ts = TemperatureScaling().fit(P, t, tax); assert ts.temperature == pytest.approx(true_t, rel=.12)
    nll = lambda T: float(negative_log_likelihood(temper(q, T), t, tax).mean()); grid = np.exp(np.linspace(np.log(.1), np.log(15), 60))
    assert nll(ts.temperature) <= min(map(nll, grid)) + 1e-6   # no point of a fine grid is better

def test_scaling_changes_confidence_and_no_ranking():
    tax, q, t, r = labelled(3.); P = tax.node_probs(q); ts = TemperatureScaling().fit(P[:2000], t[:2000], tax); S = ts.scale(P[2000:])
    before, after = evaluate(P[2000:], t[2000:], tax), evaluate(S, t[2000:], tax)
    for k in 'top1', 'top5', 'hd@1', 'hd@20', 'macro_top1': assert before[k] == after[k]
    assert after['nll'] < before['nll'] and after['ece'] < .5*before['ece'] and after['brier'] < before['brier']
    assert isinstance(ts.scale(P[:3].numpy()), np.ndarray); torch.testing.assert_close(ts.scale(P[:1])[0], ts.scale(P[:7])[0], rtol=0, atol=0)

def test_zeros_stay_zero_and_sharp_models_stay_finite():
    z = torch.tensor([[200., 0, -200], [0, 0, -300]]); q = z.softmax(1)
    for T in .05, 1., 20.:
        p = temper(q, T); assert p.isfinite().all() and (p[q == 0] == 0).all(); torch.testing.assert_close(p.sum(1), torch.ones(2))
    torch.testing.assert_close(temper(q, 1.), q)

def test_temperature_that_the_data_do_not_tell():
    tax = Taxonomy.from_parents({'root': None, 'a': 'root', 'b': 'root'}); P = tax.node_probs(np.array([[.7, .3]]*5))
    with pytest.warns(UserWarning, match='limit of the search'): assert TemperatureScaling().fit(P, np.full(5, tax.leaves[0]), tax).temperature < .06
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert TemperatureScaling().fit(P, tax.leaves[[0, 0, 0, 1, 1]], tax).temperature > 1

def test_temperature_wants_validation_data():
    tax, q, t, r = labelled(1., 20); P = tax.node_probs(q)
    with pytest.raises(TypeError): TemperatureScaling().fit(P)
    with pytest.raises(HiermetricError, match='not been fitted'): TemperatureScaling().scale(P)
    with pytest.raises(HiermetricError, match='19 targets for 20 images'): TemperatureScaling().fit(P, t[:-1], tax)
    with pytest.raises(HiermetricError, match='no images'): TemperatureScaling().fit(P[:0], t[:0], tax)

def test_reliability_diagram_shows_the_ece():
    import matplotlib; matplotlib.use('Agg', force=False)
    tax, q, t, r = labelled(3., 500); P = tax.node_probs(q); ax = plot_reliability({'raw': P, 'half': tax.node_probs(temper(q, 2.))}, t, tax)
    assert [o.get_text() for o in ax.get_legend().get_texts()][0] == f"raw (ECE {evaluate(P, t, tax)['ece']:.1%})" and len(ax.collections) == 2
