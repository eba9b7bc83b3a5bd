"Draws and operations on pixels beside plain integers, loops and torchvision."

import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from hiermetric.images.operations import affine_maps, draws, erase, image_seeds, resample, rim_colour


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
