"Quantiles and sets that keep a promise, image by image."

import numpy as np
from hypothesis import given, settings
from hiermetric.judging.rules import create_rule
from hiermetric.judging.conformal import fewest_images, conformal_order
from hiermetric.trees.taxonomy import Taxonomy
from rule_cases import bags


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


def test_being_sure_over_calibration_sets():
    "Uniform scores: the long-run correctness of a calibration set is its threshold"
    r = np.random.default_rng(0)
    n, c, sure = 60, 0.9, 0.95
    k = int(conformal_order(n, c, sure))
    u = np.sort(r.random((20000, n)), 1)
    assert (u[:, k - 1] >= c).mean() >= sure - 0.006 and (u[:, k - 2] >= c).mean() < sure  # and no smaller k will do
    assert conformal_order(10, c, sure) > 10 and fewest_images(c, sure) == 1 + next(
        m for m in range(1, 99) if 1 - c**m >= sure
    )


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
