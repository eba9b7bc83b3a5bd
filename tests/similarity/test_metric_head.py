"The head of class means: means, probabilities, scale, runs (hiermetric.similarity.metric_head)"

import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pair_batches import D, L, TAX, batch
from hiermetric.images.features import toy_features
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.similarity.losses import LOSSES
from hiermetric.similarity.metric_head import class_means
from hiermetric.running.inference import embeddings, predict
from hiermetric.running.fitting import fit


def test_class_means_slow():
    x, t = batch(inner=5)
    mean, n = class_means(x, t, TAX)
    for j, leaf in enumerate(TAX.leaves):
        own = [xi for xi, ti in zip(x, t.tolist()) if ti == leaf]
        assert n[j] == len(own)
        assert torch.allclose(mean[j], torch.stack(own).mean(0) if own else torch.zeros(D), atol=1e-6)


@pytest.mark.parametrize('distance,normalise', [('cosine', True), ('euclidean', True), ('euclidean', False)])
def test_probabilities_are_a_softmax_over_distances_to_means(distance, normalise):
    x, t = batch(inner=3)
    head = create_head('metric', D, TAX, loss='triplet', loss_kw=dict(normalise=normalise), distance=distance)
    head.conclude(x, t)
    head.calibrate(x, t)
    head.eval()
    z = F.normalize(x) if normalise else x
    seen = [j for j, leaf in enumerate(TAX.leaves) if (t == leaf).any()]
    means = {j: torch.stack([o for o, k in zip(z, t.tolist()) if k == TAX.leaves[j]]).mean(0) for j in seen}
    for zi, pi in zip(z[:5], head.leaf_probs(x)[:5]):
        d = {
            j: (1 - F.cosine_similarity(zi, m, dim=0) if distance == 'cosine' else ((zi - m) ** 2).sum()).item()
            for j, m in means.items()
        }
        e = [math.exp(-head.scale.item() * d.get(j, max(d.values()))) for j in range(L)]
        assert np.allclose(pi.numpy(), np.array(e) / sum(e), atol=1e-5)


def test_scale_is_the_likeliest():
    x, t = batch(n=300)
    x = x + 3 * torch.randn(len(TAX), D, generator=torch.Generator().manual_seed(5))[t]
    head = create_head('metric', D, TAX).eval()
    head.conclude(x[:200], t[:200])
    head.calibrate(x[200:], t[200:])

    def nll(s):
        return F.cross_entropy(s * head(x[200:]) / head.scale, TAX.tensor('leaf_column')[t[200:]]).item()

    s = head.scale.item()
    assert nll(s) <= min(nll(s * 0.9), nll(s * 1.1)) and 0.05 < s < 1000


def test_training_separates_classes():
    x, t = batch(n=400)
    x = x * 0.6 + 1.5 * torch.randn(len(TAX), D, generator=torch.Generator().manual_seed(5))[t]
    torch.manual_seed(0)
    head = create_head('metric', 8, TAX, loss='triplet', miner='semi_hard')
    model = Model(EmbeddingNet(D, 8), head)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        i = torch.randint(0, 400, (64,))
        opt.zero_grad()
        model.loss(x[i], t[i]).backward()
        opt.step()
    acc = (head.taxonomy.tensor('leaves')[model.eval().leaf_probs(x).argmax(1)] == t).float().mean()
    assert acc > 0.9


@pytest.mark.parametrize(
    'kw',
    [
        dict(head_kw=dict(loss='tree_triplet', miner='tree'), sampler='m_per_class'),
        dict(head_kw=dict(loss='snca')),
        dict(head_kw=dict(loss='moco'), views=2),
        dict(head_kw=dict(loss='simclr'), views=2),
        dict(head_kw=dict(loss='boosted', loss_kw=dict(decorrelate=1.0)), sampler='m_per_class'),
    ],
    ids=lambda o: o['head_kw']['loss'],
)
def test_fit(kw, tmp_path):
    "Twice the same, exact means, better than chance, saved and read back"
    f = toy_features(TAX, per_leaf=20, dim=24)
    a, b = (fit(f, 'metric', embed_dim=16, epochs=3, batch_size=60, out=o, **kw) for o in (None, tmp_path / 'run'))
    p = predict(a.model, f, 'test')
    assert torch.equal(p, predict(b.model, f, 'test'))
    x, t = f.of('test')
    leaf = TAX.tensor('leaves')[p[:, TAX.tensor('leaves')].argmax(1)]
    assert (leaf == t).float().mean() > (0.5 if 'views' not in kw else 0.15)
    mean, n = class_means(embeddings(a.model, f, 'train'), f.of('train')[1], TAX)
    assert torch.allclose(a.model.head.weight, mean, atol=1e-5) and torch.equal(a.model.head.count, n)
    again = Model.load(tmp_path / 'run' / 'model')
    assert torch.allclose(predict(again, f, 'test'), p, atol=1e-6)


def test_tuning_goes_by_the_loss():
    from hiermetric.running.variants import Variant, own_space, search_space, trials

    named = [k.removeprefix('metric: ') for k in search_space if k.startswith('metric: ')]
    assert set(named) < set(LOSSES)
    for name in named:
        for v in trials(Variant.of(('x', 'metric', dict(loss=name))), 4):
            create_head('metric', D, TAX, **v.settings['head_kw'])
        assert {
            repr(v.settings['head_kw'].get('loss_kw')) for v in trials(Variant.of(('x', 'metric', dict(loss=name))), 4)
        } != {'None'}
    assert (
        own_space(dict(head='metric', head_kw=dict(loss='boosted'))) == {}
        and own_space(dict(head='arcface')) == search_space['arcface']
    )
