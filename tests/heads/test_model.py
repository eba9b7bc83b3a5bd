"The model: its embedding block, and what is saved and loaded (hiermetric.heads.model)"

import json
import pytest, torch, torch.nn.functional as F
from hiermetric.core import HiermetricError
from hiermetric.images.encoder import Encoder
from hiermetric.heads.contract import Classifier, HEADS, create_head, register_head
from hiermetric.heads.model import EMBEDDINGS, EmbeddingNet, Model
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


@pytest.mark.parametrize('name', ALL)
def test_a_sample_does_not_depend_on_its_batch(name):
    torch.manual_seed(0)
    m = Model(EmbeddingNet(12, D, 'mlp', norm='batch'), create_head(name, D, TAX)).eval()
    x = torch.randn(9, 12)
    with torch.no_grad():
        whole = m.node_probs(x)
        assert torch.allclose(whole, torch.cat([m.node_probs(x[i : i + 1]) for i in range(9)]), atol=1e-6)
    assert torch.allclose(m.node_probs(x.flip(0)).flip(0), whole, atol=1e-6)


@pytest.mark.parametrize(
    'call,message',
    [
        (
            lambda: EmbeddingNet(4, 4, 'devnett'),
            "There is no embedding 'devnett'; there are devnet, mlp, linear, skip, none. Did you mean 'devnet'?",
        ),
        (lambda: EmbeddingNet(4, 4, norm='layer'), "There is no norm 'layer'"),
        (
            lambda: EmbeddingNet(4, 4)(torch.zeros(3, 5)),
            'Features of shape (3, 5) do not fit an embedding of 4 features.',
        ),
        (lambda: EmbeddingNet(4, 4)(torch.zeros(4)), 'Features of shape (4,) do not fit an embedding of 4 features.'),
        (lambda: EmbeddingNet(4, 4, norm='batch')(torch.zeros(1, 4)), 'batch of one sample'),
        (
            lambda: Model(EmbeddingNet(4, 5), create_head('classifier', 6, TAX)),
            'The embedding gives 5 numbers and the head expects 6',
        ),
    ],
)
def test_bad_settings_of_the_model(call, message):
    with pytest.raises(HiermetricError) as e:
        call()
    assert message in str(e.value)


# embedding, prototypes, registry


@pytest.mark.parametrize('kind', EMBEDDINGS)
@pytest.mark.parametrize('norm', [None, 'batch'])
def test_embedding(kind, norm):
    net = EmbeddingNet(12, 5, kind, norm=norm).eval()
    x = torch.randn(6, 12, dtype=torch.float16)
    y = net(x)
    assert y.shape == (6, net.out_features) == net(x[:, :, None, None]).shape and y.dtype == torch.float32
    assert net.out_features == (12 if kind == 'none' else 5) and net(x[:0]).shape == (0, net.out_features)
    assert net.dropout == (0.2 if kind in ('devnet', 'mlp', 'skip') else 0)


def test_devnet_is_the_block_of_the_thesis():
    net = EmbeddingNet(6, 4, 'devnet').eval()
    a, b = [o for o in net.layers if isinstance(o, torch.nn.Linear)]
    x = torch.randn(3, 6)
    assert (
        torch.equal(net(x), F.relu(F.linear(F.relu(F.linear(x, a.weight, a.bias)), b.weight, b.bias)))
        and a.weight.shape == (6, 6)
        and net.layers[-1].p == 0.2
    )


class Own(Classifier):
    "A user's head"

    def __init__(self, in_features, taxonomy, gain=1.0):
        super().__init__(in_features, taxonomy)
        self.gain = gain

    def logits(self, emb):
        return self.gain * super().logits(emb)


def test_own_head(tmp_path, monkeypatch):
    monkeypatch.setattr(HEADS, 'entries', dict(HEADS.entries))
    m = Model(EmbeddingNet(12, D), Own(D, TAX, gain=2.0)).eval()
    with pytest.raises(HiermetricError, match='register_head'):
        m.save(tmp_path / 'm')
    assert not (tmp_path / 'm').exists()
    register_head('own', Own, 'mine')
    m.save(tmp_path / 'm')
    x = torch.randn(3, 12)
    back = Model.load(tmp_path / 'm')
    assert back.head.gain == 2 and torch.equal(back.node_probs(x), m.node_probs(x))
    with pytest.raises(HiermetricError, match='exists already'):
        register_head('own', Own)


# checkpoints

SETTINGS = {
    'classifier': dict(init='orthogonal'),
    'arcface': dict(s=30.0, m=0.3, tail='jump'),
    'subcenter': dict(K=2),
    'combined': dict(m1=1.2, m2=0.1, m3=0.05),
    'cosface': dict(m=0.4),
}


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('kind', EMBEDDINGS)
def test_round_trip(name, kind, tmp_path):
    torch.manual_seed(0)
    w = [1, 2, 3, 4, 5, 6.0]
    net = EmbeddingNet(12, D, kind, norm='batch')
    m = Model(net, create_head(name, net.out_features, TAX, class_weights=w, **SETTINGS[name]))
    x, t = torch.randn(9, 12), torch.arange(9)
    m(x)
    m.eval()  # moves BatchNorm's running means
    m.save(tmp_path / 'm')
    back = Model.load(tmp_path / 'm')
    assert not back.training and back.taxonomy == TAX and type(back.head) is type(m.head)
    assert (
        torch.equal(back.node_probs(x), m.node_probs(x))
        and torch.equal(back.loss(x, t), m.loss(x, t))
        and torch.equal(back.leaf_probs(x), m.leaf_probs(x))
        and torch.equal(back(x), m(x))
    )
    for k in SETTINGS[name]:
        assert (getattr(back.head, k) if hasattr(back.head, k) else back.head.m3) == SETTINGS[name][k]
    assert (
        sorted(o.name for o in (tmp_path / 'm').iterdir())
        == ['SHA256SUMS', 'config.json', 'model.safetensors', 'taxonomy.npz']
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.fixture
def saved(tmp_path):
    m = Model(EmbeddingNet(12, D), create_head('arcface', D, TAX))
    m.save(tmp_path / 'm')
    return tmp_path / 'm'


def refused(folder, *words, **kw):
    with pytest.raises(HiermetricError) as e:
        Model.load(folder, **kw)
    for w in words:
        assert w in str(e.value), str(e.value)


def test_another_taxonomy_is_refused(saved):
    other = Taxonomy.from_paths({'lynx': 'cat', 'wolf': 'dog'})
    refused(saved, TAX.fingerprint, other.fingerprint, 'train a new one', taxonomy=other)
    same_size = Taxonomy.from_paths(
        {'a': 'mammal/cat', 'b': 'mammal/cat', 'c': 'mammal/dog', 'd': 'mammal/dog', 'e': 'bird', 'f': 'bird'}
    )
    refused(saved, same_size.fingerprint, taxonomy=same_size)
    other.save(saved / 'taxonomy.npz')
    refused(saved, 'taxonomy.npz is not what was saved')
    (saved / 'SHA256SUMS').unlink()
    refused(saved, TAX.fingerprint, other.fingerprint)  # the file beside it was exchanged
    assert Model.load(saved, taxonomy=TAX).taxonomy is TAX


@pytest.mark.parametrize(
    'spoil,words',
    [
        (lambda d: (d / 'config.json').unlink(), ['There is no model in', 'config.json']),
        (lambda d: (d / 'model.safetensors').unlink(), ['is damaged']),
        (lambda d: (d / 'model.safetensors').write_bytes(b'PK\x03\x04 not weights'), ['is damaged']),
        (lambda d: (d / 'config.json').write_text('{"embedding":'), ['is damaged']),
        (lambda d: (d / 'config.json').write_text('{}'), ['is damaged']),
        (lambda d: (d / 'config.json').write_text('[]'), ['is damaged']),
        (lambda d: (d / 'taxonomy.npz').write_bytes(b'x'), ['taxonomy.npz']),
    ],
)
def test_damaged(saved, spoil, words):
    spoil(saved)
    refused(saved, *words)


def edit(d, f):
    cfg = json.loads((d / 'config.json').read_text())
    f(cfg)
    (d / 'config.json').write_text(json.dumps(cfg))
    (d / 'SHA256SUMS').unlink()  # as a folder of before, which has none


def test_nothing_is_run_from_a_checkpoint(saved):
    edit(saved, lambda c: c['head'].update(name='os.system'))
    refused(saved, "There is no head 'os.system'")


def test_shapes_of_another_size(saved):
    edit(saved, lambda c: (c['head'].update(in_features=9), c['embedding'].update(out_features=9)))
    refused(saved, 'is damaged', 'size mismatch')


def test_save_replaces_a_model_and_nothing_else(saved, tmp_path):
    m = Model(EmbeddingNet(12, D), create_head('classifier', D, TAX))
    m.save(saved)
    assert type(Model.load(saved).head).__name__ == 'Classifier'
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'cat.jpg').write_text('x')
    with pytest.raises(HiermetricError, match='holds no model'):
        m.save(tmp_path / 'photos')
    assert (tmp_path / 'photos' / 'cat.jpg').exists()


def test_a_failed_save_leaves_the_old_model(saved, monkeypatch):
    before = (saved / 'model.safetensors').read_bytes()
    m = Model(EmbeddingNet(12, D), create_head('classifier', D, TAX))

    def full(*a, **k):
        raise OSError('No space left on device')

    monkeypatch.setattr('safetensors.torch.save', full)
    with pytest.raises(OSError):
        m.save(saved)
    assert (
        (saved / 'model.safetensors').read_bytes() == before
        and [o.name for o in saved.parent.iterdir()] == ['m']
        and Model.load(saved).head.s == 16
    )


def test_an_encoder_travels_with_its_model(tmp_path):
    encoder = Encoder(
        'timm:test_efficientnet',
        size=32,
        pretrained=False,
        size_input=True,
        channels_last=True,
        fit='pad',
        fill=(250, 251, 252),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.1 * torch.randn_like(p)
    encoder.learn_sizes(torch.tensor([[10, 20], [30, 40]]))
    m = Model(EmbeddingNet(encoder.out_features, D), create_head('arcface', D, TAX), encoder).eval()
    m.save(tmp_path / 'm')
    back = Model.load(tmp_path / 'm')
    x, size = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), torch.randint(10, 90, (5, 2))
    with torch.no_grad():
        assert torch.equal(m.node_probs(x, size), back.node_probs(x, size)) and not torch.allclose(
            m.embed(x, size), m.embed(x, size * 2)
        )
        assert torch.allclose(
            back.node_probs(x, size),
            back.top.node_probs(back.encoder.append_size(back.backbone(back.backbone.transform.normalize(x)), size)),
            atol=1e-5,
        )
    assert (
        m.backbone.fingerprint == back.backbone.fingerprint
        and back.backbone.transform.fill == (250, 251, 252)
        and (top := m.top).backbone is None
        and top.top is top
    )
    assert not any(p.requires_grad for p in m.backbone.model.parameters()) and all(
        p.requires_grad for p in m.encoder.net.parameters()
    )  # a copy
    with pytest.raises(HiermetricError, match='size of the original images'):
        m.node_probs(x)
    with pytest.raises(HiermetricError, match='encoder gives 258 numbers and the embedding expects 12'):
        Model(EmbeddingNet(12, D), create_head('arcface', D, TAX), encoder)
