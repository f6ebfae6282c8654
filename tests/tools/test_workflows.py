"""The workflows: what they may do, and that their commands do what they say."""

import json
import os
import re
import shutil
import subprocess
import zipfile

import pytest
import yaml
from support import ROOT

WORKFLOWS = {
    # BaseLoader: in YAML 1.1 the key `on` is a boolean.
    path.name: yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}
JOBS = [(name, job) for name, flow in WORKFLOWS.items() for job in flow["jobs"].values()]
STEPS = [(name, step) for name, job in JOBS for step in job["steps"]]
SCRIPTS = "\n".join(step["run"] for _, step in STEPS if "run" in step)
MARKER = "<!-- the report of review.yml -->"


def step_of(workflow, name):
    return next(step for file, step in STEPS if file == workflow and step.get("name") == name)


# --- What they may do ------------------------------------------------------------------------


def test_every_action_is_pinned_to_a_commit():
    for _, step in STEPS:
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_jobs_have_only_the_rights_they_need():
    assert all(flow["permissions"] == {} for flow in WORKFLOWS.values())
    assert "secrets." not in str(WORKFLOWS)
    for name, job in JOBS:
        comment = {"actions": "read", "pull-requests": "write"}
        assert job["permissions"] == (comment if name == "comment.yml" else {"contents": "read"})
    for _, step in STEPS:
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] == "false"


def test_a_token_that_can_write_runs_no_code_of_a_pull_request():
    triggers = {name: {*flow["on"]} for name, flow in WORKFLOWS.items()}
    assert "pull_request_target" not in set().union(*triggers.values())
    assert [name for name, on in triggers.items() if "workflow_run" in on] == ["comment.yml"]
    for name, step in STEPS:
        if name == "comment.yml":
            assert not re.search(r"\b(git|make|python|pip|source|eval)\b", step["run"])


def test_no_script_holds_an_expression():
    # GitHub puts its value into the script before the shell reads it: a title would be run.
    assert "${{" not in SCRIPTS


def test_only_an_approved_run_reaches_our_own_machine():
    for name, job in JOBS:
        if "self-hosted" in job["runs-on"]:
            assert list(WORKFLOWS[name]["on"]) == ["workflow_dispatch"]
            assert job["environment"] == "study"


def test_no_picture_of_a_patient_is_uploaded(tmp_path):
    charts = ["plots/uar.png", "plots/confusion/a.csv", "metrics/test.json", "review/report.md"]
    private = ["plots/sheets/a.png", "data/images/224.npy", "data/raw/study/a.png"]
    private += ["data/slices/a.png", "models/a/model.safetensors", "data/manifest.csv"]
    for name in [*charts, *private]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    uploads = [s["with"]["path"] for _, s in STEPS if "upload-artifact@" in s.get("uses", "")]
    found = {p.relative_to(tmp_path) for x in "\n".join(uploads).split() for p in tmp_path.glob(x)}
    assert {path.as_posix() for path in found} == {*charts}


def test_what_a_workflow_calls_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets, scripts = (
        re.findall(r"\bmake (\w+)", SCRIPTS),
        re.findall(r"python (\S+\.py)", SCRIPTS),
    )
    assert {*targets} == {"test", "repro", "venv"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert {*scripts} == {"tools/review.py", "tools/stale.py"}
    assert all((ROOT / script).is_file() for script in scripts)


def test_every_lock_is_audited():
    given = re.findall(
        r"--requirement (\S+)", step_of("audit.yml", "Look up every locked package")["run"]
    )
    locks = {path.name for path in ROOT.glob("requirements*.lock")}
    assert locks - {*given} == {"requirements-cpu.lock"}  # another build of what -cuda holds


# --- That their commands do what they say ------------------------------------------------------


def run_step(workflow, name, folder, **env):
    """Run a step's script in `folder` as GitHub does; commands in folder/bin come first."""
    step = step_of(workflow, name)
    options = ["--noprofile", "--norc", "-eo", "pipefail"] if "shell" in step else ["-e"]
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    files = {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "RUNNER_TEMP": str(folder)}
    return subprocess.run(
        ["bash", *options, "-c", step["run"]],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": path, **files, **env},
    )


def command(folder, name, script):
    """Put a command that does `script` before all others of that name."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()


GH = """
path=$(printf '%s\\n' "$@" | grep '^repos/')
if [[ "$*" == *--input* ]]; then
  cp "${@: -1}" posted.json
  echo "$*" > call
else
  cat "answers/$(basename "$path")"
fi
"""


@pytest.fixture
def post(tmp_path):
    """Run the comment's script with a `gh` that answers from files; return what was posted."""
    if missing := [name for name in ("jq", "unzip") if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    command(tmp_path, "gh", GH)
    answers = tmp_path / "answers"
    answers.mkdir()
    artifact = {"name": "review", "size_in_bytes": 900, "id": 3}
    (answers / "artifacts").write_text(json.dumps({"artifacts": [artifact]}))
    head = {"sha": "abc", "repo": {"full_name": "someone/fork"}}
    (answers / "7").write_text(json.dumps({"head": head}))
    (answers / "8").write_text(json.dumps({"head": head | {"sha": "def"}}))

    def post(report="# Report\nby @someone\n", number="7\n", comments=()):
        (answers / "comments").write_text(json.dumps(comments))
        with zipfile.ZipFile(answers / "zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("number", number)
            packed.writestr("report.md", report)
        run = {"RUN": "5", "RUN_PAGE": "https://example.org/5", "HEAD": "someone/fork abc"}
        limits = {"REPOSITORY": "us/chest", "LIMIT": "60000", "MARKER": MARKER, "GH_TOKEN": "none"}
        done = run_step("comment.yml", "Post or replace the comment", tmp_path, **run, **limits)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "evil").exists()
        if not (tmp_path / "posted.json").exists():
            return None, done.stdout
        return json.loads((tmp_path / "posted.json").read_text())["body"], (
            tmp_path / "call"
        ).read_text()

    return post


def test_the_report_becomes_a_comment_that_notifies_nobody(post):
    body, call = post()
    assert body.startswith(f"{MARKER}\n\n# Report\n")
    assert "someone" in body
    assert "@someone" not in body
    assert "POST repos/us/chest/issues/7/comments" in call


def test_the_next_report_replaces_our_own_comment(post):
    bot = {"login": "github-actions[bot]"}
    comments = [
        {"id": 1, "user": {"login": "somebody"}, "body": f"{MARKER} not ours"},
        {"id": 2, "user": bot, "body": "of another workflow"},
        {"id": 3, "user": bot, "body": f"{MARKER}\n\nolder"},
    ]
    assert "PATCH repos/us/chest/issues/comments/3 " in post(comments=comments)[1]


@pytest.mark.parametrize("number", ["8", "../issues/1", "$(touch evil)", ""])
def test_a_report_for_another_pull_request_is_not_posted(post, number):
    body, printed = post(number=number)
    assert body is None
    assert printed.startswith("::notice::The report ")


def test_a_report_of_any_length_and_content_is_text(post):
    text = 'a"b\\`$(touch evil)`ü' * 100_000
    body, _ = post(report=text)
    assert text[:1000] in body
    assert len(body) < 65_536


@pytest.mark.parametrize(("profile", "kept"), [("phantom", True), ("study", False)])
def test_a_page_leaves_the_machine_only_with_phantoms(tmp_path, profile, kept):
    command(tmp_path, "python", 'mkdir review; echo "$*" | tee review/report.md review/report.html')
    (tmp_path / "params.yaml").write_text(f"# Which block\nprofile: {profile}\n")
    done = run_step("review.yml", "Write the report", tmp_path, BASE="main", NUMBER="7")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.md").read_text() == "tools/review.py origin/main\n"
    assert (tmp_path / "review/number").read_text() == "7\n"
    assert (tmp_path / "review/report.html").exists() == kept


@pytest.mark.parametrize("stray", [None, "metrics/test.json", "plots/new.csv"])
def test_results_that_differ_from_the_committed_ones_fail(tmp_path, stray):
    command(tmp_path, "dvc", "true")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "plots").mkdir()
    (tmp_path / "metrics/test.json").write_text("{}")
    me = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "metrics"], [*me, "commit", "-qm", "Results"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    if stray:
        (tmp_path / stray).write_text("other")
    done = run_step("phantoms.yml", "Compare metrics and plots with the committed ones", tmp_path)
    assert done.returncode == (1 if stray else 0)
    assert (stray or "") in done.stdout


def run_study(folder, parameters):
    command(folder, "dvc", 'echo "$*" >> calls')
    (folder / "data/raw").mkdir(parents=True)
    places = {"COLLECTIONS": str(folder), "DVC_CACHE": "/cache"}
    return run_step("study.yml", "Run the study", folder, PARAMETERS=parameters, **places)


def test_the_study_runs_with_the_given_parameters(tmp_path):
    done = run_study(tmp_path, "seed=7 study.finetune_siglip.lr=1.0e-5")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[-1] == (
        "exp run --set-param profile=study --set-param seed=7"
        " --set-param study.finetune_siglip.lr=1.0e-5"
    )


@pytest.mark.parametrize("given", ["seed", "--force", "seed=$(id)", "a=1;id"])
def test_a_parameter_that_is_more_than_a_plain_value_is_refused(tmp_path, given):
    done = run_study(tmp_path, given)
    assert done.returncode == 1
    assert "::error::" in done.stdout
