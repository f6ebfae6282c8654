"""The leak audit: near-duplicates found as by brute force, and what the splits share."""

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import BESIDE, failure, run_stage, write_params

from chest import audit
from chest.audit import (
    NEAR_COLUMNS,
    THRESHOLD,
    composition,
    count_by_distance,
    find_near_duplicates,
    leak_counts,
    near_pairs,
    perceptual_hashes,
    read_near_duplicates,
    worst_pairs,
)
from chest.dataset import read_labelled
from chest.errors import InputError
from chest.images import read_grey
from chest.labels import SPLITS

SLICES = BESIDE / "real/large-covid19-ct-slice-dataset/curated_data/curated_data"


def describe(n, **columns):
    """A manifest with the column split, of `n` images: all alike but for `columns`."""
    table = pd.DataFrame(
        {"image_id": [f"image-{i:05}" for i in range(n)], "label": "normal",
         "collection": "ct_slices", "site": "A", "patient_id": [f"p{i}" for i in range(n)],
         "pixel_hash": [f"h{i}" for i in range(n)], "split": "train"}
    )  # fmt: skip
    return table.assign(**columns)


def draw(n, side=224, seed=0):
    """`n` different smooth pictures, uint8 (n, side, side)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 12, 12)).astype(np.uint8)
    return np.stack([resize(picture, side) for picture in coarse])


def resize(picture, side):
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def as_jpeg(picture, quality=60):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


COPIES = {
    "jpeg": as_jpeg,
    "smaller": lambda picture: resize(resize(picture, 100), len(picture)),
    "brighter": lambda picture: np.minimum(picture * 1.05 + 5, 255).astype(np.uint8),
}


# --- The search ------------------------------------------------------------------------------


def drawn_hashes(families=60, size=8, flips=14):
    """Families of hashes: `size` of each differ from a common one in 0 to `flips` bits."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2, (families, 256)).repeat(size, axis=0).astype(np.uint8)
    for row in bits:
        row[rng.permutation(256)[: rng.integers(flips + 1)]] ^= 1
    return np.packbits(rng.permutation(bits), axis=1).view(np.uint64)


def by_brute_force(hashes, groups, threshold):
    bits = np.unpackbits(hashes.view(np.uint8), axis=1).astype(np.int64)
    distance = (bits[:, None] != bits[None]).sum(2)
    apart = groups[:, None] != groups[None]
    first, second = np.nonzero(np.triu(apart & (distance <= threshold), 1))
    return first, second, distance[first, second]


@pytest.mark.parametrize("threshold", [0, 1, 7, 16, THRESHOLD])
@pytest.mark.parametrize("chunk", [37, audit.CHUNK])
def test_the_pairs_are_those_of_brute_force(threshold, chunk, monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", chunk)
    hashes = drawn_hashes()
    groups = np.random.default_rng(2).integers(0, 3, len(hashes))
    expected = by_brute_force(hashes, groups, threshold)
    assert expected[2].max() == threshold
    assert len(expected[2]) > 0
    for found, due in zip(near_pairs(hashes, groups, threshold), expected, strict=True):
        assert np.array_equal(found, due)


def test_only_pairs_of_two_groups_count():
    hashes = np.repeat(drawn_hashes()[:1], 6, axis=0)
    first, second, distance = near_pairs(hashes, np.array([0, 0, 0, 1, 1, 2]), THRESHOLD)
    assert len(first) == 3 * 2 + 3 * 1 + 2 * 1
    assert (first < second).all()
    assert (distance == 0).all()
    assert len(near_pairs(hashes, np.zeros(6), THRESHOLD)[0]) == 0


def test_candidates_are_all_pairs_of_keys_that_differ_in_at_most_one_bit():
    keys = np.random.default_rng(4).integers(0, 2**6, 150)
    found = [pair for part in audit._candidates(keys, width=6) for pair in zip(*part, strict=True)]
    near = np.triu(np.bitwise_count(keys[:, None] ^ keys[None]) <= 1, 1)
    assert sorted(tuple(sorted(pair)) for pair in found) == list(zip(*near.nonzero(), strict=True))


def test_a_bucket_that_holds_all_is_worked_off_in_parts(monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", 100)
    parts = list(audit._candidates(np.full(80, 5), width=4))
    assert max(len(first) for first, _ in parts) == 100
    pairs = {tuple(sorted(pair)) for part in parts for pair in zip(*part, strict=True)}
    assert len(pairs) == sum(len(first) for first, _ in parts) == 80 * 79 // 2


def test_few_of_all_pairs_are_compared(monkeypatch):
    compared = []
    distances = audit._distances
    monkeypatch.setattr(
        audit, "_distances", lambda hashes, a, b: compared.append(len(a)) or distances(hashes, a, b)
    )
    hashes = perceptual_hashes(draw(1500, side=64))
    near_pairs(hashes, np.arange(1500), THRESHOLD)
    assert 0 < sum(compared) < 0.01 * 1500 * 1499 / 2


# --- The pairs' table ------------------------------------------------------------------------


def test_copies_in_another_split_are_found_and_nothing_else():
    originals = draw(40)
    copies = np.stack([
        copy(picture)
        for picture, copy in zip(originals[:30], [*COPIES.values()] * 10, strict=True)
    ])  # fmt: skip
    table = describe(70, split=["train"] * 40 + ["test"] * 30)
    found = find_near_duplicates(table, perceptual_hashes(np.concatenate([originals, copies])))
    assert tuple(found.columns) == NEAR_COLUMNS
    expected = {(f"image-{i:05}", f"image-{40 + i:05}") for i in range(30)}
    assert set(zip(found["image_id_a"], found["image_id_b"], strict=True)) == expected
    assert found["distance"].is_monotonic_increasing


def test_the_earlier_split_stands_first_with_what_is_known_of_it():
    hashes = np.repeat(drawn_hashes()[:1], 3, axis=0)
    table = describe(
        3, split=["test", "val", "train"], label=["covid19", "normal", "tuberculosis"],
        collection=["ct_volumes", "ct_slices", "xrays"],
    )  # fmt: skip
    found = find_near_duplicates(table, hashes)
    assert found.to_numpy().tolist() == [
        [0, "image-00001", "val", "normal", "p1", "ct_slices",
         "image-00000", "test", "covid19", "p0", "ct_volumes"],
        [0, "image-00002", "train", "tuberculosis", "p2", "xrays",
         "image-00000", "test", "covid19", "p0", "ct_volumes"],
        [0, "image-00002", "train", "tuberculosis", "p2", "xrays",
         "image-00001", "val", "normal", "p1", "ct_slices"],
    ]  # fmt: skip


def test_the_order_of_the_rows_changes_nothing():
    hashes = drawn_hashes()
    rng = np.random.default_rng(3)
    table = describe(len(hashes), split=rng.choice(SPLITS, len(hashes)))
    shuffled = rng.permutation(len(hashes))
    found = find_near_duplicates(table, hashes)
    assert len(found) > 100
    again = find_near_duplicates(table.iloc[shuffled].reset_index(drop=True), hashes[shuffled])
    pd.testing.assert_frame_equal(found, again)


def test_no_near_duplicates_give_empty_tables():
    table = describe(20, split=["train"] * 15 + ["test"] * 5)
    found = find_near_duplicates(table, perceptual_hashes(draw(20)))
    assert (len(found), tuple(found.columns)) == (0, NEAR_COLUMNS)
    assert len(count_by_distance(found)) == len(worst_pairs(found, 5)) == 0
    counts = leak_counts(table, found)
    assert {*counts["shared"].values(), *counts["near_duplicates"].values()} == {0}


def pairs_of(table, *pairs):
    """The pairs' table for (row a, row b, distance) of `table`."""
    sides = list(audit.DESCRIBED)
    rows = [[d, *table.loc[a, sides], *table.loc[b, sides]] for a, b, d in pairs]
    return pd.DataFrame(rows, columns=NEAR_COLUMNS)


def test_pairs_are_counted_by_distance():
    table = describe(6, patient_id=["a", "a", "b", "c", "d", "d"], split=["train", "test"] * 3)
    found = count_by_distance(pairs_of(table, (0, 1, 2), (2, 3, 2), (2, 1, 2), (4, 5, 8)))
    assert found.to_dict("list") == {
        "distance": [2, 8], "same_patient": [1, 1], "other_patient": [2, 0],
    }  # fmt: skip


def test_the_worst_pairs_show_each_image_once():
    table = describe(7)
    near = pairs_of(table, (0, 1, 0), (0, 2, 2), (3, 1, 2), (3, 2, 4), (5, 6, 6))
    worst = worst_pairs(near, 3)
    assert list(worst["distance"]) == [0, 4, 6]
    assert list(worst_pairs(near, 1)["image_id_a"]) == ["image-00000"]


# --- What the splits hold and share ----------------------------------------------------------


def test_the_composition_counts_images_and_patients():
    table = describe(
        7,
        label=["covid19"] * 3 + ["normal"] * 4,
        collection=["ct_slices", "ct_slices", "ct_volumes", *["xrays"] * 4],
        site=["A", "A", "A", "B", "B", "C", "C"],
        patient_id=["a", "a", "a", "b", "c", "d", "e"],
        split=["train", "train", "train", "train", "val", "test", "test"],
    )
    found = composition(table)
    assert list(found.columns) == [
        "label", "collection", "site", "train_images", "train_patients",
        "val_images", "val_patients", "test_images", "test_patients",
    ]  # fmt: skip
    assert found.to_numpy().tolist() == [
        ["covid19", "ct_slices", "A", 2, 1, 0, 0, 0, 0],
        ["covid19", "ct_volumes", "A", 1, 1, 0, 0, 0, 0],
        ["normal", "xrays", "B", 1, 1, 1, 1, 0, 0],
        ["normal", "xrays", "C", 0, 0, 0, 0, 2, 2],
        ["total", "", "", 4, 2, 1, 1, 2, 2],  # patient a is in two rows, and counts once
    ]


def test_the_composition_has_all_splits_even_where_one_is_empty():
    found = composition(describe(3, split=["train", "train", "test"])).iloc[-1]
    assert [found[f"{split}_images"] for split in SPLITS] == [2, 0, 1]


def test_the_leaks_are_counted():
    table = describe(
        8,
        patient_id=["a", "a", "b", "c", "c", "c", "e", "f"],
        pixel_hash=["1", "2", "3", "4", "5", "6", "7", "3"],
        label=["normal", "normal", "covid19", *["normal"] * 5],
        split=["train", "test", "train", "val", "test", "test", "test", "val"],
    )
    near = pairs_of(table, (2, 7, 0), (0, 1, 4), (2, 1, 6), (2, 6, 8), (3, 4, 8), (3, 5, 10))
    assert leak_counts(table, near) == {
        "shared": {"patients": 2, "pixels": 1},  # a and c; the pixels 3
        "near_duplicates": {
            "pairs": 6, "train_test": 3, "train_val": 1, "val_test": 2,
            "other_label": 3, "same_patient": 3,
        },
        # Of the four test images 1, 4, 5 and 6: patient a's; 1 and 6 have a twin in training.
        "test_share": {"patient_in_train": 0.25, "near_duplicate_in_train": 0.5},
    }  # fmt: skip


# --- The stage -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(phantoms, tmp_path_factory):
    """A folder in which the phantoms are packed; to be copied."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "data/raw").mkdir(parents=True)
    (folder / "data/raw/phantom").symlink_to(phantoms)
    write_params(folder, **{"phantom.expected_counts": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage("extract_slices")
        run_stage("build_manifest")
    return folder


@pytest.fixture
def place(packed, tmp_path, monkeypatch):
    """A working directory with packed phantoms, split by patient."""
    shutil.copytree(packed, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_stage("split")
    return tmp_path


def audited():
    run_stage("audit")
    near = read_near_duplicates()
    return near, leak_counts(read_labelled(), near)


def test_a_split_by_patient_shares_no_patient(place, capsys):
    near, counts = audited()
    assert counts["shared"] == {"patients": 0, "pixels": 0}
    assert counts["near_duplicates"]["same_patient"] == 0
    assert counts["test_share"]["patient_in_train"] == 0
    # Phantoms of different patients may look alike: the stage says how many do.
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"near-duplicates across splits: {len(near)}, of different patients: {len(near)}"


def test_the_published_protocol_leaks_and_the_audit_shows_it(place):
    write_params(place, **{"phantom.expected_counts": None, "split.group": "image"})
    run_stage("split")
    near, counts = audited()
    assert counts["shared"]["patients"] > 10
    assert counts["near_duplicates"]["same_patient"] > 10
    assert counts["test_share"]["patient_in_train"] > 0.5
    labelled = read_labelled()
    test = labelled[labelled["split"] == "test"]
    twins = near.loc[(near["split_a"] == "train") & (near["split_b"] == "test"), "image_id_b"]
    share = test["image_id"].isin(set(twins)).mean()
    assert counts["test_share"]["near_duplicate_in_train"] == pytest.approx(share, abs=1e-4)
    assert share > 0


def test_two_runs_give_the_same_bytes(place):
    def run():
        run_stage("audit")
        return {path.name: path.read_bytes() for path in Path("data/audit").iterdir()}

    first = run()
    assert first == run()
    assert first.keys() == {"near_duplicates.csv", "by_distance.csv"}


def test_missing_images_are_named_and_the_old_audit_stays(place, capsys):
    run_stage("audit")
    before = Path("data/audit/near_duplicates.csv").read_bytes()
    Path("data/images.npy").unlink()
    assert "data/images.npy" in failure("audit", capsys)
    assert Path("data/audit/near_duplicates.csv").read_bytes() == before
    assert not list(Path("data").glob(".*partial*"))


def test_rows_that_do_not_fit_are_refused(place, capsys):
    images = np.load("data/images.npy")
    np.save("data/images.npy", images[1:])
    message = failure("audit", capsys)
    assert f"uint8 of shape ({len(images) - 1}, 224, 224)" in message
    assert f"uint8 of shape ({len(images)}, side, side)" in message
    assert not Path("data/audit").exists()


def test_an_audit_of_another_form_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/audit").mkdir(parents=True)
    for content, told in (
        ("image_id,distance\na,1\n", "the columns image_id,distance"),
        (",".join(NEAR_COLUMNS) + "\n" + "near" + ",a" * 10 + "\n", "near"),
    ):
        Path("data/audit/near_duplicates.csv").write_text(content)
        with pytest.raises(InputError, match=told):
            read_near_duplicates()


# --- Real images -----------------------------------------------------------------------------

real = pytest.mark.skipif(not SLICES.is_dir(), reason="no real images beside the project")


@real
def test_real_slices_saved_again_are_found_and_other_people_are_not(tmp_path):
    paths = sorted(SLICES.glob("*/cvt_*.png"))[::3]  # one slice a patient
    copies = []
    for k, path in enumerate(paths):
        picture, side = Image.open(path).convert("L"), (256, 384, 700)[k % 3]
        copies.append(tmp_path / f"{path.stem}.jpg")
        picture.resize((side, side)).save(copies[-1], quality=75)
    n = len(paths)
    table = describe(2 * n, split=["train"] * n + ["test"] * n)
    images = np.stack([read_grey(path, 224).pixels for path in [*paths, *copies]])
    found = find_near_duplicates(table, perceptual_hashes(images))
    assert n >= 30
    assert sorted(zip(found["image_id_a"], found["image_id_b"], strict=True)) == [
        (f"image-{i:05}", f"image-{n + i:05}") for i in range(n)
    ]


@real
def test_real_neighbouring_slices_are_found():
    names = ("P001_79", "P001_80", "P001_81", "P002_120", "P002_121", "P001_140", "P001_141")
    images = np.stack([read_grey(SLICES / f"2COVID/{name}.png", 224).pixels for name in names])
    table = describe(7, split=["train", "test", "train", "train", "test", "train", "test"])
    found = find_near_duplicates(table, perceptual_hashes(images))
    pairs = set(zip(found["image_id_a"].str[-1], found["image_id_b"].str[-1], strict=True))
    assert pairs == {("0", "1"), ("2", "1"), ("3", "4"), ("5", "6")}
