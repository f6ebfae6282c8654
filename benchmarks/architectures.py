"""The study's models from their configurations, with random weights: speed does not depend on them.

``full`` are google/siglip-base-patch16-224 and Qwen/Qwen2.5-VL-3B-Instruct; ``small`` the same
architectures of a size that a CPU can time in a minute, ``tiny`` in a moment.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from chest.core.labels import LABELS
from chest.models.common.checkpoints import Source
from chest.models.common.pixels import Normalization
from chest.models.qwen import QwenModel

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


def make_classifier(size: str) -> SiglipForImageClassification:
    """The vision tower with a 3-class head, on the CPU, float32."""
    vision = TOWERS[size] | {"image_size": SIDE, "patch_size": 16, "vision_use_head": False}
    return SiglipForImageClassification(SiglipConfig(vision_config=vision, num_labels=len(LABELS)))


def make_siglip(size: str) -> SiglipModel:
    """Both towers, on the CPU, float32."""
    vision = TOWERS[size] | {"image_size": SIDE, "patch_size": 16}
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=TOWERS[size])).eval()


def make_reader(size: str, accelerator: Accelerator) -> QwenModel:
    """Qwen2.5-VL with the phantoms' tokenizer, on the device, as `load_qwen` would load it.

    In bf16 where matrix products are, else float32.
    """
    tokenizer = train_bpe()
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
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    with torch.device(accelerator.device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    return QwenModel(Source("random", "main", None), model, tokenizer, CHAT_TEMPLATE, HALF, SIDE)
