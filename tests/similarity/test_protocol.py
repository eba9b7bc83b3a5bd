"The protocol's intervals, tables and pictures (hiermetric.similarity.protocol)"

import numpy as np
import pandas as pd
import pytest
import torch
from galleries import data
from hiermetric.similarity.protocol import Protocol, unseen_protocol
from hiermetric.trees.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures('one_thread')


def protocol(seed, lost=0.5, n=300):
    "B names each held-out image wrongly with probability `lost`, A never"
    r = np.random.default_rng(seed)
    tax = Taxonomy.from_paths({f'c{i}': f'g{i // 3}' for i in range(12)})
    t = r.choice(tax.leaves, n)
    held = tax.leaves[:4]
    b = np.where(np.isin(t, held) & (r.random(n) < lost), tax.leaves[-1], t)
    return Protocol(pd.DataFrame({'seed': seed, 'target': t, 'held': np.isin(t, held), 'a': t, 'b': b}), tax)


def test_intervals_cover_the_truth():
    "Of 60 intervals at 90 % about 54 hold the true drop, at least 45; they get narrower with more seeds"
    tables = [protocol(s).summary(200, 0.9).loc[('unseen', 'classes', 'drop')] for s in range(60)]
    assert sum(o.lo <= 0.5 <= o.hi for o in tables) >= 45 and all(o.lo <= o['mean'] <= o.hi for o in tables)
    joined = Protocol.join([protocol(s) for s in range(8)]).summary(200, 0.9).loc[('unseen', 'classes', 'drop')]
    assert joined.hi - joined.lo < np.mean([o.hi - o.lo for o in tables]) / 1.7
    assert (protocol(0).summary(50).loc['seen'].xs('drop', level='model')[['mean', 'lo', 'hi']] == 0).all().all()


def test_protocol_of_embeddings():
    "B's embedding mixes two held-out classes up; only they lose"
    x, t, tax, _ = data(17, n=400, noise=0.3)
    seen = np.unique(t)
    held = seen[:2]
    y = x.clone()
    y[torch.as_tensor(np.isin(t, held))] = x[torch.as_tensor(t == held[0])][0]
    y += 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    g, q = slice(0, 250), slice(250, 400)
    p = unseen_protocol((x[g], x[q]), (y[g], y[q]), t[g], t[q], tax, held)
    each = p.by_class(100).reset_index()
    assert (each[~each.held]['drop'].abs() < 0.1).all() and each[each.held]['drop'].mean() > 0.2
    assert np.isclose(p.summary(50).loc[('all', 'images', 'b'), 'mean'], (p.hits.b == p.hits.target).mean())
    assert (p.report('a')['support'].iloc[: len(seen)].sum()) == 150


def test_tables_and_pictures_are_written_and_logged(tmp_path, monkeypatch):
    p = protocol(0)
    p.save(tmp_path / 'p')
    s = pd.read_csv(tmp_path / 'p' / 'summary.csv')
    assert len(s) == 18 and (tmp_path / 'p' / 'protocol.png').stat().st_size > 1000
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    import wandb

    logged = {}

    class Run:
        log = staticmethod(logged.update)

    p.log(Run())
    assert set(logged) == {'summary', 'by_class', 'report_a', 'report_b', 'protocol'} and isinstance(
        logged['by_class'], wandb.Table
    )
