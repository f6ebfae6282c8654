"""How the stages that need no model grow: time and memory at the study's size and ten times it.

Makes   in a temporary folder: the three collections in their published layout, of pictures and
        volumes of 16 px, and made-up predictions, probes and a training curve, with the study's
        structure: patients in two collections, many slices of some, few large hospitals
Runs    each of the stages in a process of its own
Writes  benchmarks/results/load.json   seconds, peak memory, and their exponents against N
        benchmarks/results/load.png    the same drawn

    python benchmarks/load.py                           some minutes on two CPU cores
    python benchmarks/load.py --images 4000 16300       smaller
"""

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from datetime import UTC, datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from measure import circumstances
from PIL import Image
from scipy.fft import idctn

from chest.core.errors import ChestError
from chest.core.files import replacing, write_json, write_table
from chest.core.labels import EVALUATED, LABELS, SPLITS
from chest.core.runtime import parser, run
from chest.data.collections import CT_SLICES, CT_VOLUMES, SLICE_CLASSES, XRAYS
from chest.data.dataset import read_labelled
from chest.data.regions import VISIBLE
from chest.evaluation import predictions, probes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
STAGES = ("index_collections", "extract_slices", "build_manifest", "split", "audit", "evaluate")
STUDY = 16_300  # images
SIZES = (STUDY, 2 * STUDY, 4 * STUDY, 10 * STUDY)

# The study: label, collection, first patient, patients, images. Patients are numbered for each
# label: 254 normal ones and 50 with COVID-19 are in both collections of CT.
STRATA = (
    ("normal", "ct_volumes", 0, 254, 254),
    ("covid19", "ct_volumes", 414, 856, 856),
    ("tuberculosis", "xrays", 0, 345, 345),
    ("normal", "xrays", 604, 359, 359),
    ("covid19", "ct_slices", 0, 464, 7593),
    ("normal", "ct_slices", 0, 604, 6893),
)
MOST_VOLUMES = 9  # times the study's: a study's number has four digits; more slices make up for it
LEVELS = {"normal": "CT-0", "covid19": "CT-1"}
SITES = 16  # at the study's size; ten times the images come from ten times the hospitals
LOOKS = 16  # of scanners, however many hospitals there are: some pictures always look alike
SIDE = 16  # px: as many as the perceptual hash has frequencies
# Shares of variance that pictures have in common: all, those of a scanner, of a patient; the rest
# changes from slice to slice. So perceptual hashes differ as those of chest images do: by 116 of
# 256 bits between people (median), by 80 at one scanner, by 10 to 40 between slices of one person.
ALIKE, SCANNER, PERSON, SLICE = 0.15, 0.30, 0.50, 0.05

# Starts a script and prints its peak memory and its processor time. A process of its own: to the
# peak that a process reports, the system adds what the one that started it held.
WATCH = """if True:
    import os, sys
    child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
    _, status, used = os.wait4(child, 0)
    print(used.ru_maxrss, used.ru_utime + used.ru_stime)
    sys.exit(os.waitstatus_to_exitcode(status))"""


class LoadError(ChestError):
    """A stage that failed on the made tables."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    runs = []
    for n in options.images:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            runs += measure(n, options.stages)
    when = {"when": datetime.now(UTC).strftime("%Y-%m-%d")}
    result = {**circumstances(ROOT), **when, "exponents": exponents(runs), "runs": runs}
    write_json(options.out / "load.json", result)
    draw(options.out / "load.png", runs)
    print(pd.DataFrame(runs).to_string(index=False))
    if result["exponents"]:
        print(pd.DataFrame(result["exponents"]).to_string())


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument(
        "--images", type=int, nargs="+", default=list(SIZES), metavar="N", help="how many"
    )
    command.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    command.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return command.parse_args(arguments)


# --- Measuring -------------------------------------------------------------------------------


def measure(n: int, stages: Sequence[str] = STAGES) -> list[dict]:
    """Make a study of `n` images in the working directory and run `stages` on it.

    Returns for each stage, seconds (wall clock), cpu_seconds (of all cores), mib (the peak memory
    of its largest process), images.
    """
    make_collections(n)
    found = []
    for stage in STAGES:
        if stage == "audit":
            make_answers()
        if stage in stages or stage in STAGES[:4]:  # on which the others build
            found.append(run_stage(stage) | {"images": n})
    return [row for row in found if row["stage"] in stages]


def run_stage(stage: str) -> dict:
    """Run a stage as a user does; raises LoadError if it fails."""
    command = [sys.executable, "-c", WATCH, str(ROOT / "stages" / f"{stage}.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise LoadError(f"{stage} ended with exit code {done.returncode}:\n{done.stderr}")
    peak, busy = map(float, done.stdout.split()[-2:])
    peak /= 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {
        "stage": stage,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "mib": round(peak),
    }


def exponents(runs: list[dict]) -> dict:
    """Return {stage: {seconds, mib}}: the slope of each against N, in logarithms; 1 is linear."""
    return {
        stage: {
            figure: round(float(np.polyfit(np.log(own["images"]), np.log(own[figure]), 1)[0]), 2)
            for figure in ("seconds", "mib")
        }
        for stage, own in pd.DataFrame(runs).groupby("stage", sort=False)
        if own["images"].nunique() > 1
    }


# --- The made study --------------------------------------------------------------------------


def make_collections(n: int, seed: int = 0) -> None:
    """Write params.yaml and data/raw/study, collections of `n` images in all."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["profile"] = "study"
    params["study"] |= {"expected_counts": None, "image_sizes": [SIDE]}
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    table = make_table(n, np.random.default_rng(seed))
    images = draw_images(table, np.random.default_rng(seed + 1))
    table = table.assign(picture=list(images))
    raw = Path("data/raw/study")
    for collection, write in (
        ("ct_slices", write_slices),
        ("ct_volumes", write_volumes),
        ("xrays", write_xrays),
    ):
        write(table[table["collection"] == collection], raw)


def make_table(n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Return a row per image: label, collection, number (of its patient), study, hospital."""
    scale, parts, left = n / STUDY, [], n
    for label, collection, first, patients, images in STRATA:
        share = min(scale, MOST_VOLUMES) if collection == "ct_volumes" else scale
        first, people = round(first * scale), max(1, round(patients * share))
        count = left if (label, collection) == STRATA[-1][:2] else round(images * share)
        left -= count
        number = np.repeat(np.arange(first, first + people), sizes(rng, people, count))
        parts.append(pd.DataFrame({"label": label, "collection": collection, "number": number}))
    table = pd.concat(parts, ignore_index=True)
    volumes = table[table["collection"] == "ct_volumes"]
    studies = {
        person: f"study_{k:04}"
        for k, person in enumerate(zip(volumes["label"], volumes["number"], strict=True), 1)
    }
    people = list(zip(table["label"], table["number"], strict=True))
    table["study"] = [studies.get(person, "") for person in people]
    table.loc[table["collection"] == "xrays", "study"] = ""
    return table.assign(hospital=hospitals(people, scale, rng))


def sizes(rng: np.random.Generator, people: int, images: float) -> np.ndarray:
    """Return how many images each of `people` has, int64, (people,): at least one, a long tail."""
    weights = rng.lognormal(sigma=0.8, size=people)
    return 1 + rng.multinomial(images - people, weights / weights.sum())


def hospitals(people: list[tuple], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Return the number of each image's hospital: few are large, many small."""
    codes, names = pd.factorize(pd.Series(people))
    return (round(SITES * max(1, scale)) * rng.random(len(names)) ** 2).astype(int)[codes]


def draw_images(table: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Return a smooth picture per row, uint8, (N, SIDE, SIDE)."""
    look = table["hospital"].to_numpy() % LOOKS
    patient = table.groupby(["label", "number"]).ngroup().to_numpy()
    shape = SIDE * SIDE
    shared = np.sqrt(ALIKE) * rng.standard_normal(shape, np.float32)
    scanner = np.sqrt(SCANNER) * rng.standard_normal((LOOKS, shape), np.float32)
    person = np.sqrt(PERSON) * rng.standard_normal((patient.max() + 1, shape), np.float32)
    frequency = np.hypot(*np.indices((SIDE, SIDE)))
    images = np.empty((len(table), SIDE, SIDE), np.uint8)
    for start in range(0, len(table), STUDY):
        own = slice(start, start + STUDY)
        waves = shared + scanner[look[own]] + person[patient[own]]
        apart = np.sqrt(SLICE * rng.exponential(size=(len(waves), 1)).astype(np.float32))
        waves += apart * rng.standard_normal(waves.shape, np.float32)
        waves = waves.reshape(-1, SIDE, SIDE) / (1 + frequency)
        waves[:, 0, 0] = 0
        images[own] = np.clip(128 + 250 * idctn(waves, axes=(1, 2), norm="ortho"), 0, 255)
    return images


def write_slices(table: pd.DataFrame, raw: Path) -> None:
    """Write collection 1; slices of patients that collection 2 has too are of its volumes."""
    folder = raw / CT_SLICES
    for name, csv, infection, label in SLICE_CLASSES:
        images = folder / "curated_data/curated_data" / name
        images.mkdir(parents=True)
        rows = []
        for k, row in enumerate(table[table["label"] == label].itertuples()):
            file = f"Morozov_{row.study}_{k}.png" if row.study else f"{label}_{k}.png"
            Image.fromarray(row.picture).save(images / file, compress_level=1)
            rows.append(
                {
                    "File name": file,
                    "Patient ID": f"{label}{row.number}",
                    "COVID-19 Infection": infection,
                    "Institution": f"Hospital {row.hospital:03}",
                    "Country": "",
                    "study_file": f"/studies/{LEVELS[label]}/{row.study}.nii" if row.study else "",
                }
            )
        pd.DataFrame(rows).to_csv(folder / csv, index=False)


def write_volumes(table: pd.DataFrame, raw: Path) -> None:
    """Write collection 2: volumes of three slices, with the picture in the middle."""
    studies = raw / CT_VOLUMES / "studies"
    for level in LEVELS.values():
        (studies / level).mkdir(parents=True)
    for row in table.itertuples():
        values = np.zeros((SIDE, SIDE, 3), np.int16)
        values[:, :, 1] = row.picture[::-1, ::-1].T
        image = nib.Nifti1Image(values, np.diag([1, 1, 8, 1]))
        content = gzip.compress(image.to_bytes(), 1)
        (studies / LEVELS[row.label] / f"{row.study}.nii.gz").write_bytes(content)


def write_xrays(table: pd.DataFrame, raw: Path) -> None:
    """Write collection 3, of two hospitals."""
    folder = raw / XRAYS
    images = folder / "Chest-X-Ray/Chest-X-Ray/image"
    images.mkdir(parents=True)
    rows = []
    for k, row in enumerate(table.itertuples(), 1000):
        Image.fromarray(row.picture).save(images / f"{k}.png", compress_level=1)
        county = ("Shenxhen", "Montgomery")[row.hospital % 2]
        ptb = int(row.label == "tuberculosis")
        rows.append({"id": k, "county": county, "ptb": ptb, "remarks": ""})
    pd.DataFrame(rows).to_csv(folder / "MetaData.csv", index=False)


def make_answers(seed: int = 2) -> None:
    """Write what the models would: answers, probes and a training curve; the split must be there.

    Some patients are harder than others. One system answers all images.
    """
    labelled, rng = read_labelled(), np.random.default_rng(seed)
    systems = {
        "zeroshot_qwen": ("zero-shot", EVALUATED),
        "zeroshot_siglip": ("zero-shot", SPLITS),
        "finetune_siglip": ("trained", ("val", *EVALUATED)),
    }
    for skill, (system, (kind, splits)) in enumerate(systems.items()):
        table = labelled[labelled["split"].isin(splits)]
        record = predictions.Record(name=system, kind=kind, n=len(table))
        predictions.write(system, answer(table, skill, rng), record)
    table = labelled[labelled["split"].isin(("val", *EVALUATED))]
    for probe in VISIBLE:
        record = predictions.Record(name=probe, kind="blind", n=len(table))
        predictions.write(probe, answer(table, 1, rng), record, probes.FOLDER)
    epochs = np.arange(1, 11)
    curve = np.column_stack([epochs, 1 / epochs, 1.1 / epochs, 1e-5 / epochs, *[epochs / 12] * 4])
    curve = pd.DataFrame(curve, columns=predictions.CURVE_COLUMNS).astype({"epoch": int})
    write_table(predictions.CURVES / "finetune_siglip.csv", curve)


def answer(table: pd.DataFrame, skill: float, rng: np.random.Generator) -> pd.DataFrame:
    """Return predictions for `table`: the higher `skill` and the easier a patient, the better."""
    patient = pd.factorize(table["patient_id"])[0]
    ease = 1 + skill + rng.standard_normal(patient.max() + 1)[patient]
    truth = table["label"].to_numpy()[:, None] == np.array(LABELS)
    logits = rng.standard_normal((len(table), len(LABELS))) + ease[:, None] * truth
    shares = np.exp(logits)
    return predictions.tabulate(table, shares / shares.sum(1, keepdims=True))


# --- Drawing ---------------------------------------------------------------------------------


def draw(path: Path, runs: list[dict]) -> None:
    """Draw time and peak memory of each stage against the number of images, in logarithms."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    table = pd.DataFrame(runs)
    panels = {"seconds": "Wall-clock time, s", "mib": "Peak memory, MiB"}
    for axes, (column, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        _panel(axes, table, column)
        axes.set_title(title, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    markers = dict(zip(STAGES, "vPosD^", strict=True))
    for stage, own in table.groupby("stage", sort=False):
        axes.plot(own["images"], own[column], marker=markers[stage], label=stage)
    x = np.array([table["images"].min(), table["images"].max()])
    middle = np.median(table.loc[table["images"] == x[0], column])
    axes.plot(x, middle * x / x[0], color="0.6", linestyle=":", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="Images")
    axes.set_xticks(sorted(set(table["images"])))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run(main)
