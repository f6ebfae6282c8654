"""Show which operations take the time of a training epoch and of a batch of likelihoods.

Full-size models on a GPU, small ones else; random weights and images.

    python benchmarks/profiling.py
"""

from collections.abc import Callable

import torch
from architectures import SIDE, make_reader
from torch.profiler import ProfilerActivity, profile
from training import SIZES, epoch_of, make_data, make_task
from zeroshot import PROMPTS

from chest.core.labels import LABELS
from chest.core.runtime import parser, run
from chest.core.tables import markdown
from chest.models.common.device import start
from chest.models.qwen import answer_likelihoods, prepare_question

SHOWN = 6  # operations of each part
BATCH = 16  # images that are asked about at once


def main() -> None:
    parser(__doc__).parse_args()
    size = "full" if torch.cuda.is_available() else "small"
    epoch, *_ = epoch_of(make_task(size, make_data(SIZES[size])))
    parts = {"training": epoch, "likelihood": likelihood(size)}
    rows = [[name, *row] for name, part in parts.items() for row in shares(part)]
    print(markdown(["part", "operation", "share of its time"], rows))


def likelihood(size: str) -> Callable[[], object]:
    accelerator = start(0)
    reader = make_reader(size, accelerator)
    answers = [getattr(PROMPTS.answers, label) for label in LABELS]
    question = prepare_question(reader, PROMPTS.ask("ct"), answers)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE), dtype=torch.uint8).to(accelerator.device)
    return lambda: answer_likelihoods(reader, images, question)


def shares(part: Callable[[], object]) -> list[list[str]]:
    """Return the operations that take most of the device's time, and their shares of it."""
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
