import os, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('WANDB_MODE', 'offline')

@pytest.fixture(scope='module')
def one_thread():
    "Small networks gain nothing from more, and on a busy machine threads that wait for each other cost minutes"
    import torch
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
