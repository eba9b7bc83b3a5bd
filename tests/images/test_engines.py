"Engines agree with the plain network."

import importlib.util
import numpy as np
import pytest, torch
from hiermetric.images.backbones import create_backbone
from hiermetric.images.engines import ENGINES, _fold, _network
from toys import toy_backbone

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def backbone():
    return toy_backbone()


def cosine(a, b):
    return np.min((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@pytest.mark.skipif(importlib.util.find_spec('openvino') is None, reason='openvino is not installed')
def test_openvino_keeps_float32_on_processors_with_bfloat16_units():
    "With its defaults the cosine falls to 0.99 there"
    b = create_backbone(size=64)
    x = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    got = np.concatenate(list(ENGINES['openvino'](b)(iter(x.split(4)))))
    assert cosine(got, b(b.transform.normalize(x)).numpy()) > 0.99999


@pytest.mark.parametrize(
    'engine',
    [
        'folded',
        'compiled',
        pytest.param(
            'openvino',
            marks=pytest.mark.skipif(importlib.util.find_spec('openvino') is None, reason='openvino is not installed'),
        ),
    ],
)
def test_engines_agree_with_the_plain_network(engine, backbone):
    x = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    want = backbone(backbone.transform.normalize(x)).numpy()
    got = np.concatenate(list(ENGINES[engine](backbone)(iter(x.split(2)))))
    assert cosine(got, want) > 0.9999


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'resnet18'])
def test_folding_leaves_no_batchnorm_and_changes_nothing(name):
    b = create_backbone(name, pretrained=name == 'efficientnet_lite0', size=64)
    folded = _fold(_network(b))
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert cosine(folded(x).numpy(), _network(b)(x).numpy()) > 0.99999
