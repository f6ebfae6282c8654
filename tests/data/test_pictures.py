"""Every kind of PNG and JPEG gives the same grey picture; what is none is refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from support import require_shared

from chest.data.pictures import Picture, PictureError, fit, read_picture, read_pictures, resize_grey
from chest.data.volumes import read_axial_slice, to_grey

SIDE = 32
GREY = np.add.outer(np.arange(40), np.arange(60) * 2).astype(np.uint8)  # 60 x 40 px, 0 to 157
OPAQUE = np.full_like(GREY, 255)


def save(path, picture, **options):
    picture.save(path, **options)
    return path


def read_pixels(path, side=SIDE):
    return read_picture(path, [side]).pixels[side]


def palette_of(grey):
    picture = Image.fromarray(255 - grey)
    picture.putpalette([255 - i // 3 for i in range(768)])
    return picture


def with_alpha(mode, alpha):
    picture = Image.fromarray(GREY).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    return picture


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
    picture = read_picture(save(tmp_path / "a.png", KINDS[kind]), [SIDE, 50])
    assert (picture.width, picture.height) == (60, 40)
    assert np.array_equal(picture.pixels[SIDE], np.asarray(expected))
    assert picture.pixels[50].shape == (50, 50)
    other = read_picture(save(tmp_path / "b.png", KINDS["L"]), [SIDE])
    assert picture.pixel_hash == other.pixel_hash


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = read_pixels(save(tmp_path / "a.png", Image.fromarray(deep)), 64)
    assert np.array_equal(pixels, np.round(deep / 257))


@pytest.mark.parametrize(
    ("used", "stated", "depth"),
    [
        *((bits, None, bits) for bits in (8, 10, 12, 14)),
        (10, 12, 12),  # a dark picture
        (16, 12, 16),  # scaled to 16 bits, as the standard of PNG wants it
        (12, 16, None),
    ],
)
def test_fewer_bits_in_sixteen_are_scaled_by_their_depth(tmp_path, used, stated, depth):
    deep = np.linspace(0, 2**used - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(deep))
    if stated:  # the chunk sBIT comes after the header, which ends at byte 33
        content, chunk = path.read_bytes(), b"sBIT" + bytes([stated])
        chunk = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + chunk + content[33:])
    if depth:
        assert np.abs(read_pixels(path, 64) - deep * (255 / (2**depth - 1))).max() <= 0.5
    else:
        with pytest.raises(PictureError, match="only 17 grey values"):
            read_pixels(path, 64)


def save_deep_colours(path, deep):
    """Write a PNG of 16-bit colours, which Pillow reads only."""
    rows = np.repeat(deep[..., None], 3, axis=2).astype(">u2").reshape(len(deep), -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", deep.shape[1], deep.shape[0], 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)


def test_deep_colours_are_read_if_they_use_their_range(tmp_path):
    save_deep_colours(tmp_path / "a.png", GREY.astype(np.uint16) * 257)
    assert np.array_equal(
        read_pixels(tmp_path / "a.png"), read_pixels(save(tmp_path / "b.png", KINDS["L"]))
    )


def test_the_main_picture_of_an_mpo_is_taken_and_cmyk_is_not_inverted(tmp_path):
    expected = read_pixels(save(tmp_path / "a.jpg", KINDS["RGB"], quality=95)).astype(int)
    second = Image.fromarray(255 - GREY).convert("RGB")
    options = {"format": "MPO", "save_all": True, "append_images": [second], "quality": 95}
    assert np.array_equal(read_pixels(save(tmp_path / "b.jpg", KINDS["RGB"], **options)), expected)
    cmyk = save(tmp_path / "c.jpg", KINDS["RGB"].convert("CMYK"), quality=95)
    assert np.abs(read_pixels(cmyk) - expected).max() <= 3


def test_no_real_image_is_refused():
    real, study = require_shared("real"), require_shared("real-study")
    films = [path for path in study.rglob("image/*.png")][::10]
    for picture in read_pictures(
        [*real.rglob("image/*.png"), *real.rglob("curated_data/*/*.png"), *films], [112]
    ):
        assert isinstance(picture, Picture), picture
    cuts = [(path, "minmax") for path in sorted(study.rglob("*.nii.gz"))[::10]]
    cuts += [(path, kind) for path in real.rglob("*.nii.gz") for kind in ("minmax", "window")]
    assert len(cuts) > 100
    for path, kind in cuts:
        fit(Image.fromarray(to_grey(read_axial_slice(path), kind)), [112])


def test_transparent_pixels_are_black(tmp_path):
    alpha = OPAQUE.copy()
    alpha[:, :30] = 0
    pixels = read_pixels(save(tmp_path / "a.png", with_alpha("RGB", alpha)), 60)
    assert (pixels[:, :28] == 0).all()
    assert pixels[:, 32:].min() > 50


def test_a_jpeg_is_rotated_as_its_exif_says_whatever_its_ending(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    path = save(tmp_path / "a.png", Image.fromarray(GREY), format="JPEG", quality=95, exif=exif)
    picture = read_picture(path, [SIDE])
    assert (picture.width, picture.height) == (40, 60)
    # The bright corner, bottom right, comes to the bottom left.
    assert picture.pixels[SIDE][-1, 0] > 140
    assert picture.pixels[SIDE][0, -1] < 15


def test_large_pictures_are_shrunk_in_two_steps_that_hardly_show():
    y, x = np.mgrid[:1500, :1600] / 100
    noise = np.random.default_rng(0).normal(0, 8, y.shape)
    large = Image.fromarray((128 + 80 * np.sin(x) * np.cos(y * x / 9) + noise).astype(np.uint8))
    plain = np.asarray(large.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    assert 0 < np.abs(resize_grey(large, SIDE) - plain).max() <= 2


def test_the_hash_is_of_the_picture_and_its_size(tmp_path):
    def digest(grey):
        return read_picture(save(tmp_path / "a.png", Image.fromarray(grey)), [SIDE]).pixel_hash

    changed = GREY.copy()
    changed[7, 7] += 1
    assert len({digest(GREY), digest(changed), digest(GREY.reshape(60, 40))}) == 3


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("filled", [False, True])
def test_truncated_and_zero_filled_files_are_refused(tmp_path, form, share, filled):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300)).astype(np.uint8)
    content = save(tmp_path / "a.png", Image.fromarray(noise), format=form).read_bytes()
    part = content[: int(share * len(content))]
    (tmp_path / "a.png").write_bytes(part + bytes(len(content) - len(part)) * filled)
    with pytest.raises(PictureError, match=r"a\.png"):
        read_pixels(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: Image.fromarray(GREY // 50 * 50).save(path), "only 4 grey values"),
        (lambda path: Image.fromarray(100 + GREY // 20).save(path), "nearly one grey value"),
        (lambda path: Image.fromarray(GREY * (GREY > 140)).save(path), "9.% of it black"),
        (lambda path: Image.fromarray(255 - GREY * (GREY > 140)).save(path), "9.% of it white"),
        (lambda path: save_deep_colours(path, GREY.astype(np.uint16) * 26), "16-bit colours"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("<html>"), "no readable picture"),
        (lambda path: Image.fromarray(GREY).save(path, format="GIF"), "no readable picture"),
        (lambda path: KINDS["L"].save(path, save_all=True, append_images=[KINDS["P"]]), "2 frames"),
        (lambda path: Image.new("L", (9, 9), 7).save(path), "one grey value"),
        (lambda path: Image.new("1", (8001, 8001)).save(path), "8001 x 8001 px"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_name(tmp_path, write, told):
    write(tmp_path / "a.png")
    with pytest.raises(PictureError, match=rf"a\.png(?s:.)*{told}"):
        read_pixels(tmp_path / "a.png")
