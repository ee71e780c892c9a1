"""Batches of conversations for a model that writes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llava_keeplora_eval.chat import Encoding
from llava_keeplora_eval.image_inputs import joined
from llava_keeplora_eval.llava import batched_tokens

IGNORE = -100  # the label of a token that is not learned, as everywhere in transformers


def collate_turns(
    turns: Sequence[Encoding], images: Sequence[Mapping[str, Tensor]], pad_id: int
) -> dict[str, Tensor]:
    """Return a batch, padded on the right.

    Args:
        turns: the conversations.
        images: what the model takes for the images of each.
        pad_id: fills up `input_ids`.

    Returns:
        `input_ids`, `attention_mask`, `labels` and the other inputs of tokens (batch, tokens), and those of
        the images. `labels` are the ids of the answers' tokens and `IGNORE` elsewhere. `image_rows` (batch,
        keys of the images in alphabetical order) says how many rows of each key belong to each example.
    """
    tokens, batch = batched_tokens(turns, pad_id), joined(images)
    labels = torch.full_like(tokens["input_ids"], IGNORE)
    for row, turn in enumerate(turns):
        for start, end in turn.learned_spans:
            labels[row, start:end] = tokens["input_ids"][row, start:end]
    rows = [[len(item[key]) if key in item else 0 for key in sorted(batch)] for item in images]
    return {**tokens, "labels": labels, "image_rows": torch.tensor(rows, dtype=torch.long), **batch}
