"Trees that are slow and obvious, to compare with, and trees of every shape"

import os, subprocess, sys, warnings
import numpy as np
from hypothesis import HealthCheck, settings, strategies as st
from hiermetric.trees.taxonomy import Taxonomy

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


def random_tree(n, rng, depth=40):
    parents, depths = np.full(n, -1), np.zeros(n, int)
    for i in range(1, n):
        p = int(rng.integers(max(0, i - 50), i))
        while depths[p] >= depth:
            p = int(parents[p])
        parents[i], depths[i] = p, depths[p] + 1
    return Taxonomy(map(str, range(n)), parents)


def run(code, **env):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, **env}
    ).stdout.strip()


def table(path, *lines):
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path
