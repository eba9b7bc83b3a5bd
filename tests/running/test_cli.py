"""The command on tiny data, in a process of its own where that matters: what it writes, what it says, how it exits.
Every case of bad input quotes its message."""

import contextlib, json, os, re, shutil, subprocess, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from PIL import Image
from typer.testing import CliRunner
from hiermetric.running.cli import app
from hiermetric.core import HiermetricError
from hiermetric.images.features import Features
from hiermetric.trees.taxonomy import Taxonomy

CLASSES = {'ant': 'insect/walker', 'bug': 'insect/walker', 'bee': 'insect/flyer', 'crow': 'bird', 'dove': 'bird'}
SMALL = ['--size', '32', '--epochs', '2', '--device', 'cpu']


def paint(path, rng, hue):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = rng.integers(0, 60, (32, 32, 3))
    a[..., hue % 3] += 40 * (1 + hue // 3)
    Image.fromarray(a.astype(np.uint8)).save(path)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder of 5 classes with 12 images each, its taxonomy, and a cache of its own"
    root, rng = tmp_path_factory.mktemp('world'), np.random.default_rng(0)
    for i, c in enumerate(CLASSES):
        for j in range(12):
            paint(root / 'zoo' / c / f'{c}{j}.png', rng, i)
    (root / 'zoo.csv').write_text('class,lineage\n' + ''.join(f'{c},{l}\n' for c, l in CLASSES.items()))
    return root


def environment(world):
    return {'HIERMETRIC_CACHE': str(world / 'cache'), 'COLUMNS': '200', 'NO_COLOR': '1', 'TERM': 'dumb'}


def command(world, *args):
    "In a process of its own, as a user would"
    cmd = [sys.executable, '-c', 'from hiermetric.running.cli import app; app(prog_name="hiermetric")', *map(str, args)]
    r = subprocess.run(cmd, cwd=world, env=os.environ | environment(world), capture_output=True, text=True, timeout=900)
    return SimpleNamespace(code=r.returncode, out=r.stdout, err=r.stderr)


def inside(world, *args):
    "In this process, for the many small cases: importing torch takes longer than most of them"
    with contextlib.chdir(world):
        r = CliRunner().invoke(app, [*map(str, args)], prog_name='hiermetric', env=environment(world))
    if r.exception and not isinstance(r.exception, SystemExit):
        raise r.exception
    return SimpleNamespace(code=r.exit_code, out=r.stdout, err=r.stderr)


def ok(r):
    assert r.code == 0, r.err
    return r.out


def refused(r, text):
    assert r.code == 1, (r.code, r.out, r.err)
    assert 'Traceback' not in r.err and text in r.err, r.err
    said = [
        line for line in r.err.strip().splitlines() if not line.startswith('Note: ')
    ]  # pytest shows warnings that a user does not see
    assert said[0].startswith('Error: ') and (len(said) == 1 or 'unreadable' in said[0]), (
        r.err
    )  # one sentence; or a list of files


@pytest.fixture(scope='module')
def compared(world):
    return ok(command(world, 'compare', '--data', 'zoo', '--taxonomy', 'zoo.csv', '--seeds', 2, *SMALL))


def test_compare_prints_the_table_and_writes_the_report(world, compared):
    assert (
        'arcface' in compared
        and 'LogisticRegression' in compared
        and 'runs/zoo/report.html' in compared.replace('\n', '')
    )
    out = world / 'runs' / 'zoo'
    runs = pd.read_csv(out / 'runs.csv')
    assert (
        set(runs['head']) == {'classifier', 'arcface', 'LogisticRegression'}
        and set(runs['rule']) == {'argmax', 'crm', 'hie'}
        and set(runs.seed) == {0, 1}
    )
    assert (
        'data:image/svg+xml' in (out / 'report.html').read_text()
        and (out / 'table.csv').exists()
        and (out / 'summary.csv').exists()
    )


def test_compare_again_is_the_same(world, compared):
    before = (world / 'runs' / 'zoo' / 'runs.csv').read_text()
    ok(inside(world, 'compare', '--data', 'zoo', '--taxonomy', 'zoo.csv', '--seeds', 2, *SMALL))
    assert (world / 'runs' / 'zoo' / 'runs.csv').read_text() == before


def test_options_of_compare(world, compared, tmp_path):
    ok(
        inside(
            world,
            'compare',
            '--data',
            'zoo',
            '--taxonomy',
            'zoo.csv',
            '--heads',
            'classifier, cosface',
            '--seeds',
            1,
            '--rules',
            'crm',
            '--no-yardstick',
            '--tune',
            2,
            '--out',
            tmp_path / 'x',
            *SMALL,
        )
    )
    runs = pd.read_csv(tmp_path / 'x' / 'runs.csv')
    assert set(runs['head']) == {'classifier', 'cosface'} and set(runs['rule']) == {'crm'}
    assert pd.read_csv(tmp_path / 'x' / 'tuning.csv').groupby('head').size().tolist() == [2, 2]


def test_features_train_evaluate(world, tmp_path):
    data = ['--data', 'zoo', '--taxonomy', 'zoo.csv', '--size', 32]
    said = ok(inside(world, 'features', *data, '--out', tmp_path / 'f'))
    assert '60 images' in said and '1280 features each' in said and (tmp_path / 'f').is_dir()
    assert 'Run: ' in ok(
        inside(
            world,
            'train',
            *data,
            '--head',
            'arcface',
            '--epochs',
            2,
            '--lr',
            0.01,
            '--device',
            'cpu',
            '--out',
            tmp_path / 'run',
        )
    )
    assert (tmp_path / 'run' / 'model' / 'model.safetensors').exists() and len(
        pd.read_csv(tmp_path / 'run' / 'history.csv')
    ) == 2
    assert (
        'hd@1'
        in ok(
            inside(world, 'evaluate', tmp_path / 'run', *data, '--rules', 'argmax,crm', '--out', tmp_path / 'e.csv')
        ).lower()
    )
    assert pd.read_csv(tmp_path / 'e.csv', index_col=0).loc['crm', 'top1'] >= 0
    refused(
        inside(
            world,
            'train',
            *data,
            '--head',
            'arcface',
            '--epochs',
            3,
            '--lr',
            0.01,
            '--device',
            'cpu',
            '--out',
            tmp_path / 'run',
        ),
        'holds a run with other settings: epochs 2, now 3. Choose another folder, or start over',
    )
    ok(
        inside(
            world,
            'train',
            *data,
            '--head',
            'arcface',
            '--epochs',
            3,
            '--lr',
            0.01,
            '--device',
            'cpu',
            '--out',
            tmp_path / 'run',
            '--fresh',
        )
    )


def test_held_out_classes(world, tmp_path):
    data, held = ['--data', 'zoo', '--taxonomy', 'zoo.csv', '--size', 32], ['--held-out', 'ant, dove']
    assert '24 unseen' in ok(inside(world, 'features', *data, *held, '--out', tmp_path / 'f'))
    f = Features.load(tmp_path / 'f')
    assert {c.split('/')[-1] for c in f.taxonomy.names[f.targets[f.split == 'unseen']]} == {
        'ant',
        'dove',
    } and f.taxonomy.n_leaves == 5
    assert '12 unseen' in ok(inside(world, 'features', *data, '--held-out', 1))
    run = [*data, *held, '--epochs', 2, '--device', 'cpu', '--out', tmp_path / 'run']
    ok(inside(world, 'train', *run))
    ok(
        inside(
            world,
            'evaluate',
            tmp_path / 'run',
            *data,
            *held,
            '--split',
            'unseen',
            '--rules',
            'argmax',
            '--out',
            tmp_path / 'e.csv',
        )
    )
    assert pd.read_csv(tmp_path / 'e.csv').n.tolist() == [24]
    refused(
        inside(world, 'train', *data, '--epochs', 2, '--device', 'cpu', '--out', tmp_path / 'run'),
        'belongs to other features',
    )  # the same folder without them
    ok(
        inside(
            world,
            'compare',
            *data,
            *held,
            '--heads',
            'classifier',
            '--seeds',
            1,
            '--rules',
            'argmax',
            '--no-yardstick',
            '--epochs',
            2,
            '--device',
            'cpu',
            '--out',
            tmp_path / 'c',
        )
    )
    refused(inside(world, 'features', *data, '--held-out', 'ant,bea'), "Class 'bea' cannot be held out")
    refused(inside(world, 'features', *data, '--held-out', 5), '5 classes cannot be held out of 5')


def test_taxonomy_show(world):
    said = ok(inside(world, 'taxonomy', 'show', 'zoo.csv'))
    assert '5 leaves, 10 nodes, height 3' in said and 'walker' in said and 'crow' in said
    assert 'crow' not in ok(inside(world, 'taxonomy', 'show', 'zoo.csv', '--depth', 1))


def test_version_help_and_usage(world):
    from hiermetric import __version__

    assert ok(command(world, '--version')) == f'hiermetric {__version__}\n'
    for words in (
        [],
        ['compare'],
        ['features'],
        ['train'],
        ['evaluate'],
        ['predict'],
        ['taxonomy'],
        ['taxonomy', 'show'],
    ):
        said = ok(inside(world, *words, '--help'))
        assert 'Usage: hiermetric' in said and (words in ([], ['taxonomy']) or 'Example' in said)
        assert ('--held-out' in said) == (words in (['compare'], ['features'], ['train'], ['evaluate']))
    for wrong in (
        ['compare', '--seeds', '0'],
        ['compare', '--seeds', 'five'],
        ['compare', '--sedes', '5'],
        ['evaluate'],
        ['compair'],
    ):
        assert inside(world, *wrong).code == 2
    r = command(world, 'compair')
    assert r.code == 2 and 'compare' in r.err


def test_help_needs_no_torch(world):
    code = (
        'import sys\nfrom hiermetric.running.cli import app\ntry: app(["compare", "--help"])\nexcept SystemExit: pass\n'
        'assert not {"torch", "pandas", "timm"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


# predict


@pytest.fixture(scope='module')
def trained(world):
    "The one road: train, then predict"
    return ok(
        command(
            world, 'train', '--data', 'zoo', '--taxonomy', 'zoo.csv', *SMALL, '--head', 'classifier', '--out', 'trained'
        )
    )


@pytest.fixture
def quick(monkeypatch):
    "The engine that needs no preparation"
    import hiermetric.running.calibrated as m

    monkeypatch.setattr(m, 'choose_engine', lambda name='auto': 'eager')


def test_train_then_predict(world, trained, tmp_path):
    assert 'Next: hiermetric predict IMAGES --model trained' in trained
    r = command(world, 'predict', 'zoo', '--model', 'trained', '--out', tmp_path / 'a.csv')
    ok(r)
    assert r.out == '' and '60 images: ' in r.err and f'Answers: {tmp_path}/a.csv' in r.err
    a = pd.read_csv(tmp_path / 'a.csv', keep_default_na=False)
    assert (
        len(a) == 60
        and a.image[0] == 'zoo/ant/ant0.png'
        and set(a.columns) >= {'answer', 'path', 'probability', 'novel', 'guess', 'candidate_1'}
        and set(a.guess) <= set(CLASSES)
    )
    assert (world / 'trained' / 'model' / 'README.md').exists() and 'predict FOLDER --model trained' in (
        world / 'trained' / 'model' / 'README.md'
    ).read_text()


def test_predict_continues(world, trained, tmp_path, quick):
    from hiermetric.running.answers import AnswerFile

    ask = lambda *more: inside(
        world, 'predict', *more, '--model', 'trained', '--confidence', 0.8, '--out', tmp_path / 'a.csv'
    )
    ok(ask('zoo/ant', 'zoo/bee'))
    (tmp_path / 'a.csv').open('a').write('zoo/crow/crow0.png,bi')
    assert '36 images' in ask('zoo').err
    a, whole = pd.read_csv(tmp_path / 'a.csv'), tmp_path / 'whole.csv'
    assert sorted(a.image) == sorted(f'zoo/{c}/{c}{i}.png' for c in CLASSES for i in range(12))
    ok(inside(world, 'predict', 'zoo', '--model', 'trained', '--confidence', 0.8, '--out', whole))
    pd.testing.assert_frame_equal(
        a.sort_values('image', ignore_index=True),
        pd.read_csv(whole).sort_values('image', ignore_index=True),
        rtol=1e-4,
        atol=1e-5,
    )
    assert 'No new image' in ask('zoo').err
    refused(
        inside(world, 'predict', 'zoo', '--model', 'trained', '--confidence', 0.9, '--out', tmp_path / 'a.csv'),
        'holds answers to another question: confidence 0.8, now 0.9',
    )
    assert AnswerFile(tmp_path / 'a.csv', about=json.loads((tmp_path / 'a.csv.json').read_text())['about']).images == 60


@pytest.mark.parametrize('format', ['csv', 'json', 'ecotaxa', 'dwc'])
def test_predict_in_every_format(world, trained, quick, format):
    from hiermetric.running.formats import FORMATS

    ask = (
        'predict',
        'zoo/ant',
        'zoo/dove',
        '--model',
        'trained',
        '--rule',
        'argmax',
        '--within',
        'bird, walker',
        '--candidates',
        1,
        '--format',
        format,
    )
    ok(inside(world, *ask, '--out', world / f't.{format}'))
    said = inside(world, *ask)  # without --out: to the terminal, and nothing else there
    assert ok(said) == (world / f't.{format}').read_text() and '24 images: 100.0% as specific as asked' in said.err
    t = FORMATS[format]().read(world / f't.{format}')
    assert len(t) == 24 and set(t.answer) <= {'ant', 'bug', 'crow', 'dove'} and t.listed.between(0, 1).all()


def test_predict_at_a_rank_within_a_list(world, trained, tmp_path, quick):
    (world / 'list.txt').write_text('insect\nAves\n')
    r = inside(
        world,
        'predict',
        'zoo/ant',
        '--model',
        'trained',
        '--rule',
        'argmax',
        '--rank',
        2,
        '--within',
        'list.txt',
        '--out',
        tmp_path / 't',
    )
    assert ok(r) == '' and "1 of the 2 names in list.txt are unknown to this model (Aves)" in r.err
    assert set(pd.read_csv(tmp_path / 't').answer) <= {'walker', 'flyer'}
    (world / 'ranks.csv').write_text(
        'class,order,species\ninsect,walker,ant\ninsect,walker,bug\ninsect,flyer,bee\nbird,,crow\nbird,,dove\n'
    )
    ok(
        inside(
            world,
            'predict',
            'zoo/ant',
            '--model',
            'trained',
            '--rule',
            'argmax',
            '--rank',
            'class',
            '--ranks',
            'ranks.csv',
            '--out',
            tmp_path / 'u',
        )
    )
    u = pd.read_csv(tmp_path / 'u', keep_default_na=False)
    assert set(u.answer) <= {'insect', 'bird'} and set(u['rank']) == {'class'}
    refused(
        inside(world, 'predict', 'zoo/ant', '--model', 'trained', '--rank', 'family', '--ranks', 'ranks.csv'),
        "There is no rank 'family'; there are class, order, species",
    )
    refused(
        inside(world, 'predict', 'zoo/ant', '--model', 'trained', '--rank', 'family'),
        'does not know which taxa are of the rank',
    )


def test_predict_with_unreadable_images(world, trained, tmp_path, quick):
    zoo(world, tmp_path, n=3)
    (tmp_path / 'zoo' / 'bee' / 'torn.png').write_bytes(b'torn')
    ask = ('predict', tmp_path / 'zoo', '--model', 'trained', '--out', tmp_path / 't')
    refused(inside(world, *ask), 'torn.png')
    r = inside(world, *ask, '--skip-bad')
    ok(r)
    assert (
        'torn.png' in r.err and '1 unreadable images were left out' in r.err and len(pd.read_csv(tmp_path / 't')) == 15
    )
    refused(
        inside(world, 'predict', tmp_path / 'zoo' / 'bee' / 'torn.png', '--model', 'trained', '--skip-bad'),
        'None of the images can be read',
    )


@pytest.mark.parametrize(
    'args,says',
    [
        (['zooo', '-m', 'trained'], "There is no image or folder zooo. Did you mean 'zoo'"),
        (['empty', '-m', 'trained'], 'There is no image in empty'),
        (['zoo', '-m', 'empty'], 'There is no model in empty: it has no config.json'),
        (['zoo', '-m', 'traind'], "There is no model folder traind. Did you mean 'trained'"),
        (['zoo', '-m', 'plain'], 'has no calibration, so it cannot promise anything'),
        (['zoo', '-m', 'mixed'], 'files of different models are mixed'),
        (['zoo', '-m', 'regrown'], 'belongs to the taxonomy'),
        (
            ['zoo', '-m', 'trained', '--within', 'birds'],
            "There is no 'birds' in the tree of 'root'. Did you mean 'bird'",
        ),
        (['zoo', '-m', 'trained', '-c', '1.2'], 'The confidence must lie between 0 and 1, not 1.2'),
        (['zoo', '-m', 'trained', '-c', '95'], 'Write 0.95 for 95 %'),
        (['zoo', '-m', 'trained', '--format', 'xls'], "There is no format 'xls'; there are csv, json, ecotaxa, dwc"),
        (['zoo', '-m', 'trained', '--rule', 'garantee'], "Did you mean 'guarantee'"),
        (['zoo', '-m', 'trained', '-o', 'zoo.csv'], 'is no table of answers that could be continued'),
    ],
    ids=lambda o: ' '.join(o) if isinstance(o, list) else '',
)
def test_predict_with_bad_input(world, trained, args, says, quick):
    (world / 'empty').mkdir(exist_ok=True)
    for name in ('plain', 'mixed', 'regrown'):
        if not (world / name).exists():
            shutil.copytree(world / 'trained' / 'model', world / name)
    config = json.loads((world / 'plain' / 'config.json').read_text())
    config.pop('predictor', None)
    (world / 'plain' / 'config.json').write_text(json.dumps(config))
    config = json.loads((world / 'mixed' / 'config.json').read_text())
    config['predictor']['temperature'] = 9.0
    (world / 'mixed' / 'config.json').write_text(json.dumps(config))
    Taxonomy.from_paths({'x': 'y'}).save(world / 'regrown' / 'taxonomy.npz')
    for name in ('plain', 'mixed', 'regrown'):
        (world / name / 'SHA256SUMS').unlink(missing_ok=True)  # as a folder of before: what is inside tells, too
    refused(inside(world, 'predict', *args), says)


# Anybody's table: ranks as they come, chains, labels that are no names


@pytest.fixture(scope='module')
def ranked(world):
    """A table of rank columns in which the heading `class` stands twice, genera with one species, a class at a family,
    a class without images and one without a rank"""
    rows = {
        'ant': 'Insecta,Hymenoptera,Formicidae,Formica,Formica rufa',
        'bee': 'Insecta,Hymenoptera,Apidae,Apis,Apis mellifera',
        'bug': 'Insecta,Hemiptera,Cimicidae,,',
        'crow': 'Aves,Passeriformes,Corvidae,Corvus,Corvus corax',
        'dove': 'Aves,,,,',
        'yak': 'Mammalia,,Bovidae,Bos,Bos mutus',
    }
    (world / 'ranked.csv').write_text(
        'class,class,order,family,genus,species\n' + ''.join(f'{k},{v}\n' for k, v in rows.items())
    )
    r = command(
        world, 'train', '--data', 'zoo', '--taxonomy', 'ranked.csv', *SMALL, '--head', 'classifier', '--out', 'ranked'
    )
    ok(r)
    return {k: [o or None for o in v.split(',')] for k, v in rows.items()}, r


def test_notes_are_said_by_all_alike(world, ranked):
    for r in (
        ranked[1],
        inside(world, 'features', '--data', 'zoo', '--taxonomy', 'ranked.csv', '--size', 32),
        inside(
            world,
            'compare',
            '--data',
            'zoo',
            '--taxonomy',
            'ranked.csv',
            '--seeds',
            1,
            '--heads',
            'classifier',
            '--out',
            'compared-ranked',
            *SMALL,
        ),
    ):
        ok(r)
        assert 'Note: 1 class without images was cut from the tree (yak)' in r.err


def test_the_tree_of_a_model_is_the_table(world, ranked):
    tax = Taxonomy.load(world / 'ranked' / 'model' / 'taxonomy.npz')
    assert tax.ranks == ('class', 'order', 'family', 'genus', 'species') and tax.labels.keys() == {
        'ant',
        'bee',
        'bug',
        'crow',
        'dove',
    }
    assert {tax.path(i) for i in tax.leaves} == {
        'root/' + '/'.join(filter(None, v)) for k, v in ranked[0].items() if k not in ('yak', 'dove')
    } and tax.path(tax.label_index(['dove'])[0]) == 'root/Aves'
    said = ok(
        inside(world, 'train', '--data', 'zoo', '--taxonomy', 'ranked.csv', '--contract', *SMALL, '--out', 'short')
    )
    assert len(Taxonomy.load(world / 'short' / 'model' / 'taxonomy.npz')) < len(tax)


@pytest.mark.parametrize('rank', ['class', 'order', 'family', 'genus', 'species'])
def test_a_rank_asked_for_is_a_rank_kept(world, ranked, tmp_path, quick, rank):
    ok(
        inside(
            world,
            'predict',
            'zoo',
            '--model',
            'ranked',
            '--rule',
            'argmax',
            '--rank',
            rank,
            '--novel',
            0,
            '--out',
            tmp_path / 't',
        )
    )
    t, names = pd.read_csv(tmp_path / 't', keep_default_na=False), ['class', 'order', 'family', 'genus', 'species']
    at = {n: names[k] for row in ranked[0].values() for k, n in enumerate(row) if n}
    most = names.index(rank)
    for row in t.to_dict('records'):
        own = next(v for v in ranked[0].values() if [o for o in v if o][-1] == row['guess'] or row['guess'] in v)
        assert row['rank'] == at[row['answer']] and names.index(row['rank']) <= most
        named = [o for o in own[: most + 1] if o]
        assert row['answer'] == named[-1] and [row[o] for o in names] == [
            o or '' for o in own[: names.index(row['rank']) + 1]
        ] + [''] * (4 - names.index(row['rank']))


def test_darwin_core_has_the_ranks(world, ranked, tmp_path, quick):
    ok(
        inside(
            world,
            'predict',
            'zoo',
            '--model',
            'ranked',
            '--rule',
            'argmax',
            '--novel',
            0,
            '--format',
            'dwc',
            '--out',
            tmp_path / 't',
        )
    )
    t = pd.read_csv(tmp_path / 't', keep_default_na=False)
    own = {v[-1]: v[:-1] for v in ranked[0].values() if v[-1]}
    species = t[t.scientificName.isin(own)]
    assert (
        len(species)
        and set(species.taxonRank) == {'species'}
        and all(
            row[['class', 'order', 'family', 'genus']].tolist() == own[row.scientificName]
            for _, row in species.iterrows()
        )
    )
    from hiermetric.running.formats import FORMATS

    back = FORMATS['dwc']().read(tmp_path / 't')
    assert list(back)[:9] == [
        'image',
        'answer',
        'rank',
        'path',
        'class',
        'order',
        'family',
        'genus',
        'species',
    ] and set(back.species) <= {'Formica rufa', 'Apis mellifera', 'Corvus corax', ''}


def test_a_novel_image_is_no_known_species(world, ranked, tmp_path, quick):
    ask = ('predict', 'zoo', '--model', 'ranked', '--rule', 'argmax', '--out')
    ok(inside(world, *ask, tmp_path / 'a', '--novel', 0))
    ok(inside(world, *ask, tmp_path / 'b', '--novel', 0.9))
    a, b = (pd.read_csv(tmp_path / o, keep_default_na=False) for o in 'ab')
    lone = b.novel & a['rank'].eq('species')
    assert (
        lone.any()
        and (b.answer[lone] == a.genus[lone]).all()
        and (b.answer[~b.novel] == a.answer[~b.novel]).all()
        and (b.probability == a.probability).all()
    )


def test_a_newick_file_with_several_trees(world):
    (world / 'two.nwk').write_text(
        '((ant,bug)walker,bee,(crow,dove)bird);\n((ant,bee)Hymenoptera,bug,(crow,dove)bird);\n'
    )
    r = inside(world, 'taxonomy', 'show', 'two.nwk')
    assert 'walker' in ok(r) and '2 trees, and this is the first' in r.err
    assert 'Hymenoptera' in ok(inside(world, 'taxonomy', 'show', 'two.nwk', '--tree', 2))
    ok(inside(world, 'features', '--data', 'zoo', '--taxonomy', 'two.nwk', '--tree', 2, '--size', 32))
    refused(
        inside(world, 'features', '--data', 'zoo', '--taxonomy', 'two.nwk', '--tree', 3, '--size', 32),
        'There is no tree 3; the source holds 2',
    )
    refused(
        inside(world, 'features', '--data', 'zoo', '--tree', 3, '--size', 32),
        'chooses among the trees of a Newick file',
    )


# Bad input: DESIGN.md's last section, case by case


def zoo(world, tmp_path, classes=CLASSES, csv=CLASSES, n=8):
    rng = np.random.default_rng(1)
    for i, c in enumerate(classes):
        for j in range(n):
            paint(tmp_path / 'zoo' / c / f'{c}{j}.png', rng, i)
    (tmp_path / 'zoo.csv').write_text('class,lineage\n' + ''.join(f'{c},{l}\n' for c, l in csv.items()))
    return ['--data', tmp_path / 'zoo', '--taxonomy', tmp_path / 'zoo.csv', '--size', 32]


def test_wrong_path(world):
    refused(command(world, 'features', '--data', 'zooo', '--taxonomy', 'zoo.csv'), "'zooo' is neither a data set (")
    refused(inside(world, 'features', '--data', 'zoo', '--taxonomy', 'zoos.csv'), 'There is no taxonomy file zoos.csv')
    refused(inside(world, 'features', '--data', 'plankton-set'), "Did you mean 'planktonset'")
    refused(
        inside(world, 'evaluate', 'nowhere', '--data', 'zoo', '--taxonomy', 'zoo.csv', '--size', 32),
        'There is no finished run in nowhere',
    )


def test_class_outside_the_tree(world, tmp_path):
    args = zoo(world, tmp_path, classes=[*CLASSES, 'doves'])
    refused(inside(world, 'features', *args), "Class 'doves' is not in the taxonomy")


def test_empty_folder(world, tmp_path):
    (tmp_path / 'empty').mkdir()
    refused(
        inside(world, 'features', '--data', tmp_path / 'empty', '--taxonomy', 'zoo.csv'),
        f'There is no image in {tmp_path}/empty',
    )


def test_unreadable_image(world, tmp_path):
    args = zoo(world, tmp_path)
    for name, content in (
        ('torn.png', (tmp_path / 'zoo' / 'ant' / 'ant0.png').read_bytes()[:60]),
        ('words.jpg', b'not an image'),
    ):
        (tmp_path / 'zoo' / 'ant' / name).write_bytes(content)
    refused(inside(world, 'features', *args), 'Cannot read the image')
    r = inside(world, 'features', *args, '--skip-bad')
    assert '40 images' in ok(r) and 'torn.png' in r.out + r.err and 'words.jpg' in r.out + r.err


@pytest.mark.parametrize(
    'csv,text',
    [
        ('', "has no column 'lineage'; it has none."),
        ('name,path\nant,insect\n', "has no column 'lineage'; it has 'name', 'path'."),
        ('class,lineage\n', 'The tree is empty; give it at least one class.'),
    ],
)
def test_broken_taxonomy_file(world, tmp_path, csv, text):
    (tmp_path / 'bad.csv').write_text(csv)
    refused(inside(world, 'taxonomy', 'show', tmp_path / 'bad.csv'), text)


def test_what_was_mended_is_a_note_and_not_an_error(world, tmp_path):
    (tmp_path / 'twice.csv').write_text('class,lineage\nant,insect/ant/red\nbee,insect\n')
    r = inside(world, 'taxonomy', 'show', tmp_path / 'twice.csv')
    assert '2 leaves' in ok(r) and r.err.startswith('Note: ') and 'ant' in r.err and 'taxonomy.py' not in r.err


@pytest.mark.parametrize(
    'edges,text',
    [
        ([('a', 'b'), ('b', 'c'), ('c', 'a')], 'cycle'),
        ([('a', 'b'), ('c', 'b')], 'two parents|2 parents'),
        ([('a', 'b'), ('c', 'd')], 'roots'),
        ([], 'The tree is empty'),
    ],
)
def test_edges_that_are_no_tree(edges, text):
    with pytest.raises(HiermetricError, match=text):
        Taxonomy.from_edges(edges)


def test_misspelt_names(world):
    data = ['--data', 'zoo', '--taxonomy', 'zoo.csv', '--size', 32]
    refused(inside(world, 'compare', *data, '--heads', 'arcfase'), "There is no head 'arcfase'")
    refused(inside(world, 'compare', *data, '--rules', 'cmr'), "Did you mean 'crm'")
    refused(
        inside(world, 'features', '--data', 'zoo', '--taxonomy', 'zoo.csv', '--backbone', 'resnet19'),
        "There is no backbone 'resnet19'",
    )
    refused(inside(world, 'train', *data, '--device', 'tpu'), "This machine has no device 'tpu'")


def test_too_few_images(world, tmp_path):
    args = zoo(world, tmp_path, n=1)
    refused(inside(world, 'compare', *args), "There are no features in the split 'val'")


def test_model_of_another_taxonomy(world, tmp_path):
    data = ['--data', 'zoo', '--taxonomy', 'zoo.csv', '--size', 32]
    ok(inside(world, 'train', *data, '--epochs', 1, '--device', 'cpu', '--out', tmp_path / 'run'))
    (tmp_path / 'flat.csv').write_text(
        'class,lineage\n' + ''.join(f'{c},{l.split("/")[0]}\n' for c, l in CLASSES.items())
    )
    other = ['--data', 'zoo', '--taxonomy', tmp_path / 'flat.csv', '--size', 32]
    r = inside(world, 'evaluate', tmp_path / 'run', *other)
    refused(r, 'belongs to the taxonomy')
    assert len(set(re.findall(r'\b[0-9a-f]{16}\b', r.err))) == 2  # both trees are named
    refused(
        inside(world, 'train', *other, '--epochs', 1, '--device', 'cpu', '--out', tmp_path / 'run'),
        'belongs to other taxonomy',
    )


def test_debug_shows_the_traceback(world):
    r = command(world, '--debug', 'features', '--data', 'zooo')
    assert r.code == 1 and 'Traceback' in r.err and 'HiermetricError' in r.err


def test_a_bug_of_ours_keeps_its_traceback(world):
    code = (
        'import hiermetric.running.cli as c\ndef broken(*a): raise ZeroDivisionError("ours")\nc._read_tree = broken\n'
        'c.app(["taxonomy", "show", "x.csv"])'
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 1 and 'Traceback' in r.stderr and 'ZeroDivisionError: ours' in r.stderr
