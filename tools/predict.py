"""Say what chest images show: COVID-19, tuberculosis or normal lungs, by a system of the study.

PATH is a PNG or JPEG, a CT volume (.nii or .nii.gz), a DICOM file (an axial CT slice or a frontal
X-ray), or a folder: everything of these kinds in it is answered, however deep it lies.

- Of a volume, the slice is taken that the model was trained on: position and normalization are
  kept beside its weights. Zero-shot systems take those of params.yaml, slices.
- In a folder, the CT slices of one DICOM series are a volume, as is a multi-frame CT; another file
  that is named by itself is one picture. No DICOM tag that names a person is read.
- What is no frontal chest film and no axial chest CT is skipped in a folder, with the reason.
- DICOM X-rays are shown as their file says (window, black or white bone), CT slices in Hounsfield
  units, as those of volumes. What else is read, mended or refused: docs/bad-input.md.
- The modality comes from --modality or from the file: a volume is CT, DICOM says what it is, a PNG
  or JPEG does not. Zero-shot systems need it, since their prompts name it.

Bad files are listed all at once, and nothing is answered (or the rest, with --keep-going); the exit
code is 1 then, 2 for a wrong call, else 0.

    python tools/predict.py scan.png
    python tools/predict.py scans/ volume.nii.gz --csv > answers.csv
    python tools/predict.py scans/ --explain explained/          # where did the model look?
    python tools/predict.py xray.jpg --system zeroshot_qwen --modality xray --json

This is research on public data. It is no diagnosis, no medical device, and must not be used on
patients.
"""

import importlib
import itertools
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from PIL import Image

from chest.core.errors import ChestError, FileError, Problem, printable, refuse
from chest.core.labels import LABEL_NAMES, LABELS, MODALITIES, MODALITY_NAMES, UNPARSED
from chest.core.parallel import parallel_map, progress
from chest.core.params import Params, Text, load_params
from chest.core.runtime import parser, run_tool
from chest.data import dicom
from chest.data.collections import LITTER, VOLUME_ENDINGS
from chest.data.pictures import ENDINGS, LOOK, fit, read_picture
from chest.data.volumes import Slices, check_header, cut_axial_slice, slice_index, to_grey
from chest.evaluation.predictions import PLACES
from chest.evaluation.predictions import tabulate as tabulate_answers

if TYPE_CHECKING:  # PyTorch takes seconds to import
    from chest.models.predictor import Predictor

NOTICE = "Research on public data: no diagnosis, no medical device, not to be used on patients."
RANDOM = "The weights began as random ones: the answers say nothing about real lungs."
COLUMNS = ("path", "predicted", *LABELS, "modality")  # of --csv
KINDS = "a PNG or JPEG, a volume (.nii, .nii.gz), a frontal X-ray or an axial CT slice in DICOM"
MODELS, STAGES = Path("models"), Path("stages")
# What is in the folder of a trained model: of prompts, of adapters, or of a classifier alone.
TRAINED = ("prompts.json", "answering.json", "config.json")


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    params = load_params()
    options.system = options.system or params.section("evaluation.primary", Text)
    if options.explain:
        make_folder(options.explain)
    predictor = load_predictor(options.system, options.model, params)
    slices = slices_for(predictor, params)
    problems: list[Problem] = []

    # 1. Find and decode everything, so that all bad files are known before the model runs.
    found = find(options.paths, slices, problems)
    if options.explain and predictor.explain is None:
        raise ChestError(f"--explain: {options.system} cannot tell where it looked")
    found = tell_modality(found, options.modality, predictor.needs_modality, problems)
    items, images = decode(found, slices, predictor.image_size, problems)
    if not (options.keep_going and items):
        refuse(problems)

    # 2. Answer, and draw where the model looked.
    modalities, lungs = [item.modality for item in items], None
    if predictor.show:
        images, lungs, answered = show(predictor, items, images, modalities)
    said = predictor.classify(images, np.arange(len(items)), modalities)
    if lungs is not None:
        said = [row if seen else None for row, seen in zip(said, answered, strict=True)]
    answers = tabulate(items, said)
    drawn = draw(predictor, images, lungs, answers, options.explain) if options.explain else []

    # 3. Print it; what is bad comes last, where it is seen.
    report(options, predictor.describe(len(items)), items, answers, drawn)
    refuse(problems)


def read_options(arguments: Sequence[str] | None) -> Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("paths", metavar="PATH", nargs="+", type=Path, help="a file or a folder")
    add("--system", metavar="NAME", help="which one answers (default: evaluation.primary)")
    add("--model", metavar="FOLDER", type=Path, help="a trained model, instead of models/NAME")
    add("--modality", choices=MODALITIES, help="what the images are, if the files do not say it")
    add("--explain", metavar="FOLDER", type=Path, help="draw where the model looked; a new folder")
    add("--keep-going", action="store_true", help="answer what is good, and list what is bad")
    form = options.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print json, for programs")
    form.add_argument("--csv", action="store_true", help=f"print csv: {','.join(COLUMNS)}")
    return options.parse_args(arguments)


def make_folder(folder: Path) -> None:
    """Make the folder for explanations; raises InputError if it cannot be made or is not empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = "something is there already" if any(folder.iterdir()) else ""
    except OSError as error:
        found = error.strerror or str(error)
    if found:
        refuse([Problem(folder, found, "a new or empty folder for --explain", "name another one")])


# --- The system ------------------------------------------------------------------------------


def load_predictor(system: str, model: Path | None, params: Params) -> "Predictor":
    """Load a trained model, or the zero-shot system of the stage `system`.

    Raises ChestError if there is neither; it names what there is.
    """
    from chest.models.trained import load_prompted_predictor, load_trained_predictor
    from chest.models.vlm.trained import load_adapted_predictor

    loaders = (load_prompted_predictor, load_adapted_predictor, load_trained_predictor)
    folder = model or MODELS / system
    for name, load in zip(TRAINED, loaders, strict=True):
        if (folder / name).is_file():
            return load(folder, params)
    asked = find_asked(params)
    if system in asked and not model:
        return asked[system]()
    trained = [path.parent.name for path in MODELS.glob("*/*.json") if path.name in TRAINED]
    there = ", ".join(sorted({*trained, *asked})) or "none"
    remedy = "train it with `dvc repro`, or fetch it with `dvc pull`"
    raise ChestError(f"{folder}: no model of {system} there. Systems: {there}; or {remedy}")


def find_asked(params: Params) -> dict[str, Callable[[], "Predictor"]]:
    """Return what loads each system that a stage asks without training it.

    Such a stage has a function ``load_predictor``. If it has several systems, its ``list_systems``
    names them, with the argument that each is loaded by.
    """
    sys.path.insert(0, str(STAGES.absolute()))
    asked = {}
    for path in sorted(STAGES.glob("*.py")):
        if "def load_predictor" not in path.read_text(encoding="utf-8"):
            continue
        stage = importlib.import_module(path.stem)
        if hasattr(stage, "list_systems"):
            own = stage.list_systems(params).items()
            asked |= {key: partial(stage.load_predictor, params, name) for key, name in own}
        else:
            asked[stage.SYSTEM] = partial(stage.load_predictor, params)
    return asked


def slices_for(predictor: "Predictor", params: Params) -> Slices:
    """Return the slices that the model was trained on; tells if params.yaml says otherwise."""
    stated = params.section("slices", Slices)
    slices = stated.model_copy(update=predictor.slices or {})
    if slices != stated:
        used = f"position {slices.position}, normalize {slices.normalize}"
        print(f"Slices as the model was trained on, not as in params.yaml: {used}", file=sys.stderr)
    return slices


# --- Finding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A picture to answer, with its modality and what told it (empty: not told).

    ``index`` and ``count``: which slice of a volume it is, from the feet, from 0, of how many; None
    for what is no volume, and for a NIfTI volume until it is read.
    """

    path: Path
    kind: Literal["picture", "volume", "dicom"]
    modality: str = ""
    told: str = ""
    index: int | None = None
    count: int | None = None
    header: dicom.Header | None = None


def find(paths: Sequence[Path], slices: Slices, problems: list[Problem]) -> list[Found]:
    """Return all that `paths` name, folders in the order of their files' names.

    Each name gets an answer, copies and links of a file too. Prints what is skipped.
    """
    found: list[Found] = []
    skipped: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            found += find_below(path, slices, problems, skipped)
        elif isinstance(items := look_into(path, problems), list):
            found += pick(items, slices, problems)
        else:
            problems.append(Problem(path, items, KINDS, "convert it, or leave it out"))
    for path, reason in skipped.items():
        print(f"Skipped {printable(path)}: {reason}", file=sys.stderr)
    first = {item.path: item for item in reversed(found)}
    return [item for item in found if first[item.path] is item]


def find_below(
    folder: Path, slices: Slices, problems: list[Problem], skipped: dict[Path, str]
) -> list[Found]:
    """Return all pictures and volumes below `folder`; the CT slices of a series are a volume."""
    found: list[Found] = []
    series: dict[str, list[dicom.Header]] = {}
    before = len(problems)
    for path in progress(walk(folder, problems), "files"):
        items = look_into(path, problems)
        if isinstance(items, str):
            skipped[path] = items
            continue
        for item in items:
            if item.kind == "dicom" and item.modality == "ct":
                series.setdefault(item.header.series or str(path), []).append(item.header)
            else:
                found.append(item)
    for headers in series.values():
        found += cut_series(headers, slices, problems)
    if not found and len(problems) == before:
        problems.append(Problem(folder, "no image below it", KINDS, "correct the path"))
    return sorted(found, key=lambda item: str(item.path))


def walk(folder: Path, problems: list[Problem], above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below `folder`, by name, links too, but no hidden ones."""
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        problems.append(problem_of(folder, error))
        return
    for path in entries:
        if path.name.startswith(".") or path.name.lower() in LITTER:
            continue
        if path.is_dir():
            yield from walk(path, problems, (*above, real))
        else:
            yield path


def look_into(path: Path, problems: list[Problem]) -> list[Found] | str:
    """Return what the file `path` holds, by name or first bytes, or why it is of another kind.

    Several items are the frames of a multi-frame CT; none, and a problem, if it cannot be read. A
    NIfTI of one slice may be an X-ray, so it does not tell its modality.
    """
    name = path.name.lower()
    try:
        if name.endswith(ENDINGS) and path.is_file():
            return [Found(path, "picture")]
        if name.endswith(VOLUME_ENDINGS) and path.is_file():
            told = ("ct", "NIfTI") if check_header(path) > 1 else ("", "")
            return [Found(path, "volume", *told)]
        if name.endswith(dicom.ENDINGS) or dicom.is_dicom(path):
            headers = dicom.read_headers(path)
            return headers[0].foreign or [of_dicom(header) for header in headers]
    except (OSError, FileError) as error:
        problems.append(problem_of(path, error))
        return []
    return "no image of a known kind"


def pick(items: list[Found], slices: Slices, problems: list[Problem]) -> list[Found]:
    """Return the item of a file, or the slice to answer of the frames of a multi-frame CT."""
    if len(items) < 2:
        return items
    return cut_series([item.header for item in items], slices, problems)


def of_dicom(header: dicom.Header, index: int | None = None, count: int | None = None) -> Found:
    told = f"DICOM, {header.stated}"
    return Found(header.path, "dicom", header.modality, told, index, count, header)


def cut_series(headers: list[dicom.Header], slices: Slices, problems: list[Problem]) -> list[Found]:
    """Return the slice of a DICOM series to answer, as of a volume; one for each copy of it."""
    acquisitions = sorted({header.acquisition for header in headers})
    folders = sorted({header.path.parent for header in headers})
    copied = len({header.position for header in headers}) * len(folders) == len(headers)
    if len(folders) > 1 and copied:
        parts = [[h for h in headers if h.path.parent == folder] for folder in folders]
        return [item for part in parts for item in cut_series(part, slices, problems)]
    try:
        ordered = dicom.sort_series(headers)
    except FileError as error:
        if len(acquisitions) > 1:  # several passes over the chest, which some scanners do not tell
            parts = [[h for h in headers if h.acquisition == number] for number in acquisitions]
            return [item for part in parts for item in cut_series(part, slices, problems)]
        problems.append(error.problem)
        return []
    index = slice_index(len(ordered), slices.position)
    return [of_dicom(ordered[index], index, len(ordered))]


def tell_modality(
    found: list[Found], told: str | None, needed: bool, problems: list[Problem]
) -> list[Found]:
    """Return the items with --modality, `told`, where their files are silent.

    A problem is one whose file contradicts it, or that stays without although it is `needed`.
    """
    good = []
    for item in found:
        if told and not item.modality:
            item = replace(item, modality=told, told="--modality")
        if told and item.modality != told:
            stated = f"{MODALITY_NAMES[item.modality]} ({item.told})"
            expected = f"{MODALITY_NAMES[told]}, as --modality says"
            problems.append(Problem(item.path, stated, expected, "leave --modality out"))
        elif needed and not item.modality:
            stated, expected = "a picture that does not tell its modality", "CT or X-ray"
            remedy = "give --modality ct or --modality xray: the system's question names it"
            problems.append(Problem(item.path, stated, expected, remedy))
        else:
            good.append(item)
    return good


# --- Reading ---------------------------------------------------------------------------------


def decode(
    found: list[Found], slices: Slices, side: int, problems: list[Problem]
) -> tuple[list[Found], np.ndarray]:
    """Read all pictures; return those that are good, and their pixels, uint8 (n, side, side)."""
    items, images = [], np.empty((len(found), side, side), np.uint8)
    results = parallel_map(partial(read, slices=slices, side=side), found)
    for result in progress(results, "images", len(found)):
        if isinstance(result, Problem):
            problems.append(result)
        else:
            item, images[len(items)] = result
            items.append(item)
    return items, images[: len(items)]


def read(item: Found, slices: Slices, side: int) -> tuple[Found, np.ndarray] | Problem:
    """Return `item`, with the place of its slice, and uint8 (side, side), as in the pipeline."""
    try:
        if item.kind == "picture":
            return item, read_picture(item.path, [side]).pixels[side]
        if item.kind == "volume":
            cut = cut_axial_slice(item.path, slices.position, slices.verify)
            item = replace(item, index=cut.index, count=cut.count)
            grey = to_grey(cut.pixels, slices.normalize)
        elif item.modality == "ct":
            pixels = dicom.read_ct(item.path, item.header.frame)
            grey = to_grey(pixels, slices.normalize)
        else:
            grey = dicom.read_xray(item.path)
        return item, fit(Image.fromarray(grey), [side])[side]
    except (OSError, FileError, ValueError) as error:
        return problem_of(item.path, error)


def problem_of(path: Path, error: OSError | FileError | ValueError) -> Problem:
    """Return what kept the file `path` from being read."""
    if isinstance(error, FileError):
        return error.problem
    if isinstance(error, OSError):
        return Problem(path, error.strerror or str(error), KINDS, "correct the path, or its rights")
    return Problem(path, str(error), "a picture of a chest", LOOK)


# --- Answers ---------------------------------------------------------------------------------


def show(
    predictor: "Predictor", items: list[Found], images: np.ndarray, modalities: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the model is shown, the lungs in it, and which images it answers.

    Prints that lungs were looked for, and where what was found cannot be two lungs.
    """
    shown = predictor.show(images, modalities)
    print(
        "The model sees the images through its view: lungs are looked for first.", file=sys.stderr
    )
    for item, accepted, answered in zip(items, shown.accepted, shown.answered, strict=True):
        if not accepted:
            then = "shown whole" if answered else "not answered"
            print(f"{printable(item.path)}: no two lungs found, {then}", file=sys.stderr)
    return shown.images, shown.masks, shown.answered


def tabulate(items: list[Found], said: Sequence[Sequence[float] | None]) -> pd.DataFrame:
    """Return the answers, rounded as in the predictions' files: COLUMNS, n rows."""
    numbered = pd.DataFrame({"image_id": range(len(items)), "split": "", "label": ""})
    table = tabulate_answers(numbered, said)
    paths, modalities = [str(item.path) for item in items], [item.modality for item in items]
    return table.assign(path=paths, modality=modalities)[list(COLUMNS)]


def draw(
    predictor: "Predictor",
    images: np.ndarray,
    lungs: np.ndarray | None,
    answers: pd.DataFrame,
    folder: Path,
) -> list[str]:
    """Draw for each answer where the model looked, into `folder`; return the pictures' paths.

    The outline of the `lungs`, bool like `images`, is drawn where they were looked for. An image
    without an answer is drawn without relevance.
    """
    from chest.reporting.sheets import draw_relevance

    names = picture_names(answers["path"])
    for k in progress(range(len(names)), "explanations", len(names)):
        label, file = answers["predicted"][k], printable(Path(answers["path"][k]).name)
        outline = None if lungs is None else lungs[k]
        look, title = np.zeros((1, 1)), "not answered: no two lungs found"
        if label != UNPARSED:
            chosen, modality = np.array([LABELS.index(label)]), [answers["modality"][k]]
            look = predictor.explain(images[k : k + 1], chosen, modality)[0]
            title = f"{LABEL_NAMES[label]}, {percent(answers[label][k])}"
        draw_relevance(folder / names[k], images[k], look, title, file, NOTICE, outline)
    return [str(folder / name) for name in names]


def picture_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each path's explanation: its own, and a number if it recurs."""
    endings = "|".join(map(re.escape, (*ENDINGS, *VOLUME_ENDINGS, *dicom.ENDINGS)))
    stems = [re.sub(rf"({endings})$", "", Path(path).name, flags=re.I) for path in paths]
    names: list[str] = []
    for stem in stems:
        count = itertools.count(2)
        name = stem
        while name.casefold() in map(str.casefold, names):
            name = f"{stem}-{next(count)}"
        names.append(name)
    return [f"{name}.png" for name in names]


def report(
    options: Namespace, record: dict, items: list[Found], answers: pd.DataFrame, drawn: list[str]
) -> None:
    """Print the answers in the form that the options ask for, with the notice."""
    notice = f"{NOTICE}\n{RANDOM}" if record["weights"] == "random" else NOTICE
    sys.stdout.reconfigure(errors="surrogateescape")  # names are bytes, and pass as they are
    if options.csv:
        form = {"index": False, "lineterminator": "\n", "float_format": f"%.{PLACES}f"}
        answers.to_csv(sys.stdout, **form)
        print(notice, file=sys.stderr)
    elif options.json:
        content = as_json(items, answers, drawn)
        content = {"notice": notice, "system": options.system, "run": record, "answers": content}
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        print(f"{record['name']} ({record['checkpoint']})\n\n{as_text(items, answers)}")
        if drawn:
            print(f"\nWhere the model looked: {printable(options.explain)}")
        print(f"\n{notice}")


def as_json(items: list[Found], answers: pd.DataFrame, drawn: list[str]) -> list[dict]:
    rows = zip(answers.to_dict("records"), items, drawn or [None] * len(items), strict=True)
    return [
        {
            **row,
            "modality": item.modality or None,
            "modality_told_by": item.told or None,
            "slice": item.index,
            "slices": item.count,
            "explanation": picture,
        }
        for row, item, picture in rows
    ]


def as_text(items: list[Found], answers: pd.DataFrame) -> str:
    """Return a table with a line for each answer."""
    names = {**LABEL_NAMES, UNPARSED: "none named"}
    lines = [["file", "answer", *LABEL_NAMES.values(), "modality"]]
    for item, row in zip(items, answers.to_dict("records"), strict=True):
        place = "" if item.count is None else f" (slice {item.index + 1} of {item.count})"
        told = f"{MODALITY_NAMES[item.modality]} ({item.told})" if item.told else "not told"
        shares = [percent(row[label]) for label in LABELS]
        lines.append([printable(item.path) + place, names[row["predicted"]], *shares, told])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


if __name__ == "__main__":
    run_tool(main)
