"""evaluate: metrics, tables and charts of whatever systems are in data/predictions."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import failure, run_in, run_stage, write_params

from chest.core import parallel
from chest.core.labels import LABELS
from chest.data import audit, synthetic
from chest.data.dataset import MANIFEST_COLUMNS, SLICE_COLUMNS
from chest.data.regions import VISIBLE
from chest.evaluation import controls, few_shots, layers, predictions, probes
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.predictions import Record
from chest.evaluation.synthetic import FIGURES

KINDS = {
    "finetune_siglip": "trained",
    "zeroshot_qwen": "zero-shot",
    "blind_site": "blind",
}
PROCESSOR = "EPYC 7B13 64-Core Processor"


def make_study(folder, n=240, systems=KINDS, external=True):
    """Make the inputs of evaluate in `folder`, the working directory; return the manifest."""
    rng = np.random.default_rng(0)
    write_params(folder)
    row = np.arange(n)
    label = rng.choice(LABELS, n, p=[0.45, 0.4, 0.15])
    xray = (label == "tuberculosis") | ((label == "normal") & (row % 3 == 0))
    volume = ~xray & (row % 2 == 0)
    table = pd.DataFrame("x", index=row, columns=list(MANIFEST_COLUMNS)).assign(
        image_id=[f"image-{i:06}" for i in row],
        label=label,
        modality=np.where(xray, "xray", "ct"),
        collection=np.where(xray, "xrays", np.where(volume, "ct_volumes", "ct_slices")),
        site=np.where(xray, np.where(row % 4, "Shenzhen", "Montgomery"), "Moscow $5_100%"),
        patient_id=[f"p{i // 2}" for i in row],
        study=[f"study_{i:06}" for i in row],
        width="64",
        height="64",
        pixel_hash=[f"{i:x}" for i in row],
    )
    table.loc[~xray & (row // 2 % 5 == 4), "site"] = "Málaga"
    split = np.array(["train", "val", "test", "test", "external"], dtype=object)[row // 2 % 5]
    split[(split == "external") & (not external)] = "train"
    for name in ("index", "slices", "images", "audit", "training"):
        (folder / "data" / name).mkdir(parents=True)
    table.to_csv("data/manifest.csv", index=False)
    pd.DataFrame({"image_id": table["image_id"], "split": split}).to_csv(
        "data/split.csv", index=False
    )
    np.save("data/images/32.npy", rng.integers(0, 256, (n, 32, 32)).astype(np.uint8))
    slices = table[volume].reindex(columns=list(SLICE_COLUMNS), fill_value="x")
    grade = np.where(slices["label"] == "normal", "CT-0", "CT-2")
    slices["volume"] = [f"raw/{g}/{s}.nii" for g, s in zip(grade, slices["study"], strict=True)]
    slices.to_csv("data/slices/index.csv", index=False)
    pd.DataFrame(columns=list(audit.NEAR_COLUMNS)).to_csv(audit.NEAR_DUPLICATES, index=False)
    counts = dict.fromkeys([*audit.COUNTED, *audit.TWINS.values()], 0)
    audit.COUNTS.write_text(json.dumps(counts))
    table["split"] = split
    for key, kind in systems.items():
        write_system(table, key, kind)
    for region in VISIBLE:
        write_system(table, region, "trained", probes.FOLDER)
        write_across(table, region, rng)
    write_masks(table, rng)
    write_synthetic_images(table, rng)
    shots = itertools.product(few_shots.METHODS, ("ct", "xray"), ("1", "all"), range(3))
    curves = [(*shot, uar) for shot, uar in zip(shots, rng.random(24), strict=True)]
    few_shots.write_curves("toy", pd.DataFrame(curves, columns=list(few_shots.COLUMNS)))
    return table


def write_across(table, region, rng):
    """Write what models of Shenzhen and Montgomery answer to their test images and each other's."""
    films = table[table["modality"] == "xray"]
    for_site = [
        films[(films["site"] != site) | (films["split"] == "test")].assign(trained_on=site)
        for site in ("Montgomery", "Shenzhen")
    ]
    answers = pd.concat(for_site)
    answers["disease"] = (2 * rng.random(len(answers)) + (answers["label"] == "tuberculosis")) / 3
    answers = answers[list(probes.ACROSS_COLUMNS)]
    probes.write_across(region, answers, probes.FOLDER)


def write_vlm(table, key):
    """Write answers without the image, which change those within X-ray alone, and layers."""
    rng = np.random.default_rng(1)
    rows = table[table["split"].isin(["val", "test", "external"])]
    truth = (rows["label"].to_numpy()[:, None] == np.array(LABELS)) * 0.6 + rng.random(
        (len(rows), 3)
    )
    guess = np.where((rows["modality"] == "ct").to_numpy()[:, None], truth, rng.random(truth.shape))
    covered = np.full(len(rows), 0.25)
    conditions = {
        "asked": truth,
        "no_image": guess,
        "other_image": rng.random(truth.shape),
        "order_normal_covid19_tuberculosis": truth,
        "order_tuberculosis_covid19_normal": guess,
        "paraphrase_1": truth,
        "prior_none": guess,
    }
    replies = {
        name: (list(own / own.sum(axis=1, keepdims=True)), covered)
        for name, own in conditions.items()
    }
    controls.write_controls(key, rows, replies)
    figures = [
        (layer, modality, 40, 0.8, 0.7, 0.9)
        for layer in ("vision", "merger", "language_9")
        for modality in ("all", "ct", "xray")
    ]
    layers.FOLDER.mkdir()
    scores = pd.DataFrame(figures, columns=list(layers.COLUMNS))
    scores.to_csv(layers.FOLDER / f"{key}.csv", index=False)


def write_synthetic_images(table, rng):
    """Write six synthetic images, of which the audit drops the first two."""
    made = pd.DataFrame({"synthetic_id": [f"s{i}" for i in range(6)], "label": "tuberculosis"})
    made = made.assign(modality="xray", method="diffusion", seed=0, guidance=1.5)
    synthetic.write_synthetic(made, rng.integers(0, 256, (6, 32, 32)).astype(np.uint8), {32})
    audited = made.reindex(columns=list(synthetic.AUDIT_COLUMNS)).assign(
        nearest=table["image_id"].iloc[0], percentile=np.arange(6), dropped=np.arange(6) < 2
    )
    audited.to_csv(synthetic.SYNTHETIC_AUDIT, index=False)
    FIGURES.write_text(json.dumps({"n": 6, "diffusion": {"tuberculosis_xray": {"dropped": 2}}}))


def write_masks(table, rng):
    """Write lung masks of which the gate refuses every second one of COVID-19."""
    Path("data/masks").mkdir()
    np.save("data/masks/32.npy", rng.integers(0, 256, (len(table), 32, 4)).astype(np.uint8))
    refused = (table["label"] == "covid19") & (table.index % 2 == 0)
    index = table[["image_id"]].assign(method="toy", area=0.3, parts=2, accepted="True")
    index.loc[refused, "accepted"] = "false"
    index["dice"] = np.where(table["split"] == "train", "1", "0.9")
    index.loc[table["modality"] == "ct", "dice"] = ""
    index.to_csv("data/masks/index.csv", index=False)


def write_system(table, key, kind, folder=predictions.FOLDER, splits=("val", "test", "external")):
    """Write answers that are right more often than not, and a training curve of a trained one."""
    rng = np.random.default_rng(sum(map(ord, key)))
    rows = table[table["split"].isin(splits)]
    truth = rows["label"].to_numpy()[:, None] == np.array(LABELS)
    values = [*rng.dirichlet([1, 1, 1], len(rows)) * 0.7 + 0.3 * truth]
    if kind == "zero-shot":
        values[3] = None  # an unparsed answer
    record = Record(
        name=f"System {key}",
        kind=kind,
        n=len(rows),
        weights="none" if kind == "blind" else "random",
        seed=42,
        checkpoint=None if kind == "blind" else "some/where",
        revision="main",
        device=f"CPU ({PROCESSOR})",
        precision="fp64",
        versions={"python": "3.12.99", "torch": "2.0+cu130"},
        details={"best_epoch": 2, "temperature": 1.23456789} if kind == "trained" else {},
    )
    predictions.write(key, predictions.tabulate(rows, values), record, folder)
    if kind == "trained" and folder == predictions.FOLDER:
        curve = [[epoch, 1 / epoch, 1.1 / epoch, 1e-4, *[0.5] * 4] for epoch in (1, 2, 3)]
        table = pd.DataFrame(curve, columns=list(predictions.CURVE_COLUMNS))
        table.to_csv(predictions.CURVES / f"{key}.csv", index=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Evaluate four systems, then three, in one folder; return it and a copy of the first run."""
    folder, first = tmp_path_factory.mktemp("evaluated"), tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(parallel, "workers", lambda: 1)  # starting workers takes longer
        table = make_study(folder, systems={**KINDS, "finetune_toy": "trained"})
        write_vlm(table, "zeroshot_qwen")
        run_stage("evaluate")
        for name in ("metrics", "plots", "data/sheets"):
            shutil.copytree(name, first / name)
        for path in [*folder.glob("data/*/finetune_toy.*")]:
            path.unlink()
        run_stage("evaluate")
    return first, folder


@pytest.fixture
def first(runs):
    """The results of four systems, one of which the repository does not know."""
    return runs[0]


def read_json(folder, name):
    return json.loads((folder / f"metrics/{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("split", ["test", "external"])
def test_metrics_are_those_of_the_predictions(runs, split):
    answers = pd.read_csv(runs[1] / "data/predictions/zeroshot_qwen.csv")
    answers = answers[answers["split"] == split]
    expected = classification_metrics(answers["actual"], answers["predicted"])
    found = read_json(runs[1], split)["zeroshot_qwen"]
    for key in ("uar", "war", "macro_precision", "macro_f1"):
        assert found[key] == round(expected[key], 4)
    for key in ("recall", "precision", "f1"):
        assert found[key] == {x: round(value, 4) for x, value in expected[key].items()}
    assert found["uar_low"] < found["uar"] < found["uar_high"]


def test_an_unknown_system_is_in_metrics_charts_and_card(first):
    for name in ("test", "external", "patients", "within", "ranking", "runs"):
        assert "finetune_toy" in read_json(first, name)
    for name in ("plots/uar.csv", "plots/recall.csv", "metrics/within.csv"):
        assert "finetune_toy" in set(pd.read_csv(first / name)["system"])
    assert "finetune_toy" in pd.read_csv(first / "metrics/answers.csv", nrows=0)
    assert (first / "plots/confusion/finetune_toy.csv").exists()
    assert (first / "plots/training/finetune_toy.csv").exists()
    card = (first / "metrics/model_card.md").read_text(encoding="utf-8")
    assert "| System finetune_toy (trained from random weights) |" in card


def test_a_system_that_is_gone_leaves_nothing(runs):
    written = [*runs[1].glob("metrics/*"), *runs[1].glob("plots/**/*")]
    assert not [path for path in written if "finetune_toy" in path.name]
    texts = [path for path in written if path.suffix in (".json", ".csv", ".md")]
    assert not [path for path in texts if "finetune_toy" in path.read_text(encoding="utf-8")]


def test_the_same_input_gives_the_same_bytes(runs):
    first, second = runs
    same = [
        *("metrics/audit.csv", "metrics/primary.json", "metrics/probes.json"),
        *("plots/reliability.png", "plots/scores.png", "plots/probes.png", "plots/scores.csv"),
        *("plots/probes_across.png", "plots/few_shots.png", "plots/probes.csv"),
        *("metrics/controls.json", "plots/controls.csv", "plots/layers.csv"),
        *("data/sheets/contact_sheet.png", "data/sheets/mistakes.png", "data/sheets/regions.png"),
        "data/sheets/synthetic.png",
    ]
    assert [n for n in same if (first / n).read_bytes() != (second / n).read_bytes()] == []


def test_what_git_tracks_names_no_processor_and_holds_no_nan(first):
    for path in [*first.glob("metrics/*"), *first.glob("plots/**/*.csv")]:
        text = path.read_text(encoding="utf-8")
        assert PROCESSOR not in text, path
        assert "3.12.99" not in text, path
        assert "+cu130" not in text, path
        assert "nan" not in text.lower(), path
    assert read_json(first, "runs")["finetune_siglip"]["device"] == "CPU"


def test_probes_across_sites_few_shots_and_masks(first):
    probed = read_json(first, "probes")["probes"]["border"]
    assert probed["uar_low"] < probed["uar"] < probed["uar_high"]
    figures = probed["across"]["Shenzhen"]["Montgomery"]
    assert figures["auroc_low"] < figures["auroc"] < figures["auroc_high"]
    rows = pd.read_csv(first / "plots/probes.csv").set_index("bar")
    assert rows.loc["border: Shenzhen to Montgomery", "auroc"] == figures["auroc"]

    curves = read_json(first, "few_shots")["few_shots"]["toy"]
    assert {*curves["logistic"]["ct"]["1"]} == {"uar", "sd", "draws"}
    table = pd.read_csv(first / "plots/few_shots.csv", dtype=str)
    assert {*table["modality"]} == {"ct", "xray"}
    assert "all" in set(table["patients"])

    masks = read_json(first, "masks")["masks"]
    assert masks["ct"]["label"]["covid19"]["accepted"] < 0.7
    assert masks["ct"]["label"]["normal"]["accepted"] == 1
    assert masks["xray"]["site"]["Shenzhen"]["dice"] == 0.9  # not of training images
    assert "dice" not in masks["ct"]
    own = read_json(first, "synthetic")["synthetic"]["diffusion"]["tuberculosis_xray"]
    assert own["dropped"] == 2
    for chart in ("probes_across", "few_shots"):
        assert (first / f"plots/{chart}.png").exists()


def test_what_a_vision_language_model_answers_without_the_image(first):
    own = read_json(first, "controls")["controls"]["zeroshot_qwen"]
    ct, xray = own["ct"], own["xray"]
    assert (ct["no_image"]["changed"], ct["no_image"]["gain"]) == (0, 0)
    assert ct["no_image"]["gain_low"] <= 0 < xray["no_image"]["gain_low"]
    assert xray["asked"]["uar_low"] < xray["asked"]["uar"] < xray["asked"]["uar_high"]
    assert {*xray["prior_none"]} == {"uar", "changed"}
    assert (xray["covered"], own["external"]["xray"]["covered"]) == (0.25, 0.25)
    card = (first / "metrics/model_card.md").read_text(encoding="utf-8")
    line = next(x for x in card.splitlines() if x.startswith("- System zeroshot_qwen"))
    assert "Within X-ray it is better than without its image" in line
    assert "**Within CT it is not shown to be better than without its image" in line
    share = 50 * xray["order_tuberculosis_covid19_normal"]["changed"]  # of two orders
    row = next(x for x in card.splitlines() if "| within X-ray |" in x and x.endswith(" 25.0 % |"))
    assert f"| {share:.1f} % | 0.0 % | 25.0 % |" in row

    layer = read_json(first, "layers")["layers"]["zeroshot_qwen"]["language_9"]
    assert (layer["uar_ct"], layer["uar_ct_low"]) == (0.8, 0.7)
    assert "zeroshot_qwen: merger, xray" in set(pd.read_csv(first / "plots/layers.csv")["bar"])
    bars = pd.read_csv(first / "plots/controls.csv")["bar"]
    assert "zeroshot_qwen: no_image, ct, external" in set(bars)
    assert bars.is_unique


def test_metrics_are_nested_floats_of_four_places(first):
    def check(value):
        if isinstance(value, dict):
            for part in value.values():
                check(part)
        else:
            assert isinstance(value, int | float)
            assert value == round(value, 4)

    for path in first.glob("metrics/*.json"):
        if path.stem != "runs":
            check(json.loads(path.read_text(encoding="utf-8")))


def test_thresholds_come_from_validation(first):
    points = read_json(first, "ranking")["finetune_siglip"]
    for modality in ("ct", "xray"):
        inside, outside = points["points"][modality], points["external"]["points"][modality]
        for target in ("sensitivity_90", "specificity_70"):
            assert inside[target]["threshold"] == outside[target]["threshold"]


def test_card_and_checklist_tell_what_a_reader_must_know(first):
    card = (first / "metrics/model_card.md").read_text(encoding="utf-8")
    checklist = (first / "metrics/claim.md").read_text(encoding="utf-8")
    for text in (card, checklist):
        assert "no medical device" in text
        assert "Phantom run" in text
        assert "its own noise is not in the interval" in text
        assert "Montgomery" in text  # an external site
    for heading in ("External sites", "Per patient", "Primary comparisons", "Shortcuts"):
        assert f"## {heading}\n" in card
    difference = read_json(first, "primary")["ct"]["difference"]
    assert f"{100 * difference:+.1f} points" in card
    assert "Half-width of" in card


def test_without_external_sites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "workers", lambda: 1)
    table = make_study(tmp_path, 120, external=False)
    write_system(table, "zeroshot_siglip", "zero-shot", splits=("train", "val", "test"))
    manifest = pd.read_csv("data/manifest.csv", dtype=str)
    manifest.loc[(table["split"] == "test") & (table["modality"] == "xray"), "site"] = "Lima"
    manifest.to_csv("data/manifest.csv", index=False)
    run_stage("evaluate")
    assert read_json(tmp_path, "controls") == {"controls": {}}
    assert not Path("plots/controls.png").exists()
    assert read_json(tmp_path, "external") == {}
    assert set(pd.read_csv("plots/uar.csv")["split"]) == {"test"}
    card = Path("metrics/model_card.md").read_text(encoding="utf-8")
    assert "None: `split.external` names no site" in card
    assert "Sites of the test split without training images: Lima." in card
    answers = pd.read_csv("data/predictions/zeroshot_siglip.csv")
    expected = classification_metrics(answers["actual"], answers["predicted"])["uar"]
    found = read_json(tmp_path, "all")
    assert found["zeroshot_siglip"]["all_images"]["uar"] == round(expected, 4)
    assert set(found) == {"zeroshot_siglip"}


def test_an_unknown_primary_system_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, 120)
    write_params(tmp_path, **{"evaluation.primary": "finetune_other"})
    message = failure("evaluate", capsys)
    assert "evaluation.primary: finetune_other found" in message
    assert "finetune_siglip, zeroshot_qwen, blind_site" in message
    assert not Path("metrics").exists()


def test_predictions_of_no_stage_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, 120)
    stages = {
        key: {"cmd": "true", "outs": [f"data/predictions/{key}.csv"]}
        for key in KINDS
        if key != "zeroshot_qwen"
    }
    Path("dvc.yaml").write_text(json.dumps({"stages": stages}))
    run_in(tmp_path, "git", "init", "--quiet")
    run_in(tmp_path, "dvc", "init", "--quiet")
    message = failure("evaluate", capsys)
    assert "data/predictions/zeroshot_qwen.csv" in message
    assert "remove" in message
    assert "blind_site" not in message
