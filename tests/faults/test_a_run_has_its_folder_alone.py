"Two processes that train or compare in one folder: the second gets a sentence, the first does not notice."

import os, signal, time
import pytest
from hiermetric.core import HiermetricError
from hiermetric.files import alone, workplace
from hiermetric.running.comparison import compare
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.images.features import toy_features

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked here'),
]
TOY = toy_features(Taxonomy.from_paths([('an', 'mam', 'cat'), ('an', 'mam', 'dog'), ('pl', 'oak')]), per_leaf=12, dim=8)
KW = dict(epochs=2, embed_dim=4, device='cpu')
WORK = {
    'train': lambda p, **kw: fit(TOY, 'classifier', **KW, out=p, **kw),
    'compare': lambda p, **kw: compare(
        TOY, ['classifier', 'arcface'], 1, ['argmax'], yardstick=False, draws=20, **KW, out=p
    ),
}


def elsewhere(work):
    if (pid := os.fork()) == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


@pytest.mark.parametrize('kind', WORK)
def test_the_second_gets_a_sentence(kind, tmp_path):
    ready = tmp_path / 'ready'

    def hold():
        with workplace(tmp_path / 'out', [], []):
            ready.touch()
            time.sleep(30)

    pid = elsewhere(hold)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(HiermetricError, match='out is being written by another run .process [0-9]+.; wait'):
        WORK[kind](tmp_path / 'out')
    assert set(os.listdir(tmp_path / 'out')) == {'.hiermetric.lock'}
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    WORK[kind](tmp_path / 'out')  # a dead one is no obstacle


@pytest.mark.parametrize('kind', WORK)
def test_of_two_at_once_one_is_whole(kind, tmp_path):
    pids = [elsewhere(lambda: WORK[kind](tmp_path / 'out')) for _ in range(2)]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(o, 0)[1]) for o in pids)
    assert codes[0] == 0  # the other one came too early, or found it finished
    once = WORK[kind](tmp_path / 'out')
    fresh = WORK[kind](tmp_path / 'again')
    if kind == 'train':
        assert once.history.drop(columns='seconds').equals(fresh.history.drop(columns='seconds'))
    else:
        assert once.runs.equals(fresh.runs)


def test_what_is_held_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError):
        with alone(tmp_path / 'a.csv'):
            raise RuntimeError
    with alone(tmp_path / 'a.csv'), alone(tmp_path / 'a.csv'):
        pass  # and the same thread may come again
