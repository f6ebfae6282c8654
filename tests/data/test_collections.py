"""The readers of the three collections: the true tables, the layouts in use, what may be wrong."""

import shutil
import unicodedata

import pytest
from support import require_shared

from chest.data.collections import (
    CT_SLICES,
    CT_VOLUMES,
    XRAYS,
    read_ct_slices,
    read_ct_volumes,
    read_xrays,
    slice_table,
    xray_table,
)


def read_all(raw):
    problems = []
    items = read_ct_slices(raw / CT_SLICES, problems)
    items += read_ct_volumes(raw / CT_VOLUMES, problems)
    items += read_xrays(raw / XRAYS, "ptb", problems)
    return items, problems


def described(raw):
    items, problems = read_all(raw)
    assert problems == []
    return [(i.image_id, i.label, i.site, i.patient_id, i.study) for i in items]


@pytest.mark.parametrize(
    ("file", "infection", "slices", "patients", "of_volumes", "studies"),
    [
        ("meta_data_covid.csv", "COVID-19", 7593, 464, 785, 50),
        ("meta_data_normal.csv", "Normal", 6893, 604, 5080, 254),
    ],
)
def test_published_slice_tables(file, infection, slices, patients, of_volumes, studies):
    problems = []
    table = slice_table(require_shared("metadata") / file, infection, problems)
    assert problems == []
    assert (len(table), table["patient_id"].nunique()) == (slices, patients)
    mosmed = table[table["study"] != ""]
    assert (len(mosmed), mosmed["study"].nunique()) == (of_volumes, studies)
    assert (mosmed["patient_id"] == "mosmed-" + mosmed["study"].str[-4:]).all()
    for column in ("patient_id", "site"):
        assert (table[column] == table[column].str.strip()).all()
        assert (table[column] != "").all()
        assert not table[column].str.contains("\xa0").any()


@pytest.mark.parametrize(
    ("labelling", "sick", "healthy"), [("ptb", 345, 359), ("remarks", 393, 311)]
)
def test_published_xray_table(labelling, sick, healthy):
    problems = []
    table = xray_table(require_shared("metadata") / "MetaData.csv", labelling, problems)
    assert problems == []
    assert table["label"].value_counts().to_dict() == {"normal": healthy, "tuberculosis": sick}
    assert table["site"].value_counts().to_dict() == {"Shenzhen": 566, "Montgomery": 138}


ITEMS = """
ct_slices-16_Morozov_study_0001_25 normal Moscow mosmed-0001 study_0001
ct_slices-16_Morozov_study_0255_20 covid19 Moscow mosmed-0255 study_0255
ct_slices-17_Zhao_a%b covid19 not-named ct-Zhao
ct_slices-P001_1 covid19 Málaga ct-P001
ct_slices-P001_2 covid19 Málaga ct-P001
ct_slices-P002_7 covid19 Iran-(hospital-not-named) ct-P002
ct_slices-normal001_1 normal Tehran ct-normal001
ct_slices-normal001_2 normal Tehran ct-normal001
ct_volumes-study_0001 normal Municipal-Hospitals-in-Moscow mosmed-0001 study_0001
ct_volumes-study_0002 normal Municipal-Hospitals-in-Moscow mosmed-0002 study_0002
ct_volumes-study_0255 covid19 Municipal-Hospitals-in-Moscow mosmed-0255 study_0255
xrays-1000 tuberculosis Shenzhen xray-1000
xrays-1001 normal Shenzhen xray-1001
xrays-1002 tuberculosis Montgomery xray-1002
xrays-1003 normal Montgomery xray-1003"""


def test_items_of_all_collections(raw):
    found = [" ".join(x.replace(" ", "-") for x in item if x) for item in described(raw)]
    assert sorted(found) == ITEMS.strip().split("\n")


def test_published_reading_of_remarks_takes_a_normal_film_for_tuberculosis(raw):
    labels = {i.image_id: i.label for i in read_xrays(raw / XRAYS, "remarks", [])}
    assert labels["xrays-1001"] == "normal"
    assert labels["xrays-1003"] == "tuberculosis"


@pytest.mark.parametrize(
    ("collection", "name"), [(CT_SLICES, "curated_data"), (XRAYS, "Chest-X-Ray")]
)
def test_copies_with_a_single_folder_read_alike(raw, collection, name):
    before = described(raw)
    outer = raw / collection / name
    (outer / name).rename(raw / "inner")
    outer.rmdir()
    (raw / "inner").rename(outer)
    assert described(raw) == before


def test_links_and_what_file_managers_leave_behind(raw, tmp_path):
    before = described(raw)
    (raw / CT_VOLUMES / "studies/CT-1/.DS_Store").write_bytes(b"x")
    (raw / CT_VOLUMES / "studies/Thumbs.db").write_bytes(b"x")
    for name in (XRAYS, f"{CT_VOLUMES}/studies/CT-0/study_0001.nii.gz"):
        target = tmp_path / "store" / name
        target.parent.mkdir(parents=True)
        (raw / name).rename(target)
        (raw / name).symlink_to(target)
    assert described(raw) == before


def test_unicode_forms_of_a_name_are_one_image_patient_and_site(raw):
    table = raw / CT_SLICES / "meta_data_normal.csv"
    images = raw / CT_SLICES / "curated_data/curated_data/1NonCOVID"
    (images / "normal001_1.png").rename(images / unicodedata.normalize("NFD", "é.png"))
    edit(table, "normal001_1.png,normal001,Normal,Tehran", "é.png,é,Normal,é")
    edit(table, "normal001,Normal,Tehran", unicodedata.normalize("NFD", "é,Normal,é"))
    items, problems = read_all(raw)
    assert problems == []
    found = [i for i in items if i.site == "é"]
    assert {i.image_id for i in found} == {"ct_slices-é", "ct_slices-normal001_2"}
    assert {i.patient_id for i in found} == {"ct-é"}


# --- What may be wrong -----------------------------------------------------------------------


COVID, NORMAL = f"{CT_SLICES}/meta_data_covid.csv", f"{CT_SLICES}/meta_data_normal.csv"
TABLE, STUDIES = f"{XRAYS}/MetaData.csv", f"{CT_VOLUMES}/studies"
PICTURES = f"{CT_SLICES}/curated_data/curated_data"


def edit(path, old, new):
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        (TABLE, "ptb", "tb", "no column ptb"),
        (TABLE, "1001,", "1001,1,", "no readable csv"),
        (TABLE, "gender,", "", "more fields than the first"),
        (TABLE, "Shenxhen", "Atlantis", "county is 'Atlantis'"),
        (TABLE, "Shenxhen,1", "Shenxhen,2", "ptb is '2'"),
        (TABLE, "1001,", "1000,", "1000 in 2 rows"),
        (NORMAL, ",Normal,", ",CAP,", "COVID-19 Infection is 'CAP'"),
        (COVID, ",P002,", ", ,", "P002_7.png: no Patient ID"),
        (NORMAL, "/CT-0/", "/CT-1/", "study_file is '/studies/CT-1/"),
        (NORMAL, "/study_0001", "/study_0002", "study_0002.nii.gz'"),
    ],
)
def test_wrong_tables_are_refused(raw, file, old, new, told):
    edit(raw / file, old, new)
    assert told in "\n".join(map(str, read_all(raw)[1]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda raw: (raw / COVID).unlink(), "No such file"),
        (lambda raw: (raw / TABLE).write_bytes(b""), "no readable csv"),
        (lambda raw: (raw / NORMAL).write_bytes(b"\xa0\xff,"), "no readable csv"),
        (lambda raw: shutil.rmtree(raw / STUDIES), "no such folder"),
        (lambda raw: shutil.rmtree(raw / XRAYS / "Chest-X-Ray"), "no such folder"),
        (lambda raw: (raw / STUDIES / "CT-7").mkdir(), "CT-7"),
        (lambda raw: (raw / STUDIES / "CT-1/notes.txt").write_text("x"), "a .txt file"),
        (lambda raw: (raw / STUDIES / "CT-1/a.nii").write_text("x"), "the name a.nii"),
        (lambda raw: (raw / STUDIES / "CT-1/study_0002.nii").touch(), "study_0002 a second time"),
        (lambda raw: (raw / STUDIES / "CT-0/study_0001.nii").touch(), "a second file of this name"),
        (lambda raw: (raw / PICTURES / "2COVID/P001_1.png").unlink(), "a row for P001_1.png"),
        (lambda raw: (raw / PICTURES / "1NonCOVID/P001_1.png").touch(), "no row in meta_data_norm"),
    ],
)
def test_wrong_folders_are_refused(raw, damage, told):
    damage(raw)
    assert told in "\n".join(map(str, read_all(raw)[1]))


def test_covid_table_may_have_been_saved_as_utf8(raw):
    before = described(raw)
    text = (raw / COVID).read_text(encoding="iso-8859-1")
    (raw / COVID).write_text(text, encoding="utf-8-sig")
    assert described(raw) == before
