"""Inference on many rows: batches are dealt to the processes, and halved if memory runs out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache

from chest.core.errors import ParameterError
from chest.core.parallel import progress
from chest.models.common.journal import Journal
from chest.models.common.memory import is_out_of_memory

Inference = Callable[[np.ndarray], torch.Tensor | list]  # of row numbers (B,), returns B answers


def infer(
    accelerator: Accelerator,
    batches: Iterable[np.ndarray],
    function: Inference,
    journal: Journal | None = None,
) -> dict[int, object]:
    """Call `function` on all `batches` and return {row: answer}, in every process.

    Batches are dealt to the processes. If one does not fit into the device's memory, it and all
    that follow are halved. Rows that are in `journal` are skipped, and the answers of each batch
    are added to it. Raises ParameterError if the model overflows in fp16.
    """
    known = _read(accelerator, journal) if journal else {}
    open_batches = [_without(batch, known) for batch in batches]
    open_batches = [batch for batch in open_batches if len(batch)]
    mine = open_batches[accelerator.process_index :: accelerator.num_processes]
    done = []
    with torch.inference_mode():
        results = _fitting(mine, function)
        silent = not accelerator.is_main_process
        for batch, answers in progress(results, "batches", len(mine), silent):
            if journal:
                answers = _as_list(accelerator, answers)
                journal.add(dict(zip(batch.tolist(), answers, strict=True)))
            done.append((batch, answers))
    # Tensors become lists only now, since that waits for the device.
    lists = [(rows.tolist(), _as_list(accelerator, answers)) for rows, answers in done]
    pairs = [pair for rows, answers in lists for pair in zip(rows, answers, strict=True)]
    return known | dict(gather_object(pairs))


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut `rows`, in order, into arrays of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _read(accelerator: Accelerator, journal: Journal) -> dict[int, object]:
    """Read the journal in the main process: others might see what a process has just added."""
    return broadcast_object_list([journal.answers() if accelerator.is_main_process else None])[0]


def _without(batch: np.ndarray, known: dict[int, object]) -> np.ndarray:
    return batch[[row not in known for row in batch.tolist()]]


def _fitting(batches: list[np.ndarray], function: Inference) -> Iterator[tuple[np.ndarray, object]]:
    """Yield each batch with its answers; a batch that does not fit into memory is halved."""
    waiting, most = deque(batches), max(map(len, batches), default=0)
    while waiting:
        batch = waiting.popleft()
        if len(batch) > most:
            waiting.extendleft(reversed(in_batches(batch, most)))
            continue
        try:
            answers = function(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield batch, answers
            continue
        # Outside the handler: the error keeps the tensors that are to be freed.
        most = len(batch) // 2
        clear_device_cache(garbage_collection=True)
        waiting.appendleft(batch)


def _as_list(accelerator: Accelerator, answers: torch.Tensor | list) -> list:
    """Return `answers`; raises ParameterError if fp16, which ends at 65,504, has overflowed."""
    if not torch.is_tensor(answers):
        return answers
    on_device = answers.device == accelerator.device  # text is parsed on the CPU, and may be NaN
    if accelerator.mixed_precision == "fp16" and on_device and answers.isnan().any():
        raise ParameterError("precision: the model overflows in fp16; set it to fp32")
    return answers.tolist()
