"Detectors by hand."

import json, math
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from hiermetric.judging.detectors import DETECTORS, Detector, auroc, create_detector, node_prototypes
from unseen_cases import cases, slow_protos, slowly, under, up


@given(cases())
@slowly
def test_detectors_by_hand(case):
    tax, known, tr, t, o, _ = case
    P = o.node_probs.numpy()
    leaf = P[:, tax.leaves].astype(float)
    e = o.emb.numpy() / np.linalg.norm(o.emb.numpy(), axis=1, keepdims=True)
    b = tr.emb.numpy() / np.linalg.norm(tr.emb.numpy(), axis=1, keepdims=True)
    best = tax.leaves[leaf.argmax(1)]
    protos = slow_protos(tr.emb, t, tax)
    want = {
        'softmax': 1 - leaf.max(1),
        'entropy': [-sum(p * math.log(p) for p in row if p > 0) for row in leaf],
        'energy': [-math.log(sum(math.exp(z - max(row)) for z in row)) - max(row) for row in o.logits.tolist()],
        'clade': [1 - P[i, up(tax, int(v))[1] if v else 0] for i, v in enumerate(best)],
        'prototype': [1 - max(x @ protos[c] for c in np.unique(t)) for x in e],
        'knn': [1 - sorted((x @ y for y in b), reverse=True)[2] for x in e],
    }
    assert set(want) == set(DETECTORS) - {'rehearsed'}
    for name, w in want.items():
        d = create_detector(name, **({'k': 3} if name == 'knn' else {})).fit(tr, t, tax)
        np.testing.assert_allclose(d.score(o), w, atol=2e-5, err_msg=name)
        again = Detector.restore(d.state(), tax)
        torch.testing.assert_close(again.score(o), d.score(o), atol=0, rtol=0)
        json.dumps({k: v for k, v in d.state().items() if k != 'learned'})
        assert all(isinstance(v, torch.Tensor) for v in d.state()['learned'].values())


@given(cases())
@slowly
def test_prototypes_by_hand(case):
    tax, known, tr, t, *_ = case
    got = node_prototypes(tr.emb, torch.as_tensor(t), tax).numpy()
    want = slow_protos(tr.emb, t, tax)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(
        np.abs(got).sum(1) > 0, [bool(set(under(tax, v)) & set(t.tolist())) for v in range(len(tax))]
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_auroc_counts_pairs(a, b):
    assert auroc(a, b) == pytest.approx(np.mean([(y > x) + 0.5 * (y == x) for x in a for y in b]))
