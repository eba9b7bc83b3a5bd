"Held-out species, their right answers and what is said of them."

import numpy as np, pytest, torch
from hypothesis import given
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.known import (
    balanced,
    draw_species,
    hold_out,
    known_ancestor,
    known_leaves,
    known_probs,
    model_outputs,
    placement_scores,
)
from unseen_cases import cases, dist, features, slowly, under, up


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
