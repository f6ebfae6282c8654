"""What the README says of the committed state is true."""

import json
import re

from support import ROOT, run_in

from chest.labels import LABELS, SYSTEMS
from chest.params import load_params

README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(name):
    return re.search(rf"<!-- {name}:.*?-->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)[1]


def test_the_results_are_those_of_the_metrics():
    metrics = json.loads((ROOT / "metrics/test.json").read_text())
    rows = between("results").splitlines()[2:]
    assert len(rows) == len(SYSTEMS)
    for row, system in zip(rows, SYSTEMS, strict=True):
        own = metrics[system]
        values = [own["uar"], own["war"], *(own["recall"][label] for label in LABELS)]
        assert re.findall(r"[\d.]+ %", row) == [f"{100 * value:.1f} %" for value in values]


def test_the_numbers_of_images_and_the_seed_are_those_of_the_run():
    runs = json.loads((ROOT / "metrics/runs.json").read_text())
    table = (ROOT / "plots/confusion_finetune_siglip.csv").read_text().splitlines()[1:]
    covid, normal, sick = (sum(line.startswith(f"{label},") for line in table) for label in LABELS)
    text = " ".join(README.split())
    assert (
        f"{len(table)} drawn test images ({covid} COVID-19, {normal} normal, {sick} tuberculosis)"
        in text
    )
    assert f"{runs['finetune_siglip']['trained_on']:,} drawn images" in text
    assert f"seed {load_params(ROOT / 'params.yaml').seed}" in text


def test_the_graph_is_that_of_the_pipeline():
    assert between("graph").split() == run_in(ROOT, "dvc", "dag", "--md").split()


def test_every_variation_names_parameters_that_exist():
    content = load_params(ROOT / "params.yaml").model_dump()
    keys = re.findall(r"-S ([\w.]+)=", README)
    assert len(keys) > 5
    for key in keys:
        value = content
        for part in key.split("."):
            value = value[part]
