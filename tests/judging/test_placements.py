"Placement rules from their definitions."

import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import norm
from hiermetric.core import HiermetricError
from hiermetric.judging.rules import create_rule
from hiermetric.images.features import Features
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.detectors import DETECTORS, Detector, auroc, create_detector, list_detectors, register_detector
from hiermetric.judging.placements import (
    PLACEMENTS,
    Placement,
    create_placement,
    curve_area,
    evaluate_placement,
    known_novel_curve,
    list_placements,
    novel_at,
    register_placement,
)
from hiermetric.judging.known import Outputs, draw_species, hold_out, known_ancestor, known_probs
from hiermetric.trees.arithmetic import tree_median
from unseen_cases import cases, dist, features, outputs, random_tree, slow_protos, slowly, under, up


def settings_of(name):
    return {'steps': dict(steps=2)}.get(name, {})


def slow_place(name, tax, known, tr, t, o, limit, gate):
    "One image after the other, from the definitions"
    protos, out = slow_protos(tr.emb, t, tax), []
    b = tr.emb.double().numpy()
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    e = o.emb.double().numpy()
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    places = [v for v in range(len(tax)) if tax.heights[v] and set(under(tax, v)) & set(tax.leaves[known].tolist())]
    cos = {v: np.array([x @ protos[v] for x, y in zip(b, t) if v in up(tax, int(y))]) for v in range(len(tax))}
    spread = {v: c.std() for v, c in cos.items() if len(c) > 2}

    def usual(v):
        return (
            cos[v].mean() if len(cos[v]) else 0.0,
            max(spread.get(v, np.mean(list(spread.values())) if spread else 1.0), 1e-3),
        )

    for i, p in enumerate(o.node_probs.double().numpy()):
        leaf = int(tax.leaves[o.node_probs[i].numpy()[tax.leaves].argmax()])
        path = up(tax, leaf)
        if name in ('climb', 'complement'):
            own = {
                v: p[v]
                if name == 'climb'
                else 1.0
                if v == 0
                else norm.cdf((e[i] @ protos[v] - usual(v)[0]) / usual(v)[1])
                for v in path
            }
            score = {v: min(own[u] for u in up(tax, v)) for v in path}
            out.append(next((v for v in path if 1 - score[v] <= limit), 0))
            continue
        if gate[i] <= limit:
            out.append(leaf)
            continue
        if name == 'steps':
            out.append(path[min(2, len(path) - 1)])
        elif name == 'prototypes':
            out.append(max(places, key=lambda v: e[i] @ protos[v]))
        else:
            q = {v: p[v] * math.exp((8 if name == 'blend' else 0) * (e[i] @ protos[v])) for v in places}
            out.append(
                [sum(q[v] * dist(tax, a, v) for v in places) for a in range(len(tax))]
            )  # the costs: the minimum may be shared
    return out


@given(cases(), st.sampled_from(list(PLACEMENTS)), st.sampled_from([-math.inf, 0.2, 0.5, 0.9, math.inf]))
@settings(max_examples=120, deadline=None)
def test_placement_from_the_definitions(case, name, limit):
    tax, known, tr, t, o, _ = case
    rule = create_placement(name, **settings_of(name)).fit(tr, t, tax)
    got = rule(o, limit)
    for a, w in zip(got, slow_place(name, tax, known, tr, t, o, limit, rule.novelty(o).tolist())):
        if isinstance(w, list):
            assert w[a] == pytest.approx(min(w), rel=1e-5, abs=1e-6)
        elif name == 'prototypes':
            assert tax.heights[a] > 0 or limit > 0
        else:
            assert a == w, name
    leaf = rule.leaf(o)
    s = rule.novelty(o).numpy()
    np.testing.assert_array_equal(got[s <= limit], leaf[s <= limit])


@given(cases(), st.sampled_from(list(PLACEMENTS)))
@slowly
def test_an_answer_does_not_depend_on_its_neighbours(case, name):
    tax, known, tr, t, o, r = case
    rule = create_placement(name, **settings_of(name)).fit(tr, t, tax).calibrate(tr, t, loss=0.2)
    order = r.permutation(len(o))
    whole = rule(o)

    def alike(got, want):
        """The same; but of two nodes over the same training images, which lie equally near, a matrix product of another
        shape may find the other one nearer"""
        (i,) = np.nonzero(got != want)
        if name == 'prototypes':
            e = torch.nn.functional.normalize(o.emb.double()).numpy()
            near = e @ rule.prototypes.double().numpy().T
            assert (
                (np.abs(near[i, got[i]] - near[i, want[i]]) < 1e-6).all()
                and (tax.heights[got[i]] > 0).all()
                and (tax.heights[want[i]] > 0).all()
            )
        else:
            assert not len(i)

    back = np.argsort(order)
    alike(rule(o[torch.as_tensor(order)])[back], whole)
    alike(np.concatenate([rule(o[i : i + 1]) for i in range(len(o))]), whole)
    assert rule(o[:0]).shape == (0,)
    np.testing.assert_array_equal(rule.sweep(o, [math.inf, rule.limit]), [rule.leaf(o), whole])
    again = Placement.restore(rule.state(), tax)
    assert again.limit == rule.limit
    np.testing.assert_array_equal(again(o), whole)


@given(cases(), st.sampled_from(list(PLACEMENTS)), st.sampled_from([0.0, 0.01, 0.1, 0.5]))
@slowly
def test_the_limit_is_the_lowest_that_keeps_to_the_loss(case, name, loss):
    tax, known, tr, t, o, r = case
    rule = create_placement(name, **settings_of(name)).fit(tr, t, tax)
    y = r.choice(tax.leaves[known], len(o))
    rule.calibrate(o, y, loss)
    right = rule.leaf(o) == y
    s = rule.novelty(o).numpy()
    lost = lambda limit: (right & (s > limit)).sum()
    assert lost(rule.limit) <= loss * len(o) + 1e-9 and (right & (rule(o) != y)).sum() == lost(rule.limit)
    for lower in s[s < rule.limit]:
        assert lost(lower) > loss * len(o) + 1e-9 or lost(lower) == lost(rule.limit)


def test_climbing_is_the_decision_rule():
    r = np.random.default_rng(1)
    tax = random_tree(60, 5, r)
    o = outputs(tax, 200, r)
    t = np.repeat(tax.leaves, 2)[:200]
    rule = create_placement('climb').fit(outputs(tax, len(t), r), t, tax)
    for x in (0.05, 0.3, 0.62):
        np.testing.assert_array_equal(
            rule(o, x), create_rule('climb', confidence=1 - x).fit(tax=tax)(o.node_probs.double())
        )


@given(cases(least=1))
@slowly
def test_the_median_is_the_least_expected_distance(case):
    tax, *_, r = case
    mass = r.dirichlet(np.full(len(tax), r.choice([0.05, 1.0])), 4) * r.choice([1e-8, 1, 1e8])
    D = np.array([[dist(tax, a, b) for b in range(len(tax))] for a in range(len(tax))])
    for row, a in zip(mass, tree_median(torch.as_tensor(mass), tax)):
        assert (D @ row)[int(a)] == pytest.approx((D @ row).min(), rel=1e-9)


def test_own_detectors_and_rules():
    class Coin(Detector):
        def _score(self, o):
            return o.emb[:, 0]

    register_detector('coin', Coin, 'the first number')
    try:
        r = np.random.default_rng(2)
        tax = random_tree(12, 3, r)
        t = tax.leaves.astype(np.int64)
        rule = create_placement('steps', detector='coin').fit(outputs(tax, len(t), r), t, tax)
        o = outputs(tax, 5, r)
        torch.testing.assert_close(rule.novelty(o), o.emb[:, 0].double())
        assert 'coin' in list_detectors().index
    finally:
        del DETECTORS.entries['coin']
    register_placement('mine', 'hiermetric.judging.placements.StepsUp')
    try:
        assert 'mine' in list_placements().index and type(create_placement('mine')).__name__ == 'StepsUp'
    finally:
        del PLACEMENTS.entries['mine']


def test_the_curve_point_by_point():
    r = np.random.default_rng(5)
    tax = random_tree(30, 4, r)
    known = np.ones(tax.n_leaves, bool)
    known[[0, 3]] = False
    t = np.repeat(tax.leaves[known], 3).astype(np.int64)
    tr = outputs(tax, len(t), r, known=known)
    te, u = outputs(tax, len(t), r, known=known), outputs(tax, 10, r, known=known)
    s = np.repeat(tax.leaves[~known], 5).astype(np.int64)
    te.node_probs[:] = tax.node_probs(
        0.5 * torch.nn.functional.one_hot(tax.tensor('leaf_column')[torch.as_tensor(t)], tax.n_leaves)
        + 0.5 * te.node_probs[:, tax.tensor('leaves')]
    )
    for name in PLACEMENTS:
        rule = create_placement(name, **settings_of(name)).fit(tr, t, tax)
        c = known_novel_curve(rule, te, t, u, s, points=20)
        for row in c.itertuples():
            a, b = rule(te, row.limit), rule(u, row.limit)
            assert row.known == pytest.approx((a == t).mean()) and row.novel == pytest.approx(
                np.mean([(b[s == k] == known_ancestor(tax, known)[k]).mean() for k in np.unique(s)])
            )
        assert (
            c.known.is_monotonic_decreasing
            and c.limit.is_monotonic_decreasing
            and c.known.iloc[0] == (rule.leaf(te) == t).mean()
            and c.known.iloc[-1] == 0
        )
        k, n = c.known.to_numpy(), c.novel.to_numpy()
        assert curve_area(c) == pytest.approx(sum((k[i] - k[i + 1]) * (n[i] + n[i + 1]) / 2 for i in range(len(k) - 1)))
        assert novel_at(c, 2.0) == 0.0 and 0 <= novel_at(c) <= 1
        e = evaluate_placement(rule.calibrate(te, t, 0.05), te, t, u, s)
        assert (
            e['lost'] <= 0.05 + 1e-9
            and e['known'] == pytest.approx(k[0])
            and e['area'] == pytest.approx(curve_area(known_novel_curve(rule, te, t, u, s)))
        )
        assert 'area' not in evaluate_placement(rule, te, t, u, s, points=0)


def test_bad_input_is_one_clear_sentence():
    r = np.random.default_rng(0)
    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'y', 'd': 'y'})
    f = features(r, tax)
    t = np.repeat(tax.leaves, 3)
    o = outputs(tax, 12, r)
    fitted = create_placement('blend').fit(o, t, tax)

    def bad(what, call):
        with pytest.raises(HiermetricError, match=what) as e:
            call()
        assert '\n' not in str(e.value)

    bad('at least one must go', lambda: draw_species(f, 4))
    bad('number of species', lambda: draw_species(f, 0))
    bad("'x' is no leaf", lambda: hold_out(f, ['x']))
    bad('no node 99', lambda: hold_out(f, [99]))
    bad('There is no', lambda: hold_out(f, ['zebra']))
    bad('no images of it', lambda: hold_out(Features(f.x[:6], f.targets[:6], f.split[:6], tax), ['d']))
    bad('Nothing is left', lambda: hold_out(f, tax.leaves))
    bad('4 booleans', lambda: known_probs(o.node_probs, tax, np.ones(3, bool)))
    bad('4 booleans', lambda: known_ancestor(tax, np.ones(4)))
    bad('No leaf is known', lambda: known_ancestor(tax, np.zeros(4, bool)))
    bad("no detector 'sofmax'.*Did you mean", lambda: create_detector('sofmax'))
    bad("no placement 'clim'", lambda: create_placement('clim'))
    bad("'knn' has no setting 'n'", lambda: create_detector('knn', n=3))
    bad('neighbours k', lambda: create_detector('knn', k=0))
    bad('lower k', lambda: create_detector('knn', k=50).fit(o, t, tax))
    bad('steps', lambda: create_detector('clade', steps=-1))
    bad('steps', lambda: create_placement('steps', steps=0))
    bad('kappa', lambda: create_placement('blend', kappa=-1.0))
    bad("no detector 'no'", lambda: create_placement('blend', detector='no'))
    bad('needs the tree', lambda: create_detector('softmax').fit())
    bad('has not been fitted', lambda: create_detector('softmax').score(o))
    bad('has not been fitted', lambda: create_placement('climb')(o))
    bad('has not been fitted', lambda: create_placement('climb').state())
    bad('learns from training images', lambda: create_detector('knn').fit(tax=tax))
    bad('training images', lambda: create_placement('climb').fit(None, None, tax))
    bad('12 images', lambda: fitted.calibrate(o, t[:5]))
    bad('integers', lambda: fitted.calibrate(o, t.astype(float)))
    bad('a share of the images', lambda: fitted.calibrate(o, t, loss=1.0))
    bad('model_outputs', lambda: fitted(o.node_probs))
    bad('do not fit this tree', lambda: fitted(outputs(random_tree(5, 1, r), 3, r)))
    broken = Outputs(o.emb.clone(), o.logits, o.node_probs)
    broken.emb[3, 0] = math.nan
    bad('Image 3 has NaN or infinity in its emb', lambda: fitted(broken))
    bad('another tree', lambda: Placement.restore(fitted.state(), tax.subset(['a', 'b', 'c'])))
    bad('another tree', lambda: Detector.restore(fitted.gate.state(), tax.subset(['a', 'b', 'c'])))
    bad('one of the two', lambda: auroc([], [1.0]))

    class Nameless(type(fitted)):
        pass

    bad('no name', lambda: Nameless().fit(outputs(tax, 12, r), t, tax).state())
    one = Taxonomy.from_parents({'only': None})
    bad('nowhere to place', lambda: create_placement('climb').fit(outputs(one, 2, r), np.zeros(2, int), one))
