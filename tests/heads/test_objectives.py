"Losses along the path: the tools, the published forms, the schedules, and the traps (hiermetric.heads.objectives)"

import math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.trees.arithmetic import group_logsumexp, leaf_counts, path_rings, path_sums, root_path
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import HEADS, register_head
from hiermetric.heads.objectives import (
    HACE,
    HXE,
    LogitAdjusted,
    SimpleHierarchy,
    SoftLabels,
    SoftMaxMargin,
    leaf_costs,
    path_steps,
    ramp,
)
from hiermetric.trees.taxonomy import Taxonomy
from path_kinds import D, TAX, batch, counted, distance, leaves_under, make, mass, tail, trees, ups

# the tools


@settings(max_examples=25, deadline=None)
@given(trees(18), st.integers(0, 99))
def test_tools_on_any_tree(tax, seed):
    t = torch.arange(len(tax))
    z = 3 * torch.randn(len(tax), tax.n_leaves, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    paths, rings, steps, costs = root_path(t, tax), path_rings(t, tax), path_steps(z, t, tax), leaf_costs(t, tax)
    assert steps.shape == (len(tax), tax.height) and paths.shape == (len(tax), tax.height + 1)
    for v in range(len(tax)):
        path = tax.ancestors(v).tolist()
        d = len(path) - 1
        assert paths[v].tolist() == path + [v] * (tax.height - d)
        for j, leaf in enumerate(tax.leaves.tolist()):
            assert rings[v, j] == (tax.height if v in ups(tax, leaf) else tax.depths[tax.lca(v, leaf)])
            assert costs[v, j].item() == pytest.approx(distance(tax, v, j), abs=1e-6) and (costs[v, j] == 0) == (
                v in ups(tax, leaf)
            )
        for k in range(d):
            assert steps[v, k].item() == pytest.approx(
                -math.log(mass(z[v], tax, path[k + 1]) / mass(z[v], tax, path[k])), rel=1e-6, abs=1e-9
            )
        assert (steps[v, d:] == 0).all()
    x = torch.randn(2, len(tax), generator=torch.Generator().manual_seed(seed))
    s = path_sums(x, tax)
    assert s.dtype == torch.float32 and torch.allclose(
        s, torch.stack([x[:, tax.ancestors(v).tolist()].sum(1) for v in range(len(tax))], 1), atol=1e-5
    )


def test_path_sums_keep_small_values_beside_huge_ones():
    tax = Taxonomy.from_parents({'r': None, **{f'a{i}': 'r' for i in range(2000)}})
    x = torch.full((1, 2001), 1e6)
    x[0, ::2] = -1e6
    x[0, 0] = 0
    x[0, 2000] = 1e-3
    assert torch.allclose(path_sums(x, tax)[0, 1:], x[0, 1:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_group_logsumexp(dtype):
    g = torch.Generator().manual_seed(0)
    x = 30 * torch.randn(5, 40, generator=g, dtype=dtype)
    group = torch.randint(0, 9, (5, 40), generator=g)
    group[group == 4] = 5
    out = group_logsumexp(x, group, 9)
    for i in range(5):
        for k in range(9):
            inside = x[i][group[i] == k]
            assert (
                out[i, k].item() == pytest.approx(inside.logsumexp(0).item(), rel=1e-6)
                if len(inside)
                else out[i, k] == torch.finfo(dtype).min
            )
    same = torch.randint(0, 9, (40,), generator=g)
    assert torch.equal(group_logsumexp(x, same, 9), group_logsumexp(x, same.expand(5, -1), 9))


def test_gradcheck_of_the_tools():
    z = torch.randn(len(TAX), 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    t = torch.arange(len(TAX))
    assert torch.autograd.gradcheck(lambda o: path_steps(o, t, TAX), (z,))
    group = torch.tensor([0, 2, 2, 0, 5, 2])
    assert torch.autograd.gradcheck(lambda o: group_logsumexp(o, group, 6)[:, [0, 2, 5]], (z,))
    x = torch.randn(2, len(TAX), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o: path_sums(o, TAX), (x,))


@pytest.mark.parametrize('gap', [50.0, 95.0, 120.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize('kind', ['hxe', 'hace', 'soft_labels', 'simple_hierarchy', 'soft_max_margin'])
def test_hopeless_and_perfect_logits(kind, gap):
    """The published HXE has a NaN gradient at 95 and loss 0 at 120: here the loss grows with the gap, and so does a
    gradient of order 1"""
    head = make(kind)
    t = torch.tensor(TAX.index(['lynx', 'cat', 'owl', 'root']))
    z = torch.zeros(4, 6)
    z[:, 2] = gap
    z.requires_grad_()  # all on the wolf
    l = head.nll(z, t)
    l.sum().backward()
    weight = {'hxe': math.exp(-0.4), 'hace': 0.7, 'soft_labels': 0.5, 'simple_hierarchy': 1.0, 'soft_max_margin': 1.0}[
        kind
    ]
    assert l.isfinite().all() and z.grad.isfinite().all() and l[3] == 0 and z.grad[3].abs().max() == 0
    assert (l[:3] > 0.4 * weight * (gap - 5)).all() and (z.grad[:3, 2] > 0.2).all()
    sure = torch.zeros(1, 6)
    sure[0, 0] = gap
    sure.requires_grad_()
    l = head.nll(sure, t[:1])
    l.sum().backward()
    assert l.isfinite().all() and sure.grad.isfinite().all()
    if kind not in ('soft_labels', 'soft_max_margin'):
        assert l.item() < 6 * math.exp(-min(gap, 80)) + 1e-30  # no rounding to 1e-7


def test_a_nearly_perfect_step_is_not_rounded_to_zero():
    z = torch.zeros(1, 6)
    z[0, 0] = 40.0
    e = path_steps(z, torch.tensor(TAX.index(['lynx'])), TAX)
    assert e[0].tolist() == pytest.approx([2 * math.exp(-40), 2 * math.exp(-40), math.exp(-40)], rel=1e-4)


# objectives


@pytest.mark.parametrize(
    'base,kw',
    [
        ('classifier', {}),
        ('arcface', dict(s=16.0, m=0.3)),
        ('subcenter', dict(K=2)),
        ('combined', {}),
        ('path_softmax', {}),
        ('attention', {}),
    ],
)
@settings(max_examples=8, deadline=None)
@given(tax=trees(), seed=st.integers(0, 99))
def test_unit_weights_are_the_base(base, kw, tax, seed):
    "HXE at α = 0, HACE at ε = 0, fine alone, τ = 0 and very sharp soft labels are the base's own loss"
    emb, t = batch(tax, 4, seed)
    for cls, own in (
        (HXE, dict(alpha=0.0)),
        (HACE, dict(eps=0.0)),
        (SimpleHierarchy, dict(coarse=0.0)),
        (SoftMaxMargin, dict(tau=0.0)),
        (SoftLabels, dict(beta=1e4)),
    ):
        torch.manual_seed(0)
        head = cls(D, tax, base, kw, **own).double()
        assert torch.allclose(head.loss(emb, t), head.head.loss(emb, t), atol=1e-8) and torch.allclose(
            head.node_probs(emb), head.head.node_probs(emb)
        )


def test_hxe_equals_the_published_form():
    "Making Better Mistakes: one-hot masks for numerators and denominators, weights scaled to sum 1 over the tree"
    z = torch.randn(6, 6, dtype=torch.float64)
    leaf = TAX.tensor('leaves')
    w = {v: math.exp(-0.4 * TAX.depths[v]) for v in range(len(TAX))}
    total = sum(w.values())
    p, out = z.softmax(1), []
    for i, y in enumerate(leaf.tolist()):
        path, loss = TAX.ancestors(y)[::-1].tolist(), 0.0
        for child, parent in zip(path, path[1:]):
            num, den = (p[i, leaves_under(TAX, v)].sum() for v in (child, parent))
            loss = loss - w[child] / total * torch.log(num / den)
        out.append(loss)
    head = HXE(D, TAX, alpha=0.4)
    assert torch.allclose(head.nll(z, leaf) / total, torch.stack(out))


def test_soft_labels_equal_the_published_labels():
    "Making Better Mistakes: exp(−β·D/max D), columns normalised; batch-mean KL"
    z = torch.randn(6, 6, dtype=torch.float64)
    Dm = torch.tensor(TAX.cost_matrix('lca_height')).double()
    Dm /= Dm.max()
    y = torch.exp(-7 * Dm) / torch.exp(-7 * Dm).sum(0)
    got = SoftLabels(D, TAX, beta=7.0).nll(z, TAX.tensor('leaves')).mean()
    assert torch.allclose(got, F.kl_div(z.log_softmax(1), y.T, reduction='batchmean'), atol=1e-6)


def test_an_objective_prefers_the_near_mistake():
    "Same probability on the right leaf, the rest on the sibling or on a stranger: cross-entropy cannot tell, these can"
    z = torch.full((2, 6), -9.0)
    z[:, 0] = 0
    z[0, 1] = z[1, 4] = 0
    t = torch.tensor(TAX.index(['lynx', 'lynx']))
    for kind in ('hxe', 'hace', 'simple_hierarchy', 'soft_labels', 'soft_max_margin'):
        near, far = make(kind).nll(z, t)
        assert near < far - 0.05
    near, far = HXE(D, TAX, alpha=0.0).nll(z, t)
    assert near.item() == pytest.approx(far.item(), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(tax=trees(), seed=st.integers(0, 999))
def test_leaf_counts(tax, seed):
    assert np.allclose(leaf_counts(torch.tensor(tail(tax), dtype=torch.long), tax), counted(tax), atol=1e-9)
    assert leaf_counts(torch.zeros(0, dtype=torch.long), tax).tolist() == [0.0] * tax.n_leaves


@pytest.mark.parametrize('tau', [0.0, 1.0])
def test_adjustment_takes_the_frequency_out_of_the_answer(tau):
    """Where images tell nothing, cross-entropy learns the class frequencies and the adjusted loss that all classes are
    alike"""
    n = torch.tensor([64, 32, 16, 8, 4, 2])
    t = TAX.tensor('leaves').repeat_interleave(n)
    head = LogitAdjusted(1, TAX, tau=tau)
    emb = torch.ones(len(t), 1)
    head.prepare(emb, t)
    opt = torch.optim.LBFGS(
        head.parameters(), max_iter=200, line_search_fn='strong_wolfe', tolerance_grad=1e-9, tolerance_change=1e-12
    )

    def step():
        opt.zero_grad()
        z = head.loss(emb, t)
        z.backward()
        return z

    opt.step(step)
    want = n / n.sum() if tau == 0 else torch.full((6,), 1 / 6)
    assert torch.allclose(head.leaf_probs(emb[:1])[0].detach(), want, atol=2e-3)


def test_schedule_is_read_at_every_call():
    head = make('simple_hierarchy', fine_start=2.0, fine_ramp=2.0)
    z, t = torch.randn(3, 6), TAX.tensor('leaves')[:3]
    out = []
    for head.epoch in (0.0, 2.0, 3.0, 4.0, 9.0):
        out.append(head.nll(z, t).mean().item())
    assert out[0] == out[1] < out[2] < out[3] == out[4] and out[2] == pytest.approx((out[1] + out[3]) / 2, rel=1e-5)
    assert [ramp(e, 1, 2) for e in (0, 1, 2, 3, 4)] == [0, 0, 0.5, 1, 1]


def test_trainer_sets_the_epoch():
    from hiermetric.running.fitting import fit
    from hiermetric.images.features import toy_features

    seen = []

    class Spy(SimpleHierarchy):
        def weights(self, depth):
            seen.append(self.epoch)
            return super().weights(depth)

    if 'spy' not in HEADS:
        register_head('spy', Spy)
    fit(toy_features(TAX, 20), 'spy', epochs=3, batch_size=24, embed_dim=8, log=(), head_kw=dict(fine_start=1.0))
    assert min(seen) == 0 and 2 < max(seen) < 3 and seen == sorted(seen)


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: HXE(D, TAX, alpha=-0.1), 'alpha must be a number of at least 0, not -0.1'),
        (lambda: HXE(D, TAX, alpha=math.nan), 'not nan'),
        (lambda: HACE(D, TAX, eps=1.1), 'eps is a share in [0, 1], not 1.1'),
        (lambda: SoftLabels(D, TAX, beta=0), 'beta must be a number above 0'),
        (lambda: SoftMaxMargin(D, TAX, tau=-1), 'tau must be a number of at least 0'),
        (lambda: LogitAdjusted(D, TAX, tau=math.inf), 'tau must be a number of at least 0, not inf'),
        (lambda: SimpleHierarchy(D, TAX, level=0), 'at depth 1 to 3 of this tree, not at 0'),
        (lambda: SimpleHierarchy(D, TAX, fine=0, coarse=0), 'must not be negative nor both 0'),
        (lambda: SimpleHierarchy(D, TAX, fine_start=1, coarse_start=2), 'nothing would be learnt'),
        (lambda: HACE(D, TAX, 'arcfac'), "no head 'arcfac'"),
        (lambda: HACE(D, TAX, 'arcface', dict(margin=2)), "The head 'arcface' has no setting 'margin'"),
        (lambda: HACE(D, TAX, 'hxe'), "'hxe' is not"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)
