"""The three published collections: what lies in their folders, and what their tables say of it.

Each reader takes the collection's folder and a list to which it adds every Problem that it finds;
it returns one `Item` for each image that belongs to the study. Layouts, encodings and traps are
those of the published files (see the README's chapter on the data).

A collection, a folder in it or a file may be a link, to wherever: data sets are often kept in a
store of their own. Nothing else of another place is read: names of a table are looked up among the
files that the folder lists, never opened as paths.
"""

import csv
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from chest.dataset import FORMULA, MAX_TEXT
from chest.errors import Problem, refuse
from chest.images import ENDINGS

CT_SLICES = "large-covid19-ct-slice-dataset"
CT_VOLUMES = "COVID19_1110"
XRAYS = "chest-x-ray-lungs-segmentation"

MOSMED_SITE = "Municipal Hospitals in Moscow"
# The county column's own spelling on the left.
XRAY_SITES = {"Shenxhen": "Shenzhen", "Montgomery": "Montgomery"}

LATIN_TABLE = "meta_data_covid.csv"  # the one published in ISO-8859-1
# Folder of collection 1, its table, what the table's `COVID-19 Infection` says, our label.
SLICE_CLASSES = (
    ("2COVID", LATIN_TABLE, "COVID-19", "covid19"),
    ("1NonCOVID", "meta_data_normal.csv", "Normal", "normal"),
)
SLICE_COLUMNS = (
    "File name", "Patient ID", "COVID-19 Infection", "Institution", "Country", "study_file",
)  # fmt: skip
XRAY_COLUMNS = ("id", "county", "ptb", "remarks")

# CT-0 is no sign of pneumonia, CT-1 to CT-4 rising shares of affected lung.
VOLUME_LABELS = {
    "CT-0": "normal",
    "CT-1": "covid19",
    "CT-2": "covid19",
    "CT-3": "covid19",
    "CT-4": "covid19",
}
VOLUME_ENDINGS = (".nii", ".nii.gz")

UTF8_LETTER = re.compile(  # of two to four bytes
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
MAX_TABLE = 32 * 2**20  # bytes of a csv; the largest published one has 1.8 million

LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave behind; also any .name


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


def find_collections(raw: Path, names: tuple[str, ...]) -> None:
    """Raise InputError, with all that is missing, where `raw` lacks one of the folders `names`."""
    refuse([
        Problem(
            raw / name,
            "no such folder",
            f"the collection {name}, unpacked",
            "put it there (data/raw/README.md says where it comes from)",
        )
        for name in names
        if not (raw / name).is_dir()
    ])  # fmt: skip


def read_ct_slices(folder: Path, problems: list[Problem]) -> list[Item]:
    """Collection 1: COVID-19 and normal CT slices; 3CAP is left out of the study."""
    images = _nested(folder, "curated_data", "1NonCOVID", problems)
    if images is None:
        return []
    tables = {
        name: slice_table(folder / table, infection, problems)
        for name, table, infection, _ in SLICE_CLASSES
    }
    elsewhere = {
        file: name for name, table in tables.items() if table is not None for file in table.index
    }
    items = []
    for name, table, _, label in SLICE_CLASSES:
        if tables[name] is None:
            continue
        files, rows = _files(images / name, ENDINGS, problems), tables[name].to_dict("index")
        for key in _matched(files, tables[name], folder / table, elsewhere, images, problems):
            row = rows[key]
            items.append(
                Item(f"ct_slices-{Path(key).stem}", files[key], label, "ct", "ct_slices",
                     row["site"], row["patient_id"], row["study"])
            )  # fmt: skip
    return items


def slice_table(path: Path, infection: str, problems: list[Problem]) -> pd.DataFrame | None:
    """A csv of collection 1, one row a file name: columns `patient_id`, `site` and `study`.

    None where the file cannot be used at all.
    """
    table = _read_csv(path, SLICE_COLUMNS, problems)
    if table is None:
        return None
    table.index = pd.Index(table["File name"].tolist())
    for key, found in table.loc[
        table["COVID-19 Infection"] != infection, "COVID-19 Infection"
    ].items():
        problems.append(
            Problem(path, f"{key}: COVID-19 Infection is {found!r}", repr(infection),
                    "repair the row, or fetch the table again")
        )  # fmt: skip
    _refuse_doubled(path, table.index, problems)
    for column in ("Institution", "Country"):
        _refuse_formulas(path, table[column], problems)
    studies = [
        _study(path, key, stated, infection, problems)
        for key, stated in zip(table.index, table["study_file"], strict=True)
    ]
    patients = [
        mosmed_patient(study) if study else f"ct-{patient}"
        for study, patient in zip(studies, table["Patient ID"], strict=True)
    ]
    for key, patient in zip(table.index, patients, strict=True):
        if patient == "ct-":
            problems.append(
                Problem(path, f"{key}: an empty Patient ID", "the patient's id", "repair the row")
            )
    sites = [
        institution
        or (f"{country} (hospital not named)" if country not in ("", "-") else "not named")
        for institution, country in zip(table["Institution"], table["Country"], strict=True)
    ]
    table = pd.DataFrame({"patient_id": patients, "site": sites, "study": studies}, table.index)
    return table[~table.index.duplicated()]


def _study(path: Path, key: str, stated: str, infection: str, problems: list[Problem]) -> str:
    """The MosMed study (`study_0056`) that a slice was cut from, or nothing.

    The csv's `study_file` and the file's name both say so: they must agree.
    """
    in_name = re.search(r"Morozov_(study_\d{4})_", key)
    in_table = re.fullmatch(r"/?studies/(CT-[0-4])/(study_\d{4})\.nii(?:\.gz)?", stated)
    if not stated and not in_name:
        return ""
    agreed = in_table and (not in_name or in_name[1] == in_table[2])
    label = {"COVID-19": "covid19", "Normal": "normal"}[infection]
    if not agreed or VOLUME_LABELS[in_table[1]] != label:
        problems.append(
            Problem(path, f"{key}: study_file is {stated!r}",
                    f"the study that the file's name states, in a folder of class {label}",
                    "repair the row, or fetch the table again")
        )  # fmt: skip
        return ""
    return in_table[2]


def mosmed_patient(study: str) -> str:
    """The patient of a MosMed study: each study is of another person."""
    return study.replace("study_", "mosmed-")


def read_ct_volumes(folder: Path, problems: list[Problem]) -> list[Item]:
    """Collection 2: the volumes of MosMedData; `path` is the volume, masks are no input."""
    studies = folder / "studies"
    if not studies.is_dir():
        problems.append(
            Problem(studies, "no such folder", "the folders CT-0 to CT-4", "unpack it again")
        )
        return []
    items: list[Item] = []
    seen: dict[str, Path] = {}
    for entry in _entries(studies, problems):
        if entry.name not in VOLUME_LABELS or not entry.is_dir():
            found = "an unknown label" if entry.is_dir() else _kind(entry)
            problems.append(
                Problem(entry, found, "a folder CT-0 to CT-4", "move it out of studies/")
            )
            continue
        for name, path in _files(entry, VOLUME_ENDINGS, problems).items():
            study = name.split(".")[0]
            if not re.fullmatch(r"study_[0-9]{4}", study):
                problems.append(
                    Problem(path, f"the name {name}", "study_NNNN.nii.gz", "rename or move it")
                )
            elif study in seen:
                problems.append(
                    Problem(path, f"{study} a second time", f"only {seen[study]}", "keep one")
                )
            else:
                seen[study] = path
                items.append(
                    Item(f"ct_volumes-{study}", path, VOLUME_LABELS[entry.name], "ct", "ct_volumes",
                         MOSMED_SITE, mosmed_patient(study), study)
                )  # fmt: skip
    if not items and not problems:
        problems.append(
            Problem(studies, "no volume", "study_NNNN.nii.gz in CT-0 to CT-4", "unpack it again")
        )
    return sorted(items, key=lambda item: item.study)


def read_xrays(
    folder: Path, labelling: Literal["ptb", "remarks"], problems: list[Problem]
) -> list[Item]:
    """Collection 3: frontal X-rays, tuberculosis or normal; lung masks are no input."""
    images = _nested(folder, "Chest-X-Ray", "image", problems)
    table = xray_table(folder / "MetaData.csv", labelling, problems)
    if images is None or table is None:
        return []
    files = {
        Path(name).stem: path for name, path in _files(images / "image", ENDINGS, problems).items()
    }
    return [
        Item(f"xrays-{key}", files[key], table.loc[key, "label"], "xray", "xrays",
             table.loc[key, "site"], f"xray-{key}")
        for key in _matched(files, table, folder / "MetaData.csv", {}, images, problems)
    ]  # fmt: skip


def xray_table(
    path: Path, labelling: Literal["ptb", "remarks"], problems: list[Problem]
) -> pd.DataFrame | None:
    """MetaData.csv of collection 3, one row an id: columns `label` and `site`.

    `labelling` is "ptb", the diagnosis, or "remarks", the published study's reading: normal where
    the remark is exactly "normal". None where the file cannot be used at all.
    """
    table = _read_csv(path, XRAY_COLUMNS, problems)
    if table is None:
        return None
    table.index = pd.Index(table["id"].tolist())
    _refuse_doubled(path, table.index, problems)
    for column, known in (("ptb", {"0", "1"}), ("county", set(XRAY_SITES))):
        for key, found in table.loc[~table[column].isin(known), column].items():
            problems.append(
                Problem(path, f"id {key}: {column} is {found!r}", " or ".join(sorted(known)),
                        "repair the row, or fetch the table again")
            )  # fmt: skip
    normal = table["ptb"] == "0" if labelling == "ptb" else table["remarks"] == "normal"
    label = normal.map({True: "normal", False: "tuberculosis"})
    table = pd.DataFrame({"label": label, "site": table["county"].map(XRAY_SITES)}, table.index)
    return table[~table.index.duplicated()]


def _nested(folder: Path, name: str, holds: str, problems: list[Problem]) -> Path | None:
    """`folder`/`name`/`name` or `folder`/`name`, whichever holds the folder `holds`."""
    for candidate in (folder / name / name, folder / name):
        if (candidate / holds).is_dir():
            return candidate
    problems.append(
        Problem(
            folder / name / name / holds,
            "no such folder",
            f"the images in {holds}/",
            "unpack it again",
        )
    )
    return None


def _read_csv(path: Path, columns: tuple[str, ...], problems: list[Problem]) -> pd.DataFrame | None:
    """The named columns of a published csv as strings, stripped and in one Unicode form.

    None where it cannot be used.
    """
    expected = f"a csv file with the columns {', '.join(columns)}"
    try:
        head, *rows = _rows(path)
    except (OSError, ValueError, csv.Error) as error:
        found = (
            "no such file" if isinstance(error, FileNotFoundError) else f"no readable csv ({error})"
        )
        problems.append(Problem(path, found, expected, "fetch it again"))
        return None
    lacking = [column for column in columns if column not in head]
    faults = [f"no column {', '.join(lacking)}"] if lacking else []
    faults += [] if rows else ["no row"]
    faults += [f"the column {column} twice" for column in columns if head.count(column) > 1]
    ragged = [number for number, row in enumerate(rows, 2) if len(row) != len(head)]
    if ragged:
        some = ", ".join(map(str, ragged[:3]))
        faults.append(f"more or fewer fields than the {len(head)} of the first row in row {some}")
    problems += [Problem(path, found, expected, "fetch it again") for found in faults]
    if faults:
        return None
    table = pd.DataFrame(rows, columns=head, dtype=str)[list(columns)]
    table = table.apply(lambda column: column.str.strip().map(_name))
    for column in set(columns) - {"remarks"}:  # free text, which is passed on to nothing
        _refuse_unprintable(path, table[column], problems)
    return table


def _rows(path: Path) -> list[list[str]]:
    """The rows of a published csv, its head first, without blank ones.

    The files are UTF-8, but for LATIN_TABLE, which is ISO-8859-1 and has non-breaking spaces before
    some values; str.strip() takes them too.
    """
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    if (size := path.stat().st_size) > MAX_TABLE:
        raise ValueError(f"{size / 2**20:.0f} MiB, of at most {MAX_TABLE // 2**20}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Any bytes are some text in ISO-8859-1; a table that holds UTF-8 too is a mixture.
        if path.name != LATIN_TABLE or UTF8_LETTER.search(content):
            line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
            raise ValueError(f"line {line}: the byte {byte:#x} is no UTF-8") from None
        text = content.decode("iso-8859-1")
    if "\0" in text:
        raise ValueError("NUL bytes")
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    if not rows:
        raise ValueError("an empty file")
    return rows


def _refuse_unprintable(path: Path, values: pd.Series, problems: list[Problem]) -> None:
    """What holds line ends or control characters breaks tables and terminals further on."""
    for number, value in enumerate(values, 2):
        if not value.isprintable() or len(value) > MAX_TEXT:
            problems.append(
                Problem(path, f"row {number}: {values.name} is {value[:40]!r}",
                        f"printable text in one line, at most {MAX_TEXT} characters",
                        "repair the row, or fetch the table again")
            )  # fmt: skip


def _refuse_formulas(path: Path, values: pd.Series, problems: list[Problem]) -> None:
    """A hospital's name goes into tables that people open in a spreadsheet, which may run it."""
    for key, value in values[values.str.match(FORMULA)].items():
        problems.append(
            Problem(path, f"{key}: {values.name} is {value!r}",
                    "a name that no spreadsheet takes for a formula",
                    "repair the row, or fetch the table again")
        )  # fmt: skip


def _refuse_doubled(path: Path, keys: pd.Index, problems: list[Problem]) -> None:
    for key in keys[keys.duplicated()].unique():
        count = int((keys == key).sum())
        problems.append(
            Problem(path, f"{key} in {count} rows", "one row an image", "remove the others")
        )


def _entries(folder: Path, problems: list[Problem]) -> list[Path]:
    """What lies in `folder`, sorted, without what file managers leave behind."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        found = f"cannot be opened ({error.strerror})"
        problems.append(Problem(folder, found, "a folder", "give yourself permission to read it"))
        return []
    return [
        entry for entry in entries
        if not entry.name.startswith(".") and entry.name.lower() not in LITTER
    ]  # fmt: skip


def _files(folder: Path, endings: tuple[str, ...], problems: list[Problem]) -> dict[str, Path]:
    """The files of `folder` by name; anything of another kind or ending is a problem."""
    if not folder.is_dir():
        problems.append(
            Problem(folder, "no such folder", "the images", "unpack the collection again")
        )
        return {}
    files: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for path in _entries(folder, problems):
        name = _name(path.name)
        stem = name.lower().removesuffix(".gz").rsplit(".", 1)[0]
        if not path.is_file():
            problems.append(Problem(path, _kind(path), "a file", "move it elsewhere"))
        elif not name.lower().endswith(endings):
            problems.append(
                Problem(path, "no image of a known kind", " or ".join(endings), "move it elsewhere")
            )
        elif not name.isprintable():
            problems.append(
                Problem(path, "a name with line ends, control characters or no Unicode",
                        "a name of printable characters", "rename it, and its row")
            )  # fmt: skip
        elif stem in stems:
            problems.append(
                Problem(path, "a second file of that name", f"only {stems[stem]}", "keep one")
            )
        else:
            files[name] = stems[stem] = path
    return files


def _kind(path: Path) -> str:
    """What `path` is where it should be something else."""
    if path.is_file():
        return "a file"
    if path.is_dir():
        return "a folder"
    if path.is_symlink() and not path.exists():
        return f"a link to nothing ({path.readlink()})"
    return "neither a file nor a folder"


def _matched(
    files: dict[str, Path],
    table: pd.DataFrame,
    csv: Path,
    elsewhere: dict[str, str],
    images: Path,
    problems: list[Problem],
) -> list[str]:
    """The names that both the folder and the table have; each one that only one has is a problem.

    `elsewhere` tells the class folder in which another table of the collection puts a name.
    """
    for key in sorted(files.keys() - set(table.index)):
        if key in elsewhere:
            problems.append(
                Problem(files[key], f"in this folder, but its row puts it into {elsewhere[key]}",
                        f"a row in {csv.name}", "correct the folder or the table")
            )  # fmt: skip
        else:
            problems.append(
                Problem(files[key], f"no row in {csv.name}", "one row an image",
                        "fetch the table again, or move the image elsewhere")
            )  # fmt: skip
    for key in sorted(set(table.index) - files.keys()):
        problems.append(
            Problem(csv, f"a row for {key}, but no such image below {images}", "one image a row",
                    "fetch the image, or remove the row")
        )  # fmt: skip
    return sorted(files.keys() & set(table.index))


def _name(text: str) -> str:
    """A name in one Unicode form: file systems and tables differ in it."""
    return unicodedata.normalize("NFC", text)
