"""SamplingParams: vLLM's names and defaults, and an error for what cannot be meant."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from moecore import SamplingParams
from moecore.keywords import reject_unknown


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
    }


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("n", 0, "an integer >= 1"),
        ("n", True, "an integer >= 1"),
        ("n", 1.0, "an integer >= 1"),
        ("temperature", -0.1, "a number >= 0"),
        ("temperature", float("nan"), "a number >= 0"),
        ("temperature", float("inf"), "a number >= 0"),
        ("temperature", "hot", "a number >= 0"),
        ("top_p", 0.0, r"a number in \(0, 1\]"),
        ("top_p", 1.1, r"a number in \(0, 1\]"),
        ("top_k", -2, "an integer >= -1"),
        ("min_p", 1.5, r"a number in \[0, 1\]"),
        ("repetition_penalty", 0.0, "a number > 0"),
        ("seed", -1, r"an integer in \[0, 18446744073709551615\]"),
        ("seed", 2**64, r"an integer in \[0, 18446744073709551615\]"),
        ("stop", "", "a string or a list of strings, none empty"),
        ("stop", ["a", 3], "a string or a list of strings, none empty"),
        ("stop", 3, "a list of strings"),
        ("stop_token_ids", 3, "a list of token ids"),
        ("max_tokens", 0, "an integer >= 1"),
        ("min_tokens", 17, r"an integer in \[0, 16\]"),
        ("logprobs", -1, "an integer >= 0"),
    ],
)
def test_errors_name_argument_rule_and_value(argument, value, rule):
    got = repr(value).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=f"^SamplingParams: {argument} must be {rule}, got {got}$"):
        SamplingParams(**{argument: value})


def test_a_stop_token_id_must_be_one():
    with pytest.raises(ValueError, match=r"each of stop_token_ids must be an integer >= 0, got -1"):
        SamplingParams(stop_token_ids=[2, -1])


def test_min_tokens_has_no_limit_without_max_tokens():
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_an_unknown_argument_names_the_nearest():
    with pytest.raises(
        TypeError,
        match=r"^SamplingParams: unknown argument 'temprature'; did you mean 'temperature'\?$",
    ):
        SamplingParams(temprature=0.5)


def test_an_unknown_argument_like_nothing_lists_the_known():
    with pytest.raises(TypeError, match=r"^f: unknown argument 'xyz'; known arguments: a, b$"):
        reject_unknown("f", ["a", "xyz"], ["a", "b"])


def test_it_is_immutable_and_hashable():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1,)))


def test_copies_are_equal_and_replace_checks():
    params = SamplingParams(temperature=0.5, stop="x", seed=3)
    assert copy.deepcopy(params) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, seed=4) == SamplingParams(temperature=0.5, stop="x", seed=4)
    with pytest.raises(ValueError, match="n must be"):
        dataclasses.replace(params, n=0)


def test_numpy_scalars_become_python_numbers():
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), max_tokens=np.int32(4))
    assert [type(x) for x in (params.n, params.temperature, params.max_tokens)] == [int, float, int]


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (0.01, False)])
def test_a_temperature_of_zero_is_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy
