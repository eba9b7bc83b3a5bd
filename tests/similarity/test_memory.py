"Memories of images and queues of keys against slow loops (hiermetric.similarity.memory)"

import math
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml
from pair_batches import B, D, TAX, VIEWS, batch, jaccard, make, multi_hot, slow_grade
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import create_head
from hiermetric.similarity.losses import create_loss


def slow_snca(x, refs, labels, targets, known, own, weight, tau):
    each = []
    for i in range(len(x)):
        right = among = 0.0
        for k in range(len(refs)):
            w = weight(targets[i], labels[k])
            if k == own[i] or not known[k] or w is None:
                continue
            e = math.exp((F.normalize(x[i], dim=0) @ refs[k]).item() / tau)
            among += e
            right += w * e
        if right:
            each.append(-math.log(right / among))
    return sum(each) / len(each)


@pytest.mark.parametrize('kind', ['same', 'graded', 'sets'])
def test_snca_slow(kind):
    n = 40
    x, t = batch(n=n, inner=4)
    m = multi_hot(n)
    y = m if kind == 'sets' else t
    loss = make('snca', temperature=0.3, momentum=0.6, **dict(graded=True, power=2.0) if kind == 'graded' else {})
    loss.prepare(y)

    def weight(a, b):
        if kind == 'sets':
            return jaccard(a, b)
        g, G = slow_grade(int(a), int(b), 'information')
        if kind == 'graded':
            return g**2 if abs(g - G) < 1e-9 else None
        return 1.0 if g == G == 1 else 0.0 if g == G else None

    memory = torch.zeros(n, D)
    known = [False] * n
    g = torch.Generator().manual_seed(7)
    for _ in range(4):
        rows = torch.randperm(n, generator=g)[:12]
        emb = torch.randn(12, D, generator=g)
        got = loss(emb, y[rows], rows=rows).item()
        for e, r in zip(F.normalize(emb), rows.tolist()):
            memory[r] = F.normalize(0.6 * memory[r] + 0.4 * e, dim=0) if known[r] else e
            known[r] = True
        assert torch.allclose(loss.memory, memory, atol=1e-5) and loss.known.tolist() == known
        assert got == pytest.approx(slow_snca(emb, memory, y, y[rows], known, rows.tolist(), weight, 0.3), rel=1e-3)
    before = loss.memory.clone()
    loss.eval()
    loss(emb, y[rows], rows=rows)
    assert torch.equal(loss.memory, before)
    e = emb.requires_grad_()
    loss.train()(e, y[rows], rows=rows).backward()
    assert e.grad.abs().max() > 0


def test_snca_without_rows_is_nca_of_the_batch():
    x, t = batch()
    a = make('snca', temperature=0.5)(x, t).item()
    z = F.normalize(x)
    p = ((z @ z.T) / 0.5).fill_diagonal_(-math.inf).softmax(1)
    same = t[:, None] == t[None]
    q = (p * same).sum(1)
    assert a == pytest.approx(-q[q > 0].log().mean().item(), rel=1e-4)


def test_snca_memory_survives_a_checkpoint_and_is_given_up():
    x, t = batch()
    a = create_head('metric', D, TAX, loss='snca')
    a.prepare(x, t)
    a.rows = torch.arange(B)
    a.loss(x, t)
    b = create_head('metric', D, TAX, loss='snca')
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.criterion.memory, b.criterion.memory) and len(b.criterion.memory) == B
    b.rows = a.rows
    assert a.eval().loss(x, t) == b.eval().loss(x, t)
    a.conclude(x, t)
    assert len(a.criterion.memory) == 0
    with pytest.raises(HiermetricError, match='prepare'):
        a.train().loss(x, t)


def test_moco_slow():
    x, t = batch(n=10)
    t = t[:5].repeat(2)
    loss = create_loss('moco', TAX, D, queue=7, dim=6, temperature=0.3, momentum=0.9)
    fast, slow, queue = loss.fast, [p.clone() for p in loss.slow.parameters()], loss.queue.clone()
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    for _ in range(3):
        slow = [0.9 * s + 0.1 * f for s, f in zip(slow, fast.parameters())]
        z = F.normalize(x)
        q, k = F.normalize(fast(z[:5]), dim=1), F.normalize(F.linear(z[5:], *slow), dim=1)
        total = 0.0
        for i in range(5):
            e = [math.exp((q[i] @ o).item() / 0.3) for o in (k[i], *queue)]
            total -= math.log(e[0] / sum(e)) / 5
        assert loss(x, t).item() == pytest.approx(total, rel=1e-4)
        queue = torch.cat([queue, k])[-7:]
        assert torch.allclose(loss.queue, queue, atol=1e-6)
    loss(x, t).backward()
    assert all(p.grad is not None for p in loss.fast.parameters()) and all(
        p.grad is None for p in loss.slow.parameters()
    )


def test_simclr_is_ntxent_and_blind_to_labels():
    x, t = batch(n=20)
    t = t[:10].repeat(2)
    ref = pml.SelfSupervisedLoss(pml.NTXentLoss(0.5))(x[:10], x[10:])
    loss = make('simclr')
    assert loss(x, t).item() == pytest.approx(ref.item(), rel=1e-4) and loss(
        x, torch.zeros(20).long()
    ).item() == pytest.approx(ref.item(), rel=1e-4)
    for name in VIEWS:
        with pytest.raises(HiermetricError, match='views=2'):
            make(name)(x, batch(n=20)[1])
