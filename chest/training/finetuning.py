"""A fine-tuning stage from the packed images to the predictions, for any family of models."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from dvclive import Live
from scipy.special import softmax
from transformers import PreTrainedModel

from chest.core.files import replacing, write_table
from chest.core.params import Params
from chest.core.runtime import interrupt_note
from chest.data.dataset import read_dataset
from chest.evaluation import predictions
from chest.evaluation.predictions import Record, tabulate
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.classification import head_of, save_classifier
from chest.models.common.device import Precision, describe_run, float_type, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.pixels import load_normalization
from chest.models.common.preprocessing import describe_preprocessing, write_preprocessing
from chest.training.calibration import divide_logits, fit_temperature
from chest.training.checkpointing import States
from chest.training.loop import Task, predict, train
from chest.training.settings import TrainingSettings

MODELS = Path("models")
# Loads a checkpoint as a classifier with a new head (LABELS), for images of a side in px.
LoadClassifier = Callable[[Source, int, torch.dtype], PreTrainedModel]


def finetune(system: str, name: str, params: Params, load: LoadClassifier) -> None:
    """Train and calibrate a classifier, and predict validation, test and external images.

    The settings are the block `system` of params.yaml; `name` is what tables and charts show.
    Writes the model, the training curve and the predictions.
    """
    settings = params.system(system, TrainingSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    accelerator = start(params.seed, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    model = load(source, settings.image_size, float_type(accelerator)).to(accelerator.device)
    images = place_images(data.images, accelerator.device)
    key = f"{params.profile}.{system}"
    task = Task(key, settings, accelerator, model, data, images, load_normalization(source))
    parameters = {"seed": params.seed, **settings.model_dump(exclude={"save_every"})}
    states = States(system, fingerprint(accelerator, source, settings.image_size, parameters))

    curve, best_epoch = train(task, params.seed, states, live_log(accelerator))
    with interrupt_note("The training is saved: the next run resumes with the calibration."):
        temperature = calibrate(task)
        rows = data.rows("val", "test", "external")
        probabilities = softmax(predict(task, rows), axis=1)
        if accelerator.is_main_process:
            record = Record(
                name=name,
                kind="trained",
                n=len(rows),
                **describe_run(accelerator, source, model, params.seed),
                details={
                    "trained_on": len(data.rows("train")),
                    "best_epoch": best_epoch,
                    "select_by": settings.select_by,
                    "temperature": round(temperature, 4),
                    **describe_preprocessing(params, settings.image_size, task.normalization),
                },
            )
            with replacing(MODELS / system) as folder:
                save_classifier(model, task.normalization, settings.image_size, folder)
                write_preprocessing(folder, params)
            write_table(predictions.CURVES / f"{system}.csv", curve, float_format="%.6g")
            predictions.write(system, tabulate(data.table.iloc[rows], probabilities), record)
            states.clear()
    accelerator.end_training()


def calibrate(task: Task) -> float:
    """Fit the temperature on validation, build it into the model, and return it."""
    if task.settings.calibrate == "none":
        return 1.0
    rows = task.data.rows("val")
    temperature = fit_temperature(predict(task, rows), task.data.targets()[rows])
    divide_logits(head_of(task.model), temperature)
    return temperature


def live_log(accelerator: Accelerator) -> Callable[[dict], None]:
    """Return a function that logs a row of the curve to live/; only the main process writes."""
    if not accelerator.is_main_process:
        return lambda row: None
    # By default dvclive would rewrite dvc.yaml and save an experiment.
    live = Live("live", dvcyaml=None, save_dvc_exp=False, report=None)

    def log(row: dict) -> None:
        for name, value in row.items():
            live.log_metric(name, value)
        live.next_step()

    return log
