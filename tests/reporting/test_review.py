"""The review of one revision against another, from what Git tracks alone."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from answers import a_system, write_run
from support import commit, load_script, run_in, write_params

from chest.core.errors import ChestError
from chest.evaluation.comparison import Difference
from chest.evaluation.intervals import Interval
from chest.reporting.report import judgement
from chest.reporting.review import Change

PIPELINE = """
stages:
  evaluate:
    cmd: python evaluate.py
    deps:
      - evaluate.py
    outs:
      - metrics/test.json:
          cache: false
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Make a repository whose first commit has the systems tuned and other."""
    folder = tmp_path_factory.mktemp("template")
    write_params(folder, **{"evaluation.primary": "tuned"})
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "evaluate.py").write_text("")
    run_in(folder, "git", "init", "--quiet")
    run_in(folder, "dvc", "init", "--quiet")
    write_run(folder, a_system("tuned", wrong=30), a_system("other", wrong=10))
    commit(folder)
    return folder


@pytest.fixture
def repository(template, tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


def reviewed(*arguments):
    load_script("tools/review.py").main([*arguments])
    return Path("review/report.md").read_text(), Path("review/report.html").read_text()


def rows_of(report, word):
    return [line for line in report.splitlines() if line.startswith("| ") and word in line]


def test_a_planted_difference_is_more_than_noise(repository):
    write_run(repository, a_system("tuned", wrong=5), a_system("other", wrong=10))
    report, page = reviewed("HEAD")
    assert report.startswith(
        "# More than noise: Tuned: UAR within CT +20.8 points; Tuned: UAR within X-ray"
        " +20.8 points. Exploratory: 2 more than noise.\n"
    )
    primary = rows_of(report, "primary")
    assert ["UAR within CT" in row for row in primary] == [True, False]
    assert all("| +20.8 |" in row and "| primary | yes | 0.0020 (Holm) |" in row for row in primary)
    assert len(rows_of(report, "exploratory")) == 2
    assert "The same answers as before: Other." in report
    assert "one training run: its own noise is not in the interval" in report.lower()
    assert page.count("<img") == 1  # confusion matrices; the learning curves are the same


def test_a_verdict_against_the_interval_is_explained():
    barely = Difference(0.5, 0.6, Interval(0.1, 0.01, 0.2), p=0.04)
    change = Change("s", "test", "UAR within CT", barely, primary=True, p=0.08)
    assert judgement(change) == ["primary", "no, after Holm's correction", "0.0800 (Holm)"]
    explored = Change("s", "test", "UAR", barely, primary=False, p=0.04)
    assert judgement(explored) == ["exploratory", "yes", "0.0400"]


def test_the_same_answers_are_no_difference(repository):
    write_run(repository, a_system("tuned", wrong=30), a_system("other", wrong=10), uar=0.91)
    report, _ = reviewed("HEAD")
    assert report.startswith("# No primary difference is more than noise.")
    assert all("| 0.0 |" in row and "| primary | no |" in row for row in rows_of(report, "primary"))
    assert "tuned.uar | 0.9 | 0.91 | +0.01" in report
    assert "uar\\_low" not in report


def test_new_and_gone_systems_are_named(repository):
    write_run(repository, a_system("tuned", wrong=30), a_system("newest"))
    report, page = reviewed("HEAD")
    assert "Newest is new." in report
    assert "Other is gone." in report
    assert "Newest" in page


def test_other_test_images_cannot_be_compared(repository):
    write_run(repository, a_system("tuned", patients=100), a_system("other", wrong=10))
    report, _ = reviewed("HEAD")
    assert "Tuned, test: cannot be compared: 80 images only in the first" in report
    assert "The primary comparisons could not be made." in report.splitlines()[0]


def test_two_commits_are_compared_without_touching_the_working_tree(repository):
    write_run(repository, a_system("tuned", wrong=5), a_system("other", wrong=10), val=0.9)
    write_params(repository, **{"evaluation.primary": "tuned", "seed": 7})
    commit(repository)
    write_run(repository, a_system("tuned", wrong=100))
    report, page = reviewed("HEAD~1", "--head", "HEAD")
    assert "+20.8" in report
    assert "| seed | 42 | 7 | -35 |" in report
    assert page.count("<img") == 2  # the learning curves, too
    assert "Epoch" not in report


def test_further_runs_bring_in_the_noise_of_training(repository):
    for wrong in (25, 1, 2, 45):
        write_run(repository, a_system("tuned", wrong=wrong), a_system("other", wrong=10))
        commit(repository)
    report, _ = reviewed("HEAD~4", "--head", "HEAD~3")
    assert all("| +4.2 |" in row for row in rows_of(report, "primary"))
    several, _ = reviewed("HEAD~4", "--head", "HEAD~3", "--runs", "HEAD~2", "HEAD~1", "HEAD")
    widths = [
        float(rows_of(text, "primary")[0].split(" | ")[10].strip("| "))
        for text in (report, several)
    ]
    assert widths[1] > 2 * widths[0]


def test_a_language_model_that_does_not_look_is_told(repository):
    _, page = reviewed("HEAD")
    assert "<p>This run has none.</p>" in page
    write_controls({"ct": 0.2, "xray": -0.1})
    report, page = reviewed("HEAD")
    assert "Tuned: Within CT it is better than without its image" in report
    assert "Within X-ray it is not shown to be better than without its image" in report
    assert "**" not in page
    assert "The declared prior: Tuned: no prior." in report
    shown = "| Tuned | within CT | 80.0 % (70.0 to 90.0) | 60.0 % (50.0 to 70.0) |"
    assert rows_of(report, "70.0 to 90.0")[0].startswith(shown)
    assert "| Tuned | within X-ray | 50.0 % | 50.0 % | 20.0 % | 10.0 % | 12.5 % |" in report


def write_controls(gain_low):
    """Write plots/controls.csv of the system tuned, with the lower limit of what an image gains."""
    conditions = {"asked": 0.0, "no_image": 0.5, "other_image": 0.5, "paraphrase_1": 0.1}
    conditions |= {"order_a": 0.1, "order_b": 0.3, "prior_none": 0.0, "prior_content_free": 0.2}
    rows = [
        {"modality": modality, "condition": name, "changed": changed, "gain_low": low}
        | {"uar": 0.6 + 0.2 * (name == "asked"), "covered": 0.125}
        for modality, low in gain_low.items()
        for name, changed in conditions.items()
    ]
    table = pd.DataFrame(rows).assign(system="tuned", split="test")
    table = table.assign(uar_low=table["uar"] - 0.1, uar_high=table["uar"] + 0.1)
    table.to_csv("plots/controls.csv", index=False)


def test_stale_stages_and_leaks_are_told(repository):
    report, _ = reviewed("HEAD")
    assert "| evaluate | not in dvc.lock |" in report
    assert "dvc.lock is not current" in report
    assert "Identical images in more than one split: 2." in report
    assert "Phantom run" in report


def test_the_page_is_one_file_and_foreign_text_is_escaped(repository):
    evil = "a|<script>@team"
    write_run(repository, a_system("tuned", wrong=5), **{evil: 1})
    run_in(repository, "git", "branch", evil.replace("|", "-"))
    report, page = reviewed(evil.replace("|", "-"))
    assert "<script>" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,|#)|url\(|https?:", page)
    assert "default-src 'none'" in page
    assert "tuned.a\\|\\<script\\>@team" in report
    assert "<script>" not in report


def test_thumbnails_are_shown_of_phantoms_only(repository, monkeypatch):
    review = load_script("tools/review.py")
    system = a_system("tuned", wrong=5)
    write_run(repository, system, a_system("other", wrong=10))
    table = system.answers[["image_id"]].assign(path="data/raw/phantom/a.png")
    images = np.zeros((len(table), 16, 16), np.uint8)
    data = type("Data", (), {"table": table, "images": images})
    monkeypatch.setattr(review, "read_dataset", lambda: data)
    _, page = reviewed("HEAD")
    assert page.count('alt="Image image_') == 100
    data.table = table.assign(path="data/raw/study/a.png")  # the profile still says phantom
    _, page = reviewed("HEAD")
    assert "No thumbnails: these images show patients." in page
    assert 'alt="Image' not in page
    assert page.count('alt="Image') == 0
    _, page = reviewed("HEAD", "--thumbnails")
    assert "do not publish it" in page


def test_an_unknown_revision_is_named(repository):
    with pytest.raises(ChestError, match="nowhere"):
        reviewed("nowhere")
