"""Let a vision-language model annotate every image: findings, and a sentence or two.

It is shown the image and told its modality; no label can reach it.

Reads   data/manifest.csv, data/images/<side>.npy, the checkpoint
Writes  data/annotations.csv    the log-likelihood of each finding, and a description, by image
        data/annotations.json   checkpoint, device, precision, versions
        .resume/annotate/       answers so far, until the stage is done

    python stages/annotate.py        (or: dvc repro annotate)
    accelerate launch stages/annotate.py        on several GPUs
"""

import numpy as np

from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.annotations import write_annotations
from chest.data.dataset import read_dataset
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.journal import open_journal
from chest.models.settings import AnnotationPrompts
from chest.models.vlm.annotation import AnnotationSettings, annotate
from chest.models.vlm.asking import AskedRows
from chest.models.vlm.model import load_vlm


def main() -> None:
    params = load_params()
    settings = params.system("annotate", AnnotationSettings)
    prompts = params.section("prompts.annotations", AnnotationPrompts)
    data = read_dataset(side=settings.image_size)

    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    vlm = load_vlm(accelerator, source, settings.image_size)
    images = place_images(data.images, accelerator.device)
    about = AskedRows(images, np.arange(len(data.table)), data.table["modality"].to_numpy())
    parameters = {"prompts": prompts.model_dump(), "settings": settings.model_dump()}
    origin = fingerprint(accelerator, source, settings.image_size, parameters)
    journal = open_journal(accelerator, "annotate", origin)
    likelihoods, texts = zip(
        *annotate(accelerator, vlm, about, prompts, settings, journal), strict=True
    )

    if accelerator.is_main_process:
        columns = dict(zip(prompts.findings, np.array(likelihoods).T, strict=True))
        made = describe_run(accelerator, source, vlm.model, None)
        write_annotations(data.table["image_id"], columns, texts, made)
        journal.clear()
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
