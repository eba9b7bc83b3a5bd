"""The predictor against loops that are slow and obvious: parts of trees, promises, folders that were tampered with,
runs that were killed, tables there and back."""

import json, warnings, shutil, tracemalloc
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from hiermetric.core import HiermetricError
from hiermetric.images.features import extract
from hiermetric.running.formats import FORMATS
from hiermetric.running.answers import AnswerFile
from hiermetric.running.predictor import Predictor, model_folder
from hiermetric.running.questions import Scope, all_images, listed_leaves, next_steps, novelty, walk_images
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.fitting import fit
from hiermetric.running.sources import split_tensors
from hiermetric.images.features import toy_features
from toys import toy_backbone, toy_table

pytestmark = pytest.mark.usefixtures('one_thread')


@st.composite
def trees(draw, most=14):
    "Ragged trees, chains and stars among them"
    n = draw(st.integers(2, most))
    return Taxonomy([f'n{i}' for i in range(n)], [-1, *(draw(st.integers(0, i - 1)) for i in range(1, n))])


def leaf_probs(tax, n, seed=0, sharp=2.0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(tax.n_leaves, 1 / sharp), n)).float()


# Parts of a tree


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_scope_is_the_sum_over_listed_leaves(data):
    tax = data.draw(trees())
    leaves = [int(o) for o in tax.leaves]
    listed = data.draw(st.lists(st.sampled_from(leaves), min_size=1, unique=True))
    level = data.draw(st.one_of(st.none(), st.integers(1, tax.height)))
    scope, leaf = Scope(tax, level, [tax.path(o) for o in listed]), leaf_probs(tax, 4, data.draw(st.integers(0, 99)))
    p, on_list = scope.probs(tax.node_probs(leaf))
    columns = [j for j, o in enumerate(leaves) if o in listed]
    np.testing.assert_allclose(on_list, leaf[:, columns].sum(1), atol=1e-5)
    expected = [
        i
        for i in range(len(tax))
        if any(tax.is_ancestor(i, o) for o in listed) and (level is None or tax.depths[i] <= level)
    ]
    assert scope.nodes.tolist() == expected and [*scope.tax.names] == tax.names[expected]
    for i, node in enumerate(expected):
        under = [j for j in columns if tax.is_ancestor(node, leaves[j])]
        np.testing.assert_allclose(p[:, i], leaf[:, under].sum(1) / leaf[:, columns].sum(1), atol=1e-5)
        assert tax.path(node) == scope.tax.path(i)
    for node in range(len(tax)):
        up = node
        while up not in expected:
            up = int(tax.parents[up])
        assert scope.nodes[scope.at[node]] == up
        assert scope.inside[node] == all(o in listed for o in leaves if tax.is_ancestor(node, o))


def test_a_list_that_the_image_has_nothing_of_gives_numbers_and_says_so():
    tax = Taxonomy.from_paths({'a': 'x', 'b': 'x', 'c': 'y'})
    p, on_list = Scope(tax, within=['a', 'b']).probs(tax.node_probs(torch.tensor([[0.0, 0.0, 1.0]])))
    np.testing.assert_allclose(p[0], [1, 1, 0.5, 0.5])
    assert float(on_list[0]) == 0


RAGGED = Taxonomy.from_paths(
    {'s1': 'o1/f1/g1', 's2': 'o1/f1/g1', 's3': 'o1/g2', 's4': 'o1/sub/f2/g3', 's5': 'o2', 'dust': None}
)


@pytest.fixture
def ranked(tmp_path):
    (tmp_path / 'taxa.csv').write_text(
        'order,family,genus,species,AphiaID\no1,f1,g1,s1,12\no1,f1,g1,s2,13\no1,,g2,s3,14\no1,f2,g3,s4,15\no2,,,s5,16\n'
    )
    return RAGGED.with_ranks(tmp_path / 'taxa.csv')


@pytest.mark.parametrize(
    'rank,kept',
    [
        ('order', 'o1 o2 dust'),
        ('family', 'o1 f1 sub f2 o2 dust'),
        ('genus', 'o1 f1 g1 g2 sub f2 g3 o2 dust'),
        ('species', 's1 s2 s3 s4 s5 o1 f1 g1 g2 sub f2 g3 o2 dust'),
    ],
)
def test_ragged_ranks(ranked, rank, kept):
    assert ranked.ranks == ('order', 'family', 'genus', 'species')
    keep = ranked.down_to(rank)
    assert {o for o, k in zip(RAGGED.names, keep) if k} == {'root', *kept.split()}
    assert Scope(ranked, rank).tax.n_leaves >= 3


def test_a_rank_is_found_by_path(tmp_path):
    "One name at two ranks, in trees that came from elsewhere, and a class by the label of its row"
    (tmp_path / 'homo.csv').write_text(
        'phylum,class,order,genus\nOchrophyta,Bacillariophyceae,Licmophorales,Ctenophora\n'
        'Ochrophyta,Bacillariophyceae,Licmophorales,Tabularia\nCtenophora,Tentaculata,Lobata,Mnemiopsis\n'
        'Actinobacteria,Actinobacteria,Actinomycetales,\n'
    )
    tree = Taxonomy.from_paths(
        [
            ('living', 'Ochrophyta', 'Licmophorales', 'Ctenophora'),
            ('living', 'Ochrophyta', 'Licmophorales', 'Tabularia'),
            ('living', 'Ctenophora', 'Lobata', 'Mnemiopsis'),
            ('Actinobacteria', 'Actinobacteria', 'Actinomycetales'),
        ]
    )
    ranked = tree.with_ranks(tmp_path / 'homo.csv')
    assert {tree.path(i): ranked.rank(i) for i in range(1, len(tree))} == {
        'root/living': '',
        'root/living/Ochrophyta': 'phylum',
        'root/living/Ochrophyta/Licmophorales': 'order',
        'root/living/Ochrophyta/Licmophorales/Ctenophora': 'genus',
        'root/living/Ochrophyta/Licmophorales/Tabularia': 'genus',
        'root/living/Ctenophora': 'phylum',
        'root/living/Ctenophora/Lobata': 'order',
        'root/living/Ctenophora/Lobata/Mnemiopsis': 'genus',
        'root/Actinobacteria': 'phylum',
        'root/Actinobacteria/Actinobacteria': 'class',
        'root/Actinobacteria/Actinobacteria/Actinomycetales': 'order',
    }
    (tmp_path / 'labels.csv').write_text('class,kingdom,class,species\nA_b,Animalia,Aves,A b\n')
    folder = Taxonomy.from_paths({'A_b': 'Animalia/Aves', 'x': 'Animalia'})
    assert [folder.with_ranks(tmp_path / 'labels.csv').rank(i) for i in range(len(folder))] == [
        '',
        'kingdom',
        'class',
        'species',
        '',
    ]


def test_ranks_of_the_tree_need_not_be_told(tmp_path):
    (tmp_path / 't.csv').write_text(
        'label,order,family,species\n'
        + ''.join(f'{k}{i}{j},{k},{k}{i},{k}{i} {j}\n' for k in 'abc' for i in range(2) for j in range(3))
        + 'other,c,,\n'
    )
    tax = Taxonomy.from_csv(tmp_path / 't.csv')
    f = toy_features(tax, per_leaf=30, dim=16)
    made = Predictor.from_model(fit(f, epochs=2, embed_dim=8, device='cpu').model, f)
    made.save_pretrained(tmp_path / 'm')
    back = Predictor.from_pretrained(tmp_path / 'm')
    x, _ = split_tensors(f, 'test')
    t = table(back.ask(0.6, rank='family'), back, x)
    assert (
        set(t['rank']) <= {'', 'order', 'family'}
        and 'family' in set(t['rank'])
        and list(t)[2:6] == ['path', 'order', 'family', 'species']
        and set(t.species) == {''}
    )
    assert (t.order == t.path.str.split('/').str[0]).all() and (
        t.family == t.path.str.split('/').str[1].fillna('')
    ).all()
    leaf = table(back.ask(0.6, 'argmax', novel=0), back, x)
    assert set(leaf['rank']) == {'species'} and (leaf.species == leaf.answer).all()


SAVED = Path(__file__).parents[1] / 'saved'


@pytest.mark.parametrize('name, kw', [('all', {}), ('family', dict(rank='family')), ('by_rank', dict(at='rank'))])
def test_a_predictor_of_before_the_tree_knew_its_ranks(name, kw, tmp_path):
    "Written when ranks stood beside the tree (`tests/saved/make.py`): the same fingerprint, the same answers"
    x, want = np.load(SAVED / 'predictor-features.npy'), pd.read_csv(SAVED / f'predictor-{name}.csv')
    old, saved = Predictor.from_pretrained(SAVED / 'predictor'), Taxonomy.load(SAVED / 'predictor' / 'taxonomy.npz')
    assert saved.ranks == () and (saved.rank_of == -1).all() and saved == old.taxonomy
    assert old.taxonomy.ranks == ('order', 'family', 'species') and len(set(want['answer'])) > 3
    old.save_pretrained(tmp_path / 'new')
    new = Predictor.from_pretrained(tmp_path / 'new', taxonomy=saved)  # an equal tree that knows less
    assert new.taxonomy.ranks == old.taxonomy.ranks
    assert 'ranks' not in json.loads((tmp_path / 'new' / 'config.json').read_text())['predictor']
    for p in (old, new):
        assert (
            p.fingerprint == json.loads((SAVED / 'predictor' / 'config.json').read_text())['predictor']['fingerprint']
        )
        got = table(p.ask(0.7, **kw), p, x).replace('', np.nan)
        pd.testing.assert_frame_equal(got, want, check_dtype=False, atol=1e-4)
    told = Predictor.from_pretrained(SAVED / 'predictor', ranks='class,genus,species')
    assert told.taxonomy.ranks == ('class', 'genus', 'species') and told.fingerprint != old.fingerprint


def test_a_part_of_a_tree_knows_its_ranks(ranked):
    for scope in (Scope(ranked, 'family'), Scope(ranked, within=['s1', 's4']), Scope(ranked, 3, ['o1', 'dust'])):
        assert scope.tax.ranks == ranked.ranks and len(scope.tax) < len(ranked)
        assert scope.tax.rank_of.tolist() == ranked.rank_of[scope.nodes].tolist()


@pytest.mark.parametrize('head', ['classifier', 'sphere_multi', 'path_softmax', 'arcface_levels'])
def test_a_model_of_a_contracted_tree_says_so_and_can_be_expanded(tmp_path, head):
    whole = Taxonomy.from_paths({'a': 'o/f1/g1', 'b': 'o/f2/g2', 'c': 'o/f2/g2', 'd': 'p/q/r', 'e': 'p'})
    f = toy_features(whole.prune(), per_leaf=30, dim=16)
    made = Predictor.from_model(fit(f, head, epochs=2, embed_dim=8, device='cpu').model, f)
    made.save_pretrained(tmp_path / 'm')
    with pytest.warns(
        UserWarning, match='The tree of this model was contracted: 5 taxa that have a single child there'
    ):
        old = Predictor.from_pretrained(tmp_path / 'm')
    new = old.expand()
    x, _ = split_tensors(f, 'test')
    assert new.taxonomy == whole and new.expand() is new
    p, q = old.look(x)[0], new.look(x)[0]
    assert torch.equal(p[:, old.taxonomy.leaves.tolist()], q[:, whole.leaves.tolist()]) and torch.equal(
        q, q[:, whole.heirs.tolist()]
    )
    new.save_pretrained(tmp_path / 'n')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*contracted')
        again = Predictor.from_pretrained(tmp_path / 'n')
    a, b = (table(o.ask(0.7, novel=0), o, x) for o in (old, again))
    assert (
        a.answer.tolist() == b.answer.tolist()
        and a.probability.tolist() == b.probability.tolist()
        and set(b.path[b.answer == 'a']) <= {'o/f1/g1/a'}
    )


def test_a_node_without_a_rank(tmp_path):
    (tmp_path / 't.csv').write_text('order,family,species\no,f,s\no,f,t\no,,u\n')
    tree = Taxonomy.from_paths(
        {
            's': 'living/o/sub/f',
            't': 'living/o/sub/f',
            'male': 'living/o/sub/f/t',
            'u': 'living/o',
            'unidentified': 'living/o',
            'dust': 'dead/grey',
        }
    )
    ranked = tree.with_ranks(tmp_path / 't.csv')
    kept = lambda rank: (
        {o for o, k in zip(tree.names, ranked.down_to(rank)) if k} - {'root', 'living', 'dead', 'grey', 'dust', 'o'}
    )
    assert (kept('order'), kept('family'), kept('species')) == (
        set(),
        {'sub', 'f'},
        {'sub', 'f', 's', 't', 'u'},
    )  # nobody knows what an unidentified one is


def test_a_tree_of_one_node_has_no_genus_to_step_up_to():
    one = Taxonomy(['life'], [-1])
    assert Scope(one).step_up(np.array([0]), np.array([True])).tolist() == [0]
    chain = Taxonomy(['life', 'genus', 'species'], [-1, 0, 1])
    assert Scope(chain).step_up(np.array([2, 1, 0]), np.ones(3, bool)).tolist() == [1, 1, 0]


def test_ranks_that_fit_nothing(tmp_path):
    (tmp_path / 'other.csv').write_text('order,family\nCoraciiformes,Alcedinidae\n')
    with pytest.raises(HiermetricError, match='No name in .*other.csv is in the tree'):
        RAGGED.with_ranks(tmp_path / 'other.csv')
    with pytest.raises(HiermetricError, match='There is no table of ranks'):
        RAGGED.with_ranks(tmp_path / 'othre.csv')
    with pytest.raises(HiermetricError, match='the depths 1 to 5, so that its levels are no ranks'):
        Taxonomy.from_paths({'s': 'a/b/c/d', 't': None}).with_ranks('a,b,c')
    for bad in (0, -1, 6):
        with pytest.raises(HiermetricError, match=f'There is no level {bad}'):
            RAGGED.down_to(bad)


def test_checklists(tmp_path):
    def file(text):
        (tmp_path / 'list.txt').write_text(text, encoding='utf-8')
        return tmp_path / 'list.txt'

    names = lambda within: {o for o, k in zip(RAGGED.leaf_names, listed_leaves(RAGGED, within)) if k}
    assert (
        names(file('\ufeffg1\n\ns5,Linnaeus 1758\n# s4\n'))
        == {'s1', 's2', 's5'}
        == names(str(tmp_path / 'list.txt'))
        == names(['g1', 'o2'])
    )
    with pytest.warns(UserWarning, match='2 of the 3 names .* unknown to this model .aves, pisces.'):
        assert names(file('aves\ns1\npisces')) == {'s1'}
    with pytest.raises(HiermetricError, match='None of the 1 names'):
        names(file('aves'))
    with pytest.raises(HiermetricError, match='The list of taxa is empty'):
        names(file(''))
    with pytest.raises(HiermetricError, match="There is no 'g9'.*Did you mean"):
        names('g9')
    with pytest.raises(HiermetricError, match='There is no list of taxa'):
        names(tmp_path / 'gone.txt')


# Flag and candidates


def test_novelty_against_a_loop():
    rng = np.random.default_rng(0)
    known, scores = np.sort(rng.integers(0, 9, 40) / 10), rng.integers(-1, 10, 50) / 10
    np.testing.assert_allclose(novelty(scores, known), [(1 + sum(o >= s for o in known)) / 41 for s in scores])


@pytest.mark.parametrize('n', [1, 3, 19, 60])
@pytest.mark.parametrize('ties', [False, True])
def test_at_most_the_wanted_share_of_known_images_is_flagged(n, ties):
    rng, share, draws = np.random.default_rng(n), 0.05, 20_000
    scores = rng.integers(0, 5, (draws, n + 1)) / 5 if ties else rng.random((draws, n + 1))
    flagged = np.mean([novelty(row[:1], np.sort(row[1:]))[0] <= share for row in scores])
    assert flagged <= share + 4 * np.sqrt(share * (1 - share) / draws)
    if not ties and n in (19, 60):
        assert flagged >= np.floor(share * (n + 1)) / (n + 1) - 0.01  # and not much fewer


@settings(deadline=None, max_examples=40)
@given(trees(), st.integers(0, 5), st.integers(0, 99))
def test_candidates_against_a_loop(tax, most, seed):
    p = tax.node_probs(leaf_probs(tax, 6, seed)).numpy()
    answers = np.random.default_rng(seed).integers(0, len(tax), 6)
    for row, a, found in zip(p, answers, next_steps(p, answers, tax, most)):
        best = sorted(tax.children(int(a)).tolist(), key=lambda i: (-row[i], i))[:most]
        assert found.tolist() == best + [-1] * (most - len(best))


# Questions

EVEN = Taxonomy.from_paths(
    {f'{k}{i}{j}': f'{k}/{k}{i}' for k in 'abc' for i in range(2) for j in range(3)}, root='life'
)


def made(head='classifier', seed=0, detector='softmax', **kw):
    f = toy_features(EVEN, per_leaf=40, dim=24, noise=1.4, seed=seed)
    return f, Predictor.from_model(
        fit(f, head, epochs=3, embed_dim=16, device='cpu', **kw).model,
        f,
        ranks='order,family,species',
        detector=detector,
    )


@pytest.fixture(scope='module')
def toy():
    return made()


def table(question, predictor, x):
    return question(*predictor.look(x))


@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(rank='family'),
        dict(within=['a', 'b0']),
        dict(rule='crm'),
        dict(at='rank', rank=2),
        dict(at='clade', novel=0.3),
    ],
    ids=str,
)
def test_an_answer_depends_on_no_other_image(toy, kw):
    f, predictor = toy
    question, (x, _) = predictor.ask(0.8, **kw), split_tensors(f, 'test')
    p, s = predictor.look(x)
    whole, order = question(p, s), np.random.default_rng(0).permutation(len(p))
    pd.testing.assert_frame_equal(question(p[order], s[order]), whole.iloc[order].reset_index(drop=True))
    pd.testing.assert_frame_equal(
        pd.concat([question(p[i : i + 1], s[i : i + 1]) for i in range(40)], ignore_index=True), whole[:40]
    )
    assert whole['novel'].any() or kw.get('novel', 0) < 0.3


def test_what_a_row_says(toy):
    f, predictor = toy
    question, (x, _) = predictor.ask(0.9, candidates=2), split_tensors(f, 'test')
    p, s = predictor.look(x)
    rows = question(p, s)
    for q, row in zip(p.numpy(), rows.to_dict('records')):
        node = EVEN.index(f"life/{row['path']}") if row['path'] else 0
        assert (
            row['answer'] == EVEN.names[node] and row['rank'] == ['', 'order', 'family', 'species'][EVEN.depths[node]]
        )
        assert row['probability'] == pytest.approx(q[node], abs=1e-6)
        assert row['guess'] == EVEN.leaf_names[q[EVEN.leaves].argmax()] and row['guess_probability'] == pytest.approx(
            q[EVEN.leaves].max(), abs=1e-6
        )
        below = sorted(EVEN.children(node), key=lambda i: -q[i])[:2]
        assert [row['candidate_1'], row['candidate_2']] == ([EVEN.names[i] for i in below] or ['', ''])
        if below:
            assert row['candidate_1_probability'] == pytest.approx(q[below[0]], abs=1e-6)


@pytest.mark.parametrize(
    'kw', [{}, dict(rank=2), dict(within=['a', 'b']), dict(rank='order', within=['a', 'c0'])], ids=str
)
def test_the_promise_holds_for_what_is_asked(kw, confidence=0.8):
    "Truths drawn from the probabilities; new images against each of many calibration sets"
    right, n = [], 60
    for seed in range(40):
        p = leaf_probs(EVEN, n + 200, seed, sharp=4.0)
        t = EVEN.leaves[
            (p.double().cumsum(1) < torch.rand(len(p), 1, generator=torch.Generator().manual_seed(seed)))
            .sum(1)
            .clamp(max=EVEN.n_leaves - 1)
            .numpy()
        ]
        predictor = Predictor(
            SimpleNamespace(eval=lambda: SimpleNamespace(taxonomy=EVEN)),
            EVEN.node_probs(p[:n]),
            torch.from_numpy(t[:n].astype(np.int64)),
            1.0,
            taxonomy=EVEN.with_ranks('order,family,species'),
        )
        question = predictor.ask(confidence, **kw)
        scope = question.scope
        new = torch.from_numpy(scope.inside[t[n:]])
        answers = np.asarray(question.rule(scope.probs(EVEN.node_probs(p[n:][new]))[0]))
        right.append(np.mean(scope.tax.is_ancestor(answers, scope.at[t[n:][new.numpy()]])))
    assert np.mean(right) >= confidence - 3 * np.std(right) / np.sqrt(len(right))
    assert np.mean(right) <= confidence + 0.12  # and it is not kept by saying nothing


def test_confidence_is_chosen_when_one_asks(toy):
    f, predictor = toy
    x, t = split_tensors(f, 'test')
    depth = [
        EVEN.depths[EVEN.index(table(predictor.ask(c), predictor, x)['path'].replace('', 'life').tolist())].mean()
        for c in (0.6, 0.8, 0.95, 0.999)
    ]
    assert depth == sorted(depth, reverse=True) and depth[0] > depth[-1]


@pytest.mark.parametrize(
    'kw,says',
    [
        (dict(confidence=1.2), 'between 0 and 1, not 1.2'),
        (dict(confidence=95), 'Write 0.95 for 95 %'),
        (dict(confidence=0), 'between 0 and 1, not 0'),
        (dict(novel=1.0), 'at least 0 and below 1'),
        (dict(candidates=-1), '0 or more'),
        (dict(rule='garantee'), "There is no rule 'garantee'.*Did you mean 'guarantee'"),
        (dict(rule='crm', at='rank'), "The rule 'crm' has no setting 'at'; it has none"),
        (dict(rank='genus'), "There is no rank 'genus'; there are order, family, species"),
        (dict(rank=9), 'There is no level 9'),
        (dict(within='d'), "There is no 'd' in the tree of 'life'"),
    ],
    ids=lambda o: str(o)[:40],
)
def test_bad_questions(toy, kw, says):
    with pytest.raises(HiermetricError, match=says):
        toy[1].ask(**kw)


def test_a_list_without_validation_images(toy):
    f, predictor = toy
    gone = predictor.val_targets != EVEN.index('a00')
    less = Predictor(predictor.model, predictor.val_probs[gone], predictor.val_targets[gone], predictor.temperature)
    with pytest.raises(HiermetricError, match='validation images shows anything on this list'):
        less.ask(within='a00')
    assert table(less.ask(rule='argmax', within='a00'), less, split_tensors(f, 'test')[0])['answer'].eq('a00').all()


def test_thinned_calibration():
    f, whole = made()
    part = Predictor.from_model(whole.model, f, most=10 * len(EVEN))
    assert len(part.val_targets) == 10 and len(whole.val_targets) == (f.split == 'val').sum()
    rows = [(np.asarray(o), int(t)) for o, t in zip(whole.val_probs, whole.val_targets)]
    assert all(
        any(np.allclose(o, q, rtol=0, atol=1e-5) and t == u for q, u in rows)
        for o, t in zip(part.val_probs.numpy(), part.val_targets)
    )


# Folders


@pytest.mark.parametrize(
    'head,detector',
    [('classifier', 'softmax'), ('sphere_multi', 'knn'), ('committee', 'prototype'), ('kernel_ridge', 'clade')],
)
def test_every_head_and_detector_comes_back(tmp_path, head, detector):
    f, predictor = made(head, detector=detector)
    x, _ = split_tensors(f, 'test')
    predictor.save_pretrained(tmp_path / 'kept')
    back = Predictor.from_pretrained(tmp_path / 'kept', taxonomy=EVEN)
    torch.testing.assert_close(back.look(x)[0], predictor.look(x)[0], rtol=0, atol=0)
    assert (
        back.fingerprint == predictor.fingerprint
        and back.about == predictor.about
        and back.taxonomy.ranks == ('order', 'family', 'species')
    )
    for kw in ({}, dict(rank='family', within='a', confidence=0.8), dict(at='rank')):
        pd.testing.assert_frame_equal(table(back.ask(**kw), back, x), table(predictor.ask(**kw), predictor, x))
    card = (tmp_path / 'kept' / 'README.md').read_text()
    assert (
        'library_name: hiermetric' in card
        and f'`{head}`' in card
        and predictor.fingerprint in card
        and str(tmp_path) not in card
    )


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "Two predictors in folders"
    root = tmp_path_factory.mktemp('kept')
    for i in range(2):
        made(seed=i)[1].save_pretrained(root / str(i))
    return root


def edit(path, **kw):
    cfg = json.loads(path.read_text())
    cfg['predictor'] |= kw
    path.write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    'harm,says',
    [
        (
            lambda a, b: shutil.copy(b / 'calibration.safetensors', a),
            'The calibration in .* does not belong to its weights',
        ),
        (lambda a, b: shutil.copy(b / 'model.safetensors', a), 'does not belong to its weights'),
        (lambda a, b: edit(a / 'config.json', temperature=2.0), 'does not belong to its weights'),
        (lambda a, b: Taxonomy.from_paths({'x': 'y', 'z': None}).save(a / 'taxonomy.npz'), 'belongs to the taxonomy'),
        (lambda a, b: (a / 'calibration.safetensors').unlink(), 'has lost its calibration'),
        (lambda a, b: (a / 'calibration.safetensors').write_bytes(b'oops'), 'is damaged'),
        (lambda a, b: (a / 'config.json').write_text('{'), 'is damaged'),
        (lambda a, b: edit(a / 'config.json', version=3), 'written by a newer hiermetric'),
        (lambda a, b: (a / 'config.json').unlink(), 'There is no model in .*no config.json'),
    ],
)
def test_folders_that_were_tampered_with(kept, tmp_path, harm, says):
    shutil.copytree(kept / '0', tmp_path / 'a')
    harm(tmp_path / 'a', kept / '1')
    with pytest.raises(HiermetricError, match='is not what was saved|has lost its|There is no model'):
        Predictor.from_pretrained(tmp_path / 'a')
    (tmp_path / 'a' / 'SHA256SUMS').unlink()  # without checksums, as a folder of before, what is inside still tells
    with pytest.raises(HiermetricError, match=says):
        Predictor.from_pretrained(tmp_path / 'a')


def test_other_folders(kept, tmp_path, toy):
    f, predictor = toy
    with pytest.raises(HiermetricError, match='belongs to the taxonomy'):
        Predictor.from_pretrained(kept / '0', taxonomy=RAGGED)
    with pytest.raises(HiermetricError, match="There is no model folder .*Did you mean '0'"):
        model_folder(kept / '0x')
    run = fit(f, 'classifier', epochs=1, embed_dim=16, device='cpu', out=tmp_path / 'run')
    with pytest.raises(HiermetricError, match='has no calibration, so it cannot promise anything'):
        Predictor.from_pretrained(tmp_path / 'run')
    with pytest.raises(HiermetricError, match='was trained on other features'):
        Predictor.from_run(tmp_path / 'run', toy_features(EVEN, seed=5))
    Predictor.from_run(tmp_path / 'run', f).save_pretrained(tmp_path / 'run' / 'model')
    assert Predictor.from_pretrained(tmp_path / 'run').fingerprint == Predictor.from_model(run.model, f).fingerprint
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('precious')
    with pytest.raises(HiermetricError, match='holds no model; it would be replaced'):
        predictor.save_pretrained(tmp_path / 'mine')
    with pytest.raises(HiermetricError, match='belongs to the taxonomy'):
        Predictor.from_model(predictor.model, toy_features(RAGGED))


def test_to_the_hub_and_back(kept, monkeypatch, tmp_path):
    "What would be uploaded, and what comes down, without a network"
    import huggingface_hub, huggingface_hub.hub_mixin as mixin

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kw):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **kw):
            shutil.copytree(folder_path, tmp_path / 'hub' / repo_id)
            return 'https://hub/' + repo_id

    monkeypatch.setattr(mixin, 'HfApi', Hub)
    predictor = Predictor.from_pretrained(kept / '0')
    assert predictor.push_to_hub('me/plankton') == 'https://hub/me/plankton'
    there = tmp_path / 'hub' / 'me' / 'plankton'
    assert {o.name for o in there.iterdir()} == {
        'README.md',
        'config.json',
        'model.safetensors',
        'calibration.safetensors',
        'taxonomy.npz',
        'SHA256SUMS',
    }
    assert "from_pretrained('me/plankton')" in (there / 'README.md').read_text()
    monkeypatch.setattr(
        mixin, 'hf_hub_download', lambda repo_id, filename, **kw: str(tmp_path / 'hub' / repo_id / filename)
    )
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo_id, **kw: str(tmp_path / 'hub' / repo_id))
    assert Predictor.from_pretrained('me/plankton').fingerprint == predictor.fingerprint
    with pytest.raises(HiermetricError, match='belongs to the taxonomy'):
        Predictor.from_pretrained('me/plankton', taxonomy=RAGGED)


def test_not_on_the_hub():
    with pytest.raises(HiermetricError, match='There is no folder nobody/nothing-at-all, and the Hugging Face hub'):
        Predictor.from_pretrained('nobody/nothing-at-all', local_files_only=True)


# Images


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Pictures, a predictor that looks at them, and the features that it should find"
    root = tmp_path_factory.mktemp('pictures')
    backbone, images = toy_backbone(), toy_table(root / 'images')
    f = extract(images, backbone, engine='eager', cache=root / 'cache', progress=False)
    predictor = Predictor.from_model(fit(f, 'classifier', epochs=2, embed_dim=16, device='cpu').model, f)
    predictor.save_pretrained(root / 'kept')
    return SimpleNamespace(
        root=root, f=f, backbone=backbone, predictor=Predictor.from_pretrained(root / 'kept', backbone=backbone)
    )


def test_images_get_what_their_features_get(pictures):
    p = pictures.predictor
    question = p.ask(0.8)
    found = p(pictures.root / 'images', 0.8, engine='eager')
    assert found['image'].tolist() == sorted(pictures.f.paths)
    expected = table(question, p, torch.from_numpy(np.asarray(pictures.f.x[np.argsort(pictures.f.paths)], np.float32)))
    pd.testing.assert_frame_equal(found.drop(columns='image'), expected, rtol=1e-4, atol=1e-5)
    for how in (dict(block=7, batch_size=3), dict(block=1, batch_size=1, workers=1)):
        pd.testing.assert_frame_equal(
            pd.concat(p.stream(pictures.root / 'images', question, engine='eager', **how), ignore_index=True),
            found,
            rtol=1e-4,
            atol=1e-5,
        )


def test_another_backbone_is_refused(pictures):
    with pytest.raises(HiermetricError, match='has other weights or another preprocessing here'):
        Predictor.from_pretrained(pictures.root / 'kept', backbone=toy_backbone(48))(
            pictures.f.paths[0], engine='eager'
        )
    f, predictor = made()
    with pytest.raises(HiermetricError, match='no backbone is known of'):
        predictor(pictures.f.paths[0])


def test_unreadable_images(pictures, tmp_path):
    good = pictures.f.paths[:5].tolist()
    (tmp_path / 'torn.png').write_bytes(Path(good[0]).read_bytes()[:60])
    (tmp_path / 'words.jpg').write_text('not an image')
    mixed, p = [*good[:3], str(tmp_path / 'torn.png'), *good[3:], str(tmp_path / 'words.jpg')], pictures.predictor
    with pytest.raises(HiermetricError, match='Cannot read the image .*torn.png.*--skip-bad'):
        p(mixed, engine='eager')
    seen = []
    with pytest.raises(HiermetricError, match='torn.png'):
        for t in p.stream(mixed, p.ask(), engine='eager', batch_size=2):
            seen += t['image'].tolist()
    assert seen == good[:3]  # what came before is not lost
    with pytest.warns(UserWarning, match='2 unreadable images were left out: .*torn.png.*words.jpg'):
        assert p(mixed, skip_bad=True, engine='eager')['image'].tolist() == good
    with pytest.raises(HiermetricError, match='no image that can be read'), pytest.warns(UserWarning):
        p([tmp_path / 'torn.png'], skip_bad=True, engine='eager')


def test_memory_does_not_grow_and_reading_ahead_is_bounded(pictures):
    "Many small images through a network that does nothing"
    p = Predictor.from_pretrained(pictures.root / 'kept', backbone=pictures.backbone)
    p._running['eager'] = lambda batches: (np.zeros((len(x), pictures.f.x.shape[1]), np.float32) for x in batches)
    question, image = p.ask(), np.zeros((8, 8, 3), np.uint8)

    def peak(n):
        taken = done = ahead = 0

        def images():
            nonlocal taken
            for _ in range(n):
                taken += 1
                yield image

        tracemalloc.start()
        for t in p.stream(images(), question, block=32, batch_size=8, workers=2, engine='eager'):
            done += len(t)
            ahead = max(ahead, taken - done)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken == done == n
        return top, ahead

    peak(50)
    (small, ahead), (large, still) = peak(200), peak(1200)
    assert large < 1.5 * small and ahead <= still <= 5 * 8


def test_walking(tmp_path):
    for i in range(25):
        (tmp_path / f'd{i % 3}').mkdir(exist_ok=True)
        (tmp_path / f'd{i % 3}' / f'{i:02}.JPG').touch()
    for junk in ('.hid/x.png', '__MACOSX/y.png', 'd1/notes.txt', 'd1/.z.png'):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).touch()
    (tmp_path / 'd2' / 'loop').symlink_to(tmp_path)
    whole = list(walk_images(tmp_path))
    assert whole == sorted(whole) and len(whole) == 25
    assert sorted(walk_images(tmp_path, chunk=4)) == whole
    assert list(all_images([tmp_path / 'd0', str(tmp_path / 'd1' / '01.JPG')])) == [
        *(o for o in whole if '/d0/' in o),
        str(tmp_path / 'd1' / '01.JPG'),
    ]
    with pytest.raises(HiermetricError, match="There is no image or folder .*Did you mean 'd1'"):
        all_images([tmp_path / 'd0', tmp_path / 'd11'])
    (tmp_path / 'bare' / '.git').mkdir(parents=True)
    (tmp_path / 'bare' / '.git' / 'x.png').touch()
    with pytest.raises(HiermetricError, match='There is no image in'):
        all_images([tmp_path / 'd0', tmp_path / 'bare'])


# Tables

names = st.text(
    st.characters(exclude_categories=('Cs', 'Cc'), exclude_characters='/>|'), min_size=1, max_size=12
).filter(lambda o: o == o.strip() and o)
number = st.floats(0, 1).map(lambda o: round(o, 6))


@st.composite
def answer_tables(draw):
    rows, most, listed = [], draw(st.integers(0, 2)), draw(st.booleans())
    for i in range(draw(st.integers(1, 5))):
        path = draw(st.lists(names, max_size=3))
        then = (
            draw(st.lists(names, max_size=most, unique=True))
            if i
            else draw(st.lists(names, min_size=most, max_size=most, unique=True))
        )
        row = {
            'image': f'{draw(names)}/{i}.png',
            'answer': path[-1] if path else 'the root',
            'rank': draw(st.sampled_from(['', 'genus'])),
            'path': '/'.join(path),
            'probability': draw(number),
            'novel': draw(st.booleans()),
            'guess': draw(names),
            'guess_probability': draw(number),
        }
        if listed:
            row['listed'] = draw(number)
        for k in range(most):
            row |= {
                f'candidate_{k + 1}': then[k] if k < len(then) else '',
                f'candidate_{k + 1}_probability': draw(number) if k < len(then) else np.nan,
            }
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize('name', list(FORMATS))
@settings(deadline=None, max_examples=25)
@given(answers=answer_tables(), cut=st.integers(0, 5))
def test_tables_come_back(tmp_path_factory, name, answers, cut):
    form, path = FORMATS[name](), tmp_path_factory.mktemp('t') / 't'
    parts = [o for o in (answers[:cut], answers[cut:]) if len(o)]
    path.write_bytes(''.join(form.write(o, 'hiermetric 0, model x', i == 0) for i, o in enumerate(parts)).encode())
    pd.testing.assert_frame_equal(form.read(path), answers, check_dtype=False)


ROWS = pd.DataFrame(
    {
        'image': ['a/1.png', 'a/2.png'],
        'answer': ['Calanus', 'root'],
        'rank': ['genus', ''],
        'path': ['Copepoda/Calanidae/Calanus', ''],
        'probability': [0.97, 1.0],
        'novel': [False, True],
        'guess': ['C. glacialis', 'Sagitta'],
        'guess_probability': [0.5, 0.1],
        'candidate_1': ['C. glacialis', 'Copepoda'],
        'candidate_1_probability': [0.5, 0.4],
    }
)


def test_ecotaxa_as_its_import_wants_it():
    head, types, first, second = (
        dict(enumerate(o.split('\t'))) for o in FORMATS['ecotaxa']().write(ROWS).removeprefix('\ufeff').splitlines()
    )
    column = {v: k for k, v in head.items()}
    assert {v: types[k] for v, k in column.items()} == {
        o: '[f]' if o.endswith(('probability', 'novel')) else '[t]' for o in column
    }
    assert all(o.startswith(('object_', 'img_')) for o in column) and len(set(column)) == len(head)
    said = lambda row: [
        row[column[o]]
        for o in (
            'object_id',
            'img_file_name',
            'object_annotation_category',
            'object_annotation_status',
            'object_annotation_hierarchy',
            'object_probability',
            'object_novel',
        )
    ]
    assert said(first) == [
        'a/1.png',
        'a/1.png',
        'Calanus',
        'predicted',
        'Copepoda>Calanidae>Calanus',
        '0.97',
        '0',
    ] and said(second) == ['a/2.png', 'a/2.png', '', '', '', '1.0', '1']


def test_darwin_core_terms(tmp_path):
    (tmp_path / 't.csv').write_text(FORMATS['dwc']().write(ROWS, 'hiermetric 1.0, model abc'))
    first, second = pd.read_csv(tmp_path / 't.csv', keep_default_na=False).to_dict('records')
    assert set(first) == {
        'occurrenceID',
        'basisOfRecord',
        'scientificName',
        'taxonRank',
        'higherClassification',
        'verbatimIdentification',
        'identifiedBy',
        'identificationVerificationStatus',
        'identificationReferences',
        'identificationRemarks',
        'associatedMedia',
        'dynamicProperties',
    }
    assert (
        first['basisOfRecord'] == 'MachineObservation'
        and first['identificationVerificationStatus'] == 'PredictedByMachine'
        and first['identifiedBy'] == ''
        and first['identificationReferences'] == 'hiermetric 1.0, model abc'
    )
    assert (first['scientificName'], first['taxonRank'], first['higherClassification']) == (
        'Calanus',
        'genus',
        'Copepoda | Calanidae',
    )
    assert (second['scientificName'], second['verbatimIdentification'], second['higherClassification']) == (
        'incertae sedis',
        'root',
        '',
    ) and 'unlike all' in second['identificationRemarks']
    assert json.loads(first['dynamicProperties'])['probability'] == 0.97


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / 'x').write_text('name,size\ncod,3\neel,4\n')
    for name in FORMATS:
        with pytest.raises(HiermetricError, match='is no table of answers'):
            FORMATS[name]().read(tmp_path / 'x')
        with pytest.raises(HiermetricError, match='There is no file'):
            FORMATS[name]().read(tmp_path / 'y')


@pytest.mark.parametrize('name', list(FORMATS))
def test_killed_at_any_byte(tmp_path, name):
    "A table that grew over crashes is the one that grew without"
    rows = pd.concat([ROWS] * 6, ignore_index=True).assign(image=[f'é{i}.png' for i in range(12)])
    whole = AnswerFile(tmp_path / 'whole', name)
    [whole.append(rows[i : i + 3]) for i in range(0, 12, 3)]
    rng = np.random.default_rng(0)
    file = AnswerFile(tmp_path / 'grown', name, {'model': 'hiermetric'})
    for _ in range(40):
        left = list(file.missing(rows['image']))
        if not left:
            break
        if rng.random() < 0.6:
            file.append(rows[rows['image'].isin(left[:3])])
            left = left[3:]
        text = file.format.write(rows[rows['image'].isin(left[:3])], first=file.bytes == 0).encode() if left else b'x'
        file._write_note(file.bytes + len(text))
        with file.path.open('ab') as f:
            f.write(text[: rng.integers(0, len(text))])  # what a killed process leaves
        file = AnswerFile(tmp_path / 'grown', name, {'model': 'hiermetric'})
    assert (tmp_path / 'grown').read_bytes() == (tmp_path / 'whole').read_bytes() and file.images == 12
    pd.testing.assert_frame_equal(file.format.read(file.path), rows, check_dtype=False)


def test_answer_files_of_others(tmp_path):
    AnswerFile(tmp_path / 't', about={'confidence': 0.9, 'within': None}).append(ROWS)
    with pytest.raises(
        HiermetricError, match=r"holds answers to another question: confidence 0.9, now 0.8; within None, now 'x'"
    ):
        AnswerFile(tmp_path / 't', about={'confidence': 0.8, 'within': 'x'})
    with pytest.raises(HiermetricError, match="format 'csv', now 'json'"):
        AnswerFile(tmp_path / 't', 'json', {'confidence': 0.9, 'within': None})
    with pytest.raises(HiermetricError, match="There is no format 'xls'"):
        AnswerFile(tmp_path / 't', 'xls')
    (tmp_path / 't').write_text('short')
    with pytest.raises(HiermetricError, match='is shorter than'):
        AnswerFile(tmp_path / 't', about={'confidence': 0.9, 'within': None})
    (tmp_path / 't.json').write_text('{}')
    with pytest.raises(HiermetricError, match='is damaged'):
        AnswerFile(tmp_path / 't')
    (tmp_path / 'u').write_text('precious')
    with pytest.raises(HiermetricError, match='no table of answers that could be continued'):
        AnswerFile(tmp_path / 'u')
    assert (tmp_path / 'u').read_text() == 'precious'
