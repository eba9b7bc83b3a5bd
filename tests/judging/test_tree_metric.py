"The stateful metric is the functional one, whatever the batches."

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings
from hiermetric.judging.metrics import evaluate, per_sample
from hiermetric.judging.tree_metric import TreeMetric
from hiermetric.judging.mistakes import rank_accuracy
from metric_cases import assert_same, cases, flat


@given(cases())
@settings(max_examples=25, deadline=None)
def test_stateful_equals_functional_whatever_the_batches(case):
    tax, P, T, r = case
    if tax.height < 4:
        tax = tax.with_ranks([int(o) % 3 or None for o in tax.depths])
    whole = evaluate(P, T, tax)
    every = {k: TreeMetric(tax, k) for k in ('top1', 'macro_top1', 'severity', 'hd@20', 'hf1', 'ece')}
    m = TreeMetric(tax)
    cuts = sorted(r.integers(0, len(T) + 1, 3))
    parts = [o for o in np.split(np.arange(len(T)), cuts) if len(o)]
    for o in parts:
        m.update(torch.as_tensor(P[o]), torch.as_tensor(T[o]))
        for e in every.values():
            e.update(P[o], T[o])
    assert_same(m.compute(), whole)
    pd.testing.assert_frame_equal(
        m.by_rank(), rank_accuracy(per_sample(P, T, tax).node.to_numpy(), T, tax), check_dtype=False
    )
    for k, e in every.items():
        assert float(e.compute()) == pytest.approx(whole[k], abs=1e-6, nan_ok=True)
    m.reset()
    m.update(P[:1], T[:1])
    assert_same(m.compute(), evaluate(P[:1], T[:1], tax))


def test_forward_gives_the_batch_and_keeps_the_sum():
    tax = flat(4)
    P = tax.node_probs(np.eye(4))
    m = TreeMetric(tax, 'top1')
    assert (
        float(m(P[:2], tax.leaves[[0, 0]])) == 0.5
        and float(m(P[2:], tax.leaves[[2, 3]])) == 1.0
        and float(m.compute()) == 0.75
    )
    assert float(m.clone().compute()) == 0.75
    assert TreeMetric(tax)(P, tax.leaves)['hf1'] == 1.0
