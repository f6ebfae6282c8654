"""The study's models from their configurations, with random weights: speed does not depend on them.

``full`` are google/siglip-base-patch16-224 and Qwen/Qwen2.5-VL-3B-Instruct; ``small`` the same
architectures of a size that a CPU can time in a minute, ``tiny`` in a moment.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import (
    EfficientNetConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    ResNetConfig,
    SiglipConfig,
)

from chest.models.common.checkpoints import Source
from chest.models.common.device import frozen_type
from chest.models.common.pixels import Normalization, write_preprocessor
from chest.models.vlm.families import FAMILIES
from chest.models.vlm.model import Vlm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_checkpoints import CHAT_TEMPLATE, train_bpe

SIDE = 224
HALF = Normalization((0.5,) * 3, (0.5,) * 3)

TOWERS = {
    "full": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "small": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}

QWENS = {
    "full": {
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "small": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 2752,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 32000,
        },
        "vision": {
            "depth": 8,
            "hidden_size": 320,
            "intermediate_size": 856,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [3, 7],
        },
    },
    "tiny": {
        "text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 1000,
        },
        "vision": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
}


def write_encoder(folder: Path, family: str, size: str) -> None:
    """Write the configuration of an encoder, from which `load_classifier` makes random weights."""
    folder.mkdir(parents=True)
    ENCODERS[family](size).save_pretrained(folder)
    write_preprocessor(folder, HALF, SIDE)


def siglip(size: str) -> SiglipConfig:
    vision = TOWERS[size] | {"image_size": SIDE, "patch_size": 16}
    text = TOWERS[size] | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return SiglipConfig(vision_config=vision, text_config=text)


def resnet50(size: str) -> ResNetConfig:
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    return ResNetConfig(**({} if size == "full" else small))


def efficientnet_b0(size: str) -> EfficientNetConfig:
    width = 1.0 if size == "full" else 0.25
    return EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=0.2 if size == "tiny" else 1.0,
        image_size=SIDE,
        hidden_dim=int(1280 * width),
        dropout_rate=0.2,
    )


ENCODERS = {"siglip": siglip, "resnet50": resnet50, "efficientnet_b0": efficientnet_b0}


def make_reader(size: str, accelerator: Accelerator) -> Vlm:
    """Qwen2.5-VL with the phantoms' tokenizer, on the device, as `load_vlm` would load it."""
    tokenizer = train_bpe(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token = tokenizer.convert_tokens_to_ids
    text, vision = QWENS[size]["text"], QWENS[size]["vision"]
    head = text["hidden_size"] // text["num_attention_heads"]
    # A quarter, three eighths and three eighths of the frequencies: time, height, width.
    sections = [head // 8, 3 * head // 16, 3 * head // 16]
    config = Qwen2_5_VLConfig(
        text_config=text
        | {
            "rope_parameters": {"rope_type": "default", "mrope_section": sections},
            "eos_token_id": token("<|im_end|>"),
            "tie_word_embeddings": True,
        },
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.device(accelerator.device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=frozen_type(accelerator)
        ).eval()
    return Vlm(
        *(Source("random", "main", None), FAMILIES["qwen2_5_vl"], model, tokenizer),
        *(CHAT_TEMPLATE, HALF, SIDE, "bicubic"),
    )
