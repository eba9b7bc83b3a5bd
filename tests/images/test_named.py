"The named data sets in every layout, their downloads, and what their errors say."

import functools, hashlib, http.server, io, os, tarfile, threading, zipfile
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image
import hiermetric.images.named as D
from hiermetric.core import data_dir
from hiermetric.images.named import load_dataset
from hiermetric.trees.taxonomy import Taxonomy
from toys import message, touch

TREE = Taxonomy.from_paths(
    {
        'bee': 'Animalia/Insecta',
        'ant': 'Animalia/Insecta',
        'gnat': 'Animalia/Insecta',
        'cod': 'Animalia/Pisces',
        'eel': 'Animalia/Pisces',
    }
)


def needs(name):
    return pytest.mark.skipif(
        not (data_dir() / name).is_file(), reason=f'{name} is not in HIERMETRIC_DATA ({data_dir()})'
    )


@pytest.fixture
def places(tmp_path, monkeypatch):
    "An empty data folder and an empty cache"
    monkeypatch.setenv('HIERMETRIC_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('HIERMETRIC_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'data').mkdir()
    return tmp_path


def test_messages(tmp_path):
    d = touch(tmp_path / 'set', 'bee/1.jpg', 'wsap/1.jpg', 'zebra/1.jpg')
    assert message(load_dataset, tmp_path / 'sett').endswith(
        "sett' is neither a data set (synthetic-taxa, tiny-imagenet, planktonset, cifar-100) nor a folder. Did "
        "you mean 'set'?"
    )
    assert (
        message(load_dataset, d, TREE)
        == f"Class 'wsap' (and 1 more: 'zebra') is not in the taxonomy; it is the class of {d}/wsap/1.jpg (2 images "
        "in all). Add it to the taxonomy or rename its folder."
    )
    assert message(load_dataset, d, Taxonomy.from_paths({'bee': 'I', 'wasp': 'I', 'zebra': 'M'})).endswith(
        "Add it to the taxonomy or rename its folder. Did you mean 'wasp'?"
    )
    (tmp_path / 'empty').mkdir()
    assert message(load_dataset, tmp_path / 'empty').startswith(
        f'There is no image in {tmp_path}/empty: it should hold one folder a class, with .bmp, '
    )
    assert (
        message(load_dataset, touch(tmp_path / 'flat', '1.jpg'))
        == f'The images in {tmp_path}/flat lie beside each other; put them into one folder a class.'
    )
    twice = touch(tmp_path / 'twice', 'north/bee/1.jpg', 'south/bee/2.jpg')
    assert (
        message(load_dataset, twice, TREE)
        == "Class 'bee' is in two places, north/bee and south/bee; if that is one class, put its images together, "
        "and if these are two, rename one or give the taxonomy both."
    )
    assert (
        message(load_dataset, d, TREE, val=0.6, test=0.4)
        == 'The shares val=0.6 and test=0.4 leave nothing to train on; they are fractions whose sum is below 1.'
    )
    assert (
        message(load_dataset, d, held_out='bea')
        == "Class 'bea' cannot be held out: set has no images of it. Did you mean 'bee' or 'zebra'?"
    )
    assert (
        message(load_dataset, 'tiny-imagenet', root=tmp_path / 'nowhere')
        == f'There is no {tmp_path}/nowhere; give the folder that holds tiny-imagenet-200.zip.'
    )
    assert (
        message(load_dataset, 'tiny-imagenet', root=d)
        == f'{d} does not hold Tiny-ImageNet: there is no wnids.txt in it. It should be what tiny-imagenet-200.zip '
        'unpacks to.'
    )


def archive(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z:
            for k, v in files.items():
                z.writestr(k, v)
    else:
        with tarfile.open(path, 'w:gz') as t:
            for k, v in files.items():
                info = tarfile.TarInfo(k)
                info.size = len(v)
                t.addfile(info, io.BytesIO(v))
    return path


TINY = {
    'tiny-imagenet-200/wnids.txt': b'n01443537\nn02012849\n',
    'tiny-imagenet-200/val/val_annotations.txt': b'val_0.JPEG\tn02012849\t0\t0\t9\t9\n'
    b'val_7.JPEG\tn01443537\t0\t0\t9\t9\n',
    'tiny-imagenet-200/val/images/val_0.JPEG': b'',
    **{f'tiny-imagenet-200/train/{w}/images/{w}_{i}.JPEG': b'' for w in ('n01443537', 'n02012849') for i in range(10)},
    'tiny-imagenet-200/test/images/test_0.JPEG': b'',
}


def test_tiny_imagenet_is_unpacked_once(places):
    archive(places / 'data' / 'tiny-imagenet-200.zip', TINY)
    table = load_dataset('tiny-imagenet')
    assert table.samples['split'].value_counts().to_dict() == {'train': 18, 'val': 2, 'test': 1}
    assert set(table.samples['class']) == set(table.taxonomy.leaf_names) == {'goldfish', 'crane (5)'}
    stamp = table.root.stat().st_mtime_ns
    assert load_dataset('tiny-imagenet').root == table.root and table.root.stat().st_mtime_ns == stamp
    assert table.root.is_relative_to(places / 'cache') and [o.name for o in (places / 'data').iterdir()] == [
        'tiny-imagenet-200.zip'
    ]  # the data folder may be read-only
    for root in (places / 'data', places / 'data' / 'tiny-imagenet-200.zip', table.root, table.root.parent):
        assert load_dataset('tiny-imagenet', root=root).fingerprint == table.fingerprint
    archive(
        places / 'data' / 'tiny-imagenet-200.zip', {k: v for k, v in TINY.items() if '_9' not in k}
    )  # another archive under that name
    assert len(load_dataset('tiny-imagenet')) == len(table) - 2


@pytest.mark.parametrize(
    'name, files',
    [
        (
            '127422.2.3.tar.gz',
            {
                **{
                    f'0127422/2.3/data/0-data/FINAL_Plankton_Segments_12082014/{c}/{i}.jpg': b''
                    for c in ('acantharia_protist', 'amphipods', 'artifacts')
                    for i in range(4)
                },
                '0127422/2.3/data/0-data/FINAL_Plankton_Segments_12082014/._amphipods': b'',
                '0127422/2.3/about/0127422_map.jpg': b'',
            },
        ),
        (
            'planktonset-1.0.zip',
            {f'train/{c}/{i}.jpg': b'' for c in ('acantharia_protist', 'amphipods', 'artifacts') for i in range(4)},
        ),
    ],
)
def test_planktonset_layouts(places, name, files):
    archive(places / 'data' / name, files)
    table = load_dataset('planktonset')
    assert (
        len(table) == 12
        and table.fill == 'white'
        and set(table.taxonomy.leaf_names) == {'acantharia_protist', 'amphipods', 'artifacts'}
    )
    assert table.samples['split'].value_counts().to_dict() == {'train': 6, 'val': 3, 'test': 3}
    assert load_dataset('planktonset', keep_empty=True).taxonomy.n_leaves == 121


def cifar_binary(n=40, classes=('apple', 'aquarium_fish', 'baby')):
    rng = np.random.default_rng(0)
    out = {
        'cifar-100-binary/fine_label_names.txt': '\n'.join(classes).encode(),
        'cifar-100-binary/coarse_label_names.txt': b'x',
    }
    for split in 'train', 'test':
        out[f'cifar-100-binary/{split}.bin'] = np.concatenate(
            [
                np.zeros((n, 1), np.uint8),
                (np.arange(n) % len(classes))[:, None].astype(np.uint8),
                rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            ],
            1,
        ).tobytes()
    return out


def test_cifar_binary(places):
    files = cifar_binary()
    archive(places / 'data' / 'cifar-100-binary.tar.gz', files)
    table = load_dataset('cifar-100')
    assert table.summary()['images'].to_dict() == {'train': 37, 'val': 3, 'test': 40, 'all': 80}
    raw = np.frombuffer(files['cifar-100-binary/test.bin'], np.uint8).reshape(-1, 3074)
    for path, c in table.samples.loc[table.samples['split'] == 'test', ['path', 'class']].values:
        row = raw[int(Path(path).stem)]
        image = np.asarray(Image.open(path))
        assert c == ('apple', 'aquarium_fish', 'baby')[row[1]]
        for y, x, channel in ((0, 0, 0), (3, 17, 1), (31, 30, 2)):
            assert image[y, x, channel] == row[2 + 1024 * channel + 32 * y + x]
    assert load_dataset('cifar-100').fingerprint == table.fingerprint


@pytest.mark.parametrize(
    'change, said',
    [
        (
            lambda f: f.update({'cifar-100-binary/train.bin': f['cifar-100-binary/train.bin'][:-1]}),
            '122959 bytes are no whole number of records of 3074. Delete it and fetch the archive again.',
        ),
        (
            lambda f: f.update({'cifar-100-binary/fine_label_names.txt': b'apple\n'}),
            'has label 2, but there are 1 names in fine_label_names.txt; fetch the archive again.',
        ),
        (
            lambda f: f.pop('cifar-100-binary/test.bin'),
            'cifar-100-binary has no test.bin; delete the folder and fetch the archive again.',
        ),
    ],
)
def test_cifar_damaged(places, change, said):
    files = cifar_binary()
    change(files)
    archive(places / 'data' / 'cifar-100-binary.tar.gz', files)
    assert said in message(load_dataset, 'cifar-100')
    assert not list((places / 'cache' / 'datasets').glob('*png*'))  # nothing half-converted is left


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a):
        pass


@pytest.fixture
def server(tmp_path):
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path / 'srv'))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{srv.server_port}'
    srv.shutdown()
    srv.server_close()


@pytest.mark.parametrize(
    'name, source, file, files',
    [
        ('tiny-imagenet', 'TINY_IMAGENET', 'tiny-imagenet-200.zip', TINY),
        ('cifar-100', 'CIFAR_100', 'cifar-100-binary.tar.gz', cifar_binary()),
        (
            'planktonset',
            'PLANKTONSET',
            '127422.2.3.tar.gz',
            {f'0127422/2.3/data/0-data/FINAL_Plankton_Segments_12082014/amphipods/{i}.jpg': b'' for i in range(3)},
        ),
    ],
)
def test_download(places, server, monkeypatch, name, source, file, files):
    made = archive(places / 'srv' / file, files)
    old = getattr(D, source)
    monkeypatch.setattr(
        D,
        source,
        replace(
            old, url=f'{server}/{file}', checksum=old.checksum and f'md5:{hashlib.md5(made.read_bytes()).hexdigest()}'
        ),
    )
    assert old.archives[-1] == file == old.url.rsplit('/', 1)[1]
    table = load_dataset(name)
    assert len(table) and table.root.is_relative_to(places / 'cache')
    made.unlink()
    assert load_dataset(name).fingerprint == table.fingerprint  # no second download


def test_download_that_arrives_wrong(places, server, monkeypatch):
    archive(places / 'srv' / 'tiny-imagenet-200.zip', TINY)
    monkeypatch.setattr(D, 'TINY_IMAGENET', replace(D.TINY_IMAGENET, url=f'{server}/tiny-imagenet-200.zip'))
    said = message(load_dataset, 'tiny-imagenet')
    assert 'instead of 90528d7ca1a48142e341f4ef8d21d0de; it was thrown away. Try again.' in said and said.endswith(
        f"Fetch it yourself and put it at {places / 'cache' / 'data' / 'tiny-imagenet-200.zip'}."
    )
    assert not [o for o in (places / 'cache').rglob('*') if o.is_file()]


def test_download_without_a_network(places, monkeypatch):
    monkeypatch.setattr(D, 'PLANKTONSET', replace(D.PLANKTONSET, url='http://127.0.0.1:9/127422.2.3.tar.gz'))
    said = message(load_dataset, 'planktonset')
    assert said.startswith('Could not download http://127.0.0.1:9/127422.2.3.tar.gz (') and said.endswith(
        f"Fetch it yourself and put it at {places / 'cache' / 'data' / '127422.2.3.tar.gz'}."
    )


def test_truncated_archive(places):
    whole = archive(places / 'data' / '127422.2.3.tar.gz', {f'a/amphipods/{i}.jpg': os.urandom(5000) for i in range(9)})
    whole.write_bytes(whole.read_bytes()[:20_000])
    assert 'is damaged or unsafe' in message(load_dataset, 'planktonset')


@needs('planktonset-1.0.zip')
def test_real_planktonset():
    table = load_dataset('planktonset')
    n = table.summary()
    assert n.loc['all', 'classes'] == n.loc['train', 'classes'] == n.loc['test', 'classes'] == table.taxonomy.n_leaves
    assert (
        abs(n.loc['test', 'images'] / len(table) - 0.2) < 0.01 and abs(n.loc['val', 'images'] / len(table) - 0.1) < 0.01
    )
    chained = load_dataset('planktonset', contract=True).taxonomy
    assert not (np.bincount(chained.parents[1:])[1:] == 1).any() and chained == table.taxonomy.prune()
    above = {o for i in table.taxonomy.leaves for o in table.taxonomy.path(i).split('/')[1:-1]}
    assert (
        len(table.taxonomy) - len(chained) >= 22
        and {'Mollusca', 'Annelida', 'Polychaeta', 'Amphipoda', 'Bacteria'} <= above
    )
    split = table.samples.set_index(table.samples['path'].map(lambda o: Path(o).name))['split']
    if len(table) == 22617:
        assert split[['100224.jpg', '101165.jpg', '101232.jpg', '101260.jpg', '101358.jpg']].tolist() == [
            'train',
            'train',
            'train',
            'test',
            'train',
        ]


@needs('tiny-imagenet-200.zip')
def test_real_tiny_imagenet():
    table = load_dataset('tiny-imagenet')
    assert table.samples['class'].nunique() == table.taxonomy.n_leaves == 200
    per = pd.crosstab(table.samples['class'], table.samples['split'])
    assert (per['val'] * 9 == per['train']).all() and per['test'].nunique() == 1
    assert all(('/val/' in p) == (s == 'test') for p, s in zip(table.samples['path'], table.samples['split']))


@needs('cifar-100-images.zip')
def test_real_cifar():
    table = load_dataset('cifar-100')
    assert table.taxonomy.n_leaves == 100 and table.taxonomy.height == 2 and len(table.taxonomy) == 121
    assert (table.samples['split'] == 'test').sum() == sum('/test/' in o for o in table.samples['path'])
