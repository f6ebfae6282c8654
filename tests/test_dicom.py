"""DICOM: the same picture as of a volume, X-rays as their files say, and what is refused."""

import io
import tracemalloc
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pydicom
import pytest
from corpus import thrifty
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)

from chest.dicom import (
    TAGS,
    DicomError,
    _read_pixels,
    is_dicom,
    read_ct,
    read_header,
    read_xray,
    sort_series,
)
from chest.volumes import read_axial_slice

# Every way in which a file may store an axial slice: rows, columns, slices.
ORDERS = [
    "".join(code)
    for plane in permutations(("AP", "LR"))
    for code in product(*plane, "SI")
]  # fmt: skip
NAME = "Secret^Name"
GREY = np.add.outer(np.arange(8), np.arange(6) * 100).astype(np.uint16)  # 0 to 507


def make(pixels, modality="CT", **tags):
    """A DICOM file's content; `tags` replace or add, None leaves one out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    kind = CTImageStorage if modality == "CT" else DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        "PatientName": NAME, "PatientID": NAME, "PatientBirthDate": "19700101",
        "Modality": modality, "SeriesInstanceUID": "1.2.3",
        "Rows": pixels.shape[0], "Columns": pixels.shape[1],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": int(pixels.dtype.kind == "i"), "PixelData": pixels.tobytes(),
    }  # fmt: skip
    if modality == "CT":
        values |= {
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 0],
            "RescaleSlope": 1, "RescaleIntercept": -1024,
        }  # fmt: skip
    for tag, value in {**values, **tags}.items():
        if value is not None:
            setattr(dataset, tag, value)
    return dataset


def save(path, dataset):
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_volume(folder, codes="PLS", tilt=0.0, **tags):
    """Noise in Hounsfield units as a NIfTI volume, and the same as a DICOM series, stored `codes`.

    11 columns, 9 rows and 7 slices of 3 mm; tilted about the axis from right to left, in degrees.
    """
    values = np.random.default_rng(0).integers(-1000, 1000, (11, 9, 7)).astype(np.int16)
    angle = np.deg2rad(tilt)
    affine = np.diag([0.7, 0.8, 3, 1])
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = nib.Nifti1Image(values, turn @ affine)
    nib.save(image, folder / "volume.nii.gz")
    stored = nib.orientations.axcodes2ornt(tuple(codes))
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), stored))
    axes = np.diag([-1, -1, 1, 1]) @ image.affine  # DICOM runs to the left and to the back
    down, along, _ = (axes[:3, i] / np.linalg.norm(axes[:3, i]) for i in range(3))
    (folder / "series").mkdir()
    for k in range(7):
        pixels = np.ascontiguousarray(image.get_fdata()[..., k].astype(np.int16) + 1024)
        where = {
            "ImageOrientationPatient": [round(x, 6) for x in (*along, *down)],
            "ImagePositionPatient": [round(x, 6) for x in axes[:3] @ [0, 0, k, 1]],
        }
        name = f"IM{k * 5 % 7:04}"  # the names' order is not that of the slices
        save(folder / "series" / name, make(pixels, **{**where, **tags}))
    return folder


def series_of(folder):
    return sort_series([read_header(path) for path in sorted((folder / "series").iterdir())])


def test_all_orders_of_the_axes_are_tried():
    assert len(set(ORDERS)) == 16


@pytest.mark.parametrize("codes", ORDERS)
def test_a_series_shows_what_the_same_volume_shows(tmp_path, codes):
    make_volume(tmp_path, codes)
    slices = series_of(tmp_path)
    for index in (0, 3, 6):
        expected = read_axial_slice(tmp_path / "volume.nii.gz", index / 6)
        found = read_ct(slices[index].path)
        assert found.dtype == np.float64
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("codes", ["PLS", "ARI"])
def test_a_tilted_series_is_cut_along_its_nearest_axis(tmp_path, codes):
    make_volume(tmp_path, codes, tilt=25)
    slices = series_of(tmp_path)
    expected = read_axial_slice(tmp_path / "volume.nii.gz", 2 / 6)
    assert np.array_equal(read_ct(slices[2].path), expected)


def test_rescale_gives_hounsfield_units(tmp_path):
    path = save(tmp_path / "a", make(GREY, RescaleSlope=2, RescaleIntercept=-1000))
    assert np.array_equal(read_ct(path), GREY * 2.0 - 1000)
    # They mean the same, in whatever tones they were to be shown.
    path = save(tmp_path / "b", make(GREY, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(read_ct(path), GREY - 1024.0)


def test_a_compressed_slice_is_read(tmp_path):
    dataset = make(GREY)
    dataset.compress(RLELossless)
    assert np.array_equal(read_ct(save(tmp_path / "a", dataset)), GREY - 1024.0)


# --- X-rays ----------------------------------------------------------------------------------

DX = {"modality": "DX"}
FULL = np.round(GREY / 507 * 255)


@pytest.mark.parametrize("modality", ["CR", "DX", "PX"])
def test_an_xray_takes_its_own_range(tmp_path, modality):
    path = save(tmp_path / "a", make(GREY + 100, modality))
    assert read_header(path).modality == "xray"
    grey = read_xray(path)
    assert grey.dtype == np.uint8
    assert np.array_equal(grey, FULL)


def test_bone_is_white_however_it_is_stored(tmp_path):
    path = save(tmp_path / "a", make(507 - GREY, **DX, PhotometricInterpretation="MONOCHROME1"))
    assert np.abs(read_xray(path).astype(int) - FULL).max() <= 1


def test_the_files_first_window_is_taken(tmp_path):
    windows = {"WindowCenter": [250, 50], "WindowWidth": [201, 11], "VOILUTFunction": "LINEAR"}
    grey = read_xray(save(tmp_path / "a", make(GREY, **DX, **windows)))
    expected = (np.clip(GREY.astype(float), 149.5, 349.5) - 149.5) / 200
    assert np.abs(grey - expected * 255).max() <= 1
    assert {0, 255} <= set(grey.ravel())


def test_the_files_table_is_taken(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [600, 0, 16]
    table.add_new("LUTData", "US", [min(i, 300) for i in range(600)])
    slope = {"RescaleSlope": 1, "RescaleIntercept": 0}  # makes floats of the values
    grey = read_xray(save(tmp_path / "a", make(GREY, **DX, **slope, VOILUTSequence=[table])))
    assert np.array_equal(grey, np.round(np.minimum(GREY, 300) / 300 * 255))


# --- What is of another kind -----------------------------------------------------------------


def directory():
    dataset = make(GREY, modality=None, PixelData=None)
    dataset.SOPClassUID = MediaStorageDirectoryStorage
    dataset.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    return dataset


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        (make(GREY, "MR"), "modality MR"),
        (make(GREY, "SR", PixelData=None, Rows=None), "modality SR"),
        (make(GREY, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (make(GREY, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "not axial"),
        (make(GREY, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "not axial"),
        (make(GREY, **DX, ViewPosition="LL"), "lateral"),
        (directory(), "directory"),
    ],
)
def test_what_the_study_does_not_have_is_told(tmp_path, dataset, told):
    assert told in read_header(save(tmp_path / "a", dataset)).foreign


@pytest.mark.parametrize("dataset", [make(GREY), make(GREY, **DX, ViewPosition="PA")])
def test_what_it_has_is_not(tmp_path, dataset):
    assert read_header(save(tmp_path / "a", dataset)).foreign == ""


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        (make(GREY, NumberOfFrames=4), "4 frames"),
        (make(GREY, SamplesPerPixel=3, PhotometricInterpretation="RGB"), "RGB"),
        (make(GREY, PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
        (make(GREY, PixelData=None), "no pixel data"),
        (make(GREY, ImageOrientationPatient=None), "no ImageOrientationPatient"),
        (make(GREY, ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), "no ImageOrientationPatient"),
        (make(GREY, modality=None), "no Modality"),
        (make(GREY, Rows=60_000, Columns=60_000), "60000 x 60000 px"),
    ],
)
def test_files_that_hold_no_one_grey_picture_are_refused(tmp_path, dataset, told):
    path = save(tmp_path / "a", dataset)
    with pytest.raises(DicomError, match=told) as error:
        read_header(path)
    assert str(path) in str(error.value)


def unreadable():
    dataset = make(GREY)
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    return dataset


@pytest.mark.parametrize(
    ("read", "dataset", "told"),
    [
        (read_ct, unreadable(), "compressed as JPEG Lossless"),
        (read_ct, make(GREY, PixelData=GREY.tobytes()[:-9]), "cannot be decoded"),
        (read_xray, make(GREY, **DX, BitsAllocated=12), "cannot be decoded"),
        (read_xray, make(GREY, **DX, WindowCenter=9, WindowWidth=0), "window"),
        (read_xray, make(GREY * 0, **DX), "constant"),
    ],
)
def test_pixels_that_cannot_be_used_are_refused(tmp_path, read, dataset, told):
    path = save(tmp_path / "a", dataset)
    assert read_header(path).foreign == ""
    with pytest.raises(DicomError, match=told) as error:
        read(path)
    assert str(path) in str(error.value)


def compressed(grey, form, syntax, **tags):
    """A DICOM file whose pixels are the picture `grey`, (rows, columns), as a JPEG of that form."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, form)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    dataset = make(np.zeros(grey.shape[:2], np.uint8), **DX, **{**eight, **tags})
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    return dataset


STREAMS = [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless)]


@pytest.mark.parametrize(("form", "syntax"), STREAMS)
def test_a_compressed_xray_is_read(tmp_path, form, syntax):
    grey = np.tile(np.arange(40, dtype=np.uint8), (30, 1))
    found = read_xray(save(tmp_path / "a", compressed(grey, form, syntax)))
    assert np.abs(found - np.round(grey / 39 * 255)).max() <= 10


@pytest.mark.parametrize(("form", "syntax"), STREAMS)
def test_a_picture_larger_than_the_tags_say_is_refused_before_it_is_decoded(tmp_path, form, syntax):
    grey = np.zeros((5000, 5000), np.uint8)
    path = save(tmp_path / "a", compressed(grey, form, syntax, Rows=10, Columns=10))
    with thrifty(grey.size), pytest.raises(DicomError, match="5000 x 5000 px in 1 channel"):
        read_xray(path)


def test_a_compressed_picture_in_colours_is_refused(tmp_path):
    dataset = compressed(np.zeros((30, 40, 3), np.uint8), *STREAMS[0])
    with pytest.raises(DicomError, match="40 x 30 px in 3 channels"):
        read_xray(save(tmp_path / "a", dataset))


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    content = save(tmp_path / "whole", make(GREY)).read_bytes()
    (tmp_path / "a.dcm").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DicomError, match=r"a\.dcm"):
        read_ct(tmp_path / "a.dcm")


def test_a_deflated_data_set_is_refused_before_it_is_inflated(tmp_path):
    dataset = make(GREY, PixelData=bytes(2**25))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(tmp_path / "a.dcm", dataset)
    assert path.stat().st_size < 2**16
    tracemalloc.start()
    for read in (read_header, read_ct, read_xray):
        with pytest.raises(DicomError, match=r"a deflated data set"):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("read", "dataset", "told"),
    [
        (read_ct, make(GREY, **DX), "DICOM of modality DX"),
        (read_xray, make(GREY), "DICOM of modality CT"),
        (read_ct, make(GREY, modality="MR"), "DICOM of modality MR"),
        (read_xray, make(GREY, **DX, ViewPosition="LL"), "a lateral X-ray"),
        (read_ct, make(GREY, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer"),
    ],
)
def test_a_picture_of_another_kind_is_refused(tmp_path, read, dataset, told):
    with pytest.raises(DicomError, match=told):
        read(save(tmp_path / "a", dataset))


def test_what_is_no_dicom_file_is_refused(tmp_path):
    (tmp_path / "a.dcm").write_text("text")
    assert not is_dicom(tmp_path / "a.dcm")
    for name, told in (("a.dcm", "DICM after 128 bytes"), ("gone.dcm", "no such file")):
        with pytest.raises(DicomError, match=told):
            read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({}, "at the same place as"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"ImagePositionPatient": [0, 0, 9], "Rows": 6, "Columns": 8}, "another size"),
        ({"ImagePositionPatient": [0, 0, 9], "ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]},
         "another size or orientation"),
    ],
)  # fmt: skip
def test_what_is_no_one_volume_is_refused(tmp_path, other, told):
    paths = [save(tmp_path / "a", make(GREY)), save(tmp_path / "b", make(GREY, **other))]
    with pytest.raises(DicomError, match=told) as error:
        sort_series([read_header(path) for path in paths])
    assert str(tmp_path / "b") in str(error.value)


def test_nothing_that_names_a_person_is_read(tmp_path, recwarn, caplog):
    # Values of a wrong form, which pydicom would repeat in warnings.
    wrong = {"ReferringPhysicianName": NAME * 20, "StudyInstanceUID": NAME}
    path = save(tmp_path / "a", make(GREY, **wrong))
    recwarn.clear()
    assert NAME.encode() in path.read_bytes()
    assert NAME not in repr(read_header(path))
    dataset, _ = _read_pixels(path)
    assert {element.keyword for element in dataset} <= set(TAGS)
    assert [str(warning.message) for warning in recwarn] + caplog.messages == []
