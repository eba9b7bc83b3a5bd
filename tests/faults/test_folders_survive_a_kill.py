"""Whatever moment a process is killed at, what was there before or what was to come is there whole, and the next call
leaves nothing else behind."""

import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from hiermetric.files import atomic_path, settle, sweep
from hiermetric.downloads import unpack
from hiermetric.images.features import Features
from hiermetric.heads.model import Model
from hiermetric.running.predictor import Predictor
from hiermetric.similarity.index import Index
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.running.runs import load_run
from hiermetric.images.features import toy_features

pytestmark = [
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked here'),
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.filterwarnings('ignore:This process'),
]
TREE = Taxonomy.from_paths([('an', 'mam', 'cat'), ('an', 'mam', 'dog'), ('an', 'bird', 'owl'), ('pl', 'oak')])
TOY = toy_features(TREE, per_leaf=12, dim=8)
EVENTS = ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.listdir', 'shutil.rmtree', 'shutil.move')


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def child(work, after=None):
    "Run `work` in a process of its own, which kills itself before its file event number `after`; whether it was killed"
    if (pid := os.fork()) == 0:
        try:
            if after is not None:
                left = [after]

                def hook(event, args):
                    if event in EVENTS:
                        left[0] -= 1
                        if left[0] < 0:
                            die()

                sys.addaudithook(hook)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if after is None:
        time.sleep(random.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, 'the writer failed'
    return os.WIFSIGNALED(status)


def moments(work):
    "Kill `work` before each of its file events, one after the other, until it ends by itself"
    n = 0
    while child(work, n):
        yield n
        n += 1
    assert n > 5  # there was something to kill


def index(seed):
    return Index(
        np.random.default_rng(seed).normal(size=(30, 4)).astype('f4'),
        np.random.default_rng(seed).choice(TREE.leaves, 30),
        TREE,
    )


MODEL = fit(TOY, 'classifier', epochs=1, embed_dim=4, device='cpu').model
PREDICTOR = Predictor.from_model(MODEL, TOY)

KEPT = {  # name → (what writes, what reads back something to compare)
    'index': (lambda p, i: index(i).save(p), lambda p: Index.load(p).targets.tolist()),
    'features': (
        lambda p, i: Features(TOY.x[i:], TOY.targets[i:], TOY.split[i:], TREE).save(p),
        lambda p: len(Features.load(p)),
    ),
    'model': (lambda p, i: MODEL.save(p), lambda p: Model.load(p).taxonomy.fingerprint),
    'predictor': (lambda p, i: PREDICTOR.save_pretrained(p), lambda p: Predictor.from_pretrained(p).fingerprint),
}


@pytest.mark.parametrize('kind', KEPT)
def test_replacing_a_folder_survives_a_kill_before_every_step(kind, tmp_path):
    write, read = KEPT[kind]
    at = tmp_path / 'it'
    both = []
    for i in (1, 0):
        write(at, i)
        both.append(read(at))
    for n in moments(lambda: write(at, 1)):
        assert read(at) in both, f'lost after step {n}'
    assert read(at) == both[0]  # the last one came through
    write(at, 0)
    assert os.listdir(tmp_path) == ['it'] and read(at) == both[1]


def at_random(kind, tmp_path, times):
    write, read = KEPT[kind]
    at, i, killed = tmp_path / 'it', 0, 0
    write(at, 0)
    one = read(at)
    write(at, 1)
    both = one, read(at)

    def work():
        for k in range(10**6):
            write(at, k % 2)

    for _ in range(times):
        killed += child(work)
        assert read(at) in both
    write(at, 0)
    assert os.listdir(tmp_path) == ['it'] and read(at) == one and killed == times


def test_an_index_survives_kills_at_random_moments(tmp_path):
    random.seed(0)
    at_random('index', tmp_path, 60)


@pytest.mark.long
@pytest.mark.parametrize('kind', KEPT)
def test_folders_survive_two_hundred_kills_at_random_moments(kind, tmp_path):
    random.seed(1)
    at_random(kind, tmp_path, 200)


def archive(tmp_path):
    for i in range(12):
        (tmp_path / 'src' / f'{i}').mkdir(parents=True)
        (tmp_path / 'src' / f'{i}' / 'a.txt').write_text(str(i))
    return Path(shutil.make_archive(tmp_path / 'a', 'gztar', tmp_path / 'src'))


def whole(folder):
    return {str(o.relative_to(folder)): o.read_text() for o in folder.rglob('*.txt')} == {
        f'{i}/a.txt': str(i) for i in range(12)
    }


def test_unpacking_survives_a_kill_before_every_step(tmp_path):
    made = archive(tmp_path)
    (tmp_path / 'd').mkdir()
    for n in moments(lambda: unpack(made, tmp_path / 'd' / 'out')):
        assert not settle(tmp_path / 'd' / 'out').exists() or whole(tmp_path / 'd' / 'out')
    assert whole(unpack(made, tmp_path / 'd' / 'out')) and os.listdir(tmp_path / 'd') == ['out']


@pytest.mark.long
def test_unpacking_survives_two_hundred_kills_at_random_moments(tmp_path):
    random.seed(2)
    made = archive(tmp_path)
    (tmp_path / 'd').mkdir()
    for _ in range(200):
        child(lambda: unpack(made, tmp_path / 'd' / 'out'))
        if settle(tmp_path / 'd' / 'out').exists():
            assert whole(tmp_path / 'd' / 'out')
            shutil.rmtree(tmp_path / 'd' / 'out')
    assert whole(unpack(made, tmp_path / 'd' / 'out')) and os.listdir(tmp_path / 'd') == ['out']


RUN = dict(head='classifier', epochs=2, embed_dim=4, device='cpu', checkpoint_every=1, log=('csv',))


def finish(out):
    fit(TOY, **RUN, out=out)
    Predictor.from_model(load_run(out, TREE).model, TOY).save_pretrained(out / 'model')  # what `hiermetric train` does


def weights(run):
    return {k: v.tolist() for k, v in run.model.state_dict().items()}


def ended(out, true):
    finish(out)
    assert weights(load_run(out, TREE)) == true and Predictor.from_pretrained(out).taxonomy == TREE
    assert sorted(os.listdir(out)) == ['about.json', 'history.csv', 'history.png', 'model', 'run.json']


def test_the_end_of_a_training_survives_a_kill(tmp_path):
    true, n = weights(fit(TOY, **RUN)), 0
    steps = iter(range(0, 10**6, 7))  # every seventh moment; all of them in the long form
    while child(lambda: finish(tmp_path / 'run'), next(steps)):
        n += 1
    assert n > 5
    ended(tmp_path / 'run', true)
    for _ in range(3):
        child(lambda: finish(tmp_path / 'run'))
        ended(tmp_path / 'run', true)


@pytest.mark.long
def test_a_training_survives_a_kill_at_every_step_and_two_hundred_at_random(tmp_path):
    true, n = weights(fit(TOY, **RUN)), 0
    while True:
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        if not child(lambda: finish(tmp_path / 'run'), n):
            break
        ended(tmp_path / 'run', true)
        n += 1
    random.seed(3)
    for k in range(200):
        if k % 2:
            shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        child(lambda: finish(tmp_path / 'run'))
        ended(tmp_path / 'run', true)
    print(f'{n} steps')


# leftovers


def gone(name, what):
    return f'.{name}.{2**22 + 7}.{what}'  # no process has this number


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path):
    live = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    try:
        for o in ('a', 'b'):
            (tmp_path / gone(o, 'part')).touch()
            (tmp_path / f'.{o}.{live.pid}.part').mkdir()
        with atomic_path(tmp_path / 'a') as tmp:
            tmp.touch()
        assert sorted(os.listdir(tmp_path)) == sorted(
            ['a', gone('b', 'part'), f'.a.{live.pid}.part', f'.b.{live.pid}.part']
        )
        sweep(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(['a', f'.a.{live.pid}.part', f'.b.{live.pid}.part'])
    finally:
        live.kill()
        live.wait()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ['a']


def test_a_reader_that_may_not_write_reads_all_the_same(tmp_path, monkeypatch):
    index(0).save(tmp_path / 'it')
    (tmp_path / gone('it', 'old')).mkdir()
    (tmp_path / gone('it', 'old') / 'x').touch()

    def no(*a, **k):
        raise PermissionError(13, 'Permission denied')

    for o in ('rename', 'replace', 'unlink', 'rmdir', 'remove'):
        monkeypatch.setattr(os, o, no)
    assert len(Index.load(tmp_path / 'it')) == 30


def test_two_writers_of_one_folder_and_a_reader(tmp_path):
    index(0).save(tmp_path / 'it')
    pids, over = [], tmp_path / 'over'
    known = {tuple(index(i).targets) for i in range(3)}
    for seed in (1, 2):
        if (pid := os.fork()) == 0:
            try:
                while not over.exists():
                    index(seed).save(tmp_path / 'it')
            except BaseException:
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    try:
        for _ in range(50):
            assert tuple(Index.load(tmp_path / 'it').targets) in known  # `check` tells a mixture
    finally:
        over.touch()
        ended = [os.waitpid(pid, 0)[1] for pid in pids]
    assert ended == [0, 0] and sorted(os.listdir(tmp_path)) == ['it', 'over']
