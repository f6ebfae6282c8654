"""Bring the three collections of the study into data/raw/study, in their published layout.

Writes  data/raw/study/large-covid19-ct-slice-dataset    CT slices, from Kaggle
        data/raw/study/COVID19_1110                      CT volumes, from a copy on Kaggle
        data/raw/study/chest-x-ray-lungs-segmentation    X-rays, from Kaggle

    python tools/download.py                               # fetch what is not there yet
    python tools/download.py --from-archives ~/Downloads   # take what was fetched by hand
    python tools/download.py --check                       # only say what is there

About 18 GB are fetched, and become 31 GB. What is there and complete stays; a download that was
interrupted goes on where it stopped, an unpacking begins anew. Each collection has terms of its
own: read them before you use it.
"""

import argparse
import os
import re
import shutil
import tarfile
import textwrap
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chest import commands
from chest.archives import (
    KINDS,
    UNSUPPORTED,
    ArchiveError,
    Member,
    archive_kind,
    find_damage,
    read_contents,
    unpack,
)
from chest.collections import (
    CT_SLICES,
    CT_VOLUMES,
    LITTER,
    SLICE_CLASSES,
    VOLUME_LABELS,
    XRAYS,
    Item,
    read_ct_slices,
    read_ct_volumes,
    read_xrays,
)
from chest.errors import ChestError, InputError, Problem, refuse, run
from chest.files import remove, replacing
from chest.progress import progress

say = partial(print, flush=True)  # at once, in a log too

STUDY = Path("data/raw/study")
EXAMPLES = 5  # problems of a collection that are shown

# Images of each class as published (data/raw/README.md), by the manifest's name of the collection.
EXPECTED = {
    "ct_slices": {"covid19": 7593, "normal": 6893},
    "ct_volumes": {"covid19": 856, "normal": 254},
    "xrays": {"tuberculosis": 345, "normal": 359},
}

# What an archive raises that was not fetched as it should be.
DAMAGES = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)

TOKEN = (
    "sign in at kaggle.com, make a token at kaggle.com/settings/api (Generate New Token), and put "
    "it into ~/.kaggle/access_token or the environment variable KAGGLE_API_TOKEN"
)


@dataclass(frozen=True)
class Published:
    """A collection as it was published.

    ``image`` matches the path of an image or volume; its first group is the collection's folder.
    ``packed`` and ``unpacked`` are the sizes of Kaggle's archive and of its files in GB, roughly.
    ``origin`` is where it was published, if not on Kaggle; ``note`` says what Kaggle holds then.
    """

    key: str  # in the manifest's column `collection`
    folder: str
    handle: str  # on Kaggle
    read: Callable[..., list[Item]]  # of the folder and the list of problems
    image: re.Pattern[str]
    packed: int
    unpacked: int
    origin: str = ""
    note: str = ""

    @property
    def page(self) -> str:
        return self.origin or f"https://www.kaggle.com/datasets/{self.handle}"


def image_pattern(below: str) -> re.Pattern[str]:
    return re.compile(rf"(|.*?/){below}")


SLICE_FOLDERS = "|".join(folder for folder, *_ in SLICE_CLASSES)
VOLUME_FOLDERS = "|".join(VOLUME_LABELS)

COLLECTIONS = {
    collection.key: collection
    for collection in (
        Published(
            "ct_slices",
            CT_SLICES,
            "maedemaftouni/large-covid19-ct-slice-dataset",
            read_ct_slices,
            image_pattern(rf"curated_data/(?:curated_data/)?(?:{SLICE_FOLDERS})/[^/]+"),
            packed=2,
            unpacked=2,
        ),
        # mosmed.ai sends a 7z file to those who leave an e-mail address. The copy on Kaggle holds
        # the same 1,110 volumes in the same folders, not compressed.
        Published(
            "ct_volumes",
            CT_VOLUMES,
            "mathurinache/mosmeddata-chest-ct-scans-with-covid19",
            read_ct_volumes,
            image_pattern(rf"studies/(?:{VOLUME_FOLDERS})/study_\d{{4}}\.nii(?:\.gz)?"),
            packed=12,
            unpacked=25,
            origin="https://mosmed.ai/en/datasets/covid19_1110/",
            note="a third party's copy, under the licence of the volumes, CC BY-NC-ND 3.0",
        ),
        Published(
            "xrays",
            XRAYS,
            "iamtapendu/chest-x-ray-lungs-segmentation",
            partial(read_xrays, labelling="ptb"),
            image_pattern(r"Chest-X-Ray/(?:Chest-X-Ray/)?image/[^/]+"),
            packed=4,
            unpacked=4,
        ),
    )
}


@dataclass(frozen=True)
class Finding:
    """What lies in a collection's folder: images of each class, bytes, and all that is wrong."""

    folder: Path
    counts: Counter[str]
    size: int
    problems: list[Problem]


@dataclass(frozen=True)
class Source:
    """Where a collection can be taken from: the folder `path`, or `members` of the archive `path`.

    ``root`` is what stands before the collection's own paths in the archive.
    """

    collection: Published
    path: Path
    root: str = ""
    members: tuple[Member, ...] = ()

    def size(self, into: Path) -> int:
        """Bytes that it will take in `into`; files of a folder on the same disk are linked."""
        if self.path.is_file():
            return sum(member.size for member in self.members)
        same_disk = self.path.stat().st_dev == into.stat().st_dev
        return 0 if same_disk else sum(path.stat().st_size for path in files_below(self.path))


@contextmanager
def telling_of_the_disk() -> Iterator[None]:
    """Turn an error of the disk into an InputError."""
    try:
        yield
    except OSError as error:
        remedy = "see that it can be read and written, that there is room, or pass another --into"
        found = error.strerror or str(error)
        refuse([Problem(error.filename or "the disk", found, "to read and write it", remedy)])


@telling_of_the_disk()
def main(arguments: list[str] | None = None, expected: dict[str, dict] = EXPECTED) -> None:
    options = read_options(arguments)
    chosen = [COLLECTIONS[key] for key in options.only]

    # 1. What is there already.
    findings = {c.key: examine(c, options.into / c.folder, expected[c.key]) for c in chosen}
    lacking = [c for c in chosen if findings[c.key].problems]

    # 2. Fetch or unpack the rest.
    failures: dict[str, Problem] = {}
    if lacking and not options.check:
        refuse(in_the_way(lacking, options.into, options.replace))
        for c in lacking:  # what a run that was killed has left would count as room taken
            remove(options.into / f".{c.folder}.partial")
        if options.from_archives:
            take_archives(options.from_archives, lacking, options.into)
        else:
            failures = fetch_all(lacking, options.into)
        for c in lacking:
            findings[c.key] = examine(c, options.into / c.folder, expected[c.key])
            if not findings[c.key].problems:
                remove(download_folder(c, options.into))

    # 3. What is there now, and what is wrong with it.
    say(table(findings, expected))
    report(findings, failures)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    token = textwrap.fill(
        f"Kaggle gives public data to everybody; where it asks for more, {TOKEN}.", 100
    )
    parser = commands.parser(f"{__doc__}\n{token}")
    parser.add_argument(
        "--from-archives", type=Path, metavar="PATH",
        help=f"fetch nothing: take the collections from PATH, an archive ({', '.join(KINDS)}), an "
        "unpacked folder, or a folder that holds such; their names do not matter, and unpacked "
        "files on the same disk are hard-linked, not copied",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=COLLECTIONS, default=list(COLLECTIONS), metavar="NAME",
        help=f"only these collections: {', '.join(COLLECTIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--into", type=Path, default=STUDY, metavar="FOLDER", help="instead of data/raw/study"
    )
    parser.add_argument("--check", action="store_true", help="write nothing: say what is there")
    parser.add_argument(
        "--replace", action="store_true", help="replace a collection that is there, but incomplete"
    )
    return parser.parse_args(arguments)


# --- What is there ---------------------------------------------------------------------------


def examine(collection: Published, folder: Path, expected: dict[str, int]) -> Finding:
    """Read the collection in `folder` as the stages do, and compare it with the `expected` counts.

    `expected` gives the number of images of each class.
    """
    if not folder.is_dir():
        found = "no such folder" if not os.path.lexists(folder) else "no folder"
        return Finding(folder, Counter(), 0, [_incomplete(collection, folder, found, expected)])
    problems: list[Problem] = []
    items = collection.read(folder, problems=problems)
    files = [(path, path.stat().st_size) for path in files_below(folder)]
    problems += [
        Problem(path, "an empty file", "an image or a table", "fetch it again")
        for path, size in files
        if size == 0
    ]
    counts = Counter(item.label for item in items)
    if counts != expected:
        found = in_words(counts, expected) + missing_studies(items, sum(expected.values()))
        problems.insert(0, _incomplete(collection, folder, found, expected))
    return Finding(folder, counts, sum(size for _, size in files), problems)


def missing_studies(items: list[Item], total: int) -> str:
    """Examples of missing volumes: MosMed numbers its studies from 1 to `total`.

    Of the other collections, the tables name each image, so the readers name the missing ones.
    """
    there = {item.study for item in items if item.collection == "ct_volumes"}
    names = [name for i in range(1, total + 1) if (name := f"study_{i:04}") not in there]
    return f"; missing: {some(names)}" if there and names else ""


def some(names: list[str]) -> str:
    more = len(names) - EXAMPLES
    return ", ".join(names[:EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")


def _incomplete(collection: Published, folder: Path, found: str, expected: dict) -> Problem:
    remedy = f"python tools/download.py --only {collection.key}; or {by_hand(collection)}"
    return Problem(folder, found, in_words(expected, expected), remedy)


def in_words(counts: dict[str, int], expected: dict[str, int]) -> str:
    """``7,593 covid19, 6,893 normal``"""
    return ", ".join(f"{counts.get(label, 0):,} {label}" for label in expected)


def in_gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def table(findings: dict[str, Finding], expected: dict[str, dict[str, int]]) -> str:
    """A row a collection: what was found, what was expected, size, folder."""
    rows = [("collection", "found", "expected", "size", "where")]
    for key, finding in findings.items():
        found, due = in_words(finding.counts, expected[key]), in_words(expected[key], expected[key])
        rows.append((key, found, due, in_gb(finding.size), str(finding.folder)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def report(findings: dict[str, Finding], failures: dict[str, Problem]) -> None:
    """Raise InputError where a collection is incomplete: the first problems of each."""
    problems, details = [], []
    for key, finding in findings.items():
        own = [failures[key]] if key in failures else finding.problems
        problems += own[:EXAMPLES]
        if len(own) > EXAMPLES:
            details.append(f"and {len(own) - EXAMPLES:,} more of {finding.folder}")
    if problems:
        raise InputError(problems, "\n".join(details))


def files_below(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """Every file in `folder` and its folders, sorted; links to folders are not followed.

    What lies in the folder `without`, an absolute path, is left out.
    """
    for parent, folders, names in os.walk(folder):
        if without and Path(parent).resolve() == without:
            folders.clear()
            continue
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def in_the_way(lacking: list[Published], into: Path, replace: bool) -> list[Problem]:
    """A Problem for each incomplete collection that is there and would be overwritten."""
    problems = []
    for collection in lacking:
        folder = into / collection.folder
        plain = folder.is_dir() and not folder.is_symlink()
        if not os.path.lexists(folder) or (plain and (replace or not any(folder.iterdir()))):
            continue
        remedy = "complete it by hand, or move it elsewhere"
        problems.append(
            Problem(folder, "there, but incomplete (--check says what is wrong)",
                    "a complete collection, or none",
                    f"{remedy}, or pass --replace" if plain else remedy)
        )  # fmt: skip
    return problems


# --- From archives and folders ---------------------------------------------------------------


def take_archives(path: Path, lacking: list[Published], into: Path) -> None:
    """Unpack or copy what `path` holds of the collections `lacking`.

    Raises InputError, before anything is written, with all that speaks against it.
    """
    sources = find_sources(path, lacking, into)
    into.mkdir(parents=True, exist_ok=True)
    check_space(into, sum(source.size(into) for source in sources))
    for source in sources:
        say(f"{source.collection.folder}: from {source.path}")
        with replacing(into / source.collection.folder) as folder:
            if source.path.is_file():
                unpack(source.path, list(source.members), source.root, folder)
            else:
                copy_files(source.path, folder)


def find_sources(path: Path, lacking: list[Published], into: Path) -> list[Source]:
    """One source of each collection that `path` holds, known by what lies in it."""
    problems: list[Problem] = []
    if path.is_dir():
        sources = folder_sources(path, lacking, into, problems)
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
    else:
        sources, files = [], [path]
    for file in files:
        sources += archive_sources(file, lacking, problems)
    for collection in lacking:
        places = [str(s.path / s.root) for s in sources if s.collection is collection]
        if len(places) > 1:
            problems.append(
                Problem(" and ".join(places), f"each holds {collection.folder}", "one of them",
                        "move the others elsewhere, or pass the one to take")
            )  # fmt: skip
    if not sources and not problems:
        remedy = "; ".join(f"fetch {c.folder} from {c.page}" for c in lacking)
        problems = [Problem(path, "none of the collections", "an archive or folder of one", remedy)]
    refuse(problems)
    return sources


def archive_sources(path: Path, lacking: list[Published], problems: list[Problem]) -> list[Source]:
    """The collections in the file `path`, if it is an archive; a bad one is added to `problems`."""
    kind = archive_kind(path)
    if kind in UNSUPPORTED:
        say(f"Passed over: {path} ({kind} is not supported: unpack it by hand, pass the folder)")
    if kind not in KINDS:
        return []
    say(f"Looking through {path}")
    try:
        contents = read_contents(path)
    except ArchiveError as error:
        problems += error.problems
        return []
    found = find_roots((member.name for member in contents.members), lacking)
    if found:  # what is wrong with other archives does not matter
        problems += contents.problems or find_damage(path, contents.members)
    return [
        Source(c, path, root, tuple(m for m in contents.members if m.name.startswith(root)))
        for c, root in found
    ]


def folder_sources(
    path: Path, lacking: list[Published], into: Path, problems: list[Problem]
) -> list[Source]:
    """The collections that lie unpacked somewhere below `path`, but not in `into`."""
    names = (file.relative_to(path).as_posix() for file in files_below(path, into.resolve()))
    sources = [Source(c, path / root) for c, root in find_roots(names, lacking)]
    problems += [
        Problem(entry, "a link", "the file or folder itself", "put it there, or remove the link")
        for source in sources
        for entry in source.path.rglob("*")
        if entry.is_symlink()
    ]
    return sources


def find_roots(names: Iterable[str], lacking: list[Published]) -> list[tuple[Published, str]]:
    """The collections whose images are among the paths `names`, each with the path before theirs.

    The path ends with ``/``, or is empty where the collection has no folder of its own.
    """
    found = {
        (collection.key, match[1])
        for name in names
        if not any(part.startswith("._") or part.lower() in LITTER for part in name.split("/"))
        for collection in lacking
        if (match := collection.image.fullmatch(name))
    }
    return [(COLLECTIONS[key], root) for key, root in sorted(found)]


def copy_files(source: Path, target: Path) -> None:
    """Copy the folder `source`; on the same disk as hard links, which take no place."""
    for file in progress(files_below(source), "files"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(file, place)


# --- From Kaggle -----------------------------------------------------------------------------


class DownloadError(ChestError):
    """A collection that cannot be fetched from Kaggle; ``problem`` says why."""

    def __init__(self, problem: Problem):
        self.problem = problem
        super().__init__(str(problem))


def fetch_all(lacking: list[Published], into: Path) -> dict[str, Problem]:
    """Fetch the collections one after the other; returns why those that failed did."""
    into.mkdir(parents=True, exist_ok=True)
    # An archive and what is unpacked of it lie side by side for a while.
    needed = 10**9 * (sum(c.unpacked for c in lacking) + max(c.packed for c in lacking))
    downloads = [download_folder(collection, into) for collection in lacking]
    kept = sum(file.stat().st_size for folder in downloads for file in files_below(folder))
    check_space(into, max(needed - kept, 0))
    failures = {}
    for collection, download in zip(lacking, downloads, strict=True):
        say(f"{collection.folder}: from kaggle.com/datasets/{collection.handle}")
        if collection.note:
            say(f"    {collection.note}")
        try:
            fetched = fetch(collection, download)
        except DownloadError as error:
            failures[collection.key] = error.problem
            continue
        with replacing(into / collection.folder) as folder:
            copy_files(fetched, folder)
    return failures


def download_folder(collection: Published, into: Path) -> Path:
    """Where kagglehub keeps what it has fetched so far, until the collection is complete."""
    return into / f".{collection.key}.download"


def fetch(collection: Published, download: Path) -> Path:
    """Download a collection with kagglehub, which resumes and unpacks; returns its folder.

    Raises DownloadError.
    """
    import kagglehub  # here, since it is slow to import and the other ways do without it

    try:
        with kagglehub_cache(download):
            folder = Path(kagglehub.dataset_download(collection.handle))
    except KeyboardInterrupt:
        say(f"What has been fetched is kept in {download}: run it again to go on.")
        raise
    except Exception as error:  # its own, those of requests, and those of the archives
        if of_the_disk(error):
            raise
        if isinstance(error, DAMAGES):
            remove(download)  # it would be taken for whole
        raise DownloadError(explain(error, collection)) from None
    names = (file.relative_to(folder).as_posix() for file in files_below(folder))
    roots = find_roots(names, [collection])
    if len(roots) != 1:
        found = f"{len(roots)} folders in the layout of {collection.folder}"
        raise DownloadError(Problem(collection.handle, found, "one", by_hand(collection)))
    return folder / roots[0][1]


@contextmanager
def kagglehub_cache(folder: Path) -> Iterator[None]:
    """Let kagglehub work on the collections' disk, unless the user has set where it should."""
    own = "KAGGLEHUB_CACHE" not in os.environ
    if own:
        os.environ["KAGGLEHUB_CACHE"] = str(folder.absolute())
    try:
        yield
    finally:
        if own:
            del os.environ["KAGGLEHUB_CACHE"]


def explain(error: Exception, collection: Published) -> Problem:
    """What kagglehub's `error` means, and what to do about it."""
    from kagglehub import exceptions

    page = f"kaggle.com/datasets/{collection.handle}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    lacks_credentials = isinstance(
        error, (exceptions.UnauthenticatedError, exceptions.CredentialError)
    ) or "credentials" in str(error)
    if lacks_credentials:
        found, remedy = f"no valid credentials ({error})", TOKEN
    elif status == 401:
        found, remedy = "no valid credentials (401)", TOKEN
    elif status == 403:
        found = "Kaggle refuses access (403)"
        remedy = f"open {page} signed in, and accept its terms if it asks; {TOKEN}"
    elif status == 404:
        found, remedy = "no such data set on Kaggle any more (404)", by_hand(collection)
    elif status:
        found, remedy = f"Kaggle answers with {status}", f"try later; or {by_hand(collection)}"
    elif isinstance(error, (*DAMAGES, exceptions.DataCorruptionError)):
        found, remedy = f"a damaged download ({error})", "run it again: it is fetched anew"
    elif isinstance(error, OSError):
        found = f"no connection ({error})"
        remedy = f"run it again, which goes on where it stopped; or {by_hand(collection)}"
    else:
        found, remedy = f"{type(error).__name__}: {error}", by_hand(collection)
    return Problem(page, found, "the collection", remedy)


def by_hand(collection: Published) -> str:
    return f"fetch it from {collection.page} and pass where it lies with --from-archives"


# --- The disk --------------------------------------------------------------------------------


def of_the_disk(error: Exception) -> bool:
    """Those of requests are OSError too, but have no number; those of sockets have."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not network


def check_space(into: Path, needed: int) -> None:
    """Say how much room there is in the folder `into`; raise InputError where it is too little."""
    free = shutil.disk_usage(into).free
    if needed:
        say(f"Needs up to {in_gb(needed)} in {into}, where {in_gb(free)} are free")
    if needed > free:
        remedy = "make room, pass --into with a folder on another disk, or --only with fewer"
        refuse([Problem(into, f"{in_gb(free)} free", in_gb(needed), remedy)])


if __name__ == "__main__":
    run(main)
