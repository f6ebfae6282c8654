"""Axial slices: the same picture however a volume is stored, and damage that is noticed."""

import gzip
import struct
import zlib
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from chest.data.volumes import (
    CHUNK,
    VolumeError,
    check_header,
    cut_axial_slice,
    read_axial_slice,
    to_grey,
)

ORDERS = ["".join(code) for axes in permutations(("LR", "AP", "IS")) for code in product(*axes)]

AFFINE = np.diag([0.7, 0.8, 5, 1])


def make_volume(path, codes="RAS"):
    """Write a volume of 34 x 36 x 7 voxels (R, A, S), stored in the order `codes`."""
    values = np.random.default_rng(0).integers(-1000, 1000, (34, 36, 7)).astype(np.int16)
    image = nib.Nifti1Image(values, AFFINE)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(turn), path)
    assert "".join(nib.aff2axcodes(nib.load(path).affine)) == codes
    return values


@pytest.mark.parametrize("codes", ORDERS)
def test_every_axis_order_shows_the_same_picture(tmp_path, codes):
    values = make_volume(tmp_path / "a.nii.gz", codes)
    for position, index in ((0.0, 0), ("center", 3), (1.0, 6)):
        # Rows from anterior to posterior, columns from the patient's right to the left.
        expected = values[::-1, ::-1, index].T
        found = cut_axial_slice(tmp_path / "a.nii.gz", position)
        assert np.array_equal(found.pixels, expected)
        assert (found.index, found.count) == (index, 7)
        assert found.pixels.dtype == np.float64


def test_an_oblique_volume_is_cut_along_its_nearest_axis(tmp_path):
    values = make_volume(tmp_path / "a.nii")
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(values, turn @ AFFINE), tmp_path / "b.nii")
    assert np.array_equal(
        read_axial_slice(tmp_path / "b.nii"), read_axial_slice(tmp_path / "a.nii")
    )


def test_a_gzip_file_may_have_several_members(tmp_path):
    expected = make_volume(tmp_path / "a.nii")[::-1, ::-1, 3].T
    content = (tmp_path / "a.nii").read_bytes()
    members = [gzip.compress(content[i : i + 4000]) for i in range(0, len(content), 4000)]
    (tmp_path / "b.nii.gz").write_bytes(b"".join(members))
    assert np.array_equal(read_axial_slice(tmp_path / "b.nii.gz"), expected)
    (tmp_path / "b.nii.gz").write_bytes(b"".join(members[:-1]))
    with pytest.raises(VolumeError, match="damaged data"):
        read_axial_slice(tmp_path / "b.nii.gz", 0)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("share", [0, 0.01, 0.4, 0.99, -1, -8, -9])
def test_truncated_volumes_are_refused(tmp_path, name, share):
    make_volume(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    end = int(share * len(content)) if share >= 0 else share
    (tmp_path / name).write_bytes(content[:end])
    with pytest.raises(VolumeError, match=name):
        read_axial_slice(tmp_path / name, 0)


@pytest.mark.parametrize("position", [0.0, 1.0])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_flipped_bit_is_noticed_with_verify(tmp_path, place, position):
    make_volume(tmp_path / "a.nii.gz")
    content = bytearray((tmp_path / "a.nii.gz").read_bytes())
    content[int(place * len(content))] ^= 4
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(VolumeError):
        cut_axial_slice(tmp_path / "a.nii.gz", position, verify=True)


def test_nothing_behind_the_slice_is_inflated_without_verify(tmp_path):
    values = np.random.default_rng(0).integers(-99, 99, (64, 64, 200)).astype(np.int16)
    content = nib.Nifti1Image(values, AFFINE).to_bytes()
    end = 352 + 101 * values[..., 0].nbytes + CHUNK
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    good = packer.compress(content[:end]) + packer.flush(zlib.Z_FULL_FLUSH)
    bad = bytes([255] * (len(content) - end))  # no block of deflate begins so
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"\x1f\x8b\x08" + bytes(7) + good + bad + struct.pack("<II", 0, len(content)))
    assert np.array_equal(read_axial_slice(path), values[::-1, ::-1, 100].T)
    with pytest.raises(VolumeError, match="damaged data"):
        cut_axial_slice(path, verify=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({46: struct.pack("<h", 8)}, "damaged data"),  # a slice more than there is
        ({42: struct.pack("<3h", 32767, 32767, 32767)}, "slices of 32767 x 32767 px"),
        ({44: struct.pack("<h", 0)}, "shape 34x0x7"),
        ({40: struct.pack("<h", 2)}, "shape 34x36"),
        ({108: bytes(4), 344: b"ni1\0"}, "values inside the header"),
        ({280: bytes(48)}, "names no axes"),  # the rows of the sform
    ],
)
def test_headers_that_promise_no_slice_are_refused(tmp_path, changes, told):
    make_volume(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    for offset, value in changes.items():
        content[offset : offset + len(value)] = value
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match=told):
        check_header(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.zeros((96, 36, 4), "i2"), "an axial plane of 96 x 36 px"),
        (np.zeros((12, 15, 4), "i2"), "an axial plane of 12 x 15 px"),
        (np.full((36, 36, 4), np.nan), "NaN or infinity"),
        (np.zeros((36, 36, 4), "c16"), "values of type complex"),
        (np.zeros((4, 4, 4, 2), "i2"), "shape 4x4x4x2"),
        (None, "no such file"),
    ],
)
def test_what_shows_no_slice_is_refused(tmp_path, values, told):
    if values is not None:
        nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=told):
        read_axial_slice(tmp_path / "a.nii")


# --- Grey values -----------------------------------------------------------------------------


def test_grey_takes_the_slices_own_range_or_the_window():
    assert to_grey(np.array([[-50.0, 0], [25, 50]]), "minmax").tolist() == [[0, 128], [191, 255]]
    grey = to_grey(np.array([-3000.0, -1000, -300, 400, 3000]), "window")
    assert grey.tolist() == [0, 0, 128, 255, 255]
    assert grey.dtype == np.uint8


@pytest.mark.parametrize("normalize", ["minmax", "window"])
@pytest.mark.parametrize("padding", [-2000.0, -3024.0])
def test_padding_outside_the_scanner_is_air(normalize, padding):
    plain = np.random.default_rng(0).integers(-1024, 900, (20, 20)).astype(float)
    plain[0] = -1024
    padded = plain.copy()
    padded[0] = padding
    assert np.array_equal(to_grey(padded, normalize), to_grey(plain, normalize))


@pytest.mark.parametrize(
    ("values", "normalize"),
    [([7, 7], "minmax"), ([-2000, -3000], "minmax"), ([-900, -899], "window")],
)
def test_a_slice_that_becomes_one_grey_value_is_refused(values, normalize):
    with pytest.raises(ValueError, match="a constant picture"):
        to_grey(np.array(values, float), normalize)


@pytest.mark.parametrize("change", [lambda x: x + 1024, lambda x: (x + 1024) / 2000, abs])
def test_a_window_needs_hounsfield_units(change):
    values = np.random.default_rng(0).integers(-1000, 900, (20, 20)).astype(float)
    values[0] = -2000  # padding is no air
    values[1:] = change(values[1:])
    with pytest.raises(ValueError, match="no Hounsfield units"):
        to_grey(values, "window")
    assert to_grey(values, "minmax").max() == 255


@pytest.mark.parametrize("change", [lambda x: x.astype(np.uint16), lambda x: x + 32768])
def test_negative_values_without_their_sign_are_refused(change):
    values = np.random.default_rng(0).integers(-1000, 900, (20, 20)).astype(np.int32)
    with pytest.raises(ValueError, match="without their sign"):
        to_grey(change(values).astype(float), "minmax")
    assert to_grey(np.where(values > 890, 32767.0, values), "minmax").max() == 255  # metal


@pytest.mark.parametrize(
    ("sform", "qform", "told"),
    [
        (np.eye(4), None, "an affine that says nothing"),
        (None, None, "an affine that says nothing"),
        (AFFINE, AFFINE * [[-1], [1], [1], [1]], "sform and qform contradict"),
        (AFFINE, AFFINE, ""),
        (None, AFFINE, ""),
    ],
)
def test_the_orientation_must_be_told_and_only_one(tmp_path, sform, qform, told):
    image = nib.Nifti1Image(np.zeros((34, 36, 7), np.int16), None)
    image.set_sform(sform, code=int(sform is not None))
    image.set_qform(qform, code=int(qform is not None))
    nib.save(image, tmp_path / "a.nii")
    if told:
        with pytest.raises(VolumeError, match=told):
            check_header(tmp_path / "a.nii")
    else:
        assert check_header(tmp_path / "a.nii") == 7
