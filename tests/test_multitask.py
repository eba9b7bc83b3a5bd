"Shared and specific embeddings: clusters, partial softmax, flags and the multi-task heads against slow loops; resumption, degenerate batches, multi-hot labels."
import itertools, math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.aam import CombinedMargin, unit
from hiermetric.core import HiermetricError
from hiermetric.decisions import Rule, create_rule
from hiermetric.heads import create_head
from hiermetric.multitask import PartialMargin, RankFlags, join_modalities, kmeans, match_clusters, pseudo_classes, rank_report
from hiermetric.taxonomy import Taxonomy
from hiermetric.training import embeddings, fit, predict, toy_features
from hiermetric.unseen import known_ancestor

TAX = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xy' for s in '123'})
TOY = toy_features(TAX, per_leaf=30, noise=2.)

pytestmark = pytest.mark.usefixtures('one_thread')

def random_tree(nodes, rng): return Taxonomy.from_parents({'n0': None} | {f'n{i}': f'n{rng.integers(i)}' for i in range(1, nodes)})

# clusters

def test_kmeans_is_a_fixed_point_and_as_good_as_scikit_learn():
    from sklearn.cluster import KMeans
    x = unit(TOY.of('train')[0]); centres, cluster = kmeans(x, 6, iters=50)
    cos = x@centres.T
    assert torch.equal(cluster, cos.argmax(1)) and torch.allclose(centres.norm(dim=1), torch.ones(6), atol=1e-5)
    for k in range(6): assert torch.allclose(unit(x[cluster == k].sum(0)), centres[k], atol=.02)
    theirs = KMeans(6, n_init=1, random_state=0).fit(x.numpy())
    mine = ((x - torch.stack([x[cluster == k].mean(0) for k in range(6)])[cluster])**2).sum()
    assert mine < 1.05*theirs.inertia_

def test_kmeans_does_not_mind_copies_zeros_or_as_many_clusters_as_rows():
    for x, k in ((torch.ones(9, 4), 3), (torch.zeros(5, 4), 2), (torch.randn(4, 3), 4), (torch.randn(4, 3), 1)):
        centres, cluster = kmeans(x, k)
        assert centres.isfinite().all() and len(cluster) == len(x) and 0 <= cluster.min() and cluster.max() < k

@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_matched_clusters_keep_the_most(k, n, seed):
    rng = np.random.default_rng(seed); before, now = (torch.from_numpy(rng.integers(k, size=n)) for _ in range(2))
    out = match_clusters(before, now, k)
    best = max(sum(p[b] == a for a, b in zip(before.tolist(), now.tolist())) for p in itertools.permutations(range(k)))
    assert int((out == before).sum()) == best
    assert len(set(zip(out.tolist(), now.tolist()))) == len(now.unique())   # only the numbers have changed

# partial softmax

def slow_partial(head, x, t, few):
    "The definition, image by image"
    out = []
    for e, y in zip(F.normalize(x, dim=1), t.tolist()):
        rows = range(TAX.leaf_start[y], TAX.leaf_stop[y]); good, bad = 0., 0.
        for j in few.tolist():
            theta = math.acos(float(e@F.normalize(head.weight[j].detach(), dim=0)))
            if j in rows: good += math.exp(head.s*(math.cos(head.m1*theta + head.m2) - head.m3))
            else: bad += math.exp(head.s*math.cos(theta))
        out.append(-math.log(good/(good + bad)))
    return out

@pytest.mark.parametrize('inner', [False, True])
def test_partial_softmax_is_the_loop(inner, monkeypatch):
    torch.manual_seed(0); head = PartialMargin(8, TAX, share=.4, s=4., m1=1., m2=.2, m3=.1)
    x = torch.randn(5, 8); t = torch.as_tensor(TAX.leaves[[0, 0, 4, 7, 11]].copy()).long()
    if inner: t[1] = int(TAX.parents[t[1]])
    few = head.chosen(*head.labels(t)); monkeypatch.setattr(head, 'chosen', lambda *_: few)
    assert torch.allclose(head.losses(x, t, *head.labels(t)), torch.tensor(slow_partial(head, x, t, few)), atol=1e-4)

def test_partial_softmax_leaves_the_others_alone(monkeypatch):
    torch.manual_seed(0); head = PartialMargin(8, TAX, share=.5); t = torch.as_tensor(TAX.leaves[[0, 3]].copy()).long()
    few = head.chosen(*head.labels(t)); monkeypatch.setattr(head, 'chosen', lambda *_: few)
    assert len(few) == 6 == len(few.unique()) and {0, 3} <= set(few.tolist())
    head.loss(torch.randn(2, 8), t).backward()
    touched = head.weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(few.tolist())

@pytest.mark.parametrize('bad', ['zero', 'copy', 'large', 'empty', 'bf16'])
def test_partial_softmax_is_finite(bad):
    torch.manual_seed(0); head = PartialMargin(8, TAX, share=.3, s=64.); t = torch.as_tensor(TAX.leaves[:4].copy()).long()
    x = {'zero': torch.zeros(4, 8), 'copy': head.weight[:4].detach().clone(), 'large': 1e4*torch.randn(4, 8), 'empty': torch.zeros(0, 8), 'bf16': torch.randn(4, 8)}[bad].requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bad == 'bf16'): loss = head.loss(x, t[:len(x)])
    loss.backward(); assert loss.isfinite() and x.grad.isfinite().all() and head.weight.grad.isfinite().all()

def test_all_classes_are_combined_margin():
    torch.manual_seed(0); a, b = PartialMargin(8, TAX, share=1.), CombinedMargin(8, TAX); b.load_state_dict(a.state_dict())
    x, t = torch.randn(7, 8), torch.as_tensor(TAX.leaves[[0, 1, 2, 2, 5, 9, 11]].copy()).long()
    assert torch.equal(a.loss(x, t), b.loss(x, t))

def test_pseudo_classes_keep_everything_but_the_labels():
    made = pseudo_classes(TOY, 7, seed=3)
    assert made.taxonomy.n_leaves == 7 and (made.split == TOY.split).all() and made.x is TOY.x
    x = unit(torch.from_numpy(TOY.x.astype(np.float32))); centres, own = kmeans(x[torch.from_numpy(TOY.split == 'train')], 7, 3)
    assert (made.targets[TOY.split == 'train'] == made.taxonomy.leaves[own.numpy()]).all() and (made.targets == made.taxonomy.leaves[(x@centres.T).argmax(1).numpy()]).all()
    other = pseudo_classes(TOY, 7, emb=-TOY.x.astype(np.float32)[::-1].copy(), seed=3)
    assert not (other.targets == made.targets).all()
    with pytest.raises(HiermetricError, match='cannot make'): pseudo_classes(TOY, 10**4)

def test_texts_that_are_missing_change_nothing(tmp_path):
    torch.manual_seed(0); a, b = torch.randn(5, 3), torch.randn(5, 3); b[2] = math.nan
    np.savez(tmp_path/'t.npz', emb=b.numpy()); out = join_modalities(a, tmp_path/'t.npz')
    for i in range(5):
        want = F.normalize(a[i], dim=0) + (F.normalize(b[i], dim=0) if i != 2 else 0)
        assert torch.allclose(out[i], F.normalize(want, dim=0), atol=1e-6)
    np.savez(tmp_path/'wrong.npz', other=b.numpy())
    with pytest.raises(HiermetricError, match='emb'): join_modalities(a, tmp_path/'wrong.npz')

# flags

def slow_flags(p, t, q, tax):
    "A threshold a node, one by one"
    leaf = tax.leaves[p[:, tax.leaves].argmax(1)]; out = np.full(len(tax), np.inf); out[0] = -np.inf
    for v in range(1, len(tax)):
        own = sorted(p[i, v] for i in range(len(p)) if tax.is_ancestor(v, int(leaf[i])) and tax.is_ancestor(v, int(t[i])))
        if own: out[v] = own[int(q*len(own))]
    return out

@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 30), st.sampled_from([0., .1, .5]), st.integers(0, 10**6))
def test_flags_are_the_loop(nodes, n, q, seed):
    rng = np.random.default_rng(seed); tax = random_tree(nodes, rng)
    p = tax.node_probs(torch.from_numpy(rng.dirichlet(np.full(tax.n_leaves, .5), size=n))).numpy(); t = rng.integers(len(tax), size=n)
    rule = create_rule('rank_flags', strange=q).fit(p, t, tax)
    assert np.allclose(rule.limits, slow_flags(p, t, q, tax))
    new = tax.node_probs(torch.from_numpy(rng.dirichlet(np.full(tax.n_leaves, .5), size=9))).numpy(); leaf = tax.leaves[new[:, tax.leaves].argmax(1)]
    for i, said in enumerate(rule(new)):
        want = 0
        for v in tax.path(int(leaf[i])) if False else [u for u in range(len(tax)) if tax.is_ancestor(u, int(leaf[i]))]:
            if new[i, v] < rule.limits[v]: break
            want = v
        assert said == want
    again = Rule.restore(rule.state(), tax)
    assert (again(new) == rule(new)).all() and (torch.as_tensor(rule(torch.from_numpy(new))).numpy() == rule(new)).all()

@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 20), st.integers(0, 10**6))
def test_rank_report_is_the_loop(nodes, n, seed):
    rng = np.random.default_rng(seed); tax = random_tree(nodes, rng)
    a, t = (rng.integers(len(tax), size=n) for _ in range(2)); known = rng.random(tax.n_leaves) < .6; known[0] = True
    best, report = known_ancestor(tax, known)[t], rank_report(a, t, tax, known)
    for d in range(1, tax.height + 1):
        rows = {'right': [], 'wrong': [], 'unsure': [], 'due': []}
        for i in range(n):
            if tax.depths[t[i]] < d: continue
            path = [v for v in range(len(tax)) if tax.is_ancestor(v, int(a[i]))][:d + 1]   # as far as depth d
            on = all(tax.is_ancestor(v, int(best[i])) for v in path); named = len(path) == d + 1
            for k, v in (('right', on and named), ('wrong', not on), ('unsure', on and not named), ('due', tax.depths[best[i]] < d)): rows[k].append(v)
        assert report.loc[d, 'images'] == len(rows['due'])
        if rows['due']: assert np.allclose(report.loc[d, list(rows)].astype(float), [np.mean(v) for v in rows.values()], atol=1e-6)
