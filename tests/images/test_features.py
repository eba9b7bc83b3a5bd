"Features: killed runs resume to the same bytes, other batches and processors agree, nothing stale is used."

import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest, torch
from hiermetric.images.backbones import create_backbone
from hiermetric.core import HiermetricError
from hiermetric.images.features import Features, extract
from hiermetric.images.engines import choose_engine
from toys import toy_backbone, toy_table

ONE = {**os.environ, 'OMP_NUM_THREADS': '1'}


KW = dict(engine='eager', batch_size=4, block=8, progress=False)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def backbone():
    return toy_backbone()


def assert_rounding(got, want):
    """What is promised of features computed twice: one step of float16, or near zero a hundred-thousandth of the row's
    largest number; another image's differ by hundreds of steps"""
    got, want = (np.asarray(o, np.float16) for o in (got, want))
    assert got.shape == want.shape
    a, b, step = (o.astype(np.float64) for o in (got, want, np.spacing(np.maximum(np.abs(got), np.abs(want)))))
    assert (np.abs(a - b) <= step + 1e-5 * np.abs(b).max(1, keepdims=True)).all()


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 96)
    whole = extract(table, backbone, cache=tmp_path / 'whole', **KW)
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import hiermetric.images.engines as he, hiermetric.images.features as hf
from toys import toy_backbone, toy_table
slow = he.decode_picture
def decode(*a): time.sleep(.05); return slow(*a)
he.decode_picture = decode
table, cache = toy_table({str(tmp_path / 'img')!r}, 96), {str(tmp_path / 'cut')!r}
hf.extract(table, toy_backbone(), cache=cache, engine='eager', batch_size=4, block=8, progress=False, workers=1)
"""
    child = subprocess.Popen([sys.executable, '-c', code], env=ONE)
    deadline = time.time() + 100
    while not list((tmp_path / 'cut').glob('*/progress.json')) and time.time() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    record = json.loads(next((tmp_path / 'cut').glob('*/progress.json')).read_text())
    assert 0 < record['done'] < 96
    again = extract(table, backbone, cache=tmp_path / 'cut', **KW)
    assert Path(again.meta['folder'], 'x.npy').read_bytes() == Path(whole.meta['folder'], 'x.npy').read_bytes()
    assert again.fingerprint == whole.fingerprint


def test_two_processes_at_once_do_not_disturb_each_other(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 48)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from hiermetric.images.features import extract
from toys import toy_backbone, toy_table
table, cache = toy_table({str(tmp_path / 'other')!r}, 48), {str(tmp_path / 'cache')!r}
f = extract(table, toy_backbone(), cache=cache, engine='eager', batch_size=4, block=8, progress=False)
print(f.fingerprint)
"""
    two = [
        subprocess.Popen(
            [sys.executable, '-c', code.replace('/other', f'/other{i}')], stdout=subprocess.PIPE, text=True, env=ONE
        )
        for i in range(2)
    ]
    prints = {p.communicate()[0].strip() for p in two}
    assert [p.returncode for p in two] == [0, 0] and prints == {
        extract(table, backbone, cache=tmp_path / 'cache', **KW).fingerprint
    }
    assert len(list((tmp_path / 'cache').glob('*/x.npy'))) == 1


def test_a_changed_setting_never_finds_old_features(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 8)
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    keys = {first.meta['key']}
    for other in (
        dict(backbone=toy_backbone(48)),
        dict(backbone=create_backbone('timm:resnet10t', pretrained=False, size=32, fit='stretch')),
        dict(KW, engine='folded'),
    ):
        keys.add(extract(table, **({'backbone': backbone, 'cache': tmp_path / 'c'} | KW | other)).meta['key'])
    renamed = toy_table(tmp_path / 'img', 8, name='other')
    keys.add(extract(renamed, backbone, cache=tmp_path / 'c', **KW).meta['key'])
    Path(table.samples.path[0]).write_bytes(
        Path(table.samples.path[0]).read_bytes() + b'\0'
    )  # a changed file has another size
    keys.add(extract(table, backbone, cache=tmp_path / 'c', **KW).meta['key'])
    assert len(keys) == 6


def test_a_second_call_computes_nothing(tmp_path, backbone, monkeypatch):
    table = toy_table(tmp_path / 'img', 8)
    first = extract(table, backbone, cache=tmp_path / 'c', **KW)
    monkeypatch.setattr('hiermetric.images.features._fill', lambda *a, **k: pytest.fail('computed again'))
    assert extract(table, backbone, cache=tmp_path / 'c', **KW).fingerprint == first.fingerprint


def test_unreadable_images_are_all_named_and_skipped_only_on_demand(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 12)
    good = {i: Path(table.samples.path[i]).read_bytes() for i in (2, 7)}
    Path(table.samples.path[2]).write_bytes(b'')
    Path(table.samples.path[7]).write_bytes(good[7][:60])
    with pytest.raises(HiermetricError) as e:
        extract(table, backbone, cache=tmp_path / 'c', **KW)
    message = str(e.value)
    assert (
        "2 of the 12 images of 'toy' cannot be read" in message
        and '0002.png: the file is empty' in message
        and '0007.png' in message
        and '--skip-bad' in message
    )
    assert len(next((tmp_path / 'c').glob('*.unreadable.txt')).read_text().splitlines()) == 2
    f = extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW)
    assert (
        len(f) == 10
        and len(f.meta['skipped']) == 2
        and not {table.samples.path[2], table.samples.path[7]} & set(f.paths)
    )
    clean = toy_table(tmp_path / 'img2', 12)
    want = extract(clean, backbone, cache=tmp_path / 'c2', **KW)
    np.testing.assert_array_equal(f.x, np.delete(np.asarray(want.x), [2, 7], 0))
    np.testing.assert_array_equal(f.targets, np.delete(want.targets, [2, 7]))


def test_a_missing_file_is_named(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 8)
    Path(table.samples.path[3]).unlink()
    with pytest.raises(HiermetricError, match='0003.png'):
        extract(table, backbone, cache=tmp_path / 'c', **KW)


def test_features_that_are_not_finite_are_refused_with_the_image_named(tmp_path):
    b = toy_backbone()
    list(b.model.parameters())[0].data.fill_(float('nan'))
    with pytest.raises(HiermetricError, match=r"makes NaN or infinite features of .*0000\.png"):
        extract(toy_table(tmp_path / 'img', 8), b, cache=tmp_path / 'c', **KW)


def test_save_and_load(tmp_path, backbone):
    f = extract(toy_table(tmp_path / 'img', 8), backbone, cache=tmp_path / 'c', **KW)
    g = Features.load(f.save(tmp_path / 'kept'))
    assert (
        g.fingerprint == f.fingerprint
        and g.taxonomy == f.taxonomy
        and g.meta == f.meta
        and list(g.paths) == list(f.paths)
    )
    for split in ('train', 'val', 'test'):
        (x, t), (u, v) = f.of(split), g.of(split)
        assert torch.equal(x, u) and torch.equal(t, v) and x.dtype == torch.float32
    with pytest.raises(HiermetricError, match='There is no set of features in .*it has no x.npy'):
        Features.load(tmp_path / 'nowhere')


def test_errors_name_culprit_and_remedy(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 8)
    with pytest.raises(HiermetricError, match="Did you mean 'openvino'"):
        choose_engine('openvinno')
    with pytest.raises(HiermetricError, match='made for 32 px, not 64'):
        extract(table, backbone, size=64, cache=tmp_path, **KW)
    table.samples = table.samples.iloc[:0]
    with pytest.raises(HiermetricError, match="'toy' has no images"):
        extract(table, backbone, cache=tmp_path, **KW)
    with pytest.raises(HiermetricError, match='There is no engine'):
        extract(toy_table(tmp_path / 'img', 8), backbone, cache=tmp_path, engine='fast', progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_cuda_without_a_gpu_says_so(tmp_path, backbone):
    with pytest.raises(HiermetricError, match="needs an NVIDIA GPU.*engine='auto'"):
        extract(toy_table(tmp_path / 'img', 8), backbone, cache=tmp_path, engine='cuda', progress=False)


def test_plain_arrays_are_checked():
    from hiermetric.trees.taxonomy import Taxonomy

    tax, x = Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}), np.eye(3, dtype=np.float16)
    good = Features(x, [2, 3, 1], ['train', 'val', 'test'], tax)
    assert [len(good.of(s)[0]) for s in ('train', 'val', 'test', 'unseen')] == [1, 1, 1, 0]
    for bad in (np.nan, np.inf):
        y = x.copy()
        y[1, 2] = bad
        with pytest.raises(HiermetricError, match=r'Row 1 has NaN or infinite features \(1 of 3 rows have\)'):
            Features(y, [2, 3, 1], ['train'] * 3, tax)
    for kw, says in [
        (dict(x=x[0]), r'are \(images, features\), not \(3,\)'),
        (dict(targets=[0, 1]), '3 rows of features and 2 targets'),
        (dict(split=['train']), '3 rows of features and 1 split'),
        (dict(paths=['a']), '3 rows of features and 1 paths'),
        (dict(targets=[0, 1, 4]), r'Row 2 has the label 4, which is outside the tree of 4 nodes \(0 to 3\)'),
        (dict(targets=[-1, 0, 0]), 'Row 0 has the label -1'),
        (dict(split=['train', 'tset', 'val']), "no split 'tset'.*Did you mean 'test'"),
    ]:
        with pytest.raises(HiermetricError, match=says):
            Features(**({'x': x, 'targets': [2, 3, 1], 'split': ['train'] * 3, 'taxonomy': tax} | kw))
    with pytest.raises(HiermetricError, match="no split 'valid'.*Did you mean 'val'"):
        good.of('valid')


def test_files_of_another_tree_are_refused(tmp_path):
    from hiermetric.trees.taxonomy import Taxonomy

    tax = Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'})
    folder = Features(np.eye(3), [2, 3, 1], ['train'] * 3, tax).save(tmp_path / 'f')
    Taxonomy.from_paths({'a': '', 'b': ''}).save(folder / 'taxonomy.npz')
    with pytest.raises(HiermetricError, match='taxonomy.npz is not what was saved'):
        Features.load(folder)
    (folder / 'SHA256SUMS').unlink()  # as a folder of before
    with pytest.raises(HiermetricError, match='outside the tree of 3 nodes'):
        Features.load(folder)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path, backbone):
    table = toy_table(tmp_path / 'img', 4)
    for p in table.samples.path:
        Path(p).write_text('no picture')
    with pytest.raises(HiermetricError, match='4 of the 4 images'):
        extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW)


def test_a_second_call_with_skipped_files_builds_no_network(tmp_path, backbone, monkeypatch):
    table = toy_table(tmp_path / 'img', 8)
    Path(table.samples.path[1]).write_bytes(b'')
    first = extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW)
    monkeypatch.setattr('hiermetric.images.engines._eager', lambda b: pytest.fail('a network was built'))
    assert extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW).fingerprint == first.fingerprint


def test_a_file_that_can_be_read_again_is_taken_up(tmp_path, backbone):
    "Same name, same size, so the same key: a disk that came back"
    table = toy_table(tmp_path / 'img', 12)
    p = Path(table.samples.path[5])
    good = p.read_bytes()
    want = extract(table, backbone, cache=tmp_path / 'whole', **KW)
    p.write_bytes(b'\0' * len(good))
    assert len(extract(table, backbone, cache=tmp_path / 'c', skip_bad=True, **KW)) == 11
    p.write_bytes(good)
    f = extract(table, backbone, cache=tmp_path / 'c', **KW)
    assert f.meta['key'] == want.meta['key'] and f.meta['skipped'] == [] and list(f.paths) == list(want.paths)
    np.testing.assert_array_equal(
        np.delete(f.x, 5, 0), np.delete(want.x, 5, 0)
    )  # computed in batches of the same shape
    assert_rounding(f.x, want.x)  # the sixth in a batch of its own
    np.testing.assert_array_equal(f.targets, want.targets)


@pytest.mark.parametrize('engine', ['eager', 'folded'])
def test_the_same_batches_give_the_same_bits_and_others_the_same_numbers(engine, tmp_path, backbone):
    table, kw = toy_table(tmp_path / 'img', 16), dict(engine=engine, block=8, progress=False)
    want, again, *others = (
        extract(table, backbone, cache=tmp_path / f'{i}', batch_size=n, workers=w, **kw)
        for i, (n, w) in enumerate([(4, 2), (4, 1), (1, 2), (3, 2), (8, 2)])
    )
    assert (
        np.asarray(again.x).tobytes() == np.asarray(want.x).tobytes() and again.fingerprint == want.fingerprint
    )  # threads that decode change nothing
    for f in others:
        assert_rounding(f.x, want.x)
    for wrong in (np.roll(want.x, 1, 0), want.x[::-1], np.roll(want.x, 1, 1), want.x * np.float16(1.01)):
        with pytest.raises(AssertionError):
            assert_rounding(wrong, want.x)  # the comparison can fail


@pytest.mark.parametrize(
    'env',
    [
        dict(ONEDNN_MAX_CPU_ISA='SSE41', ATEN_CPU_CAPABILITY='default', MKL_ENABLE_INSTRUCTIONS='SSE4_2'),
        dict(
            ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2', MKL_ENABLE_INSTRUCTIONS='AVX2', OMP_NUM_THREADS='2'
        ),
    ],
    ids=['SSE', 'AVX2'],
)
def test_narrower_vectors_and_more_threads_give_the_same_numbers(env, tmp_path, backbone):
    """Another processor, as far as one can be had here; the network's own weights go along, since random ones are drawn
    to rounding only"""
    table = toy_table(tmp_path / 'img', 8)
    torch.save(backbone.model.state_dict(), tmp_path / 'w.pt')
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch
from hiermetric.images.features import extract
from toys import toy_backbone, toy_table
b = toy_backbone(); b.model.load_state_dict(torch.load({str(tmp_path / 'w.pt')!r}))
table, cache = toy_table({str(tmp_path / 'img')!r}, 8), {str(tmp_path / 'there')!r}
print(extract(table, b, cache=cache, engine='eager', batch_size=4, block=8, progress=False).meta['key'])
"""
    key = subprocess.run(
        [sys.executable, '-c', code], env=ONE | env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    want = extract(table, backbone, cache=tmp_path / 'here', **KW)
    assert want.meta['key'] == key  # the key depends on no number that is computed
    assert_rounding(np.load(next((tmp_path / 'there').glob('*/x.npy'))), want.x)


def test_a_network_trained_further_is_another_one(tmp_path):
    table, b = toy_table(tmp_path / 'img', 4), toy_backbone()
    first = extract(table, b, cache=tmp_path / 'c', **KW)
    with torch.no_grad():
        next(b.model.parameters()).add_(0.1)
    assert extract(table, b, cache=tmp_path / 'c', **KW).meta['key'] != first.meta['key']


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda p: type('U', (), {'free': 100}))
    with pytest.raises(HiermetricError, match='make room, or name another folder'):
        extract(toy_table(tmp_path / 'img', 4), backbone, cache=tmp_path / 'c', **KW)


def test_progress_is_quiet_where_there_is_no_terminal(tmp_path, backbone, capfd):
    extract(toy_table(tmp_path / 'img', 4), backbone, cache=tmp_path / 'c', **(KW | {'progress': True}))
    assert capfd.readouterr().out.strip() == ''
