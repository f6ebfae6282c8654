"""Errors of the device are told as such, wherever they arise."""

import pytest
import torch

from chest.core import runtime
from chest.models.common.checkpoints import Source
from chest.models.common.device import start
from chest.models.common.memory import explain, is_out_of_memory

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
