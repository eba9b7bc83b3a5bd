"Losses and heads along the path: against slow and obvious versions, and the traps (hiermetric.paths)"

import math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.heads import HEADS, EmbeddingNet, Model, create_head, register_head
from hiermetric.paths import (
    HACE,
    HXE,
    ArcFaceMultiHead,
    ConditionalSoftmax,
    HierarchicalAttention,
    LogitAdjusted,
    PathSoftmax,
    SemanticEmbedding,
    SimpleHierarchy,
    SoftLabels,
    SoftMaxMargin,
    leaf_costs,
    path_steps,
    ramp,
    semantic_vectors,
)
from hiermetric.arithmetic import group_logsumexp, leaf_counts, path_rings, root_path
from hiermetric.arithmetic import path_sums
from hiermetric.taxonomy import Taxonomy

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
D = 8
ARC = dict(base='arcface', base_kw=dict(s=16.0, m=0.3))
ALL = {
    'hxe': (HXE, dict(alpha=0.4)),
    'hxe arcface': (HXE, ARC),
    'hace': (HACE, dict(eps=0.3)),
    'hace arcface': (HACE, ARC),
    'hace attention': (HACE, dict(base='attention')),
    'soft_labels': (SoftLabels, dict(beta=4.0)),
    'soft_labels arcface': (SoftLabels, ARC),
    'simple_hierarchy': (SimpleHierarchy, {}),
    'simple_hierarchy arcface': (SimpleHierarchy, ARC),
    'soft_max_margin': (SoftMaxMargin, dict(tau=2.0)),
    'soft_max_margin arcface': (SoftMaxMargin, ARC),
    'logit_adjusted': (LogitAdjusted, dict(tau=0.8)),
    'logit_adjusted arcface': (LogitAdjusted, ARC),
    'path_softmax': (PathSoftmax, {}),
    'conditional': (ConditionalSoftmax, {}),
    'arcface_levels': (ArcFaceMultiHead, dict(m=0.3)),
    'attention': (HierarchicalAttention, dict(m=0.3)),
    'attention uniform': (HierarchicalAttention, dict(attention='uniform')),
    'attention leaf': (HierarchicalAttention, dict(attention='leaf')),
    'attention linear': (HierarchicalAttention, dict(cosine=False)),
    'semantic': (SemanticEmbedding, dict(ce=0.5)),
}
MODULE = 'hiermetric.paths.'
for name, (cls, _) in ALL.items():
    if name.split()[0] not in HEADS:
        register_head(name.split()[0], MODULE + cls.__name__, '')


def make(kind, tax=TAX, dim=D, seed=0, **kw):
    torch.manual_seed(seed)
    cls, own = ALL[kind]
    return cls(dim, tax, **{**own, **kw})


@st.composite
def trees(draw, most=22):
    "Random ragged trees, chains, stars and the lone root"
    n = draw(st.integers(1, most))
    kind = draw(st.sampled_from(['any', 'deep', 'chain', 'star']))
    parent = {
        'any': lambda i: draw(st.integers(0, i - 1)),
        'deep': lambda i: draw(st.integers(max(0, i - 3), i - 1)),
        'chain': lambda i: i - 1,
        'star': lambda i: 0,
    }[kind]
    return Taxonomy.from_parents({'n0': None, **{f'n{i}': f'n{parent(i)}' for i in range(1, n)}})


def leaves_under(tax, v):
    return [j for j, leaf in enumerate(tax.leaves.tolist()) if v in ups(tax, leaf)]


def ups(tax, v):
    return [v] if v == 0 else [v, *ups(tax, int(tax.parents[v]))]


def mass(z, tax, v):
    return sum(torch.exp(z[j]) for j in leaves_under(tax, v)) / sum(torch.exp(o) for o in z)


def batch(tax, n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g, dtype=dtype), torch.randint(0, len(tax), (n,), generator=g)


def slow_mean(head, f, emb, t):
    return sum(f(head, emb[i], int(v)) for i, v in enumerate(t)) / len(t)


# the definitions, one sample, one node, one leaf at a time, on the tree without chains; labels are its nodes


def slow_step(w):
    "Σ over the steps of w(depth of the child, depth of the label) · −log p(child | parent)"

    def f(head, x, v):
        tax, z, path = head.tree, train_logits(head, x, v), head.tree.ancestors(v).tolist()
        return sum(
            (
                w(head, k, len(path) - 1) * -torch.log(mass(z, tax, path[k]) / mass(z, tax, path[k - 1]))
                for k in range(1, len(path))
            ),
            torch.zeros((), dtype=x.dtype),
        )

    return f


def train_logits(head, x, v):
    "Logits of one sample, the margin on each leaf under the label"
    inner, tax = head.head, head.tree
    if inner.__class__.__name__ == 'Classifier':
        return inner.weight @ x + inner.bias
    w = inner.leaf_vectors() if isinstance(inner, HierarchicalAttention) else inner.weight
    cos, under = [F.cosine_similarity(x, o, dim=0) for o in w], leaves_under(tax, v)
    return inner.s * torch.stack([psi(c, inner.m) if j in under else c for j, c in enumerate(cos)])


def psi(c, m):
    theta = torch.acos(c)
    return torch.cos(theta + m) if theta <= math.pi - m else -torch.cos(theta + m) - 2


def slow_hace(head, x, v):
    tax, z, path = head.tree, train_logits(head, x, v), head.tree.ancestors(v).tolist()[1:]
    if not path:
        return torch.zeros((), dtype=x.dtype)
    q = {a: head.eps / (len(path) - 1) for a in path[:-1]}
    q[path[-1]] = 1 - sum(q.values())
    assert abs(sum(q.values()) - 1) < 1e-12
    return -sum(w * torch.log(mass(z, tax, a)) for a, w in q.items())


def slow_simple(head, x, v):
    tax, z = head.tree, train_logits(head, x, v)
    path = tax.ancestors(v).tolist()
    up = path[min(head.level, len(path) - 1)]
    lam = [
        a * (0 if head.epoch < s else min(1, (head.epoch - s) / r) if r else 1)
        for a, s, r in (
            (head.fine, head.fine_start, head.fine_ramp),
            (head.coarse, head.coarse_start, head.coarse_ramp),
        )
    ]
    return -lam[0] * torch.log(mass(z, tax, v)) - lam[1] * torch.log(mass(z, tax, up))


def distance(tax, v, j):
    return (
        0.0
        if j in leaves_under(tax, v)
        else tax.lca_height(v, int(tax.leaves[j])) / tax.lca_height(int(tax.leaves[0]), int(tax.leaves[-1]))
    )


def slow_soft(head, x, v):
    "The label's leaves are one class, whose probability is their sum"
    tax, z = head.tree, train_logits(head, x, v)
    classes = [v, *(int(tax.leaves[j]) for j in range(tax.n_leaves) if j not in leaves_under(tax, v))]
    y = np.array([1.0, *(math.exp(-head.beta * distance(tax, v, int(tax.leaf_column[c]))) for c in classes[1:])])
    y /= y.sum()
    return sum(o * (math.log(o) - torch.log(mass(z, tax, c))) for o, c in zip(y.tolist(), classes))


def slow_margin(head, x, v):
    tax, z = head.tree, train_logits(head, x, v)
    return torch.log(sum(torch.exp(o + head.tau * distance(tax, v, j)) for j, o in enumerate(z))) - torch.log(
        sum(torch.exp(z[j]) for j in leaves_under(tax, v))
    )


def slow_adjusted(head, x, v):
    "The logits of a world where the classes are as common as `counted` made them"
    z = train_logits(head, x, v)
    n = [max(o, 1.0) for o in counted(head.taxonomy)]
    return -torch.log(mass([o + head.tau * math.log(k / sum(n)) for o, k in zip(z, n)], head.tree, v))


def tail(tax):
    return [v for v in range(len(tax)) for _ in range(v * v % 7)]  # labels at leaves and above; some leaves have none


def counted(tax):
    n = [0.0] * tax.n_leaves
    for v in tail(tax):
        for j in leaves_under(tax, v):
            n[j] += 1 / len(leaves_under(tax, v))
    return n


def slow_path(head, x, v):
    tax = head.tree
    z = torch.stack(
        [
            sum(
                ((head.weight[n - 1] @ x + head.bias[n - 1]) for n in tax.ancestors(int(leaf)).tolist()[1:]),
                torch.zeros((), dtype=x.dtype),
            )
            for leaf in tax.leaves
        ]
    )
    return -torch.log(mass(z, tax, v))


def slow_conditional(head, x, v):
    tax, total = head.tree, torch.zeros((), dtype=x.dtype)
    for n in tax.ancestors(v).tolist()[1:]:
        s = {int(u): head.weight[u - 1] @ x + head.bias[u - 1] for u in tax.children(int(tax.parents[n]))}
        total = total - torch.log(torch.exp(s[n]) / sum(torch.exp(o) for o in s.values()))
    return total


def level_rows(tax):
    """(level, original node) of each node of the levelled tree but the root, in its order: a leaf stands on all levels
    from its own down"""
    out = []

    def walk(n):
        d = int(tax.depths[n])
        out.extend((k, n) for k in range(d, (tax.height if tax.heights[n] == 0 else d) + 1))
        for c in tax.children(n):
            walk(int(c))

    walk(0)
    return [o for o in out if o[0] > 0]


def slow_levels(head, x, v):
    tax, rows = head.tree, level_rows(head.tree)
    assert len(rows) == len(head.weight)
    cos, total = [F.cosine_similarity(x, w, dim=0) for w in head.weight], torch.zeros((), dtype=x.dtype)
    for k in range(1, tax.height + 1):
        inside = outside = torch.zeros((), dtype=x.dtype)
        for c, (level, n) in zip(cos, rows):
            if level != k:
                continue
            if tax.is_ancestor(n, v) or tax.is_ancestor(v, n):
                inside = inside + torch.exp(head.s * psi(c, head.m))
            else:
                outside = outside + torch.exp(head.s * c)
        total = total - torch.log(inside / (inside + outside))
    return total / max(tax.height, 1)


def slow_attention(head, x, v):
    tax, protos = head.tree, []
    for j, leaf in enumerate(tax.leaves.tolist()):
        path = tax.ancestors(leaf).tolist()[1:]
        d = len(path)
        b = (
            torch.zeros(d, dtype=x.dtype)
            if head.score is None
            else torch.tensor(
                [*[(1 - head.leaf_share) / max(d - 1, 1)] * (d - 1), head.leaf_share][:d] if d > 1 else [1.0] * d,
                dtype=x.dtype,
            ).log()
            + head.rate * head.score[j, :d]
        )
        a = [float(k == d - 1) for k in range(d)] if head.attention == 'leaf' else (b.exp() / b.exp().sum())
        protos.append(
            sum(
                (
                    a[k] * (F.normalize(head.weight[n - 1], dim=0) if head.cosine else d * head.weight[n - 1])
                    for k, n in enumerate(path)
                ),
                torch.zeros_like(x),
            )
        )
    if not head.cosine:
        return -torch.log(mass(torch.stack([p @ x + b for p, b in zip(protos, head.bias)]), tax, v))
    cos = [F.cosine_similarity(x, p, dim=0) for p in protos]
    under = leaves_under(tax, v)
    return -torch.log(
        mass(head.s * torch.stack([psi(c, head.m) if j in under else c for j, c in enumerate(cos)]), tax, v)
    )


def slow_semantic(head, x, v):
    "Vectors in another basis, one axis a node: along the path, the growth of the similarity"
    tax = head.tree
    H = max(tax.cost_matrix('lca_height').max(), 1)
    s = [max(1 - tax.heights[n] / H, 0.0) for n in range(len(tax))]
    S = np.array([[s[tax.lca(u, int(w))] for w in tax.leaves] for u in range(len(tax))])
    cos = torch.stack([F.cosine_similarity(x, w, dim=0) for w in head.weight])
    u = head.vectors[v].to(x.dtype)
    assert np.allclose(head.vectors[tax.tensor('leaves')] @ head.vectors.T, S.T, atol=1e-5)
    return (s[v] - F.normalize(x, dim=0) @ u).relu() - head.ce * torch.log(mass(head.s * cos, tax, v))


SLOW = {
    'hxe': slow_step(lambda h, k, d: math.exp(-h.alpha * k)),
    'hace': slow_hace,
    'soft_labels': slow_soft,
    'simple_hierarchy': slow_simple,
    'soft_max_margin': slow_margin,
    'logit_adjusted': slow_adjusted,
    'path_softmax': slow_path,
    'conditional': slow_conditional,
    'arcface_levels': slow_levels,
    'attention': slow_attention,
    'semantic': slow_semantic,
}


@pytest.mark.parametrize('kind', ALL)
@settings(max_examples=8, deadline=None)
@given(tax=trees(16), seed=st.integers(0, 999))
def test_loss_is_the_slow_loss(kind, tax, seed):
    if 'simple' in kind:
        head = make(kind, tax, level=min(2, max(tax.chainless.height, 1)), fine_start=1.0, fine_ramp=4.0, coarse=0.7)
        head.epoch = seed % 7
    else:
        head = make(kind, tax, dim=D if 'semantic' not in kind else 24)
    head = head.double()
    emb, t = batch(tax, 3, seed)
    if 'adjusted' in kind:
        head.prepare(None, torch.tensor(tail(tax), dtype=torch.long))
    if 'semantic' in kind:
        emb = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if getattr(head, 'score', None) is not None:
        with torch.no_grad():
            head.score.add_(torch.randn_like(head.score) / head.rate)
    want = torch.stack([SLOW[kind.split()[0]](head, emb[i], int(tax.to_chainless[v])) for i, v in enumerate(t)])
    eps = 1e-5 if 'semantic' in kind else 1e-8  # its fixed vectors are kept in float32
    assert torch.allclose(head.loss(emb, t), want.mean(), rtol=1e-6, atol=eps)
    for i in range(3):
        assert torch.allclose(
            head.loss(emb[i : i + 1], t[i : i + 1]), want[i], rtol=1e-6, atol=eps
        )  # a sample does not depend on its batch


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


# every head: the contract


@pytest.mark.parametrize('kind', ALL)
@settings(max_examples=8, deadline=None)
@given(tax=trees(), seed=st.integers(0, 99))
def test_node_probs_are_coherent(kind, tax, seed):
    head = make(kind, tax, dim=(d := 22 if kind == 'semantic' else D))
    emb = torch.randn(4, d, generator=torch.Generator().manual_seed(seed))
    p, leaf = head.node_probs(emb), head.leaf_probs(emb)
    assert p.shape == (4, len(tax)) and torch.allclose(p[:, 0], torch.ones(4), atol=1e-5) and (p >= 0).all()
    if len(tax) > 1:
        assert (p[:, 1:] <= p[:, tax.tensor('parents')[1:]]).all()
    for v in range(len(tax)):
        assert torch.allclose(p[:, v], leaf[:, leaves_under(tax, v)].sum(1), atol=1e-5)


@pytest.mark.parametrize('kind', ALL)
def test_empty_batch_lone_root_and_root_label(kind):
    head = make(kind)
    l = head.loss(torch.zeros(0, D, requires_grad=True), torch.zeros(0).long())
    l.backward()
    assert l == 0
    assert head.node_probs(torch.zeros(0, D)).shape == (0, len(TAX))
    emb = torch.randn(3, D, requires_grad=True)
    l = head.loss(emb, torch.zeros(3).long())
    l.backward()
    assert l.item() == pytest.approx(0, abs=1e-6) and emb.grad.abs().max() < 1e-6  # 'root' says nothing
    lone = make(kind, Taxonomy.from_parents({'only': None}))
    l = lone.loss(torch.randn(2, D), torch.zeros(2).long())
    assert (l.item() == pytest.approx(0, abs=1e-6) or kind == 'semantic' and l.isfinite()) and torch.equal(
        lone.node_probs(torch.randn(2, D)), torch.ones(2, 1)
    )


@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_degenerate_inputs_are_finite(kind, dtype):
    "On a prototype, opposite to it, without direction, huge; leaf and inner labels; plain and under bfloat16 autocast"
    head = make(kind, **(dict(s=128.0) if 's' in ALL[kind][0].__init__.__annotations__ else {}))
    w = head.weight.detach()[:6]
    e = torch.cat([w, 3 * w, -w, 1e3 * w, w + 1e-7, torch.zeros_like(w), 1e-7 * w, 1e-30 * w]).to(dtype)
    for t in (TAX.tensor('leaves'), TAX.tensor('parents')[TAX.tensor('leaves')], torch.tensor([0, 1, 2, 3, 8, 9])):
        for auto in (False, True):
            x = e.clone().requires_grad_()
            head.zero_grad()
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=auto):
                l = head.loss(x, t.repeat(8))
                p = head.node_probs(x)
            l.backward()
            grads = [o.grad for o in head.parameters() if o.grad is not None]
            assert (
                l.dtype == torch.float32
                and l.isfinite()
                and l >= 0
                and p.isfinite().all()
                and x.grad.isfinite().all()
                and all(g.isfinite().all() for g in grads)
            )


@pytest.mark.parametrize('kind', ALL)
def test_gradcheck(kind):
    head = make(kind, dim=6 if 'semantic' in kind else 4, seed=1, class_weights=[1, 2, 0.5, 1, 3, 1]).double()
    d = head.in_features
    emb = torch.randn(5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    params = [o for o in head.parameters() if o.requires_grad]
    for names in (['lynx', 'dog', 'bird', 'owl', 'mammal'], ['lynx', 'fox', 'wren', 'owl', 'wolf']):
        t = torch.tensor(TAX.index(names))
        assert torch.autograd.gradcheck(lambda e, *p: head.loss(e, t), (emb, *params))
    assert torch.autograd.gradcheck(lambda e: head.node_probs(e), (emb,))


@pytest.mark.parametrize('kind', ALL)
def test_class_weights(kind):
    "A weighted mean over the samples; an inner label weighs the mean of its leaves"
    cw = [1, 2, 0.5, 1, 3, 1]
    head = make(kind, class_weights=cw)
    plain = make(kind)
    emb = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    for names in (['lynx', 'tiger', 'wolf', 'owl'], ['cat', 'tiger', 'mammal', 'owl']):
        t = torch.tensor(TAX.index(names))
        each = torch.stack([plain.loss(emb[i : i + 1], t[i : i + 1]) for i in range(4)])
        w = torch.tensor([np.mean([cw[j] for j in leaves_under(TAX, int(v))]) for v in t]).float()
        assert torch.allclose(head.loss(emb, t), (w * each).sum() / w.sum(), rtol=1e-4)


@pytest.mark.parametrize('kind', ALL)
def test_save_and_load(kind, tmp_path):
    head = make(kind)
    model = Model(EmbeddingNet(12, D), head).eval()
    x = torch.randn(3, 12)
    model.save(tmp_path / 'm')
    back = Model.load(tmp_path / 'm')
    assert torch.equal(back.node_probs(x), model.node_probs(x)) and type(back.head) is type(head)
    t = torch.tensor([3, 1, 8])
    assert torch.equal(back.loss(x, t), model.loss(x, t))


@pytest.mark.parametrize('kind', ALL)
def test_it_learns_from_leaves_and_from_inner_labels(kind):
    "Clusters are fitted; with every second label moved to its parent the leaves are still found"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 6, (240,), generator=g)
    x = 3 * torch.randn(6, 12, generator=g)[y] + torch.randn(240, 12, generator=g)
    t = TAX.tensor('leaves')[y]
    for targets in (t, torch.where(torch.arange(240) % 2 > 0, TAX.tensor('parents')[t], t)):
        torch.manual_seed(0)
        model = Model(EmbeddingNet(12, D, dropout=0.0), make(kind))
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
        first = model.loss(x, targets).item()
        for _ in range(60):
            opt.zero_grad()
            l = model.loss(x, targets)
            l.backward()
            opt.step()
        assert l.item() < 0.6 * first and (model.leaf_probs(x).argmax(1) == y).float().mean() > 0.93


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
    from hiermetric.training import fit
    from hiermetric.features import toy_features

    seen = []

    class Spy(SimpleHierarchy):
        def weights(self, depth):
            seen.append(self.epoch)
            return super().weights(depth)

    if 'spy' not in HEADS:
        register_head('spy', Spy)
    fit(toy_features(TAX, 20), 'spy', epochs=3, batch_size=24, embed_dim=8, log=(), head_kw=dict(fine_start=1.0))
    assert min(seen) == 0 and 2 < max(seen) < 3 and seen == sorted(seen)


# heads


def test_attention_special_cases():
    emb, t = batch(TAX, 20, dtype=torch.float32)
    arc, leaf = create_head('arcface', D, TAX, m=0.3), make('attention', attention='leaf')
    path, even = PathSoftmax(D, TAX), make('attention', attention='uniform', cosine=False)
    with torch.no_grad():
        arc.weight.copy_(leaf.weight[TAX.tensor('leaves') - 1])
        path.weight.copy_(even.weight)
    for a, b in ((arc, leaf), (path, even)):
        assert torch.allclose(a.loss(emb, t), b.loss(emb, t), atol=1e-5) and torch.allclose(a(emb), b(emb), atol=1e-4)
    near = make('attention', leaf_share=1 - 1e-6)  # and learning can start next to either
    with torch.no_grad():
        near.weight.copy_(leaf.weight)
    assert torch.allclose(near.loss(emb, t), leaf.loss(emb, t), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(trees(), st.floats(0.05, 0.95))
def test_attention_is_a_distribution_over_the_path(tax, share):
    head = HierarchicalAttention(D, tax, leaf_share=share)
    a = head.shares().detach()
    depth = head.tree.depths[head.tree.leaves]
    assert torch.allclose(a.sum(1), torch.tensor(depth > 0).float(), atol=1e-5)
    for j, d in enumerate(depth):
        if d > 1:
            assert a[j, d - 1].item() == pytest.approx(share, abs=1e-4) and a[j, : d - 1].tolist() == pytest.approx(
                [(1 - share) / (d - 1)] * (d - 1), abs=1e-4
            )
        assert (a[j, d:] == 0).all()


def test_sharing_reaches_the_relatives():
    "A step on a lynx alone raises the tiger above the birds"

    def gains(head):
        opt = torch.optim.SGD(head.parameters(), lr=0.05)
        emb = torch.ones(1, D)
        before = head(emb)
        opt.zero_grad()
        head.loss(emb, TAX.tensor('leaves')[:1]).backward()
        opt.step()
        return (head(emb) - before)[0].tolist()

    for seed in range(3):
        g = gains(make('path_softmax', seed=seed))
        assert g[1] > g[4] and g[1] > g[5]


def test_levels_know_only_real_paths():
    "Level 1 says mammal, level 2 says owl: the product over real paths must weigh both, and sums to 1 over the leaves"
    tax = Taxonomy.from_paths({'a1': 'A', 'a2': 'A', 'b1': 'B', 'b2': 'B'})
    head = ArcFaceMultiHead(2, tax, 'product', s=4.0)
    rows = level_rows(tax)
    with torch.no_grad():
        head.weight.copy_(
            torch.tensor([[1.0, 0] if tax.names[n] in 'A b1' else [-1.0, 0] for _, n in rows])
        )  # level 1: A; level 2: b1
    p = head.leaf_probs(torch.tensor([[1.0, 0]]))[0].tolist()
    e = math.exp(4.0)
    want = torch.tensor([e * (1 / e), e * (1 / e), (1 / e) * e, (1 / e) * (1 / e)])
    assert p == pytest.approx((want / want.sum()).tolist(), abs=1e-5)


def test_level_matrix_is_the_separate_heads():
    "One product over all levels = one ArcFace a level, each with its own softmax"
    head = make('arcface_levels', m=0.3)
    emb, _ = batch(TAX, 12, dtype=torch.float32)
    t = TAX.tensor('leaves')[torch.arange(12) % 6]
    rows, total = level_rows(TAX), 0.0
    for k in range(1, 4):
        at = [i for i, (level, _) in enumerate(rows) if level == k]
        nodes = [rows[i][1] for i in at]
        flat = Taxonomy.from_parents({'r': None, **{str(n): 'r' for n in nodes}})
        arc = create_head('arcface', D, flat, m=0.3)
        with torch.no_grad():
            arc.weight.copy_(head.weight[at])
        own = [next(n for n in nodes if TAX.is_ancestor(n, int(v))) for v in t]
        total += arc.loss(emb, torch.tensor(flat.index([str(o) for o in own]))).item() / 3
    assert head.loss(emb, t).item() == pytest.approx(total, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(trees(30))
def test_semantic_vectors(tax):
    H, L = max(tax.cost_matrix('lca_height').max(), 1), tax.n_leaves
    S = (1 - tax.cost_matrix('lca_height', rows=range(len(tax))) / H).clip(0)
    for dim in (L, L + 5):
        U = semantic_vectors(tax, dim)
        assert U.shape == (len(tax), dim) and np.allclose(U @ U[tax.tensor('leaves')].T, S, atol=1e-9)


def test_semantic_vectors_in_few_dimensions():
    S = 1 - TAX.cost_matrix('lca_height') / 3
    for dim, most in ((5, 0.04), (3, 0.12)):
        Y = semantic_vectors(TAX, dim)[TAX.tensor('leaves')]
        assert np.allclose(Y.norm(dim=1), 1) and (Y @ Y.T - S).abs().mean() < most
    with pytest.raises(HiermetricError, match='has no direction of its own; give the embedding 4'):
        semantic_vectors(Taxonomy.from_paths({k: 'x' for k in 'abcd'}), 2)


def test_semantic_head_learns_nothing_itself():
    head = make('semantic')
    assert not [p for p in head.parameters() if p.requires_grad] and head.weight.shape == (6, D)
    model = Model(EmbeddingNet(12, D), head)
    before = head.weight.clone()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    model.loss(torch.randn(4, 12), TAX.tensor('leaves')[:4]).backward()
    opt.step()
    assert torch.equal(before, head.weight)


def test_to_double_and_back_keeps_the_fixed_parts():
    for kind in ('semantic', 'arcface_levels', 'attention'):
        head = make(kind).double().float()
        emb, t = batch(TAX, 5, dtype=torch.float32)
        assert torch.allclose(head.loss(emb, t), make(kind).loss(emb, t), atol=1e-5)


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
        (lambda: HierarchicalAttention(D, TAX, 'all'), "There is no attention 'all'"),
        (lambda: HierarchicalAttention(D, TAX, leaf_share=1.0), 'leaf_share is a share between 0 and 1'),
        (lambda: HierarchicalAttention(D, TAX, rate=0), 'rate must be a number above 0'),
        (lambda: ArcFaceMultiHead(D, TAX, m=30), 'looks like degrees'),
        (lambda: ArcFaceMultiHead(D, TAX, joint='sum'), "There is no joint score 'sum'"),
        (lambda: SemanticEmbedding(D, TAX, s=0), 'must be above 0'),
        (lambda: SemanticEmbedding(D, TAX, ce=-1), 'at least 0'),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)
