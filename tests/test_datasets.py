"Image tables: splits, folders with mess in them, the named data sets, downloads, and the synthetic organisms."

import functools, hashlib, http.server, io, os, shutil, subprocess, sys, tarfile, threading, zipfile
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
import hiermetric.datasets as D
from hiermetric.core import data_dir
from hiermetric.datasets import load_dataset, split_counts, stratified_split
from hiermetric.taxonomy import Taxonomy, TaxonomyWarning
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


# --- splits


def test_split_is_what_the_hash_says():
    "Another implementation: hashlib and sorted, one class at a time"
    names = [f'd{i % 3}/{i}.jpg' for i in range(400)]
    classes = [f'c{i * i % 11}' for i in range(400)]
    want = {}
    for c in set(classes):
        mine = sorted(
            (n for n, k in zip(names, classes) if k == c),
            key=lambda n: (hashlib.sha256(n.split('/')[1].encode()).hexdigest(), n),
        )
        n_test = min(len(mine) - 1, max(1, int(0.2 * len(mine) + 0.5)))
        n_val = min(len(mine) - n_test - 1, max(1, int(0.1 * len(mine) + 0.5)))
        for i, n in enumerate(mine):
            want[n] = 'test' if i < n_test else 'val' if i < n_test + n_val else 'train'
    assert stratified_split(names, classes).tolist() == [want[n] for n in names]


def test_split_of_known_names():
    "Quoted, so that it can never change unnoticed, on no machine"
    names = ['100224.jpg', '101165.jpg', '101232.jpg', 'n01443537_0.JPEG', 'Büschel 1.png', '10.jpg', '11.jpg']
    assert [hex(D.name_hash(o)) for o in names[:5]] == [
        '0x7270311785fd440b',
        '0xc6b31b1c1e9dbf0a',
        '0x63139fb731649104',
        '0xb51399137752a94b',
        '0xfe6ae38e613057e3',
    ]
    assert stratified_split(names, ['a'] * 7).tolist() == ['val', 'train', 'test', 'train', 'train', 'train', 'train']


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.sampled_from([0, 0.1, 0.3]),
    st.sampled_from([0, 0.2, 0.5]),
    st.randoms(),
)
def test_split_properties(sizes, val, test, random):
    rows = [(f'{c}_{i}.png', f'class {c}') for c, n in enumerate(sizes) for i in range(n)]
    split = dict(zip([r[0] for r in rows], stratified_split(*zip(*rows), val, test)))
    random.shuffle(rows)
    assert (
        dict(zip([r[0] for r in rows], stratified_split(*zip(*rows), val, test))) == split
    )  # the order does not matter
    for c, n in enumerate(sizes):
        got = [split[f'{c}_{i}.png'] for i in range(n)]
        assert 'train' in got
        assert ('test' in got) == (test > 0 and n > 1) and ('val' in got) == (val > 0 and n - got.count('test') > 1)
        if (val, test) == (0.1, 0.2) and n > 2:
            assert set(got) == {'train', 'val', 'test'}
        if n >= 10:
            assert abs(got.count('test') - test * n) <= 0.5 and abs(got.count('val') - val * n) <= 0.5


def test_a_new_file_moves_at_most_one_across_each_boundary():
    names = [f'{i}.png' for i in range(60)]
    before = pd.Series(stratified_split(names, ['a'] * 60), names)
    for k in range(40):
        after = pd.Series(stratified_split([*names, f'new{k}.png'], ['a'] * 61), [*names, f'new{k}.png'])[names]
        assert (after != before).sum() <= 2


def test_the_split_does_not_depend_on_the_hash_seed_of_python():
    code = (
        "from hiermetric.datasets import stratified_split as s; print(*s([f'{i}.png' for i in range(50)], "
        "['a','b']*25))"
    )
    out = {
        subprocess.run(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONHASHSEED': o},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for o in ('1', '2')
    }
    assert len(out) == 1


def test_counts_of_small_classes():
    assert [tuple(int(o[0]) for o in split_counts([n])) for n in (1, 2, 3, 4)] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 1),
        (2, 1, 1),
    ]


# --- folders


def test_folder_with_mess(tmp_path):
    d = touch(
        tmp_path,
        *(f'bee/{i}.jpg' for i in range(20)),
        'ant/1.PNG',
        'Pisces/deep/er/1.jpg',
        'notes.txt',
        'bee/.hidden.jpg',
        '.git/x.jpg',
        '__MACOSX/bee/._1.jpg',
        'Thumbs.db',
        'loose.jpg',
    )
    shutil.move(d / 'Pisces' / 'deep' / 'er' / '1.jpg', d / 'Pisces' / '1.jpg')
    table = load_dataset(d, TREE, fill='white', name='mess')
    assert table.samples['class'].value_counts().to_dict() == {'bee': 20, 'ant': 1, 'Pisces': 1}
    assert table.summary().loc['all', 'images'] == len(table) == 22 and table.fill == 'white' and table.name == 'mess'
    assert table.summary().loc[['train', 'val', 'test'], 'images'].tolist() == [16, 2, 4]
    assert '2 files that are no images were left out (Thumbs.db, notes.txt)' in table.notes
    assert '1 image outside any class folder was left out (loose.jpg)' in table.notes
    assert (
        '3 classes without images were cut from the tree (cod, eel, gnat)' in table.notes
        and '1 class has no row in the table and was found by the name of its node (Pisces)' in table.notes
    )
    assert '2 classes have a single image, which trains (Pisces, ant)' in table.notes
    assert table.taxonomy.leaf_names == ('bee', 'ant', 'Pisces')  # nothing tells a cod from an eel
    assert table.targets.tolist() == table.taxonomy.index(table.samples['class'].tolist()).tolist()
    assert all(Path(o).is_absolute() and Path(o).is_file() for o in table.samples['path'])
    assert 'mess' in repr(table) and '22 images' in repr(table)


def test_fingerprint_follows_content_not_place(tmp_path):
    files = [f'{c}/{i}.jpg' for c in ('bee', 'ant') for i in range(9)]
    a, b = (load_dataset(touch(tmp_path / o, *files), TREE, name='x') for o in 'ab')
    assert a.fingerprint == b.fingerprint and a.samples['path'].tolist() != b.samples['path'].tolist()
    others = [
        load_dataset(tmp_path / 'a', TREE, name='x', **kw)
        for kw in (dict(val=0.3), dict(keep_empty=True), dict(fill='white'), dict(held_out='ant'))
    ]
    touch(tmp_path / 'b', 'bee/new.jpg')
    others.append(load_dataset(tmp_path / 'b', TREE, name='x'))
    assert len({a.fingerprint, *(o.fingerprint for o in others)}) == 6


def test_given_splits_are_kept(tmp_path):
    d = touch(tmp_path, *(f'train/bee/{i}.jpg' for i in range(30)), *(f'test/bee/t{i}.jpg' for i in range(3)))
    s = load_dataset(d, TREE).samples
    assert s['split'].value_counts().to_dict() == {'train': 27, 'val': 3, 'test': 3}
    assert all((o['split'] == 'test') == ('/test/' in o['path']) for _, o in s.iterrows())
    touch(d, 'valid/bee/v.jpg', 'test/ant/1.jpg')
    table = load_dataset(d, TREE)
    assert table.samples['split'].value_counts().to_dict() == {'train': 30, 'test': 4, 'val': 1}
    assert '1 class is never trained (ant)' in table.notes


def test_a_class_called_train_is_a_class(tmp_path):
    d = touch(tmp_path, 'train/1.jpg', 'test/1.jpg', 'bee/1.jpg')
    assert set(load_dataset(d).samples['class']) == {'train', 'test', 'bee'}
    d = touch(tmp_path / 'split', 'train/train/1.jpg', 'train/bee/1.jpg', 'test/train/2.jpg')
    assert load_dataset(d).samples[['class', 'split']].values.tolist() == [
        ['train', 'test'],
        ['bee', 'train'],
        ['train', 'train'],
    ]


def test_links_are_followed_once(tmp_path):
    d = touch(tmp_path / 'd', 'bee/1.jpg')
    touch(tmp_path, 'elsewhere/2.jpg')
    (d / 'ant').symlink_to(tmp_path / 'elsewhere')
    (d / 'bee' / 'loop').symlink_to(d)
    assert load_dataset(d, TREE).samples['class'].tolist() == ['ant', 'bee']


def test_taxonomy_beside_the_images_and_names_in_two_places(tmp_path):
    d = touch(tmp_path, 'bee/1.jpg', 'ant/1.jpg', 'ant/2.jpg')
    (d / 'taxonomy.csv').write_text('class,lineage\nbee,Insecta\nant,Insecta\n')
    assert load_dataset(d).taxonomy.path('ant') == 'root/Insecta/ant'
    with pytest.warns(TaxonomyWarning, match='other'):
        two = Taxonomy.from_paths([('fish', 'other'), ('fish', 'cod'), ('crab', 'other')])
    table = load_dataset(touch(tmp_path / 'n', 'fish/other/1.jpg', 'fish/cod/1.jpg', 'crab/other/1.jpg'), two)
    assert [table.taxonomy.path(i) for i in table.targets] == ['root/crab/other', 'root/fish/cod', 'root/fish/other']


def test_held_out_by_number(tmp_path):
    d = touch(tmp_path, *(f'{c}/{i}.jpg' for c in ('bee', 'ant', 'cod', 'eel') for i in range(10)))
    table = load_dataset(d, TREE, held_out=2)
    unseen = set(table.samples['class'][table.samples['split'] == 'unseen'])
    assert (
        len(unseen) == 2
        and not unseen & set(table.samples['class'][table.samples['split'] != 'unseen'])
        and table.taxonomy == load_dataset(d, TREE).taxonomy
    )
    assert len({table.taxonomy.parents[table.taxonomy.index(c)] for c in unseen}) == 2  # each leaves a sibling
    assert unseen == set(load_dataset(d, TREE, held_out=2).notes[-1].split('(')[1].rstrip(')').split(', '))
    assert (
        message(load_dataset, d, TREE, held_out=3)
        == '3 classes cannot be held out of 4: 2 have a sibling that stays. Ask for fewer, or name them.'
    )


def test_a_folder_finds_its_node_through_its_row(tmp_path):
    d = touch(tmp_path / 'd', *(f'{c}/{i}.jpg' for c in ('Cnidaria', 'Copepoda', 'Acartia', 'a_b') for i in range(4)))
    (tmp_path / 't.csv').write_text(
        'class,kingdom,phylum,class,genus,species\nCnidaria,Animalia,Cnidaria,Cnidaria,,\n'
        'Copepoda,Animalia,Arthropoda,Copepoda,,\nAcartia,Animalia,Arthropoda,Copepoda,Acartia,\n'
        'a_b,Animalia,Arthropoda,Copepoda,A,A b\nc,Animalia,Mollusca,,,\n'
    )
    with pytest.warns(TaxonomyWarning):
        table = load_dataset(d, tmp_path / 't.csv')
    tax, node = table.taxonomy, dict(zip(table.samples['class'], table.targets))
    assert {k: tax.path(v) for k, v in node.items()} == {
        'Cnidaria': 'root/Animalia/Cnidaria/Cnidaria',
        'Copepoda': 'root/Animalia/Arthropoda/Copepoda',
        'Acartia': 'root/Animalia/Arthropoda/Copepoda/Acartia',
        'a_b': 'root/Animalia/Arthropoda/Copepoda/A/A b',
    }
    assert [tax.rank(node[o]) for o in ('Cnidaria', 'Copepoda', 'Acartia', 'a_b')] == [
        'class',
        'class',
        'genus',
        'species',
    ]
    assert '1 class without images was cut from the tree (c)' in table.notes and 'Mollusca' not in tax.names
    assert '1 class has no images of its own (c)' in load_dataset(d, tmp_path / 't.csv', keep_empty=True).notes
    held = load_dataset(d, tmp_path / 't.csv', held_out='a_b')  # by label
    assert set(held.samples['class'][held.samples['split'] == 'unseen']) == {'a_b'} and held.taxonomy == tax


def test_the_tree_stays_whole(tmp_path):
    d = touch(tmp_path, *(f'{c}/{i}.jpg' for c in ('a', 'b', 'c') for i in range(4)))
    tree = Taxonomy.from_paths(
        {
            'a': 'order/family 1/genus 1',
            'b': 'order/family 2/genus 2',
            'c': 'order/family 2/genus 2',
            'd': 'order/family 3',
        }
    )
    whole = load_dataset(d, tree)
    assert whole.taxonomy.names == [
        'root',
        'order',
        'family 1',
        'genus 1',
        'a',
        'family 2',
        'genus 2',
        'b',
        'c',
    ] and not any('contracted' in o for o in whole.notes)
    short = load_dataset(d, tree, contract=True)
    assert (
        short.taxonomy.names == ['root', 'order', 'a', 'genus 2', 'b', 'c']
        and '3 inner nodes with a single child were contracted' in short.notes
    )
    assert (
        load_dataset(d, tree, held_out=1).samples.query("split == 'unseen'")['class'].tolist()
        == load_dataset(d, tree, held_out=1, contract=True).samples.query("split == 'unseen'")['class'].tolist()
    )


def test_newick_with_several_trees(tmp_path):
    d = touch(tmp_path / 'd', *(f'{c}/{i}.jpg' for c in ('bee', 'ant', 'cod') for i in range(3)))
    nwk = tmp_path / 't.nwk'
    nwk.write_text('((bee,ant)Insecta,cod);\n(bee,(ant,cod)Odd);\n')
    with pytest.warns(TaxonomyWarning, match='2 trees, and this is the first'):
        assert load_dataset(d, nwk).taxonomy.path('ant') == 'root/Insecta/ant'
    assert load_dataset(d, nwk, tree=2).taxonomy.path('ant') == 'root/Odd/ant'
    assert message(load_dataset, d, nwk, tree=3) == 'There is no tree 3; the source holds 2, counted from 1.'
    assert message(load_dataset, d, tree=1).startswith('tree=1 chooses among the trees of a Newick file')


# --- mistakes, and what is said about them


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


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root may read every folder')
def test_unreadable_folder(tmp_path):
    d = touch(tmp_path, 'bee/1.jpg', 'ant/1.jpg')
    (d / 'ant').chmod(0)
    try:
        assert 'ant cannot be read' in message(load_dataset, d)
    finally:
        (d / 'ant').chmod(0o755)


@pytest.mark.parametrize(
    'text, said',
    [
        ('', "has no column 'lineage'"),
        (
            'class\nbee\n',
            "has no column 'lineage'; it has 'class'. Give a class and its lineage, or a label and columns that "
            "are named after ranks (kingdom … species).",
        ),
        ('class,lineage\nbee\n', 'line 2: 1 cells under a header of 2'),
        ('class,lineage\n,Insecta\n', 'line 2: the class is blank'),
        ('class,lineage\n', 'The tree is empty'),
        (b'class,lineage\nb\xe9e,Insecta\n', 'is not UTF-8'),
    ],
)
def test_bad_csv(tmp_path, text, said):
    d = touch(tmp_path / 'd', 'bee/1.jpg')
    csv = tmp_path / 'tree.csv'
    csv.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in message(load_dataset, d, csv)


def test_missing_or_strange_taxonomy_file(tmp_path):
    d = touch(tmp_path / 'd', 'bee/1.jpg', 'ant/1.jpg')
    touch(tmp_path, 'tree.csv', 'tree.docx')
    assert message(load_dataset, d, tmp_path / 'tre.csv').endswith("tre.csv. Did you mean 'tree.csv' or 'tree.docx'?")
    assert (
        message(load_dataset, d, tmp_path / 'tree.docx')
        == f'{tmp_path}/tree.docx is no taxonomy that can be read; give a .csv with the columns class and lineage, a '
        'Newick tree (.nwk) or a saved tree (.npz).'
    )
    (tmp_path / 'tree.nwk').write_text('((bee,ant)Insecta,cod)Animalia;')
    TREE.save(tmp_path / 'tree.npz')
    assert load_dataset(d, tmp_path / 'tree.nwk').taxonomy.leaf_names == ('bee', 'ant')
    assert load_dataset(d, tmp_path / 'tree.npz').taxonomy.leaf_names == ('bee', 'ant')


# --- archives and downloads


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


# --- the real ones


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


# --- synthetic organisms


def test_dice_are_bits():
    assert D._Dice('a', 1).raw(2).tolist() == [14690851904124000029, 439518477509817507]
    assert D._Dice('a', 1).shuffled('abcdef') == ['b', 'd', 'c', 'f', 'a', 'e']


def test_a_specimen_is_the_same_everywhere():
    "The pixels of two photographs, quoted"
    fauna = D._fauna(0)
    got = []
    for path in (('Articulata', 'Scarabina', 'Squeculella vulgaris'), ('Radialia', 'Stellina', 'Coriculus vulgaris')):
        got.append(
            hashlib.sha256(np.asarray(D._photograph(*fauna[path], D._Dice(0, path[-1], 0), 48)).tobytes()).hexdigest()[
                :16
            ]
        )
    assert got == ['3e77270ea6054388', 'b3d7073ba43fc837']


def test_every_body_plan_draws_in_every_texture():
    seen = set()
    for _, (draw, start) in ((k, v) for orders in D._PLANS.values() for k, v in orders.items()):
        for pattern in ('plain', 'bands', 'spots', 'stripes', 'eyespots', 'saddle'):
            for count in (1, 8):
                im = np.asarray(D._specimen(draw, D._Genome(**start, pattern=pattern, count=count, horn=1.0), 48))
                assert im.shape == (48, 48, 3) and 0.02 < (im.min(-1) < 235).mean() < 0.9
            seen.add(im.tobytes())
    assert len(seen) > 90  # all but a few are different pictures


def test_fauna_is_a_ragged_tree_of_small_differences():
    for seed in range(4):
        fauna = D._fauna(seed)
        tree = Taxonomy.from_paths(list(fauna))
        assert 40 <= len(fauna) <= 75 and set(tree.depths[tree.leaves]) >= {3, 4} and tree.height <= 5
        assert not (np.bincount(tree.parents[1:])[1:] == 1).any() and len(set(tree.leaf_names)) == len(fauna)
        for i in tree.leaves:  # species of one genus share what makes the genus
            for j in tree.children(tree.parents[i]):
                if tree.names[i].split()[0] == tree.names[j].split()[0]:
                    a, b = (fauna[tuple(tree.path(k).split('/')[1:])][1] for k in (i, j))
                    assert (a.pattern, a.horn, a.n, a.shape, a.hue2) == (
                        b.pattern,
                        b.horn,
                        b.n,
                        b.shape,
                        b.hue2,
                    ) and abs(a.hue - b.hue) < 0.12
    assert D._fauna(0).keys() == D._fauna(0).keys() != D._fauna(1).keys()


def test_synthetic_taxa_are_written_once(places, monkeypatch):
    table = load_dataset(size=32, largest=4, smallest=1)
    n = table.samples['class'].value_counts()
    assert (
        (n.max(), n.min()) == (4, 1)
        and len(n) == table.taxonomy.n_leaves
        and Image.open(table.samples['path'][0]).size == (32, 32)
    )
    assert any('a single image, which trains' in o for o in table.notes)
    monkeypatch.setattr(D, '_draw_all', lambda *a: pytest.fail('drawn again'))
    assert load_dataset('synthetic-taxa', size=32, largest=4, smallest=1).fingerprint == table.fingerprint
    held = load_dataset(size=32, largest=4, smallest=1, held_out=5)
    assert held.samples['class'][held.samples['split'] == 'unseen'].nunique() == 5 and held.taxonomy == table.taxonomy


def test_helpers_draw_the_same_images(tmp_path, monkeypatch):
    "Two processes and one give the same files"
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    shared = D.synthetic_taxa(tmp_path / 'a', size=32, largest=36, smallest=1)  # large enough to be shared out
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)
    alone = D.synthetic_taxa(tmp_path / 'b', size=32, largest=36, smallest=1)
    assert len(shared) > 500 and [Path(o).read_bytes() for o in shared.samples['path']] == [
        Path(o).read_bytes() for o in alone.samples['path']
    ]


def test_synthetic_taxa_leave_nothing_half_done(places, monkeypatch):
    calls = []

    def photograph(*a):
        calls.append(a)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return Image.new('RGB', (32, 32))

    monkeypatch.setattr(D, '_photograph', photograph)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(size=32, largest=2, smallest=1)
    assert not list((places / 'cache' / 'datasets').iterdir())


def test_bad_arguments(places):
    assert (
        message(load_dataset, size=8)
        == "synthetic-taxa cannot be drawn with seed=0, size=8, largest=180, smallest=8: the seed is a whole number, "
        "size at least 32, and 1 <= smallest <= largest."
    )
    assert message(load_dataset, seed='x').startswith("synthetic-taxa cannot be drawn with seed='x'")


def test_plot_draws_every_class(tmp_path):
    table = load_dataset(
        touch(tmp_path, *(f'{c}/{i}.jpg' for c, n in (('bee', 30), ('ant', 3), ('cod', 1)) for i in range(n))), TREE
    )
    left, right = table.plot().axes
    assert sorted(round(o.get_height()) for o in left.patches) == [1, 3, 30] and sorted(
        round(o.get_width()) for o in right.patches
    ) == [34]
