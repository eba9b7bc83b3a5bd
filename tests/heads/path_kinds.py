"""Every objective and every head along the path: how it is made, and its definition, one sample, one node, one leaf at
a time"""

import math
import numpy as np, torch, torch.nn.functional as F
from hypothesis import strategies as st
from hiermetric.heads.contract import HEADS, register_head
from hiermetric.heads.objectives import HACE, HXE, LogitAdjusted, SimpleHierarchy, SoftLabels, SoftMaxMargin
from hiermetric.heads.paths import (
    ArcFaceMultiHead,
    ConditionalSoftmax,
    HierarchicalAttention,
    PathSoftmax,
    SemanticEmbedding,
)
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


for name, (cls, _) in ALL.items():
    if name.split()[0] not in HEADS:
        register_head(name.split()[0], f'{cls.__module__}.{cls.__name__}', '')


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
