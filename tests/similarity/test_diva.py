"DiVA against the loop (hiermetric.similarity.diva)"

import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from several_embeddings import TAX, above, batch, hinge, settled, slow_epshn, slow_parts

pytestmark = pytest.mark.usefixtures('one_thread')


def test_diva_is_the_loop(monkeypatch):
    head, (x, t) = settled('diva', shared=0.5, intra=0.25, single=2.0), batch()
    parts = slow_parts(head, x)
    dealt, found = torch.randperm(len(t)), None
    import hiermetric.similarity.diva as m

    found = m.intra_triplets(t, TAX)
    monkeypatch.setattr(m, 'intra_triplets', lambda *_: found)
    monkeypatch.setattr(torch, 'randperm', lambda *_, **__: dealt)
    first, across, inside, single = parts
    want = slow_epshn(first, t.tolist()) + 0.5 * slow_epshn(across, t[dealt].tolist())
    want += 0.25 * above(
        [
            hinge(-float(inside[a] @ inside[p]), -float(inside[a] @ inside[n]), 0.1)
            for a, p, n in zip(*(o.tolist() for o in found))
        ]
    )
    want += 2 * np.mean(
        [
            -float(single[i] @ single[i]) / 0.1 + math.log(sum(math.exp(float(single[i] @ o) / 0.1) for o in single))
            for i in range(len(x))
        ]
    )
    for part, net in zip(parts[1:], head.adversaries):  # from the part to the first
        want -= 10 * np.mean(
            [float((F.normalize(net.nets[0](p), dim=0) * q).square().mean()) for p, q in zip(part, first)]
        )
    assert abs(float(head.loss(x, t)) - want) < 1e-3
