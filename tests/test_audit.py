"""The leak audit: near-duplicates found as by brute force, and what the splits share."""

import io
import json
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
    find_near_duplicates,
    leak_counts,
    near_pairs,
    perceptual_hashes,
    read_counts,
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
    """(row in the lower group, row in the higher one, bits that differ) of each near pair."""
    bits = np.unpackbits(hashes.view(np.uint8), axis=1).astype(np.int64)
    distance = (bits[:, None] != bits[None]).sum(2)
    first, second = np.nonzero((groups[:, None] < groups[None]) & (distance <= threshold))
    return sorted(zip(first, second, distance[first, second], strict=True))


def found_pairs(hashes, groups, threshold):
    """The same by `near_pairs`."""
    parts = near_pairs(hashes, groups, threshold)
    return sorted(pair for part in parts for pair in zip(*part, strict=True))


@pytest.mark.parametrize("threshold", [0, 1, 7, 16, THRESHOLD])
@pytest.mark.parametrize("chunk", [37, audit.CHUNK])
def test_the_pairs_are_those_of_brute_force(threshold, chunk, monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", chunk)
    hashes = drawn_hashes()
    groups = np.random.default_rng(2).integers(0, 3, len(hashes))
    expected = by_brute_force(hashes, groups, threshold)
    assert max(distance for *_, distance in expected) == threshold
    assert found_pairs(hashes, groups, threshold) == expected


def test_pairs_of_pictures_that_are_all_alike_are_those_of_brute_force_too():
    # One family: nearly every pair would be compared in nearly every band.
    hashes = drawn_hashes(families=1, size=90, flips=11)
    groups = np.random.default_rng(2).integers(0, 3, len(hashes))
    assert found_pairs(hashes, groups, THRESHOLD) == by_brute_force(hashes, groups, THRESHOLD)


def test_no_more_pairs_are_compared_than_there_are(monkeypatch):
    compared = watch(monkeypatch)
    assert len(found_pairs(np.zeros((60, 4), np.uint64), np.arange(60) % 2, THRESHOLD)) == 900
    assert sum(compared) == 900


def test_only_pairs_of_two_groups_count():
    hashes = np.repeat(drawn_hashes()[:1], 6, axis=0)
    groups = np.array([0, 1, 0, 2, 1, 0])
    first, second, distance = zip(*found_pairs(hashes, groups, THRESHOLD), strict=True)
    assert len(first) == 3 * 2 + 3 * 1 + 2 * 1
    assert (groups[list(first)] < groups[list(second)]).all()
    assert set(distance) == {0}
    assert found_pairs(hashes, np.zeros(6), THRESHOLD) == []


def test_a_band_gives_all_pairs_that_differ_in_at_most_one_bit_of_it():
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 2, (150, 6)), rng.integers(0, 2, (70, 6))
    band = audit.Band(first, second)
    found = [pair for part in band.pairs() for pair in zip(*part, strict=True)]
    near = (first[:, None] != second[None]).sum(2) <= 1
    assert sorted(found) == list(zip(*near.nonzero(), strict=True))
    assert band.count() == len(found)


def test_a_band_that_all_share_is_worked_off_in_parts(monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", 100)
    parts = list(audit.Band(np.ones((80, 4), int), np.ones((30, 4), int)).pairs())
    assert max(len(first) for first, _ in parts) == 100
    pairs = {pair for part in parts for pair in zip(*part, strict=True)}
    assert len(pairs) == sum(len(first) for first, _ in parts) == 80 * 30


def watch(monkeypatch):
    """A list that grows by how many pairs are compared, part by part."""
    compared, keep = [], audit._keep_near
    monkeypatch.setattr(
        audit,
        "_keep_near",
        lambda hashes, a, *rest: compared.append(len(a)) or keep(hashes, a, *rest),
    )
    return compared


def test_few_of_all_pairs_are_compared(monkeypatch):
    compared = watch(monkeypatch)
    hashes = perceptual_hashes(draw(1500, side=64))
    found_pairs(hashes, np.arange(1500) % 3, THRESHOLD)
    assert 0 < sum(compared) < 0.01 * 3 * 500**2


# --- The pairs' table ------------------------------------------------------------------------


def test_copies_in_another_split_are_found_and_nothing_else():
    originals = draw(40)
    copies = np.stack([
        copy(picture)
        for picture, copy in zip(originals[:30], [*COPIES.values()] * 10, strict=True)
    ])  # fmt: skip
    table = describe(70, split=["train"] * 40 + ["test"] * 30)
    hashes = perceptual_hashes(np.concatenate([originals, copies]))
    found = find_near_duplicates(table, hashes).pairs
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
    found = find_near_duplicates(table, hashes).pairs
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
    assert len(found.pairs) == found.counts["pairs"] > 100
    again = find_near_duplicates(table.iloc[shuffled].reset_index(drop=True), hashes[shuffled])
    pd.testing.assert_frame_equal(found.pairs, again.pairs)
    pd.testing.assert_frame_equal(found.by_distance, again.by_distance)
    assert found.counts == again.counts


def test_the_list_is_cut_and_the_counts_are_not(monkeypatch):
    hashes = drawn_hashes()
    table = describe(len(hashes), split=np.resize(SPLITS, len(hashes)))
    every = find_near_duplicates(table, hashes)
    monkeypatch.setattr(audit, "LISTED", 50)
    monkeypatch.setattr(audit, "CHUNK", 37)
    cut = find_near_duplicates(table, hashes)
    pd.testing.assert_frame_equal(cut.pairs, every.pairs.head(50))
    pd.testing.assert_frame_equal(cut.by_distance, every.by_distance)
    assert cut.counts == every.counts


def test_no_near_duplicates_give_empty_tables():
    table = describe(20, split=["train"] * 15 + ["test"] * 5)
    found = find_near_duplicates(table, perceptual_hashes(draw(20)))
    assert (len(found.pairs), tuple(found.pairs.columns)) == (0, NEAR_COLUMNS)
    assert len(found.by_distance) == len(worst_pairs(found.pairs, 5)) == 0
    counts = leak_counts(table, found.counts)
    assert {*counts["shared"].values(), *counts["near_duplicates"].values()} == {0}


def pairs_of(table, *pairs):
    """The pairs' table for (row a, row b, distance) of `table`."""
    sides = list(audit.DESCRIBED)
    rows = [[d, *table.loc[a, sides], *table.loc[b, sides]] for a, b, d in pairs]
    return pd.DataFrame(rows, columns=NEAR_COLUMNS)


def hashes_at(*flips):
    """Hashes that differ from the first in so many bits, each in bits of its own."""
    bits = np.zeros((len(flips), 256), np.uint8)
    for row, (start, flipped) in enumerate(zip(np.cumsum([0, *flips]), flips, strict=False)):
        bits[row, start : start + flipped] = 1
    return np.packbits(bits, axis=1).view(np.uint64)


def test_pairs_are_counted_by_distance_splits_label_and_patient():
    table = describe(
        6,
        patient_id=["a", "a", "b", "c", "c", "d"],
        label=["normal", "normal", "covid19", "normal", "normal", "normal"],
        split=["train", "test", "test", "val", "test", "test"],
    )
    found = find_near_duplicates(table, hashes_at(0, 2, 5, 20, 30, 90))
    # Rows 0 and 1: 2 bits, patient a. 0 and 2: 5 bits. 0 and 3: 20 bits. 1 and 3: 22 bits. The rest
    # is 25 bits or more apart, or in one split.
    assert found.by_distance.to_dict("list") == {
        "distance": [2, 5, 20, 22], "same_patient": [1, 0, 0, 0], "other_patient": [0, 1, 1, 1],
    }  # fmt: skip
    assert found.counts == {
        "pairs": 4, "train_test": 2, "train_val": 1, "val_test": 1, "other_label": 1,
        "same_patient": 1, "test_images": 2,
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
    near = {
        "pairs": 6, "train_test": 3, "train_val": 1, "val_test": 2, "other_label": 3,
        "same_patient": 3,
    }  # fmt: skip
    assert leak_counts(table, near | {"test_images": 2}) == {
        "shared": {"patients": 2, "pixels": 1},  # a and c; the pixels 3
        "near_duplicates": near,
        # Of the four test images 1, 4, 5 and 6: patient a's; two have a twin in training.
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
    return read_near_duplicates(), leak_counts(read_labelled(), read_counts())


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
    assert first.keys() == {"near_duplicates.csv", "by_distance.csv", "counts.json"}


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


@pytest.mark.parametrize(
    "content", ["", "[]", '{"pairs": 1}', '{"pairs": "1"}', "{}", None, "negative"]
)
def test_counts_of_another_form_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("data/audit").mkdir(parents=True)
    if content == "negative":
        content = json.dumps(dict.fromkeys((*audit.COUNTED, audit.TWINNED), -1))
    if content is not None:
        Path("data/audit/counts.json").write_text(content)
    with pytest.raises(InputError, match=r"counts\.json"):
        read_counts()


def test_the_stage_says_where_it_does_not_list_all(place, capsys, monkeypatch):
    write_params(place, **{"phantom.expected_counts": None, "split.group": "image"})
    run_stage("split")
    monkeypatch.setattr(audit, "LISTED", 5)
    near, counts = audited()
    assert len(near) == 5 < counts["near_duplicates"]["pairs"]
    assert "data/audit/near_duplicates.csv lists the 5 closest" in capsys.readouterr().out


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
    found = find_near_duplicates(table, perceptual_hashes(images)).pairs
    assert n >= 30
    assert sorted(zip(found["image_id_a"], found["image_id_b"], strict=True)) == [
        (f"image-{i:05}", f"image-{n + i:05}") for i in range(n)
    ]


@real
def test_real_neighbouring_slices_are_found():
    names = ("P001_79", "P001_80", "P001_81", "P002_120", "P002_121", "P001_140", "P001_141")
    images = np.stack([read_grey(SLICES / f"2COVID/{name}.png", 224).pixels for name in names])
    table = describe(7, split=["train", "test", "train", "train", "test", "train", "test"])
    found = find_near_duplicates(table, perceptual_hashes(images)).pairs
    pairs = set(zip(found["image_id_a"].str[-1], found["image_id_b"].str[-1], strict=True))
    assert pairs == {("0", "1"), ("2", "1"), ("3", "4"), ("5", "6")}
