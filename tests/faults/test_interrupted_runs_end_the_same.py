"""A run that is stopped at any moment, by a signal that asks or one that does not, ends with the weights of one that
was not."""

import os, random, signal
import pytest, torch
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.trainer import Trainer
from hiermetric.running.fitting import fit
from hiermetric.images.features import toy_features

TOY = toy_features(Taxonomy.from_paths({'a': 'X/x', 'b': 'X/x', 'c': 'X/y', 'd': 'Y/z'}), per_leaf=20, dim=12)
RUN = dict(
    head='arcface', epochs=3, batch_size=8, embed_dim=8, device='cpu', accumulate=2, ema=0.9, log=('csv', 'json')
)
STEPS = 3 * (len(TOY.of('train')[1]) // 8)
pytestmark = pytest.mark.usefixtures('one_thread')


def stopped(out, at, by):
    "Train in a process of its own, which is sent a signal in the middle of its `at`-th step"
    told, tell = os.pipe()
    if not (child := os.fork()):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
        real, done = Trainer._backward, [0]

        def backward(self, *a, **kw):
            real(self, *a, **kw)
            done[0] += 1
            if done[0] == 2 * at - 1:
                os.write(tell, b'.')
                signal.pause() if by == signal.SIGKILL else signal.sigtimedwait([], 5)

        Trainer._backward = backward
        try:
            fit(TOY, **RUN, out=out, checkpoint_every='2 steps')
        finally:
            os._exit(3)
    os.close(tell)
    try:
        assert os.read(told, 1) == b'.'
        os.kill(child, by)
    finally:
        os.close(told)
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (-by, 3) and not (out / 'run.json').exists()


def moments(n):
    rng = random.Random(0)
    return [
        (at, by) for by in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL) for at in rng.sample(range(1, STEPS + 1), n)
    ]


def ends_the_same(tmp_path, moments):
    whole = fit(TOY, **RUN)
    for at, by in moments:
        out = tmp_path / f'{at}-{by.name}'
        stopped(out, at, by)
        rest = fit(TOY, **RUN, out=out)
        a, b = whole.model.state_dict(), rest.model.state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a) and whole.history.loss.tolist() == pytest.approx(
            rest.history.loss.tolist(), abs=1e-12
        ), (at, by)
        assert sorted(o.name for o in out.iterdir()) == [
            'about.json',
            'history.csv',
            'history.jsonl',
            'history.png',
            'model',
            'run.json',
        ]


def test_at_three_moments(tmp_path):
    ends_the_same(tmp_path, moments(1))


@pytest.mark.long
def test_at_many_moments(tmp_path):
    ends_the_same(tmp_path, moments(10))
