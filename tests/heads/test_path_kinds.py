"""Losses and heads along the path: the contract, each against its slow and obvious version
(hiermetric.heads.objectives, .paths)"""

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.trees.taxonomy import Taxonomy
from path_kinds import ALL, D, SLOW, TAX, batch, leaves_under, make, tail, trees


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
