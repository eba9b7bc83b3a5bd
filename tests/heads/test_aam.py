"Additive angular margins: against slow loops, pytorch-metric-learning, and the traps (hiermetric.heads.aam)"

import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pytorch_metric_learning import losses as pml
from hiermetric.heads.aam import ArcFace, CombinedMargin, SubCenterArcFace, add_margin, combined_margin
from hiermetric.trees.geometry import sine, unit
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import create_head
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths({f'c{i}': f'g{i % 4}' for i in range(17)})
C, D, B = 17, 32, 64
HEADS = {
    'arcface': dict(m=0.5),
    'arcface jump': dict(m=0.5, tail='jump'),
    'subcenter': dict(m=0.5, K=3),
    'combined': dict(m1=1.35, m2=0.5, m3=0.2),
    'combined angular': dict(m2=0.3),
    'combined sphere': dict(m1=4.0, m2=0.0),
    'cosface': dict(m=0.35),
}


def make(kind, s=16.0, dim=D, **kw):
    torch.manual_seed(0)
    return create_head(kind.split()[0], dim, TAX, s=s, **{**HEADS[kind], **kw})


def batch(seed=1, dtype=torch.float32, n=B):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, C, (n,), generator=g)
    return torch.randn(n, D, generator=g, dtype=dtype), y, TAX.tensor('leaves')[y]


# equality with pytorch-metric-learning on copied weights


@pytest.mark.parametrize('m', [0.1, 0.2, 0.5])
@pytest.mark.parametrize('s', [1.0, 16.0, 64.0])
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 2e-4), (torch.float64, 1e-9)])
def test_arcface_equals_pml(m, s, dtype, tol):
    "In the tail too (eight samples are nearly opposite to their prototype): 'jump' is pytorch-metric-learning's form"
    x, y, t = batch(dtype=dtype)
    head = make('arcface jump', s, m=m).to(dtype)
    ref = pml.ArcFaceLoss(C, D, margin=math.degrees(m), scale=s)
    ref.W.data = head.weight.data.T.clone()
    with torch.no_grad():
        x[:8] = -head.weight[y[:8]] + 0.02 * x[:8]
    assert (F.normalize(x) * F.normalize(head.weight[y])).sum(1).min() < -math.cos(m)  # some are past π − m
    x.requires_grad_()
    a = head.loss(x, t)
    b = ref(x, y)
    assert a.item() == pytest.approx(b.item(), abs=tol)
    ga, gb = (torch.autograd.grad(o, x)[0] for o in (a, b))
    assert torch.allclose(ga, gb, atol=tol * s)
    smooth = make('arcface', s, m=m).to(dtype)
    assert smooth.loss(x[8:], t[8:]).item() == pytest.approx(
        ref(x[8:], y[8:]).item(), abs=tol
    )  # random embeddings are not in the tail: the default form is the same there


@pytest.mark.parametrize('m', [0.0, 0.2, 0.35])
def test_cosface_equals_pml(m):
    x, y, t = batch()
    head = make('cosface', 30.0, m=m)
    ref = pml.CosFaceLoss(C, D, margin=m, scale=30.0)
    ref.W.data = head.weight.data.T.clone()
    assert head.loss(x, t).item() == pytest.approx(ref(x, y).item(), abs=1e-5)


@pytest.mark.parametrize('K', [1, 2, 3])
def test_subcenter_equals_pml(K):
    x, y, t = batch()
    head = make('subcenter', 30.0, m=0.3, K=K)
    ref = pml.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, margin=math.degrees(0.3), scale=30.0, sub_centers=K)
    ref.W.data = head.weight.data.T.clone()
    assert head.loss(x, t).item() == pytest.approx(ref(x, y).item(), abs=1e-4)
    assert torch.allclose(head(x), ref.get_logits(x), atol=1e-4)  # inference: no margin


def test_sphereface_equals_pml():
    "The multiplicative margin unrolled, (4, 0, 0), against the multiple-angle formula of LargeMarginSoftmaxLoss"
    c = torch.linspace(-0.9999, 0.9999, 999, dtype=torch.float64)
    ref = pml.LargeMarginSoftmaxLoss(C, D, margin=4)
    assert torch.allclose(combined_margin(c, 4.0), ref.modify_cosine_of_target_classes(c.float()).double(), atol=1e-3)


# the definition, one sample and one class at a time


def slow(head, emb, targets):
    def psi(c):
        th = math.acos(max(-1, min(1, c)))
        if isinstance(head, CombinedMargin):
            phi = head.m1 * th + head.m2
            k = math.floor(phi / math.pi)
            return (-1) ** k * math.cos(phi) - 2 * k - head.m3
        if th <= math.pi - head.m:
            return math.cos(th + head.m)
        return math.cos(th) - head.m * math.sin(head.m) if head.tail == 'jump' else -math.cos(th + head.m) - 2

    K = getattr(head, 'K', 1)
    total = 0.0
    for x, v in zip(emb.tolist(), targets.tolist()):
        cos = []
        for j in range(C):
            best = -2.0
            for w in head.weight[j * K : (j + 1) * K].tolist():
                best = max(
                    best, sum(a * b for a, b in zip(x, w)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in w))
                )
            cos.append(best)
        inside = sum(math.exp(head.s * psi(cos[j])) for j in range(C) if TAX.is_ancestor(v, int(TAX.leaves[j])))
        outside = sum(math.exp(head.s * cos[j]) for j in range(C) if not TAX.is_ancestor(v, int(TAX.leaves[j])))
        total -= math.log(inside / (inside + outside))
    return total / len(emb)


@pytest.mark.parametrize('kind', HEADS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), s=st.sampled_from([1.0, 16.0, 30.0]), leaf=st.booleans())
def test_loss_is_the_slow_loss(kind, seed, s, leaf):
    head = make(kind, s).double()
    x, _, t = batch(seed, torch.float64, 5)
    with torch.no_grad():
        x[0] = 0.1 * x[0] - head.weight[7]
        x[1] = 0.1 * x[1] + head.weight[7]
    if not leaf:
        t = torch.randint(0, len(TAX), (5,), generator=torch.Generator().manual_seed(seed))
    assert head.loss(x, t).item() == pytest.approx(slow(head, x, t), rel=1e-6, abs=1e-8)


# traps


@pytest.mark.parametrize('kind', HEADS)
@pytest.mark.parametrize('s', [1.0, 16.0, 128.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_degenerate_inputs_are_finite(kind, s, dtype):
    """On the prototype, opposite to it, beside it, without direction; leaf and inner labels; plain and under bfloat16
    autocast"""
    head = make(kind, s)
    K = getattr(head, 'K', 1)
    w = head.weight.detach()[::K]
    inner = TAX.tensor('parents')[TAX.tensor('leaves')]
    e = torch.cat(
        [w, 3 * w, -w, 1e3 * w, w + 1e-7, w + 1e-4 * torch.randn(w.shape), torch.zeros_like(w), 1e-7 * w, 1e-30 * w]
    ).to(dtype)
    for t in (TAX.tensor('leaves'), inner, torch.where(torch.arange(C) % 2 > 0, inner, TAX.tensor('leaves'))):
        for auto in (False, True):
            x = e.clone().requires_grad_()
            head.zero_grad()
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=auto):
                l = head.loss(x, t.repeat(9))
                p = head.node_probs(x)
            l.backward()
            assert (
                l.dtype == torch.float32
                and l.isfinite()
                and l >= 0
                and x.grad.isfinite().all()
                and head.weight.grad.isfinite().all()
                and p.isfinite().all()
            )


@pytest.mark.parametrize('kind', HEADS)
def test_gradients_stay_small_near_the_prototype(kind):
    """The angle's slope is bounded, so a sample next to its prototype must not outweigh the batch: d loss/dx is at most
    2·s·m1/|x|"""
    head = make(kind, 16.0)
    K = getattr(head, 'K', 1)
    w = F.normalize(head.weight.detach()[::K])
    t = TAX.tensor('leaves')
    bound = 2 * 16 * getattr(head, 'm1', 1.0)
    for size in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        for sign in (1, -1):
            x = (
                sign * w + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) / D**0.5
            ).requires_grad_()
            (head.loss(x, t) * C).backward()
            assert x.grad.norm(dim=1).max() <= bound


def test_zero_embeddings_send_no_gradient():
    head = make('arcface')
    x = torch.zeros(C, D, requires_grad=True)
    head.loss(x, TAX.tensor('leaves')).backward()
    assert x.grad.abs().max() == 0
    assert torch.allclose(head.leaf_probs(x), torch.full((C, C), 1 / C))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('m', [0.0, 1e-3, 0.2, 0.5, 1.5, 3.1])
def test_target_logit_is_monotone_and_continuous(m, dtype):
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    c = theta.cos().to(dtype)
    noise = 4 * torch.finfo(dtype).eps
    y = add_margin(c, m).double()
    step = y.diff()
    h = math.pi / 20000
    assert (
        step.max() <= noise and step.abs().max() <= h + 4 * torch.finfo(dtype).eps ** 0.5
    )  # its slope in θ is at most 1; the safe sine costs √eps at the ends
    assert (y - c.double()).max() <= noise  # a margin never helps
    jump = add_margin(c, m, 'jump').double()
    low = theta < math.pi - m - 1e-3
    assert torch.equal(jump[low], y[low]) and (
        jump.diff().max() <= noise or m > 2.331
    )  # beyond m = tan(m/2) the published form jumps upward
    if m == 0.5:
        assert jump.diff().min() == pytest.approx(-0.1173, abs=1e-3)  # the published form falls from −1 to −1.117


@pytest.mark.parametrize('m1,m2,m3', [(1, 0.3, 0), (1, 0, 0.35), (2, 0, 0), (4, 0, 0), (1.35, 0.5, 0.2), (2.7, 3, 1)])
def test_combined_target_logit_is_monotone_and_continuous(m1, m2, m3):
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    y = combined_margin(theta.cos(), m1, m2, m3)
    assert (
        y.diff().max() <= 1e-12
        and y.diff().abs().max() <= m1 * math.pi / 20000 + 1e-6 * m1
        and (y <= theta.cos() + 1e-9).all()
    )


@pytest.mark.parametrize('m', [0.2, 0.5])
def test_slope_is_continuous_at_the_turn(m):
    "Unrolling joins without a corner: numerical slopes on both sides of π − m agree"
    th = math.pi - m + torch.tensor([-2e-3, -1e-3, 1e-3, 2e-3], dtype=torch.float64)
    y = add_margin(th.cos(), m)
    assert (y[1] - y[0]).item() == pytest.approx((y[3] - y[2]).item(), abs=1e-5)


@pytest.mark.parametrize(
    'f',
    [
        lambda c: add_margin(c, 0.5),
        lambda c: add_margin(c, 0.5, 'jump'),
        lambda c: combined_margin(c, 1.35, 0.5, 0.2),
        lambda c: sine(c),
    ],
)
def test_gradcheck_of_the_margin(f):
    assert torch.autograd.gradcheck(
        f, torch.tensor([-0.99, -0.9, -0.5, 0, 0.3, 0.8, 0.999], dtype=torch.float64, requires_grad=True)
    )


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3))
def test_unit(v):
    x = torch.tensor([v])
    n = x.norm()
    u = unit(x)
    assert u.isfinite().all() and (u.norm().item() == pytest.approx(1, abs=1e-5) if n > 1e-6 else u.abs().max() == 0)


# what the head promises


@pytest.mark.parametrize('kind', HEADS)
def test_no_margin_at_inference_and_direction_only(kind):
    head = make(kind)
    x, y, t = batch()
    K = getattr(head, 'K', 1)
    cos = (F.normalize(x) @ F.normalize(head.weight).T).reshape(B, C, K).amax(2)
    assert torch.allclose(head(x), 16 * cos, atol=1e-5) and torch.allclose(
        head.node_probs(1e3 * x), head.node_probs(x), atol=1e-5
    )
    assert head.loss(x, t) > F.cross_entropy(head(x), y)  # training is harder
    with torch.no_grad():
        before = head(x)
        head.weight.mul_(torch.rand(len(head.weight), 1) + 0.5)
        assert torch.allclose(head(x), before, atol=1e-5)


@pytest.mark.parametrize('kind', HEADS)
def test_margin_touches_only_the_labelled_leaves(kind):
    head = make(kind)
    x, _, _ = batch(n=len(TAX))
    t = torch.arange(len(TAX))
    column, under = head.labels(t)
    z, plain = head.train_logits(x, column, under), head(x)
    assert torch.equal(z[~under], plain[~under]) and (z[under] < plain[under]).all()
    assert head.loss(x[:1], t[:1]).item() == 0  # the root


def test_special_cases_of_the_combined_margin():
    x, _, t = batch()
    arc, cos = make('arcface', m=0.3), make('cosface', m=0.35)
    general = lambda **kw: make('combined', **{**dict(m1=1.0, m2=0.0, m3=0.0), **kw})
    assert torch.equal(general(m2=0.3).loss(x, t), arc.loss(x, t)) and torch.equal(
        general(m3=0.35).loss(x, t), cos.loss(x, t)
    )
    c = torch.linspace(-1, 1, 301, dtype=torch.float64)
    assert torch.allclose(
        combined_margin(c, 1 + 1e-9, 0.3, 0.1), combined_margin(c, 1.0, 0.3, 0.1), atol=1e-6
    )  # the two routes agree
    unicom = CombinedMargin(D, TAX)
    assert (unicom.m1, unicom.m2, unicom.m3, unicom.s) == (1, 0.3, 0, 32)


def test_one_centre_is_arcface():
    x, _, t = batch()
    one, sub = make('arcface'), make('subcenter', K=1)
    sub.weight = one.weight
    assert torch.equal(one.loss(x, t), sub.loss(x, t)) and sub.weight.shape == (C, D)


def test_training_moves_the_second_centre_to_the_second_cluster():
    "A class in two places: with one prototype it cannot be near both, with two it is"
    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x'})
    g = torch.Generator().manual_seed(0)
    spots = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]])
    k = torch.arange(3).repeat(40)
    x = spots[k] + 0.05 * torch.randn(120, 3, generator=g)
    t = tax.tensor('leaves')[(k == 2).long()]
    own = {}
    for K in (1, 2):
        torch.manual_seed(0)
        head = SubCenterArcFace(3, tax, K=K)
        opt = torch.optim.AdamW(head.parameters(), lr=0.05)
        for _ in range(100):
            opt.zero_grad()
            head.loss(x, t).backward()
            opt.step()
        own[K] = (head(x) / 16)[k < 2, 0].min().item()
    assert own[2] > 0.7 and own[1] < 0.2


@pytest.mark.parametrize(
    'call,message',
    [
        (
            lambda: ArcFace(D, TAX, m=28.6),
            'The margin m must be an angle in [0, π) radians, not 28.6; 0.1 to 0.5 is usual. That looks like degrees.',
        ),
        (lambda: ArcFace(D, TAX, m=-0.1), 'The margin m must be an angle in [0, π) radians, not -0.1'),
        (lambda: ArcFace(D, TAX, m=math.nan), 'not nan'),
        (lambda: ArcFace(D, TAX, s=0), 'The scale s must be a positive number, not 0'),
        (lambda: ArcFace(D, TAX, s=math.inf), 'not inf'),
        (
            lambda: ArcFace(D, TAX, tail='smoth'),
            "There is no tail 'smoth'; there are smooth, jump. Did you mean 'smooth'?",
        ),
        (lambda: SubCenterArcFace(D, TAX, K=0), 'A class needs at least one prototype, not K=0.'),
        (lambda: CombinedMargin(D, TAX, m1=0.5), 'Margins must satisfy m1 ≥ 1'),
        (lambda: CombinedMargin(D, TAX, m2=4), 'got m1=1.0, m2=4, m3=0.0'),
        (lambda: CombinedMargin(D, TAX, m3=-1), 'm3 ≥ 0'),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)


@pytest.mark.parametrize('kind', HEADS)
def test_it_learns(kind):
    "Two hundred samples in 17 classes: every head fits them"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, C, (200,), generator=g)
    x = 3 * torch.randn(C, D, generator=g)[y] + torch.randn(200, D, generator=g)
    t = TAX.tensor('leaves')[y]
    head = make(kind)
    opt = torch.optim.AdamW(head.parameters(), lr=0.02)
    first = head.loss(x, t).item()
    for _ in range(60):
        opt.zero_grad()
        l = head.loss(x, t)
        l.backward()
        opt.step()
    assert l.item() < 0.5 * first and (head(x).argmax(1) == y).float().mean() > 0.95
