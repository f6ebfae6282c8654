"""DICOM files: CT slices and series as a radiologist looks at them, and X-rays.

Only the tags below are read, none of which names a person: nothing personal can get out.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from chest.errors import FileError, Problem
from chest.volumes import to_grey

ENDINGS = (".dcm", ".dicom")
MAGIC = b"DICM"  # after a preamble of 128 bytes; many DICOM files have no ending, or a number
# The Modality tag: computed tomography; computed, digital and panoramic radiography.
MODALITIES = {"CT": "ct", "CR": "xray", "DX": "xray", "PX": "xray"}
EXPECTED = {"ct": "an axial CT slice", "xray": "a frontal X-ray"}
LATERAL_VIEWS = ("LL", "RL", "LAT", "LATERAL")  # from the left, from the right
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")  # the smallest value is white, is black
MAX_PIXELS = 32_000_000  # the largest detectors have some 16; each becomes 8 bytes, twice over
SAME_PLACE = 1e-3  # mm between slices
SAME_DIRECTION = 1e-3  # between direction cosines

TAGS = [
    "ImageType", "Modality", "SeriesInstanceUID", "ViewPosition",
    "ImageOrientationPatient", "ImagePositionPatient",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth",
]  # fmt: skip

# Files that are not quite of the standard's form are common, and pydicom's warnings would repeat
# what they hold; where it matters, reading them fails.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


class DicomError(FileError):
    """A DICOM file or series that cannot be used."""


@dataclass(frozen=True)
class Header:
    """What a DICOM file says of its picture.

    ``modality`` is ``ct`` or ``xray``, and ``stated`` the tag that says so. ``foreign`` says why
    the picture is of a kind that the study does not have; it is empty where it is of one.
    ``series`` groups the slices of a CT series. ``size``: rows, columns. ``orientation``: six
    direction cosines, along a row and down a column, and ``position``, mm, both to the patient's
    left, back and head; empty where they are not stated.
    """

    path: Path
    foreign: str
    modality: str
    stated: str
    series: str
    size: tuple[int, int]
    orientation: tuple[float, ...]
    position: tuple[float, ...]


def is_dicom(path: str | Path) -> bool:
    """Whether the file `path` says that it is DICOM, whatever its name; raises OSError."""
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: str | Path) -> Header:
    """What `path` says of its picture, without the picture.

    Raises DicomError where the file is missing or damaged, states no modality, or is of a modality
    of the study but holds several frames, colours, no pixels, or a CT slice without orientation.
    """
    with _refusing(path, "no readable DICOM file"):
        dataset = _read_tags(path, defer_size=1024)
        stated = str(dataset.get("Modality") or "")
        orientation = _numbers(dataset, "ImageOrientationPatient", 6)
        foreign = _foreign(dataset, stated, orientation)
        if not foreign:
            _check(path, dataset, stated, orientation)
        return Header(
            Path(path), foreign, MODALITIES.get(stated, ""), stated,
            str(dataset.get("SeriesInstanceUID") or ""),
            (int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
            orientation, _numbers(dataset, "ImagePositionPatient", 3),
        )  # fmt: skip


def sort_series(headers: Sequence[Header]) -> list[Header]:
    """The slices of one CT series from the feet to the head, by their place along their normal.

    Raises DicomError where a slice states no position, has another size or orientation than the
    others, or lies where another one does: then it is not one volume.
    """
    first = headers[0]
    if len(headers) == 1:
        return [first]
    for header in headers:
        turned = np.abs(np.subtract(header.orientation, first.orientation)).max()
        if header.size != first.size or turned > SAME_DIRECTION:
            raise _problem(
                header.path, f"another size or orientation than {first.path}, in one series",
                "slices of one volume", "move it elsewhere",
            )  # fmt: skip
        if not header.position:
            raise _problem(
                header.path, "no ImagePositionPatient", "the slice's position", "export it again"
            )
    row, column = np.reshape(first.orientation, (2, 3))
    normal = np.cross(row, column)
    heights = np.array([header.position for header in headers]) @ normal * np.sign(normal[2])
    order = np.argsort(heights, kind="stable")
    for lower, upper in pairwise(order):
        if heights[upper] - heights[lower] < SAME_PLACE:
            raise _problem(
                headers[upper].path, f"a slice at the same place as {headers[lower].path}",
                "one slice at each place of a series", "keep one of them",
            )  # fmt: skip
    return [headers[i] for i in order]


def read_ct(path: str | Path) -> np.ndarray:
    """The axial CT slice in `path`, in display orientation, as chest.volumes gives one.

    Returns float64, rows x columns, in Hounsfield units, by the file's rescale slope and intercept:
    anterior up, the patient's right on the picture's left. An oblique slice is not resampled.
    Whether small values were meant to be shown black or white does not matter to Hounsfield units.

    Raises DicomError as read_header does, where the file is no axial CT slice, and where its pixels
    are damaged or cannot be decoded.
    """
    header = _header_of(path, "ct")
    _, pixels = _read_pixels(path)
    turn = nib.orientations.ornt_transform(
        _nearest_axes(header.orientation), nib.orientations.axcodes2ornt(("P", "L", "S"))
    )
    turned = nib.orientations.apply_orientation(pixels[..., None], turn)
    return np.ascontiguousarray(turned[..., 0], dtype=np.float64)


def read_xray(path: str | Path) -> np.ndarray:
    """The X-ray in `path` as uint8, rows x columns, bone white.

    It is shown as the file says, by its first VOI table or window where it has one; then darkest to
    brightest become 0 to 255. Raises DicomError as read_ct does, but where the file is no frontal
    X-ray, and where all pixels are alike.
    """
    _header_of(path, "xray")
    dataset, pixels = _read_pixels(path)
    with _refusing(path, "a window that cannot be used"):
        if dataset.get("VOILUTSequence"):
            pixels = np.rint(pixels).astype(np.int64)  # they are looked up in a table
        grey = to_grey(apply_voi_lut(pixels, dataset), "minmax")
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _header_of(path: str | Path, modality: str) -> Header:
    """What `path` says of its picture, which must be of `modality`, and of a kind of the study."""
    header = read_header(path)
    if header.foreign or header.modality != modality:
        found = header.foreign or f"DICOM of modality {header.stated}"
        raise _problem(path, found, EXPECTED[modality], "leave it out")
    return header


def _read_tags(path: str | Path, **how) -> pydicom.Dataset:
    """TAGS of a file; raises DicomError where it would have to be inflated as a whole for them.

    That is what pydicom does with a deflated data set, however large it becomes.
    """
    if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise _problem(
            path, "a deflated data set", "one that is not compressed as a whole",
            "inflate it first (with dcmconv or gdcmconv)",
        )  # fmt: skip
    return pydicom.dcmread(path, specific_tags=TAGS, **how)


def _foreign(dataset: pydicom.Dataset, stated: str, orientation: tuple[float, ...]) -> str:
    """Why the picture is of a kind that the study does not have; empty where it is of one."""
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return "a DICOM directory"
    if stated and stated not in MODALITIES:
        return f"DICOM of modality {stated}"
    if "LOCALIZER" in (dataset.get("ImageType") or ()):
        return "a localizer of a CT series"
    if MODALITIES.get(stated) == "xray":
        lateral = str(dataset.get("ViewPosition") or "").upper() in LATERAL_VIEWS
        return "a lateral X-ray" if lateral else ""
    if orientation and _nearest_axes(orientation)[2, 0] != 2:
        return "a CT slice that is not axial"
    return ""


def _check(
    path: str | Path, dataset: pydicom.Dataset, stated: str, orientation: tuple[float, ...]
) -> None:
    """Raise DicomError where the tags show that the picture cannot be used."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    colours = dataset.get("PhotometricInterpretation")
    rows, columns = dataset.get("Rows") or 0, dataset.get("Columns") or 0
    if not stated:
        raise _problem(path, "no Modality tag", " or ".join(MODALITIES), "export it again")
    if frames > 1:
        raise _problem(path, f"{frames} frames", "one picture a file", "split it into its frames")
    if dataset.get("SamplesPerPixel", 1) != 1 or colours not in MONOCHROME:
        found = f"colours ({colours})" if colours else "no PhotometricInterpretation"
        raise _problem(path, found, "grey (MONOCHROME1 or 2)", "export the original picture")
    if "PixelData" not in dataset or not rows * columns:
        raise _problem(path, "no pixel data", "a picture", "export it again")
    if rows * columns > MAX_PIXELS:
        raise _problem(
            path,
            f"{columns} x {rows} px",
            f"at most {MAX_PIXELS // 1_000_000} megapixels",
            "shrink it",
        )
    if MODALITIES[stated] == "ct" and not orientation:
        raise _problem(
            path, "no ImageOrientationPatient that can be used", "six direction cosines",
            "export it again",
        )  # fmt: skip


def _read_pixels(path: str | Path) -> tuple[pydicom.Dataset, np.ndarray]:
    """The tags, and the pixels in the file's orientation, (rows, columns), as modality values."""
    with _refusing(path, "pixel data that cannot be decoded"):
        dataset = _read_tags(path)
        syntax = dataset.file_meta.TransferSyntaxUID
        if not get_decoder(syntax).is_available:
            raise _problem(
                path, f"pixels compressed as {syntax.name}", "a compression that can be read here",
                "decompress it first (with dcmdjpeg or gdcmconv)",
            )  # fmt: skip
        _check_stream(dataset, syntax)
        pixels = apply_modality_lut(dataset.pixel_array, dataset)
        if not np.isfinite(pixels).all():
            raise ValueError("NaN or infinity")
        return dataset, pixels


def _check_stream(dataset: pydicom.Dataset, syntax: UID) -> None:
    """Raise ValueError where a JPEG is of another size than the tags say.

    pydicom decodes it first, however large it is.
    """
    if not syntax.is_encapsulated or syntax == RLELossless:
        return
    stream = io.BytesIO(get_frame(dataset.PixelData, 0, number_of_frames=1))
    with Image.open(stream, formats=("JPEG", "JPEG2000")) as image:
        channels = len(image.getbands())
        if (*image.size, channels) != (dataset.Columns, dataset.Rows, 1):
            raise ValueError(
                f"{image.width} x {image.height} px in {channels} channel{'s' * (channels > 1)}, "
                f"not {dataset.Columns} x {dataset.Rows} in 1"
            )


def _nearest_axes(orientation: tuple[float, ...]) -> np.ndarray:
    """For rows, columns and slices as stored, the axis of RAS+ that each is nearest to, (3, 2)."""
    row, column = np.reshape(orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, :3] = np.stack([column, row, np.cross(row, column)], axis=1)
    affine[:2] *= -1  # DICOM's x and y run to the left and back, RAS+ to the right and front
    return nib.io_orientation(affine)


def _numbers(dataset: pydicom.Dataset, tag: str, count: int) -> tuple[float, ...]:
    """The `count` finite numbers of a tag; empty where they are not there."""
    numbers = tuple(float(x) for x in dataset.get(tag) or ())
    usable = len(numbers) == count and np.isfinite(numbers).all()
    if usable and count == 6:  # direction cosines: two unit vectors at right angles
        pair = np.reshape(numbers, (2, 3))
        usable = np.abs(pair @ pair.T - np.eye(2)).max() < 0.01
    return numbers if usable else ()


@contextmanager
def _refusing(path: str | Path, found: str) -> Iterator[None]:
    """Turn whatever pydicom raises on a file that it cannot read into a DicomError."""
    try:
        yield
    except DicomError:
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file", "a DICOM file", "fetch it") from None
    except InvalidDicomError:
        raise _problem(
            path, "no readable DICOM file", "DICM after 128 bytes", "export it again"
        ) from None
    except Exception as error:  # pydicom raises many kinds
        raise _problem(
            path, f"{found} ({error})", "a whole DICOM file", "export it again"
        ) from None


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> DicomError:
    return DicomError(Problem(path, found, expected, remedy))
