"""Other checkpoints: what docs/checkpoints.md says loads does, and the rest is refused clearly.

The checkpoints are tiny, with random weights, but of the real ones' architecture and file layout.
"""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from documents import commands
from dvc.utils.hydra import apply_overrides
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from support import ROOT, load_script
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)
from transformers.initialization import no_init_weights

from chest.compute import CheckpointError, find_checkpoint, load_normalization, start, to_pixels
from chest.errors import ParameterError
from chest.labels import LABELS
from chest.params import load_params
from chest.qwen import answer_likelihoods, load_reader, pose
from chest.siglip import (
    TEXT_LENGTH,
    class_embeddings,
    classify,
    load_classifier,
    load_for_prompts,
    load_trained,
    score,
    tokenize,
)

PAGE = ROOT / "docs" / "checkpoints.md"
PROMPTS = load_params(ROOT / "params.yaml").prompts.siglip.model_dump()
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}

# SigLIP checkpoints that the page says load: side of the image and of a patch, in px.
SIGLIP = {
    "google/siglip2-base-patch16-224": (224, 16),
    "google/siglip-base-patch16-384": (384, 16),
    "google/siglip-base-patch16-512": (512, 16),
    "google/siglip-so400m-patch14-384": (384, 14),
    "google/medsiglip-448": (448, 14),
}
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes each checkpoint once: ``tiny("microsoft/rad-dino")`` is its Source."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name):
        path = folder / name
        if not path.exists():
            path.mkdir(parents=True)
            MAKERS.get(name, make_siglip)(path, name)
        return find_checkpoint(str(path), "main")

    return make


def make_siglip(path, name):
    load_script("data/make_checkpoints.py").make_siglip(path, *SIGLIP[name])


def make_siglip2(path, name):
    """A SigLIP checkpoint with Gemma's tokenizer, as the ones of fixed resolution on the hub."""
    make_siglip(path, name)
    (path / "spiece.model").unlink()
    config = SiglipConfig.from_pretrained(path)
    config.text_config.vocab_size = write_gemma_tokenizer(path)
    SiglipModel(config).save_pretrained(path)


def write_gemma_tokenizer(path) -> int:
    """tokenizer.json and tokenizer_config.json with the hub's settings; returns the entries."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    sentences = load_script("data/make_checkpoints.py").SENTENCES
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*sentences, *map(str.lower, sentences)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", special.index("<eos>"))]
    )
    tokenizer.enable_padding(length=TEXT_LENGTH)
    tokenizer.enable_truncation(TEXT_LENGTH)
    tokenizer.save(str(path / "tokenizer.json"))
    content = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        **{f"{kind}_token": f"<{kind}>" for kind in ("pad", "eos", "bos", "unk")},
        "do_lower_case": True,
        "model_input_names": ["input_ids"],
        "padding_side": "right",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return tokenizer.get_vocab_size()


def make_short(path, name):
    """SigLIP that reads texts of 16 tokens."""
    text = TOWER | {"num_hidden_layers": 1, "max_position_embeddings": 16}
    vision = TOWER | {"num_hidden_layers": 1, "image_size": 224, "patch_size": 14}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(path)


def make_naflex(path, name):
    """SigLIP 2 for images of any shape: another architecture."""
    text = TOWER | {"num_hidden_layers": 1}
    vision = TOWER | {"num_hidden_layers": 1, "num_patches": 256, "patch_size": 16}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(path)


def make_dinov2(path, name):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14
    )
    Dinov2Model(config).save_pretrained(path)


def make_qwen(path, name):
    """Qwen2.5-VL as the hub has the larger ones: an output layer of its own, bf16, several files.

    Its config.json is the hub's too: the text tower's settings stand beside the vision tower's.
    """
    load_script("data/make_checkpoints.py").make_qwen(path)
    (path / "model.safetensors").unlink()
    content = json.loads((path / "config.json").read_text())
    text = content.pop("text_config")
    text["rope_scaling"] = text.pop("rope_parameters")
    own = {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(text | content | own))
    config = Qwen2_5_VLConfig.from_pretrained(path)
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    flat = (path / "config.json").read_text()
    model.save_pretrained(path, max_shard_size="300KB")
    (path / "config.json").write_text(flat)


def make_qwen3(path, name):
    load_script("data/make_checkpoints.py").make_qwen(path)
    content = json.loads((path / "config.json").read_text())
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 5.0e6}
    config = Qwen3VLConfig(
        text_config={key: content["text_config"][key] for key in shared}
        | heads
        | {"rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
        **{key: content[key] for key in content if key.endswith("_token_id")},
        tie_word_embeddings=True,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)


MAKERS = {
    "google/siglip2-base-patch16-224": make_siglip2,
    "google/siglip2-base-patch16-naflex": make_naflex,
    "google/siglip-so400m-patch14-224": make_short,
    "microsoft/rad-dino": make_dinov2,
    QWEN: make_qwen,
    "Qwen/Qwen3-VL-4B-Instruct": make_qwen3,
}


def draw(side):
    drawn = np.random.default_rng(0).integers(0, 256, (2, side, side)).astype(np.uint8)
    return torch.from_numpy(drawn)


def check(probabilities):
    assert probabilities.shape == (2, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    assert (probabilities > 0).all()
    assert not torch.equal(probabilities[0], probabilities[1])


# --- What loads ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGLIP)
def test_siglip_answers_by_prompts(tiny, name):
    source, side = tiny(name), SIGLIP[name][0]
    model, tokenizer = load_for_prompts(source, side)
    pixels = to_pixels(draw(side), load_normalization(source))
    with torch.inference_mode():
        check(score(model, pixels, class_embeddings(model, tokenizer, PROMPTS)))


@pytest.mark.parametrize("name", SIGLIP)
def test_siglip_answers_as_a_classifier(tiny, name):
    source, side = tiny(name), SIGLIP[name][0]
    accelerator = start(1)
    model = load_classifier(source, side).eval()
    with torch.inference_mode():
        logits = classify(accelerator, model, draw(side), load_normalization(source))
    check(logits.softmax(1))


@pytest.mark.parametrize("side", [224, 448])
def test_a_larger_qwen_answers(tiny, side):
    reader = load_reader(tiny(QWEN), side, start(1))
    question = pose(reader, "Which one?", ("COVID-19", "normal", "tuberculosis"))
    check(answer_likelihoods(reader, draw(side), question).softmax(1))


def test_a_larger_qwen_has_its_own_output_layer(tiny):
    # A tied one would answer too, with other weights than those that were trained.
    reader = load_reader(tiny(QWEN), 224, start(1))
    files = [load_file(path) for path in Path(tiny(QWEN).checkpoint).glob("*.safetensors")]
    assert len(files) > 1
    stored = {name: value for file in files for name, value in file.items()}
    assert torch.equal(reader.model.lm_head.weight, stored["lm_head.weight"].float())
    assert not torch.equal(reader.model.lm_head.weight, reader.model.get_input_embeddings().weight)


# --- What SigLIP 2 reads ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["google/siglip2-base-patch16-224", "google/medsiglip-448"])
def test_letters_are_lowered(tiny, name):
    _, tokenizer = load_for_prompts(tiny(name), SIGLIP[name][0])
    upper, lower = (tokenize(tokenizer, [text]) for text in ("COVID-19 on CT", "covid-19 on ct"))
    assert torch.equal(upper, lower)


def test_prompts_are_padded_at_the_end_whatever_the_tokenizer_does_by_itself(tiny, tmp_path):
    folder = shutil.copytree(tiny("google/siglip2-base-patch16-224").checkpoint, tmp_path / "copy")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["padding_side"] = "left"  # as Gemma's is where the file does not say otherwise
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    _, tokenizer = load_for_prompts(find_checkpoint(str(folder), "main"), 224)
    ids = tokenize(tokenizer, ["a chest x-ray"])[0]
    assert ids[0] != tokenizer.pad_token_id
    assert ids[-1] == tokenizer.pad_token_id


def test_prompts_of_siglip2_end_with_its_padding(tiny):
    _, tokenizer = load_for_prompts(tiny("google/siglip2-base-patch16-224"), 224)
    ids = tokenize(tokenizer, ["a chest x-ray"])[0].tolist()
    end = ids.index(tokenizer.eos_token_id)
    assert 0 < end < TEXT_LENGTH - 1
    assert set(ids[end + 1 :]) == {tokenizer.pad_token_id}


def test_a_tokenizer_that_ends_no_text_is_refused(tiny, tmp_path):
    # transformers heeds no add_eos_token beside a tokenizer.json.
    folder = shutil.copytree(tiny("google/siglip2-base-patch16-224").checkpoint, tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    _, tokenizer = load_for_prompts(find_checkpoint(str(folder), "main"), 224)
    with pytest.raises(CheckpointError, match="does not end a text with <eos>"):
        tokenize(tokenizer, ["a chest x-ray"])


def test_a_prompt_that_siglip2_would_cut_is_refused(tiny):
    # Its tokenizer.json asks for truncation: the length must be counted before that.
    _, tokenizer = load_for_prompts(tiny("google/siglip2-base-patch16-224"), 224)
    with pytest.raises(ParameterError, match="at most 64"):
        tokenize(tokenizer, ["lungs " * 80])


# --- What does not load ----------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_for_prompts, load_classifier])
@pytest.mark.parametrize(
    ("name", "side", "kind"),
    [
        ("microsoft/rad-dino", 518, "dinov2"),
        ("google/siglip2-base-patch16-naflex", 224, "siglip2"),
    ],
)
def test_another_architecture_is_not_taken_for_siglip(tiny, name, side, kind, load):
    with pytest.raises(CheckpointError, match=f"of the kind {kind}, but this stage reads siglip"):
        load(tiny(name), side)


def test_another_architecture_is_not_taken_for_qwen2_5_vl(tiny):
    with pytest.raises(CheckpointError, match="of the kind qwen3_vl, but this stage reads qwen2_5"):
        load_reader(tiny("Qwen/Qwen3-VL-4B-Instruct"), 224, start(1))


def test_another_architecture_is_told_before_its_weights_are_fetched(tiny, tmp_path):
    for name in ("microsoft/rad-dino", "Qwen/Qwen3-VL-4B-Instruct"):
        folder = tmp_path / Path(name).name
        folder.mkdir()
        shutil.copy(Path(tiny(name).checkpoint) / "config.json", folder)
        source = find_checkpoint(str(folder), "main")
        with pytest.raises(CheckpointError, match="of the kind"):
            load_classifier(source, 224)
        with pytest.raises(CheckpointError, match="of the kind"):
            load_reader(source, 224, start(1))


def test_a_text_tower_of_another_length_is_refused_for_prompts_alone(tiny):
    source = tiny("google/siglip-so400m-patch14-224")
    with pytest.raises(CheckpointError, match="texts of 16 tokens, but prompts are padded to 64"):
        load_for_prompts(source, 224)
    assert load_classifier(source, 224).classifier.weight.shape == (3, 32)


def test_weights_of_another_shape_are_named(tiny, tmp_path):
    folder = shutil.copytree(tiny("google/medsiglip-448").checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = "vision_model.embeddings.position_embedding.weight"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weights of .*{name}"):
        load_classifier(find_checkpoint(str(folder), "main"), 448)


VISION, TEXT = "vision_config", "text_config"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ([VISION, "patch_size"], 0),
        ([VISION, "patch_size"], -1),
        ([VISION, "patch_size"], "x"),
        ([VISION, "num_attention_heads"], 0),
        ([VISION, "num_attention_heads"], 3.5),
        ([VISION, "hidden_act"], "nope"),
        ([VISION, "hidden_act"], 3),
        ([VISION, "dtype"], "nope"),
        ([VISION], []),
        ([VISION, "layer_norm_eps"], "x"),
        (["num_labels"], "x"),
        (["id2label"], []),
        (["id2label"], {"x": "y"}),
        (["dtype"], "nope"),
        (["dtype"], []),
        (["transformers_weights"], 3),
        (["model_type"], None),
        (["model_type"], [3]),
    ],
)
@pytest.mark.parametrize("load", [load_for_prompts, load_classifier, load_trained])
def test_a_config_that_makes_no_model_is_refused(tiny, tmp_path, keys, value, load):
    folder = shutil.copytree(tiny("google/medsiglip-448").checkpoint, tmp_path / "copy")
    content = json.loads((folder / "config.json").read_text())
    content["id2label"] = dict(enumerate(LABELS))
    *parents, last = keys
    section = content[parents[0]] if parents else content
    section[last] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=rf"{folder} .*(config\.json|of the kind|no classifier)"
    ):
        load(find_checkpoint(str(folder), "main"), 448)


@pytest.mark.parametrize("content", ["[]", "null", '"abc"', "{}"])
@pytest.mark.parametrize("load", [load_for_prompts, load_classifier, load_trained])
def test_a_config_that_is_none_is_refused(tiny, tmp_path, content, load):
    folder = shutil.copytree(tiny("google/medsiglip-448").checkpoint, tmp_path / "copy")
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{folder} .* config\.json"):
        load(find_checkpoint(str(folder), "main"), 448)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 9999])
def test_a_tokenizers_config_that_is_none_is_refused(tiny, tmp_path, content):
    folder = shutil.copytree(tiny("google/medsiglip-448").checkpoint, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{folder} .* tokenizer"):
        load_for_prompts(find_checkpoint(str(folder), "main"), 448)


@pytest.mark.parametrize("side", [384, 512])
def test_qwen_refuses_the_sides_between(tiny, side):
    with pytest.raises(ParameterError, match=f"{side} px, but Qwen2.5-VL needs a multiple of 28"):
        load_reader(tiny(QWEN), side, start(1))


def test_a_gated_checkpoint_says_so(monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match="gated repo"):
        find_checkpoint("google/medsiglip-448", "main")


# --- What the page says ----------------------------------------------------------------------


def rows():
    """The page's table: the cells of each row by its checkpoint."""
    found = re.findall(r"^\| `([^`]+)`.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    lines = re.findall(r"^\| `.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return dict(zip(found, cells, strict=True))


def experiments():
    """The page's `dvc exp run` commands: their parameters' changes and their stages."""
    for command in commands(PAGE):
        if command.text.startswith("dvc exp run "):
            words = command.words()
            changes = [word for option, word in pairwise(words) if option == "-S"]
            yield changes, [word for word in words if word in STAGES]


STAGES = ("zeroshot_siglip", "finetune_siglip", "zeroshot_qwen")
LARGE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
}


def architecture(name) -> SiglipConfig:
    """The real checkpoint's, with its sizes; SiglipConfig's own are the base model's."""
    side, patch = SIGLIP[name]
    sizes = {} if "base" in name else LARGE
    text = sizes | ({"vocab_size": 256000} if "siglip2" in name else {})
    vision = sizes | {"image_size": side, "patch_size": patch, "vision_use_head": True}
    return SiglipConfig(text_config=text, vision_config=vision)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_kept(model, side) -> int:
    """What a batch of 32 keeps for the backward pass, in bf16, without the weights themselves."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.train()(pixel_values=torch.empty(32, 3, side, side))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


@pytest.mark.parametrize("name", SIGLIP)
def test_the_page_has_siglips_size_and_memory(name):
    config = architecture(name)
    with FakeTensorMode(), no_init_weights():  # shapes alone, no memory
        weights = 4 * count(SiglipModel(config))
        config.vision_config.vision_use_head = False
        classifier = SiglipForImageClassification(config)
        training = 16 * count(classifier) + bytes_kept(classifier, SIGLIP[name][0])
    cells = rows()[name]
    assert cells[1] == str(SIGLIP[name][0])
    assert cells[4:] == [f"{weights / 1e9:.1f} GB", f"{training / 1e9:.1f} GB"]


def test_the_page_has_qwens_memory():
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        weights = 2 * count(Qwen2_5_VLForConditionalGeneration(config))
    assert rows()[QWEN][4] == f"{weights / 1e9:.1f} GB"


def test_every_checkpoint_that_loads_is_on_the_page_with_its_stages():
    for name, cells in rows().items():
        loads = "both SigLIP stages" if name in SIGLIP else "`zeroshot_qwen`"
        assert cells[2] == (loads if name in (*SIGLIP, QWEN) else "none: refused"), name
    assert set(rows()) >= {*SIGLIP, QWEN}


def test_every_command_gives_parameters_that_fit(tmp_path):
    for changes, stages in experiments():
        path = shutil.copy(ROOT / "params.yaml", tmp_path)
        apply_overrides(path, changes)
        params = load_params(path)
        assert params.profile == "study"
        for stage in set(stages or STAGES):
            name = getattr(params.study, stage).checkpoint
            if stage == "zeroshot_qwen":
                assert params.image_size % 28 == 0, changes
            else:
                assert params.image_size == SIGLIP.get(name, (224,))[0], changes
    assert len(list(experiments())) == 4
