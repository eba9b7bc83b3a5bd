"Numbering and arrays against a slow and obvious tree; what is no tree, and what may not change"

import copy, pickle, re, warnings
from math import log2
import numpy as np, pytest
from hypothesis import given
from hiermetric.core import HiermetricError
from hiermetric.trees.graph import LabelGraph
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError, TaxonomyWarning
from slow_trees import slow_trees, fancy


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
