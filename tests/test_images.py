"""Every kind of PNG and JPEG gives the same grey picture; what is none is refused."""

import numpy as np
import pytest
from PIL import Image

from chest.images import ImageError, read_grey

SIDE = 32
GREY = np.add.outer(np.arange(40), np.arange(60) * 2).astype(np.uint8)  # 60 x 40 px, 0 to 157


def save(path, picture, **how):
    picture.save(path, **how)
    return path


def palette_of(grey):
    picture = Image.fromarray(255 - grey)
    picture.putpalette([255 - i // 3 for i in range(768)])
    return picture


def with_alpha(mode, alpha):
    picture = Image.fromarray(GREY).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    return picture


OPAQUE = np.full_like(GREY, 255)
KINDS = {
    "L": Image.fromarray(GREY),
    "RGB": Image.fromarray(GREY).convert("RGB"),
    "RGBA": with_alpha("RGB", OPAQUE),
    "LA": with_alpha("L", OPAQUE),
    "P": palette_of(GREY),
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_gives_the_same_picture(tmp_path, kind):
    expected = Image.fromarray(GREY).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = read_grey(save(tmp_path / "a.png", KINDS[kind]), SIDE)
    assert (grey.width, grey.height) == (60, 40)
    assert grey.pixels.dtype == np.uint8
    assert np.array_equal(grey.pixels, np.asarray(expected))
    assert grey.pixel_hash == read_grey(save(tmp_path / "b.png", KINDS["L"]), SIDE).pixel_hash


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    grey = read_grey(save(tmp_path / "a.png", Image.fromarray(deep)), 64)
    assert np.abs(grey.pixels.astype(float) - deep / 257).max() <= 0.5


def test_one_bit_pictures_are_read(tmp_path):
    picture = Image.fromarray(GREY > 80).convert("1")
    assert set(np.unique(read_grey(save(tmp_path / "a.png", picture), 60).pixels)) >= {0, 255}


def test_what_is_transparent_is_black(tmp_path):
    alpha = OPAQUE.copy()
    alpha[:, :30] = 0
    grey = read_grey(save(tmp_path / "a.png", with_alpha("RGB", alpha)), 60)
    assert (grey.pixels[:, :28] == 0).all()
    assert grey.pixels[:, 32:].min() > 50


def test_a_transparent_palette_colour_is_black(tmp_path):
    picture = Image.fromarray(np.repeat([[0, 1]], 20, axis=0).repeat(10, axis=1).astype(np.uint8))
    picture.putpalette([200, 200, 200, 100, 100, 100])
    grey = read_grey(save(tmp_path / "a.png", picture, transparency=0), 20)
    assert grey.pixels[10, 2] == 0
    assert grey.pixels[10, 17] == 100


def test_jpeg_is_read_and_turned_as_it_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path / "a.jpg", Image.fromarray(GREY), quality=95, exif=exif)
    grey = read_grey(path, SIDE)
    assert (grey.width, grey.height) == (40, 60)
    # The bright corner, bottom right, comes to the bottom left.
    assert grey.pixels[-1, 0] > 140
    assert grey.pixels[0, -1] < 15


def test_fine_stripes_become_grey_not_moire(tmp_path):
    stripes = np.zeros((448, 448), np.uint8)
    stripes[:, ::3] = 255
    grey = read_grey(save(tmp_path / "a.png", Image.fromarray(stripes)), 64)
    inner = grey.pixels[4:-4, 4:-4].astype(float)
    assert np.abs(inner - 85).max() < 12


def test_the_hash_is_of_the_picture_and_its_size(tmp_path):
    def digest(grey):
        return read_grey(save(tmp_path / "a.png", Image.fromarray(grey)), SIDE).pixel_hash

    changed = GREY.copy()
    changed[7, 7] += 1
    assert len({digest(GREY), digest(changed), digest(GREY.reshape(60, 40))}) == 3


def png(**how):
    def write(path):
        Image.fromarray(GREY).save(path, **how)

    return write


def truncated(kind):
    def write(path):
        noise = np.random.default_rng(0).integers(0, 256, (99, 99)).astype(np.uint8)
        Image.fromarray(noise).save(path, format=kind)
        path.write_bytes(path.read_bytes()[:3000])

    return write


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "no readable picture"),
        (lambda path: path.write_text("<html>"), "no readable picture"),
        (truncated("PNG"), "no readable picture"),
        (truncated("JPEG"), "no readable picture"),
        (lambda path: Image.fromarray(GREY).save(path, format="GIF"), "no readable picture"),
        (png(format="PNG", save_all=True, append_images=[Image.fromarray(255 - GREY)]), "2 frames"),
        (lambda path: Image.new("L", (9, 9), 7).save(path), "one grey value"),
        (lambda path: Image.new("1", (8001, 8001)).save(path), "8001 x 8001 px"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_name(tmp_path, write, told):
    path = tmp_path / "a.png"
    write(path)
    with pytest.raises(ImageError) as error:
        read_grey(path, SIDE)
    assert told in str(error.value)
    assert str(path) in str(error.value)
