"""params.yaml is read once and checked; messages name every key at fault."""

import re

import pytest
import yaml
from support import ROOT, write_params

from chest.core.errors import ParameterError
from chest.core.params import Positive, Section, Share, Text, load_params


class Settings(Section):
    lr: Share
    epochs: Positive
    name: Text = "none"


def params(folder, text, head="profile: phantom\nseed: 42\n"):
    (folder / "params.yaml").write_text(head + text)
    return load_params(folder / "params.yaml")


def refused(folder, text):
    with pytest.raises(ParameterError) as caught:
        params(folder, text).system("model", Settings)
    return str(caught.value)


@pytest.mark.parametrize("text", ["1e-05", "1.0e-5", "0.00001", "'1e-05'"])
def test_a_number_is_one_however_it_is_written(tmp_path, text):
    # YAML 1.1 reads 1e-05 as a string, and DVC writes it so.
    found = params(tmp_path, f"phantom: {{model: {{lr: {text}, epochs: 3}}}}")
    assert found.system("model", Settings) == Settings(lr=1e-5, epochs=3)


def test_the_profile_chooses_its_block_and_its_data(tmp_path):
    for profile, side in (("study", 224), ("phantom", 112)):
        write_params(tmp_path, profile=profile)
        found = load_params(tmp_path / "params.yaml")
        assert found.raw.as_posix() == f"data/raw/{profile}"
        assert found.system("finetune_siglip.image_size", Positive) == side


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 0.1, epochs: 3, epoch: 4", "phantom.model.epoch: unknown key"),
        ("lr: 0.1", "phantom.model.epochs: missing"),
        ("lr: high, epochs: 3", "phantom.model.lr: .*number.*'high'"),
        ("lr: 0.1, epochs: 2.5", "phantom.model.epochs: .*integer.*2.5"),
        ("lr: 1.5, epochs: 3", "phantom.model.lr: .*less than 1"),
        ("lr: .nan, epochs: 3", "phantom.model.lr: "),
        ("lr: 0.1, epochs: 0", "phantom.model.epochs: .*greater"),
    ],
)
def test_an_impossible_value_is_refused_by_name(tmp_path, text, told):
    message = refused(tmp_path, f"phantom: {{model: {{{text}}}}}")
    assert re.search(told, message), message


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    message = refused(tmp_path, "phantom: {model: {lr: 2, epochs: -1, x: 1}}")
    assert all(f"phantom.model.{key}: " in message for key in ("lr", "epochs", "x"))


def test_a_missing_block_is_named(tmp_path):
    assert "phantom.model: missing" in refused(tmp_path, "phantom: {}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "cannot be read"),
        ("- a", "a mapping expected"),
        ("", "a mapping expected"),
        ("seed: 1", "profile: missing"),
        ("profile: both\nseed: 1", "profile: .*both"),
        ("profile: study\nseed: -1", "seed: "),
    ],
)
def test_a_file_that_is_no_params_yaml_is_refused(tmp_path, content, told):
    with pytest.raises(ParameterError, match=told):
        params(tmp_path, content, head="")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"nowhere\.yaml"):
        load_params(tmp_path / "nowhere.yaml")


def test_both_profiles_have_the_same_keys():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())

    def keys(block):
        return {
            k: keys(v) if k.startswith(("zeroshot", "finetune")) else None for k, v in block.items()
        }

    assert keys(content["phantom"]) == keys(content["study"])
