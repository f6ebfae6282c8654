"""The pipeline through DVC itself, as it is committed and as it runs."""

import ast
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from documents import commands
from PIL import Image
from support import BESIDE, ROOT, copy_repository, run_in
from test_privacy import leaks_of

from chest.floors import FLOORS
from chest.labels import LABELS
from chest.params import load_params
from chest.systems import SYSTEMS

PIPELINES = ("dvc.yaml", "data/dvc.yaml")
REAL = BESIDE / "real"


def stages(pipeline):
    return yaml.safe_load((ROOT / pipeline).read_text())["stages"]


STAGES = [(pipeline, name) for pipeline in PIPELINES for name in stages(pipeline)]


# --- As it is committed ----------------------------------------------------------------------


def modules_of(script: Path) -> set[str]:
    """The files of chest/ that a script imports, and those that these import."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "chest":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chest."):
            names = [node.module.split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("chest.")]
        else:
            continue
        found |= {f"chest/{name}.py" for name in names}
    return found.union(*(modules_of(ROOT / module) for module in found))


@pytest.mark.parametrize(("pipeline", "name"), STAGES)
def test_the_deps_of_a_stage_are_what_it_imports(pipeline, name):
    stage = stages(pipeline)[name]
    folder = (ROOT / pipeline).parent
    deps = [(folder / dep).resolve() for dep in stage["deps"] if "${" not in dep]
    code = {path.relative_to(ROOT).as_posix() for path in deps if path.suffix == ".py"}
    assert len(deps) == len(set(deps))
    script = folder / stage["cmd"].removeprefix("python ")
    assert code == {script.relative_to(ROOT).as_posix(), *modules_of(script)}


def test_evaluate_reads_and_draws_every_system():
    # What DVC does not know of it neither makes again nor brings back.
    evaluate = stages("dvc.yaml")["evaluate"]
    written = {name for out in evaluate["outs"] if isinstance(out, dict) for name in out}
    plotted = {name for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
               for name in plot}  # fmt: skip
    for system in SYSTEMS:
        for ending in ("csv", "json"):
            assert f"data/predictions/{system}.{ending}" in evaluate["deps"]
        assert f"plots/confusion_{system}.csv" in written
        assert f"confusion_{system}" in plotted


def test_every_stage_script_is_a_stage():
    named = {name for pipeline, name in STAGES if pipeline == "dvc.yaml"}
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == named


def test_expensive_stages_have_cached_outs_only():
    # One out that is not cached switches DVC's run cache off for its whole stage.
    for pipeline, name in STAGES:
        stage = stages(pipeline)[name]
        plain = all(isinstance(out, str) for out in stage["outs"])
        assert plain or name == "evaluate"


def test_what_shows_images_is_ignored_by_git():
    shown = ["data/images.npy", "data/slices/a.png", "data/raw/study/a.png", "plots/sheets/a.png"]
    ignored = run_in(ROOT, "git", "check-ignore", "--no-index", *shown)
    assert ignored.split() == shown


def test_every_parameter_that_a_stage_tracks_exists():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, stage in stages("dvc.yaml").items():
        for key in stage.get("params", []):
            for profile in ("study", "phantom"):
                value = content
                for part in key.replace("${profile}", profile).split("."):
                    assert part in value, f"{name}: {key}"
                    value = value[part]


def test_in_a_fresh_clone_nothing_is_to_be_done(tmp_path):
    clone = copy_repository(tmp_path)
    assert not (clone / "data" / "images.npy").exists()
    printed = run_in(clone, "dvc", "repro", "--dry", "--allow-missing")
    assert "Running stage" not in printed
    assert "Data and pipelines are up to date." in printed


def test_that_check_notices_a_change(tmp_path):
    # Otherwise the test above could not fail.
    clone = copy_repository(tmp_path)
    with open(clone / "chest" / "siglip.py", "a") as file:
        file.write("# changed\n")
    # DVC stops at the first stage that it can not look into without data.
    printed = run_in(clone, "dvc", "repro", "--dry", "--allow-missing", fails=None)
    assert "Stage 'zeroshot_qwen' didn't change" in printed
    assert "Stage 'zeroshot_siglip' didn't change" not in printed
    assert "Data and pipelines are up to date." not in printed


# --- As it runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A clone in which `dvc repro` ran from nothing, without network; its outputs are there."""
    clone = copy_repository(tmp_path_factory.mktemp("reproduced"))
    attempts = tmp_path_factory.mktemp("network") / "attempts"
    run_in(clone, "dvc", "repro", network=attempts)
    assert attempts.read_text() == ""
    run_in(clone, "git", "add", "--all")
    run_in(clone, "git", "commit", "--quiet", "--allow-empty", "--message", "Reproduced here")
    return clone


def test_the_phantoms_are_told_apart(reproduced):
    metrics = json.loads((reproduced / "metrics/test.json").read_text())
    assert set(metrics) == set(SYSTEMS)
    assert metrics["finetune_siglip"]["uar"] >= 0.85
    assert metrics["finetune_siglip"]["recall"]["tuberculosis"] >= 0.7
    runs = json.loads((reproduced / "metrics/runs.json").read_text())
    for system, run in runs.items():
        assert run["weights"] == ("none" if system in FLOORS else "random")


def test_the_phantoms_are_as_uneven_as_the_study(reproduced):
    manifest = pd.read_csv(reproduced / "data/manifest.csv")
    split = pd.read_csv(reproduced / "data/split.csv")["split"]
    counts = manifest["label"].value_counts()
    assert counts["tuberculosis"] <= counts["covid19"] / 10
    sick = manifest[(manifest["label"] == "tuberculosis") & (split == "test")]
    assert sick["patient_id"].nunique() >= 8
    moscow = manifest["site"] == "Municipal Hospitals in Moscow"
    assert moscow[(manifest["label"] == "normal") & (manifest["modality"] == "ct")].mean() > 0.6


def test_what_is_drawn_is_small(reproduced):
    files = [path for path in (reproduced / "data").rglob("*") if path.is_file()]
    made = [p for p in files if {"raw", "checkpoints"} & set(p.relative_to(reproduced).parts)]
    assert sum(path.stat().st_size for path in made) < 80e6


def test_predictions_answer_the_test_split(reproduced):
    split = pd.read_csv(reproduced / "data/split.csv").set_index("image_id")["split"]
    for system in SYSTEMS:
        table = pd.read_csv(reproduced / f"data/predictions/{system}.csv")
        due = {"test"} if system.startswith("zeroshot_") else {"val", "test"}
        assert list(table["image_id"]) == sorted(split.index[split.isin(due)])
        assert (table[list(LABELS)].sum(axis=1) - 1).abs().max() < 1e-5


def test_a_second_run_has_nothing_to_do(reproduced):
    assert "Running stage" not in run_in(reproduced, "dvc", "repro")


TOOLS = [
    command.text
    for command in commands(ROOT / "README.md")
    if command.text.startswith("python tools/") and not command.reason
]


@pytest.mark.parametrize("command", TOOLS)
def test_what_the_readme_says_of_the_tools_works(reproduced, command):
    assert run_in(reproduced, "bash", "-c", command).strip()


def test_the_review_and_the_explanation_are_there(reproduced):
    for path in ("review/report.html", "review/report.md", "seen"):
        assert (reproduced / path).exists()
    assert run_in(reproduced, "git", "status", "--porcelain", "review") == ""


def test_another_run_from_nothing_gives_the_same_bytes(reproduced):
    locks = [reproduced / "dvc.lock", reproduced / "data" / "dvc.lock"]
    before = [lock.read_text() for lock in locks]
    run_in(reproduced, "dvc", "repro", "--force", "--no-run-cache")
    assert [lock.read_text() for lock in locks] == before


def test_an_experiment_changes_what_it_names_and_can_be_compared(reproduced):
    change = "prompts.siglip.tuberculosis=['a picture of lungs']"
    printed = run_in(reproduced, "dvc", "exp", "run", "--name", "worded", "--set-param", change)
    assert "Running stage 'zeroshot_siglip'" in printed
    assert "Running stage 'finetune_siglip'" not in printed
    diff = run_in(reproduced, "dvc", "metrics", "diff", "--md", "HEAD")
    assert "zeroshot_siglip.uar" in diff
    assert "finetune_siglip.uar" not in diff
    run_in(reproduced, "dvc", "plots", "diff", "HEAD", "--out", "compared")
    page = (reproduced / "compared" / "index.html").read_text()
    for name in (*(f"confusion_{system}" for system in SYSTEMS), "recall", "validation", "loss"):
        assert name in page
    run_in(reproduced, "git", "checkout", "--quiet", "--force", ".")
    run_in(reproduced, "dvc", "checkout")


def test_a_learning_rate_from_the_command_line_arrives_as_a_number(reproduced):
    # DVC writes 1e-05, which PyYAML would read as a string.
    run_in(reproduced, "dvc", "exp", "run", "--name", "typed", "split", "--single-item",
           "--set-param", "study.finetune_siglip.lr=1e-5")  # fmt: skip
    assert "lr: 1e-05" in (reproduced / "params.yaml").read_text()
    assert load_params(reproduced / "params.yaml").study.finetune_siglip.lr == 1e-5
    run_in(reproduced, "git", "checkout", "--quiet", "--force", ".")


@pytest.mark.parametrize(
    ("stage", "damaged"),
    [("evaluate", "data/predictions/zeroshot_siglip.csv"), ("audit", "data/split.csv")],
)
def test_what_a_refused_stage_had_written_is_still_there(reproduced, stage, damaged):
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics")
        for out in stages("dvc.yaml")[stage].get(kind, [])
    ]
    before = {path: path.read_bytes() for path in files_of(reproduced, outs)}
    path = reproduced / damaged
    content = path.read_text()
    path.unlink()  # DVC may have made it a link into its cache
    path.write_text(content.rsplit("\n", 2)[0] + "\n")
    assert "ERROR" in run_in(reproduced, "dvc", "repro", "--single-item", stage, fails=True)
    # DVC removes what it can bring back; what it cannot, the stage keeps.
    run_in(reproduced, "dvc", "checkout", "--force")
    assert {path: path.read_bytes() for path in files_of(reproduced, outs)} == before
    assert run_in(reproduced, "git", "status", "--porcelain", "--untracked-files=no") == ""


def files_of(folder, outs):
    paths = [folder / out for out in outs]
    return sorted({file for path in paths for file in (path, *path.rglob("*")) if file.is_file()})


def test_a_parameter_that_cannot_be_is_refused(reproduced):
    printed = run_in(reproduced, "dvc", "exp", "run", "--set-param",
                     "phantom.finetune_siglip.warmup_steps=99999", fails=True)  # fmt: skip
    assert "99999, but the whole training has only" in printed
    run_in(reproduced, "git", "checkout", "--quiet", "--force", ".")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images in {REAL}")
def test_real_images_go_in_without_a_hand_on_them(reproduced):
    (reproduced / "data/raw/study").symlink_to(REAL)
    checkpoint = "data/checkpoints/phantom"
    run_in(
        reproduced, "dvc", "exp", "run", "--name", "real",
        "--set-param", "profile=study",
        "--set-param", "study.expected_counts=null",
        "--set-param", f"study.zeroshot_qwen.checkpoint={checkpoint}/qwen",
        "--set-param", f"study.zeroshot_siglip.checkpoint={checkpoint}/siglip",
        "--set-param", f"study.finetune_siglip.checkpoint={checkpoint}/siglip",
        "--set-param", "study.finetune_siglip.lr=1e-3",
        "--set-param", "study.finetune_siglip.warmup_steps=10",
        "--set-param", "study.finetune_siglip.epochs=5",
    )  # fmt: skip
    manifest = pd.read_csv(reproduced / "data/manifest.csv")
    counts = manifest.groupby(["collection", "label"]).size().to_dict()
    assert counts == {
        ("ct_slices", "covid19"): 120,
        ("ct_slices", "normal"): 90,
        ("ct_volumes", "covid19"): 2,
        ("ct_volumes", "normal"): 2,
        ("xrays", "normal"): 60,
        ("xrays", "tuberculosis"): 60,
    }
    assert not manifest["path"].str.contains("3CAP").any()
    split = pd.read_csv(reproduced / "data/split.csv")["split"]
    assert split.groupby(manifest["patient_id"]).nunique().max() == 1
    metrics = json.loads((reproduced / "metrics/test.json").read_text())
    assert metrics["finetune_siglip"]["uar"] > 0.4  # better than any answer given to all
    for name in ("plots/confusion.png", "plots/sheets/contact_sheet.png"):
        with Image.open(reproduced / name) as picture:
            assert picture.width > 700
    # Real pictures show patients.
    tracked = run_in(reproduced, "git", "ls-files", "plots", "data", "models")
    assert "sheets" not in tracked
    assert "raw/study" not in tracked
    assert leaks_of(reproduced, REAL) == []
