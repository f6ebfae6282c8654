"""DICOM: the same picture as of a volume, X-rays as their files say, and what is refused."""

import io
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.decoders.gdcm import gdcm
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)

from chest.data.dicom import (
    TAGS,
    DicomError,
    _read_pixels,
    is_dicom,
    read_ct,
    read_headers,
    read_xray,
    sort_series,
)
from chest.data.volumes import read_axial_slice

# Every way in which a file may store an axial slice: rows, columns, slices.
ORDERS = ["".join(c) for plane in permutations(("AP", "LR")) for c in product(*plane, "SI")]
NAME = "Secret^Name"
GREY = np.add.outer(np.arange(40), np.arange(36) * 100).astype(np.uint16)  # 0 to 3539
LOW, HIGH = np.percentile(GREY, (0.5, 99.5))
SHADES = np.round((np.clip(GREY, LOW, HIGH) - LOW) / (HIGH - LOW) * 255)


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
        if isinstance(value, pydicom.DataElement):  # with another type than its tag has
            dataset.add(value)
        elif value is not None:
            setattr(dataset, tag, value)
    return dataset


def make_xray(pixels=GREY, **tags):
    return make(pixels, "DX", **tags)


def item(**tags):
    """Make an item of a sequence."""
    dataset = Dataset()
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    return dataset


def code(value, meaning):
    return item(CodeValue=value, CodingSchemeDesignator="SRT", CodeMeaning=meaning)


def save(path, dataset):
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_series(folder, codes, tilt=0):
    """Save noise as a NIfTI volume of 7 slices, and as a series that is stored `codes`."""
    values = np.random.default_rng(0).integers(-1000, 1000, (37, 35, 7)).astype(np.int16)
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
    return sort_series([read_headers(path)[0] for path in sorted(paths)])


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
        (make(modality="CR", BodyPartExamined="PORT CHEST"), SHADES),
        (make_xray(ViewCodeSequence=[code("R-10206", "antero-posterior")]), SHADES),
        (make_xray(ImageType=["DERIVED", "SECONDARY"], ViewPosition="PA"), SHADES),
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


PADDED = np.pad(GREY[4:-4, 4:-4], 4, constant_values=9000)
UNSIGNED = pydicom.DataElement("PixelPaddingValue", "US", 63536)  # -2000


@pytest.mark.parametrize(
    ("pixels", "tags"),
    [
        (PADDED, {"PixelPaddingValue": 9000}),
        (PADDED, {"PixelPaddingValue": 8000, "PixelPaddingRangeLimit": 9100}),
        (PADDED.astype(np.int16) - np.int16(11000), {"PixelPaddingValue": UNSIGNED}),
        (PADDED + np.uint16(54536), {"PixelPaddingValue": 63536}),
    ],
)
def test_padding_is_left_out_and_black(tmp_path, pixels, tags):
    inner = pixels[4:-4, 4:-4].astype(float)
    low, high = np.percentile(inner, (0.5, 99.5))
    expected = np.round((np.clip(inner, low, high) - low) / (high - low) * 255)
    for tone, shown in (("MONOCHROME1", 255 - expected), ("MONOCHROME2", expected)):
        path = save(tmp_path / "a", make_xray(pixels, PhotometricInterpretation=tone, **tags))
        assert np.array_equal(read_xray(path), np.pad(shown, 4))
    found = read_ct(save(tmp_path / "b", make(pixels, **tags)))
    assert np.array_equal(found, np.pad(inner - 1024, 4, constant_values=-1024))


def test_bits_above_those_stored_are_no_values(tmp_path):
    overlay = GREY | (np.arange(36) % 2 << 12).astype(np.uint16)
    dataset = make(overlay, BitsStored=12, HighBit=11)
    assert np.array_equal(read_ct(save(tmp_path / "a", dataset)), GREY - 1024.0)
    stream = io.BytesIO()
    Image.fromarray(overlay).save(stream, "JPEG2000", no_jp2=True)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    assert np.array_equal(read_ct(save(tmp_path / "b", dataset)), GREY - 1024.0)


@pytest.mark.parametrize(
    ("along", "down", "turn"),
    [
        ("L", "F", lambda grey: grey),
        ("R", "FP", lambda grey: grey[:, ::-1]),
        ("L", "H", lambda grey: grey[::-1]),
        ("F", "L", lambda grey: grey.T),
        ("H", "R", lambda grey: grey[::-1, ::-1].T),
    ],
)
def test_an_xray_is_turned_upright(tmp_path, along, down, turn):
    path = save(tmp_path / "a", make_xray(PatientOrientation=[along, down]))
    assert np.array_equal(read_xray(path), turn(SHADES))


def test_tables_of_values_and_a_falling_slope(tmp_path):
    falling = [*range(4095, -1, -1)]
    modality = item(LUTDescriptor=[4096, 0, 12], LUTData=falling)
    voi = item(LUTDescriptor=[4096, 0, 16], LUTData=falling)  # although it uses 12 bits
    for table in (modality, voi):
        table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    full = np.round(255 - GREY / GREY.max() * 255)
    assert (
        np.abs(read_xray(save(tmp_path / "a", make_xray(VOILUTSequence=[voi]))) - full).max() <= 1
    )
    slope = {"RescaleSlope": -10, "RescaleIntercept": 3000}
    for tags in ({"ModalityLUTSequence": [modality]}, slope):
        found = read_xray(save(tmp_path / "a", make_xray(**tags)))
        assert np.abs(found - (255 - SHADES)).max() <= 1


def as_jpeg(grey, **tags):
    """Make an X-ray whose pixels are stored as a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=95)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    dataset = make_xray(np.zeros(grey.shape[:2], np.uint8), **eight | tags)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    return dataset


T = gdcm.TransferSyntax
LOSSLESS = [
    *(T.JPEGLosslessProcess14, T.JPEGLosslessProcess14_1, T.JPEGLSLossless),
    *(T.JPEGLSNearLossless, T.JPEG2000Lossless, T.JPEG2000, T.RLELossless),
]


def compress(path, syntax, lossy=False):
    """Replace a DICOM file by a compressed one."""
    reader, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(T(syntax))
    if lossy:
        codec = gdcm.JPEGCodec()
        codec.SetLossless(False)
        codec.SetQuality(95)
        change.SetUserCodec(codec)
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize(("bits", "lowest"), [(12, 0), (12, -1500), (16, -3000)])
def test_compressed_slices_have_the_values_of_the_plain_ones(tmp_path, syntax, bits, lowest):
    pixels = (GREY.astype(int) + lowest).astype(np.int16 if lowest else np.uint16)
    path = save(tmp_path / "a.dcm", make(pixels, BitsStored=bits, HighBit=bits - 1))
    compress(path, syntax)
    assert np.array_equal(read_ct(path), pixels - 1024.0)
    dataset = pydicom.dcmread(path)
    dataset.Rows += 1
    with pytest.raises(DicomError, match="cannot be decoded"):
        read_ct(save(path, dataset))


@pytest.mark.parametrize("bits", [8, 12])
def test_jpeg_extended_is_read(tmp_path, bits):
    pixels = (GREY * ((2**bits - 1) / 3539)).astype(np.uint16)
    path = save(tmp_path / "a.dcm", make(pixels, BitsStored=bits, HighBit=bits - 1))
    compress(path, T.JPEGExtendedProcess2_4, lossy=True)
    assert np.abs(read_ct(path) + 1024 - pixels).max() < 2**bits / 100


def test_a_compressed_xray_is_read(tmp_path):
    grey = np.tile(np.arange(40, dtype=np.uint8), (30, 1))
    found = read_xray(save(tmp_path / "a", as_jpeg(grey)))
    assert np.abs(found - np.round(grey / 39 * 255)).max() <= 10


@pytest.mark.parametrize(
    ("read", "dataset", "told"),
    [
        (read_ct, make(modality="MR"), "modality MR"),
        (read_ct, make_xray(), "modality DX"),
        (
            read_ct,
            make(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
            r"no original slice \(LOCALIZER\)",
        ),
        (read_ct, make(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "not axial"),
        (read_xray, make_xray(ViewPosition="LL"), r"not frontal \(LL\)"),
        (read_xray, make(), "modality CT"),
        (read_ct, make(NumberOfFrames=4), "4 frames"),
        (read_ct, make(ImageType=["DERIVED", "PRIMARY", "CSA MPR"]), r"\(MPR\)"),
        (read_ct, make(ImageType=["DERIVED", "SECONDARY"]), "a secondary capture"),
        (read_ct, make(BodyPartExamined="HEAD"), "the body part HEAD"),
        (read_xray, make(modality="PX"), "modality PX"),
        (read_xray, make_xray(ViewPosition="XTABLE LATERAL"), "XTABLE LATERAL"),
        (read_xray, make_xray(ViewCodeSequence=[code("R-10236", "left lateral")]), "left lateral"),
        (read_xray, make_xray(PatientOrientation=["A", "F"]), "seen from the side"),
        (read_xray, make_xray(PresentationIntentType="FOR PROCESSING"), "for processing"),
        (read_xray, make_xray(ImageType=["DERIVED", "SECONDARY"]), "states no frontal view"),
        (read_xray, make_xray(PresentationLUTShape="INVERSE"), "PresentationLUTShape INVERSE"),
        (read_xray, make_xray(NumberOfFrames=2), "2 frames"),
        (read_ct, make(HighBit=14), "HighBit 14 with BitsStored 16"),
        (read_ct, make(BitsStored=None), "BitsStored None"),
        (read_ct, make(RescaleIntercept=None), "only one of RescaleSlope and RescaleIntercept"),
        (read_ct, make(RescaleSlope=""), "a RescaleSlope that is empty"),
        (read_ct, make(RescaleIntercept="inf"), "NaN or infinity"),
        (read_ct, make(GREY[:15]), "an axial plane of 36 x 15 px"),
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


def test_a_malformed_number_is_told_with_its_tag(tmp_path):
    content = save(tmp_path / "a.dcm", make()).read_bytes()
    (tmp_path / "a.dcm").write_bytes(content.replace(b"-1024", b"-1o24"))
    with pytest.raises(DicomError, match="a RescaleIntercept that is empty or no number"):
        read_ct(tmp_path / "a.dcm")


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
            read_headers(tmp_path / name)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({}, "at the same place as"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"ImagePositionPatient": [0, 0, 9], "Rows": 36, "Columns": 40}, "another size"),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}, "another size or orientation"),
    ],
)
def test_slices_that_are_no_single_volume_are_refused(tmp_path, other, told):
    paths = [save(tmp_path / "a", make()), save(tmp_path / "b", make(**other))]
    with pytest.raises(DicomError, match=told):
        sort_series([read_headers(path)[0] for path in paths])


@pytest.mark.parametrize(
    ("heights", "told"),
    [([0, 3, 6, 60, 63], "54 mm above"), ([0, 1.3, 8, 9.3, 16], "6.7 mm above")],
)
def test_slices_must_be_evenly_spaced(tmp_path, heights, told):
    for k, height in enumerate(heights):
        save(tmp_path / f"{k}", make(ImagePositionPatient=[0, 0, height]))
    with pytest.raises(DicomError, match=told):
        sort_series([read_headers(path)[0] for path in sorted(tmp_path.iterdir())])


def test_a_series_is_of_one_study_and_one_frame_of_reference(tmp_path):
    uids = {"StudyInstanceUID": "1.1", "FrameOfReferenceUID": "1.2"}
    paths = [save(tmp_path / "a", make(**uids))]
    paths += [save(tmp_path / f"b{key}", make(**uids | {key: "9"})) for key in uids]
    assert len({read_headers(path)[0].series for path in paths}) == 3
    (header,) = read_headers(save(tmp_path / "c", make(SeriesInstanceUID=None)))
    assert header.series == ""


def test_a_multi_frame_ct_is_a_volume(tmp_path):
    frames = np.stack([GREY + k for k in range(4)])
    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    own = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, -3 * k])],
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1000 - k)],
        )
        for k in range(4)
    ]
    at_top = ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient")
    dataset = make(
        GREY,
        **dict.fromkeys(at_top) | {"PixelData": frames.tobytes(), "NumberOfFrames": 4},
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=own,
    )
    path = save(tmp_path / "a", dataset)
    ordered = sort_series(read_headers(path))
    assert [header.frame for header in ordered] == [3, 2, 1, 0]
    assert np.array_equal(read_ct(path, 2), GREY + 2.0 - 1002)
    compress(path, T.JPEGLosslessProcess14_1)
    dataset = pydicom.dcmread(path)  # GDCM leaves the groups out
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = own
    assert np.array_equal(read_ct(save(path, dataset), 2), GREY + 2.0 - 1002)


def test_nothing_that_names_a_person_is_read(tmp_path, recwarn, caplog):
    # Values of a wrong form, which pydicom would repeat in warnings.
    dataset = make(ReferringPhysicianName=NAME * 20, StudyID=NAME)
    path = save(tmp_path / "a", dataset)
    recwarn.clear()
    assert NAME not in repr(read_headers(path))
    assert {element.keyword for element in _read_pixels(path)[0]} <= set(TAGS)
    assert [str(warning.message) for warning in recwarn] + caplog.messages == []
