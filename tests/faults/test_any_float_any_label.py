"""Every head takes features of any float type in a model of any other, and labels at any node; arrays as well as
tensors, and nothing at all."""

import copy, itertools
import numpy as np, pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import HEADS, create_head, head_trait
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.images.encoder import Encoder
from hiermetric.similarity.losses import LOSSES
from hiermetric.similarity.miners import MINERS
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.inference import embeddings, predict

TAX = Taxonomy.from_paths(
    {'a': 'X/x', 'b': 'X/x', 'c': 'X/y', 'd': 'Y/z/zz', 'e': 'Y/w', 'f': 'Y/w'}
)  # z and y are chains
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALL = dict(
    committee=dict(dim=8, dropout=0.0),
    diva=dict(dim=4, dropout=0.0),
    divide_conquer=dict(dim=8, learners=2, dropout=0.0),
    bier=dict(sizes=(4, 8), dropout=0.0),
    sndl=dict(dim=8, dropout=0.0),
)
X, T = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)), TAX.tensor('leaves').repeat(2)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('head', list(HEADS))
def test_features_and_models_of_every_float(head):
    torch.manual_seed(0)
    kind = head_trait(head, 'embedding')
    net = EmbeddingNet(12, 8, kind='skip' if kind == 'linear' else kind)
    model = Model(net, create_head(head, net.out_features, TAX, **SMALL.get(head, {}))).eval()
    with torch.no_grad():
        model.head.prepare(model.embed(X), T)
        model.head.conclude(model.embed(X), T)
    want, near = predict(model, X), embeddings(model, X)
    for weights, rows in itertools.product(FLOATS, FLOATS):
        m, x = copy.deepcopy(model).to(weights), X.to(rows)
        p, z = predict(m, x), embeddings(m, x)
        assert p.dtype == z.dtype == torch.float32
        loose = torch.float16 in (weights, rows) or torch.bfloat16 in (weights, rows)
        if not loose:
            torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(z, near, rtol=1e-4, atol=1e-5)
        elif head != 'kernel_ridge':
            assert (p - want).abs().max() < 0.1  # its kernel wants more digits
        if rows != torch.bfloat16:
            torch.testing.assert_close(predict(m, x.numpy()), p)
            torch.testing.assert_close(embeddings(m, x.numpy()), z)
        loss = m.train().loss(x, T)
        loss.backward()
        assert loss.isfinite()
    assert predict(model.eval(), X[:0]).shape == (0, len(TAX)) and len(embeddings(model, X[:0].numpy())) == 0


def test_whole_numbers_lists_and_what_is_no_array():
    model = Model(EmbeddingNet(12, 8), create_head('classifier', 8, TAX))
    whole = (X * 100).long()
    torch.testing.assert_close(predict(model, whole.numpy()), predict(model, whole.float()))
    torch.testing.assert_close(predict(model, whole.tolist()), predict(model, whole.float()))
    for bad in (['cod', 'eel'], [[1.0, 2.0], [3.0]], np.array([None, 'x'], dtype=object)):
        with pytest.raises(HiermetricError, match='rows of numbers'):
            predict(model, bad)
    with pytest.raises(HiermetricError, match='do not fit'):
        predict(model, X[0])


@pytest.mark.parametrize('size_input', [False, True])
def test_networks_of_every_float(size_input):
    torch.manual_seed(0)
    encoder = Encoder('timm:test_efficientnet', pretrained=False, size=32, size_input=size_input)
    model = Model(EmbeddingNet(encoder.out_features, 8), create_head('arcface', 8, TAX), encoder).eval()
    x = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    size = [torch.full((6, 2), 40.0)] if size_input else []
    with torch.no_grad():
        want = model.node_probs(x, *size)
    for weights in FLOATS:
        m = copy.deepcopy(model).to(weights)
        for pixels in (torch.uint8, torch.float32, torch.float64):
            with torch.no_grad():
                torch.testing.assert_close(
                    m.eval().node_probs(x.to(pixels), *size).float(),
                    want,
                    rtol=0,
                    atol=0.1 if weights in FLOATS[:2] else 1e-5,
                )
        loss = m.train().loss(x, T[:6], *size)
        loss.backward()
        assert loss.isfinite()


LABELS = dict(
    leaves=T,
    mixed=torch.arange(len(TAX)),
    inner=torch.tensor([i for i in range(len(TAX)) if i not in TAX.leaves]).repeat(2),
    roots=torch.zeros(4, dtype=torch.long),
    one=T[:1],
    alike=T[:1].repeat(4),
    none=T[:0],
)


@pytest.mark.parametrize('loss', list(LOSSES))
def test_every_loss_with_every_miner_takes_labels_at_any_node(loss):
    torch.manual_seed(0)
    tried = 0
    for miner in (None, *MINERS):
        try:
            create_head('metric', 8, TAX, loss=loss, miner=miner)
        except HiermetricError:
            continue  # they do not go together, and it says so
        for kind, t in LABELS.items():
            t = t.repeat(2) if loss in ('moco', 'simclr') else t
            head = create_head('metric', 8, TAX, loss=loss, miner=miner)
            head.prepare(torch.zeros(len(t), 8), t)
            x = torch.randn(len(t), 8, requires_grad=True)
            value = head.loss(x, t.int())
            value.backward()
            tried += 1
            assert (
                value.isfinite()
                and x.grad.isfinite().all()
                and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
            ), (miner, kind)
    assert tried >= len(LABELS)


def test_the_bound_of_an_image_known_to_its_genus_is_the_mean_of_its_species():
    from hiermetric.similarity.losses import create_loss

    leaves = TAX.leaf_names
    genus = int(TAX.index('X'))
    bounds = torch.tensor([0.5, 0.8, 1.1, 0.2, 0.3, 0.4])
    loss = create_loss('margin', TAX, 8)
    loss.loss.beta.data = bounds.clone()
    x = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    t = torch.as_tensor([genus, TAX.index('a'), TAX.index('e')])
    found = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
    under = [leaves.index(o) for o in 'abc']
    beta = bounds[under].mean()
    d = torch.cdist(x, x)
    far, near = (d[0, 1] - beta + 0.2).clamp_min(0), (beta - d[0, 2] + 0.2).clamp_min(0)
    torch.testing.assert_close(loss(x, t, found), (far + near) / ((far > 0).float() + (near > 0).float()).clamp_min(1))
    loss(x, t, found).backward()
    assert set(loss.loss.beta.grad.nonzero()[:, 0].tolist()) <= set(under)
