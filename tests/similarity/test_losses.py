"""Losses on pairs and proxies: labels at any node, the library as oracle, batches that teach nothing
(hiermetric.similarity.losses)"""

import itertools
import math
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml, distances as pmd
from pair_batches import B, D, L, TAX, VIEWS, batch, make
from hiermetric.core import HiermetricError
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.similarity.losses import LOSSES, relation
from hiermetric.similarity.metric_head import MetricHead


def test_relation_slow():
    u = torch.arange(len(TAX))
    same, different = relation(u, u, TAX)
    for i, j in itertools.product(range(len(TAX)), repeat=2):
        up = lambda k: {k} | (up(int(TAX.parents[k])) if TAX.parents[k] >= 0 else set())
        assert same[i, j] == (i == j and i in TAX.leaves) and different[i, j] == (i not in up(j) and j not in up(i))


ORIGINAL = dict(
    triplet=lambda d: pml.TripletMarginLoss(0.1, distance=d),
    supcon=lambda d: pml.SupConLoss(0.1, distance=d),
    multi_similarity=lambda d: pml.MultiSimilarityLoss(distance=d),
)


@pytest.mark.parametrize('name', ORIGINAL)
def test_equals_library_with_its_own_distances(name):
    x, t = batch()
    assert make(name, distance='euclidean')(x, t).item() == pytest.approx(
        ORIGINAL[name](pmd.LpDistance())(x, t).item(), rel=1e-4
    )
    assert make(name, distance='cosine')(x, t).item() == pytest.approx(
        ORIGINAL[name](pmd.CosineSimilarity())(x, t).item(), rel=1e-4
    )


def test_contrastive_and_margin_equal_library():
    x, t = batch()
    y = TAX.tensor('leaf_column')[t]
    assert make('contrastive')(x, t).item() == pytest.approx(pml.ContrastiveLoss()(x, t).item(), rel=1e-4)
    assert make('contrastive', distance='cosine')(x, t).item() == pytest.approx(
        pml.ContrastiveLoss(1, 0, distance=pmd.CosineSimilarity())(x, t).item(), rel=1e-4
    )
    assert make('margin')(x, t).item() == pytest.approx(
        pml.MarginLoss(0.2, beta=1.2, learn_beta=True, num_classes=L)(x, y).item(), rel=1e-4
    )
    assert make('margin', distance='cosine')(x, t).item() == pytest.approx(
        pml.MarginLoss(0.2, beta=0.28, learn_beta=True, num_classes=L, distance=pmd.CosineSimilarity())(x, y).item(),
        rel=1e-4,
    )


@pytest.mark.parametrize('name', ['triplet', 'contrastive', 'margin', 'multi_similarity', 'supcon', 'boosted', 'snca'])
def test_unknown_pairs_teach_nothing(name):
    "An image known to its genus moves nobody inside the genus, and is moved by nobody there"
    t = torch.as_tensor(TAX.index(['c0', 'c0', 'c4'] + ['g0']))
    assert TAX.names[TAX.parents[t[0]]] == 'g0'
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = make(name)
    loss(x, t).backward()
    assert (x.grad[3] == 0).all()
    whole, part = loss(x, t).item(), loss(x[:3], t[:3]).item()
    assert whole == pytest.approx(part, abs=1e-6) or name == 'multi_similarity'  # that one divides by all anchors


def test_proxy_nca_slow_at_inner_nodes():
    loss = make('proxy_nca', scale=3.0)
    x, t = batch(inner=5)
    p, z = F.normalize(loss.proxies), F.normalize(x)
    total = 0.0
    for xi, ti in zip(z, t.tolist()):
        e = [math.exp(-3 * ((xi - q) ** 2).sum().item()) for q in p]
        total -= math.log(sum(e[j] for j, leaf in enumerate(TAX.leaves) if TAX.is_ancestor(ti, int(leaf))) / sum(e))
    assert loss(x, t).item() == pytest.approx(total / len(t), rel=1e-4)


DEGENERATE = {
    'zeros': lambda: (torch.zeros(8, D), batch(n=8)[1]),
    'one class': lambda: (torch.randn(8, D), torch.full((8,), int(TAX.leaves[0]))),
    'no pairs': lambda: (torch.randn(8, D), TAX.tensor('leaves')[:8]),
    'one image': lambda: batch(n=1),
    'empty': lambda: batch(n=0),
    'all alike': lambda: (torch.ones(8, D), batch(n=8)[1]),
    'root only': lambda: (torch.randn(8, D), torch.zeros(8).long()),
    'huge': lambda: (1e15 * batch(n=8)[0], batch(n=8)[1]),
    'tiny': lambda: (1e-20 * batch(n=8)[0], batch(n=8)[1]),
}


@pytest.mark.parametrize('what', DEGENERATE)
@pytest.mark.parametrize('name', list(LOSSES))
def test_finite(name, what):
    torch.manual_seed(0)
    x, t = DEGENERATE[what]()
    if name in VIEWS:
        x, t = x.repeat(2, 1), t.repeat(2)
    takes = make(name).takes
    for miner in [None] + ['epshn', 'random'] * (takes != 'none') + ['tree', 'multi_label'] * (takes == 'any'):
        head = create_head('metric', D, TAX, loss=name, miner=miner)
        emb = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=miner != 'epshn'):
            loss = head.loss(emb, t)
        assert loss.dtype == torch.float32 and loss.ndim == 0 and loss.isfinite()
        loss.backward()
        assert emb.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
        assert head.node_probs(x).isfinite().all() and head.weight.isfinite().all()


@pytest.mark.parametrize('name', list(LOSSES))
def test_parameters_are_saved_and_move(name, tmp_path):
    own = dict(distance='cosine') if name not in (*VIEWS, 'boosted') else {}
    model = Model(
        EmbeddingNet(20, D),
        create_head('metric', D, TAX, loss=name, miner=None if make(name).takes == 'none' else 'random', loss_kw=own),
    )
    x, t = batch(dim=20)
    model.head.prepare(torch.empty(B, 0), t)
    model.head.rows = torch.arange(B)
    model.train().loss(*((x.repeat(2, 1), t.repeat(2)) if name in VIEWS else (x, t)))
    for p in model.parameters():
        p.data.add_(0.1)
    model.head.scale.fill_(3.0)
    model.save(tmp_path / 'm')
    again = Model.load(tmp_path / 'm')
    assert {k for k in again.state_dict()} == {
        k for k in model.state_dict()
    } and again.head.settings == model.head.settings
    assert torch.equal(model.eval().node_probs(x), again.node_probs(x))
    for a, b in zip(model.head.criterion.parameters(), again.head.criterion.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {p.dtype for p in again.double().head.criterion.parameters()} <= {torch.float64}


def test_errors():
    for kw, word in (
        (dict(loss='supkon'), 'supcon'),
        (dict(miner='epsh'), 'epshn'),
        (dict(distance='l3'), 'euclidean'),
        (dict(loss='triplet', loss_kw=dict(normalise=False), distance='cosine'), 'euclidean'),
        (dict(loss='proxy_nca', loss_kw=dict(scale=0)), 'scale'),
        (dict(miner='random', miner_kw=dict(k=0)), 'k=0'),
    ):
        with pytest.raises(HiermetricError, match=word):
            MetricHead(D, TAX, **kw)
    with pytest.raises(HiermetricError, match='one label'):
        make('triplet')(torch.randn(2, D), torch.zeros(2, 4))
