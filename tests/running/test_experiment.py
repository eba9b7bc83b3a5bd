"""Experiments: statistics against slow oracles, fairness of the procedure, reports that survive a kill. On clusters in
feature space, so no data are needed."""

import re, shutil
from dataclasses import replace
from html.parser import HTMLParser
import numpy as np, pandas as pd, pytest
from scipy import stats
from hiermetric.core import HiermetricError
from hiermetric.heads.contract import list_heads
from hiermetric.running.variants import Variant, trials, tune_head
from hiermetric.running.verdicts import bootstrap, bootstrap_macro, image_sums, logistic_regression, mean_interval
from hiermetric.running.comparison import compare
from hiermetric.running.results import shown_metrics
from hiermetric.judging.metrics import per_sample, summarise
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.images.features import toy_features

LINEAGES = {f'{o}{f}{s}': f'{o}/{o}{f}' for o in 'AB' for f in 'xyz' for s in '123'}
TAX = Taxonomy.from_paths(LINEAGES)
TOY = toy_features(TAX, per_leaf=40, noise=1.5)
QUICK = dict(epochs=3, batch_size=64, embed_dim=32, lr=1e-2)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp('report')
    return compare(TOY, seeds=3, draws=300, out=out, **QUICK), out


def tables(rng, n=200):
    leaf = rng.dirichlet(np.ones(TAX.n_leaves), n)
    return per_sample(TAX.node_probs(leaf), TAX.leaves[rng.integers(TAX.n_leaves, size=n)].astype(int), TAX)


def test_interval_is_students():
    v = [0.61, 0.64, 0.60, 0.66]
    lo, hi = stats.ttest_1samp(v, 0).confidence_interval(0.95)
    mean, half = mean_interval(v)
    assert (mean - half, mean + half) == pytest.approx((lo, hi))


def test_image_sums_are_the_metrics():
    table = tables(np.random.default_rng(0))
    for k, (a, b) in image_sums(table).items():
        assert a.sum() / b.sum() == pytest.approx(summarise(table)[k]), k


def test_bootstrap_against_a_slow_loop():
    rng = np.random.default_rng(0)
    table = tables(rng, 60)
    sums = image_sums(table)
    fast = bootstrap(*(np.stack([s[i] for s in sums.values()], 1) for i in (0, 1)), draws=40, seed=3)
    again = np.random.default_rng(3)
    for r, draw in enumerate(
        again.integers(60, size=(40, 60))
    ):  # the same draws, metric by metric from the drawn table itself
        slow = summarise(table.iloc[draw])
        assert fast[r] == pytest.approx([slow[k] for k in sums])


def test_macro_bootstrap_against_a_slow_loop():
    table = tables(np.random.default_rng(1), 60)
    fast = bootstrap_macro(table[['top1']].to_numpy(), table.target.to_numpy(), draws=30, seed=5)
    order, rng = np.argsort(table.target.to_numpy(), kind='stable'), np.random.default_rng(5)
    for r in range(30):
        slow = summarise(table.iloc[order[rng.integers(60, size=60)]])['macro_top1']
        assert fast[r, 0] == pytest.approx(slow)


def test_bootstrap_interval_covers():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        a, b = rng.random((150, 1)) < 0.7, rng.random((150, 1)) < 0.6
        d = bootstrap(np.hstack([a, b]).astype(float), np.ones((150, 2)), 200, seed=int(rng.integers(1e9)))
        lo, hi = np.quantile(d[:, 0] - d[:, 1], (0.025, 0.975))
        hits += lo <= 0.1 <= hi
    assert 180 <= hits <= 199  # 95 % of 200, give or take


def test_pairing_is_what_makes_small_differences_visible():
    rng = np.random.default_rng(0)
    easy = rng.random(500) < 0.7
    a, b = easy.copy(), easy.copy()
    b[np.flatnonzero(easy)[:15]] = False  # b loses 15 images that a wins, else they agree
    d = bootstrap(np.stack([a, b], 1).astype(float), np.ones((500, 2)), 500)
    assert np.quantile(d[:, 0] - d[:, 1], 0.025) > 0
    apart = d[:, 0] - np.random.default_rng(1).permutation(d[:, 1])  # the same without pairing
    assert np.quantile(apart, 0.025) < 0


def test_report_is_complete(report):
    r, _ = report
    assert {(h, s) for h, s in r.runs[['head', 'rule']].itertuples(index=False)} == {
        (h, s) for h in ('classifier', 'arcface', 'LogisticRegression') for s in ('argmax', 'crm', 'hie')
    }
    assert r.runs.query("head == 'arcface' and rule == 'hie' and metric == 'hd@5'").seed.tolist() == [0, 1, 2]
    assert list(r.table.columns) == [v[0] for v in shown_metrics.values()] and not r.runs.value.isna().any()
    assert r.nodes['classifier', 'crm'].shape == (3, len(r.targets))


def test_numbers_in_the_table_are_the_numbers_of_the_runs(report):
    r, _ = report
    v = r.runs.query("head == 'classifier' and rule == 'crm' and metric == 'top1'").value
    right = np.mean(r.nodes['classifier', 'crm'] == r.targets, axis=1)
    assert v.tolist() == pytest.approx(right.tolist())
    lo, hi = stats.ttest_1samp(100 * v, 0).confidence_interval(0.95)
    assert r.table.loc[('classifier', 'crm'), 'top-1 %'] == f'{100 * v.mean():.1f} ±{(hi - lo) / 2:.1f}'


def test_triangles_say_what_the_bootstrap_says(report):
    r, _ = report
    s, seen = r.summary, set()
    for (head, rule), row in r.table.iterrows():
        for k, (column, _, _, higher) in shown_metrics.items():
            lo, hi = s.loc[(head, rule, k), ['lo', 'hi']]
            sure = lo > 0 or hi < 0
            mark = {'▲': 1, '▼': -1}.get(row[column][-1], 0)
            assert mark == (0 if not sure else 1 if (lo > 0) == higher else -1), (head, rule, k)
            seen.add(mark)
    assert {0, 1} <= seen
    assert s.loc['classifier', 'lo'].isna().all()  # the baseline is not compared with itself


def test_differences_have_the_right_sign(report):
    s = report[0].summary.dropna(subset='lo')
    for (head, rule, metric), row in s.iterrows():
        point = row['mean'] - report[0].summary.loc[('classifier', rule, metric), 'mean']
        assert row.lo - 0.05 <= point <= row.hi + 0.05, (head, rule, metric)


def test_level_shares_and_confusion_add_up(report):
    r, _ = report
    shares = r.level_shares()
    assert np.allclose(shares.sum(1), 1)
    hd1 = (shares * shares.columns).sum(1)
    for head, rule in r.nodes:
        assert hd1[head, rule] == pytest.approx(r.summary.loc[(head, rule, 'hd@1'), 'mean'])
    c = r.confusion('arcface')
    assert np.allclose(c.sum(1), 1) and np.diag(c).mean() == pytest.approx(
        r.summary.loc[('arcface', 'argmax', 'macro_top1'), 'mean']
    )


def test_a_rerun_is_free_and_identical(report, monkeypatch):
    r, out = report
    import hiermetric.running.verdicts as ex
    from hiermetric.running.trainer import Trainer

    monkeypatch.setattr(Trainer, 'train_epoch', lambda self: pytest.fail('trained again'))
    monkeypatch.setattr(ex, 'logistic_regression', lambda *a: pytest.fail('fitted again'))
    again = compare(TOY, seeds=3, draws=300, out=out, **QUICK)
    assert again.runs.equals(r.runs) and again.table.equals(r.table)


def test_a_killed_comparison_continues(tmp_path, report):
    r, _ = report

    class Kill(BaseException):
        pass

    import hiermetric.running.comparison as ex

    done, real = [], ex.fit

    def mortal(*a, **kw):
        if len(done) == 2:
            raise Kill
        done.append(1)
        return real(*a, **kw)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(ex, 'fit', mortal)
        m.setattr(
            ex, 'inspect', type('I', (), {'signature': staticmethod(lambda f: __import__('inspect').signature(real))})
        )
        with pytest.raises(Kill):
            compare(TOY, seeds=3, draws=300, out=tmp_path, **QUICK)
    assert (
        len(list((tmp_path / 'runs').glob('classifier-seed*/run.json'))) == 2
        and not (tmp_path / 'report.html').exists()
    )
    again = compare(TOY, seeds=3, draws=300, out=tmp_path, **QUICK)
    assert again.runs.equals(r.runs) and (tmp_path / 'report.html').exists()


def test_other_settings_in_the_same_folder_do_not_mix(report, tmp_path):
    r, out = report
    shutil.copytree(out, tmp_path / 'copy')
    other = compare(
        TOY, ('classifier',), seeds=2, draws=100, out=tmp_path / 'copy', yardstick=False, **{**QUICK, 'lr': 1e-3}
    )
    alone = compare(TOY, ('classifier',), seeds=2, draws=100, yardstick=False, **{**QUICK, 'lr': 1e-3})
    assert other.runs.equals(alone.runs)


def test_everybody_is_calibrated_on_validation(report):
    t = report[0].runs.query("metric == 'temperature' and rule == 'argmax'").groupby('head').value.first()
    assert len(t) == 3 and (t != 1).all()


def test_tuning_gives_everybody_the_same_number_of_trials(tmp_path):
    r = compare(TOY, seeds=1, tune=3, draws=50, yardstick=False, out=tmp_path, **QUICK)
    assert r.tuning.groupby('head').size().tolist() == [3, 3] and r.tuning.groupby('head').chosen.sum().tolist() == [
        1,
        1,
    ]
    for head, rows in r.tuning.groupby('head'):
        best = rows.loc[rows.chosen].iloc[0]
        assert best.val_top1 == rows.val_top1.max()
        assert r.settings[head]['lr'] == best.lr
    assert (tmp_path / 'tuning.csv').exists()


def test_trials_never_repeat_and_start_with_the_given():
    v = Variant.of('arcface', QUICK)
    t = trials(v, 9)
    assert t[0] == v and len({repr(o.settings) for o in t}) == 9 and all(o.settings['epochs'] == 3 for o in t)


def test_every_head_can_be_compared_and_tuned():
    r = compare(
        TOY,
        list(list_heads().index),
        seeds=1,
        rules=['argmax'],
        tune=2,
        draws=20,
        yardstick=False,
        **QUICK | dict(epochs=1),
    )
    assert (
        list(r.table.index.get_level_values('head')) == list(list_heads().index)
        and np.isfinite(r.summary['mean']).all()
    )


def test_test_images_are_not_used_for_choices(monkeypatch):
    spoiled = np.asarray(TOY.x).copy()
    spoiled[TOY.split == 'test'] = 0
    for f in (TOY, replace(TOY, x=spoiled)):
        v, t = tune_head(f, Variant.of('classifier', QUICK), 3)
        probs, chosen = logistic_regression(f)
        seen = (v.settings, t.val_top1.tolist(), chosen, probs['val'])
        if f is TOY:
            first = seen
    assert seen[:3] == first[:3] and np.array_equal(seen[3], first[3])


def test_yardstick_is_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    probs, chosen = logistic_regression(TOY, grid=dict(C=[0.1], power=[1.0]), max_iter=500)
    (x, t), (xt, _) = ([o.numpy() for o in TOY.of(s)] for s in ('train', 'test'))
    xt, x = (xt - x.mean(0)) / x.std(0), (x - x.mean(0)) / x.std(0)
    direct = LogisticRegression(C=0.1, max_iter=500).fit(x, t).predict_proba(xt)
    assert np.abs(probs['test'] - direct).max() < 1e-3


def test_yardstick_leaves_out_internal_labels_and_unseen_classes():
    targets = np.asarray(TOY.targets).copy()
    gone = (TOY.targets == TAX.leaves[0]) & (TOY.split == 'train')
    targets[gone] = TAX.parents[TAX.leaves[0]]
    probs, _ = logistic_regression(replace(TOY, targets=targets))
    assert (probs['test'][:, 0] == 0).all() and np.allclose(probs['test'].sum(1), 1, atol=1e-5)
    compare(replace(TOY, targets=targets), seeds=1, draws=20, **QUICK)


class Balanced(HTMLParser):
    void = {'meta', 'img', 'br'}

    def __init__(self):
        super().__init__()
        self.stack, self.links = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.stack.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href')]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, tag


def test_html_is_whole_and_needs_nothing_from_outside(report):
    r, out = report
    page = (out / 'report.html').read_text()
    p = Balanced()
    p.feed(page)
    p.close()
    assert not p.stack and len(p.links) == 3 and all(o.startswith('data:') for o in p.links)
    assert not re.search(r'@import|url\(|<script|<link', page)
    for text in (r.taxonomy.fingerprint, TOY.fingerprint, 'scikit-learn', 'HD@5', r.verdict().split(';')[0]):
        assert text in page
    assert r.to_html(out / 'one.html').read_bytes() == r.to_html(out / 'two.html').read_bytes()
    saved = pd.read_csv(out / 'summary.csv').set_index(['head', 'rule', 'metric'])
    assert saved.loc[('arcface', 'crm', 'hd@1'), 'mean'] == pytest.approx(
        r.summary.loc[('arcface', 'crm', 'hd@1'), 'mean']
    )


def test_names_are_escaped(tmp_path):
    r = compare(TOY, [('<b>&', 'classifier', {})], seeds=1, draws=20, yardstick=False, **QUICK)
    page = r.to_html(tmp_path / 'r.html').read_text()
    assert '&lt;b&gt;&amp;' in page and '<b>&<' not in page


def test_imagenet_is_confessed(report, tmp_path):
    r, _ = report
    assert 'has seen these very images' not in r.to_html(tmp_path / 'a.html').read_text()
    assert (
        'has seen these very images'
        in replace(r, info=r.info | {'data set': 'tiny-imagenet'}).to_html(tmp_path / 'b.html').read_text()
    )


@pytest.mark.parametrize(
    'call,text',
    [
        (dict(heads=['arcfase']), "Did you mean 'arcface'"),
        (dict(heads=[]), 'at least one head'),
        (dict(seeds=0), 'at least one head and one seed'),
        (dict(rules=['cmr']), "Did you mean 'crm'"),
        (dict(heads=['arcface', 'arcface']), "Two competitors are called 'arcface'"),
        (dict(epoch=3), "no setting 'epoch'.*Did you mean 'epochs'"),
        (dict(heads=[('mine', 'arcface', dict(margin=1))]), "has no setting 'margin'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(call, text, monkeypatch):
    from hiermetric.running.trainer import Trainer

    monkeypatch.setattr(Trainer, 'train_epoch', lambda self: pytest.fail('trained'))
    with pytest.raises(HiermetricError, match=text):
        compare(TOY, **call)


def test_trials_share_their_recipes_and_end_with_them():
    a, b = trials(Variant.of('arcface'), 5), trials(Variant.of('classifier'), 5)
    shared = lambda v: {k: v.settings.get(k) for k in ('lr', 'weight_decay', 'dropout', 'power')}
    assert [shared(o) for o in a] == [shared(o) for o in b]
    committee = trials(Variant.of('committee'), 3)
    assert all('dropout' not in o.settings for o in committee) and committee[1].settings['head_kw']['dropout'] == 0.3
    tuned = trials(Variant.of(('x', 'metric', dict(loss='triplet', loss_kw=dict(margin=0.3, normalise=False)))), 4)
    assert (
        not any(o.settings['head_kw']['loss_kw']['normalise'] for o in tuned)
        and len({o.settings['head_kw']['loss_kw']['margin'] for o in tuned}) > 1
    )  # what is tuned joins what was said
    with pytest.raises(HiermetricError, match='9 different trials'):
        trials(Variant.of('classifier'), 10)
