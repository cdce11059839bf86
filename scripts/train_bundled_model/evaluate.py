"""Validation loss, expert load and samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from model import Qwen3Moe
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

PROMPTS = (
    "Once upon a time",
    "There was once a poor woodcutter who lived",
    '"I am not afraid of the dragon," said the little princess',
    "The old house stood at the end of the lane, and",
    "One cold winter evening, when the snow lay deep upon the ground,",
)
ROWS = 32  # windows a batch


@torch.inference_mode()
def validate(model: Qwen3Moe, tokens: Tensor, num_bytes: int, context: int) -> dict[str, Any]:
    """Losses on consecutive windows of `context` tokens, each without sight of those before it.

    tokens: [n], all of which but the first are predicted; num_bytes: of their text. The per-byte
    figures do not depend on the tokenizer: end-of-document tokens are predicted, but add no bytes.
    """
    was_training = model.training
    model.eval()
    inputs, targets = tokens[:-1], tokens[1:]
    whole = len(inputs) // context * context
    pieces = [
        *zip(
            inputs[:whole].view(-1, context).split(ROWS),
            targets[:whole].view(-1, context).split(ROWS),
            strict=True,
        )
    ]
    if whole < len(inputs):
        pieces.append((inputs[None, whole:], targets[None, whole:]))
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    load = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for x, y in pieces:
        output = model(x)
        losses = F.cross_entropy(output.logits.flatten(0, 1).float(), y.flatten(), reduction="none")
        total += losses.double().sum()
        load = load + output.load.double() * x.numel()
    model.train(was_training)
    nats_per_byte = total.item() / num_bytes
    return {
        "loss_per_token": total.item() / len(targets),
        "nats_per_byte": nats_per_byte,
        "bits_per_byte": nats_per_byte / math.log(2),
        "perplexity_per_byte": math.exp(nats_per_byte),
        "expert_load": (load / len(inputs)).tolist(),
    }


@torch.inference_mode()
def sample(
    model: Qwen3Moe,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> str:
    """The prompt and what the model writes after it, up to the end of the document.

    Runs the whole sequence for every token: short, and fast enough for a few samples.
    """
    model.eval()
    device = model.embedding.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    end = tokenizer.token_to_id("<|endoftext|>")
    for _ in range(num_tokens):
        context = ids[:, -model.config.max_position_embeddings :]
        logits = model(context).logits[0, -1].float() / temperature
        probabilities, order = logits.softmax(-1).sort(descending=True)
        # The smallest set that holds top_p: a token stays while those before it hold less.
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
        chosen = order[torch.multinomial(probabilities, 1, generator=generator)]
        if chosen.item() == end:
            break
        ids = torch.cat((ids, chosen[None]), dim=1)
    return tokenizer.decode(ids[0].tolist())
