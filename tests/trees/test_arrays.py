"Names in one block, and names whose hashes collide"

import numpy as np, pytest
from hypothesis import given, strategies as st
from hiermetric.trees import arrays, nodes
from hiermetric.images.sampling import tree
from hiermetric.trees.arrays import Names, TaxonomyError
from hiermetric.trees.taxonomy import Taxonomy
from slow_trees import Slow


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


@pytest.mark.parametrize('hashed', [len, lambda name: 0, lambda name: -len(name)])
def test_names_whose_hashes_collide(monkeypatch, hashed):
    for module in (arrays, nodes, tree):
        monkeypatch.setattr(module, 'hash', hashed, raising=False)
    slow = Slow({'r': None, 'a': 'r', 'b': 'a', 'cc': 'a', 'dd': 'cc', 'e': 'r'})
    tax = Taxonomy.from_parents(slow.parent)
    assert (
        list(tax.names) == slow.order and tax.index(slow.order).tolist() == list(range(6)) and tax.index('a/cc/dd') == 4
    )
    assert Taxonomy.from_edges([(p, c) for c, p in slow.parent.items() if p]) == tax
    with pytest.raises(TaxonomyError, match="'x' has the parent 'z', which is not in the tree"):
        Taxonomy.from_parents({'r': None, 'x': 'z'})


def test_a_name_is_no_number():
    with pytest.raises(TaxonomyError, match="not by 'cod'"):
        Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}).names['cod']
