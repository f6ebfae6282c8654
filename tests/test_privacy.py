"""Nothing that Git would take shows a patient, says who it was, or tells about a machine."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from support import ROOT, run_in

PERSONAL = {"age", "gender", "sex", "remarks"}
# Charts are the only pictures: their folders are DVC's plots that Git tracks.
CHARTS = re.compile(r"(plots/[^/]+|docs/results/[^/]+|benchmarks/results/load)\.(png|svg)")
BINARY = re.compile(
    r"\.(png|jpe?g|gif|tiff?|bmp|webp|svg|dcm|nii|gz|zip|np[yz]|safetensors|bin|pth?|ckpt|pickle)$",
    re.IGNORECASE,
)
# How files of images or weights begin, whatever they are called.
SIGNATURES = {
    0: (
        b"\x89PNG",
        b"\xff\xd8\xff",
        b"GIF8",
        b"II*\0",
        b"MM\0*",
        b"\x1f\x8b",
        b"PK\x03\x04",
        b"\x93NUMPY",
    ),
    8: (b'{"',),  # safetensors
    128: (b"DICM",),
    344: (b"n+1\0", b"n+2\0"),
}
ABSOLUTE = re.compile(r"(?<![\w./~:-])/(home|root|work|tmp|Users|mnt)/\w")
RESULTS = ("metrics/", "plots/", "docs/results", "benchmarks/results/", "dvc.lock", "data/dvc.lock")


def leaks(name: str, content: bytes) -> list[str]:
    """Return what a file of this name and content would give away."""
    found = []
    binary = any(content.startswith(x, at) for at, starts in SIGNATURES.items() for x in starts)
    if (binary or BINARY.search(name)) and not CHARTS.fullmatch(name):
        found.append("holds images or weights, and is no chart")
    text = content.decode("utf-8", errors="replace")
    if personal := PERSONAL & {word for column in columns(name, text) for word in words(column)}:
        found.append(f"has a column or key {min(personal)}")
    if name.startswith(RESULTS) and ABSOLUTE.search(text):
        found.append("holds an absolute path")
    if "base64," in text and Path(name).suffix in {".md", ".html", ".json", ".csv", ".svg"}:
        found.append("holds another file in base64")
    return found


def columns(name: str, text: str) -> set[str]:
    """Return the columns of a table or the keys of JSON."""
    if name.endswith(".csv"):
        return set(next(csv.reader(io.StringIO(text)), []))
    if name.endswith(".json"):
        return set(re.findall(r'"([^"]*)"\s*:', text))
    if name.startswith("metrics/") and name.endswith(".md"):
        heads = re.findall(r"^\|(.+)\|\n\|[ :|-]+\|$", text, re.MULTILINE)
        return {cell for head in heads for cell in head.split("|")}
    return set()


def words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def test_what_git_would_take_gives_nothing_away():
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = [name for name in run_in(ROOT, *command).split("\0") if (ROOT / name).is_file()]
    assert len(names) > 50
    found = {name: told for name in names if (told := leaks(name, (ROOT / name).read_bytes()))}
    assert found == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/sheets/sheet.png", b"\x89PNG"),
        ("docs/lung.jpg", b""),
        ("metrics/lung.txt", b"\x89PNG"),
        ("docs/volume", b"\x1f\x8b"),
        ("docs/series/1", bytes(128) + b"DICM"),
        ("best/weights", (64).to_bytes(8, "little") + b'{"a":1}'),
        ("best/model.safetensors", b""),
        ("metrics/ages.csv", b"image_id,Patient Age\na,54\n"),
        ("metrics/sex.json", json.dumps([{"patientSex": "M"}]).encode()),
        ("metrics/who.md", b"| id | gender |\n| --- | --- |\n"),
        ("metrics/runs.json", b'{"checkpoint": "/root/models/siglip"}'),
        ("docs/page.md", b"![a](data:image/png;base64,aaaa)"),
    ],
)
def test_each_kind_of_leak_is_found(name, content):
    assert leaks(name, content)


def test_git_ignores_what_holds_images_weights_or_patients():
    files = """
        .resume/zeroshot_qwen/answers.jsonl data/.images.partial/112.npy data/audit/counts.json
        data/checkpoints/phantom/siglip/model.safetensors data/checkpoints/study/siglip/config.json
        data/images/224.npy data/index/xrays.csv data/manifest.csv data/masks/a.png
        data/predictions/finetune_siglip.csv data/probes/lungs.csv data/raw/phantom/a.png
        data/raw/study data/raw/study/a.png data/sheets/mistakes.png data/slices/a.png
        data/split.csv data/synthetic/64.npy data/training/finetune_siglip.csv live/plots/a.png
        models/finetune_siglip/model.safetensors review/report.html
    """
    held = files.split()
    assert run_in(ROOT, "git", "check-ignore", "--no-index", *held).split() == held


def test_git_gets_metrics_and_plots_from_the_pipeline_and_dvc_all_else():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name, stage in stages.items():
        declared = stage.get("do", stage)
        outs = [out for kind in ("outs", "metrics", "plots") for out in declared.get(kind, [])]
        options = {path: how for out in outs if isinstance(out, dict) for path, how in out.items()}
        in_git = {path for path, how in options.items() if how.get("cache") is False}
        assert not in_git or name == "evaluate"
        assert {path.partition("/")[0] for path in in_git} <= {"metrics", "plots"}
