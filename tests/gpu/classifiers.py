"""Cases of the stages whose model is no language model: training, features, lungs, prompts."""

# ruff: noqa: I001
from harness import (  # before PyTorch is used
    Patch,
    case_of,
    record,
    resume,
    set_block,
    set_params,
    task_of,
    told,
    waits_of_batches,
    waits_of_training,
)

import numpy as np
import pandas as pd
from case import SYSTEM, settings
from PIL import Image
from support import load_script, run_stage

from chest.core.params import load_params
from chest.data.annotations import write_annotations
from chest.data.masks import MASK_COLUMNS, MASK_INDEX, MASKS, pack
from chest.models.settings import AnnotationPrompts
from chest.training import loop


# --- Training --------------------------------------------------------------------------------


@case_of
def bf16(patch: Patch) -> dict:
    """Also predict and explain a new image with what was trained."""
    folder = patch.write("auto")
    run_stage(SYSTEM)
    Image.fromarray(np.load("data/images/32.npy")[0]).save("new.png")
    (folder / "dvc.yaml").touch()
    load_script("tools/predict.py").main(["new.png", "--explain", "explained"])
    return record(folder, SYSTEM) | {"explained": len([*(folder / "explained").iterdir()])}


@case_of
def fp32_not_resident(patch: Patch) -> dict:
    folder = patch.write("fp32", augment=None)
    patch.not_resident()
    run_stage(SYSTEM)
    return record(folder, SYSTEM)


@case_of
def adversary(patch: Patch) -> dict:
    folder = patch.write("auto", adversary="modality", micro_batch=4)
    run_stage(SYSTEM)
    return record(folder, SYSTEM)


@case_of
def fp16_resumed(patch: Patch) -> dict:
    """In fp16 the scaler is part of the state."""
    folder = patch.write("fp16")
    found = resume(patch, [SYSTEM], loop, "train_step", (6, 12))
    return record(folder, SYSTEM) | found


def cnn(patch: Patch, family: str) -> dict:
    folder = patch.write("auto")
    chosen = settings(patch.checkpoints / "siglip", batch_norm="estimated", epochs=1).model_dump()
    chosen |= {"checkpoint": str(patch.checkpoints / family)}
    set_params(folder, **{f"finetune_cnn__{family}": chosen})
    run_stage("finetune_cnn", family)
    return record(folder, f"finetune_{family}")


@case_of
def resnet50(patch: Patch) -> dict:
    return cnn(patch, "resnet50")


@case_of
def efficientnet_b0(patch: Patch) -> dict:
    return cnn(patch, "efficientnet_b0")


def write_texts(patch: Patch, precision: str) -> None:
    """Write a study with descriptions of its images, for finetune_siglip_text."""
    folder = patch.write(precision)
    where = {"checkpoint": str(patch.checkpoints / "siglip"), "image_size": 32}
    set_block(folder, "finetune_siglip_text", **where, batch_size=12, warmup_steps=1, save_every=2)
    ids = pd.read_csv("data/manifest.csv")["image_id"]
    findings = load_params().section("prompts.annotations", AnnotationPrompts).findings
    values = {name: np.zeros(len(ids)) for name in findings}
    write_annotations(ids, values, [f"note {i}" for i in ids], {"checkpoint": "somewhere"})


@case_of
def siglip_text_resumed(patch: Patch) -> dict:
    write_texts(patch, "fp16")
    stage = ["finetune_siglip_text", "annotated"]
    found = resume(patch, stage, loop, "train_step", (2,))
    return record(patch.folder, "finetune_siglip_text_annotated") | found


# --- Lungs -----------------------------------------------------------------------------------


def write_lungs(patch: Patch, precision: str) -> None:
    """Write a study whose X-rays have published masks: discs, brighter than what surrounds them."""
    folder = patch.write(precision)
    set_block(folder, "segment_lungs", image_size=32, batch_size=6, warmup_steps=1, epochs=1)
    manifest = pd.read_csv("data/manifest.csv", dtype=str)
    films = manifest["modality"] == "xray"
    manifest.assign(mask=np.where(films, "m.png", "")).to_csv("data/manifest.csv", index=False)
    for side in (32, 56):
        rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        disc = rows**2 + columns**2 < 0.5
        np.save(f"data/images/lungs_{side}.npy", pack(np.stack([disc] * films.sum())))


def write_masks() -> None:
    """Write lung masks of all images, as segment_lungs does."""
    masks = np.zeros((64, 32, 32), bool)
    masks[:, 8:24, 6:28] = True
    MASKS.mkdir()
    np.save(MASKS / "32.npy", pack(masks))
    index = pd.DataFrame("0.1", index=range(64), columns=MASK_COLUMNS).assign(accepted="True")
    index.to_csv(MASK_INDEX, index=False)


@case_of
def segment_lungs_resumed(patch: Patch) -> dict:
    write_lungs(patch, "bf16")
    return resume(patch, ["segment_lungs"], loop, "train_step", (2,))


@case_of
def segment_lungs_not_resident(patch: Patch) -> dict:
    write_lungs(patch, "fp32")
    patch.not_resident()
    run_stage("segment_lungs")
    return {"masks": len(np.load("data/masks/32.npy"))}


@case_of
def synthesize_resumed(patch: Patch) -> dict:
    """The training of the diffusion model is ended; then it samples."""
    folder = patch.write("bf16")
    set_block(folder, "synthesize", image_size=32, per_class=2, epoch_steps=3, warmup_steps=1)
    set_block(folder, "synthesize", sampling_steps=2, sampling_batch=2)
    return resume(patch, ["synthesize"], loop, "train_step", (2,))


# --- Inference -------------------------------------------------------------------------------


@case_of
def features(patch: Patch) -> dict:
    folder = patch.write("auto")
    where = {"checkpoint": str(patch.checkpoints / "siglip"), "image_size": 32}
    set_block(folder, "extract_features__siglip", **where)
    run_stage("extract_features", "siglip")
    return told(folder / "data/features/siglip.json")


@case_of
def features_of_lungs_not_resident(patch: Patch) -> dict:
    """Images and masks are in their memory maps, and the view is applied on the device."""
    folder = patch.write("fp32")
    patch.not_resident()
    write_masks()
    view = {"visible": "lungs", "crop": True, "grey": "stretch", "dilate": 0.1, "masks": "box"}
    where = {"checkpoint": str(patch.checkpoints / "resnet50"), "image_size": 32}
    set_block(folder, "extract_features__resnet50", **where, view=view)
    run_stage("extract_features", "resnet50")
    return told(folder / "data/features/resnet50.json")


@case_of
def regions(patch: Patch) -> dict:
    """A linear model on frozen features of each region."""
    folder = patch.write("auto")
    write_masks()
    where = {"checkpoint": str(patch.checkpoints / "siglip"), "image_size": 32}
    set_block(folder, "probe_regions", **where)
    run_stage("probe_regions")
    return told(folder / "data/probes/lungs.json")


@case_of
def zeroshot_siglip(patch: Patch) -> dict:
    folder = patch.write("fp16")
    run_stage("zeroshot_siglip")
    return record(folder, "zeroshot_siglip")


# --- Waits -----------------------------------------------------------------------------------


@case_of
def waits_bf16(patch: Patch) -> dict:
    patch.write("bf16")
    return waits_of_training(patch, SYSTEM)


@case_of
def waits_fp16_adversary(patch: Patch) -> dict:
    patch.write("fp16", adversary="modality", micro_batch=3)
    return waits_of_training(patch, SYSTEM)


@case_of
def waits_not_resident(patch: Patch) -> dict:
    patch.write("bf16")
    patch.not_resident()
    return waits_of_training(patch, SYSTEM)


@case_of
def waits_siglip_text(patch: Patch) -> dict:
    write_texts(patch, "bf16")
    return waits_of_training(patch, "finetune_siglip_text", "annotated")


@case_of
def waits_segment_lungs(patch: Patch) -> dict:
    write_lungs(patch, "bf16")
    return waits_of_training(patch, "segment_lungs")


@case_of
def waits_inference(patch: Patch) -> dict:
    patch.write("bf16", batch_size=2)
    objective = task_of(patch, SYSTEM).objective
    objective.classifier.eval()
    return waits_of_batches(objective.predict, objective.batch_size)
