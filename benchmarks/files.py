"""Reading: volumes to the slice, pictures to the packed array."""

import gzip
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from measure import Row, time_in_turn
from PIL import Image
from scipy.ndimage import gaussian_filter

from chest.data.pictures import read_pictures
from chest.data.volumes import cut_axial_slice, read_axial_slice

STUDY = {"volumes": 1110, "slices": 14_486, "xrays": 704}


@dataclass(frozen=True)
class Sizes:
    """How much is read: slices of each volume, pictures of each kind and their sides in px."""

    volumes: dict[int, int]  # slices: how many such volumes
    side: int  # of a slice
    slices: int
    xrays: int
    xray_side: int
    repeats: int


SIZES = {
    "full": Sizes({40: 6, 150: 2}, 512, 480, 32, 3000, 5),
    "tiny": Sizes({6: 2}, 64, 6, 2, 100, 1),
}


def measure_volumes(size: str) -> list[Row]:
    """Ours against nibabel, one core: of each volume the centre slice."""
    sizes, rows = SIZES[size], []
    with tempfile.TemporaryDirectory() as folder:
        for count, number in sizes.volumes.items():
            paths = [Path(folder, f"{count}-{i}.nii.gz") for i in range(number)]
            for i, path in enumerate(paths):
                draw_volume(path, sizes.side, count, i)
            for name, ours, theirs, opponent in (
                ("", read_axial_slice, whole_volume, "nibabel, get_fdata()[..., k]"),
                ("", read_axial_slice, one_slice, "nibabel, dataobj[..., k]"),
                (", checksum tested", verified, whole_volume, "nibabel, get_fdata()[..., k]"),
            ):
                times = time_in_turn(each(ours, paths), each(theirs, paths), sizes.repeats, number)
                kind = f"Slice of a volume {sizes.side} x {sizes.side} x {count}{name}"
                rows.append(Row(kind, opponent, number, "volumes", *times))
    return rows


def measure_packing(size: str) -> list[Row]:
    """Ours, on all cores, against a loop as one writes it with Pillow, on one."""
    sizes = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        slices = [Path(folder, f"slice-{i}.png") for i in range(sizes.slices)]
        xrays = [Path(folder, f"xray-{i}.png") for i in range(sizes.xrays)]
        for i, path in enumerate(slices):
            draw_picture(path, sizes.side, i)
        for i, path in enumerate(xrays):
            draw_picture(path, sizes.xray_side, i)
        rows = []
        for kind, paths in (
            (f"Packing slices of {sizes.side} px", slices),
            (f"Packing X-rays of {sizes.xray_side} px", xrays),
        ):
            both = partial(pack, paths), partial(pillow_loop, paths)
            times = time_in_turn(*both, sizes.repeats, len(paths))
            rows.append(Row(kind, "Pillow in a loop", len(paths), "images", *times))
    return rows


def pack(paths: list[Path]) -> None:
    """As build_manifest does: decode, check, hash, resize."""
    for _ in read_pictures(paths, [224]):
        pass


def pillow_loop(paths: list[Path]) -> None:
    """Nothing checked, nothing hashed."""
    for path in paths:
        np.asarray(Image.open(path).convert("L").resize((224, 224), Image.Resampling.BICUBIC))


def on_one_core(function: Callable) -> Callable:
    """`function`, for as long as it runs, on one core."""

    def run(paths: list[Path]) -> None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            function(paths)
        finally:
            os.sched_setaffinity(0, cores)

    return run


def each(function: Callable, paths: list[Path]) -> Callable[[], None]:
    """`function` of one path after the other, on one core."""

    def run(paths: list[Path]) -> None:
        for path in paths:
            function(path)

    return lambda: on_one_core(run)(paths)


def verified(path: Path) -> np.ndarray:
    return cut_axial_slice(path, verify=True).pixels


def whole_volume(path: Path) -> np.ndarray:
    image = nib.load(path)
    return image.get_fdata()[..., image.shape[2] // 2]


def one_slice(path: Path) -> np.ndarray:
    image = nib.load(path)
    return np.asarray(image.dataobj[..., image.shape[2] // 2], np.float64)


def draw_volume(path: Path, side: int, count: int, seed: int) -> None:
    """A CT-like volume, int16, gzip level 6: a body of smooth tissue with the scanner's noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    body = (rows / 0.7) ** 2 + (columns / 0.9) ** 2 < 1
    tissue = gaussian_filter(rng.normal(0, 1, (side, side)), side / 50)
    tissue *= 300 / np.abs(tissue).max()
    values = np.full((side, side, count), -1000, np.int16)
    for k in range(count):
        shape = body * (1000 + tissue * math.cos(k / 9))
        values[..., k] += (shape + body * rng.normal(0, 12, (side, side))).astype(np.int16)
    image = nib.Nifti1Image(values, np.diag([0.7, 0.7, 8, 1]))
    path.write_bytes(gzip.compress(image.to_bytes(), 6))


def draw_picture(path: Path, side: int, seed: int) -> None:
    """A grey picture, smooth with a little noise, as a PNG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 220, (12, 12)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-3, 4, (side, side))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
