"""A name is one name at every door and in every table: slashes and other signs, null words, accents, two taxa of one
name, a class called root, a locale without letters."""

import csv, os, subprocess, sys, unicodedata, warnings
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner
from answering import picture, predicts, tiny_predictor
from hiermetric.running.cli import app
from hiermetric.core import HiermetricError
from hiermetric.images.named import load_dataset
from hiermetric.images.folders import read_taxonomy
from hiermetric.judging.rules import create_rule
from hiermetric.running.formats import FORMATS
from hiermetric.running.questions import Question, Scope, listed_leaves
from hiermetric.trees.graph import LabelGraph
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError, TaxonomyWarning

pytestmark = pytest.mark.usefixtures('one_thread')
SLASH = "(('Calanus finmarchicus','Oithona similis')'Calanus/Oithona group',Chaetoceros)plankton;"
ODD = [
    'a/b',
    'a',
    'b',
    'a > b',
    'a|b',
    'a | b',
    'a, b',
    '"a"',
    "it's",
    'tab\tin',
    'new\nline',
    'car\rriage',
    r'back\x2fslash',
    '=1',
    '-x',
    'NA',
    'null',
    'none',
    'nan',
    'N/A',
    '-',
    'incertae sedis',
    'root',
    'é',
    os.fsdecode(b'caf\xe9'),
    "'",
    '/',
    '//',
    '%2F',
    '#1',
]
NULLS = ['none', 'None', 'NA', 'N/A', 'null', 'nan', 'NaN', '-', 'unassigned']


def show(*args):
    r = CliRunner().invoke(
        app, ['taxonomy', 'show', *map(str, args)], env={'COLUMNS': '200', 'NO_COLOR': '1', 'TERM': 'dumb'}
    )
    if r.exception and not isinstance(r.exception, SystemExit):
        raise r.exception
    return r


def odd_tree():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TaxonomyWarning)  # 'a' and 'b' stand twice
        return Taxonomy.from_paths([(clade, o) for clade in ('x/y', 'a', '>|,') for o in ODD] + [('a/b',)])


def answers(tax, nodes):
    "What a question says of these nodes"
    q = Question(Scope(tax), create_rule('argmax').fit(tax=tax), known=np.array([0.5]), candidates=1)
    q.rule = lambda p: nodes
    return q, q(torch.eye(len(tax))[nodes], np.zeros(len(nodes)))


# Signs in names


def test_every_path_finds_its_node():
    tax = odd_tree()
    paths = [tax.path(i) for i in range(len(tax))]
    assert (
        len(set(paths)) == len(tax)
        and [tax.index(o) for o in paths] == list(range(len(tax))) == tax.index(paths).tolist()
    )
    assert all(o.count('/') == d for o, d in zip(paths, tax.depths))  # whoever splits at / gets names, not pieces


word = st.text(st.sampled_from('ab/\\x2f>| \n\té\udce9'), min_size=1, max_size=5).map(str.strip).filter(bool)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(word, min_size=1, max_size=3).map(tuple), min_size=1, max_size=6))
def test_any_path_finds_its_node(rows):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TaxonomyWarning)
        tax = Taxonomy.from_paths(rows, root='r')
    assert (
        [tax.index(tax.path(i)) for i in range(len(tax))]
        == list(range(len(tax)))
        == tax.index([tax.path(i) for i in range(len(tax))]).tolist()
    )
    assert all(tax.path(i).count('/') == tax.depths[i] for i in range(len(tax)))
    assert {tuple(tax.names[tax.ancestors(i)[1:]]) for i in range(1, len(tax))} == {
        o[:k] for o in rows for k in range(1, len(o) + 1)
    }


@pytest.mark.parametrize('format', list(FORMATS))
def test_a_name_comes_back_from_every_format(tmp_path, format):
    tax = odd_tree()
    nodes = np.arange(len(tax))
    q, table = answers(tax, nodes)
    table.insert(0, 'image', [f'{i}.png' for i in nodes])
    form = FORMATS[format]()
    (tmp_path / 't').write_text(form.write(table), encoding='utf-8')
    back = form.read(tmp_path / 't')
    assert (
        back['answer'].tolist() == list(tax.names)
        and back['path'].tolist() == table['path'].tolist()
        and [q.node(o) for o in back['path']] == nodes.tolist()
    )
    assert [tax.index(f'root of all/{o}') if o else 0 for o in back['path']] == nodes.tolist()
    if format == 'csv':
        plain = pd.read_csv(tmp_path / 't', keep_default_na=False)
        assert plain['path'].tolist()[1:] == table['path'].tolist()[1:]
    if format in ('ecotaxa', 'dwc'):  # as others read them
        column, sep = {'ecotaxa': ('object_annotation_hierarchy', '>'), 'dwc': ('higherClassification', ' | ')}[format]
        with (tmp_path / 't').open(encoding='utf-8-sig', newline='') as f:
            rows = list(csv.DictReader(f, delimiter=form.sep))[form.heads - 1 :]
        assert [len(row[column].split(sep)) if row[column] else 0 for row in rows] == [
            max(d - (format == 'dwc'), 0) for d in tax.depths
        ]


def test_a_newick_name_with_a_slash(tmp_path, monkeypatch):
    (tmp_path / 't.nwk').write_text(SLASH)
    tax = Taxonomy.from_newick(tmp_path / 't.nwk')
    assert tax.path('Oithona similis') == r'plankton/Calanus\x2fOithona group/Oithona similis' and tax.index(
        'Calanus/Oithona group'
    ) == 1 == tax.index(r'plankton/Calanus\x2fOithona group')
    assert 'Calanus/Oithona group' in show(tmp_path / 't.nwk').stdout
    for i in range(3):
        picture(tmp_path / 'in' / f'{i}.png', i)
    predict = predicts(monkeypatch, tiny_predictor(tmp_path / 'tiny', tax, tax.leaf_names))
    for format in FORMATS:
        r = predict(
            'in',
            '--within',
            'Calanus/Oithona group',
            '--rank',
            '1',
            '--format',
            format,
            '--out',
            f'ecotaxa_{format}.tsv',
            at=tmp_path,
        )
        assert r.code == 0, r.err
        t = FORMATS[format]().read(tmp_path / f'ecotaxa_{format}.tsv')
        assert (
            set(t.answer) == {'Calanus/Oithona group'}
            and set(t.path) == {r'Calanus\x2fOithona group'}
            and '100.0% as specific as asked' in r.err
        )


# Separators


def test_the_separator_can_be_told(tmp_path):
    (tmp_path / 't.csv').write_text('class,lineage\ncod,sea/fish;bony\nray,sea/fish;cartilage\n')
    assert (
        'sea/fish' in show(tmp_path / 't.csv', '--sep', ';').stdout
        and show(tmp_path / 't.csv', '--sep', ';').exit_code == 0
    )
    for c in ('cod', 'ray'):
        picture(tmp_path / 'zoo' / c / '1.png')
    found = load_dataset(tmp_path / 'zoo', tmp_path / 't.csv', sep=';').taxonomy
    assert (
        found.names
        == ['root', 'sea/fish', 'bony', 'cod', 'cartilage', 'ray']
        == read_taxonomy(tmp_path / 't.csv', sep=';').names
    )
    from hiermetric.running.settings import TrainConfig

    assert (
        TrainConfig.of(dict(data=dict(name=str(tmp_path / 'zoo'), taxonomy=str(tmp_path / 't.csv'), sep=';')))
        .data.load()
        .taxonomy
        == found
    )
    with pytest.raises(HiermetricError, match='no taxonomy is given'):
        load_dataset(tmp_path / 'zoo', sep=';')
    (tmp_path / 't.nwk').write_text(SLASH)
    r = show(tmp_path / 't.nwk', '--sep', ';')
    assert r.exit_code == 1 and 'is no CSV' in r.stderr
    for command in ('compare', 'features', 'train', 'evaluate'):
        assert '--sep' in CliRunner().invoke(app, [command, '--help'], env={'COLUMNS': '200', 'TERM': 'dumb'}).stdout
    r = CliRunner().invoke(app, ['features', '--data', str(tmp_path / 'zoo'), '--sep', ';'])
    assert r.exit_code == 1 and 'give one with --taxonomy' in r.stderr


# A class called root


def test_a_class_may_be_called_root(tmp_path, monkeypatch):
    (tmp_path / 't.csv').write_text('class,lineage\nroot,plant\nleaf,plant\nroot of all,evil\n')
    tax = Taxonomy.from_csv(tmp_path / 't.csv')
    assert tax.names[0] == 'root of all 3' and tax.label_index(['root', 'leaf']).tolist() == [
        tax.index('root'),
        tax.index('leaf'),
    ]
    for c in ('root', 'leaf'):
        [picture(tmp_path / 'my.data' / c / f'{i}.png', i) for i in range(2)]
    for made in (
        Taxonomy.from_folder(tmp_path / 'my.data'),
        load_dataset(tmp_path / 'my.data').taxonomy,
        Taxonomy.from_newick('(root,leaf);'),
        Taxonomy.from_paths({'root': None, 'leaf': None}),
    ):
        assert sorted(made.names) == ['leaf', 'root', 'root of all'] and made.index('root') in made.leaves
    assert (
        'root of all' in show(tmp_path / 'my.data').stdout and show(tmp_path / 't.csv').exit_code == 0
    )  # the folder has a dot, and is a folder
    with pytest.raises(TaxonomyError, match="name 'root' of the root above all classes"):
        Taxonomy.from_paths(['root'], root='root')
    assert Taxonomy.from_paths(['leaf']).names[0] == 'root'
    predict = predicts(monkeypatch, tiny_predictor(tmp_path / 'tiny', made, ['root', 'leaf']))
    r = predict('my.data', '--out', 't', at=tmp_path)
    assert r.code == 0 and '100.0% as specific as asked' in r.err
    assert set(FORMATS['csv']().read(tmp_path / 't').answer) <= {'root', 'leaf'}


# Two taxa of one name


def test_two_taxa_of_one_name_are_two(tmp_path):
    with pytest.raises(TaxonomyError) as e:
        Taxonomy.from_edges([('Moraceae', 'Ficus'), ('Ficidae', 'Ficus')], root='life')
    assert 'told apart by paths (Taxonomy.from_paths)' in str(e.value)
    with pytest.warns(TaxonomyWarning):
        tax = Taxonomy.from_paths([('Moraceae', 'Ficus'), ('Ficidae', 'Ficus')])
    assert len(tax) == 5 and tax.index(['Moraceae/Ficus', 'Ficidae/Ficus']).tolist() == [2, 4]
    (tmp_path / 'list.txt').write_text('Ficus\nMoraceae\n')
    with pytest.raises(HiermetricError, match="list.txt: 'Ficus' is the name of 2 nodes, .*give the path"):
        listed_leaves(tax, tmp_path / 'list.txt')
    (tmp_path / 'list.txt').write_text('Ficidae/Ficus\n')
    assert listed_leaves(tax, tmp_path / 'list.txt').tolist() == [False, True]
    _, table = answers(tax, np.array([2, 4]))
    assert table['path'].tolist() == ['Moraceae/Ficus', 'Ficidae/Ficus']


def test_what_is_alike_as_name_and_as_path_is_asked_for():
    tax = Taxonomy(['r', 'a/b', 'a', 'b'], [-1, 0, 0, 2])
    for ask in ('a/b', ['a/b']):
        with pytest.raises(TaxonomyError, match='is the name of 2 nodes'):
            tax.index(ask)
    assert tax.index([r'r/a\x2fb', 'r/a/b', r'a\x2fb']).tolist() == [1, 3, 1]


# Null words


def test_null_words_are_classes(tmp_path):
    rows = {o: 'grey' for o in NULLS if '/' not in o}
    for o in rows:
        picture(tmp_path / 'zoo' / o / '1.png')
    (tmp_path / 't.csv').write_text('class,lineage\n' + ''.join(f'{k},{v}\n' for k, v in rows.items()))
    (tmp_path / 'l.csv').write_text('label,family,genus\n' + ''.join(f'{o},F,G{i}\n' for i, o in enumerate(rows)))
    for tax in (
        Taxonomy.from_folder(tmp_path / 'zoo'),
        load_dataset(tmp_path / 'zoo').taxonomy,
        Taxonomy.from_paths(rows),
        Taxonomy.from_csv(tmp_path / 't.csv'),
        load_dataset(tmp_path / 'zoo', tmp_path / 't.csv').taxonomy,
    ):
        assert sorted(tax.leaf_names) == sorted(rows) and sorted(
            tax.names[i] for i in tax.label_index(list(rows))
        ) == sorted(rows)
    assert (
        set(load_dataset(tmp_path / 'zoo', tmp_path / 'l.csv').taxonomy.labels)
        == set(rows)
        == set(Taxonomy.from_csv(tmp_path / 'l.csv').labels)
    )
    assert sorted(
        load_dataset(tmp_path / 'zoo', tmp_path / 't.csv', held_out=['NA', 'null']).samples.query("split == 'unseen'")[
            'class'
        ]
    ) == ['NA', 'null']
    picked = lambda within: sorted(o for o, k in zip(tax.leaf_names, listed_leaves(tax, within)) if k)
    (tmp_path / 'list.txt').write_text('NA\nnull\nnan\n')
    assert picked(tmp_path / 'list.txt') == ['NA', 'nan', 'null'] == picked(['NA', 'nan', 'null']) and picked(
        'none'
    ) == ['none']
    (tmp_path / 'ranks.csv').write_text('label,family,genus\n' + ''.join(f'{o},grey,\n' for o in rows))
    assert tax.with_ranks(tmp_path / 'ranks.csv').rank('grey') == 'family'
    _, table = answers(tax, tax.leaves)
    table.insert(0, 'image', list(tax.leaf_names))
    for name in FORMATS:
        (tmp_path / 'a').write_text(FORMATS[name]().write(table), encoding='utf-8')
        back = FORMATS[name]().read(tmp_path / 'a')
        assert back['answer'].tolist() == list(tax.leaf_names) == back['image'].tolist() == back['guess'].tolist()
    (tmp_path / 'a').write_text(FORMATS['csv']().write(table), encoding='utf-8')
    assert [o.removeprefix("'") for o in pd.read_csv(tmp_path / 'a', keep_default_na=False)['answer']] == list(
        tax.leaf_names
    )


# Accents

NFC, NFD = 'Évadne', unicodedata.normalize('NFD', 'Évadne')


@pytest.mark.parametrize('given,asked', [(NFC, NFD), (NFD, NFC), (NFD, NFD)], ids=['composed', 'split', 'split both'])
def test_an_accent_is_an_accent_at_every_door(tmp_path, given, asked):
    clade = unicodedata.normalize('NFD' if given == NFD else 'NFC', 'Crustacé')
    (tmp_path / 't.csv').write_text(f'class,lineage\n{given},{clade}\ncod,fish\n', encoding='utf-8')
    (tmp_path / 'r.csv').write_text(f'famille é,genus\n{clade},{given}\nfish,cod\n', encoding='utf-8')
    (tmp_path / 't.nwk').write_text(f'(({given}){clade},(cod)fish);', encoding='utf-8')
    for c in (f'{clade}/{given}', 'fish/cod'):
        [picture(tmp_path / 'zoo' / c / f'{i}.png', i) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TaxonomyWarning)
        trees = [
            Taxonomy(['r', clade, given, 'fish', 'cod'], [-1, 0, 1, 0, 3]),
            Taxonomy.from_parents({given: clade, clade: 'r', 'cod': 'fish', 'fish': 'r', 'r': None}),
            Taxonomy.from_edges([('r', clade), (clade, given), ('r', 'fish'), ('fish', 'cod')]),
            Taxonomy.from_paths({given: clade, 'cod': 'fish'}),
            Taxonomy.from_csv(tmp_path / 't.csv'),
            Taxonomy.from_newick(tmp_path / 't.nwk'),
            Taxonomy.from_folder(tmp_path / 'zoo'),
            LabelGraph([('r', clade), (clade, given), ('r', 'fish'), ('fish', 'cod')]).to_tree(),
            Taxonomy(['r', 'x', 'y'], [-1, 0, 0], labels={given: [1]}),
            load_dataset(tmp_path / 'zoo').taxonomy,
        ]
        for tax in trees:
            found = tax.label_index([asked])[0]
            assert found == tax.label_index([NFC])[0] == tax.label_index([NFD])[0] and all(
                unicodedata.is_normalized('NFC', o) for o in tax.names
            )
            if not tax.labels or asked in tax.names:
                assert tax.index(asked) == tax.index([asked])[0] == found == tax.index(tax.path(found))
        tax = trees[0]
        (tmp_path / 'list.txt').write_text(f'{asked}\n', encoding='utf-8')
        for within in (asked, [asked], tmp_path / 'list.txt'):
            assert [o for o, k in zip(tax.leaf_names, listed_leaves(tax, within)) if k] == [NFC]
        held = load_dataset(tmp_path / 'zoo', held_out=[asked])
        assert set(held.samples['class'][held.samples['split'] == 'unseen']) == {NFC}
        (tmp_path / 'ranks.csv').write_text(
            f'family,genus\n{unicodedata.normalize("NFD", clade)},{asked}\nfish,cod\n', encoding='utf-8'
        )
        assert tax.with_ranks(tmp_path / 'ranks.csv').rank(NFC) == 'genus'
        named = tax.with_ranks(f'{unicodedata.normalize("NFD", "Crustacé")},genre')
        assert named.down_to('Crustacé').sum() == 3 == named.down_to(unicodedata.normalize('NFD', 'Crustacé')).sum()
        assert Taxonomy.from_csv(
            tmp_path / 'r.csv', ranks=[unicodedata.normalize('NFD', 'famille é'), 'genus']
        ).ranks == ('famille é', 'genus')
        back = Taxonomy.load(tax.save(tmp_path / 't.npz'))
        assert back == tax and back.index(asked) == tax.index(NFC)


# A locale without letters

POOR = {'LC_ALL': 'C', 'LANG': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'TERM': 'dumb', 'NO_COLOR': '1'}


def poor(*args, cwd):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONIOENCODING', 'LC_CTYPE')} | POOR
    return subprocess.run(
        [sys.executable, '-c', 'from hiermetric.running.cli import app; app(prog_name="hiermetric")', *args],
        cwd=cwd,
        env=env | {'HIERMETRIC_CACHE': str(cwd / 'cache')},
        capture_output=True,
    )


def test_a_tree_is_shown_in_any_locale(tmp_path):
    (tmp_path / 'é.csv').write_text('class,lineage\nÉvadne,Crustacé/日本\n', encoding='utf-8')
    r = poor('taxonomy', 'show', 'é.csv', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert 'Évadne' in r.stdout.decode('utf-8') and '日本' in r.stdout.decode('utf-8')  # a pipe is UTF-8
    r = poor('taxonomy', 'show', 'ü.csv', cwd=tmp_path)
    assert r.returncode == 1 and 'ü.csv' in r.stderr.decode('utf-8') and b'Traceback' not in r.stderr


@pytest.mark.long
def test_everything_runs_in_any_locale(tmp_path):
    for c in ('É/Évadne', 'É/Öithona', 'fish/cod'):
        for i in range(12):
            picture(tmp_path / 'donné' / c / f'ü{i}.png', i)
    small = ('--data', 'donné', '--size', '32', '--epochs', '1', '--device', 'cpu')
    for args in (
        ('train', *small, '--out', 'rün'),
        ('compare', *small, '--seeds', '1', '--heads', 'classifier', '--out', 'compé'),
        ('predict', 'donné', '--model', 'rün', '--within', 'Évadne,cod', '--out', 'ä/é.csv'),
        ('evaluate', 'rün', '--data', 'donné', '--size', '32', '--out', 'ä/e.csv'),
    ):
        r = poor(*args, cwd=tmp_path)
        assert r.returncode == 0, r.stderr.decode()
    t = FORMATS['csv']().read(tmp_path / 'ä' / 'é.csv')
    assert set(t['guess']) <= {'Évadne', 'cod'} and sorted(t['image']) == sorted(
        str(o.relative_to(tmp_path)) for o in (tmp_path / 'donné').rglob('*.png')
    )
    for o in (tmp_path / 'compé' / 'report.html', tmp_path / 'rün' / 'model' / 'README.md'):
        assert 'donné' in o.read_text(encoding='utf-8')
    here = subprocess.run(
        [
            sys.executable,
            '-c',
            'from hiermetric.running.cli import app; app(prog_name="hiermetric")',
            'predict',
            'donné',
            '--model',
            'rün',
            '--within',
            'Évadne,cod',
            '--out',
            'ä/é.csv',
        ],
        cwd=tmp_path,
        env=os.environ | {'HIERMETRIC_CACHE': str(tmp_path / 'cache')},
        capture_output=True,
        text=True,
    )
    assert here.returncode == 0 and 'No new image' in here.stderr  # the same names in this locale
