"""The report on real lungs, from made-up answers whose figures are known."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_runs import FOLDS, write_plan, write_run

from chest.core import parallel
from chest.evaluation.recalibration import SIZES, draw, recalibrate_layer, recalibrate_threshold
from chest.evaluation.repeated import auroc_difference, mean_auroc
from chest.evaluation.roc import auroc
from chest.reporting import results
from chest.reporting.real_runs import RealRuns
from chest.reporting.results_tables import without_impossible

README = "Results\n<!-- real: filled -->\nold\n<!-- /real -->\nend\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two seeds of a system, and an unfinished one; two views of another hospital."""
    into = tmp_path_factory.mktemp("runs")
    planned = []
    for fold in range(FOLDS):
        both = {"protocol": "both", "system": "finetuned", "fold": fold}
        for seed, wrong in ((0, 0.2), (1, 0.4)):
            planned.append(write_run(into, both | {"seed": seed}, wrong))
        shown = {"protocol": "shenzhen", "system": "finetuned", "fold": fold}
        for view, across in (("everything", 1 / 3), ("lungs_crop", 1 / 9)):
            planned.append(write_run(into, shown | {"view": view}, 0.2, across))
        joint = {"protocol": "ct_shenzhen", "system": "finetuned", "fold": fold}
        planned.append(write_run(into, joint, 0.2, 1 / 3))
        films = {"protocol": "films", "system": "finetuned", "fold": fold}
        for variant, wrong in (("", 0.2), ("adversary: site", 0.4)):
            site = {"site_found_xray": 0.9} | ({"discriminator_xray": 0.5} if variant else {})
            planned.append(write_run(into, films | {"variant": variant}, wrong, **site))
    for method, wrong in (("duplicates", 0.4), ("diffusion", 0.2)):
        for seed in range(2):
            tried = shown | {"fold": 0, "part": "synthetic", "variant": f"filled by {method}"}
            planned.append(write_run(into, tried | {"seed": seed, "films": 10}, wrong, 1 / 3))
    unfinished = write_run(into, both | {"seed": 2}, 0.9)
    planned += [unfinished | {"fold": fold, "done": None} for fold in range(FOLDS - 1)]
    planned.append(unfinished)
    write_plan(into, planned)
    (into / "README.md").write_text(README)
    (into / "docs").mkdir()
    pages = [README.replace("real", name) for name in ("synthetic", "synthetic_quality")]
    (into / "docs/synthetic.md").write_text("".join(pages))
    audit = into / "audit/diffusion/10/data/synthetic_audit.json"
    audit.parent.mkdir(parents=True)
    figures = {"kid": 3.5, "kid_sd": 0.5, "precision": 0.1, "recall": 0.2, "probe_auroc": 0.9}
    near = {"n": 157, "near_copies": 4, "near_by_hash": 2, "near_by_features": 3}
    found = near | figures | {"floor": figures | {"kid": 0.25}}
    audit.write_text(json.dumps({"n": 157, "diffusion": {"tuberculosis_xray": found}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "workers", lambda: 1)
        results.report(into, into / "docs", into / "README.md", "python tools/real.py DATA")
    return into


def rows(written, name):
    return pd.read_csv(written / f"docs/results/{name}.csv")


def test_folds_are_pooled_and_seeds_averaged(written):
    table = rows(written, "systems").set_index("place")
    assert [*table.index] == [f"within {x}" for x in ("CT", "X-ray", "Shenzhen", "Montgomery")]
    assert (table["runs"] == 2).all()  # the third seed lacks two folds
    assert table["images"].tolist() == [60, 96, 60, 36]
    assert table.loc["within Shenzhen", "uar"] == pytest.approx(0.7)  # 0.8 and 0.6
    spread = table["uar_high"] - table["uar_low"]
    assert (spread > 0.2).all()  # the noise of the seeds is in it


def test_differences_to_another_hospital_are_paired(written):
    table = rows(written, "views").set_index(["place", "view"])
    whole = table.loc[("Shenzhen to Montgomery", "Whole image")]
    lungs = table.loc[("Shenzhen to Montgomery", "Lungs, cropped and stretched")]
    assert (whole["images"], whole["runs"]) == (36, FOLDS)
    assert whole["uar"] == pytest.approx(2 / 3, abs=1e-4)
    assert lungs["uar_change"] == pytest.approx(2 / 9, abs=1e-4)
    assert lungs["uar_change_low"] > 0
    assert lungs["auroc_change"] == pytest.approx(2 / 9, abs=1e-4)
    assert np.isnan(whole["uar_change"])
    # The threshold comes from validation, where every fifth diseased film has a low score.
    assert table.loc[("within Shenzhen", "Whole image"), "sensitivity"] == 1


def test_each_setting_is_compared_with_the_rule_wherever_it_was_tested(written):
    table = rows(written, "helps").set_index(["place", "setting"])
    cropped = table.xs("lungs, cropped and stretched", level="setting")
    assert cropped["auroc_change"].to_dict() == {
        "within Shenzhen": 0,
        "Shenzhen to Montgomery": pytest.approx(2 / 9, abs=1e-4),
    }
    adversary = table.loc[("within X-ray", "adversary: site")]
    assert adversary["uar_change"] == pytest.approx(-0.2, abs=0.02)  # rounded in each fold
    assert (adversary["discriminator"], adversary["site_found"]) == (0.5, 0.9)
    masked = table.loc[("within CT", "head masked at inference")]
    assert (masked["trainings"], masked["uar_change"]) == (FOLDS, 0)
    assert np.isnan(masked["validated"])  # no other training, so nothing to choose
    page = (written / "docs/results.md").read_text()
    assert "### Trained on films of both hospitals" in page
    assert (
        "tested 1 times in a hospital never seen: 1 (lungs, cropped and stretched, Shenzhen to"
        in page
    )
    assert "| within X-ray | as it is (chosen) |" in page


def test_a_masked_head_answers_with_a_class_of_the_modality(written):
    run = RealRuns(written).find(protocol="ct_shenzhen")[0]
    impossible = run.answers.assign(predicted="tuberculosis", tuberculosis=0.9)
    masked = without_impossible(replace(run, answers=impossible)).answers
    ct = masked[masked["modality"] == "ct"]
    assert {*ct["predicted"]} == {"covid19", "normal"}
    assert {*masked[masked["modality"] == "xray"]["predicted"]} == {"tuberculosis"}


def test_what_fills_up_few_films_is_compared_with_duplicates(written):
    table = rows(written, "synthetic").set_index(["place", "filled"])
    within, across = (table.loc[place] for place in ("within Shenzhen", "Shenzhen to Montgomery"))
    assert [*within.index] == ["duplicates", "a diffusion model"]
    assert (table["runs"] == 2).all()
    assert [*within["images"], *across["images"]] == [20, 20, 36, 36]
    assert within.loc["a diffusion model", "uar_change"] == pytest.approx(0.2)
    assert across.loc["a diffusion model", "uar_change"] == 0
    assert np.isnan(within.loc["duplicates", "uar_change"])
    page = (written / "docs/synthetic.md").read_text()
    assert "| within Shenzhen | 10 | a diffusion model | 2 |" in page
    assert "| 10 | a diffusion model | 157 | 4 | 3.50 ± 0.50 (real 0.25) |" in page
    assert (written / "docs/results/synthetic.png").exists()


def test_the_page_states_limits_first_and_what_is_missing(written):
    page = (written / "docs/results.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings[0] == "## What must not be concluded"
    assert "Not run yet: the systems within CT and within X-ray, pretraining" in page
    assert "tested in Montgomery, the fine-tuned network reaches 0.667" in page
    assert "| made | 22 of 24 | 0.22 |" in page
    for chart in ("views", "scores", "systems"):
        assert f"results/{chart}.png" in page
        assert (written / f"docs/results/{chart}.png").exists()
    assert "starved.png" not in page


def test_the_readme_gets_the_lines_between_its_marks(written):
    text = (written / "README.md").read_text()
    assert text.startswith("Results\n<!-- real: filled -->\n- ")
    assert text.endswith("<!-- /real -->\nend\n")
    assert "earlier lines" not in text


def answers(right: float, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    truth = np.arange(120) % 2 == 1
    score = 1 / (1 + np.exp(-(right * (truth - 0.5) + rng.normal(size=120))))
    return pd.DataFrame(
        {
            "image_id": [f"i{n:03}" for n in range(120)],
            "patient_id": np.arange(120),
            "modality": "xray",
            "actual": np.where(truth, "tuberculosis", "normal"),
            "covid19": 0.0,
            "normal": 1 - score,
            "tuberculosis": score,
        }
    )


def test_the_auroc_of_one_run_is_that_of_the_field_and_several_add_their_noise():
    one = answers(1.0, 0)
    truth = (one["actual"] == "tuberculosis").to_numpy()
    single = auroc(one["patient_id"], truth, one["tuberculosis"].to_numpy(), seed=1)
    assert mean_auroc([one], "xray", seed=1) == single
    several = [one, answers(0.2, 1), answers(2.0, 2)]
    found = mean_auroc(several, "xray", seed=1)
    assert found.high - found.low > 1.2 * (single.high - single.low)
    change = auroc_difference([one], [answers(4.0, 0)], "xray", seed=1)
    assert change.change.low > 0
    assert auroc_difference(several, several[::-1], "xray", seed=1).change.value == pytest.approx(0)


def test_a_few_labelled_images_move_a_shifted_threshold_back():
    one = answers(3.0, 0)
    truth = (one["actual"] == "tuberculosis").to_numpy()
    shifted = one["tuberculosis"].to_numpy() ** 4  # nearly all below 1/2
    found = recalibrate_threshold(truth, shifted, seed=0).groupby("labelled").mean()
    assert list(found.index) == [0, *SIZES]
    assert found.loc[50, "uar"] > found.loc[0, "uar"] + 0.1
    assert found["auroc"].between(0.9, 1).all()  # the order stays


def test_a_few_labelled_images_teach_a_linear_layer_the_new_hospital():
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2 == 1
    signal = truth[:, None] * 2.0 - 1
    old = np.hstack([signal, -signal]) + rng.normal(size=(200, 2))
    new = np.hstack([signal, 3 * signal]) + rng.normal(size=(200, 2))  # the second one turns round
    found = recalibrate_layer((old, truth), (new, truth), np.full(200, 0.5), c=1.0, seed=0)
    found = found.groupby("labelled")["uar"].mean()
    assert found[50] > max(0.8, found[5])


def test_drawn_images_have_both_classes_and_grow():
    truth = np.arange(60) < 3
    drawn = {(size, number): rows for size, number, rows in draw(truth, seed=0)}
    assert all(len(rows) == size for (size, _), rows in drawn.items())
    assert all(truth[rows].any() and not truth[rows].all() for rows in drawn.values())
    assert {*drawn[5, 0]} < {*drawn[20, 0]}
