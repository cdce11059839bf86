"""The transformers integration, on tiny random models, against transformers' own eager experts."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moecore

transformers = pytest.importorskip("transformers", minversion="5.20")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import (  # noqa: E402
    ALL_EXPERTS_FUNCTIONS,
    use_experts_implementation,
)

from moecore.integrations import transformers as integration  # noqa: E402

HIDDEN, INNER, EXPERTS, TOP_K, VOCAB = 64, 48, 8, 3, 128

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GLM_LIKE = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INNER,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
}
# Name: (settings beyond _COMMON, number of MoE layers).
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Mixtral": ({"num_local_experts": EXPERTS}, 3),
    "Olmoe": ({"num_experts": EXPERTS}, 3),
    "Qwen2Moe": (
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "shared_expert_intermediate_size": 32,
        },
        3,
    ),
    "Qwen3Moe": (
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
        3,
    ),
    "DeepseekV3": (
        {
            **_GLM_LIKE,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        2,
    ),
    "Glm4Moe": ({**_GLM_LIKE, "head_dim": 16}, 2),
    "GptOss": (
        {
            "num_local_experts": EXPERTS,
            "head_dim": 16,
            "sliding_window": 8,
            "swiglu_alpha": 1.5,
            "swiglu_limit": 1.0,  # Reached by many values of order 1.
        },
        3,
    ),
}
each_model = pytest.mark.parametrize("name", list(MODELS))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**_COMMON | MODELS[name][0] | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for key, parameter in model.named_parameters():
            # Unit gain through every matrix keeps logits of order 1, far from ties; small values
            # elsewhere give the biases and the correction something to do.
            if parameter.dim() >= 2 and not key.endswith("bias"):
                fan_in = HIDDEN if "embed" in key or "gate_up" in key else parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
            elif "norm" not in key:
                torch.nn.init.normal_(parameter, std=0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.1)
    return model.to(dtype).eval()


def batch() -> dict[str, torch.Tensor]:
    """Two prompts of 12 and 7 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, implementation: str) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    inputs = batch()
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].double()


def generate(model: Any, implementation: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    return model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)


def experts_of(model: Any) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "is_concatenated")]


@pytest.fixture(autouse=True)
def calls() -> Iterator[Counter[torch.nn.Module]]:
    """Register the integration and count its calls, by experts module."""
    integration.register()
    counts: Counter[torch.nn.Module] = Counter()
    forward = ALL_EXPERTS_FUNCTIONS["moecore"]

    def counted(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts[self] += 1
        return forward(self, *args, **kwargs)

    ALL_EXPERTS_FUNCTIONS.register("moecore", counted)
    yield counts
    integration.register()


@each_model
def test_logits_match_eager_in_float32(name: str, calls: Counter[torch.nn.Module]) -> None:
    model = build(name)
    num_moe_layers = MODELS[name][1]
    want = logits(model, "eager")
    assert not calls
    got = logits(model, "moecore")
    assert calls == Counter(experts_of(model))
    assert len(calls) == num_moe_layers
    # Rounding errors of a float32 sum of K terms of random signs add up to about sqrt(K) eps of the
    # result, here in two orders, for the two products of an expert; a layer passes an error on with
    # a gain near 1. Norms average over thousands of them.
    eps = torch.finfo(torch.float32).eps
    bound = num_moe_layers * 2 * 2 * HIDDEN**0.5 * eps
    assert (got - want).norm() <= bound * want.norm()


def record_routing(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    routings: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in experts_of(model):
        module.register_forward_pre_hook(lambda _, args: routings.append(args[1:]))
    return routings


def replay_routing(model: Any, routings: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for module, (ids, weights) in zip(experts_of(model), routings, strict=True):
        module.register_forward_pre_hook(
            lambda _, args, ids=ids, weights=weights: (args[0], ids, weights.to(args[2].dtype))
        )


@each_model
def test_logits_are_as_exact_as_eager_in_bfloat16(
    name: str, calls: Counter[torch.nn.Module]
) -> None:
    model = build(name, torch.bfloat16)
    exact_model = copy.deepcopy(model).float()
    routings = record_routing(exact_model)
    exact = logits(exact_model, "eager")
    # All three runs take the routes of the first: a rounding that flips a near tie would otherwise
    # send a token to another expert, an error that says nothing of the experts' arithmetic.
    replay_routing(model, routings)
    eager_error = (logits(model, "eager") - exact).norm()
    error = (logits(model, "moecore") - exact).norm()
    assert calls == Counter(experts_of(model))
    assert error > 0
    # The errors are those of some thousand roundings; moecore makes fewer of them than eager.
    assert error <= 1.1 * eager_error


@each_model
@each_dtype
def test_generate_gives_the_tokens_of_eager(
    name: str, dtype: torch.dtype, calls: Counter[torch.nn.Module]
) -> None:
    model = build(name, dtype)
    inputs = batch()
    got = generate(model, "moecore", inputs)
    assert got.shape == (2, 12 + 16)
    assert set(calls.values()) == {16}
    assert len(calls) == MODELS[name][1]
    if dtype is torch.float32:
        assert torch.equal(got, generate(model, "eager", inputs))


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss"])
def test_generate_from_one_prompt(name: str) -> None:
    model = build(name)
    inputs = {key: value[:1] for key, value in batch().items()}
    assert torch.equal(generate(model, "moecore", inputs), generate(model, "eager", inputs))


@each_model
@each_dtype
def test_pack_gives_the_same_bits(
    name: str, dtype: torch.dtype, calls: Counter[torch.nn.Module]
) -> None:
    model = build(name, dtype)
    want = logits(model, "moecore")
    model.set_experts_implementation("eager")
    calls.clear()
    integration_forward = ALL_EXPERTS_FUNCTIONS["moecore"]
    assert integration.pack(model) == MODELS[name][1]
    ALL_EXPERTS_FUNCTIONS.register("moecore", integration_forward)
    assert model.config._experts_implementation == "moecore"
    for module in experts_of(model):
        assert module.gate_up_proj.shape == module.down_proj.shape == (0,)
    assert torch.equal(logits(model, "moecore"), want)
    assert calls == Counter(experts_of(model))
    assert integration.pack(model) == 0


def test_pack_refuses_a_model_without_experts() -> None:
    with pytest.raises(ValueError, match="Linear has no experts modules"):
        integration.pack(torch.nn.Linear(2, 2))


def test_pack_changes_nothing_if_a_module_is_unsupported() -> None:
    model = build("Mixtral")
    model.set_experts_implementation("eager")
    modules = experts_of(model)
    modules[-1].act_fn = torch.nn.ReLU()
    with pytest.raises(moecore.UnsupportedError, match="MixtralExperts: the activation is ReLU"):
        integration.pack(model)
    assert all(module.down_proj.dim() == 3 for module in modules)
    assert model.config._experts_implementation == "eager"


def test_pack_refuses_weights_that_are_not_on_the_cpu() -> None:
    model = build("Mixtral")
    experts_of(model)[-1].to("meta")
    with pytest.raises(moecore.UnsupportedError, match="MixtralExperts: gate_up_proj is on meta"):
        integration.pack(model)
    assert experts_of(model)[0].gate_up_proj.dim() == 3


def test_a_copy_of_a_packed_model_says_that_it_has_no_weights() -> None:
    model = build("Mixtral")
    integration.pack(model)
    with pytest.raises(ValueError, match="MixtralExperts: gate_up_proj must have 3 dimensions"):
        logits(copy.deepcopy(model), "moecore")


class _Config:
    _experts_implementation = "moecore"


class _Experts(torch.nn.Module):
    """Experts as transformers models define them, with what a test wants changed."""

    def __init__(
        self, config: _Config, *, act: str = "silu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        generator = torch.Generator().manual_seed(2)
        for name, shape in (
            ("gate_up_proj", (EXPERTS, 2 * INNER, HIDDEN)),
            ("down_proj", (EXPERTS, HIDDEN, INNER)),
        ):
            weight = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            self.register_parameter(name, torch.nn.Parameter(weight.to(dtype), requires_grad=False))
        self.act_fn = ACT2FN[act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError


def _experts(changes: dict[str, Any] | None = None, flags: Any = None, **settings: Any) -> Any:
    """An instance of a subclass of _Experts of its own, since the decorator changes its class."""
    subclass = type("TinyExperts", (_Experts,), changes or {})
    decorated = use_experts_implementation(**flags or {})(subclass)
    return decorated(_Config(), **settings)


def _routed(num_tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores, ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(TOP_K)
    return hidden, ids, scores


def _close_to_batched_mm(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    got = module(*inputs)
    want = ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *inputs)
    assert got.dtype == inputs[0].dtype
    assert got.shape == inputs[0].shape
    # The bound of one layer in the float32 test of whole models.
    assert (got - want).norm() <= 4 * HIDDEN**0.5 * torch.finfo(torch.float32).eps * want.norm()


@pytest.mark.parametrize("act", ["silu", "swish", "gelu_pytorch_tanh"])
def test_activations(act: str) -> None:
    _close_to_batched_mm(_experts(act=act), _routed())


def test_transposed_weights() -> None:
    module = _experts()
    transposed = _experts(flags={"is_transposed": True})
    for weight in transposed.parameters():
        weight.data = weight.data.transpose(1, 2).contiguous()
    assert torch.equal(transposed(*_routed()), module(*_routed()))


def test_no_tokens() -> None:
    assert _experts()(*_routed(0)).shape == (0, HIDDEN)


def test_sentinel_ids_add_nothing() -> None:
    module = _experts()
    module._is_expert_parallel = True
    hidden, ids, weights = _routed()
    ids[0, 1], ids[3] = EXPERTS, EXPERTS
    weights = weights.masked_fill(ids == EXPERTS, 0.0)
    _close_to_batched_mm(module, (hidden, ids, weights))
    assert not module(hidden, ids, weights)[3].any()


def test_strided_and_low_precision_inputs() -> None:
    module = _experts()
    hidden, ids, weights = _routed()
    strided = torch.stack([hidden, hidden], dim=2)[..., 0]
    assert not strided.is_contiguous()
    want = module(hidden, ids, weights.bfloat16().float())
    got = module(strided, ids.T.contiguous().T, weights.bfloat16())
    assert torch.equal(got, want)


def test_float32_states_meet_bfloat16_weights() -> None:
    module = _experts(dtype=torch.bfloat16)
    hidden, ids, weights = _routed()
    got = module(hidden.bfloat16().float(), ids, weights)
    assert got.dtype == torch.float32
    assert torch.equal(got.bfloat16(), module(hidden.bfloat16(), ids, weights))


def _own_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.chunk(2, dim=-1)[0]


@pytest.mark.parametrize(
    ("module", "what"),
    [
        pytest.param(lambda: _experts(act="gelu"), "the activation is GELUActivation", id="gelu"),
        pytest.param(
            lambda: _experts({"_apply_gate": _own_gate}), "the gate is .*_own_gate", id="gate"
        ),
        pytest.param(
            lambda: _experts(flags={"is_concatenated": False}), "is_concatenated=False", id="layout"
        ),
        pytest.param(lambda: _experts(flags={"has_gate": False}), "have no gate", id="no-gate"),
        pytest.param(
            lambda: _experts(flags={"has_post_expert_norm": True}),
            "has_post_expert_norm",
            id="norm",
        ),
        pytest.param(
            lambda: _experts(dtype=torch.float16), "gate_up_proj is torch.float16", id="float16"
        ),
        pytest.param(
            lambda: _experts(dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn", id="float8"
        ),
    ],
)
def test_unsupported_modules_are_named(module: Any, what: str) -> None:
    with pytest.raises(
        moecore.UnsupportedError, match=rf"TinyExperts: .*{what}.*set_experts_implementation\("
    ):
        module()(*_routed())


def test_float16_states_are_unsupported() -> None:
    hidden, ids, weights = _routed()
    with pytest.raises(moecore.UnsupportedError, match="TinyExperts: hidden_states are torch"):
        _experts()(hidden.half(), ids, weights)


def test_tensor_subclasses_are_unsupported() -> None:
    class Quantised(torch.Tensor):
        pass

    module = _experts()
    del module.down_proj
    module.down_proj = torch.zeros(EXPERTS, HIDDEN, INNER).as_subclass(Quantised)
    with pytest.raises(moecore.UnsupportedError, match="TinyExperts: down_proj is a Quantised"):
        module(*_routed())


def test_a_cast_after_the_first_call_is_noticed() -> None:
    module = _experts()
    module(*_routed())
    with pytest.raises(moecore.UnsupportedError, match="gate_up_proj is torch"):
        module.half()(*_routed())


@pytest.mark.parametrize("source", ["parameter", "states", "weights"])
def test_gradients_are_refused(source: str) -> None:
    module = _experts()
    hidden, ids, weights = _routed()
    {"parameter": module.down_proj, "states": hidden, "weights": weights}[source].requires_grad_()
    with pytest.raises(RuntimeError, match=r"TinyExperts needs them.*torch\.no_grad\(\)"):
        module(hidden, ids, weights)
    with torch.no_grad():
        module(hidden, ids, weights)
    with torch.inference_mode():
        module(hidden, ids, weights)


def test_a_model_in_training_mode_of_autograd_is_refused() -> None:
    model = build("Mixtral")
    model.set_experts_implementation("moecore")
    with pytest.raises(RuntimeError, match="MixtralExperts needs them"):
        model(**batch())


def test_register_twice() -> None:
    integration.register()
    first = ALL_EXPERTS_FUNCTIONS["moecore"]
    integration.register()
    assert ALL_EXPERTS_FUNCTIONS["moecore"] is first


@pytest.mark.parametrize("version", ["5.19.3", "4.57.0"])
def test_register_refuses_an_old_transformers(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers >= 5\.20, found {version}"):
        integration.register()
    monkeypatch.setattr("transformers.__version__", "5.20.0.dev0")
    integration.register()


def test_register_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="not installed"):
            integration.register()
