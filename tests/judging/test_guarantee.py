"Answers that keep a promise: exactly, in every group, under weights."

import json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.judging.rules import Rule, create_rule
from hiermetric.judging.conformal import fewest_images
from hiermetric.judging.guarantee import _pools, bits_per_mistake, class_ratios
from hiermetric.judging.curves import operating_curve
from hiermetric.trees.taxonomy import Taxonomy
from rule_cases import bags, first_best, labelled, path, random_tree, under


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
    pool = _pools(np.bincount(of, minlength=len(names)), above, fewest_images(c, None))[of]
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
    if ((counts + 1 < fewest_images(c, None)) & np.isin(np.arange(len(counts)), rule.grouping[2])).any():
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
