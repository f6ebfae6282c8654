"""Bring the three collections of the study into data/raw/study, in their published layout.

Writes  data/raw/study/large-covid19-ct-slice-dataset    CT slices, from Kaggle
        data/raw/study/COVID19_1110                      CT volumes, from a copy on Kaggle
        data/raw/study/chest-x-ray-lungs-segmentation    X-rays, from Kaggle

    python tools/download.py                               # fetch what is not there yet
    python tools/download.py --from-archives ~/Downloads   # take what was fetched by hand
    python tools/download.py --check                       # only say what is there

About 18 GB are fetched and become 31 GB; 43 GB must be free for a while. What is complete is left
alone, and an interrupted download goes on where it stopped. Each collection has its own terms of
use: read them first.

Kaggle gives public data to everybody. Where it asks for more, sign in at kaggle.com, make a token
at kaggle.com/settings/api (Generate New Token), and put it into ~/.kaggle/access_token or the
environment variable KAGGLE_API_TOKEN.
"""

import os
import re
import shutil
import tarfile
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from chest.core.errors import FileError, InputError, Problem, refuse
from chest.core.files import remove, replacing
from chest.core.runtime import interrupt_note, parser, run_tool
from chest.core.tables import markdown
from chest.data import collections

STUDY = Path("data/raw/study")
GB = 10**9
MAX_UNPACKED = 90 * GB  # of one archive: three times what all collections take
EXAMPLES = 5  # problems of a collection that are shown


@dataclass(frozen=True)
class Collection:
    """A collection as it was published."""

    folder: str
    handle: str  # on Kaggle
    read: Callable[..., list[collections.Item]]
    image: re.Pattern[str]  # path of an image; group 1 is what precedes the collection's own paths
    counts: dict[str, int]  # images of each class as published (data/raw/README.md)
    origin: str = ""  # page, if it was not published on Kaggle

    def by_hand(self) -> str:
        page = self.origin or f"https://www.kaggle.com/datasets/{self.handle}"
        return f"fetch it from {page} and pass where it lies with --from-archives"


COLLECTIONS = {
    "ct_slices": Collection(
        collections.CT_SLICES,
        "maedemaftouni/large-covid19-ct-slice-dataset",
        collections.read_ct_slices,
        re.compile(r"(|.*?/)curated_data/(?:curated_data/)?(?:1NonCOVID|2COVID)/[^/]+"),
        {"covid19": 7593, "normal": 6893},
    ),
    # mosmed.ai sends a 7z file to those who leave an e-mail address. The copy on Kaggle, a third
    # party's (CC BY-NC-ND 3.0), holds the same volumes in the same folders, not compressed.
    "ct_volumes": Collection(
        collections.CT_VOLUMES,
        "mathurinache/mosmeddata-chest-ct-scans-with-covid19",
        collections.read_ct_volumes,
        re.compile(r"(|.*?/)studies/CT-[0-4]/study_\d{4}\.nii(?:\.gz)?"),
        {"covid19": 856, "normal": 254},
        origin="https://mosmed.ai/en/datasets/covid19_1110/",
    ),
    "xrays": Collection(
        collections.XRAYS,
        "iamtapendu/chest-x-ray-lungs-segmentation",
        partial(collections.read_xrays, labelling="ptb"),
        re.compile(r"(|.*?/)Chest-X-Ray/(?:Chest-X-Ray/)?image/[^/]+"),
        {"tuberculosis": 345, "normal": 359},
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    counts, problems = examine(options.only, options.into)
    lacking = [key for key in options.only if problems[key]]
    if lacking and not options.check:
        if not options.replace:
            refuse_incomplete(lacking, options.into)
        options.into.mkdir(parents=True, exist_ok=True)
        failures = {}
        if options.from_archives:
            take(options.from_archives, lacking, options.into)
        else:
            failures = fetch(lacking, options.into)
        counts, problems = examine(options.only, options.into)
        problems |= failures
    print_table(counts, options.into)
    report(problems)


def read_options(arguments: Sequence[str] | None) -> Namespace:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=COLLECTIONS, default=[*COLLECTIONS])
    options.add_argument("--into", type=Path, default=STUDY, help=f"instead of {STUDY}")
    options.add_argument("--check", action="store_true", help="write nothing: say what is there")
    options.add_argument("--replace", action="store_true", help="replace incomplete collections")
    options.add_argument(
        "--from-archives",
        type=Path,
        metavar="PATH",
        help="fetch nothing: take the collections from PATH, a zip or tar file, an unpacked folder,"
        " or a folder that holds such; their names do not matter",
    )
    return options.parse_args(arguments)


# --- What is there ---------------------------------------------------------------------------


def examine(keys: Sequence[str], into: Path) -> tuple[dict[str, Counter], dict[str, list[Problem]]]:
    """Read collections as the stages do; return the images of each class and what is wrong."""
    counts, problems = {}, {key: [] for key in keys}
    for key in keys:
        collection = COLLECTIONS[key]
        folder = into / collection.folder
        items = collection.read(folder, problems=problems[key]) if folder.is_dir() else []
        counts[key] = Counter(item.label for item in items)
        if counts[key] != collection.counts:
            found = in_words(key, counts[key]) if folder.is_dir() else "no such folder"
            remedy = f"python tools/download.py --only {key}; or {collection.by_hand()}"
            problem = Problem(folder, found, in_words(key, collection.counts), remedy)
            problems[key].insert(0, problem)
    return counts, problems


def in_words(key: str, counts: dict[str, int]) -> str:
    return ", ".join(f"{counts.get(label, 0):,} {label}" for label in COLLECTIONS[key].counts)


def print_table(found: dict[str, Counter], into: Path) -> None:
    rows = [
        [key, in_words(key, counts), in_words(key, COLLECTIONS[key].counts), str(into)]
        for key, counts in found.items()
    ]
    print(markdown(["collection", "found", "expected", "in"], rows))


def report(problems: dict[str, list[Problem]]) -> None:
    """Raise InputError with the first problems of each collection, if there are any."""
    first = [problem for own in problems.values() for problem in own[:EXAMPLES]]
    more = sum(map(len, problems.values())) - len(first)
    if first:
        raise InputError(first, f"and {more:,} more" if more else "")


def refuse_incomplete(lacking: list[str], into: Path) -> None:
    """Raise InputError if a collection would be replaced."""
    folders = [into / COLLECTIONS[key].folder for key in lacking]
    found, expected = "there, but incomplete (--check says why)", "a complete collection, or none"
    remedy = "complete it by hand, move it elsewhere, or pass --replace"
    refuse(Problem(path, found, expected, remedy) for path in folders if os.path.lexists(path))


# --- Archives and folders --------------------------------------------------------------------


def take(path: Path, lacking: list[str], into: Path) -> None:
    """Take the collections `lacking` from `path`: an archive, or a folder of archives or files.

    Raises InputError if none of them is there, or if an archive must not be unpacked.
    """
    placed = place(path, lacking, into) if path.is_dir() else []
    for archive in sorted(path.iterdir()) if path.is_dir() else [path]:
        if archive.is_file() and (zipfile.is_zipfile(archive) or tarfile.is_tarfile(archive)):
            placed += unpack(archive, [key for key in lacking if key not in placed], into)
    if not placed:
        found = "none of the collections" if path.exists() else "no such file or folder"
        expected = "zip or tar files, or unpacked folders (rar and 7z: unpack them by hand)"
        remedy = "; ".join(f"{key}: {COLLECTIONS[key].by_hand()}" for key in lacking)
        refuse([Problem(path, found, expected, remedy)])


def unpack(path: Path, lacking: list[str], into: Path) -> list[str]:
    """Unpack an archive if it holds some of the collections `lacking`; return which.

    Raises InputError if a member would leave the folder or the archive is too large, FileError if
    it is damaged.
    """
    folder = into / ".unpacked"
    remove(folder)
    try:
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive:
            sizes = member_sizes(archive)
            if find_roots(sizes, lacking):
                print(f"Unpacking {path}", flush=True)
                check_members(path, sizes)
                archive.extraction_filter = tarfile.data_filter  # no links to elsewhere
                archive.extractall(folder)
        return place(folder, lacking, into)
    except Exception as error:  # zipfile, tarfile and the decompressors raise many kinds
        if isinstance(error, InputError) or of_the_disk(error):
            raise
        problem = Problem(path, f"damaged ({error})", "a whole archive", "fetch it again")
        raise FileError(problem) from None
    finally:
        remove(folder)


def member_sizes(archive: zipfile.ZipFile | tarfile.TarFile) -> dict[str, int]:
    if isinstance(archive, zipfile.ZipFile):
        return {member.filename: member.file_size for member in archive.infolist()}
    return {member.name: member.size for member in archive.getmembers()}


def check_members(path: Path, sizes: dict[str, int]) -> None:
    """Raise InputError if a member of an archive would leave its folder, or if it is too large."""
    remedy = "do not unpack it; fetch the collection again from where it was published"
    outside = [x for x in map(PurePosixPath, sizes) if x.is_absolute() or ".." in x.parts]
    problems = [
        Problem(f"{path}: {name}", "a path that leaves the folder", "a path in it", remedy)
        for name in outside
    ]
    if (total := sum(sizes.values())) > MAX_UNPACKED:
        found, expected = f"{total / GB:,.0f} GB unpacked", f"at most {MAX_UNPACKED / GB:.0f} GB"
        problems.append(Problem(path, found, expected, remedy))
    refuse(problems)


def of_the_disk(error: Exception) -> bool:
    """Return whether an error is of the disk; those of archives and of requests have no number."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not network


def place(source: Path, lacking: list[str], into: Path) -> list[str]:
    """Bring the collections that lie somewhere below `source` to `into`; return which."""
    files = (Path(parent, name) for parent, _, names in os.walk(source) for name in names)
    roots = find_roots((file.relative_to(source).as_posix() for file in files), lacking)
    for key, root in roots.items():
        print(f"{key}: from {source / root}", flush=True)
        with replacing(into / COLLECTIONS[key].folder) as folder:
            shutil.copytree(source / root, folder, copy_function=link_or_copy)
    return list(roots)


def find_roots(names: Iterable[str], lacking: list[str]) -> dict[str, str]:
    """Return {collection: what precedes its own paths} of those found among the paths `names`."""
    roots: dict[str, str] = {}
    for name in names:
        for key in lacking:
            match = COLLECTIONS[key].image.fullmatch(name)
            if match and "__MACOSX" not in name:
                roots.setdefault(key, match[1])
    return roots


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, which takes no room; copy it from another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# --- Kaggle ----------------------------------------------------------------------------------


def fetch(lacking: list[str], into: Path) -> dict[str, list[Problem]]:
    """Fetch collections with kagglehub, which resumes and unpacks; return why some failed."""
    cache = into / ".kagglehub"
    os.environ.setdefault("KAGGLEHUB_CACHE", str(cache.absolute()))
    import kagglehub  # slow to import, and of no use to --check and --from-archives

    failures = {}
    for key in lacking:
        handle = COLLECTIONS[key].handle
        print(f"{key}: from kaggle.com/datasets/{handle}", flush=True)
        try:
            with interrupt_note("What has been fetched is kept: run it again to go on."):
                folder = Path(kagglehub.dataset_download(handle))
        except Exception as error:  # those of kagglehub, requests and the archives
            if of_the_disk(error):
                raise
            failures[key] = [explain(error, COLLECTIONS[key])]
        else:
            place(folder, [key], into)
    if not failures:
        remove(cache)
    return failures


def explain(error: Exception, collection: Collection) -> Problem:
    """Say what to do about an error of kagglehub."""
    from kagglehub import exceptions

    page, token = f"kaggle.com/datasets/{collection.handle}", "make a token, as --help says"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (exceptions.UnauthenticatedError, exceptions.CredentialError)):
        status = 401
    remedies = {
        401: token,
        403: f"accept the terms on {page}, signed in; {token}",
        404: collection.by_hand(),
    }
    again = f"run it again, which goes on where it stopped; or {collection.by_hand()}"
    found = f"{type(error).__name__}: {error}"
    return Problem(page, found, "the collection", remedies.get(status, again))


if __name__ == "__main__":
    run_tool(main)
