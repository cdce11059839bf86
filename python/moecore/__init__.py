"""moecore: a native inference core for mixture-of-experts models.

``moecore.ops`` holds the operators on torch tensors, ``moecore.MoELayer`` the whole layer, and
``moecore.integrations.transformers`` plugs both into Hugging Face models.
"""

# torch comes first: the core then shares its OpenMP library, and with it one pool of threads.
import torch  # noqa: F401  isort: skip

from moecore import ops
from moecore._core import CudaError, UnsupportedError, build_info, num_threads, set_num_threads
from moecore.errors import FormatError
from moecore.moe_layer import MoELayer
from moecore.ops import PackedWeights, Routing

__version__: str = build_info()["version"]

__all__ = [
    "CudaError",
    "FormatError",
    "MoELayer",
    "PackedWeights",
    "Routing",
    "UnsupportedError",
    "__version__",
    "build_info",
    "num_threads",
    "ops",
    "set_num_threads",
]
