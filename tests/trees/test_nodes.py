"Nodes by name, path and number, and every kind of question about what is not there"

import re
import numpy as np, pytest, torch
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError, TaxonomyWarning
from slow_trees import fancy, run


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


def test_index_does_not_depend_on_the_hash_seed(tmp_path):
    path = fancy().save(tmp_path / 't')
    code = (
        f"from hiermetric.trees import Taxonomy; t = Taxonomy.load({str(path)!r}); print(t.index(t.path(3)), "
        "t.fingerprint)"
    )
    assert {run(code, PYTHONHASHSEED=str(k)) for k in range(3)} == {f'3 {fancy().fingerprint}'}


def test_tensors_that_inference_made_serve_autograd():
    torch = pytest.importorskip('torch')
    tax = Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish', 'crab': 'crustacean'})
    with torch.inference_mode():
        tax.tensor('leaves')
    x = torch.ones(len(tax), requires_grad=True)
    x.index_select(0, tax.tensor('leaves')).square().sum().backward()
    assert x.grad.sum() == 2 * tax.n_leaves
