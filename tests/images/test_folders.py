"Folders of class folders with mess in them, and the trees that belong to them."

import os, shutil
from pathlib import Path
import pytest
from hiermetric.images.named import load_dataset
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyWarning
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


def test_newick_with_several_trees(tmp_path):
    d = touch(tmp_path / 'd', *(f'{c}/{i}.jpg' for c in ('bee', 'ant', 'cod') for i in range(3)))
    nwk = tmp_path / 't.nwk'
    nwk.write_text('((bee,ant)Insecta,cod);\n(bee,(ant,cod)Odd);\n')
    with pytest.warns(TaxonomyWarning, match='2 trees, and this is the first'):
        assert load_dataset(d, nwk).taxonomy.path('ant') == 'root/Insecta/ant'
    assert load_dataset(d, nwk, tree=2).taxonomy.path('ant') == 'root/Odd/ant'
    assert message(load_dataset, d, nwk, tree=3) == 'There is no tree 3; the source holds 2, counted from 1.'
    assert message(load_dataset, d, tree=1).startswith('tree=1 chooses among the trees of a Newick file')


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
