"Every file in a folder of images is an image of the table, or is named in a note or an error."

import os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from hiermetric.images.folders import IMAGE_TYPES, find_images, folder_dataset
from hiermetric.images.named import load_dataset
from hiermetric.images.features import extract
from toys import message, touch, toy_backbone


def test_what_is_not_taken_is_named_with_what_helps(tmp_path):
    d = touch(
        tmp_path / 'd',
        'bee/1.jpg',
        'bee/2.jfif',
        'bee/3.JP2',
        'bee/4.nef',
        'bee/5',
        'ant/1.PNG',
        'ant/.6.png',
        'ant/._7.png',
        'ant/notes.txt',
        '.DS_Store',
        'loose.bmp',
    )
    table = load_dataset(d)
    assert sorted(Path(o).name for o in table.samples['path']) == ['1.PNG', '1.jpg', '2.jfif']
    assert table.notes[:5] == (
        '1 file that is no image was left out (ant/notes.txt)',
        '2 pictures of kinds that are not read were left out (bee/3.JP2, bee/4.nef): save .jp2, .nef as PNG or TIFF',
        '1 file without a suffix was left out (bee/5): give it one such as .jpg where it is an image',
        '1 hidden image was left out (ant/.6.png): rename what should count',
        '1 image outside any class folder was left out (loose.bmp)',
    )
    d = touch(tmp_path / 'e', 'bee/1.nef', 'ant/2')
    assert (
        'There is no image in' in (m := message(load_dataset, d)) and 'save .nef as PNG or TIFF' in m and 'ant/2' in m
    )


KINDS = [
    '.jpg',
    '.JPG',
    '.jfif',
    '.jp2',
    '.heic',
    '.HEIF',
    '.avif',
    '.cr2',
    '.psd',
    '.txt',
    '.csv',
    '.zip',
    '',
    '.1',
    '.jpg~',
    '.tif',
    '.pbm',
]


@pytest.mark.filterwarnings('ignore::hiermetric.trees.arrays.TaxonomyWarning')
def test_every_file_is_somewhere(tmp_path):
    "A hundred random trees: found, named, or a note would be too long"
    rng = np.random.default_rng(0)
    for k in range(100):
        files = {
            '/'.join(f'c{o}.{o}' for o in rng.integers(3, size=rng.integers(1, 3)))
            + f"/{'.' if rng.random() < 0.1 else ''}{i}{rng.choice(KINDS)}"
            for i in range(8)
        } | {'z/0.png'}
        table = folder_dataset(touch(tmp_path / f'{k}', *files))
        notes = ' '.join(table.notes)
        found = {os.path.relpath(o, table.root) for o in table.samples['path']}
        quiet = {o for o in files if Path(o).name.startswith('.') and Path(o).suffix.lower() not in IMAGE_TYPES}
        assert (
            found <= files
            and not found & quiet
            and all(
                (o in found) != (f' {o},' in f' {notes},'.replace('(', ' ').replace(')', ',')) for o in files - quiet
            )
        ), (files - found, notes)


@pytest.mark.usefixtures('one_thread')
def test_jfif_and_heic_are_images(tmp_path):
    for i in range(6):
        (tmp_path / 'd' / f'c{i % 2}').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 20), (40 * i, 9, 9)).save(tmp_path / 'd' / f'c{i % 2}' / f'{i}.jfif', 'JPEG')
    heif = pytest.importorskip('pillow_heif')
    heif.from_pillow(Image.new('RGB', (64, 64), 'red')).save(tmp_path / 'd' / 'c0' / '6.heic')
    f = extract(load_dataset(tmp_path / 'd'), toy_backbone(), cache=tmp_path / 'c', engine='eager', progress=False)
    assert len(f) == 7 and any(str(o).endswith('6.heic') for o in f.paths)


def test_without_its_library_heic_is_named_with_how_to_get_it(tmp_path):
    touch(tmp_path / 'd', 'bee/1.jpg', 'bee/2.heic', 'bee/3.HEIF', 'bee/4.jp2')
    code = (
        "import sys; sys.modules['pillow_heif'] = None\nfrom hiermetric.images.folders import folder_dataset\n"
        "print(*folder_dataset(sys.argv[1]).notes, sep='\\n')"
    )
    run = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'd')], capture_output=True, text=True)
    assert (
        '3 pictures of kinds that are not read were left out (bee/2.heic, bee/3.HEIF, bee/4.jp2): pip install '
        'pillow-heif to read .heic and .heif and save .jp2 as PNG or TIFF' in run.stdout
    ), run.stderr


def test_a_dot_in_a_class_is_part_of_its_name(tmp_path):
    d = touch(
        tmp_path / 'Plankton v1.2',
        *(f'Calanus sp.{i}/{j}.jpg' for i in (1, 2) for j in range(3)),
        *(f'Calanus.jpg/{j}.jpg' for j in range(2)),
        'Acartia/a.b.jpg',
    )
    table = load_dataset(d)
    assert table.samples['class'].value_counts().to_dict() == {
        'Calanus sp.1': 3,
        'Calanus sp.2': 3,
        'Calanus.jpg': 2,
        'Acartia': 1,
    } and set(table.taxonomy.leaf_names) == set(table.samples['class'])
    assert table.name == 'Plankton v1.2' and not any('no image' in o for o in table.notes)


@pytest.mark.skipif(os.name == 'nt', reason='links need rights')
def test_a_folder_under_two_names_is_named_and_a_link_that_leads_back_is_none(tmp_path):
    d = touch(tmp_path / 'd', 'bee/1.jpg', 'ant/2.jpg', 'ant/deep/3.jpg')
    touch(tmp_path, 'elsewhere/4.jpg')
    (d / 'fly').symlink_to(tmp_path / 'elsewhere')
    (d / 'bee' / 'up').symlink_to(d)
    (d / 'ant' / 'deep' / 'self').symlink_to('.')
    assert sorted(find_images(d)[0]['folder']) == ['ant', 'ant/deep', 'bee', 'fly']
    (d / 'wasp').symlink_to('bee')
    assert (
        message(find_images, d)
        == f'{d}/bee and {d}/wasp are one folder, by a link, and its images would count twice; take one of the two '
        f'out of {d}.'
    )
    (d / 'wasp').unlink()
    (d / 'gnat').symlink_to(tmp_path / 'elsewhere')
    assert f'{d}/fly and {d}/gnat are one folder' in message(load_dataset, d)
    (d / 'gnat').unlink()
    (d / 'gone').symlink_to(tmp_path / 'nowhere')
    assert 'gone' in find_images(d)[1]  # a link to nothing is a file
    (d / 'bee' / 'gone.jpg').symlink_to(tmp_path / 'nowhere.jpg')
    assert str(d / 'bee' / 'gone.jpg') in set(find_images(d)[0]['path'])  # and named when it is read


def test_what_lies_in_a_folder_of_new_images_is_counted(tmp_path, monkeypatch):
    from collections import Counter
    from answering import picture, predicts, tiny_predictor
    from hiermetric.running.questions import passed_over, walk_images
    from hiermetric.trees.taxonomy import Taxonomy

    picture(tmp_path / 'in' / 'a.png', 0)
    for o in ('b.heic', 'c.HEIC', 'd.txt', 'e', '.hidden', 'sub/f.raw'):
        (tmp_path / 'in' / o).parent.mkdir(exist_ok=True)
        (tmp_path / 'in' / o).touch()
    monkeypatch.setattr('hiermetric.running.questions.IMAGE_TYPES', {'.png'})
    n = Counter()
    assert (
        [Path(o).name for o in walk_images(tmp_path / 'in', others=n)] == ['a.png']
        and n == {'.heic': 2, '.txt': 1, '': 1, '.raw': 1}
        and passed_over(Counter()) == ''
    )
    run = predicts(
        monkeypatch,
        tiny_predictor(tmp_path / 'tiny', Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}), ['cod', 'eel']),
    )
    r = run('in', '--out', 'a.csv', at=tmp_path)
    assert (
        r.code == 0
        and 'Note: 5 files that are no images, or of no kind that is read, were passed over: 2 .heic, 1 .txt, 1 '
        'without a suffix, 1 .raw.'
        in r.err
        and 'pip install pillow-heif' in r.err
    )
