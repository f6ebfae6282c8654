"""The collections are fetched, unpacked and checked; nothing bad gets out of an archive."""

import errno
import gzip
import io
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import kagglehub
import pandas as pd
import pytest
from corpus import thrifty
from kagglehub.exceptions import DataCorruptionError, KaggleApiHTTPError, UnauthenticatedError
from support import BESIDE, ROOT, load_script

from chest import archives
from chest.archives import Limits, find_damage, read_contents
from chest.collections import CT_SLICES, CT_VOLUMES, XRAYS
from chest.errors import run
from chest.params import load_params

download = load_script("tools/download.py")
MUCH = 64 * 2**20  # bytes of memory for the list of what is in an archive
FOLDERS = {"ct_slices": CT_SLICES, "ct_volumes": CT_VOLUMES, "xrays": XRAYS}


@pytest.fixture(scope="session")
def counts(phantoms):
    """How many images of each class the phantoms have, counted without the readers."""
    slices = phantoms / CT_SLICES / "curated_data" / "curated_data"
    studies = phantoms / CT_VOLUMES / "studies"
    sick = pd.read_csv(phantoms / XRAYS / "MetaData.csv")["ptb"]
    return {
        "ct_slices": {
            "covid19": len(list((slices / "2COVID").iterdir())),
            "normal": len(list((slices / "1NonCOVID").iterdir())),
        },
        "ct_volumes": {
            "covid19": len(list(studies.glob("CT-[1-4]/*"))),
            "normal": len(list(studies.glob("CT-0/*"))),
        },
        "xrays": {"tuberculosis": int(sick.sum()), "normal": int((sick == 0).sum())},
    }


@pytest.fixture
def into(tmp_path):
    return tmp_path / "study"


def pack(folder, archive, below=""):
    """An archive of all files of `folder`, of the kind that its suffix names; returns it."""
    archive.parent.mkdir(exist_ok=True)
    files = [(path, below + path.relative_to(folder).as_posix()) for path in tree(folder)]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path, name in files:
                file.write(path, name)
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tar', '')}") as file:
            for path, name in files:
                file.add(path, name)
    return archive


def tree(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in tree(folder)}


def fetch(counts, into, *arguments):
    download.main(["--into", str(into), *map(str, arguments)], counts)


def failure(capsys, counts, into, *arguments):
    """The message of a run that must end with exit code 1."""
    with pytest.raises(SystemExit) as end:
        run(lambda: fetch(counts, into, *arguments))
    assert end.value.code == 1
    return capsys.readouterr().err


# --- What is expected ------------------------------------------------------------------------


def test_the_expected_images_are_those_of_the_study():
    classes = {}
    for expected in download.EXPECTED.values():
        for label, count in expected.items():
            classes[label] = classes.get(label, 0) + count
    assert classes == load_params(ROOT / "params.yaml").study.expected_counts.model_dump()


def test_the_help_shows_how_to_call_it(capsys):
    with pytest.raises(SystemExit) as end:
        download.main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "python tools/download.py --from-archives ~/Downloads" in told
    assert "KAGGLE_API_TOKEN" in told
    packed = sum(collection.packed for collection in download.COLLECTIONS.values())
    unpacked = sum(collection.unpacked for collection in download.COLLECTIONS.values())
    assert f"About {packed} GB are fetched, and become {unpacked} GB" in told


def test_no_stage_needs_kaggle():
    code = "".join(
        path.read_text() for name in ("stages", "chest") for path in (ROOT / name).glob("*.py")
    )
    assert "kagglehub" not in code
    assert "chest.archives" not in "".join(p.read_text() for p in (ROOT / "stages").glob("*.py"))


# --- From archives and folders ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".gz"])
def test_archives_are_known_by_what_lies_in_them(phantoms, counts, into, tmp_path, capsys, suffix):
    for name, key in (("archive", "xrays"), ("archive (1)", "ct_slices"), ("b", "ct_volumes")):
        pack(phantoms / FOLDERS[key], tmp_path / "fetched" / f"{name}{suffix}", "some/where/")
    fetch(counts, into, "--from-archives", tmp_path / "fetched")
    assert contents(into) == {
        name: content
        for name, content in contents(phantoms).items()
        if name.split("/")[0] in FOLDERS.values()
    }
    rows = capsys.readouterr().out.splitlines()[-3:]
    for row, key in zip(rows, FOLDERS, strict=True):
        words = ", ".join(f"{count:,} {label}" for label, count in counts[key].items())
        assert row.startswith(key)
        assert row.count(words) == 2  # found and expected
        assert row.endswith(str(into / FOLDERS[key]))


def test_what_is_complete_is_left_alone(phantoms, counts, into, tmp_path, monkeypatch, capsys):
    archive = pack(phantoms, tmp_path / "all.zip")
    fetch(counts, into, "--from-archives", archive)
    monkeypatch.setattr(download, "unpack", None)
    monkeypatch.setattr(kagglehub, "dataset_download", None)
    fetch(counts, into, "--from-archives", archive)
    fetch(counts, into)
    shutil.rmtree(into / XRAYS)
    fetch(counts, into, "--only", "ct_slices", "ct_volumes")
    assert "xrays" not in capsys.readouterr().out.splitlines()[-1]


def test_folders_that_were_unpacked_by_hand_are_linked(phantoms, counts, into, tmp_path):
    unpacked = tmp_path / "mine" / "deep" / "versions" / "11"
    shutil.copytree(phantoms / CT_SLICES, unpacked)
    shutil.copytree(phantoms / CT_VOLUMES, tmp_path / "mine" / "MosMedData 1.0")
    shutil.copytree(phantoms / XRAYS, tmp_path / "mine" / "x")
    fetch(counts, into, "--from-archives", tmp_path / "mine")
    for folder in FOLDERS.values():
        assert contents(into / folder) == contents(phantoms / folder)
    table = Path("meta_data_covid.csv")
    assert (into / CT_SLICES / table).samefile(unpacked / table)


def test_on_another_disk_they_are_copied(phantoms, counts, into, tmp_path, monkeypatch):
    def refused(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    source = shutil.copytree(phantoms / XRAYS, tmp_path / "x")
    fetch(counts, into, "--from-archives", source, "--only", "xrays")
    assert contents(into / XRAYS) == contents(source)
    assert not (into / XRAYS / "MetaData.csv").samefile(source / "MetaData.csv")


def test_a_collection_that_is_nested_once_is_taken_as_it_is(phantoms, counts, into, tmp_path):
    copy = shutil.copytree(phantoms / XRAYS, tmp_path / "x")
    (copy / "Chest-X-Ray" / "Chest-X-Ray" / "image").rename(copy / "Chest-X-Ray" / "image")
    fetch(counts, into, "--only", "xrays", "--from-archives", pack(copy, tmp_path / "x.zip"))
    assert (into / XRAYS / "Chest-X-Ray" / "image").is_dir()


def test_what_macs_put_into_archives_is_no_second_collection(phantoms, counts, into, tmp_path):
    archive = pack(phantoms / XRAYS, tmp_path / "x.zip", "x/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/x/Chest-X-Ray/Chest-X-Ray/image/._1000.png", "")
    fetch(counts, into, "--only", "xrays", "--from-archives", archive)


def test_two_sources_of_one_collection_are_refused(phantoms, counts, into, tmp_path, capsys):
    archive = pack(phantoms / XRAYS, tmp_path / "mine" / "x.zip")
    shutil.copytree(phantoms / XRAYS, tmp_path / "mine" / "x")
    message = failure(capsys, counts, into, "--from-archives", archive.parent)
    assert f"each holds {XRAYS}" in message
    assert str(archive) in message
    assert not list(into.rglob("*"))


def test_what_is_no_collection_is_passed_over(phantoms, counts, into, tmp_path, capsys):
    mine = pack(phantoms / XRAYS, tmp_path / "mine" / "x.zip").parent
    with zipfile.ZipFile(mine / "other.zip", "w") as file:
        file.writestr("../secret.txt", "x")
    (mine / "volumes.7z").write_bytes(b"7z\xbc\xaf\x27\x1c...")
    (mine / "volumes.rar").write_bytes(b"Rar!\x1a\x07...")
    (mine / "scan.nii.gz").write_bytes((next(phantoms.rglob("*.nii.gz"))).read_bytes())
    (mine / "empty.zip").write_bytes(b"")
    fetch(counts, into, "--only", "xrays", "--from-archives", mine)
    told = capsys.readouterr().out
    assert "volumes.7z (7z is not supported: unpack it by hand, pass the folder)" in told
    assert "volumes.rar (rar is not supported" in told
    message = failure(capsys, counts, into, "--only", "ct_volumes", "--from-archives", mine)
    assert "none of the collections" in message
    assert "https://mosmed.ai/en/datasets/covid19_1110/" in message


# --- What is checked -------------------------------------------------------------------------


def test_what_is_missing_is_said_with_examples(phantoms, counts, tmp_path, capsys):
    study = shutil.copytree(phantoms, tmp_path / "study")
    slices = sorted((study / CT_SLICES / "curated_data" / "curated_data" / "2COVID").iterdir())
    for path in slices[:8]:
        path.unlink()
    (study / CT_VOLUMES / "studies" / "CT-0" / "study_0002.nii.gz").unlink()
    victim = min((study / XRAYS / "Chest-X-Ray" / "Chest-X-Ray" / "image").iterdir())
    victim.write_bytes(b"")
    before = contents(study)
    message = failure(capsys, counts, study, "--check")
    assert f"{counts['ct_slices']['covid19'] - 8} covid19, " in message
    assert f"a row for {slices[0].name}, but no such image" in message
    assert f"and 4 more of {study / CT_SLICES}" in message
    assert "; missing: study_0002\n" in message
    assert "python tools/download.py --only ct_volumes; or fetch it from https://mosmed" in message
    assert f"{victim}\n    found:    an empty file" in message
    assert contents(study) == before


def test_a_folder_that_cannot_be_read_is_said(phantoms, counts, tmp_path, capsys):
    study = shutil.copytree(phantoms, tmp_path / "study")
    (study / XRAYS / "lost.png").symlink_to("nowhere.png")
    message = failure(capsys, counts, study, "--check")
    assert f"{study / XRAYS / 'lost.png'}\n    found:    No such file or directory" in message


def test_check_says_what_is_not_there_and_makes_no_folder(counts, into, capsys):
    message = failure(capsys, counts, into, "--check")
    assert message.count("no such folder") == 3
    assert not into.exists()


def test_an_incomplete_collection_is_replaced_only_when_told(
    phantoms, counts, into, tmp_path, capsys
):
    archive = pack(phantoms / XRAYS, tmp_path / "x.zip")
    (into / XRAYS).mkdir(parents=True)
    (into / XRAYS / "mine.txt").write_text("kept")
    arguments = ("--only", "xrays", "--from-archives", archive)
    assert "or pass --replace" in failure(capsys, counts, into, *arguments)
    assert contents(into) == {f"{XRAYS}/mine.txt": b"kept"}
    fetch(counts, into, *arguments, "--replace")
    assert contents(into / XRAYS) == contents(phantoms / XRAYS)


def test_what_is_there_is_no_source_of_itself(phantoms, counts, into, tmp_path):
    pack(phantoms / XRAYS, tmp_path / "x.zip")
    shutil.copytree(phantoms / XRAYS, into / XRAYS)
    (into / XRAYS / "MetaData.csv").unlink()
    fetch(counts, into, "--only", "xrays", "--from-archives", tmp_path, "--replace")
    assert contents(into / XRAYS) == contents(phantoms / XRAYS)


def test_what_a_link_points_to_is_never_replaced(phantoms, counts, into, tmp_path, capsys):
    archive = pack(phantoms / XRAYS, tmp_path / "x.zip")
    into.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("kept")
    (into / XRAYS).symlink_to(tmp_path / "elsewhere")
    arguments = ("--only", "xrays", "--from-archives", archive, "--replace")
    assert "move it elsewhere\n" in failure(capsys, counts, into, *arguments)
    assert contents(tmp_path / "elsewhere") == {"mine.txt": b"kept"}


# --- What is refused -------------------------------------------------------------------------

Bad = namedtuple("Bad", "name told mode", defaults=(stat.S_IFREG,))

BAD_NAMES = (
    Bad("../outside.png", "a path that leaves the folder"),
    Bad("a/../../outside.png", "a path that leaves the folder"),
    Bad("/outside.png", "an absolute path"),
    Bad("C:/outside.png", "an absolute path"),
    Bad("..\\outside.png", "a path that leaves the folder"),
    Bad("a\\b.png", "a path with a backslash"),
    Bad("x" * 256, "a name of more than 255 bytes"),
    Bad("METADATA.csv", "a second member of that name"),
    Bad("MetaData.csv", "a second member of that name"),
    Bad("./MetaData.csv", "a second member of that name"),
    Bad("MetaData.csv/below.png", "a path below a member that is a file"),
)


def write_bad_zip(archive):
    bad = (
        *BAD_NAMES,
        Bad("link", "a link", stat.S_IFLNK),
        Bad("device", "a device or pipe", stat.S_IFCHR),
        Bad("pipe", "a device or pipe", stat.S_IFIFO),
    )
    with warnings.catch_warnings(), zipfile.ZipFile(archive, "a") as file:
        warnings.simplefilter("ignore", UserWarning)  # of doubled names
        for member in bad:
            info = zipfile.ZipInfo(member.name)
            info.external_attr = (member.mode | 0o644) << 16
            file.writestr(info, "x")
    return bad


def write_bad_tar(archive):
    bad = (
        *BAD_NAMES,
        Bad("symbolic", "a link to /etc/passwd", tarfile.SYMTYPE),
        Bad("hard", "a link to /etc/passwd", tarfile.LNKTYPE),
        Bad("device", "a device or pipe", tarfile.CHRTYPE),
        Bad("pipe", "a device or pipe", tarfile.FIFOTYPE),
    )
    with tarfile.open(archive, "a") as file:
        for member in bad:
            info = tarfile.TarInfo(member.name)
            if isinstance(member.mode, bytes):
                info.type, info.linkname = member.mode, "/etc/passwd"
            file.addfile(info, io.BytesIO())
    return bad


@pytest.mark.parametrize(("name", "spoil"), [("x.zip", write_bad_zip), ("x.tar", write_bad_tar)])
def test_every_bad_member_is_named_and_nothing_is_written(
    phantoms, counts, tmp_path, capsys, name, spoil
):
    archive = pack(phantoms / XRAYS, tmp_path / "deep" / name)
    bad = spoil(archive)
    into = tmp_path / "deep" / "study"
    before = tree(tmp_path)
    message = failure(capsys, counts, into, "--only", "xrays", "--from-archives", archive)
    for member in bad:
        assert (
            f"{archive}: {member.name}\n    found:    {member.told}".replace("\\", "\\") in message
        )
    assert message.startswith(f"ERROR: {len(bad)} problems")
    assert tree(tmp_path) == before


def set_flag(archive, offset, value):
    """Change two bytes of the first entry in a zip's directory."""
    content = bytearray(archive.read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + offset : start + offset + 2] = value.to_bytes(2, "little")
    archive.write_bytes(content)


def flip(archive, at):
    content = bytearray(archive.read_bytes())
    content[at] ^= 0xFF
    archive.write_bytes(content)


def cut(archive, size):
    archive.write_bytes(archive.read_bytes()[:size])


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("x.zip", lambda a: set_flag(a, 8, 0x1), "encrypted"),
        ("x.zip", lambda a: set_flag(a, 10, 9), "packed by method 9, which cannot be read here"),
        ("x.zip", lambda a: flip(a, 2000), "damaged (Bad CRC-32"),
        ("x.zip", lambda a: cut(a, 2000), "damaged or cut off (File is not a zip file)"),
        ("x.tar", lambda a: cut(a, -20_000), "damaged or cut off (unexpected end of data)"),
        # Where tarfile by itself sees a regular end: between two members, or at a damaged header.
        ("x.tar", lambda a: cut(a, end_of_first_member(a)), "damaged or cut off (empty header)"),
        ("x.tar", lambda a: flip(a, end_of_first_member(a)), "damaged or cut off (bad checksum)"),
        ("x.gz", lambda a: cut(a, -20_000), "damaged or cut off (Compressed file ended"),
        ("x.gz", lambda a: cut(a, -4), "damaged or cut off (Compressed file ended"),
        ("x.gz", lambda a: flip(a, -6), "damaged or cut off (CRC check failed"),
        ("x.xz", lambda a: flip(a, -40), "damaged or cut off ("),
        ("x.bz2", lambda a: cut(a, -40), "damaged or cut off ("),
        ("x.gz", lambda a: cut(a, 20), "damaged or cut off ("),
    ],
)  # fmt: skip
def test_a_damaged_archive_is_refused(phantoms, counts, into, tmp_path, capsys, name, damage, told):
    archive = pack(phantoms / XRAYS, tmp_path / name)
    damage(archive)
    message = failure(capsys, counts, into, "--only", "xrays", "--from-archives", archive)
    assert told in message
    assert str(archive) in message
    assert not list(into.rglob("*"))


def end_of_first_member(archive):
    with tarfile.open(archive) as file:
        return file.getmembers()[1].offset


def test_every_damaged_file_of_a_zip_is_named(phantoms, tmp_path):
    archive = pack(phantoms / XRAYS, tmp_path / "x.zip")
    with zipfile.ZipFile(archive) as file:
        spoilt = file.infolist()[2:5]
    for info in spoilt:
        flip(archive, info.header_offset + 30 + len(info.filename) + info.file_size // 2)
    found = read_contents(archive)
    assert found.problems == []
    damaged = [problem.file for problem in find_damage(archive, found.members)]
    assert damaged == [f"{archive}: {info.filename}" for info in spoilt]


@pytest.mark.parametrize("name", ["x.zip", "x.gz", "x.xz"])
def test_a_bomb_is_refused_unread(phantoms, counts, into, tmp_path, capsys, monkeypatch, name):
    bomb = shutil.copytree(phantoms / XRAYS, tmp_path / "bomb")
    image = min((bomb / "Chest-X-Ray" / "Chest-X-Ray" / "image").iterdir())
    os.truncate(image, 60_000_000)
    archive = tmp_path / name
    if name == "x.zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(image, image.relative_to(bomb))
    else:
        with tarfile.open(archive, f"w:{name[2:]}") as file:
            file.add(image, image.relative_to(bomb))
            file.add(bomb / "MetaData.csv", "MetaData.csv")
    monkeypatch.setattr(download, "find_damage", None)
    message = failure(capsys, counts, into, "--only", "xrays", "--from-archives", archive)
    assert "times as large unpacked as packed" in message
    assert len(read_contents(archive).members) == 1  # the second was not looked for
    assert not list(into.rglob("*"))


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (Limits(members=5, unpacked=10**9, ratio=20), "more than 5 members"),
        (Limits(members=10**6, unpacked=100_000, ratio=20), "more than 0.0001 GB unpacked"),
        (Limits(members=10**6, unpacked=10**9, ratio=0.1), "0 times as large unpacked"),
    ],
)
@pytest.mark.parametrize("name", ["x.zip", "x.gz"])
def test_an_archive_has_limits(phantoms, tmp_path, name, limits, told):
    archive = pack(phantoms / XRAYS, tmp_path / name)
    found = read_contents(archive, limits)
    assert told in found.problems[0].found
    assert len(found.members) < len(tree(phantoms / XRAYS))
    assert read_contents(archive).problems == []


def test_a_tar_header_does_not_fill_the_memory(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 10**9
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(10240))
    with pytest.raises(archives.ArchiveError, match="a header with a size of 1000000000"):
        read_contents(tmp_path / "x.tar")


def headed(count, **headers):
    """The blocks of `count` empty members of a tar, each behind the same extended header."""
    info = tarfile.TarInfo("x")
    info.pax_headers = headers
    return info.tobuf(tarfile.PAX_FORMAT) * count


def test_headers_count_as_unpacked(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(headed(300, comment="a" * 60_000)))
    with thrifty(MUCH):
        found = read_contents(tmp_path / "x.gz")
    assert "times as large unpacked as packed" in found.problems[0].found
    assert len(found.members) < 300


def test_headers_of_many_members_do_not_fill_the_memory(tmp_path):
    (tmp_path / "x.tar").write_bytes(headed(2000, comment="a" * 60_000) + bytes(10240))
    with thrifty(MUCH):
        assert len(read_contents(tmp_path / "x.tar").members) == 2000


@pytest.mark.parametrize(
    "content",
    [
        headed(1, comment="a" * 2**16),
        headed(1, path="a/" * 600),
        # A map of holes that goes on and on.
        headed(1, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"})
        + b"99999999\n" + b"0\n" * 10**7,
    ],
)  # fmt: skip
def test_a_tar_member_has_small_headers(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(gzip.compress(content + bytes(-len(content) % 512 + 10240)))
    with (
        thrifty(MUCH),
        pytest.raises(archives.ArchiveError, match=r"a header|headers|a path"),
    ):
        read_contents(tmp_path / "x.gz")


@pytest.mark.parametrize("zip64", [False, True])
def test_a_zip_of_too_many_members_is_refused_before_they_are_listed(tmp_path, zip64):
    entry = struct.pack("<4s24xHHH12x", b"PK\1\2", 2, 0, 0) + b"a/"
    directory = entry * 200_000
    size, start = len(directory), 4
    content = b"PK\3\4" + directory
    if zip64:
        content += struct.pack("<4sQ28xQQ", b"PK\6\6", 44, size, start)
        content += struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
        size = start = 0xFFFFFFFF
    content += struct.pack("<4s8xLLH", b"PK\5\6", size, start, 0)
    (tmp_path / "x.zip").write_bytes(content)
    with thrifty(MUCH):
        found = read_contents(tmp_path / "x.zip")
    assert [problem.found for problem in found.problems] == ["more than 60,000 members"]


def test_a_zip_of_long_names_is_refused_before_they_are_listed(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for number in range(100):
            file.writestr(f"{number}/" + "a" * 60_000, "")
    limits = Limits(members=100, unpacked=10**9, ratio=20)
    with pytest.raises(archives.ArchiveError, match="a directory of"):
        read_contents(tmp_path / "x.zip", limits)


def test_a_tar_header_does_not_lead_backwards(tmp_path):
    info = tarfile.TarInfo("x")
    info.pax_headers = {"size": "-1024"}
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    with pytest.raises(archives.ArchiveError, match="x has a size of -1024"):
        read_contents(tmp_path / "x.tar")


def test_a_file_with_holes_is_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert [p.found for p in read_contents(tmp_path / "x.tar").problems] == ["a file with holes"]


def test_a_link_in_a_folder_is_refused(phantoms, counts, into, tmp_path, capsys):
    mine = shutil.copytree(phantoms / XRAYS, tmp_path / "x")
    (mine / "table.csv").symlink_to("/etc/passwd")
    message = failure(capsys, counts, into, "--only", "xrays", "--from-archives", mine)
    assert f"{mine / 'table.csv'}\n    found:    a link" in message
    assert not list(into.rglob("*"))


def test_an_archive_that_is_not_there_is_said(counts, into, capsys):
    assert "No such file" in failure(capsys, counts, into, "--from-archives", "nowhere.zip")


@pytest.mark.skipif(not (BESIDE / "metadata").is_dir(), reason=f"no published tables in {BESIDE}")
def test_no_published_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for csv, folder in (
            ("meta_data_covid.csv", "2COVID"),
            ("meta_data_normal.csv", "1NonCOVID"),
        ):
            table = pd.read_csv(BESIDE / "metadata" / csv, encoding="iso-8859-1", dtype=str)
            for name in table["File name"]:
                file.writestr(f"curated_data/curated_data/{folder}/{name.strip()}", "")
    found = read_contents(tmp_path / "x.zip")
    assert found.problems == []
    assert len(found.members) == sum(download.EXPECTED["ct_slices"].values())
    names = [member.name for member in found.members]
    assert all(download.COLLECTIONS["ct_slices"].image.fullmatch(name)[1] == "" for name in names)


# --- Interrupted, and no room ----------------------------------------------------------------

KILLED_AT_THE_TENTH_FILE = """
import os, shutil, signal, sys
sys.path[:0] = {path!r}
import download
from chest import archives

def copy(*arguments, count=[0], copy=shutil.copyfileobj):
    count[0] += 1
    if count[0] == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    copy(*arguments)

archives.shutil.copyfileobj = copy
download.main({arguments!r}, {counts!r})
"""


def test_after_a_kill_nothing_half_is_taken_for_whole(phantoms, counts, into, tmp_path):
    archive = pack(phantoms / XRAYS, tmp_path / "x.zip")
    arguments = ["--only", "xrays", "--into", str(into), "--from-archives", str(archive)]
    code = KILLED_AT_THE_TENTH_FILE.format(
        path=[str(ROOT / "tools"), str(ROOT)], arguments=arguments, counts=counts
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(tree(into)) == 10  # what it left behind, under another name
    assert not (into / XRAYS).exists()
    download.main(arguments, counts)
    assert contents(into / XRAYS) == contents(phantoms / XRAYS)
    assert os.listdir(into) == [XRAYS]


def test_room_is_looked_for_before_anything_is_written(
    phantoms, counts, into, tmp_path, capsys, monkeypatch
):
    archive = pack(phantoms / XRAYS, tmp_path / "x.zip")
    size = sum(path.stat().st_size for path in tree(phantoms / XRAYS))
    (into / f".{XRAYS}.partial").mkdir(parents=True)  # left by a run that was killed
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    arguments = ("--only", "xrays", "--from-archives", archive)
    assert "make room" in failure(capsys, counts, into, *arguments)
    assert not list(into.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size))
    fetch(counts, into, *arguments)


def test_a_full_disk_leaves_nothing_half_written(
    phantoms, counts, into, tmp_path, capsys, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = pack(phantoms / XRAYS, tmp_path / "x.zip")
    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    message = failure(capsys, counts, into, "--only", "xrays", "--from-archives", archive)
    assert "No space left on device" in message
    assert not list(into.rglob("*"))


# --- From Kaggle -----------------------------------------------------------------------------


@pytest.fixture
def kaggle(phantoms, monkeypatch):
    """A stand-in for kagglehub: as it does, it unpacks into its cache; `errors` are raised."""
    folders = {c.handle: FOLDERS[key] for key, c in download.COLLECTIONS.items()}
    stand_in = SimpleNamespace(asked=[], errors={})

    def dataset_download(handle):
        stand_in.asked.append(handle)
        version = Path(os.environ["KAGGLEHUB_CACHE"]) / "datasets" / handle / "versions" / "1"
        below = version / "MosMedData 1.0" if folders[handle] == CT_VOLUMES else version
        below.parent.mkdir(parents=True, exist_ok=True)
        if handle in stand_in.errors:
            (below.parent / "1.archive").write_bytes(b"half")
            raise stand_in.errors[handle]
        shutil.copytree(phantoms / folders[handle], below)
        return str(version)

    monkeypatch.setattr(kagglehub, "dataset_download", dataset_download)
    monkeypatch.delenv("KAGGLEHUB_CACHE", raising=False)
    return stand_in


def test_what_is_missing_is_fetched_from_kaggle(phantoms, counts, into, kaggle):
    shutil.copytree(phantoms / CT_SLICES, into / CT_SLICES)
    fetch(counts, into)
    assert kaggle.asked == [
        "mathurinache/mosmeddata-chest-ct-scans-with-covid19",
        "iamtapendu/chest-x-ray-lungs-segmentation",
    ]
    for folder in FOLDERS.values():
        assert contents(into / folder) == contents(phantoms / folder)
    assert sorted(os.listdir(into)) == sorted(FOLDERS.values())  # no cache is left
    assert "KAGGLEHUB_CACHE" not in os.environ


def test_a_cache_of_ones_own_is_used_and_kept(
    phantoms, counts, into, kaggle, tmp_path, monkeypatch
):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    fetch(counts, into, "--only", "xrays")
    assert contents(into / XRAYS) == contents(phantoms / XRAYS)
    assert len(tree(tmp_path / "cache")) == len(tree(phantoms / XRAYS))


def answer(status):
    return KaggleApiHTTPError(f"{status} error", response=SimpleNamespace(status_code=status))


@pytest.mark.parametrize(
    ("error", "found", "to_do", "keeps"),
    [
        (answer(401), "no valid credentials", "kaggle.com/settings/api", True),
        (UnauthenticatedError(), "no valid credentials", "KAGGLE_API_TOKEN", True),
        (ValueError("Invalid Kaggle credentials file at x"), "x", "~/.kaggle/access_token", True),
        (answer(403), "refuses access (403)", "accept its terms", True),
        (answer(404), "no such data set", "--from-archives", True),
        (answer(503), "answers with 503", "try later", True),
        (OSError("name resolution failed"), "no connection", "goes on where it stopped", True),
        (ConnectionResetError(104, "reset"), "no connection", "goes on where it stopped", True),
        (DataCorruptionError("md5"), "a damaged download", "it is fetched anew", True),
        (zipfile.BadZipFile("bad"), "a damaged download", "it is fetched anew", False),
        (RuntimeError("odd"), "RuntimeError: odd", "--from-archives", True),
    ],
)
def test_why_kaggle_fails_is_said(counts, into, kaggle, capsys, error, found, to_do, keeps):
    handle = download.COLLECTIONS["xrays"].handle
    kaggle.errors[handle] = error
    message = failure(capsys, counts, into)
    assert message.startswith(f"ERROR: 1 problem with the input:\n  kaggle.com/datasets/{handle}")
    assert found in message.split("expected:")[0]
    assert to_do in message.split("to do:")[1]
    assert {CT_SLICES, CT_VOLUMES} <= set(os.listdir(into))  # the others were fetched
    assert not (into / XRAYS).exists()
    assert bool(list(into.rglob("*.archive"))) == keeps


def test_a_full_disk_during_the_download_is_said(counts, into, kaggle, capsys):
    kaggle.errors[download.COLLECTIONS["xrays"].handle] = OSError(errno.ENOSPC, "No space left")
    message = failure(capsys, counts, into, "--only", "xrays")
    assert "the disk\n    found:    No space left" in message


def test_room_for_archive_and_files_is_looked_for(counts, into, kaggle, capsys, monkeypatch):
    collection = download.COLLECTIONS["ct_volumes"]
    needed = (collection.packed + collection.unpacked) * 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 10))
    assert "make room" in failure(capsys, counts, into, "--only", "ct_volumes")
    assert kaggle.asked == []
    # What an interrupted run has fetched need not be fetched again.
    into.joinpath(".ct_volumes.download").mkdir(parents=True)
    into.joinpath(".ct_volumes.download", "1.archive").write_bytes(bytes(10))
    fetch(counts, into, "--only", "ct_volumes")


def test_what_is_no_collection_on_kaggle_is_refused(counts, into, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: str(tmp_path))
    message = failure(capsys, counts, into, "--only", "ct_volumes")
    assert f"0 folders in the layout of {CT_VOLUMES}" in message
    assert "https://mosmed.ai" in message
