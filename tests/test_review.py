"""The review of a run against a revision, on a small repository made for it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from dvc.repo import Repo
from support import ROOT, load_script, run_in, write_params

from chest import audit, predictions, report, review, scores
from chest.comparison import compare
from chest.dataset import MANIFEST_COLUMNS, read_labelled
from chest.files import write_json, write_table
from chest.intervals import intervals
from chest.labels import LABELS
from chest.metrics import rounded

N = 90  # images, of which 30 test; two of each patient
HOSTILE = "a|b `c` <script>alert(1)</script> \"d'"
SYSTEMS = ("zeroshot_siglip", "finetune_siglip")
PIPELINE = {
    "predict": {
        "cmd": "python model.py",
        "deps": ["model.py"],
        "params": ["seed"],
        "outs": ["data/manifest.csv", "data/split.csv", "data/images.npy",
                 *(f"data/predictions/{system}.csv" for system in SYSTEMS)],
    },
    "evaluate": {
        "cmd": "python evaluate.py",
        "deps": [f"data/predictions/{system}.csv" for system in SYSTEMS],
        "metrics": [{"metrics/test.json": {"cache": False}}],
    },
}  # fmt: skip


# --- A repository and its runs ---------------------------------------------------------------


def write_tables():
    """Manifest, split and images."""
    ids = sorted([*(f"image-{i:02}" for i in range(N - 1)), HOSTILE])
    label = np.repeat(np.resize(LABELS, N // 2), 2)
    table = pd.DataFrame("x", index=range(N), columns=list(MANIFEST_COLUMNS)).assign(
        modality="ct",
        image_id=ids, label=label, collection="ct_slices", site=HOSTILE, pixel_hash=ids,
        patient_id=[f"p{i // 2}" for i in range(N)], path="data/raw/phantom/x.png",
    )  # fmt: skip
    split = ["test"] * 30 + ["train"] * 30 + ["val"] * 30
    write_table("data/manifest.csv", table)
    write_table("data/split.csv", pd.DataFrame({"image_id": ids, "split": split}))
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32)).astype(np.uint8)
    np.save("data/images.npy", images)


def answer(system, wrong):
    """Predictions that are right but for the rows `wrong`; those of the test split come first."""
    table = read_labelled()
    table = table[table["split"].isin(predictions.ANSWERED[system][0])]
    certain = np.eye(3)[table["label"].map(LABELS.index)]
    certain[wrong] = np.roll(certain[wrong], 1, axis=1)
    Path("data/predictions").mkdir(exist_ok=True)
    answers = predictions.tabulate(table, 0.1 + 0.7 * certain)
    write_table(predictions.path_of(system), answers, float_format="%.6f")


def evaluate(systems=SYSTEMS, epoch=1):
    """Metrics and tables of what the `systems` answered, as the stage of that name writes them."""
    labelled = read_labelled()
    figures = {}
    for system in systems:
        table = predictions.read(system, labelled).merge(
            labelled[["image_id", "patient_id"]], on="image_id"
        )
        table = table[table["split"] == "test"].reset_index(drop=True)
        figures[system] = scores.headline(table, intervals(table, 42))
        write_table(f"plots/confusion_{system}.csv", table[["actual", "predicted"]])
    write_json("metrics/test.json", rounded(figures))
    twins = dict.fromkeys((*audit.COUNTED, audit.TWINNED), 0)
    write_json("metrics/audit.json", {"audit": audit.leak_counts(labelled, twins)})
    write_table("metrics/audit.csv", audit.composition(labelled))
    record = {"device": f"CPU {HOSTILE}", "torch": "2.0", "best_epoch": epoch}
    write_json("metrics/runs.json", {system: record for system in systems})
    rows = [[k, 1 / k, 1 / k, 1e-4, 0.5, 0.5 + 0.1 * epoch] for k in (1, 2, 3)]
    write_table("plots/training.csv", pd.DataFrame(rows, columns=predictions.CURVE_COLUMNS))


def commit(message):
    """Record in dvc.lock what is there, and commit what Git tracks."""
    with Repo() as repo:
        repo.commit(force=True)
    run_in(Path.cwd(), "git", "add", "--all")
    run_in(Path.cwd(), "git", "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository with one committed run; its predictions are in DVC's cache too."""
    folder = tmp_path_factory.mktemp("origin")
    run_in(folder, "git", "init", "--quiet", "--initial-branch", "main")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, text in (
            (".dvc/config", "[core]\n    analytics = false\n    autostage = false\n"),
            (".dvc/.gitignore", "/cache\n/tmp\n/config.local\n"),
            (".gitignore", "/data/\n/review/\n"),
            ("dvc.yaml", yaml.safe_dump({"stages": PIPELINE})),
            ("model.py", "# a model\n"),
        ):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(text)
        write_params(folder)
        Path("data").mkdir()
        write_tables()
        answer("zeroshot_siglip", [0, 1])
        answer("finetune_siglip", [2, 3])
        evaluate()
        commit(HOSTILE)
    return folder


@pytest.fixture
def repository(origin, tmp_path, monkeypatch):
    """A copy of that repository, to work in."""
    folder = tmp_path / "repository"
    shutil.copytree(origin, folder)
    monkeypatch.chdir(folder)
    return folder


def run(*arguments):
    """Both reports, Markdown and HTML."""
    load_script("tools/review.py").main([*arguments, "--out", "review"])
    return [Path(f"review/report.{kind}").read_text() for kind in ("md", "html")]


def sides(base="main", head=None):
    tool = load_script("tools/review.py")
    commits = tool.resolve(base), head and tool.resolve(head)
    scratch = Path("scratch")
    folders = scratch / "base", scratch / "now" if head else Path.cwd()
    return tool.read_sides(commits, (base, head or "here"), folders)


def refusal(capsys, *arguments):
    """The message with which the script ends on exit code 1."""
    tool = load_script("tools/review.py")
    with pytest.raises(SystemExit) as end:
        tool.run(lambda: tool.main([*arguments, "--out", "review"]))
    assert end.value.code == 1
    assert not Path("review").exists()
    return capsys.readouterr().err


# --- The report ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviewed(origin, tmp_path_factory):
    """A report on a run in which much has changed: base, Markdown, HTML and the folder."""
    folder = tmp_path_factory.mktemp("changed") / "repository"
    shutil.copytree(origin, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = answers_to_test()
        answer("finetune_siglip", list(range(25)))
        answer("floor_site", [0])
        evaluate(("finetune_siglip", "floor_site"), epoch=2)
        write_json("metrics/within.json", {"floor_site": {"within": {"ct": {"uar": 0.5}}}})
        write_params(folder, **{
            "seed": 43, "prompts.qwen.question": f"{{modality}}\n{HOSTILE}", "split.train": 0.8
        })  # fmt: skip
        markdown, html = run("main")
        after = answers_to_test()
        yield before, after, markdown, html


def answers_to_test():
    return review.of_test(predictions.read("finetune_siglip", read_labelled())).reset_index()


def section(markdown, heading):
    return markdown.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_verdict_is_that_of_the_paired_comparison(reviewed):
    before, after, markdown, html = reviewed
    patient = {image: f"p{i // 2}" for i, image in enumerate(before["image_id"])}
    tables = [t.assign(patient_id=t["image_id"].map(patient)) for t in (before, after)]
    result = compare(*tables, seed=42)
    change = result.uar.change
    assert result.uar.beyond_noise
    row = next(line for line in markdown.splitlines() if "fine-tuned | UAR" in line)
    assert (
        f"| {100 * change.value:+.1f} | {100 * change.low:+.1f} to {100 * change.high:+.1f}" in row
    )
    assert row.endswith("| <strong>yes</strong> |")
    assert "base is better than now by" in section(markdown, "Verdict")
    assert markdown.startswith("# More than noise: SigLIP, fine-tuned: UAR -")
    assert "More than noise: SigLIP, fine-tuned: UAR -" in html


def test_a_system_of_one_side_alone_is_new_or_gone(reviewed):
    _, _, markdown, _ = reviewed
    metrics = section(markdown, "Metrics that changed")
    assert re.search(r"\| `zeroshot_siglip` \| \d+ figures \| – \| gone \|", metrics)
    assert re.search(r"\| `floor_site` \| – \| \d+ figures \| new \|", metrics)
    assert "metrics/within.json: 1" in metrics
    assert section(markdown, "Verdict").count("Only one side has it.") == 2


def test_parameters_that_changed_are_named_with_both_values(reviewed):
    parameters = section(reviewed[2], "Parameters that changed")
    assert "| `seed` | `42` | `43` |" in parameters
    assert "`prompts.qwen.question`" in parameters
    assert "split.train" not in parameters


def test_metrics_that_changed_are_named_with_both_values(reviewed):
    rows = section(reviewed[2], "Metrics that changed").splitlines()
    row = next(row for row in rows if "`finetune_siglip.war`" in row)
    assert re.fullmatch(
        r"\| `\S+` \| 0\.9333 \(.* to .*\) \| 0\.1667 \(.* to .*\) \| -0\.7666 \|", row
    )
    assert not any("_low" in row or "_high" in row for row in rows)


def test_counts_and_curves_stand_side_by_side(reviewed):
    _, _, markdown, html = reviewed
    assert re.search(r"\| COVID-19 \| \d+ → \d+ \|", section(markdown, "Confusion matrices"))
    curves = section(markdown, "Learning curves")
    assert "| base | 3 | 1 | 50.0 % | 60.0 % | 1.0000 |" in curves
    assert "| now | 3 | 2 | 50.0 % | 70.0 % | 0.5000 |" in curves
    assert "Confusion matrix of SigLIP, fine-tuned, base" in html
    assert "Confusion matrix of SigLIP, fine-tuned, now" in html
    assert "base dashed" in html


def test_images_that_changed_their_answer_are_listed_with_both(reviewed):
    before, after, markdown, html = reviewed
    unlike = before.loc[before["predicted"] != after["predicted"], "image_id"]
    listed = section(markdown, "Images that changed their answer")
    assert f"{len(unlike)} of the test split" in listed
    assert "| right before, now wrong | COVID-19 | COVID-19 (0.80 / 0.10 / 0.10) |" in listed
    assert html.count('alt="Image ') == len(unlike) == 23
    # A comment has no room for all of them; the page has.
    assert sum(f"`{image}`" in listed for image in unlike) == report.MOST_ROWS - 1  # and HOSTILE
    assert f"and {23 - report.MOST_ROWS} more in `report.html`" in listed
    assert len(markdown.encode()) < 60_000


def test_stale_stages_are_named(reviewed):
    lock = section(reviewed[2], "Is dvc.lock current?")
    assert "| `predict` | `seed in params.yaml has changed` |" in lock
    assert "`evaluate`" in lock


def test_how_both_came_about_is_told(reviewed):
    told = section(reviewed[2], "How both came about")
    assert "| `best_epoch` | `1` | `2` | <strong>yes</strong> |" in told
    assert "| `torch` | `2.0` | `2.0` |  |" in told


# --- What is not ours is escaped -------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page, and the text of its table cells."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.cells, self.open = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.open, self.cells = True, [*self.cells, ""]

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def test_the_page_is_one_file_that_asks_for_nothing(reviewed):
    page = Page(reviewed[3])
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "background"):
            if key in attributes:
                assert attributes[key].startswith(("#", "data:image/png;base64,")), tag
        assert not any(key.startswith("on") for key in attributes)
    style = reviewed[3].split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_page_is_semantic(reviewed):
    page = Page(reviewed[3])
    targets = {a["id"] for _, a in page.tags if "id" in a}
    links = [a["href"][1:] for t, a in page.tags if t == "a"]
    assert links == [a["id"] for t, a in page.tags if t == "h2"]
    assert set(links) <= targets
    assert all(a.get("scope") in ("row", "col") for t, a in page.tags if t == "th")
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    tables = [k for k, (tag, _) in enumerate(page.tags) if tag == "table"]
    assert all(page.tags[k - 1][1].get("class") == "scroll" for k in tables)


def test_names_and_values_of_others_are_text_in_the_page(reviewed):
    page = Page(reviewed[3])
    assert "<script" not in reviewed[3]
    for shown in (HOSTILE, f"CPU {HOSTILE}", json.dumps(f"{{modality}}\n{HOSTILE}")):
        assert shown in page.cells


def test_names_and_values_of_others_break_no_table_of_the_markdown(reviewed):
    markdown = reviewed[2]
    code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "code", markdown)
    assert "<script" in markdown
    assert "<script" not in code
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "`plain`"),
        ("a|b", r"`a\|b`"),
        ("`", "`` ` ``"),
        ("a``b", "```a``b```"),
        ("a\nb", r"`a\nb`"),
    ],
)
def test_text_of_others_is_one_span_of_code(text, shown):
    assert report._markdown(report.Verbatim(text)) == shown


def test_the_markdown_holds_no_picture(reviewed):
    assert "data:image" not in reviewed[2]
    assert "![" not in reviewed[2]
    with pytest.raises(TypeError, match="no picture"):
        report._markdown(report.Picture("data:", "x"))


# --- What cannot be judged -------------------------------------------------------------------


def said(base, now, system="finetune_siglip"):
    """What is said of the UAR of a system, and the judgement."""
    judgement = review.judge(system, base, now)
    return review.find(judgement, base, now)[0], judgement


def test_without_predictions_separate_intervals_decide_if_they_do_not_overlap(repository):
    answer("finetune_siglip", list(range(25)))
    evaluate()
    commit("Worse")
    shutil.rmtree("data")
    shutil.rmtree(".dvc/cache")
    base, now = sides("HEAD~1")
    finding, judgement = said(base, now)
    assert finding.beyond
    assert "do not even overlap" in finding.said
    assert finding.cells[3] == "–"
    assert "base: data/predictions/finetune_siglip.csv neither in DVC's cache" in judgement.why
    assert "now: data/predictions/finetune_siglip.csv not there" in judgement.why
    # The other system: dvc.lock tells that nothing has changed.
    finding, _ = said(base, now, "zeroshot_siglip")
    assert finding.beyond is False
    assert "the same predictions on both sides" in finding.said


def test_without_predictions_overlapping_intervals_say_nothing(repository):
    answer("finetune_siglip", [4, 5, 6])
    evaluate()
    shutil.rmtree("data")
    finding, _ = said(*sides())
    assert finding.beyond is None
    assert "cannot be judged" in finding.said


def test_without_predictions_another_split_is_not_judged(repository):
    answer("finetune_siglip", list(range(25)))
    evaluate()
    lock = Path("dvc.lock")
    lock.write_text(re.sub(r"(path: data/split.csv\n.*\n\s+md5: )\w+", r"\g<1>0", lock.read_text()))
    shutil.rmtree("data")
    finding, _ = said(*sides())
    assert finding.beyond is None
    assert "not known to be of the same test images" in finding.said


def test_another_split_is_named_and_not_compared(repository):
    table = pd.read_csv("data/split.csv")
    table["split"] = np.roll(table["split"], 2)
    write_table("data/split.csv", table)
    for system in SYSTEMS:
        answer(system, [0])
    evaluate()
    base, now = sides()
    finding, judgement = said(base, now)
    assert judgement.result is None
    assert "2 images only in the first, 2 only in the second" in judgement.why
    assert finding.beyond is None
    # Each with its own interval.
    assert re.fullmatch(r"\d+\.\d % \(\d+\.\d to \d+\.\d\)", finding.cells[1])
    assert review.headline([finding]) == "No difference can be judged."


def test_predictions_that_are_not_those_of_the_metrics_are_not_used(repository):
    answer("finetune_siglip", [7, 8])
    evaluate()
    answer("finetune_siglip", list(range(25)))
    _, judgement = said(*sides())
    assert judgement.result is None
    assert "gives a UAR of" in judgement.why
    assert "not of one run" in judgement.why


def test_a_file_that_changed_is_not_the_one_that_the_lock_names(repository):
    # Its own digest counts: dvc.lock and metrics are those of the base.
    answer("finetune_siglip", list(range(25)))
    finding, judgement = said(*sides())
    assert judgement.result is None
    assert not judgement.alike
    assert finding.beyond is None
    assert "No difference is more than noise" not in review.headline([finding])


def poison(how):
    path = predictions.path_of("finetune_siglip")
    table = pd.read_csv(path)
    if how == "missing":
        table = table.iloc[1:]
    elif how == "doubled":
        table = pd.concat([table, table.iloc[-1:]])
    elif how == "unknown":
        table.loc[29, "image_id"] = "zzz"
    else:
        table.loc[0, "covid19"] = 0.5
    write_table(path, table, float_format="%.6f")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", "1 images missing"),
        ("doubled", "images doubled"),
        ("unknown", "1 that do not belong (image-28, zzz)"),
        ("no sum", "do not add up to 1"),
    ],
)
def test_faulty_predictions_are_refused(repository, capsys, how, named):
    poison(how)
    message = refusal(capsys, "main")
    assert "now: data/predictions/finetune_siglip.csv" in message
    assert named in message


def test_faulty_predictions_of_a_revision_are_refused(repository, capsys):
    poison("no sum")
    commit("Poisoned")
    shutil.rmtree("data")
    assert "base: data/predictions/finetune_siglip.csv" in refusal(capsys, "HEAD")


# --- Revisions -------------------------------------------------------------------------------


def test_a_revision_is_compared_whatever_lies_in_the_working_tree(repository):
    answer("finetune_siglip", [2, 3, 4, 5])
    evaluate()
    commit("Second")
    Path("metrics/test.json").write_text("{}")
    shutil.rmtree("data")
    markdown, html = run("HEAD~1", "--head", "HEAD")
    assert "2 of 30 answers changed: 2 were right and are wrong" in markdown
    assert "Yes: no stage is stale." in markdown
    assert "No thumbnails: data/manifest.csv" in html


def test_it_works_in_a_clone_that_has_no_data(repository, tmp_path, monkeypatch):
    run_in(tmp_path, "git", "clone", "--quiet", str(repository), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    markdown, _ = run("origin/main")
    assert markdown.startswith("# No difference is more than noise.")
    assert "Yes: no stage is stale." in markdown
    assert "Not known without the predictions of both sides." in markdown


def test_an_unknown_revision_is_named(repository, capsys):
    assert "nonsense: no such revision" in refusal(capsys, "nonsense")
    assert "--x: no such revision" in refusal(capsys, "main", "--head=--x")


def test_a_base_without_metrics_is_named(repository, capsys):
    run_in(repository, "git", "rm", "--quiet", "-r", "--cached", "metrics")
    run_in(repository, "git", "commit", "--quiet", "--message", "Without")
    message = refusal(capsys, "HEAD")
    assert "base: metrics/test.json" in message
    assert "name a revision that has been run" in message


def test_all_that_is_damaged_is_listed(repository, capsys):
    Path("metrics/test.json").write_text('{"finetune_siglip": 1}')
    Path("metrics/runs.json").write_text("{")
    Path("params.yaml").write_text("- a list")
    message = refusal(capsys, "main")
    assert "3 problems" in message
    assert all(f"now: {name}" in message for name in
               ("metrics/test.json", "metrics/runs.json", "params.yaml"))  # fmt: skip


def test_what_is_no_repository_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "not a git repository" in refusal(capsys, "main")
    run_in(tmp_path, "git", "init", "--quiet")
    assert "run this in the root of the repository" in refusal(capsys, "main")


def test_a_file_in_the_way_is_named(repository, capsys):
    tool = load_script("tools/review.py")
    with pytest.raises(tool.RepositoryError, match="in the way"):
        tool.main(["main", "--out", "dvc.yaml"])


# --- Thumbnails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "folder", "wanted", "shown", "note"),
    [
        ("phantom", "phantom", None, True, "drawn phantoms"),
        ("phantom", "phantom", False, False, "not asked for"),
        ("study", "study", None, False, "these images show patients"),
        ("study", "study", True, True, "do not publish it, do not commit it"),
        # What lies there is not what params.yaml says.
        ("phantom", "study", None, False, "these images show patients"),
        ("study", "phantom", None, False, "these images show patients"),
    ],
)
def test_thumbnails_show_patients_only_if_told_to(repository, profile, folder, wanted, shown, note):
    write_params(repository, profile=profile)
    path = Path("data/manifest.csv")
    path.write_text(path.read_text().replace("raw/phantom", f"raw/{folder}", 5))
    base, now = sides()
    tool = load_script("tools/review.py")
    pictures, about = tool.read_pictures(wanted, ["image-00"], (base, now), repository)
    assert list(pictures) == (["image-00"] if shown else [])
    assert note in about


def test_a_thumbnail_is_of_the_image_that_was_answered(repository):
    base, now = sides(head="main")
    path = Path("data/manifest.csv")
    table = pd.read_csv(path)
    table.loc[table["image_id"] == "image-00", "pixel_hash"] = "another"
    write_table(path, table)
    tool = load_script("tools/review.py")
    pictures, about = tool.read_pictures(
        None, ["image-00", "image-01"], (base, now), repository / "scratch/now"
    )
    assert list(pictures) == ["image-01"]
    assert "1 are not those in data/images.npy" in about


# --- What it takes for granted ---------------------------------------------------------------


def test_it_knows_every_metrics_file_of_the_pipeline():
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]["metrics"]
    assert {f"metrics/{file}.json" for file in review.METRICS} == {
        path for file in listed for path in file
    }


def test_it_knows_the_columns_of_the_audit(repository):
    assert tuple(audit.composition(read_labelled()).columns) == review.COMPOSITION


def test_limits_belong_to_their_value():
    figures = {"uar_low": 1, "uar": 2, "uar_high": 3, "recall.a": 4, "recall_low.a": 5,
               "recall_high.a": 6, "alone_low": 7}  # fmt: skip
    assert review.fold(figures) == {"uar": [2, 1, 3], "recall.a": [4, 5, 6], "alone_low": [7]}
