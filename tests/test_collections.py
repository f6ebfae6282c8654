"""The collections' readers: the true tables, the layouts in use, and what may be wrong."""

import errno
import shutil
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from support import BESIDE

from chest.collections import (
    CT_SLICES,
    CT_VOLUMES,
    XRAYS,
    read_ct_slices,
    read_ct_volumes,
    read_xrays,
    slice_table,
    xray_table,
)

METADATA = BESIDE / "metadata"
needs_metadata = pytest.mark.skipif(
    not METADATA.is_dir(), reason=f"the published csv files are not in {METADATA}"
)


@pytest.fixture
def raw(phantoms, tmp_path):
    """A copy of the phantoms that a test may damage."""
    return shutil.copytree(phantoms, tmp_path / "raw")


def read_all(raw):
    problems = []
    items = read_ct_slices(raw / CT_SLICES, problems)
    items += read_ct_volumes(raw / CT_VOLUMES, problems)
    items += read_xrays(raw / XRAYS, "ptb", problems)
    return items, problems


def refusals(raw):
    return "\n".join(str(problem) for problem in read_all(raw)[1])


# --- The true tables -------------------------------------------------------------------------


@needs_metadata
@pytest.mark.parametrize(
    ("csv", "infection", "slices", "patients", "studies"),
    [
        ("meta_data_covid.csv", "COVID-19", 7593, 464, 50),
        ("meta_data_normal.csv", "Normal", 6893, 604, 254),
    ],
)
def test_the_published_slice_tables(csv, infection, slices, patients, studies):
    problems = []
    table = slice_table(METADATA / csv, infection, problems)
    assert problems == []
    assert len(table) == slices
    assert table["patient_id"].nunique() == patients
    of_volumes = table[table["study"] != ""]
    assert of_volumes["study"].nunique() == studies
    # One patient a study, named as the volume's own row names it.
    assert (of_volumes["patient_id"] == "mosmed-" + of_volumes["study"].str[-4:]).all()


@needs_metadata
def test_published_patients_are_in_one_class_only_and_have_no_stray_spaces():
    tables = [
        slice_table(METADATA / csv, infection, [])
        for csv, infection in (
            ("meta_data_covid.csv", "COVID-19"),
            ("meta_data_normal.csv", "Normal"),
        )
    ]
    both = pd.concat(tables)
    assert not set(tables[0]["patient_id"]) & set(tables[1]["patient_id"])
    for column in ("patient_id", "site"):
        assert (both[column] == both[column].str.strip()).all()
        assert not both[column].str.contains("\xa0").any()
        assert (both[column] != "").all()


@needs_metadata
@pytest.mark.parametrize(
    ("labelling", "sick", "healthy"), [("ptb", 345, 359), ("remarks", 393, 311)]
)
def test_the_published_xray_table(labelling, sick, healthy):
    problems = []
    table = xray_table(METADATA / "MetaData.csv", labelling, problems)
    assert problems == []
    assert table["label"].value_counts().to_dict() == {"normal": healthy, "tuberculosis": sick}
    assert table["site"].value_counts().to_dict() == {"Shenzhen": 566, "Montgomery": 138}


# --- Layouts ---------------------------------------------------------------------------------


def test_one_person_has_one_id_in_both_ct_collections(raw):
    items, problems = read_all(raw)
    assert problems == []
    volumes = {i.study: i.patient_id for i in items if i.collection == "ct_volumes"}
    slices = {i.study: i.patient_id for i in items if i.collection == "ct_slices" and i.study}
    assert slices
    assert slices.items() <= volumes.items()


def test_other_pneumonia_and_masks_are_left_out(raw):
    assert list(raw.rglob("3CAP/*.png"))
    assert list(raw.rglob("masks/*.nii.gz"))
    assert list(raw.rglob("mask/*.png"))
    parts = {part for item in read_all(raw)[0] for part in item.path.relative_to(raw).parts}
    assert not parts & {"3CAP", "masks", "mask"}


@pytest.mark.parametrize(
    ("collection", "name"), [(CT_SLICES, "curated_data"), (XRAYS, "Chest-X-Ray")]
)
def test_copies_that_are_nested_once_read_alike(raw, collection, name):
    before = [(i.image_id, i.label, i.site, i.patient_id) for i in read_all(raw)[0]]
    outer = raw / collection / name
    (outer / name).rename(raw / "inner")
    outer.rmdir()
    (raw / "inner").rename(outer)
    items, problems = read_all(raw)
    assert problems == []
    assert [(i.image_id, i.label, i.site, i.patient_id) for i in items] == before


def test_volumes_may_be_compressed_or_not(raw):
    endings = {i.path.suffix for i in read_all(raw)[0] if i.collection == "ct_volumes"}
    assert endings == {".nii", ".gz"}


def test_what_file_managers_leave_behind_is_passed_over(raw):
    count = len(read_all(raw)[0])
    for place in (raw / CT_VOLUMES / "studies", raw / CT_VOLUMES / "studies" / "CT-1"):
        (place / ".DS_Store").write_bytes(b"x")
        (place / "Thumbs.db").write_bytes(b"x")
    assert (len(read_all(raw)[0]), read_all(raw)[1]) == (count, [])


def test_labels_follow_ptb_and_the_published_reading_takes_healthy_for_sick(raw):
    by_ptb = {i.image_id: i.label for i in read_xrays(raw / XRAYS, "ptb", [])}
    by_remarks = {i.image_id: i.label for i in read_xrays(raw / XRAYS, "remarks", [])}
    differing = {i for i in by_ptb if by_ptb[i] != by_remarks[i]}
    table = pd.read_csv(raw / XRAYS / "MetaData.csv", dtype=str, keep_default_na=False)
    slips = table[(table["ptb"] == "0") & (table["remarks"] != "normal")]
    assert differing == {f"xrays-{key}" for key in slips["id"]}
    assert differing


# --- What may be wrong -----------------------------------------------------------------------


def edit(csv, old, new, count=1):
    content = csv.read_bytes()
    assert old in content
    csv.write_bytes(content.replace(old, new, count))


def test_everything_that_is_wrong_is_listed_at_once(raw):
    covid = raw / CT_SLICES / "curated_data" / "curated_data" / "2COVID"
    victims = sorted(covid.glob("P00*.png"))
    victims[0].rename(covid / "stranger.png")  # an image without a row, and a row without an image
    (raw / CT_VOLUMES / "studies" / "CT-7").mkdir()
    edit(raw / XRAYS / "MetaData.csv", b"Shenxhen,1", b"Atlantis,2")
    message = refusals(raw)
    assert "stranger.png" in message
    assert victims[0].name in message
    assert "CT-7" in message
    assert "'Atlantis'" in message
    assert "ptb is '2'" in message


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda raw: (raw / CT_SLICES / "meta_data_covid.csv").unlink(), "no such file"),
        (lambda raw: (raw / XRAYS / "MetaData.csv").write_bytes(b"\0\1\2"), "NUL bytes"),
        (lambda raw: (raw / XRAYS / "MetaData.csv").write_bytes(b""), "no readable csv"),
        (lambda raw: edit(raw / XRAYS / "MetaData.csv", b"ptb", b"tb"), "no column ptb"),
        (lambda raw: shutil.rmtree(raw / XRAYS / "Chest-X-Ray"), "no such folder"),
        (lambda raw: shutil.rmtree(raw / CT_VOLUMES / "studies"), "no such folder"),
        (
            lambda raw: edit(raw / CT_SLICES / "meta_data_normal.csv", b",Normal,", b",CAP,"),
            "COVID-19 Infection is 'CAP'",
        ),
        (
            lambda raw: edit(raw / CT_SLICES / "meta_data_covid.csv", b",P002,", b", ,"),
            "an empty Patient ID",
        ),
        (
            lambda raw: edit(raw / CT_SLICES / "meta_data_normal.csv", b"/CT-0/", b"/CT-1/"),
            "study_file is '/studies/CT-1/",
        ),
        (
            lambda raw: edit(raw / XRAYS / "MetaData.csv", b"\n1001,", b"\n1000,"),
            "1000 in 2 rows",
        ),
        (
            lambda raw: (raw / CT_VOLUMES / "studies" / "CT-1" / "notes.txt").write_text("x"),
            "no image of a known kind",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(raw, damage, told):
    damage(raw)
    assert told in refusals(raw)


def test_a_folder_that_may_not_be_read_is_named(raw, monkeypatch):
    images = raw / XRAYS / "Chest-X-Ray" / "Chest-X-Ray" / "image"
    open_folder = Path.iterdir

    def iterdir(folder):
        if folder == images:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_folder(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    message = refusals(raw)
    assert str(images) in message
    assert "cannot be opened (Permission denied)" in message


def test_the_same_study_twice_is_refused(raw):
    studies = raw / CT_VOLUMES / "studies"
    shutil.copy(studies / "CT-0" / "study_0001.nii.gz", studies / "CT-1" / "study_0001.nii.gz")
    assert "study_0001 a second time" in refusals(raw)


def test_an_image_in_another_class_folder_than_its_row_is_refused(raw):
    images = raw / CT_SLICES / "curated_data" / "curated_data"
    name = min(path.name for path in (images / "1NonCOVID").glob("normal*.png"))
    (images / "1NonCOVID" / name).rename(images / "2COVID" / name)
    assert "in this folder, but its row puts it into 1NonCOVID" in refusals(raw)


@pytest.mark.parametrize("column", ["patient_id", "site"])
def test_the_forms_of_unicode_are_one_patient_and_one_hospital(raw, column):
    csv = raw / CT_SLICES / "meta_data_normal.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    rows = table.index[table["study_file"] == ""][:2]
    for name in ("Patient ID", "Institution"):
        table.loc[rows, name] = [unicodedata.normalize(form, "Málaga") for form in ("NFC", "NFD")]
    table.to_csv(csv, index=False)
    problems = []
    found = slice_table(csv, "Normal", problems)
    assert problems == []
    assert found.loc[table.loc[rows, "File name"], column].nunique() == 1
