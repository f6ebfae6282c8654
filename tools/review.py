"""Review a run: what changed against a Git revision, and is it more than noise?

Compares the working tree, or the revision HEAD, with the revision BASE.

Reads   metrics/, plots/, params.yaml and dvc.lock of both, out of Git; the predictions of both
        where they are, in the working tree or in DVC's cache or remote; data/images.npy
Writes  review/report.md      for a pull request: tables, no picture
        review/report.html    one file that opens offline: charts too, and thumbnails of the images
                              whose answer changed

Without predictions there are no paired intervals, and the report says so. Thumbnails of the study's
images show patients: they are left out unless --thumbnails is given.

    python tools/review.py main                               # this working tree against main
    python tools/review.py HEAD~1 --head HEAD --out compared  # the last commit against its parent
    python tools/review.py main --head lively-newt            # a DVC experiment against main
"""

import argparse
import io
import re
import subprocess
import tarfile
import tempfile
from contextlib import chdir, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import RevError, SCMError, resolve_rev

from chest import commands, predictions
from chest.dataset import IMAGES, MANIFEST, SPLIT, read_dataset, read_labelled
from chest.errors import ChestError, InputError, refuse, run
from chest.files import write_text
from chest.report import Picture, Review, render, thumbnail, unlike_images
from chest.review import NAMES, Side, digest, judge, read_side, systems_of
from chest.revisions import opened, read_here
from chest.staleness import PipelineError, StaleStage, stale_stages

WORKING_TREE = "working tree"
PHANTOMS = "data/raw/phantom/"
DRAWN_SHOWN = "The thumbnails show drawn phantoms."
PATIENTS_SHOWN = "This file shows images of patients: do not publish it, do not commit it."
PATIENTS_LEFT_OUT = (
    "No thumbnails: these images show patients. With --thumbnails this file would show them, and"
    " must then stay with you."
)


class RepositoryError(ChestError):
    """A folder that is no repository of this project, or a revision that it does not have."""


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    check_surroundings(options.out)
    commits = resolve(options.base), options.head and resolve(options.head)
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch, "base"), Path(scratch, "now") if commits[1] else Path.cwd()
        base, now = read_sides(commits, (options.base, options.head or WORKING_TREE), folders)
        judgements = [judge(system, base, now) for system in systems_of(base, now)]
        stale, trouble = look_for_stale(folders[1])
        pictures, about = read_pictures(
            options.thumbnails, unlike_images(judgements, base, now), (base, now), folders[1]
        )
        review = Review(base, now, judgements, stale, trouble, pictures, about)
        markdown, html, verdict = render(review)
    try:
        write_text(options.out / "report.md", markdown)
        write_text(options.out / "report.html", html)
    except OSError as error:
        raise RepositoryError(f"{options.out}: cannot be written: {error}") from None
    print(f"{verdict}\n{options.out / 'report.md'}\n{options.out / 'report.html'}")


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = commands.parser(__doc__)
    parser.add_argument("base", metavar="BASE", help="a Git revision, or a DVC experiment")
    parser.add_argument(
        "--head", metavar="REV", help="what to compare with BASE (default: the working tree)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("review"), metavar="DIR", help="default: review"
    )
    parser.add_argument(
        "--thumbnails", action=argparse.BooleanOptionalAction, default=None,
        help="show the images whose answer changed (default: only where all are phantoms)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def check_surroundings(out: Path) -> None:
    """Raise RepositoryError where nothing can be compared, or nothing be written to `out`."""
    git("rev-parse", "--is-inside-work-tree")
    if not Path(".dvc").is_dir():
        raise RepositoryError(f"{Path.cwd()}: no .dvc: run this in the root of the repository")
    if next((p for p in (out, *out.parents) if p.exists()), Path()).is_file():
        raise RepositoryError(f"{out}: a file is in the way of that folder: name another --out")


# --- Git and DVC -----------------------------------------------------------------------------


def git(*arguments: str) -> bytes:
    """What git prints; raises RepositoryError where it fails."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise RepositoryError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()
        raise RepositoryError(f"{Path.cwd()}: git {arguments[0]}: {message}") from None


def resolve(revision: str) -> str:
    """The commit that a Git revision or a DVC experiment names."""
    try:
        with Repo() as repo:
            return resolve_rev(repo.scm, revision)
    except RevError:
        remedy = "see `git log --all` and `dvc exp show`"
        raise RepositoryError(f"{revision}: no such revision or experiment: {remedy}") from None
    except (DvcException, SCMError) as error:
        raise RepositoryError(f"not a DVC repository: {error}") from None


def lay_out(commit: str, folder: Path) -> None:
    """Write what Git has of `commit` to `folder`, and make a repository of that.

    DVC asks Git which files it ignores: so it has to be one.
    """
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
        archive.extractall(folder, filter=only_files)
    git("init", "--quiet", str(folder))


def only_files(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """No links: they might lead out of the folder."""
    return tarfile.data_filter(member, folder) if member.isreg() or member.isdir() else None


def describe(revision: str, commit: str | None) -> dict[str, str]:
    """What Git tells of a side: revision, commit, date and subject, and what is not committed."""
    form = "--format=%h%n%cs%n%s"
    short, date, *subject = git("log", "-1", form, commit or "HEAD", "--").decode().split("\n")
    changed = [] if commit else git("status", "--porcelain").decode().splitlines()
    return {
        "revision": revision,
        "commit": short,
        "date": date,
        "subject": subject[0],
        "files not committed": str(len(changed)),
    }


def look_for_stale(folder: Path) -> tuple[list[StaleStage] | None, str]:
    """The stale stages of the pipeline in `folder`; or None, and why that cannot be said."""
    try:
        return stale_stages(folder), ""
    except PipelineError as error:
        return None, str(error).replace(str(folder), ".")  # nobody's folders in a pull request


# --- Both sides ------------------------------------------------------------------------------


def read_sides(
    commits: tuple[str, str | None], revisions: tuple[str, str], folders: tuple[Path, Path]
) -> list[Side]:
    """Base and now; raises InputError with all that is wrong with either."""
    sides, problems = [], []
    for name, commit, revision, folder in zip(NAMES, commits, revisions, folders, strict=True):
        try:
            if commit:
                lay_out(commit, folder)
            side = read_side(name, describe(revision, commit), folder)
            sides.append(add_predictions(side, commit, folder))
        except InputError as error:
            problems += error.problems
    refuse(problems)
    return sides


def add_predictions(side: Side, commit: str | None, folder: Path) -> Side:
    """`side` with its predictions; raises InputError where one is there and faulty."""
    systems = [system for system in side.test if re.fullmatch(r"\w+", system)]
    if commit:
        fetch_into(folder, commit, [MANIFEST, SPLIT, *map(predictions.path_of, systems)])
    answers, absent, problems, lock = {}, {}, [], dict(side.lock)
    with chdir(folder):
        for system in systems:
            needed = predictions.path_of(system), MANIFEST, SPLIT
            lacking = [path for path in needed if not path.exists()]
            lock |= {path.as_posix(): digest(path) for path in needed if path.is_file()}
            if lacking:
                where = "neither in DVC's cache nor in its remote" if commit else "not there"
                absent[system] = f"{lacking[0]} {where}"
                continue
            try:
                due = predictions.ANSWERED.get(system)
                answers[system] = read_here(system, predictions.FOLDER, due)
            except InputError as error:
                problems += [replace(p, file=f"{side.name}: {p.file}") for p in error.problems]
    refuse(list(dict.fromkeys(problems)))
    return replace(side, lock=lock, answers=answers, absent=absent)


def fetch_into(folder: Path, commit: str, paths: list[Path]) -> None:
    """Write those of `paths` to `folder` that DVC has of `commit`."""
    with opened(commit) as files:
        for path in paths:
            with suppress(DvcException, OSError):
                content = files.read_bytes(path.as_posix())
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)


# --- Thumbnails ------------------------------------------------------------------------------


def read_pictures(
    wanted: bool | None, images: list[str], sides: tuple[Side, Side], folder: Path
) -> tuple[dict[str, Picture], str]:
    """{image_id: thumbnail} of `images`, and what to say about them.

    They come from the working tree's images, as far as the side now, in `folder`, has the same.
    """
    if wanted is False or not images:
        return {}, "No thumbnails: they were not asked for." if images else ""
    try:
        data = read_dataset()
    except InputError as error:
        return {}, f"No thumbnails: {error.problems[0].file}: {error.problems[0].found}."
    drawn = are_drawn(data.table["path"], sides)
    if not (drawn or wanted):
        return {}, PATIENTS_LEFT_OUT
    with chdir(folder):
        hashes = read_labelled().set_index("image_id")["pixel_hash"]
    rows = data.table.reset_index().set_index("image_id")
    pictures = {
        image: thumbnail(data.images[rows.at[image, "index"]], image)
        for image in images
        if image in rows.index and rows.at[image, "pixel_hash"] == hashes[image]
    }
    lacking = len(images) - len(pictures)
    other = f" {lacking} are not those in {IMAGES}, and left out." if lacking else ""
    return pictures, (DRAWN_SHOWN if drawn else PATIENTS_SHOWN) + other


def are_drawn(paths: pd.Series, sides: tuple[Side, Side]) -> bool:
    """Whether all images are phantoms: by where they come from, not by the profile alone."""
    phantoms, raw = paths.str.startswith(PHANTOMS), paths.str.startswith("data/raw/")
    profiles = {side.params.get("profile") for side in sides}
    return profiles == {"phantom"} and bool(phantoms.any()) and bool((phantoms | ~raw).all())


if __name__ == "__main__":
    run(main)
