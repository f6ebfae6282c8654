"""Fine-tune SigLIP's vision tower with a 3-class head, and let it answer validation and test.

Reads   data/manifest.csv, data/images.npy, data/split.csv, the checkpoint
Writes  models/finetune_siglip/                 weights of the best epoch, as from_pretrained reads
        data/predictions/finetune_siglip.csv    one row an image of validation and test
        data/predictions/finetune_siglip.json   checkpoint, device, precision, seed, versions
        data/training/finetune_siglip.csv       the curve: losses, learning rate, UAR, WAR by epoch
        live/                                   the same curve while it grows (dvclive)
        .resume/finetune_siglip/                its state every so many steps and at the end: an
                                                interrupted run goes on from there

    python stages/finetune_siglip.py        (or: dvc repro finetune_siglip)
    accelerate launch stages/finetune_siglip.py        on several GPUs
"""

import chest.early  # noqa: F401

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dvclive import Live
from scipy.special import softmax

from chest import predictions
from chest.calibration import fit_temperature
from chest.compute import find_checkpoint, load_normalization, record, start
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.files import replacing, together, write_table
from chest.labels import SPLITS
from chest.params import load_params
from chest.resident import place_images
from chest.resume import States, origin_of
from chest.running import Interrupted
from chest.siglip import divide_logits, load_classifier, save_classifier
from chest.training import Task, predict, train

SYSTEM = "finetune_siglip"


def main() -> None:
    params = load_params()
    settings = params.chosen.finetune_siglip
    data = read_dataset(*SPLITS, side=params.image_size)
    accelerator = start(params.seed)
    source = find_checkpoint(settings.checkpoint, settings.revision)
    model = load_classifier(source, params.image_size)
    images = place_images(data.images, accelerator.device)
    task = Task(accelerator, model, data, images, load_normalization(source), settings)
    origin = origin_of(accelerator, source, {
        "seed": params.seed, "image_size": params.image_size,
        **settings.model_dump(exclude={"save_every"}),
    })  # fmt: skip
    states = States(SYSTEM, origin)

    # 1. Train; the weights of the best epoch remain.
    with live_curve(accelerator.is_main_process) as log:
        curve, best_epoch = train(task, params.seed, log, states)

    with telling("the training is kept: the next run goes on with its calibration"):
        # 2. Calibrate on the validation split; answer validation and test.
        temperature = calibrate(task)
        rows = data.rows("val", "test")
        answers = predictions.tabulate(data.table.iloc[rows], softmax(predict(task, rows), axis=1))

        # 3. Write everything, or nothing.
        if accelerator.is_main_process:
            made_by = record(accelerator, source, model, params.seed, len(rows))
            with together():
                with replacing(predictions.TRAINED_MODEL) as folder:
                    save_classifier(model, task.normal, folder)
                write_table(predictions.curve_path_of(SYSTEM), curve, float_format="%.6g")
                predictions.write(
                    SYSTEM,
                    answers,
                    {
                        **made_by,
                        "trained_on": len(data.rows("train")),
                        "best_epoch": best_epoch,
                        "temperature": round(temperature, 4),
                    },
                )
    if accelerator.is_main_process:
        states.clear()
    accelerator.end_training()


def calibrate(task: Task) -> float:
    """Divide the model's logits by the temperature that fits the validation split best.

    Returns it; 1.0 where `calibrate` is none, and the logits stay as they are.
    """
    if task.settings.calibrate == "none":
        return 1.0
    rows = task.data.rows("val")
    temperature = fit_temperature(predict(task, rows), task.data.targets()[rows])
    divide_logits(task.model, temperature)
    return temperature


@contextmanager
def telling(note: str) -> Iterator[None]:
    """What a signal to end tells meanwhile."""
    try:
        yield
    except Interrupted as end:
        raise Interrupted(end.signal, note) from None


@contextmanager
def live_curve(shown: bool) -> Iterator[Callable[[dict], None]]:
    """A function that adds a row to the curves in live/, which grow while the training runs."""
    if not shown:
        yield lambda row: None
        return
    try:
        # By itself dvclive would rewrite dvc.yaml and save an experiment.
        live = Live("live", dvcyaml=None, save_dvc_exp=False, report=None)
    except sqlite3.Error as error:  # it opens DVC's data base, for which there may be no room
        raise OSError(f"live: {error}") from None
    with live:

        def log(row: dict) -> None:
            for name, value in row.items():
                live.log_metric(name, value)
            live.next_step()

        yield log


if __name__ == "__main__":
    run_stage(main)
