"A chain has one vote: every head learns the same from a whole tree and from the contracted one, and answers on the tree that it was given"
import inspect, math
import numpy as np, pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.heads import HEADS, EmbeddingNet, Head, Model, create_head
from hiermetric.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')

WHOLE = Taxonomy.from_paths({'a': 'A', 'b': 'B/B1', 'c': 'C/C1/C2',                                       # chains of 1, 2 and 3 above a leaf
    'd1': 'D/D1', 'd2': 'D/D1', 'e1': 'E/E1/E2', 'e2': 'E/E1/E2', 'e3': 'E/E1/E2/e', 'f1': 'F/F1/F2/F3', 'f2': 'F/F1/F2/F3/F4', 'f3': 'F/F1/F2/F3/F4',   # and above a fork, some with a chain below it
    'g': '', 'h1': 'H', 'h2': 'H'})
SHORT = WHOLE.prune()
MAP = WHOLE.tensor('to_chainless')
D, L = 16, WHOLE.n_leaves
CHAINS = np.flatnonzero(WHOLE.heirs != np.arange(len(WHOLE)))
SETTINGS = {'committee': dict(dim=8), 'diva': dict(dim=4, decorrelate=1.), 'divide_conquer': dict(learners=2, dim=8, every=1), 'bier': dict(sizes=(3, 5)), 'sndl': dict(dim=8)}
CASES = {name: (name, SETTINGS.get(name, {})) for name in HEADS} | {
    **{f'sphere_multi {o}': ('sphere_multi', dict(decode=o, node_weights='deep')) for o in ('sigmoid', 'path', 'product', 'mean', 'siblings', 'veto', 'closure', 'conditional')},
    'sphere_multi balanced': ('sphere_multi', dict(node_weights='balanced', scale='label', margin='both', criterion='asymmetric')),
    'sphere_multi levels': ('sphere_multi', dict(node_weights=[3.] + [1.]*(SHORT.height - 1))), 'sphere_multi prior': ('sphere_multi', dict(prior=[.5 - .01*i for i in range(len(SHORT) - 1)])),
    'sphere_hier product': ('sphere_hier', dict(penalty='product', distance='soft', penalty_weight=[.1*i for i in range(len(SHORT) - 1)], node_weights='shallow')), 'sphere_hier hard': ('sphere_hier', dict(penalty='hard', distance='hard')),
    'hxe arcface': ('hxe', dict(base='arcface', alpha=.5)), 'hace attention': ('hace', dict(base='attention', eps=.4)), 'soft_labels sharp': ('soft_labels', dict(beta=30.)), 'simple_hierarchy second': ('simple_hierarchy', dict(level=2, coarse=1., coarse_ramp=1.)),
    'arcface_levels product': ('arcface_levels', dict(joint='product')), 'attention linear': ('attention', dict(cosine=False)), 'attention uniform': ('attention', dict(attention='uniform')), 'semantic plain': ('semantic', dict(ce=0.)), 'classifier weighted': ('classifier', dict(class_weights=[1. + i for i in range(L)])),
    'tree_gaussian strong': ('tree_gaussian', dict(strength=20.)), 'diva paths': ('diva', dict(dim=4, paths=True, pair_loss='tree_supcon', miner=None)), 'bier paths': ('bier', dict(sizes=(3, 5), paths=True)), 'sndl paths': ('sndl', dict(dim=8, paths=True)), 'diva height': ('diva', dict(dim=4, pair_loss='tree_triplet', pair_kw=dict(by='height'), miner='tree')),
    **{f'metric {o}': ('metric', dict(loss=o)) for o in ('triplet', 'contrastive', 'margin', 'supcon', 'proxy_nca', 'tree_triplet', 'tree_margin', 'tree_supcon', 'boosted', 'snca')},
    **{f'metric {o} by height': ('metric', dict(loss=o, loss_kw=dict(by='height'))) for o in ('tree_triplet', 'tree_margin', 'tree_supcon')}, 'metric snca graded': ('metric', dict(loss='snca', loss_kw=dict(graded=True, by='height'))),
    **{f'metric tree_triplet, {o}': ('metric', dict(loss='tree_triplet', miner=o, loss_kw=dict(by='height'), miner_kw=dict(by='height') if o == 'multi_label' else None)) for o in ('epshn', 'hard', 'semi_hard', 'multi_similarity', 'tree', 'multi_label', 'random', 'intra_class')}}

def data(n=120, seed=0):
    "Clusters around the leaves; one label in three lies above them, at inner nodes of chains too"
    g = torch.Generator().manual_seed(seed); y = torch.randint(0, L, (n,), generator=g); x = 2*torch.randn(L, D, generator=torch.Generator().manual_seed(9))[y] + torch.randn(n, D, generator=g)
    t = WHOLE.tensor('leaves')[y]
    for k in range(n):
        for _ in range(int(torch.randint(-4, 5, (1,), generator=g))): t[k] = max(int(WHOLE.parents[t[k]]), 0)
    return x, t

def make(name, tax, seed=0, **kw):
    torch.manual_seed(seed); head, own = CASES[name]
    return create_head(head, D, tax, **{**own, **kw})

def train(head, x, t, epochs=3, batch=40):
    "As `Trainer` does it"
    opt = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad] or [torch.nn.Parameter(torch.zeros(1))], lr=.02); torch.manual_seed(1); losses = []
    with torch.no_grad(): head.eval(); head.prepare(x, t)
    for epoch in range(epochs):
        with torch.no_grad(): head.eval(); head.refresh(x, t)
        head.train()
        for i, rows in enumerate(torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(batch)):
            head.epoch, head.rows = epoch + i*batch/len(x), rows
            l = head.loss(x[rows], t[rows]); losses.append(l.item())
            opt.zero_grad(); l.backward() if l.requires_grad else None; opt.step()
    head.rows = None; head.eval()
    with torch.no_grad(): head.conclude(x, t); head.calibrate(x[::3], t[::3])
    return losses

def test_the_trees():
    "The whole tree has every kind of chain; contracted, it is the tree that heads learn on, and the labels meet nodes of chains"
    assert len(WHOLE) > len(SHORT) and SHORT == WHOLE.chainless and SHORT.chainless is SHORT
    sizes = {}
    for v in CHAINS: sizes.setdefault(int(WHOLE.heirs[v]), []).append(v)
    kinds = {(len(o), bool(WHOLE.heights[heir])) for heir, o in sizes.items()}; assert kinds >= {(k, fork) for k in (1, 2, 3) for fork in (False, True)}
    t = data()[1]; assert np.isin(t, CHAINS).sum() > 10 and (WHOLE.tensor('heights')[t] == 0).sum() > 40

@pytest.mark.parametrize('name', CASES)
def test_the_same_is_learnt_from_the_whole_and_the_contracted_tree(name):
    "Losses, weights and leaf probabilities: a chain has one vote"
    x, t = data(); whole, short = (make(name, tax) for tax in (WHOLE, SHORT)); assert whole.taxonomy is WHOLE
    assert train(whole, x, t) == pytest.approx(train(short, x, MAP[t]), rel=1e-5, abs=1e-6)
    a, b = whole.state_dict(), short.state_dict(); assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    with torch.no_grad(): p, q = whole.leaf_probs(x), short.leaf_probs(x)
    assert torch.allclose(p, q, atol=1e-6) and (p - 1/L).abs().max() > .01   # something was learnt

@pytest.mark.parametrize('name', CASES)
def test_answers_are_on_the_whole_tree(name):
    "Gathered from the contracted one, coherent, one probability along a chain"
    x, t = data(); whole, short = (make(name, tax) for tax in (WHOLE, SHORT)); train(whole, x, t, 1); train(short, x, MAP[t], 1)
    with torch.no_grad(): p, q = whole.node_probs(x), short.node_probs(x)
    assert p.shape == (len(x), len(WHOLE)) and torch.allclose(p, q[:, MAP], atol=1e-6)
    assert torch.allclose(p[:, 0], torch.ones(len(x)), atol=1e-5) and (p[:, 1:] <= p[:, WHOLE.tensor('parents')[1:]]).all() and torch.equal(p[:, CHAINS], p[:, WHOLE.heirs[CHAINS].astype(int)])

@pytest.mark.parametrize('name', CASES)
def test_the_loss_is_that_of_the_contracted_tree(name):
    "For labels at every node of the tree, and sample by sample"
    x, t = data(2*len(WHOLE), seed=3); t = torch.arange(len(WHOLE)).repeat(2); whole, short = (make(name, tax).eval() for tax in (WHOLE, SHORT))
    if name.split()[0] in ('tree_gaussian', 'kernel_ridge', 'committee', 'metric', 'diva', 'divide_conquer', 'bier', 'sndl'):
        for head, o in ((whole, t), (short, MAP[t])): torch.manual_seed(2); head.prepare(x, o)
    def loss(head, x, t): torch.manual_seed(4); return head.loss(x, t).item()
    assert loss(whole, x, t) == pytest.approx(loss(short, x, MAP[t]), rel=1e-5, abs=1e-6)
    if name.split()[0] in ('metric', 'diva', 'divide_conquer', 'bier', 'sndl'): return   # single images teach these nothing
    for v in CHAINS.tolist(): assert loss(whole, x[:1], t[v:v+1]) == pytest.approx(loss(short, x[:1], MAP[t[v:v+1]]), rel=1e-5, abs=1e-6)

@pytest.mark.parametrize('name', CASES)
def test_weights_from_the_contracted_tree_fit_the_whole_one(name, tmp_path):
    x, t = data(); short = make(name, SHORT); train(short, x, MAP[t], 1); kind = 'none'
    Model(EmbeddingNet(D, D, kind=kind), short).save(tmp_path/'short'); saved = Model.load(tmp_path/'short')
    model = Model(EmbeddingNet(D, D, kind=kind), make(name, WHOLE, seed=5)).eval(); model.load_state_dict(saved.state_dict())
    own, other = (dict(o.head.named_buffers()) for o in (model, saved)); assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)   # those that are not saved, too
    with torch.no_grad(): assert torch.allclose(model.node_probs(x), saved.node_probs(x)[:, MAP], atol=1e-6)
    model.save(tmp_path/'whole'); back = Model.load(tmp_path/'whole', WHOLE)
    with torch.no_grad(): assert torch.equal(back.node_probs(x), model.node_probs(x))
    with pytest.raises(HiermetricError, match='belongs to the taxonomy'): Model.load(tmp_path/'short', WHOLE)
