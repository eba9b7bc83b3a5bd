"""A bit that flips, a number that is edited, a file that comes from elsewhere: an error that names it, or the same
answers."""

import json, os, shutil
import numpy as np
import pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.images.features import Features
from hiermetric.running.predictor import Predictor
from hiermetric.similarity.index import Index
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.running.runs import load_run
from hiermetric.images.features import toy_features

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
TREE = Taxonomy.from_paths([('an', 'mam', 'cat'), ('an', 'mam', 'dog'), ('an', 'bird', 'owl'), ('pl', 'eud', 'oak')])
TOY = toy_features(TREE, per_leaf=12, dim=8)
MODEL = fit(TOY, 'arcface', epochs=1, embed_dim=4, device='cpu').model
PREDICTOR = Predictor.from_model(MODEL, TOY, ranks=['kingdom', 'class', 'species'])
ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype('f4')
INDEX = Index(ROWS, np.repeat(TREE.leaves, 10), TREE, ids=[f'{i}.jpg' for i in range(40)])
X = TOY.of('test')[0]


def answers(p):
    return p.ask(0.9)(*p.look(X)).to_csv()


READ = {  # name → (what writes, what reads, everything that it answers)
    'predictor': (
        PREDICTOR.save_pretrained,
        Predictor.from_pretrained,
        lambda p: (answers(p), p.fingerprint, p.taxonomy.rank_of.tolist()),
    ),
    'index': (
        INDEX.save,
        Index.load,
        lambda i: (
            i.search(ROWS[:9], 5).rows.tolist(),
            i.targets.tolist(),
            i.ids.tolist(),
            i.alive.tolist(),
            i.classify(ROWS[:9]).tolist(),
            i.taxonomy.fingerprint,
        ),
    ),
    'features': (TOY.save, Features.load, lambda f: (f.fingerprint, f.meta, str(f))),
}


def flips(kind, folder, n, seed):
    write, read, say = READ[kind]
    write(folder)
    true, rng, told = say(read(folder)), np.random.default_rng(seed), 0
    files = sorted(o for o in folder.iterdir() if o.name != 'README.md')
    for k in range(n):
        file = files[k % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        try:
            assert say(read(folder)) == true, f'{file.name} answers differently'
        except HiermetricError as e:
            told += 1
            assert str(folder) in str(e)
        file.write_bytes(good)
    assert say(read(folder)) == true
    return told


@pytest.mark.parametrize('kind', READ)
def test_a_flipped_bit_is_told(kind, tmp_path):
    assert flips(kind, tmp_path / 'it', 60, 0) > 50


@pytest.mark.long
@pytest.mark.parametrize('kind', READ)
def test_four_hundred_flipped_bits_are_told(kind, tmp_path):
    print(f"{kind}: {flips(kind, tmp_path / 'it', 400, 1)} of 400 told, the others answer alike")


def test_the_checksums_are_those_of_coreutils(tmp_path):
    import subprocess

    if not shutil.which('sha256sum'):
        pytest.skip('no sha256sum here')
    PREDICTOR.save_pretrained(tmp_path / 'it')
    said = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path / 'it', capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.count(': OK') == 4


def put(cfg, where, value):
    *path, last = where.split('.')
    for k in path:
        cfg = cfg[k]
    assert cfg.get(last) != value
    cfg[last] = value


EDITS = [
    ('head.s', 17.0),
    ('embedding.power', 0.6),
    ('head.m', 0.3),
    ('predictor.temperature', 3.0),
    # where ranks were before the tree kept them
    ('predictor.ranks', {'names': ['phylum', 'class', 'species'], 'of': (TREE.depths - 1).tolist()}),
    ('predictor.ranks', {'names': ['kingdom', 'class', 'species'], 'of': [-1, 1, 1, 2, 2, 2, 0, 1, 2, 2]}),
]


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize('where, value', EDITS)
def test_an_edited_setting_is_told(where, value, sealed, tmp_path):
    PREDICTOR.save_pretrained(tmp_path / 'it')
    file = tmp_path / 'it' / 'config.json'
    cfg = json.loads(file.read_text())
    put(cfg, where, value)
    file.write_text(json.dumps(cfg))
    if not sealed:
        (tmp_path / 'it' / 'SHA256SUMS').unlink()  # the fingerprint tells, too
    with pytest.raises(
        HiermetricError,
        match='config.json is not what was saved' if sealed else 'does not belong to its weights and settings',
    ):
        Predictor.from_pretrained(tmp_path / 'it')


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize('ranks', [['phylum', 'class', 'species'], [None, *'abcdefghi'][: len(TREE)]])
def test_an_edited_rank_is_told(ranks, sealed, tmp_path):
    "Ranks are no part of a tree's fingerprint, and of the predictor's"
    PREDICTOR.save_pretrained(tmp_path / 'it')
    TREE.with_ranks(ranks).save(tmp_path / 'it' / 'taxonomy.npz')
    if not sealed:
        (tmp_path / 'it' / 'SHA256SUMS').unlink()
    with pytest.raises(
        HiermetricError,
        match='taxonomy.npz is not what was saved' if sealed else 'does not belong to its weights and settings',
    ):
        Predictor.from_pretrained(tmp_path / 'it')


def test_a_fingerprint_covers_what_decides_an_answer():
    other = [Predictor.from_model(MODEL, TOY), Predictor.from_model(MODEL, TOY, ranks=['kingdom', 'order', 'species'])]
    prints = [o.fingerprint for o in (PREDICTOR, *other)]
    assert len(set(prints)) == 3
    MODEL.head.s += 1
    try:
        assert PREDICTOR.fingerprint not in prints
    finally:
        MODEL.head.s -= 1
    assert PREDICTOR.fingerprint == prints[0]


@pytest.mark.parametrize('kind', READ)
def test_a_file_of_elsewhere_is_told(kind, tmp_path):
    write, read, _ = READ[kind]
    write(tmp_path / 'it')
    extra = dict(predictor='more.safetensors', index='more.npy', features='paths.npy')[kind]
    shutil.copy(tmp_path / 'it' / 'taxonomy.npz', tmp_path / 'it' / extra)  # it was not saved with the others
    with pytest.raises(HiermetricError, match=f'{extra} is not what was saved'):
        read(tmp_path / 'it')
    (tmp_path / 'it' / extra).unlink()
    (tmp_path / 'it' / 'notes.txt').write_text('mine')
    (tmp_path / 'it' / 'README.md').write_text('edited')
    read(tmp_path / 'it')


def test_an_index_knows_its_own_tree(tmp_path):
    INDEX.save(tmp_path / 'it')
    Taxonomy.from_paths([('x', o) for o in 'abcdefghi']).save(tmp_path / 'it' / 'taxonomy.npz')
    with pytest.raises(HiermetricError, match='taxonomy.npz is not what was saved'):
        Index.load(tmp_path / 'it')
    (tmp_path / 'it' / 'SHA256SUMS').unlink()
    with pytest.raises(HiermetricError, match='is damaged .its tree is'):
        Index.load(tmp_path / 'it')


def test_a_folder_of_before_is_read(tmp_path):
    for write, read, say in READ.values():
        write(tmp_path / 'it')
        true = say(read(tmp_path / 'it'))
        (tmp_path / 'it' / 'SHA256SUMS').unlink()
        assert say(read(tmp_path / 'it')) == true
        shutil.rmtree(tmp_path / 'it')


# runs

SPOIL = [b'', b'{', b'[]', b'\x00\xff\xfe', b'{"settings": {}}', b'a,b\n1,2\n']


@pytest.mark.parametrize('name', ['run.json', 'history.csv'])
@pytest.mark.parametrize('spoilt', SPOIL)
def test_a_run_that_is_damaged_says_so(name, spoilt, tmp_path):
    run = fit(TOY, 'classifier', epochs=1, embed_dim=4, device='cpu', out=tmp_path)
    (tmp_path / name).write_bytes(spoilt)
    for again in (
        lambda: load_run(tmp_path, TREE),
        lambda: fit(TOY, 'classifier', epochs=1, embed_dim=4, device='cpu', out=tmp_path),
    ):
        with pytest.raises(HiermetricError, match='is damaged'):
            again()
    fit(TOY, 'classifier', epochs=1, embed_dim=4, device='cpu', out=tmp_path, resume=False)
    load_run(tmp_path, TREE)


@pytest.mark.parametrize(
    'spoil', [lambda b: b'', lambda b: b[: len(b) // 2], lambda b: b'{}', lambda b: b[:200] + bytes(200) + b[400:]]
)
def test_a_checkpoint_that_is_damaged_says_so(spoil, tmp_path):
    class Stop(Exception):
        pass

    def stop(row):
        if row['epoch']:
            raise Stop

    kw = dict(head='classifier', epochs=3, embed_dim=4, device='cpu', checkpoint_every=1, out=tmp_path)
    with pytest.raises(Stop):
        fit(TOY, **kw, log=(stop,))
    p = tmp_path / 'checkpoint.pt'
    p.write_bytes(spoil(p.read_bytes()))
    with pytest.raises(HiermetricError, match='checkpoint.pt is not a readable checkpoint .*delete it to start over'):
        fit(TOY, **kw)


def test_files_can_be_read_by_others(tmp_path):
    mask = os.umask(0o022)
    try:
        PREDICTOR.save_pretrained(tmp_path / 'it')
    finally:
        os.umask(mask)
    assert {oct(o.stat().st_mode & 0o777) for o in (tmp_path / 'it').iterdir()} == {'0o644'}


def test_weights_that_are_one_tensor_are_saved(tmp_path):
    import copy

    model = copy.deepcopy(MODEL)
    own = next(iter(model.embedding.parameters()))
    model.embedding.register_parameter('twin', own)
    assert model.state_dict()['embedding.twin'].data_ptr() == own.data_ptr()
    model.save(tmp_path / 'it')  # safetensors refuses them
    from safetensors.torch import load_file

    kept = load_file(tmp_path / 'it' / 'model.safetensors')
    assert torch.equal(kept['embedding.twin'], own)


def test_every_head_comes_back_with_its_fingerprint(tmp_path):
    from hiermetric.heads.contract import HEADS

    for head in HEADS:
        p = Predictor.from_model(fit(TOY, head, epochs=1, embed_dim=8, device='cpu').model, TOY)
        p.save_pretrained(tmp_path / head)
        q = Predictor.from_pretrained(tmp_path / head)
        assert q.fingerprint == p.fingerprint and torch.equal(q.look(X)[0], p.look(X)[0]), head
