"""Each row is answered once, whatever the batches, the memory and the processes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chest.answering import answer, in_batches
from chest.compute import start


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_every_row_is_answered_once(size):
    rows = np.array([4, 5, 9, 10, 11, 40, 41])
    batches = in_batches(rows, size)
    assert max(map(len, batches)) <= size
    answers = answer(start(1), batches, lambda batch: [f"image {row}" for row in batch])
    assert answers == {row: f"image {row}" for row in rows.tolist()}


def test_an_answer_too_few_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        answer(start(1), [np.arange(3)], lambda batch: [0])


def test_no_gradients_are_kept_while_answering():
    modes = answer(start(1), [np.arange(1)], lambda batch: [torch.is_inference_mode_enabled()])
    assert modes == {0: True}


# --- Memory ----------------------------------------------------------------------------------


class Device:
    """Memory for so many rows at once; ``asked`` holds the batches that it took."""

    def __init__(self, most, message="CUDA out of memory. Tried to allocate 2.00 GiB"):
        self.most, self.message, self.asked = most, message, []

    def __call__(self, rows):
        if len(rows) > self.most:
            raise RuntimeError(self.message)
        self.asked.append(rows.tolist())
        return torch.from_numpy(rows * 10)


@pytest.mark.parametrize("most", [1, 3, 4, 16])
def test_a_batch_that_does_not_fit_is_halved_and_so_are_all_that_follow(most):
    device = Device(most)
    answers = answer(start(1), in_batches(np.arange(40), 16), device)
    assert answers == {row: 10 * row for row in range(40)}
    assert [row for rows in device.asked for row in rows] == list(range(40))
    assert max(map(len, device.asked)) == {1: 1, 3: 2, 4: 4, 16: 16}[most]


def test_what_does_not_fit_alone_is_an_error():
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(start(1), in_batches(np.arange(4), 2), Device(0))


def test_another_error_is_not_taken_for_a_lack_of_memory():
    device = Device(1, "shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        answer(start(1), in_batches(np.arange(4), 2), device)
    assert device.asked == []


def test_what_a_journal_knows_of_other_rows_is_ignored():
    journal = SimpleNamespace(answers=lambda: {1: "a", 7: "b"}, add=lambda answers: None)
    batches = iter(in_batches(np.arange(4), 2))
    answers = answer(start(1), batches, lambda rows: rows.tolist(), journal)
    assert answers == {0: 0, 1: "a", 2: 2, 3: 3}


# --- Processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_batches_are_dealt_to_the_processes(count):
    batches, shares = in_batches(np.arange(40), 3), []
    for index in range(count):
        one = SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0)
        shares.append(answer(one, batches, lambda rows: rows.tolist()))
    assert sorted(row for share in shares for row in share) == list(range(40))
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_all_processes_go_by_what_the_main_one_read(monkeypatch):
    # Another one may have written more by the time that this one looks: the deal would differ.
    class Later:
        def answers(self):
            raise AssertionError("this process looked itself")

        def add(self, answers):
            pass

    monkeypatch.setattr("chest.answering.broadcast_object_list", lambda found: [{0: "a", 1: "b"}])
    one = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
    found = answer(one, in_batches(np.arange(8), 2), lambda rows: rows.tolist(), Later())
    assert found == {0: "a", 1: "b", 4: 4, 5: 5}
