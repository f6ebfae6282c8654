"""Made-up manifests and answers of a known quality."""

import numpy as np
import pandas as pd

from chest.core.labels import LABELS
from chest.evaluation.predictions import DESCRIBED, Record, System, tabulate

KINDS = (("covid19", "ct"), ("normal", "ct"), ("normal", "xray"), ("tuberculosis", "xray"))
SITES = {"ct": ("Moscow", "Tehran"), "xray": ("Montgomery", "Shenzhen")}


def make_manifest(patients=20, images=2, splits=("train", "val", "test")):
    """Return a labelled manifest: per split and kind so many patients with so many images."""
    rows = []
    for split in splits:
        for label, modality in KINDS:
            for p in range(patients):
                site = SITES[modality][p % 2]
                person = f"{split}-{label}-{modality}-{p:03}"
                rows += [
                    (f"{person}-{i}", split, label, modality, site, person) for i in range(images)
                ]
    columns = ["image_id", "split", "label", "modality", "site", "patient_id"]
    table = pd.DataFrame(rows, columns=columns).sort_values("image_id", ignore_index=True)
    collection = np.where(table["modality"] == "ct", "ct_volumes", "xrays")
    return table.assign(collection=collection, study=table["patient_id"], width="512", height="512")


def make_system(labelled, skill=1.0, seed=0, key="system", kind="trained", splits=("val", "test")):
    """Return a system that separates disease from normal by `skill` standard deviations."""
    rng = np.random.default_rng(seed)
    rows = labelled[labelled["split"].isin(splits)]
    sick = (rows["label"] != "normal").to_numpy()
    p = 1 / (1 + np.exp(-(skill * (sick - 0.5) + rng.normal(size=len(rows)))))
    zero = np.zeros(len(rows))
    on_ct = (rows["modality"] == "ct").to_numpy()
    table = tabulate(rows, np.where(on_ct, [p, 1 - p, zero], [zero, 1 - p, p]).T)
    answers = table.merge(labelled[["image_id", *DESCRIBED]], on="image_id")
    return System(key, Record(name=key.title(), kind=kind, n=len(answers)), answers)


def constant_system(labelled, label, key="constant", kind="blind", splits=("val", "test")):
    """Return a system that always gives the same answer."""
    rows = labelled[labelled["split"].isin(splits)]
    table = tabulate(rows, [[0.8 if x == label else 0.1 for x in LABELS]] * len(rows))
    answers = table.merge(labelled[["image_id", *DESCRIBED]], on="image_id")
    return System(key, Record(name=key.title(), kind=kind, n=len(answers)), answers)
