"Policies of a label graph against the definition"

import pickle
import numpy as np
from hypothesis import given, strategies as st
from hiermetric.trees.graph import LabelGraph
from hiermetric.trees.taxonomy import Taxonomy
import slow_trees  # noqa: F401 (sets the profile of random tests)


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
