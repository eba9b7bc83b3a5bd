"""Augmentations beside torchvision's operations one at a time, mixes beside torchvision's, samplers beside
pytorch-metric-learning's and beside loops."""

import math, pickle
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from hiermetric.augment import (
    AUGMENTS,
    SAMPLERS,
    VIEWS,
    Augment,
    affine_maps,
    create_augment,
    create_mix,
    create_sampler,
    draws,
    erase,
    image_seeds,
    mix_targets,
    mixed_loss,
    resample,
    rim_colour,
    tta_views,
)
from hiermetric.core import HiermetricError
from hiermetric.heads import create_head
from hiermetric.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(
    {
        'cod': 'animal/fish',
        'eel': 'animal/fish',
        'ray': 'animal/fish',
        'krill': 'animal/crustacean',
        'crab': 'animal/crustacean/decapod',
        'shrimp': 'animal/crustacean/decapod',
        'kelp': 'plant',
    }
)
LEAVES = np.asarray(TAX.leaves)


def images(n=24, c=3, h=20, w=20, seed=0):
    return torch.randint(256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(n=4, s=32):
    "Waves: what interpolates them well agrees with what interpolates them otherwise"
    y, x = torch.meshgrid(torch.linspace(0, 3, s), torch.linspace(0, 3, s), indexing='ij')
    return (
        torch.stack(
            [
                torch.stack([128 + 90 * torch.sin(x * (1 + 0.3 * k) + y * (1.2 - 0.2 * c) + k + c) for c in range(3)])
                for k in range(n)
            ]
        )
        .round()
        .byte()
    )


# --- draws


def slow_hash(z):
    "SplitMix64's finaliser in Python's integers"
    m = 2**64 - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & m
    z = (z ^ z >> 27) * 0x94D049BB133111EB & m
    return z ^ z >> 31


@given(st.integers(-(2**40), 2**70), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_draws_beside_plain_integers(seed, epoch, rows):
    m, g = 2**64, 0x9E3779B97F4A7C15
    for row, s, u in zip(rows, image_seeds(seed, epoch, rows), draws(image_seeds(seed, epoch, rows), 3)):
        want = slow_hash((slow_hash((slow_hash((seed + g) % m) + epoch) % m) + row * g) % m)
        assert int(s) % m == want
        assert u.tolist() == [(slow_hash((want + k * g) % m) >> 11) * 2.0**-53 for k in (1, 2, 3)]


def test_draws_look_random():
    from scipy.stats import kstest

    for u in (
        draws(image_seeds(0, 0, range(4000)), 1)[:, 0],
        draws(image_seeds(0, 5, [3]), 4000)[0],
        torch.cat([draws(image_seeds(s, 0, [0]), 1)[0] for s in range(2000)]),
        torch.cat([draws(image_seeds(0, e, [0]), 1)[0] for e in range(2000)]),
    ):
        assert kstest(u.numpy(), 'uniform').pvalue > 1e-3
    assert len(set(image_seeds(0, 0, range(100_000)).tolist())) == 100_000


# --- an image's draw is its own


def alike(a, b):
    """Equal to rounding: matrix products of other shapes may add up in another order, and then a value in a thousand is
    rounded to the next grey level"""
    d = (a.int() - b.int()).abs()
    return a.shape == b.shape and d.max() <= 1 and (d > 0).float().mean() < 1e-3


@pytest.mark.parametrize('name', list(AUGMENTS))
@pytest.mark.parametrize('shape', [(24, 3, 20, 20), (24, 1, 20, 20), (24, 3, 30, 17), (24, 3, 90, 100)])
def test_neighbours_change_nothing(name, shape):
    x, aug, seeds = images(*shape), create_augment(name, 16), image_seeds(3, 2, range(24))
    y = aug(x, seeds)
    assert y.shape == (24, shape[1], 16, 16) and y.dtype == torch.uint8
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert alike(aug(x[order], seeds[order]), y[order]) and (name == 'none' or not alike(aug(x, seeds[order]), y))
    assert all(alike(aug(x[i], seeds[i]), y[i]) for i in (0, 5, 23))
    assert torch.equal(pickle.loads(pickle.dumps(aug))(x, seeds), y)  # as a worker gets it


def test_without_seeds_the_global_generator_decides():
    x, aug = images(), create_augment('plankton', 16)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        a = aug(x[0])
        b = aug(x[0])
        torch.manual_seed(5)
        assert torch.equal(aug(x[0]), a) and torch.equal(aug(x[0]), b)
    assert not torch.equal(a, b)


def test_empty_batch_and_bad_input():
    aug = create_augment('natural', 16)
    assert aug(images(0), image_seeds(0, 0, [])).shape == (0, 3, 16, 16)
    for bad in (images().float(), images()[0, 0], np.zeros((3, 8, 8), np.uint8)):
        with pytest.raises(HiermetricError, match='Images to augment are uint8 tensors'):
            aug(bad)
    for kw, text in (
        (dict(area=(0, 1)), 'area'),
        (dict(rotation=200), 'rotation'),
        (dict(flip_x=2), 'flip_x'),
        (dict(hue=1), 'hue'),
        (dict(ratio=0.5), 'ratio'),
        (dict(fill=300), 'fill'),
        (dict(erase_area=(0.5, 2)), 'erase_area'),
        (dict(brightness=-1), 'brightness'),
    ):
        with pytest.raises(HiermetricError, match=text):
            Augment(16, **kw)


# --- geometry and colour, beside torchvision


def maps(n, size, area=1.0, ratio=1.0, angle=0.0, shear=0.0, fx=1.0, fy=1.0, x=0.0, y=0.0, **kw):
    return affine_maps(size, *(torch.full((n,), float(o)) for o in (area, ratio, angle, shear, fx, fy, x, y)), **kw)


def inner(x, k=9):
    return x[..., k:-k, k:-k].float()  # away from the rim, where the two pad differently


@pytest.mark.parametrize('degrees', [0, 20, -75, 90, 180])
@pytest.mark.parametrize('area', [0.6, 1.0, 1.4])
def test_rotation_and_zoom_are_torchvisions(degrees, area):
    x = smooth()
    ours = resample(x, maps(4, x.shape[2:], area, angle=math.radians(degrees)), 32, rim_colour(x))
    theirs = F.affine(
        x.float(), -degrees, [0, 0], area**-0.5, [0, 0], interpolation=v2.InterpolationMode.BILINEAR
    )  # our angle turns the window, torchvision's the picture
    assert (inner(ours) - inner(theirs)).abs().max() < 0.01


def test_crop_is_torchvisions():
    x = smooth(s=40)
    ours = resample(x, maps(4, (40, 40), 0.25, x=-1.0, y=1.0), 40, rim_colour(x))  # lower left quarter
    theirs = F.resized_crop(x.float(), 20, 0, 20, 20, [40, 40], antialias=False)
    assert (ours - theirs)[
        ..., 2:-2, 2:-2
    ].abs().max() < 1e-3  # at the crop's rim torchvision repeats pixels and we look beyond it


def test_shear_moves_rows():
    x = smooth()
    ours = resample(x, maps(4, x.shape[2:], shear=0.3), 32, rim_colour(x))
    theirs = F.affine(x.float(), 0, [0, 0], 1.0, [math.degrees(0.3), 0], interpolation=v2.InterpolationMode.BILINEAR)
    assert (inner(ours) - inner(theirs)).abs().max() < 0.01


@pytest.mark.parametrize('area,inside', [((0.2, 0.9), True), ((1.2, 3.0), False)])
def test_windows_stay_inside(area, inside):
    "A window smaller than the image shows no background; a larger one shows all of the image"
    n = 200
    u = draws(image_seeds(0, 0, range(n)), 4).float()
    m = affine_maps(
        (24, 36),
        area[0] + u[:, 0] * (area[1] - area[0]),
        (u[:, 1] - 0.5).exp(),
        torch.zeros(n),
        torch.zeros(n),
        torch.ones(n),
        torch.ones(n),
        2 * u[:, 2] - 1,
        2 * u[:, 3] - 1,
        inside=inside,
    )
    low = m[:, :, 2] - torch.stack([m[:, 0, 0], m[:, 1, 1]], 1)
    high = m[:, :, 2] + torch.stack([m[:, 0, 0], m[:, 1, 1]], 1)
    if inside:
        assert (low >= -1 - 1e-5).all() and (high <= 1 + 1e-5).all()
    else:
        w = torch.stack([m[:, 0, 0], m[:, 1, 1]], 1)
        assert ((low <= -1 + 1e-5) & (high >= 1 - 1e-5))[w >= 1].all()


def test_rim_colour_is_the_median_of_the_rim():
    x = images(3, 3, 9, 7)
    for i in range(3):
        for c in range(3):
            a = x[i, c]
            rim = [int(a[r, k]) for r in range(9) for k in range(7) if r in (0, 8) or k in (0, 6)]
            assert rim_colour(x)[i, c].item() == sorted(rim)[(len(rim) - 1) // 2]


def test_a_plankter_on_white_keeps_its_background():
    x = torch.full((8, 3, 40, 40), 255, dtype=torch.uint8)
    x[:, :, 15:25, 10:30] = 20
    y = create_augment('plankton', 40, brightness=0, contrast=0)(x, image_seeds(0, 0, range(8)))
    assert (y[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() and (y < 60).flatten(1).any(1).all()
    assert (y[:, 0] == y[:, 1]).all() and (y[:, 0] == y[:, 2]).all()  # no colour comes in


def test_grey_is_one_channel_of_three():
    x, seeds = images(12, 1), image_seeds(0, 0, range(12))
    aug = create_augment('plankton', 16)
    assert (aug(x, seeds).expand(-1, 3, -1, -1).int() - aug(x.expand(-1, 3, -1, -1), seeds).int()).abs().max() <= 1


def test_twelve_channels():
    x, seeds = images(5, 12), image_seeds(0, 0, range(5))
    y = create_augment('plankton', 16)(x, seeds)
    assert y.shape == (5, 12, 16, 16)
    turned = create_augment('plankton', 16, contrast=0)(x, seeds)  # without contrast bands do not know each other
    assert alike(turned[:, 4:7], create_augment('plankton', 16, contrast=0)(x[:, 4:7], seeds))
    assert create_augment('natural', 16, hue=0)(x, seeds).shape == (5, 12, 16, 16)
    with pytest.raises(HiermetricError, match='12 channels have no hue'):
        create_augment('natural', 16)(x, seeds)


def test_erase_beside_a_loop():
    u = draws(image_seeds(1, 0, range(30)), 4).float()
    x = images(30, 2, 12, 12).float()
    area, ratio = 0.05 + 0.4 * u[:, 0], 0.5 + u[:, 1]
    y = erase(x, area, ratio, u[:, 2], u[:, 3], torch.full((2, 1, 1), -1.0))
    for i in range(30):
        w, h = math.sqrt(area[i] * ratio[i]), math.sqrt(area[i] / ratio[i])
        for r in range(12):
            for c in range(12):
                hidden = 0 <= (c + 0.5) / 12 - u[i, 2] * (1 - w) < w and 0 <= (r + 0.5) / 12 - u[i, 3] * (1 - h) < h
                assert (y[i, :, r, c] == -1).all() if hidden else (y[i, :, r, c] == x[i, :, r, c]).all()


def test_the_settings_do_something():
    x, seeds = smooth(24), image_seeds(0, 0, range(24))
    plain = Augment(32)(x, seeds)
    for kw in (
        dict(area=(0.5, 0.8)),
        dict(ratio=1.3),
        dict(rotation=90),
        dict(shear=20),
        dict(flip_x=1),
        dict(flip_y=1),
        dict(brightness=0.5),
        dict(contrast=0.5),
        dict(saturation=0.5),
        dict(hue=0.2),
        dict(erase=1),
    ):
        y = Augment(32, **kw)(x, seeds)
        assert (y != plain).flatten(1).any(1).float().mean() > 0.9, kw
    share = (
        (Augment(32, flip_x=0.25)(images(400, h=32, w=32), image_seeds(0, 1, range(400))) != images(400, h=32, w=32))
        .flatten(1)
        .any(1)
        .float()
        .mean()
    )
    assert abs(share - 0.25) < 0.07


def test_large_images_are_averaged_not_skipped():
    "A fine chessboard, eight times too large, becomes grey"
    x = ((torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255).byte().expand(1, 3, -1, -1)
    y = Augment(32)(x, torch.tensor([0]))
    assert (y.float() - 127.5).abs().max() < 20


# --- views


@pytest.mark.parametrize('name,k', [(n, k) for n in VIEWS for k in (1, 2, 4, 8) if k <= len(VIEWS[n])])
def test_views_are_a_group(name, k):
    x = images(1, 1, 5, 5)
    have = {tuple(v.flatten().tolist()) for v in tta_views(name, k)(x)}
    assert len(have) == k and tuple(x.flatten().tolist()) in have
    for v in tta_views(name, k)(x):
        assert {tuple(o.flatten().tolist()) for o in tta_views(name, k)(v)} == have


def test_view_averages_stay_coherent():
    head = create_head('classifier', 75, TAX)
    x = torch.rand(6, 3, 5, 5)
    with torch.no_grad():
        p = tta_views('plankton').node_probs(lambda v: head.node_probs(v.flatten(1)), x)
    assert torch.allclose(p[:, 0], torch.ones(6)) and (p[:, 1:] <= p[:, TAX.parents[1:].tolist()] + 1e-6).all()
    with pytest.raises(HiermetricError, match="Did you mean 'plankton'"):
        tta_views('planktn')


# --- mixes


def test_mixup_is_torchvisions():
    x, t = torch.rand(6, 3, 8, 8), torch.as_tensor(LEAVES[[0, 1, 2, 3, 4, 5]]).long()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        y, parts = create_mix('mixup', alpha=0.7)(x, t, TAX)
    lam = parts[0][0]
    theirs = v2.MixUp(alpha=0.7, num_classes=len(TAX))
    want_x = theirs.transform(x, dict(lam=lam, labels=t, batch_size=6))
    want_t = theirs.transform(t, dict(lam=lam, labels=t, batch_size=6))
    assert torch.allclose(y, want_x, atol=1e-6)
    assert torch.allclose(sum(w * torch.nn.functional.one_hot(o, len(TAX)) for w, o in parts), want_t, atol=1e-6)


def test_cutmix_is_torchvisions():
    x, t = torch.rand(5, 3, 12, 16), torch.as_tensor(LEAVES[:5]).long()
    theirs = v2.CutMix(alpha=1.0, num_classes=len(TAX))
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            y, parts = create_mix('cutmix')(x, t, TAX)
        pasted = (y[0] != x[0]).any(0)
        assert abs(pasted.float().mean().item() - (1 - parts[0][0])) < 1e-6
        if pasted.any():
            r, c = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            box = (c.min().item(), r.min().item(), c.max().item() + 1, r.max().item() + 1)
            assert torch.equal(y, theirs.transform(x, dict(box=box, lam_adjusted=parts[0][0], labels=t, batch_size=5)))


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, len(TAX) - 1), st.integers(0, len(TAX) - 1)), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_mixed_targets(lam, tree, pairs):
    a, b = torch.tensor(pairs).T
    parts = mix_targets(a, b, lam, TAX, tree)
    weights = [w for w, _ in parts]
    assert abs(sum(weights) - 1) < 1e-9 and min(weights) >= 0
    if len(parts) == 3:
        assert (
            parts[2][1].tolist() == [int(TAX.lca(*p)) for p in pairs]
            and abs(weights[2] - 2 * tree * min(lam, 1 - lam)) < 1e-9
        )


@pytest.mark.parametrize('name', ['classifier', 'arcface', 'hace', 'sphere_multi', 'conditional', 'attention'])
def test_mixes_work_with_heads(name):
    torch.manual_seed(0)
    head = create_head(name, 12, TAX)
    emb = torch.randn(6, 12, requires_grad=True)
    t = torch.as_tensor(LEAVES[[0, 1, 2, 3, 4, 6]])
    loss = lambda y: head.loss(emb, y)
    assert torch.allclose(
        mixed_loss(loss, mix_targets(t, t, 0.3, TAX, 0.8)), loss(t), atol=1e-5
    )  # a mix within a class is that class
    z = mixed_loss(loss, mix_targets(t, t.roll(1), 0.3, TAX, 0.8))
    z.backward()
    assert z.isfinite() and emb.grad.isfinite().all()
    root = torch.zeros_like(t)
    assert abs(loss(root).item()) < 1e-6  # so that classes which meet at the root only weigh less


def test_mix_keeps_bytes_as_floats_and_takes_features():
    x = images(4)
    y, _ = create_mix('mixup')(x, torch.as_tensor(LEAVES[:4]), TAX)
    assert y.dtype == torch.float32 and y.max() <= 255
    y, _ = create_mix('cutmix')(x, torch.as_tensor(LEAVES[:4]), TAX)
    assert y.dtype == torch.float32
    y, _ = create_mix('mixup')(torch.randn(4, 7), torch.as_tensor(LEAVES[:4]), TAX)
    assert y.shape == (4, 7)
    for kw in (dict(alpha=0), dict(tree=2)):
        with pytest.raises(HiermetricError):
            create_mix('mixup', **kw)


# --- samplers

LONG = np.repeat(LEAVES, [300, 120, 50, 20, 7, 2, 1])


@pytest.mark.parametrize('name', list(SAMPLERS))
def test_sampler_contract(name):
    targets = np.random.default_rng(1).permutation(LONG)
    for batch in (1, 16, 64, 10_000):
        if name == 'm_per_class' and batch < 4:
            continue  # refused, see below
        rows = create_sampler(name)(targets, TAX, batch, np.random.default_rng(0))
        size = min(batch, len(targets))
        assert (
            rows.dtype == np.int64
            and rows.shape == (len(targets) // size, size)
            and rows.min() >= 0
            and rows.max() < len(targets)
        )
        assert np.array_equal(rows, create_sampler(name)(targets, TAX, batch, np.random.default_rng(0)))
        if batch == 16:
            assert not np.array_equal(rows, create_sampler(name)(targets, TAX, batch, np.random.default_rng(1)))
    assert np.array_equal(
        pickle.loads(pickle.dumps(create_sampler(name)))(targets, TAX, 16, np.random.default_rng(0)),
        create_sampler(name)(targets, TAX, 16, np.random.default_rng(0)),
    )
    with pytest.raises(HiermetricError):
        create_sampler(name)(targets[:0], TAX, 8, np.random.default_rng(0))
    with pytest.raises(HiermetricError):
        create_sampler(name)(targets, TAX, 0, np.random.default_rng(0))


def slow_tree_share(v, labels):
    "Walk down from the root; at every fork choose evenly"
    p, node = 1.0, int(v)
    while True:
        children = [
            c for c in range(len(TAX)) if c and TAX.parents[c] == node and any(TAX.is_ancestor(c, y) for y in labels)
        ]
        p /= max(len(children) + (node in labels), 1)
        if node == 0:
            return p
        node = int(TAX.parents[node])


@pytest.mark.parametrize(
    'name,kw,share',
    [
        ('shuffle', {}, lambda n, v, labels: n),
        ('balanced', {}, lambda n, v, labels: 1),
        ('power', dict(q=0.5), lambda n, v, labels: n**0.5),
        ('power', dict(q=-0.5), lambda n, v, labels: n**-0.5),
        ('tree', {}, lambda n, v, labels: slow_tree_share(v, labels)),
        ('tree', dict(q=0.4), lambda n, v, labels: n**0.4 * slow_tree_share(v, labels) ** 0.6),
    ],
)
@pytest.mark.parametrize('inner', [False, True])
def test_classes_get_their_share(name, kw, share, inner):
    targets = np.concatenate([LONG, TAX.index(['fish', 'decapod', 'decapod'])]) if inner else LONG
    rows = create_sampler(name, **kw)(targets, TAX, 10, np.random.default_rng(0)).ravel()
    labels, n = np.unique(targets, return_counts=True)
    want = np.array([share(k, v, set(labels.tolist())) for v, k in zip(labels, n)], dtype=float)
    want *= len(rows) / want.sum()
    got = np.array([(targets[rows] == v).sum() for v in labels])
    assert (np.abs(got - want) <= (1 if name != 'shuffle' else 10)).all()
    for v in labels:  # no image again before all of its class have come
        times = np.bincount(rows, minlength=len(targets))[targets == v]
        assert np.ptp(times) <= 1


def test_draws_are_spread_over_the_epoch():
    "Batches of a balanced epoch are balanced as chance allows, not sorted"
    rows = create_sampler('balanced')(LONG, TAX, 50, np.random.default_rng(0))
    assert all(len(np.unique(LONG[r])) == 7 for r in rows)


@pytest.mark.parametrize('m,batch', [(2, 8), (4, 12), (3, 21)])
def test_m_per_class_beside_pytorch_metric_learning(m, batch):
    samplers = pytest.importorskip('pytorch_metric_learning.samplers')
    LONG = np.repeat(LEAVES, [1500, 600, 250, 100, 35, 10, 1])
    ours = create_sampler('m_per_class', m=m)(LONG, TAX, batch, np.random.default_rng(0))
    theirs = np.array(list(samplers.MPerClassSampler(LONG, m, batch, length_before_new_iter=len(LONG)))).reshape(
        -1, batch
    )
    assert ours.shape[1] == batch == theirs.shape[1]
    for rows in (ours, theirs):
        for r in rows:
            assert set(np.unique(LONG[r], return_counts=True)[1]) == {m} and len(np.unique(LONG[r])) == batch // m
    count = [np.bincount(np.searchsorted(LEAVES, LONG[r].ravel()), minlength=7) / r.size for r in (ours, theirs)]
    assert np.abs(count[0] - 1 / 7).max() < 0.07 and np.abs(count[1] - 1 / 7).max() < 0.07  # both draw classes evenly
    for r in ours:
        for v in np.unique(LONG[r]):
            assert len(set(r[LONG[r] == v])) == min(m, (LONG == v).sum())  # no repetition but of necessity


def test_m_per_class_with_few_classes():
    for r in create_sampler('m_per_class', m=4)(
        LONG, TAX, 63, np.random.default_rng(0)
    ):  # seven classes of four, twice, and seven more
        assert sorted(np.unique(LONG[r], return_counts=True)[1]) == [8, 8, 8, 8, 8, 11, 12]
    with pytest.raises(HiermetricError, match='m must be in'):
        create_sampler('m_per_class', m=0)(LONG, TAX, 64, np.random.default_rng(0))
