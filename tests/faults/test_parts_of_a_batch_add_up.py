"""A batch in parts is the batch: every head has the same gradients with accumulate=1 and 4, or refuses, whatever its
classes weigh and whatever is done to the batch."""

import inspect
from dataclasses import replace
import numpy as np, pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import HEADS, create_head, head_trait, inverse_frequency
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.similarity.losses import LOSSES
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.sources import FeatureSource
from hiermetric.running.trainer import Trainer
from hiermetric.running.fitting import defaults
from hiermetric.running.inference import make_accelerator
from hiermetric.images.features import toy_features

TAX = Taxonomy.from_paths(
    {'a': 'X/x', 'b': 'X/x', 'c': 'X/y', 'd': 'Y/z/zz', 'e': 'Y/w', 'f': 'Y/w'}
)  # z and y are chains
pytestmark = pytest.mark.usefixtures('one_thread')


def tail(inner=True):
    "A long tail of classes; some images known to their genus or only to the root"
    toy = toy_features(TAX, per_leaf=120, dim=12)
    keep = np.ones(len(toy), bool)
    for leaf, most in zip(TAX.leaves, (70, 30, 30, 15, 6, 3)):
        keep[(toy.targets == leaf).nonzero()[0][most:]] = False
    keep |= toy.split != 'train'
    x, targets, split = toy.x[keep], toy.targets[keep].copy(), toy.split[keep]
    if inner:
        targets[::7] = np.asarray(TAX.parents)[targets[::7]]
        targets[0] = 0
    return replace(toy, x=x, targets=targets, split=split)


DATA = {inner: tail(inner) for inner in (False, True)}
WEIGHTS = inverse_frequency(DATA[False].of('train')[1], TAX, 1.0)


def step(head, accumulate, steps=1, inner=True, head_kw=None, **kw):
    "Gradients of the first steps, what the run's loss is, and the trainer"
    cfg = (
        defaults()
        | dict(
            head=head,
            batch_size=16,
            weight_decay=0.0,
            optimizer='sgd',
            lr=0.1,
            power=1.0,
            dropout=0.0,
            accumulate=accumulate,
        )
        | kw
    )
    torch.manual_seed(0)
    data = DATA[inner]
    kind = head_trait(head, 'embedding')
    net = EmbeddingNet(12, 8, kind=kind, dropout=0.0)
    model = Model(net, create_head(head, net.out_features, TAX, **head_kw or {}))
    trainer = Trainer(model, FeatureSource(data, 'train'), FeatureSource(data, 'val'), cfg, make_accelerator('cpu'))
    seen = []

    def keep(*_):
        seen.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})

    trainer.opt.register_step_pre_hook(keep)

    class Enough(Exception):
        pass

    def stop():
        if len(seen) == steps:
            raise Enough

    trainer.after_step = stop
    with pytest.raises(Enough):
        trainer.train_epoch()
    return seen, float(trainer.total), trainer


def same(a, b, tol=2e-5):
    for x, y in zip(a[0], b[0], strict=True):
        assert x.keys() == y.keys() and x
        for k in x:
            torch.testing.assert_close(
                x[k], y[k], rtol=1e-3, atol=tol * max(1.0, float(x[k].abs().max())), msg=lambda m, k=k: f'{k}: {m}'
            )
    assert a[1] == pytest.approx(b[1], rel=1e-4)


def takes_weights(head):
    return 'class_weights' in inspect.signature(HEADS[head]).parameters


SMALL = dict(
    committee=dict(dim=8, dropout=0.0),
    diva=dict(dim=4, dropout=0.0),
    divide_conquer=dict(dim=8, learners=2, dropout=0.0),
    bier=dict(sizes=(4, 8), dropout=0.0),
    sndl=dict(dim=8, dropout=0.0),
)
WHOLE = {
    'metric',
    'diva',
    'divide_conquer',
    'bier',
    'sndl',
    'partial_margin',
}  # pairs, memories, classes drawn for a batch


@pytest.mark.parametrize('head', list(HEADS))
def test_every_head_adds_up_or_refuses(head):
    kw = dict(SMALL.get(head, {}), **({'class_weights': WEIGHTS} if takes_weights(head) else {}))
    if head in WHOLE:
        with pytest.raises(HiermetricError, match='looks at a batch as a whole .*accumulate=1'):
            step(head, 4, head_kw=kw)
    else:
        same(step(head, 1, head_kw=kw), step(head, 4, head_kw=kw))
        same(step(head, 1, inner=False, head_kw=kw), step(head, 2, inner=False, head_kw=kw))


@pytest.mark.parametrize('loss', list(LOSSES))
def test_every_loss_on_pairs_adds_up_or_refuses(loss):
    kw = dict(head_kw=dict(loss=loss), views=2 if loss in ('moco', 'simclr') else 1)
    if loss == 'proxy_nca':
        one, four = step('metric', 1, 3, **kw), step('metric', 4, 3, **kw)
        same(one, four)
        for k in ('weight', 'count'):
            torch.testing.assert_close(
                getattr(one[2].model.head, k), getattr(four[2].model.head, k)
            )  # the class means that follow
    else:
        with pytest.raises(HiermetricError, match='looks at a batch as a whole'):
            step('metric', 4, **kw)
        step('metric', 1, **kw)


@pytest.mark.parametrize(
    'kw',
    [
        dict(mix='mixup', mix_kw=dict(tree=0.5)),
        dict(clip_norm=0.05),
        dict(ema=0.5),
        dict(sampler='balanced'),
        dict(views=2),
        dict(batch_size=24, optimizer='adamw'),
    ],
    ids=str,
)
def test_whatever_is_done_to_the_batch(kw):
    head = dict(head_kw=dict(class_weights=WEIGHTS))
    one = step('hace', 1, 3, **head, **kw)
    for n in (2, 4):
        parts = step('hace', n, 3, **head, **kw)
        same(one, parts)
        for a, b in zip(one[2].judged.state_dict().values(), parts[2].judged.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_split_smaller_than_the_batch_is_one_batch():
    "All of it in a batch, also where four parts cannot be alike"
    one, four = (step('classifier', n, batch_size=256, head_kw=dict(class_weights=WEIGHTS)) for n in (1, 4))
    assert one[2].batch == four[2].batch == len(FeatureSource(DATA[True], 'train')) and one[2].batch % 4
    same(one, four)


def test_an_own_head_is_refused_until_it_says_what_its_images_weigh(monkeypatch):
    from hiermetric.heads.contract import Classifier, Head

    class Own(Classifier):
        def sample_weights(self, targets):
            return Head.sample_weights(self, targets)

    monkeypatch.setitem(HEADS.entries, 'own', (Own, 'mine'))
    with pytest.raises(HiermetricError, match="head 'own'"):
        step('own', 2)
    step('own', 1)


def test_members_of_a_committee_that_weigh_differently_are_refused():
    members = [dict(head='classifier', class_weights=WEIGHTS.tolist()), dict(head='arcface')]
    with pytest.raises(HiermetricError, match='as a whole'):
        step('committee', 2, head_kw=dict(SMALL['committee'], members=members))


def test_members_hear_the_epoch_and_the_rows():
    members = [dict(head='classifier'), dict(head='simple_hierarchy', coarse_start=0.0, coarse_ramp=1.0)]
    trainer = step('committee', 1, 2, head_kw=dict(SMALL['committee'], members=members))[2]
    assert (
        trainer.model.head.heads[1].epoch == trainer.model.head.epoch > 0
        and trainer.model.head.heads[1].rows is not None
    )
