"""Lung masks: packing, the gate, and the lungs of CT slices on drawn and real ones."""

import numpy as np
import pytest
from PIL import Image
from support import load_script, require_shared

from chest.core.errors import Problem
from chest.data.masks import (
    dice,
    keep_lungs,
    measure,
    pack,
    packed_shape,
    read_published_mask,
    resize_mask,
    segment_ct,
    unpack,
)
from chest.data.volumes import read_axial_slice, to_grey

LEFT, RIGHT = (slice(12, 50), slice(8, 28)), (slice(12, 50), slice(36, 56))


def draw(*parts, side=64):
    mask = np.zeros((side, side), bool)
    for part in parts:
        mask[part] = True
    return mask


def test_masks_survive_packing_whatever_their_side():
    masks = np.random.default_rng(0).random((3, 13, 13)) < 0.5
    packed = pack(masks)
    assert packed.shape == packed_shape(3, 13)
    assert np.array_equal(unpack(packed), masks)


def test_a_mask_is_squeezed_to_a_square_as_its_image_is(tmp_path):
    mask = np.zeros((60, 80), np.uint8)
    mask[15:45, 20:60] = 1  # some copies hold 0 and 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = read_published_mask(tmp_path / "mask.png", [16, 8])
    for side, small in found.items():
        quarter = side // 4
        assert np.array_equal(small, draw((slice(quarter, -quarter),) * 2, side=side))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.zeros((40, 40), np.uint8), "one grey value"),
        (np.tile(np.arange(256, dtype=np.uint8), (64, 1)), "neither black nor white"),
        (None, "no readable picture"),
    ],
)
def test_what_is_no_mask_is_a_problem(tmp_path, content, told):
    path = tmp_path / "mask.png"
    path.write_bytes(b"no picture") if content is None else Image.fromarray(content).save(path)
    problem = read_published_mask(path, [8])
    assert isinstance(problem, Problem)
    assert told in problem.found


def test_the_gate_wants_two_lungs_in_the_middle():
    figures = measure(draw(LEFT, RIGHT))
    assert figures == (2 * 38 * 20 / 64**2, 2, True)
    assert not measure(draw()).accepted
    assert not measure(draw(LEFT)).accepted  # a lung is lost
    assert not measure(draw((slice(0, 64),) * 2)).accepted  # the air around the body
    assert not measure(draw(LEFT, RIGHT, (slice(55, 60), slice(30, 34)))).accepted
    assert not measure(draw((slice(30, 34), slice(30, 34)))).accepted


def test_specks_go_and_holes_close():
    mask = draw(LEFT, RIGHT, (slice(55, 60), slice(30, 34)))
    mask[20:30, 12:18] = False
    assert np.array_equal(keep_lungs(mask), draw(LEFT, RIGHT))


def test_dice_of_masks():
    assert dice(draw(LEFT), draw(LEFT, RIGHT)) == pytest.approx(2 / 3)
    assert dice(draw(), draw()) == 1


@pytest.mark.parametrize("window", [(-1000, 400), (-1050, 350)])
def test_lungs_of_drawn_slices(window):
    phantoms = load_script("data/draw_phantoms.py")
    for number in range(2, 8):
        rng = np.random.default_rng(number)
        body = phantoms.make_anatomy(rng, ("normal", "covid19")[number % 2], False, 1.3)
        drawn = phantoms.axial(body, 0.5, 128, phantoms.MOSCOW.vary(rng), rng)
        found = segment_ct(phantoms.to_bytes(drawn.values, window))
        assert dice(found, drawn.lungs) > 0.88
        assert measure(found).accepted
        lesions = drawn.lesions.sum()
        assert (found & drawn.lesions).sum() >= 0.95 * lesions


def test_an_image_without_a_body_has_no_lungs():
    for image in (np.zeros((32, 32), np.uint8), np.eye(32, dtype=np.uint8) * 200):
        assert not measure(segment_ct(image)).accepted


def test_severe_cases_keep_their_lungs():
    studies = require_shared("real-study") / "COVID19_1110/studies"
    areas = {}
    for grade in ("CT-0", "CT-2", "CT-3"):
        found = []
        for path in sorted((studies / grade).iterdir())[:12]:
            grey = to_grey(read_axial_slice(path), "minmax")
            small = np.asarray(Image.fromarray(grey).resize((112, 112)))
            found.append(measure(segment_ct(small)))
        assert np.mean([figures.accepted for figures in found]) > 0.9
        areas[grade] = np.median([figures.area for figures in found])
    assert min(areas.values()) > 0.7 * areas["CT-0"]


def test_resizing_takes_pixels_that_are_covered_by_half():
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = mask[2, 3] = True
    assert np.array_equal(resize_mask(mask, 2), [[True, False], [False, False]])
