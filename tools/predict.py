"""Say what chest images show: COVID-19, tuberculosis or normal lungs, by a system of the study.

PATH is a PNG or JPEG, a CT volume (.nii or .nii.gz), a DICOM file (an axial CT slice or a frontal
X-ray), or a folder, of which everything of these kinds is answered, however deep it lies.

- Of a volume the slice is taken that the pipeline takes: params.yaml, slices.
- In a folder, the CT slices of one DICOM series are a volume; a file that is named by itself is one
  picture. Of DICOM files nothing is read that names a person.
- DICOM X-rays are shown as their file says (window, black or white bone), CT slices in Hounsfield
  units, as those of the volumes.
- The modality is told by --modality or by the file: a volume is CT, DICOM says what it is, a PNG or
  JPEG does not. Only zeroshot_qwen needs it, since its question names it.

Bad files are listed all at once, and nothing is answered (or the others, with --keep-going); the
exit code is 1 then, 2 for a wrong call, else 0. Run it in the repository's root.

    python tools/predict.py scan.png
    python tools/predict.py scans/ volume.nii.gz --csv > answers.csv
    python tools/predict.py scans/ --explain explained/          # where did the model look?
    python tools/predict.py xray.jpg --system zeroshot_qwen --modality xray --json

This is research on public data. It is no diagnosis, no medical device, and must not be used on
patients.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pandas as pd
from PIL import Image

from chest import commands, dicom, predictions
from chest.collections import LITTER, VOLUME_ENDINGS
from chest.errors import ChestError, FileError, Problem, printable, refuse, run
from chest.files import replacing
from chest.images import ENDINGS, read_grey, resize_grey
from chest.labels import LABEL_NAMES, LABELS, MODALITIES, MODALITY_NAMES, UNPARSED
from chest.parallel import map_in_processes
from chest.params import Params, load_params
from chest.progress import progress
from chest.systems import SYSTEM_NAMES
from chest.volumes import cut_axial_slice, slice_index, to_grey

NOTICE = "Research on public data: no diagnosis, no medical device, not to be used on patients."
RANDOM = "The weights began as random ones: the answers say nothing about real lungs."
COLUMNS = ("path", "predicted", *LABELS, "modality")  # of --csv
KINDS = "a PNG or JPEG, a volume (.nii, .nii.gz), a frontal X-ray or an axial CT slice in DICOM"
OTHER = "no image of a known kind"


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    params = load_params()
    refuse(list(find_folder_problems(options)))
    problems: list[Problem] = []

    # 1. Find and decode everything, once, into a file: so all that is bad is known before the
    #    model runs, and memory stays small however many images there are.
    with tempfile.TemporaryFile() as file:
        images, items = decode(find(options, params, problems), params, file, problems)
        rows = np.array([i for i, item in enumerate(items) if item], np.int64)
        items = [item for item in items if item]
        if not (options.keep_going and items):
            refuse(problems)

        # 2. Answer, and draw where the model looked.
        system = SYSTEMS[options.system](options, params)
        answers = tabulate(items, system.say(images, rows, [item.modality for item in items]))
        drawn = draw(system, images, rows, answers, options.explain) if options.explain else []

    # 3. Say it; what is bad comes last, where it is seen.
    report(options, system.record(len(rows)), items, answers, drawn)
    refuse(problems)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = commands.parser(__doc__)
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="a file or a folder")
    parser.add_argument(
        "--system", choices=SYSTEMS, default="finetune_siglip",
        help="which one answers (default: finetune_siglip); zero-shot systems use the checkpoint"
        " and the prompts of params.yaml",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="FOLDER", type=Path,
        help=f"the fine-tuned classifier (default: {predictions.TRAINED_MODEL})",
    )  # fmt: skip
    parser.add_argument(
        "--modality", choices=MODALITIES, help="what the images are, where the files do not say it"
    )
    parser.add_argument(
        "--explain", metavar="FOLDER", type=Path,
        help="draw for each image where the model looked; a new or empty folder",
    )  # fmt: skip
    parser.add_argument(
        "--keep-going", action="store_true", help="answer what is good, and list what is bad"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print json, for programs")
    form.add_argument("--csv", action="store_true", help=f"print csv: {','.join(COLUMNS)}")
    options = parser.parse_args(arguments)
    if options.model and options.system != "finetune_siglip":
        parser.error(f"--model is the fine-tuned classifier; {options.system} takes the checkpoint"
                     " of params.yaml")  # fmt: skip
    if options.explain and options.system == "zeroshot_qwen":
        parser.error("--explain: zeroshot_qwen cannot be explained, the SigLIP systems can")
    return options


def find_folder_problems(options: argparse.Namespace) -> Iterator[Problem]:
    """What is wrong with the folders that the options name, before anything is read."""
    folder = options.model or predictions.TRAINED_MODEL
    if options.system == "finetune_siglip" and not (folder / "config.json").is_file():
        found = "no model in it" if folder.is_dir() else "no such folder"
        remedy = "correct --model" if options.model else "run `dvc repro`, or `dvc pull`"
        yield Problem(folder, found, "the classifier that finetune_siglip writes", remedy)
    folder = options.explain
    above = next(p for p in folder.absolute().parents if p.exists()) if folder else None
    if above and not (above.is_dir() and os.access(above, os.W_OK)):
        yield Problem(folder, f"{above} cannot be written to", "a new folder for --explain",
                      "name another one")  # fmt: skip
    elif folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        yield Problem(folder, "something is there already", "a new or empty folder for --explain",
                      "name another one, or empty it")  # fmt: skip


# --- What there is to answer -----------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A picture that is to be answered, with its modality and what told it (empty: not told).

    ``index`` and ``count``: which slice of a volume it is, from the feet, from 0, of how many; None
    for what is no volume, and for a NIfTI volume until it is read.
    """

    path: Path
    kind: Literal["picture", "volume", "dicom"]
    modality: str = ""
    told: str = ""
    index: int | None = None
    count: int | None = None


def find(options: argparse.Namespace, params: Params, problems: list[Problem]) -> list[Found]:
    """All that the options name, each once, folders in the order of names; says what is skipped."""
    found: list[Found] = []
    skipped: dict[Path, str] = {}
    for path in options.paths:
        if path.is_dir():
            found += find_in_folder(path, params, problems, skipped)
        else:
            found += find_file(path, problems)
    if skipped:
        print(f"Skipped, since of another kind: {len(skipped):,}", file=sys.stderr)
    for path, why in skipped.items():
        print(f"  {printable(path)}: {why}", file=sys.stderr)
    first = {item.path.resolve(): item for item in reversed(found)}
    once = [item for item in found if first[item.path.resolve()] is item]
    told = [tell_modality(item, options, problems) for item in once]
    return [item for item in told if item]


def find_file(path: Path, problems: list[Problem]) -> list[Found]:
    """The one picture or volume that the file `path` holds; anything else is a problem."""
    try:
        kind, header = look_into(path)
    except (OSError, dicom.DicomError) as error:
        problems.append(problem_of(path, error))
        return []
    foreign = header.foreign if header else "" if kind else OTHER
    if foreign:
        problems.append(Problem(path, foreign, KINDS, "convert it, or leave it out"))
        return []
    return [of_dicom(header) if header else Found(path, kind)]


def find_in_folder(
    folder: Path, params: Params, problems: list[Problem], skipped: dict[Path, str]
) -> list[Found]:
    """All pictures and volumes below `folder`, by path; the CT slices of a series are a volume."""
    found: list[Found] = []
    series: dict[str, list[dicom.Header]] = {}
    bad: list[Problem] = []
    for path in progress(walk(folder, bad), "files"):
        try:
            kind, header = look_into(path)
        except (OSError, dicom.DicomError) as error:
            bad.append(problem_of(path, error))
            continue
        if header is None and kind:
            found.append(Found(path, kind))
        elif header is None or header.foreign:
            skipped[path] = header.foreign if header else OTHER
        elif header.modality == "ct":
            series.setdefault(header.series or str(path), []).append(header)
        else:
            found.append(of_dicom(header))
    for headers in series.values():
        found += cut_series(headers, params, bad)
    if not found and not bad:
        bad.append(Problem(folder, "no image below it", KINDS, "correct the path"))
    problems += bad
    return sorted(found, key=lambda item: str(item.path))


def walk(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """The files below `folder`, by name, behind links too; not what file managers leave behind."""
    seen = set()
    listing = os.walk(
        folder, followlinks=True, onerror=lambda e: problems.append(problem_of(e.filename, e))
    )
    for parent, folders, names in listing:
        real = os.path.realpath(parent)
        if real in seen:  # behind a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from (Path(parent, name) for name in sorted(names) if not is_litter(name))


def is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def look_into(path: Path) -> tuple[str, dicom.Header | None]:
    """The file's kind, empty for none that is known, and a DICOM file's header.

    Raises OSError or DicomError where the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError("no such file")
    name = path.name.lower()
    if name.endswith(ENDINGS):
        return "picture", None
    if name.endswith(VOLUME_ENDINGS):
        return "volume", None
    if name.endswith(dicom.ENDINGS) or dicom.is_dicom(path):
        return "dicom", dicom.read_header(path)
    return "", None


def of_dicom(header: dicom.Header, index: int | None = None, count: int | None = None) -> Found:
    told = f"DICOM, {header.stated}"
    return Found(header.path, "dicom", header.modality, told, index, count)


def cut_series(headers: list[dicom.Header], params: Params, problems: list[Problem]) -> list[Found]:
    """The one slice of a DICOM series that is to be answered, as of a volume."""
    try:
        slices = dicom.sort_series(headers)
    except dicom.DicomError as error:
        problems.append(error.problem)
        return []
    index = slice_index(len(slices), params.slices.position)
    return [of_dicom(slices[index], index, len(slices))]


def tell_modality(
    item: Found, options: argparse.Namespace, problems: list[Problem]
) -> Found | None:
    """`item` with its modality; None, and a problem, where it lacks or contradicts it."""
    if item.kind == "volume":
        item = replace(item, modality="ct", told="NIfTI")
    if not item.modality and options.modality:
        return replace(item, modality=options.modality, told="--modality")
    if not item.modality and options.system == "zeroshot_qwen":
        problems.append(Problem(item.path, "a picture that does not tell its modality",
                                "CT or X-ray: the question to zeroshot_qwen names it",
                                "give --modality ct or --modality xray"))  # fmt: skip
        return None
    if options.modality and item.modality != options.modality:
        problems.append(Problem(item.path, f"{MODALITY_NAMES[item.modality]} ({item.told})",
                                f"{MODALITY_NAMES[options.modality]}, as --modality says",
                                "leave --modality out: the file tells it"))  # fmt: skip
        return None
    return item


# --- Reading ---------------------------------------------------------------------------------


def decode(
    found: list[Found], params: Params, file: IO[bytes], problems: list[Problem]
) -> tuple[np.ndarray, list[Found | None]]:
    """All pictures, uint8 (n, side, side), kept in `file`, and `found` with the places of slices.

    Where a picture cannot be read there is a problem, and None in its stead.
    """
    side = params.image_size
    images = np.memmap(file, np.uint8, "w+", shape=(max(1, len(found)), side, side))
    items: list[Found | None] = []
    with closing(map_in_processes(partial(read, params=params), found)) as reading:
        for row, result in zip(images, progress(reading, "images", len(found)), strict=False):
            if isinstance(result, Problem):
                problems.append(result)
                items.append(None)
            else:
                item, row[:] = result
                items.append(item)
    return images, items


def read(item: Found, params: Params) -> tuple[Found, np.ndarray] | Problem:
    """`item`, with the place of the slice, and its picture, uint8 (side, side), as the pipeline's.

    A Problem where there is none.
    """
    side, normalize = params.image_size, params.slices.normalize
    try:
        if item.kind == "picture":
            return item, read_grey(item.path, side).pixels
        if item.kind == "volume":
            cut = cut_axial_slice(item.path, params.slices.position, params.slices.verify)
            item = replace(item, index=cut.index, count=cut.count)
            grey = to_grey(cut.pixels, normalize)
        elif item.modality == "ct":
            grey = to_grey(dicom.read_ct(item.path), normalize)
        else:
            grey = dicom.read_xray(item.path)
        return item, resize_grey(Image.fromarray(grey), side)
    except (ChestError, ValueError) as error:
        return problem_of(item.path, error)


def problem_of(path: str | Path, error: Exception) -> Problem:
    """What kept the file `path` from being read."""
    if isinstance(error, FileError):
        return error.problem
    if isinstance(error, OSError):
        return Problem(path, error.strerror or str(error), KINDS, "correct the path, or its rights")
    return Problem(path, str(error), "a picture that shows a body", "look at it; leave it out")


# --- Answering -------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A loaded system.

    ``say`` gets all images, uint8 (N, side, side), the numbers of those to answer, int64 (n,), and
    their modalities; it returns the probabilities of the classes for each, or None where the answer
    names no class. ``look`` gets images, uint8 (B, side, side), and a class for each, (B,), and
    returns what that class's score depends on, float32 (B, rows, columns), patch by patch.
    ``record`` says of n answers what they must carry to be believed.
    """

    say: Callable[[np.ndarray, np.ndarray, list[str]], list[list[float] | None]]
    record: Callable[[int], dict]
    look: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


# PyTorch and transformers take seconds to import: only once the input is known to be good.


def load_finetuned(options: argparse.Namespace, params: Params) -> System:
    import torch
    from scipy.special import softmax

    from chest.compute import find_checkpoint, load_normalization, record, start, to_pixels
    from chest.explain import look_of_classifier
    from chest.resident import place_images
    from chest.siglip import Input, classify_rows, load_trained

    accelerator = start(params.seed)
    source = find_checkpoint(str(options.model or predictions.TRAINED_MODEL), "main")
    model = load_trained(source, params.image_size).to(accelerator.device)
    normal, size = load_normalization(source), 2 * params.chosen.finetune_siglip.batch_size

    def say(images: np.ndarray, rows: np.ndarray, _) -> list[list[float]]:
        asked = Input(place_images(images, accelerator.device), rows, normal)
        return softmax(classify_rows(accelerator, model, asked, size), axis=1)

    def look(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        pixels = to_pixels(torch.from_numpy(images).to(accelerator.device), normal)
        return look_of_classifier(model, pixels, classes)

    return System(say, lambda n: record(accelerator, source, model, params.seed, n), look)


def load_prompted(options: argparse.Namespace, params: Params) -> System:
    import torch

    from chest.compute import find_checkpoint, load_normalization, record, start, to_pixels
    from chest.explain import look_of_prompts
    from chest.resident import place_images
    from chest.siglip import Input, class_embeddings, compare_rows, load_for_prompts

    settings = params.chosen.zeroshot_siglip
    accelerator = start(params.seed)
    source = find_checkpoint(settings.checkpoint, settings.revision)
    model, tokenizer = load_for_prompts(source, params.image_size)
    model.to(accelerator.device)
    normal = load_normalization(source)
    texts = class_embeddings(model, tokenizer, params.prompts.siglip.model_dump())

    def say(images: np.ndarray, rows: np.ndarray, _) -> list[list[float]]:
        asked = Input(place_images(images, accelerator.device), rows, normal)
        return compare_rows(accelerator, model, texts, asked, settings.batch_size)

    def look(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        pixels = to_pixels(torch.from_numpy(images).to(accelerator.device), normal)
        return look_of_prompts(model, pixels, texts, classes)

    return System(say, lambda n: record(accelerator, source, model, params.seed, n), look)


def load_qwen(options: argparse.Namespace, params: Params) -> System:
    from chest.compute import find_checkpoint, record, start
    from chest.qwen import Asked, ask_rows, load_reader
    from chest.resident import place_images

    settings = params.chosen.zeroshot_qwen
    accelerator = start(params.seed)
    source = find_checkpoint(settings.checkpoint, settings.revision)
    reader = load_reader(source, params.image_size, accelerator)

    def say(images: np.ndarray, rows: np.ndarray, modalities: list[str]) -> list:
        placed = place_images(images, accelerator.device)
        asked = Asked(placed, rows, np.array(modalities), params.prompts.qwen, settings)
        return ask_rows(accelerator, reader, asked)

    return System(say, lambda n: record(accelerator, source, reader.model, params.seed, n))


SYSTEMS = {
    "finetune_siglip": load_finetuned,
    "zeroshot_siglip": load_prompted,
    "zeroshot_qwen": load_qwen,
}


def tabulate(items: list[Found], said: list[list[float] | None]) -> pd.DataFrame:
    """The answers as in the predictions' files: COLUMNS, then slice and slices; n rows."""
    numbered = pd.DataFrame({"image_id": range(len(items)), "split": "", "label": ""})
    table = predictions.tabulate(numbered, said)
    return table.drop(columns=["image_id", "split", "actual"]).assign(
        path=[str(item.path) for item in items],
        modality=[item.modality for item in items],
    )[list(COLUMNS)]


# --- Saying it -------------------------------------------------------------------------------


def draw(
    system: System, images: np.ndarray, rows: np.ndarray, answers: pd.DataFrame, folder: Path
) -> list[str]:
    """Draw for each answer where the model looked, into `folder`; returns the pictures' paths."""
    from chest.explain import draw_look

    names = picture_names(answers["path"])
    classes = answers["predicted"].map(LABELS.index).to_numpy()
    with replacing(folder) as partial:
        partial.mkdir()
        for k in progress(range(len(rows)), "explanations", len(rows)):
            label, image = answers["predicted"][k], images[rows[k]]
            title = f"{LABEL_NAMES[label]}, {percent(answers[label][k])}"
            heat = system.look(image[None], classes[k : k + 1])[0]
            file = printable(Path(answers["path"][k]).name)
            draw_look(partial / names[k], image, heat, title, file, NOTICE)
    return [str(folder / name) for name in names]


def picture_names(paths: Iterable[str]) -> list[str]:
    """For each path the name of its explanation: its own without ending, numbered if it recurs."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = Path(path).name
        for ending in (*ENDINGS, *VOLUME_ENDINGS, *dicom.ENDINGS):
            if stem.lower().endswith(ending):
                stem = stem[: -len(ending)]
        name, number = f"{stem}.png", 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name.casefold())
        names.append(name)
    return names


def report(
    options: argparse.Namespace,
    record: dict,
    items: list[Found],
    answers: pd.DataFrame,
    drawn: list[str],
) -> None:
    """Print the answers in the form that the options ask for, with the notice."""
    notice = f"{NOTICE}\n{RANDOM}" if record["weights"] == "random" else NOTICE
    sys.stdout.reconfigure(errors="surrogateescape")  # names are bytes, and pass as they are
    if options.csv:
        answers.to_csv(sys.stdout, index=False, lineterminator="\n",
                       float_format=f"%.{predictions.PLACES}f")  # fmt: skip
        print(notice, file=sys.stderr)
    elif options.json:
        content = as_json(items, answers, drawn)
        content = {"notice": notice, "system": options.system, "run": record, "answers": content}
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        print(f"{SYSTEM_NAMES[options.system]} ({record['checkpoint']})\n")
        print(as_text(items, answers))
        if drawn:
            print(f"\nWhere the model looked: {printable(options.explain)}")
        print(f"\n{notice}")


def as_json(items: list[Found], answers: pd.DataFrame, drawn: list[str]) -> list[dict]:
    return [
        {
            **row,
            "modality": item.modality or None,
            "modality_told_by": item.told or None,
            "slice": item.index,
            "slices": item.count,
            "explanation": picture,
        }
        for row, item, picture in zip(
            answers.to_dict("records"), items, drawn or [None] * len(items), strict=True
        )
    ]


def as_text(items: list[Found], answers: pd.DataFrame) -> str:
    """A table with a line for each answer; files left-aligned, numbers right-aligned."""
    names = {**LABEL_NAMES, UNPARSED: "none named"}
    lines = [["file", "answer", *LABEL_NAMES.values(), "modality"]]
    for item, row in zip(items, answers.to_dict("records"), strict=True):
        place = "" if item.count is None else f" (slice {item.index + 1} of {item.count})"
        told = f"{MODALITY_NAMES[item.modality]} ({item.told})" if item.told else "not told"
        lines.append([printable(item.path) + place, names[row["predicted"]],
                      *(percent(row[label]) for label in LABELS), told])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(2, 2 + len(LABELS))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


if __name__ == "__main__":
    run(main)
