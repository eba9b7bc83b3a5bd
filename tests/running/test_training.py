"""Training: determinism, crash and resume, what is refused, internal labels; schedules, optimisers, images, several
processes. On clusters in feature space and painted squares, so no data are needed."""

import errno, json, math, os, signal, subprocess, sys, textwrap, types
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as VF
import hiermetric.running.fitting as fitting
import hiermetric.running.sources as sources
import hiermetric.running.trainer as trainer_module
from hiermetric.core import HiermetricError
from hiermetric.images.table import ImageTable
from hiermetric.images.features import Features, extract
from hiermetric.heads.contract import HEADS, Classifier, create_head
from hiermetric.heads.model import EmbeddingNet, Model, power_normalise
from hiermetric.images.encoder import Encoder
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.sources import ImageSource
from hiermetric.running.schedules import create_optimizer, create_schedule, parameter_groups, warmup_cosine
from hiermetric.running.epochs import ema_update
from hiermetric.running.fitting import fit
from hiermetric.running.runs import load_run
from hiermetric.running.listeners import loggers
from hiermetric.running.inference import make_accelerator, embeddings, predict
from hiermetric.images.augment import create_augment
from hiermetric.images.backbones import Transform
from hiermetric.images.pictures import image_size
from hiermetric.images.encoder import stages
from hiermetric.running.runs import build_model
from hiermetric.running.schedules import SCHEDULES
from hiermetric.running.trainer import Trainer
from hiermetric.images.features import toy_features

pytestmark = pytest.mark.usefixtures('one_thread')
LINEAGES = {f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xyz' for s in '123'}
TAX = Taxonomy.from_paths(LINEAGES)
TOY = toy_features(TAX, per_leaf=40)
QUICK = dict(epochs=6, batch_size=64, embed_dim=32, lr=1e-2)


def weights(run):
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(run):
    return run.history.drop(columns='seconds')


@pytest.fixture(scope='module')
def straight():
    return fit(TOY, 'arcface', **QUICK)


def test_learns(straight):
    x, t = TOY.of('test')
    leaf = predict(straight.model, x)[:, TAX.leaves.copy()].argmax(1)
    assert (TAX.leaves[leaf] == t.numpy()).mean() > 0.6 > 3 / TAX.n_leaves  # chance is 1 in 18
    assert straight.history.loss.iloc[-1] < straight.history.loss.iloc[0]


def test_same_seed_same_weights_other_seed_others(straight):
    torch.manual_seed(99)
    np.random.seed(99)  # the world outside must not matter …  # noqa: NPY002
    before = torch.get_rng_state()
    again = fit(TOY, 'arcface', **QUICK)
    assert torch.equal(before, torch.get_rng_state())  # … and must not notice
    assert same(weights(straight), weights(again)) and rows(straight).equals(rows(again))
    assert not same(weights(straight), weights(fit(TOY, 'arcface', **QUICK, seed=1)))


def test_dropout_is_seeded_too():
    a, b = (fit(TOY, **QUICK, embedding='mlp', dropout=0.5) for _ in range(2))
    assert same(weights(a), weights(b)) and not same(
        weights(a), weights(fit(TOY, **QUICK, embedding='mlp', dropout=0.1))
    )


def test_best_epoch_is_kept():
    run = fit(TOY, **{**QUICK, 'epochs': 12, 'lr': 0.05}, patience=None, monitor='nll')
    assert run.best_epoch == run.history.val_nll.idxmin() and len(run.history) == 12
    x, t = TOY.of('val')
    nll = -predict(run.model, x).gather(1, t[:, None]).log().mean()
    assert float(nll) == pytest.approx(run.best['val_nll'], rel=1e-4)
    top = fit(TOY, **{**QUICK, 'epochs': 12, 'lr': 0.05}, patience=None, monitor='top1')
    assert top.best_epoch == top.history.val_top1.idxmax()


def test_early_stopping():
    run = fit(TOY, epochs=60, batch_size=64, embed_dim=32, lr=0.1, patience=3, monitor='nll')
    assert len(run.history) == run.best_epoch + 1 + 3 < 60


CHILD = textwrap.dedent("""
    import os, sys, time, torch
    sys.path.insert(0, 'tests/running')
    torch.set_num_threads(1)
    from test_training import *
    out, kind = sys.argv[1:]
    say = lambda *a: print(*a, 'wandb' in sys.modules, flush=True)
    if kind == 'features':   # stops for a moment after every checkpoint in mid-epoch
        real = Trainer.save
        def save(self, *a): real(self, *a); say(self.epoch, self.step); time.sleep(.1)
        Trainer.save = save
        fit(TOY, 'arcface', **QUICK, dropout=0.3, out=out, checkpoint_every='4 steps')
    else:   # stops for a moment with a checkpoint half written
        real = os.fsync
        def fsync(fd):
            there = os.path.exists(f'{out}/checkpoint.pt')
            say('writing', os.path.getsize(f'{out}/checkpoint.pt') if there else 0)
            time.sleep(.3)
            real(fd)
        os.fsync = fsync
        fit(squares(sys.argv[1] + '-images'), **IMAGES, out=out, checkpoint_every='1 step')
""")


def killed(out, kind, when):
    "Start a training, kill it at the line of output that `when` accepts, and return that line"
    child = subprocess.Popen(
        [sys.executable, '-c', CHILD, str(out), kind],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {'PYTHONPATH': os.pathsep.join(['.', *sys.path])},
    )
    lines = []
    for line in child.stdout:
        lines.append(line.split())
        if when(lines):
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL and not (out / 'run.json').exists()
    return lines


class Watcher(Classifier):
    "Writes down when it is asked to look, and what its batches hold"

    def __init__(self, in_features, taxonomy):
        super().__init__(in_features, taxonomy)
        self.seen = []

    def loss(self, emb, targets):
        self.seen.append(('step', self.rows.clone(), targets.clone(), emb.detach().clone()))
        return super().loss(emb, targets)

    def prepare(self, emb, targets):
        self.seen.append(('prepare', emb.clone(), targets))

    def refresh(self, emb, targets):
        self.seen.append(('refresh', emb.clone(), targets))

    def conclude(self, emb, targets):
        self.seen.append(('conclude', emb.clone(), targets))

    def calibrate(self, emb, targets):
        self.seen.append(('calibrate', emb.clone(), targets))

    def represent(self, emb):
        return 2 * emb


@pytest.fixture
def watcher(monkeypatch):
    monkeypatch.setitem(HEADS.entries, 'watcher', (Watcher, 'for a test'))
    return 'watcher'


def test_a_head_is_shown_the_splits_when_it_should(watcher):
    run = fit(TOY, watcher, **QUICK | {'epochs': 2})
    seen, steps = run.model.head.seen, len(TOY.of('train')[1]) // 64
    assert [o[0] for o in seen] == ['prepare', *2 * ['refresh', *steps * ['step']], 'conclude', 'calibrate']
    (x, t), (xv, tv) = TOY.of('train'), TOY.of('val')
    looks = {o[0]: o for o in seen}  # the last of each
    assert (
        not torch.equal(seen[0][1], looks['refresh'][1])
        and torch.equal(looks['conclude'][2], t)
        and torch.equal(looks['calibrate'][2], tv)
    )
    with torch.inference_mode():
        assert torch.allclose(looks['conclude'][1], run.model.embed(x), atol=1e-6) and torch.allclose(
            looks['calibrate'][1], run.model.embed(xv), atol=1e-6
        )
    assert torch.equal(embeddings(run.model, TOY, 'val'), 2 * looks['calibrate'][1]) and torch.equal(
        embeddings(run.model, xv), embeddings(run.model, TOY, 'val')
    )
    assert (
        all(torch.equal(t[rows], targets) for what, rows, targets, _ in (o for o in seen if o[0] == 'step'))
        and run.model.head.rows is None
    )


def test_a_batch_may_hold_its_images_several_times(watcher):
    run = fit(TOY, watcher, **QUICK | {'epochs': 1}, views=2, dropout=0.5)
    steps = [o for o in run.model.head.seen if o[0] == 'step']
    assert len(steps) == len(TOY.of('train')[1]) // 64
    for _, rows, targets, emb in steps:
        assert (
            len(rows) == 128
            and torch.equal(rows[:64], rows[64:])
            and torch.equal(targets[:64], targets[64:])
            and not torch.allclose(emb[:64], emb[64:])
        )
    with pytest.raises(HiermetricError, match='views must be at least 1'):
        fit(TOY, **QUICK, views=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40))
def test_copies_in_a_batch_are_numbered(rows):
    found, often = sources._copies(torch.tensor(rows, dtype=torch.long), 10).tolist(), {}
    for row, key in zip(rows, found, strict=True):
        assert key == row + 10 * often.get(row, 0)
        often[row] = often.get(row, 0) + 1


def test_killed_in_mid_epoch_and_continued(tmp_path):
    whole = fit(TOY, 'arcface', **QUICK, dropout=0.3, out=tmp_path / 'whole')
    lines = killed(
        tmp_path / 'torn', 'features', lambda lines: len(lines) == 5
    )  # 6 steps an epoch, a checkpoint every 4
    assert lines[4] == ['3', '2', 'False']  # after 20 steps; and nobody has imported wandb
    state = torch.load(tmp_path / 'torn' / 'checkpoint.pt', weights_only=True)
    assert (state['epoch'], state['step']) in ((3, 2), (4, 0))
    seen = []
    rest = fit(
        TOY,
        'arcface',
        **QUICK,
        dropout=0.3,
        out=tmp_path / 'torn',
        checkpoint_every='5 steps',
        log=('csv', lambda row: seen.append(row['epoch'])),
    )
    assert seen in ([3, 4, 5], [4, 5])  # it did continue
    assert same(weights(whole), weights(rest)) and rows(whole).equals(rows(rest))
    assert (
        not (tmp_path / 'torn' / 'checkpoint.pt').exists() and len(pd.read_csv(tmp_path / 'torn' / 'history.csv')) == 6
    )


class Stop(Exception):
    pass


def stop_at(epoch):
    def listen(row):
        if row['epoch'] == epoch:
            raise Stop

    return listen


def torn(out, features=TOY, **kw):
    with pytest.raises(Stop):
        fit(features, **{**QUICK, **kw}, out=out, checkpoint_every=1, log=(stop_at(3),))


@pytest.mark.parametrize('stop', [1, 4])
def test_resume_at_any_epoch(tmp_path, stop):
    whole = fit(TOY, **QUICK)
    with pytest.raises(Stop):
        fit(TOY, **QUICK, out=tmp_path, checkpoint_every=1, log=(stop_at(stop),))
    assert same(weights(whole), weights(fit(TOY, **QUICK, out=tmp_path)))


def test_finished_run_is_reused_and_loads(tmp_path):
    run = fit(TOY, **QUICK, out=tmp_path)
    stamp = (tmp_path / 'model' / 'model.safetensors').stat().st_mtime_ns
    again = fit(TOY, **QUICK, out=tmp_path)
    assert same(weights(run), weights(again)) and (tmp_path / 'model' / 'model.safetensors').stat().st_mtime_ns == stamp
    assert same(weights(run), weights(load_run(tmp_path, TAX))) and load_run(tmp_path, TAX).best_epoch == run.best_epoch
    fit(TOY, **QUICK, out=tmp_path, resume=False)
    assert (tmp_path / 'model' / 'model.safetensors').stat().st_mtime_ns > stamp


def test_checkpoint_of_another_taxonomy_is_refused(tmp_path):
    torn(tmp_path / 'a')
    fit(TOY, **QUICK, out=tmp_path / 'b')
    other = toy_features(Taxonomy.from_paths(LINEAGES | {'new': 'C'}), per_leaf=40)
    for name, file in (('a', 'checkpoint.pt'), ('b', 'b')):
        with pytest.raises(
            HiermetricError,
            match=f'{file} belongs to other taxonomy \\({TAX.fingerprint}, now {other.taxonomy.fingerprint}\\)',
        ):
            fit(other, **QUICK, out=tmp_path / name)
    with pytest.raises(HiermetricError, match=f'belongs to the taxonomy {TAX.fingerprint}'):
        load_run(tmp_path / 'b', other.taxonomy)


def test_other_settings_or_features_are_refused_by_name(tmp_path):
    torn(tmp_path / 'a')
    fit(TOY, **QUICK, out=tmp_path / 'b')
    for name in 'ab':
        with pytest.raises(HiermetricError, match='other settings: lr 0.01, now 0.001; seed 0, now 7'):
            fit(TOY, **{**QUICK, 'lr': 1e-3}, seed=7, out=tmp_path / name)
        with pytest.raises(HiermetricError, match='belongs to other features'):
            fit(toy_features(TAX, per_leaf=40, seed=1), **QUICK, out=tmp_path / name)


def test_torn_or_hostile_checkpoint(tmp_path):
    torn(tmp_path)
    whole = (tmp_path / 'checkpoint.pt').read_bytes()
    (tmp_path / 'checkpoint.pt').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HiermetricError, match='not a readable checkpoint'):
        fit(TOY, **QUICK, out=tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    torch.save(Evil(), tmp_path / 'checkpoint.pt')
    with pytest.raises(HiermetricError, match='not a readable checkpoint'):
        fit(TOY, **QUICK, out=tmp_path)
    assert not (tmp_path / 'owned').exists()


def test_labels_at_internal_nodes():
    coarse = np.asarray(TOY.targets).copy()
    train = np.flatnonzero(np.asarray(TOY.split) == 'train')[::3]
    coarse[train] = np.asarray(TAX.parents)[coarse[train]]
    val = np.flatnonzero(np.asarray(TOY.split) == 'val')[::2]
    coarse[val] = np.asarray(TAX.parents)[coarse[val]]
    mixed = fit(replace(TOY, targets=coarse), **QUICK)
    x, t = TOY.of('test')
    assert (TAX.leaves[predict(mixed.model, x)[:, TAX.leaves.copy()].argmax(1)] == t.numpy()).mean() > 0.5
    assert np.isfinite(mixed.history.loss).all() and mixed.best['val_top1'] > 0.5
    # against a slow loop: an answer under the label counts, and so does its probability
    probs = predict(mixed.model, x)
    labels = np.where(np.arange(len(t)) % 2, t.numpy(), np.asarray(TAX.parents)[t.numpy()])
    judged = replace(TOY, targets=coarse)
    x, t = judged.of('val')
    p = predict(mixed.model, x)
    right = [
        TAX.is_ancestor(int(label), int(TAX.leaves[int(row[TAX.leaves.copy()].argmax())])) for row, label in zip(p, t)
    ]
    assert mixed.best['val_top1'] == pytest.approx(np.mean(right))
    assert mixed.best['val_nll'] == pytest.approx(
        float(np.mean([-np.log(float(row[label])) for row, label in zip(p, t)])), rel=1e-4
    )


def test_bad_features_are_refused_by_name():
    def spoiled(row, value):  # as a file of features may be; in memory `Features` refuses it at once
        f = replace(TOY)
        f.x = np.asarray(TOY.x).copy()
        f.x[row, 2] = value
        return f

    with pytest.raises(
        HiermetricError,
        match="1 of the 432 feature vectors of 'train' hold NaN or infinity, the first is that of: Row 7",
    ):
        fit(spoiled(7, np.nan), **QUICK)
    with pytest.raises(HiermetricError, match="of 'val' hold NaN or infinity, the first is that of: Row 3"):
        fit(spoiled(3, np.inf), **QUICK)
    t = np.asarray(TOY.targets).copy()
    t[0] = -1
    with pytest.raises(HiermetricError, match='Row 0 has the label -1, which is outside the tree of 27 nodes'):
        fit(replace(TOY, targets=t), **QUICK)
    with pytest.raises(HiermetricError, match="no features in the split 'val'"):
        fit(replace(TOY, split=np.where(TOY.split == 'val', 'train', TOY.split)), **QUICK)


def test_bad_settings_are_refused_by_name():
    for kw, text in (
        (dict(head='arcfase'), "Did you mean 'arcface'"),
        (dict(monitor='auc'), "no monitor 'auc'"),
        (dict(device='tpu'), "no device 'tpu'"),
        (dict(precision='fp4'), "no precision 'fp4'"),
        (dict(log=('cvs',)), "Did you mean 'csv'"),
        (dict(embedding='linaer'), "Did you mean 'linear'"),
        (dict(head_kw=dict(margin=1)), "no setting 'head_kw.margin'; there are"),
        (dict(epochs=0), 'epochs'),
    ):
        with pytest.raises(HiermetricError, match=text):
            fit(TOY, **{**QUICK, **kw})


def test_diverged_run_says_so():
    with pytest.raises(HiermetricError, match='lower the learning rate|NaN or infinity'):
        fit(TOY, **{**QUICK, 'lr': 1e30})


def test_bfloat16_learns_and_devices_can_change_within_a_process():
    low = fit(TOY, **QUICK, device='cpu', precision='bf16')
    assert low.settings['precision'] == 'bf16' and low.best['val_top1'] > 0.5
    assert fit(TOY, **QUICK, device='cpu', precision='no').settings['precision'] == 'no'
    assert make_accelerator('cpu').device.type == 'cpu'


def test_logs_are_written_as_they_go(tmp_path):
    torn(tmp_path)
    with pytest.raises(Stop):
        fit(TOY, **QUICK, out=tmp_path, checkpoint_every=1, log=('csv', 'json', stop_at(4)))
    for history in (
        pd.read_csv(tmp_path / 'history.csv'),
        pd.read_json(tmp_path / 'history.jsonl', lines=True),
    ):  # with the epochs before the break
        assert list(history.epoch) == list(range(5)) and {'loss', 'val_nll', 'val_top1', 'lr'} <= set(history)
    fit(TOY, **QUICK, out=tmp_path)
    assert json.loads((tmp_path / 'run.json').read_text())['settings']['lr'] == 1e-2
    assert (
        len((tmp_path / 'history.jsonl').read_text().splitlines()) == 6
        and Image.open(tmp_path / 'history.png').size[0] > 300
    )
    about = json.loads((tmp_path / 'about.json').read_text())
    assert (
        about['data']['fingerprint'] == TOY.fingerprint
        and about['versions']['torch'] in torch.__version__
        and about['settings']['ema'] is None
        and 'git' in about
    )


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    import wandb

    told, real = [], wandb.Table.__init__
    monkeypatch.setattr(
        wandb.Table, '__init__', lambda self, *a, **kw: told.append(kw.get('dataframe')) or real(self, *a, **kw)
    )
    fit(TOY, **{**QUICK, 'epochs': 2}, out=tmp_path, log=('csv', 'wandb'))
    assert list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
    assert list(told[0].epoch) == [0, 1] and list((tmp_path / 'wandb').rglob('history*.png'))


def test_tensorboard_is_told_or_missed(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, where):
            told.append(where)

        def add_scalar(self, *a):
            told.append(a)

        def close(self):
            told.append('closed')

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    run = fit(TOY, **{**QUICK, 'epochs': 2}, out=tmp_path, log=('tensorboard',))
    assert (
        told[0] == str(tmp_path / 'tensorboard') and told[-1] == 'closed' and ('loss', run.history.loss[1], 1) in told
    )
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(HiermetricError, match='pip install tensorboard'):
        fit(TOY, **QUICK, out=tmp_path / 'b', log=('tensorboard',))


def test_console(capsys):
    fit(TOY, **{**QUICK, 'epochs': 2}, log=('console',))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:2] == ['epoch', 'loss'] and lines[2].split()[0] == '1'


def test_own_logger_and_names(tmp_path):
    seen = []
    fit(TOY, **{**QUICK, 'epochs': 2}, log=(seen.append,))
    assert [r['epoch'] for r in seen] == [0, 1] and 'csv' in loggers and 'wandb' in loggers


@pytest.mark.parametrize('total,warmup', [(1, 0), (10, 0), (100, 10), (7, 7)])
def test_schedule(total, warmup):
    f = [warmup_cosine(t, total, warmup) for t in range(total)]
    assert all(0 < o <= 1 for o in f) and max(f) == pytest.approx(1)
    assert all(a <= b for a, b in zip(f[:warmup], f[1:warmup])) and all(
        a >= b for a, b in zip(f[warmup:], f[warmup + 1 :])
    )


def test_weight_decay_spares_biases():
    net = Model(EmbeddingNet(64, 8), create_head('classifier', 8, TAX))
    assert {
        p.ndim: g['weight_decay']
        for g in create_optimizer('adamw', parameter_groups(net, 0.3), 1e-3).param_groups
        for p in g['params']
    } == {2: 0.3, 1: 0.0}


# ---- schedules and optimisers, against closed forms, torch, and slow loops ----


class Probe(torch.optim.SGD):
    def __init__(self):
        super().__init__([torch.zeros(1, requires_grad=True)], lr=1.0)


def of_torch(make, n):
    opt = Probe()
    lr = make(opt)
    out = []
    for _ in range(n):
        out.append(opt.param_groups[0]['lr'])
        opt.step()
        lr.step()
    return out


L = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    'name,kw,total,warmup,make',
    [
        ('cosine', {}, 50, 0, lambda o: L.CosineAnnealingLR(o, 50)),
        ('sgdr', dict(cycles=3, mult=2.0), 70, 0, lambda o: L.CosineAnnealingWarmRestarts(o, 10, 2)),
        ('sgdr', dict(cycles=4, mult=1.0), 60, 0, lambda o: L.CosineAnnealingWarmRestarts(o, 15)),
        (
            'cyclic',
            dict(cycles=3, low=0.2),
            60,
            0,
            lambda o: L.CyclicLR(o, 0.2, 1.0, step_size_up=10, cycle_momentum=False),
        ),
        (
            'cyclic',
            dict(cycles=3, low=0.2, shrink=0.5),
            60,
            7,
            lambda o: L.CyclicLR(o, 0.2, 1.0, step_size_up=10, mode='triangular2', cycle_momentum=False),
        ),
        ('multistep', dict(at=[0.2, 0.5, 0.9], gamma=0.3), 40, 0, lambda o: L.MultiStepLR(o, [8, 20, 36], 0.3)),
        ('onecycle', {}, 80, 24, lambda o: L.OneCycleLR(o, 1.0, total_steps=80, pct_start=0.3, cycle_momentum=False)),
        ('constant', {}, 10, 0, lambda o: L.ConstantLR(o, 1.0)),
        ('constant', {}, 12, 5, lambda o: L.LinearLR(o, 1 / 5, total_iters=4)),
    ],
)
def test_schedules_are_those_of_torch(name, kw, total, warmup, make):
    f = create_schedule(name, total, warmup, **kw)
    assert [f(t) for t in range(total)] == pytest.approx(of_torch(make, total), abs=1e-9)


@pytest.mark.parametrize('name', [o for o in SCHEDULES if o != 'cyclic'])
def test_schedules_climb_first_and_stay_within_bounds(name):
    for total, warmup in ((1, 1), (2, 1), (50, 20), (7, 7)):
        f = create_schedule(name, total, warmup)
        v = [f(t) for t in range(total)]
        assert (
            all(0 <= o <= 1 + 1e-12 for o in v)
            and all(a < b for a, b in zip(v[:warmup], v[1:warmup]))
            and max(v) == pytest.approx(1)
        )


def test_fit_follows_its_schedule_and_milestones_in_epochs():
    run = fit(TOY, **QUICK, schedule='multistep', schedule_kw=dict(at=[2, 4], gamma=0.1), warmup=0.0, patience=None)
    assert list(run.history.lr) == pytest.approx([1e-2] * 2 + [1e-3] * 2 + [1e-4] * 2)
    with pytest.raises(HiermetricError, match="no setting 'schedule_kw.cycle'; there are cycles"):
        fit(TOY, **QUICK, schedule='sgdr', schedule_kw=dict(cycle=2))


def by_hand(optimizer, wd, clip=None, ema=None, momentum=0.9):
    "The same training, written down without a trainer"
    cfg = fitting.resolve_settings(TOY, fitting.defaults() | QUICK | dict(head='classifier', dropout=0.0))
    model = build_model(TOY, cfg)
    x, t = TOY.of('train')
    x = power_normalise(x, 0.5)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == o] for o in (True, False))
    opt = {
        'adamw': lambda g: torch.optim.AdamW(g, lr=1e-2),
        'adam': lambda g: torch.optim.Adam(g, lr=1e-2),
        'sgd': lambda g: torch.optim.SGD(g, lr=1e-2, momentum=momentum, nesterov=momentum > 0),
    }[optimizer]([dict(params=matrices, weight_decay=wd), dict(params=rest, weight_decay=0.0)])
    step, total = 0, 6 * 6
    for epoch in range(6):
        torch.manual_seed(int(np.random.SeedSequence([0, 1 + epoch]).generate_state(1)[0]))
        order = torch.randperm(len(t))
        for i in range(6):
            for g in opt.param_groups:
                g['lr'] = 1e-2 * warmup_cosine(step, total, 4)
            rows = order[64 * i : 64 * i + 64]
            opt.zero_grad()
            model.loss(x[rows], t[rows]).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            if ema:
                d = min(ema, (1 + step) / (10 + step))
                for k, v in model.state_dict().items():
                    average[k] = d * average[k] + (1 - d) * v
            step += 1
    return average if ema else model.state_dict()


@pytest.mark.parametrize(
    'kw',
    [
        dict(optimizer='adamw', weight_decay=1.0),
        dict(optimizer='adam', weight_decay=0.01),
        dict(optimizer='sgd', weight_decay=0.01),
        dict(optimizer='sgd', weight_decay=0.0, momentum=0.0),
        dict(optimizer='adamw', weight_decay=0.1, clip_norm=0.05),
        dict(optimizer='adamw', weight_decay=0.1, ema=0.8),
        dict(optimizer='adamw', weight_decay=0.1, accumulate=4),
    ],
)
def test_fit_is_what_a_plain_loop_does(kw, monkeypatch):
    last = {}
    monkeypatch.setattr(fitting, '_finish', lambda trainer, *a: last.update(trainer.judged.state_dict()))
    with torch.random.fork_rng():
        want = by_hand(kw['optimizer'], kw['weight_decay'], kw.get('clip_norm'), kw.get('ema'), kw.get('momentum', 0.9))
    fit(TOY, **QUICK, dropout=0.0, patience=None, **kw)
    assert want.keys() == last.keys()
    for k, v in want.items():
        assert torch.allclose(v, last[k], atol=2e-5), k


def test_averaged_weights_are_judged_and_kept():
    run = fit(TOY, **QUICK, ema=0.9, patience=None)
    x, t = TOY.of('val')
    leaf = TAX.leaves[predict(run.model, x)[:, TAX.leaves.copy()].argmax(1)]
    assert (leaf == t.numpy()).mean() == pytest.approx(run.best['val_top1'])
    assert not same(weights(run), weights(fit(TOY, **QUICK, patience=None)))


def test_running_statistics_are_averaged_and_counts_copied():
    a, b = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    b.running_mean += 4.0
    b.num_batches_tracked += 7
    ema_update(a, b, 0.75, 1000)
    assert a.running_mean.tolist() == [1.0, 1.0] and a.num_batches_tracked == 7


def test_averages_and_clipping_survive_a_break(tmp_path):
    kw = dict(QUICK, ema=0.9, clip_norm=0.1, dropout=0.3, optimizer='sgd', schedule='sgdr', accumulate=2)
    whole = fit(TOY, **kw)

    class Step(Exception):
        pass

    def after(n):
        real, done = Trainer._backward, []

        def backward(self, *a, **k):
            if len(done) == n:
                raise Step
            done.append(1)
            return real(self, *a, **k)

        return backward

    for n in (5, 23, 41):  # parts of batches; 12 an epoch
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Trainer, '_backward', after(n))
            with pytest.raises(Step):
                fit(TOY, **kw, out=tmp_path, checkpoint_every='1 step')
    rest = fit(TOY, **kw, out=tmp_path)
    assert same(weights(whole), weights(rest)) and rows(whole).equals(rows(rest))


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    whole, real, full = fit(TOY, **QUICK), trainer_module.atomic_path, [False]
    from contextlib import contextmanager

    @contextmanager
    def tight(path):  # /dev/full says ENOSPC to whoever writes
        if full[0] and Path(path).name == 'checkpoint.pt':
            yield Path('/dev/full')
        else:
            with real(path) as tmp:
                yield tmp

    monkeypatch.setattr(trainer_module, 'atomic_path', tight)

    def fills(row):
        full[0] = row['epoch'] >= 2

    def stops(row):
        if row['epoch'] == 4:
            raise Stop

    with (
        pytest.warns(
            UserWarning,
            match='checkpoint of epoch 3, step 0 cannot be written .*No space left.*The one before stands; training '
            'goes on',
        ),
        pytest.raises(Stop),
    ):
        fit(TOY, **QUICK, out=tmp_path, checkpoint_every=1, log=(fills, stops))
    assert torch.load(tmp_path / 'checkpoint.pt', weights_only=True)['epoch'] == 2
    full[0], seen = False, []
    rest = fit(TOY, **QUICK, out=tmp_path, log=(lambda row: seen.append(row['epoch']),))
    assert seen == [2, 3, 4, 5] and same(weights(whole), weights(rest))


def test_a_full_disk_at_the_end_is_told(tmp_path, monkeypatch):
    def save(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Model, 'save', save)
    with pytest.raises(HiermetricError, match='No space left.*call fit again'):
        fit(TOY, **QUICK, out=tmp_path, checkpoint_every=1)
    monkeypatch.undo()
    assert same(weights(fit(TOY, **QUICK)), weights(fit(TOY, **QUICK, out=tmp_path)))


def test_a_run_of_before_is_accepted(tmp_path):
    run = fit(TOY, **QUICK, out=tmp_path)
    found = json.loads((tmp_path / 'run.json').read_text())
    assert set(found['settings']) == {
        'head',
        'embedding',
        'embed_dim',
        'power',
        'dropout',
        'epochs',
        'batch_size',
        'lr',
        'weight_decay',
        'warmup',
        'patience',
        'monitor',
        'seed',
        'precision',
        'head_kw',
        'embed_kw',
    }  # as issue 3 wrote them
    assert same(weights(run), weights(fit(TOY, **QUICK, out=tmp_path, optimizer='adamw', ema=None, schedule_kw=None)))
    with pytest.raises(HiermetricError, match="other settings: optimizer 'adamw', now 'sgd'"):
        fit(TOY, **QUICK, out=tmp_path, optimizer='sgd')


def test_start_over_forgets_the_checkpoint(tmp_path):
    torn(tmp_path)
    (tmp_path / '.checkpoint.pt.99.part').write_bytes(b'half')
    with pytest.raises(Stop):
        fit(TOY, **QUICK, out=tmp_path, resume=False, log=(stop_at(0),))
    assert not (tmp_path / 'checkpoint.pt').exists() and not list(tmp_path.glob('.*.part'))


# ---- images ----


def squares(folder, n=80, size=40):
    "A bright square in one of four corners, or a blue or red field; the tree groups corners and fields"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(0), ['nw', 'se', 'blue', 'red']
    tax = Taxonomy.from_paths({'nw': 'corner', 'se': 'corner', 'blue': 'field', 'red': 'field'})
    for i in range(n):
        a, k = rng.integers(0, 60, (size, size + i % 5, 3), dtype=np.uint8), i % 4
        if k == 0:
            a[:20, :20] = 220
        if k == 1:
            a[-20:, -20:] = 220
        if k >= 2:
            a[..., 2 if k == 2 else 0] += 150
        if not (folder / f'{i:03}.png').exists():
            Image.fromarray(a).save(folder / f'{i:03}.png')
    split = np.resize(['train'] * 12 + ['val'] * 4 + ['test'] * 4, n)
    return ImageTable(
        pd.DataFrame(
            {
                'path': [str(folder / f'{i:03}.png') for i in range(n)],
                'class': [names[i % 4] for i in range(n)],
                'split': split,
            }
        ),
        tax,
        'squares',
        folder,
        'white',
    )


def shifted(x):
    return VF.resize(x, [32, 32], antialias=True).roll(int(torch.randint(0, 4, ())), -1)


IMAGES = dict(
    head='classifier',
    backbone='timm:test_efficientnet',
    backbone_kw=dict(pretrained=False),
    image_size=32,
    batch_size=16,
    embed_dim=16,
    lr=5e-3,
    epochs=3,
    patience=None,
    augment=shifted,
    device='cpu',
)


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('HIERMETRIC_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return squares(tmp_path_factory.mktemp('squares'))


@pytest.fixture(scope='module')
def seen(pictures, tmp_path_factory):
    return fit(pictures, **{**IMAGES, 'epochs': 8, 'augment': None}, out=tmp_path_factory.mktemp('seen'))


def test_images_learn_and_their_model_keeps_its_backbone(seen, pictures):
    assert seen.best['val_top1'] > 0.7 > 2 / 4
    back = load_run(seen.out, pictures.taxonomy).model
    p = predict(seen.model, pictures, 'test')
    assert torch.equal(p, predict(back, pictures, 'test')) and back.encoder.size == 32
    # and its parts: features of the trained backbone, and what lies above
    f = extract(pictures, seen.model.backbone, engine='eager', progress=False)
    assert torch.allclose(predict(seen.model.top, f, 'test'), p, atol=2e-3)  # features are kept in half precision
    assert {'about.json', 'batch.png', 'history.png', 'history.csv', 'run.json', 'model'} <= {
        o.name for o in seen.out.iterdir()
    }
    assert (
        'images' in (found := json.loads((seen.out / 'run.json').read_text()))
        and 'features' not in found
        and found['settings']['backbone'] == 'timm:test_efficientnet'
    )
    with pytest.raises(HiermetricError, match='belongs to other images'):
        fit(replace(pictures, name='others'), **{**IMAGES, 'epochs': 8, 'augment': None}, out=seen.out)


def test_views_at_test_time_make_the_answer_the_same_whichever_way_up(seen, pictures, tmp_path):
    model, paths = seen.model, pictures.samples.path.tolist()
    turned = []
    for i, p in enumerate(paths):
        Image.open(p).rotate(90, expand=True).save(tmp_path / f'{i}.png')
        turned.append(str(tmp_path / f'{i}.png'))
    other = replace(pictures, samples=pictures.samples.assign(path=turned))
    a, b = (predict(model, o, 'test', tta='plankton') for o in (pictures, other))
    # resizing and padding are not quite the same for a picture that lies on its side
    assert (
        torch.allclose(a, b, atol=0.02)
        and (predict(model, pictures, 'test') - predict(model, other, 'test')).abs().max() > 0.05
    )
    assert torch.allclose(
        a,
        torch.stack([predict(model, o, 'test', tta='natural') for o in _turns(pictures, tmp_path)]).mean(0),
        atol=0.02,
    )
    with pytest.raises(HiermetricError, match='Only images can be turned'):
        predict(model, torch.zeros(2, 16), tta='plankton')
    with pytest.raises(HiermetricError, match="no views 'plancton'"):
        predict(model, pictures, 'test', tta='plancton')


def _turns(pictures, folder):
    for k in range(4):
        paths = []
        for i, p in enumerate(pictures.samples.path):
            paths.append(str(folder / f't{k}-{i}.png'))
            Image.open(p).rotate(90 * k, expand=True).save(paths[-1])
        yield replace(pictures, samples=pictures.samples.assign(path=paths))


def test_a_predictor_looks_through_the_trained_backbone(seen, pictures, tmp_path):
    from hiermetric.running.predictor import Predictor

    f = extract(pictures, seen.model.backbone, engine='eager', progress=False)
    test = pictures.samples[pictures.samples.split == 'test'].path.tolist()
    predictor = Predictor.from_run(seen.out, f)
    predictor.save_pretrained(tmp_path / 'p')
    again = Predictor.from_pretrained(tmp_path / 'p')
    a, b = (o(test, 0.5, 'argmax', engine='eager') for o in (predictor, again))
    want = pictures.taxonomy.names[
        pictures.taxonomy.leaves[
            predict(seen.model, pictures, 'test')[:, pictures.taxonomy.leaves.copy()].argmax(1).numpy()
        ]
    ]
    assert a.equals(b) and a.answer.tolist() == list(want)
    with pytest.raises(HiermetricError, match='of its own backbone'):
        Predictor.from_model(
            seen.model,
            Features(f.x, f.targets, f.split, f.taxonomy, f.meta | {'backbone_fingerprint': 'other'}, f.paths),
        )


def test_batches_do_not_depend_on_workers_or_neighbours(pictures, tmp_path):
    make = lambda **kw: ImageSource(
        pictures, 'train', Transform(32, fit='pad', fill='white'), augment=shifted, seed=3, cache=tmp_path, **kw
    )
    rows = torch.arange(24).view(3, 8)
    before = torch.get_rng_state()
    a, b = ([x for (x,), _ in make(workers=w).batches(rows, 5)] for w in (0, 2))
    assert torch.equal(torch.cat(a), torch.cat(b)) and torch.equal(before, torch.get_rng_state())
    (one,), t = next(make().batches([torch.tensor([17])], 5))
    assert (
        torch.equal(one[0], torch.cat(a)[17])
        and t.item() == pictures.targets[np.flatnonzero(pictures.samples.split == 'train')[17]]
    )
    (other,), _ = next(make().batches(rows, 6))
    assert not torch.equal(other, a[0])
    (plain,), _ = next(make().batches(rows))
    (again,), _ = next(make().batches(rows))
    assert torch.equal(plain, again) and plain.shape == (8, 3, 32, 32)


@pytest.mark.parametrize('augment', ['one by one', 'a batch'])
def test_copies_of_an_image_are_augmented_each_on_its_own(augment, pictures, tmp_path):
    own = shifted if augment == 'one by one' else create_augment('natural', 32)
    source = ImageSource(pictures, 'train', Transform(32, fit='pad', fill='white'), augment=own, seed=3, cache=tmp_path)
    (x,), _ = next(source.batches([torch.tensor([4, 7, *[4] * 6])], 2))
    (first,), _ = next(source.batches([torch.tensor([4, 7])], 2))
    assert (x[:2].int() - first.int()).abs().max() <= 1 and len(
        torch.unique(x[[0, *range(2, 8)]], dim=0)
    ) > 2  # in a batch of eight or of two: equal to rounding


def test_pixels_are_decoded_once_and_as_the_predictor_sees_them(pictures, tmp_path, monkeypatch):
    t = Transform(32, fit='pad', fill='white')
    source = ImageSource(pictures, 'val', t, cache=tmp_path, size_input=True)
    paths = pictures.samples[pictures.samples.split == 'val'].path.tolist()
    (x, size), _ = next(source.batches(torch.arange(len(source))[None]))
    assert torch.equal(x, torch.stack([t.pixels(p) for p in paths])) and size.tolist() == [
        list(Image.open(p).size) for p in paths
    ]
    monkeypatch.setattr(sources, 'image_batches', lambda *a: pytest.fail('decoded again'))
    assert len(ImageSource(pictures, 'val', t, cache=tmp_path)) == len(paths)
    with pytest.raises(BaseException, match='decoded again'):
        ImageSource(
            pictures, 'val', Transform(24, fit='pad', fill='white'), cache=tmp_path
        )  # another size is another file
    monkeypatch.undo()
    monkeypatch.setattr(
        'shutil.disk_usage', lambda p: types.SimpleNamespace(free=0)
    )  # no room: decoded as needed, to the same pixels
    (y, _), _ = next(
        ImageSource(pictures, 'val', t, cache=tmp_path / 'other', size_input=True).batches(
            torch.arange(len(source))[None]
        )
    )
    assert torch.equal(x, y)


def test_unreadable_images_are_listed(pictures, tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    samples = pictures.samples.copy()
    samples.loc[0, 'path'] = str(tmp_path / 'bad.png')
    with pytest.raises(HiermetricError, match='1 of the 48 images cannot be read: .*bad.png'):
        fit(replace(pictures, samples=samples), **IMAGES)
    assert not list(Path(os.environ['HIERMETRIC_CACHE'], 'pixels').glob('.*part'))


def test_orientation_counts_in_the_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (30, 20)).save(tmp_path / 'a.jpg', exif=exif)
    assert image_size(str(tmp_path / 'a.jpg')) == (20, 30)


def test_images_killed_while_a_checkpoint_is_written(pictures, tmp_path):
    kw = dict(IMAGES, out=tmp_path / 'whole', size_input=False)
    whole = fit(pictures, **kw)
    # the fifth checkpoint (3 steps an epoch, so the second epoch's second step) is half written, the fourth stands
    lines = killed(tmp_path / 'torn', 'images', lambda lines: len(lines) == 5)
    assert lines[4][0] == 'writing' and int(lines[4][1]) > 0 and list((tmp_path / 'torn').glob('.checkpoint.pt.*.part'))
    assert (state := torch.load(tmp_path / 'torn' / 'checkpoint.pt', weights_only=True))['epoch'] == 1 and state[
        'step'
    ] == 1
    rest = fit(squares(str(tmp_path / 'torn') + '-images'), **IMAGES, out=tmp_path / 'torn')
    assert (
        same(weights(whole), weights(rest))
        and rows(whole).equals(rows(rest))
        and not list((tmp_path / 'torn').glob('.*.part'))
    )


def test_frozen_batch_norm_is_frozen_and_the_rest_learns(pictures):
    start = Encoder('timm:test_efficientnet', size=32, pretrained=False).net.state_dict()
    norms = {k for k in start if 'bn' in k or 'running' in k or 'num_batches' in k}
    for kw, moved in ((dict(freeze_bn=True), False), (dict(), True)):
        end = fit(pictures, **{**IMAGES, 'epochs': 1}, **kw).model.encoder.net.state_dict()
        assert len(norms) > 20 and all(torch.equal(start[k], end[k]) != moved for k in norms)
        assert not any(torch.equal(start[k], end[k]) for k in start if k not in norms)


def test_frozen_backbone_and_when_it_thaws(pictures, tmp_path):
    start = Encoder('timm:test_efficientnet', size=32, pretrained=False).net.state_dict()
    frozen = fit(pictures, **IMAGES, freeze='backbone')
    assert (
        same(start, frozen.model.encoder.net.state_dict())
        and frozen.history.loss.iloc[-1] < frozen.history.loss.iloc[0]
    )
    states = []
    monkey = pytest.MonkeyPatch()
    real = Trainer.validate
    monkey.setattr(
        Trainer,
        'validate',
        lambda self: (
            states.append({k: v.clone() for k, v in self.model.encoder.net.state_dict().items()}),
            real(self),
        )[1],
    )
    try:
        whole = fit(pictures, **IMAGES, freeze='backbone', unfreeze_at=1)
        assert [same(start, o) for o in states] == [True, False, False]
        with pytest.raises(Stop):
            fit(
                pictures,
                **IMAGES,
                freeze='backbone',
                unfreeze_at=1,
                out=tmp_path,
                checkpoint_every=1,
                log=(stop_at(1),),
            )
        assert same(weights(whole), weights(fit(pictures, **IMAGES, freeze='backbone', unfreeze_at=1, out=tmp_path)))
    finally:
        monkey.undo()


@pytest.mark.parametrize(
    'name,least',
    [('timm:test_efficientnet', 4), ('timm:test_resnet', 4), ('timm:test_vit', 3), ('timm:test_convnext', 4)],
)
def test_stages_cover_the_network_and_rates_fall_with_depth(name, least):
    net = Encoder(name, pretrained=False)
    parts = stages(net.net)
    assert len(parts) >= least and sorted(id(p) for s in parts for p in s) == sorted(map(id, net.net.parameters()))
    assert all(any(p.ndim > 1 for p in s) for s in parts)
    model = Model(EmbeddingNet(net.out_features, 8), create_head('classifier', 8, TAX), net)
    groups = parameter_groups(model, 0.1, layer_decay=0.5)
    of = {id(p): g['scale'] for g in groups for p in g['params']}
    assert all(of[id(p)] == 1.0 for p in model.top.parameters())
    for k, stage in enumerate(parts):
        assert {of[id(p)] for p in stage} == {0.5 ** (len(parts) - k)}
    assert len(of) == len(list(model.parameters()))


def test_layer_decay_reaches_the_optimiser(pictures, monkeypatch):
    rates = []
    monkeypatch.setattr(
        Trainer,
        'validate',
        lambda self: (rates.append([g['lr'] for g in self.opt.param_groups]), {'val_nll': 1.0, 'val_top1': 0.0})[1],
    )
    run = fit(pictures, **{**IMAGES, 'epochs': 1, 'schedule': 'constant', 'warmup': 0.0}, layer_decay=0.5)
    assert max(rates[0]) == 5e-3 == run.history.lr[0] and len({round(o, 12) for o in rates[0]}) >= 5


def test_the_size_of_the_original_is_seen(tmp_path):
    table = squares(tmp_path / 'im', n=40)
    for i, p in enumerate(table.samples.path):  # the same grey, only the size differs
        Image.fromarray(np.full((20, 20, 3) if i % 4 < 2 else (90, 90, 3), 128, np.uint8)).save(p)
    coarse = table.samples.assign(**{'class': ['corner' if i % 4 < 2 else 'field' for i in range(40)]})
    table = replace(table, samples=coarse)
    kw = {**IMAGES, 'epochs': 10, 'batch_size': 8, 'augment': None, 'lr': 1e-2}
    blind, seeing = fit(table, **kw | dict(epochs=3)), fit(table, **kw, size_input=True, out=tmp_path / 'run')
    assert seeing.best['val_top1'] == 1.0 and blind.best['val_top1'] < 0.8
    back = load_run(tmp_path / 'run', table.taxonomy).model
    assert torch.equal(predict(back, table, 'test'), predict(seeing.model, table, 'test'))
    assert back.encoder.size_mean.tolist() == pytest.approx([math.log(20 * 90) / 2] * 2, abs=0.2)
    # and a predictor measures for itself
    from hiermetric.running.predictor import Predictor

    p = Predictor.from_run(tmp_path / 'run', extract(table, back.backbone, engine='eager', progress=False))
    p.save_pretrained(tmp_path / 'p')
    answers = Predictor.from_pretrained(tmp_path / 'p')(
        table.samples.path.tolist(), 0.5, 'argmax', rank=1, engine='eager'
    )
    assert (answers.answer == table.samples['class'].to_numpy()).all()


def test_settings_for_images_are_refused_for_features():
    for kw in (dict(augment='natural'), dict(freeze='backbone'), dict(layer_decay=0.5), dict(backbone='resnet18')):
        with pytest.raises(HiermetricError, match=f'{next(iter(kw))} is a setting for images'):
            fit(TOY, **QUICK, **kw)


@pytest.mark.parametrize(
    'kw,text',
    [
        (dict(optimizer='adamv'), "Did you mean"),
        (dict(schedule='cosin'), "Did you mean 'cosine'"),
        (dict(accumulate=3), 'multiple of 3'),
        (dict(ema=1.5), 'ema must be above 0 and at most 1'),
        (dict(clip_norm=0.0), 'clip_norm must be above 0'),
        (dict(checkpoint_every='7 stops'), 'unit of checkpoint_every'),
        (dict(checkpoint_every=0), 'checkpoint_every must be above 0'),
        (dict(log=('jsn',)), "Did you mean 'json'"),
    ],
)
def test_more_bad_settings(kw, text, tmp_path):
    with pytest.raises(HiermetricError, match=text):
        fit(TOY, **QUICK, **kw)


def test_unfreezing_what_was_never_frozen(pictures):
    with pytest.raises(HiermetricError, match="freeze='backbone'"):
        fit(pictures, **IMAGES, unfreeze_at=2)
    with pytest.raises(HiermetricError, match="no images in the split 'val'"):
        fit(replace(pictures, samples=pictures.samples[pictures.samples.split != 'val']), **IMAGES)


def test_samplers_and_mixes_of_the_augmentation(pictures):
    from hiermetric.images.augment import create_augment, create_mix

    run = fit(
        pictures, **{**IMAGES, 'augment': 'plankton', 'epochs': 2}, mix='mixup', sampler='balanced', clip_norm=1.0
    )
    assert np.isfinite(run.history.loss).all() and run.settings['mix'] == 'mixup' and create_augment and create_mix
    again = fit(
        pictures, **{**IMAGES, 'augment': 'plankton', 'epochs': 2}, mix='mixup', sampler='balanced', clip_norm=1.0
    )
    assert same(weights(run), weights(again))


@pytest.mark.parametrize('head', ['arcface', 'sphere_multi', 'tree_gaussian', 'kernel_ridge'])
def test_any_head_trains_on_images(pictures, head):
    run = fit(pictures, **{**IMAGES, 'head': head, 'epochs': 1})
    assert np.isfinite(run.history.loss).all() and predict(run.model, pictures, 'test').isfinite().all()


def test_pictures_of_twelve_bands(tmp_path):
    table = squares(tmp_path / 'rgb', n=40)

    def bands(path):
        a = np.asarray(Image.open(path))
        np.save(path[:-4], np.tile(a, (1, 1, 4)))
        return path[:-4] + '.npy'

    table = replace(table, samples=table.samples.assign(path=table.samples.path.map(bands)), fill=None)
    run = fit(
        table,
        **{**IMAGES, 'epochs': 1, 'augment': None, 'backbone_kw': dict(pretrained=False, in_channels=12)},
        size_input=True,
        out=tmp_path / 'run',
    )
    assert run.model.encoder.net.conv_stem.in_channels == 12 and run.model.encoder.transform.channels == 12
    assert torch.equal(
        predict(load_run(tmp_path / 'run', table.taxonomy).model, table, 'test'), predict(run.model, table, 'test')
    )


def test_how_fast_is_not_what(pictures, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, *a, **kw: compiled.append(type(self).__name__))
    run = fit(pictures, **{**IMAGES, 'epochs': 1}, out=tmp_path, compile=True, workers=1)
    assert compiled == ['EfficientNet'] and next(
        p for p in run.model.encoder.net.parameters() if p.ndim == 4
    ).is_contiguous(memory_format=torch.channels_last)
    assert (
        len(
            fit(
                pictures, **{**IMAGES, 'epochs': 1}, out=tmp_path, compile=False, channels_last=False, workers=0
            ).history
        )
        == 1
        and len(compiled) == 1
    )  # the finished run


# ---- several processes ----

TWO = textwrap.dedent("""
    import os, sys, torch
    sys.path.insert(0, 'tests/running')
    torch.set_num_threads(1)
    from test_training import *
    from accelerate import debug_launcher
    def train(out):
        torch.set_num_threads(1)
        assert make_accelerator('cpu').num_processes == 2
        fit(TOY, 'arcface', **WEIGHED, out=f'{out}/features', accumulate=2)
        fit(squares(f'{out}/images'), **SHARED, out=f'{out}/run')
    debug_launcher(train, (sys.argv[1],), num_processes=2)
""")
WEIGHED = dict(
    QUICK, dropout=0.0, head_kw=dict(class_weights=[1.0 + 4 * (i % 3) for i in range(TAX.n_leaves)])
)  # by the whole batch
SHARED = dict(IMAGES, freeze='backbone', unfreeze_at=1, freeze_bn=True, dropout=0.0, ema=0.9, epochs=2)


def test_two_processes_are_one_within_rounding(tmp_path):
    squares(tmp_path / 'images')
    subprocess.run(
        [sys.executable, '-c', TWO, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {'PYTHONPATH': os.pathsep.join(['.', *sys.path])},
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    for name, one in (
        ('features', fit(TOY, 'arcface', **WEIGHED)),
        ('run', fit(squares(tmp_path / 'images'), **SHARED)),
    ):
        two = load_run(tmp_path / name, one.model.taxonomy)
        assert len(two.history) == len(one.history) and np.allclose(
            one.history[['loss', 'val_nll', 'lr']], two.history[['loss', 'val_nll', 'lr']], atol=1e-3
        )
        a, b = weights(one), weights(two)
        assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a) and (
            one.best_epoch != two.best_epoch
            or all((a[k] - b[k]).abs().max() < 1e-3 for k in a if a[k].is_floating_point())
        )


@pytest.mark.parametrize(
    'script', sorted((Path(__file__).parents[2] / 'nbs' / 'jobs').glob('*.sh')), ids=lambda p: p.name
)
def test_job_scripts_are_sound(script):
    subprocess.run(['bash', '-n', script], check=True)
    text = script.read_text()
    assert 'hiermetric' in text and 'train --config' in text and ('--requeue' in text or 'idempotent' in text)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_same_seed_same_weights():
    a, b = (fit(TOY, 'arcface', **QUICK, device='cuda') for _ in range(2))
    assert same(weights(a), weights(b)) and a.settings['precision'] == 'bf16'


# beginning with another run


def test_start_takes_over_all_below_the_head(straight, tmp_path):
    "Another head on the embedding of a run, from memory and from its folder alike; another beginning is another run"
    kw = QUICK | dict(epochs=1, lr=1e-9, weight_decay=0.0)
    a = fit(TOY, 'classifier', **kw, start=straight)
    old = straight.model.embedding.state_dict()
    for k, v in a.model.embedding.state_dict().items():
        assert torch.allclose(v, old[k], atol=1e-6)
    assert not torch.allclose(
        fit(TOY, 'classifier', **kw).model.embedding.state_dict()['layers.1.weight'], old['layers.1.weight'], atol=1e-3
    )
    fit(TOY, 'arcface', **QUICK, out=tmp_path / 'first')
    b = fit(TOY, 'classifier', **kw, start=tmp_path / 'first', out=tmp_path / 'second')
    assert (
        same(weights(a), weights(b))
        and b.settings['start'] == a.settings['start']
        and isinstance(b.settings['start'], str)
    )
    assert same(
        weights(fit(TOY, 'classifier', **kw, start=tmp_path / 'first' / 'model', out=tmp_path / 'second')), weights(b)
    )
    with pytest.raises(HiermetricError, match='other settings: start'):
        fit(TOY, 'classifier', **kw, out=tmp_path / 'second')


def test_start_refuses_what_does_not_fit(straight, tmp_path):
    with pytest.raises(HiermetricError, match='embedding of that one: they differ in layers.1'):
        fit(TOY, 'classifier', **QUICK | dict(embed_dim=16), start=straight)
    with pytest.raises(HiermetricError, match='layers.2.* not there'):
        fit(TOY, 'classifier', **QUICK, embed_kw=dict(norm='batch'), start=straight)
    with pytest.raises(HiermetricError, match='no model'):
        fit(TOY, 'classifier', **QUICK, start=tmp_path)
