"Augmentations, views and mixes: an image by itself and in a batch, groups, torchvision, heads."

import pickle
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms import v2
from hiermetric.images.augment import (
    AUGMENTS,
    VIEWS,
    Augment,
    create_augment,
    create_mix,
    mix_targets,
    mixed_loss,
    tta_views,
)
from hiermetric.images.operations import image_seeds
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import create_head
from hiermetric.trees.taxonomy import Taxonomy

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
