"""Pictures of every depth, read in one way."""
import numpy as np
import pytest
import torch
from PIL import Image

from elsa_models import _images
from elsa_models._images import DataError, denormalise, find_images, normalise, printable, read_image, to_picture

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture(autouse=True)
def afresh():
    _images.warn_again()


def _values(image):
    return np.asarray(image.convert('L') if image.mode != 'L' else image)


@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm'])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_sixteen_bits_keep_their_greys(tmp_path, ending, mode, caplog):
    file = tmp_path / f'x.{ending}'
    if ending == 'pgm':
        file.write_bytes(b'P5 16 16 65535\n' + (RAMP.astype('>u2') * 257).tobytes())
    else:
        Image.fromarray(RAMP.astype(np.uint16) * 257).save(file)
    image = read_image(file, mode)
    assert image.mode == mode
    np.testing.assert_array_equal(_values(image), RAMP)
    read_image(file, mode)
    assert caplog.text.count('has 16 bits a pixel') == 1


def test_big_endian_and_pictures_in_memory():
    image = Image.frombytes('I;16B', (16, 16), (RAMP.astype('>u2') * 257).tobytes())
    np.testing.assert_array_equal(_values(read_image(image)), RAMP)


def test_floats_are_from_0_to_1(tmp_path):
    file = tmp_path / 'x.tif'
    Image.fromarray(RAMP.astype(np.float32) / 255.).save(file)
    np.testing.assert_array_equal(_values(read_image(file)), RAMP)
    for values in (RAMP.astype(np.float32), RAMP / np.float32(255.) - np.float32(0.5), np.full((4, 4), np.nan, 'f4')):
        Image.fromarray(values).save(file)
        with pytest.raises(DataError, match=r'x\.tif: has values from .* must be from 0 to 1'):
            read_image(file)


def test_thirty_two_bits_are_refused(tmp_path):
    file = tmp_path / 'x.tif'
    Image.fromarray(RAMP.astype(np.int32) * 1000).save(file)
    with pytest.raises(DataError, match=r'x\.tif: has whole numbers of 32 bits'):
        read_image(file)


def test_palettes_and_transparency(tmp_path, recwarn):
    image = Image.new('P', (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.info['transparency'] = b'\xff\x80'
    image.save(tmp_path / 'p.png', transparency=b'\xff\x80')
    image.save(tmp_path / 'p.gif')
    Image.new('RGBA', (8, 8), (200, 30, 60, 128)).save(tmp_path / 'a.png')
    Image.new('1', (8, 8), 1).save(tmp_path / '1.png')
    recwarn.clear()
    for name in ('p.png', 'p.gif', 'a.png'):
        assert read_image(tmp_path / name).getpixel((3, 3)) == (200, 30, 60)
    assert read_image(tmp_path / '1.png').getpixel((3, 3)) == (255, 255, 255)
    assert not recwarn.list


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ('a.png', '.b.png', '.cache/c.png', '__MACOSX/d.png', 'deep/e.gif', 'f.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    assert [f[len(str(tmp_path)) + 1:] for f in find_images([str(tmp_path)])] == ['a.png', 'deep/e.gif']


def test_a_tensor_as_a_picture_is_what_it_was():
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    back = denormalise(normalise(images, mean, std), mean, std)
    assert ((back * 255).round() == images).all()
    grey = normalise(torch.full((3, 4, 4), 128, dtype=torch.uint8), mean, std)
    np.testing.assert_allclose(to_picture(grey, mean, std), 128 / 255, atol=1e-6)
    assert to_picture(torch.zeros(1, 4, 4), (0.5,), (0.5,)).shape == (4, 4)


def test_printable():
    assert printable('größe 大') == 'größe 大'
    assert printable('a\nb\udcff') == 'a\\nb\\udcff'
