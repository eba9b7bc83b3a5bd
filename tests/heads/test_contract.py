"Heads: the contract, against slow and obvious versions (hiermetric.heads.contract)"

import math, subprocess, sys
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import (
    Classifier,
    Head,
    INITS,
    LeafHead,
    create_head,
    inverse_frequency,
    list_heads,
    prototypes,
    subtree_nll,
)
from hiermetric.trees.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {
        'lynx': 'mammal/cat',
        'tiger': 'mammal/cat',
        'wolf': 'mammal/dog',
        'fox': 'mammal/dog',
        'owl': 'bird',
        'wren': 'bird',
    }
)
ALL = ['classifier', 'arcface', 'subcenter', 'combined', 'cosface']
D = 8


@st.composite
def trees(draw, most=25):
    "Random ragged trees, chains, stars and the lone root"
    n = draw(st.integers(1, most))
    kind = draw(st.sampled_from(['any', 'chain', 'star']))
    parent = {'any': lambda i: draw(st.integers(0, i - 1)), 'chain': lambda i: i - 1, 'star': lambda i: 0}[kind]
    return Taxonomy.from_parents({'n0': None, **{f'n{i}': f'n{parent(i)}' for i in range(1, n)}})


def leaves_under(tax, v):
    return [j for j, leaf in enumerate(tax.leaves) if tax.is_ancestor(v, int(leaf))]


def slow_nll(logits, targets, tax):
    "One sample, one leaf at a time, in the definition's own words"
    out = []
    for z, v in zip(logits, targets.tolist()):
        total = sum(torch.exp(o) for o in z)
        out.append(-torch.log(sum(torch.exp(z[j]) for j in leaves_under(tax, v)) / total))
    return torch.stack(out)


def batch(tax, n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g, dtype=dtype), torch.randint(0, len(tax), (n,), generator=g)


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(1, 7), st.integers(0, 99))
def test_loss_is_the_slow_loss(tax, n, seed):
    emb, t = batch(tax, n, seed)
    head = Classifier(D, tax).double()
    want = slow_nll(emb @ head.weight.T + head.bias, t, tax)
    assert torch.allclose(head.loss(emb, t), want.mean(), atol=1e-10)
    for i in range(n):
        assert torch.allclose(
            head.loss(emb[i : i + 1], t[i : i + 1]), want[i], atol=1e-10
        )  # whatever path a batch takes


@settings(max_examples=60, deadline=None)
@given(trees(), st.sampled_from(ALL), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_node_probs_are_coherent(tax, name, dtype, seed):
    emb, _ = batch(tax, 5, seed, dtype)
    head = create_head(name, D, tax).to(dtype)
    p = head.node_probs(emb)
    leaf = head.leaf_probs(emb)
    assert p.shape == (5, len(tax)) and p.dtype == dtype
    assert torch.allclose(p[:, 0], torch.ones(5, dtype=dtype), atol=1e-6) and (p >= 0).all()
    if len(tax) > 1:
        assert (p[:, 1:] <= p[:, tax.tensor('parents')[1:]]).all()
    for v in range(len(tax)):
        assert torch.allclose(p[:, v], leaf[:, leaves_under(tax, v)].sum(1), atol=1e-6)
    assert torch.allclose(leaf, head(emb).softmax(1)) and torch.allclose(Head.leaf_probs(head, emb), leaf, atol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_fast_path_equals_masked_path(name):
    torch.manual_seed(0)
    head = create_head(name, D, TAX).double()
    emb, _ = batch(TAX, 6)
    t = TAX.tensor('leaves')[torch.randint(0, 6, (6,))]
    column, none = head.labels(t)
    assert none is None and torch.equal(TAX.tensor('leaves')[column], t)
    under = F.one_hot(column, 6).bool()
    masked = subtree_nll(head.train_logits(emb, column, under), under).mean()
    assert torch.allclose(head.loss(emb, t), masked, atol=1e-10)
    # one label above the leaves sends the whole batch through the masked path: the others' share must not change
    both = head.loss(torch.cat([emb, emb[:1]]), torch.cat([t, t.new_zeros(1)]))  # the root adds 0
    assert torch.allclose(both * 7 / 6, masked, atol=1e-10)


@pytest.mark.parametrize('name', ALL)
def test_gradcheck(name):
    torch.manual_seed(1)
    head = create_head(name, 4, TAX, class_weights=[1, 2, 0.5, 1, 3, 1]).double()
    emb = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for names in (['lynx', 'dog', 'bird', 'owl', 'mammal'], ['lynx', 'fox', 'wren', 'owl', 'wolf'], ['root'] * 5):
        t = torch.tensor(TAX.index(names))
        assert torch.autograd.gradcheck(lambda e, *p: head.loss(e, t), (emb, *head.parameters()))
    assert torch.autograd.gradcheck(lambda e: head.node_probs(e), (emb,))


def test_subtree_nll_at_extreme_logits():
    z = torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0], [1e4, -1e4, 3.0]], requires_grad=True)
    under = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    l = subtree_nll(z, under)
    l.sum().backward()
    assert l.tolist() == pytest.approx([600, 0, 1e4 - 3]) and z.grad.isfinite().all() and z.grad[1].abs().max() == 0
    sure = torch.tensor([[30.0, 0.0]], requires_grad=True)
    l = subtree_nll(sure, torch.tensor([[True, False]]))
    l.sum().backward()
    assert l.item() == pytest.approx(math.exp(-30), rel=1e-4)  # log(softmax) would have rounded this to 0
    assert sure.grad[0, 1].item() == pytest.approx(math.exp(-30), rel=1e-4)


@pytest.mark.parametrize('name', ALL)
def test_empty_batch_and_lone_root(name):
    head = create_head(name, D, TAX)
    none = torch.zeros(0, D)
    for t in (torch.zeros(0).long(), torch.zeros(0).int(), []):
        l = head.loss(none, torch.as_tensor(t, dtype=torch.long))
        l.backward()
        assert l.item() == 0 and all(p.grad.abs().max() == 0 for p in head.parameters())
    assert head(none).shape == (0, 6) and head.node_probs(none).shape == (0, len(TAX))
    lone = create_head(name, D, Taxonomy.from_parents({'life': None}))
    assert (
        lone.loss(torch.randn(3, D), torch.zeros(3).long()).item() == 0
        and lone.node_probs(torch.randn(3, D)).tolist() == [[1]] * 3
    )


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_target_types(name, dtype):
    torch.manual_seed(0)
    head = create_head(name, D, TAX)
    emb, t = batch(TAX, 6, dtype=torch.float32)
    assert torch.equal(head.loss(emb, t.to(dtype)), head.loss(emb, t)) and torch.equal(
        head.loss(emb, t.numpy()), head.loss(emb, t)
    )


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_embedding_types_give_at_least_float32(name, dtype):
    torch.manual_seed(0)
    head = create_head(name, D, TAX)
    emb, t = batch(TAX, 6, dtype=torch.float32)
    emb = emb.to(dtype)
    assert head(emb).dtype == head.loss(emb, t).dtype == head.node_probs(emb).dtype == torch.float32
    assert torch.allclose(head.loss(emb, t), head.loss(emb.float(), t))
    assert head.to(torch.bfloat16)(emb).dtype == torch.float32


@pytest.mark.parametrize('name', ALL)
def test_autocast_changes_nothing_in_the_head(name):
    torch.manual_seed(0)
    head = create_head(name, D, TAX)
    emb, t = batch(TAX, 6, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        l, z, p = head.loss(emb, t), head(emb), head.node_probs(emb)
    assert torch.equal(l, head.loss(emb, t)) and torch.equal(z, head(emb)) and torch.equal(p, head.node_probs(emb))


BAD = [
    (lambda h: h(torch.zeros(2, D + 1)), 'Embeddings of shape (2, 9) do not fit: (B, 8) is wanted.'),
    (lambda h: h(torch.zeros(D)), 'Embeddings of shape (8,) do not fit: (B, 8) is wanted.'),
    (lambda h: h.node_probs(torch.zeros(2, 2, D)), 'Embeddings of shape (2, 2, 8) do not fit'),
    (lambda h: h(np.zeros((2, D))), 'Embeddings must be a floating-point torch tensor, not float64'),
    (lambda h: h.loss(np.zeros((2, D)), [1, 2]), 'Embeddings must be a floating-point torch tensor'),
    (lambda h: h(torch.zeros(2, D).int()), 'Embeddings must be a floating-point torch tensor, not torch.int32'),
    (
        lambda h: h(torch.tensor([[0.0] * D, [math.nan] * D])),
        'Row 1 of the embeddings holds NaN or infinity (1 of 2 rows do); check the features, or lower the '
        'learning rate.',
    ),
    (
        lambda h: h.loss(torch.full((1, D), math.inf), torch.tensor([1])),
        'Row 0 of the embeddings holds NaN or infinity',
    ),
    (
        lambda h: h.loss(torch.tensor([[math.inf] * 4 + [-math.inf] * 4]), torch.tensor([1])),
        'Row 0 of the embeddings holds NaN or infinity',
    ),
    (
        lambda h: h.loss(torch.zeros(2, D), torch.tensor([3, 11])),
        'Target 11 of sample 1 is no node of this taxonomy, whose ids are 0 … 10; targets are node ids, as '
        'tax.index(name) gives them.',
    ),
    (lambda h: h.loss(torch.zeros(1, D), torch.tensor([-1])), 'Target -1 of sample 0 is no node'),
    (
        lambda h: h.loss(torch.zeros(1, D), torch.tensor([1.0])),
        'Targets must be integers (node ids), not torch.float32',
    ),
    (lambda h: h.loss(torch.zeros(1, D), torch.tensor([True])), 'Targets must be integers (node ids), not torch.bool'),
    (
        lambda h: h.loss(torch.zeros(2, D), torch.tensor([1])),
        'Targets of shape (1,) do not fit: (2,) is wanted, one node id a sample.',
    ),
    (lambda h: h.loss(torch.zeros(2, D), torch.zeros(2, 6).long()), 'Targets of shape (2, 6) do not fit'),
]


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('call,message', BAD)
def test_bad_batches(name, call, message):
    with pytest.raises(HiermetricError) as e:
        call(create_head(name, D, TAX))
    assert message in str(e.value)


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: create_head('arcfase', D, TAX), "There is no head 'arcfase'"),
        (
            lambda: create_head('arcface', D, TAX, margin=0.3),
            "The head 'arcface' has no setting 'margin'; it has s, m, tail, init, class_weights.",
        ),
        (lambda: create_head('classifier', 0, TAX), 'input features of a head must be 1, 2, 3, …, not 0'),
        (lambda: create_head('classifier', D, TAX, init='zeros'), "There is no initialisation 'zeros'"),
        (
            lambda: create_head('classifier', D, TAX, class_weights=[1] * 5),
            'Class weights must be 6 finite numbers, none below 0, in the order of tax.leaves; got shape (5,).',
        ),
        (lambda: create_head('classifier', D, TAX, class_weights=[1] * 5 + [-1]), 'none below 0'),
        (lambda: create_head('classifier', D, TAX, class_weights=[1] * 5 + [math.nan]), 'finite'),
        (lambda: inverse_frequency([1, 99], TAX), 'Target 99 of sample 1'),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)


def test_values_are_not_looked_at_where_it_would_wait():
    "On an accelerator shapes are checked and values are not: the meta device, which has no values, would raise"
    h = create_head('arcface', D, TAX).to('meta')
    emb, t = torch.zeros(3, D, device='meta'), torch.zeros(3, device='meta').long()
    h.check(emb, t)
    column, under = h.labels(t)
    assert under.shape == (3, 6) and h.train_logits(emb, column, under).shape == (3, 6)
    for bad in ((emb[:, :4], t), (emb, t[:2]), (emb, t.float())):
        with pytest.raises(HiermetricError):
            h.check(*bad)


# class weights


@settings(max_examples=40, deadline=None)
@given(trees(), st.lists(st.integers(1, 4), min_size=25, max_size=25), st.integers(0, 99))
def test_integer_weights_repeat_samples(tax, w, seed):
    w = torch.tensor(w[: tax.n_leaves])
    emb, _ = batch(tax, 6, seed)
    y = torch.randint(0, tax.n_leaves, (6,), generator=torch.Generator().manual_seed(seed))
    t = tax.tensor('leaves')[y]
    heavy = Classifier(D, tax, class_weights=w).double()
    plain = Classifier(D, tax).double()
    plain.weight = heavy.weight
    assert torch.allclose(
        heavy.loss(emb, t), plain.loss(emb.repeat_interleave(w[y], 0), t.repeat_interleave(w[y])), atol=1e-10
    )


def test_inner_label_weighs_its_leaves_mean():
    w = torch.tensor([1.0, 2, 4, 8, 16, 32])
    head = Classifier(D, TAX, class_weights=w).double()
    emb, _ = batch(TAX, 3)
    t = torch.tensor(TAX.index(['cat', 'mammal', 'wren']))
    l = torch.stack([head.loss(emb[i : i + 1], t[i : i + 1]) for i in range(3)])
    share = torch.tensor([1.5, 3.75, 32])
    assert torch.allclose(head.loss(emb, t), (share * l).sum() / share.sum(), atol=1e-10)


def test_zero_weights_give_zero_not_nan():
    head = Classifier(D, TAX, class_weights=[0] * 6)
    l = head.loss(torch.randn(3, D), TAX.tensor('leaves')[:3])
    l.backward()
    assert l.item() == 0 and head.weight.grad.isfinite().all()


@pytest.mark.parametrize('power', [0, 0.5, 1])
def test_inverse_frequency(power):
    n = [50, 5, 1, 0, 8, 2]
    t = np.repeat(TAX.leaves, n)
    w = inverse_frequency(np.r_[t, TAX.index('dog'), 0], TAX, power)
    assert (
        (w * torch.tensor(n)).sum() / sum(n) == pytest.approx(1, rel=1e-5)
        and w[0] / w[1] == pytest.approx(10**-power, rel=1e-5)
        and w[3] == w[2]
    )


@pytest.mark.parametrize('init', INITS)
def test_prototypes(init):
    torch.manual_seed(3)
    a = prototypes(6, 4, init)
    torch.manual_seed(3)
    b = getattr(torch.nn.init, f'{init}_')(torch.empty(6, 4))
    assert torch.equal(a, b) and a.requires_grad


@pytest.mark.parametrize('name', ALL)
def test_prototypes_move_and_are_saved(name):
    head = create_head(name, D, TAX)
    assert isinstance(head.weight, torch.nn.Parameter) and head.weight.shape[1] == D and 'weight' in head.state_dict()
    assert head.to('meta').weight.device.type == 'meta' and head.class_weights.device.type == 'meta'


def test_listing_imports_nothing():
    code = (
        "import sys, hiermetric.heads as h; h.list_heads(); assert 'hiermetric.heads.aam' not in sys.modules; "
        "h.create_head; h.HEADS['arcface']; assert 'hiermetric.heads.aam' in sys.modules"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    assert set(ALL) <= set(list_heads().index) and list_heads()['about'].str.len().min() > 10


def test_abstract_heads():
    h = LeafHead(D, TAX)
    with pytest.raises(NotImplementedError):
        h.logits(torch.zeros(1, D))
    with pytest.raises(NotImplementedError):
        Head(D, TAX).loss(torch.zeros(1, D), torch.zeros(1).long())
