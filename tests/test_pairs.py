"Losses on pairs and proxies, miners, and the head of class means (hiermetric.pairs)"
import itertools, math
import numpy as np, pytest, torch, torch.nn.functional as F
from pytorch_metric_learning import losses as pml, miners as pmm, distances as pmd
from hiermetric.core import HiermetricError
from hiermetric.heads import EmbeddingNet, Model, create_head
from hiermetric.pairs import LOSSES, MINERS, MetricHead, class_means, create_loss, create_miner, relation
from hiermetric.taxonomy import Taxonomy

TAX = Taxonomy.from_paths({f'c{i}': f'g{i%4}' if i < 12 else '' for i in range(15)})   # ragged: three leaves hang on the root
FLAT = Taxonomy.from_paths({f'c{i}': '' for i in range(15)})
L, D, B = 15, 16, 32

def batch(tax=TAX, n=B, seed=0, inner=0, dim=D):
    g = torch.Generator().manual_seed(seed)
    t = tax.tensor('leaves')[torch.randint(0, 8, (n,), generator=g)]
    for i in range(inner): t[3*i] = tax.tensor('parents')[t[3*i]]   # known to the genus only
    return torch.randn(n, dim, generator=g), t

def make(name, tax=TAX, dim=D, **kw): torch.manual_seed(0); return create_loss(name, tax, dim, **kw)

def test_relation_slow():
    u = torch.arange(len(TAX)); same, different = relation(u, u, TAX)
    for i, j in itertools.product(range(len(TAX)), repeat=2):
        up = lambda k: {k} | (up(int(TAX.parents[k])) if TAX.parents[k] >= 0 else set())
        assert same[i, j] == (i == j and i in TAX.leaves) and different[i, j] == (i not in up(j) and j not in up(i))

# the library's losses and miners, on labels that are leaves, are the library's

ORIGINAL = dict(triplet=lambda d: pml.TripletMarginLoss(.1, distance=d), supcon=lambda d: pml.SupConLoss(.1, distance=d), multi_similarity=lambda d: pml.MultiSimilarityLoss(distance=d))

@pytest.mark.parametrize('name', ORIGINAL)
def test_equals_library_with_its_own_distances(name):
    x, t = batch()
    assert make(name, distance='euclidean')(x, t).item() == pytest.approx(ORIGINAL[name](pmd.LpDistance())(x, t).item(), rel=1e-4)
    assert make(name, distance='cosine')(x, t).item() == pytest.approx(ORIGINAL[name](pmd.CosineSimilarity())(x, t).item(), rel=1e-4)

def test_contrastive_and_margin_equal_library():
    x, t = batch(); y = TAX.tensor('leaf_column')[t]
    assert make('contrastive')(x, t).item() == pytest.approx(pml.ContrastiveLoss()(x, t).item(), rel=1e-4)
    assert make('contrastive', distance='cosine')(x, t).item() == pytest.approx(pml.ContrastiveLoss(1, 0, distance=pmd.CosineSimilarity())(x, t).item(), rel=1e-4)
    assert make('margin')(x, t).item() == pytest.approx(pml.MarginLoss(.2, beta=1.2, learn_beta=True, num_classes=L)(x, y).item(), rel=1e-4)
    assert make('margin', distance='cosine')(x, t).item() == pytest.approx(pml.MarginLoss(.2, beta=.28, learn_beta=True, num_classes=L, distance=pmd.CosineSimilarity())(x, y).item(), rel=1e-4)

@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
@pytest.mark.parametrize('name,theirs', [('epshn', lambda d: pmm.BatchEasyHardMiner(distance=d)), ('hard', lambda d: pmm.BatchHardMiner(distance=d)),
    ('semi_hard', lambda d: pmm.TripletMarginMiner(.2, 'semihard', distance=d) if False else pmm.TripletMarginMiner(margin=.2, type_of_triplets='semihard', distance=d)), ('multi_similarity', lambda d: pmm.MultiSimilarityMiner(distance=d))])
def test_miners_equal_library(name, theirs, distance):
    x, t = batch(); x = F.normalize(x)
    a = create_miner(name, TAX, distance)(x, t); b = theirs(pmd.CosineSimilarity() if distance == 'cosine' else pmd.LpDistance())(x, t)
    rows = lambda found: [set(zip(*(o.tolist() for o in found[i:i+2]))) for i in (0, 2)] if len(found) == 4 else set(zip(*(o.tolist() for o in found)))
    assert rows(a) == rows(b) and len(a[0])

# labels above the leaves

@pytest.mark.parametrize('name', [o for o in LOSSES])
def test_unknown_pairs_teach_nothing(name):
    "An image known to its genus moves nobody inside the genus, and is moved by nobody there"
    t = torch.as_tensor(TAX.index(['c0', 'c0', 'c4'] + ['g0'])); assert TAX.names[TAX.parents[t[0]]] == 'g0'
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = make(name)
    if name == 'proxy_nca': return
    loss(x, t).backward(); assert (x.grad[3] == 0).all()
    whole, part = loss(x, t).item(), loss(x[:3], t[:3]).item(); assert whole == pytest.approx(part, abs=1e-6) or name == 'multi_similarity'   # that one divides by all anchors

@pytest.mark.parametrize('name', list(MINERS))
def test_miners_find_only_what_is_known(name):
    x, t = batch(inner=4); torch.manual_seed(0); same, different = relation(t, t, TAX)
    found = create_miner(name, TAX)(F.normalize(x), t); assert len(found[0])
    if name == 'intra_class': assert all(same[a, b] and a != b for a, *o in zip(*(o.tolist() for o in found)) for b in o); return
    assert same[found[0], found[1]].all() and different[found[-2] if len(found) == 4 else found[0], found[-1]].all()

def test_distance_weighted_draws_far_ones_too():
    x, t = batch(n=200, dim=D); torch.manual_seed(0); x = F.normalize(x)
    a, p, n = create_miner('distance_weighted', TAX)(x, t); d = (x[a] - x[n]).norm(dim=1)
    assert d.max() <= 1.4 and d.min() < .9 and len(a) >= 200

def test_proxy_nca_slow_at_inner_nodes():
    loss = make('proxy_nca', scale=3.); x, t = batch(inner=5); p, z = F.normalize(loss.proxies), F.normalize(x); total = 0.
    for xi, ti in zip(z, t.tolist()):
        e = [math.exp(-3*((xi - q)**2).sum().item()) for q in p]
        total -= math.log(sum(e[j] for j, leaf in enumerate(TAX.leaves) if TAX.is_ancestor(ti, int(leaf)))/sum(e))
    assert loss(x, t).item() == pytest.approx(total/len(t), rel=1e-4)

# nothing may break a loss

DEGENERATE = {'zeros': lambda: (torch.zeros(8, D), batch(n=8)[1]), 'one class': lambda: (torch.randn(8, D), torch.full((8,), int(TAX.leaves[0]))), 'no pairs': lambda: (torch.randn(8, D), TAX.tensor('leaves')[:8]),
    'one image': lambda: batch(n=1), 'empty': lambda: batch(n=0), 'all alike': lambda: (torch.ones(8, D), batch(n=8)[1]), 'root only': lambda: (torch.randn(8, D), torch.zeros(8).long()),
    'huge': lambda: (1e15*batch(n=8)[0], batch(n=8)[1]), 'tiny': lambda: (1e-20*batch(n=8)[0], batch(n=8)[1])}

@pytest.mark.parametrize('what', DEGENERATE)
@pytest.mark.parametrize('name', list(LOSSES))
def test_finite(name, what):
    torch.manual_seed(0); x, t = DEGENERATE[what]()
    for miner in (None, 'epshn', 'random') if name != 'simclr' else (None,):
        for precision in (None, torch.bfloat16):
            head = create_head('metric', D, TAX, loss=name, miner=miner); emb = x.clone().requires_grad_()
            with torch.autocast('cpu', torch.bfloat16, enabled=precision is not None): loss = head.loss(emb, t)
            assert loss.dtype == torch.float32 and loss.ndim == 0 and loss.isfinite()
            loss.backward(); assert emb.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
            assert head.node_probs(x).isfinite().all() and head.weight.isfinite().all()

# the head

@pytest.mark.parametrize('name', list(LOSSES))
def test_parameters_are_saved_and_move(name, tmp_path):
    model = Model(EmbeddingNet(20, D), create_head('metric', D, TAX, loss=name, miner='random', loss_kw=dict(distance='cosine')))
    x, t = batch(dim=20); model.train().loss(x, t)
    for p in model.parameters(): p.data.add_(.1)
    model.head.scale.fill_(3.); model.save(tmp_path/'m'); again = Model.load(tmp_path/'m')
    assert {k for k in again.state_dict()} == {k for k in model.state_dict()} and again.head.settings == model.head.settings
    assert torch.equal(model.eval().node_probs(x), again.node_probs(x))
    for a, b in zip(model.head.criterion.parameters(), again.head.criterion.parameters(), strict=True): assert torch.equal(a, b)
    assert {p.dtype for p in again.double().head.criterion.parameters()} <= {torch.float64}

def test_class_means_slow():
    x, t = batch(inner=5); mean, n = class_means(x, t, TAX)
    for j, leaf in enumerate(TAX.leaves):
        own = [xi for xi, ti in zip(x, t.tolist()) if ti == leaf]; assert n[j] == len(own)
        assert torch.allclose(mean[j], torch.stack(own).mean(0) if own else torch.zeros(D), atol=1e-6)

@pytest.mark.parametrize('distance,normalise', [('cosine', True), ('euclidean', True), ('euclidean', False)])
def test_probabilities_are_a_softmax_over_distances_to_means(distance, normalise):
    x, t = batch(inner=3); head = create_head('metric', D, TAX, loss='triplet', loss_kw=dict(normalise=normalise), distance=distance); head.conclude(x, t); head.calibrate(x, t); head.eval()
    z = F.normalize(x) if normalise else x; seen = [j for j, leaf in enumerate(TAX.leaves) if (t == leaf).any()]
    means = {j: torch.stack([o for o, k in zip(z, t.tolist()) if k == TAX.leaves[j]]).mean(0) for j in seen}
    for zi, pi in zip(z[:5], head.leaf_probs(x)[:5]):
        d = {j: (1 - F.cosine_similarity(zi, m, dim=0) if distance == 'cosine' else ((zi - m)**2).sum()).item() for j, m in means.items()}
        e = [math.exp(-head.scale.item()*d.get(j, max(d.values()))) for j in range(L)]
        assert np.allclose(pi.numpy(), np.array(e)/sum(e), atol=1e-5)

def test_scale_is_the_likeliest():
    x, t = batch(n=300); x = x + 3*torch.randn(len(TAX), D, generator=torch.Generator().manual_seed(5))[t]
    head = create_head('metric', D, TAX).eval(); head.conclude(x[:200], t[:200]); head.calibrate(x[200:], t[200:])
    def nll(s): return F.cross_entropy(s*head(x[200:])/head.scale, TAX.tensor('leaf_column')[t[200:]]).item()
    s = head.scale.item(); assert nll(s) <= min(nll(s*.9), nll(s*1.1)) and .05 < s < 1000

def test_training_separates_classes():
    x, t = batch(n=400); x = x*.6 + 1.5*torch.randn(len(TAX), D, generator=torch.Generator().manual_seed(5))[t]
    torch.manual_seed(0); head = create_head('metric', 8, TAX, loss='triplet', miner='semi_hard'); model = Model(EmbeddingNet(D, 8), head); opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60): i = torch.randint(0, 400, (64,)); opt.zero_grad(); model.loss(x[i], t[i]).backward(); opt.step()
    acc = (head.taxonomy.tensor('leaves')[model.eval().leaf_probs(x).argmax(1)] == t).float().mean(); assert acc > .9

def test_errors():
    for kw, word in ((dict(loss='supkon'), 'supcon'), (dict(miner='epsh'), 'epshn'), (dict(distance='l3'), 'euclidean'), (dict(loss='triplet', loss_kw=dict(normalise=False), distance='cosine'), 'euclidean'), (dict(loss='proxy_nca', loss_kw=dict(scale=0)), 'scale'), (dict(miner='random', miner_kw=dict(k=0)), 'k=0')):
        with pytest.raises(HiermetricError, match=word): MetricHead(D, TAX, **kw)
    with pytest.raises(HiermetricError, match='one label'): make('triplet')(torch.randn(2, D), torch.zeros(2, 4))
