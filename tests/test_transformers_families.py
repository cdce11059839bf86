"""Every experts class of the installed transformers: moecore agrees with it or names it."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moecore
from tiny_models import EXPERTS, HIDDEN, INNER, TOP_K, transformers

pytestmark = pytest.mark.usefixtures("calls")

UNSUPPORTED = {
    "Inkling2Experts": "the gate is .*Inkling2Experts._apply_gate",  # soft caps
    "MuseSparkExperts": "a norm follows each expert",
    "NemotronHExperts": "the experts have no gate",
    # Its own forward keeps float32 between the products, whatever the weights' dtype.
    "OpenAIPrivacyFilterExperts": "the gate is .*OpenAIPrivacyFilterExperts._apply_gate",
}
# All that any experts class reads from its configuration, whatever it calls it.
CONFIG = {
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    "hidden_size": HIDDEN,
    "rms_norm_eps": 1e-6,
    "post_norm_eps": 1e-6,
    "moe_latent_size": None,
    "moe_hidden_size": HIDDEN,
    "mlp_gate_softcap": 4.0,
    "mlp_up_softcap": 4.0,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 0.5,
}


def files_with_experts() -> list[Path]:
    folder = Path(transformers.__file__).parent / "models"
    return sorted(
        path
        for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    )


def experts_classes(path: Path) -> list[type[torch.nn.Module]]:
    module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    return [
        found
        for found in vars(module).values()
        if inspect.isclass(found)
        and found.__module__ == module.__name__
        and issubclass(found, torch.nn.Module)
        and hasattr(found, "_apply_gate")
    ]


def make(experts_class: Any, **settings: Any) -> Any:
    config = SimpleNamespace(**CONFIG | settings)
    module = experts_class(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.normal_(std=HIDDEN**-0.5, generator=generator)
    return module


# Every class of this release of transformers is known to run, or is in UNSUPPORTED.
IS_NEWER = tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 23)


def run(module: Any, implementation: str) -> torch.Tensor:
    module.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, HIDDEN, generator=generator)
    weights, ids = torch.rand(11, EXPERTS, generator=generator).topk(TOP_K)
    return module(hidden, ids, weights)


@pytest.mark.parametrize("path", files_with_experts(), ids=lambda path: path.parent.name)
def test_experts_give_what_their_own_forward_gives_or_are_named(path: Path) -> None:
    found = experts_classes(path)
    assert found
    for experts_class in found:
        module = make(experts_class)
        if reason := UNSUPPORTED.get(experts_class.__name__):
            with pytest.raises(
                moecore.UnsupportedError, match=f"{experts_class.__name__}: {reason}"
            ):
                run(module, "moecore")
            continue
        refusal = None
        try:
            got = run(module, "moecore")
        except moecore.UnsupportedError as error:
            refusal = str(error)
        if refusal is not None:
            # A release after the tested one may bring gates that nobody has looked at.
            assert IS_NEWER, refusal
            assert experts_class.__name__ in refusal
            continue
        want = run(module, "eager")
        # As in the float32 test of whole models, for one layer.
        bound = 4 * HIDDEN**0.5 * torch.finfo(torch.float32).eps
        assert (got - want).norm() <= bound * want.norm()
