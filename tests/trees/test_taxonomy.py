"Saved and read back, fancy names, damaged files and what is imported"

import pickle
import numpy as np, pytest
from hypothesis import given
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError
from slow_trees import slow_trees, fancy, run, table


@given(slow_trees())
def test_save_and_load(tmp_path_factory, slow):
    path = tmp_path_factory.mktemp('t') / 'any.suffix'
    for tax in (Taxonomy.from_parents(slow.parent), Taxonomy.from_parents(slow.parent).prune()):
        back = Taxonomy.load(tax.save(path))
        assert (
            back == tax
            and list(back.names) == list(tax.names)
            and dict(back.contracted) == dict(tax.contracted)
            and (back.last == tax.last).all()
        )
    assert [o.name for o in path.parent.iterdir()] == ['any.suffix']


def test_fancy_names_survive(tmp_path):
    tax = fancy()
    back = Taxonomy.load(tax.save(tmp_path / 'ä ö.tree'))
    assert (
        back == tax
        and list(back.names) == list(tax.names)
        and back.contracted == tax.contracted
        and back.index('Fische/other') == tax.index('Fische/other') > 0
    )
    assert tax.path('コイ', contracted=True) == 'root/日本/x/コイ'


def test_damaged_files(tmp_path):
    path = fancy().save(tmp_path / 't')
    whole = path.read_bytes()
    for k in range(0, len(whole), 11):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 255]) + whole[k + 1 :])
        try:
            assert Taxonomy.load(path) == fancy()  # a byte that carries nothing, such as a time stamp
        except TaxonomyError as e:
            assert 'is no taxonomy file, or a damaged one' in str(e)
    for part in (whole[: len(whole) // 2], b'', b'hello'):
        path.write_bytes(part)
        with pytest.raises(TaxonomyError, match='is no taxonomy file, or a damaged one'):
            Taxonomy.load(path)
    np.savez(path.open('wb'), parents=[-1])
    with pytest.raises(TaxonomyError, match='is no taxonomy file, or a damaged one'):
        Taxonomy.load(path)
    np.savez(path.open('wb'), parents=np.array([{}], object))
    with pytest.raises(TaxonomyError, match='is no taxonomy file, or a damaged one'):
        Taxonomy.load(path)


def test_import_is_light():
    code = (
        "import sys, hiermetric.trees as t; tax = t.Taxonomy.from_paths({'a':'b','c':'b'}); tax.lca('a','c'); "
        "tax.node_probs([.5,.5]); print([m for m in "
        "('torch','pandas','numba','rustworkx','matplotlib','scipy','plotly') if m in sys.modules])"
    )
    assert run(code) == '[]'


def test_ranks_and_labels_travel(tmp_path):
    tax = Taxonomy.from_csv(
        table(
            tmp_path / 't.csv',
            'class,family,genus,species',
            'Felidae,Felidae,,',
            'p_leo,Felidae,Panthera,Panthera leo',
            'c_lupus,Canidae,Canis,Canis lupus',
        )
    )
    for t in (
        tax,
        pickle.loads(pickle.dumps(tax)),
        Taxonomy.load(tax.save(tmp_path / 'x')),
        tax.subset(['Panthera leo']),
        tax.prune(),
        tax.level_leaves(),
    ):
        assert (
            t.ranks == ('family', 'genus', 'species')
            and t.names[t.label_index(['p_leo'])] == ['Panthera leo']
            and t.rank('Panthera leo') == 'species'
            and t.rank(0) == ''
        )
        assert t.rank(t.label_index(['Felidae'])[0]) == 'family'  # a class is not contracted
    assert (
        Taxonomy(
            tax.names[::-1],
            [len(tax) - 1 - p if p >= 0 else -1 for p in tax.parents[::-1]],
            ranks=tax.ranks,
            rank_of=tax.rank_of[::-1],
            labels={k: [len(tax) - 1 - i for i in v] for k, v in tax.labels.items()},
        )
        .label_index(['p_leo'])
        .size
        == 1
    )
    assert tax == Taxonomy(tax.names, tax.parents) and not Taxonomy(tax.names, tax.parents).ranks


def test_ranks_are_saved_with_the_tree_and_old_trees_have_none(tmp_path):
    tax = Taxonomy.from_paths({'cod': 'fish/Gadus', 'ray': 'fish', 'dust': None})
    ranked = tax.with_ranks([{'fish': 'class', 'Gadus': 'genus', 'cod': 'species'}.get(o) for o in tax.names])
    back = Taxonomy.load(ranked.save(tmp_path / 'new'))
    assert back == tax and back.ranks == ('class', 'genus', 'species') and (back.node_ranks == ranked.node_ranks).all()
    with np.load(tax.save(tmp_path / 'old')) as z:
        assert not {'ranks', 'rank_of'} & set(z)
    old = Taxonomy.load(tmp_path / 'old')
    assert old.ranks == () and set(old.node_ranks) == {None}
    with np.load(tmp_path / 'new') as z:
        arrays = dict(z) | {'rank_of': np.full(len(tax), 3)}
    np.savez(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(TaxonomyError, match='damaged one .*no rank number 3'):
        Taxonomy.load(tmp_path / 'bad.npz')
    assert old.with_ranks(back.node_ranks).at('genus')[tax.index('cod')] == tax.index('Gadus')
