"""extract_slices, build_manifest and split as a user runs them: outputs, and bad input."""

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import ROOT, failure, run_stage, write_params

from chest.collections import CT_SLICES, CT_VOLUMES, XRAYS
from chest.dataset import MANIFEST_COLUMNS
from chest.volumes import read_axial_slice

STUDIES = Path("data/raw/phantom") / CT_VOLUMES / "studies"
XRAY_IMAGES = Path("data/raw/phantom") / XRAYS / "Chest-X-Ray" / "Chest-X-Ray" / "image"
CT_IMAGES = Path("data/raw/phantom") / CT_SLICES / "curated_data" / "curated_data"


@pytest.fixture
def place(phantoms, tmp_path, monkeypatch):
    """A working directory with phantoms that a test may damage."""
    shutil.copytree(phantoms, tmp_path / "data/raw/phantom")
    write_params(tmp_path, **{"phantom.expected_counts": None})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cut(place):
    """The same, with the slices cut."""
    run_stage("extract_slices")
    return place


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


# --- extract_slices --------------------------------------------------------------------------


def test_each_volume_gives_its_centre_slice_as_a_grey_picture(cut):
    index = read("data/slices/index.csv")
    volumes = sorted(STUDIES.rglob("*.nii*"))
    assert list(index["study"]) == sorted(path.name.split(".")[0] for path in volumes)
    for row in index.itertuples():
        values = read_axial_slice(row.volume)
        low, high = values.min(), values.max()
        with Image.open(f"data/slices/{row.study}.png") as picture:
            assert picture.mode == "L"
            expected = np.round((values - low) / (high - low) * 255)
            assert np.array_equal(np.asarray(picture), expected)
        assert (row.slice, row.slices) == ("10", "20")
        assert row.label == ("normal" if "CT-0" in row.volume else "covid19")


def test_phantom_volumes_lie_as_a_radiologist_looks_at_them(cut):
    # Their bodies lie on a table, in whatever order the axes are stored.
    for path in Path("data/slices").glob("*.png"):
        grey = np.asarray(Image.open(path)).astype(float)
        rows, columns = (np.flatnonzero((grey[:80] > 90).sum(axis) > 10) for axis in (1, 0))
        assert grey[rows.max() + 4 :].max() > grey[: rows.min() - 3].max() + 20
        # The heart lies on the patient's left, the picture's right: less air in that lung.
        y, x = round(rows.mean()), round(columns.mean())
        right, left = grey[y - 14 : y + 4, x - 26 : x - 8], grey[y - 14 : y + 4, x + 8 : x + 26]
        assert (left > 120).sum() > (right > 120).sum()


def test_the_lung_window_is_a_parameter(place):
    write_params(place, **{"slices.normalize": "window", "slices.position": 0.25})
    run_stage("extract_slices")
    row = read("data/slices/index.csv").iloc[0]
    assert row["slice"] == str(round(0.25 * 19))
    values = np.clip(read_axial_slice(row["volume"], 0.25), -1000, 400)
    grey = np.asarray(Image.open(f"data/slices/{row['study']}.png"))
    assert np.array_equal(grey, np.round((values + 1000) / 1400 * 255))


def test_all_bad_volumes_are_listed_and_nothing_is_written(place, capsys):
    good = nib.load(STUDIES / "CT-0/study_0001.nii.gz")
    whole = gzip.decompress((STUDIES / "CT-0/study_0001.nii.gz").read_bytes())
    flat = nib.Nifti1Image(np.zeros((9, 9), np.int16), good.affine)
    nib.save(flat, STUDIES / "CT-0/study_0901.nii.gz")
    (STUDIES / "CT-1/study_0902.nii.gz").write_bytes(b"no volume")
    (STUDIES / "CT-1/study_0903.nii").write_bytes(whole[:20_000])
    (STUDIES / "CT-9").mkdir()
    message = failure("extract_slices", capsys)
    for told in (
        "study_0901", "shape 9x9", "study_0902", "no readable volume", "study_0903",
        f"at most 20,000 of {len(whole):,} bytes", "CT-9",
    ):  # fmt: skip
        assert told in message
    assert not Path("data/slices").exists()


def test_damage_inside_volumes_is_listed_and_nothing_is_written(place, capsys):
    path = STUDIES / "CT-0/study_0001.nii.gz"
    good, content = nib.load(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    (STUDIES / "CT-0/study_0901.nii.gz").write_bytes(with_another_value(content))
    constant = nib.Nifti1Image(np.full((9, 9, 9), -1000, np.int16), good.affine)
    nib.save(constant, STUDIES / "CT-1/study_0902.nii.gz")
    message = failure("extract_slices", capsys)
    assert "3 problems" in message
    for told in (
        "study_0001",
        "study_0901",
        "study_0902",
        "a constant slice (from -1000 to -1000)",
    ):
        assert told in message
    assert not Path("data/slices").exists()


def with_another_value(content):
    """A gzipped volume in which one value is not that of which it holds the checksum."""
    damaged = bytearray(gzip.decompress(content))
    damaged[len(damaged) // 2] ^= 1
    return gzip.compress(damaged)[:-8] + content[-8:]


def test_checksums_are_tested_unless_params_say_otherwise(place, capsys):
    # One whose slices lie one after another: of any other all is inflated, whatever they say.
    volumes = STUDIES.rglob("*.nii.gz")
    path = next(x for x in volumes if nib.aff2axcodes(nib.load(x).affine)[2] in "SI")
    path.write_bytes(with_another_value(path.read_bytes()))
    assert "CRC" in failure("extract_slices", capsys)
    write_params(place, **{"slices.verify": False})
    run_stage("extract_slices")
    assert len(list(Path("data/slices").glob("*.png"))) == len(list(STUDIES.rglob("*.nii*")))


def test_old_slices_survive_a_failing_run(cut, capsys):
    before = {path.name: path.read_bytes() for path in Path("data/slices").iterdir()}
    (STUDIES / "CT-1/study_0902.nii.gz").write_bytes(b"")
    failure("extract_slices", capsys)
    assert {path.name: path.read_bytes() for path in Path("data/slices").iterdir()} == before
    assert not list(Path("data").glob(".*partial*"))


def test_a_missing_collection_is_named(place, capsys):
    shutil.rmtree("data/raw/phantom/" + CT_VOLUMES)
    assert f"the collection {CT_VOLUMES}, unpacked" in failure("extract_slices", capsys)


# --- build_manifest --------------------------------------------------------------------------


def test_the_manifest_lists_every_image_once_and_row_i_is_image_i(cut):
    run_stage("build_manifest")
    manifest = read("data/manifest.csv")
    assert tuple(manifest.columns) == MANIFEST_COLUMNS
    ids = list(manifest["image_id"])
    assert ids == sorted(set(ids))
    files = [*CT_IMAGES.glob("[12]*/*.png"), *XRAY_IMAGES.glob("*.png"), *STUDIES.rglob("*.nii*")]
    assert len(manifest) == len(files)
    images = np.load("data/images.npy")
    assert (images.dtype, images.shape) == (np.uint8, (len(manifest), 224, 224))
    for i in range(0, len(manifest), 7):
        with Image.open(manifest["path"][i]) as picture:
            assert (str(picture.width), str(picture.height)) == (
                manifest["width"][i],
                manifest["height"][i],
            )
            if picture.mode == "L":
                expected = picture.resize((224, 224), Image.Resampling.BICUBIC)
                assert np.array_equal(images[i], np.asarray(expected))


def test_patients_sites_and_labels_are_those_of_the_tables(cut):
    run_stage("build_manifest")
    manifest = read("data/manifest.csv")
    shared = manifest[manifest["study"] != ""]
    both = shared.groupby("patient_id")["collection"].agg(set)
    assert (both == {"ct_slices", "ct_volumes"}).any()
    assert shared.groupby("patient_id")["study"].nunique().eq(1).all()
    assert set(manifest["site"]) >= {"Municipal Hospitals in Moscow", "Shenzhen", "Montgomery"}
    assert set(manifest.loc[manifest["modality"] == "xray", "label"]) == {"normal", "tuberculosis"}
    assert set(manifest.loc[manifest["modality"] == "ct", "label"]) == {"normal", "covid19"}


def test_counts_that_differ_show_both_tables(cut, capsys):
    run_stage("build_manifest")
    found = read("data/manifest.csv")["label"].value_counts()
    expected = {"covid19": 8449, "normal": 7506, "tuberculosis": 345}
    write_params(cut, **{"phantom.expected_counts": expected})
    message = failure("build_manifest", capsys)
    for label, count in expected.items():
        assert any(
            line.split() == [label, f"{count:,}", f"{found[label]:,}"]
            for line in message.splitlines()
        )


def test_all_bad_pictures_are_listed_and_nothing_is_written(cut, capsys):
    xrays = sorted(XRAY_IMAGES.glob("*.png"))
    xrays[0].write_bytes(xrays[0].read_bytes()[:3000])
    xrays[1].write_bytes(b"")
    Image.new("L", (50, 50), 7).save(xrays[2])
    slices = sorted((CT_IMAGES / "2COVID").glob("*.png"))
    slices[0].write_text("<html>404</html>")
    message = failure("build_manifest", capsys)
    assert "4 problems" in message
    for path in (*xrays[:3], slices[0]):
        assert str(path) in message
    assert "one grey value in all pixels" in message
    assert not Path("data/manifest.csv").exists()
    assert not Path("data/images.npy").exists()
    assert not list(Path("data").glob(".*partial*"))


def test_a_picture_under_two_labels_is_refused(cut, capsys):
    sick, healthy = (min((CT_IMAGES / name).glob("*.png")) for name in ("2COVID", "1NonCOVID"))
    shutil.copy(sick, healthy)
    message = failure("build_manifest", capsys)
    assert str(sick) in message
    assert str(healthy) in message
    assert "the same pixels" in message
    assert not Path("data/manifest.csv").exists()


FULL_DISK = """if True:
    import resource, runpy, sys
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def test_a_disk_that_fills_up_leaves_the_old_files(cut):
    run_stage("build_manifest")
    outputs = [Path("data/images.npy"), Path("data/manifest.csv")]
    before = [path.read_bytes() for path in outputs]
    write_params(cut, **{"phantom.expected_counts": None, "labels.tuberculosis": "remarks"})
    script = ROOT / "stages/build_manifest.py"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "ERROR: File too large: data/images.npy\n"
    assert [path.read_bytes() for path in outputs] == before
    assert not list(Path("data").glob(".*partial*"))


def test_a_disk_without_room_is_told_before_any_image_is_decoded(cut, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1e6))
    monkeypatch.setattr("chest.images.read_greys", lambda *_: pytest.fail("decoded"))
    assert "1 MB free on its disk" in failure("build_manifest", capsys)


def test_a_slice_that_is_gone_is_named(cut, capsys):
    Path("data/slices/study_0001.png").unlink()
    assert "data/slices/study_0001.png" in failure("build_manifest", capsys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: index.replace(",covid19,", ",healthy,", 1), "the label 'healthy'"),
        (lambda index: index.replace(",covid19,", ",tuberculosis,", 1), "the label 'tuberculosis'"),
        (lambda index: "".join(index.splitlines(True)[:-1]), "no row in index.csv"),
        (lambda index: index + index.splitlines(True)[-1], "2 images of that name"),
    ],
)
def test_an_index_that_does_not_fit_its_slices_is_refused(cut, capsys, change, told):
    index = Path("data/slices/index.csv")
    index.write_text(change(index.read_text()))
    assert told in failure("build_manifest", capsys)
    assert not Path("data/manifest.csv").exists()


# --- split -----------------------------------------------------------------------------------


def test_no_patient_is_in_two_splits(cut, capsys):
    run_stage("build_manifest")
    run_stage("split")
    manifest, split = read("data/manifest.csv"), read("data/split.csv")
    assert list(split["image_id"]) == list(manifest["image_id"])
    assert set(split["split"]) == {"train", "val", "test"}
    assert split["split"].groupby(manifest["patient_id"]).nunique().eq(1).all()
    assert "patients in more than one split: 0" in capsys.readouterr().out


def test_the_published_protocol_leaks_and_the_stage_says_so(cut, capsys):
    run_stage("build_manifest")
    write_params(cut, **{"split.group": "image"})
    run_stage("split")
    told = capsys.readouterr().out.splitlines()[-1]
    assert int(told.removeprefix("patients in more than one split: ")) > 10


def test_a_manifest_of_another_form_is_refused(place, capsys):
    Path("data/manifest.csv").write_text("image_id,label\na,normal\n")
    assert "the columns image_id,label" in failure("split", capsys)
    assert not Path("data/split.csv").exists()


# --- all of them -----------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(cut):
    def run():
        for stage in ("extract_slices", "build_manifest", "split"):
            run_stage(stage)
        files = [*Path("data/slices").iterdir(), *Path("data").glob("*.*")]
        return {path: path.read_bytes() for path in files}

    assert run() == run()


def test_the_data_stages_load_no_deep_learning_library(place):
    # They run on machines that have none, and start in a second.
    code = """if True:
        import runpy, sys
        runpy.run_path(sys.argv[1])
        print({"torch", "transformers"} & {*sys.modules})"""
    for stage in ("extract_slices", "build_manifest", "split", "audit", "floors", "evaluate"):
        script = ROOT / "stages" / f"{stage}.py"
        done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True)
        assert done.stdout.strip() == "set()", done.stderr
