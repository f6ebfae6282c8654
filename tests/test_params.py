"""params.yaml: what it holds is typed, and what it must not hold is refused by its name."""

import os

import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from support import ROOT, write_params

from chest.errors import ParameterError
from chest.params import load_params


def load(tmp_path, **changes):
    """The repository's parameters with some lines replaced: ``{"lr: 2.0e-5": "lr: 1e-5"}``."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    return load_params(tmp_path / "params.yaml")


def test_the_committed_parameters_are_those_of_the_study():
    params = load_params(ROOT / "params.yaml")
    assert params.profile == "phantom"
    assert params.chosen is params.phantom
    counts = params.study.expected_counts.model_dump()
    assert counts == {"covid19": 8449, "normal": 7506, "tuberculosis": 345}
    settings = params.study.finetune_siglip
    assert (settings.lr, settings.warmup_steps, settings.batch_size, settings.epochs) == (
        2e-5, 500, 32, 10,
    )  # fmt: skip
    assert settings.weight_decay == 0.01
    assert settings.checkpoint == "google/siglip-base-patch16-224"
    assert params.study.zeroshot_qwen.checkpoint == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert params.study.zeroshot_qwen.revision == "main"


def test_the_profile_chooses_its_block_and_its_data(tmp_path):
    params = load(tmp_path, **{"profile: phantom": "profile: study"})
    assert params.chosen is params.study
    assert params.raw.as_posix() == "data/raw/study"


def test_every_key_says_why():
    # Each mapping or its first key carries a comment; readers change values they understand.
    lines = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) >= 15


@pytest.mark.parametrize("text", ["1e-05", "1e-5", "1.0e-5", "1E-5", "0.00001", ".00001"])
def test_numbers_arrive_as_numbers_however_they_are_written(tmp_path, text):
    # PyYAML alone reads 1e-05, which DVC writes, as a string.
    lr = load(tmp_path, **{"lr: 2.0e-5": f"lr: {text}"}).study.finetune_siglip.lr
    assert type(lr) is float
    assert lr == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seed: 42", "seed: 42\nsede: 1", "sede: unknown key"),
        ("seed: 42", "", "seed: missing"),
        ("seed: 42", "seed: true", "seed: "),
        ("seed: 42", "seed: -1", "seed: "),
        ("seed: 42", "seed: '42'", "seed: "),
        ("seed: 42", "seed: 42\nseed: 43", "key given twice: seed"),
        ("profile: phantom", "profile: real", "profile: "),
        ("image_size: 224", "image_size: 224.0", "image_size: "),
        ("image_size: 224", "image_size: 0", "image_size: "),
        ("position: center", "position: 1.5", "slices.position"),
        ("position: center", "position: middle", "slices.position"),
        ("normalize: minmax", "normalize: none", "slices.normalize"),
        ("tuberculosis: ptb", "tuberculosis: folder", "labels.tuberculosis"),
        ("train: 0.8", "train: 0.7", "split: .*add up to 0.9"),
        ("train: 0.8", "train: .nan", "split.train"),
        ("test: 0.1", "test: -0.1", "split.test"),
        ("group: patient", "group: slice", "split.group"),
        ("lr: 2.0e-5", "lr: fast", "study.finetune_siglip.lr"),
        ("lr: 2.0e-5", "lr: 0", "study.finetune_siglip.lr"),
        ("lr: 2.0e-5", "lr: .inf", "study.finetune_siglip.lr"),
        ("lr: 2.0e-5", "lr:", "study.finetune_siglip.lr"),
        ("epochs: 10", "epochs: 0", "study.finetune_siglip.epochs"),
        ("epochs: 10", "epochs: 2.5", "study.finetune_siglip.epochs"),
        ("warmup_steps: 500", "warmup_steps: -1", "study.finetune_siglip.warmup_steps"),
        ("weight_decay: 0.01", "weight_decay: -0.1", "study.finetune_siglip.weight_decay"),
        ("balance: class_modality", "balance: yes", "study.finetune_siglip.balance"),
        ("batch_size: 64", "batch_size: 0", "study.zeroshot_qwen.batch_size"),
        ("method: likelihood", "method: guess", "study.zeroshot_qwen.method"),
        ("images: test", "images: train", "study.zeroshot_qwen.images"),
        ("revision: main", "revision: ''", "study.zeroshot_qwen.revision"),
        ("    covid19: 8449", "    covid: 8449", "study.expected_counts.covid: unknown key"),
        ("      normal: normal", "      normal: COVID-19", "prompts.qwen.answers"),
        ("      normal: normal", "      normal: 7", "prompts.qwen.answers.normal"),
        ("This is {modality}. ", "", "prompts.qwen"),
        ("This is {modality}. ", "This is {modality} {0}. ", "prompts.qwen"),
        ("      - a medical image of tuberculosis in the lungs", "      - 3", "tuberculosis.2"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(tmp_path, old, new, told):
    with pytest.raises(ParameterError, match=told):
        load(tmp_path, **{old: new})


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("study.zeroshot_qwen.batch_size", 65_536),
        ("study.zeroshot_siglip.batch_size", 65_536),
        ("phantom.finetune_siglip.batch_size", 65_536),
        ("study.finetune_siglip.epochs", 10_000),
        ("study.finetune_siglip.warmup_steps", 10**9),
        ("study.finetune_siglip.save_every", 10**9),
        ("study.zeroshot_qwen.max_new_tokens", 4096),
        ("study.expected_counts.normal", 10**9),
    ],
)
def test_numbers_have_an_upper_limit(tmp_path, key, most):
    write_params(tmp_path, **{key: most})
    load_params(tmp_path / "params.yaml")
    for more in (most + 1, 10**30, 10**400):
        write_params(tmp_path, **{key: more})
        with pytest.raises(ParameterError, match=rf"{key}: .* less than or equal to {most} "):
            load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("key", "fits", "beyond"),
    [
        ("prompts.qwen.question", "{modality}" + "x" * 1990, "{modality}" + "x" * 1991),
        ("prompts.qwen.answers.normal", "x" * 2000, "x" * 2001),
        ("study.zeroshot_qwen.checkpoint", "x" * 2000, "x" * 90_000),
        ("prompts.siglip.normal", ["x"] * 1000, ["x"] * 1001),
    ],
)
def test_texts_have_an_upper_limit(tmp_path, key, fits, beyond):
    write_params(tmp_path, **{key: fits})
    load_params(tmp_path / "params.yaml")
    write_params(tmp_path, **{key: beyond})
    with pytest.raises(ParameterError, match=rf"{key}: .* at most (2000 characters|1000 items)"):
        load_params(tmp_path / "params.yaml")


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    with pytest.raises(ParameterError) as error:
        load(tmp_path, **{"seed: 42": "seed: x", "epochs: 10": "epochs: 0", "val: 0.1": "vel: 0.1"})
    for key in ("seed", "study.finetune_siglip.epochs", "split.val: missing", "split.vel: unknown"):
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("0o10", 8), ("0x1F", 31), ("08", 8), ("+5", 5)]
)
def test_whole_numbers_are_those_that_dvc_reads(tmp_path, text, value):
    # YAML 1.1 reads 010 as eight, and dvc.lock would say ten.
    assert load(tmp_path, **{"seed: 42": f"seed: {text}"}).seed == value
    assert parse_yaml(f"seed: {text}", "")["seed"] == value


@pytest.mark.parametrize("text", ["1:2:3", "yes", "on", "2020-01-01", "=", "0b11", "1_000"])
def test_words_that_only_older_yaml_takes_for_something_else_are_words(tmp_path, text):
    with pytest.raises(ParameterError, match=f"seed: .*found: '{text}'"):
        load(tmp_path, **{"seed: 42": f"seed: {text}"})


BOMB = "\n".join(  # nine lists of nine lists of nine …: 9^12 words
    ["x0: &x0 [a]", *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 13))]
)


@pytest.mark.parametrize(
    ("seed", "told"),
    [
        ("*x12", r"seed: .*\[\.\.\.\]"),
        ("0x" + "f" * 5000, "seed: .*a number of 20000 bits"),
        ("[0x" + "f" * 9000 + "]", r"seed: .*\[a number of 36000 bits\]"),
        ("1" * 5000, "cannot be read"),
        ("!!int ''", "cannot be read"),
        ("!!float ''", "cannot be read"),
        ("!!bool x", "cannot be read"),
        ("!!timestamp x", "cannot be read"),
        ("!!map [a]", "cannot be read"),
        (r'"\e[31m"', r"seed: .*\\x1b"),
        ("{<<: *x1}", "merge"),
        ("[" * 3000, "cannot be read"),
        ("x" * 300_000, "more than 200,000 bytes"),
    ],
)
def test_what_a_stranger_may_write_is_refused_in_few_words(tmp_path, seed, told):
    with pytest.raises(ParameterError, match=told) as error:
        load(tmp_path, **{"seed: 42": f"{BOMB}\nseed: {seed}"})
    assert len(str(error.value)) < 3000


def test_a_key_of_control_characters_is_shown_as_such(tmp_path):
    with pytest.raises(ParameterError, match=r"\\x1b\[2J\\n: unknown key"):
        load(tmp_path, **{"seed: 42": 'seed: 42\n"\\e[2J\\n": 1'})


@pytest.mark.parametrize("content", ["", "[]", "a: b: c", "\t", "a: &x [*x]", "!!python/none x"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(ParameterError, match=r"params\.yaml"):
        load_params(path)


def test_a_file_that_is_none_is_refused(tmp_path):
    os.mkfifo(tmp_path / "params.yaml")  # opening it would wait for ever
    for path in (tmp_path / "params.yaml", tmp_path):
        with pytest.raises(ParameterError, match="no file"):
            load_params(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ParameterError, match="no_such"):
        load_params(tmp_path / "no_such.yaml")


def test_both_profiles_have_the_same_keys():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage, settings in content["study"].items():
        assert set(settings) == set(content["phantom"][stage])
