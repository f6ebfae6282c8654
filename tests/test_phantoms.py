"""The drawn collections: repeatable, in the true layout, and with what makes the true ones hard."""

import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import load_script

from chest.collections import CT_SLICES, CT_VOLUMES, XRAYS


@pytest.fixture(scope="module")
def script():
    return load_script("data/draw_phantoms.py")


@pytest.fixture(scope="module")
def patients(script):
    return list(script.make_patients(1.0))


def test_the_same_bytes_are_drawn_again(script, phantoms, tmp_path):
    script.main(tmp_path / "again", scale=0.1)
    names = [path.relative_to(phantoms) for path in phantoms.rglob("*") if path.is_file()]
    assert len(names) > 100
    for name in names:
        assert (phantoms / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_everybody_has_a_body_of_his_own(script):
    rng = np.random.default_rng
    bodies = [script.make_anatomy(rng(seed), "covid19") for seed in range(20)]
    assert len({body.width for body in bodies}) == 20
    for body in bodies:  # bilateral
        assert {*np.sign(body.lesions[:, 0])} == {-1, 1}


def test_tuberculosis_lies_in_the_upper_lobes(script):
    for seed in range(20):
        body = script.make_anatomy(np.random.default_rng(seed), "tuberculosis")
        lesions = np.concatenate([body.lesions, body.cavities])
        assert len(lesions)
        assert (lesions[:, 2] >= 0.6).all()
    assert not len(script.make_anatomy(np.random.default_rng(0), "normal").lesions)


def test_some_cases_are_mild(script):
    strength = [
        script.make_anatomy(np.random.default_rng(seed), "covid19").lesions[:, 4].max()
        for seed in range(200)
    ]
    assert 0.04 < np.mean(np.array(strength) < 0.4) < 0.2


def test_classes_are_as_uneven_as_in_the_study(patients):
    images = pd.Series(
        [p.finding for p in patients for _ in (*p.slices, *filter(None, (p.volume, p.xray)))]
    )
    counts = images.value_counts()
    assert counts["tuberculosis"] <= counts["covid19"] / 10
    both = [p for p in patients if p.slices and p.volume]
    assert {p.finding for p in both} == {"covid19", "normal"}


def test_slices_of_volumes_are_slices_of_them(phantoms):
    images = phantoms / CT_SLICES / "curated_data" / "curated_data"
    shared = sorted(images.rglob("16_Morozov_*.png"))
    assert shared
    for path in shared[::5]:
        study, index = re.search(r"(study_\d+)_(\d+)", path.stem).groups()
        (volume,) = (phantoms / CT_VOLUMES / "studies").rglob(f"{study}.nii*")
        values = nib.as_closest_canonical(nib.load(volume)).get_fdata()[:, :, int(index)]
        expected = np.clip((values[::-1, ::-1].T + 1000) / 1400, 0, 1) * 255
        assert np.abs(np.asarray(Image.open(path)) - expected).max() < 1


def test_files_come_in_all_kinds(phantoms):
    modes = {Image.open(path).mode for path in phantoms.rglob("*.png")}
    assert modes >= {"L", "RGB", "RGBA", "P", "I;16"}
    volumes = (phantoms / CT_VOLUMES / "studies").rglob("*.nii*")
    orders = {"".join(nib.aff2axcodes(nib.load(path).affine)) for path in volumes}
    assert len(orders) >= 5


def test_tables_have_the_published_traps(phantoms):
    covid = (phantoms / CT_SLICES / "meta_data_covid.csv").read_bytes()
    with pytest.raises(UnicodeDecodeError):
        covid.decode("utf-8")
    assert b",\xa0" in covid
    assert b"%1.png" in covid
    assert b'"fever\ncough"' in covid
    xrays = pd.read_csv(phantoms / XRAYS / "MetaData.csv", dtype=str, keep_default_na=False)
    assert ",normal" in set(xrays["remarks"])
    assert not xrays["age"].str.fullmatch(r"[1-9]\d").all()
    assert not xrays["gender"].isin(["male", "female"]).all()


def test_sites_look_different(script):
    body = script.make_anatomy(np.random.default_rng(3), "normal")
    rng = np.random.default_rng
    looks = [script.axial(body, 0.5, 64, s, rng(0)) for s in (script.MOSCOW, script.BABAK)]
    assert np.abs(looks[0] - looks[1]).mean() > 30  # Hounsfield units
    again = script.axial(body, 0.5, 64, script.MOSCOW, rng(1))
    assert np.abs(looks[0] - again).mean() < 30
