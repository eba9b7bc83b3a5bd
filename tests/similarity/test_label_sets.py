"Sets of labels as classes: tables, files, probabilities (hiermetric.similarity.label_sets)"

import math
import warnings
import numpy as np
import pandas as pd
import pytest
import torch
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from PIL import Image
from several_embeddings import LABELS, TAX, scenes, written
from hiermetric.core import HiermetricError
from hiermetric.images.table import ImageTable
from hiermetric.similarity.label_sets import (
    label_probs,
    label_report,
    powerset,
    read_multi_hot,
    rows_of_files,
    with_label_sets,
)
from hiermetric.running.fitting import fit
from hiermetric.running.inference import predict

pytestmark = pytest.mark.usefixtures('one_thread')


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_powerset_is_the_loop(n, C, seed):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, C)) < rng.random(C)).astype(int)
    tax, t, sets = powerset(pd.DataFrame(y, columns=LABELS[:C]))
    assert (
        sets.shape == (len(tax), C)
        and not sets.iloc[0].any()
        and tax.n_leaves == len(tax) - 1 == len({tuple(o) for o in y.tolist()})
    )
    for i in range(n):
        own = [LABELS[j] for j in range(C) if y[i, j]]
        assert tax.names[t[i]] == (' + '.join(own) or 'none') and sets.iloc[t[i]].tolist() == y[i].tolist()
    # probabilities, set by set and label by label
    p = tax.node_probs(torch.from_numpy(rng.dirichlet(np.ones(tax.n_leaves), size=4)))
    got = label_probs(p, sets, tax)
    for i in range(4):
        for j in range(C):
            assert abs(float(got[i, j]) - sum(float(p[i, v]) for v in tax.leaves if sets.iloc[v, j])) < 1e-9


def test_label_probs_of_paths_are_node_probs():
    p = TAX.node_probs(torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(TAX.n_leaves), size=5)))
    assert torch.allclose(label_probs(p, TAX.multi_hot(np.arange(len(TAX)))[:, 1:], TAX), p[:, 1:])


def test_label_report_is_the_loop():
    rng = np.random.default_rng(0)
    y = (rng.random((30, 4)) < 0.3).astype(int)
    y[:, 3] = 0
    p = torch.from_numpy(rng.random((30, 4)))
    report = label_report(p, pd.DataFrame(y, columns=LABELS[:4]))
    for j in range(3):
        order = sorted(range(30), key=lambda i: -float(p[i, j]))
        hits, found = [], 0
        for place, i in enumerate(order, 1):
            if y[i, j]:
                found += 1
                hits.append(found / place)
        assert (
            abs(report['average precision'].iloc[j] - np.mean(hits)) < 1e-9
            and report.images.iloc[j] == len(hits)
            and report['share'].iloc[j] == len(hits) / 30
        )
    assert math.isnan(report['average precision'].iloc[3]) and list(report.index) == LABELS[:4]
    for bad in (p[:5], p * math.nan):
        with pytest.raises(HiermetricError, match='images, labels'):
            label_report(bad, pd.DataFrame(y))


def test_labels_are_joined_by_path(scene):
    labelled, sets, y = scene
    f, _ = scenes()
    assert labelled.x is f.x or (labelled.x == f.x).all()
    assert (labelled.split == f.split).all() and (labelled.paths == f.paths).all()
    assert (
        (sets.to_numpy()[labelled.targets] == y).all()
        and labelled.taxonomy.n_leaves == 8
        and 'none' in labelled.taxonomy.leaf_names
    )
    assert (
        labelled.meta['labels'] == LABELS[:3]
        and labelled.meta['unused_rows'] == 0
        and labelled.meta['sets_without_training'] == []
    )


def test_a_table_of_images_takes_the_same_labels(tmp_path):
    f, y = scenes(40)
    table = ImageTable(
        pd.DataFrame({'path': f.paths, 'class': str(TAX.leaf_names[0]), 'split': f.split}), TAX, 'photos', tmp_path
    )
    csv = written(tmp_path, y, [f'{i}.jpg' for i in range(40)])
    labelled, sets = with_label_sets(table, csv)
    vectors, same = with_label_sets(f, csv)
    assert (
        (labelled.targets == vectors.targets).all()
        and labelled.taxonomy.fingerprint == vectors.taxonomy.fingerprint
        and sets.equals(same)
    )
    assert 'sets of 3 labels' in labelled.notes[-1] and labelled.fingerprint != table.fingerprint


def test_pictures_with_labels_go_through_fit(tmp_path):
    "Red and blue, either, both or none, from the files on"
    rng = np.random.default_rng(0)
    y = (rng.random((90, 2)) < 0.5).astype(int)
    for i, hot in enumerate(y):
        Image.fromarray((rng.integers(0, 30, (32, 32, 3)) + 200 * np.array([hot[0], 0, hot[1]])).astype(np.uint8)).save(
            tmp_path / f'{i}.png'
        )
    table = ImageTable(
        pd.DataFrame(
            {
                'path': [str(tmp_path / f'{i}.png') for i in range(90)],
                'class': str(TAX.leaf_names[0]),
                'split': np.resize(['train', 'train', 'val'], 90),
            }
        ),
        TAX,
        'colours',
        tmp_path,
    )
    labelled, sets = with_label_sets(table, written(tmp_path, y, [f'{i}.png' for i in range(90)], ['red', 'blue']))
    run = fit(
        labelled,
        'sndl',
        head_kw=dict(sets=sets, dim=8),
        backbone='timm:test_efficientnet',
        backbone_kw=dict(pretrained=False),
        image_size=32,
        batch_size=16,
        lr=5e-3,
        epochs=3,
        device='cpu',
    )
    report = label_report(
        label_probs(predict(run.model, labelled, 'val'), sets, labelled.taxonomy),
        sets.iloc[labelled.targets[labelled.samples['split'] == 'val']],
    )
    assert (report['average precision'] > report['share'] + 0.2).all()


def test_tables_that_cannot_be_read(tmp_path):
    for text, word in (
        ('', 'Cannot read'),
        ('image,a\n', 'holds no labels'),
        ('image\nx.jpg\n', 'holds no labels'),
        ('image,a\nx.jpg,2\n', "'a' of 'x.jpg' is '2'"),
        ('image,a,b\nx.jpg,1,\n', "'b' of 'x.jpg' is ''"),
        ('image,a,b\nx.jpg,1,0\ny.jpg,1\n', "'b' of 'y.jpg'"),
        ('image,a\nx.jpg,1,0\n', 'Cannot read'),
        ('image,a,a\nx.jpg,1,0\n', "label 'a' occurs twice"),
        ('image,a\nx.jpg,1\n x.jpg,1\n', "image 'x.jpg' occurs twice"),
        ('image,a,\nx.jpg,1,0\n', 'label 2 has no name'),
        ('image,a\nx.jpg,1\n,0\n', 'image 2 has no name'),
    ):
        (tmp_path / 'labels.csv').write_text(text)
        with pytest.raises(HiermetricError, match=word):
            read_multi_hot(tmp_path / 'labels.csv')
    (tmp_path / 'labels.csv').write_text('\ufeffimage, water ,007\nx.jpg,1.0,0\n1e3,0,1\n', encoding='utf-8')
    table = read_multi_hot(tmp_path / 'labels.csv')
    assert (
        list(table.columns) == ['water', '007']
        and list(table.index) == ['x.jpg', '1e3']
        and table.to_numpy().tolist() == [[1, 0], [0, 1]]
    )


@pytest.mark.filterwarnings('ignore:1 of 7 sets')
def test_labels_that_do_not_fit_the_images(tmp_path):
    f, y = scenes(40)
    names = [f'{i}.jpg' for i in range(40)]

    def joined(y, names, **kw):
        return with_label_sets(f, written(tmp_path, y, names), **kw)

    with pytest.raises(HiermetricError, match='no row for 2 of 40 images, the first /photos/3/38.jpg'):
        joined(y[:38], names[:38])
    with pytest.raises(HiermetricError, match='2 rows for /photos/0/0.jpg'):
        joined(np.r_[y, y[:1]], [*names, '/photos/0/0.jpg'])
    with pytest.raises(HiermetricError, match='fits /photos/0/0.jpg as well as /photos/1/0.jpg'):
        with_label_sets(
            replace(f, paths=np.array(['/photos/0/0.jpg', '/photos/1/0.jpg', *f.paths[2:]])),
            written(tmp_path, y, names),
        )
    with pytest.raises(HiermetricError, match="'0.jpg' and './0.jpg' are one path"):
        joined(np.r_[y, y[:1]], [*names, './0.jpg'])
    with pytest.raises(HiermetricError, match='at most 3 may be classes'):
        joined(y, names, most=3)
    with pytest.raises(HiermetricError, match='a class needs another'):
        joined(y * 0, names)
    with pytest.raises(HiermetricError, match='`paths` is None'):
        with_label_sets(replace(f, paths=None), written(tmp_path, y, names))
    with pytest.raises(HiermetricError, match="name 'all sets'"):
        powerset(pd.DataFrame(np.eye(2), columns=['all sets', 'b']))
    with pytest.raises(HiermetricError, match="name 'none'"):
        powerset(pd.DataFrame([[0, 0], [1, 0]], columns=['none', 'b']))
    with pytest.warns(UserWarning, match='3 of 43 rows'):
        more = joined(np.r_[y, y[:3]], [*names, 'x.jpg', 'y.jpg', 'z.jpg'])[0]
    assert more.meta['unused_rows'] == 3
    y = np.zeros((40, 3), dtype=int)
    y[::2, 0] = 1
    y[3] = 1  # image 3 validates
    with pytest.warns(UserWarning, match='1 of 3 sets of labels have no training image.*sand . water . boat'):
        lone, sets = joined(y, names)
    assert lone.meta['sets_without_training'] == ['sand + water + boat']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert rows_of_files(names, f.paths, 'x').tolist() == list(range(40))
        assert rows_of_files(['0.jpg'], ['/photos/0.jpg', ''.join(['/photos/', '0.jpg'])], 'x').tolist() == [
            0,
            0,
        ]  # one file, twice
    run = fit(lone, 'sndl', head_kw=dict(sets=sets, dim=8), epochs=1, batch_size=8, device='cpu')
    assert run.history.val_nll.notna().all()
