"The index killed, mapped, taken from; faiss beside torch; answers at every rank (hiermetric.similarity.index)"

import os
import subprocess
import sys
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from galleries import data, random_tree, slowly
from hiermetric.core import HiermetricError
from hiermetric.trees.geometry import DISTANCES
from hiermetric.judging.mistakes import rank_accuracy
from hiermetric.similarity import index as index_module
from hiermetric.similarity.index import Index
from hiermetric.similarity.scores import evaluate_retrieval
from hiermetric.similarity.search import VOTES, neighbours
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('first', ['faiss', 'torch'])
def test_faiss_and_torch_share_a_process(first):
    "Both bring their own OpenMP; in both orders of import, with two threads, training and searching take turns"
    code = f"""
import {first}, faiss, torch, numpy as np
from hiermetric.similarity import Index, kmeans
from hiermetric.trees import Taxonomy
torch.set_num_threads(2); faiss.omp_set_num_threads(2)
tax = Taxonomy.from_paths({{'a': 'x', 'b': 'x', 'c': ''}})
x = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
t = tax.leaves[np.arange(3000) % 3]
for kind in ('hnsw', 'ivfpq', 'exact'):
    net = torch.nn.Linear(32, 32); net(x).square().sum().backward()
    assert (Index(x, t, tax, kind=kind).search(x[:200], 5).rows >= 0).all()
kmeans(x, 5); net(x).sum().backward(); print('fine')"""
    run = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {'OMP_NUM_THREADS': '2'},
    )
    assert run.stdout.strip() == 'fine', run.stderr


def test_import_leaves_faiss_alone():
    code = "import sys, hiermetric.similarity.index; print('faiss' in sys.modules)"
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
        == 'False'
    )


@pytest.mark.parametrize('metric', DISTANCES)
@pytest.mark.parametrize('kind', ['exact', 'hnsw', 'ivfpq'])
def test_kinds_find_what_is_there(kind, metric, tmp_path):
    "What the exact search finds is found; what was removed is not, before and after a save; what was added is"
    x, t, tax, r = data(5, n=1500, dim=32, noise=0.7)
    q, k = x[::30] + 0.05 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1)), 10
    index, truth = Index(x, t, tax, metric, kind), neighbours(q, x, k, metric)
    found = (index.search(q, k).rows[:, :, None] == truth.rows[:, None]).any(2).float().mean()
    assert found == 1 if kind == 'exact' else found > {'hnsw': 0.97, 'ivfpq': 0.3}[kind]
    gone = r.permutation(1500)[:700]
    assert index.remove(rows=gone) == 700 and len(index) == 800
    for o in (index, Index.load(index.save(tmp_path / kind)), Index.load(tmp_path / kind, mapped=False)):
        near = o.search(q, k)
        assert not np.isin(near.rows, gone).any() and (near.rows >= 0).all()
        if kind == 'exact':
            left = np.setdiff1d(np.arange(1500), gone)
            assert (near.rows.numpy() == left[neighbours(q, x[left], k, metric).rows]).all()
    o.add(q[:3], t[:3], ids=['a', 'b', 'c'])
    assert o.ids[o.search(q[:3], 1).rows[:, 0]].tolist() == ['a', 'b', 'c'] or kind == 'ivfpq'
    assert len(o) == 803 and o.remove(nodes=[0]) == 803
    with pytest.raises(HiermetricError, match='empty'):
        o.search(q)
    assert len(o.add(x[:5], t[:5])) == 5 and o.search(q, 10).rows.shape == (50, 5)


def test_what_is_removed_is_what_was_named():
    x, t, tax, _ = data()
    n = len(t)
    mask = np.zeros(n, bool)
    mask[[3, 7]] = True
    for rows in (mask, mask.tolist(), torch.from_numpy(mask), [3, 7], torch.tensor([3, 7])):
        i = Index(x, t, tax)
        assert i.remove(rows=rows) == 2 and not i.alive[[3, 7]].any() and len(i) == n - 2
    i = Index(x, t, tax)
    assert i.remove(rows=[]) == i.remove(nodes=[]) == 0
    for kw, says in (
        (dict(rows=[-1]), 'There is no row -1; the index has the rows 0'),
        (dict(rows=[0, n]), f'There is no row {n};'),
        (dict(rows=[1.7]), 'Rows are whole numbers'),
        (dict(rows=[True, False]), f'one value for each of the {n} rows'),
        (dict(nodes=[-1]), 'There is no node -1'),
        (dict(nodes=[1.7]), 'integers'),
        (dict(nodes=[len(tax)]), f'There is no node {len(tax)}'),
    ):
        with pytest.raises(HiermetricError, match=says):
            i.remove(**kw)
    assert len(i) == n


def test_automatic_kind():
    assert [index_module._kind(n) for n in (1, 100_000, 100_001, 2_000_000, 2_000_001)] == [
        'exact',
        'exact',
        'hnsw',
        'hnsw',
        'ivfpq',
    ]


def test_nothing_is_pickled_and_a_killed_save_leaves_the_old_index(tmp_path, monkeypatch):
    x, t, tax, _ = data()
    a = Index(x, t, tax)
    a.save(tmp_path / 'i')
    for p in (tmp_path / 'i').glob('*.npy'):
        np.load(p, allow_pickle=False)
    a.remove(rows=[0])
    monkeypatch.setattr(Taxonomy, 'save', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError):
        a.save(tmp_path / 'i')
    assert len(Index.load(tmp_path / 'i')) == len(t) and [p.name for p in tmp_path.iterdir()] == ['i']


def test_a_mapped_index_is_not_written_to(tmp_path):
    x, t, tax, _ = data()
    Index(x, t, tax).save(tmp_path / 'i')
    before = (tmp_path / 'i' / 'vectors.npy').read_bytes()
    i = Index.load(tmp_path / 'i')
    i.remove(rows=range(100))
    i.search(x[:3])
    assert (tmp_path / 'i' / 'vectors.npy').read_bytes() == before
    for kind in ('exact', 'hnsw'):
        Index(x, t, tax, kind=kind).save(tmp_path / kind)
        with pytest.raises(HiermetricError, match='mapped=False'):
            Index.load(tmp_path / kind).add(x, t)  # faiss would end the process


@pytest.mark.parametrize('fault', ['short', 'nojson', 'faiss'])
def test_damage_is_named(tmp_path, fault):
    x, t, tax, _ = data()
    Index(x, t, tax, kind='hnsw').save(tmp_path / 'i')
    if fault == 'short':
        np.save(tmp_path / 'i' / 'targets.npy', t[:-1])
    if fault == 'nojson':
        (tmp_path / 'i' / 'index.json').write_text('{')
    if fault == 'faiss':
        (tmp_path / 'i' / 'vectors.faiss').write_bytes((tmp_path / 'i' / 'vectors.faiss').read_bytes()[:999])
    with pytest.raises(HiermetricError, match='is damaged'):
        Index.load(tmp_path / 'i')


@pytest.mark.parametrize('metric', DISTANCES)
@pytest.mark.parametrize('rule', list(VOTES))
def test_answers_at_every_rank_are_those_of_the_loop(metric, rule):
    x, t, tax, r = data(7)
    q = x[:25] + 0.5 * torch.randn(25, 12, generator=torch.Generator().manual_seed(2))
    index = Index(x, t, tax, metric)
    near = neighbours(q, x, 1 if rule == 'nearest' else 6, metric)
    for at in ('leaf', 1, 2):
        place = tax.at(at)
        said = index.classify(q, at, rule, k=6)
        for i in range(len(q)):
            if rule == 'mean':
                u = torch.nn.functional.normalize(x, dim=1) if metric == 'cosine' else x
                best = {}
                for node in set(place[t]) - {-1}:
                    m = u[place[t] == node].mean(0)
                    v = q[i]
                    best[node] = float(1 - v @ m / v.norm() / m.norm() if metric == 'cosine' else (v - m).norm())
                assert said[i] == min(best, key=best.get)
            else:
                votes = {}
                for j, d in zip(near.rows[i].tolist(), near.distances[i].tolist()):
                    if place[t[j]] >= 0:
                        votes.setdefault(place[t[j]], []).append(1 / (d + 1e-6) if rule == 'weighted' else 1)
                if not votes:
                    assert said[i] == 0
                    continue
                assert said[i] == max(votes, key=lambda o: sum(votes[o]))  # dictionaries keep the nearest first


@slowly
@given(st.integers(0, 10**6))
def test_rank_of_every_node_by_walking_up(seed):
    r = np.random.default_rng(seed)
    tax = random_tree(r)
    ranks = [f'r{d}' if r.random() < 0.8 else None for d in tax.depths]
    for at, wanted in (('leaf', tax.heights == 0), (1, tax.depths == 1), ('r1', np.array([o == 'r1' for o in ranks]))):
        if not np.any(wanted):
            continue
        place = (tax.with_ranks(ranks) if at == 'r1' else tax).at(at)
        for v in range(len(tax)):
            u = v
            while u >= 0 and not wanted[u]:
                u = tax.parents[u]
            assert place[v] == u


def test_ranks_by_name_are_those_of_the_tree():
    x, t, tax, r = data(5)
    named = tax.with_ranks([f'r{d}' if d else None for d in tax.depths])
    by_depth, by_name = (
        evaluate_retrieval(x, t, tax=tax, at=(1, 2)),
        evaluate_retrieval(x, t, tax=named, at=('r1', 'r2')),
    )
    np.testing.assert_array_equal(by_name, by_depth)
    a, b = Index(x, t, tax), Index(x, t, named)
    for rule in VOTES:
        np.testing.assert_array_equal(a.classify(x[:20], 1, rule), b.classify(x[:20], 'r1', rule))
    with pytest.raises(HiermetricError, match='needs `ranks`'):
        a.classify(x[:20], 'r1')


def test_classification_at_a_rank_agrees_with_rank_accuracy():
    x, t, tax, _ = data(13)
    index = Index(x[:160], t[:160], tax)
    said = index.classify(x[160:], 'leaf', 'nearest')
    table = rank_accuracy(said, t[160:], tax)
    for depth in table.index:
        c = tax.at(int(depth))[t[160:]]
        assert np.isclose((index.classify(x[160:], int(depth), 'nearest') == c)[c >= 0].mean(), table.accuracy[depth])
