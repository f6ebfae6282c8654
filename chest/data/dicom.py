"""DICOM files: CT slices and series as a radiologist looks at them, and X-rays.

Only the tags below are read, none of which names a person, so nothing personal can get out.
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
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from pydicom.uid import MediaStorageDirectoryStorage, RLELossless

from chest.core.errors import FileError, Problem
from chest.data.volumes import scale

ENDINGS = (".dcm", ".dicom")
MAGIC = b"DICM"  # after a preamble of 128 bytes; many DICOM files have no ending, or a number
# The Modality tag: computed tomography; computed, digital and panoramic radiography.
MODALITIES = {"CT": "ct", "CR": "xray", "DX": "xray", "PX": "xray"}
EXPECTED = {"ct": "an axial CT slice", "xray": "a frontal X-ray"}
LATERAL_VIEWS = ("LL", "RL", "LAT", "LATERAL")  # from the left, from the right
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")  # the smallest value is white, is black
MAX_PIXELS = 32_000_000  # the largest detectors have some 16 million
SAME_PLACE = 1e-3  # mm between slices
SAME_DIRECTION = 1e-3  # between direction cosines

TAGS = [
    *("ImageType", "Modality", "SeriesInstanceUID", "ViewPosition"),
    *("ImageOrientationPatient", "ImagePositionPatient"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth"),
]

# Files that deviate from the standard are common, and pydicom's warnings would repeat what they
# hold. Where a deviation matters, reading fails.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


class DicomError(FileError):
    """A DICOM file or series that cannot be used."""


@dataclass(frozen=True)
class Header:
    """What a DICOM file says about its picture.

    ``modality``: ``ct`` or ``xray``; ``stated``: the tag that says so. ``foreign``: why the study
    has no pictures of this kind; empty if it has. ``series`` groups the slices of a CT series.
    ``size``: rows, columns. ``orientation``: six direction cosines, along a row and down a column;
    ``position``: in mm. Both run to the patient's left, back and head, and are empty if not stated.
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
    """Return whether the file is DICOM by its content, whatever its name; raises OSError."""
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: str | Path) -> Header:
    """Read what `path` says about its picture, without the picture.

    Raises DicomError if the file is missing or damaged, states no modality, or is of a modality of
    the study but holds several frames, colours, no pixels, or a CT slice without orientation.
    """
    with _refusing(path, "no readable DICOM file"):
        dataset = pydicom.dcmread(path, specific_tags=TAGS, defer_size=1024)
        header = Header(
            path=Path(path),
            foreign=_foreign(dataset),
            modality=MODALITIES.get(_modality(dataset), ""),
            stated=_modality(dataset),
            series=str(dataset.get("SeriesInstanceUID") or ""),
            size=(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
            orientation=_orientation(dataset),
            position=_numbers(dataset, "ImagePositionPatient", 3),
        )
        if not header.foreign:
            _check(header, dataset)
        return header


def sort_series(headers: Sequence[Header]) -> list[Header]:
    """Sort the slices of one CT series from the feet to the head, by their place along the normal.

    Raises DicomError if they are no single volume: a slice states no position, has another size or
    orientation than the others, or lies where another one does.
    """
    first = headers[0]
    if len(headers) == 1:
        return [first]
    for header in headers:
        turned = np.abs(np.subtract(header.orientation, first.orientation)).max()
        if header.size != first.size or turned > SAME_DIRECTION:
            found = f"another size or orientation than {first.path}, in one series"
            raise _problem(header.path, found, "slices of one volume", "move it elsewhere")
        if not header.position:
            found = "no ImagePositionPatient"
            raise _problem(header.path, found, "the slice's position", "export it again")
    row, column = np.reshape(first.orientation, (2, 3))
    normal = np.cross(row, column)
    heights = np.array([header.position for header in headers]) @ normal * np.sign(normal[2])
    order = np.argsort(heights, kind="stable")
    for lower, upper in pairwise(order):
        if heights[upper] - heights[lower] < SAME_PLACE:
            found = f"a slice at the same place as {headers[lower].path}"
            expected = "one slice at each place of a series"
            raise _problem(headers[upper].path, found, expected, "keep one of them")
    return [headers[i] for i in order]


def read_ct(path: str | Path) -> np.ndarray:
    """Read the axial CT slice in `path`, in the display orientation of chest.data.volumes.

    Returns float64, (rows, columns), in Hounsfield units, by the file's rescale slope and
    intercept: anterior up, the patient's right on the left. An oblique slice is not resampled. The
    photometric interpretation does not matter to Hounsfield units.

    Raises DicomError as `read_header` does, if the file is no axial CT slice, and if its pixels
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
    """Read the X-ray in `path` as uint8, (rows, columns), bone white.

    The file's first VOI table or window is applied, if it has one; then darkest to brightest become
    0 to 255. Raises DicomError as `read_ct` does, but if the file is no frontal X-ray, and if all
    pixels are alike.
    """
    _header_of(path, "xray")
    dataset, pixels = _read_pixels(path)
    with _refusing(path, "a window that cannot be used"):
        if dataset.get("VOILUTSequence"):
            pixels = np.rint(pixels).astype(np.int64)  # they are looked up in a table
        pixels = apply_voi_lut(pixels, dataset).astype(np.float64)
        grey = scale(pixels, pixels.min(), pixels.max())
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _header_of(path: str | Path, modality: str) -> Header:
    """Read the header of a picture, which must be of `modality` and of a kind of the study."""
    header = read_header(path)
    if header.foreign or header.modality != modality:
        found = header.foreign or f"DICOM of modality {header.stated}"
        raise _problem(path, found, EXPECTED[modality], "leave it out")
    return header


def _modality(dataset: pydicom.Dataset) -> str:
    return str(dataset.get("Modality") or "")


def _foreign(dataset: pydicom.Dataset) -> str:
    """Return why the study has no pictures of this kind, or an empty string."""
    stated = _modality(dataset)
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return "a DICOM directory"
    if stated and stated not in MODALITIES:
        return f"DICOM of modality {stated}"
    if "LOCALIZER" in (dataset.get("ImageType") or ()):
        return "a localizer of a CT series"
    if MODALITIES.get(stated) == "xray":
        lateral = str(dataset.get("ViewPosition") or "").upper() in LATERAL_VIEWS
        return "a lateral X-ray" if lateral else ""
    orientation = _orientation(dataset)
    if orientation and _nearest_axes(orientation)[2, 0] != 2:
        return "a CT slice that is not axial"
    return ""


def _check(header: Header, dataset: pydicom.Dataset) -> None:
    """Raise DicomError if the tags show that the picture cannot be used."""
    rows, columns = header.size
    frames = int(dataset.get("NumberOfFrames") or 1)
    colours = dataset.get("PhotometricInterpretation")
    again = "export it again"
    if not header.stated:
        raise _problem(header.path, "no Modality tag", " or ".join(MODALITIES), again)
    if frames > 1:
        remedy = "split it into its frames"
        raise _problem(header.path, f"{frames} frames", "one picture a file", remedy)
    if dataset.get("SamplesPerPixel", 1) != 1 or colours not in MONOCHROME:
        found = f"colours ({colours})" if colours else "no PhotometricInterpretation"
        remedy = "export the original picture"
        raise _problem(header.path, found, "grey (MONOCHROME1 or 2)", remedy)
    if "PixelData" not in dataset or not rows * columns:
        raise _problem(header.path, "no pixel data", "a picture", again)
    if rows * columns > MAX_PIXELS:
        found, expected = f"{columns} x {rows} px", f"at most {MAX_PIXELS // 1_000_000} megapixels"
        raise _problem(header.path, found, expected, "shrink it")
    if header.modality == "ct" and not header.orientation:
        found = "no ImageOrientationPatient that can be used"
        raise _problem(header.path, found, "six direction cosines", again)


def _read_pixels(path: str | Path) -> tuple[pydicom.Dataset, np.ndarray]:
    """Read the tags, and the pixels as modality values: (rows, columns), oriented as stored."""
    with _refusing(path, "pixel data that cannot be decoded"):
        dataset = pydicom.dcmread(path, specific_tags=TAGS)
        syntax = dataset.file_meta.TransferSyntaxUID
        if not get_decoder(syntax).is_available:
            found = f"pixels compressed as {syntax.name}"
            remedy = "decompress it first (with dcmdjpeg or gdcmconv)"
            raise _problem(path, found, "a compression that can be read here", remedy)
        if syntax.is_encapsulated and syntax != RLELossless:
            _check_stream(dataset)
        pixels = apply_modality_lut(dataset.pixel_array, dataset)
        if not np.isfinite(pixels).all():
            raise ValueError("NaN or infinity")
        return dataset, pixels


def _check_stream(dataset: pydicom.Dataset) -> None:
    """Raise ValueError if a JPEG has another size or more channels than the tags say."""
    stream = io.BytesIO(get_frame(dataset.PixelData, 0, number_of_frames=1))
    with Image.open(stream, formats=("JPEG", "JPEG2000")) as image:
        found = (*image.size, len(image.getbands()))
    if found != (dataset.Columns, dataset.Rows, 1):
        width, height, channels = found
        raise ValueError(
            f"{width} x {height} px in {channels} channel(s), "
            f"not {dataset.Columns} x {dataset.Rows} in 1"
        )


def _nearest_axes(orientation: tuple[float, ...]) -> np.ndarray:
    """Return the axis of RAS+ that stored rows, columns and slices are each nearest to, (3, 2)."""
    row, column = np.reshape(orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, :3] = np.stack([column, row, np.cross(row, column)], axis=1)
    affine[:2] *= -1  # DICOM's x and y run to the left and back, RAS+ to the right and front
    return nib.io_orientation(affine)


def _orientation(dataset: pydicom.Dataset) -> tuple[float, ...]:
    """Return the direction cosines, or nothing if they are no two unit vectors at right angles."""
    numbers = _numbers(dataset, "ImageOrientationPatient", 6)
    pair = np.reshape(numbers or np.zeros(6), (2, 3))
    return numbers if np.abs(pair @ pair.T - np.eye(2)).max() < 0.01 else ()


def _numbers(dataset: pydicom.Dataset, tag: str, count: int) -> tuple[float, ...]:
    """Return the `count` finite numbers of a tag, or nothing."""
    numbers = tuple(float(x) for x in dataset.get(tag) or ())
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else ()


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
        found, expected = "no readable DICOM file", "DICM after 128 bytes"
        raise _problem(path, found, expected, "export it again") from None
    except Exception as error:  # pydicom raises many kinds
        found = f"{found} ({error})"
        raise _problem(path, found, "a whole DICOM file", "export it again") from None


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> DicomError:
    return DicomError(Problem(path, found, expected, remedy))
