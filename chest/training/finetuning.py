"""A fine-tuning stage from the packed images to the predictions, for any family of encoders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from dvclive import Live
from scipy.special import softmax

from chest.core.files import replacing, write_table
from chest.core.params import Params
from chest.core.runtime import interrupt_note
from chest.data.dataset import Dataset, read_dataset
from chest.evaluation import predictions
from chest.evaluation.predictions import Record, tabulate
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.classification import ImageRows, head_of, save_classifier
from chest.models.common.device import Precision, describe_run, float_type, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.pixels import load_normalization
from chest.models.common.preprocessing import describe_preprocessing, write_preprocessing
from chest.models.common.view_masks import read_view_masks
from chest.models.encoders import load_classifier
from chest.training.adversary import (
    AdversarialNetwork,
    find_domains,
    probe_sites,
    score_discriminator,
)
from chest.training.batch_norm import estimate_statistics
from chest.training.calibration import divide_logits, fit_temperature
from chest.training.checkpointing import States
from chest.training.classification import Classification, Selection, TrainingSettings
from chest.training.loop import Task, train
from chest.training.sampling import sampling_weights

MODELS = Path("models")
ANSWERED = ("val", "test", "external")


def finetune(system: str, block: str, name: str, params: Params) -> None:
    """Train and calibrate a classifier, and predict validation, test and external images.

    The settings are the `block` of the profile in params.yaml; `system` names the files, `name` is
    what tables and charts show. Writes the model, the training curve and the predictions.
    """
    settings = params.system(block, TrainingSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    accelerator = start(params.seed, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    masks, accepted = read_view_masks(data.table, settings.image_size, settings.view, params.seed)
    task = make_task(
        f"{params.profile}.{block}", settings, accelerator, source, data, masks, accepted
    )
    objective: Classification = task.objective
    parameters = {"seed": params.seed, **settings.model_dump(exclude={"save_every"})}
    states = States(system, fingerprint(accelerator, source, settings.image_size, parameters))

    curve, best_epoch = train(task, params.seed, states, live_log(accelerator))
    with interrupt_note("The training is saved: the next run resumes with the calibration."):
        temperature = calibrate(objective)
        rows = data.rows(*ANSWERED)
        shares = softmax(objective.predict(rows), axis=1)
        answers = [x if seen else None for x, seen in zip(shares, accepted[rows], strict=True)]
        details = {
            "trained_on": len(task.rows),
            "best_epoch": best_epoch,
            "select_by": settings.select_by,
            "temperature": round(temperature, 4),
            **describe_domains(task, rows),
            **describe_preprocessing(
                params, settings.image_size, objective.normalization, settings.view
            ),
        }
        if accelerator.is_main_process:
            run = describe_run(accelerator, source, objective.classifier, params.seed)
            record = Record(name=name, kind="trained", n=len(rows), **run, details=details)
            with replacing(MODELS / system) as folder:
                save_classifier(
                    objective.classifier, objective.normalization, settings.image_size, folder
                )
                write_preprocessing(folder, params, settings.view)
            write_table(predictions.CURVES / f"{system}.csv", curve, float_format="%.6g")
            predictions.write(system, tabulate(data.table.iloc[rows], answers), record)
            states.clear()
    accelerator.end_training()


def make_task(
    key: str,
    settings: TrainingSettings,
    accelerator: Accelerator,
    source: Source,
    data: Dataset,
    masks: np.ndarray | None,
    accepted: np.ndarray,
) -> Task:
    """Load the classifier of `source` and return its training on the `accepted` images, bool (N,).

    `masks` are the packed lung masks that the view needs, if any.
    """
    images = place_images(data.images, accelerator.device, masks, settings.view)
    normalization = load_normalization(source)
    classifier = load_classifier(
        source,
        settings.image_size,
        float_type(accelerator),
        settings.pooling,
        settings.head,
        random=settings.weights == "random",
    ).to(accelerator.device)
    rows = data.rows("train")
    rows = rows[accepted[rows]]
    if settings.batch_norm == "estimated":
        estimate_statistics(classifier, ImageRows(images, rows, normalization))
    model, domains = classifier, None
    if settings.adversary != "none":
        domains = find_domains(data.table, settings.adversary)
        model = AdversarialNetwork(
            classifier, len(domains.names), settings.adversary_lr / settings.lr
        )
    return Task(
        key=key,
        settings=settings,
        accelerator=accelerator,
        model=model,
        images=images,
        rows=rows,
        weights=sampling_weights(data.table.iloc[rows], settings.balance),
        objective=Classification(
            settings, data, accelerator, classifier, images, normalization, domains
        ),
    )


def calibrate(objective: Selection) -> float:
    """Fit the temperature on validation, build it into the model, and return it."""
    if objective.settings.calibrate == "none":
        return 1.0
    rows = objective.data.rows("val")
    temperature = fit_temperature(objective.predict(rows), objective.data.targets()[rows])
    divide_logits(head_of(objective.classifier), temperature)
    return temperature


def describe_domains(task: Task, rows: np.ndarray) -> dict[str, float]:
    """Return how well the site is found in the features of `rows`, and by the discriminator."""
    objective: Classification = task.objective
    features, table = objective.features(rows), objective.data.table.iloc[rows]
    found = probe_sites(features, table)
    if objective.domains:
        domains = objective.domains.of(rows)
        found |= score_discriminator(task.model, features, domains, table)
    return found


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
