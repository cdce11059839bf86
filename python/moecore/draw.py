"""One token from each row of logits: temperature, min_p, top_k, top_p, and a number of noise.

N rows, V vocab_size. Likelihoods become integer weights before they are summed: integers add up to
the same number in every order, so no other row, tile or device changes which token a number hits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecore import _core
from moecore.sampling_params import SamplingParams

# The likeliest token weighs 2**40: 2**22 tokens then sum to at most 2**62, and what is less likely
# than the likeliest by more than 2**-40 is never drawn.
_WEIGHT_OF_LIKELIEST = 2.0**40
# top_p ranks this many of the likeliest tokens, and so many times more while they do not reach it.
_FIRST_CANDIDATES = 256
_MORE_CANDIDATES = 16


def draw(logits: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]) -> list[int]:
    """Draw a token from each row.

    Equal logits rank in the order of their ids: top_k keeps exactly k tokens, and top_p the fewest.

    Args:
        logits: [N, V] float32, finite or -inf, at least one finite in a row; V <= 2**22.
        params: of the N rows, none greedy.
        noise: N numbers in [0, 1).

    Returns:
        N token ids.
    """
    tokens = [0] * len(params)
    ranked = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    whole = [i for i, p in enumerate(params) if not (p.top_k > 0 or p.top_p < 1.0)]
    for rows, draw_rows in ((whole, _draw_whole), (ranked, _draw_ranked)):
        if rows:
            chosen = [params[i] for i in rows], [noise[i] for i in rows]
            for i, token in zip(rows, draw_rows(take_rows(logits, rows), *chosen), strict=True):
                tokens[i] = token
    return tokens


def argmax(logits: Tensor) -> tuple[list[int], list[float]]:
    """The first of each row's largest logits [N, V], and that logit; NaN if the row holds one."""
    zeros = [0.0] * logits.shape[0]
    return _core.draw_tokens(logits, zeros, zeros, zeros)


def top_ids(logits: Tensor, k: int) -> Tensor:
    """The ids of the k largest logits [N, V], largest first, equals by id. Returns [N, k] int64."""
    vocab_size = logits.shape[1]
    # One int64 a token, no two alike in a row: by logit, then by id from the last to the first.
    # + 0.0 makes -0.0 equal to 0.0; the bits of negative floats order backwards.
    bits = (logits + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (order << 32) | torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    return vocab_size - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def take_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """The rows of a tensor, which is not copied where they are all of its rows in order."""
    return tensor if len(rows) == tensor.shape[0] else tensor[rows]


def _weights(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Likelihoods at the row's temperature, 0 below min_p. Returns [N, V] int64."""
    temperature = torch.tensor([p.temperature for p in params]).to(logits.device)[:, None]
    # The likeliest token's exponent is 0 at any temperature: the largest logit goes first.
    likelihood = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if any(p.min_p > 0 for p in params):
        min_p = torch.tensor([p.min_p for p in params]).to(logits.device)[:, None]
        likelihood.masked_fill_(likelihood < min_p, 0.0)
    return likelihood.mul_(_WEIGHT_OF_LIKELIEST).long()


def _draw_whole(
    logits: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]
) -> list[int]:
    """Draw from all tokens of each row."""
    temperature, min_p = [p.temperature for p in params], [p.min_p for p in params]
    return _core.draw_tokens(logits, temperature, min_p, list(noise))[0]


def _draw_ranked(
    logits: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]
) -> list[int]:
    """Draw from each row's top_k tokens, and of these from those that reach top_p."""
    weights = _weights(logits, params)
    vocab_size = logits.shape[1]
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    width = max([k for k in top_k if k < vocab_size], default=0)
    width = min(max(width, _FIRST_CANDIDATES), vocab_size)
    limit = torch.tensor(top_k).to(logits.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64).to(logits.device)[:, None]
    while True:
        ids = top_ids(logits, width)
        rank = torch.arange(width, device=logits.device)
        sums = weights.gather(1, ids).masked_fill_(rank >= limit, 0).cumsum(dim=-1)
        # A row without top_k (every other limit is <= width) counts what lies beyond, too.
        total = torch.where(limit <= width, sums[:, -1:], weights.sum(dim=-1, keepdim=True))
        needed = (total * top_p).ceil().long().clamp(min=1).minimum(total)
        if width == vocab_size or bool((sums[:, -1:] >= needed).all()):
            break
        width = min(width * _MORE_CANDIDATES, vocab_size)
    reaches_top_p = torch.searchsorted(sums, needed)
    kept = sums.minimum(sums.gather(1, reaches_top_p))
    hits = _hit(kept, _column(noise, logits))[:, None]
    return [int(token) for token in ids.gather(1, hits)[:, 0].tolist()]


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).to(like.device)[:, None]


def _hit(sums: Tensor, point: Tensor) -> Tensor:
    """Where points [N, 1] in [0, 1) fall among running sums of weights [N, V]. Returns [N]."""
    total = sums[:, -1:]
    target = (total * point).long().minimum(total - 1)
    return torch.searchsorted(sums, target, right=True)[:, 0]
