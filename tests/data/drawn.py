"""Three tiny collections in the published layout, with the published traps."""

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image

from chest.data.collections import CT_SLICES, CT_VOLUMES, SLICE_CLASSES, SLICE_TABLE_COLUMNS, XRAYS

# Image, patient, institution, country, study_file of each slice.
COVID = """
P001_1.png,\xa0P001,M\xe1laga,Spain,
P001_2.png,\xa0P001,M\xe1laga,Spain,
P002_7.png,P002,,Iran,
17_Zhao_a%b.png,Zhao,,-,
16_Morozov_study_0255_20.png,M0255,Moscow,Russia,/studies/CT-1/study_0255.nii.gz"""
NORMAL = """
normal001_1.png,normal001,Tehran,Iran,
normal001_2.png,normal001,Tehran,Iran,
16_Morozov_study_0001_25.png,M0001,Moscow,Russia,/studies/CT-0/study_0001.nii.gz"""
VOLUMES = ("CT-0/study_0001.nii.gz", "CT-0/study_0002.nii", "CT-1/study_0255.nii.gz")
FILMS = """id,gender,county,ptb,remarks
1000,"Male,",Shenxhen,1,PTB in the left upper field
1001,femal,Shenxhen,0,normal
1002,Male,Montgomery,1,
1003,Male,Montgomery,0,",normal"
"""
COUNTS = {"covid19": 6, "normal": 7, "tuberculosis": 2}


def draw_picture(seed, side=40):
    """Draw a smooth grey picture, uint8, (side, side)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 10)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def draw_mask():
    """Draw two rectangular lungs, uint8 (60, 80), white on black."""
    mask = np.zeros((60, 80), np.uint8)
    mask[15:45, 10:35] = mask[15:45, 45:70] = 255
    return mask


def draw_volume(path, seed=0):
    """Write a volume of noise in Hounsfield units, 36 x 42 pixels and 9 slices."""
    values = np.random.default_rng(seed).integers(-1000, 900, (36, 42, 9)).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([0.7, 0.7, 8, 1])), path)


def draw_collections(raw):
    """Draw the three collections in `raw`, with other pneumonia and lesions, which are no input.

    One X-ray has a lung mask, of another size than the X-ray, and one mask has no X-ray.
    """
    slices, images = raw / CT_SLICES, raw / XRAYS / "Chest-X-Ray/Chest-X-Ray"
    for (folder, file, infection, _), rows in zip(SLICE_CLASSES, (COVID, NORMAL), strict=True):
        rows = [row.split(",") for row in rows.strip().split("\n")]
        for name, *_ in rows:
            save(slices / "curated_data/curated_data" / folder / name)
        table = pd.DataFrame([(*row[:2], infection, *row[2:]) for row in rows])
        encoding = "iso-8859-1" if infection == "COVID-19" else "utf-8"
        table.to_csv(slices / file, index=False, header=SLICE_TABLE_COLUMNS, encoding=encoding)
    save(slices / "curated_data/curated_data/3CAP/cap001.png")
    for number, name in enumerate(VOLUMES):
        draw_volume(raw / CT_VOLUMES / "studies" / name, number)
    draw_volume(raw / CT_VOLUMES / "masks/study_0255_mask.nii.gz")
    for name in ("image/1000", "image/1001", "image/1002", "image/1003"):
        save(images / f"{name}.png")
    (images / "mask").mkdir()
    for name in ("1000", "2000"):
        Image.fromarray(draw_mask()).save(images / f"mask/{name}.png")
    (raw / XRAYS / "MetaData.csv").write_text(FILMS)


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_picture(sum(map(ord, str(path))))).save(path)
