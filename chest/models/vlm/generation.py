"""Free text of a vision-language model, and the class that it names."""

import re
from collections.abc import Mapping, Sequence

import torch

from chest.models.vlm.model import Vlm, image_inputs, prompt_ids


@torch.inference_mode()
def generate_answers(
    vlm: Vlm, images: torch.Tensor | None, question: str, max_new_tokens: int
) -> list[str]:
    """Return the model's answer to `question` for uint8 grey `images`, by greedy decoding.

    `images` is None for a question without image, which has one answer.
    """
    count = 1 if images is None else len(images)
    ids = torch.tensor([prompt_ids(vlm, question, images is not None)], device=vlm.model.device)
    inputs = {}
    if images is not None:
        is_image = (ids == vlm.config.image_token_id).int()
        inputs = image_inputs(vlm, images)
        inputs[vlm.family.token_types] = is_image.expand(count, -1)
    ids = ids.expand(count, -1)
    output = vlm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        **inputs,
    )
    texts = vlm.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def parse_answer(text: str, answers: Mapping[str, Sequence[str]]) -> str | None:
    """Return the class of which `text` names an answer; None if it names none, or several classes.

    `answers` maps each class to its answers. Case and punctuation do not count (COVID-19, covid
    19); an answer inside a longer word (abnormal) is not named.
    """
    named = [label for label, own in answers.items() if any(_names(text, x) for x in own)]
    return named[0] if len(named) == 1 else None


def _names(text: str, answer: str) -> bool:
    parts = re.findall(r"[^\W\d_]+|\d+", answer)
    pattern = r"(?<![^\W_])" + r"[\W_]*".join(map(re.escape, parts)) + r"(?![^\W_])"
    return re.search(pattern, text, re.IGNORECASE) is not None
