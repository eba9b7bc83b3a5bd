"Heads along the path: special cases, sharing, fixed vectors, and the traps (hiermetric.heads.paths)"

import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import create_head
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.paths import (
    ArcFaceMultiHead,
    HierarchicalAttention,
    PathSoftmax,
    SemanticEmbedding,
    semantic_vectors,
)
from hiermetric.trees.taxonomy import Taxonomy
from path_kinds import D, TAX, batch, level_rows, make, trees

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
        (lambda: HierarchicalAttention(D, TAX, 'all'), "There is no attention 'all'"),
        (lambda: HierarchicalAttention(D, TAX, leaf_share=1.0), 'leaf_share is a share between 0 and 1'),
        (lambda: HierarchicalAttention(D, TAX, rate=0), 'rate must be a number above 0'),
        (lambda: ArcFaceMultiHead(D, TAX, m=30), 'looks like degrees'),
        (lambda: ArcFaceMultiHead(D, TAX, joint='sum'), "There is no joint score 'sum'"),
        (lambda: SemanticEmbedding(D, TAX, s=0), 'must be above 0'),
        (lambda: SemanticEmbedding(D, TAX, ce=-1), 'at least 0'),
    ],
)
def test_bad_settings_of_heads(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)
