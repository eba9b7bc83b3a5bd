"Shared and specific embeddings: matched clusters, partial softmax, flags and the multi-task heads against slow loops; resumption, degenerate batches, multi-hot labels."
import itertools, math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hiermetric.aam import CombinedMargin, unit
from hiermetric.core import HiermetricError
from hiermetric.decisions import Rule, create_rule
from hiermetric.heads import create_head
from hiermetric.multitask import PartialMargin, join_modalities, match_clusters, pseudo_classes, rank_report
from hiermetric.retrieval import kmeans
from hiermetric.taxonomy import Taxonomy
from hiermetric.training import embeddings, fit, toy_features
from hiermetric.unseen import known_ancestor

TAX = Taxonomy.from_paths({f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xy' for s in '123'})
TOY = toy_features(TAX, per_leaf=30, noise=2.)

pytestmark = pytest.mark.usefixtures('one_thread')

def random_tree(nodes, rng): return Taxonomy.from_parents({'n0': None} | {f'n{i}': f'n{rng.integers(i)}' for i in range(1, nodes)})

# clusters

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
    x = unit(torch.from_numpy(TOY.x.astype(np.float32))); own, centres = kmeans(x[torch.from_numpy(TOY.split == 'train')], 7, 'cosine', seed=3)
    assert (made.targets[TOY.split == 'train'] == made.taxonomy.leaves[own.numpy()]).all() and (made.targets == made.taxonomy.leaves[(x@centres.T).argmax(1).numpy()]).all()
    other = pseudo_classes(TOY, 7, emb=-TOY.x.astype(np.float32)[::-1].copy(), seed=3)
    assert not (other.targets == made.targets).all()
    with pytest.raises(HiermetricError, match='not 10000'): pseudo_classes(TOY, 10**4)

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
        for v in [u for u in range(len(tax)) if tax.is_ancestor(u, int(leaf[i]))]:
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

# the heads

SMALL = dict(diva=dict(dim=8, decorrelate=10.), divide_conquer=dict(dim=24, learners=3), bier=dict(sizes=(4, 8, 12), decorrelate=1.), sndl=dict(dim=16))
names = pytest.mark.parametrize('name', SMALL)
X, T = TOY.of('train')

def made(name, **kw):
    torch.manual_seed(0); head = create_head(name, X.shape[1], TAX, **SMALL[name] | kw)
    head.prepare(X, T); head.refresh(X, T); return head

def settled(name, **kw):
    "Without chance, so that a loop can follow"
    return made(name, dropout=0., **kw)

def slow_parts(head, x):
    out, at = [], 0
    for size in head.sizes:
        layer = head.project.layers[1]
        out.append([F.normalize(layer.weight[at:at + size]@row + layer.bias[at:at + size], dim=0) for row in x]); at += size
    return out

@names
def test_the_joint_cosine_is_the_mean_of_the_parts(name):
    head = settled(name).eval(); x = X[:5]; parts, shares = slow_parts(head, x), (head.shares/head.shares.sum()).tolist()
    r = head.represent(x); assert torch.allclose(r.norm(dim=1), torch.ones(5), atol=1e-5) and r.shape[1] == sum(head.sizes)
    for i in range(5):
        for j in range(5): assert abs(float(r[i].detach()@r[j].detach()) - sum(w*float(p[i]@p[j]) for w, p in zip(shares, parts))) < 1e-5

def hinge(d_ap, d_an, m): return max(0., d_ap - d_an + m)
def above(values): good = [v for v in values if v > 0]; return sum(good)/max(len(good), 1)
def dist(a, b): return float((a - b).norm())

def slow_epshn(p, t, margin=.1):
    "Easy positive, semi-hard negative, triplet by triplet, with Euclidean distances of unit vectors"
    out, n = [], len(t)
    for a in range(n):
        good = [dist(p[a], p[i]) for i in range(n) if i != a and t[i] == t[a]]
        if not good: continue
        bad = [d for d in (dist(p[a], p[i]) for i in range(n) if t[i] != t[a]) if d > min(good)]
        if bad: out.append(hinge(min(good), min(bad), margin))
    return above(out)

def batch(n=18):
    t = torch.as_tensor(TAX.leaves[np.arange(n)//3 % 6].copy()).long(); torch.manual_seed(1)
    return torch.randn(n, X.shape[1]), t

def test_diva_is_the_loop(monkeypatch):
    head, (x, t) = settled('diva', shared=.5, intra=.25, single=2.), batch(); parts = slow_parts(head, x)
    dealt, found = torch.randperm(len(t)), None
    import hiermetric.multitask as m
    found = m.intra_triplets(t, TAX)
    monkeypatch.setattr(m, 'intra_triplets', lambda *_: found); monkeypatch.setattr(torch, 'randperm', lambda *_, **__: dealt)
    first, across, inside, single = parts
    want = slow_epshn(first, t.tolist()) + .5*slow_epshn(across, t[dealt].tolist())
    want += .25*above([hinge(-float(inside[a]@inside[p]), -float(inside[a]@inside[n]), .1) for a, p, n in zip(*(o.tolist() for o in found))])
    want += 2*np.mean([-float(single[i]@single[i])/.1 + math.log(sum(math.exp(float(single[i]@o)/.1) for o in single)) for i in range(len(x))])
    for part, net in zip(parts[1:], head.adversaries):   # from the part to the first
        want -= 10*np.mean([float((F.normalize(net.nets[0](p), dim=0)*q).square().mean()) for p, q in zip(part, first)])
    assert abs(float(head.loss(x, t)) - want) < 1e-3

def test_divide_and_conquer_is_the_loop():
    head, (x, t) = settled('divide_conquer', conquer=3.), batch(36); head.rows = torch.arange(40, 76)
    parts, whose = slow_parts(head, x), head.cluster[head.rows].tolist()
    want = 0.
    for k in range(3):
        mine = [i for i in range(36) if whose[i] == k]
        want += slow_epshn([parts[k][i] for i in mine], [int(t[i]) for i in mine])/3
    assert len(set(whose)) == 3 and want > 0 and abs(float(head.loss(x, t)) - want) < 1e-4
    head.epoch = 3.; whole = list(head.represent(x))
    assert abs(float(head.loss(x, t)) - slow_epshn(whole, t.tolist())) < 1e-4

def test_bier_is_the_loop():
    head, (x, t) = settled('bier', decorrelate=0.), batch(); parts, n = slow_parts(head, x), len(t)
    total, s = 0., {}
    good, bad = ([(i, j) for i in range(n) for j in range(n) if i != j and (t[i] == t[j]) == o] for o in (True, False))
    for k, part in enumerate(parts):
        for which in (good, bad):
            for i, j in which:
                y = 1. if which is good else -25.
                w = 1/(1 + math.exp(2*y*(s[i, j] - .5))) if k else 1.
                total += w*math.log1p(math.exp(-2*y*(float(part[i]@part[j]) - .5)))/len(which)/3
        for i in range(n):
            for j in range(n): s[i, j] = (1 - 2/(k + 2))*s.get((i, j), 0.) + 2/(k + 2)*float(part[i]@part[j])
    assert abs(float(head.loss(x, t)) - total) < 1e-3

@pytest.mark.parametrize('paths', [False, True])
def test_sndl_is_the_loop(paths):
    head, rows = settled('sndl', paths=paths, memory=0.), torch.arange(30); head.rows = rows
    x, t = X[rows], T[rows]; part = slow_parts(head, x)[0]; z = 16*(torch.stack(part)@head.classes.weight.T + head.classes.bias)
    y = TAX.multi_hot(t)[:, 1:].float() if paths else None; near, classes = [], []
    for i in range(30):
        w = [float((y[i]*y[k]).sum()/((y[i] + y[k]) > 0).sum()) if paths else float(t[i] == t[k]) for k in range(30)]
        soft = [math.exp((float(part[i]@part[k]) - 1)/.05) for k in range(30)]
        if any(w[k] for k in range(30) if k != i): near.append(-math.log(sum(w[k]*soft[k] for k in range(30) if k != i)/sum(soft[k] for k in range(30) if k != i)))
        if paths: classes.append(float(-(y[i]*F.logsigmoid(z[i]) + (1 - y[i])*F.logsigmoid(-z[i])).mean()))
        else: classes.append(float(-z[i, TAX.leaves - 1].log_softmax(0)[TAX.leaf_column[t[i]]]))
    assert abs(float(head.loss(x, t)) - np.mean(near) - np.mean(classes)) < 2e-3

@names
@pytest.mark.parametrize('bad', ['one', 'empty', 'same class', 'all different', 'zero', 'inner', 'bf16'])
def test_batches_that_teach_little_are_finite(name, bad):
    head = made(name); x, t = batch(6)
    if bad == 'one': x, t = x[:1], t[:1]
    if bad == 'empty': x, t = x[:0], t[:0]
    if bad == 'same class': t = t[:1].repeat(6)
    if bad == 'all different': t = torch.as_tensor(TAX.leaves[:6].copy()).long()
    if bad == 'zero': x = torch.zeros_like(x)
    if bad == 'inner': t = torch.tensor([0, 1, 1, 2, int(TAX.leaves[0]), int(TAX.parents[TAX.leaves[0]])])
    head.rows = torch.arange(len(x)); x.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bad == 'bf16'): loss = head.loss(x, t)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    p = head.node_probs(x.detach()); assert p.isfinite().all() and torch.allclose(p[:, 0], torch.ones(len(p)), atol=1e-5)

@names
def test_runs_resume_bit_for_bit_and_models_come_back(name, tmp_path):
    kw = dict(head=name, head_kw=SMALL[name] | (dict(every=1) if name == 'divide_conquer' else {}), sampler='m_per_class', epochs=3, batch_size=48, device='cpu', checkpoint_every='1 steps')
    whole = fit(TOY, **kw, out=tmp_path/'whole')
    class Killed(Exception): pass
    from hiermetric.training import Trainer
    for at in ((1, 0), (1, 2)):   # between two epochs, and in the middle of one
        out, save = tmp_path/f'killed{at}', Trainer.save
        def stop(self, *a):
            save(self, *a)
            if (self.epoch, self.step) == at: raise Killed
        Trainer.save = stop
        try:
            with pytest.raises(Killed): fit(TOY, **kw, out=out)
        finally: Trainer.save = save
        again = fit(TOY, **kw, out=out)
        assert again.history.drop(columns='seconds').equals(whole.history.drop(columns='seconds'))
        for (k, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()): assert torch.equal(a, b), k
    from hiermetric.heads import Model
    back = Model.load(tmp_path/'whole'/'model'); q = TOY.of('test')[0]
    assert torch.equal(back.node_probs(q), whole.model.node_probs(q)) and torch.equal(back.represent(q), whole.model.represent(q))
    assert whole.history.val_top1.iloc[-1] > 1.5/TAX.n_leaves and len(embeddings(back, TOY, 'test')) == len(q)

def test_clusters_are_made_anew_and_keep_their_numbers():
    head = made('divide_conquer', every=2); first = head.cluster.clone()
    assert set(first.tolist()) == {0, 1, 2} and first.shape == T.shape
    head.refresh(X, T); assert torch.equal(head.cluster, first)                     # only every second epoch
    with torch.no_grad(): head.project.layers[1].weight.add_(.05*torch.randn_like(head.project.layers[1].weight))
    head.refresh(X, T); kept = (head.cluster == first).float().mean()
    assert kept < 1 and kept == max((torch.tensor(p)[head.cluster] == first).float().mean() for p in itertools.permutations(range(3)))
    # a learner learns from its own images alone
    x, t = X[:60], T[:60]; head.rows = torch.arange(60); head.train()
    head.loss(x, t).backward(); whose = head.cluster[:60]
    x = x.clone().requires_grad_(); head.zero_grad(); parts = head.split(x)
    from hiermetric.multitask import mined_loss
    mined_loss(head.criteria[1], head.find, parts[1][whose == 1], t[whose == 1]).backward()
    assert (x.grad[whose != 1] == 0).all() and x.grad[whose == 1].abs().sum() > 0
    head.conclude(X, T); assert not len(head.cluster)

def test_learners_share_everything_where_nothing_is_clustered():
    torch.manual_seed(0); head = create_head('divide_conquer', X.shape[1], TAX, **SMALL['divide_conquer'], dropout=0.); x, t = batch()
    a = head.loss(x, t); head.rows = torch.arange(len(x)); assert torch.equal(a, head.loss(x, t))
    with pytest.raises(HiermetricError, match='not 3'): head.refresh(X[:2], T[:2])

@pytest.mark.parametrize('name,kw', [('diva', dict(pair_loss='tree_triplet', miner=None)), ('diva', dict(pair_loss='tree_triplet', miner='multi_label')), ('divide_conquer', dict(pair_loss='tree_supcon', miner=None)), ('bier', {}), ('sndl', {})])
def test_many_labels(name, kw):
    "Rows of labels in a bare loop, and whole paths in a run: images that share labels come together"
    head = made(name, **kw); y = TAX.multi_hot(T)[:, 1:]; head.prepare(X, T)
    for o in head.modules():
        if hasattr(o, 'memory') and isinstance(o.memory, torch.Tensor): o.prepare(y)
    overlap = (y.float()@y.T.float())/(y[:, None] | y).sum(2)
    def told():
        "How well the cosines follow the overlap of labels: their correlation over all pairs"
        with torch.no_grad(): r = head.eval().represent(X)
        head.train(); return float(torch.corrcoef(torch.stack([(r@r.T).flatten(), overlap.flatten()]))[0, 1])
    before, opt = told(), torch.optim.Adam(head.parameters(), 1e-2); g = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randperm(len(X), generator=g)[:48]; head.rows = rows
        opt.zero_grad(); loss = head.loss(X[rows], y[rows]); loss.backward(); opt.step(); assert loss.isfinite()
    assert told() > before + .1
    run = fit(TOY, name, head_kw=SMALL[name] | kw | dict(paths=True), sampler='m_per_class', epochs=1, batch_size=48, device='cpu')
    assert run.history.loss.notna().all()
    with pytest.raises(HiermetricError, match='one column for every node'): head.loss(X[:4], y[:4, :3])

def test_settings_that_make_no_sense():
    for name, kw, word in (('diva', dict(shared=-1.), 'at least 0'), ('diva', dict(weights=[1., 1.]), '4 parts and 2 weights'), ('divide_conquer', dict(dim=10, learners=3), 'shared evenly'),
                           ('bier', dict(sizes=[]), 'at least one part'), ('sndl', dict(ce=-1.), 'at least 0'), ('diva', dict(pair_loss='tripplet'), 'triplet'), ('diva', dict(dim=0), 'dimension')):
        with pytest.raises(HiermetricError, match=word): create_head(name, 8, TAX, **kw)
