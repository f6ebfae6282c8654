"""Foreign files that are changed at random must be read or refused, and nothing else may happen."""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from pydicom.data import get_testdata_file

from chest.core.errors import ChestError
from chest.core.params import load_params
from chest.data.collections import CT_SLICES, CT_VOLUMES, XRAYS, slice_table, xray_table
from chest.data.dicom import read_ct, read_headers
from chest.data.pictures import read_picture
from chest.data.volumes import Slices, cut_axial_slice, to_grey
from chest.evaluation.predictions import Record, read_system, tabulate, write

LIMIT = 60  # seconds for one file: machines may be busy
TOKENS = (
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"=1",
    b"../",
    b"nan",
    b"~",
)


@dataclass(frozen=True)
class Reader:
    """What reads a file of this name, and good files to change."""

    name: str
    file: str
    read: Callable[[Path], object]
    seeds: list[bytes]


class TooLong(BaseException):
    """A reader that hangs. No Exception: readers turn those into refusals."""


def fuzz(phantoms: Path, folder: Path, examples: int, seed: int) -> dict[str, int]:
    """Try each reader on `examples` changed files; return how many it read without refusing.

    Raises whatever a reader raises but a ChestError or a ValueError; the file is left in `folder`.
    """
    read = {}
    for reader in readers(phantoms, folder):
        rng, read[reader.name] = random.Random(f"{seed} {reader.name}"), 0
        path = folder / reader.file
        for _ in range(examples):
            path.write_bytes(change(rng, rng.choice(reader.seeds)))
            try:
                with time_limit():
                    reader.read(path)
            except (ChestError, ValueError):
                continue
            read[reader.name] += 1
    return read


def readers(phantoms: Path, folder: Path) -> Iterator[Reader]:
    def contents(pattern: str, count: int = 8) -> list[bytes]:
        return [path.read_bytes() for path in sorted(phantoms.glob(pattern))[:count]]

    pictures = contents(f"{XRAYS}/**/image/*.png") + contents(f"{CT_SLICES}/**/*.png")
    tables = contents(f"{CT_SLICES}/meta_data_covid.csv")
    dicom = [Path(get_testdata_file("CT_small.dcm")).read_bytes()]
    yield Reader("volumes", "a.nii.gz", read_volume, contents(f"{CT_VOLUMES}/studies/*/*.nii*"))
    yield Reader("pictures", "a.png", lambda path: read_picture(path, [16]), pictures)
    yield Reader("dicom", "a.dcm", lambda path: (read_headers(path), read_ct(path)), dicom)
    yield Reader("slice tables", "a.csv", lambda path: slice_table(path, "COVID-19", []), tables)
    tables = contents(f"{XRAYS}/MetaData.csv")
    yield Reader("X-ray tables", "a.csv", lambda path: xray_table(path, "ptb", []), tables)
    params = [Path("params.yaml").read_bytes()]
    yield Reader("params", "params.yaml", read_params, params)
    yield predictions_reader(folder)


def read_volume(path: Path) -> None:
    pixels = cut_axial_slice(path, "center", verify=True).pixels
    assert np.isfinite(pixels).all()
    assert to_grey(pixels, "minmax").dtype == np.uint8


def read_params(path: Path) -> None:
    params = load_params(path)
    params.section("slices", Slices)
    assert yaml.safe_load(path.read_bytes())["seed"] in range(2**32)


def predictions_reader(folder: Path) -> Reader:
    import pandas as pd

    labels = ["covid19", "normal", "tuberculosis"] * 4
    known = pd.DataFrame({"image_id": [f"i{i:02}" for i in range(12)], "label": labels})
    described = ("patient_id", "modality", "collection", "site", "study")
    known = known.assign(split="test", **dict.fromkeys(described, "x"))
    answers = np.random.default_rng(0).dirichlet([1, 1, 1], 12)
    write("a", tabulate(known, answers), Record(name="A", kind="trained", n=12), folder)
    content = (folder / "a.csv").read_bytes()
    return Reader("predictions", "a.csv", lambda _: read_system("a", known, folder), [content])


def change(rng: random.Random, content: bytes) -> bytes:
    """Return `content` changed at up to four places: a bit turned, cut, doubled, or filled."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randint(0, len(content)), rng.randint(1, 12)
        before, piece, after = content[:at], content[at : at + length], content[at + length :]
        turned = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:] if piece else b""
        filling = rng.choice([rng.randbytes(length), rng.choice(TOKENS)])
        middle = rng.choice([turned, turned, b"", piece * 3, filling, filling + piece])
        content = before if rng.random() < 0.05 else before + middle + after
    return content


@contextmanager
def time_limit() -> Iterator[None]:
    def late(*_) -> None:
        raise TooLong(f"not done within {LIMIT} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
