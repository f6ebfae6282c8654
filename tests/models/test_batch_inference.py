"""Every row is answered once, whatever the batches and the memory."""

import numpy as np
import pytest
import torch

from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.device import start
from chest.models.common.journal import open_journal


@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_row_is_answered_once(size):
    rows = np.array([4, 5, 9, 10, 11, 40, 41])
    batches = in_batches(rows, size)
    assert max(map(len, batches)) <= size
    answers = infer(start(1), batches, lambda batch: [f"image {row}" for row in batch])
    assert answers == {row: f"image {row}" for row in rows.tolist()}


def test_an_answer_too_few_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        infer(start(1), [np.arange(3)], lambda batch: [0])


def test_answers_keep_double_precision():
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert infer(start(1), [np.arange(1)], lambda batch: third) == {0: 1 / 3}


class Device:
    """Memory for so many rows at once; ``asked`` holds the batches that it took."""

    def __init__(self, most, message="CUDA out of memory. Tried to allocate 2.00 GiB"):
        self.most, self.message, self.asked = most, message, []

    def __call__(self, rows):
        if len(rows) > self.most:
            raise RuntimeError(self.message)
        self.asked.append(rows.tolist())
        return torch.from_numpy(rows * 10)


@pytest.mark.parametrize(("most", "used"), [(1, 1), (3, 2), (16, 16)])
def test_a_batch_that_does_not_fit_is_halved_and_so_are_all_that_follow(most, used):
    device = Device(most)
    answers = infer(start(1), in_batches(np.arange(40), 16), device)
    assert answers == {row: 10 * row for row in range(40)}
    assert [row for rows in device.asked for row in rows] == list(range(40))
    assert max(map(len, device.asked)) == used


@pytest.mark.parametrize(("most", "message"), [(0, "CUDA out of memory."), (1, "shapes differ")])
def test_other_errors_and_single_rows_that_do_not_fit_are_raised(most, message):
    device = Device(most, message)
    with pytest.raises(RuntimeError, match=message):
        infer(start(1), in_batches(np.arange(4), 2), device)
    assert device.asked == []


# --- Journal ---------------------------------------------------------------------------------


def test_a_journal_answers_for_the_rows_that_it_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accelerator, asked = start(1), []

    def function(rows):
        asked.extend(rows.tolist())
        return [[row / 3] for row in rows.tolist()]

    journal = open_journal(accelerator, "stage", {"code": "a"})
    first = infer(accelerator, in_batches(np.arange(4), 2), function, journal)
    again = open_journal(accelerator, "stage", {"code": "a"})
    second = infer(accelerator, in_batches(np.arange(6), 4), function, again)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert second == first | {4: [4 / 3], 5: [5 / 3]}
    again.clear()
    assert not journal.folder.exists()


def test_torn_lines_of_a_journal_are_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = open_journal(start(1), "stage", {})
    journal.add({1: "a"})
    file = next(journal.folder.glob("*.jsonl"))
    file.write_text(file.read_text() + '\n[[2, "b')
    journal.add({3: "c"})
    assert journal.answers() == {1: "a", 3: "c"}


def test_a_journal_of_another_run_is_emptied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    open_journal(start(1), "stage", {"code": "a", "split": "b"}).add({1: "a"})
    assert open_journal(start(1), "stage", {"code": "a", "split": "c"}).answers() == {}
    assert "changed since: split" in capsys.readouterr().err
