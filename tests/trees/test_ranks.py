"Ranks by walking up"

import pickle
import pytest
from hypothesis import given, strategies as st
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.trees.arrays import TaxonomyError
from slow_trees import slow_trees


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
