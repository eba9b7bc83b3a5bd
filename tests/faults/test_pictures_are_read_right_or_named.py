"Whatever a file holds, `read_image` gives its pixels as an independent reader has them, or one sentence that names it."

import io, os, re, socket, struct, subprocess, sys, threading, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
import imageio.v3, numpy as np, pytest, tifffile, torch
from PIL import EpsImagePlugin, Image, ImageOps
from hiermetric.images.pictures import PictureWarning, read_bands, read_image
from hiermetric.images.backbones import Transform
from hiermetric.core import HiermetricError
from hiermetric.images.features import extract
from hiermetric.images.pictures import image_size
from toys import toy_backbone, toy_table

FORMATS = ['PNG', 'JPEG', 'TIFF', 'GIF', 'WEBP', 'BMP', 'PPM']


def picture(h=40, w=48):
    "Smooth colours and some noise"
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(
        (
            np.stack([x * 200 // w, y * 200 // h, 200 - (x + y) * 200 // (h + w)], -1)
            + np.random.default_rng(0).integers(0, 50, (h, w, 3))
        ).astype(np.uint8)
    )


def png(w, h, depth, colour, rows, before=(), after=()):
    "A PNG file byte by byte"
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        chunk(*o)
        for o in [
            (b'IHDR', struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, 0)),
            *before,
            (b'IDAT', zlib.compress(b''.join(b'\0' + o for o in rows))),
            *after,
            (b'IEND', b''),
        ]
    )


def said(f, *args, **kw):
    with pytest.raises(HiermetricError) as e:
        f(*args, **kw)
    return str(e.value)


def in_time(f, *args):
    "What `f` said, unless it waits for ever"
    out = []
    t = threading.Thread(target=lambda: out.append(said(f, *args)), daemon=True)
    t.start()
    t.join(20)
    assert out, f'{args} was not answered'
    return out[0]


# ---------- damage

DAMAGE = """
import io, sys, warnings
from pathlib import Path
import numpy as np
from PIL import Image
from hiermetric.images.pictures import image_size, read_image
from hiermetric.core import HiermetricError
folder, n, formats = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
warnings.simplefilter('always')
rng = np.random.default_rng(0); exif = Image.Exif(); exif[0x112] = 6
smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 40), 3)
for kind in formats:
    more = {'exif': exif} if kind in ('PNG', 'JPEG', 'TIFF', 'WEBP') else {}
    if kind == 'TIFF': more['compression'] = 'tiff_lzw'
    out = io.BytesIO(); smooth.save(out, kind, **more)
    whole, read, refused = out.getvalue(), 0, 0
    for k in range(n):
        b = bytearray(whole)
        if k % 4 == 0: b[rng.integers(8, len(b))] ^= 1 << int(rng.integers(8))
        elif k % 4 == 1:
            for i in rng.integers(8, len(b), 10): b[i] = rng.integers(256)
        elif k % 4 == 2: del b[rng.integers(12, len(b)):]
        else: b[rng.integers(8, min(len(b), 200))] = rng.integers(256)
        path = f'{folder}/{k}.{kind.lower()}'; Path(path).write_bytes(b)
        print(path, file=sys.stdout, flush=True)   # the last one is the culprit
        try: x = read_image(path, notes=[]); read += 1
        except HiermetricError as e:
            refused += 1
            assert str(e).startswith(f'Cannot read the image {path}: ') and '\\n' not in str(e), e
        else:
            assert image_size(path) == (x.shape[2], x.shape[1]) and x.shape[0] in (1, 3), (path, x.shape)
    print(kind, 'read', read, 'refused', refused)
"""


def damaged(folder, n, formats):
    "Many damages in a process of their own, so that its death is seen"
    run = subprocess.run(
        [sys.executable, '-c', DAMAGE, str(folder), str(n), *formats], capture_output=True, text=True, timeout=60 + n
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and not re.search(r'\w+Warning:|Traceback', run.stderr), (
        run.returncode,
        lines[-1:],
        run.stderr[-2000:],
    )  # libjpeg and libtiff have lines of their own
    counts = {o.split()[0]: o.split()[2::2] for o in lines if ' read ' in o}
    assert all(int(a) + int(b) == n and int(b) > n / 10 for a, b in counts.values()) and list(counts) == formats, counts
    return counts


def test_damaged_files_are_read_or_named_and_end_no_process(tmp_path):
    damaged(tmp_path, 60, FORMATS)


@pytest.mark.long
@pytest.mark.parametrize('kind', FORMATS)
def test_four_hundred_damages_of_each_kind(tmp_path, kind):
    print(damaged(tmp_path, 400, [kind]))


def test_decoders_keep_their_warnings_and_the_filters_stay(tmp_path):
    "Also where many threads read at once"
    for i in range(8):
        picture().save(tmp_path / f'{i}.jpg')
        Image.new('P', (4, 4)).save(tmp_path / f'{i}.png', transparency=b'\0')
    exif = Image.Exif()
    exif[0x112] = 6
    picture().save(tmp_path / '8.jpg', exif=exif)
    b = (tmp_path / '8.jpg').read_bytes()
    at = b.find(b'Exif\0\0')
    (tmp_path / '8.jpg').write_bytes(b[: at + 14] + b'\xff\xff' + b[at + 16 :])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            shapes = [o.shape for o in pool.map(read_image, sorted(tmp_path.iterdir()) * 20)]
        assert warnings.filters == before and set(shapes) == {(3, 40, 48), (3, 4, 4), (3, 48, 40)}
    with pytest.warns(UserWarning, match='Corrupt EXIF'), Image.open(tmp_path / '8.jpg'):
        pass  # Pillow has something to say


# ---------- what is no picture, or too much of one


def enormous(folder):
    "Files whose heads promise 25,000 × 25,000 pixels"
    n, save = 25000, lambda kind: (out := io.BytesIO(), picture().save(out, kind))[0].getvalue()
    jpg = bytearray(save('JPEG'))
    at = jpg.find(b'\xff\xc0')
    jpg[at + 5 : at + 9] = struct.pack('>HH', n, n)
    bmp = bytearray(save('BMP'))
    bmp[18:26] = struct.pack('<ii', n, n)
    gif = bytearray(save('GIF'))
    gif[6:10] = struct.pack('<HH', n, n)
    tif = (
        save('TIFF')
        .replace(struct.pack('<HHII', 256, 4, 1, 48), struct.pack('<HHII', 256, 4, 1, n))
        .replace(struct.pack('<HHII', 257, 4, 1, 40), struct.pack('<HHII', 257, 4, 1, n))
    )
    files = {
        'png': png(n, n, 8, 2, [bytes(3 * n)] * 9),
        'jpg': jpg,
        'bmp': bmp,
        'gif': gif,
        'tif': tif,
        'ppm': b'P6 %d %d 255\n' % (n, n),
    }
    for kind, data in files.items():
        (folder / f'a.{kind}').write_bytes(data)
    return [folder / f'a.{kind}' for kind in files]


def test_what_would_fill_the_memory_is_refused_by_its_head(tmp_path, monkeypatch):
    for p in enormous(tmp_path):
        for f in (read_image, image_size):
            assert said(f, p).startswith(
                f'Cannot read the image {p}: it has more than 178,956,970 pixels'
            ) and 'PIL.Image.MAX_IMAGE_PIXELS' in said(f, p)
    picture().save(tmp_path / 'b.png')
    picture().save(tmp_path / 'b.jpg')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40 * 48 // 2 - 1)
    for o in ('b.png', 'b.jpg'):
        assert '1,918 pixels' in said(read_image, tmp_path / o)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40 * 48 // 2)  # as the message says
    for o in ('b.png', 'b.jpg'):
        assert read_image(tmp_path / o).shape == (3, 40, 48)


@pytest.mark.skipif(os.name == 'nt', reason='no such files')
def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'a.jpg')
    os.mkfifo(tmp_path / 'a.npy')
    (tmp_path / 'z.jpg').symlink_to('/dev/zero')
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(tmp_path)
        s.bind('s.jpg')
        os.chdir(here)  # its path may be too long
        for f in (read_image, image_size, Transform(32).pixels):
            for o in ('a.jpg', 's.jpg', 'z.jpg'):
                assert 'it is a pipe, a socket or a device' in in_time(f, tmp_path / o)
    assert 'it is a pipe' in in_time(read_bands, tmp_path / 'a.npy', 4) and 'it is a pipe' in in_time(
        image_size, str(tmp_path / 'a.npy')
    )


def test_nothing_is_handed_to_another_program(tmp_path, monkeypatch):
    (tmp_path / 'bin').mkdir()
    gs = tmp_path / 'bin' / 'gs'
    gs.write_text(f'#!/bin/sh\necho called >> {tmp_path}/called\n')
    gs.chmod(0o755)
    monkeypatch.setenv('PATH', f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    out = io.BytesIO()
    picture().save(out, 'EPS')
    (tmp_path / 'a.jpg').write_bytes(out.getvalue())
    assert 'the formats that are read are' in said(read_image, tmp_path / 'a.jpg') and 'Cannot read' in said(
        image_size, tmp_path / 'a.jpg'
    )
    assert not (tmp_path / 'called').exists()


def test_other_arrays_under_an_array_s_name(tmp_path):
    np.savez(tmp_path / 'a.npz', x=np.zeros((4, 4, 4)))
    (tmp_path / 'a.npz').rename(tmp_path / 'a.npy')
    assert f'Cannot read the bands of {tmp_path}/a.npy' in said(read_bands, tmp_path / 'a.npy', 4)


# ---------- deep pictures, beside tifffile

KINDS = [
    ('u1', 255),
    ('i1', 127),
    ('<u2', 65535),
    ('>u2', 65535),
    ('<i2', 32767),
    ('>i2', 32767),
    ('<f4', 1),
    ('>f4', 1),
]


@pytest.mark.parametrize('compression', [None, 'deflate'])
@pytest.mark.parametrize('meaning', ['minisblack', 'miniswhite'])
@pytest.mark.parametrize('kind,top', KINDS)
def test_tiff_is_what_tifffile_reads(tmp_path, kind, top, meaning, compression):
    a = np.random.default_rng(1).uniform(0, top, (20, 30)).astype(kind)
    a[0, 0], a[0, 1] = 0, top
    tifffile.imwrite(
        tmp_path / 'a.tif', a, photometric=meaning, byteorder=kind[0] if kind[0] in '<>' else '<', compression=None
    )
    if compression:  # by another program: libtiff
        try:
            with Image.open(tmp_path / 'a.tif') as im:
                tags = {k: im.tag_v2[k] for k in (262, 339) if k in im.tag_v2}
                im.save(tmp_path / 'a.tif', compression='tiff_adobe_deflate', tiffinfo=tags)
        except OSError:
            pytest.skip('Pillow does not write it')
    b = tifffile.imread(tmp_path / 'a.tif')
    page = tifffile.TiffFile(tmp_path / 'a.tif').pages[0]
    top = {'f': 1, 'u': 2 ** (8 * b.dtype.itemsize) - 1, 'i': min(65535, 2 ** (8 * b.dtype.itemsize - 1) - 1)}[
        b.dtype.kind
    ]  # Pillow makes 32 bits of signed 16, whose white is that of 16
    want = b.astype(float) / top * 255
    want = 255 - want if page.photometric.name == 'MINISWHITE' else want
    try:
        x = read_image(tmp_path / 'a.tif')
    except HiermetricError as e:
        assert kind in ('i1', '>u2', '<i2', '>i2') and meaning == 'miniswhite' and f'{tmp_path}/a.tif' in str(e)
        return  # Pillow knows no such kind, and says so
    assert x.shape == (1, 20, 30) and np.abs(x[0].numpy() - want).max() <= 0.501


def test_twelve_bits_that_are_said_to_be_twelve(tmp_path):
    "Two values in three bytes, written by hand"
    v = np.random.default_rng(2).integers(0, 4096, (4, 6))
    v[0, :2] = 0, 4095
    rows = b''.join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in v.reshape(-1, 2).tolist())
    tags = [
        (256, 3, 6),
        (257, 3, 4),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1),
        (278, 3, 4),
        (279, 4, len(rows)),
    ]
    (tmp_path / 'a.tif').write_bytes(
        b'II*\0\x08\0\0\0'
        + struct.pack('<H', len(tags))
        + b''.join(struct.pack('<HHII', t, k, 1, o) for t, k, o in tags)
        + bytes(4)
        + rows
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        x = read_image(tmp_path / 'a.tif')
    np.testing.assert_array_equal(x[0].numpy(), np.round(v * (255 / 4095)))


@pytest.mark.parametrize('kind', ['i1', '<i2', '<f4'])
def test_values_below_zero_are_named(tmp_path, kind):
    tifffile.imwrite(tmp_path / 'a.tif', np.array([[-1, 1]] * 2, kind), photometric='minisblack')
    assert said(read_image, tmp_path / 'a.tif').startswith(
        f'Cannot read the image {tmp_path}/a.tif: its values run from -1 to 1 and not from 0 to '
    )


def test_arrays_are_scaled_by_the_range_of_their_type():
    for kind, top in [('i1', 127), ('i2', 32767), ('u2', 65535), ('>u2', 65535), ('i4', 65535), ('f4', 1), ('f8', 1)]:
        a = np.array([[0, top]], kind)
        assert read_image(a).tolist() == [[[0, 255]]] and read_bands(np.stack([a] * 4, -1), 4)[2].tolist() == [
            [0, 255]
        ], kind
    assert 'from -2 to 1' in said(read_image, np.array([[-2, 1]], 'i2'))


def test_other_kinds_of_tiff(tmp_path):
    "Palette, CMYK, alpha, planes, 1, 2 and 4 bits, 16 bits a colour"
    rgb, grey = np.asarray(picture()), np.asarray(picture().convert('L'))
    ways = {
        'planes': (dict(data=np.moveaxis(rgb, -1, 0), photometric='rgb', planarconfig='separate'), rgb),
        'deep': (dict(data=rgb.astype('u2') * 257, photometric='rgb'), rgb),
        'bits': (dict(data=grey > 128, photometric='minisblack'), (grey > 128) * 255),
        'white bits': (dict(data=grey > 128, photometric='miniswhite'), (grey <= 128) * 255),
        'palette': (
            dict(data=grey, photometric='palette', colormap=(np.stack([np.arange(256)[::-1]] * 3) * 257).astype('u2')),
            np.stack([255 - grey] * 3, -1),
        ),
    }
    for name, (kw, want) in ways.items():
        tifffile.imwrite(tmp_path / f'{name}.tif', **kw)
        x = read_image(tmp_path / f'{name}.tif')
        np.testing.assert_array_equal(x.permute(1, 2, 0).squeeze(-1).numpy(), want, name)
    alpha = np.dstack([rgb, np.where(grey > 128, 255, 0).astype('u1')])
    tifffile.imwrite(tmp_path / 'a.tif', alpha, photometric='rgb', extrasamples=['unassalpha'])
    np.testing.assert_array_equal(
        read_image(tmp_path / 'a.tif', (9, 8, 7)).permute(1, 2, 0).numpy(),
        np.where(alpha[..., 3:] > 0, rgb, np.uint8([9, 8, 7])),
    )
    cmyk = np.dstack([255 - rgb, np.zeros_like(grey)])
    tifffile.imwrite(tmp_path / 'c.tif', cmyk, photometric='separated')
    np.testing.assert_array_equal(read_image(tmp_path / 'c.tif').permute(1, 2, 0).numpy(), rgb)


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'gif', 'tif', 'pgm', 'ppm'])
def test_plain_pictures_are_what_imageio_reads(tmp_path, suffix):
    im = picture() if suffix != 'pgm' else picture().convert('L')
    im.save(tmp_path / f'a.{suffix}')
    want = imageio.v3.imread(tmp_path / f'a.{suffix}')
    np.testing.assert_array_equal(
        read_image(tmp_path / f'a.{suffix}').permute(1, 2, 0).squeeze(-1).numpy(), want[0] if want.ndim == 4 else want
    )


# ---------- one colour of PNG is transparent


@pytest.mark.parametrize('depth', [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_png_shows_the_background(tmp_path, depth):
    values = np.array(
        [0, 1]
        if depth == 1
        else [0, 1, 2, 3]
        if depth == 2
        else [0, 1, 14, 15]
        if depth == 4
        else [0, 1, 2**depth - 2, 2**depth - 1]
    )
    row = int(''.join(f'{v:0{depth}b}' for v in values).ljust(8, '0'), 2)
    row = row.to_bytes(max(1, len(values) * depth // 8), 'big')
    for clear in values.tolist():
        (tmp_path / 'a.png').write_bytes(
            png(len(values), 1, depth, 0, [row], before=[(b'tRNS', struct.pack('>H', clear))])
        )
        want = [[9, 8, 7] if v == clear else [round(v * 255 / (2**depth - 1))] * 3 for v in values.tolist()]
        assert read_image(tmp_path / 'a.png', (9, 8, 7))[:, 0].T.tolist() == want, (depth, clear)


def test_the_transparent_colour_of_png_shows_the_background_or_is_refused(tmp_path):
    (tmp_path / 'a.png').write_bytes(
        png(2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], before=[(b'tRNS', struct.pack('>HHH', 1, 2, 3))])
    )
    assert read_image(tmp_path / 'a.png', (9, 8, 7))[:, 0].T.tolist() == [[9, 8, 7], [4, 5, 6]]
    (tmp_path / 'b.png').write_bytes(
        png(2, 1, 16, 2, [struct.pack('>6H', 257, 514, 771, 0, 0, 9)], before=[(b'tRNS', struct.pack('>HHH', 0, 0, 0))])
    )  # 9 is not 0, but is once it has 8 bits
    assert 'save it with an alpha channel' in said(read_image, tmp_path / 'b.png')


# ---------- the way up, and the size


@pytest.mark.parametrize('flag', range(1, 9))
def test_size_and_pixels_agree_on_the_way_up(tmp_path, flag):
    exif = Image.Exif()
    exif[0x112] = flag
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{flag}"/></rdf:RDF></x:xmpmeta>'
    ).encode()
    for kind in ('jpg', 'png', 'tif', 'webp'):
        picture().save(tmp_path / f'a.{kind}', exif=exif)
    picture().save(tmp_path / 'deep.tif', exif=exif, compression='tiff_lzw')
    Image.fromarray(np.arange(40 * 48, dtype='u2').reshape(40, 48) * 30).save(tmp_path / 'grey.tif', exif=exif)
    picture().save(tmp_path / 'x.jpg', xmp=xmp)
    pixels = np.asarray(picture())
    (tmp_path / 'behind.png').write_bytes(
        png(48, 40, 8, 2, [o.tobytes() for o in pixels], after=[(b'eXIf', exif.tobytes().removeprefix(b'Exif\0\0'))])
    )
    (tmp_path / 'x.png').write_bytes(
        png(48, 40, 8, 2, [o.tobytes() for o in pixels], after=[(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + xmp)])
    )
    for p in sorted(tmp_path.iterdir()):
        x = read_image(p)
        with Image.open(io.BytesIO(p.read_bytes())) as im:
            opened = image_size(im)
            want = ImageOps.exif_transpose(im)
        assert (
            image_size(p)
            == image_size(str(p))
            == opened
            == want.size
            == (x.shape[2], x.shape[1])
            == ((48, 40) if flag < 5 else (40, 48))
        ), p
        if p.name != 'grey.tif':
            np.testing.assert_array_equal(x.permute(1, 2, 0).numpy(), np.asarray(want), str(p))
        with Image.open(io.BytesIO(p.read_bytes())) as im:
            assert torch.equal(read_image(im), x) and image_size(im) == want.size


def test_the_size_of_a_png_costs_no_decoding(tmp_path, monkeypatch):
    picture().save(tmp_path / 'a.png')
    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', lambda *a: pytest.fail('decoded'))
    assert image_size(tmp_path / 'a.png') == (48, 40)


def test_heic_is_read_where_its_library_is(tmp_path):
    heif = pytest.importorskip('pillow_heif')
    smooth = picture().resize((6, 5)).resize((48, 40), 3)
    heif.from_pillow(smooth).save(tmp_path / 'a.heic', quality=-1)
    x = read_image(tmp_path / 'a.heic')
    assert (
        image_size(tmp_path / 'a.heic') == (48, 40)
        and np.abs(x.permute(1, 2, 0).numpy().astype(int) - np.asarray(smooth)).mean() < 4
    )
    code = (
        "import sys; sys.modules['pillow_heif'] = None\nfrom hiermetric.images.pictures import read_image\n"
        "read_image(sys.argv[1])"
    )
    assert (
        'a.heic: it is a HEIC picture; pip install pillow-heif'
        in subprocess.run(
            [sys.executable, '-c', code, str(tmp_path / 'a.heic')], capture_output=True, text=True
        ).stderr.splitlines()[-1]
    )


# ---------- what is read and said


def dark(path, **kw):
    tifffile.imwrite(
        path, np.linspace(2080, 4080, 40 * 48).reshape(40, 48).astype('u2'), photometric='minisblack', **kw
    )


def test_a_picture_in_the_lowest_sixteenth_is_read_as_it_is_and_said(tmp_path):
    dark(tmp_path / 'a.tif')
    with pytest.warns(PictureWarning, match=r'a\.tif uses at most a sixteenth of the range'):
        x = read_image(tmp_path / 'a.tif')
    np.testing.assert_array_equal(x[0].numpy(), np.round(tifffile.imread(tmp_path / 'a.tif') / 257))
    notes = []
    read_image(tmp_path / 'a.tif', notes=notes)
    assert [i for i, _ in notes] == [tmp_path / 'a.tif']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_image(np.array([[0, 4096]], 'u2'))
        read_image(np.zeros((4, 4), 'u2'))
        read_image(np.array([[0, 0.01]], 'f4'))  # nothing to say
    with pytest.warns(PictureWarning, match='in memory uses at most'):
        read_image(np.array([[0, 4095]], 'u2'))
    with pytest.warns(PictureWarning, match='sixteenth'):
        read_bands(np.full((4, 4, 5), 4095, 'u2'), 5)


def test_only_the_first_page_is_read_and_that_is_said(tmp_path):
    pages = [picture(), picture().rotate(180)]
    for kind in ('tif', 'gif', 'webp', 'png'):
        pages[0].save(
            tmp_path / f'a.{kind}',
            save_all=True,
            append_images=pages[1:],
            **({'lossless': True} if kind == 'webp' else {}),
        )
    for p in sorted(tmp_path.iterdir()):
        with pytest.warns(PictureWarning, match='holds several pages or frames, of which the first is read'):
            x = read_image(p)
        if p.suffix != '.gif':
            np.testing.assert_array_equal(x.permute(1, 2, 0).numpy(), np.asarray(pages[0]))


@pytest.mark.usefixtures('one_thread')
def test_a_whole_data_set_is_said_in_one_sentence(tmp_path):
    table = toy_table(tmp_path / 'img', 12)
    table.samples['path'] = [o.replace('.png', '.tif') for o in table.samples['path']]
    for p in table.samples['path']:
        dark(p)
    with pytest.warns(PictureWarning) as w:
        extract(table, toy_backbone(), cache=tmp_path / 'c', engine='eager', block=4, progress=False)
    assert [str(o.message).startswith('Each of 12 pictures (') for o in w if o.category is PictureWarning] == [True]
