"""index_collections: the three indexes, what stops it, and fewer collections."""

import shutil

import pandas as pd
from drawn import COUNTS
from support import failure, run_stage, write_params

from chest.data.collections import CT_SLICES, CT_VOLUMES, XRAYS
from chest.data.dataset import INDEX_COLUMNS


def read(name):
    return pd.read_csv(f"data/index/{name}.csv", dtype=str, keep_default_na=False)


def test_one_sorted_index_per_collection(place):
    run_stage("index_collections")
    for name, count in (("ct_slices", 8), ("ct_volumes", 3), ("xrays", 4)):
        table = read(name)
        assert list(table.columns) == list(INDEX_COLUMNS)
        assert len(table) == count
        assert table["image_id"].is_monotonic_increasing
        assert set(table["collection"]) == {name}
        assert table["digest"].str.fullmatch("[0-9a-f]{32}").all()


def test_a_changed_file_changes_the_index_of_its_collection_alone(place, raw):
    run_stage("index_collections")
    before = {name: read(name) for name in ("ct_slices", "ct_volumes", "xrays")}
    film = raw / XRAYS / "Chest-X-Ray/Chest-X-Ray/image/1001.png"
    film.write_bytes(film.read_bytes() + b"x")
    run_stage("index_collections")
    changed = {name for name, table in before.items() if not table.equals(read(name))}
    assert changed == {"xrays"}


def test_published_lung_masks_are_listed_and_part_of_the_digest(place, raw):
    run_stage("index_collections")
    masks = raw / XRAYS / "Chest-X-Ray/Chest-X-Ray/mask"
    before = read("xrays")
    assert before["mask"].tolist() == [f"{masks.relative_to(place)}/1000.png", "", "", ""]
    assert (read("ct_slices")["mask"] == "").all()
    (masks / "1000.png").write_bytes((masks / "1000.png").read_bytes() + b"x")
    run_stage("index_collections")
    assert (read("xrays")["digest"] != before["digest"]).tolist() == [True, False, False, False]
    shutil.rmtree(masks)
    run_stage("index_collections")
    assert (read("xrays")["mask"] == "").all()


def test_wrong_counts_show_expected_and_found(place, capsys):
    write_params(place, **{"phantom.expected_counts": COUNTS | {"normal": 8}})
    message = failure("index_collections", capsys)
    assert "6 covid19, 7 normal, 2 tuberculosis" in message
    assert "6 covid19, 8 normal, 2 tuberculosis" in message
    assert "phantom.expected_counts" in message
    write_params(place, **{"phantom.expected_counts": None})
    run_stage("index_collections")


def test_everything_that_is_wrong_is_told_at_once(place, raw, capsys):
    shutil.rmtree(raw / CT_SLICES)
    (raw / CT_VOLUMES / "studies/CT-9").mkdir()
    (raw / XRAYS / "Chest-X-Ray/Chest-X-Ray/image/1000.png").unlink()
    message = failure("index_collections", capsys)
    for told in (CT_SLICES, "data/raw/README.md", "`collections`", "CT-9", "a row for 1000"):
        assert told in message
    assert not (place / "data/index").exists()


def test_a_collection_that_is_left_out_need_not_be_there(place, raw):
    shutil.rmtree(raw / CT_SLICES)
    counts = {"covid19": 1, "normal": 4, "tuberculosis": 2}
    changes = {"collections": ["xrays", "ct_volumes"], "phantom.expected_counts": counts}
    write_params(place, **changes)
    run_stage("index_collections")
    assert read("ct_slices").empty
    assert list(read("ct_slices").columns) == list(INDEX_COLUMNS)
    assert (len(read("ct_volumes")), len(read("xrays"))) == (3, 4)


def test_an_empty_collection_is_refused(place, raw, capsys):
    shutil.rmtree(raw / CT_VOLUMES / "studies")
    (raw / CT_VOLUMES / "studies").mkdir()
    write_params(place, **{"phantom.expected_counts": None})
    assert "no volume" in failure("index_collections", capsys)


def test_one_image_id_twice_is_refused(place, raw, capsys):
    folder = raw / CT_SLICES / "curated_data/curated_data"
    (folder / "1NonCOVID/normal001_2.png").rename(folder / "1NonCOVID/P001_1.jpg")
    table = raw / CT_SLICES / "meta_data_normal.csv"
    table.write_text(table.read_text().replace("normal001_2.png", "P001_1.jpg"))
    assert "ct_slices-P001_1 a second time" in failure("index_collections", capsys)
