"""Is a difference more than noise? Against a slow reference, against chance, and as a tool."""

import json
import math
import shutil
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta
from support import ROOT, load_script, run_in

from chest import predictions
from chest.comparison import compare, mcnemar, points, verdicts
from chest.dataset import MANIFEST_COLUMNS
from chest.errors import InputError, run
from chest.intervals import DRAWS, FEWEST_DRAWS, ResamplingError, intervals
from chest.labels import LABELS

# --- Drawn pairs of systems ------------------------------------------------------------------


def draw_pair(rng, people, first, second, alike=0.0):
    """What two systems of these recalls answered to the images of so many patients a class.

    On the share `alike` of the images, the second answers as the first does.
    """
    n = rng.integers(1, 10, sum(people))
    label = np.repeat(np.repeat(np.arange(len(people)), people), n)
    patient = np.repeat(np.arange(len(n)), n)
    names = np.array(LABELS, dtype=object)
    wrong = []
    for recalls in (first, second):
        mean = np.array(recalls)[label[np.unique(patient, return_index=True)[1]]]
        wrong.append(rng.random(len(label)) >= rng.beta(4 * mean, 4 * (1 - mean))[patient])
    wrong[1] = np.where(rng.random(len(label)) < alike, wrong[0], wrong[1])
    table = pd.DataFrame(
        {
            "image_id": [f"i{k:05}" for k in range(len(label))],
            "split": "test",
            "actual": names[label],
            "patient_id": [f"p{k:04}" for k in patient],
        }
    )
    return tuple(table.assign(predicted=names[(label + own) % len(LABELS)]) for own in wrong)


@pytest.fixture(scope="module")
def pair():
    return draw_pair(np.random.default_rng(2), (30, 25, 15), (0.7, 0.6, 0.5), (0.8, 0.7, 0.5), 0.5)


def test_counts_and_figures_are_those_of_the_answers(pair):
    first, second = pair
    result = compare(first, second, 0)
    right = [(t["actual"] == t["predicted"]).to_numpy() for t in pair]
    assert result.only_first == (right[0] & ~right[1]).sum() > 0
    assert result.only_second == (right[1] & ~right[0]).sum() > 0
    assert result.unlike == (first["predicted"] != second["predicted"]).sum()
    assert result.images == {**first["actual"].value_counts(), "total": len(first)}
    assert result.patients == {"covid19": 30, "normal": 25, "tuberculosis": 15, "total": 70}
    for own, table in (("first", first), ("second", second)):
        alone = intervals(table, 0)
        assert getattr(result.uar, own) == alone.uar.value
        assert getattr(result.war, own) == alone.war.value
        for label in LABELS:
            assert getattr(result.recall[label], own) == alone.recall[label].value
    for each in (result.uar, result.war, *result.recall.values()):
        assert each.change.value == each.second - each.first
        assert each.change.low < each.change.value < each.change.high


def test_limits_are_those_of_the_same_patients_drawn_for_both(pair):
    first, second = pair
    rng = np.random.default_rng(0)
    right = [(t["actual"] == t["predicted"]).to_numpy() for t in pair]
    label = first["actual"].map(LABELS.index).to_numpy()
    rows = first.groupby("patient_id").indices
    strata = [[rows[p] for p in own["patient_id"].unique()] for _, own in first.groupby("actual")]
    plain = []
    for _ in range(1000):
        drawn = [s[i] for s in strata for i in rng.integers(len(s), size=len(s))]
        drawn = np.concatenate(drawn)
        change = right[1][drawn].astype(int) - right[0][drawn]
        recalls = [change[label[drawn] == k].mean() for k in range(len(LABELS))]
        plain.append([np.mean(recalls), change.mean(), *recalls])
    plain = np.quantile(plain, [0.025, 0.975], axis=0).T
    result = compare(first, second, 0, draws=20 * DRAWS)
    for each, limits in zip((result.uar, result.war, *result.recall.values()), plain, strict=True):
        width = each.change.high - each.change.low
        assert [each.change.low, each.change.high] == pytest.approx(limits, abs=0.08 * width)


def test_the_order_of_rows_and_of_systems_does_not_matter(pair):
    first, second = pair
    result = compare(first, second, 0)
    assert compare(first.sample(frac=1, random_state=1), second, 0) == result
    other = compare(second, first, 0)
    for there, back in ((result.uar, other.uar), (result.war, other.war)):
        assert back.change.low == pytest.approx(-there.change.high, abs=1e-9)
        assert back.change.high == pytest.approx(-there.change.low, abs=1e-9)
    assert (other.only_first, other.only_second) == (result.only_second, result.only_first)
    assert other.mcnemar_p == result.mcnemar_p


def test_systems_that_mostly_agree_are_told_apart_more_finely():
    # Two intervals that overlap say little of the difference.
    rng = np.random.default_rng(4)
    first, second = draw_pair(rng, (60, 50, 30), (0.7, 0.7, 0.7), (0.9, 0.9, 0.9), 0.8)
    alone = [intervals(table, 0).uar for table in (first, second)]
    assert alone[0].high > alone[1].low
    result = compare(first, second, 0)
    assert result.uar.beyond_noise
    apart = math.hypot(*[each.high - each.low for each in alone])
    assert result.uar.change.high - result.uar.change.low < 0.7 * apart


def test_chance_is_taken_for_more_than_noise_as_rarely_as_it_should_be():
    rng = np.random.default_rng(6)
    recalls = (0.8, 0.7, 0.6)
    found = np.zeros(2)
    for seed in range(150):
        first, second = draw_pair(rng, (60, 50, 30), recalls, recalls)
        result = compare(first, second, seed, draws=FEWEST_DRAWS)
        found += [result.uar.beyond_noise, result.war.beyond_noise]
    assert (found / 150 >= 0.01).all()
    assert (found / 150 <= 0.11).all()  # 0.05, and two and a half standard errors with 150 pairs


# --- Where nothing varies --------------------------------------------------------------------


def answers_of(*patients):
    """Both tables of patients, each (class, images, right by the first, right by the second)."""
    rows = [
        (label, label if i < a else "unparsed", label if i < b else "unparsed", f"p{k}", f"{k}-{i}")
        for k, (label, images, a, b) in enumerate(patients)
        for i in range(images)
    ]
    table = pd.DataFrame(rows, columns=["actual", "first", "second", "patient_id", "image_id"])
    table["split"] = "test"
    return table.assign(predicted=table["first"]), table.assign(predicted=table["second"])


def test_the_same_answers_differ_by_nothing_give_or_take():
    result = compare(*answers_of(*[(label, 3, 2, 2) for label in LABELS for _ in range(10)]), 0)
    assert result.unlike == result.only_first == result.only_second == 0
    assert result.mcnemar_p == 1
    for each in (result.uar, result.war, *result.recall.values()):
        assert each.change.value == 0
        assert each.change.low < 0 < each.change.high
        assert not each.beyond_noise
    assert verdicts(result) == ["No difference: the same answers to all 90 images."]


@pytest.mark.parametrize("images", [1, 20])
def test_agreement_on_ten_patients_is_no_proof_of_agreement(images):
    mixed = [("covid19", 2, k % 3, (k + 1) % 3) for k in range(30)]
    result = compare(*answers_of(*mixed, *[("normal", images, images, images)] * 10), 0)
    # About what Jeffreys' interval allows to be hidden on either side.
    hidden = beta.ppf(0.975, 0.5, 11)
    normal = result.recall["normal"].change
    assert (normal.value, normal.high) == (0, pytest.approx(hidden, abs=0.05))
    assert normal.low == pytest.approx(-hidden, abs=0.05)


def test_all_against_none_is_no_certainty_either():
    mixed = [("covid19", 2, k % 3, (k + 1) % 3) for k in range(30)]
    result = compare(*answers_of(*mixed, *[("normal", 5, 0, 5)] * 10), 0)
    normal = result.recall["normal"].change
    assert (normal.value, normal.high) == (1, 1)
    assert 0.4 < normal.low < 0.9
    assert result.recall["normal"].beyond_noise
    back = compare(*answers_of(*mixed, *[("normal", 5, 5, 0)] * 10), 0).recall["normal"]
    assert (back.change.value, back.change.low) == (-1, -1)
    assert -0.9 < back.change.high < -0.4


def test_one_patient_proves_nothing():
    result = compare(*answers_of(("normal", 9, 0, 9)), 0)
    assert result.uar.change.value == 1
    assert not result.uar.beyond_noise
    assert result.uar == result.war == result.recall["normal"]


# --- Words and p-values ----------------------------------------------------------------------


def test_mcnemars_test_by_hand():
    assert mcnemar(0, 0) == mcnemar(1, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(6, 1) == mcnemar(1, 6) == pytest.approx(2 * (1 + 7) / 2**7)


def test_the_verdict_names_the_better_one_or_none(pair):
    first, perfect = pair[0], pair[0].assign(predicted=pair[0]["actual"])
    better = compare(first, perfect, 0)
    by = f"{100 * better.uar.change.value:.1f} points"
    uar, war = verdicts(better, ("A", "B"))
    assert uar.startswith(f"UAR: more than noise: B is better than A by {by}, ")
    assert war.startswith("WAR: more than noise: B is better than A by ")
    assert uar.endswith(f"to {points(better.uar.change.high)}) excludes 0.")
    assert f"A is better than B by {by}" in verdicts(compare(perfect, first, 0), ("A", "B"))[0]
    wrong = (first["actual"] != first["predicted"]).idxmax()
    unlike = first.assign(predicted=first["predicted"].mask(first.index == wrong, "unparsed"))
    uar, war = verdicts(compare(first, unlike, 0), ("A", "B"))
    assert uar.startswith("UAR: not more than noise: 0.0 points from A to B, ")
    assert war.endswith(" includes 0.")


def test_points_have_a_sign_but_for_nothing():
    assert [points(x) for x in (0.1234, -0.001, 0.0, -0.0001)] == ["+12.3", "-0.1", "0.0", "0.0"]


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t[5:], r"5 images only in the first, 0 only in the second \(i00000, i00001, i0"),
        (lambda t: t.replace({"image_id": {"i00003": "x"}}), r"1 images only in .*\(i00003, x\)"),
        (lambda t: pd.concat([t, t[:2]]), r"second\n.*more than once \(i00000, i00001\)"),
        (lambda t: t.assign(actual=["covid19", *t["actual"][1:-1], "covid19"]),
         r"first and second\n.*another label of 1 images \(i0"),
        (lambda t: t.assign(patient_id=["q", *t["patient_id"][1:]]),
         r"another patient of 1 images \(i00000\)"),
        (lambda t: t.assign(split="val"), "no answer of test, but of val"),
    ],
)  # fmt: skip
def test_answers_to_other_images_are_refused(pair, change, told):
    first, second = pair
    with pytest.raises(InputError, match=told):
        compare(first, change(second), 0, "test")


def test_all_that_is_unlike_is_told_at_once(pair):
    first, second = pair
    other = second.assign(actual="normal", patient_id="q")
    with pytest.raises(InputError, match=r"2 problems(.|\n)*label(.|\n)*patient"):
        compare(first, other, 0)


def test_unlike_splits_are_compared_on_the_one_that_is_named(pair):
    first, second = pair
    more = pd.concat([second, second.assign(split="val", image_id="v" + second["image_id"])])
    with pytest.raises(InputError, match="name a split that both answered"):
        compare(first, more, 0)
    assert compare(first, more, 0, "test") == compare(first, second, 0)


def test_too_few_draws_are_refused(pair):
    with pytest.raises(ResamplingError, match="10 draws"):
        compare(*pair, 0, draws=10)


# --- The tool --------------------------------------------------------------------------------

N = 90  # images, of which 36 train, 27 val and 27 test


def write_run(folder, seed):
    """A manifest, a split, and drawn answers of two systems, one of which answered val as well."""
    ids = [f"image-{i:03}" for i in range(N)]
    table = pd.DataFrame("x", index=range(N), columns=list(MANIFEST_COLUMNS))
    table = table.assign(
        image_id=ids,
        label=np.resize(LABELS, N),
        patient_id=[f"p{i % 45}" for i in range(N)],
        modality="ct",
    )
    split = np.resize(np.repeat(["train", "test", "val", "train", "test", "val", "train"], 3), N)
    (folder / "data").mkdir(exist_ok=True)
    table.to_csv(folder / "data/manifest.csv", index=False)
    pd.DataFrame({"image_id": ids, "split": split}).to_csv(folder / "data/split.csv", index=False)
    rng = np.random.default_rng(seed)
    for system, splits, skill in (
        ("zeroshot_siglip", ["test"], 0.3), ("finetune_siglip", ["val", "test"], 3)
    ):  # fmt: skip
        chosen = table.assign(split=split)[np.isin(split, splits)]
        sure = rng.random((len(chosen), 3)) + skill * (
            chosen["label"].to_numpy()[:, None] == np.array(LABELS)
        )
        answers = predictions.tabulate(chosen, sure / sure.sum(1, keepdims=True))
        with chdir(folder):
            predictions.write(system, answers, {"seed": seed})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, 1)
    return tmp_path


def printed(capsys, *arguments):
    load_script("tools/compare.py").main(list(arguments))
    return capsys.readouterr().out


def test_a_person_reads_what_differs(place, capsys):
    text = printed(capsys, "zeroshot_siglip", "finetune_siglip")
    count = (pd.read_csv("data/split.csv")["split"] == "test").sum()
    assert f"The test split: {count} images of" in text
    rows = [line.split()[0] for line in text.splitlines() if "%" in line and "to" in line]
    assert rows[:5] == ["UAR", "WAR", "COVID-19", "Normal", "Tuberculosis"]
    assert "UAR: more than noise: finetune_siglip is better than zeroshot_siglip by" in text
    assert "McNemar" in text


def test_a_program_reads_the_same(place, capsys):
    content = json.loads(printed(capsys, "zeroshot_siglip", "finetune_siglip", "--json"))
    tables = [
        table[table["split"] == "test"].assign(
            patient_id=lambda t: [f"p{int(i[-3:]) % 45}" for i in t["image_id"]]
        )
        for table in map(
            pd.read_csv, map(predictions.path_of, ("zeroshot_siglip", "finetune_siglip"))
        )
    ]
    result = compare(*tables, 42)
    assert content["uar"]["change"]["low"] == result.uar.change.low
    assert content["war"]["second"] == result.war.second
    assert content["only_second"] == result.only_second
    assert content["beyond_noise"]["uar"] is True
    assert content["split"] == "test"
    other = json.loads(
        printed(capsys, "zeroshot_siglip", "finetune_siglip", "--json", "--seed", "1")
    )
    assert other["recall"] != content["recall"]


def test_a_file_elsewhere_can_be_compared(place, capsys):
    (place / "kept.old").mkdir()
    shutil.copy(predictions.path_of("finetune_siglip"), "kept.old/run.2.csv")
    text = printed(capsys, "finetune_siglip", "kept.old/run.2.csv", "--split", "all")
    assert text.startswith("First:  finetune_siglip\nSecond: kept.old/run.2.csv\nAll images: ")
    assert text.endswith("No difference: the same answers to all 51 images.\n")


def test_all_bad_input_is_told_at_once(place, capsys):
    path = predictions.path_of("zeroshot_siglip")
    lines = path.read_text().splitlines(keepends=True)
    Path("short.csv").write_text("".join(lines[:-1]))
    Path("twice.csv").write_text("".join([*lines, lines[-1]]))
    tool = load_script("tools/compare.py")
    with pytest.raises(SystemExit) as end:
        run(lambda: tool.main(["short.csv", "twice.csv"]))
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert "2 problems" in message
    assert "short.csv\n    found:    1 images missing" in message
    assert "twice.csv\n    found:    images doubled" in message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["zeroshot_siglip", "finetune_siglp"], "no file data/predictions/finetune_siglp.csv"),
        (["zeroshot_siglip", "none.csv"], "no file none.csv"),
        (["zeroshot_siglip", ":zeroshot_siglip"], "REVISION:SYSTEM"),
        (["zeroshot_siglip", "main:../../secret"], "REVISION:SYSTEM"),
        (["zeroshot_siglip", "main:zeroshot_siglip"], "main\n.*found: .*not a git repository"),
        (["zeroshot_siglip", "finetune_siglip", "--split", "val"], "no answer of val, but of test"),
        (["zeroshot_siglip", "finetune_siglip", "--split", "all"], "only in the second"),
    ],
)
def test_what_cannot_be_compared_is_named(place, arguments, told):
    with pytest.raises(InputError, match=told):
        load_script("tools/compare.py").main(arguments)


# --- Revisions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A repository with two tagged runs and an experiment; the cache has lost the oldest file."""
    folder = tmp_path_factory.mktemp("history")
    run_in(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run_in(folder, "dvc", "init", "--quiet")
    tracked = ["data/manifest.csv", "data/split.csv", "data/predictions"]
    for tag, seed in (("old", 1), ("new", 2)):
        write_run(folder, seed)
        run_in(folder, "dvc", "add", "--quiet", *tracked)
        run_in(folder, "git", "add", "--all")
        run_in(folder, "git", "commit", "--quiet", "--message", tag)
        run_in(folder, "git", "tag", tag)
    write_run(folder, 3)
    run_in(folder, "dvc", "add", "--quiet", *tracked)
    run_in(folder, "dvc", "exp", "save", "--name", "tried-out")
    return folder


def test_runs_of_two_revisions_are_compared(history, capsys, monkeypatch):
    monkeypatch.chdir(history)
    old = printed(capsys, "old:finetune_siglip", "finetune_siglip", "--json")
    new = printed(capsys, "new:finetune_siglip", "tried-out:finetune_siglip", "--json")
    files = {}
    for seed in (1, 2, 3):
        (folder := history / f".tmp-{seed}").mkdir()
        write_run(folder, seed)
        files[seed] = str((folder / predictions.path_of("finetune_siglip")).relative_to(history))
    for text, pair in ((old, (1, 3)), (new, (2, 3))):
        expected = json.loads(printed(capsys, *[files[seed] for seed in pair], "--json"))
        own = json.loads(text)
        assert own["uar"] == expected["uar"]
        assert own["only_first"] == expected["only_first"]


def test_a_revision_that_is_not_known_or_not_there_is_named(history, monkeypatch, tmp_path):
    shutil.copytree(history, tmp_path / "lost")
    monkeypatch.chdir(tmp_path / "lost")
    tool = load_script("tools/compare.py")
    with pytest.raises(InputError, match="unknown Git revision 'older'"):
        tool.main(["older:finetune_siglip", "finetune_siglip"])
    with pytest.raises(InputError, match=r"new:data/predictions/none\.csv(.|\n)*cannot be read"):
        tool.main(["new:none", "finetune_siglip"])
    shutil.rmtree(".dvc/cache")
    with pytest.raises(InputError, match=r"new:data/manifest\.csv(.|\n)*cannot be read from DVC"):
        tool.main(["new:finetune_siglip", "finetune_siglip"])


def test_it_runs_as_a_program(place, capsys):
    # As a person starts it; exit code 1.
    run_in(place, sys.executable, str(ROOT / "tools/compare.py"), "none", "none", fails=True)
    with pytest.raises(SystemExit):
        load_script("tools/compare.py").main(["--help"])
    assert "python tools/compare.py zeroshot_siglip finetune_siglip" in capsys.readouterr().out
