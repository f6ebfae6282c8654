"""Many rows, one model: batches dealt to the processes, in memory, and each row answered once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from chest.progress import progress
from chest.resume import Journal

Answerer = Callable[[np.ndarray], torch.Tensor | list]  # gets row numbers, gives as many answers


def answer(
    accelerator: Accelerator,
    batches: Iterable[np.ndarray],
    function: Answerer,
    journal: Journal | None = None,
) -> dict[int, object]:
    """What `function` says of each row, as {row: answer}; the batches are dealt to the processes.

    Where the device's memory does not hold a batch, it and all that follow are halved. Rows that
    `journal` knows are not asked again, and it gets the answers of each batch.
    """
    batches = list(batches)
    known: dict[int, object] = {}
    if journal:
        # Read by one for all: another process may have added to it before the last one reads.
        read = journal.answers() if accelerator.is_main_process else None
        found = broadcast_object_list([read])[0]
        known = {row: found[row] for batch in batches for row in batch.tolist() if row in found}
    left = [batch[[row not in known for row in batch.tolist()]] for batch in batches]
    left = [batch for batch in left if len(batch)]
    mine = left[accelerator.process_index :: accelerator.num_processes]
    given = []
    silent = not accelerator.is_main_process
    with torch.inference_mode():
        for batch, said in progress(_fitting(mine, function), "batches", len(mine), silent):
            if journal:
                said = _as_list(said)
                journal.add(dict(zip(batch.tolist(), said, strict=True)))
            given.append((batch, said))
    # A tensor becomes a list only now: that waits for the device.
    pairs = [
        pair for batch, said in given for pair in zip(batch.tolist(), _as_list(said), strict=True)
    ]
    return known | dict(gather_object(pairs))


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`rows` in order, cut into arrays of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _fitting(batches: list[np.ndarray], function: Answerer) -> Iterator[tuple[np.ndarray, object]]:
    """Each batch with what `function` says of it, in halves where memory does not hold it."""
    waiting, most = deque(batches), max(map(len, batches), default=0)
    while waiting:
        batch = waiting.popleft()
        if len(batch) > most:
            waiting.extendleft(reversed(in_batches(batch, most)))
            continue
        try:
            said = function(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        else:
            yield batch, said
            continue
        # Only here, where the error no longer holds what it was raised over, is it free.
        most = len(batch) // 2
        clear_device_cache(garbage_collection=True)
        waiting.appendleft(batch)


def _as_list(said: torch.Tensor | list) -> list:
    return said.tolist() if torch.is_tensor(said) else said
