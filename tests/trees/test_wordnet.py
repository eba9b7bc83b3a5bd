"WordNet: the carried closure against nltk's own reader, ids from outside it, and what mistakes are told"

import gzip, os, re, shutil, subprocess, sys, zipfile
from collections import Counter
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import pytest
from hiermetric.trees import wordnet as W
from hiermetric.core import HiermetricError, data_dir
from hiermetric.trees.graph import LabelGraph
from hiermetric.trees.wordnet import build_closure, wordnet_graph, wordnet_names, wordnet_taxonomy

ROOT = Path(__file__).parents[2]
corpus = pytest.mark.skipif(
    not (data_dir() / 'nltk_data' / 'corpora' / 'wordnet.zip').exists(),
    reason="nltk's WordNet is not in HIERMETRIC_DATA/nltk_data",
)
tiny_data = pytest.mark.skipif(
    not (data_dir() / 'tiny-imagenet-200.zip').exists(), reason='tiny-imagenet-200.zip is not in HIERMETRIC_DATA'
)
DOG, CHIHUAHUA, GOLDFISH, PARIS = 'n02084071', 'n02085620', 'n01443537', 'n08932568'


@pytest.fixture
def nltk_paths(monkeypatch):
    "Where nltk looks; what was read from elsewhere is forgotten before and after"
    import nltk.data

    def look_in(*paths):
        monkeypatch.setattr(nltk.data, 'path', [str(p) for p in paths])
        W._corpus.cache_clear()

    yield look_in
    W._corpus.cache_clear()


@pytest.fixture
def with_corpus(nltk_paths):
    nltk_paths(data_dir() / 'nltk_data')


def imagenet():
    return sorted(set(W._closure()) - {p for _, up in W._closure().values() for p in up})


def tiny():
    return zipfile.ZipFile(data_dir() / 'tiny-imagenet-200.zip').read('tiny-imagenet-200/wnids.txt').decode().split()


def python(code, **env):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | env, check=True
    ).stdout.strip()


# the carried closure


def test_closure_is_closed_and_rooted():
    table = W._closure()
    assert all(p in table for _, up in table.values() for p in up)
    assert [w for w, (_, up) in table.items() if not up] == ['n00001740']
    assert len({name for name, _ in table.values()}) == len(table) == 1860 and len(imagenet()) == 1000


@corpus
def test_closure_equals_what_nltk_answers(with_corpus):
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.data import find

    wn = WordNetCorpusReader(find('corpora/wordnet.zip/wordnet/'), None)

    def wnid(s):
        return f'{s.pos()}{s.offset():08d}'

    for w, (name, up) in W._closure().items():
        s = wn.synset_from_pos_and_offset(w[0], int(w[1:]))
        assert sorted(up) == sorted(wnid(p) for p in s.hypernyms() + s.instance_hypernyms()), w
        lemma, _, sense = name.partition(' (')
        assert lemma.replace(' ', '_') == s.lemma_names()[0], w
        if sense:
            assert int(sense[:-1]) == int(s.name().rsplit('.', 1)[1]), w
    assert {
        wnid(o)
        for w in imagenet()
        for path in wn.synset_from_pos_and_offset('n', int(w[1:])).hypernym_paths()
        for o in path
    } == set(W._closure())


@corpus
def test_hypernyms_stand_in_the_order_of_the_source(with_corpus):
    "Against a second way of reading: all pointers of the line, by one expression"
    text = zipfile.ZipFile(data_dir() / 'nltk_data' / 'corpora' / 'wordnet.zip').read('wordnet/data.noun').decode()
    several = {w: up for w, (_, up) in W._closure().items() if len(up) > 1}
    assert len(several) == 75
    for w, up in several.items():
        line = re.search(rf'^{w[1:]} .*$', text, re.M).group()
        assert re.findall(r' @i? (\d{8}) n', line.split('|')[0]) == [p[1:] for p in up]


@corpus
def test_closure_is_what_the_builder_makes(with_corpus, tmp_path):
    ids = (Path(find_spec('timm').origin).parent / 'data/_info/imagenet_synsets.txt').read_text().split()
    assert build_closure(ids, tmp_path / 'a.gz') == 1860 and build_closure(reversed(ids), tmp_path / 'b.gz') == 1860
    assert (tmp_path / 'a.gz').read_bytes() == (tmp_path / 'b.gz').read_bytes()
    assert gzip.decompress((tmp_path / 'a.gz').read_bytes()) == gzip.decompress(
        (files('hiermetric') / 'data' / W.CLOSURE).read_bytes()
    )
    assert sorted(ids) == imagenet()


def test_closure_needs_neither_nltk_nor_anything_heavy():
    code = f"""import sys; from hiermetric.trees.wordnet import *
tax = wordnet_taxonomy(['{CHIHUAHUA}', '{GOLDFISH}', 'n02123045']); assert tax.n_leaves==3
print([o for o in ('nltk', 'torch', 'matplotlib', 'pandas', 'timm', 'plotly') if o in sys.modules])"""
    assert python(code, NLTK_DATA='/nonexistent') == '[]'


def test_the_same_tree_whatever_the_hash_seed():
    code = f"from hiermetric.trees.wordnet import *; print(wordnet_taxonomy({imagenet()[::5]!r}).fingerprint)"
    assert len({python(code, PYTHONHASHSEED=str(k)) for k in range(3)}) == 1


def test_wheel_carries_the_closure_and_its_licence(tmp_path):
    for o in ('setup.py', 'settings.ini', 'README.md', 'LICENSE', 'MANIFEST.in'):
        if (ROOT / o).exists():
            shutil.copy(ROOT / o, tmp_path)
    shutil.copytree(ROOT / 'hiermetric', tmp_path / 'hiermetric', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, 'setup.py', '-q', 'bdist_wheel'], cwd=tmp_path, check=True, capture_output=True)
    names = zipfile.ZipFile(next((tmp_path / 'dist').glob('*.whl'))).namelist()
    assert {'hiermetric/data/wordnet-imagenet.tsv.gz', 'hiermetric/data/LICENSE-WordNet.txt'} <= set(names)


# graphs and trees


def test_graph_is_the_closure():
    g = wordnet_graph(imagenet())
    names = g.graph.nodes()
    got = {(names[p], names[c]) for p, c in g.graph.edge_list()}
    want = {(W._closure()[p][0], name) for name, up in W._closure().values() for p in up}
    assert got == want and len(g) == 1860


@pytest.mark.parametrize('policy', LabelGraph.policies)
def test_taxonomy_of_all_classes(policy):
    ids = imagenet()
    tax = wordnet_taxonomy(ids, policy)
    names = wordnet_names(ids)
    assert sorted(tax.leaf_names) == sorted(names) and not tax.hollow
    children = np.bincount(tax.parents[1:], minlength=len(tax))
    assert 1 not in children[1:]
    graph = wordnet_graph(ids)
    number = {o: i for i, o in enumerate(graph.graph.nodes())}
    import rustworkx as rx

    for i in tax.leaves[::37]:  # every lineage is a path of the graph, contracted names put back
        for above, below in zip(p := tax.path(int(i), contracted=True).split('/'), p[1:], strict=False):
            assert graph.graph.has_edge(number[above], number[below])
        assert p[0] == 'entity' and number[p[0]] in rx.ancestors(graph.graph, number[p[-1]])


def test_unpruned_taxonomy_has_the_classes_as_leaves():
    ids = imagenet()[::7]
    tax = wordnet_taxonomy(ids, prune=False)
    assert sorted(tax.leaf_names) == sorted(wordnet_names(ids)) and not tax.hollow
    assert tax.prune() == wordnet_taxonomy(ids)


def test_first_parent_stays():
    tax = wordnet_taxonomy([CHIHUAHUA, 'n02123045', GOLDFISH], prune=False)
    assert tax.names[tax.parents[tax.index('dog')]] == 'canine'  # data.noun lists canine before domestic animal


def test_a_class_above_another_is_kept():
    tax = wordnet_taxonomy([DOG, CHIHUAHUA, GOLDFISH])
    assert tax.is_ancestor(tax.index('dog'), tax.index('Chihuahua')) and sorted(tax.leaf_names) == [
        'Chihuahua',
        'goldfish',
    ]
    tax = wordnet_taxonomy(
        ['n01317541', CHIHUAHUA, GOLDFISH]
    )  # 'domestic animal' loses its only child to 'canine' and is a class all the same
    assert sorted(tax.leaf_names) == ['Chihuahua', 'domestic animal', 'goldfish']
    assert sorted(tax.prune().leaf_names) == ['Chihuahua', 'domestic animal', 'goldfish']
    unpruned = wordnet_taxonomy(['n01317541', CHIHUAHUA, GOLDFISH], prune=False)
    assert sorted(unpruned.leaf_names) == ['Chihuahua', 'domestic animal', 'goldfish']


def test_one_class_and_the_root_alone():
    assert wordnet_taxonomy([GOLDFISH]).names == ['entity', 'goldfish']
    assert wordnet_taxonomy(['n00001740']).names == ['entity']
    assert wordnet_taxonomy([GOLDFISH, GOLDFISH]) == wordnet_taxonomy([GOLDFISH])


@tiny_data
def test_tiny_imagenet():
    g = wordnet_graph(tiny())
    tree = g.to_tree()
    tax = wordnet_taxonomy(tiny())
    assert (len(g), g.graph.num_edges(), len(g.dropped()), len(tree), len(tree.hollow), len(tax), tax.n_leaves) == (
        543,
        566,
        24,
        543,
        14,
        297,
        200,
    )
    assert int((g.leaf_paths().paths > 1).sum()) == 54
    assert tree.prune() == tax
    assert tax.path('refrigerator', contracted=True).endswith(
        '/commodity/consumer goods/durables/appliance/home appliance/white goods (1)/refrigerator'
    )


# names


def test_names_answer_in_order_and_repeat():
    assert wordnet_names([GOLDFISH, DOG, GOLDFISH]) == ['goldfish', 'dog', 'goldfish']
    assert wordnet_names(iter(['n02012849', 'n03126707'])) == ['crane (5)', 'crane (4)']


@corpus
def test_no_two_nouns_of_wordnet_share_a_name(with_corpus):
    data, _ = W._corpus()
    ids = ['n' + line[:8].decode() for line in data.splitlines() if not line.startswith(b' ')]
    assert len(ids) == 82115
    assert [n for n, k in Counter(wordnet_names(ids)).items() if k > 1] == []


@corpus
def test_ids_from_outside_join_those_from_inside(with_corpus):
    assert PARIS not in W._closure() and wordnet_names([PARIS]) == ['Paris']
    g = wordnet_graph([CHIHUAHUA, PARIS])
    names = g.graph.nodes()
    i = names.index('Paris')
    assert [names[p] for p in g.parents[i]] == ['national capital']  # an instance, not a kind
    assert sorted(wordnet_taxonomy([CHIHUAHUA, PARIS]).leaf_names) == ['Chihuahua', 'Paris']


@corpus
def test_source_order_of_kinds_and_instances(with_corpus):
    data, _ = W._corpus()
    for w in ('n02084071', PARIS):
        line = data[int(w[1:]) :].split(b'\n', 1)[0].decode().split('|')[0]
        assert list(W._read(w)[2]) == ['n' + o for o in re.findall(r' @i? (\d{8}) n', line)]


# mistakes


@pytest.mark.parametrize(
    'bad',
    [
        'goldfish',
        'n1443537',
        'n014435370',
        'v01443537',
        'N01443537',
        'n01443537 ',
        'n０１４４３５３７',
        '',
        1443537,
        None,
    ],
)
def test_malformed_ids(bad):
    with pytest.raises(HiermetricError) as e:
        wordnet_graph([GOLDFISH, bad])
    assert str(e.value) == f"{bad!r} is not a WordNet noun id: 'n' and eight digits, such as 'n02084071' (dog)."


@corpus
@pytest.mark.parametrize('bad', ['n00000001', 'n01443538', 'n99999999', 'n00000000'])
def test_ids_that_wordnet_does_not_have(with_corpus, bad):
    with pytest.raises(HiermetricError) as e:
        wordnet_taxonomy([GOLDFISH, bad])
    assert str(e.value) == f"WordNet 3.0 has no noun {bad!r}; check the id (ids of other WordNet releases differ)."


def test_missing_corpus(nltk_paths, tmp_path):
    nltk_paths(tmp_path)
    with pytest.raises(HiermetricError) as e:
        wordnet_taxonomy([GOLDFISH, PARIS])
    assert str(e.value) == (
        "'n08932568' is not among or above the 1,000 ImageNet ids that hiermetric carries, and nltk's WordNet "
        "corpus, which holds all others, "
        "was not found: run `python -m nltk.downloader wordnet` once, or let NLTK_DATA name the folder that holds "
        "corpora/wordnet."
    )
    assert isinstance(e.value.__cause__, LookupError)


@pytest.mark.parametrize('call', [wordnet_names, wordnet_graph, wordnet_taxonomy])
def test_empty_and_single(call):
    with pytest.raises(HiermetricError, match='The list of WordNet ids is empty; give one id at least.'):
        call([])
    with pytest.raises(HiermetricError, match="A list of ids is wanted, not the one string 'n01443537'."):
        call(GOLDFISH)


def test_wrong_policy():
    with pytest.raises(
        HiermetricError,
        match="There is no policy 'frist'; there are first, shortest, longest, balanced. Did you mean 'first'?",
    ):
        wordnet_taxonomy([GOLDFISH, DOG], 'frist')
