"""Readers for the three published collections.

Each reader takes the folder of its collection and a list, to which it appends a Problem for
everything that is wrong, and returns an `Item` for each image that belongs to the study. The
layouts, encodings and traps are those of the published files (see data/raw/README.md). Folders and
files may be links. Names in a table are looked up among the files of the folder, never opened.
"""

import re
import unicodedata
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

import pandas as pd

from chest.core.errors import Problem
from chest.data.pictures import ENDINGS

CT_SLICES = "large-covid19-ct-slice-dataset"
CT_VOLUMES = "COVID19_1110"
XRAYS = "chest-x-ray-lungs-segmentation"
FOLDERS = {"ct_slices": CT_SLICES, "ct_volumes": CT_VOLUMES, "xrays": XRAYS}

MOSMED_SITE = "Municipal Hospitals in Moscow"
XRAY_SITES = {"Shenxhen": "Shenzhen", "Montgomery": "Montgomery"}  # the table's spelling: ours

LATIN_TABLE = "meta_data_covid.csv"  # the one that is published in ISO-8859-1
# Folder in collection 1, its table, its value of `COVID-19 Infection`, our label.
SLICE_CLASSES = (
    ("2COVID", LATIN_TABLE, "COVID-19", "covid19"),
    ("1NonCOVID", "meta_data_normal.csv", "Normal", "normal"),
)
SLICE_TABLE_COLUMNS = (
    *("File name", "Patient ID", "COVID-19 Infection"),
    *("Institution", "Country", "study_file"),
)
XRAY_TABLE_COLUMNS = ("id", "county", "ptb", "remarks")

# CT-0 has no sign of pneumonia, CT-1 to CT-4 a rising share of affected lung.
VOLUME_LABELS = {
    "CT-0": "normal",
    "CT-1": "covid19",
    "CT-2": "covid19",
    "CT-3": "covid19",
    "CT-4": "covid19",
}
VOLUME_ENDINGS = (".nii", ".nii.gz")
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # left by file managers, as are hidden files

REPAIR = "repair the row, or fetch the table again"


@dataclass(frozen=True)
class Item:
    """One image file of a collection, or one volume, with what is known of it."""

    image_id: str
    path: Path
    label: str
    modality: str
    collection: str
    site: str
    patient_id: str
    study: str = ""
    mask: Path | None = None  # the published lung mask


# --- Collection 1: CT slices -----------------------------------------------------------------


def read_ct_slices(folder: Path, problems: list[Problem]) -> list[Item]:
    """Return the COVID-19 and normal CT slices of collection 1; 3CAP is left out of the study."""
    images = _nested(folder, "curated_data", "1NonCOVID", problems)
    tables = [
        slice_table(folder / table, infection, problems) for _, table, infection, _ in SLICE_CLASSES
    ]
    items = []
    for (name, file, _, label), table in zip(SLICE_CLASSES, tables, strict=True):
        if images is None or table is None:
            continue
        files = _files(images / name, ENDINGS, problems)
        for key in _matched(files, table, folder / file, problems):
            image_id, known = f"ct_slices-{Path(key).stem}", table.loc[key]
            items.append(Item(image_id, files[key], label, "ct", "ct_slices", **known))
    return items


def slice_table(path: Path, infection: str, problems: list[Problem]) -> pd.DataFrame | None:
    """Read a table of collection 1, one row per file name: columns site, patient_id, study.

    `infection` is what its column ``COVID-19 Infection`` must hold. Returns None if the file cannot
    be used at all.
    """
    table = _read_table(path, SLICE_TABLE_COLUMNS, problems)
    if table is None:
        return None
    rows = {
        key: _slice_row(path, key, row, infection, problems)
        for key, row in table.to_dict("index").items()
    }
    return pd.DataFrame.from_dict(rows, "index")


def _slice_row(
    path: Path, key: str, row: dict[str, str], infection: str, problems: list[Problem]
) -> dict[str, str]:
    if row["COVID-19 Infection"] != infection:
        found = f"{key}: COVID-19 Infection is {row['COVID-19 Infection']!r}"
        problems.append(Problem(path, found, repr(infection), REPAIR))
    study = _study(path, key, row["study_file"], infection, problems)
    if not study and not row["Patient ID"]:
        problems.append(Problem(path, f"{key}: no Patient ID", "the patient's id", REPAIR))
    country = row["Country"].strip("-")
    site = row["Institution"] or (f"{country} (hospital not named)" if country else "not named")
    patient = mosmed_patient(study) if study else f"ct-{row['Patient ID']}"
    return {"site": site, "patient_id": patient, "study": study}


def _study(path: Path, key: str, stated: str, infection: str, problems: list[Problem]) -> str:
    """Return the MosMed study (``study_0056``) that a slice was cut from, or an empty string.

    The table's study_file and the name of the image both tell it, and must agree.
    """
    in_name = re.search(r"Morozov_(study_\d{4})_", key)
    in_table = re.fullmatch(r"/?studies/(CT-[0-4])/(study_\d{4})\.nii(?:\.gz)?", stated)
    if not stated and not in_name:
        return ""
    label = {name: label for _, _, name, label in SLICE_CLASSES}[infection]
    agreed = in_table and (not in_name or in_name[1] == in_table[2])
    if agreed and VOLUME_LABELS[in_table[1]] == label:
        return in_table[2]
    expected = f"the study that the image's name states, in a folder of class {label}"
    problems.append(Problem(path, f"{key}: study_file is {stated!r}", expected, REPAIR))
    return ""


def mosmed_patient(study: str) -> str:
    """Return the patient of a MosMed study: each study is of another person."""
    return study.replace("study_", "mosmed-")


# --- Collection 2: CT volumes ----------------------------------------------------------------


def read_ct_volumes(folder: Path, problems: list[Problem]) -> list[Item]:
    """Return the volumes of MosMedData, sorted by study; its masks are no input."""
    studies = folder / "studies"
    if not studies.is_dir():
        expected = "the folders CT-0 to CT-4"
        problems.append(Problem(studies, "no such folder", expected, "unpack it again"))
        return []
    paths: dict[str, Path] = {}
    for entry in _entries(studies):
        if entry.name not in VOLUME_LABELS or not entry.is_dir():
            expected = "a folder CT-0 to CT-4"
            problems.append(Problem(entry, entry.name, expected, "move it out of studies/"))
            continue
        for name, path in _files(entry, VOLUME_ENDINGS, problems).items():
            study = name.split(".")[0]
            if not re.fullmatch(r"study_\d{4}", study):
                expected = "study_NNNN.nii.gz"
                problems.append(Problem(path, f"the name {name}", expected, "rename or move it"))
            elif study in paths:
                found = f"{study} a second time"
                problems.append(Problem(path, found, f"only {paths[study]}", "keep one"))
            else:
                paths[study] = path
    return [_volume(study, path) for study, path in sorted(paths.items())]


def _volume(study: str, path: Path) -> Item:
    image_id, label = f"ct_volumes-{study}", VOLUME_LABELS[path.parent.name]
    patient = mosmed_patient(study)
    return Item(image_id, path, label, "ct", "ct_volumes", MOSMED_SITE, patient, study)


# --- Collection 3: X-rays --------------------------------------------------------------------


def read_xrays(
    folder: Path, labelling: Literal["ptb", "remarks"], problems: list[Problem]
) -> list[Item]:
    """Return the frontal X-rays of collection 3, tuberculosis or normal, with their lung masks.

    `labelling` is "ptb", the diagnosis, or "remarks", the published study's reading. A mask may be
    missing, and one without an X-ray is ignored.
    """
    images = _nested(folder, "Chest-X-Ray", "image", problems)
    path = folder / "MetaData.csv"
    table = xray_table(path, labelling, problems)
    if images is None or table is None:
        return []
    files = _files(images / "image", ENDINGS, problems)
    files = {Path(name).stem: file for name, file in files.items()}
    masks, items = _masks(images / "mask"), []
    for key in _matched(files, table, path, problems):
        label, site = table.loc[key, ["label", "site"]]
        known = {"site": site, "patient_id": f"xray-{key}", "mask": masks.get(key)}
        items.append(Item(f"xrays-{key}", files[key], label, "xray", "xrays", **known))
    return items


def _masks(folder: Path) -> dict[str, Path]:
    """Return the pictures in `folder` by the id of their X-ray; none if there is no folder."""
    entries = _entries(folder) if folder.is_dir() else []
    pictures = [entry for entry in entries if entry.suffix.lower() in ENDINGS]
    return {Path(_normal_form(picture.name)).stem: picture for picture in pictures}


def xray_table(
    path: Path, labelling: Literal["ptb", "remarks"], problems: list[Problem]
) -> pd.DataFrame | None:
    """Read the table of collection 3, one row per id: columns label and site.

    With the labelling "remarks" an image is normal if its remark is exactly "normal", which takes
    48 normal X-rays for tuberculosis. Returns None if the file cannot be used at all.
    """
    table = _read_table(path, XRAY_TABLE_COLUMNS, problems)
    if table is None:
        return None
    for column, known in (("ptb", ["0", "1"]), ("county", sorted(XRAY_SITES))):
        for key, found in table.loc[~table[column].isin(known), column].items():
            found = f"id {key}: {column} is {found!r}"
            problems.append(Problem(path, found, " or ".join(known), REPAIR))
    normal = table["ptb"] == "0" if labelling == "ptb" else table["remarks"] == "normal"
    label = normal.map({True: "normal", False: "tuberculosis"})
    return pd.DataFrame({"label": label, "site": table["county"].map(XRAY_SITES)})


# --- Folders and tables ----------------------------------------------------------------------


def _nested(folder: Path, name: str, holds: str, problems: list[Problem]) -> Path | None:
    """Return folder/name/name or folder/name, whichever holds the folder `holds`."""
    for candidate in (folder / name / name, folder / name):
        if (candidate / holds).is_dir():
            return candidate
    missing = folder / name / name / holds
    problems.append(Problem(missing, "no such folder", "a folder of images", "unpack it again"))
    return None


def _entries(folder: Path) -> list[Path]:
    """List `folder`, sorted, without what file managers leave behind."""
    return [
        entry
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".") and entry.name.lower() not in LITTER
    ]


def _files(folder: Path, endings: tuple[str, ...], problems: list[Problem]) -> dict[str, Path]:
    """Return the files of `folder` by name; anything of another kind or ending is a problem."""
    if not folder.is_dir():
        problems.append(Problem(folder, "no such folder", "the images", "unpack it again"))
        return {}
    files: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for path in _entries(folder):
        name = _normal_form(path.name)
        stem = name.lower().removesuffix(".gz").rsplit(".", 1)[0]
        if not path.is_file() or not name.lower().endswith(endings):
            found = "no file" if not path.is_file() else f"a {path.suffix or 'nameless'} file"
            expected = f"files that end in {' or '.join(endings)}"
            problems.append(Problem(path, found, expected, "move it elsewhere"))
        elif stem in stems:
            found = "a second file of this name"
            problems.append(Problem(path, found, f"only {stems[stem]}", "keep one"))
        else:
            files[name] = stems[stem] = path
    return files


def _matched(
    files: dict[str, Path], table: pd.DataFrame, csv: Path, problems: list[Problem]
) -> list[str]:
    """Return the names that the folder and the table share; every other one is a problem."""
    for key in sorted(files.keys() - set(table.index)):
        remedy = "fetch the table again, or move the image elsewhere"
        problems.append(Problem(files[key], f"no row in {csv.name}", "a row per image", remedy))
    for key in sorted(set(table.index) - files.keys()):
        found = f"a row for {key}, but no such image"
        problems.append(Problem(csv, found, "an image per row", "fetch the image again"))
    return sorted(files.keys() & set(table.index))


def _read_table(
    path: Path, columns: tuple[str, ...], problems: list[Problem]
) -> pd.DataFrame | None:
    """Read the named columns of a published table, indexed by the first, values stripped.

    Doubled rows are a problem, and read once. Returns None if the file cannot be used.
    """
    expected = f"a csv file with the columns {', '.join(columns)}"
    try:
        table = pd.read_csv(StringIO(_decode(path)), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        problems.append(Problem(path, f"no readable csv ({error})", expected, "fetch it again"))
        return None
    missing = [column for column in columns if column not in table]
    if missing:
        found = f"no column {', '.join(missing)}"
    elif not isinstance(table.index, pd.RangeIndex):
        found = "rows with more fields than the first"
    else:
        found = "" if len(table) else "no row"
    if found:
        problems.append(Problem(path, found, expected, "fetch it again"))
        return None
    # str.strip() also removes the non-breaking spaces of LATIN_TABLE.
    table = table[[*columns]].map(lambda value: _normal_form(value.strip()))
    table = table.set_index(columns[0])
    for key, count in table.index[table.index.duplicated(keep=False)].value_counts().items():
        problems.append(Problem(path, f"{key} in {count} rows", "one row", "remove the others"))
    return table[~table.index.duplicated()]


def _decode(path: Path) -> str:
    """Return the text of a table: UTF-8, except LATIN_TABLE, which copies may hold in either."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if path.name != LATIN_TABLE:
            raise
        return content.decode("iso-8859-1")


def _normal_form(text: str) -> str:
    """Return `text` in Unicode's form NFC: file systems and tables differ in it."""
    return unicodedata.normalize("NFC", text)
