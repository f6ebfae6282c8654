"""Make the tiny checkpoints of the phantom profile: the real architectures, random weights.

Writes  checkpoints/phantom/siglip   SiglipModel, SigLIP tokenizer (sentencepiece), preprocessor
        checkpoints/phantom/qwen     Qwen2_5_VLForConditionalGeneration, byte-level BPE tokenizer,
                                     chat template, preprocessor

They load with the same `from_pretrained` as the real ones, and say `random_weights: true` in their
config.json, so that every result of theirs is labelled so.

    python data/make_checkpoints.py        (or: dvc repro data/dvc.yaml:make_checkpoints)
    python data/make_checkpoints.py --into data/checkpoints/study/scratch --side 112 --patch 14
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)

from chest.commands import parser
from chest.errors import run
from chest.files import replacing

SEED = 2026
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
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

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


def main(folder: Path = CHECKPOINTS, side: int = 224, patch: int = 28) -> None:
    """Write both below `folder`; SigLIP's images have `side` px, and its patches `patch`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with replacing(folder / "siglip") as partial:
        partial.mkdir()
        make_siglip(partial, side, patch)
    with replacing(folder / "qwen") as partial:
        partial.mkdir()
        make_qwen(partial)


def read_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--into", type=Path, default=CHECKPOINTS, metavar="FOLDER")
    options.add_argument("--side", type=int, default=224, metavar="PX", help="of SigLIP's images")
    options.add_argument("--patch", type=int, default=28, metavar="PX", help="of SigLIP's patches")
    return options.parse_args()


def make_siglip(folder: Path, side: int, patch: int) -> None:
    """SigLIP with a vision tower of under half a million parameters, for minutes on a CPU."""
    entries = write_sentencepiece(folder / "spiece.model")
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=64).save_pretrained(folder)
    tower = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=tower
        | {
            "num_hidden_layers": 2,
            "vocab_size": entries,
            "max_position_embeddings": 64,
            "projection_size": 96,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config=tower | {"num_hidden_layers": 4, "image_size": side, "patch_size": patch},
        random_weights=True,
    )
    torch.manual_seed(SEED)
    SiglipModel(config).save_pretrained(folder)
    size = {"height": side, "width": side}
    write_preprocessor(folder, "SiglipImageProcessor", [0.5] * 3, [0.5] * 3, {"size": size})


def write_sentencepiece(path: Path) -> int:
    """Train a unigram model on the sentences, as SigLIP's tokenizer sees them; returns its size."""
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
    """Qwen2.5-VL of 0.3 million parameters; its vision tower has a windowed and a full layer."""
    tokenizer = train_bpe()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}) + "\n")
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            # A quarter, three eighths and three eighths of the 8 frequencies: time, height, width.
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        random_weights=True,
    )
    torch.manual_seed(SEED)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    # Mean and standard deviation of CLIP's training images, as in the real checkpoint.
    write_preprocessor(
        folder,
        "Qwen2VLImageProcessor",
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
    )


def train_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS)})
    return fast


def write_preprocessor(
    folder: Path, kind: str, mean: list[float], std: list[float], more: dict
) -> None:
    """preprocessor_config.json: grey values / 255, minus `mean`, over `std`."""
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
    run(lambda: main(options.into, options.side, options.patch), stage="make_checkpoints")
