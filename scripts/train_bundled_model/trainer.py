"""One training run against the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from model import ModelConfig, Qwen3Moe
from optimizer import make_optimizers
from record import Record
from torch import Tensor
from torch.nn import functional as F

BALANCE_WEIGHT = 0.01
WARM_UP = 0.02  # share of a run
MAX_GRADIENT_NORM = 1.0
STEPS_AHEAD = 20  # the schedule follows the clock, so the host must not run far ahead of the GPU


class Settings(NamedTuple):
    """What a run needs to know beside its data."""

    dropout: float
    weight_decay: float
    learning_rate: float
    batch: int  # sequences a step
    context: int  # tokens a sequence
    compile: str  # on, off or auto
    validate_seconds: float
    seed: int


def windows(tokens: Tensor, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless [batch, context + 1] windows: an epoch takes consecutive ones from a new first token,
    in random order."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(context + 1, device=tokens.device)
    while True:
        first = torch.randint(context, (1,), generator=generator)
        count = (len(tokens) - 1 - int(first)) // context
        starts = first + context * torch.randperm(count, generator=generator)
        for rows in starts.to(tokens.device).split(batch):
            if len(rows) == batch:
                yield tokens[rows[:, None] + span]


def rate_at(progress: float) -> float:
    """The share of the learning rate: up over WARM_UP, then in a straight line to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Trainer:
    """A new model, and the time until which to train it."""

    def __init__(self, settings: Settings, tokens: Tensor) -> None:
        """tokens: [n] int64, the training text, on the device that trains."""
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.tokens = tokens
        self.model = Qwen3Moe(ModelConfig(), settings.dropout).to(tokens.device)
        self.optimizers = make_optimizers(self.model, settings.learning_rate, settings.weight_decay)
        self.batches = windows(tokens, settings.batch, settings.context, settings.seed)
        self.loss: Callable[[Tensor], tuple[Tensor, Tensor]] = self.eager_loss
        self.step = 0
        self.entropy = torch.zeros((), device=tokens.device)  # sum since the last validation
        self.compiled = self.compile()

    def eager_loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What to minimise, and the cross-entropy in it. tokens: [batch, context + 1]."""
        output = self.model(tokens[:, :-1])
        entropy = F.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return entropy + BALANCE_WEIGHT * output.balance, entropy

    def compile(self) -> bool:
        """Whether the loss is compiled from now on. mode auto: on a GPU, if that works."""
        mode = self.settings.compile
        if mode == "off" or (mode == "auto" and not self.tokens.is_cuda):
            return False
        compiled = torch.compile(self.eager_loss, dynamic=False)
        try:
            with autocast(self.tokens.device):
                total, _ = compiled(next(self.batches))
            total.backward()
        except Exception as error:
            if mode == "on":
                raise
            print(f"torch.compile fails here, going on without: {error!r:.600}", flush=True)
            return False
        finally:
            self.model.zero_grad()
        self.loss = compiled
        return True

    def update(self, progress: float) -> None:
        """One step, at a share `progress` of the run."""
        with autocast(self.tokens.device):
            total, entropy = self.loss(next(self.batches))
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * rate_at(progress)
            optimizer.step()
        self.model.zero_grad()
        self.entropy += entropy.detach()
        self.step += 1
        if self.step % STEPS_AHEAD == 0 and self.tokens.is_cuda:
            torch.cuda.synchronize()

    def run(self, end: float, valid_loss: Callable[[Qwen3Moe], float], record: Record) -> None:
        """Trains until time.perf_counter() is `end`; stops early if the loss is not finite."""
        begin = checked = time.perf_counter()
        steps_checked = 0
        progress = 0.0
        while progress < 1.0:
            self.update(progress)
            now = time.perf_counter()
            progress = min(1.0, (now - begin) / max(end - begin, 1e-9))
            if progress < 1.0 and now - checked < self.settings.validate_seconds:
                continue
            train_loss = self.entropy.item() / (self.step - steps_checked)
            seconds = time.perf_counter() - begin
            with autocast(self.tokens.device):
                loss = valid_loss(self.model)
            seen = self.step * self.settings.batch * self.settings.context
            point = {
                "step": self.step,
                "seconds": seconds,
                "epochs": seen / len(self.tokens),
                "tokens_per_second": seen / seconds,
                "train_loss": train_loss,
                "valid_loss": loss,
            }
            print("  ".join(f"{name} {value:.5g}" for name, value in point.items()), flush=True)
            record.add(self.model, point)
            if not math.isfinite(train_loss):
                print("the training loss is not finite: this run ends", flush=True)
                return
            self.entropy.zero_()
            steps_checked, checked = self.step, time.perf_counter()
