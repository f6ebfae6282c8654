"""Draw three collections of phantoms in the layout of the published ones: no image of a person.

Writes  raw/phantom/large-covid19-ct-slice-dataset    CT slices: COVID-19, normal, other pneumonia
        raw/phantom/COVID19_1110                      CT volumes, some of the same patients
        raw/phantom/chest-x-ray-lungs-segmentation    X-rays: tuberculosis, normal

Every lung, healthy or not, has opacities of the same number, place, size and density. In healthy
lungs they are smooth; in COVID-19 (peripheral, bilateral) and tuberculosis (upper lobes, often with
a cavity) a fine reticular pattern lies on them, which adds nothing to their mean. Brightness and
coarse shape therefore do not tell the classes apart, only texture does; every fourth case is mild.
Hospitals differ in look, and each examination from the next.

What makes the published collections hard to read is there too: a table that is not UTF-8, stray
spaces, file names with signs, untidy remarks, five kinds of PNG, volumes in many axis orders, one
patient in two collections, most of the normal slices from one city, few cases of tuberculosis.

    python data/draw_phantoms.py        (or: dvc repro data/dvc.yaml:draw_phantoms)
    python data/draw_phantoms.py --into few --scale 0.1
"""

import gzip
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter

from chest.core.files import replacing
from chest.core.parallel import parallel_map
from chest.core.runtime import parser, run

SEED = 2026
PHANTOM = Path(__file__).parent / "raw" / "phantom"

SIDE = 128  # px, of CT
VOLUME_SLICES = 16
MILD = 0.25  # share of cases with a faint pattern
OUTSIDE = -2000  # what some scanners store outside their circular field of view


# --- What is drawn ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """A chest in units of half the picture's side: x to the patient's left, y to the back.

    ``shift`` is the position of its centre (x, y), ``tilt`` its rotation in degrees, ``bone`` the
    density of bone in Hounsfield units. ``vessels`` and ``opacities`` are (k, 5): x, y, z, radius
    and density from 0 to 1; z runs from 0 (feet) to 1 (head). ``pattern`` is the strength of
    the reticular pattern on the opacities, 0 in healthy lungs; ``cavity`` turns the first opacity
    into a cavity.
    """

    width: float
    depth: float
    lung: float
    heart: float
    bone: float
    shift: tuple[float, float]
    tilt: float
    vessels: np.ndarray
    opacities: np.ndarray
    pattern: float
    cavity: bool


@dataclass(frozen=True)
class Scanner:
    """The look of a hospital's images; `vary` gives that of one examination."""

    name: str
    country: str
    zoom: float
    blur: float  # px at SIDE
    noise: float  # Hounsfield units, or thousandths of the X-ray's range
    table: float  # how often the table is in the picture
    window: tuple[float, float]
    kind: str  # of its PNG files

    def vary(self, rng: np.random.Generator) -> "Scanner":
        """Return the look of one examination: field of view, dose, kernel, table and window."""
        low, high = self.window
        span = high - low
        return replace(
            self,
            zoom=self.zoom * rng.uniform(0.92, 1.08),
            blur=self.blur * rng.uniform(0.7, 1.3),
            noise=self.noise * rng.uniform(0.7, 1.3),
            table=float(rng.random() < self.table),
            window=(low + span * rng.uniform(-0.1, 0.05), high + span * rng.uniform(-0.1, 0.1)),
        )


class Picture(NamedTuple):
    """Values (side, side), float64, with the masks of the lungs and of the lesions, bool."""

    values: np.ndarray
    lungs: np.ndarray
    lesions: np.ndarray


MOSCOW_NAME = "Municipal Hospitals in Moscow"
MOSCOW = Scanner(MOSCOW_NAME, "Russia", 1.00, 0.6, 20, 0.7, (-1000, 400), "L")
BABAK = Scanner("Babak Imaging Center, Tehran", "Iran", 1.04, 0.5, 30, 0.4, (-1050, 350), "L")
NEGIN = Scanner("Negin radiology located at Sari", "Iran", 0.97, 0.7, 24, 0.6, (-1050, 450), "RGBA")
WENZHOU = Scanner("Wenzhou Medical University", "China", 1.02, 0.5, 36, 0.6, (-1000, 300), "RGB")
JAM = Scanner("\xa0Jame Jam Imaging Center", "Iran", 1.00, 0.6, 32, 0.4, (-1000, 450), "RGB")
JOURNALS = Scanner("", "China", 1.06, 0.8, 15, 0.3, (-1100, 350), "P")
SHENZHEN = Scanner("Shenxhen", "China", 1.00, 0.5, 12, 0.0, (0.02, 1.0), "RGB")
MONTGOMERY = Scanner("Montgomery", "USA", 0.95, 0.7, 18, 0.0, (0.0, 1.1), "L")


def make_anatomy(rng: np.random.Generator, finding: str, xray: bool, extent: float) -> Anatomy:
    """Return a patient with `finding`, opacities where the modality's disease has them.

    The finding is ``covid19``, ``tuberculosis``, ``pneumonia`` or ``normal``; `extent` scales the
    radius of the opacities.
    """
    lung = rng.uniform(0.9, 1.08)
    count = int(rng.integers(3, 7) if xray else rng.integers(8, 13))
    side = rng.permutation(np.resize([-1, 1], count))
    density, radius = rng.uniform(0.6, 1, count), extent * rng.uniform(0.12, 0.2, count)
    if xray:  # upper lobes
        x, y = rng.uniform(0.25, 0.5, count), np.zeros(count)
        z = rng.uniform(0.55, 0.8, count)
    else:  # along the rim, from lateral to posterior
        angle = rng.uniform(-0.5, 1.4, count)
        x, y = 0.42 + 0.24 * np.cos(angle), 0.36 * lung * np.sin(angle)
        z = rng.uniform(0.2, 0.8, count)
    opacities = np.column_stack([side * lung * x, y, z, radius, density])
    if finding == "pneumonia":  # one dense lobe
        opacities = np.array([[side[0] * 0.4 * lung, 0.1, 0.45, 0.3, 1.0]])
    hilum, spread = [0, 0, 0.5, 0.028, 0.75], [0.45, 0.3, 0.35, 0.008, 0.25]
    sick = finding in ("covid19", "tuberculosis")
    return Anatomy(
        width=rng.uniform(0.92, 1.0),
        depth=rng.uniform(0.68, 0.78),
        lung=lung,
        heart=rng.uniform(0.75, 1.25),
        bone=rng.uniform(200, 400),
        shift=(rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07)),
        tilt=rng.uniform(-7, 7),
        vessels=hilum + spread * rng.uniform(-1, 1, (20, 5)),
        opacities=opacities,
        pattern=sick * (rng.uniform(0.15, 0.3) if rng.random() < MILD else rng.uniform(0.7, 1)),
        cavity=finding == "tuberculosis" and rng.random() < 0.6,
    )


def soft(distance: np.ndarray, width: float = 0.02) -> np.ndarray:
    """Return 1 inside (negative distance) and 0 outside, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(distance / width, -30, 30)))


def ellipse(x, y, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    """Return the distance to an ellipse in its own radii, negative inside."""
    return np.hypot((x - cx) / rx, (y - cy) / ry) - 1


def blobs(x: np.ndarray, y: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """Sum Gaussian spots; `spots` (k, 4): x, y, radius, height."""
    total = np.zeros_like(x)
    for cx, cy, radius, height in spots[spots[:, 3] > 0.02]:
        square = ((x - cx) ** 2 + (y - cy) ** 2) / radius**2
        near = square < 6
        total[near] += height * np.exp(-square[near])
    return total


def grid(body: Anatomy, side: int, zoom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of each pixel, (side, side), in the axes of the body."""
    line = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(line, line)
    x, y = x / zoom - body.shift[0], y / zoom - body.shift[1]
    cosine, sine = np.cos(np.radians(body.tilt)), np.sin(np.radians(body.tilt))
    return cosine * x + sine * y, cosine * y - sine * x


def smooth(rng: np.random.Generator, side: int, size: float) -> np.ndarray:
    """Return smooth noise of deviation 1 with a grain of `size` px."""
    noise = gaussian_filter(rng.standard_normal((side, side)), size, mode="wrap", truncate=3)
    return noise / noise.std()


def structure(rng: np.random.Generator, side: int, pattern: float) -> np.ndarray:
    """Return what the density of opacities is multiplied by: 1 on average, smooth or reticular.

    The pattern is a net of bright lines, the contours of smooth noise, less its own mean.
    """
    lines = np.exp(-((smooth(rng, side, side / 72) / 0.4) ** 2))
    net = (lines - lines.mean()) / lines.std()
    return 1 + 0.25 * smooth(rng, side, side / 25) + pattern * net


def axial(
    body: Anatomy, z: float, side: int, scanner: Scanner, rng: np.random.Generator
) -> Picture:
    """Draw an axial slice at height `z` in Hounsfield units."""
    x, y = grid(body, side, scanner.zoom)
    tissue = soft(ellipse(x, y, 0, 0, body.width, body.depth))
    muscle = soft(ellipse(x, y, 0, 0, body.width - 0.06, body.depth - 0.06))
    swell = body.lung * np.sin(np.pi * (0.12 + 0.76 * z)) ** 0.5
    lungs = np.zeros_like(x)
    for centre in (-0.44, 0.44):
        lungs += soft(ellipse(x, y, centre * body.lung, 0, 0.36 * swell, 0.54 * swell), 0.06)
    lungs *= 1 - soft(ellipse(x, y, 0.1, -0.18, 0.26 * body.heart * (1.1 - 0.6 * z), 0.24), 0.05)
    opacities = np.minimum(blobs(x, y, at_height(body.opacities, z, 0.3)), 1)
    inside = -870 + 30 * smooth(rng, side, side / 40)
    inside += 360 * opacities * structure(rng, side, body.pattern)
    inside += 350 * blobs(x, y, at_height(body.vessels, z, 0.12))
    hu = -1000 + tissue * 900 + muscle * 140
    hu = hu * (1 - lungs) + np.minimum(inside, 300) * lungs
    spine = soft(ellipse(x, y, 0, 0.5, 0.1, 0.11), 0.08)
    ribs = soft(np.abs(ellipse(x, y, 0, 0, body.width - 0.08, body.depth - 0.08)) - 0.04, 0.01)
    ribs *= soft(0.3 - np.cos(13 * np.arctan2(y, x) + 9 * z), 0.1)
    hu = np.maximum(hu, -1000 + (1000 + body.bone) * np.maximum(spine, ribs))
    if scanner.table:
        hu = np.maximum(hu, -1000 + 700 * soft(np.abs(y - 0.88 + 0.1 * x**2) - 0.012, 0.004))
    hu = gaussian_filter(hu, scanner.blur * side / SIDE)
    hu += scanner.noise * rng.standard_normal((side, side))
    lungs = lungs > 0.5
    return Picture(hu, lungs, lungs & (opacities > 0.4) & (body.pattern > 0))


def at_height(things: np.ndarray, z: float, reach: float) -> np.ndarray:
    """Return the spots at height `z`, (k, 4): x, y, radius, height."""
    height = things[:, 4] * np.exp(-(((things[:, 2] - z) / reach) ** 2))
    return np.column_stack([things[:, :2], things[:, 3], height])


def frontal(body: Anatomy, side: int, scanner: Scanner, rng: np.random.Generator) -> Picture:
    """Draw a frontal X-ray, about 0 (dark) to 1; y runs from head to feet."""
    x, y = grid(body, side, scanner.zoom)
    width = body.width * np.clip(0.75 + 0.6 * (y + 1.1), 0.3, 1)
    lungs = np.zeros_like(x)
    for centre in (-0.38, 0.38):
        tip = centre * (1 - 0.25 * np.clip(-y, 0, 1))
        field = np.hypot((x - tip) / (0.31 * body.lung), (y + 0.02) / 0.74) - 1
        lungs += soft(field, 0.05) * soft(y - 0.52 + 0.9 * (x - centre) ** 2, 0.02)
    spots = from_front(body.opacities)
    opacities = np.minimum(blobs(x, y, spots), 1)
    inside = 0.2 * opacities * structure(rng, side, body.pattern)
    inside += 0.08 * blobs(x, y, from_front(body.vessels))
    if body.cavity:
        cx, cy, radius, _ = spots[0]
        distance = np.hypot(x - cx, y - cy) / radius
        wall, hole = np.exp(-(((distance - 0.8) / 0.2) ** 2)), np.exp(-((distance / 0.7) ** 4))
        inside += 0.25 * body.pattern * (wall - hole * wall.sum() / hole.sum())
    ribs = 0.05 * np.cos(2 * np.pi * (3.8 * y + 2.5 * x**2 + body.heart))
    image = 0.08 + 0.62 * soft(np.abs(x) - width, 0.03)
    image += lungs * (-0.42 + 0.02 * smooth(rng, side, side / 40) + inside + ribs)
    image += 0.3 * soft(ellipse(x, y, 0.13, 0.3, 0.27 * body.heart, 0.3), 0.12) * lungs
    image += (0.05 + body.bone / 6000) * soft(np.abs(x) - 0.07, 0.02)
    for slope in (-1, 1):
        collar = np.abs(y + 0.62 - 0.25 * slope * x) - 0.02
        image += 0.1 * soft(collar, 0.01) * (slope * x > 0.08) * (np.abs(x) < 0.62)
    image = gaussian_filter(image, scanner.blur * side / SIDE)
    image += scanner.noise / 1000 * rng.standard_normal((side, side))
    lungs = lungs > 0.5
    return Picture(image, lungs, lungs & (opacities > 0.4) & (body.pattern > 0))


def from_front(things: np.ndarray) -> np.ndarray:
    """Return the spots of an X-ray, (k, 4): x, y, radius, height."""
    return np.column_stack([things[:, 0], 1 - 2 * things[:, 2], things[:, 3:]])


# --- How it is written -----------------------------------------------------------------------


def to_bytes(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map `window` to grey values from 0 to 255."""
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
    packed = gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content
    path.write_bytes(packed)


# --- The collections -------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """One person: the finding, the scanner, and the names in tables and of files.

    ``slices`` are the files of CT slices, ``volume`` and ``xray`` those of a volume and an X-ray.
    ``extent`` scales the opacities; None: drawn at random.
    """

    finding: str
    scanner: Scanner
    name: str
    slices: tuple[str, ...] = ()
    volume: str = ""
    xray: str = ""
    extent: float | None = None
    number: int = 0


SLICES = "large-covid19-ct-slice-dataset"
VOLUMES = "COVID19_1110"
XRAYS = "chest-x-ray-lungs-segmentation"
EXTENT = {"CT-0": None, "CT-1": 0.9, "CT-2": 1.05, "CT-3": 1.2, "CT-4": 1.4}
FOLDERS = {"covid19": "2COVID", "normal": "1NonCOVID", "pneumonia": "3CAP"}


def main(folder: Path = PHANTOM, scale: float = 1.0) -> None:
    """Draw the collections; `scale` shrinks the number of patients, for tests."""
    patients = make_patients(scale)
    with replacing(folder) as unfinished:
        write_slice_tables(patients, unfinished / SLICES)
        write_xray_table(patients, unfinished / XRAYS)
        for _ in parallel_map(partial(draw, folder=unfinished), patients):
            pass


def make_patients(scale: float) -> list[Patient]:
    """Return everybody, in proportions like those of the published collections."""

    def numbers(count: int) -> range:
        return range(1, max(2, round(count * scale)) + 1)

    people: list[Patient] = []
    for finding, scanner, name, count, slices in (
        ("covid19", BABAK, "P{:03}", 36, 6),
        ("covid19", WENZHOU, "{}_Wenzhou", 18, 5),
        ("covid19", NEGIN, "6_Rahimzadeh_137covid_patient{}", 12, 5),
        ("covid19", JAM, "14_Jun_coronacases_case{}", 10, 4),
        ("covid19", JOURNALS, "17_Zhao_2020.03.08.200316{:02}-p15-106%1", 24, 1),
        ("normal", NEGIN, "normal{:03}", 16, 4),
        ("normal", BABAK, "normal1{:02}", 20, 4),
        ("pneumonia", BABAK, "cap{:03}", 4, 4),
    ):
        endings = [f"_{60 + 5 * k}.png" for k in range(slices)] if slices > 1 else [".png"]
        for i in numbers(count):
            files = tuple(name.format(i) + ending for ending in endings)
            people.append(Patient(finding, scanner, name.format(i), files))
    grades = (("CT-0", 32), ("CT-1", 32), ("CT-2", 9), ("CT-3", 5), ("CT-4", 2))
    studies = [(grade, i) for grade, count in grades for i in numbers(count)]
    for study, (grade, i) in enumerate(studies, 1):
        name, finding = f"study_{study:04}", "normal" if grade == "CT-0" else "covid19"
        # All of CT-0 and some of CT-1 have slices in collection 1, too.
        shared = {"CT-0": range(5, 11), "CT-1": range(6, 11) if i in numbers(20) else ()}
        files = tuple(f"16_Morozov_{name}_{k}.png" for k in shared.get(grade, ()))
        # One in twenty is not compressed: some copies of the collection hold such.
        volume = f"studies/{grade}/{name}.nii" + ".gz" * (study % 20 != 7)
        people.append(Patient(finding, MOSCOW, name, files, volume, extent=EXTENT[grade]))
    for finding, scanner, count in (
        ("tuberculosis", SHENZHEN, 70),
        ("normal", SHENZHEN, 78),
        ("tuberculosis", MONTGOMERY, 30),
        ("normal", MONTGOMERY, 36),
    ):
        for _ in numbers(count):
            key = str(1000 + sum(bool(patient.xray) for patient in people))
            people.append(Patient(finding, scanner, key, xray=f"{key}.png"))
    return [replace(patient, number=number) for number, patient in enumerate(people)]


def draw(patient: Patient, folder: Path) -> None:
    """Draw and write all images of one patient, from a seed of its own."""
    rng = np.random.default_rng([SEED, patient.number])
    extent = patient.extent or rng.uniform(0.8, 1.3)
    body = make_anatomy(rng, patient.finding, bool(patient.xray), extent)
    images = folder / SLICES / "curated_data" / "curated_data" / FOLDERS.get(patient.finding, "")
    if patient.xray:
        draw_xray(patient, body, folder / XRAYS / "Chest-X-Ray" / "Chest-X-Ray", rng)
    elif patient.volume:
        draw_volume(patient, body, folder / VOLUMES, images, rng)
    else:  # slices from the middle of the chest, each as of an examination of its own
        heights = np.linspace(0.36, 0.64, len(patient.slices))
        for name, z in zip(patient.slices, heights, strict=True):
            look = patient.scanner.vary(rng)
            hu = axial(body, z, SIDE, look, rng).values
            save_png(to_bytes(hu, look.window), images / name, look.kind)


def draw_volume(
    patient: Patient, body: Anatomy, folder: Path, images: Path, rng: np.random.Generator
) -> None:
    """Draw a volume, slices of it for collection 1, and for some a mask of the lesions."""
    look = patient.scanner.vary(rng)
    heights = (np.arange(VOLUME_SLICES) + 0.5) / VOLUME_SLICES
    drawn = [axial(body, z, SIDE, look, rng) for z in heights]
    hu = np.stack([picture.values for picture in drawn])
    if patient.number % 2:
        line = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
        hu[:, np.hypot(line, line[:, None]) > 1] = OUTSIDE
    path = folder / patient.volume
    save_volume(hu, path, patient.number)
    for name in patient.slices:
        index = int(Path(name).stem.rsplit("_", 1)[1])
        save_png(to_bytes(hu[index], look.window), images / name, look.kind)
    if patient.slices and patient.finding == "covid19":
        lesions = np.stack([picture.lesions for picture in drawn])
        save_volume(lesions, folder / "masks" / f"{path.name.split('.')[0]}_mask.nii.gz", 0)


def draw_xray(patient: Patient, body: Anatomy, folder: Path, rng: np.random.Generator) -> None:
    """Draw an X-ray, every seventh with 16 bits, and the mask of its lungs."""
    look = patient.scanner.vary(rng)
    picture = frontal(body, int(rng.integers(170, 240)), look, rng)
    kind = "I;16" if patient.number % 7 == 0 else look.kind
    save_png(to_bytes(picture.values, look.window), folder / "image" / patient.xray, kind)
    save_png(picture.lungs.astype(np.uint8) * 255, folder / "mask" / patient.xray, "L")


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
    return stray + patient.name.replace("%1", "")


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
    run(lambda: main(options.into, options.scale))
