"""The tables of the results on real lungs, from the predictions that `tools/real.py` stored."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.labels import DISEASES, EVALUATED
from chest.core.parallel import parallel_map, progress
from chest.evaluation import few_shots
from chest.evaluation.comparison import Difference, compare, pooled
from chest.evaluation.predictions import part_of
from chest.evaluation.recalibration import recalibrate_layer, recalibrate_threshold
from chest.evaluation.repeated import auroc_difference
from chest.evaluation.roc import disease_scores
from chest.reporting.real_runs import (
    SEED,
    Group,
    RealRun,
    RealRuns,
    apart,
    figures,
    spread,
    together,
)

# Key of a system (name of the file of its answers, labels), and what it is called.
SYSTEMS = {
    "EfficientNet, fine-tuned": ("", {"system": "finetuned", "variant": ""}),
    "EfficientNet, 3 epochs": ("", {"system": "finetuned", "variant": "3 epochs"}),
    "EfficientNet frozen, logistic regression": ("", {"system": "frozen"}),
    "EfficientNet from random weights": ("", {"system": "finetuned", "variant": "random weights"}),
    "Small ResNet from random weights": ("", {"system": "resnet"}),
    "Small SigLIP from random weights": ("", {"system": "siglip"}),
    "Linear on 28 x 28 pixels": ("linear_pixels", {"system": "baselines"}),
    "Blind: scanner traces": ("blind_scanner", {"system": "baselines"}),
    "Blind: by site (balanced)": ("blind_site", {"system": "baselines"}),
}
PLACES = {
    "within CT": ("ct", None),
    "within X-ray": ("xray", None),
    "within Shenzhen": ("xray", "Shenzhen"),
    "within Montgomery": ("xray", "Montgomery"),
}
# Protocol: modality, and what the pooled folds and the images held out are called.
PROTOCOLS = {
    "shenzhen": ("xray", "within Shenzhen", "Shenzhen to Montgomery"),
    "montgomery": ("xray", "within Montgomery", "Montgomery to Shenzhen"),
    "ct": ("ct", "within MosMed (CT)", ""),
}
METHODS = {"finetuned": "fine-tuned", "frozen": "frozen, logistic regression"}
# What is asked first, then what answers objections.
VIEWS = {
    "everything": "Whole image",
    "lungs": "Lungs only",
    "lungs_crop": "Lungs, cropped and stretched",
    "no_lungs": "Lungs hidden",
    "border": "Border only",
    "mask": "Shape of the lung mask",
    "lungs_true": "Lungs by the published mask",
    "lungs_box": "Box around the lungs",
    "lungs_shuffled": "Another patient's lung mask",
    "dilate_0": "Lungs, mask not grown",
    "dilate_4": "Lungs, mask grown by 4 %",
    "dilate_8": "Lungs, mask grown by 8 %",
    "stretch": "Whole image, grey values stretched",
    "equalize": "Whole image, grey values equalised",
}
MAIN_VIEWS = list(VIEWS.values())[:6]
# What may help: the labels of each setting; the first is the rule.
ON_FILMS = {
    "as it is": {"view": "everything", "variant": ""},
    "grey values equalised": {"view": "equalize", "variant": ""},
    "lungs only": {"view": "lungs", "variant": ""},
    "lungs, cropped and stretched": {"view": "lungs_crop", "variant": ""},
}
WITH_CT = {"as it is": {"view": "everything", "variant": ""}} | {
    name: {"view": "everything", "variant": name}
    for name in (
        "head by modality",
        "balance: none",
        "balance: class",
        "balance: logit_adjusted",
        "no augmentation",
        "batch norms of the checkpoint",
        "adversary: modality",
    )
}
MASKED = "head masked at inference"
AGAINST_SITE = {
    "as it is": {"view": "everything", "variant": ""},
    "adversary: site": {"view": "everything", "variant": "adversary: site"},
}
# Protocol: what was trained on, the settings, and what counts: the split and the modality.
SHENZHEN, MONTGOMERY = (
    {place: (split, "xray") for place, split in zip(PROTOCOLS[name][1:], EVALUATED, strict=True)}
    for name in ("shenzhen", "montgomery")
)
CT = {"within CT": ("test", "ct")}
HELPS = {
    "shenzhen": ("films of Shenzhen", ON_FILMS, SHENZHEN),
    "montgomery": ("films of Montgomery", ON_FILMS, MONTGOMERY),
    "ct_shenzhen": ("CT slices and films of Shenzhen", WITH_CT, CT | SHENZHEN),
    "ct_montgomery": ("CT slices and films of Montgomery", WITH_CT, CT | MONTGOMERY),
    "films": ("films of both hospitals", AGAINST_SITE, {"within X-ray": ("test", "xray")}),
}
# By what few tuberculosis films are filled up; each is compared with the rule below.
FILLED = {
    "none": "nothing",
    "duplicates": "duplicates",
    "augmented": "augmented duplicates",
    "mixup": "mixup within the class",
    "diffusion": "a diffusion model",
}
FILLED_RULE = "duplicates"
RECALIBRATED = ("everything", "lungs_crop")

Tables = dict[str, pd.DataFrame]
Job = Callable[[], list[dict]]  # computes rows of a table


def tabulate(runs: RealRuns) -> Tables:
    """Return all tables; those of which nothing was run have no rows."""
    makers: dict[str, Callable[[RealRuns], list[Job]]] = {
        "systems": system_jobs,
        "views": view_jobs,
        "helps": help_jobs,
        "starved": starved_jobs,
        "recalibration": recalibration_jobs,
        "synthetic": synthetic_jobs,
    }
    jobs = [(name, job) for name, make in makers.items() for job in make(runs)]
    done = parallel_map(_work, [job for _, job in jobs])
    rows: dict[str, list[dict]] = {name: [] for name in makers}
    for (name, _), found in zip(jobs, progress(done, "figures", len(jobs)), strict=True):
        rows[name] += found
    tables = {name: pd.DataFrame(own) for name, own in rows.items()}
    if len(tables["systems"]):
        tables["systems"] = in_order(tables["systems"], place=[*PLACES], system=[*SYSTEMS])
    tables |= {"few_shots": few_shot_curves(runs), "runs": run_table(runs)}
    return tables | {"synthetic_quality": synthetic_quality(runs.into)}


def _work(job: Job) -> list[dict]:
    return job()


def system_jobs(runs: RealRuns) -> list[Job]:
    """Each system, by five folds pooled."""
    jobs = []
    for name, (key, labels) in SYSTEMS.items():
        group = runs.within(key, protocol="both", view="everything", **labels)
        for place, where in PLACES.items() if group else ():
            jobs.append(partial(_row, {"system": name, "place": place}, group, *where))
    return jobs


def view_jobs(runs: RealRuns) -> list[Job]:
    """Each view, within a hospital and across, with the difference to the whole image."""
    jobs = []
    for protocol, (modality, *places) in PROTOCOLS.items():
        for (method, name), (view, seen) in product(METHODS.items(), VIEWS.items()):
            labels = {"protocol": protocol, "system": method, "variant": ""}
            for place, find in zip(places, (runs.within, runs.across), strict=True):
                group, whole = find(view=view, **labels), find(view="everything", **labels)
                if group and place:
                    known = {"place": place, "method": name, "view": seen}
                    rule = None if view == "everything" else whole
                    jobs.append(partial(_row, known, group, modality, None, rule))
    return jobs


def help_jobs(runs: RealRuns) -> list[Job]:
    """Each setting with its validation figure and its difference to the rule."""
    jobs = []
    for protocol, (trained, settings, places) in HELPS.items():
        found = {
            name: runs.find(protocol=protocol, system="finetuned", **labels)
            for name, labels in settings.items()
        }
        rule = next(iter(found))
        if settings is WITH_CT:
            found[MASKED] = [without_impossible(run) for run in found[rule]]
        for (name, own), (place, (split, modality)) in product(found.items(), places.items()):
            own, base = alike(own, found[rule])
            if own:
                known = {"trained": trained, "place": place, "setting": name}
                known |= {"trainings": len(own)} | site_left(own)
                known |= {} if name == MASKED else validation(own)
                pair = (of_split(x, split) for x in (own, base if name != rule else []))
                jobs.append(partial(_row, known, next(pair), modality, None, next(pair)))
    return jobs


def validation(own: list[RealRun]) -> dict[str, float]:
    """Return mean and standard deviation over runs of the UAR within modality on validation."""
    found = np.array([run.validated for run in own])
    return {"validated": found.mean(), "validated_sd": found.std(ddof=1) if len(own) > 1 else 0.0}


def site_left(own: list[RealRun]) -> dict[str, float]:
    """Return how well the site is told by the adversary, and by a new linear classifier."""
    names = {"discriminator": "discriminator_xray", "site_found": "site_found_xray"}
    details = [run.record.details for run in own]
    return {
        name: float(np.mean([x[key] for x in details]))
        for name, key in names.items()
        if all(key in x for x in details)
    }


def without_impossible(run: RealRun) -> RealRun:
    """Return a run whose answers leave out the class that does not occur in the modality."""
    parts = []
    for modality, disease in DISEASES.items():
        rows, _, score = disease_scores(run.answers, modality)
        parts.append(rows.assign(predicted=np.where(score > 0.5, disease, "normal")))
    return replace(run, answers=pd.concat(parts))


def alike(first: list[RealRun], second: list[RealRun]) -> tuple[list[RealRun], list[RealRun]]:
    """Return the runs of the folds that both have."""
    folds = {run.labels["fold"] for run in first} & {run.labels["fold"] for run in second}
    return tuple([run for run in part if run.labels["fold"] in folds] for part in (first, second))


def of_split(found: list[RealRun], split: str) -> Group | None:
    """Return the answers to the hospital held out, run by run, or to the folds, pooled."""
    return apart(found, split) if split == "external" else together(found, split)


def starved_jobs(runs: RealRuns) -> list[Job]:
    """The recall of tuberculosis by the number of its training images and the balance."""
    return [
        partial(starved_row, run) for run in runs.find(system="finetuned") if "keep" in run.labels
    ]


def starved_row(run: RealRun) -> list[dict]:
    """Return the recalls of one training, on its test images and those kept from training."""
    seen = run.answers[(run.answers["split"] != "val") & (run.answers["modality"] == "xray")]
    found, keep = pooled(seen, SEED), run.labels["keep"]
    known = {"kept": keep, "share": keep / run.record.details["trained_on"]}
    known |= {"balance": run.labels["variant"], "fold": run.labels["fold"]}
    known |= {"tested": int((seen["actual"] == "tuberculosis").sum())}
    recalls = {f"recall_{label}": found.recall[label] for label in ("tuberculosis", "normal")}
    return [known | spread(recalls)]


def synthetic_jobs(runs: RealRuns) -> list[Job]:
    """What few tuberculosis films are filled up by: in the same hospital, and in another one."""
    jobs, labels = [], {"part": "synthetic"}
    for films in sorted({run.labels["films"] for run in runs.find(**labels)}):
        found = {
            method: runs.find(**labels, films=films, variant=f"filled by {method}")
            for method in FILLED
        }
        for site, (split, place) in {
            "Shenzhen": ("test", "within Shenzhen"),
            "Montgomery": ("external", "Shenzhen to Montgomery"),
        }.items():
            groups = {method: apart(own, split) for method, own in found.items() if own}
            for method, group in groups.items():
                known = {"place": place, "films": films, "filled": FILLED[method]}
                rule = None if method == FILLED_RULE else groups.get(FILLED_RULE)
                jobs.append(partial(_row, known, group, "xray", site, rule))
    return jobs


def synthetic_quality(into: Path) -> pd.DataFrame:
    """Return what `audit_synthetic` found of the images that fill tuberculosis up."""
    rows = []
    for method, name in FILLED.items():
        for path in into.glob(f"audit/{method}/*/data/synthetic_audit.json"):
            found = json.loads(path.read_text(encoding="utf-8"))[method]["tuberculosis_xray"]
            floor = {f"real_{key}": value for key, value in found.pop("floor", {}).items()}
            rows.append({"films": int(path.parts[-3]), "filled": name, **found, **floor})
    return pd.DataFrame(sorted(rows, key=lambda row: row["films"]))


def recalibration_jobs(runs: RealRuns) -> list[Job]:
    jobs = []
    for protocol, method, view in product(PROTOCOLS, METHODS, RECALIBRATED):
        own = runs.find(protocol=protocol, system=method, view=view, variant="")
        own = [run for run in own if (run.answers["split"] == "external").any()]
        known = {"place": PROTOCOLS[protocol][2], "method": METHODS[method], "view": VIEWS[view]}
        if own:
            jobs.append(partial(recalibrated, known, own, False))
        if own and method == "frozen":
            jobs.append(partial(recalibrated, known, own, True))
    return jobs


def recalibrated(known: Mapping, runs: list[RealRun], layer: bool) -> list[dict]:
    """Return a row per number of labelled films: means, and 95 % of the draws and runs."""
    tables = [_recalibrate_layer(run) if layer else _recalibrate_threshold(run) for run in runs]
    rows, what = [], "linear layer" if layer else "threshold"
    for count, own in pd.concat(tables).groupby("labelled"):
        low, high = own["uar"].quantile([0.025, 0.975])
        means = own[["uar", "auroc", "brier"]].mean().to_dict()
        row = {**known, "recalibrated": what, "labelled": count, "draws": len(own)}
        rows.append(row | means | {"uar_low": low, "uar_high": high})
    return rows


def _recalibrate_threshold(run: RealRun) -> pd.DataFrame:
    _, truth, score = disease_scores(part_of(run.answers, "external"), "xray")
    return recalibrate_threshold(truth, score, SEED + run.labels["fold"])


def _recalibrate_layer(run: RealRun) -> pd.DataFrame:
    manifest = pd.read_csv(run.folder / "data/manifest.csv", dtype=str)
    split = pd.read_csv(run.folder / "data/split.csv")["split"]
    [path] = (run.folder / "data/features").glob("*.npy")
    features = np.load(path).astype(np.float64)
    truth = (manifest["label"] == "tuberculosis").to_numpy()
    old, new = ((features[split == x], truth[split == x]) for x in ("train", "external"))
    outside = part_of(run.answers, "external").sort_values("image_id")
    _, _, score = disease_scores(outside, "xray")
    c = run.record.details["C_xray"]
    return recalibrate_layer(old, new, score, c, SEED + run.labels["fold"])


def _row(
    known: Mapping,
    group: Group,
    modality: str,
    site: str | None = None,
    rule: Group | None = None,
) -> list[dict]:
    """Return `known` with the figures of `group` and the differences from `rule` to it."""
    row = {**known, **figures(group, modality, site)}
    if rule:
        first, second = (part.of(modality, site).answers for part in (rule, group))
        row |= change("uar", compare(first, second, SEED).uar)
        row |= change("auroc", auroc_difference(first, second, modality, SEED))
    return [row]


def change(name: str, difference: Difference) -> dict:
    return difference.change.as_dict(f"{name}_change") | {f"{name}_p": difference.p}


def few_shot_curves(runs: RealRuns) -> pd.DataFrame:
    """Return UAR by patients per class, over folds and draws, as `few_shots.read_curves` does."""
    tables = []
    for run in runs.find(protocol="both", system="frozen"):
        labelled = pd.read_csv(run.folder / "data/manifest.csv", dtype=str)
        split = pd.read_csv(run.folder / "data/split.csv")["split"]
        counts = labelled[split == "train"].groupby(["modality", "label"])["patient_id"].nunique()
        smaller = counts.groupby("modality").min()
        for path in sorted((run.folder / "data/few_shots").glob("*.csv")):
            own = pd.read_csv(path, dtype={"patients": str})
            per_class = own["modality"].map(smaller).where(own["patients"] == few_shots.ALL)
            own["per_class"] = per_class.fillna(pd.to_numeric(own["patients"], errors="coerce"))
            tables.append(own.assign(encoder="frozen EfficientNet"))
    if not tables:
        return pd.DataFrame()
    keys = ["encoder", "method", "modality", "patients"]
    drawn = pd.concat(tables).groupby(keys, sort=False)
    found = drawn.agg(
        per_class=("per_class", "mean"), uar=("uar", "mean"), sd=("uar", "std"), n=("uar", "size")
    )
    return found.fillna(0.0).reset_index()


def run_table(runs: RealRuns) -> pd.DataFrame:
    """Return runs done and planned, and the hours that they took, by part."""
    planned = pd.Series([labels["part"] for labels in runs.planned]).value_counts(sort=False)
    unique = {run.folder: run for run in runs.runs}.values()
    done = pd.DataFrame([(x.labels["part"], x.seconds) for x in unique], columns=["part", "s"])
    taken = done.groupby("part")["s"].agg(["size", "sum"]).reindex(planned.index, fill_value=0)
    rows = {"part": planned.index, "planned": planned.to_numpy(), "done": taken["size"].astype(int)}
    return pd.DataFrame(rows | {"hours": taken["sum"] / 3600}).reset_index(drop=True)


def in_order(table: pd.DataFrame, **orders: list[str]) -> pd.DataFrame:
    """Sort by columns whose values come in the given orders."""
    codes = {f"_{name}": table[name].map(order.index) for name, order in orders.items()}
    return table.assign(**codes).sort_values([*codes], kind="stable").drop(columns=[*codes])
