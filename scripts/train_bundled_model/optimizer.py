"""Muon for weight matrices, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# An odd polynomial a x + b x^3 + c x^5 that takes singular values in (0, 1] near 1 in five passes
# (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_PASSES = 5
TABLE_DECAY = 0.1  # at most this weight decay for embedding and routers
_UPDATE_RMS = 0.2  # of AdamW's usual updates: one learning rate and weight decay then suit both


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same shape; each matrix's singular values moved near 1."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_PASSES):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, with decoupled weight decay.

    A parameter's last two dimensions are a matrix; those before them number independent matrices.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(momentum, group["momentum"])
                update = orthogonalise(ahead.flatten(0, -3)).view_as(parameter)
                scale = _UPDATE_RMS * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the attention and expert matrices; AdamW for embedding, routers and norms, of which
    the norms do not decay."""
    matrices, tables, norms = [], [], []
    for name, parameter in model.named_parameters():
        if name in ("embedding", "router"):
            tables.append(parameter)
        elif name.endswith("norm"):
            norms.append(parameter)
        else:
            matrices.append(parameter)
    adam = torch.optim.AdamW(
        [
            {"params": tables, "weight_decay": min(weight_decay, TABLE_DECAY)},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        fused=matrices[0].is_cuda,
    )
    return [Muon(matrices, lr, weight_decay), adam]
