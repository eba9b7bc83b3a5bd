"Clusters as classes: a partial softmax against the loop, features and texts (hiermetric.similarity.clusters)"

import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from several_embeddings import TAX, TOY
from hiermetric.heads.aam import CombinedMargin
from hiermetric.core import HiermetricError
from hiermetric.running.fitting import fit
from hiermetric.running.inference import embeddings
from hiermetric.trees.geometry import unit
from hiermetric.similarity.clusters import PartialMargin, join_modalities, pseudo_classes
from hiermetric.similarity.search import kmeans

pytestmark = pytest.mark.usefixtures('one_thread')


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


def test_clusters_are_classes_to_fit():
    made = pseudo_classes(TOY, 30)
    run = fit(made, 'partial_margin', embed_dim=32, epochs=4, batch_size=64, head_kw=dict(share=0.5), device='cpu')
    assert made.taxonomy.n_leaves == run.model.taxonomy.n_leaves == 30
    assert embeddings(run.model, TOY, 'test').shape == ((TOY.split == 'test').sum(), 32)


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
