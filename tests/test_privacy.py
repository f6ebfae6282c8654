"""Nothing that Git tracks, or that a workflow uploads, shows a patient or says who it was.

`leaks_of` looks through a repository as `git add --all` would leave it: test_pipeline.py asks it
after a run on real images.
"""

import base64
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support import BESIDE, ROOT, copy_repository, run_in

from chest.collections import XRAYS

# The pictures that Git may hold: they show figures.
PLOTS = {
    f"plots/{name}.png"
    for name in ("confusion", "probes", "recall", "reliability", "training", "uar")
}
CHARTS = PLOTS | {"benchmarks/results/load.png"}
PERSONAL = {"age", "gender", "sex", "remarks"}
REMARK_LENGTH = 13  # characters from which on a remark is a sentence on somebody: not "normal"
TEXTS = {".csv", ".json", ".md", ".html", ".svg"}
ENDINGS = re.compile(
    r"\.(png|jpe?g|gif|tiff?|bmp|webp|dcm|nii|gz|zip|np[yz]|safetensors|bin|pth?|ckpt|pickle)$",
    re.IGNORECASE,
)
# How a file of images or weights begins, whatever it is called.
SIGNATURES = {
    0: (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"\x1f\x8b", b"PK\x03\x04",
        b"\x93NUMPY"),
    8: (b"WEBP", b'{"'),  # b'{"': safetensors, behind its header's length
    128: (b"DICM",),
    344: (b"n+1\0", b"n+2\0"),
}  # fmt: skip
DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w=.-]+)*;base64,", re.IGNORECASE)


def leaks_of(repository: Path, raw: Path) -> list[str]:
    """What a commit of all of `repository` would give away of the collections in `raw`: file, why.

    It takes a file for a leak that holds pixels or weights (but the charts), is a file of `raw`, or
    is a table, page or JSON with a column of personal data, a patient's remark or an embedded file.
    """
    listed = run_in(
        repository, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    )
    names = sorted(name for name in filter(None, listed.split("\0")))
    files = {name: repository / name for name in names if is_plain(repository / name)}
    copies, remarks = copies_of(files, raw), remarks_in(raw)
    found = []
    for name, path in files.items():
        content = path.read_bytes()
        if name not in CHARTS and (ENDINGS.search(name) or is_binary(content)):
            found.append(f"{name}: holds images or weights, and is no chart")
        if name in copies:
            found.append(f"{name}: is a file of the collections, {copies[name]}")
        if path.suffix.lower() in TEXTS:
            found += [f"{name}: {what}" for what in told_in(path.suffix.lower(), content, remarks)]
    return found


def is_plain(path: Path) -> bool:
    """Whether Git stores the file's content: of a link it stores where that leads."""
    return path.is_file() and not path.is_symlink()


def is_binary(content: bytes) -> bool:
    return any(content.startswith(x, at) for at, starts in SIGNATURES.items() for x in starts)


def copies_of(files: dict[str, Path], raw: Path) -> dict[str, str]:
    """Those of `files` that have the content of a file in `raw`, with its name there."""
    sizes = {path.stat().st_size for path in files.values()} - {0}
    originals = {
        hashlib.sha256(path.read_bytes()).digest(): path.relative_to(raw).as_posix()
        for path in sorted(raw.rglob("*"))
        if path.is_file() and path.stat().st_size in sizes
    }
    hashes = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    return {name: originals[value] for name, value in hashes.items() if value in originals}


def remarks_in(raw: Path) -> set[str]:
    """The longer remarks on the X-rays, in small letters."""
    text = (raw / XRAYS / "MetaData.csv").read_text(encoding="utf-8", errors="replace")
    remarks = {row["remarks"].strip().lower() for row in csv.DictReader(io.StringIO(text))}
    return {remark for remark in remarks if len(remark) >= REMARK_LENGTH}


def told_in(kind: str, content: bytes, remarks: set[str]) -> Iterator[str]:
    """What a table, page or JSON says that it should not."""
    text = content.decode("utf-8", errors="replace")
    columns = {name for name in columns_in(kind, text) if PERSONAL & set(words(name))}
    for name in sorted(columns):
        yield f"has the column {name}"
    flat = " ".join(text.lower().split())
    if any(remark in flat for remark in remarks):
        yield "holds a remark on a patient"
    if DATA_URI.search(text):
        yield "holds another file in base64"


def words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def columns_in(kind: str, text: str) -> set[str]:
    """The names of columns, in JSON of keys at any depth."""
    if kind == ".csv":
        return set(next(csv.reader(io.StringIO(text)), []))
    if kind == ".json":
        return set(re.findall(r'"([^"]*)"\s*:', text))
    if kind == ".html":
        return set(re.findall(r"<t[hd][^>]*>\s*([^<]+?)\s*</t[hd]>", text))
    heads = re.findall(r"^\s*\|(.+)\|\s*\n\s*\|[\s:|-]+\|\s*$", text, re.MULTILINE)
    return {cell.strip(" *`") for head in heads for cell in head.split("|")}


# --- That it finds what it should, and nothing else --------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("private"))


def test_what_is_committed_gives_nothing_away(repository, phantoms):
    assert leaks_of(repository, phantoms) == []


@pytest.mark.skipif(not (BESIDE / "real").is_dir(), reason="no real images beside the project")
def test_what_is_committed_gives_nothing_of_real_patients_away(repository):
    assert leaks_of(repository, BESIDE / "real") == []


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), 9).save(stream, kind)
    return stream.getvalue()


REMARK = "Bilateral  PTB"  # one of the phantoms', spelt otherwise
URI = f"data:image/png;base64,{base64.b64encode(picture('PNG')).decode()}"
PLANTED = {
    "plots/contact_sheet.png": (picture("PNG"), "no chart"),
    "docs/lung.jpg": (picture("JPEG"), "no chart"),
    "metrics/lung.txt": (picture("PNG"), "no chart"),
    "docs/lung.csv": (picture("TIFF"), "no chart"),
    "tests/images.npy": (b"\x93NUMPY\x01\0", "no chart"),
    "docs/volume": (gzip.compress(b"volume"), "no chart"),
    "docs/volume.nii": (b"", "no chart"),
    "docs/series/1": (bytes(128) + b"DICM", "no chart"),
    "best/weights": ((64).to_bytes(8, "little") + b'{"__metadata__":{}}', "no chart"),
    "best/model.safetensors": (b"", "no chart"),
    "metrics/ages.csv": (b"image_id,Patient Age\na,54\n", "the column Patient Age"),
    "metrics/sex.json": (b'{"a": [{"patientSex": "M"}]}', "the column patientSex"),
    "metrics/who.md": (b"Who\n\n| id | **Gender** |\n| --- | --- |\n| a | f |\n", "column Gender"),
    "docs/who.html": (b"<table><tr><th> remarks </th></tr></table>", "the column remarks"),
    "metrics/notes.csv": (f"image_id,note\na,{REMARK}\n".encode(), "a remark on a patient"),
    "metrics/notes.json": (json.dumps({"a": REMARK}).encode(), "a remark on a patient"),
    "docs/notes.md": (f"He has\n{REMARK}.".encode(), "a remark on a patient"),
    "docs/page.html": (f'<img src="{URI}">'.encode(), "another file in base64"),
    "metrics/page.md": (f"![a]({URI})".encode(), "another file in base64"),
}


@pytest.mark.parametrize("tracked", [True, False])
def test_each_kind_of_leak_is_found(repository, phantoms, tracked):
    for name, (content, _) in PLANTED.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(content)
    if tracked:
        run_in(repository, "git", "add", "--force", *PLANTED)
    leaks = leaks_of(repository, phantoms)
    run_in(repository, "git", "rm", "--quiet", "--cached", "--ignore-unmatch", *PLANTED)
    for name in PLANTED:
        (repository / name).unlink()
    assert [leak.partition(": ")[0] for leak in leaks] == sorted(PLANTED)
    for leak in leaks:
        name, _, reason = leak.partition(": ")
        assert PLANTED[name][1] in reason


def test_a_copy_of_a_raw_file_is_found_under_any_name(repository, phantoms):
    original = min(phantoms.rglob("meta_data_covid.csv"))
    path = repository / "docs" / "notes.txt"
    path.write_bytes(original.read_bytes())
    try:
        (leak,) = leaks_of(repository, phantoms)
    finally:
        path.unlink()
    assert leak == f"docs/notes.txt: is a file of the collections, {original.relative_to(phantoms)}"


def test_a_chart_is_none_if_it_is_a_raw_picture(repository, phantoms):
    path = repository / min(CHARTS)
    before = path.read_bytes()
    path.write_bytes(min(phantoms.rglob("*.png")).read_bytes())
    try:
        (leak,) = leaks_of(repository, phantoms)
    finally:
        path.write_bytes(before)
    assert leak.startswith(f"{min(CHARTS)}: is a file of the collections")


# --- What Git ignores, and what the pipeline gives it --------------------------------------------


def test_what_holds_images_weights_or_patients_is_ignored_by_git():
    held = [
        ".resume/finetune_siglip/state.safetensors", "data/audit/near_duplicates.csv",
        "data/checkpoints/phantom/siglip/model.safetensors",
        "data/checkpoints/study/siglip/model.safetensors", "data/images.npy", "data/manifest.csv",
        "data/predictions/floor_site.csv", "data/raw/phantom/a.png", "data/raw/study",
        "data/raw/study/a.png", "data/slices/a.png", "data/split.csv",
        "data/training/finetune_siglip.csv", "live/plots/a.png",
        "models/finetune_siglip/model.safetensors", "plots/sheets/a.png", "review/report.html",
        # Unfinished, where a run was killed.
        *[f"{folder}.{name}.{kind}" for folder, name in (
            ("data/", "images.npy"), ("data/", "manifest.csv"), ("data/", "slices"),
            ("data/raw/", "study"), ("plots/", "sheets"), ("plots/", "uar.png"), ("", "review"),
        ) for kind in ("partial", "old")],
    ]  # fmt: skip
    assert run_in(ROOT, "git", "check-ignore", "--no-index", *held).split() == held


def test_git_gets_charts_and_tables_from_the_pipeline_and_dvc_all_else():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outs = [out for stage in stages.values() for out in stage["outs"]]
    in_git = {
        name for out in outs if isinstance(out, dict)
        for name, how in out.items() if how.get("cache") is False
    }  # fmt: skip
    assert {name for name in in_git if name.endswith(".png")} == PLOTS
    assert {Path(name).suffix for name in in_git} == {".png", ".csv", ".json", ".md"}
    assert {name.partition("/")[0] for name in in_git} == {"metrics", "plots"}
    assert {"plots/sheets": {"persist": True}} in stages["evaluate"]["outs"]  # cached, not in Git
