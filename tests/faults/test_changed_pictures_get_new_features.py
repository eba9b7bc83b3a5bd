"""Features and pixels are those of the images' contents: a replaced image gets new ones, a touched or copied one keeps
its own, and a complete cache is only read."""

import os, shutil, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
import hiermetric.images.engines as he, hiermetric.images.features as hf, hiermetric.images.folders as ho
from hiermetric.images.backbones import Transform
from hiermetric.core import HiermetricError
from hiermetric.images.table import ImageTable
from hiermetric.images.features import extract
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.sources import decode_split
from toys import toy_backbone

pytestmark = pytest.mark.usefixtures('one_thread')
KW = dict(engine='eager', batch_size=4, block=4, progress=False, workers=1)
LONG_AGO = 10**18


@pytest.fixture(scope='module')
def backbone():
    return toy_backbone()


def draw(path, seed, **kw):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path, **kw)


def age(table, by=0):
    "Dates of a data set that has lain there for years"
    for p in table.samples['path']:
        os.utime(p, ns=(LONG_AGO + by, LONG_AGO + by))


def table_in(folder, kind='bmp', n=12):
    "Uncompressed pictures, all of one size in bytes"
    folder = Path(folder)
    folder.mkdir(parents=True)
    for i in range(n):
        draw(folder / f'{i:02}.{kind}', i)
    samples = pd.DataFrame(
        {
            'path': [str(folder / f'{i:02}.{kind}') for i in range(n)],
            'class': ['cod', 'eel'] * (n // 2),
            'split': ['train', 'train', 'val', 'test'] * (n // 4),
        }
    )
    return ImageTable(samples, Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}), 'toy', folder, 'white')


@pytest.fixture
def settled(monkeypatch):
    "As if every file had been written long ago: stamps that are not too young to be trusted"
    now = time.time_ns
    monkeypatch.setattr(ho.time, 'time_ns', lambda: now() + 10**11)


@pytest.fixture
def reads(monkeypatch):
    "Files whose contents are hashed, and images that are decoded"
    seen = {'hashed': [], 'decoded': []}
    digest, decode = ho._digest, he.decode_picture
    monkeypatch.setattr(ho, '_digest', lambda p: (seen['hashed'].append(p), digest(p))[1])
    for o in (he, hf):
        monkeypatch.setattr(o, 'decode_picture', lambda p, *a: (seen['decoded'].append(p), decode(p, *a))[1])
    return seen


@pytest.mark.parametrize('kind', ['bmp', 'ppm', 'tif'])
@pytest.mark.parametrize('same_date', [False, True])
def test_a_replaced_image_of_the_same_size_gets_new_features(tmp_path, backbone, kind, same_date, settled):
    table = table_in(tmp_path / 'img', kind)
    age(table)
    old = np.array(extract(table, backbone, cache=tmp_path / 'c', **KW).x)
    p = Path(table.samples['path'][5])
    size = p.stat().st_size
    draw(p, 99)
    if same_date:
        os.utime(p, ns=(LONG_AGO, LONG_AGO))
    assert p.stat().st_size == size
    new = extract(table, backbone, cache=tmp_path / 'c', **KW)
    want = extract(table, backbone, cache=tmp_path / 'fresh', **KW)
    assert np.array_equal(new.x, want.x) and new.meta['key'] == want.meta['key']
    assert np.flatnonzero((new.x != old).any(1)).tolist() == [5]


def test_replaced_at_once_is_seen_too(tmp_path, backbone):
    "The clock of the file system may not have ticked between"
    table = table_in(tmp_path / 'img')
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    p = Path(table.samples['path'][0])
    stamp = ho._stamp(str(p))
    draw(p, 99)
    real = ho._stamp
    ho._stamp = lambda o: stamp if o == str(p) else real(o)
    try:
        assert extract(table, backbone, cache=tmp_path / 'c', **KW).meta['key'] != first.meta['key']
    finally:
        ho._stamp = real


def test_what_was_read_before_keeps_its_numbers(tmp_path, backbone):
    table = table_in(tmp_path / 'img')
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    x = np.array(first.x)
    draw(table.samples['path'][0], 99)
    extract(table, backbone, cache=tmp_path / 'c', **KW)
    assert np.array_equal(first.x, x)  # a memory map, and nobody has written to it
    draw(table.samples['path'][0], 0)
    assert extract(table, backbone, cache=tmp_path / 'c', **KW).meta['key'] == first.meta['key']  # and back


def test_what_did_not_change_is_not_read(tmp_path, backbone, settled, reads):
    table = table_in(tmp_path / 'img')
    age(table)
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    assert len(reads['hashed']) == len(reads['decoded']) == 12
    other = toy_backbone(48)
    extract(table, other, cache=tmp_path / 'c', **KW)
    assert len(reads['hashed']) == 12  # another network, the same files
    again = extract(table, backbone, cache=tmp_path / 'c', **KW)
    assert again.fingerprint == first.fingerprint and len(reads['hashed']) == 12 and len(reads['decoded']) == 24


def test_touched_and_copied_images_keep_their_features(tmp_path, backbone, settled, reads):
    table = table_in(tmp_path / 'img')
    age(table)
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    os.utime(table.samples['path'][3])
    reads['hashed'].clear()
    reads['decoded'].clear()
    assert extract(table, backbone, cache=tmp_path / 'c', **KW).fingerprint == first.fingerprint
    assert reads == {'hashed': [table.samples['path'][3]], 'decoded': []}
    shutil.copytree(tmp_path / 'img', tmp_path / 'elsewhere' / 'img', copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / 'c', tmp_path / 'there')  # another machine
    moved = ImageTable(
        table.samples.assign(path=[o.replace('/img/', '/elsewhere/img/') for o in table.samples['path']]),
        table.taxonomy,
        'toy',
        tmp_path / 'elsewhere' / 'img',
        'white',
    )
    shutil.rmtree(tmp_path / 'img')
    reads['hashed'].clear()
    there = extract(moved, backbone, cache=tmp_path / 'there', **KW)
    assert (
        there.fingerprint == first.fingerprint
        and there.meta['key'] == first.meta['key']
        and len(reads['hashed']) == 12
        and not reads['decoded']
    )


@pytest.mark.parametrize('row', [1, 10])
def test_the_second_half_notices_a_change_since_the_first(tmp_path, backbone, monkeypatch, row):
    table = table_in(tmp_path / 'img')
    place, n = hf._record, 0

    class Cut(Exception):
        pass

    def stop(*a):
        nonlocal n
        n += 1
        if n == 8:
            raise Cut
        return decode(*a)

    decode = he.decode_picture
    monkeypatch.setattr(he, 'decode_picture', stop)
    with pytest.raises(Cut):
        extract(table, backbone, cache=tmp_path / 'c', **KW | dict(batch_size=1))
    monkeypatch.setattr(he, 'decode_picture', decode)
    assert 0 < place(next((tmp_path / 'c').glob('toy-*/progress.json')).parent)['done'] < 12
    draw(table.samples['path'][row], 99)
    assert np.array_equal(
        extract(table, backbone, cache=tmp_path / 'c', **KW).x,
        extract(table, backbone, cache=tmp_path / 'fresh', **KW).x,
    )


def test_a_change_while_features_are_made_stops_the_work(tmp_path, backbone, monkeypatch):
    table = table_in(tmp_path / 'img')
    p, decode = table.samples['path'][6], he.decode_picture

    def meddle(path, *a):
        if path == p:
            draw(p, 99)
        return decode(path, *a)

    monkeypatch.setattr(he, 'decode_picture', meddle)
    with pytest.raises(HiermetricError, match=r'06\.bmp was changed while it was being used; run again'):
        extract(table, backbone, cache=tmp_path / 'c', **KW)
    monkeypatch.setattr(he, 'decode_picture', decode)
    assert np.array_equal(
        extract(table, backbone, cache=tmp_path / 'c', **KW).x,
        extract(table, backbone, cache=tmp_path / 'fresh', **KW).x,
    )
    draw(p, 6)
    monkeypatch.setattr(he, 'decode_picture', lambda path, *a: (os.utime(path), decode(path, *a))[1])
    assert len(extract(table, backbone, cache=tmp_path / 'touched', **KW)) == 12  # only its date


def test_pixels_follow_contents_too(tmp_path, settled):
    table = table_in(tmp_path / 'img')
    age(table)
    how = Transform(16, fit='pad', fill='white')
    first = decode_split(table, 'train', how, cache=tmp_path / 'p')
    before = np.load(first / 'x.npy')
    os.utime(table.samples['path'][0])
    assert decode_split(table, 'train', how, cache=tmp_path / 'p') == first
    draw(table.samples['path'][1], 99)
    second = decode_split(table, 'train', how, cache=tmp_path / 'p')
    assert second != first and np.flatnonzero((np.load(second / 'x.npy') != before).any((1, 2, 3))).tolist() == [1]
    draw(table.samples['path'][2], 99)
    assert decode_split(table, 'train', how, cache=tmp_path / 'p') == second  # of another split


@pytest.fixture
def read_only(monkeypatch):
    "A folder in which nothing can be written from now on, as the system says it: root may write everywhere else"
    import builtins

    def lock(folder):
        inside = lambda p: isinstance(p, (str, Path)) and str(p).startswith(str(folder))

        def refuse(real, writes):
            def call(p, *a, **kw):
                if inside(p) and writes(*a, **kw):
                    raise OSError(30, 'Read-only file system', str(p))
                return real(p, *a, **kw)

            return call

        monkeypatch.setattr(
            os, 'open', refuse(os.open, lambda flags, *a, **kw: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        writes = lambda mode='r', *a, **kw: bool(set(mode) & set('wax+'))
        monkeypatch.setattr(builtins, 'open', refuse(open, writes))
        monkeypatch.setattr('io.open', builtins.open)
        for f in ('mkdir', 'unlink', 'rename', 'replace', 'rmdir'):
            monkeypatch.setattr(os, f, refuse(getattr(os, f), lambda *a, **kw: True))

    return lock


def test_a_complete_cache_is_used_where_nothing_can_be_written(tmp_path, backbone, read_only):
    table = table_in(tmp_path / 'img')
    how = Transform(16, fit='pad', fill='white')
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    pixels = decode_split(table, 'train', how, cache=tmp_path / 'p')
    for p in [*(tmp_path / 'c').glob('*.lock'), *(tmp_path / 'p').glob('*.lock')]:
        p.unlink()
    read_only(tmp_path / 'c')
    read_only(tmp_path / 'p')
    with pytest.raises(OSError):
        (tmp_path / 'c' / 'x').write_text('')
    assert (
        extract(table, backbone, cache=tmp_path / 'c', **KW).fingerprint == first.fingerprint
        and decode_split(table, 'train', how, cache=tmp_path / 'p') == pixels
    )
    draw(table.samples['path'][0], 99)
    for f in (
        lambda: extract(table, backbone, cache=tmp_path / 'c', **KW),
        lambda: decode_split(table, 'train', how, cache=tmp_path / 'p'),
    ):
        with pytest.raises(HiermetricError, match='is not complete and cannot be written .*Read-only.*cache='):
            f()


def test_unreadable_images_are_listed_where_nothing_can_be_written(tmp_path, backbone, read_only):
    table = table_in(tmp_path / 'img')
    Path(table.samples['path'][2]).write_bytes(b'no picture')
    assert len(extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW)) == 11
    read_only(tmp_path / 'c')
    assert len(extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW)) == 11
    with pytest.raises(HiermetricError, match=r'02\.bmp: cannot identify.*\(--skip-bad\)\.$'):
        extract(table, backbone, cache=tmp_path / 'c', **KW)


def test_names_with_dots_keep_their_lists_apart(tmp_path, backbone):
    table = table_in(tmp_path / 'img')
    Path(table.samples['path'][2]).write_bytes(b'')
    for name in ('Calanus sp.1', 'Calanus sp.2'):
        with pytest.raises(HiermetricError, match=f'{name}-[0-9a-f]+.unreadable.txt'):
            extract(
                ImageTable(table.samples, table.taxonomy, name, table.root, 'white'),
                backbone,
                cache=tmp_path / 'c',
                **KW,
            )
    assert len(list((tmp_path / 'c').glob('*.unreadable.txt'))) == 2


@pytest.mark.parametrize('name', ['x.npy', 'progress.json'])
@pytest.mark.parametrize(
    'harm',
    [
        lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:],
        lambda b: b[: len(b) // 2],
        lambda b: b'',
        lambda b: b'\x93' + b[1:],
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, backbone, name, harm):
    t = table_in(tmp_path / 'data')
    f = extract(t, backbone, cache=tmp_path / 'cache', **KW)
    true, was, where = np.array(f.x), f.fingerprint, f.meta['folder']
    del f
    file = Path(where) / name
    file.write_bytes(harm(file.read_bytes()))  # a file that is mapped must not shrink
    g = extract(t, backbone, cache=tmp_path / 'cache', **KW)
    assert np.array_equal(g.x, true) and g.fingerprint == was and g.meta['folder'] == where
