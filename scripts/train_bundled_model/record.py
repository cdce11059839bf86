"""What a training leaves: metrics.json and the best model, both up to date at every validation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from export import write_model
from model import Qwen3Moe
from torch import Tensor


class Record:
    """The metrics of all runs, and the model with the lowest validation loss in any of them."""

    def __init__(self, out: Path, device: torch.device, settings: dict[str, Any], eos: int) -> None:
        self.out = out
        self.eos_token_id = eos
        self.best_loss = math.inf
        self.best_weights: dict[str, Tensor] = {}
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.metrics: dict[str, Any] = {
            "card": card,
            "torch": torch.__version__,
            "settings": settings,
            "runs": [],
        }

    def start_run(self, run: dict[str, Any]) -> None:
        self.metrics["runs"].append({**run, "history": []})

    def add(self, model: Qwen3Moe, point: dict[str, float]) -> None:
        """A validation of the last run started, with `model` as it was validated."""
        self.metrics["runs"][-1]["history"].append(point)
        if point["valid_loss"] < self.best_loss:
            self.best_loss = point["valid_loss"]
            self.best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            self.metrics["best"] = {"run": len(self.metrics["runs"]) - 1, **point}
            write_model(model, self.eos_token_id, self.out / "model")
        self.write()

    def write(self) -> None:
        (self.out / "metrics.json").write_text(json.dumps(self.metrics, indent=1) + "\n")
