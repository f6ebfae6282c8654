"""What the README says of the committed state is true."""

import json
import re
import sys
from itertools import pairwise

import pytest
from documents import commands, documents
from support import ROOT, run_in

from chest.labels import LABELS
from chest.params import load_params
from chest.systems import SYSTEMS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(name):
    return re.search(rf"<!-- {name}:.*?-->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)[1]


@pytest.mark.parametrize("figure", ["UAR", "recall"])
def test_the_results_are_those_of_the_model_card(figure):
    card = (ROOT / "metrics/model_card.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| {figure} \|.*?(?=\n\n)", card, re.DOTALL | re.MULTILINE)[0]
    assert between(figure.lower()) == table


def test_the_results_are_those_of_the_metrics():
    metrics = json.loads((ROOT / "metrics/test.json").read_text())
    rows = between("recall").splitlines()[2:]
    assert len(rows) == len(SYSTEMS)
    for row, system in zip(rows, SYSTEMS, strict=True):
        shown = re.findall(r"([\d.]+) %", row)
        assert shown == [f"{100 * metrics[system]['recall'][label]:.1f}" for label in LABELS]


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


def test_the_speed_is_that_of_the_results():
    source = re.search(r"<!-- bench: from (\S+),", README)[1]
    assert between("bench") == (ROOT / source).read_text(encoding="utf-8").strip()


def test_the_graph_is_that_of_the_pipeline():
    assert between("graph").split() == run_in(ROOT, "dvc", "dag", "--md").split()


# --- Every command in every document ---------------------------------------------------------

COMMANDS = [command for path in documents() for command in commands(path)]


def test_documents_have_commands():
    assert {command.document for command in COMMANDS} >= {"README.md", "docs/experiments.md"}
    assert len(COMMANDS) > 30
    # Each is run by `make docs`, or says why not.
    assert {command.reason for command in COMMANDS if command.text.startswith("make")} == {""}


def test_every_parameter_that_is_set_exists():
    content = load_params(ROOT / "params.yaml").model_dump()
    keys = [
        (command, word.partition("=")[0])
        for command in COMMANDS
        for option, word in pairwise(command.words())
        if option in ("-S", "--set", "--set-param", "--vary")
    ]
    assert len(keys) > 20
    for command, key in keys:
        value = content
        for part in key.split("."):
            assert part in (value or {}), f"{command.document}:{command.line}: {key}"
            value = value[part]


def test_every_script_and_its_options_exist():
    scripts = [c for c in COMMANDS if c.text.startswith(("python ", "accelerate launch "))]
    helps = {}
    for command in scripts:
        script = next(word for word in command.words() if word.endswith(".py"))
        assert (ROOT / script).is_file(), f"{command.document}:{command.line}: {script}"
        options = [word for word in command.words() if word.startswith("--")]
        if not options or script.startswith("stages/"):
            continue
        if script not in helps:
            helps[script] = run_in(ROOT, sys.executable, script, "--help")
        for option in options:
            assert option.partition("=")[0] in helps[script], f"{command.document}: {command.text}"


def test_every_make_target_exists():
    targets = run_in(ROOT, "make", "--dry-run", "--print-data-base", "--question", fails=None)
    for command in COMMANDS:
        if command.text.startswith("make "):
            assert re.search(rf"^{command.words()[1]}:", targets, re.MULTILINE), command.text


def test_every_link_leads_somewhere():
    for document in documents():
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
