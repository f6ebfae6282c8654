"""The estimate of memory and time, from configurations alone."""

import pytest
import torch
import yaml
from support import load_script, write_params
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chest.core.errors import ParameterError
from chest.core.params import load_params

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
    cost = plan.Cost(
        *(4 * gib, 0),
        batch=32,
        active=lambda n: n * gib / plan.OVERHEAD,
        operations=1e9,
        calls=calls,
    )
    cards = [plan.Card("", memory, 100.0) for memory in (5.5, 13, 40)]
    assert [cost.fits(card) for card in cards] == [0, 8, 32]
    assert plan.describe(cost, cards[0]) == "no"
    assert plan.describe(cost, cards[1]) == "16 min (8)"  # four times as many operators
    assert plan.describe(cost, cards[2]) == "4 min"


@pytest.fixture
def case(checkpoints, tmp_path, monkeypatch):
    """A working directory with params.yaml, whose phantom profile names tiny checkpoints."""
    monkeypatch.chdir(tmp_path)
    names = {
        "zeroshot_vlm.qwen3": "qwen3",
        "zeroshot_vlm.medgemma": "medgemma",
        **dict.fromkeys(("zeroshot_qwen", "annotate", "finetune_qwen"), "qwen"),
        **dict.fromkeys(("zeroshot_siglip", "finetune_siglip", "finetune_siglip_text"), "siglip"),
        "extract_features.siglip": "siglip",
        "audit_synthetic": "efficientnet_b0",
        **{
            f"{stage}.{name}": name
            for stage in ("finetune_cnn", "extract_features")
            for name in ("resnet50", "efficientnet_b0")
        },
    }
    changes = {f"phantom.{x}.checkpoint": str(checkpoints / name) for x, name in names.items()}
    write_params(tmp_path, **changes, **{"phantom.precision": "auto"})
    return tmp_path


def lines(capsys, *arguments):
    """Return the cells of each line of the table, by stage."""
    plan.main(arguments)
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) > 5}


def test_every_stage_with_a_model_is_estimated(case, capsys):
    found = lines(capsys)
    for stage in set(plan.WORKS) - {"probe_regions"}:  # on pixels alone in this profile
        own = [cells for name, cells in found.items() if f"{name}.".startswith(f"{stage}.")]
        assert own, stage
        assert all("min" in cells[-1] for cells in own), stage


def test_a_stage_that_is_not_known_does_not_hide_the_others(case, capsys):
    params = yaml.safe_load((case / "params.yaml").read_text())
    params["phantom"]["finetune_other"] = {"checkpoint": "x", "batch_size": 4}
    params["phantom"]["zeroshot_siglip"]["checkpoint"] = "nowhere"
    (case / "params.yaml").write_text(yaml.safe_dump(params))
    assert set(lines(capsys, "finetune_other")["finetune_other"]) == {"?"}
    assert set(lines(capsys, "zeroshot_siglip")["zeroshot_siglip"]) == {"?"}
    with pytest.raises(ParameterError, match="no stage"):
        plan.main(["finetune_nothing"])


def test_images_that_nobody_has_counted(case):
    with pytest.raises(ParameterError, match=r"phantom\.expected_counts: null"):
        plan.main(["zeroshot_siglip", "-S", "phantom.expected_counts=null"])


def test_adapters_train_and_a_frozen_model_has_no_gradients(case):
    params = load_params()
    found = dict(plan.blocks(params.content["phantom"]))
    trained, asked = (found[name] for name in ("finetune_qwen", "zeroshot_qwen"))
    works = [plan.asking(block, torch.bfloat16) for block in (trained, asked)]
    counts = [sum(x.numel() for x in w.model.parameters() if x.requires_grad) for w in works]
    names = [n for n, x in works[0].model.named_parameters() if x.requires_grad]
    assert counts[1] == 0
    assert names
    assert all("lora" in name for name in names)
    more = plan.estimate(params, "finetune_qwen", trained).fixed
    more -= plan.estimate(params, "zeroshot_qwen", asked).fixed
    assert more == 12 * counts[0]  # in fp32, with two moments
