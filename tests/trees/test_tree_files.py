"Tables and Newick as people and programs write them, and every kind of bad file with its message"

import csv, re, warnings
import pytest
from hypothesis import given
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError, TaxonomyWarning
from slow_trees import slow_trees, table


@pytest.mark.parametrize(
    'text, kw, message',
    [
        ('class,lineage\n', {}, 'The tree is empty; give it at least one class.'),
        ('', {}, "has no column 'lineage'; it has none."),
        ('name,lineage\ncat,mammal\n', {}, "has no column 'class'; it has 'name', 'lineage'."),
        (
            'class,linage\ncat,a/b\n',
            {},
            "has no column 'lineage'; it has 'class', 'linage'. Did you mean 'linage'? Give a class and its "
            "lineage, or a label and columns that are named after ranks",
        ),
        ('class,lineage\ncat,mammal\n ,mammal\n', {}, ', line 3: the class is blank; name it or remove the line.'),
        (
            'class,lineage\nknife, fork,tool\n',
            {},
            ", line 2: 3 cells under a header of 2; put quotes around a name that holds ','.",
        ),
        ('class,lineage\ncat\n', {}, ', line 2: 1 cells under a header of 2'),
        (
            'class,lineage\n"cat,mammal\ndog,mammal\n',
            {},
            'unexpected end of data; put quotes around the whole cell or nowhere.',
        ),
        ('class,lineage\n"cat"s,mammal\n', {}, "line 2: ',' expected after '\"'; put quotes"),
        (
            'kingdom,species\nAnimalia,cat\n',
            dict(ranks=['kingdom', 'specie']),
            "has no column 'specie'; it has 'kingdom', 'species'. Did you mean 'species'",
        ),
        ('kingdom,species\n,\n', dict(ranks=['kingdom', 'species']), 'The tree is empty; give it at least one class.'),
    ],
)
@pytest.mark.filterwarnings('ignore::hiermetric.trees.arrays.TaxonomyWarning')
def test_bad_tables(tmp_path, text, kw, message):
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(TaxonomyError, match=re.escape(message)) as e:
        Taxonomy.from_csv(tmp_path / 't.csv', **kw)
    if 'empty' not in message:
        assert str(tmp_path / 't.csv') in str(e.value)


def test_table_that_is_not_utf8(tmp_path):
    (tmp_path / 't.csv').write_bytes('class,lineage\nÄsche,fish\n'.encode('latin-1'))
    with pytest.raises(TaxonomyError, match=r'is not UTF-8 \(.* at byte \d+\); save it as UTF-8\.'):
        Taxonomy.from_csv(tmp_path / 't.csv')


def test_null_ranks_are_skipped_not_dropped(tmp_path):
    rows = [
        ('Animalia', '', 'Corvidae', 'Pica', 'Pica pica'),
        ('Animalia', 'NA', 'Corvidae', 'null', 'Corvus sp.'),
        ('Animalia', 'Aves', 'nan', '', ''),
        ('', '', '', '', ''),
        ('None', r'\N', 'n/a', 'NaN', ' '),
    ]
    with (tmp_path / 't.tsv').open('w') as f:
        w = csv.writer(f, delimiter='\t')
        w.writerow('kingdom class family genus species'.split())
        w.writerows(rows)
    with pytest.warns(TaxonomyWarning, match=r't\.tsv: 2 lines without any rank were left out \(lines 5, 6\)\.'):
        tax = Taxonomy.from_csv(tmp_path / 't.tsv', ranks='kingdom class family genus species'.split())
    assert [tax.path(i) for i in tax.leaves] == [
        'root/Animalia/Corvidae/Pica/Pica pica',
        'root/Animalia/Corvidae/Corvus sp.',
        'root/Animalia/Aves',
    ]
    (tmp_path / 'u.csv').write_text('common,class,species\ncat,Mammalia,Felis catus\nwasp,Insecta,\n')
    assert Taxonomy.from_csv(tmp_path / 'u.csv', name='common', ranks=['class', 'species']).names == [
        'root',
        'Mammalia',
        'Felis catus',
        'cat',
        'Insecta',
        'wasp',
    ]


def test_tabs_do_not_swallow_quotes(tmp_path):
    (tmp_path / 't.tsv').write_text('class\tlineage\n"Candidatus x\tbacteria\ny\tbacteria\n')
    assert Taxonomy.from_csv(tmp_path / 't.tsv').leaf_names == ('"Candidatus x', 'y')


def test_newick_labels():
    tax = Taxonomy.from_newick("""((a_b:0.1[100],'it''s, (so)':2e-3)'100':1,("x y",Homo sapiens,(c)))[&R]top:0;""")
    assert [tax.path(i) for i in tax.leaves] == [
        'top/100/a_b',
        "top/100/it's, (so)",
        'top/x y…c/x y',
        'top/x y…c/Homo sapiens',
        'top/x y…c/c…c/c',
    ]
    assert (
        Taxonomy.from_newick('alone;').leaf_names == ('alone',)
        and Taxonomy.from_newick('(a,b);', root='life').names[0] == 'life'
    )
    assert Taxonomy.from_newick('((a,b)0.98,(c,d)1e-2)x;', support=True).names == [
        'x',
        'a…b',
        'a',
        'b',
        'c…d',
        'c',
        'd',
    ]


@pytest.mark.parametrize(
    'text, names',
    [
        ('(((A,B)95:0.1,C)88:0.1,(D,E)77:0.2);', 'root A…C A…B A B C D…E D E'),
        ('[&R] ((A,B)100:0.1,(C,D)100:0.2)100;', 'root A…B A B C…D C D'),
        ('((A,B)95.2/100,(C,D)E)1e-3%;', 'root A…B A B E C D'),
        ('((A, B)x [comment [nested] more],C)y;', 'y x A B C'),
        ('((A:1e-5,B:),C:0);', 'root A…B A B C'),
        ('((A,B){0}:0.1{1},C:2{2})y{3};', 'y A…B A B C'),
        ("(('a','b')'a/b group',c)r;", 'r a/b group a b c'),
    ],
)
def test_newick_as_programs_write_it(text, names):
    assert ' '.join(Taxonomy.from_newick(text).names) == names


@pytest.mark.parametrize(
    'text, message',
    [
        ('(a:1 b:2,c:1)r;', 'Newick, character 5: something follows a branch length'),
        ('(a:1,b:2\n00)r;', 'Newick, character 9: something follows a branch length'),
        ('(a:1(b,c))r;', 'Newick, character 4: something follows a branch length'),
        ('(a[x[y],b);', 'character 2: \'[x[y],b);\' opens a quote or a comment that does not end'),
    ],
)
def test_newick_that_would_be_misread(text, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_newick(text)


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16'])
def test_newick_that_is_not_utf8(tmp_path, encoding):
    (tmp_path / 't.nwk').write_bytes('((Caféa,B)x,C)y;'.encode(encoding))
    with pytest.raises(TaxonomyError, match=r't\.nwk is not UTF-8 \(.* at byte \d\); save it as UTF-8\.'):
        Taxonomy.from_newick(tmp_path / 't.nwk')


@given(slow_trees())
def test_newick_round_trip(slow):
    def text(n):
        return (f"({','.join(map(text, slow.kids[n]))})" if slow.kids[n] else '') + n

    assert Taxonomy.from_newick(text(slow.root) + ';') == Taxonomy.from_parents(slow.parent)


def classes(tax):
    return {k: tax.path(v[0]) for k, v in tax.labels.items()}


def quiet(f, *a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TaxonomyWarning)
        return f(*a, **kw)


def test_a_class_that_ends_its_lineage_is_that_taxon(tmp_path):
    t = table(
        tmp_path / 't.csv',
        'class,lineage',
        'Acartia,Copepoda/Acartiidae/Acartia',
        'Copepoda,Copepoda',
        'sp_a,Copepoda/Acartiidae/sp a',
        'Cnidaria,Cnidaria/Cnidaria unidentified',
        'other,',
    )
    tax = quiet(Taxonomy.from_csv, t)
    assert tax.names == [
        'root',
        'Copepoda',
        'Acartiidae',
        'Acartia',
        'sp a',
        'Cnidaria',
        'Cnidaria unidentified',
        'Cnidaria',
        'other',
    ]
    assert tax.label_index(['Acartia', 'Copepoda', 'sp_a', 'Cnidaria', 'other']).tolist() == [3, 1, 4, 7, 8]
    with pytest.raises(
        TaxonomyError,
        match="'Cnidaria' is the name of 2 nodes, 'root/Cnidaria', 'root/Cnidaria/Cnidaria unidentified/Cnidaria'; "
        "give the path",
    ):
        tax.index('Cnidaria')
    assert tax.index('sp_a') == 4  # what a person types may be a label, where no node has the name
    assert Taxonomy.from_paths({'Acartia': 'Copepoda/Acartia', 'Copepoda': 'Copepoda'}).names == [
        'root',
        'Copepoda',
        'Acartia',
    ]


def test_labels_that_share_a_taxon_are_classes_below_it(tmp_path):
    ranks = table(
        tmp_path / 'r.csv',
        'label,family,genus',
        'male,Felidae,Panthera',
        'female,Felidae,Panthera',
        'cat,Felidae,',
        'dog,Canidae,Canis',
        'wolf,Canidae,Canis',
        'Canis,Canidae,Canis',
        'stone,,',
    )
    assert classes(Taxonomy.from_csv(ranks)) == {
        'male': 'root/Felidae/Panthera/male',
        'female': 'root/Felidae/Panthera/female',
        'cat': 'root/Felidae',
        'dog': 'root/Canidae/Canis/dog',
        'wolf': 'root/Canidae/Canis/wolf',
        'Canis': 'root/Canidae/Canis',
        'stone': 'root/stone',
    }
    lines = table(
        tmp_path / 'l.csv',
        'class,lineage,species',
        'm,Felidae,Panthera leo',
        'f,Felidae,Panthera leo',
        'cat,Felidae,Felis catus',
        'fossil,Felidae,',
    )
    assert classes(Taxonomy.from_csv(lines)) == {
        'm': 'root/Felidae/Panthera leo/m',
        'f': 'root/Felidae/Panthera leo/f',
        'cat': 'root/Felidae/Felis catus',
        'fossil': 'root/Felidae/fossil',
    }


@pytest.mark.parametrize(
    'head, row, label, path, ranks',
    [
        (
            'class,kingdom,class,species',
            'a_b,Animalia,Aves,A b',
            'a_b',
            'Animalia/Aves/A b',
            ('kingdom', 'class', 'species'),
        ),
        (
            'name,Species,Genus,Kingdom',
            'x,A b,A,Animalia',
            'x',
            'Animalia/A/A b',
            ('kingdom', 'genus', 'species'),
        ),  # from the bottom up
        (
            'kingdom,class,species',
            'Animalia,Aves,A b',
            'A b',
            'Animalia/Aves/A b',
            ('kingdom', 'class', 'species'),
        ),  # no label
        (
            'species,kingdom,genus',
            'A b,Animalia,A',
            'A b',
            'Animalia/A',
            ('kingdom', 'genus'),
        ),  # the first column is the label
        ('kingdom,genus,label', 'Animalia,A,none', 'none', 'Animalia/A', ('kingdom', 'genus')),
        ('class,family,genus', 'x,incertae sedis,A', 'x', 'A', ('family', 'genus')),
        ('class,family,genus', 'x,Felidae incertae sedis,A', 'x', 'A', ('family', 'genus')),
    ],
)
def test_rank_columns_as_they_come(tmp_path, head, row, label, path, ranks):
    tax = quiet(Taxonomy.from_csv, table(tmp_path / 't.csv', head, row))
    assert classes(tax) == {label: f'root/{path}'} and tax.ranks == ranks
    assert [tax.rank(i) for i in tax.ancestors(label)[1:]] == [
        r for r in ranks if len(ranks) == len(path.split('/')) or r != 'family'
    ]


def test_columns_that_are_no_ranks_are_named(tmp_path):
    with pytest.warns(TaxonomyWarning, match="the columns 'AphiaID', 'note' are no ranks and were passed over"):
        Taxonomy.from_csv(table(tmp_path / 't.csv', 'label,genus,AphiaID,species,note', 'x,A,1,A b,'))
    first = table(tmp_path / 'u.csv', 'class,order', 'Aves,Passeriformes', 'Aves,Strigiformes')
    assert Taxonomy.from_csv(first).names == [
        'root',
        'Aves',
        'Passeriformes',
        'Strigiformes',
    ]  # Aves stands twice: no label


@pytest.mark.parametrize('sep', ['>', ';', '|', ' > '])
def test_lineages_with_another_separator(tmp_path, sep):
    rows = [
        'class,lineage',
        *(
            f'"{c}","living{sep}{l}"'
            for c, l in (('Calanus', f'Crustacea{sep}Copepoda'), ('Chaetoceros', f'Harosa{sep}Diatomea'))
        ),
    ]
    with pytest.warns(TaxonomyWarning, match=re.escape(f'lineages are separated by {sep.strip()!r}')):
        tax = Taxonomy.from_csv(table(tmp_path / 't.csv', *rows))
    assert tax.height == 4 and tax.path('Calanus') == 'root/living/Crustacea/Copepoda/Calanus'


def test_unnamed_ranks_in_a_lineage_join_nobody(tmp_path):
    t = table(
        tmp_path / 't.csv',
        'class,lineage',
        'Calanus,Animalia/NA/NA/Calanidae',
        'Vermes1,Animalia/NA/NA/Vermidae',
        'None,Animalia/Annelida',
        'NA,Animalia/Annelida',
    )
    with pytest.warns(TaxonomyWarning, match=r"4 ranks without a name \('NA'\) were passed over"):
        tax = Taxonomy.from_csv(t)
    assert tax.names == ['root', 'Animalia', 'Calanidae', 'Calanus', 'Vermidae', 'Vermes1', 'Annelida', 'None', 'NA']
