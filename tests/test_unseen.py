"Placing the unseen, against slow and obvious versions, on random ragged trees."

import json, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import norm
from hiermetric.core import HiermetricError
from hiermetric.decisions import create_rule
from hiermetric.images.features import Features
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.taxonomy import Taxonomy
from hiermetric.unseen import (
    DETECTORS,
    PLACEMENTS,
    Detector,
    Outputs,
    Placement,
    auroc,
    balanced,
    create_detector,
    create_placement,
    curve_area,
    draw_species,
    evaluate_placement,
    hold_out,
    known_ancestor,
    known_leaves,
    known_novel_curve,
    known_probs,
    list_detectors,
    list_placements,
    model_outputs,
    node_prototypes,
    novel_at,
    placement_scores,
    Rehearsal,
    register_detector,
    register_placement,
    rehearse,
)
from hiermetric.arithmetic import tree_median

slowly = settings(max_examples=40, deadline=None)


def random_tree(n, back, r):
    return Taxonomy.from_parents({f'n{i}': f'n{r.integers(max(0, i - back), i)}' if i else None for i in range(n)})


def up(tax, v):
    return [v, *up(tax, int(tax.parents[v]))] if v else [0]


def under(tax, v):
    return [j for j in range(len(tax)) if v in up(tax, j)]


def dist(tax, a, b):
    return len(set(up(tax, a)) ^ set(up(tax, b)))


def outputs(tax, n, r, dim=5, known=None):
    "Random outputs, some rows flat and some saturated"
    z = torch.as_tensor(r.normal(size=(n, tax.n_leaves)) * r.choice([0.1, 2.0, 30.0], (n, 1)), dtype=torch.float32)
    if known is not None:
        z[:, ~torch.as_tensor(known)] = -math.inf
    return Outputs(torch.as_tensor(r.normal(size=(n, dim)), dtype=torch.float32), z, tax.node_probs(z.softmax(1)))


@st.composite
def cases(draw, least=3):
    "A tree, some of its leaves known, training images of all known leaves, other images"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tax = random_tree(draw(st.integers(least, 40)), draw(st.sampled_from([1, 3, 40])), r)
    known = r.random(tax.n_leaves) < 0.7
    known[r.integers(tax.n_leaves)] = True
    t = np.concatenate([tax.leaves[known], r.choice(tax.leaves[known], 12)]).astype(np.int64)
    return tax, known, outputs(tax, len(t), r, known=known), t, outputs(tax, int(r.integers(1, 12)), r, known=known), r


def settings_of(name):
    return {'steps': dict(steps=2)}.get(name, {})


# ---- protocol --------------------------------------------------------------------------------------------------------
def features(r, tax, per=6):
    t = np.repeat(tax.leaves, per)
    return Features(
        r.normal(size=(len(t), 4)).astype(np.float32),
        t,
        np.tile(['train', 'train', 'train', 'val', 'test', 'test'], tax.n_leaves),
        tax,
        {'dataset': 'toy'},
    )


@given(cases())
@slowly
def test_right_answers_by_walking_up(case):
    tax, known, *_ = case
    seen = set(tax.leaves[known].tolist())
    want = [next(u for u in up(tax, v) if seen & set(under(tax, u))) for v in range(len(tax))]
    np.testing.assert_array_equal(known_ancestor(tax, known), want)


@given(cases())
@slowly
def test_held_out_species_are_gone_from_training(case):
    tax, *_, r = case
    if tax.n_leaves < 3:
        return
    f = features(r, tax)
    n = int(r.integers(1, tax.n_leaves))
    chosen = draw_species(f, n, seed=3)
    held = hold_out(f, chosen)
    assert len(set(chosen.tolist())) == n and held.x is f.x and (held.targets == f.targets).all()
    for t, before, now in zip(f.targets, f.split, held.split):
        assert now == ('unseen' if t in chosen else before)
    np.testing.assert_array_equal(known_leaves(held), [i not in chosen for i in tax.leaves])
    if n < tax.n_leaves - 1:
        again = hold_out(held, draw_species(held, 1, seed=4))
        assert (again.split == 'unseen').sum() == 6 * (n + 1)  # a second set out of what is left
    rest = draw_species(f, 1, exclude=np.setdiff1d(tax.leaves, tax.leaves[:2]))
    assert rest[0] in tax.leaves[:2]


def test_held_out_by_name_and_the_same_every_time():
    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'y', 'd': 'y'})
    f = features(np.random.default_rng(0), tax)
    assert hold_out(f, ['a', 'c']).fingerprint == hold_out(f, tax.index(['c', 'a'])).fingerprint != f.fingerprint
    assert hold_out(f, ['a']).meta['held_out'] == ['root/x/a'] and 'held_out' not in f.meta
    assert {tuple(draw_species(f, 2, s)) for s in range(40)} == {
        tuple(sorted(p)) for p in [(i, j) for i in tax.leaves for j in tax.leaves if i < j]
    }  # every pair comes up
    np.testing.assert_array_equal(draw_species(f, 2, 7), draw_species(f, 2, 7))


@given(cases())
@slowly
def test_probabilities_are_conditioned_on_what_is_known(case):
    tax, known, _, _, o, r = case
    p = r.dirichlet(np.full(tax.n_leaves, 0.3), 5).astype(np.float32)
    p[0, known] = 0
    p[0, ~known] = 1 / max((~known).sum(), 1)
    if (~known).sum() == 0:
        p[0] = 1 / tax.n_leaves
    got = known_probs(tax.node_probs(torch.as_tensor(p)), tax, known).numpy()
    for row, out in zip(p, got):
        q = np.where(known, row, 0)
        q = q / q.sum() if q.sum() > 0 else known / known.sum()
        np.testing.assert_allclose(
            out,
            [sum(q[tax.leaf_column[j]] for j in under(tax, v) if tax.heights[j] == 0) for v in range(len(tax))],
            atol=1e-5,
        )


@pytest.mark.parametrize('name', ['classifier', 'arcface', 'sphere_multi', 'hace', 'arcface_levels', 'conditional'])
def test_outputs_of_every_kind_of_head(name):
    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'y', 'd': 'y', 'e': ''})
    torch.manual_seed(0)
    model, known = Model(EmbeddingNet(6, 4), create_head(name, 4, tax)), np.array([1, 0, 1, 1, 0], bool)
    x = torch.randn(9, 6)
    o = model_outputs(model, x, known)
    small = model_outputs(model, x, known, batch_size=2)
    assert o.emb.shape == (9, 4) and o.logits.shape == (9, 5) and o.node_probs.shape == (9, len(tax)) and len(o) == 9
    assert (
        (o.logits.isinf() == torch.tensor(~known)).all()
        and (o.node_probs[:, tax.index('e')] == 0).all()
        and (o.node_probs[:, 0] - 1).abs().max() < 1e-5
    )
    for a, b in (
        (o.emb, small.emb),
        (o.logits.nan_to_num(neginf=0), small.logits.nan_to_num(neginf=0)),
        (o.node_probs, small.node_probs),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if name in ('classifier', 'arcface', 'hace'):
        leaf = o.logits.softmax(1)
        torch.testing.assert_close(o.node_probs, tax.node_probs(leaf), atol=1e-5, rtol=1e-4)


# ---- detectors -------------------------------------------------------------------------------------------------------
def slow_protos(emb, t, tax):
    e = emb.double().numpy()
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    out = np.zeros((len(tax), e.shape[1]))
    mean = {c: (lambda s: s / np.linalg.norm(s))(e[t == c].sum(0)) for c in np.unique(t)}
    for v in range(len(tax)):
        m = [mean[c] for c in mean if v in up(tax, int(c))]
        if m:
            s = np.sum(m, 0)
            out[v] = s / np.linalg.norm(s)
    return out


@given(cases())
@slowly
def test_detectors_by_hand(case):
    tax, known, tr, t, o, _ = case
    P = o.node_probs.numpy()
    leaf = P[:, tax.leaves].astype(float)
    e = o.emb.numpy() / np.linalg.norm(o.emb.numpy(), axis=1, keepdims=True)
    b = tr.emb.numpy() / np.linalg.norm(tr.emb.numpy(), axis=1, keepdims=True)
    best = tax.leaves[leaf.argmax(1)]
    protos = slow_protos(tr.emb, t, tax)
    want = {
        'softmax': 1 - leaf.max(1),
        'entropy': [-sum(p * math.log(p) for p in row if p > 0) for row in leaf],
        'energy': [-math.log(sum(math.exp(z - max(row)) for z in row)) - max(row) for row in o.logits.tolist()],
        'clade': [1 - P[i, up(tax, int(v))[1] if v else 0] for i, v in enumerate(best)],
        'prototype': [1 - max(x @ protos[c] for c in np.unique(t)) for x in e],
        'knn': [1 - sorted((x @ y for y in b), reverse=True)[2] for x in e],
    }
    assert set(want) == set(DETECTORS) - {'rehearsed'}
    for name, w in want.items():
        d = create_detector(name, **({'k': 3} if name == 'knn' else {})).fit(tr, t, tax)
        np.testing.assert_allclose(d.score(o), w, atol=2e-5, err_msg=name)
        again = Detector.restore(d.state(), tax)
        torch.testing.assert_close(again.score(o), d.score(o), atol=0, rtol=0)
        json.dumps({k: v for k, v in d.state().items() if k != 'learned'})
        assert all(isinstance(v, torch.Tensor) for v in d.state()['learned'].values())


@given(cases())
@slowly
def test_prototypes_by_hand(case):
    tax, known, tr, t, *_ = case
    got = node_prototypes(tr.emb, torch.as_tensor(t), tax).numpy()
    want = slow_protos(tr.emb, t, tax)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(
        np.abs(got).sum(1) > 0, [bool(set(under(tax, v)) & set(t.tolist())) for v in range(len(tax))]
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_auroc_counts_pairs(a, b):
    assert auroc(a, b) == pytest.approx(np.mean([(y > x) + 0.5 * (y == x) for x in a for y in b]))


# ---- placement -------------------------------------------------------------------------------------------------------
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
    register_placement('mine', 'hiermetric.unseen.StepsUp')
    try:
        assert 'mine' in list_placements().index and type(create_placement('mine')).__name__ == 'StepsUp'
    finally:
        del PLACEMENTS.entries['mine']


# ---- metrics ---------------------------------------------------------------------------------------------------------
@given(cases())
@slowly
def test_scores_by_hand(case):
    tax, known, *_, r = case
    n = int(r.integers(1, 15))
    a, t = r.integers(len(tax), size=n), r.choice(tax.leaves, n)
    right = known_ancestor(tax, known)[t]

    def each(i):
        d = dist(tax, int(a[i]), int(right[i]))
        x, y = set(up(tax, int(a[i]))) - {0}, set(up(tax, int(right[i]))) - {0}
        return [d, d == 0, d <= 1, 2 * len(x & y) / (len(x) + len(y)) if x or y else 1.0]

    rows = np.array([each(i) for i in range(n)], float)
    want = np.mean([rows[t == c].mean(0) for c in np.unique(t)], 0)
    np.testing.assert_allclose(list(placement_scores(a, t, tax, known).values()), want, atol=1e-12)
    np.testing.assert_allclose(
        balanced(rows, t) if rows.ndim == 1 else [balanced(c, t) for c in rows.T], want, atol=1e-12
    )


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


# ---- bad input -------------------------------------------------------------------------------------------------------
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


# ---- rehearsal -------------------------------------------------------------------------------------------------------
def played(tax, r, known=(1.0, 6.0), strangers=(1.0, 0.5), n=400):
    "A round: two leaves play the stranger; the logits' height says who is who"
    stars = r.choice(tax.leaves, 2, replace=False)
    seen = ~np.isin(tax.leaves, stars)
    own = tax.leaves[seen]

    def say(t, height):
        z = torch.as_tensor(r.normal(size=(len(t), tax.n_leaves)), dtype=torch.float32)
        hit = np.isin(t, own)
        z[torch.arange(len(t))[hit], tax.leaf_column[t[hit]]] += height
        z[~torch.as_tensor(hit), int(tax.leaf_column[own[0]])] += height
        z[:, ~torch.as_tensor(seen)] = -math.inf
        return Outputs(
            torch.as_tensor(r.normal(size=(len(t), 5)), dtype=torch.float32), z, tax.node_probs(z.softmax(1))
        )

    t = {'train': np.repeat(own, 4), 'val': r.choice(own, n), 'unseen': r.choice(stars, n)}
    return Rehearsal(
        {'train': say(t['train'], 6.0), 'val': say(t['val'], known[1]), 'unseen': say(t['unseen'], strangers[1])}, t
    )


def test_a_gate_learns_what_tells_strangers():
    r = np.random.default_rng(0)
    tax = random_tree(30, 30, r)
    rounds = [played(tax, r) for _ in range(3)]
    new = played(tax, r)
    o, t = new.outputs, new.targets
    rule = (
        create_placement('blend', detector='rehearsed')
        .rehearse(rounds, tax)
        .fit(o['train'], t['train'], tax)
        .calibrate(o['val'], t['val'], loss=0.02)
    )
    plain = create_placement('blend').fit(o['train'], t['train'], tax)
    assert auroc(rule.novelty(o['val']), rule.novelty(o['unseen'])) > max(
        0.95, auroc(plain.novelty(o['val']), plain.novelty(o['unseen'])) - 0.01
    )
    kept = rule.leaf(o['val']) == t['val']
    assert (kept & (rule(o['val']) != t['val'])).mean() <= 0.02
    np.testing.assert_array_equal(rule.elsewhere(o['unseen']), plain.elsewhere(o['unseen']))
    before = torch.get_rng_state()
    other = (
        create_placement('blend', detector='rehearsed').rehearse(rounds, tax, seed=1).fit(o['train'], t['train'], tax)
    )
    assert not torch.equal(other.novelty(o['val']), rule.novelty(o['val'])) and torch.equal(
        before, torch.get_rng_state()
    )
    one = [rule.novelty(o['val'][slice(i, i + 1)]).item() for i in range(5)]
    np.testing.assert_allclose(one, rule.novelty(o['val'])[:5], rtol=1e-4, atol=1e-5)  # alone or in company
    np.testing.assert_allclose(Placement.restore(rule.state(), tax).novelty(o['val']), rule.novelty(o['val']))
    assert rule.novelty(o['unseen']).isfinite().all()


def test_a_gate_that_nothing_can_be_learned_for():
    r = np.random.default_rng(1)
    tax = random_tree(20, 20, r)
    blind = [played(tax, r, strangers=(1.0, 6.0)) for _ in range(3)]
    o = played(tax, r, strangers=(1.0, 6.0)).outputs
    rule = (
        create_placement('blend', detector='rehearsed')
        .rehearse(blind, tax)
        .fit(o['train'], np.resize(tax.leaves, len(o['train'])), tax)
    )
    assert rule.novelty(o['val']).isfinite().all()
    flat = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'x', 'd': 'x', 'e': 'x'}).prune()
    with pytest.raises(HiermetricError, match='nothing to learn'):
        create_placement('blend', detector='rehearsed').rehearse([], flat)


def test_each_known_species_plays_once():
    r = np.random.default_rng(2)
    tax = random_tree(25, 25, r)
    f = hold_out(features(r, tax), tax.leaves[:2])
    models = []

    def train(g):
        assert not set(g.targets) & set(tax.leaves[:2].tolist()) and g.split.tolist().count('unseen') == 6 * len(
            np.unique(g.targets[g.split == 'unseen'])
        )
        models.append(Model(EmbeddingNet(4, kind='none'), create_head('classifier', in_features=4, taxonomy=tax)))
        return models[-1]

    rounds = rehearse(f, train, rounds=4, seed=3)
    stars = [np.unique(o.targets['unseen']) for o in rounds]
    assert (
        len(models) == 4
        and sorted(np.concatenate(stars).tolist()) == tax.leaves[2:].tolist()
        and all(set(s).isdisjoint(o.targets['train']) for s, o in zip(stars, rounds))
    )
    for s, o in zip(stars, rounds):
        assert (o.outputs['val'].node_probs[:, torch.as_tensor(s)] == 0).all()
