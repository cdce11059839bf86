"""Build a model and fill its weights from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moecore.checkpoint import Checkpoint
from moecore.config import ModelConfig
from moecore.loading import dummy_weights, load_weights
from moecore.models import family_of
from moecore.models.decoder import CausalLM
from moecore.transport import Transport


@torch.inference_mode(False)  # weights are plain tensors, whatever the caller's mode is
def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    dummy_seed: int | None = None,
    progress: bool = True,
    transport: Transport | None = None,
    check: Callable[[], object] | None = None,
) -> CausalLM:
    """Return the model of `folder` with its weights loaded; random ones if dummy_seed is given.

    With a transport, it holds this rank's experts only; see CausalLM. `check` is called between
    parts of a checkpoint, and may raise to end the load.

    Raises:
        FormatError: a tensor is missing, left over, misshapen or cut; nothing is loaded then.
    """
    names = family_of(config.model_type).NAMES
    if dummy_seed is not None:
        model = CausalLM(config, names, device=device, dtype=dtype, transport=transport)
        dummy_weights(model.slots(), dtype=dtype, seed=dummy_seed, device=device)
        return model
    checkpoint = Checkpoint.open(folder)
    model = CausalLM(config, names, device=device, dtype=dtype, transport=transport)
    load_weights(
        checkpoint,
        model.slots(),
        dtype=dtype,
        ignore=model.ignored(),
        progress=progress,
        check=check,
    )
    return model
