"""A chain has one vote: every head learns the same from a whole tree and from the contracted one, and answers on the
tree that it was given"""

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.heads.aam import ArcFace
from hiermetric.core import HiermetricError
from hiermetric.heads.hbce import HBCELoss, edge_weights
from hiermetric.heads.contract import HEADS, Classifier, Head, create_head, prototypes
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.similarity.multitask import MultiTask
from hiermetric.similarity.losses import create_loss
from hiermetric.heads.node_head import NodeHead
from hiermetric.trees.arithmetic import path_targets
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.running.inference import predict
from hiermetric.images.features import toy_features
from hiermetric.judging.known import model_outputs

pytestmark = pytest.mark.usefixtures('one_thread')

WHOLE = Taxonomy.from_paths(
    {
        'a': 'A',
        'b': 'B/B1',
        'c': 'C/C1/C2',  # chains of 1, 2 and 3 above a leaf
        'd1': 'D/D1',
        'd2': 'D/D1',
        'e1': 'E/E1/E2',
        'e2': 'E/E1/E2',
        'e3': 'E/E1/E2/e',
        'f1': 'F/F1/F2/F3',
        'f2': 'F/F1/F2/F3/F4',
        'f3': 'F/F1/F2/F3/F4',  # and above a fork, some with a chain below it
        'g': '',
        'h1': 'H',
        'h2': 'H',
    }
)
SHORT = WHOLE.prune()
MAP = WHOLE.tensor('to_chainless')
D, L = 16, WHOLE.n_leaves
CHAINS = np.flatnonzero(WHOLE.heirs != np.arange(len(WHOLE)))
SETTINGS = {
    'committee': dict(dim=8),
    'diva': dict(dim=4, decorrelate=1.0),
    'divide_conquer': dict(learners=2, dim=8, every=1),
    'bier': dict(sizes=(3, 5)),
    'sndl': dict(dim=8),
}
OURS = [
    name for name, (path, _) in HEADS.entries.items() if str(path).startswith('hiermetric.')
]  # other tests register heads, too
CASES = {name: (name, SETTINGS.get(name, {})) for name in OURS} | {
    **{
        f'sphere_multi {o}': ('sphere_multi', dict(decode=o, node_weights='deep'))
        for o in ('sigmoid', 'path', 'product', 'mean', 'siblings', 'veto', 'closure', 'conditional')
    },
    'sphere_multi balanced': (
        'sphere_multi',
        dict(node_weights='balanced', scale='label', margin='both', criterion='asymmetric'),
    ),
    'sphere_multi levels': ('sphere_multi', dict(node_weights=[3.0] + [1.0] * (SHORT.height - 1))),
    'sphere_multi prior': ('sphere_multi', dict(prior=[0.5 - 0.01 * i for i in range(len(SHORT) - 1)])),
    'sphere_hier product': (
        'sphere_hier',
        dict(
            penalty='product',
            distance='soft',
            penalty_weight=[0.1 * i for i in range(len(SHORT) - 1)],
            node_weights='shallow',
        ),
    ),
    'sphere_hier hard': ('sphere_hier', dict(penalty='hard', distance='hard')),
    'hxe arcface': ('hxe', dict(base='arcface', alpha=0.5)),
    'hace attention': ('hace', dict(base='attention', eps=0.4)),
    'soft_labels sharp': ('soft_labels', dict(beta=30.0)),
    'simple_hierarchy second': ('simple_hierarchy', dict(level=2, coarse=1.0, coarse_ramp=1.0)),
    'arcface_levels product': ('arcface_levels', dict(joint='product')),
    'attention linear': ('attention', dict(cosine=False)),
    'attention uniform': ('attention', dict(attention='uniform')),
    'semantic plain': ('semantic', dict(ce=0.0)),
    'classifier weighted': ('classifier', dict(class_weights=[1.0 + i for i in range(L)])),
    'tree_gaussian strong': ('tree_gaussian', dict(strength=20.0)),
    'diva paths': ('diva', dict(dim=4, paths=True, pair_loss='tree_supcon', miner=None)),
    'bier paths': ('bier', dict(sizes=(3, 5), paths=True)),
    'sndl paths': ('sndl', dict(dim=8, paths=True)),
    'diva height': ('diva', dict(dim=4, pair_loss='tree_triplet', pair_kw=dict(by='height'), miner='tree')),
    **{
        f'metric {o}': ('metric', dict(loss=o))
        for o in (
            'triplet',
            'contrastive',
            'margin',
            'supcon',
            'proxy_nca',
            'tree_triplet',
            'tree_margin',
            'tree_supcon',
            'boosted',
            'snca',
        )
    },
    **{
        f'metric {o} by height': ('metric', dict(loss=o, loss_kw=dict(by='height')))
        for o in ('tree_triplet', 'tree_margin', 'tree_supcon')
    },
    'metric snca graded': ('metric', dict(loss='snca', loss_kw=dict(graded=True, by='height'))),
    **{
        f'metric tree_triplet, {o}': (
            'metric',
            dict(
                loss='tree_triplet',
                miner=o,
                loss_kw=dict(by='height'),
                miner_kw=dict(by='height') if o == 'multi_label' else None,
            ),
        )
        for o in ('epshn', 'hard', 'semi_hard', 'multi_similarity', 'tree', 'multi_label', 'random', 'intra_class')
    },
}


def data(n=120, seed=0):
    "Clusters around the leaves; one label in three lies above them, at inner nodes of chains too"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, L, (n,), generator=g)
    x = 2 * torch.randn(L, D, generator=torch.Generator().manual_seed(9))[y] + torch.randn(n, D, generator=g)
    t = WHOLE.tensor('leaves')[y]
    for k in range(n):
        for _ in range(int(torch.randint(-4, 5, (1,), generator=g))):
            t[k] = max(int(WHOLE.parents[t[k]]), 0)
    return x, t


def make(name, tax, seed=0, **kw):
    torch.manual_seed(seed)
    head, own = CASES[name]
    return create_head(head, D, tax, **{**own, **kw})


def train(head, x, t, epochs=3, batch=40):
    "As `Trainer` does it"
    opt = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad] or [torch.nn.Parameter(torch.zeros(1))], lr=0.02
    )
    torch.manual_seed(1)
    losses = []
    with torch.no_grad():
        head.eval()
        head.prepare(x, t)
    for epoch in range(epochs):
        with torch.no_grad():
            head.eval()
            head.refresh(x, t)
        head.train()
        for i, rows in enumerate(torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(batch)):
            head.epoch, head.rows = epoch + i * batch / len(x), rows
            l = head.loss(x[rows], t[rows])
            losses.append(l.item())
            opt.zero_grad()
            l.backward() if l.requires_grad else None
            opt.step()
    head.rows = None
    head.eval()
    with torch.no_grad():
        head.conclude(x, t)
        head.calibrate(x[::3], t[::3])
    return losses


def test_the_trees():
    """The whole tree has every kind of chain; contracted, it is the tree that heads learn on, and the labels meet nodes
    of chains"""
    assert len(OURS) >= 29 and len(WHOLE) > len(SHORT) and SHORT == WHOLE.chainless and SHORT.chainless is SHORT
    sizes = {}
    for v in CHAINS:
        sizes.setdefault(int(WHOLE.heirs[v]), []).append(v)
    kinds = {(len(o), bool(WHOLE.heights[heir])) for heir, o in sizes.items()}
    assert kinds >= {(k, fork) for k in (1, 2, 3) for fork in (False, True)}
    t = data()[1]
    assert np.isin(t, CHAINS).sum() > 10 and (WHOLE.tensor('heights')[t] == 0).sum() > 40


@pytest.mark.parametrize('name', CASES)
def test_the_same_is_learnt_from_the_whole_and_the_contracted_tree(name):
    "Losses, weights and leaf probabilities: a chain has one vote"
    x, t = data()
    whole, short = (make(name, tax) for tax in (WHOLE, SHORT))
    assert whole.taxonomy is WHOLE
    assert train(whole, x, t) == pytest.approx(train(short, x, MAP[t]), rel=1e-5, abs=1e-6)
    a, b = whole.state_dict(), short.state_dict()
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    with torch.no_grad():
        p, q = whole.leaf_probs(x), short.leaf_probs(x)
    assert torch.allclose(p, q, atol=1e-6) and (p - 1 / L).abs().max() > 0.01  # something was learnt


@pytest.mark.parametrize('name', CASES)
def test_answers_are_on_the_whole_tree(name):
    "Gathered from the contracted one, coherent, one probability along a chain"
    x, t = data()
    whole, short = (make(name, tax) for tax in (WHOLE, SHORT))
    train(whole, x, t, 1)
    train(short, x, MAP[t], 1)
    with torch.no_grad():
        p, q = whole.node_probs(x), short.node_probs(x)
    assert p.shape == (len(x), len(WHOLE)) and torch.allclose(p, q[:, MAP], atol=1e-6)
    assert (
        torch.allclose(p[:, 0], torch.ones(len(x)), atol=1e-5)
        and (p[:, 1:] <= p[:, WHOLE.tensor('parents')[1:]]).all()
        and torch.equal(p[:, CHAINS], p[:, WHOLE.heirs[CHAINS].astype(int)])
    )


@pytest.mark.parametrize('name', CASES)
def test_the_loss_is_that_of_the_contracted_tree(name):
    "For labels at every node of the tree, and sample by sample"
    x, t = data(2 * len(WHOLE), seed=3)
    t = torch.arange(len(WHOLE)).repeat(2)
    whole, short = (make(name, tax).eval() for tax in (WHOLE, SHORT))
    if name.split()[0] in (
        'tree_gaussian',
        'kernel_ridge',
        'committee',
        'metric',
        'diva',
        'divide_conquer',
        'bier',
        'sndl',
    ):
        for head, o in ((whole, t), (short, MAP[t])):
            torch.manual_seed(2)
            head.prepare(x, o)

    def loss(head, x, t):
        torch.manual_seed(4)
        return head.loss(x, t).item()

    assert loss(whole, x, t) == pytest.approx(loss(short, x, MAP[t]), rel=1e-5, abs=1e-6)
    if name.split()[0] in ('metric', 'diva', 'divide_conquer', 'bier', 'sndl'):
        return  # single images teach these nothing
    for v in CHAINS.tolist():
        assert loss(whole, x[:1], t[v : v + 1]) == pytest.approx(
            loss(short, x[:1], MAP[t[v : v + 1]]), rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize('name', CASES)
def test_weights_from_the_contracted_tree_fit_the_whole_one(name, tmp_path):
    x, t = data()
    short = make(name, SHORT)
    train(short, x, MAP[t], 1)
    kind = 'none'
    Model(EmbeddingNet(D, D, kind=kind), short).save(tmp_path / 'short')
    saved = Model.load(tmp_path / 'short')
    model = Model(EmbeddingNet(D, D, kind=kind), make(name, WHOLE, seed=5)).eval()
    model.load_state_dict(saved.state_dict())
    own, other = (dict(o.head.named_buffers()) for o in (model, saved))
    assert own.keys() == other.keys() and all(
        torch.equal(own[k], other[k]) for k in own
    )  # those that are not saved, too
    with torch.no_grad():
        assert torch.allclose(model.node_probs(x), saved.node_probs(x)[:, MAP], atol=1e-6)
    model.save(tmp_path / 'whole')
    back = Model.load(tmp_path / 'whole', WHOLE)
    with torch.no_grad():
        assert torch.equal(back.node_probs(x), model.node_probs(x))
    with pytest.raises(HiermetricError, match='belongs to the taxonomy'):
        Model.load(tmp_path / 'short', WHOLE)


@st.composite
def trees(draw, most=16):
    "Any rooted tree; most of them have chains"
    n = draw(st.integers(2, most))
    back = draw(st.sampled_from([1, 2, most]))
    return Taxonomy(
        [str(i) for i in range(n)], [-1] + [draw(st.integers(max(0, i - back), i - 1)) for i in range(1, n)]
    )


@pytest.mark.parametrize(
    'name',
    [
        o
        for o in OURS
        if o not in ('committee', 'kernel_ridge', 'diva', 'divide_conquer', 'bier', 'sndl', 'tree_gaussian', 'metric')
    ],
)
@settings(max_examples=10, deadline=None)
@given(tax=trees(), seed=st.integers(0, 99))
def test_losses_and_gradients_on_any_tree(name, tax, seed):
    short, t = tax.prune(), torch.randint(0, len(tax), (8,), generator=torch.Generator().manual_seed(seed))
    assert short == tax.chainless
    grads = []
    for o, v in ((tax, t), (short, tax.tensor('to_chainless')[t])):
        head = make(name, o)
        torch.manual_seed(seed)
        emb = torch.randn(8, D, requires_grad=True)
        l = head.loss(emb, v)
        l.backward()
        grads.append((l.item(), emb.grad, *(p.grad for p in head.parameters() if p.requires_grad)))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5, abs=1e-6)
    for a, b in zip(grads[0][1:], grads[1][1:]):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


def test_where_there_is_no_chain_nothing_is_mapped():
    head = ArcFace(D, SHORT)
    t = torch.arange(len(SHORT))
    p = torch.rand(2, len(SHORT))
    assert head.tree is SHORT and head.on_tree(t) is t and head.on_taxonomy(p) is p
    head = ArcFace(D, WHOLE)
    assert (
        head.tree == SHORT
        and head.taxonomy is WHOLE
        and head.on_tree(torch.arange(len(WHOLE))).tolist() == MAP.tolist()
    )
    assert torch.equal(head.on_taxonomy(p), p[:, MAP])


def test_a_chain_of_nothing_but_nodes():
    "Root, inner node, leaf: one class, everything has probability 1"
    tax = Taxonomy.from_parents({'r': None, 'x': 'r', 'y': 'x', 'z': 'y'})
    for name in (
        'classifier',
        'arcface',
        'sphere_multi',
        'sphere_hier',
        'sphere_maxconstraint',
        'path_softmax',
        'conditional',
        'attention',
        'arcface_levels',
        'semantic',
        'hxe',
        'hace',
    ):
        head = make(name, tax)
        p = head.node_probs(torch.randn(3, D))
        assert (
            p.shape == (3, 4) and torch.equal(p[:, 1], p[:, 3]) and head.loss(torch.randn(3, D), [1, 2, 3]).isfinite()
        )


# settings of nodes are those of the tree without chains

M, N = len(SHORT) - 1, len(WHOLE) - 1


@pytest.mark.parametrize(
    'name,kw',
    [
        ('sphere_multi', dict(prior=[0.5] * N)),
        ('sphere_multi', dict(node_weights=[1.0] * N)),
        ('sphere_hier', dict(prior=torch.full((N,), 0.5))),
        ('sphere_hier', dict(penalty_weight=[1.0] * N)),
        ('sphere_maxconstraint', dict(node_weights=[1.0] * N)),
        ('sphere_hier', dict(node_weights=[1.0] * WHOLE.height)),
    ],
)
def test_settings_of_the_wrong_size_say_which_tree_counts(name, kw):
    with pytest.raises(HiermetricError) as e:
        create_head(name, D, WHOLE, **kw)
    assert f'{M} ' in str(e.value) and 'of the tree without chains' in str(e.value)
    with pytest.raises(HiermetricError) as e:
        create_head(name, D, SHORT, **kw)
    assert f'{M} ' in str(e.value) and 'without chains' not in str(e.value)
    head = create_head(
        name,
        D,
        WHOLE,
        **{k: torch.as_tensor(v)[:M] for k, v in kw.items()}
        if len(next(iter(kw.values()))) == N
        else {'node_weights': [1.0] * SHORT.height},
    )
    assert head.loss(*data(10)).isfinite()


def test_levels_are_those_of_the_tree_without_chains():
    assert WHOLE.height > SHORT.height
    with pytest.raises(
        HiermetricError, match=f'depth 1 to {SHORT.height} of this tree without its chains, not at {WHOLE.height}'
    ):
        create_head('simple_hierarchy', D, WHOLE, level=WHOLE.height)
    create_head('simple_hierarchy', D, WHOLE, level=SHORT.height)


def test_counts_and_edges_that_a_user_would_make():
    "`node_frequency` and `edge_weights` on the head's own tree fit its settings"
    x, t = data()
    head = create_head(
        'sphere_hier',
        D,
        WHOLE,
        penalty_weight=edge_weights(path_targets(MAP[t], SHORT)[0], SHORT),
        prior=torch.full((M,), 0.1),
    )
    assert head.hbce.taxonomy is head.tree and head.loss(x, t).isfinite()
    head.prepare(x, t)
    assert torch.equal(head.prior, torch.full((M,), 0.1))


# free functions mean the tree that they are given


def test_free_functions_count_what_they_are_given():
    v = WHOLE.tensor('leaves')
    z = torch.zeros(len(v), N)
    assert HBCELoss(WHOLE)(z, v).isfinite() and path_targets(v, WHOLE)[0].shape == (len(v), N)
    assert create_loss('tree_margin', WHOLE, D).beta.shape == (N + 1,) and create_head(
        'metric', D, WHOLE, loss='tree_margin'
    ).criterion.beta.shape == (M + 1,)


# rows of labels


@pytest.mark.parametrize('name', ['diva', 'bier', 'sndl'])
def test_rows_of_labels_are_folded(name):
    "A row over the nodes of the whole tree counts a chain once"
    kw = dict(pair_loss='tree_supcon', miner=None) if name == 'diva' else {}
    x, t = data(60)
    whole, short = (make(name, tax, paths=True, **kw) for tax in (WHOLE, SHORT))
    got = []
    for head, o in ((whole, t), (short, MAP[t])):
        for rows in (o, head.taxonomy.multi_hot(o)[:, 1:], head.taxonomy.multi_hot(o)[:, 1:].float()):
            torch.manual_seed(0)
            got.append(head.loss(x, rows).item())
    assert got == pytest.approx([got[0]] * 6, rel=1e-5)
    with pytest.raises(HiermetricError, match=f'every node but the root, {N} of them, not {M}'):
        whole.loss(x, SHORT.multi_hot(MAP[t])[:, 1:])


@pytest.mark.parametrize('name', ['diva', 'bier', 'sndl'])
def test_sets_of_a_chain_are_those_of_its_end(name, tmp_path):
    kw = dict(pair_loss='tree_supcon', miner=None) if name == 'diva' else {}
    sets = torch.randint(0, 2, (len(SHORT), 4), generator=torch.Generator().manual_seed(0))
    x, t = data(60)
    whole, short = make(name, WHOLE, sets=sets[MAP], **kw), make(name, SHORT, sets=sets, **kw)
    assert train(whole, x, t, 1) == pytest.approx(train(short, x, MAP[t], 1), rel=1e-5) and torch.equal(
        whole.node_labels, short.node_labels
    )
    Model(EmbeddingNet(D, D, kind='none'), whole).save(tmp_path / 'm')
    back = Model.load(tmp_path / 'm')
    assert (
        back.head.sets == whole.sets
        and torch.equal(back.head.node_labels, whole.node_labels)
        and torch.equal(back.leaf_probs(x), whole.eval().leaf_probs(x))
    )
    with pytest.raises(HiermetricError, match=f'each of the {N + 1} nodes'):
        make(name, WHOLE, sets=sets, **kw)


# heads of users, which know `taxonomy` only


class OwnHead(Head):
    def __init__(self, in_features, taxonomy):
        super().__init__(in_features, taxonomy)
        self.weight = prototypes(len(taxonomy), in_features)

    def logits(self, emb):
        return emb @ self.weight.T

    def node_probs(self, emb):
        return self.taxonomy.node_probs(self.logits(emb)[:, self.taxonomy.tensor('leaves')].softmax(1))

    def loss(self, emb, targets):
        return F.cross_entropy(self.logits(emb), targets)


class OwnLeafHead(Classifier):
    def losses(self, emb, targets, column, under):
        return -self.taxonomy.node_probs(self.logits(emb).softmax(1)).gather(1, targets[:, None])[:, 0].log()


class OwnTasks(MultiTask):
    def __init__(self, in_features, taxonomy):
        super().__init__(in_features, taxonomy, [4, 4])
        self.own = create_loss('snca', taxonomy, 4)

    def tasks(self, parts, targets, x):
        self.seen = targets
        return self.own(parts[0], targets, None, self.rows)


@pytest.mark.parametrize('cls', [OwnHead, OwnLeafHead, OwnTasks])
def test_heads_of_users_go_on_working(cls):
    x, t = data()
    torch.manual_seed(0)
    head = cls(D, WHOLE)
    losses = train(head, x, t, 8)
    assert losses[-1] < losses[0]
    p = head.node_probs(x)
    assert p.shape == (len(x), N + 1) and torch.equal(p[:, CHAINS], p[:, WHOLE.heirs[CHAINS].astype(int)])
    if cls is OwnTasks:
        head.loss(x, t)
        assert torch.equal(head.seen, t)  # node ids of the tree that it was given
    if cls is OwnLeafHead:
        plain = Classifier(D, WHOLE)
        plain.load_state_dict(head.state_dict())
        assert head.loss(x, t).item() == pytest.approx(plain.loss(x, t).item(), rel=1e-4)


class OwnNodes(NodeHead):
    def __init__(self, in_features, taxonomy, rows):
        super().__init__(in_features, taxonomy)
        self.weight = prototypes(rows, in_features)

    def logits(self, emb):
        return F.linear(emb, self.weight)


def test_node_logits_are_wanted_on_the_tree_without_chains():
    x, t = data(20)
    head = OwnNodes(D, WHOLE, M)
    assert head.loss(x, t).isfinite() and head.node_probs(x).shape == (20, N + 1)
    for f in (lambda h: h.loss(x, t), lambda h: h.node_probs(x)):
        with pytest.raises(
            HiermetricError,
            match=f'OwnNodes gives {N} node logits, and {M} are wanted, one for each node below the root of the tree '
            'without chains',
        ):
            f(OwnNodes(D, WHOLE, N))


# through the package


@pytest.mark.parametrize(
    'head,kw',
    [
        ('sphere_hier', {}),
        ('hace', {}),
        ('tree_gaussian', {}),
        ('metric', dict(loss='tree_triplet', miner='tree')),
        ('sndl', dict(dim=8)),
    ],
)
def test_fit_on_the_whole_and_the_contracted_tree(head, kw):
    "Training, validation and predictions; logits of nodes are read as leaves by `model_outputs`"
    a = toy_features(WHOLE, 12)
    b = type(a)(a.x, SHORT.index([SHORT.names[WHOLE.to_chainless[o]] for o in a.targets]), a.split, SHORT, dict(a.meta))
    runs = [fit(o, head, epochs=2, batch_size=32, embed_dim=D, log=(), seed=3, head_kw=kw) for o in (a, b)]
    p, q = (predict(r.model, a, 'test') for r in runs)
    assert p.shape[1] == N + 1 and torch.allclose(p, q[:, MAP], atol=1e-5)
    x = torch.from_numpy(np.ascontiguousarray(a.x[:9]))
    whole, short = (model_outputs(r.model, x) for r in runs)
    assert (
        whole.logits.shape == (9, L)
        and torch.allclose(whole.logits, short.logits, atol=1e-4)
        and torch.allclose(whole.node_probs, short.node_probs[:, MAP], atol=1e-5)
    )
