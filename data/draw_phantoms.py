"""Draw three collections of phantoms in the layout of the published ones: no image of a person.

Writes  raw/phantom/large-covid19-ct-slice-dataset    CT slices: COVID-19, normal, other pneumonia
        raw/phantom/COVID19_1110                      CT volumes, some of the same patients
        raw/phantom/chest-x-ray-lungs-segmentation    X-rays: tuberculosis, normal

Each patient has an anatomy, and each hospital a scanner with a look of its own. COVID-19 is drawn
as bilateral peripheral ground-glass patches, tuberculosis as upper-lobe infiltrates and cavities;
every tenth case is so mild that it can hardly be seen. What makes the true collections hard to
read and easy to get wrong is there too: a table that is not UTF-8, stray spaces, names with signs,
dirty remarks, five kinds of PNG, volumes in many axis orders, one patient in two collections, most
of the normal slices from one city, few cases of tuberculosis.

    python data/draw_phantoms.py        (or: dvc repro data/dvc.yaml:draw_phantoms)
    python data/draw_phantoms.py --into few --scale 0.1
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter

from chest.commands import parser
from chest.errors import run
from chest.files import replacing
from chest.parallel import map_in_processes

SEED = 2026
PHANTOM = Path(__file__).parent / "raw" / "phantom"

VOLUME_SIDE, VOLUME_SLICES = 96, 20
SLICE_SIDE = 128
BATCH = 8  # patients that a process draws at a time
MILD = 0.1  # share of cases that can hardly be seen


# --- What is drawn ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """A chest in units of half the picture's side: x to the patient's left, y to the back.

    ``shift`` is where its centre lies, x and y; ``tilt`` how far it is turned, in degrees.
    ``vessels`` (k, 4): x, y, z and radius; z runs from 0 (feet) to 1 (head).
    ``lesions`` (k, 5): x, y, z, radius, and strength from 0 to 1; ``cavities`` alike: rings.
    """

    width: float
    depth: float
    lung: float
    heart: float
    shift: tuple[float, float]
    tilt: float
    vessels: np.ndarray
    lesions: np.ndarray
    cavities: np.ndarray


@dataclass(frozen=True)
class Scanner:
    """The look of a hospital's pictures."""

    name: str
    country: str
    zoom: float
    blur: float  # px at SLICE_SIDE
    noise: float  # Hounsfield units, or thousandths of the X-ray's range
    table: bool
    window: tuple[float, float]
    kind: str  # of its PNG files


MOSCOW = Scanner(
    "Municipal Hospitals in Moscow", "Russia", 1.00, 0.8, 18, True, (-1000, 400), "L"
)  # fmt: skip
BABAK = Scanner("Babak Imaging Center, Tehran", "Iran", 1.08, 0.5, 30, False, (-1200, 300), "L")
NEGIN = Scanner(
    "Negin radiology located at Sari", "Iran", 0.94, 1.0, 24, True, (-1100, 500), "RGBA"
)
WENZHOU = Scanner("Wenzhou Medical University", "China", 1.03, 0.6, 40, True, (-1000, 200), "RGB")
JAM = Scanner("\xa0Jame Jam Imaging Center", "Iran", 1.00, 0.7, 35, False, (-1000, 500), "RGB")
JOURNALS = Scanner("", "China", 1.10, 1.2, 15, False, (-1300, 300), "P")
SHENZHEN = Scanner("Shenxhen", "China", 1.00, 0.6, 12, False, (0.02, 1.0), "RGB")
MONTGOMERY = Scanner("Montgomery", "USA", 0.93, 1.0, 20, False, (0.0, 1.15), "L")


def make_anatomy(rng: np.random.Generator, finding: str) -> Anatomy:
    """A patient with the finding ``covid19``, ``tuberculosis``, ``pneumonia`` or ``normal``."""
    lung = rng.uniform(0.86, 1.12)
    vessels = np.column_stack([
        rng.choice([-1, 1], 24) * rng.uniform(0.22, 0.5, 24), rng.uniform(-0.3, 0.25, 24),
        rng.uniform(0.15, 0.85, 24), rng.uniform(0.012, 0.03, 24),
    ])  # fmt: skip
    draw = {"covid19": ground_glass, "tuberculosis": infiltrates, "pneumonia": consolidation}
    lesions = draw[finding](rng, lung) if finding != "normal" else np.zeros((0, 5))
    cavities = np.zeros((0, 5))
    if finding == "tuberculosis" and rng.random() < 0.6:
        cavities, lesions = lesions[:1], lesions[1:]
    return Anatomy(
        rng.uniform(0.74, 0.92), rng.uniform(0.48, 0.66), lung, rng.uniform(0.75, 1.25),
        (rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08)), rng.uniform(-8, 8), vessels, lesions,
        cavities,
    )  # fmt: skip


def ground_glass(rng: np.random.Generator, lung: float) -> np.ndarray:
    """COVID-19: patches along the outer and posterior rim of both lungs."""
    mild = rng.random() < MILD
    count = rng.integers(2, 4) if mild else rng.integers(7, 14)
    side = np.where(np.arange(count) % 2, 1, -1)
    angle = rng.uniform(-0.35, 1.35, count)  # from lateral towards the back
    x = side * lung * (0.37 + 0.2 * np.cos(angle))
    y = -0.02 + 0.27 * lung * np.sin(angle)
    radius = rng.uniform(0.05, 0.08, count) if mild else rng.uniform(0.08, 0.16, count)
    strength = rng.uniform(0.2, 0.35, count) if mild else rng.uniform(0.6, 1.0, count)
    return np.column_stack([x, y, rng.uniform(0.3, 0.7, count), radius, strength])


def infiltrates(rng: np.random.Generator, lung: float) -> np.ndarray:
    """Tuberculosis: patches in the upper lobes; here z, from 0 to 1, is the height in an X-ray."""
    mild = rng.random() < MILD
    count = 1 if mild else rng.integers(4, 8)
    strength = rng.uniform(0.25, 0.4, count) if mild else rng.uniform(0.65, 1.0, count)
    side = rng.choice([-1, 1], count)
    return np.column_stack([
        side * lung * rng.uniform(0.26, 0.5, count), np.zeros(count),
        rng.uniform(0.6, 0.8, count), rng.uniform(0.08, 0.16, count), strength,
    ])  # fmt: skip


def consolidation(rng: np.random.Generator, lung: float) -> np.ndarray:
    """Another pneumonia: one dense lobe."""
    side = rng.choice([-1, 1])
    return np.array([[side * 0.38 * lung, 0.1, 0.45, 0.24, 1.0]])


def soft(distance: np.ndarray, width: float = 0.02) -> np.ndarray:
    """1 inside (negative distance), 0 outside, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(distance / width, -30, 30)))


def ellipse(x, y, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    """Distance to an ellipse in its own radii, negative inside."""
    return np.hypot((x - cx) / rx, (y - cy) / ry) - 1


def blobs(x: np.ndarray, y: np.ndarray, spots: np.ndarray, ratio: float = 1.0) -> np.ndarray:
    """Sum of Gaussian spots; `spots` (k, 4): x, y, radius, height."""
    if not len(spots):
        return np.zeros_like(x)
    cx, cy, radius, height = (column[:, None, None] for column in spots.T)
    return (height * np.exp(-(((x - cx) / radius) ** 2 + ((y - cy) * ratio / radius) ** 2))).sum(0)


def grid(side: int, zoom: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel, (side, side), from -1 to 1."""
    line = (np.arange(side) + 0.5) / side * 2 - 1
    return np.meshgrid(line / zoom, line / zoom)


def placed(body: Anatomy, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same pixels as the body sees them: it lies off the centre, and not quite straight."""
    x, y = x - body.shift[0], y - body.shift[1]
    cosine, sine = np.cos(np.radians(body.tilt)), np.sin(np.radians(body.tilt))
    return cosine * x + sine * y, cosine * y - sine * x


def texture(rng: np.random.Generator, side: int, size: float) -> np.ndarray:
    """Smooth noise of deviation 1 with grains of `size` px."""
    noise = gaussian_filter(rng.standard_normal((side, side)), size, mode="wrap")
    return noise / noise.std()


def axial(
    body: Anatomy, z: float, side: int, scanner: Scanner, rng: np.random.Generator
) -> np.ndarray:
    """An axial slice at height `z` in Hounsfield units, float64 (side, side)."""
    x, y = placed(body, *grid(side, scanner.zoom))
    tissue = soft(ellipse(x, y, 0, 0, body.width, body.depth))
    muscle = soft(ellipse(x, y, 0, 0, body.width - 0.09, body.depth - 0.09))
    hu = -1000 + tissue * 900 + muscle * 140
    swell = body.lung * np.sin(np.pi * np.clip(0.12 + 0.8 * z, 0, 1)) ** 0.5
    lungs = np.zeros_like(x)
    for centre in (-0.38, 0.38):
        lungs += soft(ellipse(x, y, centre * body.lung, -0.02, 0.26 * swell, 0.38 * swell), 0.04)
    heart = soft(ellipse(x, y, 0.1, -0.12, 0.26 * body.heart * (1.1 - 0.6 * z), 0.2), 0.05)
    lungs = lungs * (1 - heart)
    spots = blobs(x, y, near(body.vessels, z, 0.12))
    patches = np.minimum(blobs(x, y, near(body.lesions, z, 0.3)), 1)
    grain = 1 + 0.35 * texture(rng, side, side / 60)
    inside = -870 + 50 * texture(rng, side, side / 40) + 400 * spots + 560 * patches * grain
    hu = hu * (1 - lungs) + np.minimum(inside, 40) * lungs
    hu = np.maximum(hu, -1000 + 1380 * soft(ellipse(x, y, 0, 0.36, 0.1, 0.11), 0.08))
    for angle in np.linspace(0.15, 2 * np.pi - 0.15, 13) + z:
        cx, cy = (body.width - 0.1) * np.cos(angle), (body.depth - 0.09) * np.sin(angle)
        hu = np.maximum(hu, -1000 + 1500 * soft(ellipse(x, y, cx, cy, 0.06, 0.035), 0.15))
    if scanner.table:
        hu = np.maximum(hu, -1000 + 700 * soft(np.abs(y - 0.74 + 0.1 * x**2) - 0.012, 0.004))
    hu = gaussian_filter(hu, scanner.blur * side / SLICE_SIDE)
    return hu + scanner.noise * rng.standard_normal((side, side))


def near(things: np.ndarray, z: float, reach: float) -> np.ndarray:
    """Spots at height `z`, (k, 4): x, y, radius, height; vessels have full strength."""
    strength = things[:, 4] if things.shape[1] > 4 else 1.0
    height = strength * np.exp(-(((things[:, 2] - z) / reach) ** 2))
    return np.column_stack([things[:, :2], things[:, 3], height])


def frontal(body: Anatomy, side: int, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """A frontal X-ray, float64 (side, side), about 0 (dark) to 1; y runs from head to feet."""
    x, y = placed(body, *grid(side, scanner.zoom))
    width = body.width * np.clip(0.75 + 0.6 * (y + 1.1), 0.3, 1)
    image = 0.08 + 0.62 * soft(np.abs(x) - width, 0.03)
    lungs = np.zeros_like(x)
    for centre in (-0.36, 0.36):
        tip = centre * (1 - 0.25 * np.clip(-y, 0, 1))
        field = np.hypot((x - tip) / (0.27 * body.lung), (y + 0.02) / 0.68) - 1
        lungs += soft(field, 0.05) * soft(y - 0.5 + 0.9 * (x - centre) ** 2, 0.02)
    ribs = 0.07 * np.cos(2 * np.pi * (4.2 * y + 2.5 * x**2 + body.heart)) * lungs
    patches = np.minimum(blobs(x, y, seen_from_front(body.lesions), 0.8), 1)
    grain = 1 + 0.3 * texture(rng, side, side / 50)
    cavities = np.zeros_like(x)
    for cx, cy, radius, strength in seen_from_front(body.cavities):
        distance = np.hypot(x - cx, y - cy) / radius
        cavities += strength * (np.exp(-(((distance - 1) / 0.3) ** 2)) - 0.3 * soft(distance - 0.8))
    markings = 0.03 * texture(rng, side, side / 80)
    image += lungs * (-0.45 + markings + 0.36 * patches * grain + 0.3 * cavities) + ribs
    image += 0.3 * soft(ellipse(x, y, 0.13, 0.3, 0.27 * body.heart, 0.3), 0.12) * lungs
    image += 0.12 * soft(np.abs(x) - 0.07, 0.02)
    for slope in (-1, 1):
        collar = np.abs(y + 0.62 - 0.25 * slope * x) - 0.02
        image += 0.1 * soft(collar, 0.01) * (slope * x > 0.08) * (np.abs(x) < 0.62)
    image = gaussian_filter(image, scanner.blur * side / SLICE_SIDE)
    return image + scanner.noise / 1000 * rng.standard_normal((side, side))


def seen_from_front(things: np.ndarray) -> np.ndarray:
    """Spots of an X-ray, (k, 4): x, y, radius, strength."""
    return np.column_stack([things[:, 0], 1 - 2 * things[:, 2], things[:, 3], things[:, 4]])


# --- How it is written -----------------------------------------------------------------------


def to_bytes(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    return np.round(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def save_png(grey: np.ndarray, path: Path, kind: str) -> None:
    """Save uint8 grey values as a PNG of mode L, RGB, RGBA or P, or with 16 bits (I;16)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(grey)
    if kind == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    elif kind == "P":
        # Grey values through a palette in reverse order: read as numbers it would be a negative.
        picture = Image.fromarray(255 - grey)
        picture.putpalette([255 - i // 3 for i in range(768)])
    elif kind != "L":
        picture = picture.convert(kind)
    picture.save(path)


def save_volume(hu: np.ndarray, path: Path, order: int) -> None:
    """Save (z, y, x) values in the `order`-th of several axis orders; z to the head, 8 mm apart."""
    spacing = 360 / hu.shape[1]
    affine = np.array([[0, 0, -spacing, 180], [0, -spacing, 0, 180], [8, 0, 0, -80], [0, 0, 0, 1]])
    codes = ("LPS", "RAS", "LAS", "RPI", "SPL", "ARS")[order % 6]
    image = nib.Nifti1Image(np.round(hu).astype(np.int16), affine)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    content = image.as_reoriented(turn).to_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the time, so that the same phantom gives the same bytes.
    packed = gzip.compress(content, 4, mtime=0) if path.suffix == ".gz" else content
    path.write_bytes(packed)


# --- The collections -------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """One person: what is drawn, by which scanner, and how the tables name it.

    ``slices`` names the file of each CT slice, ``volume`` the volume file, both below the
    collections' folder.
    """

    number: int
    finding: str
    scanner: Scanner
    name: str
    slices: tuple[str, ...] = ()
    volume: str = ""
    xray: str = ""


SLICES = "large-covid19-ct-slice-dataset"
VOLUMES = "COVID19_1110"
XRAYS = "chest-x-ray-lungs-segmentation"
FOLDERS = {"covid19": "2COVID", "normal": "1NonCOVID", "pneumonia": "3CAP"}


def main(folder: Path = PHANTOM, scale: float = 1.0) -> None:
    """Draw the collections; `scale` shrinks the number of patients, for tests."""
    patients = list(make_patients(scale))
    with replacing(folder) as unfinished:
        write_slice_tables(patients, unfinished / SLICES)
        write_xray_table(patients, unfinished / XRAYS)
        some = [patients[i : i + BATCH] for i in range(0, len(patients), BATCH)]
        for _ in map_in_processes(partial(draw_all, folder=unfinished), some):
            pass


def make_patients(scale: float) -> Iterator[Patient]:
    """Everybody, in the proportions of the published collections."""
    number = 0
    for finding, scanner, prefix, people, slices in (
        ("covid19", BABAK, "P{:03}", 60, 8),
        ("covid19", WENZHOU, "{}_Wenzhou", 28, 6),
        ("covid19", NEGIN, "6_Rahimzadeh_137covid_patient{}", 15, 6),
        ("covid19", JAM, "14_Jun_coronacases_case{}", 16, 4),
        ("covid19", JOURNALS, "17_Zhao_2020.03.08.200316{:02}-p15-106%1", 30, 1),
        ("normal", NEGIN, "normal{:03}", 24, 5),
        ("normal", BABAK, "normal1{:02}", 20, 4),
        ("pneumonia", BABAK, "cap{:03}", 4, 5),
    ):
        for i in range(1, max(2, round(people * scale)) + 1):
            name = prefix.format(i)
            names = (name,) if slices == 1 else [f"{name}_{60 + 5 * k}" for k in range(slices)]
            yield Patient(number, finding, scanner, name, tuple(f"{n}.png" for n in names))
            number += 1
    study = 0
    for grade, people, shared, slices in (
        ("CT-0", 40, 40, 9), ("CT-1", 42, 25, 5), ("CT-2", 11, 0, 0), ("CT-3", 5, 0, 0),
        ("CT-4", 2, 0, 0),
    ):  # fmt: skip
        shared = max(2, round(shared * scale)) if shared else 0
        for i in range(max(2, round(people * scale))):
            study += 1
            name = f"study_{study:04}"
            first = VOLUME_SLICES // 2 - slices // 2
            names = [
                f"16_Morozov_{name}_{first + k}.png" for k in range(slices if i < shared else 0)
            ]
            # One in twenty is not compressed: some copies of the collection hold such.
            ending = ".nii" if study % 20 == 7 else ".nii.gz"
            yield Patient(
                number, "normal" if grade == "CT-0" else "covid19", MOSCOW, f"{grade}/{name}",
                tuple(names), f"studies/{grade}/{name}{ending}",
            )  # fmt: skip
            number += 1
    key = 1000
    for finding, scanner, people in (
        ("tuberculosis", SHENZHEN, 80), ("normal", SHENZHEN, 82), ("tuberculosis", MONTGOMERY, 20),
        ("normal", MONTGOMERY, 28),
    ):  # fmt: skip
        for _ in range(max(2, round(people * scale))):
            yield Patient(number, finding, scanner, str(key), xray=f"{key}.png")
            number, key = number + 1, key + 1


def draw_all(patients: list[Patient], folder: Path) -> None:
    for patient in patients:
        draw(patient, folder)


def draw(patient: Patient, folder: Path) -> None:
    """Draw and write all pictures and the volume of one patient, from a seed of its own."""
    rng = np.random.default_rng([SEED, patient.number])
    body = make_anatomy(rng, patient.finding)
    images = folder / SLICES / "curated_data" / "curated_data" / FOLDERS.get(patient.finding, "")
    if patient.xray:
        draw_xray(patient, body, folder / XRAYS / "Chest-X-Ray" / "Chest-X-Ray", rng)
    elif patient.volume:
        draw_volume(patient, body, folder / VOLUMES, images, rng)
    else:
        draw_slices(patient, body, images, rng)


def draw_slices(patient: Patient, body: Anatomy, images: Path, rng: np.random.Generator) -> None:
    """Slices from the middle of the chest; the second half of them from a later visit."""
    count = len(patient.slices)
    for i, (name, z) in enumerate(zip(patient.slices, np.linspace(0.36, 0.64, count), strict=True)):
        later = i >= count / 2 and count > 1
        visit = replace(body, shift=(body.shift[0] + 0.03 * later, body.shift[1]))
        hu = axial(visit, z, SLICE_SIDE, patient.scanner, rng)
        save_png(to_bytes(hu, patient.scanner.window), images / name, patient.scanner.kind)


def draw_volume(
    patient: Patient, body: Anatomy, folder: Path, images: Path, rng: np.random.Generator
) -> None:
    """A volume, slices of it for collection 1, and for some a mask of the lesions."""
    heights = (np.arange(VOLUME_SLICES) + 0.5) / VOLUME_SLICES
    hu = np.stack([axial(body, z, VOLUME_SIDE, patient.scanner, rng) for z in heights])
    path = folder / patient.volume
    save_volume(hu, path, patient.number)
    for name in patient.slices:
        index = int(Path(name).stem.rsplit("_", 1)[1])
        save_png(to_bytes(hu[index], patient.scanner.window), images / name, patient.scanner.kind)
    if patient.slices and patient.finding == "covid19":
        save_volume(hu > 0, folder / "masks" / f"{path.name.split('.')[0]}_mask.nii.gz", 0)


def draw_xray(patient: Patient, body: Anatomy, folder: Path, rng: np.random.Generator) -> None:
    """An X-ray, every seventh with 16 bits, and for some a mask of the lungs."""
    side = int(rng.integers(180, 260))
    grey = to_bytes(frontal(body, side, patient.scanner, rng), patient.scanner.window)
    kind = "I;16" if patient.number % 7 == 0 else patient.scanner.kind
    save_png(grey, folder / "image" / patient.xray, kind)
    if patient.number % 20 == 0:
        save_png(np.where(grey < 128, 255, 0).astype(np.uint8), folder / "mask" / patient.xray, "L")


def write_slice_tables(patients: list[Patient], folder: Path) -> None:
    """The three csv files of collection 1; that of COVID-19 is not UTF-8, as the true one."""
    folder.mkdir(parents=True)
    for finding, csv, infection in (
        ("covid19", "meta_data_covid.csv", "COVID-19"),
        ("normal", "meta_data_normal.csv", "Normal"),
        ("pneumonia", "meta_data_cap.csv", "CAP"),
    ):
        rows = [
            {
                "File name": name,
                "Patient ID": patient_id(patient),
                "Gender": "MF"[patient.number % 2],
                "Age": 25 + patient.number * 7 % 60,
                "Country": patient.scanner.country,
                "COVID-19 Infection": infection,
                "Slice": Path(name).stem.rsplit("_", 1)[-1],
                "Institution": patient.scanner.name,
                # A cell of two lines, as there are in the true table.
                "Presentation": "fever\ncough" if patient.number % 30 == 0 else "",
                "study_file": f"/{patient.volume}" if patient.volume else "",
            }
            for patient in patients
            if patient.finding == finding
            for name in patient.slices
        ]
        table = pd.DataFrame(rows).rename_axis("index")
        encoding = "iso-8859-1" if finding == "covid19" else "utf-8"
        table.to_csv(folder / csv, encoding=encoding, lineterminator="\n")


def patient_id(patient: Patient) -> str:
    """As the table writes it; some begin with a non-breaking space."""
    stray = "\xa0" if patient.finding == "covid19" and patient.number % 11 == 0 else ""
    return stray + patient.name.replace("%1", "").rsplit("/", 1)[-1]


def write_xray_table(patients: list[Patient], folder: Path) -> None:
    """MetaData.csv of collection 3, with remarks, ages and genders as untidy as the true ones."""
    folder.mkdir(parents=True)
    rows = []
    for i, patient in enumerate(p for p in patients if p.xray):
        sick = patient.finding == "tuberculosis"
        remark = "bilateral PTB" if sick else ",normal" if i % 8 == 1 else "normal"
        rows.append(
            {
                "id": patient.name,
                "gender": {5: "Male,", 17: "femal"}.get(i % 40, "male" if i % 2 else "female"),
                "age": {9: "030", 21: "39yr"}.get(i % 40, str(20 + i * 11 % 60)),
                "county": patient.scanner.name,
                "ptb": int(sick),
                "remarks": "" if i % 50 == 40 else remark,
            }
        )
    pd.DataFrame(rows).to_csv(folder / "MetaData.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--into", type=Path, default=PHANTOM, metavar="FOLDER")
    arguments.add_argument("--scale", type=float, default=1.0, help="of the number of patients")
    options = arguments.parse_args()
    run(lambda: main(options.into, options.scale), stage="draw_phantoms")
