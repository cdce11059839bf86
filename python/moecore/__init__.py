"""moecore: a native inference core for mixture-of-experts models.

``moecore.LLM`` loads a checkpoint and generates (``moecore.SamplingParams`` says how tokens are
drawn), ``moecore.ops`` holds the operators on torch tensors, ``moecore.MoELayer`` the whole layer,
and ``moecore.integrations.transformers`` plugs the experts into Hugging Face models.

Names are loaded at first use, so that the command line answers without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecore import ops
    from moecore._core import (
        CudaError,
        TransportError,
        UnsupportedError,
        build_info,
        num_threads,
        set_num_threads,
    )
    from moecore.errors import FormatError
    from moecore.llm import LLM, generate
    from moecore.moe_layer import MoELayer
    from moecore.ops import PackedWeights, Routing
    from moecore.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from moecore.sampling_params import SamplingParams
    from moecore.transport import Transport, expert_range

    __version__: str

__all__ = [
    "LLM",
    "CompletionOutput",
    "CudaError",
    "FormatError",
    "Logprob",
    "MoELayer",
    "PackedWeights",
    "RequestMetrics",
    "RequestOutput",
    "Routing",
    "SamplingParams",
    "Transport",
    "TransportError",
    "UnsupportedError",
    "__version__",
    "build_info",
    "expert_range",
    "generate",
    "num_threads",
    "ops",
    "set_num_threads",
]

# Name -> the module that holds it.
_MODULE_OF = {
    "CompletionOutput": "outputs",
    "CudaError": "_core",
    "FormatError": "errors",
    "LLM": "llm",
    "Logprob": "outputs",
    "MoELayer": "moe_layer",
    "PackedWeights": "ops",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "Routing": "ops",
    "SamplingParams": "sampling_params",
    "Transport": "transport",
    "TransportError": "_core",
    "UnsupportedError": "_core",
    "build_info": "_core",
    "expert_range": "transport",
    "generate": "llm",
    "num_threads": "_core",
    "set_num_threads": "_core",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = __getattr__("build_info")()["version"]
    elif name == "ops":
        value = importlib.import_module("moecore.ops")
    elif name in _MODULE_OF:
        # torch comes first: the core then shares its OpenMP library, and with it its threads.
        if _MODULE_OF[name] == "_core":
            importlib.import_module("torch")
        value = getattr(importlib.import_module(f"moecore.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'moecore' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
