"""Domain-adversarial training: gradients, domains, and what remains of the site."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from chest.training.adversary import ReverseGradient, find_domains, probe_sites, reversal

TABLE = pd.DataFrame(
    {
        "modality": ["ct", "ct", "xray", "xray", "xray"],
        "site": ["Moscow", "Milan", "Shenzhen", "Montgomery", "Delhi"],
        "split": ["train", "train", "train", "train", "external"],
    }
)


def test_the_gradient_is_reversed_and_the_value_is_not():
    features = torch.tensor([1.0, 2.0], requires_grad=True)
    out = ReverseGradient.apply(features, torch.tensor(0.5))
    (out * torch.tensor([3.0, 4.0])).sum().backward()
    assert out.tolist() == [1.0, 2.0]
    assert features.grad.tolist() == [-1.5, -2.0]


def test_the_strength_rises_to_the_weight():
    assert reversal(0, 0.3, 10) == 0
    assert reversal(1, 0.3, 10) == pytest.approx(0.3, abs=1e-3)
    assert reversal(0.1, 1, 10) == pytest.approx(2 / (1 + math.exp(-1)) - 1)


def test_sites_compete_within_their_modality_only():
    domains = find_domains(TABLE, "site")
    assert domains.names == ["ct Milan", "ct Moscow", "xray Montgomery", "xray Shenzhen"]
    assert domains.codes.tolist() == [1, 0, 3, 2, -1]
    assert domains.possible.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert find_domains(TABLE, "modality").codes.tolist() == [0, 0, 1, 1, 1]


def test_a_site_in_the_features_is_found():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "modality": "xray",
            "site": rng.choice(["Shenzhen", "Montgomery"], 400),
            "split": ["val", "test"] * 200,
        }
    )
    noise = rng.normal(size=(400, 5))
    assert probe_sites(noise, table)["site_found_xray"] == pytest.approx(0.5, abs=0.1)
    told = noise + 3 * (table["site"] == "Shenzhen").to_numpy()[:, None]
    assert probe_sites(told, table)["site_found_xray"] > 0.95
    assert probe_sites(told, table.assign(site="Shenzhen")) == {}
