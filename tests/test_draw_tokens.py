"""The core's draw_tokens: integer weights in float64, ties, and what it refuses."""

import math
import re

import pytest
import torch

from moecore import _core

VOCABS = [1, 15, 16, 17, 4095, 4096, 4097, 9000]


def randn(*shape, seed=0):
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(logits, device, temperature=1.0, min_p=0.0, noise=0.0):
    rows = [float(x) for x in torch.as_tensor(noise, dtype=torch.float64).expand(len(logits))]
    same = [[value] * len(logits) for value in (temperature, min_p)]
    return _core.draw_tokens(logits.to(device), *same, rows)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_noise_falls_into_the_token_that_float64_gives(device, vocab_size):
    logits = randn(1, vocab_size)
    weights = (logits[0].double() - logits.max().double()).div(0.7).exp()
    sums = weights.cumsum(0) / weights.sum()
    # The middle of a token's share is far from its ends, next to float32's rounding of the weights.
    likely = weights.topk(min(9, vocab_size)).indices
    points = [float(sums[i] - weights[i] / weights.sum() / 2) for i in likely]
    rows = logits.expand(len(points), vocab_size).contiguous()
    token_ids, maxima = draw(rows, device, temperature=0.7, noise=points)
    assert token_ids == likely.tolist()
    assert maxima == [float(logits.max())] * len(points)


def test_the_ends_of_the_noise_are_the_first_and_last_token_with_a_weight(device):
    logits = randn(2, 5000)
    logits[:, :3] = -torch.inf
    logits[:, 4990:] = -1e4
    token_ids, _ = draw(logits, device, noise=[0.0, math.nextafter(1.0, 0.0)])
    assert token_ids == [3, 4989]


def test_min_p_bars_the_unlikely(device):
    logits = torch.tensor([[0.0, -1.0, -2.0, 0.0]]).repeat(200, 1)
    points = [i / 200 for i in range(200)]
    assert set(draw(logits, device, min_p=math.exp(-1.5), noise=points)[0]) == {0, 1, 3}
    assert set(draw(logits, device, min_p=1.0, noise=points)[0]) == {0, 3}


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_temperature_0_takes_the_first_of_the_largest(device, vocab_size):
    logits = randn(40, vocab_size).round()
    logits[1] = -0.0
    logits[1, -1] = 0.0
    token_ids, maxima = draw(logits, device, temperature=0.0)
    assert token_ids == [row.index(max(row)) for row in logits.tolist()]
    assert maxima == logits.amax(1).tolist()


@pytest.mark.parametrize("place", [0, 7, 4096, 8998])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_maximum_tells_what_is_not_finite(device, place, value):
    logits = randn(3, 9000)
    logits[1, place] = value
    for temperature in (0.0, 1.0):
        token_ids, maxima = draw(logits, device, temperature=temperature)
        assert token_ids[1] == 0
        assert str(maxima[1]) == str(float(value))
        assert math.isfinite(maxima[0])
        assert math.isfinite(maxima[2])
    assert draw(torch.full((1, 20), -torch.inf), device)[1] == [-math.inf]


def test_rows_do_not_depend_on_each_other(device):
    logits, points = randn(64, 1000), torch.rand(64, generator=torch.Generator().manual_seed(1))
    want, _ = draw(logits, device, noise=points)
    for n in (0, 13, 63):
        assert draw(logits[n : n + 1], device, noise=points[n])[0] == [want[n]]
    wide = torch.zeros(64, 1003, device=device)
    wide[:, 1:1001] = logits
    assert draw(wide[:, 1:1001], device, noise=points)[0] == want


@pytest.mark.parametrize("vocab_size", [*VOCABS, 151936])
def test_every_device_draws_the_same_tokens(device, vocab_size):
    rows, points = randn(32, vocab_size), torch.rand(32, generator=torch.Generator().manual_seed(1))
    for options in ({}, {"temperature": 0.3, "min_p": 0.05}, {"temperature": 5.0}):
        assert draw(rows, device, noise=points, **options) == draw(
            rows, "cpu", noise=points, **options
        )


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((randn(2, 9).double(), [1.0] * 2, [0.0] * 2, [0.0] * 2), "logits must be"),
        ((randn(9), [1.0], [0.0], [0.0]), "logits must have shape [any, any]"),
        ((randn(9, 2).mT, [1.0] * 2, [0.0] * 2, [0.0] * 2), "logits must have contiguous rows"),
        ((randn(2, 0), [1.0] * 2, [0.0] * 2, [0.0] * 2), "logits must have 1 to 4194304 columns"),
        ((randn(2, 9), [1.0], [0.0], [0.0]), "params must be one a row, 2, got 1"),
        ((randn(1, 9), [1.0], [0.0], []), "temperature, min_p and noise must be as many"),
        ((randn(1, 9), [-1.0], [0.0], [0.0]), "temperature must be finite and >= 0, got -1"),
        ((randn(1, 9), [math.inf], [0.0], [0.0]), "temperature must be finite"),
        ((randn(1, 9), [1.0], [1.5], [0.0]), "min_p must be in [0, 1], got 1.5 in row 0"),
        ((randn(1, 9), [1.0], [0.0], [1.0]), "noise must be in [0, 1), got 1 in row 0"),
        ((randn(1, 9), [1.0], [0.0], [math.nan]), "noise must be in [0, 1), got nan"),
        ((None, [1.0], [0.0], [0.0]), "logits must be a tensor"),
    ],
)
def test_a_bad_argument_is_named(arguments, rule):
    with pytest.raises((ValueError, TypeError), match=re.escape(rule)):
        _core.draw_tokens(*arguments)
