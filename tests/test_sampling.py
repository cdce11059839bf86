"""sample: the distribution it draws from, in float64, and that a row is on its own."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecore.draw import draw, top_ids
from moecore.sampling import RequestSampler, sample
from moecore.sampling_params import SamplingParams

VOCAB = 50
EOS = 7


def sampler(params=None, *, prompt=(1, 2, 3), seed=0, vocab_size=VOCAB, eos=(EOS,), name=None):
    return RequestSampler(
        SamplingParams() if params is None else params,
        prompt_token_ids=prompt,
        seed=seed,
        eos_token_ids=eos,
        vocab_size=vocab_size,
        request_id=name,
    )


def randn(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distribution(logits, params):
    """Probabilities of one row in float64, from the definitions."""
    logits = [float(x) for x in logits]
    exponents = [(x - max(logits)) / params.temperature for x in logits]
    weights = {i: math.exp(x) for i, x in enumerate(exponents)}
    kept = sorted(weights, key=lambda i: (-logits[i], i))
    kept = [i for i in kept if weights[i] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total = sum(weights[i] for i in kept)
    chosen, reached = [], 0.0
    for i in kept:
        chosen.append(i)
        reached += weights[i]
        if reached >= params.top_p * total:
            break
    return {i: weights[i] / reached for i in chosen if weights[i] > 0}


DISTRIBUTIONS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=5.0),
    "top_p": SamplingParams(top_p=0.8),
    "top_k": SamplingParams(top_k=3),
    "top_k-of-one": SamplingParams(top_k=1),
    "top_k-off": SamplingParams(top_k=-1),
    "top_k-past-the-vocabulary": SamplingParams(top_k=1000, top_p=0.99),
    "min_p": SamplingParams(min_p=0.05),
    "all": SamplingParams(temperature=1.7, min_p=0.01, top_k=9, top_p=0.7),
    "top_p-after-top_k": SamplingParams(temperature=3.0, top_k=20, top_p=0.5),
}


@pytest.mark.parametrize("vocab_size", [1, 9, 50])
@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_noise_hits_each_token_in_proportion_to_its_probability(device, params, vocab_size):
    num_points = 4000
    logits = randn(vocab_size)
    rows = logits.expand(num_points, vocab_size).contiguous().to(device)
    points = [(i + 0.5) / num_points for i in range(num_points)]

    got = draw(rows, [params] * num_points, points)

    want = distribution(logits, params)
    assert set(got) <= set(want)
    # Evenly spaced points count an interval's length to within one point; the interval's ends may
    # be off by float32's rounding, far less than another point.
    for token_id, probability in want.items():
        assert abs(got.count(token_id) - probability * num_points) <= 1.5


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_looks_past_its_first_candidates(device, top_p):
    params = SamplingParams(top_p=top_p, temperature=2.0)
    logits = randn(5000, scale=1.0)
    want = sorted(distribution(logits, params))
    assert len(want) > 256
    # The largest point below 1 hits the last token that top_p keeps.
    last = draw(logits[None].to(device), [params], [1 - 2**-53])
    tail = max(want, key=lambda i: (-float(logits[i]), i))
    assert last == [tail]


def test_equal_logits_rank_by_id(device):
    logits = torch.zeros(1, 600, device=device)
    assert top_ids(logits, 4).tolist() == [[0, 1, 2, 3]]
    assert draw(logits, [SamplingParams(top_k=3)], [0.999]) == [2]
    assert draw(logits, [SamplingParams(top_p=0.5)], [0.9999]) == [299]
    signed = torch.tensor([[-0.0, 0.0, -1.0, 0.0]], device=device)
    assert top_ids(signed, 4).tolist() == [[0, 1, 3, 2]]


def test_top_ids_orders_like_a_stable_sort(device):
    logits = randn(7, 300).round()
    logits[0, 5:40] = -torch.inf
    want = logits.sort(dim=-1, descending=True, stable=True).indices
    assert top_ids(logits.to(device), 300).tolist() == want.tolist()


def test_greedy_takes_the_first_of_the_largest(device):
    logits = randn(33, VOCAB).round().to(device)
    want = [row.index(max(row)) for row in logits.tolist()]
    got = sample(logits, [sampler(SamplingParams(temperature=0)) for _ in range(33)])
    assert [row.token_id for row in got] == want
    assert got[0].logprob is None
    assert got[0].top_logprobs is None


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 4.0]),
    top_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 4, 40]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    min_tokens=st.sampled_from([0, 2]),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 2**64 - 1),
)


def generate(samplers, logits_of_step):
    """Three tokens of each row: [step][row]."""
    steps = []
    for logits in logits_of_step:
        steps.append(sample(logits, samplers))
        for row, token in zip(samplers, steps[-1], strict=True):
            row.accept(token.token_id)
    return steps


@given(params=st.lists(PARAMS, min_size=1, max_size=9), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_the_others(params, seed):
    vocab_size = 301  # no multiple of a vector: rows of a batch begin at every alignment
    logits = [randn(len(params), vocab_size, seed=seed + step) for step in range(3)]

    def make(p):
        return sampler(p, seed=p.seed, vocab_size=vocab_size)

    together = generate([make(p) for p in params], logits)
    for row, p in enumerate(params):
        alone = generate([make(p)], [step[row : row + 1] for step in logits])
        assert [step[row] for step in together] == [step[0] for step in alone]


def test_tokens_are_the_same_on_every_device(device):
    logits = [randn(len(DISTRIBUTIONS), VOCAB, seed=step) for step in range(3)]
    params = [dataclasses.replace(p, logprobs=None) for p in DISTRIBUTIONS.values()]
    want = generate([sampler(p, seed=5) for p in params], logits)
    got = generate([sampler(p, seed=5) for p in params], [step.to(device) for step in logits])
    assert got == want


def test_a_seed_fixes_the_tokens_and_seeds_differ():
    logits = [randn(3, VOCAB, seed=2, scale=0.1).expand(3, VOCAB)] * 20
    steps = generate([sampler(seed=1), sampler(seed=1), sampler(seed=2)], logits)
    columns = list(zip(*[[t.token_id for t in step] for step in steps], strict=True))
    first = generate([sampler(seed=1)], [step[:1] for step in logits])
    assert list(columns[0]) == [step[0].token_id for step in first]
    flat = [torch.zeros(3, VOCAB)] * 20
    steps = generate([sampler(seed=1), sampler(seed=1), sampler(seed=2)], flat)
    columns = list(zip(*[[t.token_id for t in step] for step in steps], strict=True))
    assert columns[0] == columns[1] != columns[2]
    assert len(set(columns[0])) > 10  # each token draws new noise


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bars_the_ends_until_reached(device, temperature):
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 9]] = torch.tensor([60.0, 50.0])
    logits[0, 4] = 30.0
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=[9])
    steps = generate([sampler(params)], [logits.to(device)] * 3)
    assert [step[0].token_id for step in steps] == [4, 4, EOS]


def test_repetition_penalty_counts_prompt_and_completion(device):
    # Each penalised once: 4 -> 2, 3 -> 1.5 when seen, -1 -> -2.
    logits = torch.full((1, 5), -1.5)
    logits[0, :3] = torch.tensor([4.0, 3.0, 2.5])
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    row = sampler(params, prompt=[0, 0], vocab_size=5, eos=())
    steps = generate([row], [logits.to(device)] * 4)
    assert [step[0].token_id for step in steps] == [1, 2, 0, 0]
    assert logits[0, 0] == 4.0  # the caller's logits stay

    negative = torch.tensor([[-1.0, -1.5]], device=device)
    row = sampler(params, prompt=[0], vocab_size=2, eos=())
    assert sample(negative, [row])[0].token_id == 1


def test_logprobs_are_of_the_raw_logits(device):
    logits = randn(2, VOCAB, seed=4)
    want = logits.double().log_softmax(dim=-1)
    params = SamplingParams(
        temperature=5.0, repetition_penalty=1.5, min_p=0.3, top_k=30, logprobs=4
    )
    for row, token in enumerate(sample(logits.to(device), [sampler(params), sampler(params)])):
        order = logits[row].argsort(descending=True).tolist()
        expected = list(dict.fromkeys([token.token_id, *order[:4]]))
        assert list(token.top_logprobs) == expected
        for token_id, entry in token.top_logprobs.items():
            assert entry.rank == order.index(token_id) + 1
            # log_softmax in float32: a sum of 50 positive terms, exp and log, below 64 eps of
            # values whose size is below 32.
            assert abs(entry.logprob - float(want[row, token_id])) < 64 * 2**-23 * 32
        assert token.logprob == token.top_logprobs[token.token_id].logprob


def test_logprobs_of_zero_give_the_chosen_token_only():
    greedy, drawn = SamplingParams(temperature=0, logprobs=0), SamplingParams(logprobs=100)
    got = sample(randn(2, VOCAB), [sampler(greedy), sampler(drawn)])
    assert list(got[0].top_logprobs) == [got[0].token_id]
    assert got[0].top_logprobs[got[0].token_id].rank == 1
    assert len(got[1].top_logprobs) == VOCAB


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams()])
def test_a_bad_logit_names_its_request(device, value, params):
    logits = randn(3, VOCAB).to(device)
    logits[1, 5] = value
    rows = [sampler(params, seed=1, name=f"request-{i}") for i in range(3)]
    with pytest.raises(ValueError, match=rf"logits of request 'request-1' must .* got .*{value}"):
        sample(logits, rows)
    # Nothing was drawn: the same noise comes next.
    logits[1, 5] = 0.0
    again = sample(logits, rows)
    assert again == sample(logits, [sampler(params, seed=1) for _ in range(3)])


def test_a_row_without_a_finite_logit_is_refused():
    logits = torch.full((1, VOCAB), -torch.inf)
    with pytest.raises(ValueError, match="logits of row 0 must be finite or -inf"):
        sample(logits, [sampler()])
    only_end = logits.clone()
    only_end[0, EOS] = 1.0
    with pytest.raises(ValueError, match="one of them finite"):
        sample(only_end, [sampler(SamplingParams(min_tokens=1))])


def test_tokens_of_minus_infinity_are_never_drawn(device):
    logits = torch.full((2, VOCAB), -torch.inf, device=device)
    logits[:, 3] = -5.0
    rows = [sampler(SamplingParams(temperature=9.0, top_p=0.5)), sampler()]
    assert [token.token_id for token in sample(logits, rows)] == [3, 3]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, VOCAB), r"must be float32 \[1, V\], got torch.float32 \[2, 50\]"),
        (torch.zeros(VOCAB), r"got torch.float32 \[50\]"),
        (torch.zeros(1, VOCAB, dtype=torch.bfloat16), r"got torch.bfloat16 \[1, 50\]"),
        (torch.zeros(1, VOCAB + 1), "must have 50 columns, got 51"),
    ],
    ids=["rows", "dimensions", "dtype", "columns"],
)
def test_logits_that_do_not_fit_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        sample(logits, [sampler()])


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"prompt_token_ids must be in \[0, 50\), got 50"):
        sampler(prompt=[50])
    with pytest.raises(ValueError, match=r"stop_token_ids must be in \[0, 50\), got 99"):
        sampler(SamplingParams(stop_token_ids=[99]))


def test_no_rows_give_no_tokens():
    assert sample(torch.zeros(0, VOCAB), []) == []


def test_noise_is_the_generators_numbers_one_by_one():
    row, generator = sampler(seed=5), torch.Generator().manual_seed(5)
    one_by_one = [
        float(torch.rand((), dtype=torch.float64, generator=generator)) for _ in range(100)
    ]
    assert [row.draw_uniform() for _ in range(100)] == one_by_one
