"""Results that somebody changed, or that belong to another run, are refused by name.

By the stage that scores them, with nothing written; and by the review, which reads what others have
committed, or said to be unknown there.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_review
import yaml
from support import failure, load_script, run_stage
from test_evaluate import make_answers
from test_review import refusal, run

from chest import audit, predictions, report, review
from chest.dataset import read_labelled
from chest.errors import InputError
from chest.files import write_json, write_table
from chest.labels import LABELS
from chest.systems import PROBES, SYSTEMS

origin, repository = test_review.origin, test_review.repository
SYSTEM = "finetune_siglip"


def change(path, edit):
    """Rewrite a csv file with what `edit` makes of its table; numbers stay as they are written."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    write_table(path, edit(table))


def cell(column, value, row=0):
    def edit(table):
        table.loc[table.index[row], column] = value
        return table

    return edit


# --- evaluate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Made answers that evaluate takes, and what it wrote."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_answers(folder)
        run_stage("evaluate")
    return folder


@pytest.fixture
def place(scored, tmp_path, monkeypatch):
    folder = shutil.copytree(scored, tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


def results():
    files = [p for folder in ("metrics", "plots") for p in Path(folder).rglob("*") if p.is_file()]
    return {path: path.read_bytes() for path in files}


def refused(capsys, path, told):
    """evaluate ends on a message that names `path`, and what it wrote before is untouched."""
    before = results()
    message = failure("evaluate", capsys)
    assert str(path) in message
    assert told in message
    assert results() == before


def swapped(table):
    other = table.index[table["actual"] != table["actual"][0]][0]
    table.loc[[0, other], "actual"] = table.loc[[other, 0], "actual"].to_numpy()
    return table


def of_another_split(table):
    table["split"] = table["split"].replace({"test": "train"})
    return table


def of_val_alone(table):
    """Whole and right in themselves; on each side, what they answer is not what is asked."""
    known = read_labelled()
    known = known[known["split"] == "val"]
    return predictions.tabulate(known, np.eye(3)[known["label"].map(LABELS.index)])


def of_another_manifest(table):
    return table.assign(image_id="other-" + table["image_id"])


def least_probable(table):
    numbers = table[["covid19", "normal", "tuberculosis"]].astype(float)
    return table.assign(predicted=numbers.idxmin(axis=1))


POISONED = {
    "missing": (lambda table: table.iloc[1:], "1 images missing"),
    "doubled": (lambda table: pd.concat([table, table.iloc[-1:]]), "images doubled"),
    "unknown": (cell("image_id", "zzz", -1), "1 that do not belong"),
    "unsorted": (lambda table: table[::-1], "not in order"),
    "no sum": (cell("covid19", "0.999999"), "do not add up to 1"),
    "NaN": (cell("normal", "nan"), "no probabilities"),
    "negative": (cell("normal", "-0.1"), "no probabilities"),
    "infinite": (cell("normal", "inf"), "no probabilities"),
    "no number": (cell("normal", "half"), "half"),
    "val alone": (of_val_alone, "answers of val"),
    "another split": (of_another_split, "images missing"),
    "an unknown split": (cell("split", "holdout"), "another split of"),
    "another manifest": (of_another_manifest, "that do not belong"),
    "actual swapped": (swapped, "another actual of"),
    "an unknown class": (cell("predicted", "healthy"), "the answer 'healthy'"),
    "not the most probable": (least_probable, "not the most probable"),
    "unparsed": (cell("predicted", "unparsed"), "unparsed answers"),
    "a column more": (lambda table: table.assign(note=""), "the columns"),
    "no answer": (lambda table: table[:0], "a split"),
}


FILES = [predictions.path_of(system) for system in SYSTEMS]
FILES += [predictions.path_of(probe, predictions.PROBES) for probe in PROBES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("how", POISONED)
def test_poisoned_answers_are_not_scored(place, capsys, how, path):
    edit, told = POISONED[how]
    change(path, edit)
    refused(capsys, path, told)


@pytest.mark.parametrize("system", ["finetune_siglip", "floor_modality", "floor_site"])
def test_answers_of_test_alone_are_not_all_that_is_due(place, capsys, system):
    path = predictions.path_of(system)
    change(path, lambda table: table[table["split"] == "test"])
    n = len(pd.read_csv(path))
    record = predictions.record_path_of(system)
    write_json(record, {**json.loads(record.read_text()), "n": n})
    refused(capsys, path, "answers of test")


def test_an_unparsed_answer_favours_no_class(place, capsys):
    path = predictions.path_of("zeroshot_qwen")
    table = pd.read_csv(path)
    sure = table.index[(table["predicted"] != "unparsed")][0]
    change(path, cell("predicted", "unparsed", sure))
    refused(capsys, path, "unparsed answers that favour a class")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.98])
def test_answers_that_are_cut_off_are_not_scored(place, capsys, share):
    path = predictions.path_of(SYSTEM)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(capsys, path, "found:")


@pytest.mark.parametrize("end", range(2, 64, 3))
def test_wherever_the_last_row_is_cut_off(place, end):
    # It is either noticed, or nothing but the last digits' noughts are gone.
    path = predictions.path_of(SYSTEM)
    content = path.read_bytes()
    known = pd.read_csv("data/manifest.csv", dtype=str).assign(
        split=pd.read_csv("data/split.csv", dtype=str)["split"]
    )
    due = predictions.read(SYSTEM, known)
    path.write_bytes(content[:-end])
    try:
        found = predictions.read(SYSTEM, known)
    except InputError:
        return
    numbers = ["covid19", "normal", "tuberculosis"]
    assert (found[numbers] - due[numbers]).abs().max(axis=None) < predictions.ROUNDING


RECORDS = {
    "torn": (lambda text: text[:40], "found:"),
    "a list": (lambda text: "[]", "no mapping, but list"),
    "another n": (lambda text: re.sub(r'"n": \d+', '"n": 7', text), "a record of n = 7"),
    "no n": (lambda text: re.sub(r'"n": \d+', '"m": 7', text), "n: null"),
    "n in words": (lambda text: re.sub(r'"n": \d+', '"n": "36"', text), 'n: "36"'),
    "no epoch": (lambda text: text.replace("best_epoch", "epoch"), "best_epoch: null"),
    "an epoch in words": (lambda text: text.replace('"best_epoch": 1', '"best_epoch": true'),
                          "best_epoch: true"),
    "no such epoch": (lambda text: text.replace('"best_epoch": 1', '"best_epoch": 9'),
                      "no epoch 9"),
    "no device": (lambda text: text.replace('"device"', '"machine"'), "device: null"),
    "NaN": (lambda text: text.replace("1.5", "NaN"), "NaN"),
    "infinite": (lambda text: text.replace("1.5", "1e999"), "temperature: Infinity"),
    "negative": (lambda text: text.replace("1.5", "-1.5"), "temperature: -1.5"),
    "no unicode": (lambda text: text.replace('"CPU"', r'"\ud800"'), r'device: "\ud800"'),
    "two lines": (lambda text: text.replace('"CPU"', r'"CPU\n# x"'), r'device: "CPU\n# x"'),
    "HTML": (lambda text: text.replace('"CPU"', '"<b>CPU</b>"'), "device: "),
    "a formula": (lambda text: text.replace('"CPU"', '"=1+1"'), "device: "),
    "no text": (lambda text: text.replace('"CPU"', '""'), 'device: ""'),
    "no commit": (lambda text: text.replace('"commit": null', '"commit": 7'), "commit: 7"),
    "weights of another name": (lambda text: text.replace('"random"', '"Random"'),
                                "pretrained or random"),
    "weights of a floor": (lambda text: text.replace('"random"', '"none"'), "pretrained or random"),
    "a key more": (lambda text: text.replace("{", '{"patient": "Jane Doe",'), "patient"),
    "without end": (lambda text: "[" * 100_000, "found:"),
}  # fmt: skip


def poison(path, edit):
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))


@pytest.mark.parametrize("how", RECORDS)
def test_poisoned_records_are_not_taken(place, capsys, how):
    path = predictions.record_path_of(SYSTEM)
    edit, told = RECORDS[how]
    poison(path, edit)
    refused(capsys, path, told)


@pytest.mark.parametrize("how", [how for how in RECORDS if "epoch" not in how])
def test_nor_are_those_of_probes(place, capsys, how):
    path = predictions.record_path_of(PROBES[1], predictions.PROBES)
    edit, told = RECORDS[how]
    text = path.read_text()
    if edit(text) != text:  # they have no temperature
        poison(path, edit)
        refused(capsys, path, told)
    path.unlink()
    refused(capsys, path, "No such file")


@pytest.mark.parametrize("by", ["modality", "ite", "", 7, None])
def test_the_record_of_another_floor_is_not_taken(place, capsys, by):
    path = predictions.record_path_of("floor_site")
    write_json(path, {**json.loads(path.read_text()), "by": by})
    refused(capsys, path, "another system")


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_record_of_another_system_is_not_taken(place, capsys, system):
    path = predictions.record_path_of(system)
    n = json.loads(path.read_text())["n"]
    others = [other for other in SYSTEMS if other != system]
    records = [json.loads(predictions.record_path_of(other).read_text()) for other in others]
    for record in records:
        write_json(path, {**record, "n": n})
        refused(capsys, path, "found:")


CURVES = {
    "torn": (lambda text: text[:-12], "rows that are no epochs"),
    "words": (lambda text: text.replace("0.9", "good"), "rows that are no epochs"),
    "NaN": (lambda text: text.replace("0.9", "nan"), "rows that are no epochs"),
    "infinite": (lambda text: text.replace("0.9", "inf"), "rows that are no epochs"),
    "a share of 7": (lambda text: text.replace("0.6", "7"), "from 0 to 1"),
    "a negative loss": (lambda text: text.replace("0.9", "-0.9"), "rows that are no epochs"),
    "an epoch twice": (lambda text: text + text.splitlines()[-1], "rows that are no epochs"),
    "a row too long": (lambda text: text.replace("\n1,", "\n1,1,"), "more or fewer fields"),
    "no row": (lambda text: text.splitlines()[0], "no epoch 1"),
}


@pytest.mark.parametrize("how", CURVES)
def test_a_poisoned_curve_is_not_drawn(place, capsys, how):
    path = predictions.curve_path_of(SYSTEM)
    edit, told = CURVES[how]
    poison(path, edit)
    refused(capsys, path, told)


PAIR = ["3", "image-000", "train", "covid19", "p0", "ct_slices",
        "image-001", "test", "normal", "p0", "ct_slices"]  # fmt: skip


def audited(**changes):
    """A near-duplicate in data/audit, with `changes` to its columns."""
    pair = dict(zip(audit.NEAR_COLUMNS, PAIR, strict=True)) | changes
    write_table(audit.NEAR_DUPLICATES, pd.DataFrame([pair]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"distance": "-5"}, "distances from 0"),
        ({"distance": "25"}, "distances from 0"),
        ({"image_id_a": "Jane Doe 1960"}, "Jane Doe 1960"),
        ({"label_b": "healthy"}, "image-001"),
        ({"patient_id_a": "Jane Doe"}, "image-000"),
        ({"split_a": "val"}, "image-000"),
        (dict(zip(audit.NEAR_COLUMNS[1:], PAIR[6:] + PAIR[1:6], strict=True)), "other pairs"),
    ],
)
def test_near_duplicates_of_other_images_are_not_shown(place, capsys, changes, told):
    table = read_labelled().set_index("image_id")
    for image, at in (("image-000", 1), ("image-001", 6)):
        assert [image, *table.loc[image, list(audit.DESCRIBED[1:])]] == PAIR[at : at + 5]
    audited()
    run_stage("evaluate")
    audited(**changes)
    refused(capsys, audit.NEAR_DUPLICATES, told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"test_images": 3700, "train_test": 3700, "pairs": 3700}, "test_images: 3700"),
        ({"test_images": 8}, "counts that add up"),
        ({"test_images": 0}, "counts that add up"),
        ({"pairs": 6}, "counts that add up"),
        ({"same_patient": 8}, "counts that add up"),
        ({"other_label": 8}, "counts that add up"),
        ({"pairs": float("inf")}, "no number"),
    ],
)
def test_counts_that_cannot_be_are_not_shown(place, capsys, changes, told):
    counts = json.loads(audit.COUNTS.read_text())
    audit.COUNTS.write_text(json.dumps(counts | changes))
    refused(capsys, audit.COUNTS, told)


def test_counts_without_end_are_refused(place, capsys):
    audit.COUNTS.write_text("[" * 100_000)
    refused(capsys, audit.COUNTS, "found:")


PIPES = ["data/manifest.csv", "data/split.csv", "data/images.npy", audit.COUNTS, FILES[0],
         predictions.record_path_of(SYSTEM)]  # fmt: skip


@pytest.mark.parametrize("path", PIPES, ids=str)
def test_nobody_waits_for_the_other_end_of_a_pipe(place, capsys, path):
    Path(path).unlink()
    os.mkfifo(path)
    signal.alarm(20)  # else the test would wait too
    try:
        refused(capsys, path, "no regular file")
    finally:
        signal.alarm(0)


# --- The review ------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["zeroshot_siglip", "finetune_siglip"])
@pytest.mark.parametrize("how", POISONED)
def test_poisoned_answers_are_not_reviewed(repository, capsys, how, system):
    path = predictions.path_of(system)
    edit, told = POISONED[how]
    change(path, edit)
    message = refusal(capsys, "main")
    assert f"now: {path}" in message
    assert told in message


def side(name="now"):
    """What the review reads of the working directory, but for predictions."""
    return review.read_side(name, {"revision": name}, Path.cwd())


def tables(base, now):
    """All of the report's tables that are filled from files that others wrote."""
    return [
        *(report.tabulate_metrics(file, base, now) for file in review.METRICS),
        report.tabulate_params(base, now),
        report.tabulate_leaks(base, now),
        report.tabulate_curves(base, now),
        report.tabulate_runs(base, now),
    ]


def test_a_manifest_that_lists_an_image_twice_is_not_compared(repository, capsys):
    for name in ("manifest", "split"):
        change(f"data/{name}.csv", lambda table: pd.concat([table, table.iloc[:1]]).sort_values(
            "image_id", kind="stable"))  # fmt: skip
    message = refusal(capsys, "main")
    assert "data/manifest.csv" in message
    assert "doubled" in message


@pytest.mark.parametrize(
    "value", ['"0.9"', "NaN", "Infinity", "[0.9, 0.8]", "null", "true", "1" + "0" * 400]
)
def test_what_is_no_figure_judges_nothing(repository, value):
    path, base = Path("metrics/test.json"), side("base")
    text = re.sub(r'"uar": [\d.]+', f'"uar": {value}', path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    now = side()
    uar, war = review.find(review.judge(SYSTEM, base, now), base, now)
    assert (uar.figure, uar.beyond, uar.cells[1:]) == ("UAR", None, ["–"] * 3)
    assert war.cells[0] == war.cells[1]
    assert f"{SYSTEM}.uar" in [row[0] for row in tables(base, now)[0].rows]


def test_limits_in_the_other_order_are_the_same_limits():
    assert review.fold({"uar_high": 3, "uar": 2, "uar_low": 1}) == {"uar": [2, 1, 3]}


BOMB = "\n".join(
    ["x0: &x0 {a: 1, b: 2}", *(f"x{i}: &x{i} {{a: *x{i - 1}, b: *x{i - 1}}}" for i in range(1, 41))]
)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("params.yaml", BOMB, "more than 100,000 values"),
        ("params.yaml", "a: &a {b: *a}", "deep"),
        ("params.yaml", "a: &a [*a]", "deep"),
        ("params.yaml", "a: " + "[" * 300 + "]" * 300, "deep"),
        ("metrics/test.json", '{"a":' * 200 + "1" + "}" * 200, "deep"),
        ("metrics/test.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "found:"),
        ("metrics/within.json", "[1, 2]", "no mapping, but list"),
        ("metrics/ranking.json", '{"finetune_siglip": "good"}', "no mapping in"),
        ("metrics/runs.json", '{"finetune_siglip": {', "found:"),
        ("metrics/audit.json", "\udcff", "found:"),
        ("dvc.lock", "stages: [", "found:"),
    ],
)
def test_files_without_end_or_sense_are_refused(repository, file, text, told):
    Path(file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        side()
    assert f"now: {file}" in str(error.value)
    assert told in str(error.value)


def test_such_a_file_ends_the_review(repository, capsys):
    Path("params.yaml").write_text(BOMB)
    assert "now: params.yaml" in refusal(capsys, "main")


@pytest.mark.parametrize(
    "lock",
    ["stages: 3", "stages: {a: 3}", "stages: {a: {outs: 3}}", "stages: {a: {outs: [3]}}",
     "stages: {a: {outs: [{path: [1]}]}}", "stages: {a: {outs: [{path: x, md5: {}}]}}", "{}"],
)  # fmt: skip
def test_a_lock_of_another_form_tells_nothing(lock):
    assert review._digests(yaml.safe_load(lock)) in ({}, {"x": "{}"})


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:-9],
        lambda text: text.replace("\n2,", "\n1,"),
        lambda text: text.replace("\n2,", "\n2.5,"),
        lambda text: text.replace("\n2,", "\ninf,"),
        lambda text: text.replace("0.0001", "nan"),
        lambda text: text.replace("epoch", "step"),
        lambda text: "",
    ],
)
def test_a_torn_curve_is_left_out(repository, edit):
    path, base = Path("plots/training.csv"), side("base")
    assert edit(path.read_text()) != path.read_text()
    path.write_text(edit(path.read_text()))
    assert base.curve is not None
    assert side().curve is None
    assert [row[0] for row in report.tabulate_curves(base, side()).rows] == ["base"]


@pytest.mark.parametrize("text", ["", "actual\n", "actual,predicted\nnormal\n", "actual,predicted\n"
                                  "normal,<b>\n", "actual,predicted\n"])  # fmt: skip
def test_a_torn_confusion_is_left_out(repository, text):
    base = side("base")
    Path("plots/confusion_finetune_siglip.csv").write_text(text)
    assert SYSTEM in base.confusions
    assert SYSTEM not in side().confusions
    assert len(report.draw_confusions(SYSTEM, base, side())) == 1


def test_a_system_that_is_gone_is_told(repository):
    content = json.loads(Path("metrics/test.json").read_text())
    del content[SYSTEM]
    write_json("metrics/test.json", content)
    markdown, _ = run("main")
    assert re.search(r"`finetune_siglip` \| \d+ figures \| – \| gone", markdown)
    assert "Only one side has it." in markdown


def test_a_name_of_a_system_leads_nowhere(repository):
    content = json.loads(Path("metrics/test.json").read_text())
    content["../../../etc/passwd"] = content["a;b `c` <i>"] = content[SYSTEM]
    write_json("metrics/test.json", content)
    tool = load_script("tools/review.py")
    now = tool.add_predictions(side(), None, Path.cwd())
    assert set(now.answers) | set(now.absent) == {"zeroshot_siglip", SYSTEM}
    assert "<i>" not in run("main")[1]


@pytest.mark.parametrize("told", [2.5, "2", [2], None, True, 99, {"a": 1}])
def test_an_epoch_that_there_is_not_is_not_the_kept_one(repository, told):
    content = json.loads(Path("metrics/runs.json").read_text())
    content[SYSTEM]["best_epoch"] = told
    write_json("metrics/runs.json", content)
    assert review.kept_epoch(side()) in (1, 2, 3)
    tables(side("base"), side())
