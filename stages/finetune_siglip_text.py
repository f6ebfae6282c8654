"""Fine-tune SigLIP by its own loss on images and texts; classify by prompts.

TEXTS says what the texts are: `plain`, the prompts of the image's class, or `annotated`, with what
`annotate` wrote of the image behind them.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, data/masks/,
        data/annotations.csv, the checkpoint
Writes  models/finetune_siglip_text_<texts>/            both towers and the tokenizer: a checkpoint
                                                        that zeroshot_siglip can load
        data/predictions/finetune_siglip_text_<texts>.csv and .json
        data/training/finetune_siglip_text_<texts>.csv  losses and validation figures by epoch
        live/                                           the same while it trains (dvclive)
        .resume/finetune_siglip_text_<texts>/           to resume an interrupted run

    python stages/finetune_siglip_text.py plain    (or: dvc repro finetune_siglip_text@plain)
    accelerate launch stages/finetune_siglip_text.py plain    on several GPUs
"""

from chest.core.errors import ParameterError
from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.training.image_text import finetune_image_text

TEXTS = {"plain": "SigLIP, image-text loss", "annotated": "SigLIP, image-text loss, annotated"}


def main(texts: str) -> None:
    if texts not in TEXTS:
        raise ParameterError(f"{texts}: one of {', '.join(TEXTS)} expected")
    system = f"finetune_siglip_text_{texts}"
    finetune_image_text(system, TEXTS[texts], load_params(), notes=texts == "annotated")


if __name__ == "__main__":
    run_stage(main, argument="TEXTS")
