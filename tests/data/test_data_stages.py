"""extract_slices, build_manifest, split and audit as a user runs them, on drawn and real data."""

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from drawn import draw_mask, draw_picture
from PIL import Image
from support import failure, require_shared, run_stage, write_params

from chest.core.errors import InputError
from chest.core.labels import SPLITS
from chest.data import audit
from chest.data.collections import CT_SLICES, CT_VOLUMES, XRAYS
from chest.data.dataset import (
    MANIFEST_COLUMNS,
    read_dataset,
    read_images,
    read_labelled,
    read_manifest,
)
from chest.data.masks import read_published_masks, resize_mask, unpack
from chest.data.pictures import read_picture
from chest.data.volumes import read_axial_slice, to_grey

STUDIES = Path("data/raw/phantom") / CT_VOLUMES / "studies"
FILMS = Path("data/raw/phantom") / XRAYS / "Chest-X-Ray/Chest-X-Ray/image"
SLICES = Path("data/raw/phantom") / CT_SLICES / "curated_data/curated_data"


@pytest.fixture
def indexed(place):
    run_stage("index_collections")
    return place


@pytest.fixture
def cut(indexed):
    run_stage("extract_slices")
    return indexed


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_each_volume_gives_its_centre_slice(cut):
    index = read("data/slices/index.csv")
    assert list(index["study"]) == ["study_0001", "study_0002", "study_0255"]
    assert list(index["label"]) == ["normal", "normal", "covid19"]
    for row in index.itertuples():
        assert (row.slice, row.slices) == ("4", "9")
        expected = to_grey(read_axial_slice(row.volume), "minmax")
        with Image.open(row.path) as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), expected)
        assert (row.columns, row.rows) == ("36", "42")


def test_position_and_window_are_parameters(indexed):
    write_params(indexed, **{"slices.normalize": "window", "slices.position": 0.25})
    run_stage("extract_slices")
    row = read("data/slices/index.csv").iloc[0]
    assert row["slice"] == "2"
    expected = to_grey(read_axial_slice(row["volume"], 0.25), "window")
    assert np.array_equal(np.asarray(Image.open(row["path"])), expected)


def test_bad_headers_are_listed_before_a_slice_is_cut(indexed, capsys):
    whole = gzip.decompress((STUDIES / "CT-0/study_0001.nii.gz").read_bytes())
    (STUDIES / "CT-0/study_0001.nii.gz").write_bytes(b"no volume")
    (STUDIES / "CT-0/study_0002.nii").write_bytes(whole[:2000])
    constant = nib.Nifti1Image(np.zeros((40, 40, 9), np.int16), np.diag([1, 1, 5, 1]))
    nib.save(constant, STUDIES / "CT-1/study_0255.nii.gz")  # which only cutting it tells
    message = failure("extract_slices", capsys)
    for told in ("2 problems", "study_0001", "study_0002", f"2,000 of {len(whole):,} bytes"):
        assert told in message
    assert not Path("data/slices").exists()


def test_damage_inside_volumes_is_listed_and_nothing_is_written(indexed, capsys):
    path = STUDIES / "CT-0/study_0001.nii.gz"
    noise = np.random.default_rng(0).integers(-999, 999, (60, 60, 60)).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, np.diag([1, 1, 5, 1])), path)
    damaged = bytearray(gzip.decompress(path.read_bytes()))
    damaged[-600] ^= 1
    path.write_bytes(gzip.compress(damaged)[:-8] + path.read_bytes()[-8:])
    constant = nib.Nifti1Image(np.full((40, 40, 9), -2000, np.int16), np.diag([1, 1, 5, 1]))
    nib.save(constant, STUDIES / "CT-1/study_0255.nii.gz")
    message = failure("extract_slices", capsys)
    for told in ("2 problems", "CRC", "a constant picture"):
        assert told in message
    assert not Path("data/slices").exists()


def test_manifest_and_arrays(cut):
    run_stage("build_manifest")
    table = read_manifest()
    assert list(table.columns) == list(MANIFEST_COLUMNS)
    assert table["label"].value_counts().to_dict() == {"normal": 7, "covid19": 6, "tuberculosis": 2}
    assert table.groupby("patient_id")["collection"].nunique()["mosmed-0001"] == 2
    for side in (16, 24):
        images = read_images(len(table), side)
        for row, image in zip(table.itertuples(), images, strict=True):
            picture = read_picture(row.path, [side])
            assert np.array_equal(image, picture.pixels[side])
            assert row.pixel_hash == picture.pixel_hash
            assert (row.width, row.height) == (str(picture.width), str(picture.height))
    assert read_images(len(table)).shape == (15, 16, 16)  # the smallest, unless one is named
    with pytest.raises(InputError, match="images packed to 16, 24"):
        read_images(len(table), 32)
    with pytest.raises(InputError, match=r"uint8 of shape \(14, 16, 16\)"):
        read_images(14, 16)


def test_published_lung_masks_lie_on_their_images(cut):
    run_stage("build_manifest")
    table = read_manifest()
    for side in (16, 24):
        rows, packed = read_published_masks(table, side)
        assert table["image_id"].iloc[rows].tolist() == ["xrays-1000"]
        expected = resize_mask(draw_mask() > 0, side)  # of another size than the X-ray
        assert np.array_equal(unpack(packed), expected[None])


def test_all_bad_pictures_are_listed_and_nothing_is_written(cut, capsys):
    (FILMS.parent / "mask/1000.png").write_bytes(b"no mask")
    Image.new("L", (9, 9), 7).save(FILMS / "1000.png")
    (FILMS / "1001.png").write_bytes((FILMS / "1001.png").read_bytes()[:200])
    (SLICES / "2COVID/P002_7.png").unlink()
    message = failure("build_manifest", capsys)
    for told in ("4 problems", "one grey value", "mask/1000.png", "no such file"):
        assert told in message
    assert not Path("data/images").exists()
    assert not Path("data/manifest.csv").exists()


def test_the_same_pixels_under_two_labels_are_refused(cut, capsys):
    shutil.copy(FILMS / "1000.png", FILMS / "1001.png")
    shutil.copy(FILMS / "1000.png", FILMS / "1002.png")  # tuberculosis as well
    message = failure("build_manifest", capsys)
    assert "1 problem" in message
    assert "the same pixels as tuberculosis and as normal and as tuberculosis" in message


def test_collections_that_are_left_out(place, raw):
    shutil.rmtree(raw / CT_VOLUMES)
    changes = {"collections": ["ct_slices", "xrays"], "phantom.expected_counts": None}
    write_params(place, **changes)
    for stage in ("index_collections", "extract_slices", "build_manifest"):
        run_stage(stage)
    assert list(Path("data/slices").iterdir()) == [Path("data/slices/index.csv")]
    assert set(read_manifest()["collection"]) == {"ct_slices", "xrays"}


def test_tables_that_do_not_belong_together_are_refused(cut):
    run_stage("build_manifest")
    manifest = read_manifest()
    split = pd.DataFrame({"image_id": manifest["image_id"], "split": "train"})

    def told(needed, **changes):
        split.assign(**changes).to_csv("data/split.csv", index=False)
        with pytest.raises(InputError) as error:
            read_labelled(*needed)
        return str(error.value)

    assert "no image in test" in told(["train", "test"])
    assert "the split 'dev'" in told([], split="dev")
    assert "other images" in told([], image_id="a")
    split.to_csv("data/split.csv", index=False)
    data = read_dataset("train", side=24)
    assert data.images.shape == (15, 24, 24)
    assert list(data.rows("train", "val")) == list(range(15))
    for changes, expected in (
        ({"label": "flu"}, "the label 'flu'"),
        ({"image_id": manifest["image_id"][::-1].to_numpy()}, "out of order"),
    ):
        manifest.assign(**changes).to_csv("data/manifest.csv", index=False)
        with pytest.raises(InputError, match=expected):
            read_manifest()


def test_real_images_from_index_to_audit(tmp_path, monkeypatch, capsys):
    real = require_shared("real")
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/study").symlink_to(real)
    counts = {"covid19": 122, "normal": 152, "tuberculosis": 60}
    changes = {"study.expected_counts": counts, "study.image_sizes": [64]}
    write_params(tmp_path, profile="study", **changes)
    monkeypatch.chdir(tmp_path)
    for stage in ("index_collections", "extract_slices", "build_manifest", "split", "audit"):
        run_stage(stage)
    data = read_dataset("train", "val", "test")
    assert data.images.shape == (334, 64, 64)
    patients = data.table.groupby("patient_id")["split"].nunique()
    assert patients.max() == 1
    assert "patients in more than one split: 0" in capsys.readouterr().out

    # Slices lie as a radiologist looks at them: the table below, air above.
    cuts = [np.asarray(Image.open(path), float) for path in Path("data/slices").glob("*.png")]
    assert len(cuts) == 4
    for grey in cuts:
        assert grey[:10].mean() < grey[-60:].mean()

    pairs, counted = audit.read_audit(data.table)
    assert len(pairs) == counted["pairs"]
    leaks = audit.leak_counts(data.table, counted)
    assert leaks["shared"] == {"patients": 0, "pixels": 0}
    table = audit.composition(data.table)
    assert table.iloc[-1][[f"{split}_images" for split in SPLITS]].sum() == 334


def test_copies_in_two_splits_are_told_by_the_audit(cut):
    picture = Image.fromarray(draw_picture(1, 200))
    for number, name in enumerate(["2COVID/P001_1.png", "2COVID/P001_2.png", "2COVID/P002_7.png"]):
        picture.resize((200 - number, 200 + number)).save(SLICES / name)
    run_stage("build_manifest")
    frame = read_manifest()[["image_id"]].assign(split=["train", "val", "test"] * 5)
    frame.to_csv("data/split.csv", index=False)
    run_stage("audit")
    pairs, counts = audit.read_audit(read_labelled())
    copies = {f"ct_slices-{name}" for name in ("P001_1", "P001_2", "P002_7")}
    assert {*pairs["image_id_a"], *pairs["image_id_b"]} == copies
    assert counts["pairs"] == len(pairs) == 3
    frame.assign(split="train").to_csv("data/split.csv", index=False)
    with pytest.raises(InputError, match="other images or splits"):
        audit.read_audit(read_labelled())
