"""Archives that came from elsewhere: looked through before anything is written, then unpacked.

Zip and tar files (plain, gzip, bzip2 or xz). A member that would be written outside the folder, is
no plain file, stands there twice or cannot be read is refused; so is what unpacks to far more than
the collections hold.
"""

import bz2
import gzip
import lzma
import math
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from chest.errors import InputError, Problem
from chest.progress import progress

MIB = 1 << 20
TAR_OPENERS = {"tar.gz": gzip.open, "tar.bz2": bz2.open, "tar.xz": lzma.open, "tar": open}
KINDS = ("zip", *TAR_OPENERS)
UNSUPPORTED = ("rar", "7z")
FIRST_BYTES = {
    "zip": (b"PK\x03\x04", b"PK\x05\x06"),  # the second: of an empty one
    "rar": b"Rar!\x1a\x07",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "tar.gz": b"\x1f\x8b",
    "tar.bz2": b"BZh",
    "tar.xz": b"\xfd7zXZ\x00",
    "tar": b"",  # any: its first block has a checksum
}
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ENCRYPTED = 0x1  # flag of a zip member
EXTENDED_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
MAX_HEADERS = 64 * 1024  # bytes of a tar member's headers
MAX_PATH = 1024  # bytes of a member's path; the longest of the collections have 200
MAX_PADDING = 16 * MIB  # after a tar's end mark; tar pads to a record, 10 KiB unless told otherwise
MAX_NAME = 255  # bytes of a file's name on the usual file systems


@dataclass(frozen=True)
class Limits:
    """The most that an archive may hold: members, bytes unpacked, bytes unpacked a byte packed."""

    members: int
    unpacked: int
    ratio: float


# All three collections in one archive are 20,000 files and 30 GB, and three times that is allowed.
# CT volumes pack to half of their size, PNG not at all; a bomb packs to a hundredth and less.
LIMITS = Limits(members=60_000, unpacked=90 * 10**9, ratio=20)


class ArchiveError(InputError):
    """An archive that cannot or must not be unpacked; ``problems`` names every member at fault."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: its path there, with ``/``, and its size unpacked, in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Contents:
    """All files of an archive, those at fault too, and what speaks against unpacking it."""

    members: list[Member]
    problems: list[Problem]


@dataclass(frozen=True)
class _Entry:
    """A member as the archive states it; `fault` says what it is if neither file nor folder.

    ``taken``: the bytes that it takes unpacked, in a tar with its headers.
    """

    name: str
    size: int
    taken: int
    folder: bool
    fault: str
    open: Callable[[], IO[bytes]]


def archive_kind(path: Path) -> str | None:
    """One of KINDS or UNSUPPORTED, by what the file begins with, whatever its name; or None."""
    with path.open("rb") as file:
        start = file.read(8)
    for kind, first in FIRST_BYTES.items():
        if start.startswith(first) and (kind not in TAR_OPENERS or _holds_tar(path, kind)):
            return kind
    return None


def read_contents(path: Path, limits: Limits = LIMITS) -> Contents:
    """List the files of an archive of one of KINDS; writes nothing.

    A compressed tar is read to its end, and so checked as a whole; of a zip only the directory is
    read (`find_damage` reads the rest). Reading stops where a limit is passed. Raises ArchiveError
    where the archive is damaged or cut off.
    """
    entries: list[_Entry] = []
    problems: list[Problem] = []
    unpacked = 0
    with _refusing_damage(path):
        excess = _excess(path, _listed(path, limits.members), 0, limits)
        if excess:
            return Contents([], [excess])
        for entry in progress(_entries(path), "members"):
            entries.append(entry)
            unpacked += entry.taken
            excess = _excess(path, len(entries), unpacked, limits)
            if excess:
                problems.append(excess)
                break
    files = [entry for entry in entries if not entry.folder]
    problems += [_problem(path, e.name, fault) for e in entries if (fault := _fault(e))]
    problems += [_problem(path, name, fault) for name, fault in _collisions(files)]
    return Contents([Member(_tidy(entry.name), entry.size) for entry in files], problems)


def find_damage(path: Path, members: list[Member]) -> list[Problem]:
    """Read `members`, all files of an archive, against their checksums; a Problem for each damaged.

    Only of a zip: `read_contents` has read a tar as a whole. Writes nothing.
    """
    if archive_kind(path) != "zip":
        return []
    problems = []
    with _refusing_damage(path):
        for entry in progress(_entries(path), "files checked", len(members)):
            if not entry.folder and (damage := _damage(entry)):
                problems.append(_problem(path, entry.name, damage))
    return problems


def unpack(path: Path, members: list[Member], root: str, folder: Path) -> None:
    """Write `members`, which `read_contents` has listed, to `folder`, without `root` before them.

    Neither owner, permissions nor times are taken over; no file is overwritten; a member at fault
    is never written. Raises ArchiveError where the archive is damaged, OSError where the disk is
    full.
    """
    names = {member.name for member in members}
    folder.mkdir(parents=True, exist_ok=True)
    with _refusing_damage(path):
        for entry in progress(_entries(path), "files unpacked", len(members)):
            name = _tidy(entry.name)
            if entry.folder or _fault(entry) or name not in names:
                continue
            place = folder / name.removeprefix(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            with entry.open() as source, place.open("xb") as target:
                shutil.copyfileobj(source, target, MIB)


# --- What stands in an archive ---------------------------------------------------------------


def _entries(path: Path) -> Iterator[_Entry]:
    return _zip_entries(path) if archive_kind(path) == "zip" else _tar_entries(path)


def _zip_entries(path: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            yield _Entry(
                info.filename, info.file_size, info.file_size, info.is_dir(), _zip_fault(info),
                partial(archive.open, info),
            )  # fmt: skip


def _listed(path: Path, most: int) -> int:
    """How many members a zip's directory lists, counted no further than one beyond `most`.

    zipfile makes objects of all of them at once. What the directory's end states of their number
    need not be so, and of a tar nothing states it: 0.
    """
    if archive_kind(path) != "zip":
        return 0
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # as zipfile itself finds it, so that both read the same
        if not end:
            raise zipfile.BadZipFile("File is not a zip file")
        size, at = end[zipfile._ECD_SIZE], end[zipfile._ECD_LOCATION]
        if end[zipfile._ECD_SIGNATURE] == zipfile.stringEndArchive64:
            at -= zipfile.sizeEndCentDir64 + zipfile.sizeEndCentDir64Locator
        count, stop = 0, at
        file.seek(max(0, stop - size))
        while count <= most and file.tell() < stop:
            entry = file.read(zipfile.sizeCentralDir)
            if len(entry) < zipfile.sizeCentralDir:
                break  # damaged: zipfile says how
            file.seek(sum(struct.unpack("<HHH", entry[28:34])), 1)  # name, extra field, comment
            count += 1
    if count <= most and size > most * MAX_PATH:
        raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
    return count


def _zip_fault(info: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)  # of Unix; 0 where another system packed it
    if info.flag_bits & ENCRYPTED:
        return "encrypted"
    if kind == stat.S_IFLNK:
        return "a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a device or pipe"
    if info.compress_type not in ZIP_METHODS:
        return f"packed by method {info.compress_type}, which cannot be read here"
    return ""


def _tar_entries(path: Path) -> Iterator[_Entry]:
    with (
        TAR_OPENERS[archive_kind(path)](path, "rb") as file,
        tarfile.open(fileobj=(stream := _Stream(file)), mode="r:", tarinfo=_Header) as archive,
    ):
        done = 0
        while info := archive.next():
            if info.size < 0:  # an extended header can say so
                raise tarfile.ReadError(f"{info.name} has a size of {info.size}")
            if len(info.name) > MAX_PATH:
                raise tarfile.ReadError(f"a path of {len(info.name):,} characters")
            # Neither it nor what its headers say is kept, however many there are.
            archive.members, archive.pax_headers, info.pax_headers = [], {}, {}
            stream.left = math.inf
            end = info.offset_data + info.size
            yield _Entry(
                info.name, info.size, end - done, info.isdir(), _tar_fault(info),
                partial(archive.extractfile, info),
            )  # fmt: skip
            done, stream.left = end, MAX_HEADERS
        stream.left = math.inf
        _read_padding(file)


class _Stream:
    """A tar, unpacked, of which tarfile may read ``left`` bytes more.

    It reads a member's headers and map of holes into memory as a whole, however long they are.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, MAX_HEADERS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADERS // 1024} KiB")
        return self.file.read(size)


def _tar_fault(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to {info.linkname}"
    if info.issparse():
        return "a file with holes"
    return "" if info.isreg() or info.isdir() else "a device or pipe"


class _Header(tarfile.TarInfo):
    """A tar header. Where tarfile takes a damaged one for the archive's end, this raises."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # the end mark
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        # tarfile follows a negative size.
        if header.size < 0 or (header.type in EXTENDED_HEADERS and header.size > MAX_HEADERS):
            raise tarfile.ReadError(f"a header with a size of {header.size}")
        return header


def _read_padding(file: IO[bytes]) -> None:
    """Read what follows a tar's end mark: only then the checksum of the compression is compared."""
    count = 0
    while chunk := file.read(MIB):
        count += len(chunk)
        if count > MAX_PADDING:
            raise tarfile.ReadError("more data after its end mark")


def _holds_tar(path: Path, kind: str) -> bool:
    """Whether the file's first block is that of a tar, or is damaged: reading it tells how."""
    try:
        with TAR_OPENERS[kind](path, "rb") as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return True
    return True


# --- What speaks against it ------------------------------------------------------------------


def _excess(path: Path, members: int, unpacked: int, limits: Limits) -> Problem | None:
    """The limit that is passed, if one is."""
    ratio = unpacked / path.stat().st_size
    remedy = "do not unpack it; fetch the collection from where it was published"
    if members > limits.members:
        return Problem(path, f"more than {limits.members:,} members", "a collection", remedy)
    if unpacked > limits.unpacked:
        found = f"more than {limits.unpacked / 1e9:,.3g} GB unpacked"
        return Problem(path, found, "a collection", remedy)
    if ratio > limits.ratio:
        found = f"{ratio:,.0f} times as large unpacked as packed, or more"
        return Problem(path, found, f"at most {limits.ratio:g} times", remedy)
    return None


def _fault(entry: _Entry) -> str:
    """What is wrong with a member by itself, or nothing."""
    name = entry.name
    parts = PurePosixPath(name).parts
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "a path that leaves the folder"
    if "\\" in name:
        return "a path with a backslash"
    if not parts and not entry.folder:
        return "a file without a name"
    if any(len(part.encode("utf-8", "surrogateescape")) > MAX_NAME for part in parts):
        return f"a name of more than {MAX_NAME} bytes"
    return entry.fault


def _damage(entry: _Entry) -> str:
    """What the reader says of a file that differs from its checksum, or nothing."""
    try:
        with entry.open() as file:
            while file.read(MIB):
                pass
    except Exception as error:  # zipfile and the decompressors raise many kinds
        return f"damaged ({error})"
    return ""


def _collisions(files: list[_Entry]) -> Iterator[tuple[str, str]]:
    """Name and fault of each file that would be written over another, or below one.

    Names that differ only in case or Unicode form are one file on some file systems.
    """
    seen: set[str] = set()
    for entry in files:
        key = _key(_tidy(entry.name))
        if key in seen:
            yield entry.name, "a second member of that name"
        seen.add(key)
    for entry in files:
        parents = PurePosixPath(_tidy(entry.name)).parents
        if any(_key(str(parent)) in seen for parent in parents):
            yield entry.name, "a path below a member that is a file"


def _tidy(name: str) -> str:
    """`name` without ``./`` and doubled slashes."""
    return PurePosixPath(name).as_posix()


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _problem(path: Path, member: str, found: str) -> Problem:
    return Problem(
        f"{path}: {member}", found, "a plain, readable file with a path of its own in the folder",
        "fetch the archive again; or unpack it by hand, look at it, and give its folder",
    )  # fmt: skip


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn whatever the readers raise on a damaged archive into an ArchiveError."""
    try:
        yield
    except Exception as error:  # they raise many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the archive
        raise ArchiveError([
            Problem(path, f"damaged or cut off ({error})", "a whole archive", "fetch it again")
        ]) from None  # fmt: skip
