"""DICOM files: CT slices and series as a radiologist looks at them, and X-rays.

Only the tags below are read, none of which names a person, so nothing personal can get out.
"""

import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder, pixel_array
from pydicom.pixels.decoders.gdcm import gdcm  # never before zlib, which it would break

from chest.core.errors import FileError, Problem
from chest.data.volumes import AIR, plane_fault, scale

ENDINGS = (".dcm", ".dicom")
MAGIC = b"DICM"  # after a preamble of 128 bytes; many DICOM files have no ending, or a number
# The Modality tag: computed tomography; computed and digital radiography, radiographs on film.
MODALITIES = {"CT": "ct", "CR": "xray", "DX": "xray", "RG": "xray"}
EXPECTED = {"ct": "an axial CT slice", "xray": "a frontal X-ray of a chest"}
FRONTAL = ("AP", "PA")
# Frontal, antero-posterior and postero-anterior, as SNOMED CT has them and as it had them before.
FRONTAL_CODES = ("399033003", "399348003", "272479007", "R-10202", "R-10206", "R-10214")
CHEST = ("CHEST", "THORA", "TORAX", "LUNG", "TORSO", "BODY", "UNKNOWN")  # parts of BodyPartExamined
REFORMATTED = ("LOCALIZER", "MPR", "MIP", "MINIP", "PROJECTION IMAGE")  # values of ImageType
TONES = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}  # the smallest value is white, black
MAX_PIXELS = 32_000_000  # the largest detectors have some 16 million
SAME_PLACE = 1e-3  # mm between slices
SAME_DIRECTION = 1e-3  # between direction cosines
EVEN = 1.5  # at most, between the largest and the smallest step of a series
START_OF_FRAME = (0xFFC0, 0xFFC1, 0xFFC2, 0xFFC3, 0xFFF7)  # markers in JPEG; the last is JPEG-LS
PERCENTILES = (0.5, 99.5)  # of an X-ray without a window: markers and dead pixels lie beyond them

SERIES = ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
TAGS = [
    *("ImageType", "SOPClassUID", "Modality", "PresentationIntentType", "BodyPartExamined"),
    *("ViewPosition", "ViewCodeSequence", "PatientOrientation", "AcquisitionNumber"),
    *SERIES,
    *("ImageOrientationPatient", "ImagePositionPatient"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PresentationLUTShape"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth"),
]

GROUPS = {  # where a multi-frame file states a tag for its frames
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    **dict.fromkeys(("RescaleSlope", "RescaleIntercept"), "PixelValueTransformationSequence"),
}

# Files that deviate from the standard are common, and pydicom's warnings would repeat what they
# hold. Where a deviation matters, reading fails.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
gdcm.Trace.WarningOff()
gdcm.Trace.ErrorOff()


class DicomError(FileError):
    """A DICOM file or series that cannot be used."""


@dataclass(frozen=True)
class Header:
    """What a DICOM file says about its picture, or about one of its frames.

    ``modality``: ``ct`` or ``xray``; ``stated``: the tag that says so. ``foreign``: why the study
    has no pictures of this kind; empty if it has. ``series`` groups the slices of a CT series: its
    study, series and frame of reference; empty if no series is stated. ``size``: rows, columns.
    ``orientation``: six direction cosines, along a row and down a column; ``position``: in mm. Both
    run to the patient's left, back and head, and are empty if not stated.
    """

    path: Path
    frame: int
    foreign: str
    modality: str
    stated: str
    series: str
    acquisition: str
    size: tuple[int, int]
    orientation: tuple[float, ...]
    position: tuple[float, ...]


def is_dicom(path: str | Path) -> bool:
    """Return whether the file is DICOM by its content, whatever its name; raises OSError."""
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(len(MAGIC)) == MAGIC


def read_headers(path: str | Path) -> list[Header]:
    """Read what `path` says about its picture, without the picture; a multi-frame CT has several.

    Raises DicomError if the file is missing or damaged, states no modality, or is of a modality of
    the study but holds an X-ray of several frames, colours, no pixels, or a CT slice without
    orientation.
    """
    with _refusing(path, "no readable DICOM file"):
        dataset = pydicom.dcmread(path, specific_tags=TAGS, defer_size=1024)
        foreign, modality = _foreign(dataset), MODALITIES.get(_text(dataset, "Modality"), "")
        frames = int(dataset.get("NumberOfFrames") or 1) if modality == "ct" and not foreign else 1
        series = " ".join(_text(dataset, tag) for tag in SERIES)
        headers = [
            Header(
                path=Path(path),
                frame=frame,
                foreign=foreign,
                modality=modality,
                stated=_text(dataset, "Modality"),
                series=series if _text(dataset, SERIES[0]) else "",
                acquisition=_text(dataset, "AcquisitionNumber"),
                size=(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
                orientation=_orientation(dataset, frame),
                position=_numbers(dataset, frame, "ImagePositionPatient", 3),
            )
            for frame in range(frames)
        ]
        if not foreign:
            _check(headers[0], dataset)
        return headers


def sort_series(headers: Sequence[Header]) -> list[Header]:
    """Sort the slices of one CT series from the feet to the head, by their place along the normal.

    Raises DicomError if they are no single volume: a slice states no position, has another size or
    orientation than the others, lies where another one does, or slices are missing between two.
    """
    first = headers[0]
    if len(headers) == 1:
        return [first]
    for header in headers:
        turned = np.abs(np.subtract(header.orientation or 9, first.orientation)).max()
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
    steps = np.diff(heights[order])
    for (lower, upper), step in zip(pairwise(order), steps, strict=True):
        if step < SAME_PLACE:
            found = f"a slice at the same place as {headers[lower].path}"
            expected = "one slice at each place of a series"
            raise _problem(headers[upper].path, found, expected, "keep one of them")
        if step == steps.max() > EVEN * steps.min():
            found = f"a slice {step:g} mm above {headers[lower].path}, others {steps.min():g} mm"
            remedy = "fetch the missing slices, or name one slice"
            raise _problem(headers[upper].path, found, "evenly spaced slices", remedy)
    return [headers[i] for i in order]


def read_ct(path: str | Path, frame: int = 0) -> np.ndarray:
    """Read the axial CT slice in `path`, in the display orientation of chest.data.volumes.

    Returns float64, (rows, columns), in Hounsfield units, by the file's rescale slope and
    intercept, or in the stored values if it states neither; padding is air. Anterior is up, the
    patient's right on the left. An oblique slice is not resampled. The photometric interpretation
    does not matter to Hounsfield units. `frame` is one of a multi-frame file.

    Raises DicomError as `read_headers` does, if the file is no axial CT slice, and if its pixels
    are damaged or cannot be decoded.
    """
    header = _header_of(path, "ct", frame)
    _, pixels, padding = _read_pixels(path, frame)
    turn = nib.orientations.ornt_transform(
        _nearest_axes(header.orientation), nib.orientations.axcodes2ornt(("P", "L", "S"))
    )
    pixels = np.where(padding, AIR, pixels)
    turned = nib.orientations.apply_orientation(pixels[..., None], turn)
    return np.ascontiguousarray(turned[..., 0], dtype=np.float64)


def read_xray(path: str | Path) -> np.ndarray:
    """Read the X-ray in `path` as uint8, (rows, columns), bone white, padding black.

    The file's first VOI table or window is applied, if it has one; then darkest to brightest become
    0 to 255, without one PERCENTILES do. It is turned as its PatientOrientation says, so that the
    patient's right is on the left. Raises DicomError as `read_ct` does, but if the file is no
    frontal X-ray, and if all pixels are alike.
    """
    _header_of(path, "xray")
    dataset, pixels, padding = _read_pixels(path)
    with _refusing(path, "a window that cannot be used"):
        if dataset.get("VOILUTSequence"):
            pixels = np.rint(pixels).astype(np.int64)  # they are looked up in a table
        shown = apply_voi_lut(pixels, dataset).astype(np.float64)
        windowed = dataset.get("VOILUTSequence") or dataset.get("WindowWidth") is not None
        body = shown[~padding] if not padding.all() else shown
        grey = scale(shown, *np.percentile(body, (0, 100) if windowed else PERCENTILES))
        grey = 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey
        return _upright(np.where(padding, 0, grey).astype(np.uint8), dataset)


def _header_of(path: str | Path, modality: str, frame: int = 0) -> Header:
    """Read the header of a picture, which must be of `modality` and of a kind of the study."""
    header = read_headers(path)[frame]
    if header.foreign or header.modality != modality:
        found = header.foreign or f"DICOM of modality {header.stated}"
        raise _problem(path, found, EXPECTED[modality], "leave it out")
    return header


def _text(dataset: pydicom.Dataset, tag: str) -> str:
    """Return a tag as text, of at most the 64 characters that a UID may have."""
    value = dataset.get(tag) or ""
    several = isinstance(value, pydicom.multival.MultiValue)
    return " ".join(map(str, value if several else [value])).strip()[:64]


def _foreign(dataset: pydicom.Dataset) -> str:
    """Return why the study has no pictures of this kind, or an empty string."""
    stated, part = _text(dataset, "Modality"), _text(dataset, "BodyPartExamined").upper()
    kind = _text(dataset.file_meta, "MediaStorageSOPClassUID") or _text(dataset, "SOPClassUID")
    types = [str(value).upper() for value in dataset.get("ImageType") or ()]
    if kind == uid.MediaStorageDirectoryStorage:
        return "a DICOM directory"
    if stated and stated not in MODALITIES:
        return f"DICOM of modality {stated}"
    if part and not any(name in part for name in CHEST):
        return f"the body part {part}"
    captured = kind.startswith(uid.SecondaryCaptureImageStorage) or "SECONDARY" in types[1:2]
    if MODALITIES.get(stated) == "xray":
        intent = _text(dataset, "PresentationIntentType").upper()
        if intent == "FOR PROCESSING" or kind == uid.DigitalXRayImageStorageForProcessing:
            return "an X-ray for processing, not for presentation"
        views = _views(dataset)
        if captured and not views:  # screenshots; but some collections captured their films
            return "a secondary capture that states no frontal view"
        side = next((view for view in views if view not in FRONTAL), "")
        return f"an X-ray that is not frontal ({side})" if side else ""
    if captured:
        return "a secondary capture"
    words = {word for value in types for word in (value, *value.replace("_", " ").split())}
    if made := words.intersection(REFORMATTED):
        return f"no original slice ({', '.join(sorted(made))})"
    orientation = _orientation(dataset, 0)
    if orientation and _nearest_axes(orientation)[2, 0] != 2:
        return "a CT slice that is not axial"
    return ""


def _views(dataset: pydicom.Dataset) -> list[str]:
    """Return all that an X-ray states of its view, AP if it says frontal."""
    position = _text(dataset, "ViewPosition").upper()
    views = [position] if position else []
    for code in dataset.get("ViewCodeSequence") or ():
        frontal = code.get("CodeValue") in FRONTAL_CODES
        views.append("AP" if frontal else _text(code, "CodeMeaning") or "another view")
    return [*views, "seen from the side"] if {"A", "P"} & {*_directions(dataset)} else views


def _directions(dataset: pydicom.Dataset) -> list[str]:
    """Return where an X-ray's rows and columns run to, upright if not said: left and feet."""
    letters = [str(value)[:1].upper() for value in dataset.get("PatientOrientation") or ()]
    return letters if len(letters) == 2 and all(letters) else ["L", "F"]


def _upright(grey: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Turn an X-ray so that its rows run to the patient's left and its columns to the feet."""
    directions = _directions(dataset)
    grey = grey.T if directions[0] in "HF" else grey
    grey = grey[:, ::-1] if "R" in directions else grey
    return np.ascontiguousarray(grey[::-1] if "H" in directions else grey)


def _check(header: Header, dataset: pydicom.Dataset) -> None:
    """Raise DicomError if the tags show that the picture cannot be used."""
    rows, columns = header.size
    frames = int(dataset.get("NumberOfFrames") or 1)
    colours, tone = dataset.get("PhotometricInterpretation"), _text(dataset, "PresentationLUTShape")
    stored, high, again = dataset.get("BitsStored"), dataset.get("HighBit"), "export it again"
    if not header.stated:
        raise _problem(header.path, "no Modality tag", " or ".join(MODALITIES), again)
    placed = len(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    if frames > 1 and (header.modality == "xray" or placed != frames):
        found, remedy = f"{frames} frames", "split it into its frames"
        raise _problem(header.path, found, "one picture, or frames with their places", remedy)
    if dataset.get("SamplesPerPixel", 1) != 1 or colours not in TONES:
        found = f"colours ({colours})" if colours else "no PhotometricInterpretation"
        remedy = "export the original picture"
        raise _problem(header.path, found, "grey (MONOCHROME1 or 2)", remedy)
    if header.modality == "xray" and tone not in ("", TONES[colours]):
        found, expected = f"{colours} with PresentationLUTShape {tone}", TONES[colours]
        raise _problem(header.path, found, expected, "look at it; repair the wrong tag")
    if "PixelData" not in dataset or not rows * columns:
        raise _problem(header.path, "no pixel data", "a picture", again)
    if not stored or high != stored - 1:
        found = f"HighBit {high} with BitsStored {stored}"
        raise _problem(header.path, found, "HighBit = BitsStored - 1", again)
    if rows * columns > MAX_PIXELS:
        found, expected = f"{columns} x {rows} px", f"at most {MAX_PIXELS // 1_000_000} megapixels"
        raise _problem(header.path, found, expected, "shrink it")
    if header.modality == "ct" and not header.orientation:
        found = "no ImageOrientationPatient that can be used"
        raise _problem(header.path, found, "six direction cosines", again)
    if header.modality == "ct" and (fault := plane_fault(rows, columns)):
        raise _problem(header.path, fault, EXPECTED["ct"], "leave it out")


def _read_pixels(
    path: str | Path, frame: int = 0
) -> tuple[pydicom.Dataset, np.ndarray, np.ndarray]:
    """Read the tags, the pixels as modality values, and which are padding, bool.

    Both (rows, columns), oriented as stored.
    """
    with _refusing(path, "pixel data that cannot be decoded"):
        dataset = pydicom.dcmread(path, specific_tags=TAGS)
        stored = _decode(path, dataset, frame)
        padding = _padding(dataset, stored)
        if dataset.get("ModalityLUTSequence"):
            descriptor = dataset.ModalityLUTSequence[0].LUTDescriptor
            if 10 <= descriptor[2] <= 16:  # all of them lie in 16 bits; pydicom takes no other
                descriptor[2] = 16
            pixels = apply_modality_lut(stored, dataset)
        else:
            slope, intercept = _rescale(path, dataset, frame)
            pixels = stored * slope + intercept
        if not np.isfinite(pixels).all():
            raise ValueError("NaN or infinity")
        return dataset, pixels, padding


def _decode(path: str | Path, dataset: pydicom.Dataset, frame: int) -> np.ndarray:
    """Return the stored values, without what old files keep in the bits above them."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        found = f"pixels compressed as {syntax.name}"
        remedy = "decompress it first (with dcmdjpeg or gdcmconv)"
        raise _problem(path, found, "a compression that can be read here", remedy)
    if syntax.is_encapsulated and syntax != uid.RLELossless:
        frames = int(dataset.get("NumberOfFrames") or 1)
        found = _stream_shape(get_frame(dataset.PixelData, frame, number_of_frames=frames))
        if found != (dataset.Rows, dataset.Columns, 1):
            rows, columns, channels = found
            expected = f"{dataset.Columns} x {dataset.Rows} in 1"
            raise ValueError(f"{columns} x {rows} px in {channels} channel(s), not {expected}")
    if syntax == uid.JPEGExtended12Bit and dataset.BitsStored > 8:
        return _decode_extended(path, dataset, frame)
    try:  # Pillow, since GDCM would end the process on some damaged files of this kind
        plugin = "pillow" if syntax == uid.JPEGBaseline8Bit else ""
        pixels = pixel_array(dataset, index=frame, decoding_plugin=plugin)
    except RuntimeError:
        raise ValueError(f"damaged, or no {syntax.name}") from None
    return pixels if dataset.PixelRepresentation else pixels & (2**dataset.BitsStored - 1)


def _decode_extended(path: str | Path, dataset: pydicom.Dataset, frame: int) -> np.ndarray:
    """Decode JPEG Extended of 12 bits by GDCM, which pydicom does not let do it."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if not reader.Read():
        raise ValueError("no JPEG Extended")
    content = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    kind = np.int16 if dataset.PixelRepresentation else np.uint16
    return np.frombuffer(content, kind).reshape(-1, dataset.Rows, dataset.Columns)[frame]


def _stream_shape(stream: bytes) -> tuple[int, int, int]:
    """Return rows, columns and channels that a JPEG of any kind states itself."""
    if not stream.startswith(b"\xff\xd8"):  # JPEG 2000: the marker SIZ
        place = stream.index(b"\xff\x4f\xff\x51") + 8
        right, lower, left, upper = struct.unpack_from(">4I", stream, place)
        return lower - upper, right - left, struct.unpack_from(">H", stream, place + 32)[0]
    place = 2
    while True:
        marker, length = struct.unpack_from(">HH", stream, place)
        if marker in START_OF_FRAME:
            return struct.unpack_from(">HHB", stream, place + 5)
        place += 2 + length


def _padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Return which pixels the file calls padding, whatever the sign that it gives their value."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    ends = np.array([value, limit], np.int64).astype(stored.dtype)
    return (stored >= ends.min()) & (stored <= ends.max())


def _rescale(path: str | Path, dataset: pydicom.Dataset, frame: int) -> tuple[float, float]:
    """Return slope and intercept of a frame: 1 and 0 if the file has neither tag.

    Raises DicomError, which names the tag, if one is missing, empty or no number.
    """
    numbers = []
    for tag in ("RescaleSlope", "RescaleIntercept"):
        try:
            element = _element(dataset, frame, tag)
            numbers.append(None if element is None else float(element.value))
        except (TypeError, ValueError):
            found = f"a {tag} that is empty or no number"
            raise _problem(path, found, "a number", "export it again") from None
    if numbers.count(None) == 1:
        found = "only one of RescaleSlope and RescaleIntercept"
        raise _problem(path, found, "both, or neither", "export it again")
    return (1.0, 0.0) if None in numbers else tuple(numbers)


def _element(dataset: pydicom.Dataset, frame: int, tag: str) -> pydicom.DataElement | None:
    """Return a tag as a frame states it, all frames together, or the file; None if none does."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    items = (*frames[frame : frame + 1], *shared)
    parts = (*(part for item in items for part in item.get(GROUPS[tag]) or ()), dataset)
    return next((part[tag] for part in parts if tag in part), None)


def _nearest_axes(orientation: tuple[float, ...]) -> np.ndarray:
    """Return the axis of RAS+ that stored rows, columns and slices are each nearest to, (3, 2)."""
    row, column = np.reshape(orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, :3] = np.stack([column, row, np.cross(row, column)], axis=1)
    affine[:2] *= -1  # DICOM's x and y run to the left and back, RAS+ to the right and front
    return nib.io_orientation(affine)


def _orientation(dataset: pydicom.Dataset, frame: int) -> tuple[float, ...]:
    """Return the direction cosines, or nothing if they are no two unit vectors at right angles."""
    numbers = _numbers(dataset, frame, "ImageOrientationPatient", 6)
    pair = np.reshape(numbers or np.zeros(6), (2, 3))
    return numbers if np.abs(pair @ pair.T - np.eye(2)).max() < 0.01 else ()


def _numbers(dataset: pydicom.Dataset, frame: int, tag: str, count: int) -> tuple[float, ...]:
    """Return the `count` finite numbers of a tag, or nothing."""
    element = _element(dataset, frame, tag)
    numbers = () if element is None else tuple(float(x) for x in element.value or ())
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
    except Exception as error:  # pydicom raises many kinds; of these the text is about its code
        ours = isinstance(error, AttributeError | TypeError | LookupError)
        found = f"{found} ({'tags that are missing or damaged' if ours else error})"
        raise _problem(path, found, "a whole DICOM file", "export it again") from None


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> DicomError:
    return DicomError(Problem(path, found, expected, remedy))
