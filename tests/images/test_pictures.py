"Pictures of every kind: the pixels are those of PIL, upright, by the range of their type."

import numpy as np
import pytest, torch
from PIL import Image
from hiermetric.images.pictures import read_image
from hiermetric.core import HiermetricError

pytestmark = pytest.mark.usefixtures('one_thread')


def picture(h=60, w=90):
    "Smooth colours, so that JPEG keeps them nearly"
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x * 255 // w, y * 255 // h, 255 - (x + y) * 255 // (h + w)], -1).astype(np.uint8))


@pytest.mark.parametrize(
    'name,mode',
    [
        ('a.png', 'RGB'),
        ('a.png', 'L'),
        ('a.jpg', 'RGB'),
        ('a.jpg', 'L'),
        ('a.png', 'P'),
        ('a.gif', 'P'),
        ('a.png', '1'),
        ('a.bmp', 'RGB'),
        ('a.tif', 'RGB'),
        ('a.webp', 'RGB'),
        ('a.jpg', 'CMYK'),
        ('a.tif', 'CMYK'),
    ],
)
def test_pixels_are_those_of_pil(tmp_path, name, mode):
    picture().convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as im:
        want = np.asarray(im.convert('L' if mode in ('L', '1') else 'RGB'))
    got = read_image(tmp_path / name)
    assert got.dtype == torch.uint8 and got.shape[0] == (1 if want.ndim == 2 else 3)
    np.testing.assert_array_equal(got.permute(1, 2, 0).squeeze(-1).numpy(), want)


@pytest.mark.parametrize('flag', range(1, 9))
@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.tif'])
def test_exif_orientation_is_obeyed(tmp_path, name, flag):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = flag
    picture().save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as im:
        want = np.asarray(ImageOps.exif_transpose(im))
    np.testing.assert_array_equal(read_image(tmp_path / name).permute(1, 2, 0).numpy(), want)
    assert want.shape[:2] == ((60, 90) if flag < 5 else (90, 60))


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    a = np.arange(256 * 16).reshape(64, 64).astype(np.uint16) * 16
    Image.fromarray(a).save(tmp_path / f'a.{suffix}')
    np.testing.assert_array_equal(read_image(tmp_path / f'a.{suffix}')[0].numpy(), np.round(a / 257))


def test_floating_point_pictures(tmp_path):
    a = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(a).save(tmp_path / 'a.tif')
    np.testing.assert_array_equal(read_image(tmp_path / 'a.tif')[0].numpy(), np.round(a * 255))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparent_pixels_show_the_background(tmp_path, mode):
    im = Image.new('RGBA', (10, 10), (200, 0, 0, 255))
    im.paste((0, 0, 0, 0), (0, 0, 5, 10))
    if mode == 'P':
        im = im.convert('RGB').quantize(4)
        im.info['transparency'] = im.getpixel((0, 0))
        im.save(tmp_path / 'a.png', transparency=im.getpixel((0, 0)))
    else:
        im.convert(mode).save(tmp_path / 'a.png')
    for background in [(255, 255, 255), (10, 20, 30)]:
        x = read_image(tmp_path / 'a.png', background)
        assert x[:, 5, 0].tolist() == list(background) and x[:, 5, 9].tolist() != list(background)


def test_transparent_grey_png_shows_the_background(tmp_path):
    Image.fromarray(np.array([[10, 200]], np.uint8)).save(tmp_path / 'a.png', transparency=10)
    assert read_image(tmp_path / 'a.png')[:, 0].T.tolist() == [[255] * 3, [200] * 3]


def broken(folder):
    "File name → what its message must say"
    picture().save(folder / 'good.jpg')
    picture().save(folder / 'good.png')
    jpg, png = (folder / 'good.jpg').read_bytes(), (folder / 'good.png').read_bytes()
    for name, data in {
        'torn.jpg': jpg[:500],
        'torn.png': png[:200],
        'empty.jpg': b'',
        'text.png': b'hello',
        'header.png': png[:8],
    }.items():
        (folder / name).write_bytes(data)
    (folder / 'folder.jpg').mkdir()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / 'nan.tif')
    Image.fromarray(np.full((4, 4), 9, np.float32)).save(folder / 'nine.tif')
    return {
        'torn.jpg': 'runcated',
        'torn.png': '',
        'empty.jpg': 'the file is empty',
        'text.png': 'cannot identify image file',
        'header.png': '',
        'missing.png': 'No such file or directory',
        'folder.jpg': 'Is a directory',
        'nan.tif': 'it holds NaN or infinite pixels; repair it first',
        'nine.tif': 'its values run from 9 to 9 and not from 0 to 1; scale them first',
    }


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    for name, says in broken(tmp_path).items():
        with pytest.raises(HiermetricError) as e:
            read_image(tmp_path / name)
        assert (
            str(e.value).startswith(f'Cannot read the image {tmp_path / name}: ')
            and says in str(e.value)
            and '\n' not in str(e.value)
        ), str(e.value)


@pytest.mark.parametrize(
    'bad',
    [
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
    ],
)
def test_pixels_of_a_wrong_shape_are_refused(bad):
    with pytest.raises(HiermetricError, match=r'Pixels must be uint8 of shape \(1 or 3, H, W\), not'):
        read_image(bad)
