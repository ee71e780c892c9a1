"""Batches for models that answer questions: every image with as many questions about it as fit.

The questions share one sequence, so that the image's tokens are paid for once. Each of them sees
the image and itself only, at the positions that it has when it is asked alone: the loss is that of
single questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from pretraining.images import MIRRORED, REAL, SIDE, augment
from pretraining.turns import TaughtSet
from transformers import PreTrainedTokenizerFast

from llava_keeplora_recipes.rendered import RENDERED
from llava_keeplora_recipes.rendered_scenes import SCENES

PATCH, TEXT_BUDGET, LONGEST_ANSWER = 8, 72, 96
IMAGE = "<image>"

#: Relative frequency of each set in training.
SHARES = (
    dict.fromkeys(SCENES, 10.0)
    | dict.fromkeys(RENDERED, 1.7)
    | dict.fromkeys(REAL, 2.7)
    | {"easy-vqa": 10.0, "nlvr": 2.0, "flags-vqa": 1.0, "flags-captions": 1.0, "emoji-names": 2.0}
)


class Lessons:
    """Batches of images, each with as many of its turns as fit; a batch follows from (seed, step).

    Written for a LLaVA; what another model does otherwise, a subclass overrides.
    """

    def __init__(
        self, sets: list[TaughtSet], tokenizer: PreTrainedTokenizerFast, batch: int, seed: int
    ) -> None:
        self.tokenizer, self.batch, self.seed = tokenizer, batch, seed
        self.pixels = torch.cat([s.pixels for s in sets])
        self.shapes = [shape for s in sets for shape in s.shapes]
        tokens = cache(self.turn)
        self.turns = [[tokens(*turn) for turn in turns] for s in sets for turns in s.turns]
        share = torch.cat(
            [torch.full((len(s.turns),), SHARES[s.name] / len(s.turns), dtype=torch.float64) for s in sets]
        )
        self.share = share / share.sum()
        self.mirrored = torch.cat([torch.full((len(s.turns),), s.name in MIRRORED & set(REAL)) for s in sets])
        self.moved = torch.cat(
            [torch.full((len(s.turns),), s.name in REAL + ["digits", "emoji-names"]) for s in sets]
        )

    def prefix(self, index: int) -> tuple[list[int], torch.Tensor, int]:
        """Return the tokens up to an image's end, their positions (axes x tokens), and the next position."""
        image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        ids = self.tokenizer("USER: ").input_ids + [image] * (SIDE // PATCH) ** 2
        return ids, torch.arange(len(ids))[None], len(ids)

    def images(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return images, changed at random where that keeps what is true of them, as the model's inputs."""
        return {"pixel_values": augment(self.pixels[rows], self.mirrored[rows], self.moved[rows])}

    def turn(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return the tokens of a turn after the image, and how many of them are the question."""
        asked = self.tokenizer(f"\n{question} ASSISTANT:").input_ids
        said = [*self.tokenizer(f" {answer}").input_ids, self.tokenizer.eos_token_id]
        return asked + said[:LONGEST_ANSWER], len(asked)

    def __call__(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Return the parts of a step's batch, each of images with about the same number of tokens."""
        torch.manual_seed(self.seed * 1_000_003 + step)
        rng = np.random.default_rng([self.seed, step])
        chosen = torch.from_numpy(
            rng.choice(len(self.share), self.batch, replace=False, p=self.share.numpy())
        )
        plans = [self._plan(rng, self.turns[i]) for i in chosen.tolist()]
        order = np.argsort([sum(len(tokens) for tokens, _ in plan) for plan in plans], kind="stable")
        for part in np.array_split(order, max(1, self.batch // 32)):
            rows = chosen[torch.from_numpy(part)]
            yield self.images(rows) | self.pack(rows.tolist(), [plans[i] for i in part])

    def _plan(self, rng: np.random.Generator, turns: list) -> list:
        """Choose the task's own turn (one time in ten any), and others in random order while they fit."""
        first = rng.integers(len(turns)) if len(turns) > 1 and rng.random() < 0.1 else 0
        plan, used = [turns[first]], len(turns[first][0])
        for i in rng.permutation(len(turns)):
            if i != first and used + len(turns[i][0]) <= TEXT_BUDGET:
                plan.append(turns[i])
                used += len(turns[i][0])
        return plan

    def pack(self, indices: list[int], plans: list) -> dict[str, torch.Tensor]:
        """Token ids, positions, who sees whom, and labels (-100 where nothing is learned)."""
        prefixes = [self.prefix(index) for index in indices]
        width = max(
            len(ids) + sum(len(tokens) for tokens, _ in plan)
            for (ids, _, _), plan in zip(prefixes, plans, strict=True)
        )
        ids = torch.full((len(plans), width), self.tokenizer.pad_token_id)
        labels, turn = torch.full_like(ids, -100), torch.full_like(ids, -1)
        positions = torch.zeros(len(prefixes[0][1]), *ids.shape, dtype=torch.long)
        for row, ((begin, places, after), plan) in enumerate(zip(prefixes, plans, strict=True)):
            at = len(begin)
            ids[row, :at], turn[row, :at] = torch.tensor(begin), 0
            positions[:, row, :at] = places
            for number, (tokens, asked) in enumerate(plan, 1):
                place = slice(at, at + len(tokens))
                ids[row, place] = torch.tensor(tokens)
                positions[:, row, place] = after + torch.arange(len(tokens))
                turn[row, place] = number
                labels[row, at + asked : at + len(tokens)] = torch.tensor(tokens[asked:])
                at += len(tokens)
        # eager attention adds its mask: nothing where a token is seen, a large negative number elsewhere
        mine = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        return {
            "input_ids": ids,
            "position_ids": positions.squeeze(0),  # one axis has no dimension of its own
            "labels": labels,
            "attention_mask": torch.where(mine & causal, 0.0, -1e9)[:, None],
        }
