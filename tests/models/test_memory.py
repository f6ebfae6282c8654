"""Errors of the device are told as such, wherever they arise."""

import numpy as np
import pytest
import torch
from transformers import core_model_loading

from chest.core import runtime
from chest.models.common.batch_inference import infer
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.device import start
from chest.models.common.memory import explain, is_out_of_memory
from chest.models.vlm.model import load_vlm

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_memory_ends_with_one_line_that_names_the_device(error):
    start(None)

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        runtime.run(main)
    assert "GiB free; lower batch_size" in end.value.code
    assert len(end.value.code.splitlines()) == 1


def test_a_gpu_that_others_have_filled(monkeypatch):
    """Asking how much memory is free then fails as well."""

    def fail():
        raise FULL[1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert "the GPU has not even room for CUDA itself; lower batch_size" in explain(FULL[1])


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_memory_while_weights_are_loaded(checkpoints, monkeypatch, error):
    """transformers turns some errors of loading into its own."""
    accelerator = start(None)

    def fail(*_):
        raise error

    monkeypatch.setattr(core_model_loading, "_materialize_copy", fail)
    source = find_checkpoint(str(checkpoints / "qwen"), "main")
    with pytest.raises(SystemExit, match="out of memory: "):
        runtime.run(lambda: load_vlm(accelerator, source, 56))


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_batch_is_halved_whatever_says_that_the_memory_is_full(error):
    def answer(rows):
        if len(rows) > 2:
            raise error
        return torch.from_numpy(rows)

    assert infer(start(None), [np.arange(6)], answer) == {row: row for row in range(6)}


def test_a_bug_keeps_its_traceback():
    error = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    assert not is_out_of_memory(error)
    assert explain(error) is None


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_no_checkpoint_is_blamed_for_a_full_memory(error):
    source = Source("somewhere", "main", None)
    with pytest.raises(type(error)), source.reading("weights", RuntimeError):
        raise error


def test_a_gpu_that_pytorch_was_not_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GTX 1080")
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution")
    assert "GTX 1080: PyTorch" in explain(error)
    assert "sm_61; built for sm_75, sm_80" in explain(error)
