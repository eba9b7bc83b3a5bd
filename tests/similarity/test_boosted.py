"Boosted embeddings and their adversaries against slow loops (hiermetric.similarity.boosted)"

import math
import pytest
import torch
import torch.nn.functional as F
from pair_batches import TAX, batch, jaccard, make, multi_hot
from hiermetric.core import HiermetricError
from hiermetric.similarity.boosted import Decorrelation, reverse_gradient
from hiermetric.similarity.losses import relation


@pytest.mark.parametrize('labels', ['leaves', 'inner', 'sets'])
def test_boosted_slow(labels):
    x, t = batch(n=12, inner=3 * (labels == 'inner'))
    m = multi_hot(12)
    y = t.tolist()
    sizes = [4, 4, 8]
    loss = make('boosted', sizes=sizes)
    if labels == 'sets':
        pos = {(i, j) for i in range(12) for j in range(12) if i != j and jaccard(m[i], m[j]) > 0}
        neg = {(i, j) for i in range(12) for j in range(12) if jaccard(m[i], m[j]) == 0}
    else:
        same, different = relation(t, t, TAX)
        pos = {(i, j) for i in range(12) for j in range(12) if i != j and same[i, j]}
        neg = {(i, j) for i in range(12) for j in range(12) if different[i, j]}
    total = 0.0
    for pairs, sign in ((pos, 1.0), (neg, -25.0)):
        for i, j in pairs:
            s, w = 0.0, 1.0
            for k, part in enumerate(x.split(sizes, 1)):
                own = F.cosine_similarity(part[i], part[j], dim=0).item()
                total += w * math.log1p(math.exp(-2 * sign * (own - 0.5))) / len(pairs) / 3
                eta = 2 / (k + 2)
                s = (1 - eta) * s + eta * own
                w = 1 / (1 + math.exp(2 * sign * (s - 0.5)))
    assert loss(x, m if labels == 'sets' else t).item() == pytest.approx(total, rel=1e-4)
    r = loss.represent(x)
    assert torch.allclose(r.norm(dim=1), torch.ones(12), atol=1e-5)


def test_boosted_refuses_parts_that_do_not_fit():
    with pytest.raises(HiermetricError, match='16 features'):
        make('boosted', sizes=[4, 4])
    with pytest.raises(HiermetricError, match='at least 1'):
        make('boosted', dim=3)


def test_reversal_and_decorrelation_slow():
    torch.manual_seed(0)
    dec = Decorrelation([3, 5, 4], hidden=7)
    parts = [torch.randn(6, k, requires_grad=True) for k in (3, 5, 4)]
    total = 0.0
    for (i, j), net in zip(dec.pairs, dec.nets):
        for b in range(6):
            total -= (
                (F.normalize(parts[j], dim=1)[b] * F.normalize(net(F.normalize(parts[i], dim=1)[b]), dim=0)) ** 2
            ).mean() / 6
    assert {(i, j) for i, j in dec.pairs} == {(0, 1), (0, 2), (1, 2)}
    loss = dec(parts)
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    a, b = (torch.autograd.grad(o, [*parts, *dec.parameters()], retain_graph=True) for o in (loss, total))
    for k, (ga, gb) in enumerate(zip(a, b)):
        assert (
            torch.allclose(ga, -gb if k < 3 else gb, atol=1e-6) and ga.abs().max() > 0
        )  # the embedding goes up, the adversary down
    x = torch.randn(4, 3, requires_grad=True, dtype=torch.double)
    assert torch.allclose(torch.autograd.grad(reverse_gradient(x).sin().sum(), x)[0], -x.cos())
