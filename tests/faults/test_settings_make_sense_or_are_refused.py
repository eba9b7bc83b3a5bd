"""A setting makes sense, or one sentence names it: the same from Python, from a file and from the command line, and
nothing is computed before."""

import inspect, math, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch, yaml
from typer.testing import CliRunner
from hiermetric.images.augment import AUGMENTS, MIXES
from hiermetric.images.sampling import SAMPLERS
from hiermetric.running.cli import app
from hiermetric.running.settings import TrainConfig
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import HEADS
from hiermetric.similarity.losses import LOSSES
from hiermetric.similarity.miners import MINERS
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.setting_kinds import LIMITS
from hiermetric.running.schedules import SCHEDULES
from hiermetric.running.trainer import Trainer
from hiermetric.running.fitting import fit
from hiermetric.images.features import toy_features

TAX = Taxonomy.from_paths({'a': 'X/x', 'b': 'X/x', 'c': 'X/y', 'd': 'Y/z/zz', 'e': 'Y/w', 'f': 'Y/w'})
TOY = toy_features(TAX, per_leaf=10, dim=12)
QUICK = dict(epochs=1, batch_size=16, embed_dim=8, log=(), device='cpu')
CONFIGS = sorted((Path(__file__).parents[2] / 'nbs' / 'configs').glob('*.yaml'))
SMALL = dict(
    committee=dict(dim=8, dropout=0.0),
    diva=dict(dim=4, dropout=0.0),
    divide_conquer=dict(dim=8, learners=2, dropout=0.0),
    bier=dict(sizes=(4, 8), dropout=0.0),
    sndl=dict(dim=8, dropout=0.0),
)
NONSENSE = (-1, 2.5, math.nan, math.inf, True, '3', 'x', [], {}, [math.nan])
pytestmark = pytest.mark.usefixtures('one_thread')


def says(f):
    "The sentence with which it is refused, None where it works; any other error is a fault"
    try:
        f()
    except HiermetricError as e:
        return str(e)


# --- one door

WRONG = [
    ('seed=-1', 'seed must be at least 0, not -1.'),
    ('dropout=1.5', 'dropout must be at least 0 and below 1, not 1.5.'),
    ('weight_decay=-1', 'weight_decay must be at least 0, not -1.0.'),
    ('epochs=2.5', 'epochs is 2.5, and should be a whole number.'),
    ('lr=.nan', 'lr is nan, and should be a finite number.'),
    ('warmup=-0.1', 'warmup must be at least 0 and at most 1, not -0.1.'),
    ('patience=0', 'patience must be at least 1, not 0.'),
    ('patience=-1', 'patience must be at least 1, not -1.'),
    ('embed_dim=0', 'embed_dim must be at least 1, not 0.'),
    ('epochs=true', 'epochs is True, and should be a whole number.'),
    ("lr='0.1'", "lr is '0.1', and should be a number."),
    ('batch_size=-4', 'batch_size must be at least 1, not -4.'),
    ('momentum=1.', 'momentum must be at least 0 and below 1, not 1.0.'),
    ('power=0', 'power must be above 0 and at most 1, not 0.0.'),
    ('head_kw.s=x', "head_kw.s is 'x', and should be a number."),
    ('head_kw.m=.inf', 'head_kw.m is inf, and should be a finite number.'),
    ('head_kw.mm=1', "There is no setting 'head_kw.mm'; there are s, m, tail, init, class_weights. Did you mean 'm'?"),
    ('monitor=auc', "There is no monitor 'auc'; there are nll, top1."),
]


@pytest.mark.parametrize('item,sentence', WRONG, ids=[o for o, _ in WRONG])
def test_the_same_sentence_everywhere(item, sentence, tmp_path):
    key, _, value = item.partition('=')
    value, at = yaml.safe_load(value), (given := {'head': 'arcface'})
    for k in key.split('.')[:-1]:
        at = at.setdefault(k, {})
    at[key.split('.')[-1]] = value
    assert says(lambda: fit(TOY, **{**QUICK, **given})) == sentence
    assert says(lambda: TrainConfig.of(given)) == sentence
    (tmp_path / 'c.yaml').write_text(f'# a run\n{yaml.safe_dump(given, sort_keys=False)}')
    line = 3 + ('.' in key)
    assert says(lambda: TrainConfig.load(tmp_path / 'c.yaml')) == f'{tmp_path}/c.yaml, line {line}: {sentence}'
    assert says(lambda: TrainConfig.load(None, ['head=arcface', item])) == sentence


def test_the_command_line_says_it_too(tmp_path):
    r = CliRunner(env=dict(COLUMNS='200')).invoke(app, ['train', 'seed=-1', '--out', str(tmp_path / 'run')])
    assert (
        r.exit_code
        and 'seed must be at least 0, not -1.' in ' '.join(r.output.split())
        and not (tmp_path / 'run').exists()
    )


def test_every_number_of_a_run_has_limits():
    named = {k for names in LIMITS.values() for k in names}
    kinds = {k: p.annotation for k, p in inspect.signature(fit).parameters.items()}
    assert named == {k for k, v in kinds.items() if set(v.replace(' ', '').split('|')) & {'int', 'float'}} - {
        'checkpoint_every'
    }  # which has a sentence of its own


def test_nothing_is_computed_before(monkeypatch):
    monkeypatch.setattr(Trainer, '__init__', lambda *a, **kw: pytest.fail('a trainer was made'))
    for kw in (
        dict(seed=-1),
        dict(lr=math.nan),
        dict(head_kw=dict(init='x', class_weights='y')),
        dict(workers=-1),
        dict(workers='two'),
        dict(compile='yes'),
        dict(resume=1),
        dict(log='csv'),
    ):
        assert says(lambda: fit(TOY, **{**QUICK, **kw})), kw


@pytest.mark.parametrize('key', sorted(set(inspect.signature(fit).parameters) - {'data', 'progress', 'out'}))
def test_nonsense_in_every_setting_works_or_is_named(key):
    for v in NONSENSE:
        e = says(lambda: fit(TOY, **{**QUICK, key: v}))
        assert e is None or key.removesuffix('_kw') in e or str(v) in e, (v, e)


def every(registry):
    return [
        (name, k)
        for name in registry
        for k in inspect.signature(registry[name]).parameters
        if k
        not in (
            'in_features',
            'taxonomy',
            'distance',
            'step',
            'total',
            'warmup',
            'targets',
            'batch_size',
            'rng',
            'image_size',
        )
    ]


def nonsense(make):
    "Makes it with each; a number that is none, and text or a truth value for a number, are refused"
    for v in NONSENSE:
        e = says(lambda: make(v))
        assert e or not (isinstance(v, float) and not math.isfinite(v)), v


@pytest.mark.parametrize('head,key', every(HEADS))
def test_nonsense_in_every_setting_of_a_head(head, key):
    nonsense(lambda v: fit(TOY, head, **QUICK, head_kw={**SMALL.get(head, {}), key: v}))


@pytest.mark.parametrize('loss,key', every(LOSSES))
def test_nonsense_in_every_setting_of_a_loss(loss, key):
    nonsense(
        lambda v: fit(
            TOY,
            'metric',
            **QUICK,
            views=2 if loss in ('moco', 'simclr') else 1,
            head_kw=dict(loss=loss, loss_kw={key: v}),
        )
    )


@pytest.mark.parametrize('miner,key', every(MINERS))
def test_nonsense_in_every_setting_of_a_miner(miner, key):
    nonsense(lambda v: fit(TOY, 'metric', **QUICK, head_kw=dict(loss='tree_triplet', miner=miner, miner_kw={key: v})))


@pytest.mark.parametrize(
    'what,name,key', [('schedule', *o) for o in every(SCHEDULES)] + [('sampler', *o) for o in every(SAMPLERS)]
)
def test_nonsense_in_every_setting_of_a_schedule_or_sampler(what, name, key):
    nonsense(lambda v: fit(TOY, **QUICK, **{what: name, f'{what}_kw': {key: v}}))


@pytest.mark.parametrize('name,key', every(AUGMENTS) + every(MIXES))
def test_nonsense_in_every_setting_of_an_augmentation_or_mix(name, key):
    from hiermetric.images.augment import create_augment, create_mix

    def make(v):
        what = 'augment' if name in AUGMENTS else 'mix'
        TrainConfig(images=True, **{what: name, f'{what}_kw': {key: v}})
        if what == 'mix':
            return create_mix(name, **{key: v})
        create_augment(name, 16, **{key: v})(torch.zeros(2, 3, 20, 20, dtype=torch.uint8), seeds=torch.arange(2))

    nonsense(make)


@pytest.mark.parametrize(
    'kw,text',
    [
        (dict(loss='triplet', loss_kw=dict(margin=-1)), 'margin must be at least 0'),
        (dict(loss='supcon', loss_kw=dict(temperature=0)), 'temperature must be above 0'),
        (dict(loss='snca', loss_kw=dict(temperature=-0.1)), 'temperature must be above 0'),
        (dict(loss='moco', loss_kw=dict(queue=1.5)), 'head_kw.loss_kw.queue is 1.5, and should be a whole number'),
        (dict(miner='semi_hard', miner_kw=dict(margin='x')), "head_kw.miner_kw.margin is 'x'"),
        (dict(loss='triplet', loss_kw=dict(margn=1)), "'head_kw.loss_kw.margn'"),
        (
            dict(miner='distance_weighted', loss='triplet', miner_kw=dict(cutoff=2.5)),
            'cutoff must be above 0 and below 2',
        ),
    ],
)
def test_settings_inside_settings(kw, text):
    with pytest.raises(HiermetricError, match=text):
        fit(TOY, 'metric', **QUICK, head_kw=kw)
    if 'head_kw' in text:
        with pytest.raises(HiermetricError, match=text):
            TrainConfig(head='metric', head_kw=kw)


def test_settings_of_the_members_of_a_committee():
    for members, text in (
        ([dict(head='arcface', m='x')], 'head_kw.members.m is'),
        ([dict(head='arcfac')], "no head 'arcfac'"),
        ([dict(head='hace', base='arcface', base_kw=dict(mm=1))], 'head_kw.members.base_kw.mm'),
    ):
        with pytest.raises(HiermetricError, match=text):
            fit(TOY, 'committee', **QUICK, head_kw=dict(SMALL['committee'], members=members))


def test_numbers_and_arrays_of_numpy_are_welcome():
    run = fit(
        TOY,
        **{**QUICK, 'epochs': np.int64(2)},
        lr=np.float32(0.01),
        patience=np.int32(3),
        head_kw=dict(class_weights=np.ones(6, 'f4')),
    )
    assert len(run.history) == 2 and run.settings['epochs'] == 2
    assert len(fit(TOY, **QUICK, head_kw=dict(class_weights=torch.ones(6))).history) == 1


def test_a_head_of_ones_own_may_have_types_that_nobody_can_read(monkeypatch):
    from hiermetric.heads.contract import Classifier

    class Own(Classifier):
        def __init__(self, in_features, taxonomy, a=1):
            super().__init__(in_features, taxonomy)

    Own.__init__.__annotations__['a'] = 'Nowhere'
    monkeypatch.setitem(HEADS.entries, 'own', (Own, 'mine'))
    assert len(fit(TOY, 'own', **QUICK, head_kw=dict(a='b')).history) == 1


# --- files

LAUGHS = 'a: &a [x,x,x,x,x,x,x,x,x]\n' + ''.join(
    f'{chr(98 + i)}: &{chr(98 + i)} [' + ','.join([f'*{chr(97 + i)}'] * 9) + ']\n' for i in range(9)
)
BROKEN = dict(
    empty=(b'', 'is empty'),
    blank=(b' \n\n', 'is empty'),
    a_list=(b'- lr\n', 'holds list'),
    text=(b'hello', 'holds str'),
    tabs=(b'lr: 0.1\n\thead: arcface\n', 'line 2'),
    twice=(b'lr: 1\nseed: 1\nlr: 2\n', "'lr' comes twice .line 3"),
    itself=(b'log: &x [*x]\n', 'holds itself'),
    its_own_key=(b'&a {*a : 1}: 2\n', 'line 1'),
    laughs=(LAUGHS.encode(), 'nested too deeply, or holds itself'),
    deep=(b'log: ' + b'[' * 5000 + b']' * 5000, 'nested too deeply'),
    fairly_deep=(b'log: ' + b'[' * 200 + b']' * 200, 'nested too deeply'),
    binary=(bytes(range(256)), 'UTF-8'),
    utf16=('lr: 0.1\n'.encode('utf-16'), 'UTF-8'),
    utf16_bare=('lr: 0.1\n'.encode('utf-16-le'), 'line 1'),
    nul=(b'seed: 1\nlr: \0\n', 'line 2'),
    latin=('head: Käfer\n'.encode('latin-1'), 'UTF-8'),
    python=(b'lr: !!python/object/apply:os.system [ls]\n', 'line 1'),
    date=(b'seed: 2024-01-01\n', "line 1: seed is '2024-01-01'"),
    no_date=(b'seed: 2024-13-45\n', 'line 1: seed is'),
    bad_tag=(b'seed: 1\nlr: !!float abc\n', 'line 2'),
    no_int=(b"lr: !!int ''\n", 'line 1'),
    no_bool=(b'size_input: !!bool maybe\n', 'line 1'),
    a_time=(b'lr: !!timestamp foo\n', 'line 1'),
    on=(b'seed: 1\nhead: on\n', 'line 2: head is True, and should be text'),
    octal=(b'seed: 010\n', "line 1: seed is '010'"),
    sexagesimal=(b'epochs: 1:30\n', "line 1: epochs is '1:30'"),
    hexadecimal=(b'seed: 0x10\n', "line 1: seed is '0x10'"),
    nan=(b'seed: 1\nlr: .nan\n', 'line 2: lr is nan'),
    infinite=(b'lr: 1e999\n', 'line 1: lr is inf'),
    long=(b'seed: 1' + b'0' * 5000, 'line 1'),
    unknown=(b'seed: 1\nhead: arcface\nlearning: 3\n', "line 3: There is no setting 'learning'"),
    nested=(b'head: arcface\nhead_kw:\n  s: 3\n  mm: 4\n', "line 4: There is no setting 'head_kw.mm'"),
    data=(b'seed: 1\ndata:\n  vall: 7\n', "line 3: There is no setting 'data.vall'"),
    two=(b'seed: 1\n---\nseed: 2\n', 'line 2'),
    alias=(b'lr: *nope\n', 'line 1'),
    open_quote=(b'head: "arcface\n', 'line 2'),
    a_set=(b'log: !!set {a, b}\n', 'line 1: log is'),
    bytes=(b'head: !!binary aGVsbG8=\n', 'line 1: head is'),
    low=(b'head: arcface\n\nseed: -1\n', 'line 3: seed must be at least 0'),
)


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_file_is_named_with_its_line(kind, tmp_path):
    raw, text = BROKEN[kind]
    (tmp_path / 'run.yaml').write_bytes(raw)
    with pytest.raises(HiermetricError, match=text) as e:
        TrainConfig.load(tmp_path / 'run.yaml')
    assert 'run.yaml' in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 1000


def test_a_line_is_not_blamed_for_what_came_from_outside(tmp_path):
    (tmp_path / 'run.yaml').write_text('seed: 1\n')
    with pytest.raises(HiermetricError, match='run.yaml: seed must be'):
        TrainConfig.load(tmp_path / 'run.yaml', ['seed=-1'])


@pytest.mark.parametrize(
    'text,key,want',
    [
        ('lr: 1e-3', 'lr', 1e-3),
        ('lr: 2E+1', 'lr', 20.0),
        ('lr: .5', 'lr', 0.5),
        ('lr: 1_0.5', 'lr', 10.5),
        ('epochs: 1_000', 'epochs', 1000),
        ('seed: +3', 'seed', 3),
        ('freeze_bn: yes\nimages: on', 'freeze_bn', True),
        ('data: {name: 2024-01-01}', 'data', '2024-01-01'),
        ('lr: &x 0.01\nweight_decay: *x', 'weight_decay', 0.01),
        (
            'head: metric\nhead_kw: {loss_kw: {temperature: 1e-1}, loss: supcon}',
            'head_kw',
            {'loss_kw': {'temperature': 0.1}, 'loss': 'supcon'},
        ),
    ],
)
def test_what_is_meant_is_read(text, key, want, tmp_path):
    (tmp_path / 'c.yaml').write_text('\ufeff' + text, encoding='utf-8')
    got = getattr(TrainConfig.load(tmp_path / 'c.yaml'), key)
    assert (got.name if key == 'data' else got) == want


# --- round trips


def round_trip(c, path):
    c.save(path)
    back = TrainConfig.load(path)
    assert back == c and back.to_yaml() == c.to_yaml()
    assert says(lambda: TrainConfig.of(yaml.safe_load(path.read_text()))) is None  # any reader of YAML can
    return back


@pytest.mark.parametrize('head', list(HEADS))
def test_every_head_comes_back_from_its_file(head, tmp_path):
    skip, kw = ('in_features', 'taxonomy', 'sets', 'prior', 'base_kw', 'criterion_kw', 'members'), {}
    for k, p in inspect.signature(HEADS[head]).parameters.items():
        if k not in skip and p.default is not inspect.Parameter.empty:
            kw[k] = list(p.default) if isinstance(p.default, tuple) else p.default
    if head == 'committee':
        kw['members'] = [
            dict(head='classifier'),
            dict(head='hace', base='arcface', base_kw=dict(s=16, m=1e-5), eps=0.3),
        ]
    if head == 'hace':
        kw.update(base='arcface', base_kw=dict(s=16, tail='jump'))
    round_trip(TrainConfig(head=head, head_kw=kw), tmp_path / 'c.yaml')
    assert round_trip(TrainConfig(head=head), tmp_path / 'd.yaml').head == head


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_file_of_the_book_comes_back(path, tmp_path):
    round_trip(TrainConfig.load(path), tmp_path / 'c.yaml')


def test_text_that_looks_like_something_else_comes_back(tmp_path):
    odd = [
        '1e-3',
        '1E5',
        '010',
        '1:30',
        'yes',
        'null',
        '~',
        '2024-01-01',
        '0x1F',
        '.nan',
        '-.inf',
        '=',
        '<<',
        '',
        ' a ',
        'a: b',
        '# c',
        "it's",
        '"q"',
        'ä\u2028x',
        'a\nb',
        '\ufeff',
        '1_0',
        '+1',
        '.5',
    ]
    assert round_trip(TrainConfig(data=dict(held_out=odd)), tmp_path / 'c.yaml').data.held_out == tuple(odd)


# --- data at the edge


def of(mask):
    return replace(TOY, x=np.asarray(TOY.x)[mask], targets=TOY.targets[mask], split=TOY.split[mask])


@pytest.mark.parametrize('head', list(HEADS))
def test_a_lone_leaf_an_unseen_class_and_few_images(head):
    kw = dict(QUICK, head_kw=SMALL.get(head, {}))
    n = np.arange(len(TOY))
    trees = [
        Taxonomy.from_paths([('only',)]),
        Taxonomy.from_paths([('g', 'f', 'only')]),
        Taxonomy.from_parents({'root': None}),
    ]
    data = [toy_features(o, per_leaf=10, dim=12) for o in trees] + [
        of((TOY.targets != TAX.leaves[0]) | (TOY.split != 'train')),
        of((TOY.split != 'train') | (n < 1)),
        of((TOY.split != 'train') | (n < 2)),
        replace(TOY, targets=np.zeros_like(TOY.targets)),
        replace(TOY, targets=np.asarray(TAX.parents)[TOY.targets]),
    ]
    refused = []
    for k, d in enumerate(data):

        def run():
            r = fit(d, head, **kw)
            assert np.isfinite(r.history.val_nll).all() and np.isfinite(r.history.loss).all(), (head, k)

        if says(run):
            refused.append(k)
    assert 0 not in refused and 3 not in refused  # one class, and a class without training images, are no mistakes


def test_missing_splits_are_named():
    for split in ('train', 'val'):
        with pytest.raises(HiermetricError, match=f"no features in the split '{split}'"):
            fit(of(TOY.split != split), **QUICK)


def test_what_is_no_data_and_what_is_no_folder(tmp_path):
    (tmp_path / 'f').write_text('mine')
    for f, text in (
        (lambda: fit('cifar-100'), 'not str'),
        (lambda: fit(TOY, **QUICK, out=tmp_path / 'f'), 'is a file'),
        (lambda: fit(TOY, **QUICK | dict(log='csv')), 'log is a list'),
    ):
        with pytest.raises(HiermetricError, match=text):
            f()
    assert (tmp_path / 'f').read_text() == 'mine'


def test_the_first_epoch_is_kept_whatever_it_is_worth(monkeypatch):
    monkeypatch.setattr(Trainer, 'validate', lambda self: {'val_nll': math.inf, 'val_top1': 0.0})
    assert fit(TOY, **{**QUICK, 'epochs': 2}, monitor='nll').best_epoch == 0


def test_batch_norm_and_a_batch_of_one(tmp_path):
    from test_training import IMAGES, squares

    table, kw = squares(tmp_path / 'im', n=16), {**IMAGES, 'epochs': 1, 'augment': None}
    for own in (dict(batch_size=1), dict(batch_size=4, accumulate=4)):
        with pytest.raises(HiermetricError, match='batch norm cannot learn from a single image.*freeze_bn=True'):
            fit(table, **{**kw, **own})
        assert np.isfinite(fit(table, **{**kw, **own}, freeze_bn=True).history.loss).all()
    with pytest.raises(HiermetricError, match='larger batches'):
        fit(TOY, **{**QUICK, 'batch_size': 1}, embed_kw=dict(norm='batch'))


# --- logging to where nothing answers


def test_wandb_falls_back_when_nobody_answers(tmp_path, monkeypatch):
    import wandb

    real, asked = wandb.init, []

    def init(*a, mode=None, **kw):
        asked.append(mode)
        if mode == 'online':
            raise wandb.errors.CommError('no route to host\nand more')
        return real(*a, mode=mode, **kw)

    class Gone:
        def __getattr__(self, name):
            pytest.fail('wandb.api is deprecated')

    monkeypatch.setattr(wandb, 'init', init)
    monkeypatch.setattr(wandb, 'api', Gone())
    monkeypatch.delenv('WANDB_MODE')
    monkeypatch.setenv('WANDB_API_KEY', 'a' * 40)
    with pytest.warns(UserWarning, match='no route to host.*logged offline'):
        fit(TOY, **{**QUICK, 'log': ('wandb',)}, out=tmp_path)
    assert asked == ['online', 'offline'] and list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
    monkeypatch.delenv('WANDB_API_KEY')
    monkeypatch.setenv('NETRC', str(tmp_path / 'none'))
    asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(TOY, **{**QUICK, 'log': ('wandb',)}, out=tmp_path / 'b')
    assert asked == ['offline']
