"""How figures and differences are written in charts, model card and reports."""

from collections.abc import Sequence

from chest.core.labels import LABEL_NAMES, MODALITY_NAMES, UNPARSED
from chest.evaluation.comparison import Comparison, Difference
from chest.evaluation.intervals import Interval

ANSWER_NAMES = {**LABEL_NAMES, UNPARSED: "Unparsed"}
# Images that a figure is computed on, by the key of `subgroups.Group`.
WITHIN = {"all": "all images"} | {key: f"within {name}" for key, name in MODALITY_NAMES.items()}
LAYER_NAMES = {"vision": "Vision tower", "merger": "Merger"}  # and language_<number>
CONDITION_NAMES = {"no_image": "without the image", "other_image": "another patient's image"}
UAR_WITHIN = {key: f"UAR {WITHIN[key]}" for key in MODALITY_NAMES}


def percent(share: float, places: int = 1) -> str:
    """Return ``12.3 %``: rounded to four places first, as in metrics files."""
    return f"{100 * round(share, 4):.{places}f} %"


def format_interval(value: float, low: float, high: float) -> str:
    """Return ``12.3 % (10.0 to 15.2)``."""
    low, high = (percent(limit).removesuffix(" %") for limit in (low, high))
    return f"{percent(value)} ({low} to {high})"


def format_points(share: float) -> str:
    """Return a difference in percentage points, with its sign: ``+1.5``, ``-0.2``, ``0.0``."""
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def format_limits(interval: Interval) -> str:
    """Return the limits of the interval of a difference: ``-0.2 to +1.5``."""
    return f"{format_points(interval.low)} to {format_points(interval.high)}"


def name_layer(layer: str) -> str:
    """Return the name of a layer of a vision-language model, a key of metrics/layers.json."""
    number = layer.removeprefix("language_")
    return LAYER_NAMES.get(layer, f"Language layer {number}")


def tell_need(within: Sequence[str], blind: Sequence[str]) -> str:
    """Say in which modalities, of `within`, a system needs the image; it does not in `blind`."""
    needed = " and ".join(WITHIN[key] for key in within if key not in blind)
    said = []
    if needed:
        said.append(f"{capitalize(needed)} it is better than without its image, and than with ")
        said[-1] += "another patient's."
    if blind:
        blank = " and ".join(WITHIN[key] for key in blind)
        said.append(f"**{capitalize(blank)} it is not shown to be better than without its image")
        said[-1] += " or with another patient's: there its result is no result.**"
    return " ".join(said)


def capitalize(text: str) -> str:
    """Return `text` with a capital first letter and the others as they are."""
    return text[:1].upper() + text[1:]


def compared_cells(difference: Difference) -> list[str]:
    """Return both figures, the difference, its interval, and the interval's half-width."""
    return [
        percent(difference.first),
        percent(difference.second),
        format_points(difference.change.value),
        format_limits(difference.change),
        f"{100 * difference.half_width:.1f}",
    ]


def verdicts(
    result: Comparison, within: dict[str, Difference], names: Sequence[str] = ("first", "second")
) -> list[str]:
    """Say whether the two differ by more than noise: a sentence per figure, and a note.

    `within` is {modality: difference of the UAR within it}.
    """
    if not result.unlike:
        return [f"No difference: the same answers to all {result.images:,} images."]
    figures = {UAR_WITHIN[key]: difference for key, difference in within.items()}
    figures |= {"UAR": result.uar, "WAR": result.war}
    said = [f"{verdict(name, difference, names)}." for name, difference in figures.items()]
    return said + ([f"{capitalize(result.note)}."] if result.note else [])


def verdict(figure: str, difference: Difference, names: Sequence[str] = ("first", "second")) -> str:
    """Say, without a full stop, whether one figure differs by more than noise."""
    change = difference.change.value
    limits = f"the 95 % interval ({format_limits(difference.change)})"
    if difference.beyond_noise:
        better, worse = names[::-1] if change > 0 else names
        return (
            f"{figure}: more than noise: {better} is better than {worse} by"
            f" {100 * abs(change):.1f} points, and {limits} excludes 0"
        )
    return (
        f"{figure}: not more than noise: {format_points(change)} points from {names[0]} to"
        f" {names[1]}, and {limits} includes 0"
    )
