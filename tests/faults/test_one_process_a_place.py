"Two runs do not write to one table at a time; what a dead one leaves blocks nobody, and nothing is left lying about."

import os, random, subprocess, sys, time
from pathlib import Path
import pytest
from answering import picture, predicts, tiny_predictor
from hiermetric.core import HiermetricError
from hiermetric.files import alone
from hiermetric.running.formats import FORMATS
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def predict(tmp_path, monkeypatch):
    for i in range(2):
        picture(tmp_path / 'in' / f'{i}.png', i)
    run = predicts(
        monkeypatch,
        tiny_predictor(tmp_path / 'tiny', Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}), ['cod', 'eel']),
    )
    return lambda: run('in', '--out', 'out/t.csv', at=tmp_path)


HOLD = (
    'import os, sys, time\nfrom filelock import FileLock\nlock = FileLock(sys.argv[1]); lock.acquire()\n'
    'open(sys.argv[1], "w").write(str(os.getpid()))\nprint(flush=True)\ntime.sleep(60)'
)


def test_the_second_is_told_and_the_dead_block_nobody(tmp_path, predict):
    (tmp_path / 'out').mkdir()
    other = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path / 'out' / '.t.csv.lock')], stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        r = predict()
        assert (
            r.code == 1
            and r.err
            == f'Error: out/t.csv is being written by another run (process {other.pid}); wait until that has ended, '
            'or choose another place.\n'
        )
        assert [o.name for o in (tmp_path / 'out').iterdir()] == ['.t.csv.lock']  # nothing was touched
    finally:
        other.kill()
        other.wait()
    assert predict().code == 0 and FORMATS['csv']().read(tmp_path / 'out' / 't.csv')['image'].tolist() == [
        'in/0.png',
        'in/1.png',
    ]
    assert sorted(o.name for o in (tmp_path / 'out').iterdir()) == ['t.csv', 't.csv.json']


def test_a_run_that_fails_lets_go(tmp_path, predict):
    (tmp_path / 'in' / 'torn.png').write_bytes(b'torn')
    for _ in range(2):
        assert predict().code == 1 and not (tmp_path / 'out' / '.t.csv.lock').exists()


def test_never_two_at_a_time(tmp_path):
    "Six processes that come and go: whoever is inside is alone, also while the lock's file is taken away"

    def visits(seed):
        rng = random.Random(seed)
        for _ in range(25):
            try:
                with alone(tmp_path / 't.csv'):
                    os.close(os.open(tmp_path / 'inside', os.O_CREAT | os.O_EXCL))
                    time.sleep(rng.random() / 500)
                    os.unlink(tmp_path / 'inside')
                    with open(tmp_path / 'count', 'a') as f:
                        f.write('x')
            except HiermetricError:
                pass
            time.sleep(rng.random() / 500)

    children = []
    for seed in range(6):
        if not (pid := os.fork()):
            try:
                visits(seed)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(o, 0)[1] for o in children] == [0] * 6
    assert len((tmp_path / 'count').read_text()) >= 6 and not (tmp_path / '.t.csv.lock').exists()


@pytest.mark.long
def test_two_commands_at_once(tmp_path):
    "As a user would by mistake: one answers, the other says why not"
    for c in ('cod', 'eel'):
        for i in range(40):
            picture(tmp_path / 'zoo' / 'fish' / c / f'{i}.png', i)
    app = 'from hiermetric.running.cli import app; app(prog_name="hiermetric")'
    command = lambda *a: [sys.executable, '-c', app, *a]
    env = os.environ | {'HIERMETRIC_CACHE': str(tmp_path / 'cache'), 'NO_COLOR': '1', 'TERM': 'dumb'}
    subprocess.run(
        command('train', '--data', 'zoo', '--size', '32', '--epochs', '1', '--device', 'cpu', '--out', 'run'),
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
    )
    both = [
        subprocess.Popen(
            command('predict', 'zoo', '--model', 'run', '--out', 'a.csv'),
            cwd=tmp_path,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [o.communicate()[1] for o in both]
    assert sorted(o.returncode for o in both) == [0, 1] and any(
        f'another run (process {both[0].pid})' in o or f'another run (process {both[1].pid})' in o for o in said
    ), said
    images = FORMATS['csv']().read(tmp_path / 'a.csv')['image'].tolist()
    assert len(images) == len(set(images)) == 80
    assert not [o for o in Path(tmp_path).iterdir() if o.name.startswith('.')]
