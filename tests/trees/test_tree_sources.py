"Trees from parents, edges, paths and folders agree"

import re, warnings
import pytest
from hypothesis import given
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError, TaxonomyWarning
from slow_trees import slow_trees


def test_sources_agree(tmp_path):
    want = Taxonomy(['root', 'fish', 'cod', 'ray', 'bird', 'owl'], [-1, 0, 1, 1, 0, 4])
    (tmp_path / 'lineage.csv').write_text('id,class,lineage\n1,cod,fish\n2,ray,fish\n3,owl,bird\n')
    (tmp_path / 'ranks.csv').write_text('class;species\nfish;cod\nfish;ray\nbird;owl\n')
    (tmp_path / 'tree.nwk').write_text('\ufeff((cod,ray)fish,(owl)bird)root;\n')
    for o in ('fish/ray', 'fish/cod', 'bird/owl'):
        (tmp_path / 'f' / o).mkdir(parents=True)
    trees = [
        Taxonomy.from_parents(
            {'root': None, 'fish': 'root', 'cod': 'fish', 'ray': 'fish', 'bird': 'root', 'owl': 'bird'}
        ),
        Taxonomy.from_edges(
            [('root', 'fish'), ('fish', 'cod'), ('fish', 'ray'), ('root', 'bird'), ('bird', 'owl'), ('fish', 'cod')]
        ),
        Taxonomy.from_paths({'cod': 'fish', 'ray': ('fish',), 'owl': ['bird']}),
        Taxonomy.from_paths(['fish/cod', 'fish/ray', 'bird/owl', 'fish/cod']),
        Taxonomy.from_paths([('fish', 'cod'), ('fish', 'ray'), ('bird', 'owl'), ('bird',)]),
        Taxonomy.from_csv(tmp_path / 'lineage.csv'),
        Taxonomy.from_csv(tmp_path / 'ranks.csv', ranks=['class', 'species']),
        Taxonomy.from_newick(tmp_path / 'tree.nwk'),
        Taxonomy.from_newick(str(tmp_path / 'tree.nwk')),
        Taxonomy.from_newick("((cod:1e-3,ray)fish:1,(owl[&&NHX:S=x])bird);"),
    ]
    for k, tax in enumerate(trees):
        assert tax == want, k
    assert Taxonomy.from_folder(tmp_path / 'f').names == ['root', 'bird', 'owl', 'fish', 'cod', 'ray']


def test_names_are_cleaned_and_counted(tmp_path):
    (tmp_path / 't.csv').write_text(
        '\ufeff class , lineage\n  cod,fish/ ray-finned \n"knife, ""fork""",tool\ne\u0301te\u0301,\n', encoding='utf-8'
    )
    with pytest.warns(
        TaxonomyWarning,
        match=re.escape(
            "3 names were cleaned of blanks around them, byte-order marks or split accents: ' ray-finned ', '  "
            "cod', 'e\u0301te\u0301'."
        ),
    ):
        tax = Taxonomy.from_csv(tmp_path / 't.csv')
    assert [tax.path(i) for i in tax.leaves] == [
        'root/fish/ray-finned/cod',
        'root/tool/knife, "fork"',
        'root/\u00e9t\u00e9',
    ]
    assert tax.index('e\u0301te\u0301 ') == tax.index('\u00e9t\u00e9')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Taxonomy.from_paths({'cat': 'a/b', 'dog': None, 'cow': float('nan')})


def test_folders(tmp_path):
    for o in ('ä/b', 'ä/.git/x', '__MACOSX/ä', 'c'):
        (tmp_path / o).mkdir(parents=True)
    (tmp_path / 'c' / 'picture.png').touch()
    assert Taxonomy.from_folder(tmp_path, root='all').names == ['all', 'c', 'ä', 'b']
    with pytest.raises(TaxonomyError, match='holds no folders; make one for each class'):
        Taxonomy.from_folder(tmp_path / 'c')


@given(slow_trees())
def test_edges_and_paths_agree(slow):
    tax = Taxonomy.from_parents(slow.parent)
    if len(tax) == 1:
        return
    ordered = [(slow.parent[n], n) for n in slow.order if slow.parent[n]]
    assert Taxonomy.from_edges(ordered) == tax
    assert Taxonomy.from_paths([slow.up(n)[::-1][1:] for n in slow.leaves()], root=slow.root) == tax
