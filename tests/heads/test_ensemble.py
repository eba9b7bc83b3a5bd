"""Committee: means against recursion, Gaussians and kernel against scikit-learn, the pool against a loop, saving,
internal labels."""

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.heads.ensemble import Committee, KernelRidge, TreeGaussian, opinion_pool
from hiermetric.trees.arithmetic import tree_means
from hiermetric.core import HiermetricError
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.running.inference import predict
from hiermetric.images.features import toy_features

TAX = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xy' for s in '123'})
TOY = toy_features(TAX, per_leaf=30, noise=2.0)
SMALL = dict(dim=16, dropout=0.2)


def slow_mean(node, x, t, tax, k):
    "The definition, image by image"
    below = [i for i, y in enumerate(t) if tax.is_ancestor(node, int(y))]
    own = sum((x[i] for i in below), torch.zeros(x.shape[1]))
    if node == 0:
        return own / max(len(below), 1)
    return (own + k * slow_mean(int(tax.parents[node]), x, t, tax, k)) / (len(below) + k)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 20), st.integers(0, 10**6))
def test_tree_means_are_the_recursion(nodes, images, seed):
    rng = np.random.default_rng(seed)
    tax = Taxonomy.from_parents({'n0': None} | {f'n{i}': f'n{rng.integers(i)}' for i in range(1, nodes)})
    t, x = torch.as_tensor(rng.integers(len(tax), size=images)), torch.as_tensor(rng.normal(size=(images, 3))).float()
    mean, n = tree_means(x, t, tax, strength=1.5)
    for node in range(len(tax)):
        assert torch.allclose(mean[node].float(), slow_mean(node, x, t, tax, 1.5), atol=1e-5)
        assert n[node] == sum(bool(tax.is_ancestor(node, int(y))) for y in t)


def test_a_class_without_images_sits_on_its_parent():
    x, t = TOY.of('train')
    keep = t != int(TAX.leaves[0])
    mean, n = tree_means(x[keep], t[keep], TAX)
    assert n[TAX.leaves[0]] == 0 and torch.equal(mean[TAX.leaves[0]], mean[TAX.parents[TAX.leaves[0]]])


def test_gaussian_is_discriminant_analysis():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    (x, t), (q, _) = TOY.of('train'), TOY.of('test')
    head = TreeGaussian(x.shape[1], TAX, strength=0.0, shrink=0.3)
    head.prepare(x, t)
    head.log_scale.data.zero_()
    theirs = LinearDiscriminantAnalysis(solver='lsqr', shrinkage=0.3).fit(x, t).predict_proba(q)
    assert np.abs(head.leaf_probs(q).detach().numpy() - theirs).max() < 1e-3


def test_kernel_solves_its_system():
    x, t = TOY.of('train')
    head = KernelRidge(x.shape[1], TAX, ridge=0.2, width=0.7)
    head.prepare(x, t)
    head.log_scale.data.zero_()
    z = torch.nn.functional.normalize(x).double()
    k = torch.exp(-(torch.cdist(z, z) ** 2) / (0.7 * float(head.spread)))
    y = (
        torch.nn.functional.one_hot(torch.as_tensor(TAX.leaf_column.copy()).long()[t], TAX.n_leaves).double()
        - 1 / TAX.n_leaves
    )
    assert torch.allclose(head(x).double(), k @ torch.linalg.solve(k + 0.2 * torch.eye(len(x)), y), atol=2e-3)


def test_labels_above_the_leaves_spread_in_the_kernel():
    x, t = TOY.of('train')
    up = torch.as_tensor(TAX.parents.copy()).long()[t]
    head = KernelRidge(x.shape[1], TAX)
    head.prepare(x, up)
    p = head.leaf_probs(x).detach()
    a = [c for c in range(TAX.n_leaves) if TAX.parents[TAX.leaves[c]] == TAX.parents[TAX.leaves[0]]]
    assert torch.allclose(p[:, a[0]], p[:, a[1]], atol=1e-5)  # sisters cannot be told apart
    assert (TAX.parents[TAX.leaves[p.argmax(1).numpy()]] == up.numpy()).mean() > 0.8


def test_pool_is_the_loop():
    z, w, s = torch.randn(3, 4, 5), torch.randn(3), torch.randn(3)
    slow = sum(w.softmax(0)[k] * (s[k].exp() * z[k]).softmax(1) for k in range(3))
    assert torch.allclose(opinion_pool(z, w, s).exp(), slow, atol=1e-6)


@pytest.fixture(scope='module')
def run():
    return fit(TOY, 'committee', epochs=6, batch_size=64, lr=1e-2, head_kw=SMALL)


def test_the_committee_is_no_worse_than_its_members_on_validation(run):
    x, t = TOY.of('val')
    model = run.model
    column = torch.as_tensor(TAX.leaf_column.copy()).long()[t]
    nll = lambda logits: torch.nn.functional.cross_entropy(logits, column).item()
    with torch.no_grad():
        z = model.head.opinions(model.embed(x))
        best = min(min(nll(o * T) for T in np.geomspace(0.02, 50, 60)) for o in z)
        assert nll(model(x)) <= best + 0.01
    assert (
        torch.isclose(model.head.log_weight.softmax(0).sum(), torch.tensor(1.0))
        and model.head.log_sharpness.isfinite().all()
    )


def test_clusters_that_are_gaussians_trust_the_gaussian():
    tax = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xyz' for s in '123'})
    toy = toy_features(tax, per_leaf=40)
    model = fit(toy, 'committee', epochs=8, batch_size=64, lr=3e-3, head_kw=dict(dim=32)).model
    weight = dict(zip((o['head'] for o in model.head.members), model.head.log_weight.softmax(0).tolist()))
    assert weight['tree_gaussian'] > 0.5 and weight['tree_gaussian'] + weight['kernel_ridge'] > 0.99
    x, t = toy.of('test')
    with torch.no_grad():
        p = model.leaf_probs(x)
        assert model.node_probs(x).shape == (len(x), len(tax))
    assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)
    assert (torch.as_tensor(tax.leaves.copy())[p.argmax(1)] == t).float().mean() > 0.95


def test_calibration_sees_validation_only(run):
    from dataclasses import replace

    spoiled = np.asarray(TOY.x).copy()
    spoiled[TOY.split == 'test'] = 0
    again = fit(replace(TOY, x=spoiled), 'committee', epochs=6, batch_size=64, lr=1e-2, head_kw=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), again.model.state_dict().values()))


@pytest.mark.parametrize('head', ['committee', 'tree_gaussian', 'kernel_ridge'])
def test_saved_and_read_back(head, tmp_path):
    kw = SMALL if head == 'committee' else {}
    run = fit(TOY, head, epochs=2, batch_size=64, head_kw=kw, out=tmp_path)
    x = TOY.of('test')[0]
    assert torch.equal(predict(run.model, x), predict(Model.load(tmp_path / 'model'), x))
    assert len(run.history) == (2 if head == 'committee' else 1)  # closed form: one epoch


def test_killed_and_continued_is_the_same(tmp_path, run):
    def stop(row):
        if row['epoch'] == 3:
            raise KeyboardInterrupt

    kw = dict(epochs=6, batch_size=64, lr=1e-2, head_kw=SMALL, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(TOY, 'committee', **kw, checkpoint_every=2, log=('csv', stop))
    again = fit(TOY, 'committee', **kw)
    assert all(torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), again.model.state_dict().values()))


def test_internal_labels_train_and_calibrate():
    from dataclasses import replace

    t = TOY.targets.copy()
    t[::3] = TAX.parents[t[::3]]
    run = fit(replace(TOY, targets=t), 'committee', epochs=3, batch_size=64, head_kw=SMALL)
    p = predict(run.model, TOY.of('test')[0])
    assert p.isfinite().all() and torch.allclose(p[:, 0], torch.ones(len(p)), atol=1e-4)


def test_what_is_refused():
    with pytest.raises(HiermetricError, match='at least one member'):
        Committee(4, TAX, members=[])
    with pytest.raises(HiermetricError, match='one logit a leaf'):
        Committee(4, TAX, members=[dict(head='sphere_multi')])
    with pytest.raises(HiermetricError, match='above 0'):
        KernelRidge(4, TAX, width=0.0)
    with pytest.raises(HiermetricError, match='labelled with leaves'):
        TreeGaussian(4, TAX).prepare(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    assert Model(EmbeddingNet(4, kind='none'), create_head('kernel_ridge', 4, TAX)).head.weight.shape == (0, 4)
