import os, shutil, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('WANDB_MODE', 'offline')


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: the long form of a random test; run with -m long')


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[o for o in items if o.get_closest_marker('long')])
    items[:] = [o for o in items if not o.get_closest_marker('long')]


@pytest.fixture(scope='module')
def one_thread():
    "Small networks gain nothing from more, and on a busy machine threads that wait for each other cost minutes"
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_page(tmp_path, monkeypatch):
    "Runs a page of nbs/results in its quick profile, in a copy; gives what it said, and its error outputs"

    def run(name, timeout=600):
        import execute_nbs, nbformat

        monkeypatch.setenv('HIERMETRIC_PROFILE', 'quick')
        nbs = Path(__file__).resolve().parent.parent / 'nbs'
        copy = Path(shutil.copy(nbs / 'results' / f'{name}.ipynb', tmp_path))
        shutil.copytree(nbs / 'configs', tmp_path / 'configs')
        execute_nbs.run(copy, ['data'], timeout=timeout)
        outputs = [o for c in nbformat.read(copy, 4).cells if c.cell_type == 'code' for o in c.outputs]
        return '\n'.join(str(o.get('text', '')) + str(o.get('data', {}).get('text/plain', '')) for o in outputs), [
            o for o in outputs if o.output_type == 'error'
        ]

    return run
