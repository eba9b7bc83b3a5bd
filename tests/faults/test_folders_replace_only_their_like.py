"What somebody else wrote is neither replaced nor written over, wherever a folder is named for what comes out."

import os, subprocess
import numpy as np
import pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.running.comparison import compare
from hiermetric.heads.model import Model
from hiermetric.running.predictor import Predictor
from hiermetric.similarity.index import Index
from hiermetric.similarity.protocol import unseen_protocol
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.images.features import toy_features
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures('one_thread')
TREE = Taxonomy.from_paths([('an', 'mam', 'cat'), ('an', 'mam', 'dog'), ('an', 'bird', 'owl'), ('pl', 'oak')])
TOY = toy_features(TREE, per_leaf=12, dim=8)
MODEL = fit(TOY, 'classifier', epochs=1, embed_dim=4, device='cpu').model
INDEX = Index(np.random.default_rng(0).normal(size=(60, 4)).astype('f4'), np.repeat(TREE.leaves, 15), TREE)
X = torch.randn(60, 4)
PROTOCOL = unseen_protocol((X, X), (X, X), np.repeat(TREE.leaves, 15), np.repeat(TREE.leaves, 15), TREE, ['cat'])
REPORT = compare(TOY, ['classifier'], 1, ['argmax'], yardstick=False, epochs=1, embed_dim=4, device='cpu', draws=20)

WHOLE = {
    'features': TOY.save,
    'model': MODEL.save,
    'index': INDEX.save,
    'predictor': Predictor.from_model(MODEL, TOY).save_pretrained,
}  # replaced as a whole
BY_FILE = {  # written into, file by file: what writes, and a name that it writes
    'run': (lambda p: fit(TOY, 'classifier', epochs=1, embed_dim=4, device='cpu', out=p), 'history.csv'),
    'comparison': (
        lambda p: compare(
            TOY, ['classifier'], 1, ['argmax'], yardstick=False, epochs=1, embed_dim=4, device='cpu', draws=20, out=p
        ),
        'table.csv',
    ),
    'report': (REPORT.save, 'summary.csv'),
    'protocol': (PROTOCOL.save, 'hits.csv'),
}


def content(folder):
    return {str(o.relative_to(folder)): o.read_bytes() for o in folder.rglob('*') if o.is_file()}


@pytest.fixture
def photos(tmp_path):
    for i in range(3):
        (tmp_path / 'photos' / 'cat').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'photos' / 'cat' / f'{i}.jpg').write_text(str(i))
    return tmp_path / 'photos'


@pytest.mark.parametrize('kind', WHOLE)
def test_a_folder_of_other_things_is_not_replaced(kind, photos, monkeypatch):
    before = content(photos)
    with pytest.raises(HiermetricError, match=r'photos exists and holds no \w.*Choose another folder'):
        WHOLE[kind](photos)
    (photos / 'config.json').write_text('{}')
    before = content(photos)  # of another program
    with pytest.raises(HiermetricError, match='exists and holds no'):
        WHOLE[kind](photos)
    assert content(photos) == before and os.listdir(photos.parent) == ['photos']
    file = photos / 'cat' / '0.jpg'
    with pytest.raises(HiermetricError, match='is a file'):
        WHOLE[kind](file)
    assert file.read_text() == '0'
    monkeypatch.chdir(photos / 'cat')
    for here in ('.', '..', photos):
        with pytest.raises(HiermetricError, match='the folder you are in, or one above it'):
            WHOLE[kind](here)
    assert content(photos) == before


@pytest.mark.parametrize('kind', WHOLE)
def test_its_like_is_replaced_and_what_lies_beside_it_stays(kind, tmp_path):
    for other, write in WHOLE.items():  # of another kind
        write(tmp_path / other)
        if {kind, other} not in ({'model', 'predictor'}, {kind}):
            with pytest.raises(HiermetricError, match='exists and holds no'):
                WHOLE[kind](tmp_path / other)
    at = tmp_path / kind
    (at / 'notes').mkdir()
    (at / 'notes' / 'a.txt').write_text('precious')
    (at / '.git').mkdir()
    inode = (at / 'notes' / 'a.txt').stat().st_ino
    was = content(at)
    WHOLE[kind](at)
    assert (
        set(content(at)) == set(was)
        and (at / 'notes' / 'a.txt').stat().st_ino == inode
        and (at / '.git').is_dir()
        and not [o for o in os.listdir(at) if o.endswith(('.new', '.part', '.old'))]
    )
    (tmp_path / 'empty').mkdir()
    WHOLE[kind](tmp_path / 'empty')
    (tmp_path / 'link').symlink_to(tmp_path / 'empty')
    WHOLE[kind](tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink() and set(content(tmp_path / 'empty')) == set(was) - {'notes/a.txt'}


def test_a_model_replaces_a_predictor_whole(tmp_path):
    WHOLE['predictor'](tmp_path / 'm')
    (tmp_path / 'm' / 'mine.txt').touch()
    WHOLE['model'](tmp_path / 'm')
    assert 'calibration.safetensors' not in os.listdir(tmp_path / 'm') and (tmp_path / 'm' / 'mine.txt').exists()
    Model.load(tmp_path / 'm')


@pytest.mark.parametrize('kind', BY_FILE)
def test_no_file_of_others_is_written_over(kind, photos, monkeypatch):
    write, name = BY_FILE[kind]
    (photos / name).write_text('mine')
    before = content(photos)
    with pytest.raises(HiermetricError, match=f'holds a {name} that hiermetric did not write'):
        write(photos)
    with pytest.raises(HiermetricError, match='is a file'):
        write(photos / name)
    monkeypatch.chdir(photos)
    with pytest.raises(HiermetricError, match='the folder you are in'):
        write('.')
    assert content(photos) == before
    monkeypatch.chdir('/')
    (photos / name).unlink()
    write(photos)
    write(photos)  # nothing in the way: written beside what is there, and again
    assert (photos / name).exists() and (photos / 'cat' / '2.jpg').read_text() == '2'


def test_the_command_line_says_so(photos, monkeypatch):
    from hiermetric.running.cli import app

    before = content(photos)
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr('hiermetric.running.cli.features_of', lambda *a, **k: TOY)
    for out, says in (('photos', 'exists and holds no set of features'), ('.', 'the folder you are in')):
        found = CliRunner().invoke(app, ['features', '--out', out])
        assert found.exit_code == 1 and says in ' '.join(found.output.split())
    assert content(photos) == before


# places that cannot step aside


@pytest.fixture
def volume(tmp_path):
    (tmp_path / 'volume').mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', tmp_path / 'volume'], capture_output=True
        ).returncode
    ):
        pytest.skip('nothing can be mounted here')
    yield tmp_path / 'volume'
    subprocess.run(['umount', '-l', tmp_path / 'volume'], check=True)


@pytest.mark.parametrize('kind', WHOLE)
def test_a_mount_point_is_written_and_replaced(kind, volume):
    for _ in range(3):
        WHOLE[kind](volume)
    plain = volume.parent / 'plain'
    WHOLE[kind](plain)
    assert set(content(volume)) == set(content(plain)) and sorted(os.listdir(volume.parent)) == ['plain', 'volume']


def test_a_mount_point_survives_a_kill_before_every_step(volume):
    from test_folders_survive_a_kill import KEPT, moments

    write, read = KEPT['features']
    both = []
    for i in (1, 0):
        write(volume, i)
        both.append(read(volume))
    for n in moments(lambda: write(volume, 1)):
        assert read(volume) in both, f'lost after step {n}'
    assert read(volume) == both[0]
    write(volume, 0)
    assert set(os.listdir(volume)) == {'SHA256SUMS', 'x.npy', 'targets.npy', 'split.npy', 'meta.json', 'taxonomy.npz'}


@pytest.mark.parametrize('kind', ['index'])
def test_a_folder_whose_parent_may_not_be_written(kind, tmp_path, monkeypatch):
    at = tmp_path / 'shared' / 'it'
    WHOLE[kind](at)
    access, rename = os.access, os.rename
    monkeypatch.setattr(os, 'access', lambda p, m: False if str(p) == str(at.parent) else access(p, m))
    WHOLE[kind](at)
    Index.load(at)
    assert os.listdir(at.parent) == ['it']


def test_a_device_is_no_file():
    from hiermetric.files import atomic_path

    with pytest.raises(HiermetricError, match='device or a pipe'):
        with atomic_path(os.devnull) as tmp:
            tmp.touch()


@pytest.mark.parametrize('kind', [*WHOLE, *BY_FILE])
def test_a_tilde_is_the_home(kind, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    (WHOLE | {k: o[0] for k, o in BY_FILE.items()})[kind]('~/it')
    assert os.listdir(tmp_path) == ['home'] and os.listdir(tmp_path / 'home') == ['it']
