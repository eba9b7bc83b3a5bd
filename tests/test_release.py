"What lies in release/ is whole, small enough to be in a repository, and as good on the test images as its page says."

from pathlib import Path
import pytest
from hiermetric.core import data_dir
from hiermetric.images.named import load_dataset
from hiermetric.running.predictor import Predictor

FOLDER = Path(__file__).parent.parent / 'release' / 'plankton'
pytestmark = pytest.mark.usefixtures('one_thread')


def test_fewer_than_20_megabytes():
    assert 0 < sum(o.stat().st_size for o in FOLDER.iterdir()) < 20e6


@pytest.mark.skipif(
    not (data_dir() / 'planktonset-1.0.zip').is_file(), reason='planktonset-1.0.zip is not in HIERMETRIC_DATA'
)
def test_names_plankton():
    predictor, table = Predictor.from_pretrained(FOLDER), load_dataset('planktonset')
    some = table.samples.query('split == "test"').iloc[::18]
    said = predictor(some.path.tolist(), rule='argmax', engine='folded')
    assert {'Mollusca', 'Annelida', 'Polychaeta', 'Amphipoda', 'Bacteria'} <= set(predictor.taxonomy.names) and len(
        predictor.taxonomy
    ) == 182  # its tree is whole
    assert predictor.taxonomy.fingerprint == table.taxonomy.fingerprint and len(said) == len(some) > 200
    assert (
        said.answer.to_numpy() == some['class'].to_numpy()
    ).mean() > 0.7  # the page: 76 % of one view of all test images
