"""Every kind of PNG and JPEG gives the same grey picture; what is none is refused."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from chest.errors import ChestError, Problem
from chest.images import ImageError, read_grey, read_greys, resize_grey

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


# --- Many of them ----------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """Thirty pictures of different sizes; two cannot be read, and one is missing."""
    paths = [tmp_path / f"{i:02}.png" for i in range(30)]
    for i, path in enumerate(paths):
        Image.fromarray(GREY[: 20 + i % 7] + np.uint8(i)).save(path)
    paths[5].write_bytes(b"")
    paths[17].write_bytes(paths[17].read_bytes()[:60])
    paths[29].unlink()
    return paths


def contents(greys):
    return [
        grey.file if isinstance(grey, Problem) else (grey.pixels.tobytes(), grey.pixel_hash)
        for grey in greys
    ]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_many_pictures_are_as_each_one_in_whatever_order_and_processes(many, processes):
    alone = dict(zip(many, contents(read_greys(many, SIDE, 1)), strict=True))
    assert [path for path in many if alone[path] == path] == [many[5], many[17], many[29]]
    assert alone[many[3]][1] == read_grey(many[3], SIDE).pixel_hash
    shuffled = [many[i] for i in np.random.default_rng(0).permutation(len(many))]
    for paths in (many, shuffled, many[:1], []):
        greys = contents(read_greys(paths, SIDE, processes))
        assert greys == [alone[path] for path in paths]


def test_memory_does_not_grow_with_the_number_of_pictures(many):
    def peak(count):
        tracemalloc.start()
        greys = read_greys([many[0]] * count, 128, 2)
        next(greys)
        time.sleep(0.5)  # others could get far ahead meanwhile
        assert sum(1 for _ in greys) == count - 1
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(2000) < peak(200) + 2000 * 128**2 / 10


def test_reading_may_end_early(many):
    before = set(multiprocessing.active_children())
    greys = read_greys(many * 20, SIDE, 2)
    next(greys)
    assert set(multiprocessing.active_children()) - before
    greys.close()
    assert not set(multiprocessing.active_children()) - before


def test_a_process_that_the_system_ends_is_told(many):
    before = set(multiprocessing.active_children())
    greys = read_greys(many * 20, SIDE, 2)
    next(greys)
    (set(multiprocessing.active_children()) - before).pop().kill()
    with pytest.raises(ChestError, match="too little memory"):
        list(greys)


def test_no_process_outlives_the_one_that_started_it(many):
    code = """if True:
        import multiprocessing, os, signal, sys
        from chest.images import read_greys
        greys = read_greys(sys.argv[1:] * 20, 32, 2)
        next(greys)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code, *many], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == 2
    for _ in range(500):
        if not any(is_running(pid) for pid in children):
            return
        time.sleep(0.01)
    raise AssertionError("they still run after 5 seconds")


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_large_pictures_are_shrunk_in_two_steps_that_hardly_show(tmp_path):
    y, x = np.mgrid[:1500, :1600] / 100
    noise = np.random.default_rng(0).normal(0, 8, y.shape)
    large = Image.fromarray((128 + 80 * np.sin(x) * np.cos(y * x / 9) + noise).astype(np.uint8))
    plain = np.asarray(large.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    off = np.abs(resize_grey(large, SIDE) - plain)
    assert 0 < off.max() <= 2
    # From less than six times the side it is one step.
    small = large.crop((0, 0, 6 * SIDE - 1, 6 * SIDE - 1))
    plain = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_grey(small, SIDE), plain)
