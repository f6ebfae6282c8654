"""How a trained model's images were made, kept beside its weights: slices and view.

The side and the normalization of its images are in its preprocessor_config.json.
"""

from pathlib import Path

from chest.core.files import write_json
from chest.core.params import Params
from chest.models.common.pixels import Normalization
from chest.models.common.views import View

PREPROCESSING = "preprocessing.json"
KEYS = ("position", "normalize")  # of the block slices in params.yaml; the others change no pixel


def slices_of(params: Params) -> dict[str, str | float]:
    """Return what params.yaml says of the slices, as far as it changes them."""
    slices = params.section("slices", dict)
    return {key: slices[key] for key in KEYS}


def write_preprocessing(folder: Path, params: Params, view: View) -> None:
    """Write preprocessing.json into the folder of a model trained with `params` on a `view`."""
    content = {"slices": slices_of(params), "view": view.model_dump()}
    write_json(folder / PREPROCESSING, content)


def describe_preprocessing(
    params: Params, image_size: int, normalization: Normalization, view: View
) -> dict[str, str | int]:
    """Return the details of a predictions record that say how a model's images were made."""
    mean, std = (
        " ".join(f"{value:g}" for value in values)
        for values in (normalization.mean, normalization.std)
    )
    slices = ", ".join(map(str, slices_of(params).values()))
    made = {"slices": slices, "image_size": image_size, "image_mean": mean, "image_std": std}
    changed = view.model_dump(exclude_defaults=True)
    return made | {f"view_{key}": str(value) for key, value in changed.items()}
