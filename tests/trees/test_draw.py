"Drawings of trees: nothing overlaps, every odd tree can be drawn, and importing the module stays light"

import os, subprocess, sys
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.trees.graph import LabelGraph
from hiermetric.trees.taxonomy import Taxonomy

KINDS = ('horizontal', 'radial')
ODD = {
    'one node': Taxonomy.from_parents({'only': None}),
    'two nodes': Taxonomy.from_parents({'root': None, 'leaf': 'root'}),
    'chain': Taxonomy.from_parents({'n0': None, **{f'n{i}': f'n{i - 1}' for i in range(1, 40)}}),
    'star': Taxonomy.from_parents({'hub': None, **{f'ray {i}': 'hub' for i in range(60)}}),
    'caterpillar': Taxonomy.from_parents(
        {'n0': None, **{f'n{i}': f'n{i - 1}' for i in range(1, 30)}, **{f'leg{i}': f'n{i}' for i in range(30)}}
    ),
    'dollars': Taxonomy.from_parents({'$x_1$': None, 'a$b': '$x_1$', '日本': '$x_1$', 'back\\slash': '$x_1$'}),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@st.composite
def trees(draw):
    n = draw(st.integers(1, 60))
    return Taxonomy.from_parents({'n0': None} | {f'n{i}': f'n{draw(st.integers(0, i - 1))}' for i in range(1, n)})


@settings(max_examples=60, deadline=None)
@given(trees(), st.booleans())
def test_layout_against_walking_the_tree(tax, align):
    def leaves_under(i):
        return [j for j in range(tax.n_leaves) if tax.is_ancestor(i, int(tax.leaves[j]))]

    def below(i):
        return max(int(tax.depths[int(tax.leaves[j])]) for j in leaves_under(i)) - int(tax.depths[i])

    d = tax.layout(align=align)
    for i in range(len(tax)):
        under, depth = leaves_under(i), int(tax.depths[i])
        assert d.y[i] == -(under[0] + under[-1]) / 2
        assert d.x[i] == pytest.approx(depth / max(depth + below(i) if align else tax.height, 1))


@settings(max_examples=60, deadline=None)
@given(trees())
def test_no_two_nodes_stand_on_one_place(tax):
    for kind in KINDS:
        xy = tax.layout(kind)[['x', 'y']].values
        gap = np.linalg.norm(xy[:, None] - xy[None], axis=-1)[np.triu_indices(len(tax), 1)]
        assert len(gap) == 0 or gap.min() > 1e-6
    tips = tax.layout('radial').loc[tax.leaves]
    if tax.n_leaves > 1 and tax.height:
        apart = np.linalg.norm(tips[['x', 'y']].values - np.roll(tips[['x', 'y']].values, 1, 0), axis=1)
        np.testing.assert_allclose(apart, 2 * np.sin(np.pi / tax.n_leaves), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(trees())
def test_the_angle_points_outwards(tax):
    d = tax.layout('radial')
    r = np.hypot(d.x, d.y)
    np.testing.assert_allclose(r * np.cos(np.radians(d.angle)), d.x, atol=1e-9)
    np.testing.assert_allclose(r * np.sin(np.radians(d.angle)), d.y, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(trees())
def test_links_join_parent_and_child_and_never_cross(tax):
    from hiermetric.trees.draw import _links

    for kind in KINDS:
        xy = tax.layout(kind)[['x', 'y']].values
        wide, turn, run = _links(tax, kind)
        np.testing.assert_allclose(run[:, -1], xy[1:], atol=1e-9)
        for i, line in zip(
            wide, turn, strict=True
        ):  # the line across begins and ends where a child's line along begins
            starts = run[[k - 1 for k in tax.children(i)], 0]
            for end in (line[0], line[-1]):
                assert np.abs(starts - end).sum(1).min() < 1e-9
        assert wide.tolist() == [i for i in range(len(tax)) if len(tax.children(i)) > 1]
    wide, turn, run = _links(tax, 'horizontal')  # vertical pieces against horizontal pieces
    for i, (x, lo, hi) in zip(
        wide, zip(turn[:, 0, 0], turn[:, :, 1].min(1), turn[:, :, 1].max(1), strict=True), strict=True
    ):
        for j, (y, a, b) in enumerate(zip(run[:, 0, 1], run[:, 0, 0], run[:, 1, 0], strict=True)):
            assert tax.parents[j + 1] == i or not (lo + 1e-9 < y < hi - 1e-9 and a + 1e-9 < x < b - 1e-9)


@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ODD)
def test_odd_trees_are_drawn(name, kind):
    tax = ODD[name]
    L = tax.n_leaves
    ax = tax.plot(kind, labels='all', values=np.arange(L), images=[np.zeros((4, 6, 3))] * L)
    ax.figure.canvas.draw()
    written = [t.get_text() for t in ax.texts]
    for j, leaf in enumerate(tax.leaf_names):
        assert any(t.startswith(f'{leaf}  {j:,}') for t in written), leaf


def leaf_boxes(ax, tax):
    "Corners of the written leaf names, in pixels, in leaf order"
    from matplotlib.transforms import Affine2D

    ax.figure.canvas.draw()
    out = []
    for t in ax.texts[: tax.n_leaves]:
        turn = t.get_rotation()
        t.set_rotation(0)
        box = t.get_window_extent()
        t.set_rotation(turn)
        at = ax.transData.transform(t.get_position())
        out.append(
            Affine2D()
            .rotate_deg_around(*at, turn)
            .transform([(box.x0, box.y0 + 1), (box.x1, box.y0 + 1), (box.x1, box.y1 - 1), (box.x0, box.y1 - 1)])
        )
    return out


def apart(a, b):
    "Separating axis: do two rectangles have no point in common?"
    for p in (a, b):
        for k in range(2):
            n = p[k + 1] - p[k]
            if (a @ n).max() <= (b @ n).min() or (b @ n).max() <= (a @ n).min():
                return True
    return False


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('leaves', [2, 10, 200])
def test_leaf_names_do_not_overlap(kind, leaves):
    rng = np.random.default_rng(leaves)
    tax = Taxonomy.from_paths([(f'family {rng.integers(leaves // 2)}', f'species number {i}') for i in range(leaves)])
    ax = tax.plot(kind)
    boxes = leaf_boxes(ax, tax)
    for j in range(tax.n_leaves):
        assert apart(boxes[j], boxes[j - 1]), tax.leaf_names[j]
    w, h = ax.figure.canvas.get_width_height()
    for b in boxes:
        assert (b >= -1).all() and (b[:, 0] <= w + 1).all() and (b[:, 1] <= h + 1).all()  # and all inside the picture


def test_inner_names_do_not_overlap():
    rng = np.random.default_rng(1)
    tax = Taxonomy.from_parents(
        {'n0': None}
        | {f'node number {i}': 'n0' if i < 4 else f'node number {rng.integers(1, i)}' for i in range(1, 300)}
    )
    ax = tax.plot('radial', labels='all')
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts[tax.n_leaves :]]
    assert len(boxes) > 20
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (min(a.x1, b.x1) - max(a.x0, b.x0) > 4 and min(a.y1, b.y1) - max(a.y0, b.y0) > 4)


def test_graph_draws_each_dropped_edge():
    g = LabelGraph([('a', 'b'), ('a', 'c'), ('b', 'd'), ('c', 'd'), ('a', 'd'), ('c', 'e')])
    for kind in KINDS:
        ax = g.plot(kind)
        bows = ax.collections[-2].get_segments()
        tree = g.to_tree()
        xy = tree.layout(kind).set_index('name')[['x', 'y']]
        ends = sorted((*o[0].round(6), *o[-1].round(6)) for o in bows)
        want = sorted((*xy.loc[p].round(6), *xy.loc[c].round(6)) for p, c in [('a', 'd'), ('c', 'd')])
        assert ends == want


def test_sunburst_is_the_tree():
    tax = ODD['caterpillar']
    s = tax.sunburst(values=range(tax.n_leaves)).data[0]
    assert list(s.labels) == list(tax.names)
    assert [int(p) if p else -1 for p in s.parents] == tax.parents.tolist()
    assert [v for i, v in enumerate(s['values']) if tax.heights[i] == 0] == list(range(tax.n_leaves))
    assert len({*s.ids}) == len(tax)


def test_mistakes():
    tax = ODD['star']
    for call, message in [
        (lambda: tax.plot('spiral'), "There is no layout 'spiral'; there are 'horizontal' and 'radial'."),
        (lambda: tax.plot(values=[1, 2]), "`values` has 2 entries where this tree has 60 leaves; give one for each."),
        (lambda: tax.plot(values=[-1] * 60), "`values` must be finite numbers from 0 up; leaf 'ray 0' has -1."),
        (
            lambda: tax.plot(values=[1] * 59 + [float('nan')]),
            "`values` must be finite numbers from 0 up; leaf 'ray 59' has nan.",
        ),
        (lambda: tax.plot(colors=[1, 2]), "`colors` has 2 entries where this tree has 61 nodes; give one for each."),
        (lambda: tax.plot(images=[1, 2]), "`images` has 2 entries where this tree has 60 leaves; give one for each."),
        (lambda: tax.plot(labels='most'), "`labels` is 'all', 'leaves', 'none' or None, not 'most'."),
        (
            lambda: tax.sunburst(values=[1, 2]),
            "`values` has 2 entries where this tree has 60 leaves; give one for each.",
        ),
    ]:
        with pytest.raises(HiermetricError) as e:
            call()
        assert str(e.value) == message
    assert not plt.get_fignums()  # a mistake leaves no empty figure behind


def test_a_hundred_thousand_nodes_are_laid_out():
    rng = np.random.default_rng(0)
    tax = Taxonomy.from_parents(
        {'n0': None} | {f'n{i}': f'n{rng.integers(max(0, i - 5000), i)}' for i in range(1, 100_000)}
    )
    d = tax.layout('radial')
    assert len(d) == 100_000 and np.isfinite(d[['x', 'y', 'angle']].values).all()


def test_importing_the_module_loads_no_drawing_library():
    code = (
        "import sys, hiermetric.trees.taxonomy, hiermetric.trees.draw; "
        "print([o for o in ('matplotlib', 'plotly', 'seaborn', 'pandas', 'torch', 'nltk') if o in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=os.environ, check=True
    ).stdout
    assert out.strip() == '[]'
