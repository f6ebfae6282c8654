"""What a training step and a batch of likelihoods spend their time on, by PyTorch's profiler.

Full-size models on a GPU, small ones else; random weights and images.

    python benchmarks/profiling.py
"""

from collections.abc import Callable

import numpy as np
import torch
from architectures import SIDE, make_reader
from torch.profiler import ProfilerActivity, profile
from training import SIZES, make_data, make_task
from zeroshot import text, wordings

from chest import training
from chest.commands import parser
from chest.compute import start
from chest.errors import run
from chest.qwen import answer_likelihoods, pose
from chest.tables import markdown

SHOWN = 6  # operations of each part
BATCH = 16  # images that are asked at once


def main() -> None:
    parser(__doc__).parse_args()
    size = "full" if torch.cuda.is_available() else "small"
    parts = {"training step": training_step(size), "likelihood": likelihood(size)}
    rows = [[name, *row] for name, part in parts.items() for row in shares(part)]
    print(markdown(["part", "operation", "share of its time"], rows))


def training_step(size: str) -> Callable[[], None]:
    """Two steps of an epoch, data handling included."""
    data = make_data(SIZES[size])
    task = make_task(size, data)
    one = training.begin(task, training.make_plan(task.settings, SIZES[size].train, 1), 0)
    parallel, optimizer = task.accelerator.prepare(task.model, one.optimizer)
    drawn = np.arange(2 * SIZES[size].batch).reshape(2, -1)

    def steps() -> None:
        one.step = 0
        training.train_epoch(task, one, parallel, optimizer, drawn, lambda: "")

    return steps


def likelihood(size: str) -> Callable[[], object]:
    accelerator = start(0)
    reader = make_reader(size, accelerator)
    question = pose(reader, text(), wordings())
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE), dtype=torch.uint8).to(accelerator.device)
    return lambda: answer_likelihoods(reader, images, question)


def shares(part: Callable[[], object]) -> list[list[str]]:
    """The operations that take most of the device's time, and their shares of it."""
    part()  # the first time chooses kernels
    cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=kinds) as seen:
        part()
    events = seen.key_averages()
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    whole = sum(times.values())
    most = sorted(times, key=times.get, reverse=True)[:SHOWN]
    return [[f"`{name}`", f"{100 * times[name] / whole:.0f} %"] for name in most]


if __name__ == "__main__":
    run(main)
