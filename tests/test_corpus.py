"""Every file of the corpus is read as it should be, or refused by its name; others only then."""

import csv
import importlib
import shutil
import time
from contextlib import chdir
from pathlib import Path

import corpus
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import ROOT, failure, run_stage, write_params

from chest.dicom import read_ct, read_xray
from chest.errors import ChestError, printable
from chest.images import ENDINGS, read_grey
from chest.volumes import VolumeError, check_header, cut_axial_slice

SIDE = 32
PATIENCE = 60  # seconds for a folder of files, on a busy machine
FEWEST = 35  # kinds that there are at least in each part


def by_kind(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.kind)


@pytest.fixture(autouse=True)
def thrift():
    """No test takes more than a gibibyte of memory at a time."""
    with corpus.thrifty():
        yield


def refuses(case, read):
    with pytest.raises(ChestError) as error:
        read()
    message = str(error.value)
    assert case.told in message
    assert case.name in message
    for part in ("found:", "expected:", "to do:"):
        assert part in message


def test_the_corpus_is_wide_and_each_kind_has_a_name():
    for cases in (corpus.VOLUMES, corpus.PICTURES, corpus.TREES):
        assert len({case.kind for case in cases}) == len(cases) >= FEWEST
        assert any(case.told for case in cases)
        assert not all(case.told for case in cases)


def test_the_table_for_readers_is_current():
    written = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8")
    assert written == corpus.document(), "run `python tests/corpus.py > docs/bad-input.md`"


# --- Files by themselves ---------------------------------------------------------------------


@by_kind(corpus.VOLUMES)
def test_volumes(tmp_path, case):
    path = tmp_path / case.name
    case.make(path)
    if case.told:
        refuses(case, lambda: cut_axial_slice(path, verify=True))
    else:
        check_header(path)
        pixels = cut_axial_slice(path, verify=True).pixels
        assert pixels.dtype == np.float64
        assert np.array_equal(pixels, case.gives)


@by_kind(corpus.PICTURES)
def test_pictures(tmp_path, case):
    path = tmp_path / case.name
    case.make(path)
    if case.told:
        refuses(case, lambda: read_grey(path, SIDE))
        return
    grey = read_grey(path, SIDE)
    assert (grey.pixels.dtype, grey.pixels.shape) == (np.uint8, (SIDE, SIDE))
    if isinstance(case.gives, tuple):
        assert (grey.width, grey.height) == case.gives
        return
    Image.fromarray(case.gives).save(tmp_path / "plain.png")
    due = read_grey(tmp_path / "plain.png", SIDE)
    assert (grey.width, grey.height) == (due.width, due.height)
    assert np.abs(grey.pixels.astype(int) - due.pixels).max() <= case.slack
    assert case.slack or grey.pixel_hash == due.pixel_hash


# --- Collections, as a user has them ---------------------------------------------------------


def keep(folder, table, encoding, chosen):
    """Keep the rows of a csv whose first cells that name a file or an id are `chosen`."""
    path = folder / table
    with path.open(encoding=encoding, newline="") as file:
        head, *rows = csv.reader(file)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([head, *(row for row in rows if chosen & {*row[:2]})])


def keep_few(raw):
    """Of the phantoms so many that each table, class and folder has some, and no more."""
    few = {
        corpus.COVID: {corpus.SLICE, "16_Morozov_study_0005_10.png"},
        corpus.COVID.parent / "1NonCOVID": {"normal001_60.png", "16_Morozov_study_0003_7.png"},
        corpus.STUDIES / "CT-0": {"study_0003.nii.gz"},
        corpus.STUDIES / "CT-1": {"study_0005.nii.gz"},
        corpus.XRAY: {"1000.png", "1001.png"},
    }
    for folder, names in few.items():
        for path in (raw / folder).iterdir():
            if path.name not in names:
                path.unlink()
    for folder in ("CT-2", "CT-3", "CT-4", "../masks"):
        shutil.rmtree(raw / corpus.STUDIES / folder)
    keep(raw, corpus.COVID_TABLE, "iso-8859-1", few[corpus.COVID])
    keep(raw, corpus.NORMAL_TABLE, "utf-8", few[corpus.COVID.parent / "1NonCOVID"])
    keep(raw, corpus.XRAY_TABLE, "utf-8", {"1000", "1001"})


def run_both():
    for stage in ("extract_slices", "build_manifest"):
        run_stage(stage)


def outputs():
    """The bytes of all that the two stages write, and of whatever they leave beside it."""
    return {p: p.read_bytes() for p in Path("data").rglob("*")
            if p.is_file() and "raw" not in p.parts}  # fmt: skip


@pytest.fixture(scope="module")
def few(phantoms, tmp_path_factory):
    """A working directory with a few phantoms, and with what the stages made of them."""
    folder = tmp_path_factory.mktemp("few")
    raw = shutil.copytree(phantoms, folder / "data/raw/phantom")
    keep_few(raw)
    write_params(folder, **{"phantom.expected_counts": None, "image_size": 32})
    with chdir(folder):
        run_both()
    return folder


@pytest.fixture
def place(few, tmp_path, monkeypatch):
    folder = shutil.copytree(few, tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


def known():
    """What the manifest says of the images, but for their names."""
    manifest = pd.read_csv("data/manifest.csv", dtype=str, keep_default_na=False)
    columns = ["label", "modality", "collection", "patient_id", "study", "width", "height"]
    return sorted(manifest[[*columns, "pixel_hash"]].to_numpy().tolist())


@by_kind(corpus.TREES)
def test_collections(place, capsys, case):
    due, before = known(), outputs()
    try:
        case.make(Path("data/raw/phantom").resolve())
    except OSError as error:
        pytest.skip(f"this file system cannot hold it: {error}")
    began = time.monotonic()
    if not case.told:
        run_both()
        assert known() == due
        return
    with pytest.raises(SystemExit) as end:
        run_both()
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert case.told in message
    assert case.name in message
    assert printable(message.replace("\n", "")) == message.replace("\n", "")
    assert outputs() == before
    assert time.monotonic() - began < PATIENCE


def fails_with_all(stage, capsys, bad):
    """The stage ends with exit code 1 and says of each file of `bad`, {path: case}, what is due."""
    before = outputs()
    message = failure(stage, capsys)
    assert f"ERROR: {len(bad)} problems" in message
    for path, case in bad.items():
        assert case.told in message.split(f"{path}\n")[1].split("to do:")[0]
    assert outputs() == before


def made(cases, folder):
    """Number, case and file of each of the refused `cases` that makes a file, below `folder`."""
    for number, case in enumerate(case for case in cases if case.told):
        path = folder / f"{number}{case.name[1:]}"
        case.make(path)
        if path.is_file():
            yield number, case, path


def seen_in_header(path):
    try:
        check_header(path)
    except VolumeError:
        return True
    return False


@pytest.mark.parametrize("header", [True, False])
def test_all_bad_volumes_of_a_collection_are_listed(place, tmp_path, capsys, header):
    # All whose header shows it, before any slice is cut; the others then.
    folder, bad = Path("data/raw/phantom") / corpus.STUDIES / "CT-1", {}
    for number, case, path in made(corpus.VOLUMES, tmp_path):
        if seen_in_header(path) == header:
            bad[path.rename(folder / f"study_09{number:02}{case.name[1:]}")] = case
    assert len(bad) >= 3
    fails_with_all("extract_slices", capsys, bad)


def test_all_bad_pictures_of_a_collection_are_listed(place, tmp_path, capsys):
    raw, bad = Path("data/raw/phantom"), {}
    folder, table = raw / corpus.COVID.parent / "1NonCOVID", raw / corpus.NORMAL_TABLE
    row = next(line for line in table.read_text().splitlines() if "normal001_60.png" in line)
    for number, case, path in made(corpus.PICTURES, tmp_path):
        bad[path.rename(folder / f"bad{number}{path.suffix}")] = case
    with table.open("a") as file:
        file.writelines(row.replace("normal001_60.png", path.name) + "\n" for path in bad)
    assert len(bad) >= 20
    fails_with_all("build_manifest", capsys, bad)


# --- What libraries keep for their own tests -------------------------------------------------


CODE = (".py", ".pyc", ".so")


def shipped(library, *parts):
    """The files below a folder of an installed library."""
    folder = Path(importlib.import_module(library).__file__).parent.joinpath(*parts)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in CODE)
    if not files:
        pytest.skip(f"{library} is installed without {'/'.join(parts)}")
    return files


def judged(files, read):
    """What `read` gives of each file; None where it refuses it. Any other exception is a fault."""
    began, results, unnamed = time.monotonic(), {}, []
    for path in files:
        try:
            results[path] = read(path)
        except ChestError as error:
            results[path] = None
            unnamed += [path] * (path.name not in str(error))
    assert unnamed == []
    assert time.monotonic() - began < PATIENCE
    return results


def as_nibabel(path):
    """The centre slice of a three-dimensional NIfTI volume, turned by nibabel alone."""
    image = nib.funcs.squeeze_image(nib.load(path))
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LPS")
        )
    )
    return turned.get_fdata()[..., turned.shape[2] // 2].T


ODD = [("nibabel", []), ("scipy", ["ndimage"]), ("scipy", ["io"]), ("pydicom", ["data"])]


@pytest.mark.parametrize(("library", "parts"), ODD)
def test_volumes_that_libraries_ship(library, parts):
    results = judged(shipped(library, *parts), lambda path: cut_axial_slice(path, verify=True))
    read = {path: cut for path, cut in results.items() if cut is not None}
    assert len(read) >= (3 if library == "nibabel" else 0)
    assert all(".nii" in path.name for path in read)
    for path, cut in read.items():
        assert np.array_equal(cut.pixels, as_nibabel(path)), path


@pytest.mark.parametrize("read", [read_ct, read_xray])
@pytest.mark.parametrize(("library", "parts"), [("pydicom", ["data"]), ("nibabel", ["nicom"])])
def test_dicom_files_that_libraries_ship(library, parts, read):
    results = judged(shipped(library, *parts), read)
    read_of_them = [pixels for pixels in results.values() if pixels is not None]
    assert read_of_them or library != "pydicom"
    for pixels in read_of_them:
        assert pixels.ndim == 2
        assert np.isfinite(pixels).all()


@pytest.mark.parametrize(
    ("library", "parts"), [("matplotlib", ["mpl-data"]), ("sklearn", []), *ODD]
)
def test_pictures_that_libraries_ship(library, parts):
    files = shipped(library, *parts)
    results = judged(files, lambda path: read_grey(path, SIDE))
    assert any(results.values()) == any(path.suffix in ENDINGS for path in files)
    for grey in filter(None, results.values()):
        assert (grey.pixels.dtype, grey.pixels.shape) == (np.uint8, (SIDE, SIDE))


def test_volumes_are_no_pictures_and_pictures_no_volumes(tmp_path):
    for case in corpus.PICTURES[:5]:
        path = tmp_path / "a.nii.gz"
        case.make(path)
        with pytest.raises(VolumeError):
            cut_axial_slice(path)
