"""Shared and specific embeddings: matched clusters, partial softmax, flags and the multi-task heads against slow loops;
resumption, degenerate batches, multi-hot labels, sets of labels as classes."""

import itertools, math, warnings
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from hiermetric.heads.aam import CombinedMargin
from hiermetric.geometry import unit
from hiermetric.core import HiermetricError
from hiermetric.decisions import Rule, create_rule
from hiermetric.images.table import ImageTable
from hiermetric.images.features import Features
from hiermetric.heads.model import Model
from hiermetric.heads.contract import create_head
from hiermetric.multitask import (
    PartialMargin,
    join_modalities,
    label_probs,
    label_report,
    match_clusters,
    powerset,
    pseudo_classes,
    rank_report,
    read_multi_hot,
    rows_of_files,
    with_label_sets,
)
from hiermetric.retrieval import kmeans
from hiermetric.taxonomy import Taxonomy
from hiermetric.training import embeddings, fit, predict
from hiermetric.images.features import toy_features
from hiermetric.unseen import known_ancestor

TAX = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xy' for s in '123'})
TOY = toy_features(TAX, per_leaf=30, noise=2.0)

pytestmark = pytest.mark.usefixtures('one_thread')


def random_tree(nodes, rng):
    return Taxonomy.from_parents({'n0': None} | {f'n{i}': f'n{rng.integers(i)}' for i in range(1, nodes)})


# clusters


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_matched_clusters_keep_the_most(k, n, seed):
    rng = np.random.default_rng(seed)
    before, now = (torch.from_numpy(rng.integers(k, size=n)) for _ in range(2))
    out = match_clusters(before, now, k)
    best = max(sum(p[b] == a for a, b in zip(before.tolist(), now.tolist())) for p in itertools.permutations(range(k)))
    assert int((out == before).sum()) == best
    assert len(set(zip(out.tolist(), now.tolist()))) == len(now.unique())  # only the numbers have changed


# partial softmax


def slow_partial(head, x, t, few):
    "The definition, image by image"
    out = []
    for e, y in zip(F.normalize(x, dim=1), t.tolist()):
        rows = range(TAX.leaf_start[y], TAX.leaf_stop[y])
        good, bad = 0.0, 0.0
        for j in few.tolist():
            theta = math.acos(float(e @ F.normalize(head.weight[j].detach(), dim=0)))
            if j in rows:
                good += math.exp(head.s * (math.cos(head.m1 * theta + head.m2) - head.m3))
            else:
                bad += math.exp(head.s * math.cos(theta))
        out.append(-math.log(good / (good + bad)))
    return out


@pytest.mark.parametrize('inner', [False, True])
def test_partial_softmax_is_the_loop(inner, monkeypatch):
    torch.manual_seed(0)
    head = PartialMargin(8, TAX, share=0.4, s=4.0, m1=1.0, m2=0.2, m3=0.1)
    x = torch.randn(5, 8)
    t = torch.as_tensor(TAX.leaves[[0, 0, 4, 7, 11]].copy()).long()
    if inner:
        t[1] = int(TAX.parents[t[1]])
    few = head.chosen(*head.labels(t))
    monkeypatch.setattr(head, 'chosen', lambda *_: few)
    assert torch.allclose(head.losses(x, t, *head.labels(t)), torch.tensor(slow_partial(head, x, t, few)), atol=1e-4)


def test_partial_softmax_leaves_the_others_alone(monkeypatch):
    torch.manual_seed(0)
    head = PartialMargin(8, TAX, share=0.5)
    t = torch.as_tensor(TAX.leaves[[0, 3]].copy()).long()
    few = head.chosen(*head.labels(t))
    monkeypatch.setattr(head, 'chosen', lambda *_: few)
    assert len(few) == 6 == len(few.unique()) and {0, 3} <= set(few.tolist())
    head.loss(torch.randn(2, 8), t).backward()
    touched = head.weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(few.tolist())


@pytest.mark.parametrize('bad', ['zero', 'copy', 'large', 'empty', 'bf16'])
def test_partial_softmax_is_finite(bad):
    torch.manual_seed(0)
    head = PartialMargin(8, TAX, share=0.3, s=64.0)
    t = torch.as_tensor(TAX.leaves[:4].copy()).long()
    x = {
        'zero': torch.zeros(4, 8),
        'copy': head.weight[:4].detach().clone(),
        'large': 1e4 * torch.randn(4, 8),
        'empty': torch.zeros(0, 8),
        'bf16': torch.randn(4, 8),
    }[bad].requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bad == 'bf16'):
        loss = head.loss(x, t[: len(x)])
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_all_classes_are_combined_margin():
    torch.manual_seed(0)
    a, b = PartialMargin(8, TAX, share=1.0), CombinedMargin(8, TAX)
    b.load_state_dict(a.state_dict())
    x, t = torch.randn(7, 8), torch.as_tensor(TAX.leaves[[0, 1, 2, 2, 5, 9, 11]].copy()).long()
    assert torch.equal(a.loss(x, t), b.loss(x, t))


def test_pseudo_classes_keep_everything_but_the_labels():
    made = pseudo_classes(TOY, 7, seed=3)
    assert made.taxonomy.n_leaves == 7 and (made.split == TOY.split).all() and made.x is TOY.x
    x = unit(torch.from_numpy(TOY.x.astype(np.float32)))
    own, centres = kmeans(x[torch.from_numpy(TOY.split == 'train')], 7, 'cosine', seed=3)
    assert (made.targets[TOY.split == 'train'] == made.taxonomy.leaves[own.numpy()]).all() and (
        made.targets == made.taxonomy.leaves[(x @ centres.T).argmax(1).numpy()]
    ).all()
    other = pseudo_classes(TOY, 7, emb=-TOY.x.astype(np.float32)[::-1].copy(), seed=3)
    assert not (other.targets == made.targets).all()
    with pytest.raises(HiermetricError, match='not 10000'):
        pseudo_classes(TOY, 10**4)


def test_texts_that_are_missing_change_nothing(tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    b[2] = math.nan
    np.savez(tmp_path / 't.npz', emb=b.numpy())
    out = join_modalities(a, tmp_path / 't.npz')
    for i in range(5):
        want = F.normalize(a[i], dim=0) + (F.normalize(b[i], dim=0) if i != 2 else 0)
        assert torch.allclose(out[i], F.normalize(want, dim=0), atol=1e-6)
    np.savez(tmp_path / 'wrong.npz', other=b.numpy())
    with pytest.raises(HiermetricError, match='emb'):
        join_modalities(a, tmp_path / 'wrong.npz')


# flags


def slow_flags(p, t, q, tax):
    "A threshold a node, one by one"
    leaf = tax.leaves[p[:, tax.leaves].argmax(1)]
    out = np.full(len(tax), np.inf)
    out[0] = -np.inf
    for v in range(1, len(tax)):
        own = sorted(
            p[i, v] for i in range(len(p)) if tax.is_ancestor(v, int(leaf[i])) and tax.is_ancestor(v, int(t[i]))
        )
        if own:
            out[v] = own[int(q * len(own))]
    return out


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 30), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 10**6))
def test_flags_are_the_loop(nodes, n, q, seed):
    rng = np.random.default_rng(seed)
    tax = random_tree(nodes, rng)
    p = tax.node_probs(torch.from_numpy(rng.dirichlet(np.full(tax.n_leaves, 0.5), size=n))).numpy()
    t = rng.integers(len(tax), size=n)
    rule = create_rule('rank_flags', strange=q).fit(p, t, tax)
    assert np.allclose(rule.limits, slow_flags(p, t, q, tax))
    new = tax.node_probs(torch.from_numpy(rng.dirichlet(np.full(tax.n_leaves, 0.5), size=9))).numpy()
    leaf = tax.leaves[new[:, tax.leaves].argmax(1)]
    for i, said in enumerate(rule(new)):
        want = 0
        for v in [u for u in range(len(tax)) if tax.is_ancestor(u, int(leaf[i]))]:
            if new[i, v] < rule.limits[v]:
                break
            want = v
        assert said == want
    again = Rule.restore(rule.state(), tax)
    assert (again(new) == rule(new)).all() and (torch.as_tensor(rule(torch.from_numpy(new))).numpy() == rule(new)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 20), st.integers(0, 10**6))
def test_rank_report_is_the_loop(nodes, n, seed):
    rng = np.random.default_rng(seed)
    tax = random_tree(nodes, rng)
    a, t = (rng.integers(len(tax), size=n) for _ in range(2))
    known = rng.random(tax.n_leaves) < 0.6
    known[0] = True
    best, report = known_ancestor(tax, known)[t], rank_report(a, t, tax, known)
    for d in range(1, tax.height + 1):
        rows = {'right': [], 'wrong': [], 'unsure': [], 'due': []}
        for i in range(n):
            if tax.depths[t[i]] < d:
                continue
            path = [v for v in range(len(tax)) if tax.is_ancestor(v, int(a[i]))][: d + 1]  # as far as depth d
            on = all(tax.is_ancestor(v, int(best[i])) for v in path)
            named = len(path) == d + 1
            for k, v in (
                ('right', on and named),
                ('wrong', not on),
                ('unsure', on and not named),
                ('due', tax.depths[best[i]] < d),
            ):
                rows[k].append(v)
        assert report.loc[d, 'images'] == len(rows['due'])
        if rows['due']:
            assert np.allclose(report.loc[d, list(rows)].astype(float), [np.mean(v) for v in rows.values()], atol=1e-6)


# the heads

SMALL = dict(
    diva=dict(dim=8, decorrelate=10.0),
    divide_conquer=dict(dim=24, learners=3),
    bier=dict(sizes=(4, 8, 12), decorrelate=1.0),
    sndl=dict(dim=16),
)
names = pytest.mark.parametrize('name', SMALL)
X, T = TOY.of('train')


def made(name, **kw):
    torch.manual_seed(0)
    head = create_head(name, X.shape[1], TAX, **SMALL[name] | kw)
    head.prepare(X, T)
    head.refresh(X, T)
    return head


def settled(name, **kw):
    "Without chance, so that a loop can follow"
    return made(name, dropout=0.0, **kw)


def slow_parts(head, x):
    out, at = [], 0
    for size in head.sizes:
        layer = head.project.layers[1]
        out.append([F.normalize(layer.weight[at : at + size] @ row + layer.bias[at : at + size], dim=0) for row in x])
        at += size
    return out


@names
def test_the_joint_cosine_is_the_mean_of_the_parts(name):
    head = settled(name).eval()
    x = X[:5]
    parts, shares = slow_parts(head, x), (head.shares / head.shares.sum()).tolist()
    r = head.represent(x)
    assert torch.allclose(r.norm(dim=1), torch.ones(5), atol=1e-5) and r.shape[1] == sum(head.sizes)
    for i in range(5):
        for j in range(5):
            assert (
                abs(float(r[i].detach() @ r[j].detach()) - sum(w * float(p[i] @ p[j]) for w, p in zip(shares, parts)))
                < 1e-5
            )


def hinge(d_ap, d_an, m):
    return max(0.0, d_ap - d_an + m)


def above(values):
    good = [v for v in values if v > 0]
    return sum(good) / max(len(good), 1)


def dist(a, b):
    return float((a - b).norm())


def slow_epshn(p, t, margin=0.1):
    "Easy positive, semi-hard negative, triplet by triplet, with Euclidean distances of unit vectors"
    out, n = [], len(t)
    for a in range(n):
        good = [dist(p[a], p[i]) for i in range(n) if i != a and t[i] == t[a]]
        if not good:
            continue
        bad = [d for d in (dist(p[a], p[i]) for i in range(n) if t[i] != t[a]) if d > min(good)]
        if bad:
            out.append(hinge(min(good), min(bad), margin))
    return above(out)


def batch(n=18):
    t = torch.as_tensor(TAX.leaves[np.arange(n) // 3 % 6].copy()).long()
    torch.manual_seed(1)
    return torch.randn(n, X.shape[1]), t


def test_diva_is_the_loop(monkeypatch):
    head, (x, t) = settled('diva', shared=0.5, intra=0.25, single=2.0), batch()
    parts = slow_parts(head, x)
    dealt, found = torch.randperm(len(t)), None
    import hiermetric.multitask as m

    found = m.intra_triplets(t, TAX)
    monkeypatch.setattr(m, 'intra_triplets', lambda *_: found)
    monkeypatch.setattr(torch, 'randperm', lambda *_, **__: dealt)
    first, across, inside, single = parts
    want = slow_epshn(first, t.tolist()) + 0.5 * slow_epshn(across, t[dealt].tolist())
    want += 0.25 * above(
        [
            hinge(-float(inside[a] @ inside[p]), -float(inside[a] @ inside[n]), 0.1)
            for a, p, n in zip(*(o.tolist() for o in found))
        ]
    )
    want += 2 * np.mean(
        [
            -float(single[i] @ single[i]) / 0.1 + math.log(sum(math.exp(float(single[i] @ o) / 0.1) for o in single))
            for i in range(len(x))
        ]
    )
    for part, net in zip(parts[1:], head.adversaries):  # from the part to the first
        want -= 10 * np.mean(
            [float((F.normalize(net.nets[0](p), dim=0) * q).square().mean()) for p, q in zip(part, first)]
        )
    assert abs(float(head.loss(x, t)) - want) < 1e-3


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


@names
@pytest.mark.parametrize('bad', ['one', 'empty', 'same class', 'all different', 'zero', 'inner', 'bf16'])
def test_batches_that_teach_little_are_finite(name, bad):
    head = made(name)
    x, t = batch(6)
    if bad == 'one':
        x, t = x[:1], t[:1]
    if bad == 'empty':
        x, t = x[:0], t[:0]
    if bad == 'same class':
        t = t[:1].repeat(6)
    if bad == 'all different':
        t = torch.as_tensor(TAX.leaves[:6].copy()).long()
    if bad == 'zero':
        x = torch.zeros_like(x)
    if bad == 'inner':
        t = torch.tensor([0, 1, 1, 2, int(TAX.leaves[0]), int(TAX.parents[TAX.leaves[0]])])
    head.rows = torch.arange(len(x))
    x.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bad == 'bf16'):
        loss = head.loss(x, t)
    loss.backward()
    assert (
        loss.isfinite()
        and x.grad.isfinite().all()
        and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    )
    p = head.node_probs(x.detach())
    assert p.isfinite().all() and torch.allclose(p[:, 0], torch.ones(len(p)), atol=1e-5)


@names
def test_runs_resume_bit_for_bit_and_models_come_back(name, tmp_path):
    kw = dict(
        head=name,
        head_kw=SMALL[name] | (dict(every=1) if name == 'divide_conquer' else {}),
        sampler='m_per_class',
        epochs=3,
        batch_size=48,
        device='cpu',
        checkpoint_every='1 steps',
    )
    whole = fit(TOY, **kw, out=tmp_path / 'whole')

    class Killed(Exception):
        pass

    from hiermetric.training import Trainer

    for at in ((1, 0), (1, 2)):  # between two epochs, and in the middle of one
        out, save = tmp_path / f'killed{at}', Trainer.save

        def stop(self, *a):
            save(self, *a)
            if (self.epoch, self.step) == at:
                raise Killed

        Trainer.save = stop
        try:
            with pytest.raises(Killed):
                fit(TOY, **kw, out=out)
        finally:
            Trainer.save = save
        again = fit(TOY, **kw, out=out)
        assert again.history.drop(columns='seconds').equals(whole.history.drop(columns='seconds'))
        for (k, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
            assert torch.equal(a, b), k
    back = Model.load(tmp_path / 'whole' / 'model')
    q = TOY.of('test')[0]
    assert torch.equal(back.node_probs(q), whole.model.node_probs(q)) and torch.equal(
        back.represent(q), whole.model.represent(q)
    )
    assert whole.history.val_top1.iloc[-1] > 1.5 / TAX.n_leaves and len(embeddings(back, TOY, 'test')) == len(q)


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
    from hiermetric.multitask import mined_loss

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


@pytest.mark.parametrize(
    'name,kw',
    [
        ('diva', dict(pair_loss='tree_triplet', miner=None)),
        ('diva', dict(pair_loss='tree_triplet', miner='multi_label')),
        ('divide_conquer', dict(pair_loss='tree_supcon', miner=None)),
        ('bier', {}),
        ('sndl', {}),
    ],
)
def test_many_labels(name, kw):
    "Rows of labels in a bare loop, and whole paths in a run: images that share labels come together"
    head = made(name, **kw)
    y = TAX.multi_hot(T)[:, 1:]
    head.prepare(X, T)
    for o in head.modules():
        if hasattr(o, 'memory') and isinstance(o.memory, torch.Tensor):
            o.prepare(y)
    overlap = (y.float() @ y.T.float()) / (y[:, None] | y).sum(2)

    def told():
        "How well the cosines follow the overlap of labels: their correlation over all pairs"
        with torch.no_grad():
            r = head.eval().represent(X)
        head.train()
        return float(torch.corrcoef(torch.stack([(r @ r.T).flatten(), overlap.flatten()]))[0, 1])

    before, opt = told(), torch.optim.Adam(head.parameters(), 1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randperm(len(X), generator=g)[:48]
        head.rows = rows
        opt.zero_grad()
        loss = head.loss(X[rows], y[rows])
        loss.backward()
        opt.step()
        assert loss.isfinite()
    assert told() > before + 0.1
    run = fit(
        TOY,
        name,
        head_kw=SMALL[name] | kw | dict(paths=True),
        sampler='m_per_class',
        epochs=1,
        batch_size=48,
        device='cpu',
    )
    assert run.history.loss.notna().all()
    with pytest.raises(HiermetricError, match='one column for every node'):
        head.loss(X[:4], y[:4, :3])


def test_settings_that_make_no_sense():
    for name, kw, word in (
        ('diva', dict(shared=-1.0), 'at least 0'),
        ('diva', dict(weights=[1.0, 1.0]), '4 parts and 2 weights'),
        ('divide_conquer', dict(dim=10, learners=3), 'shared evenly'),
        ('bier', dict(sizes=[]), 'at least one part'),
        ('sndl', dict(ce=-1.0), 'at least 0'),
        ('diva', dict(pair_loss='tripplet'), 'triplet'),
        ('diva', dict(dim=0), 'dimension'),
    ):
        with pytest.raises(HiermetricError, match=word):
            create_head(name, 8, TAX, **kw)


# sets of labels

LABELS = ['sand', 'water', 'boat', 'a/b', 'übrig']
GRADED = dict(
    diva=dict(pair_loss='tree_supcon', miner=None),
    divide_conquer=dict(pair_loss='tree_supcon', miner=None),
    bier={},
    sndl={},
)


def scenes(n=500, C=3, seed=0, noise=0.5):
    "Features that are sums of their labels' directions, some without any label"
    rng = np.random.default_rng(seed)
    y = (rng.random((n, C)) < 0.4).astype(int)
    x = (y @ rng.normal(size=(C, 16)) + noise * rng.normal(size=(n, 16))).astype(np.float16)
    return Features(
        x,
        np.zeros(n, dtype=int),
        np.resize(['train', 'train', 'train', 'val', 'test'], n),
        TAX,
        paths=np.array([f'/photos/{i % 7}/{i}.jpg' for i in range(n)]),
    ), y


def written(folder, y, names, labels=LABELS):
    pd.DataFrame(y, names, labels[: np.shape(y)[1]]).to_csv(folder / 'labels.csv')
    return folder / 'labels.csv'


@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    f, y = scenes()
    order = np.random.default_rng(1).permutation(len(f))  # rows in another order, names of another length
    return *with_label_sets(
        f,
        written(
            tmp_path_factory.mktemp('labels'),
            y[order],
            [f.paths[i] if i % 2 else f.paths[i].split('/', 2)[2] for i in order],
        ),
    ), y


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_powerset_is_the_loop(n, C, seed):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, C)) < rng.random(C)).astype(int)
    tax, t, sets = powerset(pd.DataFrame(y, columns=LABELS[:C]))
    assert (
        sets.shape == (len(tax), C)
        and not sets.iloc[0].any()
        and tax.n_leaves == len(tax) - 1 == len({tuple(o) for o in y.tolist()})
    )
    for i in range(n):
        own = [LABELS[j] for j in range(C) if y[i, j]]
        assert tax.names[t[i]] == (' + '.join(own) or 'none') and sets.iloc[t[i]].tolist() == y[i].tolist()
    # probabilities, set by set and label by label
    p = tax.node_probs(torch.from_numpy(rng.dirichlet(np.ones(tax.n_leaves), size=4)))
    got = label_probs(p, sets, tax)
    for i in range(4):
        for j in range(C):
            assert abs(float(got[i, j]) - sum(float(p[i, v]) for v in tax.leaves if sets.iloc[v, j])) < 1e-9


def test_label_probs_of_paths_are_node_probs():
    p = TAX.node_probs(torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(TAX.n_leaves), size=5)))
    assert torch.allclose(label_probs(p, TAX.multi_hot(np.arange(len(TAX)))[:, 1:], TAX), p[:, 1:])


def test_label_report_is_the_loop():
    rng = np.random.default_rng(0)
    y = (rng.random((30, 4)) < 0.3).astype(int)
    y[:, 3] = 0
    p = torch.from_numpy(rng.random((30, 4)))
    report = label_report(p, pd.DataFrame(y, columns=LABELS[:4]))
    for j in range(3):
        order = sorted(range(30), key=lambda i: -float(p[i, j]))
        hits, found = [], 0
        for place, i in enumerate(order, 1):
            if y[i, j]:
                found += 1
                hits.append(found / place)
        assert (
            abs(report['average precision'].iloc[j] - np.mean(hits)) < 1e-9
            and report.images.iloc[j] == len(hits)
            and report['share'].iloc[j] == len(hits) / 30
        )
    assert math.isnan(report['average precision'].iloc[3]) and list(report.index) == LABELS[:4]
    for bad in (p[:5], p * math.nan):
        with pytest.raises(HiermetricError, match='images, labels'):
            label_report(bad, pd.DataFrame(y))


def test_labels_are_joined_by_path(scene):
    labelled, sets, y = scene
    f, _ = scenes()
    assert labelled.x is f.x or (labelled.x == f.x).all()
    assert (labelled.split == f.split).all() and (labelled.paths == f.paths).all()
    assert (
        (sets.to_numpy()[labelled.targets] == y).all()
        and labelled.taxonomy.n_leaves == 8
        and 'none' in labelled.taxonomy.leaf_names
    )
    assert (
        labelled.meta['labels'] == LABELS[:3]
        and labelled.meta['unused_rows'] == 0
        and labelled.meta['sets_without_training'] == []
    )


def test_a_table_of_images_takes_the_same_labels(tmp_path):
    f, y = scenes(40)
    table = ImageTable(
        pd.DataFrame({'path': f.paths, 'class': str(TAX.leaf_names[0]), 'split': f.split}), TAX, 'photos', tmp_path
    )
    csv = written(tmp_path, y, [f'{i}.jpg' for i in range(40)])
    labelled, sets = with_label_sets(table, csv)
    vectors, same = with_label_sets(f, csv)
    assert (
        (labelled.targets == vectors.targets).all()
        and labelled.taxonomy.fingerprint == vectors.taxonomy.fingerprint
        and sets.equals(same)
    )
    assert 'sets of 3 labels' in labelled.notes[-1] and labelled.fingerprint != table.fingerprint


def test_pictures_with_labels_go_through_fit(tmp_path):
    "Red and blue, either, both or none, from the files on"
    rng = np.random.default_rng(0)
    y = (rng.random((90, 2)) < 0.5).astype(int)
    for i, hot in enumerate(y):
        Image.fromarray((rng.integers(0, 30, (32, 32, 3)) + 200 * np.array([hot[0], 0, hot[1]])).astype(np.uint8)).save(
            tmp_path / f'{i}.png'
        )
    table = ImageTable(
        pd.DataFrame(
            {
                'path': [str(tmp_path / f'{i}.png') for i in range(90)],
                'class': str(TAX.leaf_names[0]),
                'split': np.resize(['train', 'train', 'val'], 90),
            }
        ),
        TAX,
        'colours',
        tmp_path,
    )
    labelled, sets = with_label_sets(table, written(tmp_path, y, [f'{i}.png' for i in range(90)], ['red', 'blue']))
    run = fit(
        labelled,
        'sndl',
        head_kw=dict(sets=sets, dim=8),
        backbone='timm:test_efficientnet',
        backbone_kw=dict(pretrained=False),
        image_size=32,
        batch_size=16,
        lr=5e-3,
        epochs=3,
        device='cpu',
    )
    report = label_report(
        label_probs(predict(run.model, labelled, 'val'), sets, labelled.taxonomy),
        sets.iloc[labelled.targets[labelled.samples['split'] == 'val']],
    )
    assert (report['average precision'] > report['share'] + 0.2).all()


@names
def test_losses_with_sets_are_losses_of_rows(name, scene):
    labelled, sets, _ = scene
    x, t = (o[:48] for o in labelled.of('train'))
    rows = torch.tensor(sets.to_numpy())[t].float()

    def loss(y, given):
        torch.manual_seed(0)
        head = create_head(name, 16, labelled.taxonomy, **SMALL[name] | GRADED[name] | dict(sets=given))
        head.prepare(*labelled.of('train'))
        head.rows = torch.arange(48)
        torch.manual_seed(1)
        return head.loss(x, y), head

    (a, head) = loss(t, sets)
    (b, _) = loss(rows, sets.to_numpy().tolist())
    (c, _) = loss(t.tolist(), torch.tensor(sets.to_numpy()))
    assert torch.equal(a, b) and torch.equal(a, c) and a.isfinite() and a > 0 and head.n_labels == 3
    assert head.count.sum() == 48  # class means of the sets
    with pytest.raises(HiermetricError, match='every label of `sets`, 3 of them, not 7'):
        head.loss(x, torch.zeros(48, 7))


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


@names
def test_a_table_goes_through_fit_and_back(name, scene, tmp_path):
    labelled, sets, _ = scene
    kw = SMALL[name] | GRADED[name] | dict(sets=sets)
    run = fit(
        labelled, name, head_kw=kw, sampler='m_per_class', epochs=6, batch_size=64, device='cpu', out=tmp_path / 'run'
    )
    p = label_probs(predict(run.model, labelled, 'test'), sets, labelled.taxonomy)
    truth = sets.iloc[labelled.of('test')[1].numpy()]
    report = label_report(p, truth)
    assert (report['average precision'] > report['share'] + 0.25).all()
    back = Model.load(tmp_path / 'run' / 'model')
    x = labelled.of('test')[0]
    assert back.head.sets == sets.to_numpy().tolist() and torch.equal(back.head.node_labels, run.model.head.node_labels)
    assert torch.equal(back.node_probs(x), run.model.node_probs(x)) and torch.equal(
        back.represent(x), run.model.represent(x)
    )
    again = fit(
        labelled, name, head_kw=kw, sampler='m_per_class', epochs=6, batch_size=64, device='cpu', out=tmp_path / 'run'
    )  # the finished run
    assert again.best_epoch == run.best_epoch and again.settings['head_kw']['sets'] == sets.to_numpy().tolist()
    with pytest.raises(HiermetricError, match='other settings'):
        fit(
            labelled,
            name,
            head_kw=kw | dict(sets=1 - sets.to_numpy()),
            sampler='m_per_class',
            epochs=6,
            batch_size=64,
            device='cpu',
            out=tmp_path / 'run',
        )


@names
@pytest.mark.parametrize('bad', ['no labels', 'all labels', 'one label', 'one image', 'empty'])
def test_sets_that_teach_little_are_finite(name, bad):
    y = np.ones((4, 1), dtype=int) if bad == 'one label' else np.array(list(itertools.product([0, 1], repeat=2)))
    y[0] = 0
    tax, t, sets = powerset(pd.DataFrame(y, columns=LABELS[: y.shape[1]]))
    t = torch.as_tensor(t)[
        {'no labels': [0] * 6, 'all labels': [3] * 6, 'one label': [0, 1] * 3, 'one image': [1], 'empty': []}[bad]
    ].long()
    torch.manual_seed(0)
    head = create_head(name, 16, tax, **SMALL[name] | GRADED[name] | dict(sets=sets))
    x = torch.randn(len(t), 16, requires_grad=True)
    head.prepare(x, t)
    head.rows = torch.arange(len(t))
    loss = head.loss(x, t)
    loss.backward()
    assert (
        loss.isfinite()
        and x.grad.isfinite().all()
        and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    )
    head.conclude(x.detach(), t)
    p = label_probs(head.node_probs(torch.randn(3, 16)).detach(), sets, tax)
    assert p.isfinite().all() and (p <= 1 + 1e-6).all()


def test_one_label_is_yes_or_no(tmp_path):
    f, y = scenes(200, 1, noise=0.2)
    labelled, sets = with_label_sets(f, written(tmp_path, y, [f'{i}.jpg' for i in range(200)]))
    assert labelled.taxonomy.leaf_names == ('none', 'sand') and sets['sand'].tolist() == [
        0,
        *(int(o == 'sand') for o in labelled.taxonomy.names[1:]),
    ]
    run = fit(labelled, 'sndl', head_kw=dict(sets=sets, dim=8), epochs=6, batch_size=32, device='cpu')
    assert (
        label_report(
            label_probs(predict(run.model, labelled, 'test'), sets, labelled.taxonomy),
            sets.iloc[labelled.of('test')[1].numpy()],
        )['average precision'].item()
        > 0.8
    )


def test_tables_that_cannot_be_read(tmp_path):
    for text, word in (
        ('', 'Cannot read'),
        ('image,a\n', 'holds no labels'),
        ('image\nx.jpg\n', 'holds no labels'),
        ('image,a\nx.jpg,2\n', "'a' of 'x.jpg' is '2'"),
        ('image,a,b\nx.jpg,1,\n', "'b' of 'x.jpg' is ''"),
        ('image,a,b\nx.jpg,1,0\ny.jpg,1\n', "'b' of 'y.jpg'"),
        ('image,a\nx.jpg,1,0\n', 'Cannot read'),
        ('image,a,a\nx.jpg,1,0\n', "label 'a' occurs twice"),
        ('image,a\nx.jpg,1\n x.jpg,1\n', "image 'x.jpg' occurs twice"),
        ('image,a,\nx.jpg,1,0\n', 'label 2 has no name'),
        ('image,a\nx.jpg,1\n,0\n', 'image 2 has no name'),
    ):
        (tmp_path / 'labels.csv').write_text(text)
        with pytest.raises(HiermetricError, match=word):
            read_multi_hot(tmp_path / 'labels.csv')
    (tmp_path / 'labels.csv').write_text('\ufeffimage, water ,007\nx.jpg,1.0,0\n1e3,0,1\n', encoding='utf-8')
    table = read_multi_hot(tmp_path / 'labels.csv')
    assert (
        list(table.columns) == ['water', '007']
        and list(table.index) == ['x.jpg', '1e3']
        and table.to_numpy().tolist() == [[1, 0], [0, 1]]
    )


@pytest.mark.filterwarnings('ignore:1 of 7 sets')
def test_labels_that_do_not_fit_the_images(tmp_path):
    f, y = scenes(40)
    names = [f'{i}.jpg' for i in range(40)]

    def joined(y, names, **kw):
        return with_label_sets(f, written(tmp_path, y, names), **kw)

    with pytest.raises(HiermetricError, match='no row for 2 of 40 images, the first /photos/3/38.jpg'):
        joined(y[:38], names[:38])
    with pytest.raises(HiermetricError, match='2 rows for /photos/0/0.jpg'):
        joined(np.r_[y, y[:1]], [*names, '/photos/0/0.jpg'])
    with pytest.raises(HiermetricError, match='fits /photos/0/0.jpg as well as /photos/1/0.jpg'):
        with_label_sets(
            replace(f, paths=np.array(['/photos/0/0.jpg', '/photos/1/0.jpg', *f.paths[2:]])),
            written(tmp_path, y, names),
        )
    with pytest.raises(HiermetricError, match="'0.jpg' and './0.jpg' are one path"):
        joined(np.r_[y, y[:1]], [*names, './0.jpg'])
    with pytest.raises(HiermetricError, match='at most 3 may be classes'):
        joined(y, names, most=3)
    with pytest.raises(HiermetricError, match='a class needs another'):
        joined(y * 0, names)
    with pytest.raises(HiermetricError, match='`paths` is None'):
        with_label_sets(replace(f, paths=None), written(tmp_path, y, names))
    with pytest.raises(HiermetricError, match="name 'all sets'"):
        powerset(pd.DataFrame(np.eye(2), columns=['all sets', 'b']))
    with pytest.raises(HiermetricError, match="name 'none'"):
        powerset(pd.DataFrame([[0, 0], [1, 0]], columns=['none', 'b']))
    with pytest.warns(UserWarning, match='3 of 43 rows'):
        more = joined(np.r_[y, y[:3]], [*names, 'x.jpg', 'y.jpg', 'z.jpg'])[0]
    assert more.meta['unused_rows'] == 3
    y = np.zeros((40, 3), dtype=int)
    y[::2, 0] = 1
    y[3] = 1  # image 3 validates
    with pytest.warns(UserWarning, match='1 of 3 sets of labels have no training image.*sand . water . boat'):
        lone, sets = joined(y, names)
    assert lone.meta['sets_without_training'] == ['sand + water + boat']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert rows_of_files(names, f.paths, 'x').tolist() == list(range(40))
        assert rows_of_files(['0.jpg'], ['/photos/0.jpg', ''.join(['/photos/', '0.jpg'])], 'x').tolist() == [
            0,
            0,
        ]  # one file, twice
    run = fit(lone, 'sndl', head_kw=dict(sets=sets, dim=8), epochs=1, batch_size=8, device='cpu')
    assert run.history.val_nll.notna().all()


def test_sets_that_make_no_sense(scene):
    labelled, sets, _ = scene
    tax, y = labelled.taxonomy, sets.to_numpy()
    for kw, word in (
        (dict(sets=y[1:]), 'each of the 9 nodes'),
        (dict(sets=y[:, :0]), 'at least one label'),
        (dict(sets=y * 2), 'other numbers'),
        (dict(sets=y.astype(float) * math.nan), 'other numbers'),
        (dict(sets='labels.csv'), 'no table of numbers'),
        (dict(sets=y, paths=True), 'one of the two'),
    ):
        with pytest.raises(HiermetricError, match=word):
            create_head('sndl', 16, tax, **kw)
    for name, kw in (
        ('diva', {}),
        ('divide_conquer', {}),
        ('diva', dict(pair_loss='tree_triplet')),
        ('divide_conquer', dict(pair_loss='multi_similarity', miner=None)),
    ):
        with pytest.raises(HiermetricError, match="pair_loss='tree_supcon'"):
            create_head(name, 16, tax, sets=sets, **kw)
    with pytest.raises(HiermetricError, match="pair_loss='tree_supcon'"):
        create_head('diva', 16, TAX, paths=True)
    with pytest.raises(HiermetricError, match='each of the 9 nodes'):
        label_probs(tax.node_probs(torch.full((1, 8), 1 / 8)), y[1:], tax)
