"""A table of answers loses nothing and holds nothing twice: odd file names, other spellings, rows of other people,
formulas, Ctrl-C, a full disk."""

import csv, errno, json, os, warnings
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from answering import picture, predicts, tiny_predictor
from hiermetric.core import HiermetricError
from hiermetric.running.formats import FORMATS
from hiermetric.running.answers import AnswerFile
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def predictor(tmp_path_factory):
    tax = Taxonomy.from_paths({'Calanus': 'Copepoda', 'Oithona': 'Copepoda', 'Évadne': 'Cladocera'})
    return tiny_predictor(tmp_path_factory.mktemp('tiny'), tax, ['Calanus', 'Oithona', 'Évadne'])


@pytest.fixture
def predict(monkeypatch, predictor):
    return predicts(monkeypatch, predictor)


def told(images, **more):
    return pd.DataFrame(
        {
            'image': images,
            'answer': 'Calanus',
            'rank': 'genus',
            'path': 'Copepoda/Calanus',
            'probability': 0.75,
            'novel': False,
            'guess': 'Calanus',
            'guess_probability': 0.5,
        }
        | more
    )


ODD = [
    'new\nline.png',
    'return\r.png',
    'tab\t.png',
    os.fsdecode(b'caf\xe9.png'),
    'é.png',
    '=1+1.png',
    '-1.png',
    '+1.png',
    '@x.png',
    '\t=x.png',
    "'=x.png",
    "'plain.png",
    '"quoted".png',
    r'back\x41slash.png',
    'a,b;c.png',
    ' blank .png',
    'NA',
    'null',
    '#x.png',
    '\ufefftwo marks.png',
]

# Names of files


@pytest.mark.parametrize('format', list(FORMATS))
def test_any_name_is_answered_once(tmp_path, predict, format):
    for i, o in enumerate(ODD):
        picture(tmp_path / 'in' / (o if o.endswith('.png') else o + '.png'), i)
    out = tmp_path / 'ecotaxa_t.tsv'
    ask = ('in', '--format', format, '--out', out)
    r = predict(*ask, at=tmp_path)
    assert r.code == 0, r.err
    out.read_bytes().decode('utf-8')  # valid, whatever the names are
    images = FORMATS[format]().read(out)['image'].tolist()
    assert sorted(images) == sorted(str(o.relative_to(tmp_path)) for o in (tmp_path / 'in').iterdir())
    assert 'No new image' in predict(*ask, at=tmp_path).err and FORMATS[format]().read(out)['image'].tolist() == images


def test_a_spelling_is_no_other_image(tmp_path, predict):
    picture(tmp_path / 'in' / 'a.png')
    picture(tmp_path / 'in' / 'b.png', 1)
    (tmp_path / 'link').symlink_to('in')
    (tmp_path / 'elsewhere').mkdir()
    out = tmp_path / 't.csv'
    count = lambda: FORMATS['csv']().read(out)['image'].tolist()
    assert predict(
        'in/a.png', './in/a.png', tmp_path / 'in' / 'a.png', 'in/../in/a.png', 'link/a.png', '--out', out, at=tmp_path
    ).code == 0 and count() == ['in/a.png']
    for again in ('./in/a.png', tmp_path / 'in' / 'a.png', 'link/a.png'):
        assert 'No new image' in predict(again, '--out', out, at=tmp_path).err
    assert 'No new image' in predict('../in/a.png', '--out', out, at=tmp_path / 'elsewhere').err
    assert predict('b.png', '--out', out, at=tmp_path / 'in').code == 0 and count() == [
        'in/a.png',
        'in/b.png',
    ]  # relative to where the first run stood
    assert 'No new image' in predict(tmp_path / 'in', '--out', out, at='/').err
    (tmp_path / 'moved').mkdir()
    [o.rename(tmp_path / 'moved' / o.name) for o in list(tmp_path.iterdir()) if o.name != 'moved']
    assert (
        'No new image' in predict('in', '--out', 't.csv', at=tmp_path / 'moved').err
    )  # the folder as a whole may move


def test_the_same_name_elsewhere_is_another_image(tmp_path, predict):
    for d in 'xy':
        picture(tmp_path / d / 'a.png')
    for d in 'xy':
        assert '1 images' in predict('a.png', '--out', tmp_path / 't.csv', at=tmp_path / d).err
    assert FORMATS['csv']().read(tmp_path / 't.csv')['image'].tolist() == ['a.png', '../y/a.png']


# What somebody else wrote


def grown(tmp_path, format, more, **note):
    "A table of one answer with something behind it"
    path = tmp_path / 't'
    AnswerFile(path, format).append(told(['a.png']))
    before = path.read_bytes()
    if note:
        (tmp_path / 't.json').write_text(
            json.dumps(json.loads((tmp_path / 't.json').read_text()) | {k: v(len(before)) for k, v in note.items()})
        )
    path.write_bytes(before + more)
    return path, before


def line(format, image):
    return FORMATS[format]().write(told([image]), first=False).encode()


@pytest.mark.parametrize('format', list(FORMATS))
@pytest.mark.parametrize('end', [b'\n', b'\r\n', b'', b'\n\n'], ids=['lf', 'crlf', 'none', 'blank line'])
def test_a_row_added_by_hand_stays(tmp_path, format, end):
    path, before = grown(tmp_path, format, line(format, 'b.png').rstrip(b'\n') + end)
    with pytest.warns(UserWarning, match=r'holds 1 rows that were added since the last answer \(the last for b.png\)'):
        file = AnswerFile(path, format)
    assert list(file.missing(['a.png', 'b.png', 'c.png'])) == ['c.png'] and file.images == 2
    file.append(told(['c.png']))
    assert FORMATS[format]().read(path)['image'].tolist() == [
        'a.png',
        'b.png',
        'c.png',
    ] and path.read_bytes().startswith(before)


@pytest.mark.parametrize('format', ['csv', 'ecotaxa', 'dwc', 'json'])
def test_a_row_changed_by_hand_stays(tmp_path, format):
    path = tmp_path / 't'
    AnswerFile(path, format).append(told(['a.png', 'b.png']))
    text = path.read_text(encoding='utf-8')
    path.write_text(text.replace('Calanus', 'Calanus or so'), encoding='utf-8')
    with pytest.warns(UserWarning, match='was changed since the last answer; its 2 rows stay'):
        file = AnswerFile(path, format)
    file.append(told(['c.png']))
    assert FORMATS[format]().read(path)['guess'].tolist() == ['Calanus or so'] * 2 + ['Calanus'] and not list(
        file.missing(['a.png', 'b.png'])
    )


@pytest.mark.parametrize(
    'more',
    [
        b'b.png,Calanus\n',
        b'precious words\n',
        line('csv', 'b.png').replace(b'0.75', b'sure'),
        b'"b.png,Calanus\nc.png,Calanus\n',
    ],
    ids=['short', 'words', 'no number', 'open quote'],
)
def test_what_is_no_row_is_refused_and_kept(tmp_path, more):
    path, before = grown(tmp_path, 'csv', more)
    with pytest.raises(HiermetricError, match='line 3, is no row of its table'):
        AnswerFile(path, 'csv')
    assert path.read_bytes() == before + more


def test_an_open_quote_amid_the_table_eats_nothing(tmp_path):
    path = tmp_path / 't'
    AnswerFile(path).append(told(['a.png', 'b.png', 'c.png']))
    path.write_text(harmed := path.read_text().replace('b.png', '"b.png'))
    with pytest.raises(HiermetricError, match='line 3, is no row'):
        AnswerFile(path)
    assert path.read_text() == harmed


def test_half_a_line_is_cut_and_said(tmp_path):
    path, before = grown(tmp_path, 'csv', b'b.png,Cal')
    with pytest.warns(UserWarning, match='ended in half a line, which was cut off: b.png,Cal'):
        AnswerFile(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize('format', list(FORMATS))
def test_what_a_crash_left_is_ours(tmp_path, format, monkeypatch):
    "Cut at any byte of a block that was being written: no word, no loss, no row twice"
    monkeypatch.chdir(tmp_path)
    block = FORMATS[format]().write(told(['b.png', 'c\nd.png']), first=False).encode()
    for cut in range(0, len(block) + 1, 7):
        path, before = grown(tmp_path, format, block[:cut], end=lambda n: n + len(block))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            file = AnswerFile(path, format)
        left = list(file.missing(['a.png', 'b.png', 'c\nd.png']))
        if left:
            file.append(told(left))
        assert path.read_bytes() == before + block
        path.unlink()


def test_other_columns_are_not_mixed_in(tmp_path):
    AnswerFile(tmp_path / 't').append(told(['a.png']))
    with pytest.raises(HiermetricError, match='has the columns .*, and these answers have'):
        AnswerFile(tmp_path / 't').append(told(['b.png'], family='Calanidae'))


def test_two_writers_in_one_process_are_noticed(tmp_path):
    one, two = AnswerFile(tmp_path / 't'), AnswerFile(tmp_path / 't')
    one.append(told(['a.png']))
    with pytest.raises(HiermetricError, match='was changed by somebody else'):
        two.append(told(['a.png']))


def test_a_changed_list_is_another_question(tmp_path, predict):
    picture(tmp_path / 'in' / 'a.png')
    (tmp_path / 'list.txt').write_text('Copepoda\n')
    ask = ('in', '--within', 'list.txt', '--out', 't.csv')
    assert predict(*ask, at=tmp_path).code == 0 and predict(*ask, at=tmp_path).code == 0
    (tmp_path / 'list.txt').write_text('Cladocera\n')
    r = predict(*ask, at=tmp_path)
    assert r.code == 1 and 'holds answers to another question: within' in r.err


# Formats


@pytest.mark.parametrize('format', ['csv', 'ecotaxa', 'dwc'])
@pytest.mark.parametrize('cell', ['=cmd|x', '+1', '-1', '@sum', '\t=1', '\r=1', '\n=1', "'=1", "''+1", "'plain", '＝1'])
def test_no_spreadsheet_runs_a_cell(format, cell, tmp_path):
    from hiermetric.running.questions import join_path

    form = FORMATS[format]()
    table = told(
        [cell + '.png'],
        answer=cell,
        guess=cell,
        path=join_path([cell]),
        rank=cell,
        candidate_1=cell,
        candidate_1_probability=0.5,
        **{cell: cell},
    )  # also the name of a rank
    (tmp_path / 't').write_text(form.write(table), encoding='utf-8')
    with (tmp_path / 't').open(encoding='utf-8-sig', newline='') as f:
        cells = [o for row in csv.reader(f, delimiter=form.sep) for o in row]
    assert cells and not [o for o in cells if o[:1] in tuple('=+-@\t\r\n＝')]
    back = form.read(tmp_path / 't')
    for c in ('image', 'answer', 'guess', 'rank', 'candidate_1', 'path', cell):
        assert back[c].tolist() == table[c].tolist()


anything = st.text(
    st.one_of(
        st.characters(codec='utf-8'), st.sampled_from('=+-@\t\r\n\'"\\x/|>, 0a1'), st.integers(0xDC80, 0xDCFF).map(chr)
    ),
    min_size=1,
    max_size=8,
).filter(lambda o: o == os.fsencode(o).decode('utf-8', 'surrogateescape') if '\0' not in o else False)


@pytest.mark.parametrize('name', list(FORMATS))
@settings(deadline=None, max_examples=40)
@given(names=st.lists(anything, min_size=1, max_size=4))
def test_any_text_comes_back(tmp_path_factory, name, names):
    from hiermetric.running.questions import join_path

    form, path = FORMATS[name](), tmp_path_factory.mktemp('t') / 't'
    table = told(
        names,
        answer=names[-1],
        guess=names[0],
        path=join_path(names),
        candidate_1=names[-1],
        candidate_1_probability=0.5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        path.write_text(form.write(table), encoding='utf-8')
    pd.testing.assert_frame_equal(form.read(path), table, check_dtype=False)


def imported(path):
    "EcoTaxa's rules: Latin-1 without a byte-order mark, files relative to the table, named ecotaxa_….tsv"
    raw = path.read_bytes()
    text = raw.decode('utf-8-sig' if raw.startswith(b'\xef\xbb\xbf') else 'latin-1')
    rows = list(csv.DictReader(text.splitlines(keepends=True), delimiter='\t'))[1:]
    return [(row['object_annotation_category'], path.parent / row['img_file_name']) for row in rows]


@pytest.mark.parametrize(
    'at,out',
    [
        ('.', 'ecotaxa_1.tsv'),
        ('.', 'in/ecotaxa_1.tsv'),
        ('in', '../deep/er/ecotaxa_1.tsv'),
        ('.', 'link/ecotaxa_1.tsv'),
    ],
)
def test_ecotaxa_finds_every_image(tmp_path, predict, at, out):
    found = [
        picture(tmp_path / 'in' / o, i)
        for i, o in enumerate(
            ['a.png', 'é/ü.png', '=1.png', '-x.png', 'tab\t.png', 'new\nline.png', "it's.png", '"q".png']
        )
    ]
    (tmp_path / 'far' / 'away').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('far/away')
    r = predict(tmp_path / 'in' if at == '.' else '.', '--format', 'ecotaxa', '--out', out, at=tmp_path / at)
    assert r.code == 0 and 'EcoTaxa' not in r.err, r.err
    rows = imported(tmp_path / at / out)
    assert sorted(o.resolve() for _, o in rows) == sorted(o.resolve() for o in found) and {a for a, _ in rows} <= {
        'Calanus',
        'Oithona',
        'Évadne',
        'Copepoda',
    }


def test_ecotaxa_says_what_it_will_not_find(tmp_path, predict):
    picture(tmp_path / 'in' / os.fsdecode(b'\xe9.png'))
    r = predict('in', '--format', 'ecotaxa', '--out', 'answers.tsv', at=tmp_path)
    assert (
        r.code == 0
        and 'EcoTaxa will not find 1 images' in r.err
        and 'EcoTaxa imports only tables that are named ecotaxa_….tsv, and this one is answers.tsv' in r.err
    )


# Features of any kind


@pytest.mark.parametrize('kind', [np.float16, np.float64, torch.float16, torch.float64, torch.float32], ids=str)
def test_features_of_any_precision(predictor, kind):
    x = np.random.default_rng(0).normal(size=(5, predictor.width)).astype(np.float16)
    p, s = predictor.look(torch.from_numpy(x).to(kind) if isinstance(kind, torch.dtype) else x.astype(kind))
    q, t = predictor.look(torch.from_numpy(x).float())
    torch.testing.assert_close(p, q)
    np.testing.assert_allclose(s, t)


# The system says no


@pytest.mark.parametrize('code', ['ENOSPC', 'EROFS', 'EACCES', 'EMFILE', 'EDQUOT', 'EIO'])
def test_what_the_system_refuses_is_one_sentence(tmp_path, predict, monkeypatch, code):
    [picture(tmp_path / 'in' / f'{i}.png', i) for i in range(3)]
    whole = predict('in', '--out', 'whole.csv', at=tmp_path)
    assert whole.code == 0
    n = getattr(errno, code)
    sync = os.fsync

    def full(fd):
        raise OSError(n, os.strerror(n), 't.csv')

    monkeypatch.setattr(os, 'fsync', full)
    r = predict('in', '--out', 't.csv', at=tmp_path)
    monkeypatch.setattr(os, 'fsync', sync)
    assert (
        r.code == 1
        and 'Traceback' not in r.err
        and r.err.startswith(f'Error: t.csv: {os.strerror(n)}')
        and len(r.err.strip().splitlines()) == 1
    )
    assert (
        predict('in', '--out', 't.csv', at=tmp_path).code == 0
        and (tmp_path / 't.csv').read_bytes() == (tmp_path / 'whole.csv').read_bytes()
    )


def test_places_that_cannot_be_written(tmp_path, predict, monkeypatch):
    picture(tmp_path / 'in' / 'a.png')
    (tmp_path / 'file').write_text('precious')
    for out, why in (
        ('x' * 300, 'File name too long'),
        ('file/t.csv', 'a file stands where a folder should be'),
        ('/dev/full', 'is no table of answers that could be continued'),
        ('in', ''),
    ):
        r = predict('in', '--out', out, at=tmp_path)
        assert r.code == 1 and why in r.err and r.err.startswith('Error: ') and len(r.err.strip().splitlines()) == 1, (
            r.err
        )
    assert (tmp_path / 'file').read_text() == 'precious' and sorted(o.name for o in tmp_path.iterdir()) == [
        'file',
        'in',
    ]
    r = predict('in', '--within', ','.join(['Copepoda'] * 60), '--out', 't.csv', at=tmp_path)
    assert r.code == 0, r.err  # a list that is too long for the name of a file


def test_what_a_library_was_refused_is_one_sentence(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from typer.testing import CliRunner
    import hiermetric.running.cli as cli

    for place, why in (
        ('gone/x', 'No such file or directory; look at the spelling.'),
        ('x' * 300, 'File name too long; choose a shorter name.'),
    ):
        monkeypatch.setattr(cli, '_read_tree', lambda *_: save_file({'a': torch.zeros(3)}, tmp_path / place))
        r = CliRunner().invoke(cli.app, ['taxonomy', 'show', 'x'])
        assert r.exit_code == 1 and r.stderr.startswith('Error: ') and r.stderr.endswith(why + '\n'), r.stderr


def test_a_cache_that_is_a_file(tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from hiermetric.running.cli import app

    (tmp_path / 'cache').write_text('precious')
    monkeypatch.delenv('HIERMETRIC_DATA', raising=False)
    r = CliRunner().invoke(
        app,
        ['taxonomy', 'show', 'synthetic-taxa'],
        env={'HIERMETRIC_CACHE': str(tmp_path / 'cache'), 'HIERMETRIC_DATA': None},
    )
    assert (
        r.exit_code == 1
        and r.stderr.startswith('Error: ')
        and 'cache' in r.stderr
        and 'Traceback' not in r.stderr
        and (tmp_path / 'cache').read_text() == 'precious'
    )


def test_no_network(monkeypatch, predictor):
    import huggingface_hub
    from huggingface_hub.utils import _http
    from hiermetric.running.predictor import Predictor

    library = getattr(_http, 'httpx2', None) or _http.httpx  # whose errors are no OSError

    def gone(*a, **k):
        raise library.ConnectError('[Errno 111] Connection refused')

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', gone)
    monkeypatch.setattr(huggingface_hub.hub_mixin, 'hf_hub_download', gone)
    with pytest.raises(
        HiermetricError, match=r"'me/it' was not pushed to the Hugging Face hub \(\[Errno 111\] Connection refused\)"
    ):
        predictor.push_to_hub('me/it')
    with pytest.raises(HiermetricError, match='the Hugging Face hub does not give a model'):
        Predictor.from_pretrained('me/it')
    import hiermetric.running.cli as cli
    from typer.testing import CliRunner

    monkeypatch.setattr(cli, '_read_tree', gone)
    r = CliRunner().invoke(cli.app, ['taxonomy', 'show', 'x'])
    assert r.exit_code == 1 and r.stderr.startswith('Error: The network did not give what was asked for: [Errno 111]')


def test_stopped_by_hand_goes_on(tmp_path, predict, monkeypatch):
    [picture(tmp_path / 'in' / f'{i}.png', i) for i in range(3)]
    assert predict('in', '--out', 'whole.csv', at=tmp_path).code == 0
    sync = os.fsync

    def stop(fd):
        os.ftruncate(fd, os.fstat(fd).st_size - 20)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', stop)
    r = predict('in', '--out', 't.csv', at=tmp_path)
    monkeypatch.setattr(os, 'fsync', sync)
    assert (
        r.code == 130
        and r.err.strip() == 'Stopped. The same command goes on from here.'
        and not list(tmp_path.glob('.t.csv*'))
    )
    assert (
        predict('in', '--out', 't.csv', at=tmp_path).code == 0
        and (tmp_path / 't.csv').read_bytes() == (tmp_path / 'whole.csv').read_bytes()
    )
