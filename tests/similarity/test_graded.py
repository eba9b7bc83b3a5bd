"""Grades and graded losses against slow loops, and on a flat tree against the ungraded
(hiermetric.similarity.graded)"""

import itertools
import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pair_batches import D, FLAT, TAX, batch, jaccard, make, multi_hot, slow_grade
from hiermetric.core import HiermetricError
from hiermetric.similarity.graded import as_triplets, grades, overlap
from hiermetric.similarity.miners import create_miner
from hiermetric.trees.taxonomy import Taxonomy


@pytest.mark.parametrize('by', ['information', 'height'])
def test_grades_slow(by):
    u = torch.arange(len(TAX))
    low, high = grades(u, u, TAX, by)
    for i, j in itertools.product(range(len(TAX)), repeat=2):
        assert (low[i, j].item(), high[i, j].item()) == pytest.approx(slow_grade(i, j, by), abs=1e-6)


def slow_triplets(t, by, tax=TAX):
    G = {(i, j): slow_grade(i, j, by, tax) for i in set(t.tolist()) for j in set(t.tolist())}
    y = t.tolist()
    n = range(len(y))
    return [
        (a, p, q, G[y[a], y[p]][0], G[y[a], y[q]][1])
        for a in n
        for p in n
        for q in n
        if a != p and G[y[a], y[p]][0] > G[y[a], y[q]][1] + 1e-9
    ]


@pytest.mark.parametrize('by', ['information', 'height'])
@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
def test_tree_triplet_and_margin_slow(distance, by):
    x, t = batch(inner=3, n=14)
    z = F.normalize(x)
    d = 1 - z @ z.T if distance == 'cosine' else (z[:, None] - z[None]).norm(dim=2)
    trip = slow_triplets(t, by)
    assert len({o[3] for o in trip}) > 1  # more than same and different
    v = [o for o in (d[a, p].item() - d[a, n].item() + 0.3 * (g - G) for a, p, n, g, G in trip) if o > 0]
    assert make('tree_triplet', margin=0.3, by=by, distance=distance)(x, t).item() == pytest.approx(
        sum(v) / len(v), rel=1e-4
    )
    loss = make('tree_margin', margin=0.25, by=by, distance=distance)
    loss.beta.data += 0.2 * torch.randn(len(TAX), generator=torch.Generator().manual_seed(3))
    terms = []
    for a, p, n, g, G in trip:
        beta = loss.beta[t[a]].item()
        terms += [d[a, p].item() - beta - 0.25 * (1 - 2 * g), beta + 0.25 * (1 - 2 * G) - d[a, n].item()]
    terms = [o for o in terms if o > 0]
    assert loss(x, t).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    found = tuple(torch.tensor(o) for o in zip(*[o[:3] for o in trip[::7]]))
    part = trip[::7]  # the same from what a miner gives
    v = [o for o in (d[a, p].item() - d[a, n].item() + 0.3 * (g - G) for a, p, n, g, G in part) if o > 0]
    assert make('tree_triplet', margin=0.3, by=by, distance=distance)(x, t, found).item() == pytest.approx(
        sum(v) / len(v), rel=1e-4
    )
    whole = tuple(torch.tensor(o) for o in zip(*[o[:3] for o in trip]))
    assert loss(x, t, whole).item() == pytest.approx(loss(x, t).item(), rel=1e-4)


@pytest.mark.parametrize('by', ['information', 'height'])
def test_tree_supcon_slow(by):
    x, t = batch(inner=3, n=14)
    z = F.normalize(x)
    y = t.tolist()
    each = []
    for a in range(14):
        G = {i: slow_grade(y[a], y[i], by) for i in range(14) if i != a}
        known = {i: g for i, (g, G) in G.items() if abs(g - G) < 1e-9}
        if not known or max(known.values()) - min(known.values()) < 1e-9:
            continue
        e = {i: math.exp((z[a] @ z[i]).item() / 0.2) for i in known}
        w = {i: g**3 for i, g in known.items()}
        each.append(-sum(w[i] / sum(w.values()) * math.log(e[i] / sum(e.values())) for i in known))
    assert make('tree_supcon', temperature=0.2, power=3.0, by=by)(x, t).item() == pytest.approx(
        sum(each) / len(each), rel=1e-4
    )


@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
@pytest.mark.parametrize('name', ['triplet', 'margin', 'supcon'])
@pytest.mark.parametrize('by', ['information', 'height'])
@pytest.mark.parametrize('seed', range(3))
def test_on_a_flat_tree_the_graded_loss_is_the_ungraded(name, by, distance, seed):
    x, t = batch(FLAT, seed=seed)
    a, b = (make(k, FLAT, distance=distance, **o) for k, o in ((name, {}), (f'tree_{name}', dict(by=by))))
    ga, gb = (torch.autograd.grad(f(e := x.clone().requires_grad_(), t), e)[0] for f in (a, b))
    assert (
        a(x, t).item() == pytest.approx(b(x, t).item(), rel=1e-4)
        and torch.allclose(ga, gb, atol=1e-5)
        and ga.abs().max() > 1e-4
    )
    for miner in ('epshn', 'semi_hard'):
        found = as_triplets(create_miner(miner, FLAT, distance)(F.normalize(x), t))
        if name != 'supcon':
            assert a(x, t, found).item() == pytest.approx(b(x, t, found).item(), rel=1e-4)


def test_grades_need_no_matrix_of_nodes():
    tax = Taxonomy.from_paths({f'c{i}': f'a{i % 100}/b{i % 1000}' for i in range(20000)})
    x, t = torch.randn(32, D), tax.tensor('leaves')[torch.arange(32) * 7 % 5000]
    for name in ('tree_triplet', 'tree_margin', 'tree_supcon'):
        assert make(name, tax)(x, t).isfinite()


def test_sets_of_labels_slow():
    m, (x, _) = multi_hot(), batch(n=14)
    z = F.normalize(x)
    J = [[jaccard(a, b) for b in m] for a in m]
    assert np.allclose(overlap(m, m), J, atol=1e-6)
    d = (z[:, None] - z[None]).norm(dim=2)
    n = range(14)
    v = [
        o
        for o in (
            d[a, p].item() - d[a, q].item() + 0.3 * (J[a][p] - J[a][q])
            for a in n
            for p in n
            for q in n
            if a != p and J[a][p] > J[a][q] + 1e-9
        )
        if o > 0
    ]
    assert make('tree_triplet', margin=0.3)(x, m).item() == pytest.approx(sum(v) / len(v), rel=1e-4)
    each = []
    for a in n:
        w = {i: J[a][i] ** 4 for i in n if i != a}
        if max(w.values()) <= min(w.values()):
            continue
        e = {i: math.exp((z[a] @ z[i]).item() / 0.1) for i in w}
        each.append(-sum(w[i] / sum(w.values()) * math.log(e[i] / sum(e.values())) for i in w))
    assert make('tree_supcon')(x, m).item() == pytest.approx(sum(each) / len(each), rel=1e-4)
    for name in ('triplet', 'supcon', 'tree_margin', 'proxy_nca'):
        with pytest.raises(HiermetricError, match='one label'):
            make(name)(x, m)
