"""The estimate of memory and time, from configurations alone."""

import pytest
import torch
from support import load_script, write_params
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chest.core.errors import ParameterError

plan = load_script("tools/plan.py")


def test_memory_and_operations_of_a_linear_layer():
    with FakeTensorMode():
        model = nn.Linear(1000, 500, bias=False)
    work = plan.Work(model, lambda n: model(torch.empty(n, 1000)))
    measured = plan.measure(work, 8, training=True)
    # Forward, and the gradient of the weight; the input needs none.
    assert measured.operations == 2 * 2 * 8 * 1000 * 500
    gradient, weight_in_bf16 = 4 * 1000 * 500, 2 * 1000 * 500
    assert gradient + weight_in_bf16 <= measured.peak <= 1.5 * (gradient + weight_in_bf16)
    assert plan.measure(work, 8, training=False).operations == 2 * 8 * 1000 * 500


def test_a_batch_is_halved_until_it_fits():
    gib = plan.GIB
    calls = 4 * 60 / plan.CALL
    cost = plan.Cost(4 * gib, 0, batch=32, active=lambda n: n * gib, operations=1e9, calls=calls)
    cards = [plan.Card("", memory, 100.0) for memory in (5.5, 13, 40)]
    assert [cost.fits(card) for card in cards] == [0, 8, 32]
    assert plan.describe(cost, cards[0]) == "no"
    assert plan.describe(cost, cards[1]) == "16 min (8)"  # four times as many operators
    assert plan.describe(cost, cards[2]) == "4 min"


def test_every_stage_of_the_profile_is_named(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {
        f"phantom.{block}.checkpoint": str(checkpoints / name)
        for block, name in {
            "zeroshot_qwen": "qwen",
            "zeroshot_siglip": "siglip",
            "finetune_siglip": "siglip",
            "finetune_cnn.resnet50": "resnet50",
        }.items()
    }
    write_params(tmp_path, **changes)
    stages = ("zeroshot_qwen", "zeroshot_siglip", "finetune_siglip", "finetune_cnn.resnet50")
    for stage in stages:
        plan.main([stage, "-S", "phantom.finetune_siglip.batch_size=8"])
    printed = capsys.readouterr().out
    for stage in stages:
        assert f"| {stage} | " in printed
    with pytest.raises(ParameterError, match="no stage"):
        plan.main(["finetune_nothing"])
