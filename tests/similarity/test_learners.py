"Divide and conquer, BIER and SNDL against slow loops (hiermetric.similarity.learners)"

import itertools
import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from several_embeddings import SMALL, T, TAX, X, batch, made, settled, slow_epshn, slow_parts
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import create_head
from hiermetric.running.fitting import fit
from hiermetric.running.inference import predict
from hiermetric.similarity.label_sets import label_probs, label_report
from hiermetric.similarity.learners import match_clusters

pytestmark = pytest.mark.usefixtures('one_thread')


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_matched_clusters_keep_the_most(k, n, seed):
    rng = np.random.default_rng(seed)
    before, now = (torch.from_numpy(rng.integers(k, size=n)) for _ in range(2))
    out = match_clusters(before, now, k)
    best = max(sum(p[b] == a for a, b in zip(before.tolist(), now.tolist())) for p in itertools.permutations(range(k)))
    assert int((out == before).sum()) == best
    assert len(set(zip(out.tolist(), now.tolist()))) == len(now.unique())  # only the numbers have changed


def test_divide_and_conquer_is_the_loop():
    head, (x, t) = settled('divide_conquer', conquer=3.0), batch(36)
    head.rows = torch.arange(40, 76)
    parts, whose = slow_parts(head, x), head.cluster[head.rows].tolist()
    want = 0.0
    for k in range(3):
        mine = [i for i in range(36) if whose[i] == k]
        want += slow_epshn([parts[k][i] for i in mine], [int(t[i]) for i in mine]) / 3
    assert len(set(whose)) == 3 and want > 0 and abs(float(head.loss(x, t)) - want) < 1e-4
    head.epoch = 3.0
    whole = list(head.represent(x))
    assert abs(float(head.loss(x, t)) - slow_epshn(whole, t.tolist())) < 1e-4


def test_bier_is_the_loop():
    head, (x, t) = settled('bier', decorrelate=0.0), batch()
    parts, n = slow_parts(head, x), len(t)
    total, s = 0.0, {}
    good, bad = ([(i, j) for i in range(n) for j in range(n) if i != j and (t[i] == t[j]) == o] for o in (True, False))
    for k, part in enumerate(parts):
        for which in (good, bad):
            for i, j in which:
                y = 1.0 if which is good else -25.0
                w = 1 / (1 + math.exp(2 * y * (s[i, j] - 0.5))) if k else 1.0
                total += w * math.log1p(math.exp(-2 * y * (float(part[i] @ part[j]) - 0.5))) / len(which) / 3
        for i in range(n):
            for j in range(n):
                s[i, j] = (1 - 2 / (k + 2)) * s.get((i, j), 0.0) + 2 / (k + 2) * float(part[i] @ part[j])
    assert abs(float(head.loss(x, t)) - total) < 1e-3


@pytest.mark.parametrize('paths', [False, True])
def test_sndl_is_the_loop(paths):
    head, rows = settled('sndl', paths=paths, memory=0.0), torch.arange(30)
    head.rows = rows
    x, t = X[rows], T[rows]
    part = slow_parts(head, x)[0]
    z = 16 * (torch.stack(part) @ head.classes.weight.T + head.classes.bias)
    y = TAX.multi_hot(t)[:, 1:].float() if paths else None
    near, classes = [], []
    for i in range(30):
        w = [
            float((y[i] * y[k]).sum() / ((y[i] + y[k]) > 0).sum()) if paths else float(t[i] == t[k]) for k in range(30)
        ]
        soft = [math.exp((float(part[i] @ part[k]) - 1) / 0.05) for k in range(30)]
        if any(w[k] for k in range(30) if k != i):
            near.append(
                -math.log(sum(w[k] * soft[k] for k in range(30) if k != i) / sum(soft[k] for k in range(30) if k != i))
            )
        if paths:
            classes.append(float(-(y[i] * F.logsigmoid(z[i]) + (1 - y[i]) * F.logsigmoid(-z[i])).mean()))
        else:
            classes.append(float(-z[i, TAX.leaves - 1].log_softmax(0)[TAX.leaf_column[t[i]]]))
    assert abs(float(head.loss(x, t)) - np.mean(near) - np.mean(classes)) < 2e-3


def test_clusters_are_made_anew_and_keep_their_numbers():
    head = made('divide_conquer', every=2)
    first = head.cluster.clone()
    assert set(first.tolist()) == {0, 1, 2} and first.shape == T.shape
    head.refresh(X, T)
    assert torch.equal(head.cluster, first)  # only every second epoch
    with torch.no_grad():
        head.project.layers[1].weight.add_(0.05 * torch.randn_like(head.project.layers[1].weight))
    head.refresh(X, T)
    kept = (head.cluster == first).float().mean()
    assert kept < 1 and kept == max(
        (torch.tensor(p)[head.cluster] == first).float().mean() for p in itertools.permutations(range(3))
    )
    # a learner learns from its own images alone
    x, t = X[:60], T[:60]
    head.rows = torch.arange(60)
    head.train()
    head.loss(x, t).backward()
    whose = head.cluster[:60]
    x = x.clone().requires_grad_()
    head.zero_grad()
    parts = head.split(x)
    from hiermetric.similarity.multitask import mined_loss

    mined_loss(head.criteria[1], head.find, parts[1][whose == 1], t[whose == 1]).backward()
    assert (x.grad[whose != 1] == 0).all() and x.grad[whose == 1].abs().sum() > 0
    head.conclude(X, T)
    assert not len(head.cluster)


def test_learners_share_everything_where_nothing_is_clustered():
    torch.manual_seed(0)
    head = create_head('divide_conquer', X.shape[1], TAX, **SMALL['divide_conquer'], dropout=0.0)
    x, t = batch()
    a = head.loss(x, t)
    head.rows = torch.arange(len(x))
    assert torch.equal(a, head.loss(x, t))
    with pytest.raises(HiermetricError, match='not 3'):
        head.refresh(X[:2], T[:2])


def test_sndl_with_sets_is_the_loop(scene):
    labelled, sets, _ = scene
    x, t = (o[:30] for o in labelled.of('train'))
    torch.manual_seed(0)
    head = create_head('sndl', 16, labelled.taxonomy, dim=8, dropout=0.0, memory=0.0, sets=sets)
    head.prepare(*labelled.of('train'))
    head.rows = torch.arange(30)
    part = slow_parts(head, x)[0]
    z = 16 * (torch.stack(part) @ head.classes.weight.T + head.classes.bias)
    y = [set(np.flatnonzero(sets.iloc[v])) for v in t.tolist()]
    near, classes = [], []
    for i in range(30):
        w = [len(y[i] & y[k]) / max(len(y[i] | y[k]), 1) for k in range(30)]
        soft = [math.exp((float(part[i] @ part[k]) - 1) / 0.05) for k in range(30)]
        if any(w[k] for k in range(30) if k != i):
            near.append(
                -math.log(sum(w[k] * soft[k] for k in range(30) if k != i) / sum(soft[k] for k in range(30) if k != i))
            )
        classes.append(-np.mean([float(F.logsigmoid(z[i, j] if j in y[i] else -z[i, j])) for j in range(3)]))
    assert (
        len(near) < 30 and abs(float(head.loss(x, t)) - np.mean(near) - np.mean(classes)) < 2e-3
    )  # images without labels have no neighbours


def test_a_table_of_labels_through_fit(scene):
    labelled, sets, _ = scene
    kw = dict(sampler='m_per_class', epochs=4, batch_size=64, device='cpu')
    run = fit(labelled, 'sndl', head_kw=dict(sets=sets, dim=16), **kw)
    assert run.model.head.classes.out_features == 3
    report = label_report(
        label_probs(predict(run.model, labelled, 'test'), sets, labelled.taxonomy),
        sets.iloc[labelled.of('test')[1].numpy()],
    )
    assert (report['average precision'] > report['share'] + 0.2).all()
    with pytest.raises(HiermetricError, match="pair_loss='tree_supcon'"):
        fit(labelled, 'diva', head_kw=dict(sets=sets))
