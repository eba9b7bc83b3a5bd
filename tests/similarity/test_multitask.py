"""Heads of several embeddings: the joint cosine, degenerate batches, resumption, multi-hot labels
(hiermetric.similarity.multitask)"""

import itertools
import math
import numpy as np
import pandas as pd
import pytest
import torch
from several_embeddings import LABELS, SMALL, T, TAX, TOY, X, batch, made, scenes, settled, slow_parts, written
from hiermetric.core import HiermetricError
from hiermetric.heads.model import Model
from hiermetric.heads.contract import create_head
from hiermetric.similarity.label_sets import label_probs, label_report, powerset, with_label_sets
from hiermetric.running.inference import embeddings, predict
from hiermetric.running.fitting import fit

pytestmark = pytest.mark.usefixtures('one_thread')
names = pytest.mark.parametrize('name', SMALL)


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

    from hiermetric.running.trainer import Trainer

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


GRADED = dict(
    diva=dict(pair_loss='tree_supcon', miner=None),
    divide_conquer=dict(pair_loss='tree_supcon', miner=None),
    bier={},
    sndl={},
)


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
