"""Batches of images: the same from the device and read ahead."""

import numpy as np
import pytest
import torch
from test_training import data, run  # noqa: F401

from chest import training
from chest.resident import Images, place_images

CPU = torch.device("cpu")
ELSEWHERE = torch.device("cpu:0")  # to PyTorch another device than cpu: nothing lives there


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (50, 8, 8)).astype(np.uint8)


@pytest.mark.parametrize("device", [CPU, ELSEWHERE])
def test_batches_come_in_order_and_are_the_rows_asked_for(images, device):
    store = Images(torch.from_numpy(images), device)
    batches = [np.array(rows) for rows in ([3, 1, 1], [49], [0, 7, 9, 11], [5, 5])]
    streamed = list(store.stream(batches))
    assert len(streamed) == 4
    for rows, batch in zip(batches, streamed, strict=True):
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch, images[rows])
        np.testing.assert_array_equal(store.take(rows), images[rows])
    assert list(store.stream([])) == []


def test_one_batch_is_read_ahead_and_no_more(images):
    taken = []

    class Watched(torch.Tensor):
        def __getitem__(self, rows):
            taken.append(len(taken))
            return torch.from_numpy(images)[rows]

    store = Images(torch.from_numpy(images).as_subclass(Watched), ELSEWHERE)
    for i, _ in enumerate(store.stream([np.arange(4)] * 6)):
        assert len(taken) <= i + 2
    assert len(taken) == 6


def test_on_the_cpu_the_memory_map_is_used_as_it_is(images, tmp_path):
    np.save(tmp_path / "a.npy", images)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="c")
    store = place_images(mapped, CPU)
    assert store.source.data_ptr() == mapped.ctypes.data


def test_where_they_fit_the_images_live_on_the_device(images, monkeypatch):
    # A device without memory stands for a GPU, of which accelerate gives no number.
    monkeypatch.setattr("chest.resident._fits", lambda *_: True)
    store = place_images(images, torch.device("meta"))
    assert store.device == store.source.device == torch.device("meta")
    assert store.take(np.array([1, 2])).shape == (2, 8, 8)
    assert [len(batch) for batch in store.stream([np.arange(3), np.arange(2)])] == [3, 2]


def test_training_is_the_same_where_the_images_do_not_fit(checkpoints, data, monkeypatch):  # noqa: F811
    curves, place = [], training.Images
    for device in (CPU, ELSEWHERE):

        def placed(images, _, device=device):
            return place(torch.from_numpy(images), device)

        monkeypatch.setattr("test_training.place_images", placed)
        curves.append(run(checkpoints, data)[1])
    assert curves[0].equals(curves[1])
