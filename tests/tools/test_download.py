"""The collections are taken from archives, folders and Kaggle, and checked."""

import io
import shutil
import tarfile
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import kagglehub
import pytest
import yaml
from kagglehub.exceptions import KaggleApiHTTPError, UnauthenticatedError
from support import ROOT, load_script

from chest.core.errors import ChestError
from chest.data.collections import CT_SLICES, CT_VOLUMES, XRAYS

download = load_script("tools/download.py")
FOLDERS = {"ct_slices": CT_SLICES, "ct_volumes": CT_VOLUMES, "xrays": XRAYS}


@pytest.fixture(autouse=True)
def expected(phantoms, monkeypatch):
    """The counts of the phantoms in place of those of the study."""
    collections = {}
    for key, collection in download.COLLECTIONS.items():
        counts = {label: 0 for label in collection.counts}
        for item in collection.read(phantoms / FOLDERS[key], problems=[]):
            counts[item.label] += 1
        assert all(counts.values())
        collections[key] = replace(collection, counts=counts)
    monkeypatch.setattr(download, "COLLECTIONS", collections)


@pytest.fixture
def into(tmp_path):
    return tmp_path / "study"


def fetch(into, *arguments):
    download.main(["--into", str(into), *map(str, arguments)])


def refused(into, *arguments):
    with pytest.raises(ChestError) as caught:
        fetch(into, *arguments)
    return str(caught.value)


def pack(folder, archive, below=""):
    """Pack the files of `folder` as zip or tar, by the ending of `archive`."""
    archive.parent.mkdir(exist_ok=True)
    files = {f"{below}{path.relative_to(folder).as_posix()}": path for path in files_of(folder)}
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name, path in files.items():
                file.write(path, name)
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tar', '')}") as file:
            for name, path in files.items():
                file.add(path, name)
    return archive


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_same(folder, other):
    names = [path.relative_to(folder) for path in files_of(folder)]
    assert names == [path.relative_to(other) for path in files_of(other)]
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_the_expected_counts_are_those_of_the_study(monkeypatch):
    monkeypatch.undo()
    total = {}
    for collection in download.COLLECTIONS.values():
        for label, count in collection.counts.items():
            total[label] = total.get(label, 0) + count
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert total == params["study"]["expected_counts"]


def test_archives_of_any_name_are_taken_from_a_folder(phantoms, into, tmp_path, capsys):
    downloads = tmp_path / "downloads"
    pack(phantoms / CT_SLICES, downloads / "archive.zip")
    pack(phantoms / CT_VOLUMES, downloads / "archive (1).tar.gz", "COVID19_1110 1.0/")
    shutil.copytree(phantoms / XRAYS, downloads / "x" / "y")
    (downloads / "notes.txt").write_text("not an archive")
    fetch(into, "--from-archives", downloads)
    for folder in FOLDERS.values():
        assert_same(into / folder, phantoms / folder)
    assert sorted(path.name for path in into.iterdir()) == sorted(FOLDERS.values())
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(FOLDERS)
    before = (into / XRAYS / "MetaData.csv").stat()
    fetch(into)  # all is complete, so Kaggle is not asked
    assert (into / XRAYS / "MetaData.csv").stat() == before


def test_an_incomplete_archive_is_told_and_replaced_when_asked(phantoms, into, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(phantoms / XRAYS, folder)
    (gone := next((folder / "Chest-X-Ray").rglob("image/*.png"))).unlink()
    arguments = ("--only", "xrays", "--from-archives")
    message = refused(into, *arguments, pack(folder, tmp_path / "half.tar"))
    assert gone.stem in message
    assert "tuberculosis" in message
    whole = pack(phantoms / XRAYS, tmp_path / "whole.zip")
    assert "pass --replace" in refused(into, *arguments, whole)
    fetch(into, *arguments, whole, "--replace")
    assert_same(into / XRAYS, phantoms / XRAYS)


def test_check_says_what_is_missing_and_writes_nothing(phantoms, into, capsys):
    message = refused(into, "--check")
    assert message.count("no such folder") == 3
    assert "https://mosmed.ai" in message
    assert not into.exists()
    fetch(phantoms, "--check")
    assert str(phantoms) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../outside.txt", "/tmp/outside.txt"])
@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_a_path_that_leaves_the_folder_is_refused(phantoms, into, tmp_path, name, ending):
    archive = pack(phantoms / XRAYS, tmp_path / f"bad.{ending}")
    if ending == "zip":
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr(name, "x")
    else:
        with tarfile.open(archive, "a") as file:
            file.addfile(member := tarfile.TarInfo(name), io.BytesIO(b""))
            assert member.name == name
    message = refused(into, "--only", "xrays", "--from-archives", archive)
    assert name in message
    assert "leaves the folder" in message
    assert not list(into.iterdir())


def test_a_link_to_elsewhere_is_refused(phantoms, into, tmp_path):
    archive = pack(phantoms / XRAYS, tmp_path / "bad.tar")
    with tarfile.open(archive, "a") as file:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(member)
    message = refused(into, "--only", "xrays", "--from-archives", archive)
    assert "link" in message
    assert not list(into.iterdir())


def test_a_damaged_or_far_too_large_archive_is_refused(phantoms, into, tmp_path, monkeypatch):
    archive = pack(phantoms / XRAYS, tmp_path / "bad.zip")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 255
    archive.write_bytes(content)
    assert "damaged" in refused(into, "--only", "xrays", "--from-archives", archive)
    pack(phantoms / XRAYS, archive)
    monkeypatch.setattr(download, "MAX_UNPACKED", 1000)
    assert "GB unpacked" in refused(into, "--only", "xrays", "--from-archives", archive)
    assert not list(into.iterdir())


def test_what_is_no_collection_is_refused(into, tmp_path):
    assert "no such file" in refused(into, "--from-archives", tmp_path / "gone.zip")
    (tmp_path / "a.txt").write_text("text")
    archive = pack(tmp_path, tmp_path / "other.zip")
    message = refused(into, "--from-archives", archive)
    assert "none of the collections" in message
    assert "https://www.kaggle.com/datasets/iamtapendu" in message


# --- Kaggle ----------------------------------------------------------------------------------


def test_what_is_missing_is_fetched_from_kaggle(phantoms, into, tmp_path, monkeypatch):
    asked = []

    def dataset_download(handle):
        asked.append(handle)
        key = next(k for k, c in download.COLLECTIONS.items() if c.handle == handle)
        return shutil.copytree(phantoms / FOLDERS[key], tmp_path / "cache" / key / "files")

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kagglehub, "dataset_download", dataset_download)
    shutil.copytree(phantoms / CT_SLICES, into / CT_SLICES)
    fetch(into)
    assert asked == [download.COLLECTIONS[key].handle for key in ("ct_volumes", "xrays")]
    for folder in FOLDERS.values():
        assert_same(into / folder, phantoms / folder)


def answer(status):
    return KaggleApiHTTPError(f"{status} error", SimpleNamespace(status_code=status))


@pytest.mark.parametrize(
    ("error", "to_do"),
    [
        (UnauthenticatedError(), "make a token"),
        (answer(403), "accept the terms on kaggle.com/datasets/iamtapendu"),
        (answer(404), "pass where it lies with --from-archives"),
        (answer(500), "run it again"),
        (OSError("no route"), "run it again"),  # as those of requests
        (zipfile.BadZipFile("cut off"), "run it again"),
    ],
)
def test_an_error_of_kaggle_says_what_to_do(into, monkeypatch, error, to_do):
    def fail(_):
        raise error

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(into))
    monkeypatch.setattr(kagglehub, "dataset_download", fail)
    message = refused(into, "--only", "xrays")
    assert "1 problem" in message
    assert str(error) in message
    assert to_do in message
