"""New images of all kinds get the pipeline's answers; what is bad is listed at once."""

import io
import json
import re
import runpy
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from support import ROOT, load_script, require_shared, run_stage, write_params

from chest.core.errors import ChestError, InputError
from chest.core.labels import LABELS
from chest.core.params import load_params
from chest.data.collections import CT_SLICES, CT_VOLUMES, XRAYS
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.classification import save_classifier
from chest.models.common.pixels import load_normalization
from chest.models.common.preprocessing import write_preprocessing
from chest.models.common.views import View
from chest.models.encoders import load_classifier

predict = load_script("tools/predict.py")
SIDE = 112
NAME = "Secret^Name"
GREY = (np.add.outer(np.arange(40), np.arange(44) * 25) - 900).astype(np.int16)


@pytest.fixture(scope="module")
def home(checkpoints, tmp_path_factory):
    """A working directory with a tiny fine-tuned model and the stages; to be read only."""
    folder = tmp_path_factory.mktemp("home")
    asked = {"zeroshot_siglip": "siglip", "zeroshot_qwen": "qwen"}
    asked |= {f"zeroshot_vlm.{name}": name for name in ("qwen3", "medgemma")}
    changes = {f"phantom.{key}.checkpoint": str(checkpoints / x) for key, x in asked.items()}
    write_params(folder, **changes, **{"phantom.expected_counts": None})
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    model = load_classifier(source, SIDE)
    save_classifier(model, load_normalization(source), SIDE, folder / "models/finetune_siglip")
    params = load_params(folder / "params.yaml")
    write_preprocessing(folder / "models/finetune_siglip", params, View())
    (folder / "stages").symlink_to(ROOT / "stages")
    return folder


@pytest.fixture
def place(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def save_dicom(path, pixels=GREY, modality="CT", **tags):
    """Write a DICOM file of int16 `pixels`: a slice of CT, or an X-ray."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.Modality, dataset.SeriesInstanceUID = NAME, modality, "1.2.3"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *pixels.shape, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = pixels.astype("<i2").tobytes()
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_series(folder, values, height=0, **tags):
    """Write a volume, Hounsfield units in RAS+, as a DICOM series in `folder`."""
    for k in range(values.shape[2]):
        pixels = values[::-1, ::-1, k].T  # rows to posterior, columns to the patient's left
        place = [0, 0, height + 3 * k]
        save_dicom(folder / f"IM{k}", pixels, ImagePositionPatient=place, **tags)


@pytest.fixture
def mixed(tmp_path, place, phantoms):
    """A folder with images of all kinds, and files of other kinds."""
    folder = tmp_path / "all kinds"
    values = np.random.default_rng(0).integers(-1000, 1000, (44, 40, 7)).astype(np.int16)
    save_series(folder / "series", values)
    nib.save(nib.Nifti1Image(values, np.diag([0.7, 0.8, 3, 1])), folder / "volume.nii.gz")
    xray = next((phantoms / XRAYS).rglob("image/*.png"))
    shutil.copy(xray, folder / "a scan.PNG")
    Image.open(xray).convert("L").save(folder / "b.jpeg")
    save_dicom(folder / "c.dcm", modality="DX")
    save_dicom(folder / "d", modality="MR")
    (folder / "e.txt").write_text("text")
    (folder / ".hidden.png").write_text("no picture")
    return folder


IMAGES = ["a scan.PNG", "b.jpeg", "c.dcm", "series/IM3", "volume.nii.gz"]


def ask(capsys, *arguments):
    """The answers in json."""
    predict.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def names_in(answers, folder):
    return [answer["path"].removeprefix(f"{folder}/") for answer in answers]


# --- Answers ---------------------------------------------------------------------------------


def test_raw_files_get_the_answers_of_the_packed_images(
    home, phantoms, monkeypatch, tmp_path, capsys
):
    for name in ("params.yaml", "models", "stages"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data/raw/phantom"
    raw.parent.mkdir(parents=True)
    raw.symlink_to(phantoms)
    for stage in ("index_collections", "extract_slices", "build_manifest"):
        run_stage(stage)
    manifest = pd.read_csv("data/manifest.csv", keep_default_na=False)
    chosen = manifest.groupby("collection").head(6).index.to_numpy()
    images = np.load(f"data/images/{SIDE}.npy")
    predictor = predict.load_predictor("finetune_siglip", None, load_params())
    due = np.array(predictor.classify(images, chosen, ["ct"] * len(chosen)))

    volumes = {path.name.split(".")[0]: path for path in (raw / CT_VOLUMES).rglob("*.nii*")}
    rows = manifest.iloc[chosen]
    of_volume = rows["collection"] == "ct_volumes"
    paths = rows["path"].where(~of_volume, rows["study"].map(volumes)).astype(str)
    capsys.readouterr()
    predict.main([*paths, "--csv"])
    out, err = capsys.readouterr()
    table = pd.read_csv(io.StringIO(out), keep_default_na=False)
    assert list(table.columns) == ["path", "predicted", *LABELS, "modality"]
    assert list(table["path"]) == list(paths)
    np.testing.assert_allclose(table[list(LABELS)], due, atol=2e-6)
    assert list(table["predicted"]) == [LABELS[i] for i in due.argmax(1)]
    assert "no diagnosis" in err


@pytest.mark.parametrize("normalize", ["minmax", "window"])
def test_a_dicom_series_gets_the_answer_of_the_same_volume(
    home, mixed, tmp_path, capsys, monkeypatch, normalize
):
    shutil.copytree(home / "models", tmp_path / "models")
    write_params(tmp_path, **{"slices.normalize": normalize, "slices.position": 0.3})
    monkeypatch.chdir(tmp_path)
    write_preprocessing(tmp_path / "models/finetune_siglip", load_params(), View())
    series, volume = ask(capsys, mixed / "series", mixed / "volume.nii.gz")["answers"]
    assert [series[label] for label in LABELS] == [volume[label] for label in LABELS]
    for answer, told in ((series, "DICOM, CT"), (volume, "NIfTI")):
        assert (answer["slice"], answer["slices"], answer["modality"]) == (2, 7, "ct")
        assert answer["modality_told_by"] == told


ASKED = ["zeroshot_siglip", "zeroshot_qwen", "zeroshot_qwen3", "zeroshot_medgemma"]


@pytest.mark.parametrize("system", ASKED)
def test_a_stage_that_offers_a_predictor_answers_too(mixed, capsys, system):
    content = ask(capsys, mixed / "b.jpeg", "--system", system, "--modality", "xray")
    (answer,) = content["answers"]
    assert sum(answer[label] for label in LABELS) == pytest.approx(1, abs=1e-5)
    assert (answer["modality"], answer["modality_told_by"]) == ("xray", "--modality")
    assert content["system"] == system
    assert content["run"]["kind"] == "zero-shot"


def test_a_model_trained_on_prompts_answers_by_its_own(checkpoints, mixed, tmp_path, capsys):
    folder = tmp_path / "finetune_siglip_text_plain"
    shutil.copytree(checkpoints / "siglip", folder)
    write_preprocessing(folder, load_params(), View())
    prompts = load_params().content["prompts"]["siglip"]
    images = mixed / "b.jpeg", "--modality", "xray"
    due = ask(capsys, *images, "--system", "zeroshot_siglip")["answers"]
    for change, same in ({}, True), ({"normal": ["no {modality}"]}, False):
        (folder / "prompts.json").write_text(json.dumps(prompts | change))
        found = ask(capsys, *images, "--model", folder)
        assert (found["answers"] == due) == same
    assert (found["run"]["name"], found["run"]["kind"]) == (folder.name, "trained")
    (folder / "prompts.json").write_text("{}")
    with pytest.raises(ChestError, match=r"prompts\.json: missing or damaged"):
        predict.main([str(images[0]), "--model", str(folder)])


def test_the_table_for_people_tells_modality_slice_and_notice(mixed, capsys):
    predict.main([str(mixed / "a scan.PNG"), str(mixed / "c.dcm"), str(mixed / "volume.nii.gz")])
    lines = capsys.readouterr().out.splitlines()
    head, picture, xray, volume = lines[2:6]
    assert head.split() == ["file", "answer", "COVID-19", "Normal", "Tuberculosis", "modality"]
    assert picture.endswith("not told")
    assert xray.endswith("X-ray (DICOM, DX)")
    assert "volume.nii.gz (slice 4 of 7)" in volume
    assert volume.endswith("CT (NIfTI)")
    assert lines[-2:] == [predict.NOTICE, predict.RANDOM]


def test_a_model_reads_slices_as_those_it_was_trained_on(
    home, mixed, tmp_path, capsys, monkeypatch
):
    due = ask(capsys, mixed / "volume.nii.gz", "--model", home / "models/finetune_siglip")
    shutil.copytree(home / "models", tmp_path / "models")
    write_params(tmp_path, **{"slices.normalize": "window", "slices.position": 0.3})
    monkeypatch.chdir(tmp_path)
    predict.main([str(mixed / "volume.nii.gz"), "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["answers"] == due["answers"]
    assert "not as in params.yaml: position center, normalize minmax" in err
    for content in ("{}", '{"slices": {"position": "center"}}', "["):
        (tmp_path / "models/finetune_siglip/preprocessing.json").write_text(content)
        with pytest.raises(ChestError, match=r"preprocessing\.json: missing or damaged"):
            predict.main([str(mixed / "volume.nii.gz")])


# --- What is answered ------------------------------------------------------------------------


def test_all_images_in_a_folder_are_answered_and_the_rest_is_told(mixed, capsys):
    (mixed / "loop").symlink_to(mixed)
    predict.main([str(mixed), "--json"])
    out, err = capsys.readouterr()
    assert names_in(json.loads(out)["answers"], mixed) == IMAGES
    assert "d: DICOM of modality MR" in err
    assert "e.txt: no image of a known kind" in err
    assert "hidden" not in err


def test_each_name_gets_an_answer_copies_and_links_too(mixed, capsys):
    shutil.copytree(mixed / "series", mixed / "copy")
    (mixed / "link.png").symlink_to(mixed / "a scan.PNG")
    answers = ask(capsys, mixed / "c.dcm", mixed)["answers"]
    expected = ["c.dcm", "a scan.PNG", "b.jpeg", "copy/IM3", "link.png", *IMAGES[3:]]
    assert names_in(answers, mixed) == expected  # c.dcm once, where it is named first
    by_name = dict(zip(expected, answers, strict=True))
    assert by_name["link.png"]["normal"] == by_name["a scan.PNG"]["normal"]


def test_series_of_two_patients_and_of_two_passes_are_told_apart(mixed, capsys):
    values = np.random.default_rng(1).integers(-1000, 1000, (44, 40, 6)).astype(np.int16)
    save_series(mixed / "other", values, StudyInstanceUID="7.8")  # and the series of the first
    for number, height in (("1", 0), ("2", 1)):
        tags = {"AcquisitionNumber": number, "SeriesInstanceUID": "4.5"}
        save_series(mixed / f"pass{number}", values, height, **tags)
    for path in (mixed / "pass2").iterdir():
        path.rename(mixed / "pass1" / f"{path.name}b")
    names = names_in(ask(capsys, mixed)["answers"], mixed)
    assert [name for name in names if "/" in name] == [
        *("other/IM3", "pass1/IM3", "pass1/IM3b", "series/IM3")
    ]


def test_a_volume_of_one_slice_may_be_an_xray(mixed, capsys):
    film = np.random.default_rng(0).integers(0, 4000, (44, 40, 1)).astype(np.int16)
    nib.save(nib.Nifti1Image(film, np.diag([0.2, 0.2, 1, 1])), mixed / "film.nii.gz")
    (answer,) = ask(capsys, mixed / "film.nii.gz")["answers"]
    assert answer["modality"] is None
    (answer,) = ask(capsys, mixed / "film.nii.gz", "--modality", "xray")["answers"]
    assert answer["modality"] == "xray"


def test_odd_inputs_are_answered_rightly_or_refused_by_name(place, tmp_path, capsys):
    """See its README.md for what each file is."""
    odd = require_shared("odd-inputs")
    with pytest.raises(InputError) as caught:
        predict.main([str(odd), "--json", "--keep-going"])
    out, err = capsys.readouterr()
    answers = json.loads(out)["answers"]
    scores = dict(zip(names_in(answers, odd), [x["normal"] for x in answers], strict=True))
    assert {Path(name).parts[0] for name in scores} == {
        *("bits", "ct-padding", "ct-rescale", "links", "nifti", "png-16bit"),
        *("study-with-dose-report", "two-patients", "xray"),
    }
    for same in (
        ("png-16bit/c_12in16.png", "png-16bit/a_8bit.png"),
        ("ct-padding/m2000.nii.gz", "ct-padding/m3024.dcm"),
        ("ct-padding/plain.nii.gz", "ct-padding/plain.dcm", "ct-rescale/a_both.dcm"),
        ("xray/a_m2.dcm", "xray/b_m1.dcm"),
        ("xray/d_m1_pad0.dcm", "xray/e_m2_pad65535.dcm"),
    ):
        assert np.ptp([scores[name] for name in same]) < 5e-3, same
    assert {"two-patients/A/IM0010.dcm", "two-patients/B/IM0010.dcm"} <= {*scores}
    said = {str(p.file.relative_to(odd)): p.found for p in caught.value.problems}
    said |= dict(re.findall(rf"Skipped {odd}/(.*?): (.*)", err))
    for name, reason in {
        "bits/b_leftaligned.dcm": "HighBit 15",
        "ct-rescale/d_empty.dcm": "a RescaleSlope that is empty",
        "nifti/b_stack_first_identity.nii.gz": "an affine that says nothing",
        "nifti/i_mask.nii.gz": "only 2 grey values",
        "png-16bit/g_deeplesion.png": "nearly one grey value",
        "series-gap/gap_half/IM0018.dcm": "104 mm above",
        "study-with-dose-report/dose/report.dcm": "a secondary capture",
        "views/LEFT_LATERAL.dcm": "an X-ray that is not frontal",
        "views/XTABLE_LATERAL.dcm": "an X-ray that is not frontal",
        "views/k_forprocessing.dcm": "an X-ray for processing",
        "views/zz_BodyPart_HAND.dcm": "the body part HAND",
        "window/c_8bitwindow.dcm": "of it white",
    }.items():
        assert reason in said.pop(name)
    assert {Path(name).parts[0] for name in said} <= {"README.md", "links"}  # no links any more


def test_nothing_personal_is_printed(mixed, capsys):
    save_dicom(mixed / "bad.dcm", modality="DX", NumberOfFrames=2)
    for form in ([], ["--json"], ["--csv"]):
        with pytest.raises(InputError, match=r"bad\.dcm") as caught:
            predict.main([str(mixed), "--keep-going", *form])
        printed = capsys.readouterr()
        assert "c.dcm" in printed.out
        assert "Secret" not in printed.out + printed.err + str(caught.value)


# --- Explanations ----------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["finetune_siglip", "zeroshot_siglip"])
def test_a_picture_is_drawn_for_each_answer(mixed, tmp_path, capsys, system):
    shutil.copy(mixed / "b.jpeg", mixed / "a scan.jpg")
    files = [mixed / "a scan.PNG", mixed / "a scan.jpg", mixed / "volume.nii.gz"]
    options = ["--system", system, "--modality", "ct", "--explain", tmp_path / "drawn"]
    content = ask(capsys, *files, *options)
    pictures = [answer["explanation"] for answer in content["answers"]]
    names = ["a scan.png", "a scan-2.png", "volume.png"]
    assert pictures == [str(tmp_path / "drawn" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == sorted(names)
    with Image.open(pictures[0]) as drawn:
        assert drawn.width > 500


def test_explanations_replace_nothing(mixed, capsys):
    for folder in (mixed, mixed / "b.jpeg", mixed / "b.jpeg" / "drawn"):
        with pytest.raises(InputError, match="a new or empty folder"):
            predict.main([str(mixed / "b.jpeg"), "--explain", str(folder)])
    assert capsys.readouterr().out == ""


def test_a_system_that_cannot_explain_says_so(mixed, tmp_path):
    options = ["--system", "zeroshot_qwen", "--explain", str(tmp_path / "drawn")]
    with pytest.raises(ChestError, match="cannot tell where it looked"):
        predict.main([str(mixed / "volume.nii.gz"), *options])


# --- What is refused -------------------------------------------------------------------------


def test_all_bad_files_are_listed_and_nothing_is_answered(mixed, tmp_path, capsys):
    (mixed / "bad").mkdir()
    whole = (mixed / "volume.nii.gz").read_bytes()
    bad = {
        "a.png": b"no picture",
        "b.nii": b"no volume",
        "c.dcm": b"no DICOM",
        "d.nii.gz": whole[:900],
    }
    for name, content in bad.items():
        (mixed / "bad" / name).write_bytes(content)
    save_dicom(mixed / "bad" / "flat", np.zeros((9, 11)), SeriesInstanceUID="4.5")
    (tmp_path / "empty").mkdir()
    others = [tmp_path / "gone.png", mixed / "e.txt", mixed / "d", tmp_path / "empty"]
    with pytest.raises(InputError) as caught:
        predict.main([str(mixed), *map(str, others)])
    message = str(caught.value)
    assert f"{len(bad) + 1 + len(others)} problems" in message
    for told in (*bad, "flat", "gone.png", "e.txt", "modality MR", "no image below it"):
        assert told in message
    assert capsys.readouterr().out == ""

    with pytest.raises(InputError, match=f"{len(bad) + 1} problems"):
        predict.main([str(mixed), "--keep-going", "--csv"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(IMAGES)


def test_a_file_that_contradicts_the_modality_is_refused(mixed):
    files = [str(mixed / name) for name in ("volume.nii.gz", "b.jpeg")]
    with pytest.raises(InputError, match=r"1 problem .*\n.*\n.*CT \(NIfTI\)"):
        predict.main([*files, "--modality", "xray"])


def test_qwen_must_be_told_the_modality(mixed):
    with pytest.raises(InputError, match="give --modality ct or --modality xray"):
        predict.main([str(mixed / "b.jpeg"), "--system", "zeroshot_qwen"])


@pytest.mark.parametrize("options", [["--system", "floor_site"], ["--model", "nowhere"]])
def test_an_unknown_system_is_told_with_those_that_there_are(mixed, options):
    with pytest.raises(ChestError, match="finetune_siglip, zeroshot_medgemma, zeroshot_qwen,"):
        predict.main([str(mixed / "b.jpeg"), *options])


def test_elsewhere_it_says_where_to_run_it(mixed, monkeypatch):
    monkeypatch.chdir(mixed)
    with pytest.raises(ChestError, match="run this in the repository's root"):
        predict.main(["b.jpeg"])
    for tool in ("lock", "predict", "sweep"):
        with pytest.raises(SystemExit, match="run this in the repository's root"):
            runpy.run_path(str(ROOT / f"tools/{tool}.py"), run_name="__main__")


def test_real_images_are_read(place, capsys):
    real = require_shared("real")
    volume = real / CT_VOLUMES / "studies/CT-0/study_0001.nii.gz"
    slices = real / CT_SLICES / "curated_data/curated_data/3CAP"
    xrays = sorted((real / XRAYS).rglob("image/*.png"))[:3]
    answers = ask(capsys, volume, slices, *xrays)["answers"]
    assert len(answers) == 1 + len([*slices.glob("*.png")]) + 3
    assert answers[0]["slice"] == answers[0]["slices"] // 2
