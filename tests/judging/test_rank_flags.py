"Flags and reports by rank against loops."

import numpy as np, torch
from hypothesis import given, settings, strategies as st
from hiermetric.judging.rules import Rule, create_rule
from hiermetric.judging.rank_flags import rank_report
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.known import known_ancestor


def random_tree(nodes, rng):
    return Taxonomy.from_parents({'n0': None} | {f'n{i}': f'n{rng.integers(i)}' for i in range(1, nodes)})


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
