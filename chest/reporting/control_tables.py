"""What the controls of vision-language models say, for the model card and the review report.

``controls`` is always the table of ``plots/controls.csv``, and ``names`` has the display name of
each of its systems. All figures are of the test split.
"""

from collections.abc import Iterator, Mapping

import pandas as pd

from chest.core.labels import MODALITY_NAMES
from chest.evaluation.control_scores import BLIND, survives_without_image
from chest.evaluation.controls import ASKED
from chest.reporting.wording import CONDITION_NAMES, WITHIN, format_interval, percent, tell_need

# Ways of correcting for the words that a model favours (`chest.models.vlm.controls`).
PRIORS = {
    "none": "no prior",
    "content_free": "prior of blank images",
    "unlabelled": "prior of training images",
}
CHANGES = {
    **CONDITION_NAMES,
    "order_": "another order of the classes",
    "paraphrase_": "other words",
}
IMAGE_HEAD = ["UAR", "", "asked", *(CONDITION_NAMES[x] for x in BLIND), *PRIORS.values()]
CHANGE_HEAD = ["answers changed by", "", *CHANGES.values(), "covered"]


def need_image(controls: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    """Say of each system whether its result needs the image."""
    for key, own in controls[controls["split"] == "test"].groupby("system", sort=False):
        within = [name for name in MODALITY_NAMES if name in set(own["modality"])]
        yield f"{names[key]}: {tell_need(within, survives_without_image(own))}"


def image_rows(controls: pd.DataFrame, names: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield rows under IMAGE_HEAD: the UAR with the image, without it, and with each prior."""
    for name, within, found in _conditions(controls, names):
        shown = [found.loc[x, ["uar", "uar_low", "uar_high"]] for x in (ASKED, *BLIND)]
        priors = [
            percent(found.loc[f"prior_{x}", "uar"]) if f"prior_{x}" in found.index else "–"
            for x in PRIORS
        ]
        yield [name, within, *(format_interval(*x) for x in shown), *priors]


def change_rows(controls: pd.DataFrame, names: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield rows under CHANGE_HEAD: the mean share of answers that other conditions change.

    The last column is the mean probability that the model gives all answers together.
    """
    for name, within, found in _conditions(controls, names):
        kinds = [found[found.index.str.startswith(x)]["changed"].mean() for x in CHANGES]
        covered = found.loc[ASKED, "covered"]
        yield [name, within, *map(percent, kinds), percent(covered)]


def _conditions(
    controls: pd.DataFrame, names: Mapping[str, str]
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield name, modality in words, and figures by condition."""
    within = controls[(controls["split"] == "test") & (controls["modality"] != "all")]
    for (key, modality), own in within.groupby(["system", "modality"], sort=False):
        yield names[key], WITHIN[modality], own.set_index("condition")
