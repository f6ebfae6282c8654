"""What was found on real lungs, in ten lines: sentences around figures, none of them typed."""

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import pandas as pd

from chest.reporting.wording import capitalize, format_points, percent

FINE_TUNED = "EfficientNet, fine-tuned"
FINE, FROZEN = "fine-tuned", "frozen, logistic regression"
WHOLE, LUNGS, CROPPED = "Whole image", "Lungs only", "Lungs, cropped and stretched"
BORDER, HIDDEN, SHAPE = "Border only", "Lungs hidden", "Shape of the lung mask"

ZERO = 0.01  # recalls below count as none

Tables = Mapping[str, pd.DataFrame]


class Missing(Exception):
    """A figure that a sentence needs and no run has."""


def findings(tables: Tables) -> list[str]:
    """Return a sentence for each question; a question without runs is said to be open."""
    questions = {
        "the systems within CT and within X-ray": systems,
        "pretraining": pretraining,
        "the border of a film": border,
        "Shenzhen to Montgomery": lambda t: across(t, "Shenzhen", "Montgomery"),
        "Montgomery to Shenzhen": lambda t: across(t, "Montgomery", "Shenzhen"),
        "the shape of the lung mask": shape,
        "thresholds in another hospital": threshold,
        "head, balance, augmentation and adversary": helps,
        "few patients": few_shots,
        "few tuberculosis images": starved,
    }
    lines, open_ = [], []
    for name, sentence in questions.items():
        try:
            lines.append(capitalize(sentence(tables)))
        except Missing:
            open_.append(name)
    return lines + ([f"Not run yet: {', '.join(open_)}."] if open_ else [])


def systems(tables: Tables) -> str:
    ct, xray = (
        pick(tables, "systems", system=FINE_TUNED, place=place)
        for place in ("within CT", "within X-ray")
    )
    pixels = pick(tables, "systems", system="Linear on 28 x 28 pixels", place="within X-ray")
    return (
        f"a fine-tuned EfficientNet tells COVID-19 from normal within CT with an AUROC of"
        f" {told(ct)} (n = {ct['images']:,}) and tuberculosis from normal within X-ray with"
        f" {told(xray)} (n = {xray['images']:,}); a linear model on 28 x 28 pixels reaches"
        f" {told(pixels)} within X-ray."
    )


def pretraining(tables: Tables) -> str:
    random = pick(
        tables, "systems", system="EfficientNet from random weights", place="within X-ray"
    )
    found = tables["systems"]["system"]
    same = "EfficientNet, 3 epochs" if "EfficientNet, 3 epochs" in {*found} else FINE_TUNED
    trained = pick(tables, "systems", system=same, place="within X-ray")
    return (
        f"in 3 epochs the same network reaches {told(random)} within X-ray from random weights, at"
        f" a higher learning rate, and {told(trained)} from ImageNet's."
    )


def border(tables: Tables) -> str:
    """The headline: what is visible, within Shenzhen."""
    rows = [view(tables, "within Shenzhen", name) for name in (WHOLE, BORDER, HIDDEN, LUNGS)]
    whole, edge, hidden, lungs = map(told, rows)
    return (
        f"within Shenzhen the film's border alone, without a lung, gives an AUROC of {edge}, the"
        f" film with its lungs hidden {hidden}, the whole film {whole}, and the lungs alone {lungs}"
        f" (n = {rows[0]['images']:,})."
    )


def across(tables: Tables, old: str, new: str) -> str:
    """What carries over to a hospital never seen."""
    place, parts = f"{old} to {new}", []
    for method, name in (
        (FROZEN, "frozen features reach"),
        (FINE, "the fine-tuned network reaches"),
    ):
        with suppress(Missing):
            whole, lungs = (view(tables, place, visible, method) for visible in (WHOLE, CROPPED))
            parts.append(
                f"{name} {told(whole)} on whole films and {told(lungs)} on lungs alone, cropped and"
                f" stretched: {difference(lungs)}"
            )
    if not parts:
        raise Missing
    return f"trained in {old} and tested in {new}, {'; '.join(parts)}."


def shape(tables: Tables) -> str:
    inside, outside = (
        view(tables, place, SHAPE) for place in ("within Shenzhen", "Shenzhen to Montgomery")
    )
    return (
        f"the shape of the lung mask alone, without a grey value, gives {told(inside)} within"
        f" Shenzhen and {told(outside)} in Montgomery."
    )


def threshold(tables: Tables) -> str:
    """What a threshold is worth in another hospital, and what labelled films bring back."""
    rows = [view(tables, "Shenzhen to Montgomery", name) for name in (WHOLE, CROPPED)]
    (a, b), (c, d) = ([percent(row[x], 0) for x in ("sensitivity", "specificity")] for row in rows)
    known = {"place": "Shenzhen to Montgomery", "method": FINE, "view": WHOLE}
    known |= {"recalibrated": "threshold"}
    moved = [pick(tables, "recalibration", labelled=n, **known) for n in (0, 20, 50)]
    none, twenty, fifty = (percent(row["uar"]) for row in moved)
    return (
        f"a threshold set in Shenzhen for a sensitivity of 90 % gives Montgomery a sensitivity of"
        f" {a} and a specificity of {b} on whole films, {c} and {d} on lungs alone, cropped and"
        f" stretched; moving it with 20 labelled films of Montgomery changes the UAR on whole films"
        f" from {none} to {twenty}, with 50 to {fifty} (means over draws)."
    )


def helps(tables: Tables) -> str:
    """Which settings change the AUROC in a hospital that was held out."""
    table = tables["helps"]
    if table.empty or "auroc_change" not in table:
        raise Missing
    across = table["place"].str.contains(" to ") & table["auroc_change"].notna()
    tried = table[across & table["validated"].notna()]  # a masked head is no other training
    raised, lowered = tried["auroc_change_low"] > 0, tried["auroc_change_high"] < 0
    better, worse = (_listed(tried[which]) for which in (raised, lowered))
    kinds = dict.fromkeys(name.partition(":")[0] for name in tried["setting"])
    return (
        f"settings of the fine-tuned network were changed one at a time ({'; '.join(kinds)}) and"
        f" tested {len(tried)} times in a hospital never seen: {better} raised its AUROC by more"
        f" than noise, {worse} lowered it."
    )


def _listed(changes: pd.DataFrame) -> str:
    """Return how many settings there are, and their changes in points."""
    names = [
        f"{row.setting}, {row.place}: {format_points(row.auroc_change)} points"
        for row in changes.itertuples()
    ]
    return f"{len(names)} ({'; '.join(names)})" if names else "none"


def few_shots(tables: Tables) -> str:
    known = {"method": "logistic", "modality": "xray"}
    rows = [pick(tables, "few_shots", patients=n, **known) for n in ("4", "16", "64", "all")]
    four, sixteen, many, every = (percent(row["uar"]) for row in rows)
    return (
        f"on frozen features, 4 patients per class give a UAR of {four} within X-ray, 16 give"
        f" {sixteen}, 64 give {many}, and all (about {rows[-1]['per_class']:.0f}) {every}."
    )


def starved(tables: Tables) -> str:
    table = tables["starved"]
    if table.empty:
        raise Missing
    most = table[table["kept"] == table["kept"].max()]
    recalls = most.groupby("balance")["recall_tuberculosis"].mean()
    plain, balanced = recalls.get("none", np.nan), recalls.drop("none", errors="ignore")
    if np.isnan(plain) or balanced.empty:
        raise Missing
    lost = table[table["recall_tuberculosis"] < ZERO].groupby("balance")["kept"].max()
    found = ", ".join(f"{kept} ({balance})" for balance, kept in lost.items())
    end = f"it falls below 1 % with {found}" if found else "no number tried takes it below 1 %"
    return (
        f"with tuberculosis cut to {most['kept'].max()} images, {percent(most['share'].mean())} of"
        f" those in training, its recall is {percent(plain)} without balancing the classes and"
        f" {percent(balanced.min())} to {percent(balanced.max())} with it; {end}."
    )


# --- Figures ---------------------------------------------------------------------------------


def pick(tables: Tables, name: str, **where) -> dict:
    """Return the one row of a table; raises Missing if it is not there."""
    table = tables[name]
    for column, value in where.items():
        table = table[table[column] == value] if len(table) else table
    if table.empty:
        raise Missing
    return table.iloc[0].to_dict()


def view(tables: Tables, place: str, name: str, method: str = FINE) -> dict:
    """Return the figures of a method by what is visible."""
    return pick(tables, "views", place=place, method=method, view=name)


def told(row: Mapping) -> str:
    """Return the AUROC with its interval: ``0.873 (0.841 to 0.900)``."""
    value, low, high = (row[f"auroc{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def difference(row: Mapping) -> str:
    """Say whether the AUROC differs from that of the whole image by more than noise."""
    change, low, high = (row[f"auroc_change{end}"] for end in ("", "_low", "_high"))
    noise = "more than noise" if low > 0 or high < 0 else "not more than noise"
    limits = f"{format_points(low)} to {format_points(high)}"
    return f"{format_points(change)} points ({limits}), {noise}"
