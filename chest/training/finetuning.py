"""A fine-tuning stage from the packed images to the predictions, for any kind of classifier."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from dvclive import Live
from torch import nn

from chest.core.errors import ParameterError
from chest.core.files import replacing, write_table
from chest.core.params import Params
from chest.core.runtime import interrupt_note
from chest.data.dataset import Dataset, read_dataset
from chest.data.synthetic import SPLIT, TRAINED, add_synthetic, read_kept, read_synthetic
from chest.evaluation.predictions import CURVES, Record
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.classification import ImageRows
from chest.models.common.device import Precision, describe_run, float_type, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.pixels import load_normalization
from chest.models.common.preprocessing import describe_preprocessing, write_preprocessing
from chest.models.common.view_masks import read_view_masks
from chest.models.encoders import load_classifier
from chest.training.adversary import AdversarialNetwork, find_domains
from chest.training.batch_norm import estimate_statistics
from chest.training.calibration import fit_temperature
from chest.training.checkpointing import States
from chest.training.classification import (
    Classification,
    ClassifierSettings,
    Selection,
    TrainingSettings,
)
from chest.training.loop import Task, train
from chest.training.sampling import sampling_weights

MODELS = Path("models")
ANSWERED = ("val", "test", "external")


@dataclass(frozen=True)
class Setup:
    """What a fine-tuning stage starts from.

    ``system`` names the files that it writes, ``key`` the settings in error messages. ``accepted``:
    the images that may be trained on and answered, bool (N,).
    """

    system: str
    key: str
    params: Params
    settings: ClassifierSettings
    accelerator: Accelerator
    source: Source
    data: Dataset
    images: ImageStore
    accepted: np.ndarray

    @property
    def synthetic(self) -> int:
        """How many images are synthetic: the last ones of the data."""
        return len(self.data.rows(SPLIT))


def set_up(system: str, block: str, params: Params, kind: type[ClassifierSettings]) -> Setup:
    """Read the `block` of the profile as `kind` and what it names: data, checkpoint, view.

    `system` names the files that the stage writes.
    """
    settings = params.system(block, kind)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    accelerator = start(params.seed, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    key = f"{params.profile}.{block}"
    if settings.synthetic.per_class:
        data = add_images(data, key, settings)
    masks, accepted = read_view_masks(data.table, settings.image_size, settings.view, params.seed)
    images = place_images(data.images, accelerator.device, masks, settings.view)
    return Setup(system, key, params, settings, accelerator, source, data, images, accepted)


def add_images(data: Dataset, key: str, settings: ClassifierSettings) -> Dataset:
    """Return `data` with the first ``per_class`` synthetic images of each class in training.

    Raises ParameterError if there are fewer, if the view needs masks, which they do not have, or if
    an adversary hides the site: theirs would be that of a class.
    """
    count, key = settings.synthetic.per_class, f"{key}.synthetic.per_class"
    if settings.view.needs_masks:
        raise ParameterError(f"{key}: {count}, but synthetic images have no masks for the view")
    if getattr(settings, "adversary", "none") == "site":
        raise ParameterError(f"{key}: {count}, but synthetic images have no site for the adversary")
    table, images = read_synthetic(settings.image_size)
    kept = read_kept(table)
    of_class = kept.groupby(table["label"])
    fewest = of_class.sum().min() if len(table) else 0
    if count > fewest:
        raise ParameterError(
            f"{key}: {count}, but `synthesize` made {fewest} that are no copies;"
            " raise its per_class, or lower this"
        )
    chosen = kept & (of_class.cumsum() <= count)
    return add_synthetic(data, table[chosen], images[chosen])


def train_and_answer(
    setup: Setup, name: str, model: nn.Module, objective: Selection, more: dict | None = None
) -> None:
    """Train and calibrate `model`, and answer validation, test and external images.

    `name` is what tables and charts show; `more` holds what the result depends on besides the
    settings. Writes the model, the training curve and the answers.
    """
    params, settings, data = setup.params, setup.settings, setup.data
    task = make_task(setup, model, objective)
    # The first does not change the result, the second only its rounding.
    parameters = settings.model_dump(exclude={"save_every", "micro_batch"})
    parameters |= {"seed": params.seed, **(more or {})}
    if setup.synthetic:
        own = data.images[-setup.synthetic :]
        parameters["synthetic_images"] = hashlib.sha256(own.tobytes()).hexdigest()
    origin = fingerprint(setup.accelerator, setup.source, settings.image_size, parameters)
    states = States(setup.system, origin)

    curve, best_epoch = train(task, params.seed, states, live_log(setup.accelerator))
    with interrupt_note("The training is saved: the next run resumes with the calibration."):
        model.eval()
        temperature = calibrate(objective)
        rows = data.rows(*ANSWERED)
        write_answers = objective.answer(setup.system, rows, setup.accepted[rows])
        details = {
            "trained_on": len(task.rows),
            **({"synthetic": setup.synthetic} if setup.synthetic else {}),
            "best_epoch": best_epoch,
            "select_by": settings.select_by,
            "temperature": round(temperature, 4),
            **objective.details(model, rows),
            **describe_preprocessing(
                params, settings.image_size, objective.normalization, settings.view
            ),
        }
        if setup.accelerator.is_main_process:
            run = describe_run(setup.accelerator, setup.source, objective.network, params.seed)
            with replacing(MODELS / setup.system) as folder:
                objective.save(folder)
                write_preprocessing(folder, params, settings.view)
            write_table(CURVES / f"{setup.system}.csv", curve, float_format="%.6g")
            write_answers(Record(name=name, kind="trained", n=len(rows), **run, details=details))
            states.clear()
    setup.accelerator.end_training()


def finetune(system: str, block: str, name: str, params: Params) -> None:
    """Train an image classifier; see `set_up` and `train_and_answer`."""
    setup = set_up(system, block, params, TrainingSettings)
    model, objective = load_classification(setup)
    train_and_answer(setup, name, model, objective)


def load_classification(setup: Setup) -> tuple[nn.Module, Classification]:
    """Load the classifier that the settings name; returns what is trained, and its objective."""
    settings, accelerator = setup.settings, setup.accelerator
    normalization = load_normalization(setup.source)
    classifier = load_classifier(
        setup.source,
        settings.image_size,
        float_type(accelerator),
        settings.pooling,
        settings.head,
        random=settings.weights == "random",
    ).to(accelerator.device)
    if settings.batch_norm == "estimated":
        estimate_statistics(
            classifier, ImageRows(setup.images, training_rows(setup, "train"), normalization)
        )
    model, domains = classifier, None
    if settings.adversary != "none":
        domains = find_domains(setup.data.table, settings.adversary)
        scale = settings.adversary_lr / settings.lr
        model = AdversarialNetwork(classifier, len(domains.names), scale)
    shared = (settings, setup.data, accelerator, setup.images, normalization)
    return model, Classification(*shared, classifier, domains)


def training_rows(setup: Setup, *splits: str) -> np.ndarray:
    """Return the accepted images of `splits`, by default all that are learned from, int64 (n,)."""
    rows = setup.data.rows(*(splits or TRAINED))
    return rows[setup.accepted[rows]]


def make_task(setup: Setup, model: nn.Module, objective: Selection) -> Task:
    """Return the training of `model` on the accepted images."""
    rows = training_rows(setup)
    return Task(
        key=setup.key,
        settings=setup.settings,
        accelerator=setup.accelerator,
        model=model,
        images=setup.images,
        rows=rows,
        weights=sampling_weights(setup.data.table.iloc[rows], setup.settings.balance),
        objective=objective,
    )


def calibrate(objective: Selection) -> float:
    """Fit the temperature on validation, build it into the model, and return it."""
    if objective.settings.calibrate == "none":
        return 1.0
    rows = objective.data.rows("val")
    temperature = fit_temperature(objective.predict(rows), objective.data.targets()[rows])
    objective.divide(temperature)
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
