"The synthetic organisms: the same everywhere, a fauna of small differences, written once."

import hashlib, os
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
import hiermetric.images.synthetic as S
from hiermetric.images.pen import Dice, Genome, photograph, specimen
from hiermetric.images.named import load_dataset
from hiermetric.trees.taxonomy import Taxonomy
from toys import message


@pytest.fixture
def places(tmp_path, monkeypatch):
    "An empty data folder and an empty cache"
    monkeypatch.setenv('HIERMETRIC_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('HIERMETRIC_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'data').mkdir()
    return tmp_path


def test_dice_are_bits():
    assert Dice('a', 1).raw(2).tolist() == [14690851904124000029, 439518477509817507]
    assert Dice('a', 1).shuffled('abcdef') == ['b', 'd', 'c', 'f', 'a', 'e']


def test_a_specimen_is_the_same_everywhere():
    "The pixels of two photographs, quoted"
    fauna = S._fauna(0)
    got = []
    for path in (('Articulata', 'Scarabina', 'Squeculella vulgaris'), ('Radialia', 'Stellina', 'Coriculus vulgaris')):
        got.append(
            hashlib.sha256(np.asarray(photograph(*fauna[path], Dice(0, path[-1], 0), 48)).tobytes()).hexdigest()[:16]
        )
    assert got == ['3e77270ea6054388', 'b3d7073ba43fc837']


def test_every_body_plan_draws_in_every_texture():
    seen = set()
    for _, (draw, start) in ((k, v) for orders in S._PLANS.values() for k, v in orders.items()):
        for pattern in ('plain', 'bands', 'spots', 'stripes', 'eyespots', 'saddle'):
            for count in (1, 8):
                im = np.asarray(specimen(draw, Genome(**start, pattern=pattern, count=count, horn=1.0), 48))
                assert im.shape == (48, 48, 3) and 0.02 < (im.min(-1) < 235).mean() < 0.9
            seen.add(im.tobytes())
    assert len(seen) > 90  # all but a few are different pictures


def test_fauna_is_a_ragged_tree_of_small_differences():
    for seed in range(4):
        fauna = S._fauna(seed)
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
    assert S._fauna(0).keys() == S._fauna(0).keys() != S._fauna(1).keys()


def test_synthetic_taxa_are_written_once(places, monkeypatch):
    table = load_dataset(size=32, largest=4, smallest=1)
    n = table.samples['class'].value_counts()
    assert (
        (n.max(), n.min()) == (4, 1)
        and len(n) == table.taxonomy.n_leaves
        and Image.open(table.samples['path'][0]).size == (32, 32)
    )
    assert any('a single image, which trains' in o for o in table.notes)
    monkeypatch.setattr(S, '_draw_all', lambda *a: pytest.fail('drawn again'))
    assert load_dataset('synthetic-taxa', size=32, largest=4, smallest=1).fingerprint == table.fingerprint
    held = load_dataset(size=32, largest=4, smallest=1, held_out=5)
    assert held.samples['class'][held.samples['split'] == 'unseen'].nunique() == 5 and held.taxonomy == table.taxonomy


def test_helpers_draw_the_same_images(tmp_path, monkeypatch):
    "Two processes and one give the same files"
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    shared = S.synthetic_taxa(tmp_path / 'a', size=32, largest=36, smallest=1)  # large enough to be shared out
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)
    alone = S.synthetic_taxa(tmp_path / 'b', size=32, largest=36, smallest=1)
    assert len(shared) > 500 and [Path(o).read_bytes() for o in shared.samples['path']] == [
        Path(o).read_bytes() for o in alone.samples['path']
    ]


def test_synthetic_taxa_leave_nothing_half_done(places, monkeypatch):
    calls = []

    def half(*a):
        calls.append(a)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return Image.new('RGB', (32, 32))

    monkeypatch.setattr(S, 'photograph', half)
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
