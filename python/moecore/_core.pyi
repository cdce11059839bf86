"""The native core. Every function checks its arguments; moecore.ops documents them."""

from typing import Any

from torch import Tensor

class UnsupportedError(NotImplementedError): ...
class CudaError(RuntimeError): ...

class FileReadError(RuntimeError):
    matrix: int
    found: int
    error_number: int

class TransportError(RuntimeError):
    rank: int
    phase: str

KV_BLOCK_SIZE: int

class PackedWeights:
    def __init__(self, dtype: str, num_groups: int, n: int, k_dim: int, gated: bool) -> None: ...
    def pack(self, group: int, weights: Tensor) -> None: ...
    def pack_gated(self, group: int, gate: Tensor, up: Tensor) -> None: ...
    @staticmethod
    def pack_files(
        packings: list[tuple[PackedWeights, int, list[tuple[int, int, int, int]]]],
        num_threads: int,
    ) -> None: ...
    def rows(self, ids: Tensor, out: Tensor) -> None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def gated(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...

class RoutingConfig:
    def __init__(
        self,
        *,
        top_k: int,
        score_function: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        norm_epsilon: float = 0.0,
        norm_min: float = 0.0,
        group_limit: str = "none",
        num_groups: int = 1,
        topk_group: int = 1,
    ) -> None: ...
    @property
    def top_k(self) -> int: ...

class GroupedGemmConfig:
    def __init__(
        self,
        *,
        activation: str = "none",
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        up_offset: float = 1.0,
    ) -> None: ...
    @property
    def gated(self) -> bool: ...

class Transport:
    @staticmethod
    def loopback() -> Transport: ...
    @staticmethod
    def in_process(size: int, cuda_device: int | None) -> list[Transport]: ...
    @staticmethod
    def shm(
        name: str, rank: int, size: int, connect_deadline: float, ring_bytes: int
    ) -> Transport: ...
    @staticmethod
    def nccl_unique_id(library_paths: list[str]) -> bytes: ...
    @staticmethod
    def nccl(
        unique_id: bytes,
        rank: int,
        size: int,
        cuda_device: int,
        connect_deadline: float,
        library_paths: list[str],
        hosts: Transport | None,
    ) -> Transport: ...
    @staticmethod
    def peer(hosts: Transport, cuda_device: int) -> Transport: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def kind(self) -> str: ...
    deadline: float
    def barrier(self, phase: str) -> None: ...
    def all_gather(self, phase: str, mine: Any, all: Any) -> None: ...
    @property
    def cuda_device(self) -> int | None: ...
    def synchronize(self, phase: str, stream: int) -> None: ...
    def abort(self, reason: str) -> None: ...
    def measure(self) -> None: ...
    @property
    def figures(self) -> dict[str, float]: ...
    @property
    def last_choice(self) -> str: ...
    @property
    def can_capture(self) -> bool: ...
    def fix_tokens(self, tokens: int) -> None: ...
    def start_trace(self) -> None: ...
    def trace_events(self) -> str: ...
    def close(self) -> None: ...

def expert_range(num_experts: int, rank: int, size: int) -> tuple[int, int]: ...

class MoELayer:
    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        first_expert: int,
        num_local_experts: int,
        routing: RoutingConfig,
        activation: GroupedGemmConfig,
        shared_intermediate_size: int,
        dtype: str,
        weights: dict[str, Tensor | PackedWeights],
        transport: Transport | None = None,
        combine: str = "exact",
        schedule: str = "auto",
        num_groups: int = 0,
        fixed_tokens: int = 0,
    ) -> None: ...
    def forward(self, hidden_states: Tensor, router_logits: Tensor, output: Tensor) -> None: ...
    def forward_routed(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, output: Tensor
    ) -> None: ...

class Activations:
    def __init__(
        self,
        *,
        residual: Tensor,
        normed: Tensor,
        delta: Tensor,
        qkv: Tensor,
        attended: Tensor,
        router_logits: Tensor | None = None,
        inner: Tensor | None = None,
    ) -> None: ...

class DecoderLayer:
    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        rms_norm_eps: float,
        qk_norm: str,
        dtype: str,
        weights: dict[str, Tensor | PackedWeights | MoELayer | None],
    ) -> None: ...
    def before_attention(
        self, activations: Activations, positions: Tensor, cos_sin: Tensor, is_first: bool
    ) -> None: ...
    def project_qkv(self, activations: Activations, is_first: bool) -> None: ...
    def after_attention(self, activations: Activations) -> None: ...

class Decoder:
    def __init__(
        self,
        *,
        layers: list[DecoderLayer],
        key_caches: list[Tensor],
        value_caches: list[Tensor],
        weights: dict[str, Tensor | PackedWeights],
    ) -> None: ...
    def forward(
        self,
        activations: Activations,
        token_ids: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        query_offsets: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        logit_rows: Tensor,
        logits: Tensor,
    ) -> None: ...
    def forward_decodes(
        self,
        activations: Activations,
        numbers: bytes,
        num_sequences: int,
        cos_sin: Tensor,
        logits: Tensor,
    ) -> None: ...

def build_info() -> dict[str, Any]: ...
def set_num_threads(num_threads: int) -> None: ...
def num_threads() -> int: ...
def topk_routing(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    config: RoutingConfig,
    topk_ids: Tensor,
    topk_weights: Tensor,
) -> None: ...
def sort_by_expert(
    topk_ids: Tensor,
    first_expert: int,
    sorted_slots: Tensor,
    slot_to_row: Tensor,
    expert_offsets: Tensor,
) -> None: ...
def grouped_gemm(
    input: Tensor,
    weights: Tensor | PackedWeights,
    bias: Tensor | None,
    expert_offsets: Tensor,
    sorted_slots: Tensor | None,
    slots_per_token: int,
    config: GroupedGemmConfig,
    output: Tensor,
) -> None: ...
def linear(
    input: Tensor,
    weight: Tensor | PackedWeights,
    bias: Tensor | None,
    config: GroupedGemmConfig,
    output: Tensor,
) -> None: ...
def combine(
    expert_rows: Tensor,
    slot_to_row: Tensor,
    topk_weights: Tensor,
    shared_output: Tensor | None,
    shared_scale: Tensor | None,
    output: Tensor,
) -> None: ...
def rms_norm(
    input: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output: Tensor
) -> None: ...
def rotary_embedding(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None: ...
def draw_tokens(
    logits: Tensor, temperature: list[float], min_p: list[float], noise: list[float]
) -> tuple[list[int], list[float]]: ...
def embedding(ids: Tensor, weight: Tensor | PackedWeights, output: Tensor) -> None: ...
def write_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
) -> None: ...
def rotate_and_cache(
    heads: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    query_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    is_settled: bool,
) -> None: ...
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    output: Tensor,
) -> None: ...
