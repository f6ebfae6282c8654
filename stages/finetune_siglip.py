"""Fine-tune SigLIP's vision tower with a 3-class head; answer validation, test and external.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, the checkpoint
Writes  models/finetune_siglip/                 weights of the best epoch, for from_pretrained
        data/predictions/finetune_siglip.csv    one row per image of validation, test and external
        data/predictions/finetune_siglip.json   checkpoint, device, precision, seed, versions
        data/training/finetune_siglip.csv       losses, learning rate, validation figures by epoch
        live/                                   the same while it trains (dvclive)
        .resume/finetune_siglip/                training states, to resume an interrupted run

    python stages/finetune_siglip.py                 (or: dvc repro finetune_siglip)
    accelerate launch stages/finetune_siglip.py      on several GPUs
"""

from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.training.finetuning import finetune


def main() -> None:
    finetune("finetune_siglip", "finetune_siglip", "SigLIP, fine-tuned", load_params())


if __name__ == "__main__":
    run_stage(main)
