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
from test_privacy import CHARTS

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MARKER = "<!-- the report of review.yml -->"


def load(name):
    # BaseLoader: in YAML 1.1 the key `on` is a boolean.
    text = (ROOT / ".github/workflows" / name).read_text(encoding="utf-8")
    return yaml.load(text, yaml.BaseLoader)


JOBS = [(path.name, job) for path in WORKFLOWS for job in load(path.name)["jobs"].values()]
STEPS = [(name, step) for name, job in JOBS for step in job["steps"]]
SCRIPTS = [(name, step["run"]) for name, step in STEPS if "run" in step]


# --- What they may do ------------------------------------------------------------------------


def test_every_action_is_pinned_to_a_commit_that_names_its_version():
    used = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line]
    assert len(used) == sum("uses" in step for _, step in STEPS) > 0
    for line in used:
        assert re.fullmatch(r"\s*- uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_a_job_has_no_more_rights_than_it_needs():
    for path in WORKFLOWS:
        assert load(path.name)["permissions"] == {}
    for name, job in JOBS:
        if name == "comment.yml":
            assert job["permissions"] == {"actions": "read", "pull-requests": "write"}
        else:
            assert job["permissions"] == {"contents": "read"}


def test_what_may_write_runs_nothing_of_a_pull_request():
    triggers = {path.name: set(load(path.name)["on"]) for path in WORKFLOWS}
    assert "pull_request_target" not in set().union(*triggers.values())
    assert [name for name, on in triggers.items() if "workflow_run" in on] == ["comment.yml"]
    for name, step in STEPS:
        if name == "comment.yml":
            assert "uses" not in step
            assert not re.search(r"\b(git|make|python|pip|source|eval)\b", step["run"])


def test_no_workflow_has_a_secret_and_no_checkout_leaves_its_token():
    for path in WORKFLOWS:
        assert "secrets." not in path.read_text()
    for _, step in STEPS:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


def test_no_script_holds_an_expression():
    # GitHub puts its value into the script before the shell reads it: a title would be run.
    for name, script in SCRIPTS:
        assert "${{" not in script, name


def test_no_job_runs_for_ever_or_beside_itself():
    for path in WORKFLOWS:
        assert load(path.name)["concurrency"]["group"].startswith("${{ github.workflow }}")
    for name, job in JOBS:
        assert int(job["timeout-minutes"]) <= (720 if name == "study.yml" else 45)


def test_only_an_approved_run_reaches_our_own_machine():
    for name, job in JOBS:
        if "self-hosted" in job["runs-on"]:
            assert list(load(name)["on"]) == ["workflow_dispatch"]
            assert job["environment"] == "study"


def test_no_image_of_a_patient_is_uploaded(tmp_path):
    charts = ["plots/uar.png", "metrics/test.json", "review/report.md"]
    private = ["plots/sheets/a.png", "data/images.npy", "data/raw/study/a.png", "data/slices/a.png"]
    private += ["models/finetune_siglip/model.safetensors", "data/manifest.csv"]
    for name in [*charts, *private]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    uploads = [s["with"]["path"] for _, s in STEPS if "upload-artifact@" in s.get("uses", "")]
    patterns = "\n".join(uploads).split()
    assert len(uploads) == 3
    found = {p.relative_to(tmp_path).as_posix() for x in patterns for p in tmp_path.glob(x)}
    assert found == set(charts)


def test_what_a_workflow_calls_exists():
    text = "\n".join(script for _, script in SCRIPTS)
    makefile = (ROOT / "Makefile").read_text()
    targets, scripts = re.findall(r"\bmake (\w+)", text), re.findall(r"python (\S+\.py)", text)
    assert {"test", "repro", "venv"} == set(targets)
    assert {"tools/review.py", "tools/stale.py"} == set(scripts)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_a_comment_holds_text_alone():
    # Of what the report's job packed, report.html may show images.
    script = step_of("comment.yml", "Post or replace the comment")["run"]
    read = re.findall(r'unzip -p "\$packed" ([\w.]+)', script)
    assert script.count("unzip") == len(read) == 2
    assert set(read) == {"number", "report.md"}


def test_every_lock_is_audited_and_a_package_that_is_not_found_fails():
    step = step_of("audit.yml", "Look up every locked package")
    given = set(re.findall(r"--requirement (\S+)", step["run"]))
    locks = {path.name for path in ROOT.glob("requirements*.lock")}
    assert locks - given == {"requirements-cpu.lock"}  # a build of what -cuda holds
    assert "--strict" in step["run"]
    left_out = re.findall(r"--ignore-vuln (\S+)", step["run"])
    named = re.findall(r"CVE-\d+-\d+", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert left_out == named
    assert {"schedule", "pull_request"} <= set(load("audit.yml")["on"])


def test_a_job_that_installs_keeps_what_it_fetched_until_a_pin_or_lock_changes():
    paths = [s["with"]["cache-dependency-path"] for _, s in STEPS if "cache" in s.get("with", {})]
    assert paths == ["requirements*"] * 3


# --- The hooks of .pre-commit-config.yaml -----------------------------------------------------


def test_hooks_fetch_nothing_and_refuse_images_but_charts():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in hooks.values()} == {"system", "fail"}
    files, exclude = (re.compile(hooks["no-images"][key]) for key in ("files", "exclude"))
    names = [
        "plots/uar.png",
        "plots/contact_sheet.png",
        "plots/sheets/a.png",
        "data/raw/a.PNG",
        "a.nii.gz",
        "tests/a.dcm",
    ]
    refused = [name for name in names if files.search(name) and not exclude.search(name)]
    assert refused == names[1:]
    assert [name for name in CHARTS if not exclude.search(name)] == []
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert [x for x in tracked.split() if files.search(x) and not exclude.search(x)] == []


# --- That their commands do what they say ------------------------------------------------------


def step_of(workflow, name):
    return next(step for file, step in STEPS if file == workflow and step.get("name") == name)


def run_step(step, folder, **env):
    """Run a step's script in `folder` as GitHub does; commands in folder/bin come first."""
    options = ["--noprofile", "--norc", "-eo", "pipefail"] if "shell" in step else ["-e"]
    return subprocess.run(
        ["bash", *options, "-c", step["run"]],
        cwd=folder, capture_output=True, text=True,
        env={"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
             "GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "RUNNER_TEMP": str(folder), **env},
    )  # fmt: skip


def command(folder, name, script):
    """Put a command that does `script` before all others of that name."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


@pytest.fixture
def review(tmp_path):
    """What the report's job leaves, and a `gh` that answers from it and notes what is posted."""
    number, report = tmp_path / "number", tmp_path / "report.md"
    number.write_text("7\n")
    report.write_text("# The report\nby @someone\n")
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "artifacts").write_text(
        json.dumps({"artifacts": [{"name": "review", "size_in_bytes": 900, "id": 3}]})
    )
    (answers / "7").write_text(
        json.dumps({"head": {"sha": "abc", "repo": {"full_name": "someone/fork"}}})
    )
    (answers / "comments").write_text("[]")
    command(tmp_path, "gh", """
        path=$(printf '%s\\n' "$@" | grep '^repos/')
        if [[ "$*" == *--input* ]]; then
          cp "${@: -1}" posted.json
          echo "$*" > call
        else
          cat "answers/$(basename "$path")"
        fi
    """)  # fmt: skip

    def post():
        with zipfile.ZipFile(answers / "zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.write(number, "number")
            packed.write(report, "report.md")
        done = run_step(
            step_of("comment.yml", "Post or replace the comment"), tmp_path,
            REPOSITORY="us/chest", RUN="5", RUN_PAGE="https://example.org/5", LIMIT="60000",
            HEAD="someone/fork abc", MARKER=MARKER, GH_TOKEN="none",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        posted = tmp_path / "posted.json"
        body = json.loads(posted.read_text())["body"] if posted.exists() else None
        return body, (tmp_path / "call").read_text() if posted.exists() else done.stdout

    post.folder = tmp_path
    return post


@needs("jq", "unzip")
def test_the_report_becomes_a_comment(review):
    body, call = review()
    assert body.startswith(f"{MARKER}\n\n# The report\n")
    assert "someone" in body
    assert "@someone" not in body
    assert "https://example.org/5" in body
    assert "POST repos/us/chest/issues/7/comments" in call


@needs("jq", "unzip")
def test_the_next_report_replaces_our_comment_and_no_other(review):
    comments = [
        {"id": 1, "user": {"login": "somebody"}, "body": f"{MARKER} not ours"},
        {"id": 2, "user": {"login": "github-actions[bot]"}, "body": "another workflow's"},
        {"id": 3, "user": {"login": "github-actions[bot]"}, "body": f"{MARKER}\n\nolder"},
        {"id": 4, "user": {"login": "github-actions[bot]"}, "body": f"{MARKER}\n\nolder"},
    ]
    (review.folder / "answers/comments").write_text(json.dumps(comments))
    _, call = review()
    assert "PATCH repos/us/chest/issues/comments/3 " in call


@needs("jq", "unzip")
@pytest.mark.parametrize("number", ["8", "../issues/1", "7 8", "$(touch evil)", "", "7" * 40])
def test_a_report_on_another_pull_request_is_not_posted(review, number):
    (review.folder / "number").write_text(number)
    other = {"head": {"sha": "def", "repo": {"full_name": "someone/fork"}}}
    (review.folder / "answers/8").write_text(json.dumps(other))
    body, printed = review()
    assert body is None
    assert printed.startswith("::notice::The report ")
    assert not (review.folder / "evil").exists()


@needs("jq", "unzip")
def test_a_report_of_any_length_and_content_is_text(review):
    text = 'a"b\\`$(touch evil)`ü' * 100_000
    (review.folder / "report.md").write_text(text)
    body, _ = review()
    assert text[:1000] in body
    assert len(body) < 65_536
    assert not (review.folder / "evil").exists()


@needs("jq", "unzip")
def test_no_report_is_no_failure(review):
    (review.folder / "answers/artifacts").write_text('{"artifacts": []}')
    body, printed = review()
    assert body is None
    assert "no report" in printed


@needs("jq")
@pytest.mark.parametrize(
    ("uar", "sick", "code"), [(0.9, 0.8, 0), (0.85, 0.1, 0), (0.84, 0.8, 1), (0.9, 0.0, 1)]
)
def test_phantoms_that_are_not_told_apart_fail(tmp_path, uar, sick, code):
    (tmp_path / "metrics").mkdir()
    own = {"uar": uar, "recall": {"tuberculosis": sick}}
    (tmp_path / "metrics/test.json").write_text(json.dumps({"finetune_siglip": own}))
    step = step_of("phantoms.yml", "See that the fine-tuned system tells the phantoms apart")
    assert run_step(step, tmp_path).returncode == code


@pytest.mark.parametrize(("profile", "kept"), [("phantom", True), ("study", False)])
def test_a_page_leaves_the_machine_only_with_phantoms(tmp_path, profile, kept):
    command(tmp_path, "python", 'mkdir review; echo "$*" | tee review/report.md review/report.html')
    (tmp_path / "params.yaml").write_text(f"# Which block\nprofile: {profile}\n")
    done = run_step(step_of("review.yml", "Write the report"), tmp_path, BASE="main", NUMBER="7")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.md").read_text() == "tools/review.py origin/main\n"
    assert (tmp_path / "review/number").read_text() == "7\n"
    assert (tmp_path / "review/report.html").exists() == kept


def run_study(folder, parameters):
    command(folder, "dvc", 'echo "$*" >> calls')
    (folder / "data/raw").mkdir(parents=True)
    step = step_of("study.yml", "Run the study")
    return run_step(
        step, folder, COLLECTIONS=str(folder), DVC_CACHE="/cache", PARAMETERS=parameters
    )


def test_the_study_runs_with_the_parameters_that_were_asked_for(tmp_path):
    done = run_study(tmp_path, "seed=7 study.finetune_siglip.lr=1.0e-5")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/raw/study").resolve() == tmp_path.resolve()
    assert (tmp_path / "calls").read_text().splitlines()[-1] == (
        "exp run --set-param profile=study --set-param seed=7"
        " --set-param study.finetune_siglip.lr=1.0e-5"
    )


@pytest.mark.parametrize("given", ["seed", "--force", "seed=$(id)", "a=1;id", "a=${oc.env:HOME}"])
def test_a_parameter_that_is_more_than_a_value_is_refused(tmp_path, given):
    done = run_study(tmp_path, given)
    assert done.returncode == 1
    assert "::error::" in done.stdout
    assert not (tmp_path / "calls").exists()
