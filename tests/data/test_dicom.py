"""DICOM: the same picture as of a volume, X-rays as their files say, and what is refused."""

import io
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, generate_uid

from chest.data.dicom import (
    TAGS,
    DicomError,
    _read_pixels,
    is_dicom,
    read_ct,
    read_header,
    read_xray,
    sort_series,
)
from chest.data.volumes import read_axial_slice

# Every way in which a file may store an axial slice: rows, columns, slices.
ORDERS = ["".join(c) for plane in permutations(("AP", "LR")) for c in product(*plane, "SI")]
NAME = "Secret^Name"
GREY = np.add.outer(np.arange(8), np.arange(6) * 100).astype(np.uint16)  # 0 to 507
SHADES = np.round(GREY / 507 * 255)


def make(pixels=GREY, modality="CT", **tags):
    """Make a DICOM data set; `tags` replace or add, None leaves one out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {"Modality": modality, "PatientName": NAME, "PatientID": NAME}
    values |= {"SeriesInstanceUID": "1.2.3", "PixelData": pixels.tobytes()}
    values |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1}
    values |= {"PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16}
    values |= {"BitsStored": 16, "HighBit": 15}
    values |= {"PixelRepresentation": int(pixels.dtype.kind == "i")}
    if modality == "CT":
        values |= {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 0]}
        values |= {"RescaleSlope": 1, "RescaleIntercept": -1024}
    for tag, value in {**values, **tags}.items():
        if value is not None:
            setattr(dataset, tag, value)
    return dataset


def make_xray(pixels=GREY, **tags):
    return make(pixels, "DX", **tags)


def save(path, dataset):
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_series(folder, codes, tilt=0):
    """Save noise as a NIfTI volume of 7 slices, and as a series that is stored `codes`."""
    values = np.random.default_rng(0).integers(-1000, 1000, (11, 9, 7)).astype(np.int16)
    angle, turn = np.deg2rad(tilt), np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = np.diag([0.7, 0.8, 3, 1])
    image = nib.Nifti1Image(values, turn @ affine)
    nib.save(image, folder / "volume.nii.gz")
    stored = nib.orientations.axcodes2ornt(tuple(codes))
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), stored))
    axes = np.diag([-1, -1, 1, 1]) @ image.affine  # DICOM runs to the left and to the back
    down, along, _ = (axes[:3, i] / np.linalg.norm(axes[:3, i]) for i in range(3))
    paths = [folder / f"IM{k * 5 % 7:04}" for k in range(7)]  # not in the order of the slices
    for k, path in enumerate(paths):
        pixels = np.ascontiguousarray(image.get_fdata()[..., k].astype(np.int16) + 1024)
        place = [round(x, 6) for x in axes[:3] @ [0, 0, k, 1]]
        cosines = [round(x, 6) for x in (*along, *down)]
        save(path, make(pixels, ImageOrientationPatient=cosines, ImagePositionPatient=place))
    return sort_series([read_header(path) for path in sorted(paths)])


@pytest.mark.parametrize(("codes", "tilt"), [*((c, 0) for c in ORDERS), ("PLS", 25), ("ARI", 25)])
def test_a_series_shows_what_the_same_volume_shows(tmp_path, codes, tilt):
    slices = save_series(tmp_path, codes, tilt)
    for index in (0, 3, 6):
        expected = read_axial_slice(tmp_path / "volume.nii.gz", index / 6)
        found = read_ct(slices[index].path)
        assert found.dtype == np.float64
        assert np.array_equal(found, expected)


def test_rescale_gives_hounsfield_units_whatever_the_tones(tmp_path):
    path = save(tmp_path / "a", make(RescaleSlope=2, RescaleIntercept=-1000))
    assert np.array_equal(read_ct(path), GREY * 2.0 - 1000)
    dataset = make(PhotometricInterpretation="MONOCHROME1")
    dataset.compress(RLELossless)
    assert np.array_equal(read_ct(save(tmp_path / "b", dataset)), GREY - 1024.0)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (make(modality="CR"), SHADES),
        (make_xray(ViewPosition="PA", PhotometricInterpretation="MONOCHROME1"), 255 - SHADES),
        (make_xray(GREY.astype(np.int16) - 3000), SHADES),  # -3000 is no padding here
        (
            make_xray(WindowCenter=[200, 9], WindowWidth=[100, 9], VOILUTFunction="LINEAR_EXACT"),
            np.round((np.clip(GREY, 150.0, 250) - 150) / 100 * 255),
        ),
    ],
)
def test_an_xray_is_shown_as_its_file_says(tmp_path, dataset, expected):
    assert np.array_equal(read_xray(save(tmp_path / "a", dataset)), expected)


def as_jpeg(grey, **tags):
    """Make an X-ray whose pixels are stored as a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=95)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    dataset = make_xray(np.zeros(grey.shape[:2], np.uint8), **eight | tags)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    return dataset


def test_a_compressed_xray_is_read(tmp_path):
    grey = np.tile(np.arange(40, dtype=np.uint8), (30, 1))
    found = read_xray(save(tmp_path / "a", as_jpeg(grey)))
    assert np.abs(found - np.round(grey / 39 * 255)).max() <= 10


@pytest.mark.parametrize(
    ("read", "dataset", "told"),
    [
        (read_ct, make(modality="MR"), "modality MR"),
        (read_ct, make_xray(), "modality DX"),
        (read_ct, make(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer"),
        (read_ct, make(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "not axial"),
        (read_xray, make_xray(ViewPosition="LL"), "a lateral X-ray"),
        (read_xray, make(), "modality CT"),
        (read_ct, make(NumberOfFrames=4), "4 frames"),
        (read_ct, make(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "RGB"),
        (read_ct, make(PixelData=None), "no pixel data"),
        (read_ct, make(ImageOrientationPatient=None), "no ImageOrientationPatient"),
        (read_ct, make(ImageOrientationPatient=[0] * 6), "no ImageOrientationPatient"),
        (read_ct, make(modality=None), "no Modality"),
        (read_ct, make(Rows=60_000, Columns=60_000), "60000 x 60000 px"),
        (read_ct, make(PixelData=GREY.tobytes()[:-9]), "cannot be decoded"),
        (read_xray, make_xray(WindowCenter=9, WindowWidth=0), "window"),
        (read_xray, make_xray(GREY * 0), "a constant picture"),
        (read_xray, as_jpeg(np.zeros((50, 50), np.uint8), Rows=10), "50 x 50 px in 1"),
        (read_xray, as_jpeg(np.zeros((30, 40, 3), np.uint8)), "in 3 channel"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name(tmp_path, read, dataset, told):
    with pytest.raises(DicomError, match=rf"a\.dcm(?s:.)*{told}"):
        read(save(tmp_path / "a.dcm", dataset))


@pytest.mark.parametrize("share", [0, 0.1, 0.6, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    content = save(tmp_path / "whole", make()).read_bytes()
    (tmp_path / "a.dcm").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DicomError, match=r"a\.dcm"):
        read_ct(tmp_path / "a.dcm")


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
        ({"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}, "another size or orientation"),
    ],
)
def test_slices_that_are_no_single_volume_are_refused(tmp_path, other, told):
    paths = [save(tmp_path / "a", make()), save(tmp_path / "b", make(**other))]
    with pytest.raises(DicomError, match=told):
        sort_series([read_header(path) for path in paths])


def test_nothing_that_names_a_person_is_read(tmp_path, recwarn, caplog):
    # Values of a wrong form, which pydicom would repeat in warnings.
    dataset = make(ReferringPhysicianName=NAME * 20, StudyInstanceUID=NAME)
    path = save(tmp_path / "a", dataset)
    recwarn.clear()
    assert NAME not in repr(read_header(path))
    assert {element.keyword for element in _read_pixels(path)[0]} <= set(TAGS)
    assert [str(warning.message) for warning in recwarn] + caplog.messages == []
