"""Maps against a slow Grad-CAM written out; the place of a known patch; nothing of the model is changed; distances and
overlaps against loops."""

import json, re
import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cophenet, linkage
from torch import nn
from hiermetric.images.backbones import Backbone, Transform, create_backbone
from hiermetric.core import HiermetricError
from hiermetric.seeing.maps import METHODS, Explainer, to_picture
from hiermetric.seeing.maps import class_prototypes, toward_node
from hiermetric.seeing.embedding_plots import (
    cophenetic_correlation,
    overlap,
    pair_distances,
    plot_tanglegram,
    prototype_linkage,
)
from hiermetric.seeing.layouts import embedding_map, plot_neighbours, umap_layout
from hiermetric.seeing.map_plots import path_maps, plot_path, sanity_check
from hiermetric.trees.ranks import lift
from hiermetric.heads.contract import Classifier, create_head
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.images.encoder import Encoder
from hiermetric.similarity.search import neighbours
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')

TAX = Taxonomy.from_paths(
    {'lynx': 'mammal/cat', 'lion': 'mammal/cat', 'wolf': 'mammal/dog', 'fox': 'mammal/dog', 'owl': 'bird'}
)


def toy(seed=0, kind='mlp', size=40, fit='pad', head='classifier'):
    "A small network with residuals, ReLU and ReLU6 in place, under a frozen backbone"

    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU6(inplace=True)

        def forward(self, x):
            return x + self.act(self.bn(self.conv(x)))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(inplace=True),
            Block(8),
            nn.Conv2d(8, 12, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        model = Model(EmbeddingNet(12, 10, kind=kind), create_head(head, 10, TAX)).eval()
    return model, Backbone('toy', net, Transform(size, fit=fit, fill='white'), 12)


def noise(h=40, w=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def slow_cam(model, backbone, image, score):
    "Grad-CAM as the paper writes it, the network cut after the last activation by hand"
    with torch.no_grad():
        A = backbone.model[:5](backbone.transform(image)[None])
    A = A.clone().requires_grad_()
    score(model.embed(backbone.model[5:](A))).sum().backward()
    cam = torch.zeros(A.shape[2:])
    for c in range(A.shape[1]):
        alpha = sum(A.grad[0, c, i, j] for i in range(A.shape[2]) for j in range(A.shape[3])) / A[0, c].numel()
        cam += alpha * A.detach()[0, c]
    return cam.clamp(min=0)


@pytest.mark.parametrize('head', ['classifier', 'arcface', 'sphere_multi', 'path_softmax'])
def test_gradcam_is_the_slow_one(head):
    model, backbone = toy(head=head)
    for node in ('mammal', 'cat', 'owl'):
        s = toward_node(model.head, node)
        got = Explainer(model, backbone).input_map(noise(), node)[0]
        want = slow_cam(model, backbone, noise(), s)
        assert want.max() > 0 or node != 'mammal'
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6 * float(want.max()) + 1e-9)


def test_map_of_log_odds_is_that_of_the_probability():
    model, backbone = toy()
    see, p = Explainer(model, backbone), lambda emb: model.head.node_probs(emb)[:, TAX.index('cat')]
    a, b = see.input_map(noise(), 'cat'), see.input_map(noise(), p)
    share = float(see.score(noise(), p))
    torch.testing.assert_close(a * share * (1 - share), b, rtol=1e-3, atol=1e-7)


def test_gradient_is_a_finite_difference():
    model, backbone = toy()
    model.double()
    backbone.model.double()
    image, see = noise(), Explainer(model, backbone)
    s = toward_node(model.head, 'cat')
    see.transform = type(
        'T', (), dict(pixels=backbone.transform.pixels, size=40, normalize=lambda self, x: ((x - 127) / 60).double())
    )()
    g = see.input_map(image, s, 'gradient')
    x = backbone.transform.pixels(image)[None].double()
    for c, i, j in ((0, 5, 7), (1, 20, 20), (2, 33, 12)):
        step = torch.zeros_like(x)
        step[0, c, i, j] = 1e-3
        with torch.no_grad():
            d = (s(see.embed(x + step)) - s(see.embed(x - step))) / 2e-3
        assert abs(float(d) - float(g[c, i, j])) < 1e-2 * float(g.abs().max()) + 1e-9


def test_guided_is_the_backward_pass_by_hand():
    model, backbone = toy(kind='linear')
    net = backbone.model
    image = noise()
    got = Explainer(model, backbone).input_map(image, 'cat', 'guided')
    x = backbone.transform.pixels(image)[None].float()
    s, block = toward_node(model.head, 'cat'), net[2]
    a = net[0](backbone.transform.normalize(x))
    r = a.relu()
    b = block.bn(block.conv(r))
    h = r + b.clamp(0, 6)
    c = net[3](h)
    z = c.relu().detach().requires_grad_()
    g = torch.autograd.grad(s(model.embed(net[5:](z))).sum(), z)[0].clamp(min=0) * (c > 0)
    g = nn.functional.conv_transpose2d(g, net[3].weight, stride=2, padding=1, output_padding=1)
    gate = g.clamp(min=0) * ((b > 0) & (b < 6))
    g = g + nn.functional.conv_transpose2d(
        gate * (block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt())[:, None, None],
        block.conv.weight,
        padding=1,
    )
    g = nn.functional.conv_transpose2d(g.clamp(min=0) * (a > 0), net[0].weight, stride=2, padding=1, output_padding=1)
    want = g[0] / torch.tensor(backbone.transform.std)[:, None, None]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert not torch.allclose(got, Explainer(model, backbone).input_map(image, 'cat', 'gradient'))


def patch_model():
    "A head that asks for red"
    net = nn.Sequential(
        nn.AvgPool2d(4), nn.Conv2d(3, 2, 1, bias=False), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    tax = Taxonomy.from_paths({'red': 'x', 'blue': 'x'})
    head = Classifier(2, tax)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[2.0, -1, -1], [-1, -1, 2]])[:, :, None, None])
        head.weight.copy_(torch.eye(2)[[tax.leaf_names.index('red'), tax.leaf_names.index('blue')]] * 5)
    return Model(EmbeddingNet(2, kind='none'), head).eval(), net


@pytest.mark.parametrize('fit', ['pad', 'stretch', 'crop'])
@pytest.mark.parametrize('shape', [(64, 64), (50, 90), (120, 70), (200, 130)])
def test_decisive_patch_is_hottest(fit, shape):
    model, net = patch_model()
    see = Explainer(model, Backbone('p', net, Transform(64, fit=fit, fill=128, mean=(128,) * 3, std=(128,) * 3), 2))
    h, w = shape
    y, x, r = int(0.35 * h), int(0.6 * w), max(6, min(h, w) // 8)
    image = np.full((h, w, 3), 128, np.uint8)
    image[y : y + r, x : x + r] = (230, 50, 50)
    image[h - 2 * r : h - r, r : 2 * r] = (50, 50, 230)
    for method in METHODS:
        m = see(image, 'red', method)
        assert m.shape == ((h, w) if method == 'gradcam' else (h, w, 3))
        m = np.nan_to_num(np.abs(m if m.ndim == 2 else m[..., 0] * (m[..., 0] > 0)))
        cy, cx = (m.sum(1) @ np.arange(h)) / m.sum(), (m.sum(0) @ np.arange(w)) / m.sum()
        if method in ('gradcam', 'guided_gradcam'):
            assert abs(cy - y - r / 2) < 0.6 * r and abs(cx - x - r / 2) < 0.6 * r
            i, j = np.unravel_index(m.argmax(), m.shape)
            assert y - r / 2 <= i < y + 1.5 * r and x - r / 2 <= j < x + 1.5 * r
    assert np.nanmax(see(np.full((h, w, 3), 128, np.uint8), 'red')) == 0


@pytest.mark.parametrize(
    't',
    [
        Transform(48, fit='pad'),
        Transform(48, fit='stretch'),
        Transform(48, fit='crop'),
        Transform(48, crop=1.0, fit='crop'),
    ],
)
@pytest.mark.parametrize('shape', [(48, 48), (100, 37), (37, 100), (30, 200), (11, 13)])
def test_pictures_frame(t, shape):
    "Coordinates that go through the transform and back are themselves"
    h, w = shape
    for axis in (0, 1):
        ramp = torch.linspace(0, 255, shape[axis]).round().to(torch.uint8)
        x = (ramp[:, None] if axis == 0 else ramp[None]).expand(1, h, w)
        back, seen = to_picture(t.pixels(x).float(), t, h, w)[0], None
        seen = ~back.isnan()
        inner = seen.clone()
        inner[[0, -1]] = False
        inner[:, [0, -1]] = False
        step = 255 / max(shape[axis] - 1, 1)
        assert (back - x[0])[inner].abs().mean() < 0.35 * step + 4, (t.fit, shape)
    if t.fit != 'crop':
        assert seen.all()
    else:
        assert 0.1 < seen.float().mean() < 1 or (t.crop == 1 and h == w)


def test_everything_is_left_as_it_was():
    model, backbone = toy()
    see = Explainer(model, backbone)
    model.train()
    model.head.eval()
    backbone.model[2].train()
    for p in model.head.parameters():
        p.requires_grad_(False)
    mods = [*model.modules(), *backbone.model.modules()]
    state = lambda: (
        [m.training for m in mods],
        [getattr(m, 'inplace', None) for m in mods],
        [p.requires_grad for m in (model, backbone.model) for p in m.parameters()],
        [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in mods],
        [p.grad is None for m in (model, backbone.model) for p in m.parameters()],
    )
    weights, before = [v.clone() for m in (model, backbone.model) for v in m.state_dict().values()], state()
    for method in METHODS:
        see(noise(), 'cat', method)
    see.vector(noise())
    see.score(noise(), 'cat')
    with pytest.raises(ZeroDivisionError):
        see(noise(), lambda emb: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        see(noise(), lambda emb: 1 / 0, 'guided')
    with torch.no_grad():
        see(noise(), 'cat')
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        see(noise(), 'cat', 'guided_gradcam')
    sanity_check(see, [noise()], ['cat'])
    assert state() == before and all(
        torch.equal(a, b)
        for a, b in zip(weights, [v for m in (model, backbone.model) for v in m.state_dict().values()])
    )


def test_encoder_and_frozen_features_agree():
    "The same weights as a trained encoder and as a frozen backbone give the same maps"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        enc = Encoder('timm:resnet10t', size=64, pretrained=False, fit='pad', fill='white')
        emb, head = EmbeddingNet(enc.dim, 8), Classifier(8, TAX)
    whole = Model(emb, head, enc).eval()
    top, frozen = whole.top, whole.backbone
    for method in METHODS:
        a, b = Explainer(whole)(noise(50, 70), 'cat', method), Explainer(top, frozen)(noise(50, 70), 'cat', method)
        assert a.shape == ((50, 70) if method == 'gradcam' else (50, 70, 3)) and np.allclose(
            a, b, rtol=1e-3, atol=1e-4 * np.nanmax(np.abs(b)), equal_nan=True
        )


def test_size_input_reaches_the_encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        enc = Encoder('timm:resnet10t', size=64, pretrained=False, size_input=True, fit='pad', fill='white')
        model = Model(EmbeddingNet(enc.out_features, 8), Classifier(8, TAX), enc).eval()
    see = Explainer(model)
    assert see.score(noise(30, 30), 'cat') != see.score(np.kron(noise(30, 30), np.ones((2, 2, 1), np.uint8)), 'cat')
    assert np.isfinite(see(noise(30, 30), 'cat')).all()


def test_toward_another_image_is_highest_at_home():
    model, backbone = toy()
    see = Explainer(model, backbone)
    assert (
        see.score(noise(), see.vector(noise())) == pytest.approx(1, abs=1e-4)
        and see.score(noise(), see.vector(noise(seed=1))) < 1
    )
    assert see(noise(), see.vector(noise(seed=1)).numpy()).shape == (40, 40)


def test_among_ignores_the_others():
    model, _ = toy()
    emb = torch.randn(4, 10)
    a = toward_node(model.head, 'cat', 'mammal')(emb)
    with torch.no_grad():
        model.head.bias[TAX.leaf_names.index('owl')] += 5
    torch.testing.assert_close(toward_node(model.head, 'cat', 'mammal')(emb), a)
    p = model.head.leaf_probs(emb).double()
    i = [TAX.leaf_names.index(o) for o in ('lynx', 'lion')]
    torch.testing.assert_close(
        toward_node(model.head, 'cat')(emb).double(), torch.logit(p[:, i].sum(1)), rtol=1e-3, atol=1e-4
    )


def test_paths_and_errors():
    model, backbone = toy()
    see = Explainer(model, backbone)
    assert list(path_maps(see, noise(), 'lynx')) == [int(o) for o in TAX.index(['mammal', 'cat', 'lynx'])]
    assert list(path_maps(see, noise(), 'owl', 'parent')) == [
        int(o) for o in TAX.ancestors(TAX.index('owl'))[1:2]
    ]  # the second step has no rival
    assert len(plot_path(see, noise(), 'lynx').axes) == 4
    for bad, words in (
        (lambda: Explainer(model), 'begins with features'),
        (lambda: Explainer(model, toy_wrong()), 'takes 12'),
        (lambda: see(noise(), torch.ones(3)), '3 numbers'),
        (lambda: toward_node(model.head, -1), 'no node -1'),
    ):
        with pytest.raises(HiermetricError, match=words):
            bad()


def toy_wrong():
    return Backbone('w', nn.Flatten(), Transform(16), 768)


def test_sanity_check_forgets():
    model, backbone = toy(kind='linear')
    a = sanity_check(Explainer(model, backbone), [noise(seed=i) for i in range(3)], ['cat', 'owl', 'wolf'], 'gradient')
    assert a.index[0] == 'head' and a.index[-1] == 'stage 1' and a.correlation.iloc[-1] < 0.6 and (a.images == 3).all()
    pd_equal = sanity_check(
        Explainer(model, backbone), [noise(seed=i) for i in range(3)], ['cat', 'owl', 'wolf'], 'gradient'
    )
    assert np.array_equal(a.correlation, pd_equal.correlation)


def test_neighbours_against_sorting():
    g, q = torch.randn(50, 6), torch.randn(9, 6)
    near = neighbours(q, g, 5)
    i, c = near.rows.numpy(), 1 - near.distances.numpy()
    cos = np.array([[float(a @ b / (a.norm() * b.norm())) for b in g] for a in q])
    assert np.array_equal(i, np.argsort(-cos, 1)[:, :5]) and np.allclose(c, -np.sort(-cos, 1)[:, :5], atol=1e-5)
    assert (neighbours(g, g, 3, own=True).rows.numpy() != np.arange(50)[:, None]).all() and neighbours(
        q[:0], g, 3
    ).rows.shape == (0, 3)


def test_pairs_are_what_they_say():
    rng = np.random.default_rng(0)
    t = rng.choice(TAX.leaves, 60, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    t[:1] = TAX.index('owl')
    for level in (1, 2, None):
        clade = lift(TAX, t, level)
        code = np.unique(clade, return_inverse=True)[1]
        emb = torch.zeros(60, 60)
        emb[np.arange(60), code] = 1  # distance 0 within, 1 between
        same, other = pair_distances(emb, t, TAX, level, 5000)
        assert np.abs(same).max() < 1e-6 and np.abs(other - 1).max() < 1e-6
        same, _ = pair_distances(torch.eye(60), t, TAX, level, 5000)
        assert (same > 0.5).all()  # nobody with itself


def test_pairs_are_drawn_evenly():
    t = np.repeat(TAX.index(['lynx', 'wolf', 'owl']), [2, 5, 13])
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    u = x / x.norm(dim=1, keepdim=True)
    d = (1 - u @ u.T).numpy()
    same, other = pair_distances(x, t, TAX, None, 100_000)
    want_same = np.mean([d[i, [j for j in range(20) if t[j] == t[i] and j != i]].mean() for i in range(20)])
    want_other = np.mean([d[i, t != t[i]].mean() for i in range(20)])
    assert abs(same.mean() - want_same) < 0.01 and abs(other.mean() - want_other) < 0.01


def test_overlap():
    a = np.random.default_rng(0).random(100_000)
    assert (
        overlap(a, a) == pytest.approx(1)
        and overlap(a, a + 5) == 0
        and overlap(a, a + 0.5) == pytest.approx(0.5, abs=0.02)
    )


def test_linkage_and_correlation_by_hand():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double()
    d = np.array([[1 - float(a @ b / (a.norm() * b.norm())) for b in x] for a in x])
    i, j = np.triu_indices(5, 1)
    Z = linkage(d[i, j], 'average')
    assert np.allclose(Z, prototype_linkage(x))
    true = np.array([TAX.lca_height(int(TAX.leaves[a]), int(TAX.leaves[b])) for a, b in zip(i, j)])
    c = cophenetic_correlation(x, TAX, shuffles=19)
    assert (
        c['tree'] == pytest.approx(np.corrcoef(cophenet(Z), true)[0, 1])
        and c['distances'] == pytest.approx(np.corrcoef(d[i, j], true)[0, 1])
        and c['linkage'] == pytest.approx(np.corrcoef(cophenet(Z), d[i, j])[0, 1])
        and 0.05 <= c['p'] <= 1
    )


def test_pictures_can_be_drawn():
    import matplotlib.pyplot as plt

    t = np.resize(TAX.leaves, 12)
    tiles = [noise(20, 30, i) for i in range(12)]
    assert len(plot_neighbours(tiles[:2], tiles, np.arange(8).reshape(2, 4), t[:2], t, TAX).axes) == 11
    assert len(plot_tanglegram(torch.randn(5, 4), TAX).axes) == 3
    plt.close('all')


def test_map_is_small_and_says_what_it_holds():
    rng = np.random.default_rng(0)
    t = rng.choice(TAX.leaves, 300)
    tiles = [noise(60, 60, i) for i in range(300)]
    html = embedding_map(rng.normal(size=(300, 2)), t, TAX, np.resize(['train', 'unseen'], 300), tiles, thumbnails=50)
    assert (
        html.count('data:image/jpeg') == 50
        and len(html) < 200_000
        and all(o in html for o in ('level 1', 'level 3', 'mammal', 'plotly_hover', 'unseen'))
    )
    thumbs = json.loads(re.search(r'seen = (\{.*?\});', html)[1])
    assert all(v.startswith('data:image/jpeg') for v in thumbs.values())


def test_maps_and_pairs_read_the_ranks_of_the_tree():
    named = TAX.with_ranks([dict(mammal='class', bird='class', cat='family', dog='family').get(o) for o in TAX.names])
    rng = np.random.default_rng(0)
    t, xy = rng.choice(TAX.leaves, 60), rng.normal(size=(60, 2))
    menu = lambda rank: re.findall(r'"label":"(.*?)"', embedding_map(xy, t, named, rank=rank))
    assert menu(1) == ['level 1', 'level 2', 'level 3'] and menu('family') == menu(None) == ['class', 'family']
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    for rank, level in (('class', 1), ('family', 2)):
        same, other = pair_distances(x, lift(TAX, t, 2), named, rank, 100)
        assert np.array_equal(same, pair_distances(x, lift(TAX, t, 2), TAX, level, 100)[0])


def test_umap_layout_repeats():
    pytest.importorskip('umap')
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    x[:30] += 6
    a = umap_layout(x, neighbours=10)
    assert a.shape == (60, 2) and np.array_equal(a, umap_layout(x, neighbours=10))
    with pytest.raises(HiermetricError, match='too few'):
        umap_layout(x[:5])


def test_umap_missing_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(HiermetricError, match='pip install umap-learn'):
        umap_layout(torch.randn(60, 8))


def test_prototypes():
    assert torch.equal(class_prototypes(toy()[0].head), toy()[0].head.weight)
    with pytest.raises(HiermetricError, match='node_prototypes'):
        class_prototypes(create_head('path_softmax', 4, TAX))


def test_features_find_their_backbone():
    from hiermetric.images.features import Features

    model = Model(EmbeddingNet(1280, 8), Classifier(8, TAX)).eval()
    b = create_backbone(pretrained=True, size=64, fit='pad', fill=(255, 255, 255))

    def features(meta):
        return Features(np.zeros((2, 1280), np.float32), TAX.leaves[:2], np.array(['train', 'val']), TAX, meta)

    meta = dict(
        backbone='efficientnet_lite0', size=64, fit='pad', fill=[255, 255, 255], backbone_fingerprint=b.fingerprint
    )
    with pytest.raises(HiermetricError, match='other weights'):
        Explainer(model, features(meta | dict(size=32)))
    with pytest.raises(HiermetricError, match='not known'):
        Explainer(model, features({}))
    assert np.array_equal(Explainer(model, features(meta))(noise(), 'cat'), Explainer(model, b)(noise(), 'cat'))


def test_nan_is_no_place_in_a_picture():
    from hiermetric.seeing.embedding_plots import cophenetic_correlation, pair_distances, prototype_linkage
    from hiermetric.seeing.maps import toward_vector
    from hiermetric.seeing.layouts import umap_layout

    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'y', 'd': 'y'})
    bad = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    bad[3, 1] = torch.nan
    for draw in (
        lambda: umap_layout(bad),
        lambda: pair_distances(bad, tax.leaves.repeat(10), tax),
        lambda: prototype_linkage(bad[:4]),
        lambda: cophenetic_correlation(bad[:4], tax),
    ):
        with pytest.raises(HiermetricError, match='Row 3 of the embeddings holds NaN or infinity'):
            draw()
    with pytest.raises(HiermetricError, match='with NaN or infinity'):
        toward_vector(bad[3])
    flat = Taxonomy.from_paths({o: None for o in 'abcd'})
    out = cophenetic_correlation(bad[4:8], flat)
    assert np.isnan(out['tree']) and np.isnan(out['p'])  # nothing to correlate with is not significant
