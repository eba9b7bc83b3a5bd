"Hyperspherical multi-label heads: against slow loops, and the traps (hiermetric.heads.sphere)"

import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.trees.arithmetic import path_targets
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import HEADS, create_head
from hiermetric.heads.criteria import CRITERIA
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.node_head import DECODES, NodeHead, decode_nodes, node_frequency, tree_prior
from hiermetric.heads.sphere import BIASES, MARGINS, SCALES, SphereMulti
from hiermetric.trees.taxonomy import Taxonomy
from test_criteria import slow_cell

TAX = Taxonomy.from_paths(
    {
        'lynx': 'mammal/cat/wild',
        'tiger': 'mammal/cat/wild',
        'tabby': 'mammal/cat',
        'wolf': 'mammal/dog',
        'fox': 'mammal/dog',
        'owl': 'bird',
        'wren': 'bird',
        'stone': '',
    }
)
N, D = len(TAX), 16
LEAVES = TAX.tensor('leaves')


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    "The heads of this chapter by name, whether or not the table has them yet"
    for name, path in (('sphere_multi', 'SphereMulti'), ('sphere_thesis', 'sphere_thesis')):
        monkeypatch.setitem(HEADS.entries, name, (f'hiermetric.heads.sphere.{path}', ''))


def up(tax, i):
    "Nodes from `i` to just below the root, by the definition of a parent"
    out = []
    while i > 0:
        out.append(i)
        i = int(tax.parents[i])
    return out


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_decodings_keep_memory_linear():
    """A star, deep combs and chains, of 3,000 nodes each: nothing of size N × N or N × H is built (a step over heights,
    not over nodes, is all that depth costs)"""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, f, types, args=(), kw=None):
            out = f(*args, **(kw or {}))
            for o in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(o, torch.Tensor):
                    self.n = max(self.n, o.untyped_storage().nbytes() // o.element_size())
            return out

    n = 3000
    comb = [2 * (k - 30) + 1 if k >= 30 else 0 for k in ((i - 1) // 2 for i in range(1, n + 1))]
    for m, up, kept in ((n, [0] * (n - 1), n), (n + 1, comb, n + 1), (n, [max(0, i - 30) for i in range(1, n)], 31)):
        tax = Taxonomy([str(i) for i in range(m)], [-1, *up])
        assert len(tax.chainless) == kept
        head = SphereMulti(4, tax)
        e = torch.randn(2, 4)
        t = tax.tensor('leaves')[:2]
        for o in ('parents', 'last', 'heights', 'depths', 'leaves', 'leaf_start', 'leaf_stop', 'leaf_column'):
            tax.tensor(o)
        with Largest() as seen:
            head.loss(e, t).backward()
            for how in DECODES:
                decode_nodes(head(e), head.tree, how)
            assert head.node_probs(e).shape == (2, m)
        assert seen.n <= 4 * n


# heads


def make(**kw):
    torch.manual_seed(0)
    return SphereMulti(D, TAX, **kw)


SWITCHES = [dict(margin=m, bias=b, scale=s) for m in MARGINS for b in BIASES for s in SCALES]


def psi(angle):
    k = math.floor(angle / math.pi)
    return (-1) ** k * math.cos(angle) - 2 * k


def slow_logit(head, x, i, yes=None):
    "Logit of node i; `yes` is its label in training, None at inference"
    w = head.weight[i - 1].tolist()
    c = sum(a * b for a, b in zip(x, w)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in w))
    th = math.acos(max(-1.0, min(1.0, c)))
    c = math.cos(th)
    if head.margin == 'all' or (yes and head.m):
        c = psi(th + head.m)
    elif yes is False and head.margin == 'both':
        c = -psi(math.pi - th + head.m)
    s = head.log_s.exp()
    s = s[i - 1].item() if s.ndim else s.item()
    return s * c + head.offset[i - 1].item()


def slow_loss(head, emb, targets):
    total = 0.0
    for x, v in zip(emb.tolist(), targets.tolist()):
        for i in range(1, N):
            if i != v and v in [*up(TAX, i), 0]:
                continue
            yes = i in up(TAX, v)
            total += head.node_weights[i - 1].item() * slow_cell(head.criterion, slow_logit(head, x, i, yes), yes)
    return total / (len(emb) * (N - 1))


@pytest.mark.parametrize('kw', SWITCHES, ids=lambda kw: '-'.join(kw.values()))
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 999),
    criterion=st.sampled_from([*CRITERIA]),
    weights=st.sampled_from([0.75, 0, 'deep', [1.0, 0.0, 2.0, 1.0], [float(i) for i in range(N - 1)]]),
    m=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_loss_is_the_slow_loss(kw, seed, criterion, weights, m):
    head = make(s=4.0, m=m, criterion=criterion, node_weights=weights, **kw).double()
    with torch.no_grad():
        head.offset += 0.1 * randn(N - 1, seed=seed)
        head.log_s += 0.1 * randn(*head.log_s.shape, seed=seed)
    x = randn(6, D, seed=seed)
    t = torch.randint(0, N, (6,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        x[0] = 0.1 * x[0] + head.weight[3]
        x[1] = 0.1 * x[1] - head.weight[3]
        t[0] = t[1] = 4  # in both tails of the margin
    assert head.loss(x, t).item() == pytest.approx(slow_loss(head, x, t), rel=1e-5)
    assert head(x)[2].tolist() == pytest.approx(
        [slow_logit(head, x[2].tolist(), i) for i in range(1, N)], rel=1e-6, abs=1e-8
    )


@pytest.mark.parametrize(
    'kw,criterion',
    [*((kw, 'bce') for kw in SWITCHES), ({}, 'focal'), ({}, 'asymmetric'), (dict(margin='both'), 'asymmetric')],
    ids=str,
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_degenerate_inputs_are_finite(kw, criterion, dtype):
    """On the prototype, opposite to it, beside it, without direction; leaf and inner labels; plain and under bfloat16
    autocast"""
    for s in (1.0, 128.0):
        head = make(s=s, m=0.5, criterion=criterion, **kw)
        w = head.weight.detach()
        e = torch.cat(
            [w, 3 * w, -w, 1e3 * w, w + 1e-7, w + 1e-4 * torch.randn(w.shape), torch.zeros_like(w), 1e-7 * w, 1e-30 * w]
        ).to(dtype)
        t = torch.arange(1, N).repeat(9)
        for auto in (False, True):
            x = e.clone().requires_grad_()
            head.zero_grad()
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=auto):
                l, z = head.loss(x, t), head(x)
            l.backward()
            grads = [x.grad, *(o.grad for o in head.parameters() if o.requires_grad)]
            assert (
                l.dtype == z.dtype == torch.float32
                and l.isfinite()
                and l >= 0
                and z.isfinite().all()
                and all(g is not None and g.isfinite().all() for g in grads)
            )
            if not auto:
                want = head.double().loss(e.double(), t)
                head.float()
                assert l.item() == pytest.approx(want.item(), rel=1e-3)


def test_logits_do_not_lose_bits_under_autocast():
    head = make(s=64.0)
    x = torch.randn(32, D)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        z, l, p = head(x), head.loss(x, LEAVES.repeat(4)), head.node_probs(x)
    assert (
        torch.equal(z, head(x))
        and torch.equal(l, head.loss(x, LEAVES.repeat(4)))
        and torch.equal(p, head.node_probs(x))
    )


def test_gradcheck_of_the_whole_head():
    for kw in (
        dict(margin='positives'),
        dict(margin='both', scale='label'),
        dict(margin='all', criterion='asymmetric'),
    ):
        head = make(m=0.3, **kw).double()
        t = torch.tensor([1, 3, 7, 9])
        x = randn(4, D).requires_grad_()
        names, values = zip(*((k, v.detach().clone().requires_grad_()) for k, v in head.named_parameters()))
        assert torch.autograd.gradcheck(
            lambda e, *ps: torch.func.functional_call(_Loss(head), {f'head.{k}': p for k, p in zip(names, ps)}, (e, t)),
            (x, *values),
            fast_mode=True,
        )


class _Loss(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, e, t):
        return self.head.loss(e, t)


def test_margin_lowers_positives_only():
    x = torch.randn(40, D)
    t = LEAVES.repeat(5)
    positive = path_targets(t, TAX)[0]
    head = make(m=0.2)
    plain, trained = head(x), head.train_logits(x, positive)
    assert (trained < plain)[positive].all() and torch.equal(trained[~positive], plain[~positive])
    head = make(m=0.2, margin='both')
    trained = head.train_logits(x, positive)
    assert (trained < plain)[positive].all() and (trained > plain)[~positive].all()
    assert torch.equal(make(m=0.2, margin='all')(x), make(m=0.2, margin='all').train_logits(x, positive))


@pytest.mark.parametrize('margin', MARGINS)
def test_training_logit_is_monotone_and_continuous_in_the_angle(margin):
    "Also past π − m for positives and below m for negatives"
    th = torch.linspace(0, math.pi, 5001, dtype=torch.float64)
    x = torch.stack([th.cos(), th.sin()], 1)
    head = SphereMulti(2, Taxonomy.from_paths({'a': '', 'b': ''}), s=1.0, m=0.6, margin=margin, bias='none').double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    z = head.train_logits(x, torch.tensor([[True, False]]).expand(5001, 2)).diff(dim=0)
    assert (z <= 1e-12).all() and z.abs().max() <= math.pi / 5000 + 1e-7


def test_unknown_cells_send_no_gradient():
    "A picture of 'cat' says nothing about lynx, tiger, tabby, and the root's label says nothing at all"
    head = make(bias='learned', scale='label')
    x = torch.randn(3, D, requires_grad=True)
    head.loss(x, TAX.index(['cat', 'cat', 'root'])).backward()
    below = [i - 1 for i in range(1, N) if TAX.index('cat') in up(TAX, i)[1:]]
    assert len(below) == 4
    for g in (head.weight.grad.abs().sum(1), head.offset.grad.abs(), head.log_s.grad.abs()):
        assert (g[below] == 0).all() and (g[[i for i in range(N - 1) if i not in below]] > 0).all()
    assert (x.grad[2] == 0).all() and head.loss(x[:0], torch.zeros(0).long()).item() == 0


def test_internal_labels_are_learned_from():
    "Labels at leaves for one half, at their parents for the other: the loss falls and the unknown stays unknown"
    torch.manual_seed(0)
    centres = torch.randn(N, D)
    t = LEAVES.repeat(20)
    t = torch.where(torch.arange(160) // 8 % 2 > 0, TAX.tensor('parents')[t], t)
    x = centres[LEAVES.repeat(20)] + 0.1 * torch.randn(160, D)
    head = make()
    opt = torch.optim.Adam(head.parameters(), 0.05)
    first = head.loss(x, t).item()
    for _ in range(60):
        opt.zero_grad()
        l = head.loss(x, t)
        l.backward()
        opt.step()
    assert l.item() < first / 5 and (head.leaf_probs(x).argmax(1) == torch.arange(8).repeat(20)).float().mean() > 0.95


def test_subclass_changes_the_loss_alone():
    "What a price on contradictions relies on: `node_loss` sees training logits and targets, and nothing else is asked"
    seen = []

    class Own(SphereMulti):
        def node_loss(self, node_logits, targets):
            seen.append((node_logits, targets))
            return node_logits.mean()

    torch.manual_seed(0)
    head = Own(D, TAX)
    x = torch.randn(8, D)
    l = head.loss(x, LEAVES.tolist())
    ((z, t),) = seen
    assert (
        z.shape == (8, N - 1)
        and torch.equal(t, LEAVES)
        and torch.equal(l, z.mean())
        and torch.equal(z, head.train_logits(x, path_targets(LEAVES, TAX)[0]))
    )


def test_new_head_says_the_prior():
    prior = torch.linspace(0.01, 0.5, N - 1)
    for bias in ('learned', 'fixed'):
        assert torch.allclose(make(prior=prior, bias=bias)(torch.zeros(1, D)).sigmoid()[0], prior, atol=1e-6)
    assert make(bias='none')(torch.zeros(1, D)).abs().max() == 0
    assert torch.allclose(make()(torch.zeros(1, D)).sigmoid()[0], tree_prior(TAX), atol=1e-6)
    chain = SphereMulti(D, Taxonomy.from_parents({'a': None, 'b': 'a', 'c': 'b'}))
    assert chain.offset.isfinite().all() and chain.loss(torch.randn(1, D), [2]).isfinite()  # prior 1


@pytest.mark.parametrize('bias', BIASES)
def test_prepare_counts_unless_told(bias, tmp_path):
    t = torch.tensor([3, 3, 1, 9, 0])
    x = torch.zeros(5, D)
    head = make(bias=bias)
    head.prepare(x, t)
    freq = node_frequency(t, TAX)
    assert torch.equal(head.prior, freq) and head.offset.requires_grad == (bias == 'learned')
    want = freq.double() ** -0.5
    assert torch.allclose(head.node_weights.double(), want * (N - 1) / want.sum())
    for weights in ('deep', [1.0, 2.0, 3.0, 4.0], torch.arange(1.0, N)):
        other = make(node_weights=weights)
        before = other.node_weights.clone()
        other.prepare(x, t)
        assert torch.equal(other.node_weights, before)
    assert torch.allclose(head(x)[0].sigmoid(), freq if bias != 'none' else torch.tensor(0.5).expand(N - 1), atol=1e-6)
    told = make(bias=bias, prior=[0.5] * (N - 1))
    told.prepare(x, t)
    assert torch.equal(told.prior, torch.full((N - 1,), 0.5)) and torch.allclose(told.node_weights, torch.ones(N - 1))
    model = Model(EmbeddingNet(12, D), head).eval()
    model.save(tmp_path / 'm')
    assert torch.equal(Model.load(tmp_path / 'm').head.prior, freq)


@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(
            margin='both',
            bias='fixed',
            scale='label',
            decode='veto',
            criterion='asymmetric',
            criterion_kw=dict(gamma_neg=2.0),
        ),
        dict(node_weights='deep'),
        dict(node_weights=[1.0, 2.0, 3.0, 4.0]),
        dict(node_weights=torch.arange(1.0, N), prior=torch.linspace(0.01, 0.5, N - 1)),
        dict(scale='fixed', tail='jump', init='normal', s=30.0, m=0.2),
    ],
)
def test_saved_and_loaded_models_agree(tmp_path, kw):
    torch.manual_seed(0)
    model = Model(EmbeddingNet(12, D), create_head('sphere_multi', D, TAX, **kw)).eval()
    with torch.no_grad():
        model.head.offset.add_(0.1)
        model.head.log_s.add_(0.1)
    model.save(tmp_path / 'm')
    back = Model.load(tmp_path / 'm')
    x = torch.randn(8, 12)
    assert (
        torch.equal(back.node_probs(x), model.node_probs(x))
        and torch.equal(back.loss(x, LEAVES), model.loss(x, LEAVES))
        and repr(back.head) == repr(model.head)
    )
    for k in ('s', 'm', 'margin', 'bias', 'scale', 'tail', 'init', 'decode', 'criterion', 'criterion_kw'):
        assert getattr(back.head, k) == getattr(model.head, k)
    assert [k for k, v in back.head.named_parameters() if v.requires_grad] == [
        k for k, v in model.head.named_parameters() if v.requires_grad
    ]


def test_thesis_form_is_saved_as_what_it_is(tmp_path):
    model = Model(EmbeddingNet(12, D), create_head('sphere_thesis', D, TAX, m=0.3)).eval()
    model.save(tmp_path / 'm')
    back = Model.load(tmp_path / 'm')
    x = torch.randn(8, 12)
    assert (
        back.head.margin == 'all' and back.head.bias == 'none' and torch.equal(back.node_probs(x), model.node_probs(x))
    )
    assert type(model.head) is SphereMulti and not model.head.offset.any()


def test_mistakes_get_a_sentence():
    for kw, says in (
        (dict(m=30.0), 'degrees'),
        (dict(m=-1.0), 'angle'),
        (dict(s=0.0), 'positive'),
        (dict(s=math.inf), 'positive'),
        (dict(decode='leaf'), "'leaves'"),
        (dict(criterion='bec'), "'bce'"),
        (dict(criterion='focal', criterion_kw=dict(gama=1)), 'does not take'),
        (dict(node_weights=[1.0, 2.0]), 'one for each level'),
        (dict(node_weights=torch.zeros(N - 1)), 'not all 0'),
        (dict(node_weights=math.nan), 'power'),
        (dict(node_weights=-torch.ones(N - 1)), 'none below 0'),
        (dict(prior=torch.zeros(N - 1)), 'above 0'),
        (dict(prior=torch.full((N - 1,), math.nan)), 'above 0'),
        (dict(tail='smoth'), "'smooth'"),
    ):
        with pytest.raises(HiermetricError, match=says):
            make(**kw)
    head = make()
    for bad, says in (
        (lambda: head.loss(torch.randn(2, D), [0, N]), 'no node'),
        (lambda: head.loss(torch.randn(2, D), [0]), '(2,)'),
        (lambda: head(torch.randn(2, D + 1)), 'do not fit'),
        (lambda: head(torch.full((1, D), math.nan)), 'NaN'),
        (lambda: SphereMulti(D, Taxonomy(['a'], [-1])), 'at least one node'),
    ):
        with pytest.raises(HiermetricError, match=says.replace('(', r'\(').replace(')', r'\)')):
            bad()
    with pytest.raises(NotImplementedError):
        NodeHead(D, TAX).logits(torch.randn(1, D))
