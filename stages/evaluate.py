"""Score every system in data/predictions on the test and external images, and draw the results.

Reads   data/predictions/, data/controls/, data/layers/, data/probes/, data/few_shots/,
        data/training/, data/audit/, data/manifest.csv, data/split.csv, data/slices/index.csv,
        data/masks/index.csv, data/synthetic_audit.csv and .json, and the smallest side of
        data/images/, data/masks/ and data/synthetic/
Writes  metrics/test.json        UAR, WAR and recalls with 95 % intervals, precision and F1
        metrics/external.json    the same on external sites; {} without any
        metrics/patients.json    the same per patient, with AUROC
        metrics/within.json      within modality, site, collection and severity (and .csv)
        metrics/ranking.json     AUROC, sensitivity and specificity at thresholds of the validation
                                 split, calibration error, Brier score
        metrics/primary.json     the comparisons that were chosen in advance
        metrics/probes.json      what a linear model learns from one region of the images, from all
                                 sites, and at one site for another
        metrics/few_shots.json   UAR of frozen features by number of training patients
        metrics/controls.json    vision-language models with the image, without it, in other words
        metrics/layers.json      what a probe reads from each layer of a vision-language model
        metrics/masks.json       lung masks: accepted share and Dice by modality, site and class
        metrics/synthetic.json   copies among synthetic images, and how alike the others are
        metrics/audit.json       what the splits share (and .csv, near_duplicates.csv)
        metrics/all.json         all images, for systems that answered all of them
        metrics/runs.json        how each system's answers were made
        metrics/answers.csv      every answer to a test or external image
        metrics/*.md             model card and checklist
        plots/                   tables for `dvc plots` and the same as PNG charts
        data/sheets/             pictures that show images of the collections (never in Git)

Every file in data/predictions is a system: none is named here. Both folders are written anew, so
that a system that is gone leaves nothing behind.

    python stages/evaluate.py        (or: dvc repro evaluate)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from chest.core.errors import ParameterError
from chest.core.files import replacing, write_json, write_table, write_text
from chest.core.labels import EVALUATED
from chest.core.parallel import parallel_map
from chest.core.params import Section, Text, load_params
from chest.core.runtime import run_stage
from chest.data import audit
from chest.data.dataset import Dataset, read_dataset
from chest.data.masks import read_masks
from chest.data.synthetic import read_audit, read_synthetic
from chest.evaluation.calibration import reliability
from chest.evaluation.comparison import primary_comparisons
from chest.evaluation.few_shots import nest_curves, read_curves
from chest.evaluation.intervals import intervals
from chest.evaluation.layers import read_layers
from chest.evaluation.metrics import rounded
from chest.evaluation.predictions import System, read_curve, read_systems
from chest.evaluation.probes import nest_across, read_across, read_probes, score_across
from chest.evaluation.revisions import write_answers
from chest.evaluation.segmentation import mask_metrics, read_mask_index
from chest.evaluation.subgroups import nest_groups, read_severity, tabulate_groups
from chest.evaluation.synthetic import read_figures
from chest.reporting import charts, model_card, scores, sheets
from chest.reporting.scores import Scores, ScoresBySystem

METRICS, PLOTS, SHEETS = Path("metrics"), Path("plots"), Path("data/sheets")
CLOSEST = 20  # pairs of near-duplicates that Git tracks; data/audit has all
NOTES = {
    "phantom": "Drawn phantoms: no image of a person.",
    "study": "Images of the published collections. They show patients: do not publish.",
}


class EvaluationSettings(Section):
    """The block ``evaluation`` of params.yaml."""

    primary: Text  # the system that the model card describes


@dataclass(frozen=True)
class Studies:
    """Figures of no single system.

    ``across``: `probes.score_across`; ``curves``: `few_shots.read_curves`; ``layers``:
    `layers.read_layers`; ``masks``: `segmentation.mask_metrics`.
    """

    across: pd.DataFrame
    curves: pd.DataFrame
    layers: pd.DataFrame
    masks: dict


def main() -> None:
    params = load_params()
    data = read_dataset("train", "val", "test")
    systems = read_systems(data.table)
    primary = choose_primary(systems, params.section("evaluation", EvaluationSettings).primary)
    probes = read_probes(data.table)
    pairs, counts = audit.read_audit(data.table)

    # 1. Figures with intervals.
    score = partial(scores.score_system, seed=params.seed, severity=read_severity())
    found, probed = (
        dict(zip(every, parallel_map(score, [*every.values()]), strict=True))
        for every in (systems, probes)
    )
    run = model_card.Run(
        params=params,
        labelled=data.table,
        systems=systems,
        primary=primary,
        scores=found,
        uars=scores.uar_table("system", found),
        recalls=scores.recall_table(found),
        probe_uars=scores.uar_table("probe", probed),
        leaks=audit.leak_counts(data.table, counts),
        controls=scores.control_table(systems, data.table, params.seed),
        comparisons=primary_comparisons(systems, primary.key, params.seed),
    )
    studies = Studies(
        across=score_across(read_across(data.table), params.seed),
        curves=read_curves(data.table),
        layers=read_layers(),
        masks=mask_metrics(read_mask_index(data.table)),
    )

    # 2. All files; the folders replace those of an earlier run once everything is there.
    with replacing(METRICS) as metrics, replacing(PLOTS) as plots, replacing(SHEETS) as drawn:
        for folder in (metrics, plots, drawn):
            folder.mkdir()
        write_metrics(metrics, run, studies)
        write_table(metrics / "audit.csv", audit.composition(data.table))
        write_table(metrics / "near_duplicates.csv", audit.worst_pairs(pairs, CLOSEST))
        write_answers(metrics / "answers.csv", systems)
        for document in ("model_card.md", "claim.md"):
            write_text(metrics / document, model_card.render(document, run))
        draw_plots(plots, run)
        draw_studies(plots, run, studies)
        draw_sheets(drawn, data, run)


def choose_primary(systems: dict[str, System], key: str) -> System:
    """Return the system `key`; raises ParameterError if it has not answered the test split."""
    known = [name for name, system in systems.items() if "test" in system.splits]
    if key not in known:
        expected = f"one of {', '.join(known)}"
        raise ParameterError(f"params.yaml: evaluation.primary: {key} found, {expected} expected")
    return systems[key]


def write_metrics(folder: Path, run: model_card.Run, studies: Studies) -> None:
    """Write what `dvc metrics` reads, nested floats of 4 places, and tables for a reviewer."""
    complete = {
        k: s.answers for k, s in run.systems.items() if {"train", "val", "test"} <= s.splits
    }
    across = nest_across(studies.across)
    probes = {k: x | across.get(k, {}) for k, x in scores.nest_uars(run.probe_uars).items()}
    metrics = {
        "test": {key: own.headline for key, own in of_split(run.scores, "test")},
        "external": {key: own.headline for key, own in of_split(run.scores, "external")},
        "patients": nest(run.scores, lambda own: own.patients),
        "within": nest(run.scores, lambda own: {"within": nest_groups(own.groups)}),
        "ranking": nest(run.scores, lambda own: own.ranking),
        "probes": {"probes": probes},
        "few_shots": {"few_shots": nest_curves(studies.curves)},
        "controls": {"controls": scores.nest_controls(run.controls)},
        "layers": {"layers": scores.nest_layers(studies.layers)},
        "masks": {"masks": studies.masks},
        "synthetic": {"synthetic": read_figures()},
        "primary": {
            row["modality"]: {key: x for key, x in row.items() if isinstance(x, float)}
            for row in run.comparisons
        },
        "audit": {"audit": run.leaks},
        "all": {
            key: {"all_images": scores.headline(answers, intervals(answers, run.params.seed))}
            for key, answers in complete.items()
        },
    }
    for name, content in metrics.items():
        write_json(folder / f"{name}.json", rounded(content))
    write_json(folder / "runs.json", run.records)
    within = [
        tabulate_groups(key, own.groups).assign(split=split)
        for split in EVALUATED
        for key, own in of_split(run.scores, split)
    ]
    write_table(folder / "within.csv", pd.concat(within))
    write_table(folder / "primary.csv", pd.DataFrame(run.comparisons), float_format="%.4f")


def of_split(found: ScoresBySystem, split: str) -> list[tuple[str, Scores]]:
    """Return (system, Scores) of the systems that answered `split`."""
    return [(key, own[split]) for key, own in found.items() if split in own]


def nest(found: ScoresBySystem, figures: Callable[[Scores], dict]) -> dict:
    """Return {system: figures on the test split, and under "external" those on external sites}."""
    nested: dict = {key: figures(own) for key, own in of_split(found, "test")}
    for key, own in of_split(found, "external"):
        nested.setdefault(key, {})["external"] = figures(own)
    return nested


def draw_plots(folder: Path, run: model_card.Run) -> None:
    """Write the tables that `dvc plots` draws, and the same as charts."""
    primary, styles = run.primary, charts.palette(run.names, run.blind)
    own = {split: x.answers for split, x in run.own.items()}
    tables = {
        "recall": run.recalls,
        "uar": run.uars,
        "reliability": pd.concat(reliability(x).assign(split=s) for s, x in own.items()).round(4),
        "scores": pd.concat(scores.score_bins(split, answers) for split, answers in own.items()),
    }
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    charts.draw_recalls(folder / "recall.png", run.recalls, styles)
    charts.draw_uars(folder / "uar.png", run.uars, styles, run.baselines)
    charts.draw_reliability(folder / "reliability.png", tables["reliability"], primary.name)
    charts.draw_scores(folder / "scores.png", tables["scores"], run.triage, primary.name)

    seeing = {key: x.answers for key, x in of_split(run.scores, "test") if key not in run.blind}
    for key, answers in seeing.items():
        write_table(folder / "confusion" / f"{key}.csv", answers[["actual", "predicted"]])
    matrices = [(styles[primary.key], split, answers) for split, answers in own.items()]
    matrices += [(styles[k], "test", x) for k, x in seeing.items() if k != primary.key]
    charts.draw_confusions(folder / "confusion.png", matrices)

    curves = {}
    for key, system in run.systems.items():
        if (table := read_curve(system)) is not None:
            write_table(folder / "training" / f"{key}.csv", table)
            curves[system.name] = charts.TrainingCurve.of(table, system.record.details)
    if curves:
        charts.draw_training(folder / "training.png", curves)


def draw_studies(folder: Path, run: model_card.Run, studies: Studies) -> None:
    """Write tables and charts of the probes, the few shots and the controls."""
    transfers = scores.transfer_table(studies.across)
    write_table(folder / "probes.csv", pd.concat([run.probe_uars, transfers]))
    charts.draw_probes(folder / "probes.png", run.probe_uars, run.baselines)
    charts.draw_across(folder / "probes_across.png", studies.across)
    write_table(folder / "few_shots.csv", studies.curves)
    if len(studies.curves):
        charts.draw_few_shots(folder / "few_shots.png", studies.curves)
    styles = charts.palette(run.names, run.blind)
    write_table(folder / "controls.csv", run.controls, float_format="%.4f")
    if len(run.controls):
        charts.draw_controls(folder / "controls.png", run.controls, styles)
    write_table(folder / "layers.csv", scores.layer_table(studies.layers))
    if len(studies.layers):
        charts.draw_layers(folder / "layers.png", studies.layers, run.uars, styles, run.baselines)


def draw_sheets(folder: Path, data: Dataset, run: model_card.Run) -> None:
    """Draw pictures that show images of the collections."""
    note, answers = NOTES[run.params.profile], run.own["test"].answers
    sheets.draw_contact_sheet(folder / "contact_sheet.png", data.images, data.table, note)
    lungs = read_masks(len(data.table), data.images.shape[-1])
    index = read_mask_index(data.table)
    sheets.draw_masks(folder / "masks.png", data.images, lungs, index, note)
    sheets.draw_regions(folder / "regions.png", data.images, lungs, data.table["modality"], note)
    wrong = scores.worst_mistakes(answers)
    rows = pd.Series(range(len(data.table)), data.table["image_id"])
    wrong = wrong.assign(row=wrong["image_id"].map(rows))
    title = f"{run.primary.name}: {len(wrong):,} of {len(answers):,} test images wrong. {note}"
    sheets.draw_mistakes(folder / "mistakes.png", data.images, wrong, title)
    made, images = read_synthetic(data.images.shape[-1])
    found = read_audit(made)
    if len(found):
        found = found.assign(row=found["nearest"].map(rows))
        sheets.draw_nearest(folder / "synthetic.png", images, data.images, found, note)


if __name__ == "__main__":
    run_stage(main)
