"""Review a run: what changed against a Git revision, and is it more than noise?

Compares the working tree, or the revision HEAD, with the revision BASE. Both may be DVC
experiments. No data are needed: all differences come from what Git tracks.

Reads   params.yaml, dvc.lock, metrics/ and plots/ of both; data/images for thumbnails
Writes  review/report.md      for a pull request: tables, no picture
        review/report.html    one file that opens offline: also charts, and thumbnails of the images
                              whose answer changed

Thumbnails of the study's images show patients: they are left out unless --thumbnails is given.
With --runs, which takes revisions that differ in their seeds only, intervals hold the noise of
training too.

    python tools/review.py main                               # this working tree against main
    python tools/review.py HEAD~1 --head HEAD --out compared  # the last commit against its parent
    python tools/review.py main --head lively-newt            # a DVC experiment against main
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from chest.core.errors import ChestError, InputError
from chest.core.files import write_text
from chest.core.runtime import parser, run_tool
from chest.data.dataset import read_dataset
from chest.evaluation.revisions import resolve
from chest.reporting import report
from chest.reporting.review import Review, read_results, review
from chest.reporting.staleness import stale_stages

PHANTOMS = "data/raw/phantom/"
DRAWN = "The thumbnails in report.html show drawn phantoms."
PATIENTS = "report.html shows images of patients: do not publish it, do not commit it."
LEFT_OUT = "No thumbnails: these images show patients. --thumbnails shows them, for your eyes only."


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        base_folder = check_out(options.base, Path(scratch, "base"))
        base = read_results(base_folder, options.base, describe(options.base), options.base_runs)
        folder = check_out(options.head, Path(scratch, "now")) if options.head else Path.cwd()
        now = read_results(folder, options.head, describe(options.head), options.runs)
        found = review(base, now)
        images, about = read_thumbnails(found, options.thumbnails)
        sections = report.build(found, stale_stages(folder), images, about)
    title = f"Review of {now.about['revision']} against {options.base}"
    write_text(options.out / "report.md", report.to_markdown(found.headline, sections))
    write_text(options.out / "report.html", report.to_html(found.headline, sections, title))
    print(f"{found.headline}\n{options.out / 'report.md'}\n{options.out / 'report.html'}")


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    add, several = command.add_argument, {"nargs": "+", "default": [], "metavar": "REV"}
    add("base", metavar="BASE", help="a Git revision, or a DVC experiment")
    add("--head", metavar="REV", help="default: the working tree")
    add("--out", type=Path, default=Path("review"), metavar="DIR", help="default: %(default)s")
    add("--runs", **several, help="further runs of HEAD, with other seeds")
    add("--base-runs", **several, help="further runs of BASE")
    shown = "show the images whose answer changed (default: only if all are phantoms)"
    add("--thumbnails", action=argparse.BooleanOptionalAction, help=shown)
    return command.parse_args(arguments)


def git(*arguments: str | Path) -> str:
    """Return what git prints; raises ChestError if it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ChestError(f"git {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def check_out(revision: str, folder: Path) -> Path:
    """Check out what Git tracks of `revision` in `folder`, a clone that shares its objects."""
    commit = git("rev-parse", "--verify", f"{resolve(revision)}^{{commit}}")
    git("clone", "--quiet", "--shared", "--no-checkout", ".", folder)
    git("-C", folder, "checkout", "--quiet", "--detach", commit)
    return folder


def describe(revision: str | None) -> dict[str, str]:
    """Return what Git knows about a side; None is the working tree."""
    commit, date, subject = git(
        "log", "-1", "--format=%h%n%cs%n%s", resolve(revision or "HEAD"), "--"
    ).split("\n")
    changed = 0 if revision else len(git("status", "--porcelain").splitlines())
    return {
        "revision": revision or "working tree",
        "commit": commit,
        "date": date,
        "subject": subject,
        "files not committed": str(changed),
    }


def read_thumbnails(found: Review, wanted: bool | None) -> tuple[dict[str, str], str]:
    """Return {image_id: data URI} of the images whose answer changed, and what to say about them.

    They come from the working tree. Whether they are phantoms is seen from where they come from:
    the profile may have been changed since they were packed.
    """
    changed = {
        image
        for _, _, before, after in found.pairs
        for image in before["image_id"][before["predicted"] != after["predicted"]]
    }
    if wanted is False or not changed:
        return {}, ""
    try:
        data = read_dataset()
    except InputError as error:
        return {}, f"No thumbnails: {error.problems[0].file}: {error.problems[0].found}."
    raw = data.table["path"][data.table["path"].str.startswith("data/raw/")]
    profiles = {side.params.get("profile") for side in (found.base, found.now)}
    drawn = profiles == {"phantom"} and len(raw) > 0 and raw.str.startswith(PHANTOMS).all()
    if not (drawn or wanted):
        return {}, LEFT_OUT
    rows = {image: row for row, image in enumerate(data.table["image_id"])}
    images = {
        image: report.thumbnail(data.images[rows[image]]) for image in changed if image in rows
    }
    return images, DRAWN if drawn else PATIENTS


if __name__ == "__main__":
    run_tool(main)
