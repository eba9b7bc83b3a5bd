"Pruned, levelled, partial and chainless trees against a slow and obvious tree"

import re
import numpy as np, pytest
from hypothesis import given, strategies as st
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError
from slow_trees import slow_trees


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
