"""Fine-tune Qwen2.5-VL by low-rank adapters; answer validation, test and external images.

It learns the likelihood of the answers by which the zero-shot model is scored.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, data/masks/, the checkpoint
Writes  models/finetune_qwen/                 adapters of the best epoch, for peft
        data/predictions/finetune_qwen.csv    one row per image of validation, test and external
        data/predictions/finetune_qwen.json   checkpoint, parameters that trained, versions
        data/controls/finetune_qwen.csv       without the image, in other words, ...
        data/training/finetune_qwen.csv       losses, learning rate, validation figures by epoch
        live/                                 the same while it trains (dvclive)
        .resume/finetune_qwen/                training states, to resume an interrupted run

    python stages/finetune_qwen.py                 (or: dvc repro finetune_qwen)
    accelerate launch stages/finetune_qwen.py      on several GPUs
"""

from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.training.vlm import finetune_vlm

SYSTEM = "finetune_qwen"


def main() -> None:
    finetune_vlm(SYSTEM, SYSTEM, "Qwen2.5-VL, fine-tuned (LoRA)", load_params())


if __name__ == "__main__":
    run_stage(main)
