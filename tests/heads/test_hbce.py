"Hierarchical binary cross-entropy against loops, its closed-form gradient, extremes (hiermetric.heads.hbce)"

import copy, inspect, math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.heads import hbce
from hiermetric.core import HiermetricError
from hiermetric.heads.hbce import (
    DISTANCE_PENALTIES,
    PENALTIES,
    HBCELoss,
    SphereMaxConstraint,
    SphereMultiHier,
    edge_weights,
    max_constraint_loss,
)
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.sphere import SphereMulti
from hiermetric.judging.metrics import violation_rate
from hiermetric.trees.arithmetic import path_targets
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {
        'lynx': 'mammal/cat',
        'tiger': 'mammal/cat',
        'wolf': 'mammal/dog',
        'fox': 'mammal/dog',
        'owl': 'bird',
        'wren': 'bird',
    }
)


def chain(n):
    return Taxonomy.from_parents({str(i): str(i - 1) if i else None for i in range(n)})


def star(n):
    return Taxonomy.from_parents({'hub': None, **{str(i): 'hub' for i in range(n - 1)}})


TREES = {'tree': TAX, 'pair': chain(2), 'chain': chain(9), 'star': star(6), 'deep chain': chain(26)}


def trees():  # any rooted tree of 2 … 12 nodes
    return st.lists(st.integers(0, 10**6), min_size=1, max_size=11).map(
        lambda r: Taxonomy.from_parents({'0': None, **{str(i + 1): str(k % (i + 1)) for i, k in enumerate(r)}})
    )


def batch(tax, n, seed=0, size=3.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (size * torch.randn(n, len(tax) - 1, generator=g, dtype=dtype)).requires_grad_(), torch.randint(
        0, len(tax), (n,), generator=g
    )


def leaves(tax, n, seed=0):
    return tax.tensor('leaves')[torch.randint(0, tax.n_leaves, (n,), generator=torch.Generator().manual_seed(seed))]


# the definition, sample by sample, node by node


def sigma(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def slow(z, targets, tax, penalty, w, distance, mu, omega, threshold):
    total = 0.0
    for zb, v in zip(z.tolist(), targets.tolist()):
        path = set(tax.ancestors(v).tolist())
        p = [1.0] + [sigma(o) for o in zb]
        best = (0, 0.0)
        for i in range(1, len(tax)):
            if i not in path and v in tax.ancestors(i).tolist():
                continue  # strictly below the label
            total += omega[i - 1] * -math.log(p[i] if i in path else 1 - p[i])
            u = int(tax.parents[i])
            a, b = p[u], p[i]
            total += (
                w[i - 1]
                * {
                    'hinge': max(0, b - a),
                    'product': b * (1 - a),
                    'log': max(0, math.log(b) - math.log(a)),
                    'hard': float(a <= threshold < b),
                    'none': 0.0,
                }[penalty]
            )
            if distance == 'soft':
                total += mu * abs(b - (i in path))
            if b > threshold and (tax.depths[i], b) > (tax.depths[best[0]], best[1]):
                best = (i, b)
        if distance == 'hard':
            total += mu * tax.edge_distance(best[0], v)
    return total / z.numel()


@pytest.mark.parametrize('distance', DISTANCE_PENALTIES)
@pytest.mark.parametrize('penalty', PENALTIES)
@settings(max_examples=12, deadline=None)
@given(tax=trees(), seed=st.integers(0, 999), even=st.booleans(), threshold=st.sampled_from([0.3, 0.5]))
def test_value_is_the_slow_value(penalty, distance, tax, seed, even, threshold):
    z, v = batch(tax, 4, seed, 2.0)
    g = torch.Generator().manual_seed(seed)
    n = len(tax) - 1
    w = 1.5 if even else 3 * torch.rand(n, generator=g)
    omega = 'uniform' if even else (torch.rand(n, generator=g) + 0.1)
    loss = HBCELoss(tax, penalty, w, distance, 0.7, omega, threshold)
    ones = [1.0] * n if even else (omega.double() * n / omega.double().sum()).float().tolist()
    assert loss(z, v).item() == pytest.approx(
        slow(z, v, tax, penalty, [1.5] * n if even else w.tolist(), distance, 0.7, ones, threshold), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize('tree', TREES)
@pytest.mark.parametrize('distance', ['none', 'soft'])
@pytest.mark.parametrize('penalty', ['hinge', 'product', 'log', 'none'])
def test_gradcheck(penalty, distance, tree):
    tax = TREES[tree]
    z, v = batch(tax, 4, 1, 2.0)
    for kw in ({}, dict(weight=torch.rand(len(tax) - 1), level_weights='deep')):
        assert torch.autograd.gradcheck(lambda o: HBCELoss(tax, penalty, distance=distance, **kw)(o, v), z)
        assert torch.autograd.gradcheck(
            lambda o: 3 * HBCELoss(tax, penalty, distance=distance, **kw)(2 * o, v), z
        )  # the chain rule on both sides


def by_autograd(z, v, tax, penalty, weight=1.0):
    "The same in plain torch"
    hot, known = torch.as_tensor(tax.multi_hot(v))[:, 1:].to(z), path_targets(v, tax)[1]
    o = F.pad(z, (1, 0), value=math.inf)
    up = tax.tensor('parents')[1:]
    c, u = o[:, 1:], o[:, up]
    edge = {
        'hinge': lambda: (c.sigmoid() - u.sigmoid()).relu(),
        'product': lambda: c.sigmoid() * (1 - u.sigmoid()),
        'log': lambda: (F.logsigmoid(c) - F.logsigmoid(u)).relu(),
        'none': lambda: 0 * c,
    }[penalty]()
    cells = F.binary_cross_entropy_with_logits(z, hot, reduction='none') + weight * edge
    return (cells if known is None else cells * known).mean()


@pytest.mark.parametrize('penalty', ['hinge', 'product', 'log', 'none'])
@pytest.mark.parametrize('inner', [False, True])
@pytest.mark.parametrize('cells', [1, 100, 10**6])
def test_slices_agree_with_autograd(penalty, inner, cells, monkeypatch):
    "However the batch is cut, in float32 too, with one core's way to gather and with several cores'"
    monkeypatch.setattr(hbce, 'CELLS', cells)
    tax = Taxonomy.from_paths({f'c{i}': f'a{i % 3}/b{i % 3}{i % 7}' for i in range(40)})
    z, v = batch(tax, 37)
    v = v if inner else leaves(tax, 37)
    a, b = HBCELoss(tax, penalty, 2.0)(z, v), by_autograd(z, v, tax, penalty, 2.0)
    ga, gb = (torch.autograd.grad(o, z)[0] for o in (a, b))
    assert a.item() == pytest.approx(b.item(), rel=1e-9) and torch.allclose(ga, gb, rtol=1e-8, atol=1e-12)
    z32 = z.detach().float().requires_grad_()
    c = HBCELoss(tax, penalty, 2.0)(z32, v)
    (gc,) = torch.autograd.grad(c, z32)
    assert (
        c.dtype == torch.float32
        and c.item() == pytest.approx(b.item(), rel=1e-5)
        and torch.allclose(gc.double(), gb, atol=1e-6 / z.numel() * 5)
    )


def test_one_core_and_several_agree(monkeypatch):
    z, v = batch(TAX, 50, dtype=torch.float32)
    out = []
    for n in (1, 4):
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=n: n)
        l = HBCELoss(TAX)(z, v)
        out.append((l.item(), torch.autograd.grad(l, z)[0]))
    assert out[0][0] == out[1][0] and torch.equal(out[0][1], out[1][1])


def test_without_a_penalty_it_is_binary_cross_entropy():
    z, _ = batch(TAX, 30, dtype=torch.float32)
    v = leaves(TAX, 30)
    hot = torch.as_tensor(TAX.multi_hot(v))[:, 1:].float()
    a, b = HBCELoss(TAX, 'none')(z, v), F.binary_cross_entropy_with_logits(z, hot)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert torch.allclose(*(torch.autograd.grad(o, z)[0] for o in (a, b)), atol=1e-9)
    assert HBCELoss(TAX, 'hinge', 0.0)(z, v).item() == pytest.approx(b.item(), rel=1e-6)


# backward


def test_backward_twice_through_one_graph():
    z, v = batch(TAX, 9)
    l = HBCELoss(TAX)(z, v)
    (first,) = torch.autograd.grad(l, z, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * l, z)
    assert torch.equal(first, kept) and torch.allclose(second, 2 * kept, rtol=1e-12)


def test_second_derivatives_are_refused():
    z, v = batch(TAX, 3)
    (g,) = torch.autograd.grad(HBCELoss(TAX)(z, v), z, create_graph=True)
    with pytest.raises(RuntimeError, match='does not require grad'):
        g.sum().backward()
    with pytest.raises(RuntimeError, match='once_differentiable'):
        torch.autograd.grad((HBCELoss(TAX)(z, v) * z.sum()), z, create_graph=True)[0].sum().backward()


def test_nothing_is_written_to_what_was_given():
    z, v = batch(TAX, 9)
    before, labels = z.detach().clone(), v.clone()
    w = torch.rand(10)
    kept = w.clone()
    HBCELoss(TAX, 'product', w, 'soft', level_weights='deep')(z, v, torch.ones(10)).backward()
    assert torch.equal(z.detach(), before) and torch.equal(v, labels) and torch.equal(w, kept)


def test_value_is_the_same_without_gradient():
    z, v = batch(TAX, 9)
    for penalty in PENALTIES:
        loss = HBCELoss(TAX, penalty, distance='soft')
        a = loss(z, v).item()
        with torch.no_grad():
            assert loss(z, v).item() == a
        assert loss(z.detach(), v).item() == a and not loss(z.detach(), v).requires_grad


def test_strided_logits_and_int32_labels():
    z, v = batch(TAX, 8)
    wide = torch.stack([z, 0 * z], 2)[:, :, 0]
    assert not wide.is_contiguous()
    assert HBCELoss(TAX)(wide, v.int()).item() == HBCELoss(TAX)(z, v).item()


def test_hard_parts_have_no_gradient():
    z, v = batch(TAX, 40)
    (plain,) = torch.autograd.grad(HBCELoss(TAX, 'none')(z, v), z)
    for kw in (dict(penalty='hard', weight=9.0), dict(penalty='none', distance='hard', distance_weight=9.0)):
        l = HBCELoss(TAX, **kw)(z, v)
        assert torch.equal(torch.autograd.grad(l, z)[0], plain) and l > HBCELoss(TAX, 'none')(z, v)


# inner labels


@pytest.mark.parametrize('penalty', ['hinge', 'product', 'log'])
@pytest.mark.parametrize('distance', ['none', 'soft'])
def test_nothing_below_an_inner_label_counts(penalty, distance):
    z, _ = batch(TAX, 3)
    v = torch.tensor(TAX.index(['mammal', 'cat', 'root']))
    loss = HBCELoss(TAX, penalty, distance=distance)
    l = loss(z, v)
    (g,) = torch.autograd.grad(l, z)
    known = path_targets(v, TAX)[1]
    assert (g[~known] == 0).all() and (g[known] != 0).any()
    other = torch.where(known, z.detach(), 50 * torch.randn(z.shape, dtype=z.dtype))
    assert loss(other, v).item() == pytest.approx(l.item(), rel=1e-12)
    assert loss(z[2:], v[2:]).item() == 0 and (g[2] == 0).all()  # 'root' tells nothing
    assert loss(z, v).item() == pytest.approx((2 * loss(z[:2], v[:2]) / 3).item(), rel=1e-12)


# extremes


@pytest.mark.parametrize('penalty', PENALTIES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_logits(penalty, dtype):
    z, v = batch(TAX, 64)
    for size in (10.0, 100.0, 1e4):
        for distance in DISTANCE_PENALTIES:
            o = (z.detach().clamp(-1, 1) * size).to(dtype).requires_grad_()
            l = HBCELoss(TAX, penalty, distance=distance)(o, v)
            l.backward()
            assert (
                l.dtype == (dtype if dtype == torch.float64 else torch.float32)
                and l.isfinite()
                and o.grad.dtype == dtype
                and o.grad.isfinite().all()
            )
            if distance == 'none' and penalty != 'hard':
                assert l.item() == pytest.approx(by_autograd(o.detach().double(), v, TAX, penalty).item(), rel=1e-4)


def test_exact_where_the_model_is_sure_and_wrong():
    "1 − p rounds to 0 in float32 from a logit of 17 on; the loss must not notice"
    for at in (5.0, 12.0, 16.0, 17.0, 30.0, 80.0, 90.0, 200.0):
        z = torch.full((2, 10), at)
        l = HBCELoss(TAX, 'none')(z, torch.tensor([3, 9]))
        assert l.item() == pytest.approx(by_autograd(z.double(), torch.tensor([3, 9]), TAX, 'none').item(), rel=1e-6)


def test_autocast():
    z, v = batch(TAX, 8, dtype=torch.float32)
    head = SphereMultiHier(6, TAX)
    e = torch.randn(8, 6)
    with torch.autocast('cpu', torch.bfloat16):
        a, b = HBCELoss(TAX)(z, v), head.loss(e, v)
    assert (
        a.item() == HBCELoss(TAX)(z, v).item()
        and b.dtype == torch.float32
        and b.item() == pytest.approx(head.loss(e, v).item(), rel=1e-6)
    )


def test_empty_batch_and_lone_root():
    for penalty in PENALTIES:
        z = torch.zeros(0, 10, requires_grad=True)
        l = HBCELoss(TAX, penalty)(z, torch.zeros(0).long())
        l.backward()
        assert l.item() == 0 and z.grad.shape == (0, 10)
        assert HBCELoss(chain(1), penalty)(torch.zeros(3, 0), torch.zeros(3).long()).item() == 0
    assert max_constraint_loss(torch.zeros(0, 10), torch.zeros(0).long(), TAX).item() == 0


def test_a_coherent_answer_pays_no_hinge():
    p = TAX.node_probs(torch.rand(20, 6, dtype=torch.double).softmax(1) * 0.9)
    z = p[:, 1:].logit()
    v = leaves(TAX, 20)
    plain = HBCELoss(TAX, 'none')(z, v).item()
    for penalty in ('hinge', 'log', 'hard'):
        assert HBCELoss(TAX, penalty, 9.0)(z, v).item() == pytest.approx(plain, abs=1e-12)
    assert HBCELoss(TAX, 'product')(z, v) > plain


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: HBCELoss(TAX, 'soft'), "There is no penalty 'soft'; there are hinge, product, log, hard, none."),
        (
            lambda: HBCELoss(TAX, distance='hrd'),
            "There is no distance 'hrd'; there are none, soft, hard. Did you mean 'hard'?",
        ),
        (
            lambda: HBCELoss(TAX, weight=-1.0),
            'one number, or 10 (one for the edge above each node), finite and none below 0',
        ),
        (lambda: HBCELoss(TAX, weight=math.nan), 'finite and none below 0'),
        (lambda: HBCELoss(TAX, weight=[1.0] * 9), 'got shape (9,)'),
        (lambda: HBCELoss(TAX, distance_weight=-1), 'a number from 0 up, not -1'),
        (lambda: HBCELoss(TAX, threshold=0), 'between 0 and 1, not 0'),
        (lambda: HBCELoss(TAX)(torch.zeros(2, 11), torch.zeros(2).long()), 'of shape (B, 10)'),
        (lambda: HBCELoss(TAX)(torch.zeros(2, 10).long(), torch.zeros(2).long()), 'floating-point numbers'),
        (lambda: HBCELoss(TAX)(torch.zeros(2, 10), torch.zeros(3).long()), 'Targets of shape (3,) do not fit'),
        (lambda: HBCELoss(TAX)(torch.zeros(2, 10), torch.zeros(2)), 'must be integers'),
        (lambda: HBCELoss(TAX)(torch.zeros(2, 10), torch.tensor([3, 11])), 'Target 11 of sample 1 is no node'),
        (lambda: HBCELoss(TAX)(torch.zeros(2, 10), torch.tensor([-1, 1])), 'Target -1 of sample 0 is no node'),
        (lambda: edge_weights(torch.zeros(2, 9, dtype=torch.bool), TAX), 'shape (n, 10)'),
        (lambda: edge_weights(torch.zeros(2, 10), TAX), 'boolean'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)


# weights of edges


@given(tax=trees(), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_edge_weights_are_counts(tax, seed):
    y = torch.rand(25, len(tax) - 1, generator=torch.Generator().manual_seed(seed)) > 0.5
    w = edge_weights(y, tax)
    for i in range(1, len(tax)):
        u = int(tax.parents[i])
        without = [r for r in range(25) if u and not y[r, u - 1]]
        bad = [r for r in without if y[r, i - 1]]
        assert w[i - 1].item() == pytest.approx(1 - len(bad) / len(without) if without else 1.0)
    assert torch.equal(
        edge_weights(torch.as_tensor(tax.multi_hot(tax.leaves))[:, 1:], tax), torch.ones(len(tax) - 1)
    )  # closed labels


# the max-constraint loss


def literal(z, v, tax):
    total = z.new_zeros(())
    for zb, vb in zip(z, v.tolist()):
        path = set(tax.ancestors(vb).tolist())
        for i in range(1, len(tax)):
            if i not in path and vb in tax.ancestors(i).tolist():
                continue
            under = range(i, int(tax.last[i]) + 1)
            total = total - (
                max(zb[j - 1].sigmoid() for j in under if j in path).log()
                if i in path
                else (1 - max(zb[j - 1].sigmoid() for j in under)).log()
            )
    return total / max(z.numel(), 1)


@given(tax=trees(), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_max_constraint_is_the_formula(tax, seed):
    z, v = batch(tax, 3, seed, 1.0)
    a, b = max_constraint_loss(z, v, tax), literal(z, v, tax)
    assert a.item() == pytest.approx(b.item(), rel=1e-9)
    if (v > 0).any():
        assert torch.allclose(*(torch.autograd.grad(o, z)[0] for o in (a, b)), atol=1e-10)


def test_max_constraint_on_coherent_logits_is_binary_cross_entropy():
    z = TAX.node_probs(torch.rand(20, 6, dtype=torch.double).softmax(1) * 0.9)[:, 1:].logit()
    v = leaves(TAX, 20)
    assert max_constraint_loss(z, v, TAX).item() == pytest.approx(HBCELoss(TAX, 'none')(z, v).item(), rel=1e-9)


@pytest.mark.parametrize('size', [1e2, 1e4])
def test_max_constraint_extremes(size):
    z, v = batch(TAX, 32, dtype=torch.float32)
    o = (size * z.detach()).requires_grad_()
    l = max_constraint_loss(o, v, TAX)
    l.backward()
    assert l.isfinite() and o.grad.isfinite().all()


# heads


@pytest.mark.parametrize('cls', [SphereMultiHier, SphereMaxConstraint])
def test_heads_keep_the_contract(cls, tmp_path):
    torch.manual_seed(0)
    kw = dict(penalty='log', penalty_weight=torch.rand(10), distance='soft') if cls is SphereMultiHier else {}
    head = cls(6, TAX, **kw)
    x, v = torch.randn(12, 6), torch.arange(12) % len(TAX)
    head.prepare(x, v)
    l = head.loss(x, v)
    l.backward()
    assert (
        l.isfinite()
        and all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)
        and head.loss(x[:0], v[:0]).item() == 0
    )
    p = head.node_probs(x).detach()
    assert (
        p.shape == (12, 11)
        and torch.allclose(p[:, 0], torch.ones(12))
        and (p[:, 1:] <= p[:, TAX.tensor('parents')[1:]] + 1e-6).all()
    )
    assert head.loss(x[:1], torch.tensor([0])).item() == 0
    model = Model(EmbeddingNet(6, 6), head)
    model.save(tmp_path / 'm')
    again = Model.load(tmp_path / 'm')
    assert again.loss(x, v).item() == pytest.approx(
        model.eval().loss(x, v).item(), rel=1e-6
    )  # penalty and weights came along
    copy.deepcopy(head).loss(x, v)


@pytest.mark.parametrize('cls', [SphereMultiHier, SphereMaxConstraint])
def test_defaults_are_those_of_spheremulti(cls):
    own, base = (inspect.signature(o).parameters for o in (cls, SphereMulti))
    assert not [k for k in own if k in base and k != 'decode' and own[k].default != base[k].default]


def test_hier_without_penalty_is_spheremulti():
    torch.manual_seed(0)
    hier, plain = SphereMultiHier(6, TAX, 'none'), SphereMulti(6, TAX)
    plain.load_state_dict(hier.state_dict())
    x, v = torch.randn(20, 6), torch.randint(0, 11, (20,))
    for h in (hier, plain):
        h.prepare(x, v)
    assert hier.loss(x, v).item() == pytest.approx(plain.loss(x, v).item(), rel=1e-5)
    hier.loss(x, v).backward()
    plain.loss(x, v).backward()
    assert torch.allclose(hier.weight.grad, plain.weight.grad, atol=1e-6)


def test_hard_penalty_trains_the_same_weights_and_the_hinge_does_not():
    x = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
    v = leaves(TAX, 120)
    end = {}
    for penalty in ('none', 'hard', 'hinge'):
        torch.manual_seed(0)
        head = SphereMultiHier(8, TAX, penalty, 5.0)
        opt = torch.optim.AdamW(head.parameters(), lr=0.02)
        for _ in range(40):
            opt.zero_grad()
            head.loss(x, v).backward()
            opt.step()
        with torch.no_grad():
            p = F.pad(head(x).sigmoid(), (1, 0), value=1.0)
            end[penalty] = head.weight.clone(), (p[:, 1:] - p[:, TAX.tensor('parents')[1:]]).relu().mean().item()
    assert torch.equal(end['hard'][0], end['none'][0]) and end['hinge'][1] < 0.5 * end['none'][1]


def test_contradictions_of_a_worked_example():
    p = torch.tensor([[1.0, 0.95, 0.2, 0.9, 0.05, 0.1, 0.05, 0.02, 0.1, 0.15, 0.01]])
    tax = Taxonomy.from_paths(
        dict(lynx='mammal/cat', tiger='mammal/cat', wolf='mammal/dog', fox='mammal/dog', owl='bird', wren='bird')
    )
    assert violation_rate(p, tax) == pytest.approx((1.0, 0.2))  # lynx above cat, owl above bird, of ten edges
    assert violation_rate(p, tax, threshold=0.5) == pytest.approx((1.0, 0.1))
