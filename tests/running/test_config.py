"""A run in a file: round trips, everything that must be refused, the files of nbs/configs, and the command in a process
of its own."""

import contextlib, dataclasses, inspect, json, os, subprocess, sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
import numpy as np, pandas as pd, pytest, yaml
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner
from hiermetric.running.cli import app
from hiermetric.running.settings import DataConfig, TrainConfig, override
from hiermetric.running.setting_kinds import as_kind, check_settings, kind_name
from hiermetric.core import HiermetricError
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import defaults, fit
from hiermetric.running.runs import load_run
from hiermetric.images.features import toy_features

CONFIGS = sorted((Path(__file__).parents[2] / 'nbs' / 'configs').glob('*.yaml'))
TAX = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xy' for s in '123'})
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "One for all, so that the organisms are drawn once"
    return tmp_path_factory.mktemp('cache')


# --- the keys are those of fit


def test_every_setting_of_a_run_is_a_key():
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    assert set(defaults()) <= set(names) and not {'data', 'out', 'device'} & (set(names) - {'data'})
    for f in dataclasses.fields(TrainConfig):
        if f.name in defaults():
            assert f.default == defaults()[f.name] and f.metadata['about'], f.name
        assert kind_name(f.type) or dataclasses.is_dataclass(f.type), f'{f.name} has a type that no file can hold'


def test_settings_are_what_fit_takes():
    for images in (False, True):
        names = set(TrainConfig(images=images).settings)
        assert names <= set(inspect.signature(fit).parameters) and ('backbone' in names) == images


# --- types


@pytest.mark.parametrize(
    'value,kind,want',
    [
        (1, float, 1.0),
        ('1e-3', float, 0.001),
        ('2E5', float | None, 2e5),
        (None, float | None, None),
        (True, bool, True),
        ('a', str | Callable | None, 'a'),
        ([1, 2], Sequence[int], (1, 2)),
        ((1, 2.5), tuple[float, float], (1.0, 2.5)),
        ([], Iterable[str], ()),
        ({'a': 1}, dict | None, {'a': 1}),
        ([1, 'b'], list, (1, 'b')),
        (5, int | str | None, 5),
        ('5', int | str | None, '5'),
        (Path('x/y'), str | Path | None, 'x/y'),
        ('uniform', float | str | Sequence[float], 'uniform'),
        ([0.5, 1], float | str | Sequence[float], (0.5, 1.0)),
    ],
)
def test_values_that_fit(value, kind, want):
    got = as_kind(value, kind)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    'value,kind',
    [
        (True, int),
        (True, float),
        (1, bool),
        ('true', bool),
        (1.0, int),
        ('1', int),
        ('0.5', float),
        ('see', float),
        (None, int),
        ('ab', Sequence[str]),
        ([1], tuple[float, float]),
        ([[1]], Sequence[int]),
        ({1: 1}, dict),
        ([], dict),
        (print, str | Callable),
        (object(), str | Path | None),
    ],
)
def test_values_that_do_not(value, kind):
    with pytest.raises(TypeError):
        as_kind(value, kind)


# --- round trips

texts = st.text(st.characters(blacklist_categories=('Cs', 'Cc')), max_size=12)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict(
            lr=st.floats(1e-9, 10),
            epochs=st.integers(1, 10**6),
            patience=st.none() | st.integers(1, 99),
            log=st.lists(texts, max_size=3),
            checkpoint_every=st.none() | st.integers(1, 9) | texts,
            data=st.fixed_dictionaries(
                {},
                optional=dict(
                    name=texts,
                    taxonomy=st.none() | texts,
                    held_out=st.integers(0, 9) | st.lists(texts, max_size=3),
                    val=st.floats(0, 1),
                ),
            ),
        ),
    )
)
@settings(max_examples=30, deadline=None)
def test_round_trip(values):
    c = TrainConfig.of(values)
    text = c.to_yaml()
    assert TrainConfig.of(yaml.safe_load(text)) == c
    assert set(yaml.safe_load(text)) == {f.name for f in dataclasses.fields(TrainConfig)}  # the record is complete
    assert TrainConfig.of(c.changed()) == c
    assert all('  # ' in line for line in text.splitlines())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_file_round_trip(path, tmp_path):
    c = TrainConfig.load(path)
    c.save(tmp_path / 'c.yaml')
    assert TrainConfig.load(tmp_path / 'c.yaml') == c
    given = yaml.safe_load(path.read_text())
    for key in ('data', 'backbone', 'embedding', 'head', 'optimizer', 'lr', 'schedule', 'epochs', 'seed'):
        assert key in given, f'{path.name} does not say {key}'
    assert path.read_text().startswith('# ')


def test_a_file_for_every_model_of_the_thesis():
    assert {
        'classifier',
        'arcface',
        'sphere_thesis',
        'sphere_multi',
        'sphere_hier',
        'sphere_hier_thesis',
        'arcface_levels',
        'attention',
        'plankton',
    } <= {p.stem for p in CONFIGS}


# --- what is refused


@pytest.mark.parametrize(
    'text,says',
    [
        ('learning_rat: 1', "There is no setting 'learning_rat'"),
        ('epoch: 3', "no setting 'epoch'. Did you mean 'epochs'"),
        ('Head: arcface', "Did you mean 'head'"),
        ('epochs: 3.5', 'epochs is 3.5, and should be a whole number'),
        ('lr: fast', "lr is 'fast', and should be a number"),
        ('freeze_bn: 1', 'freeze_bn is 1, and should be true or false'),
        ('seed: null', 'seed is None, and should be a whole number'),
        ('head: arcfaze', "no head 'arcfaze'; .* Did you mean 'arcface'"),
        ('optimizer: [adam]', "should be text"),
        ('head: arcface\nhead_kw: {M: 0.2}', "There is no setting 'head_kw.M'"),
        ('head: arcface\nhead_kw: {s: big}', "head_kw.s is 'big', and should be a number"),
        ('head_kw: 3', 'head_kw is 3, and should be a mapping or null'),
        ('head: hace\nhead_kw: {base: arcface, base_kw: {mm: 1}}', "'head_kw.base_kw.mm'"),
        ('head: hace\nhead_kw: {base: arcfac}', "no head 'arcfac'"),
        ('embed_kw: {norms: batch}', "'embed_kw.norms'.*Did you mean 'norm'"),
        ('backbone_kw: {in_channel: 12}', "Did you mean 'in_channels'"),
        ('schedule: cosin', "Did you mean 'cosine'"),
        ('schedule: multistep\nschedule_kw: {gama: 1}', "Did you mean 'gamma'"),
        ('augment: planktn', "Did you mean 'plankton'"),
        (
            'images: true\naugment: plankton\naugment_kw: {area: [1, 2, 3]}',
            'augment_kw.area is .1, 2, 3., and should be a list of 2',
        ),
        ('augment_kw: {area: [1, 2]}', 'augment_kw has settings for augment, which is not set'),
        ('mix: mixup\nmix_kw: {beta: 1}', "'mix_kw.beta'"),
        ('sampler: ballanced', "Did you mean 'balanced'"),
        ('sampler: balanced\nsampler_kw: {q: 1}', "'sampler_kw.q'; there are none"),
        ('data: {loader: {siz: 3}}', "'data.loader.siz'.*Did you mean 'size'"),
        ('data: {name: x/y, loader: {seed: 3}}', "'data.loader.seed'; there are fill, name"),
        ('data: {nam: x}', "'data.nam'. Did you mean 'name'"),
        ('data: {val: much}', "data.val is 'much', and should be a number"),
        ('data: planktonset', 'data is .planktonset., and should be a mapping'),
        ('lr: 1\nlr: 2', "the key 'lr' comes twice .line 2"),
        ('data: {val: 0.1, val: 0.2}', "the key 'val' comes twice"),
        ('augment: plankton', 'augment is a setting for images'),
        ('monitor: loss', "no monitor 'loss'"),
        ('epochs: 0', 'epochs must be at least 1'),
        ('optimizer: adan', "Did you mean 'adam'"),
        ('[1, 2]', 'holds list and should hold a mapping'),
        ('lr: [', 'no YAML that can be read'),
        ('lr: !!python/object/apply:os.system [ls]', 'no YAML that can be read'),
        ('3: 4', "There is no setting '3'"),
    ],
)
def test_refused(tmp_path, text, says):
    (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(HiermetricError, match=says) as e:
        TrainConfig.load(tmp_path / 'c.yaml')
    assert 'c.yaml' in str(e.value)  # the file is named


def test_refused_files(tmp_path):
    with pytest.raises(HiermetricError, match='There is no configuration'):
        TrainConfig.load(tmp_path / 'c.yaml')
    with pytest.raises(HiermetricError, match='cannot be read'):
        TrainConfig.load(tmp_path)
    (tmp_path / 'b.yaml').write_bytes(b'\xff\xfe\x00x')
    with pytest.raises(HiermetricError, match='b.yaml'):
        TrainConfig.load(tmp_path / 'b.yaml')
    (tmp_path / 'empty.yaml').write_text('# nothing\n')
    assert TrainConfig.load(tmp_path / 'empty.yaml') == TrainConfig()


@pytest.mark.parametrize(
    'items,want',
    [
        (['a=1'], {'a': 1}),
        (['a.b.c=x y'], {'a': {'b': {'c': 'x y'}}}),
        (['a=1', 'a=2'], {'a': 2}),
        (['a=[1, 2]'], {'a': [1, 2]}),
        (['a='], {'a': None}),
        (['a=x=y'], {'a': 'x=y'}),
        ([' a =1'], {'a': 1}),
        ([('a.b', '1')], {'a': {'b': '1'}}),
        (['k.x=1', 'k.y=2'], {'k': {'z': 0, 'x': 1, 'y': 2}}),
    ],
)
def test_overrides(items, want):
    base = {'k': {'z': 0}}
    got = override(base, items)
    assert {**{'k': {'z': 0}}, **want} == got and base == {'k': {'z': 0}}


@pytest.mark.parametrize('item', ['a', '=1', '.a=1', 'a.=1', 'a..b=1', ''])
def test_bad_overrides(item):
    with pytest.raises(HiermetricError, match='is no setting; write key=value'):
        override({}, [item])


def test_settings_of_a_function_that_takes_anything():
    def f(a: int = 0, **kw): ...

    assert check_settings({'a': 1, 'z': 'x'}, f) == {'a': 1, 'z': 'x'}


# --- running


@pytest.mark.parametrize(
    'path', [p for p in CONFIGS if not yaml.safe_load(p.read_text()).get('images')], ids=lambda p: p.stem
)
def test_models_of_the_files_train(path):
    "An epoch of each on toy features: the settings go together"
    c = TrainConfig.load(path, ['epochs=1', 'embed_dim=24', 'batch_size=16', 'image_size=null'])
    run = c.train(None, toy_features(TAX, per_leaf=10, dim=24), device='cpu')
    assert (
        np.isfinite(run.history.loss).all()
        and np.isfinite(run.history.val_nll).all()
        and run.settings['head'] == c.head
    )


@pytest.mark.parametrize(
    'path', [p for p in CONFIGS if yaml.safe_load(p.read_text()).get('images')], ids=lambda p: p.stem
)
def test_files_for_images_train(path, tmp_path, monkeypatch, cache):
    monkeypatch.setenv('HIERMETRIC_CACHE', str(cache))
    small = [
        'data.name=synthetic-taxa',
        'data.loader={size: 32, largest: 3, smallest: 3}',
        'backbone=timm:resnet10t',
        'image_size=32',
        'epochs=1',
        'embed_dim=16',
        'batch_size=16',
        'unfreeze_at=null',
        'backbone_kw.pretrained=false',
        'layer_decay=null',
        'ema=null',
    ]
    c = TrainConfig.load(path, small)
    run = c.train(tmp_path / 'run', device='cpu')
    assert np.isfinite(run.history.loss).all() and TrainConfig.load(tmp_path / 'run' / 'config.yaml') == c


def test_the_folder_repeats_the_run(tmp_path):
    c = TrainConfig(head='cosface', epochs=2, embed_dim=16, batch_size=16)
    toy = toy_features(TAX, per_leaf=10, dim=24)
    first = c.train(tmp_path / 'a', toy, device='cpu')
    again = TrainConfig.load(tmp_path / 'a' / 'config.yaml').train(tmp_path / 'b', toy, device='cpu')
    assert first.history.drop(columns='seconds').equals(again.history.drop(columns='seconds'))
    with pytest.raises(HiermetricError, match='seed 0, now 1'):
        TrainConfig.load(tmp_path / 'a' / 'config.yaml', ['seed=1']).train(tmp_path / 'a', toy, device='cpu')
    assert TrainConfig.load(tmp_path / 'a' / 'config.yaml') == c
    TrainConfig.load(tmp_path / 'a' / 'config.yaml', ['seed=1']).train(tmp_path / 'a', toy, device='cpu', resume=False)
    assert TrainConfig.load(tmp_path / 'a' / 'config.yaml').seed == 1
    about = json.loads((tmp_path / 'a' / 'about.json').read_text())
    assert about['versions'] and about['data']['fingerprint'] == toy.fingerprint


# --- the command


def command(cwd, cache, *args):
    cmd = [sys.executable, '-c', 'from hiermetric.running.cli import app; app(prog_name="hiermetric")', *map(str, args)]
    return subprocess.run(
        cmd,
        cwd=cwd,
        env=os.environ | {'HIERMETRIC_CACHE': str(cache), 'COLUMNS': '200', 'NO_COLOR': '1', 'TERM': 'dumb'},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_train_from_a_file(tmp_path, monkeypatch, cache):
    monkeypatch.setenv('HIERMETRIC_CACHE', str(cache))
    (tmp_path / 'mine.yaml').write_text(
        'data: {loader: {size: 32, largest: 3, smallest: 3}}\nhead: cosface\nhead_kw: {m: 0.1}\nbackbone: '
        'timm:resnet10t\nbackbone_kw: {pretrained: false}\nimage_size: 32\nepochs: 3\nembed_dim: 32\nseed: 2\n'
    )
    r = command(
        tmp_path,
        cache,
        'train',
        '--config',
        'mine.yaml',
        '--seed',
        5,
        '--device',
        'cpu',
        'epochs=2',
        'head_kw.s=8',
        '--out',
        'run',
    )
    assert r.returncode == 0, r.stderr
    c = TrainConfig.load(tmp_path / 'run' / 'config.yaml')
    assert c == TrainConfig(
        data=DataConfig(loader=dict(size=32, largest=3, smallest=3)),
        head='cosface',
        head_kw={'m': 0.1, 's': 8.0},
        backbone='timm:resnet10t',
        backbone_kw={'pretrained': False},
        image_size=32,
        epochs=2,
        embed_dim=32,
        seed=5,
    )
    assert len(pd.read_csv(tmp_path / 'run' / 'history.csv')) == 2
    run = load_run(tmp_path / 'run', c.data.load().taxonomy)
    assert run.model.head.s == 8 and run.settings['seed'] == 5
    for args, says in (
        (['--config', 'mine.yml'], "There is no configuration mine.yml. Did you mean 'mine.yaml'?"),
        (['--config', 'mine.yaml', 'epoch=2'], "There is no setting 'epoch'. Did you mean 'epochs'"),
        (['lr'], "'lr' is no setting; write key=value"),
    ):
        with contextlib.chdir(tmp_path):
            r = CliRunner().invoke(
                app, ['train', *args], prog_name='hiermetric', env={'COLUMNS': '200', 'NO_COLOR': '1', 'TERM': 'dumb'}
            )
        assert r.exit_code == 1 and says in r.stderr.replace('\n', ' '), r.stderr


def test_train_a_whole_network_from_a_file(tmp_path, monkeypatch, cache):
    "Images, augmentation, mix and sampler by name; the run answers about new images afterwards"
    monkeypatch.setenv('HIERMETRIC_CACHE', str(cache))
    (tmp_path / 'whole.yaml').write_text(
        'data: {loader: {size: 32, largest: 3, smallest: 3}}\nimages: true\nbackbone: timm:resnet10t\n'
        'backbone_kw: {pretrained: false}\nimage_size: 32\naugment: plankton\nmix: cutmix\nmix_kw: {tree: 0.5}\n'
        'sampler: m_per_class\nsize_input: true\nepochs: 1\nembed_dim: 16\n'
    )

    def said(*args):
        with contextlib.chdir(tmp_path):
            r = CliRunner().invoke(
                app, [*args], prog_name='hiermetric', env={'COLUMNS': '200', 'NO_COLOR': '1', 'TERM': 'dumb'}
            )
        assert r.exit_code == 0, (r.stderr, r.exception)
        return r.stdout

    assert 'Run: run' in said('train', '--config', 'whole.yaml', '--device', 'cpu', '--out', 'run')
    image = Path(TrainConfig.load(tmp_path / 'whole.yaml').data.load().samples['path'].iloc[0])
    assert image.name in said('predict', str(image), '--model', 'run')
