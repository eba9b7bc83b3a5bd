"Taxonomy and LabelGraph against slow and obvious versions, and every kind of bad input with its message"

import copy, csv, os, pickle, re, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from math import log2
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hiermetric import taxonomy
from hiermetric.core import HiermetricError
from hiermetric.taxonomy import LabelGraph, Names, Taxonomy, TaxonomyError, TaxonomyWarning

settings.register_profile('tree', max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('tree')


class Slow:
    "A tree as dictionaries of names, by definition"

    def __init__(self, parent):  # name → parent or None, in source order
        self.parent, self.kids = parent, {n: [c for c, p in parent.items() if p == n] for n in parent}
        self.root = next(n for n, p in parent.items() if p is None)
        self.order = self.walk(self.root)

    def walk(self, n):
        return [n] + [o for c in self.kids[n] for o in self.walk(c)]

    def up(self, n):
        return [n] if self.parent[n] is None else [n] + self.up(self.parent[n])

    def depth(self, n):
        return len(self.up(n)) - 1

    def height(self, n):
        return max([1 + self.height(c) for c in self.kids[n]], default=0)

    def leaves(self, n=None):
        return [o for o in self.walk(n or self.root) if not self.kids[o]]

    def lca(self, a, b):
        return next(o for o in self.up(a) if o in self.up(b))


@st.composite
def slow_trees(draw, most=40):
    "Ragged trees, chains, stars and single nodes, their nodes in any order"
    n, reach = draw(st.integers(1, most)), draw(st.sampled_from([1, 3, 10**6]))  # a reach of 1 makes a chain
    star = draw(st.booleans()) and reach > 3
    parent = {0: None, **{i: 0 if star else draw(st.integers(max(0, i - reach), i - 1)) for i in range(1, n)}}
    return Slow({f'n{i}': None if parent[i] is None else f'n{parent[i]}' for i in draw(st.permutations(range(n)))})


def pairs_of(slow):
    return [(a, b) for a in slow.order for b in slow.order][:: max(1, len(slow.order) ** 2 // 200)]


@given(slow_trees())
def test_numbering_and_arrays(slow):
    tax = Taxonomy.from_parents(slow.parent)
    assert list(tax.names) == slow.order and len(tax) == len(slow.order)
    for i, n in enumerate(slow.order):
        assert tax.index(n) == i and tax.depths[i] == slow.depth(n) and tax.heights[i] == slow.height(n)
        assert slow.order[i : tax.last[i] + 1] == slow.walk(n)
        assert [tax.leaf_names[j] for j in range(tax.leaf_start[i], tax.leaf_stop[i])] == slow.leaves(n)
        assert tax.parents[i] == (-1 if slow.parent[n] is None else slow.order.index(slow.parent[n]))
        assert tax.ancestors(i).tolist() == [slow.order.index(o) for o in reversed(slow.up(n))]
        assert tax.names[tax.children(i)] == slow.kids[n]
        assert tax.path(i) == '/'.join(reversed(slow.up(n))) and tax.index(tax.path(i)) == i
        assert tax.leaf_column[i] == (slow.leaves().index(n) if not slow.kids[n] else -1)
        assert tax.information[i] == pytest.approx(log2(len(slow.leaves())) - log2(len(slow.leaves(n))))
    assert (
        tax.height == slow.height(slow.root)
        and tax.n_leaves == len(slow.leaves())
        and tax.leaf_names == tuple(slow.leaves())
    )
    assert tax.names[tax.leaves] == slow.leaves()


@given(slow_trees())
def test_pairwise_queries(slow):
    tax, ab = Taxonomy.from_parents(slow.parent), pairs_of(slow)
    u, v = tax.index([a for a, _ in ab]), tax.index([b for _, b in ab])
    meet = [slow.lca(a, b) for a, b in ab]
    expected = {
        'lca': [slow.order.index(m) for m in meet],
        'edge_distance': [slow.up(a).index(m) + slow.up(b).index(m) for (a, b), m in zip(ab, meet)],
        'lca_height': [slow.height(m) for m in meet],
        'lca_depth_cost': [slow.height(slow.root) - slow.depth(m) for m in meet],
        'is_ancestor': [a in slow.up(b) for a, b in ab],
    }
    for name, want in expected.items():
        ask = getattr(tax, name)
        assert ask(u, v).tolist() == want, name
        got = ask(torch.tensor(u), torch.tensor(v))
        assert isinstance(got, torch.Tensor) and got.tolist() == want, name
        assert ask(*ab[-1]) == want[-1] and type(ask(int(u[0]), int(v[0]))) in (int, bool)
        assert ask(u[:, None], v[None]).shape == (len(u), len(v))


@given(slow_trees())
def test_cost_matrix_and_multi_hot(slow):
    tax = Taxonomy.from_parents(slow.parent)
    for cost in ('lca_height', 'lca_depth_cost', 'edge_distance'):
        assert (tax.cost_matrix(cost) == getattr(tax, cost)(tax.leaves[:, None], tax.leaves)).all() and tax.cost_matrix(
            cost
        ).shape == (tax.n_leaves,) * 2
    want = [[o in slow.up(n) for o in slow.order] for n in slow.order]
    assert (
        tax.multi_hot(np.arange(len(tax))).tolist() == want and tax.multi_hot(torch.arange(len(tax))).tolist() == want
    )
    assert tax.multi_hot(slow.order[:1]).tolist() == want[:1]


@given(slow_trees(), st.integers(0, 2**32 - 1))
def test_node_probs(slow, seed):
    tax = Taxonomy.from_parents(slow.parent)
    p = np.random.default_rng(seed).dirichlet(np.ones(tax.n_leaves), (2, 3))
    want = np.stack(
        [sum((p[..., tax.leaf_names.index(o)] for o in slow.leaves(n)), np.zeros((2, 3))) for n in slow.order], -1
    )
    np.testing.assert_allclose(tax.node_probs(p), want, atol=1e-14)
    np.testing.assert_allclose(tax.node_probs(torch.tensor(p)).numpy(), want, atol=1e-14)
    assert tax.node_probs(p[0, 0].astype(np.float32)).dtype == np.float32 and tax.node_probs(p[0, 0]).shape == (
        len(tax),
    )


floats = st.one_of(
    st.floats(0, 1),
    st.floats(0, 1e-30),
    st.sampled_from([0.0, 1.0, 5e-324, 1e-320, 2**-53, 2**-52, 1 - 2**-53, 1 / 3, 1e300]),
)


@given(slow_trees(), st.data())
def test_node_probs_are_coherent_for_any_input(slow, data):
    tax = Taxonomy.from_parents(slow.parent)
    p = np.array(data.draw(st.lists(floats, min_size=tax.n_leaves, max_size=tax.n_leaves)))
    with np.errstate(over='ignore'):
        for q in (
            tax.node_probs(p),
            tax.node_probs(p.clip(0, 1e30).astype(np.float32)),
            tax.node_probs(p.clip(0, 1).astype(np.float16)),
            tax.node_probs(torch.tensor(p)).numpy(),
            tax.node_probs(torch.tensor(p.clip(0, 1)).bfloat16()).float().numpy(),
        ):
            assert (q[1:] <= q[tax.parents[1:]]).all() and (q >= 0).all()


def test_node_probs_are_coherent_at_scale():
    rng = np.random.default_rng(0)
    tax = random_tree(50_000, rng)
    p = rng.exponential(size=(4, tax.n_leaves)).astype(np.float32) ** 12
    p /= p.sum(-1, keepdims=True)
    for q in (tax.node_probs(p), tax.node_probs(torch.tensor(p)).numpy()):
        assert (q[:, 1:] <= q[:, tax.parents[1:]]).all()
        np.testing.assert_allclose(q[:, 0], p.astype(float).sum(-1), rtol=1e-6)


@given(slow_trees(12))
@settings(max_examples=15)
def test_node_probs_gradient(slow):
    tax = Taxonomy.from_parents(slow.parent)
    p = torch.rand(2, tax.n_leaves, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tax.node_probs, (p,))
    weight = torch.randn(len(tax), dtype=torch.float64)
    (tax.node_probs(p) @ weight).sum().backward()
    by_hand = torch.tensor(tax.multi_hot(tax.leaves), dtype=torch.float64) @ weight
    torch.testing.assert_close(p.grad, by_hand.expand(2, -1))


@pytest.mark.parametrize(
    'bad, message',
    [
        (np.ones((2, 3)), 'Leaf probabilities have the shape (2, 3); the last size must be 2, the number of leaves.'),
        (torch.ones(2, 3), 'Leaf probabilities have the shape (2, 3); the last size must be 2, the number of leaves.'),
        (np.float64(1.0), 'Leaf probabilities have the shape (); the last size must be 2, the number of leaves.'),
        (np.array([0.5, np.nan]), 'Leaf probabilities hold NaN or a negative number.'),
        (torch.tensor([1.5, -0.5]), 'Leaf probabilities hold NaN or a negative number.'),
    ],
)
def test_node_probs_refuses(bad, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_paths({'a': '', 'b': ''}).node_probs(bad)


@given(slow_trees(), st.sampled_from(['uniform', 'balanced', 'deep', 'shallow']))
def test_level_weights(slow, scheme):
    tax = Taxonomy.from_parents(slow.parent)
    w = tax.level_weights(scheme)
    assert w[0] == 0 and w.sum() == pytest.approx(len(tax) - 1)
    for d in range(1, tax.height + 1):
        assert len(set(w[tax.depths == d].tolist())) == 1
    totals = [w[tax.depths == d].sum() for d in range(1, tax.height + 1)]
    if scheme == 'balanced' and totals:
        assert totals == pytest.approx([totals[0]] * len(totals))
    if scheme == 'deep':
        assert all(np.diff([w[tax.depths == d][0] for d in range(1, tax.height + 1)]) > 0)


@pytest.mark.parametrize(
    'scheme, message',
    [
        ([1, 2, 3], 'Level weights are 2 numbers, one for each level below the root'),
        ([0, 0], 'not all zero'),
        ([1, -1], 'none negative'),
        ([np.nan, 1], 'none negative'),
        ('deap', "There is no scheme 'deap'; there are uniform, balanced, deep, shallow. Did you mean 'deep'"),
    ],
)
def test_level_weights_refuse(scheme, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_paths({'a': 'b'}).level_weights(scheme)


# Other trees from a tree


def slow_prune(slow, keep=()):
    parent = dict(slow.parent)
    while one := next(
        (n for n, p in parent.items() if p is not None and n not in keep and list(parent.values()).count(n) == 1), None
    ):
        child = next(c for c, p in parent.items() if p == one)
        parent[child] = parent.pop(one)
    return parent


@given(slow_trees(), st.data())
def test_prune(slow, data):
    tax, keep = Taxonomy.from_parents(slow.parent), data.draw(st.lists(st.sampled_from(slow.order), max_size=3))
    for pruned, want in ((tax.prune(), slow_prune(slow)), (tax.prune(keep), slow_prune(slow, keep))):
        assert {n: p for n, p in zip(pruned.names, pruned.parents.tolist())} == {
            n: -1 if p is None else pruned.index(p) for n, p in want.items()
        }
        assert pruned.leaf_names == tax.leaf_names
        for i, n in enumerate(pruned.names):
            assert pruned.path(i, contracted=True) == tax.path(n)
    assert tax.prune(keep).prune() == tax.prune() and dict(tax.prune(keep).prune().contracted) == dict(
        tax.prune().contracted
    )


@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from('abc')), max_size=25))
def test_prune_with_repeated_names(nodes):
    names, parents, seen = ['r'], [-1], set()
    for k, name in nodes:
        if (key := (k % len(names), name)) not in seen:
            seen.add(key)
            names.append(name)
            parents.append(key[0])
    tax = Taxonomy(names, parents)
    pruned = tax.prune()
    assert [pruned.path(i, contracted=True) for i in pruned.leaves] == [tax.path(i) for i in tax.leaves]
    assert Taxonomy(pruned.names, pruned.parents) == pruned  # with its siblings checked
    single = set(np.flatnonzero(np.bincount(pruned.parents[1:], minlength=len(pruned)) == 1).tolist()) - {0}
    for i in single:  # it stays because its child would get a sibling of its own name
        kids = pruned.children(pruned.parents[i]).tolist()
        assert [*pruned.names[kids], *(pruned.names[k + 1] for k in kids if k in single)].count(pruned.names[i + 1]) > 1


@given(slow_trees(), st.data())
def test_subset(slow, data):
    tax, chosen = Taxonomy.from_parents(slow.parent), data.draw(st.lists(st.sampled_from(slow.leaves()), min_size=1))
    part = tax.subset(chosen)
    wanted = {o for n in chosen for o in slow.up(n)}
    assert set(part.names) == wanted and set(part.leaf_names) == set(chosen) and len(part) == len(wanted)
    assert [part.path(i) for i in range(len(part))] == [tax.path(n) for n in part.names]
    assert list(part.names) == [n for n in tax.names if n in wanted]
    assert tax.prune().subset(chosen).path(chosen[0], contracted=True) == tax.path(chosen[0])


@given(slow_trees())
def test_level_leaves(slow):
    tax = Taxonomy.from_parents(slow.parent)
    level = tax.level_leaves()
    assert (
        level.leaf_names == tax.leaf_names
        and set(level.depths[level.leaves].tolist()) == {tax.height}
        and level.height == tax.height
    )
    assert len(level) == len(tax) + sum(tax.height - slow.depth(n) for n in slow.leaves())
    for n in slow.order:
        mine, path = slow.up(n)[::-1], level.path(level.index(n)).split('/')
        assert path == mine if slow.kids[n] else path[: len(mine) - 1] == mine[:-1] and path[-1] == n
    assert (
        level.cost_matrix('lca_height') == level.cost_matrix('lca_depth_cost')
    ).all()  # the two agree on a level tree


def test_change_keeps_contracted():
    tax = Taxonomy.from_paths({'x': 'a/b/c', 'y': 'a/b/c', 'z': 'd'}).prune()
    assert {tax.names[k]: v for k, v in tax.contracted.items()} == {'c': ('a', 'b'), 'z': ('d',)}
    assert tax.level_leaves().path('z', contracted=True) == 'root/d/z@1/z'
    assert tax.subset(['x']).prune().path('x', contracted=True) == 'root/a/b/c/x'


@pytest.mark.parametrize(
    'leaves, message',
    [
        (['mammal'], "'mammal' is not a leaf; name leaves, such as 'cat', 'dog'."),
        ([], 'A subset without leaves would be empty; name at least one.'),
        (['cot'], "There is no 'cot' in the tree of 'root'. Did you mean 'cat'"),
    ],
)
def test_subset_refuses(leaves, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_paths({'cat': 'mammal', 'dog': 'mammal'}).subset(leaves)


# Names


def test_duplicate_names_by_path():
    with pytest.warns(
        TaxonomyWarning,
        match=re.escape("1 names stand under several parents and want their path to be found: 'other'."),
    ):
        tax = Taxonomy.from_paths([('fish', 'other'), ('bird', 'other')])
    assert (
        tax.index('fish/other') == 2
        and tax.index('root/bird/other') == 4
        and tax.index(['bird/other', 'fish/other', 'bird']).tolist() == [4, 2, 3]
    )
    for ask in (lambda: tax.index('other'), lambda: tax.index(['fish', 'other']), lambda: tax.lca('other', 'fish')):
        with pytest.raises(
            TaxonomyError,
            match=re.escape("'other' is the name of 2 nodes, 'root/fish/other', 'root/bird/other'; give the path."),
        ):
            ask()


def test_names_with_slashes():
    tax = Taxonomy.from_parents({'r': None, 'knife/fork': 'r', 'fork': 'r', 'a': 'knife/fork', 'knife': 'r'})
    assert (
        tax.names[tax.index('knife/fork')] == 'knife/fork'
        and tax.names[tax.index('knife/fork/a')] == 'a'
        and tax.names[tax.index('r/knife/fork')] == 'knife/fork'
    )


def test_root_name_twice_is_ambiguous():
    tax = Taxonomy(['Plankton', 'Plankton'], [-1, 0])
    with pytest.raises(
        TaxonomyError, match=re.escape("'Plankton' is the name of 2 nodes, 'Plankton', 'Plankton/Plankton'")
    ):
        tax.index('Plankton')
    assert tax.index('Plankton/Plankton') == 1


@given(
    st.lists(st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=8), max_size=30)
)  # numpy's own strings lose a NUL at the end
def test_names_are_a_sequence(texts):
    names = Taxonomy(['r', *(f'{i}{o}' for i, o in enumerate(texts))], [-1] + [0] * len(texts)).names
    texts = ['r', *(f'{i}{o}' for i, o in enumerate(texts))]
    assert (
        list(names) == texts == names
        and len(names) == len(texts)
        and names[-1] == texts[-1]
        and names[1:3] == texts[1:3]
        and names[np.array([0])] == ['r']
    )
    assert (
        names[np.int64(0)] == 'r'
        and np.array(names).tolist() == texts
        and texts[-1] in names
        and isinstance(names, Names)
    )
    with pytest.raises(IndexError):
        names[len(texts)]


def test_unknown_names_and_ids():
    tax = Taxonomy.from_paths({'house cat': 'mammal', 'dog': 'mammal'})
    for ask, message in (
        (lambda: tax.index('house-cat'), "There is no 'house-cat' in the tree of 'root'. Did you mean 'house cat'?"),
        (lambda: tax.index(['dog', 'frog']), "There is no 'frog'"),
        (lambda: tax.path(9), 'There is no node 9; the tree has nodes 0 … 3.'),
        (lambda: tax.lca([0, -1], 2), 'There is no node -1; the tree has nodes 0 … 3.'),
        (lambda: tax.lca(torch.tensor([4]), 0), 'There is no node 4'),
        (lambda: tax.multi_hot([0.5]), 'Node ids are integers, not float64.'),
        (lambda: tax.index('mammal/frog'), "There is no 'mammal/frog'"),
        (lambda: tax.index(5), "There is no '5'"),
        (lambda: tax.index(['dog', None]), "There is no ''"),
        (lambda: tax.lca(torch.tensor([0.5]), 0), 'Node ids are integers, not torch.float32.'),
        (lambda: tax.lca(np.array([True]), 0), 'Node ids are integers, not bool.'),
        (
            lambda: tax.cost_matrix('lca'),
            "There is no cost 'lca'; there are lca_height, lca_depth_cost, edge_distance.",
        ),
    ):
        with pytest.raises(TaxonomyError, match=re.escape(message)):
            ask()
    assert (
        tax.index([]).shape == (0,)
        and tax.lca([], []).shape == (0,)
        and tax.index(np.array(['dog', 'dog'])).tolist() == [3, 3]
    )


def test_suggestions_in_a_large_tree():
    tax = Taxonomy(['root', *(f'taxon {i}' for i in range(30_000))], [-1] + [0] * 30_000)
    with pytest.raises(TaxonomyError, match="There is no 'taxom 29999' in the tree of 'root'"):
        tax.index('taxom 29999')


# Sources


def test_sources_agree(tmp_path):
    want = Taxonomy(['root', 'fish', 'cod', 'ray', 'bird', 'owl'], [-1, 0, 1, 1, 0, 4])
    (tmp_path / 'lineage.csv').write_text('id,class,lineage\n1,cod,fish\n2,ray,fish\n3,owl,bird\n')
    (tmp_path / 'ranks.csv').write_text('class;species\nfish;cod\nfish;ray\nbird;owl\n')
    (tmp_path / 'tree.nwk').write_text('\ufeff((cod,ray)fish,(owl)bird)root;\n')
    for o in ('fish/ray', 'fish/cod', 'bird/owl'):
        (tmp_path / 'f' / o).mkdir(parents=True)
    trees = [
        Taxonomy.from_parents(
            {'root': None, 'fish': 'root', 'cod': 'fish', 'ray': 'fish', 'bird': 'root', 'owl': 'bird'}
        ),
        Taxonomy.from_edges(
            [('root', 'fish'), ('fish', 'cod'), ('fish', 'ray'), ('root', 'bird'), ('bird', 'owl'), ('fish', 'cod')]
        ),
        Taxonomy.from_paths({'cod': 'fish', 'ray': ('fish',), 'owl': ['bird']}),
        Taxonomy.from_paths(['fish/cod', 'fish/ray', 'bird/owl', 'fish/cod']),
        Taxonomy.from_paths([('fish', 'cod'), ('fish', 'ray'), ('bird', 'owl'), ('bird',)]),
        Taxonomy.from_csv(tmp_path / 'lineage.csv'),
        Taxonomy.from_csv(tmp_path / 'ranks.csv', ranks=['class', 'species']),
        Taxonomy.from_newick(tmp_path / 'tree.nwk'),
        Taxonomy.from_newick(str(tmp_path / 'tree.nwk')),
        Taxonomy.from_newick("((cod:1e-3,ray)fish:1,(owl[&&NHX:S=x])bird);"),
    ]
    for k, tax in enumerate(trees):
        assert tax == want, k
    assert Taxonomy.from_folder(tmp_path / 'f').names == ['root', 'bird', 'owl', 'fish', 'cod', 'ray']


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: Taxonomy.from_parents({}), 'The tree is empty; give it at least a root.'),
        (lambda: Taxonomy.from_edges([]), 'The tree is empty; give it at least a root.'),
        (lambda: Taxonomy.from_paths([]), 'The tree is empty; give it at least one class.'),
        (lambda: Taxonomy.from_newick(';'), 'The Newick tree is empty; give it at least one leaf.'),
        (lambda: LabelGraph([]), 'The graph is empty; give it at least one edge.'),
        (
            lambda: Taxonomy.from_parents({'cat': 'mammal', 'cat ': 'pet', 'mammal': None, 'pet': 'mammal'}),
            "'cat' has two parents, 'mammal' and 'pet', and a tree allows one: two taxa of one name are told "
            "apart by paths (Taxonomy.from_paths), and for one class below both LabelGraph(edges).to_tree() "
            "chooses by a rule.",
        ),
        (
            lambda: Taxonomy.from_edges([('mammal', 'cat'), ('pet', 'cat')]),
            "'cat' has two parents, 'mammal' and 'pet', and a tree allows one: two taxa of one name are told "
            "apart by paths (Taxonomy.from_paths), and for one class below both LabelGraph(edges).to_tree() "
            "chooses by a rule.",
        ),
        (
            lambda: Taxonomy.from_edges([('mammal', 'cat'), (None, 'cat')]),
            "'cat' has two parents, 'mammal' and none, and a tree allows one",
        ),
        (
            lambda: Taxonomy.from_parents({'cat': 'mammal', 'mammal': None, 'wasp': None}),
            "There are 2 roots ('mammal', 'wasp') and a tree has one; root='name' puts one above them.",
        ),
        (
            lambda: Taxonomy.from_parents({'mammal': None, 'wasp': None}, root='wasp'),
            "'wasp' cannot be put above the roots because a node has that name; choose another.",
        ),
        (
            lambda: Taxonomy.from_parents({'cat': 'mamal', 'mammal': None}),
            "'cat' has the parent 'mamal', which is not in the tree. Did you mean 'mammal'? Add it as a node of "
            "its own, with the parent None if it is the root.",
        ),
        (
            lambda: Taxonomy.from_parents({'a': 'b', 'b': 'c', 'c': 'a'}),
            'The tree has a cycle, from child to parent: a → b → c → a; take one of these edges out.',
        ),
        (
            lambda: Taxonomy.from_parents({'r': None, 'a': 'b', 'b': 'b'}),
            'The tree has a cycle, from child to parent: b → b; take one of these edges out.',
        ),
        (
            lambda: Taxonomy.from_edges([(f'n{i}', f'n{(i + 1) % 20}') for i in range(20)]),
            'from child to parent: n0 → n19 → n18 → n17 → n16 → n15 → n14 → n13 → … → n0;',
        ),
        (
            lambda: Taxonomy.from_parents({'a': None, ' ': 'a'}),
            'Row 1 (counted from 0) has a blank name; name it or remove it.',
        ),
        (lambda: Taxonomy.from_edges([('a', None)]), 'Row 0 (counted from 0) has a blank name; name it or remove it.'),
        (lambda: Taxonomy.from_paths({'cat': 'a', '\ufeff ': 'b'}), 'Path 1 (counted from 0) ends in a blank: '),
        (
            lambda: Taxonomy.from_paths([('a', '')]),
            "Path 0 (counted from 0) ends in a blank: ['a', '']; name its class or remove it.",
        ),
        (lambda: Taxonomy.from_paths([()]), 'Path 0 (counted from 0) ends in a blank: []'),
        (
            lambda: Taxonomy.from_paths({'root': ''}, root='root'),
            "A node has the name 'root' of the root above all classes; choose another with root='…'.",
        ),
        (lambda: Taxonomy(['a'], [-1, 0]), 'There are 1 names and 2 parents; every node has one of each.'),
        (lambda: Taxonomy(['a', 'b'], [-1, 2]), "'b' has the parent number 2; nodes are 0 … 1, and −1 marks the root."),
        (lambda: Taxonomy(['a', 'b'], [-1, -2]), "'b' has the parent number -2"),
        (lambda: Taxonomy(['a', 'b'], [-1, 2**40]), "'b' has the parent number 1099511627776"),
        (
            lambda: Taxonomy(['a', 'b'], [-1, 0.5]),
            'Parents are positions, which are integers, not float64; −1 marks the root.',
        ),
        (lambda: Taxonomy(['a', 'b', 'b'], [-1, 0, 0]), "'a' has two children named 'b'; give them different names."),
        (lambda: Taxonomy.from_newick('((a,b)c,d'), 'a bracket is not closed'),
        (lambda: Taxonomy.from_newick('(a,b))c;'), 'more brackets close than open'),
        (lambda: Taxonomy.from_newick('(a,b);(c,d)'), 'something follows the end of the tree'),
        (
            lambda: Taxonomy.from_newick('(a,b);(c,d);', tree=3),
            'There is no tree 3; the source holds 2, counted from 1.',
        ),
        (lambda: Taxonomy.from_newick('(a:x,b);'), 'a branch length is not a number'),
        (lambda: Taxonomy.from_newick('(a(b,c));'), 'a bracket opens after a label'),
        (
            lambda: Taxonomy.from_newick('((a,),b);'),
            "A leaf of the Newick tree has no label (below 'an unnamed node', after 'a'); name it.",
        ),
        (lambda: Taxonomy.from_newick("(a,'b);"), 'opens a quote or a comment that does not end'),
        (lambda: Taxonomy.from_newick('(a[b,c);'), 'opens a quote or a comment that does not end'),
        (lambda: Taxonomy.from_newick('(a,a);'), "'root' has two children named 'a'"),
        (lambda: Taxonomy.from_newick('nowhere.nwk'), 'There is no file nowhere.nwk, and it is no Newick text either'),
        (lambda: Taxonomy.from_folder('/nowhere/at all'), 'There is no folder /nowhere/at all.'),
        (lambda: Taxonomy.from_csv('/nowhere.csv'), 'There is no file /nowhere.csv.'),
        (lambda: Taxonomy.load('/nowhere.tree'), 'There is no file /nowhere.tree.'),
        (
            lambda: LabelGraph([('a', 'b'), ('b', 'c'), ('c', 'a')]),
            'The graph has a cycle, from parent to child: a → b → c → a; take one of these edges out.',
        ),
        (
            lambda: LabelGraph([('a', 'a')]),
            'The graph has a cycle, from parent to child: a → a; take one of these edges out.',
        ),
        (
            lambda: LabelGraph([('a', 'b'), ('a', ' ')]),
            'A blank name stands in the graph (in edge 1, counted from 0); name it or remove it.',
        ),
        (
            lambda: LabelGraph([('a', 'c'), ('b', 'c')]).to_tree(),
            "There are 2 roots ('a', 'b') and a tree has one; root='name' puts one above them.",
        ),
        (
            lambda: LabelGraph([('a', 'b')]).to_tree('longst'),
            "There is no policy 'longst'; there are first, shortest, longest, balanced. Did you mean 'longest'",
        ),
    ],
)
def test_bad_trees(make, message):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TaxonomyWarning)
        with pytest.raises(HiermetricError, match=re.escape(message)):
            make()


@pytest.mark.parametrize(
    'text, kw, message',
    [
        ('class,lineage\n', {}, 'The tree is empty; give it at least one class.'),
        ('', {}, "has no column 'lineage'; it has none."),
        ('name,lineage\ncat,mammal\n', {}, "has no column 'class'; it has 'name', 'lineage'."),
        (
            'class,linage\ncat,a/b\n',
            {},
            "has no column 'lineage'; it has 'class', 'linage'. Did you mean 'linage'? Give a class and its "
            "lineage, or a label and columns that are named after ranks",
        ),
        ('class,lineage\ncat,mammal\n ,mammal\n', {}, ', line 3: the class is blank; name it or remove the line.'),
        (
            'class,lineage\nknife, fork,tool\n',
            {},
            ", line 2: 3 cells under a header of 2; put quotes around a name that holds ','.",
        ),
        ('class,lineage\ncat\n', {}, ', line 2: 1 cells under a header of 2'),
        (
            'class,lineage\n"cat,mammal\ndog,mammal\n',
            {},
            'unexpected end of data; put quotes around the whole cell or nowhere.',
        ),
        ('class,lineage\n"cat"s,mammal\n', {}, "line 2: ',' expected after '\"'; put quotes"),
        (
            'kingdom,species\nAnimalia,cat\n',
            dict(ranks=['kingdom', 'specie']),
            "has no column 'specie'; it has 'kingdom', 'species'. Did you mean 'species'",
        ),
        ('kingdom,species\n,\n', dict(ranks=['kingdom', 'species']), 'The tree is empty; give it at least one class.'),
    ],
)
@pytest.mark.filterwarnings('ignore::hiermetric.taxonomy.TaxonomyWarning')
def test_bad_tables(tmp_path, text, kw, message):
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(TaxonomyError, match=re.escape(message)) as e:
        Taxonomy.from_csv(tmp_path / 't.csv', **kw)
    if 'empty' not in message:
        assert str(tmp_path / 't.csv') in str(e.value)


def test_table_that_is_not_utf8(tmp_path):
    (tmp_path / 't.csv').write_bytes('class,lineage\nÄsche,fish\n'.encode('latin-1'))
    with pytest.raises(TaxonomyError, match=r'is not UTF-8 \(.* at byte \d+\); save it as UTF-8\.'):
        Taxonomy.from_csv(tmp_path / 't.csv')


def test_names_are_cleaned_and_counted(tmp_path):
    (tmp_path / 't.csv').write_text(
        '\ufeff class , lineage\n  cod,fish/ ray-finned \n"knife, ""fork""",tool\ne\u0301te\u0301,\n', encoding='utf-8'
    )
    with pytest.warns(
        TaxonomyWarning,
        match=re.escape(
            "3 names were cleaned of blanks around them, byte-order marks or split accents: ' ray-finned ', '  "
            "cod', 'e\u0301te\u0301'."
        ),
    ):
        tax = Taxonomy.from_csv(tmp_path / 't.csv')
    assert [tax.path(i) for i in tax.leaves] == [
        'root/fish/ray-finned/cod',
        'root/tool/knife, "fork"',
        'root/\u00e9t\u00e9',
    ]
    assert tax.index('e\u0301te\u0301 ') == tax.index('\u00e9t\u00e9')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Taxonomy.from_paths({'cat': 'a/b', 'dog': None, 'cow': float('nan')})


def test_null_ranks_are_skipped_not_dropped(tmp_path):
    rows = [
        ('Animalia', '', 'Corvidae', 'Pica', 'Pica pica'),
        ('Animalia', 'NA', 'Corvidae', 'null', 'Corvus sp.'),
        ('Animalia', 'Aves', 'nan', '', ''),
        ('', '', '', '', ''),
        ('None', r'\N', 'n/a', 'NaN', ' '),
    ]
    with (tmp_path / 't.tsv').open('w') as f:
        w = csv.writer(f, delimiter='\t')
        w.writerow('kingdom class family genus species'.split())
        w.writerows(rows)
    with pytest.warns(TaxonomyWarning, match=r't\.tsv: 2 lines without any rank were left out \(lines 5, 6\)\.'):
        tax = Taxonomy.from_csv(tmp_path / 't.tsv', ranks='kingdom class family genus species'.split())
    assert [tax.path(i) for i in tax.leaves] == [
        'root/Animalia/Corvidae/Pica/Pica pica',
        'root/Animalia/Corvidae/Corvus sp.',
        'root/Animalia/Aves',
    ]
    (tmp_path / 'u.csv').write_text('common,class,species\ncat,Mammalia,Felis catus\nwasp,Insecta,\n')
    assert Taxonomy.from_csv(tmp_path / 'u.csv', name='common', ranks=['class', 'species']).names == [
        'root',
        'Mammalia',
        'Felis catus',
        'cat',
        'Insecta',
        'wasp',
    ]


def test_tabs_do_not_swallow_quotes(tmp_path):
    (tmp_path / 't.tsv').write_text('class\tlineage\n"Candidatus x\tbacteria\ny\tbacteria\n')
    assert Taxonomy.from_csv(tmp_path / 't.tsv').leaf_names == ('"Candidatus x', 'y')


def test_folders(tmp_path):
    for o in ('ä/b', 'ä/.git/x', '__MACOSX/ä', 'c'):
        (tmp_path / o).mkdir(parents=True)
    (tmp_path / 'c' / 'picture.png').touch()
    assert Taxonomy.from_folder(tmp_path, root='all').names == ['all', 'c', 'ä', 'b']
    with pytest.raises(TaxonomyError, match='holds no folders; make one for each class'):
        Taxonomy.from_folder(tmp_path / 'c')


def test_newick_labels():
    tax = Taxonomy.from_newick("""((a_b:0.1[100],'it''s, (so)':2e-3)'100':1,("x y",Homo sapiens,(c)))[&R]top:0;""")
    assert [tax.path(i) for i in tax.leaves] == [
        'top/100/a_b',
        "top/100/it's, (so)",
        'top/x y…c/x y',
        'top/x y…c/Homo sapiens',
        'top/x y…c/c…c/c',
    ]
    assert (
        Taxonomy.from_newick('alone;').leaf_names == ('alone',)
        and Taxonomy.from_newick('(a,b);', root='life').names[0] == 'life'
    )
    assert Taxonomy.from_newick('((a,b)0.98,(c,d)1e-2)x;', support=True).names == [
        'x',
        'a…b',
        'a',
        'b',
        'c…d',
        'c',
        'd',
    ]


@pytest.mark.parametrize(
    'text, names',
    [
        ('(((A,B)95:0.1,C)88:0.1,(D,E)77:0.2);', 'root A…C A…B A B C D…E D E'),
        ('[&R] ((A,B)100:0.1,(C,D)100:0.2)100;', 'root A…B A B C…D C D'),
        ('((A,B)95.2/100,(C,D)E)1e-3%;', 'root A…B A B E C D'),
        ('((A, B)x [comment [nested] more],C)y;', 'y x A B C'),
        ('((A:1e-5,B:),C:0);', 'root A…B A B C'),
        ('((A,B){0}:0.1{1},C:2{2})y{3};', 'y A…B A B C'),
        ("(('a','b')'a/b group',c)r;", 'r a/b group a b c'),
    ],
)
def test_newick_as_programs_write_it(text, names):
    assert ' '.join(Taxonomy.from_newick(text).names) == names


@pytest.mark.parametrize(
    'text, message',
    [
        ('(a:1 b:2,c:1)r;', 'Newick, character 5: something follows a branch length'),
        ('(a:1,b:2\n00)r;', 'Newick, character 9: something follows a branch length'),
        ('(a:1(b,c))r;', 'Newick, character 4: something follows a branch length'),
        ('(a[x[y],b);', 'character 2: \'[x[y],b);\' opens a quote or a comment that does not end'),
    ],
)
def test_newick_that_would_be_misread(text, message):
    with pytest.raises(TaxonomyError, match=re.escape(message)):
        Taxonomy.from_newick(text)


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16'])
def test_newick_that_is_not_utf8(tmp_path, encoding):
    (tmp_path / 't.nwk').write_bytes('((Caféa,B)x,C)y;'.encode(encoding))
    with pytest.raises(TaxonomyError, match=r't\.nwk is not UTF-8 \(.* at byte \d\); save it as UTF-8\.'):
        Taxonomy.from_newick(tmp_path / 't.nwk')


@given(slow_trees())
def test_newick_round_trip(slow):
    def text(n):
        return (f"({','.join(map(text, slow.kids[n]))})" if slow.kids[n] else '') + n

    assert Taxonomy.from_newick(text(slow.root) + ';') == Taxonomy.from_parents(slow.parent)


@given(slow_trees())
def test_edges_and_paths_agree(slow):
    tax = Taxonomy.from_parents(slow.parent)
    if len(tax) == 1:
        return
    ordered = [(slow.parent[n], n) for n in slow.order if slow.parent[n]]
    assert Taxonomy.from_edges(ordered) == tax
    assert Taxonomy.from_paths([slow.up(n)[::-1][1:] for n in slow.leaves()], root=slow.root) == tax


# Graphs


@st.composite
def dags(draw):
    n = draw(st.integers(2, 14))
    return [
        (f'n{p}', f'n{c}')
        for c in range(1, n)
        for p in draw(st.lists(st.integers(0, c - 1), min_size=1, max_size=3, unique=True))
    ]


@given(dags())
def test_graph_policies(edges):
    graph = LabelGraph(edges)
    parents = {}
    [parents.setdefault(c, []).append(p) for p, c in edges]
    kids = {}
    [kids.setdefault(p, []).append(c) for p, c in edges]
    nodes = list(dict.fromkeys(o for e in edges for o in e))

    def paths(n):
        return [[*o, n] for p in parents[n] for o in paths(p)] if n in parents else [[n]]

    def below(n):
        return {n} if n not in kids else set().union(*map(below, kids[n]))

    assert sorted(graph.graph.nodes()) == sorted(nodes) and graph.graph.num_edges() == len(edges)
    assert graph.leaf_paths().paths.to_dict() == {n: len(paths(n)) for n in nodes if n not in kids}
    for policy in ('first', 'shortest', 'longest', 'balanced'):
        tree, dropped = graph.to_tree(policy), graph.dropped(policy)
        assert len(tree) == len(nodes) and len(dropped) == len(edges) - len(nodes) + 1
        kept = {(tree.names[p], n) for n, p in zip(tree.names, tree.parents.tolist()) if p >= 0}
        assert (
            kept | set(zip(dropped.parent, dropped.child)) == set(edges)
            and set(zip(dropped.kept, dropped.child)) <= kept
        )
        for n, p in zip(tree.names, tree.parents.tolist()):
            if policy == 'shortest':
                assert tree.depths[tree.index(n)] == min(map(len, paths(n))) - 1
            if policy == 'longest':
                assert tree.depths[tree.index(n)] == max(map(len, paths(n))) - 1
            if policy == 'first' and p >= 0:
                assert tree.names[p] == parents[n][0]
            if policy == 'balanced' and p >= 0:
                assert tree.names[p] == max(parents[n], key=lambda o: len(below(o)))
        real = {n for n in nodes if n not in kids}
        assert {tree.names[i] for i in tree.hollow} == set(tree.leaf_names) - real and set(
            tree.prune().leaf_names
        ) == real
        assert 1 not in np.bincount(tree.prune().parents[1:], minlength=1)[1:] and not tree.prune().hollow


def test_hollow_nodes(tmp_path):
    tree = LabelGraph([('r', 'a'), ('r', 'b'), ('b', 'c'), ('a', 'x'), ('c', 'x'), ('a', 'y')]).to_tree()
    assert tree.names[list(tree.hollow)] == ['c'] and 'c' in tree.leaf_names
    assert set(tree.prune().leaf_names) == {'x', 'y'} and 'b' not in tree.prune().names
    assert tree.prune(keep=['c']).path('c', contracted=True) == 'r/b/c'
    for same in (Taxonomy.load(tree.save(tmp_path / 't')), pickle.loads(pickle.dumps(tree))):
        assert same.hollow == tree.hollow
    level = tree.level_leaves()
    assert level.names[list(level.hollow)] == ['c']
    assert (
        tree.subset(['x', 'c']).names[list(tree.subset(['x', 'c']).hollow)] == ['c'] and not tree.subset(['x']).hollow
    )
    assert LabelGraph([], nodes=['alone']).to_tree().names == ['alone']
    two = LabelGraph([('r1', 'a'), ('r2', 'a'), ('r2', 'b'), ('r3', 'a')]).to_tree(root='all')
    assert two.names[list(two.hollow)] == ['r3']


# Persistence, immutability, processes


def fancy():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Taxonomy.from_paths(
            [
                ('Fische', 'Äsche 🐟'),
                ('Vögel', 'other'),
                ('Fische', 'other'),
                ('日本', 'x', 'コイ'),
                ('line\nbreak', 'tab\there'),
            ]
        ).prune()


@given(slow_trees())
def test_save_and_load(tmp_path_factory, slow):
    path = tmp_path_factory.mktemp('t') / 'any.suffix'
    for tax in (Taxonomy.from_parents(slow.parent), Taxonomy.from_parents(slow.parent).prune()):
        back = Taxonomy.load(tax.save(path))
        assert (
            back == tax
            and list(back.names) == list(tax.names)
            and dict(back.contracted) == dict(tax.contracted)
            and (back.last == tax.last).all()
        )
    assert [o.name for o in path.parent.iterdir()] == ['any.suffix']


def test_fancy_names_survive(tmp_path):
    tax = fancy()
    back = Taxonomy.load(tax.save(tmp_path / 'ä ö.tree'))
    assert (
        back == tax
        and list(back.names) == list(tax.names)
        and back.contracted == tax.contracted
        and back.index('Fische/other') == tax.index('Fische/other') > 0
    )
    assert tax.path('コイ', contracted=True) == 'root/日本/x/コイ'


def test_damaged_files(tmp_path):
    path = fancy().save(tmp_path / 't')
    whole = path.read_bytes()
    for k in range(0, len(whole), 11):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 255]) + whole[k + 1 :])
        try:
            assert Taxonomy.load(path) == fancy()  # a byte that carries nothing, such as a time stamp
        except TaxonomyError as e:
            assert 'is no taxonomy file, or a damaged one' in str(e)
    for part in (whole[: len(whole) // 2], b'', b'hello'):
        path.write_bytes(part)
        with pytest.raises(TaxonomyError, match='is no taxonomy file, or a damaged one'):
            Taxonomy.load(path)
    np.savez(path.open('wb'), parents=[-1])
    with pytest.raises(TaxonomyError, match='is no taxonomy file, or a damaged one'):
        Taxonomy.load(path)
    np.savez(path.open('wb'), parents=np.array([{}], object))
    with pytest.raises(TaxonomyError, match='is no taxonomy file, or a damaged one'):
        Taxonomy.load(path)


def test_immutable():
    tax = fancy()
    for name in (
        'parents',
        'depths',
        'heights',
        'last',
        'leaves',
        'leaf_start',
        'leaf_stop',
        'leaf_column',
        '_labels',
        'information',
    ):
        a = getattr(tax, name)
        with pytest.raises(ValueError, match='read-only'):
            a[0] = 0
        with pytest.raises(
            TaxonomyError, match=f"A taxonomy does not change, so '{name}' cannot be set; build a new one."
        ):
            setattr(tax, name, a)
    with pytest.raises(TypeError):
        tax.contracted[0] = ()


def test_identity():
    a = Taxonomy.from_paths({'x': 'p', 'y': 'p'})
    b = Taxonomy.from_edges([('root', 'p'), ('p', 'x'), ('p', 'y')])
    assert a == b and hash(a) == hash(b) and {a: 1}[b] == 1 and a != 'a' and a.fingerprint == b.fingerprint
    different = [
        Taxonomy.from_paths({'y': 'p', 'x': 'p'}),
        Taxonomy.from_paths({'x': 'p', 'y': 'q'}),
        Taxonomy.from_paths({'x': 'p', 'y': ''}),
        Taxonomy.from_paths({'x': 'p', 'z': 'p'}),
        Taxonomy(['root', 'px', '', 'y'], [-1, 0, 1, 1]),
    ]
    assert len({a.fingerprint, *(o.fingerprint for o in different)}) == 6
    assert a.fingerprint == '895e7583af2b32e2', 'a stored fingerprint must stay valid from release to release'
    assert (
        copy.copy(a) is a
        and copy.deepcopy(a) is a
        and pickle.loads(pickle.dumps(a)) == a
        and repr(a) == f"Taxonomy('root': 4 nodes, 2 leaves, height 2, {a.fingerprint})"
    )


def random_tree(n, rng, depth=40):
    parents, depths = np.full(n, -1), np.zeros(n, int)
    for i in range(1, n):
        p = int(rng.integers(max(0, i - 50), i))
        while depths[p] >= depth:
            p = int(parents[p])
        parents[i], depths[i] = p, depths[p] + 1
    return Taxonomy(map(str, range(n)), parents)


@pytest.fixture(scope='module')
def large():
    return random_tree(20_000, np.random.default_rng(1))


def climb(tax, u, v):
    while (m := u != v).any():
        lift_u = m & (tax.depths[u] >= tax.depths[v])
        lift_v = m & (tax.depths[v] >= tax.depths[u])
        u, v = np.where(lift_u, tax.parents[u], u), np.where(lift_v, tax.parents[v], v)
    return u


def test_lca_of_many_pairs(large):
    u, v = np.random.default_rng(2).integers(0, len(large), (2, 300_001))
    want = climb(large, u, v)
    for a, b in ((u, v), (u.astype(np.int32), v), (u.astype(np.uint16), v), (u[::-1][::-1], v)):
        assert (large.lca(a, b) == want).all()
    assert (large.lca(torch.tensor(u), torch.tensor(v)).numpy() == want).all() and large.lca(u, v).dtype == np.int64
    assert (large.lca(u[:500, None], v[:600]) == climb(large, *np.broadcast_arrays(u[:500, None], v[:600]))).all()


def test_lca_from_many_threads(large):
    u, v = np.random.default_rng(3).integers(0, len(large), (2, 200_000))
    fresh = Taxonomy(large.names, large.parents)  # nothing cached yet
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: fresh.lca(u, v), range(16)))
    assert all((o == results[0]).all() for o in results) and (results[0] == climb(large, u, v)).all()


def test_deep_and_wide_trees():
    n = 100_000
    chain, star = Taxonomy(map(str, range(n)), np.arange(n) - 1), Taxonomy(map(str, range(n)), [-1] + [0] * (n - 1))
    assert (
        chain.height == n - 1
        and chain.lca(77, [99_999, 5]).tolist() == [77, 5]
        and chain.node_probs([1.0]).tolist() == [1.0] * n
    )
    assert (
        star.height == 1
        and star.lca([1, 2], [1, 3]).tolist() == [1, 0]
        and len(chain.prune()) == 2
        and len(star.prune()) == n
    )
    assert Taxonomy(map(str, range(n)), [*range(1, n), -1]).names[0] == str(n - 1)


def test_torch_dtypes_and_empty():
    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': ''})
    assert (
        tax.lca(torch.tensor([2], dtype=torch.int32), 3).dtype == torch.int64
        and tax.edge_distance(torch.tensor(2), torch.tensor(3)).item() == 2
    )
    assert (
        tax.multi_hot(torch.tensor([], dtype=torch.long)).shape == (0, 5)
        and tax.node_probs(torch.zeros(0, 3)).shape == (0, 5)
        and tax.node_probs(np.zeros((0, 3))).shape == (0, 5)
    )
    assert tax.tensor('information').dtype == torch.float64 and tax.tensor('leaves').tolist() == tax.leaves.tolist()


def run(code, **env):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, **env}
    ).stdout.strip()


def test_import_is_light():
    code = (
        "import sys, hiermetric.taxonomy as t; tax = t.Taxonomy.from_paths({'a':'b','c':'b'}); tax.lca('a','c'); "
        "tax.node_probs([.5,.5]); print([m for m in "
        "('torch','pandas','numba','rustworkx','matplotlib','scipy','plotly') if m in sys.modules])"
    )
    assert run(code) == '[]'


def test_index_does_not_depend_on_the_hash_seed(tmp_path):
    path = fancy().save(tmp_path / 't')
    code = (
        f"from hiermetric.taxonomy import Taxonomy; t = Taxonomy.load({str(path)!r}); print(t.index(t.path(3)), "
        "t.fingerprint)"
    )
    assert {run(code, PYTHONHASHSEED=str(k)) for k in range(3)} == {f'3 {fancy().fingerprint}'}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork here')
def test_lca_after_fork(large):
    u, v = np.random.default_rng(4).integers(0, len(large), (2, 200_000))
    want = large.lca(u, v)
    pid = os.fork()
    if not pid:
        os._exit(0 if (large.lca(u, v) == want).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize('hashed', [len, lambda name: 0, lambda name: -len(name)])
def test_names_whose_hashes_collide(monkeypatch, hashed):
    monkeypatch.setattr(taxonomy, 'hash', hashed, raising=False)
    slow = Slow({'r': None, 'a': 'r', 'b': 'a', 'cc': 'a', 'dd': 'cc', 'e': 'r'})
    tax = Taxonomy.from_parents(slow.parent)
    assert (
        list(tax.names) == slow.order and tax.index(slow.order).tolist() == list(range(6)) and tax.index('a/cc/dd') == 4
    )
    assert Taxonomy.from_edges([(p, c) for c, p in slow.parent.items() if p]) == tax
    with pytest.raises(TaxonomyError, match="'x' has the parent 'z', which is not in the tree"):
        Taxonomy.from_parents({'r': None, 'x': 'z'})


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(-2, 2)), min_size=1, max_size=50))
def test_parallel_sums_are_made_to_ascend(steps):
    c = np.cumsum([o for o, _ in steps]) + 0.5
    noisy = torch.tensor(
        c * (1 + 2**-52 * np.array([k for _, k in steps])), requires_grad=True
    )  # some units in the last place away
    out = taxonomy._ascending(noisy)
    assert (out.diff() >= 0).all() and out.tolist() == np.maximum.accumulate(noisy.detach().numpy()).tolist()
    out.sum().backward()
    assert (noisy.grad == 1).all()


def test_a_name_is_no_number():
    with pytest.raises(TaxonomyError, match="not by 'cod'"):
        Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}).names['cod']


def test_tensors_that_inference_made_serve_autograd():
    torch = pytest.importorskip('torch')
    tax = Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish', 'crab': 'crustacean'})
    with torch.inference_mode():
        tax.tensor('leaves')
    x = torch.ones(len(tax), requires_grad=True)
    x.index_select(0, tax.tensor('leaves')).square().sum().backward()
    assert x.grad.sum() == 2 * tax.n_leaves


# Tables as people have them


def table(path, *lines):
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


def classes(tax):
    return {k: tax.path(v[0]) for k, v in tax.labels.items()}


def quiet(f, *a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TaxonomyWarning)
        return f(*a, **kw)


def test_a_class_that_ends_its_lineage_is_that_taxon(tmp_path):
    t = table(
        tmp_path / 't.csv',
        'class,lineage',
        'Acartia,Copepoda/Acartiidae/Acartia',
        'Copepoda,Copepoda',
        'sp_a,Copepoda/Acartiidae/sp a',
        'Cnidaria,Cnidaria/Cnidaria unidentified',
        'other,',
    )
    tax = quiet(Taxonomy.from_csv, t)
    assert tax.names == [
        'root',
        'Copepoda',
        'Acartiidae',
        'Acartia',
        'sp a',
        'Cnidaria',
        'Cnidaria unidentified',
        'Cnidaria',
        'other',
    ]
    assert tax.label_index(['Acartia', 'Copepoda', 'sp_a', 'Cnidaria', 'other']).tolist() == [3, 1, 4, 7, 8]
    with pytest.raises(
        TaxonomyError,
        match="'Cnidaria' is the name of 2 nodes, 'root/Cnidaria', 'root/Cnidaria/Cnidaria unidentified/Cnidaria'; "
        "give the path",
    ):
        tax.index('Cnidaria')
    assert tax.index('sp_a') == 4  # what a person types may be a label, where no node has the name
    assert Taxonomy.from_paths({'Acartia': 'Copepoda/Acartia', 'Copepoda': 'Copepoda'}).names == [
        'root',
        'Copepoda',
        'Acartia',
    ]


def test_labels_that_share_a_taxon_are_classes_below_it(tmp_path):
    ranks = table(
        tmp_path / 'r.csv',
        'label,family,genus',
        'male,Felidae,Panthera',
        'female,Felidae,Panthera',
        'cat,Felidae,',
        'dog,Canidae,Canis',
        'wolf,Canidae,Canis',
        'Canis,Canidae,Canis',
        'stone,,',
    )
    assert classes(Taxonomy.from_csv(ranks)) == {
        'male': 'root/Felidae/Panthera/male',
        'female': 'root/Felidae/Panthera/female',
        'cat': 'root/Felidae',
        'dog': 'root/Canidae/Canis/dog',
        'wolf': 'root/Canidae/Canis/wolf',
        'Canis': 'root/Canidae/Canis',
        'stone': 'root/stone',
    }
    lines = table(
        tmp_path / 'l.csv',
        'class,lineage,species',
        'm,Felidae,Panthera leo',
        'f,Felidae,Panthera leo',
        'cat,Felidae,Felis catus',
        'fossil,Felidae,',
    )
    assert classes(Taxonomy.from_csv(lines)) == {
        'm': 'root/Felidae/Panthera leo/m',
        'f': 'root/Felidae/Panthera leo/f',
        'cat': 'root/Felidae/Felis catus',
        'fossil': 'root/Felidae/fossil',
    }


@pytest.mark.parametrize(
    'head, row, label, path, ranks',
    [
        (
            'class,kingdom,class,species',
            'a_b,Animalia,Aves,A b',
            'a_b',
            'Animalia/Aves/A b',
            ('kingdom', 'class', 'species'),
        ),
        (
            'name,Species,Genus,Kingdom',
            'x,A b,A,Animalia',
            'x',
            'Animalia/A/A b',
            ('kingdom', 'genus', 'species'),
        ),  # from the bottom up
        (
            'kingdom,class,species',
            'Animalia,Aves,A b',
            'A b',
            'Animalia/Aves/A b',
            ('kingdom', 'class', 'species'),
        ),  # no label
        (
            'species,kingdom,genus',
            'A b,Animalia,A',
            'A b',
            'Animalia/A',
            ('kingdom', 'genus'),
        ),  # the first column is the label
        ('kingdom,genus,label', 'Animalia,A,none', 'none', 'Animalia/A', ('kingdom', 'genus')),
        ('class,family,genus', 'x,incertae sedis,A', 'x', 'A', ('family', 'genus')),
        ('class,family,genus', 'x,Felidae incertae sedis,A', 'x', 'A', ('family', 'genus')),
    ],
)
def test_rank_columns_as_they_come(tmp_path, head, row, label, path, ranks):
    tax = quiet(Taxonomy.from_csv, table(tmp_path / 't.csv', head, row))
    assert classes(tax) == {label: f'root/{path}'} and tax.ranks == ranks
    assert [tax.rank(i) for i in tax.ancestors(label)[1:]] == [
        r for r in ranks if len(ranks) == len(path.split('/')) or r != 'family'
    ]


def test_columns_that_are_no_ranks_are_named(tmp_path):
    with pytest.warns(TaxonomyWarning, match="the columns 'AphiaID', 'note' are no ranks and were passed over"):
        Taxonomy.from_csv(table(tmp_path / 't.csv', 'label,genus,AphiaID,species,note', 'x,A,1,A b,'))
    first = table(tmp_path / 'u.csv', 'class,order', 'Aves,Passeriformes', 'Aves,Strigiformes')
    assert Taxonomy.from_csv(first).names == [
        'root',
        'Aves',
        'Passeriformes',
        'Strigiformes',
    ]  # Aves stands twice: no label


@pytest.mark.parametrize('sep', ['>', ';', '|', ' > '])
def test_lineages_with_another_separator(tmp_path, sep):
    rows = [
        'class,lineage',
        *(
            f'"{c}","living{sep}{l}"'
            for c, l in (('Calanus', f'Crustacea{sep}Copepoda'), ('Chaetoceros', f'Harosa{sep}Diatomea'))
        ),
    ]
    with pytest.warns(TaxonomyWarning, match=re.escape(f'lineages are separated by {sep.strip()!r}')):
        tax = Taxonomy.from_csv(table(tmp_path / 't.csv', *rows))
    assert tax.height == 4 and tax.path('Calanus') == 'root/living/Crustacea/Copepoda/Calanus'


def test_unnamed_ranks_in_a_lineage_join_nobody(tmp_path):
    t = table(
        tmp_path / 't.csv',
        'class,lineage',
        'Calanus,Animalia/NA/NA/Calanidae',
        'Vermes1,Animalia/NA/NA/Vermidae',
        'None,Animalia/Annelida',
        'NA,Animalia/Annelida',
    )
    with pytest.warns(TaxonomyWarning, match=r"4 ranks without a name \('NA'\) were passed over"):
        tax = Taxonomy.from_csv(t)
    assert tax.names == ['root', 'Animalia', 'Calanidae', 'Calanus', 'Vermidae', 'Vermes1', 'Annelida', 'None', 'NA']


def test_ranks_and_labels_travel(tmp_path):
    tax = Taxonomy.from_csv(
        table(
            tmp_path / 't.csv',
            'class,family,genus,species',
            'Felidae,Felidae,,',
            'p_leo,Felidae,Panthera,Panthera leo',
            'c_lupus,Canidae,Canis,Canis lupus',
        )
    )
    for t in (
        tax,
        pickle.loads(pickle.dumps(tax)),
        Taxonomy.load(tax.save(tmp_path / 'x')),
        tax.subset(['Panthera leo']),
        tax.prune(),
        tax.level_leaves(),
    ):
        assert (
            t.ranks == ('family', 'genus', 'species')
            and t.names[t.label_index(['p_leo'])] == ['Panthera leo']
            and t.rank('Panthera leo') == 'species'
            and t.rank(0) == ''
        )
        assert t.rank(t.label_index(['Felidae'])[0]) == 'family'  # a class is not contracted
    assert (
        Taxonomy(
            tax.names[::-1],
            [len(tax) - 1 - p if p >= 0 else -1 for p in tax.parents[::-1]],
            ranks=tax.ranks,
            rank_of=tax.rank_of[::-1],
            labels={k: [len(tax) - 1 - i for i in v] for k, v in tax.labels.items()},
        )
        .label_index(['p_leo'])
        .size
        == 1
    )
    assert tax == Taxonomy(tax.names, tax.parents) and not Taxonomy(tax.names, tax.parents).ranks


@given(slow_trees())
def test_chains(slow):
    tax = Taxonomy.from_parents(slow.parent)
    ends = tax.chainless
    single = {i for i in range(1, len(tax)) if len(tax.children(i)) == 1}
    for i in range(len(tax)):
        j = i
        while j in single:
            j = int(tax.children(j)[0])
        assert tax.heirs[i] == j and ends.names[tax.to_chainless[i]] == tax.names[j]
    assert len(ends) == len(tax) - len(single) and ends.leaf_names == tax.leaf_names and (ends is tax) == (not single)


# Ranks


def some_ranks(data, slow):
    "A rank for some nodes, deeper ones deeper ranks, and the tree that knows them"
    named = {n: data.draw(st.booleans()) and f'r{slow.depth(n)}' or None for n in slow.order}
    return named, Taxonomy.from_parents(slow.parent).with_ranks([named[n] for n in slow.order])


@given(st.data(), slow_trees())
def test_ranks_by_walking_up(data, slow):
    named, tax = some_ranks(data, slow)
    known = sorted({o for o in named.values() if o}, key=lambda o: int(o[1:]))
    assert list(tax.ranks) == known and dict(zip(tax.names, tax.node_ranks)) == named
    assert [tax.rank(n) or None for n in slow.order] == [named[n] for n in slow.order]
    for rank in known:
        place, keep = tax.at(rank), tax.down_to(rank)
        for i, n in enumerate(slow.order):
            above = next((o for o in slow.up(n) if named[o] == rank), None)
            assert place[i] == (-1 if above is None else slow.order.index(above))
            ranked = [o for o in slow.up(n) if named[o]]
            if any(int(named[o][1:]) > int(rank[1:]) for o in ranked):
                assert not keep[i]
            elif named[n]:
                assert keep[i]
        assert keep[0] and keep[tax.parents[keep][1:]].all()


@given(st.data(), slow_trees())
def test_ranks_stay_with_their_nodes(data, slow):
    named, tax = some_ranks(data, slow)
    leaves = data.draw(st.lists(st.sampled_from(slow.leaves()), min_size=1, unique=True))
    for t in (
        pickle.loads(pickle.dumps(tax)),
        tax.prune(),
        tax.chainless,
        tax.subset(leaves),
        tax.spanning(leaves),
        tax.level_leaves(),
        tax.prune().expand(),
        tax.with_ranks(tax.node_ranks),
        tax.with_ranks(tax.ranks, tax.rank_of),
    ):
        assert t.ranks == tax.ranks
        for n, rank in zip(t.names, t.node_ranks):
            assert rank == named.get(n) or rank is None and n not in tax.prune().names  # put back, or a copy of a leaf


def test_ranks_are_saved_with_the_tree_and_old_trees_have_none(tmp_path):
    tax = Taxonomy.from_paths({'cod': 'fish/Gadus', 'ray': 'fish', 'dust': None})
    ranked = tax.with_ranks([{'fish': 'class', 'Gadus': 'genus', 'cod': 'species'}.get(o) for o in tax.names])
    back = Taxonomy.load(ranked.save(tmp_path / 'new'))
    assert back == tax and back.ranks == ('class', 'genus', 'species') and (back.node_ranks == ranked.node_ranks).all()
    with np.load(tax.save(tmp_path / 'old')) as z:
        assert not {'ranks', 'rank_of'} & set(z)
    old = Taxonomy.load(tmp_path / 'old')
    assert old.ranks == () and set(old.node_ranks) == {None}
    with np.load(tmp_path / 'new') as z:
        arrays = dict(z) | {'rank_of': np.full(len(tax), 3)}
    np.savez(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(TaxonomyError, match='damaged one .*no rank number 3'):
        Taxonomy.load(tmp_path / 'bad.npz')
    assert old.with_ranks(back.node_ranks).at('genus')[tax.index('cod')] == tax.index('Gadus')


@pytest.mark.parametrize(
    'ranks, says',
    [
        (['a', None], 'There are 2 ranks for 6 nodes'),
        ([None] * 7, 'There are 7 ranks for 6 nodes'),
        ('a,b', 'There are 2 ranks for the 3 levels'),
        (['a', 'b', 'c', 'd'], 'There are 4 ranks for the 3 levels'),
        ('table.csv', 'There is no table of ranks table.csv'),
    ],
)
def test_ranks_that_do_not_fit(ranks, says):
    tax = Taxonomy.from_paths({'cod': 'fish/Gadus', 'haddock': 'fish/Gadus'}, root='life')
    tax = Taxonomy([*tax.names, 'pike'], [*tax.parents, 2])
    with pytest.raises(TaxonomyError, match=says):
        tax.with_ranks(ranks)
