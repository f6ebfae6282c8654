"""Slices of volumes: where they lie, how they are turned, and what no slice can be cut from."""

import gzip
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from chest.volumes import VolumeError, check_header, cut_axial_slice, read_axial_slice, to_grey

# Every order and direction in which a file may store its axes: 6 x 8.
ORDERS = ["".join(code) for axes in permutations(("RL", "AP", "SI")) for code in product(*axes)]


def make_volume(path, codes="RAS", dtype=np.int16, affine=None):
    """A volume with a bright spot at the patient's right, front, and one at the left, back.

    In RAS+ it has 10 columns, 12 rows and 7 slices; slice k has the value k throughout.
    """
    values = np.zeros((10, 12, 7), dtype)
    values += np.arange(7, dtype=dtype)
    values[8, 10, :] = 100  # x 8 of 10: right; y 10 of 12: front
    values[1, 2, :] = 50
    image = nib.Nifti1Image(values, np.diag([2, 2, 8, 1]) if affine is None else affine)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    nib.save(image.as_reoriented(turn), path)
    return path


def test_all_orders_of_the_axes_are_tried():
    assert len(set(ORDERS)) == 48


@pytest.mark.parametrize("codes", ORDERS)
def test_however_the_axes_are_stored_the_picture_is_the_same(tmp_path, codes):
    ending = ".nii" if codes < "L" else ".nii.gz"
    cut = cut_axial_slice(make_volume(tmp_path / f"a{ending}", codes))
    assert (cut.index, cut.count, cut.pixels.shape) == (3, 7, (12, 10))
    # Front is up, and the patient's right is on the left of the picture.
    expected = np.full((12, 10), 3.0)
    expected[1, 1] = 100
    expected[9, 8] = 50
    assert np.array_equal(cut.pixels, expected)


@pytest.mark.parametrize(
    ("position", "index"), [("center", 3), (0, 0), (1, 6), (0.0, 0), (0.25, 2), (0.5, 3), (1.0, 6)]
)
@pytest.mark.parametrize("codes", ["RAS", "LPI", "ASR"])
def test_positions_run_from_feet_to_head(tmp_path, position, index, codes):
    pixels = read_axial_slice(make_volume(tmp_path / "a.nii", codes), position)
    assert pixels[0, 0] == index


def test_the_centre_of_an_even_number_is_the_upper_one(tmp_path):
    values = np.zeros((4, 4, 6)) + np.arange(6)
    for affine in (np.eye(4), np.diag([1, 1, -1, 1])):
        stored = values if affine[2, 2] > 0 else values[..., ::-1]
        nib.save(nib.Nifti1Image(stored, affine), tmp_path / "a.nii")
        assert read_axial_slice(tmp_path / "a.nii")[0, 0] == 3


def test_a_tilted_volume_is_cut_along_its_nearest_axis(tmp_path):
    angle = np.deg2rad(20)
    turned = np.eye(4)
    turned[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = make_volume(tmp_path / "a.nii", affine=turned @ np.diag([2, 2, 8, 1]))
    assert read_axial_slice(path)[0, 0] == 3


def test_values_are_the_volumes_own(tmp_path):
    image = nib.Nifti1Image(np.full((4, 4, 4), 7, np.int16), np.eye(4))
    image.header.set_slope_inter(2, -1024)
    nib.save(image, tmp_path / "a.nii.gz")
    pixels = read_axial_slice(tmp_path / "a.nii.gz")
    assert pixels.dtype == np.float64
    assert (pixels == 2 * 7 - 1024).all()


@pytest.mark.parametrize(
    ("shape", "told"), [((5, 5, 5, 1), None), ((5, 5), "5x5"), ((5, 5, 5, 2), "5x5x5x2")]
)
def test_a_volume_has_three_dimensions(tmp_path, shape, told):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "a.nii")
    if told is None:
        assert read_axial_slice(tmp_path / "a.nii").shape == (5, 5)
    else:
        with pytest.raises(VolumeError, match=told):
            check_header(tmp_path / "a.nii")


def whole(ending):
    image = nib.Nifti1Image(np.arange(8000, dtype=np.int16).reshape(20, 20, 20), np.eye(4))
    return gzip.compress(image.to_bytes()) if ending == ".nii.gz" else image.to_bytes()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0, 0.01, 0.4, 0.99])
def test_truncated_volumes_are_refused(tmp_path, ending, share):
    path = tmp_path / f"a{ending}"
    path.write_bytes(whole(ending)[: int(share * len(whole(ending)))])
    with pytest.raises(VolumeError) as error:
        read_axial_slice(path, 0)
    assert str(path) in str(error.value)


def test_damage_inside_the_data_is_noticed(tmp_path):
    content = bytearray(whole(".nii.gz"))
    content[len(content) // 2] ^= 255
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(VolumeError):
        read_axial_slice(tmp_path / "a.nii.gz", 1)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (nib.Nifti1Image(np.full((4, 4, 4), np.nan), np.eye(4)), "NaN"),
        (nib.Nifti1Image(np.zeros((4, 4, 4), "c16"), np.eye(4)), "values of type complex"),
        (
            nib.Nifti1Image(np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"]), np.eye(4)),
            "values of type",
        ),
    ],
)
def test_volumes_that_show_no_slice_are_refused(tmp_path, image, told):
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=told):
        read_axial_slice(tmp_path / "a.nii")


def test_an_affine_that_names_no_axes_is_refused(tmp_path):
    content = bytearray(whole(".nii"))
    content[254:256] = b"\2\0"  # sform_code: the affine is the three rows that follow at 280
    content[280:328] = bytes(48)
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match="names no axes"):
        check_header(tmp_path / "a.nii")


@pytest.mark.parametrize(("content", "told"), [(None, "no such file"), (b"text", "no readable")])
def test_what_is_no_volume_is_refused(tmp_path, content, told):
    if content:
        (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match=told):
        check_header(tmp_path / "a.nii")


def test_minmax_takes_the_slices_own_range():
    assert to_grey(np.array([[-50.0, 0], [25, 50]]), "minmax").tolist() == [[0, 128], [191, 255]]


def test_the_window_takes_minus_1000_to_400():
    grey = to_grey(np.array([-3000.0, -1000, -300, 400, 3000]), "window")
    assert grey.tolist() == [0, 0, 128, 255, 255]
    assert grey.dtype == np.uint8


@pytest.mark.parametrize(("value", "normalize"), [(7, "minmax"), (7, "window"), (-2000, "window")])
def test_a_constant_slice_is_refused(value, normalize):
    with pytest.raises(ValueError, match="constant"):
        to_grey(np.full((3, 3), float(value)), normalize)
