"Known species play the stranger, and a gate learns from them."

import math
import numpy as np, pytest, torch
from hiermetric.core import HiermetricError
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.judging.detectors import auroc
from hiermetric.judging.placements import Placement, create_placement
from hiermetric.judging.known import Outputs, hold_out
from hiermetric.judging.rehearsal import Rehearsal, rehearse
from unseen_cases import features, random_tree


def played(tax, r, known=(1.0, 6.0), strangers=(1.0, 0.5), n=400):
    "A round: two leaves play the stranger; the logits' height says who is who"
    stars = r.choice(tax.leaves, 2, replace=False)
    seen = ~np.isin(tax.leaves, stars)
    own = tax.leaves[seen]

    def say(t, height):
        z = torch.as_tensor(r.normal(size=(len(t), tax.n_leaves)), dtype=torch.float32)
        hit = np.isin(t, own)
        z[torch.arange(len(t))[hit], tax.leaf_column[t[hit]]] += height
        z[~torch.as_tensor(hit), int(tax.leaf_column[own[0]])] += height
        z[:, ~torch.as_tensor(seen)] = -math.inf
        return Outputs(
            torch.as_tensor(r.normal(size=(len(t), 5)), dtype=torch.float32), z, tax.node_probs(z.softmax(1))
        )

    t = {'train': np.repeat(own, 4), 'val': r.choice(own, n), 'unseen': r.choice(stars, n)}
    return Rehearsal(
        {'train': say(t['train'], 6.0), 'val': say(t['val'], known[1]), 'unseen': say(t['unseen'], strangers[1])}, t
    )


def test_a_gate_learns_what_tells_strangers():
    r = np.random.default_rng(0)
    tax = random_tree(30, 30, r)
    rounds = [played(tax, r) for _ in range(3)]
    new = played(tax, r)
    o, t = new.outputs, new.targets
    rule = (
        create_placement('blend', detector='rehearsed')
        .rehearse(rounds, tax)
        .fit(o['train'], t['train'], tax)
        .calibrate(o['val'], t['val'], loss=0.02)
    )
    plain = create_placement('blend').fit(o['train'], t['train'], tax)
    assert auroc(rule.novelty(o['val']), rule.novelty(o['unseen'])) > max(
        0.95, auroc(plain.novelty(o['val']), plain.novelty(o['unseen'])) - 0.01
    )
    kept = rule.leaf(o['val']) == t['val']
    assert (kept & (rule(o['val']) != t['val'])).mean() <= 0.02
    np.testing.assert_array_equal(rule.elsewhere(o['unseen']), plain.elsewhere(o['unseen']))
    before = torch.get_rng_state()
    other = (
        create_placement('blend', detector='rehearsed').rehearse(rounds, tax, seed=1).fit(o['train'], t['train'], tax)
    )
    assert not torch.equal(other.novelty(o['val']), rule.novelty(o['val'])) and torch.equal(
        before, torch.get_rng_state()
    )
    one = [rule.novelty(o['val'][slice(i, i + 1)]).item() for i in range(5)]
    np.testing.assert_allclose(one, rule.novelty(o['val'])[:5], rtol=1e-4, atol=1e-5)  # alone or in company
    np.testing.assert_allclose(Placement.restore(rule.state(), tax).novelty(o['val']), rule.novelty(o['val']))
    assert rule.novelty(o['unseen']).isfinite().all()


def test_a_gate_that_nothing_can_be_learned_for():
    r = np.random.default_rng(1)
    tax = random_tree(20, 20, r)
    blind = [played(tax, r, strangers=(1.0, 6.0)) for _ in range(3)]
    o = played(tax, r, strangers=(1.0, 6.0)).outputs
    rule = (
        create_placement('blend', detector='rehearsed')
        .rehearse(blind, tax)
        .fit(o['train'], np.resize(tax.leaves, len(o['train'])), tax)
    )
    assert rule.novelty(o['val']).isfinite().all()
    flat = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'x', 'd': 'x', 'e': 'x'}).prune()
    with pytest.raises(HiermetricError, match='nothing to learn'):
        create_placement('blend', detector='rehearsed').rehearse([], flat)


def test_each_known_species_plays_once():
    r = np.random.default_rng(2)
    tax = random_tree(25, 25, r)
    f = hold_out(features(r, tax), tax.leaves[:2])
    models = []

    def train(g):
        assert not set(g.targets) & set(tax.leaves[:2].tolist()) and g.split.tolist().count('unseen') == 6 * len(
            np.unique(g.targets[g.split == 'unseen'])
        )
        models.append(Model(EmbeddingNet(4, kind='none'), create_head('classifier', in_features=4, taxonomy=tax)))
        return models[-1]

    rounds = rehearse(f, train, rounds=4, seed=3)
    stars = [np.unique(o.targets['unseen']) for o in rounds]
    assert (
        len(models) == 4
        and sorted(np.concatenate(stars).tolist()) == tax.leaves[2:].tolist()
        and all(set(s).isdisjoint(o.targets['train']) for s, o in zip(stars, rounds))
    )
    for s, o in zip(stars, rounds):
        assert (o.outputs['val'].node_probs[:, torch.as_tensor(s)] == 0).all()
