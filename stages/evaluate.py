"""Score what the systems answered on the test split, and draw it.

Reads   data/predictions/, data/training/finetune_siglip.csv, data/audit/, data/manifest.csv,
        data/images.npy, data/split.csv
Writes  metrics/test.json       UAR, WAR and recalls with their 95 % intervals, macro averages,
                                precision and F1 of each system
        metrics/within.json     UAR and recalls within CT, within X-ray, and within each site
        metrics/ranking.json    AUROC, operating points, calibration error, Brier score
        metrics/probes.json     the fine-tuned system where only a part of the image is visible
        metrics/audit.json      what the splits share
        metrics/all.json        the figures of test.json over all images, for systems that answered
                                all of them
        metrics/*.csv           tables for a reviewer: within (all groups, those of one class too),
                                audit (images and patients by split), near_duplicates
        metrics/runs.json       how each came about: checkpoint, commit, device, n, seed, versions
        metrics/*.md            model_card and claim (a checklist), filled from all that
        plots/*.csv             what `dvc plots` draws: confusion_<system>, recall, uar, probes,
                                reliability, training
        plots/*.png             the same drawn
        plots/sheets/           pictures that show images of the collections (never in Git)

All metrics come from the predictions' files, none from weights: this stage alone writes what Git
tracks, and needs no GPU.

    python stages/evaluate.py        (or: dvc repro evaluate)
"""

import chest.early  # noqa: F401

from pathlib import Path

import numpy as np
import pandas as pd

from chest import audit, card, charts, predictions, scores
from chest.calibration import reliability
from chest.dataset import Dataset, read_dataset
from chest.errors import run_stage
from chest.files import replacing, together, write_json, write_table, write_text
from chest.intervals import intervals
from chest.labels import LABELS, SPLITS
from chest.metrics import rounded
from chest.params import load_params
from chest.regions import visible_region
from chest.systems import PROBES, SYSTEM_NAMES, SYSTEMS, TRAINED
from chest.within import nest_within, score_modalities, score_sites, tabulate_within

METRICS = Path("metrics")
PLOTS = Path("plots")
CLOSEST = 20  # near-duplicate pairs in the table that Git tracks; data/audit has more

NOTES = {
    "phantom": "Drawn phantoms: no image of a person.",
    "study": "Images of the published collections. They show patients: do not publish.",
}


@together()
def main() -> None:
    params = load_params()
    data = read_dataset(*SPLITS)
    answers = {
        system: predictions.describe(
            predictions.read(system, data.table, due=predictions.ANSWERED[system]), data.table
        )
        for system in SYSTEMS
    }
    records = {system: predictions.read_record(system) for system in SYSTEMS}
    test = {
        system: table[table["split"] == "test"].reset_index(drop=True)
        for system, table in answers.items()
    }
    probed = {
        probe: predictions.describe(
            predictions.read(probe, data.table, predictions.PROBES, predictions.TEST), data.table
        )
        for probe in PROBES
    }
    for probe in PROBES:
        predictions.read_record(probe, predictions.PROBES)
    names = {system: display_name(system, record) for system, record in records.items()}
    curve = predictions.read_curve(TRAINED, records[TRAINED]["best_epoch"])
    twins, counts = audit.read_audit(data.table)
    leaks = audit.leak_counts(data.table, counts)

    # 1. Figures: values and intervals of each system, over all test images and within groups.
    found = {system: intervals(table, params.seed) for system, table in test.items()}
    modalities = {system: score_modalities(table, params.seed) for system, table in test.items()}
    groups = {s: modalities[s] + score_sites(test[s], params.seed) for s in SYSTEMS}
    rankings = {system: scores.ranking(table) for system, table in test.items()}
    recalls = pd.DataFrame(
        [row for s in SYSTEMS for row in scores.recall_rows(s, test[s], found[s])]
    )
    uars = pd.DataFrame([
        row
        for s in SYSTEMS
        for row in scores.uar_rows("system", s, test[s], found[s], modalities[s])
    ])  # fmt: skip
    whole = scores.uar_rows("probe", "everything", test[TRAINED], found[TRAINED],
                            modalities[TRAINED])  # fmt: skip
    probes = pd.DataFrame(whole + probe_rows(probed, params.seed))

    # 2. Metrics, nested as `dvc metrics` wants them, and tables for a reviewer.
    complete = {s: table for s, table in answers.items() if set(table["split"]) == set(SPLITS)}
    write_metrics("test", {s: scores.headline(test[s], found[s]) for s in SYSTEMS})
    write_metrics("within", {s: {"within": nest_within(groups[s])} for s in SYSTEMS})
    write_metrics("ranking", rankings)
    write_metrics("probes", {TRAINED: {"probes": nest_probes(probes)}})
    write_metrics("audit", {"audit": leaks})
    write_metrics("all", {
        s: {"all_images": scores.headline(table, intervals(table, params.seed))}
        for s, table in complete.items()
    })  # fmt: skip
    within = pd.concat([tabulate_within(s, groups[s]) for s in SYSTEMS])
    write_table(METRICS / "within.csv", within)
    write_table(METRICS / "audit.csv", audit.composition(data.table))
    write_table(METRICS / "near_duplicates.csv", audit.worst_pairs(twins, CLOSEST))
    write_json(METRICS / "runs.json", records)

    # 3. What `dvc plots` draws, and the same drawn.
    for system, table in test.items():
        write_table(PLOTS / f"confusion_{system}.csv", table[["actual", "predicted"]])
    trained = test[TRAINED]
    bins = reliability(
        trained[list(LABELS)].to_numpy(), trained["predicted"].to_numpy(),
        trained["actual"].to_numpy(),
    )  # fmt: skip
    drawn = {"recall": recalls, "uar": uars, "probes": probes, "reliability": bins.round(4),
             "training": curve}  # fmt: skip
    for name, table in drawn.items():
        write_table(PLOTS / f"{name}.csv", table)
    charts.draw_confusions(PLOTS / "confusion.png", test, names)
    charts.draw_recalls(PLOTS / "recall.png", recalls, names)
    charts.draw_uars(PLOTS / "uar.png", uars, names)
    charts.draw_probes(PLOTS / "probes.png", probes, names[TRAINED])
    charts.draw_reliability(PLOTS / "reliability.png", drawn["reliability"], names[TRAINED])
    charts.draw_training(PLOTS / "training.png", curve, records[TRAINED]["best_epoch"])

    # 4. Pictures that show images.
    with replacing(PLOTS / "sheets") as folder:
        folder.mkdir()
        note = NOTES[params.profile]
        charts.draw_contact_sheet(folder / "contact_sheet.png", data.images, data.table, note)
        wrong = worst_mistakes(trained, data)
        title = f"{names[TRAINED]}: {len(wrong)} of {len(trained)} test images wrong. {note}"
        charts.draw_mistakes(folder / "mistakes.png", data.images, wrong, title)
        regions = {probe: visible_region(probe, data.images.shape[1]) for probe in PROBES}
        charts.draw_probe_regions(folder / "probes.png", data.images, data.table, note, regions)

    # 5. The card and the checklist.
    told = card.Run(params, records, names, data.table, uars, recalls, probes, within, leaks,
                    rankings[TRAINED])  # fmt: skip
    for document in ("model_card.md", "claim.md"):
        write_text(METRICS / document, card.render(document, told))


def display_name(system: str, record: dict) -> str:
    """As charts name it; what came out of random weights says so."""
    if record["weights"] != "random":
        return SYSTEM_NAMES[system]
    how = "trained from random weights" if system == TRAINED else "random weights"
    return f"{SYSTEM_NAMES[system]} ({how})"


def probe_rows(probed: dict[str, pd.DataFrame], seed: int) -> list[dict]:
    """Rows of ``plots/probes.csv``: UAR over all images and within each modality for each probe."""
    return [
        row
        for probe, table in probed.items()
        for row in scores.uar_rows(
            "probe", probe, table, intervals(table, seed), score_modalities(table, seed)
        )
    ]


def nest_probes(probes: pd.DataFrame) -> dict:
    """{probe: {uar, uar_ct, uar_xray}} of ``plots/probes.csv``."""
    nested: dict = {}
    for row in probes.itertuples():
        key = "uar" if row.within == scores.ALL else f"uar_{row.within}"
        nested.setdefault(row.probe, {})[key] = row.uar
    return nested


def write_metrics(name: str, metrics: dict) -> None:
    """Write metrics/`name`.json: nested floats of 4 places."""
    write_json(METRICS / f"{name}.json", rounded(metrics))


def worst_mistakes(table: pd.DataFrame, data: Dataset) -> pd.DataFrame:
    """Wrong answers, the truth's least probable first: what `draw_mistakes` reads."""
    row_of = pd.Series(np.arange(len(data.table)), data.table["image_id"])
    listed = table.assign(
        row=row_of[table["image_id"]].to_numpy(),
        probability=probabilities_of(table, "predicted"),
        truth=probabilities_of(table, "actual"),
    )
    wrong = listed[listed["actual"] != listed["predicted"]]
    return wrong.sort_values(["truth", "image_id"], ignore_index=True)


def probabilities_of(table: pd.DataFrame, column: str) -> np.ndarray:
    """The probability of the class that `column` names, float64 (n,); NaN where it names none."""
    named = pd.Index(LABELS).get_indexer(table[column])
    probabilities = table[list(LABELS)].to_numpy()[np.arange(len(table)), named]
    return np.where(named < 0, np.nan, probabilities)


if __name__ == "__main__":
    run_stage(main)
