"""Slices of volumes: where they lie, how they are turned, and what no slice can be cut from."""

import gzip
import struct
import tracemalloc
import zlib
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from isal import igzip

from chest.volumes import (
    CHUNK,
    GZIP_LIMIT,
    VolumeError,
    check_header,
    cut_axial_slice,
    read_axial_slice,
    slice_index,
    to_grey,
)

# Every order and direction in which a file may store its axes: 6 x 8.
ORDERS = ["".join(code) for axes in permutations(("RL", "AP", "SI")) for code in product(*axes)]


def affine_of(codes):
    """The affine of a volume whose array axes run, one after another, to these directions."""
    affine = np.zeros((4, 4))
    for axis, (world, direction) in enumerate(nib.orientations.axcodes2ornt(tuple(codes))):
        affine[int(world), axis] = direction
    affine[3, 3] = 1
    return affine


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


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", ORDERS)
def test_however_the_axes_are_stored_the_picture_is_the_same(tmp_path, codes, ending):
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


@pytest.mark.parametrize("position", [-0.1, 1.5, float("nan")])
def test_a_position_outside_the_volume_is_refused(position):
    with pytest.raises(ValueError, match="is not from 0 to 1"):
        slice_index(7, position)


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


SCALINGS = [(1, 0), (2, -1024), (0.1, 0), (1, 0.3), (1e-30, 1e30), (np.nan, 0)]


# Where the centre slice lies, rows to the back and columns to the left, in (5, 6, 7) values.
STORED = {
    "LPS": lambda values: values[:, :, 3].T,
    "SAR": lambda values: values[2, ::-1, ::-1],
    "ASR": lambda values: values[::-1, 3, ::-1],
}


def write_raw(path, kind, values, codes, scaling):
    """A volume file that holds `values` as they are, in their byte order, and states `scaling`."""
    header = kind.header_class(endianness=values.dtype.str[0].replace("|", "<"))
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header.set_sform(affine_of(codes), 1)
    header["scl_slope"], header["scl_inter"] = scaling
    header["vox_offset"] = header.single_vox_offset
    start = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    path.write_bytes(start + values.tobytes("F"))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_values_are_those_that_nibabel_reads(tmp_path, dtype, byte_order, kind):
    dtype = np.dtype(byte_order + dtype)
    bytes_of_any_value = np.random.default_rng(0).integers(0, 256, (5, 6, 7 * dtype.itemsize), "u1")
    values = bytes_of_any_value.view(dtype)
    if dtype.kind == "f":
        values = np.clip(np.nan_to_num(values, nan=-3.5), -1e30, 1e30).astype(dtype)
    for scaling, (codes, stored) in product(SCALINGS, STORED.items()):
        write_raw(tmp_path / "a.nii", kind, values, codes, scaling)
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes(), 1))
        nibabels = nib.load(tmp_path / "a.nii").dataobj
        assert nibabels.slope == pytest.approx(np.nan_to_num(scaling[0], nan=1))
        expected = np.asarray(stored(nibabels), np.float64).tobytes()
        for path in (tmp_path / "a.nii", tmp_path / "a.nii.gz"):
            pixels = read_axial_slice(path)
            assert pixels.dtype == np.float64
            assert pixels.tobytes() == expected


@pytest.mark.parametrize("packed", [True, False])
def test_the_content_tells_whether_a_file_is_gzipped_not_its_name(tmp_path, packed):
    path = make_volume(tmp_path / "a.nii")
    expected = read_axial_slice(path)
    other = tmp_path / ("b.nii" if packed else "b.nii.gz")
    other.write_bytes(gzip.compress(path.read_bytes()) if packed else path.read_bytes())
    check_header(other)
    assert np.array_equal(read_axial_slice(other), expected)


@pytest.mark.parametrize("ending", [b"", bytes(512)])
@pytest.mark.parametrize("parts", [2, 5])
def test_a_gzip_file_may_have_several_members_and_padding(tmp_path, parts, ending):
    content, path = whole(".nii"), tmp_path / "a.nii.gz"
    step = len(content) // parts + 1
    members = [gzip.compress(content[i : i + step]) for i in range(0, len(content), step)]
    path.write_bytes(b"".join(members) + ending)
    assert np.array_equal(read_axial_slice(path), of_whole(10))
    path.write_bytes(b"".join(members[:-1]))
    with pytest.raises(VolumeError, match="damaged data"):
        read_axial_slice(path, 0)


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


def of_whole(index):
    return np.arange(8000.0).reshape(20, 20, 20)[::-1, ::-1, index].T


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0, 0.01, 0.4, 0.99])
def test_truncated_volumes_are_refused(tmp_path, ending, share):
    path = tmp_path / f"a{ending}"
    path.write_bytes(whole(ending)[: int(share * len(whole(ending)))])
    with pytest.raises(VolumeError) as error:
        read_axial_slice(path, 0)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("missing", [1, 4, 7, 8, 9])
def test_a_volume_that_lacks_its_last_bytes_is_refused(tmp_path, missing):
    # The last 8 are gzip's own: all values are there, and nothing says that they are right.
    (tmp_path / "a.nii.gz").write_bytes(whole(".nii.gz")[:-missing])
    with pytest.raises(VolumeError, match="damaged data"):
        read_axial_slice(tmp_path / "a.nii.gz", 0)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_flipped_bit_anywhere_is_noticed_where_the_checksum_is_tested(tmp_path, place, position):
    noise = np.random.default_rng(0).integers(-99, 99, (20, 20, 20)).astype(np.int16)
    content = bytearray(gzip.compress(nib.Nifti1Image(noise, np.eye(4)).to_bytes()))
    content[int(place * len(content))] ^= 4
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(VolumeError):
        cut_axial_slice(tmp_path / "a.nii.gz", position, verify=True)


def test_nothing_behind_the_slice_is_inflated_unless_the_checksum_is_tested(tmp_path):
    values = np.random.default_rng(0).integers(-99, 99, (64, 64, 200)).astype(np.int16)
    content = nib.Nifti1Image(values, np.eye(4)).to_bytes()
    end = 352 + 101 * values[..., 0].nbytes + CHUNK
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    good = packer.compress(content[:end]) + packer.flush(zlib.Z_FULL_FLUSH)
    bad = bytes([255] * (len(content) - end))  # no block of deflate begins so
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"\x1f\x8b\x08" + bytes(7) + good + bad + struct.pack("<II", 0, len(content)))
    assert np.array_equal(read_axial_slice(path), values[::-1, ::-1, 100].T)
    with pytest.raises(VolumeError, match="damaged data"):
        cut_axial_slice(path, verify=True)


def test_no_more_is_inflated_than_the_slices_end_asks_for(tmp_path, monkeypatch):
    inflated = []

    class Counting(igzip.IGzipFile):
        def read(self, size=-1):
            content = super().read(size)
            inflated.append(self.tell())
            return content

    monkeypatch.setattr("chest.volumes.igzip.open", lambda file: Counting(fileobj=file))
    path = make_volume(tmp_path / "a.nii.gz")
    plane = 10 * 12 * 2
    for position, planes in ((0.0, 1), ("center", 4), (1.0, 7)):
        inflated.clear()
        read_axial_slice(path, position)
        assert inflated[-1] == max(inflated[0], 352 + planes * plane)
    inflated.clear()
    cut_axial_slice(path, 0.0, verify=True)
    assert inflated[-1] == 352 + 7 * plane


@pytest.mark.parametrize("codes", ["SAR", "RSA", "RAS"])
def test_memory_holds_a_plane_and_the_slice_never_the_volume(tmp_path, codes):
    values = np.arange(160 * 160 * 160, dtype=np.int16).reshape(160, 160, 160)
    image = nib.Nifti1Image(values, affine_of(codes))
    (tmp_path / "a.nii.gz").write_bytes(igzip.compress(image.to_bytes(), 0))
    tracemalloc.start()
    pixels = cut_axial_slice(tmp_path / "a.nii.gz", verify=True).pixels
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The slice in float64, turned, and tested for NaN; the compressed bytes are read in pieces.
    assert peak < 4 * pixels.nbytes + igzip.READ_BUFFER_SIZE + CHUNK < values.nbytes / 4


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_promises_more_than_the_file_can_hold_is_refused_at_once(tmp_path, ending):
    content = bytearray(whole(".nii"))
    content[42:48] = struct.pack("<3h", 32767, 32767, 32767)
    path = tmp_path / f"a{ending}"
    path.write_bytes(content if ending == ".nii" else gzip.compress(content))
    limit = path.stat().st_size * (1 if ending == ".nii" else GZIP_LIMIT)
    with pytest.raises(VolumeError, match=f"at most {limit:,} of"):
        check_header(path)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    content = bytearray(whole(".nii"))
    content[46:48] = struct.pack("<h", 21)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    with pytest.raises(VolumeError, match=r"damaged data .* of 17,152 bytes"):
        read_axial_slice(tmp_path / "a.nii.gz", 0)


def test_the_most_that_gzip_packs_is_still_read(tmp_path):
    image = nib.Nifti1Image(np.zeros((256, 256, 64), np.int16), np.eye(4))
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes(), 9))
    assert len(image.to_bytes()) > 0.9 * GZIP_LIMIT * path.stat().st_size
    assert not read_axial_slice(path).any()


def test_the_header_of_a_pair_of_files_is_no_volume(tmp_path):
    content = bytearray(whole(".nii"))
    content[108:112], content[344:348] = bytes(4), b"ni1\0"  # vox_offset and magic
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match="values inside the header"):
        check_header(tmp_path / "a.nii")


@pytest.mark.parametrize("bad", [0, -3])
def test_dimensions_that_are_none_are_refused(tmp_path, bad):
    content = bytearray(whole(".nii"))
    content[44:46] = struct.pack("<h", bad)
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match=f"shape 20x{bad}x20"):
        check_header(tmp_path / "a.nii")


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
