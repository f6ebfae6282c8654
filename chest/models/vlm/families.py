"""Families of vision-language models: what one has to know of each to ask it.

Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923), Qwen3-VL (Bai et al. 2025, arXiv:2511.21631), and
Gemma 3 (Gemma Team 2025, arXiv:2503.19786), whose medical version is MedGemma (Sellergren et al.
2025, arXiv:2507.05201). Images are resized, cut and ordered on the device just as the family's own
PIL processor does it, which is a hundred times as fast.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

Mask = torch.Tensor | dict[str, torch.Tensor]  # bool (1, 1, L, K); for Gemma by type of layer


class Family(Protocol):
    """A family of checkpoints; `config` is always the checkpoint's, of the class ``config``.

    ``vision``: where the vision tower is; ``merger``: what is between it and the language model;
    ``idle``: what of it the model does not use. ``token_types``: the argument of the model that
    marks image tokens.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: type
    vision: str
    merger: tuple[str, ...]
    idle: tuple[str, ...]
    token_types: str

    def side(self, processor, side: int) -> int:
        """Return the side in px to which an image of `side` px is resized."""

    def image_tokens(self, config: PreTrainedConfig, side: int) -> int:
        """Return how many tokens a resized image of `side` px becomes."""

    def place_image(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, tokens: int
    ) -> tuple[str, str]:
        """Return what the chat template writes for an image, and what is read in its place."""

    def cut(self, config: PreTrainedConfig, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vision tower's inputs for normalized `pixels`, (B, 3, side, side)."""

    def positions(self, model: PreTrainedModel, ids: torch.Tensor, side: int) -> torch.Tensor:
        """Return the positions of a prompt's tokens `ids`, (1, L): (1, L) or (axes, 1, L)."""

    def mask(
        self, config: PreTrainedConfig, seen: torch.Tensor, ids: torch.Tensor, at: torch.Tensor
    ) -> Mask:
        """Return the attention mask of tokens `ids`, (L,), at positions `at`, (L,).

        `seen`, bool (L, L), says which tokens each may attend to in a causal model.
        """


@dataclass(frozen=True)
class Qwen:
    """Qwen2.5-VL and Qwen3-VL: positions in time, height and width; causal attention."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: type = Qwen2VLImageProcessorPil
    vision: str = "model.visual."
    merger: tuple[str, ...] = ("model.visual.merger.", "model.visual.deepstack_merger_list.")
    idle: tuple[str, ...] = ()
    token_types: str = "mm_token_type_ids"

    def side(self, processor: Qwen2VLImageProcessorPil, side: int) -> int:
        limits = {"min_pixels": processor.size.shortest_edge}
        limits["max_pixels"] = processor.size.longest_edge
        return smart_resize(side, side, processor.patch_size * processor.merge_size, **limits)[0]

    def image_tokens(self, config: PreTrainedConfig, side: int) -> int:
        vision = config.vision_config
        return (side // (vision.patch_size * vision.spatial_merge_size)) ** 2

    def place_image(self, tokenizer, config: PreTrainedConfig, tokens: int) -> tuple[str, str]:
        image = tokenizer.convert_ids_to_tokens(config.image_token_id)
        return image, image * tokens

    def cut(self, config: PreTrainedConfig, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """``pixel_values``: (B * patches, channels * frames * patch * patch), in blocks of the
        2 x 2 patches that become one token. ``image_grid_thw``: (B, 3)."""
        vision = config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        frames = vision.temporal_patch_size
        count, channels, side, _ = pixels.shape
        blocks = side // (patch * merge)
        cut = pixels.view(count, channels, blocks, merge, patch, blocks, merge, patch)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, block, patch in it, channel, pixels
        cut = cut.unsqueeze(6).expand(*cut.shape[:6], frames, patch, patch)  # a video of 2 frames
        return {
            "pixel_values": cut.reshape(-1, channels * frames * patch * patch),
            "image_grid_thw": self._grid(config, side, pixels.device).expand(count, -1),
        }

    def positions(self, model: PreTrainedModel, ids: torch.Tensor, side: int) -> torch.Tensor:
        is_image = (ids == model.config.image_token_id).int()
        grid = self._grid(model.config, side, ids.device)
        return model.model.get_rope_index(ids, is_image, image_grid_thw=grid)[0]

    def mask(
        self, config: PreTrainedConfig, seen: torch.Tensor, ids: torch.Tensor, at: torch.Tensor
    ) -> Mask:
        return seen[None, None]

    def _grid(self, config: PreTrainedConfig, side: int, device: torch.device) -> torch.Tensor:
        """Return an image's number of frames and of patches down and across, (1, 3)."""
        patches = side // config.vision_config.patch_size
        return torch.tensor([[1, patches, patches]], device=device)


@dataclass(frozen=True)
class Gemma:
    """Gemma 3 and MedGemma: image tokens attend to each other; most layers have a window."""

    config: type[PreTrainedConfig] = Gemma3Config
    model: type[PreTrainedModel] = Gemma3ForConditionalGeneration
    processor: type = Gemma3ImageProcessorPil
    vision: str = "model.vision_tower."
    merger: tuple[str, ...] = ("model.multi_modal_projector.",)
    idle: tuple[str, ...] = ("model.vision_tower.head.",)
    token_types: str = "token_type_ids"

    def side(self, processor: Gemma3ImageProcessorPil, side: int) -> int:
        return processor.size.height

    def image_tokens(self, config: PreTrainedConfig, side: int) -> int:
        return config.mm_tokens_per_image

    def place_image(self, tokenizer, config: PreTrainedConfig, tokens: int) -> tuple[str, str]:
        ids = [config.boi_token_index, config.image_token_index, config.eoi_token_index]
        start, image, end = tokenizer.convert_ids_to_tokens(ids)
        return start, f"\n\n{start}{image * tokens}{end}\n\n"

    def cut(self, config: PreTrainedConfig, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels}

    def positions(self, model: PreTrainedModel, ids: torch.Tensor, side: int) -> torch.Tensor:
        return torch.arange(ids.shape[1], device=ids.device)[None]

    def mask(
        self, config: PreTrainedConfig, seen: torch.Tensor, ids: torch.Tensor, at: torch.Tensor
    ) -> Mask:
        image = ids == config.image_token_index
        full = seen | (image[:, None] & image[None])
        near = at[:, None] - at[None] < config.text_config.sliding_window
        masks = {"full_attention": full, "sliding_attention": full & near}
        return {name: mask[None, None] for name, mask in masks.items()}


# By the model_type of config.json.
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": Qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "gemma3": Gemma(),
}
