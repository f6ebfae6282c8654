"""Fine-tune a CNN with a new head; answer validation, test and external images.

NAME is one of `finetune_cnn` in params.yaml: resnet50 or efficientnet_b0.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, data/masks/, the checkpoint
Writes  models/finetune_<name>/                 weights of the best epoch, for from_pretrained
        data/predictions/finetune_<name>.csv    one row per image of validation, test and external
        data/predictions/finetune_<name>.json   checkpoint, device, precision, seed, versions
        data/training/finetune_<name>.csv       losses, learning rate, validation figures by epoch
        live/                                   the same while it trains (dvclive)
        .resume/finetune_<name>/                training states, to resume an interrupted run

    python stages/finetune_cnn.py resnet50                 (or: dvc repro finetune_cnn@resnet50)
    accelerate launch stages/finetune_cnn.py resnet50      on several GPUs
"""

from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.training.finetuning import finetune

NAMES = {"resnet50": "ResNet-50", "efficientnet_b0": "EfficientNet-B0"}


def main(name: str) -> None:
    shown = f"{NAMES.get(name, name)}, fine-tuned"
    finetune(f"finetune_{name}", f"finetune_cnn.{name}", shown, load_params())


if __name__ == "__main__":
    run_stage(main, argument="NAME")
