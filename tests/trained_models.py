"""The tiny models, trained until no rounding can change a greedy token or a route.

A random model has near ties: a last bit anywhere may then choose another token or another expert,
which says nothing of who rounded better. These models have memorised a few sequences, with every
route separated from the next best, so that any correct implementation must give the same tokens.
All of the memory is in the experts: attention, embeddings and head stay random.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch.nn import functional

import oracle
import tiny_models
from tiny_models import EXPERTS, HIDDEN, MODELS, TOP_K, VOCAB

PROMPT_LENGTHS = (12, 7, 9)
NUM_NEW_TOKENS = 64
_NUM_STEPS, _LEARNING_RATE = 70, 1e-2
_TRAINED = (".experts.", ".gate.", ".router.", "norm")
# Least distance of the chosen experts from the others. A bfloat16 router logit of size 2 is off by
# some eps = 2**-7 times that. A sigmoid's slope is at most 1 / 4.
_LOGIT_MARGIN, _SIGMOID_MARGIN = 0.5, 0.125


class Trained(NamedTuple):
    name: str
    model: Any  # float32: tests take copies
    sequences: dict[str, torch.Tensor]  # prompts, padded on the left, and what follows them

    def copy(self, dtype: torch.dtype) -> Any:
        return copy.deepcopy(self.model).to(dtype)

    @property
    def prompts(self) -> dict[str, torch.Tensor]:
        return {key: value[:, : max(PROMPT_LENGTHS)] for key, value in self.sequences.items()}


def train(name: str) -> Trained:
    """Train the family's tiny model; the same weights at every call on one machine."""
    model = tiny_models.build(name)
    model.set_experts_implementation("grouped_mm")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in key for part in _TRAINED))
    sequences = _sequences()
    ids, mask = sequences["input_ids"], sequences["attention_mask"]
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as generate() numbers them
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=_NUM_STEPS, pct_start=0.2
    )
    with _RouterInputs(model) as routers:
        assert len(routers.hooks) == MODELS[name].num_moe_layers
        for _ in range(_NUM_STEPS):
            routers.inputs.clear()
            logits = model(**sequences, position_ids=position_ids).logits
            following = logits[:, -NUM_NEW_TOKENS - 1 : -1].flatten(0, 1)
            loss = functional.cross_entropy(following, ids[:, -NUM_NEW_TOKENS:].flatten())
            margin, gaps = _route_gaps(name, routers.inputs, mask)
            optimizer.zero_grad()
            (loss + 2 * functional.relu(1 - gaps / margin).mean()).backward()
            optimizer.step()
            schedule.step()
    assert loss < 0.05, f"{name} has not memorised its sequences: loss {loss:.3g}"
    assert gaps.min() > margin / 2, f"{name} has routes that are {gaps.min():.3g} apart"
    return Trained(name, model.requires_grad_(False), sequences)


def _sequences() -> dict[str, torch.Tensor]:
    """Sequences of tokens in a random order: what follows a token depends on the sequence."""
    generator = torch.Generator().manual_seed(5)
    width = max(PROMPT_LENGTHS) + NUM_NEW_TOKENS
    ids = torch.zeros(len(PROMPT_LENGTHS), width, dtype=torch.long)
    for row, length in zip(ids, PROMPT_LENGTHS, strict=True):
        length += NUM_NEW_TOKENS
        row[-length:] = 1 + torch.randperm(VOCAB - 1, generator=generator)[:length]
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


class _RouterInputs:
    """Collects (router, its input) of every call while it is entered."""

    def __init__(self, model: Any) -> None:
        self.inputs: list[tuple[Any, torch.Tensor]] = []
        self.hooks = [
            module.register_forward_pre_hook(
                lambda module, args: self.inputs.append((module, args[0]))
            )
            for module in model.modules()
            if getattr(getattr(module, "weight", None), "shape", None) == (EXPERTS, HIDDEN)
        ]

    def __enter__(self) -> _RouterInputs:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _route_gaps(
    name: str, inputs: list[tuple[Any, torch.Tensor]], mask: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """(wanted margin, distance of the last chosen expert and group from the best dropped one)."""
    routing = MODELS[name].routing
    gaps = []
    for router, x in inputs:
        tokens = x.reshape(-1, HIDDEN)[mask.flatten().bool()]
        logits = functional.linear(tokens, router.weight, getattr(router, "bias", None))
        bias = getattr(router, "e_score_correction_bias", None)
        choice, group_score = oracle.choices(logits, selection_bias=bias, **routing)
        if group_score is not None:
            topk_group = routing["topk_group"]
            ranked = group_score.sort(dim=1, descending=True)
            gaps.append(ranked.values[:, topk_group - 1] - ranked.values[:, topk_group])
            kept = torch.zeros_like(group_score).scatter(1, ranked.indices[:, :topk_group], 1.0)
            is_kept = kept.bool().repeat_interleave(EXPERTS // kept.shape[1], dim=1)
            choice = choice.masked_fill(~is_kept, -1.0)
        best = choice.sort(dim=1, descending=True).values
        gaps.append(best[:, TOP_K - 1] - best[:, TOP_K])
    margin = _SIGMOID_MARGIN if routing else _LOGIT_MARGIN
    return margin, torch.stack(gaps)
