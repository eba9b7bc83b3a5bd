"A table of labels, joined to features once."

import numpy as np
import pytest
from several_embeddings import scenes, written
from hiermetric.similarity.label_sets import with_label_sets


@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    f, y = scenes()
    order = np.random.default_rng(1).permutation(len(f))  # rows in another order, names of another length
    return *with_label_sets(
        f,
        written(
            tmp_path_factory.mktemp('labels'),
            y[order],
            [f.paths[i] if i % 2 else f.paths[i].split('/', 2)[2] for i in order],
        ),
    ), y
