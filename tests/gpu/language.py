"""Cases of the stages with a vision-language model: asked, fine-tuned, probed, annotating."""

# ruff: noqa: I001
from harness import (  # before PyTorch is used
    Patch,
    case_of,
    load_settings,
    record,
    resume,
    set_block,
    told,
    waits_of_batches,
    waits_of_training,
)

import pandas as pd
from case import draw
from support import run_stage

from chest.models.common.image_store import place_images
from chest.models.common.journal import Journal
from chest.models.vlm import controls
from chest.models.vlm.asking import AskedRows, VlmSettings, asked
from chest.models.vlm.zeroshot import load_asker
from chest.training import loop


def write(patch: Patch, block: str, model: str, precision: str, **changes) -> None:
    """Write a study for the stage of `block`, with fewer ways of asking than its controls have."""
    folder = patch.write(precision)
    where = {"checkpoint": str(patch.checkpoints / model), "image_size": 56}
    set_block(folder, block, **where, **changes)
    few = controls.controls
    patch.setattr(controls, "controls", lambda prompts: few(prompts)[:4])


# --- Asking ----------------------------------------------------------------------------------


@case_of
def zeroshot_qwen(patch: Patch) -> dict:
    write(patch, "zeroshot_qwen", "qwen", "auto")
    run_stage("zeroshot_qwen")
    return record(patch.folder, "zeroshot_qwen")


@case_of
def zeroshot_qwen_generate(patch: Patch) -> dict:
    write(patch, "zeroshot_qwen", "qwen", "fp16", method="generate", max_new_tokens=2)
    run_stage("zeroshot_qwen")
    return record(patch.folder, "zeroshot_qwen")


@case_of
def zeroshot_qwen3_resumed(patch: Patch) -> dict:
    write(patch, "zeroshot_vlm__qwen3", "qwen3", "fp32", batch_size=8)
    patch.not_resident()
    stage = ["zeroshot_vlm", "qwen3"]
    found = resume(patch, stage, Journal, "add", (2,))
    return record(patch.folder, "zeroshot_qwen3") | found


@case_of
def zeroshot_medgemma(patch: Patch) -> dict:
    write(patch, "zeroshot_vlm__medgemma", "medgemma", "bf16")
    patch.not_resident()
    run_stage("zeroshot_vlm", "medgemma")
    return record(patch.folder, "zeroshot_medgemma")


@case_of
def annotate_resumed(patch: Patch) -> dict:
    write(patch, "annotate", "qwen", "bf16", max_new_tokens=2, batch_size=16)
    patch.not_resident()
    found = resume(patch, ["annotate"], Journal, "add", (2,))
    return told(patch.folder / "data/annotations.json") | found


@case_of
def probe_vlm(patch: Patch) -> dict:
    write(patch, "zeroshot_qwen", "qwen", "fp16")
    run_stage("probe_vlm")
    return {"layers": len(pd.read_csv("data/layers/zeroshot_qwen.csv"))}


# --- Fine-tuning -----------------------------------------------------------------------------

SMALL = {"batch_size": 12, "warmup_steps": 1, "save_every": 2, "inference_batch": 64}


@case_of
def finetune_qwen_resumed(patch: Patch) -> dict:
    write(patch, "finetune_qwen", "qwen", "bf16", checkpointing=True, micro_batch=6, **SMALL)
    found = resume(patch, ["finetune_qwen"], loop, "train_step", (2,))
    return record(patch.folder, "finetune_qwen") | found


@case_of
def finetune_qwen_head(patch: Patch) -> dict:
    write(patch, "finetune_qwen", "qwen", "fp16", method="head", **SMALL)
    patch.not_resident()
    run_stage("finetune_qwen")
    return record(patch.folder, "finetune_qwen")


# --- Waits -----------------------------------------------------------------------------------


@case_of
def waits_finetune_qwen(patch: Patch) -> dict:
    write(patch, "finetune_qwen", "qwen", "bf16", **SMALL | {"batch_size": 18})
    return waits_of_training(patch, "finetune_qwen")


def waits_of_asking(patch: Patch, block: str, model: str) -> dict:
    write(patch, block, model, "bf16", batch_size=4)
    settings, params = load_settings(block.replace("__", "."), VlmSettings)
    asker = load_asker(params, settings)
    images = place_images(draw(56).images, asker.accelerator.device)
    conditions = [asked(asker.prompts)]

    def answer(rows):
        return asker.ask(AskedRows(images, rows, ["ct"] * len(rows)), conditions)

    return waits_of_batches(answer, settings.batch_size)


@case_of
def waits_zeroshot_qwen(patch: Patch) -> dict:
    return waits_of_asking(patch, "zeroshot_qwen", "qwen")
