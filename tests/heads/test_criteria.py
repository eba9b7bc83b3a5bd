"What a wrong answer costs: against slow formulas, gradients, extremes (hiermetric.heads.criteria)"

import math
import pytest, torch, torch.nn.functional as F
from hiermetric.core import HiermetricError
from hiermetric.heads.criteria import AsymmetricLoss, CRITERIA, FocalLoss, bce, create_criterion


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# criteria


def slow_cell(name, z, yes, gamma=2.0, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    p = 1 / (1 + math.exp(-z))
    right = p if yes else 1 / (1 + math.exp(z))
    if name == 'bce':
        return -math.log(right)
    if name == 'focal':
        return -((1 - right) ** gamma) * math.log(right)
    if yes:
        return -((1 - p) ** gamma_pos) * math.log(p)
    p = max(p - clip, 0.0)
    return -(p**gamma_neg) * math.log(1 - p)


@pytest.mark.parametrize(
    'name,kw',
    [
        ('bce', {}),
        ('focal', {}),
        ('focal', dict(gamma=0.5)),
        ('asymmetric', {}),
        ('asymmetric', dict(gamma_neg=0.5, gamma_pos=0.0, clip=0.0)),
        ('asymmetric', dict(gamma_neg=0.0, gamma_pos=3.0, clip=0.3)),
    ],
)
def test_criteria_are_the_slow_ones(name, kw):
    z = torch.linspace(-9, 9, 73, dtype=torch.float64)
    for yes in (True, False):
        got = create_criterion(name, **kw)(z, torch.full(z.shape, yes))
        assert got.tolist() == pytest.approx([slow_cell(name, o, yes, **kw) for o in z.tolist()], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    'name,kw',
    [
        ('bce', {}),
        ('focal', {}),
        ('focal', dict(gamma=0.5)),
        ('asymmetric', {}),
        ('asymmetric', dict(gamma_neg=0.5, gamma_pos=0.5)),
        ('asymmetric', dict(gamma_neg=0.5, clip=0.0)),
        ('asymmetric', dict(gamma_neg=0.0)),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_criteria_are_finite_and_point_the_right_way(name, kw, dtype):
    z = torch.tensor(
        [-1e4, -200.0, -88.0, -20.0, -1.0, 0.0, 1.0, 20.0, 88.0, 200.0, 1e4], dtype=dtype, requires_grad=True
    )
    for yes in (True, False):
        l = create_criterion(name, **kw)(z, torch.full(z.shape, yes))
        (g,) = torch.autograd.grad(l.sum(), z)
        assert l.isfinite().all() and g.isfinite().all() and (l >= 0).all()
        if name == 'bce' or (name == 'focal' and yes):
            assert (g <= 0).all() if yes else (g >= 0).all()


@pytest.mark.parametrize('name', CRITERIA)
def test_criteria_gradcheck(name):
    z = 3 * randn(40, seed=1)
    y = randn(40, seed=2) > 0
    assert torch.autograd.gradcheck(lambda o: create_criterion(name)(o, y), z.requires_grad_())


def test_criteria_special_cases():
    z, y = randn(50), randn(50, seed=1) > 0
    assert torch.allclose(FocalLoss(0.0)(z, y), F.binary_cross_entropy_with_logits(z, y.double(), reduction='none'))
    assert torch.allclose(AsymmetricLoss(0.0, 0.0, 0.0)(z, y), bce(z, y)) and torch.allclose(
        AsymmetricLoss(2.0, 2.0, 0.0)(z, y), FocalLoss(2.0)(z, y)
    )
    easy = torch.full(
        (3,), math.log(0.05 / 0.95) - 1e-6, dtype=torch.float64, requires_grad=True
    )  # just under the clip
    l = AsymmetricLoss()(easy, torch.zeros(3).bool())
    l.sum().backward()
    assert l.abs().max() < 1e-20 and easy.grad.abs().max() == 0
    for bad in (
        lambda: FocalLoss(-1.0),
        lambda: FocalLoss(math.nan),
        lambda: AsymmetricLoss(clip=1.0),
        lambda: AsymmetricLoss(gamma_neg=-1.0),
        lambda: create_criterion('bce', gamma=2),
        lambda: create_criterion('nll'),
    ):
        with pytest.raises(HiermetricError):
            bad()
