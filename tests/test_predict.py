"""predict: the pipeline's own answers for single files, folders, volumes and DICOM."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import BESIDE, load_script, run_stage, write_params
from test_dicom import GREY, NAME, make, make_volume, save

from chest import predictions
from chest.collections import CT_SLICES, CT_VOLUMES, XRAYS
from chest.dataset import read_manifest
from chest.errors import run
from chest.labels import LABELS
from chest.predictions import TRAINED_MODEL

predict = load_script("tools/predict.py")
RAW = Path("data/raw/phantom")
VOLUMES = RAW / CT_VOLUMES / "studies"
XRAY_IMAGES = RAW / XRAYS / "Chest-X-Ray" / "Chest-X-Ray" / "image"
CT_IMAGES = RAW / CT_SLICES / "curated_data" / "curated_data"
REAL = BESIDE / "real"


@pytest.fixture(scope="module")
def answered(phantoms, checkpoints, tmp_path_factory):
    """A working directory in which all three systems answered; to be read only."""
    folder = tmp_path_factory.mktemp("answered")
    siglip, qwen = str(checkpoints / "siglip"), str(checkpoints / "qwen")
    write_params(folder, **{
        "phantom.expected_counts": None,
        "phantom.zeroshot_qwen.checkpoint": qwen, "phantom.zeroshot_siglip.checkpoint": siglip,
        "phantom.finetune_siglip.checkpoint": siglip, "phantom.finetune_siglip.epochs": 1,
        "phantom.finetune_siglip.warmup_steps": 0, "phantom.finetune_siglip.augment": None,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        RAW.parent.mkdir(parents=True)
        RAW.symlink_to(phantoms)
        for stage in ("extract_slices", "build_manifest", "split",
                      "zeroshot_qwen", "zeroshot_siglip", "finetune_siglip"):  # fmt: skip
            run_stage(stage)
    return folder


@pytest.fixture
def place(answered, monkeypatch):
    monkeypatch.chdir(answered)
    return answered


def ask(capsys, *arguments):
    """What predict prints as json."""
    predict.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """The message where it must end with exit code 1 and without an answer."""
    with pytest.raises(SystemExit) as end:
        run(lambda: predict.main([*map(str, arguments)]))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "")
    return err


# --- The pipeline's answers ------------------------------------------------------------------


@pytest.mark.parametrize("system", ["finetune_siglip", "zeroshot_siglip", "zeroshot_qwen"])
def test_it_answers_as_the_pipeline_does(place, capsys, system):
    due = predictions.read(system, predict_table()).set_index("image_id")
    manifest = read_manifest().set_index("image_id").loc[due.index]
    volumes = {path.name.split(".")[0]: path for path in VOLUMES.rglob("*.nii*")}
    for modality in ("ct", "xray"):
        rows = manifest[manifest["modality"] == modality]
        own = rows["collection"] == "ct_volumes"
        assert own.any() == (modality == "ct")
        # The volume itself, not the slice that was cut of it.
        paths = [
            volumes[study] if volume else path
            for path, study, volume in zip(rows["path"], rows["study"], own, strict=True)
        ]
        predict.main([*map(str, paths), "--system", system, "--modality", modality, "--csv"])
        table = pd.read_csv(io.StringIO(capsys.readouterr().out))
        assert tuple(table.columns) == ("path", "predicted", *LABELS, "modality")
        assert list(table["path"]) == [str(path) for path in paths]
        assert set(table["modality"]) == {modality}
        expected = due.loc[rows.index]
        difference = table[list(LABELS)].to_numpy() - expected[list(LABELS)].to_numpy()
        assert np.abs(difference).max() <= 1e-5
        sure = expected[list(LABELS)].apply(lambda p: p.nlargest(2).diff().abs().iloc[-1], axis=1)
        clear = (sure > 1e-4).to_numpy()
        assert clear.any()
        said = (table["predicted"].to_numpy() == expected["predicted"].to_numpy())[clear]
        assert said.all()


def predict_table():
    """The manifest with the column split."""
    return read_manifest().assign(split=pd.read_csv("data/split.csv")["split"])


@pytest.mark.parametrize("normalize", ["minmax", "window"])
def test_a_dicom_series_gets_the_answer_of_the_same_volume(place, tmp_path, capsys, normalize):
    make_volume(tmp_path, "ARI")
    params = predict.load_params()
    slices = params.slices.model_copy(update={"normalize": normalize, "position": 0.3})
    with pytest.MonkeyPatch.context() as patch:
        changed = params.model_copy(update={"slices": slices})
        patch.setattr(predict, "load_params", lambda: changed)
        series, volume = ask(capsys, tmp_path)["answers"]
    assert [series[label] for label in LABELS] == [volume[label] for label in LABELS]
    for answer in (series, volume):
        assert (answer["slice"], answer["slices"], answer["modality"]) == (2, 7, "ct")
    assert series["modality_told_by"] == "DICOM, CT"
    assert volume["modality_told_by"] == "NIfTI"


# --- What is found in folders ----------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, place):
    """A folder with images of all kinds, in folders of their own, and files of other kinds."""
    folder = tmp_path / "all kinds"
    make_volume(folder.mkdir() or folder)
    shutil.copytree(folder / "series", folder / "again")  # another series, with another number
    for path in (folder / "again").iterdir():
        save(
            path,
            make(GREY, SeriesInstanceUID="4.5", ImagePositionPatient=[0, 0, int(path.name[2:])]),
        )
    xray = next(XRAY_IMAGES.glob("*.png"))
    shutil.copy(xray, folder / "a scan.PNG")
    Image.open(xray).convert("L").save(folder / "b.jpeg")
    save(folder / "c.dcm", make(GREY, "DX"))
    save(folder / "d", make(GREY, "MR"))
    (folder / "e.txt").write_text("text")
    (folder / ".hidden.png").write_text("no picture")
    (folder / "loop").symlink_to(folder)
    return folder


def test_all_that_lies_in_a_folder_is_answered(mixed, capsys):
    predict.main([str(mixed), "--json"])
    out, err = capsys.readouterr()
    answers = {Path(a["path"]).relative_to(mixed).as_posix(): a for a in json.loads(out)["answers"]}
    assert list(answers) == sorted(answers)
    assert set(answers) == {
        "a scan.PNG",
        "b.jpeg",
        "c.dcm",
        "volume.nii.gz",
        "again/IM0003",
        "series/IM0001",
    }
    assert {k: a["modality"] for k, a in answers.items() if a["slices"] is None} == {
        "a scan.PNG": None, "b.jpeg": None, "c.dcm": "xray",
    }  # fmt: skip
    assert all(
        answers[k]["slices"] == 7 for k in ("again/IM0003", "series/IM0001", "volume.nii.gz")
    )
    assert "d: DICOM of modality MR" in err
    assert "e.txt: no image of a known kind" in err
    assert "hidden" not in err


def test_a_picture_named_twice_is_answered_once(mixed, capsys):
    answers = ask(capsys, mixed / "c.dcm", mixed, mixed / "b.jpeg")["answers"]
    assert len(answers) == 6
    assert answers[0]["path"].endswith("c.dcm")  # in the order in which they are named


def test_nothing_personal_is_printed(mixed, capsys):
    assert NAME.encode() in (mixed / "c.dcm").read_bytes()
    save(mixed / "damaged.dcm", make(GREY, "DX", NumberOfFrames=2))
    for form in ((), ("--json",), ("--csv",)):
        with pytest.raises(SystemExit):
            run(lambda form=form: predict.main([str(mixed), "--keep-going", *form]))
        printed = capsys.readouterr()
        assert "c.dcm" in printed.out
        assert "damaged.dcm" in printed.err
        assert "Secret" not in printed.out + printed.err


def test_a_table_for_people_says_what_told_the_modality(mixed, capsys):
    predict.main([str(mixed / "a scan.PNG"), str(mixed / "c.dcm"), str(mixed / "volume.nii.gz")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SigLIP, fine-tuned (models/finetune_siglip)")
    header, picture, xray, volume = lines[2:6]
    assert header.split() == ["file", "answer", "COVID-19", "Normal", "Tuberculosis", "modality"]
    assert picture.endswith("not told")
    assert xray.endswith("X-ray (DICOM, DX)")
    assert volume.endswith("CT (NIfTI)")
    assert "volume.nii.gz (slice 4 of 7)" in volume
    shares = [float(x) for x in picture.split("%")[0:3] for x in [x.split()[-1]]]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert predict.NOTICE in lines[-2]
    assert "say nothing about real lungs" in lines[-1]


def test_the_notice_goes_with_every_form(place, capsys):
    path = str(next(XRAY_IMAGES.glob("*.png")))
    content = ask(capsys, path)
    assert content["notice"].startswith(predict.NOTICE)
    assert content["run"]["weights"] == "random"
    assert content["run"]["n"] == 1
    predict.main([path, "--csv"])
    assert predict.NOTICE in capsys.readouterr().err


# --- Where the model looked ------------------------------------------------------------------


@pytest.mark.parametrize("system", ["finetune_siglip", "zeroshot_siglip"])
def test_a_picture_is_drawn_for_each_answer(mixed, tmp_path, capsys, system):
    shutil.copy(mixed / "b.jpeg", mixed / "again" / "a scan.jpg")
    files = [mixed / "a scan.PNG", mixed / "again" / "a scan.jpg", mixed / "volume.nii.gz"]
    content = ask(capsys, *files, "--system", system, "--explain", tmp_path / "drawn")
    names = [Path(answer["explanation"]).name for answer in content["answers"]]
    assert names == ["a scan.png", "a scan-2.png", "volume.png"]
    for name in names:
        with Image.open(tmp_path / "drawn" / name) as picture:
            assert picture.width > 800
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == sorted(names)


def test_pictures_replace_nothing(mixed, capsys):
    before = sorted(mixed.rglob("*"))
    assert "new or empty folder" in refused(capsys, mixed / "b.jpeg", "--explain", mixed)
    inside = mixed / "b.jpeg" / "drawn"
    assert "cannot be written to" in refused(capsys, mixed / "b.jpeg", "--explain", inside)
    assert sorted(mixed.rglob("*")) == before


# --- What is refused -------------------------------------------------------------------------


def test_all_bad_files_are_listed_and_nothing_is_answered(mixed, tmp_path, capsys):
    bad = {
        "bad/a.png": b"no picture", "bad/b.nii": b"no volume", "bad/c.dcm": b"no DICOM",
        "bad/d.nii.gz": (mixed / "volume.nii.gz").read_bytes()[:1000],
    }  # fmt: skip
    (mixed / "bad").mkdir()
    for name, content in bad.items():
        (mixed / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    message = refused(
        capsys, mixed, tmp_path / "gone.png", mixed / "e.txt", mixed / "d", tmp_path / "empty"
    )
    assert f"{len(bad) + 4} problems" in message
    for told in (*bad, "gone.png", "e.txt", "modality MR", "no image below it"):
        assert told in message

    with pytest.raises(SystemExit) as end:
        run(lambda: predict.main([str(mixed), "--keep-going", "--csv"]))
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert len(out.splitlines()) == 1 + 6
    assert f"{len(bad)} problems" in err


def test_a_file_that_contradicts_the_modality_is_refused(mixed, capsys):
    message = refused(capsys, mixed / "volume.nii.gz", mixed / "b.jpeg", "--modality", "xray")
    assert "1 problem" in message
    assert "CT (NIfTI)" in message
    assert "X-ray (DICOM, DX)" in refused(capsys, mixed / "c.dcm", "--modality", "ct")


def test_qwen_must_be_told_the_modality(mixed, capsys):
    qwen = ("--system", "zeroshot_qwen")
    message = refused(capsys, mixed / "b.jpeg", mixed / "c.dcm", *qwen)
    assert "1 problem" in message
    assert "give --modality ct or --modality xray" in message
    answer, other = ask(capsys, mixed / "b.jpeg", mixed / "c.dcm", *qwen, "--modality", "xray")[
        "answers"
    ]
    assert answer["modality_told_by"] == "--modality"
    assert other["modality_told_by"] == "DICOM, DX"


@pytest.mark.parametrize(
    "options", [("--system", "zeroshot_qwen"), ("--modality", "ct"), ("--modality", "xray")]
)
def test_what_is_refused_is_never_answered(mixed, capsys, options):
    with pytest.raises(SystemExit) as end:
        run(lambda: predict.main([str(mixed), *options, "--keep-going", "--csv"]))
    out, err = capsys.readouterr()
    assert end.value.code == 1
    answered = set(pd.read_csv(io.StringIO(out))["path"])
    refused = {line.strip() for line in err.split("ERROR")[1].splitlines()[1::4]}
    assert len(answered) + len(refused) == 6
    assert not answered & refused


def test_without_a_model_it_says_how_to_get_one(mixed, monkeypatch, tmp_path, capsys):
    assert "correct --model" in refused(capsys, mixed / "b.jpeg", "--model", tmp_path)
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, mixed / "b.jpeg")
    assert str(TRAINED_MODEL) in message
    assert "run `dvc repro`, or `dvc pull`" in message


def test_a_checkpoint_without_a_head_is_no_model(mixed, checkpoints, capsys):
    message = refused(capsys, mixed / "b.jpeg", "--model", checkpoints / "siglip")
    assert "classifier" in message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "PATH"),
        (("a.png", "--system", "floor_site"), "invalid choice"),
        (("a.png", "--explain", "x", "--system", "zeroshot_qwen"), "cannot be explained"),
        (("a.png", "--model", "x", "--system", "zeroshot_siglip"), "--model"),
        (("a.png", "--json", "--csv"), "not allowed with"),
    ],
)
def test_a_wrong_call_is_told(place, capsys, arguments, told):
    with pytest.raises(SystemExit) as end:
        predict.main(list(arguments))
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_names_that_are_no_unicode_pass_as_they_are(place, tmp_path, monkeypatch):
    name = b"caf\xe9 \n.png".decode("utf-8", "surrogateescape")
    shutil.copy(next(XRAY_IMAGES.glob("*.png")), tmp_path / name)
    for form in ("--csv", "--json"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8"))
        predict.main([str(tmp_path), form])
        sys.stdout.flush()
        if form == "--csv":
            assert b"caf\xe9 \n.png" in raw.getvalue()
        else:
            assert json.loads(raw.getvalue())["answers"][0]["path"] == str(tmp_path / name)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images in {REAL}")
def test_real_files_are_read(place, capsys):
    volume = REAL / CT_VOLUMES / "studies" / "CT-0" / "study_0001.nii.gz"
    slices = REAL / CT_SLICES / "curated_data" / "curated_data" / "3CAP"
    xrays = sorted((REAL / XRAYS).rglob("image/*.png"))[:3]
    answers = ask(capsys, volume, slices, *xrays)["answers"]
    assert len(answers) == 1 + 8 + 3
    assert answers[0]["slice"] == answers[0]["slices"] // 2
