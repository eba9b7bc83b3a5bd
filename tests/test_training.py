"Training: determinism, crash and resume, what is refused, internal labels. On clusters in feature space, so no data are needed."
import json, os, signal, subprocess, sys, textwrap
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.taxonomy import Taxonomy
from hiermetric.heads import EmbeddingNet, Model, create_head
from hiermetric.training import create_optimizer, fit, load_run, loggers, make_accelerator, parameter_groups, predict, toy_features, warmup_cosine

LINEAGES = {f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xyz' for s in '123'}
TAX = Taxonomy.from_paths(LINEAGES)
TOY = toy_features(TAX, per_leaf=40)
QUICK = dict(epochs=6, batch_size=64, embed_dim=32, lr=1e-2)

def weights(run): return {k: v.clone() for k, v in run.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def rows(run): return run.history.drop(columns='seconds')

@pytest.fixture(scope='module')
def straight(): return fit(TOY, 'arcface', **QUICK)

def test_learns(straight):
    x, t = TOY.of('test')
    leaf = predict(straight.model, x)[:, TAX.leaves.copy()].argmax(1)
    assert (TAX.leaves[leaf] == t.numpy()).mean() > 0.6 > 3/TAX.n_leaves   # chance is 1 in 18
    assert straight.history.loss.iloc[-1] < straight.history.loss.iloc[0]

def test_same_seed_same_weights_other_seed_others(straight):
    torch.manual_seed(99); np.random.seed(99)   # the world outside must not matter …  # noqa: NPY002
    before = torch.get_rng_state()
    again = fit(TOY, 'arcface', **QUICK)
    assert torch.equal(before, torch.get_rng_state())   # … and must not notice
    assert same(weights(straight), weights(again)) and rows(straight).equals(rows(again))
    assert not same(weights(straight), weights(fit(TOY, 'arcface', **QUICK, seed=1)))

def test_dropout_is_seeded_too():
    a, b = (fit(TOY, **QUICK, embedding='mlp', dropout=0.5) for _ in range(2))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(fit(TOY, **QUICK, embedding='mlp', dropout=0.1)))

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
    import sys, time
    from hiermetric.taxonomy import Taxonomy
    from hiermetric.training import fit, toy_features
    lineages = {f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xyz' for s in '123'}
    toy = toy_features(Taxonomy.from_paths(lineages), per_leaf=40)
    def slowly(row): print(row['epoch'], flush=True); time.sleep(0.1)
    fit(toy, 'arcface', epochs=6, batch_size=64, embed_dim=32, lr=1e-2, dropout=0.3, out=sys.argv[1], checkpoint_every=2, log=('csv', slowly))
""")

def test_killed_and_continued(tmp_path):
    whole = fit(TOY, 'arcface', **QUICK, dropout=0.3, out=tmp_path/'whole')
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path/'torn')], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.strip() == '3': break   # epochs 0 to 3 are done, the checkpoint holds 0 to 3 or 0 to 1
    child.send_signal(signal.SIGKILL); child.wait()
    assert child.returncode == -signal.SIGKILL and (tmp_path/'torn'/'checkpoint.pt').exists() and not (tmp_path/'torn'/'run.json').exists()
    seen = []
    rest = fit(TOY, 'arcface', **QUICK, dropout=0.3, out=tmp_path/'torn', checkpoint_every=2, log=('csv', lambda row: seen.append(row['epoch'])))
    assert seen in ([4, 5], [2, 3, 4, 5])   # it did continue
    assert same(weights(whole), weights(rest)) and rows(whole).equals(rows(rest))
    assert not (tmp_path/'torn'/'checkpoint.pt').exists() and len(pd.read_csv(tmp_path/'torn'/'history.csv')) == 6

class Stop(Exception): pass
def stop_at(epoch):
    def listen(row):
        if row['epoch'] == epoch: raise Stop
    return listen

def torn(out, features=TOY, **kw):
    with pytest.raises(Stop): fit(features, **{**QUICK, **kw}, out=out, checkpoint_every=1, log=(stop_at(3),))

@pytest.mark.parametrize('stop', [1, 4])
def test_resume_at_any_epoch(tmp_path, stop):
    whole = fit(TOY, **QUICK)
    with pytest.raises(Stop): fit(TOY, **QUICK, out=tmp_path, checkpoint_every=1, log=(stop_at(stop),))
    assert same(weights(whole), weights(fit(TOY, **QUICK, out=tmp_path)))

def test_finished_run_is_reused_and_loads(tmp_path):
    run = fit(TOY, **QUICK, out=tmp_path)
    stamp = (tmp_path/'model'/'model.safetensors').stat().st_mtime_ns
    again = fit(TOY, **QUICK, out=tmp_path)
    assert same(weights(run), weights(again)) and (tmp_path/'model'/'model.safetensors').stat().st_mtime_ns == stamp
    assert same(weights(run), weights(load_run(tmp_path, TAX))) and load_run(tmp_path, TAX).best_epoch == run.best_epoch
    fit(TOY, **QUICK, out=tmp_path, resume=False)
    assert (tmp_path/'model'/'model.safetensors').stat().st_mtime_ns > stamp

def test_checkpoint_of_another_taxonomy_is_refused(tmp_path):
    torn(tmp_path/'a'); fit(TOY, **QUICK, out=tmp_path/'b')
    other = toy_features(Taxonomy.from_paths(LINEAGES | {'new': 'C'}), per_leaf=40)
    for name, file in (('a', 'checkpoint.pt'), ('b', 'b')):
        with pytest.raises(HiermetricError, match=f'{file} belongs to other taxonomy \\({TAX.fingerprint}, now {other.taxonomy.fingerprint}\\)'): fit(other, **QUICK, out=tmp_path/name)
    with pytest.raises(HiermetricError, match=f'belongs to the taxonomy {TAX.fingerprint}'): load_run(tmp_path/'b', other.taxonomy)

def test_other_settings_or_features_are_refused_by_name(tmp_path):
    torn(tmp_path/'a'); fit(TOY, **QUICK, out=tmp_path/'b')
    for name in 'ab':
        with pytest.raises(HiermetricError, match='other settings: lr 0.01, now 0.001; seed 0, now 7'): fit(TOY, **{**QUICK, 'lr': 1e-3}, seed=7, out=tmp_path/name)
        with pytest.raises(HiermetricError, match='belongs to other features'): fit(toy_features(TAX, per_leaf=40, seed=1), **QUICK, out=tmp_path/name)

def test_torn_or_hostile_checkpoint(tmp_path):
    torn(tmp_path)
    whole = (tmp_path/'checkpoint.pt').read_bytes()
    (tmp_path/'checkpoint.pt').write_bytes(whole[:len(whole)//2])
    with pytest.raises(HiermetricError, match='not a readable checkpoint'): fit(TOY, **QUICK, out=tmp_path)
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
    torch.save(Evil(), tmp_path/'checkpoint.pt')
    with pytest.raises(HiermetricError, match='not a readable checkpoint'): fit(TOY, **QUICK, out=tmp_path)
    assert not (tmp_path/'owned').exists()

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
    probs, labels = predict(mixed.model, x), np.where(np.arange(len(t)) % 2, t.numpy(), np.asarray(TAX.parents)[t.numpy()])
    judged = replace(TOY, targets=coarse)
    x, t = judged.of('val'); p = predict(mixed.model, x)
    right = [TAX.is_ancestor(int(label), int(TAX.leaves[int(row[TAX.leaves.copy()].argmax())])) for row, label in zip(p, t)]
    assert mixed.best['val_top1'] == pytest.approx(np.mean(right))
    assert mixed.best['val_nll'] == pytest.approx(float(np.mean([-np.log(float(row[label])) for row, label in zip(p, t)])), rel=1e-4)

def test_bad_features_are_refused_by_name():
    def spoiled(row, value):   # as a file of features may be; in memory `Features` refuses it at once
        f = replace(TOY); f.x = np.asarray(TOY.x).copy(); f.x[row, 2] = value
        return f
    with pytest.raises(HiermetricError, match="1 of the 432 feature vectors of 'train' hold NaN or infinity, the first is that of: Row 7"): fit(spoiled(7, np.nan), **QUICK)
    with pytest.raises(HiermetricError, match="of 'val' hold NaN or infinity, the first is that of: Row 3"): fit(spoiled(3, np.inf), **QUICK)
    t = np.asarray(TOY.targets).copy(); t[0] = -1
    with pytest.raises(HiermetricError, match='Row 0 has the label -1, which is outside the tree of 27 nodes'): fit(replace(TOY, targets=t), **QUICK)
    with pytest.raises(HiermetricError, match="no features in the split 'val'"): fit(replace(TOY, split=np.where(TOY.split == 'val', 'train', TOY.split)), **QUICK)

def test_bad_settings_are_refused_by_name():
    for kw, text in ((dict(head='arcfase'), "Did you mean 'arcface'"), (dict(monitor='auc'), "no monitor 'auc'"), (dict(device='tpu'), "no device 'tpu'"), (dict(precision='fp4'), "no precision 'fp4'"),
                     (dict(log=('cvs',)), "Did you mean 'csv'"), (dict(embedding='linaer'), "Did you mean 'linear'"), (dict(head_kw=dict(margin=1)), "has no setting 'margin'"), (dict(epochs=0), 'epochs')):
        with pytest.raises(HiermetricError, match=text): fit(TOY, **{**QUICK, **kw})

def test_diverged_run_says_so():
    with pytest.raises(HiermetricError, match='lower the learning rate|NaN or infinity'): fit(TOY, **{**QUICK, 'lr': 1e30})

def test_bfloat16_learns_and_devices_can_change_within_a_process():
    low = fit(TOY, **QUICK, device='cpu', precision='bf16')
    assert low.settings['precision'] == 'bf16' and low.best['val_top1'] > 0.5
    assert fit(TOY, **QUICK, device='cpu', precision='no').settings['precision'] == 'no'
    assert make_accelerator('cpu').device.type == 'cpu'

def test_csv_is_written_as_it_goes_and_wandb_is_left_alone(tmp_path):
    code = f"import sys\nfrom tests.test_training import *\nfit(TOY, **QUICK, out={str(tmp_path)!r}); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    history = pd.read_csv(tmp_path/'history.csv')
    assert list(history.epoch) == list(range(6)) and {'loss', 'val_nll', 'val_top1', 'lr'} <= set(history)
    assert json.loads((tmp_path/'run.json').read_text())['settings']['lr'] == 1e-2

def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    fit(TOY, **{**QUICK, 'epochs': 2}, out=tmp_path, log=('csv', 'wandb'))
    assert list((tmp_path/'wandb').glob('offline-run-*/*.wandb'))

def test_own_logger_and_names(tmp_path):
    seen = []
    fit(TOY, **{**QUICK, 'epochs': 2}, log=(seen.append,))
    assert [r['epoch'] for r in seen] == [0, 1] and 'csv' in loggers and 'wandb' in loggers

@pytest.mark.parametrize('total,warmup', [(1, 0), (10, 0), (100, 10), (7, 7)])
def test_schedule(total, warmup):
    f = [warmup_cosine(t, total, warmup) for t in range(total)]
    assert all(0 < o <= 1 for o in f) and max(f) == pytest.approx(1)
    assert all(a <= b for a, b in zip(f[:warmup], f[1:warmup])) and all(a >= b for a, b in zip(f[warmup:], f[warmup+1:]))

def test_weight_decay_spares_biases():
    net = Model(EmbeddingNet(64, 8), create_head('classifier', 8, TAX))
    assert {p.ndim: g['weight_decay'] for g in create_optimizer('adamw', parameter_groups(net, 0.3), 1e-3).param_groups for p in g['params']} == {2: 0.3, 1: 0.}

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_same_seed_same_weights():
    a, b = (fit(TOY, 'arcface', **QUICK, device='cuda') for _ in range(2))
    assert same(weights(a), weights(b)) and a.settings['precision'] == 'bf16'
