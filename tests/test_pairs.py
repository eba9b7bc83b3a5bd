"Losses on pairs and proxies, miners, and the head of class means (hiermetric.pairs)"

import itertools, math
import numpy as np, pytest, torch, torch.nn.functional as F
from pytorch_metric_learning import losses as pml, miners as pmm, distances as pmd
from hiermetric.core import HiermetricError
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hypothesis import given, settings, strategies as st
from hiermetric.pairs import (
    LOSSES,
    MINERS,
    Decorrelation,
    MetricHead,
    as_triplets,
    class_means,
    create_loss,
    create_miner,
    grades,
    overlap,
    relation,
    reverse_gradient,
)
from hiermetric.training import embeddings, fit, predict
from hiermetric.images.features import toy_features
from hiermetric.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {f'c{i}': f'g{i % 4}' if i < 12 else '' for i in range(15)}
)  # ragged: three leaves hang on the root
FLAT = Taxonomy.from_paths({f'c{i}': '' for i in range(15)})
L, D, B = 15, 16, 32


def batch(tax=TAX, n=B, seed=0, inner=0, dim=D):
    g = torch.Generator().manual_seed(seed)
    t = tax.tensor('leaves')[torch.randint(0, 8, (n,), generator=g)]
    for i in range(inner):
        t[3 * i] = tax.tensor('parents')[t[3 * i]]  # known to the genus only
    return torch.randn(n, dim, generator=g), t


def make(name, tax=TAX, dim=D, **kw):
    torch.manual_seed(0)
    return create_loss(name, tax, dim, **kw)


def test_relation_slow():
    u = torch.arange(len(TAX))
    same, different = relation(u, u, TAX)
    for i, j in itertools.product(range(len(TAX)), repeat=2):
        up = lambda k: {k} | (up(int(TAX.parents[k])) if TAX.parents[k] >= 0 else set())
        assert same[i, j] == (i == j and i in TAX.leaves) and different[i, j] == (i not in up(j) and j not in up(i))


# the library's losses and miners, on labels that are leaves, are the library's

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


@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
@pytest.mark.parametrize(
    'name,theirs',
    [
        ('epshn', lambda d: pmm.BatchEasyHardMiner(distance=d)),
        ('hard', lambda d: pmm.BatchHardMiner(distance=d)),
        ('semi_hard', lambda d: pmm.TripletMarginMiner(margin=0.2, type_of_triplets='semihard', distance=d)),
        ('multi_similarity', lambda d: pmm.MultiSimilarityMiner(distance=d)),
    ],
)
def test_miners_equal_library(name, theirs, distance):
    x, t = batch()
    x = F.normalize(x)
    a = create_miner(name, TAX, distance)(x, t)
    b = theirs(pmd.CosineSimilarity() if distance == 'cosine' else pmd.LpDistance())(x, t)
    rows = lambda found: (
        [set(zip(*(o.tolist() for o in found[i : i + 2]))) for i in (0, 2)]
        if len(found) == 4
        else set(zip(*(o.tolist() for o in found)))
    )
    assert rows(a) == rows(b) and len(a[0])


# labels above the leaves


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


@pytest.mark.parametrize('name', list(MINERS))
def test_miners_find_only_what_is_known(name):
    x, t = batch(inner=4)
    torch.manual_seed(0)
    same, different = relation(t, t, TAX)
    found = create_miner(name, TAX)(F.normalize(x), t)
    assert len(found[0])
    if name in ('tree', 'multi_label'):
        low, high = grades(t, t, TAX)
        a, p, n = found
        assert (low[a, p] > high[a, n]).all() and (a != p).all()
        return
    if name == 'intra_class':
        assert all(same[a, b] and a != b for a, *o in zip(*(o.tolist() for o in found)) for b in o)
        return
    assert same[found[0], found[1]].all() and different[found[-2] if len(found) == 4 else found[0], found[-1]].all()


def test_distance_weighted_draws_far_ones_too():
    x, t = batch(n=200, dim=D)
    torch.manual_seed(0)
    x = F.normalize(x)
    a, p, n = create_miner('distance_weighted', TAX)(x, t)
    d = (x[a] - x[n]).norm(dim=1)
    assert d.max() <= 1.4 and d.min() < 0.9 and len(a) >= 200


def test_proxy_nca_slow_at_inner_nodes():
    loss = make('proxy_nca', scale=3.0)
    x, t = batch(inner=5)
    p, z = F.normalize(loss.proxies), F.normalize(x)
    total = 0.0
    for xi, ti in zip(z, t.tolist()):
        e = [math.exp(-3 * ((xi - q) ** 2).sum().item()) for q in p]
        total -= math.log(sum(e[j] for j, leaf in enumerate(TAX.leaves) if TAX.is_ancestor(ti, int(leaf))) / sum(e))
    assert loss(x, t).item() == pytest.approx(total / len(t), rel=1e-4)


# nothing may break a loss

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

VIEWS = ('simclr', 'moco')


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


# the head


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


def test_class_means_slow():
    x, t = batch(inner=5)
    mean, n = class_means(x, t, TAX)
    for j, leaf in enumerate(TAX.leaves):
        own = [xi for xi, ti in zip(x, t.tolist()) if ti == leaf]
        assert n[j] == len(own)
        assert torch.allclose(mean[j], torch.stack(own).mean(0) if own else torch.zeros(D), atol=1e-6)


@pytest.mark.parametrize('distance,normalise', [('cosine', True), ('euclidean', True), ('euclidean', False)])
def test_probabilities_are_a_softmax_over_distances_to_means(distance, normalise):
    x, t = batch(inner=3)
    head = create_head('metric', D, TAX, loss='triplet', loss_kw=dict(normalise=normalise), distance=distance)
    head.conclude(x, t)
    head.calibrate(x, t)
    head.eval()
    z = F.normalize(x) if normalise else x
    seen = [j for j, leaf in enumerate(TAX.leaves) if (t == leaf).any()]
    means = {j: torch.stack([o for o, k in zip(z, t.tolist()) if k == TAX.leaves[j]]).mean(0) for j in seen}
    for zi, pi in zip(z[:5], head.leaf_probs(x)[:5]):
        d = {
            j: (1 - F.cosine_similarity(zi, m, dim=0) if distance == 'cosine' else ((zi - m) ** 2).sum()).item()
            for j, m in means.items()
        }
        e = [math.exp(-head.scale.item() * d.get(j, max(d.values()))) for j in range(L)]
        assert np.allclose(pi.numpy(), np.array(e) / sum(e), atol=1e-5)


def test_scale_is_the_likeliest():
    x, t = batch(n=300)
    x = x + 3 * torch.randn(len(TAX), D, generator=torch.Generator().manual_seed(5))[t]
    head = create_head('metric', D, TAX).eval()
    head.conclude(x[:200], t[:200])
    head.calibrate(x[200:], t[200:])

    def nll(s):
        return F.cross_entropy(s * head(x[200:]) / head.scale, TAX.tensor('leaf_column')[t[200:]]).item()

    s = head.scale.item()
    assert nll(s) <= min(nll(s * 0.9), nll(s * 1.1)) and 0.05 < s < 1000


def test_training_separates_classes():
    x, t = batch(n=400)
    x = x * 0.6 + 1.5 * torch.randn(len(TAX), D, generator=torch.Generator().manual_seed(5))[t]
    torch.manual_seed(0)
    head = create_head('metric', 8, TAX, loss='triplet', miner='semi_hard')
    model = Model(EmbeddingNet(D, 8), head)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        i = torch.randint(0, 400, (64,))
        opt.zero_grad()
        model.loss(x[i], t[i]).backward()
        opt.step()
    acc = (head.taxonomy.tensor('leaves')[model.eval().leaf_probs(x).argmax(1)] == t).float().mean()
    assert acc > 0.9


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


# ours, against slow and obvious loops


def slow_grade(u, v, by, tax=TAX):
    "From paths, with sets: what two labels surely share, and what they may share at most"
    up = lambda k: [k] + (up(int(tax.parents[k])) if tax.parents[k] >= 0 else [])
    common = next(k for k in up(u) if k in up(v))
    below = [int(leaf) for leaf in tax.leaves if common in up(int(leaf))]

    def height(k):
        return max((1 + height(int(c)) for c in range(len(tax)) if tax.parents[c] == k), default=0)

    g = 1 - math.log(len(below)) / math.log(tax.n_leaves) if by == 'information' else 1 - height(common) / height(0)
    return g, 1.0 if common in (u, v) else g


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


def test_on_a_flat_tree_the_tree_miner_is_epshn():
    for seed in range(5):
        x, t = batch(FLAT, seed=seed)
        a, b = (
            set(zip(*(o.tolist() for o in as_triplets(create_miner(k, FLAT)(F.normalize(x), t)))))
            for k in ('tree', 'epshn')
        )
        assert a == b and a


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_tree_miner_slow(seed):
    x, t = batch(n=16, seed=seed, inner=3)
    x = F.normalize(x)
    d = 1 - x @ x.T
    y = t.tolist()
    want = set()
    up = lambda k: [k] + (up(int(TAX.parents[k])) if TAX.parents[k] >= 0 else [])
    meet = [[next(k for k in up(i) if k in up(j)) for j in y] for i in y]
    for a in range(16):
        for k in up(y[a])[:-1]:
            near = [(d[a, i].item(), i) for i in range(16) if i != a and meet[a][i] == k]
            if not near:
                continue
            dp, p = min(near)
            far = [
                (d[a, j].item(), j)
                for j in range(16)
                if j != a and meet[a][j] not in (y[a], y[j]) and meet[a][j] in up(k)[1:] and d[a, j] > dp
            ]
            if far:
                want.add((a, p, min(far)[1]))
    assert set(zip(*(o.tolist() for o in create_miner('tree', TAX)(x, t)))) == want


def test_grades_need_no_matrix_of_nodes():
    tax = Taxonomy.from_paths({f'c{i}': f'a{i % 100}/b{i % 1000}' for i in range(20000)})
    x, t = torch.randn(32, D), tax.tensor('leaves')[torch.arange(32) * 7 % 5000]
    for name in ('tree_triplet', 'tree_margin', 'tree_supcon'):
        assert make(name, tax)(x, t).isfinite()


def multi_hot(n=14, C=6, seed=0):
    return (torch.rand(n, C, generator=torch.Generator().manual_seed(seed)) < 0.35).float()


def jaccard(a, b):
    A, B_ = ({i for i, o in enumerate(v.tolist()) if o} for v in (a, b))
    return len(A & B_) / max(len(A | B_), 1)


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


def test_multi_label_miner_slow():
    m, (x, _) = multi_hot(), batch(n=14)
    x = F.normalize(x)
    d = 1 - x @ x.T
    n = range(14)
    J = [[jaccard(a, b) for b in m] for a in m]
    found = create_miner('multi_label', TAX, margin=0.3, gap=0.2)(x, m)
    assert set(zip(*(o.tolist() for o in found))) == {
        (a, p, q)
        for a in n
        for p in n
        for q in n
        if a != p and J[a][p] > J[a][q] + 0.2 and 0 < d[a, q] - d[a, p] <= 0.3
    } and len(found[0])


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


def test_random_triplets_are_even():
    x, t = batch(n=9)
    t = TAX.tensor('leaves')[torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])]
    torch.manual_seed(0)
    a, p, n = create_miner('random', TAX, k=2000)(x, t)
    count = torch.zeros(9, 9).index_put_((a, n), torch.ones(len(a)), accumulate=True)
    assert (count[0, 3:] - 2000 / 6).abs().max() < 80 and count[0, :3].sum() == 0 and (torch.bincount(a) == 2000).all()


@pytest.mark.parametrize(
    'kw',
    [
        dict(head_kw=dict(loss='tree_triplet', miner='tree'), sampler='m_per_class'),
        dict(head_kw=dict(loss='snca')),
        dict(head_kw=dict(loss='moco'), views=2),
        dict(head_kw=dict(loss='simclr'), views=2),
        dict(head_kw=dict(loss='boosted', loss_kw=dict(decorrelate=1.0)), sampler='m_per_class'),
    ],
    ids=lambda o: o['head_kw']['loss'],
)
def test_fit(kw, tmp_path):
    "Twice the same, exact means, better than chance, saved and read back"
    f = toy_features(TAX, per_leaf=20, dim=24)
    a, b = (fit(f, 'metric', embed_dim=16, epochs=3, batch_size=60, out=o, **kw) for o in (None, tmp_path / 'run'))
    p = predict(a.model, f, 'test')
    assert torch.equal(p, predict(b.model, f, 'test'))
    x, t = f.of('test')
    leaf = TAX.tensor('leaves')[p[:, TAX.tensor('leaves')].argmax(1)]
    assert (leaf == t).float().mean() > (0.5 if 'views' not in kw else 0.15)
    mean, n = class_means(embeddings(a.model, f, 'train'), f.of('train')[1], TAX)
    assert torch.allclose(a.model.head.weight, mean, atol=1e-5) and torch.equal(a.model.head.count, n)
    again = Model.load(tmp_path / 'run' / 'model')
    assert torch.allclose(predict(again, f, 'test'), p, atol=1e-6)


def test_tuning_goes_by_the_loss():
    from hiermetric.experiment import Variant, own_space, search_space, trials

    named = [k.removeprefix('metric: ') for k in search_space if k.startswith('metric: ')]
    assert set(named) < set(LOSSES)
    for name in named:
        for v in trials(Variant.of(('x', 'metric', dict(loss=name))), 4):
            create_head('metric', D, TAX, **v.settings['head_kw'])
        assert {
            repr(v.settings['head_kw'].get('loss_kw')) for v in trials(Variant.of(('x', 'metric', dict(loss=name))), 4)
        } != {'None'}
    assert (
        own_space(dict(head='metric', head_kw=dict(loss='boosted'))) == {}
        and own_space(dict(head='arcface')) == search_space['arcface']
    )
