"""Make the tiny checkpoints of the phantom profile: the real architectures, random weights.

Writes  checkpoints/phantom/siglip   SiglipModel, SigLIP tokenizer (sentencepiece), preprocessor
        checkpoints/phantom/resnet50          ResNetForImageClassification, preprocessor
        checkpoints/phantom/efficientnet_b0   EfficientNetForImageClassification, preprocessor
        checkpoints/phantom/qwen     Qwen2_5_VLForConditionalGeneration, byte-level BPE tokenizer,
                                     chat template, preprocessor
        checkpoints/phantom/qwen3    Qwen3VLForConditionalGeneration, the same
        checkpoints/phantom/medgemma Gemma3ForConditionalGeneration (MedGemma), the same

They load with the same `from_pretrained` as the real ones. Their config.json says
`random_weights: true`, and every result that comes from them is labelled so.

    python data/make_checkpoints.py        (or: dvc repro data/dvc.yaml:make_checkpoints)
    python data/make_checkpoints.py --into data/checkpoints/study/scratch --side 224 --patch 16
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)

from chest.core.files import replacing
from chest.core.runtime import parser, run

SEED = 2026
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and standard deviation
CHECKPOINTS = Path(__file__).parent / "checkpoints" / "phantom"

# Enough English for tokenizers of a few hundred entries.
SENTENCES = (
    "a chest X-ray of a patient with pulmonary tuberculosis",
    "a chest X-ray with upper-lobe infiltrates and cavities",
    "a chest X-ray with clear lungs and no finding",
    "a chest CT slice of a patient with COVID-19 pneumonia",
    "a chest CT slice of healthy lungs",
    "an axial CT scan of lungs with peripheral ground-glass opacities",
    "a medical image of normal lungs, of COVID-19 or of tuberculosis",
    "This is a frontal chest X-ray. This is an axial chest CT slice.",
    "Which one describes the lungs best: COVID-19, tuberculosis or normal?",
    "Answer with one of these words only. You are a helpful assistant.",
    "system user assistant picture image question answer yes no",
    "the quick brown fox jumps over the lazy dog 0123456789 .,:;!?-()'\"/%",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
)

# Special tokens of Qwen2.5-VL in the order of its vocabulary.
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")),
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Special tokens of Gemma 3; the last one is the image's.
GEMMA_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)

# ChatML with image places, in the form that the family's checkpoints use.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<start_of_image>' -}}
{%- else -%}{{- part.text | trim -}}
{%- endif -%}
{%- endfor -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

LAYERS = {"hidden_size": 64, "intermediate_size": 128}  # of a tiny transformer


def main(folder: Path = CHECKPOINTS, side: int = 112, patch: int = 8) -> None:
    """Write all checkpoints below `folder`; SigLIP reads images of `side` px in `patch` px."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with replacing(folder / "siglip") as partial:
        partial.mkdir()
        make_siglip(partial, side, patch)
    for name, make in {"qwen": make_qwen, "qwen3": make_qwen3, "medgemma": make_gemma}.items():
        with replacing(folder / name) as partial:
            partial.mkdir()
            make(partial)
    with replacing(folder / "resnet50") as partial:
        partial.mkdir()
        make_resnet(partial, side)
    with replacing(folder / "efficientnet_b0") as partial:
        partial.mkdir()
        make_efficientnet(partial, side)


def read_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--into", type=Path, default=CHECKPOINTS, metavar="FOLDER")
    options.add_argument("--side", type=int, default=112, metavar="PX", help="of SigLIP's images")
    options.add_argument("--patch", type=int, default=8, metavar="PX", help="of SigLIP's patches")
    return options.parse_args()


def make_siglip(folder: Path, side: int, patch: int) -> None:
    """Make a SigLIP with a vision tower of 57,000 parameters, which learns in a minute on a CPU."""
    entries = write_sentencepiece(folder / "spiece.model")
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=64).save_pretrained(folder)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"hidden_size": 48, "intermediate_size": 96}
    config = SiglipConfig(
        text_config=tower
        | {
            "vocab_size": entries,
            "max_position_embeddings": 64,
            "projection_size": 48,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config=tower | {"image_size": side, "patch_size": patch},
        random_weights=True,
    )
    model = make_random(SiglipModel, config)
    # Random filters that see contrast rather than brightness, and outweigh the position
    # embeddings: with the usual ones texture is not learned within a few hundred steps.
    filters = model.vision_model.embeddings.patch_embedding.weight.data
    filters -= 0.9 * filters.mean((1, 2, 3), keepdim=True)
    filters *= 6
    model.float().save_pretrained(folder)
    size = {"height": side, "width": side}
    write_preprocessor(folder, "SiglipImageProcessor", [0.5] * 3, [0.5] * 3, {"size": size})


def make_resnet(folder: Path, side: int) -> None:
    """Make a ResNet with a classifier of 1,000 classes, as those of ImageNet have."""
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=1000,
        random_weights=True,
    )
    make_random(ResNetForImageClassification, config).float().save_pretrained(folder)
    size = {"size": {"shortest_edge": side}, "crop_pct": 0.875}
    write_preprocessor(folder, "ConvNextImageProcessor", *IMAGENET, size)


def make_efficientnet(folder: Path, side: int) -> None:
    """Make an EfficientNet of two blocks with a classifier of 1,000 classes."""
    config = EfficientNetConfig(
        image_size=side,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        kernel_sizes=[3, 5],
        in_channels=[32, 96],
        out_channels=[96, 160],
        strides=[2, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 3],
        hidden_dim=320,  # a quarter of 1,280
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        num_labels=1000,
        random_weights=True,
    )
    make_random(EfficientNetForImageClassification, config).float().save_pretrained(folder)
    size = {"size": {"height": side, "width": side}, "include_top": True}
    write_preprocessor(folder, "EfficientNetImageProcessor", *IMAGENET, size)


def make_random(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a `kind` with random weights, drawn in double precision.

    Processors with other vector units draw other last digits; rounded to fp32 they are the same.
    """
    torch.manual_seed(SEED)
    return kind._from_config(config, dtype=torch.float64)


def write_sentencepiece(path: Path) -> int:
    """Train a unigram model on SENTENCES as SigLIP's tokenizer sees them; return its size."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence.lower() for sentence in SENTENCES]),
        model_writer=model,
        vocab_size=256,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


def make_qwen(folder: Path) -> None:
    """Make a Qwen2.5-VL with 0.3 million parameters, a windowed and a full vision layer."""
    tokenizer = write_tokenizer(folder, QWEN_TOKENS, CHAT_TEMPLATE, eos="<|im_end|>")
    vision = LAYERS | {"num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        # A quarter, three eighths and three eighths of the 8 frequencies: time, height, width.
        text_config=qwen_text(tokenizer, {"mrope_section": [2, 3, 3]}),
        vision_config=vision | {"depth": 2},
        **qwen_image_tokens(tokenizer),
        tie_word_embeddings=True,
        random_weights=True,
    )
    make_random(Qwen2_5_VLForConditionalGeneration, config).float().save_pretrained(folder)
    # Mean and standard deviation of CLIP's training images, as in the real checkpoint.
    write_preprocessor(
        folder,
        "Qwen2VLImageProcessor",
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
    )


def make_qwen3(folder: Path) -> None:
    """Make a Qwen3-VL whose vision layers also feed the language model's first layer.

    Its patches have 14 px, not 16, so that it reads the phantoms' images as they are.
    """
    tokenizer = write_tokenizer(folder, QWEN_TOKENS, CHAT_TEMPLATE, eos="<|im_end|>")
    vision = LAYERS | {"num_heads": 4, "out_hidden_size": 64, "patch_size": 14}
    rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=qwen_text(tokenizer, rope) | {"head_dim": 16},
        vision_config=vision
        | {"depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        **qwen_image_tokens(tokenizer),
        tie_word_embeddings=True,
        random_weights=True,
    )
    make_random(Qwen3VLForConditionalGeneration, config).float().save_pretrained(folder)
    size = {"shortest_edge": 3136, "longest_edge": 16777216}
    more = {"size": size, "patch_size": 14, "merge_size": 2}
    write_preprocessor(folder, "Qwen2VLImageProcessorFast", [0.5] * 3, [0.5] * 3, more)


def make_gemma(folder: Path) -> None:
    """Make a Gemma 3, as MedGemma is, with a windowed and a full language layer."""
    tokenizer = write_tokenizer(
        folder, GEMMA_TOKENS, GEMMA_TEMPLATE, eos="<eos>", bos="<bos>", pad="<pad>"
    )
    token = tokenizer.convert_tokens_to_ids
    attention = {"num_attention_heads": 4, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config=LAYERS
        | attention
        | {
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 2048,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
            "bos_token_id": token("<bos>"),
            "eos_token_id": token("<eos>"),
            "pad_token_id": token("<pad>"),
        },
        vision_config=LAYERS | attention | {"image_size": 112, "patch_size": 14},
        mm_tokens_per_image=16,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
        random_weights=True,
    )
    model = make_random(Gemma3ForConditionalGeneration, config)
    # Zeros at first; trained ones let the image through.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    model.float().save_pretrained(folder)
    size = {"height": 112, "width": 112}
    more = {"size": size, "resample": 2}
    write_preprocessor(folder, "Gemma3ImageProcessor", [0.5] * 3, [0.5] * 3, more)


def qwen_text(tokenizer: PreTrainedTokenizerFast, rope: dict) -> dict:
    """Return the configuration of a language model of Qwen."""
    token = tokenizer.convert_tokens_to_ids
    return LAYERS | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "tie_word_embeddings": True,
    }


def qwen_image_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the tokens that a configuration of Qwen names."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def write_tokenizer(
    folder: Path,
    special: Sequence[str],
    template: str,
    eos: str,
    bos: str | None = None,
    pad: str = "<|endoftext|>",
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and write it with the chat template; return it."""
    tokenizer = train_bpe(special, eos_token=eos, bos_token=bos, pad_token=pad)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}) + "\n")
    return tokenizer


def train_bpe(special: Sequence[str] = QWEN_TOKENS, **roles: str | None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `special` tokens, some of which have a role."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def write_preprocessor(
    folder: Path, kind: str, mean: list[float], std: list[float], more: dict
) -> None:
    """Write a preprocessor_config.json: grey values / 255, minus `mean`, divided by `std`."""
    content = {
        "image_processor_type": kind,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        **more,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    options = read_options()
    run(lambda: main(options.into, options.side, options.patch))
