"Image tables: who trains and who tests, what stays of the tree, and how they are known."

import hashlib, os, subprocess, sys
import pandas as pd
from hypothesis import given, settings, strategies as st
from hiermetric.images.named import load_dataset
from hiermetric.images.table import name_hash, split_counts, stratified_split
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
    assert [hex(name_hash(o)) for o in names[:5]] == [
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
        "from hiermetric.images.table import stratified_split as s; print(*s([f'{i}.png' for i in range(50)], "
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


def test_plot_draws_every_class(tmp_path):
    table = load_dataset(
        touch(tmp_path, *(f'{c}/{i}.jpg' for c, n in (('bee', 30), ('ant', 3), ('cod', 1)) for i in range(n))), TREE
    )
    left, right = table.plot().axes
    assert sorted(round(o.get_height()) for o in left.patches) == [1, 3, 30] and sorted(
        round(o.get_width()) for o in right.patches
    ) == [34]
