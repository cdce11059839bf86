"""A small checkpoint in two shards, and slots that take every tensor of it."""

import threading

import torch
from safetensors.torch import save_file

from moecore.checkpoint import Checkpoint
from moecore.loading import Source, WeightSlot

E, N, K = 6, 8, 16


def make_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layers.0.experts.{expert}.{part}.weight": torch.randn(N, K, generator=generator)
        for expert in range(E)
        for part in ("gate", "up")
    }
    tensors["layers.0.experts.fused"] = torch.randn(E, N, K, generator=generator)
    tensors["embed.weight"] = torch.randn(50, K, generator=generator)
    tensors["norm.weight"] = torch.randn(K, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def save(folder, tensors):
    names = sorted(tensors)
    cut = next((i for i, name in enumerate(names) if "3.up" in name), len(names) // 2)
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for file, part in (("a.safetensors", names[:cut]), ("b.safetensors", names[cut:])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(str({"weight_map": weight_map}).replace("'", '"'))
    return Checkpoint.open(folder)


class Model:
    """Slots that copy what they get into `got`."""

    def __init__(self, tensors):
        self.got = {}
        self.order = []
        self.threads = set()
        self._lock = threading.Lock()
        self.slots = [
            self.slot(
                *(
                    Source(f"layers.0.experts.{expert}.{part}.weight", (N, K))
                    for part in ("gate", "up")
                ),
                key=f"gate_up.{expert}",
            )
            for expert in range(E)
        ]
        self.slots += [
            self.slot(Source("layers.0.experts.fused", (E, N, K), expert=expert))
            for expert in reversed(range(E))
        ]
        self.slots += [
            self.slot(Source(name, tuple(tensors[name].shape)))
            for name in ("norm.weight", "embed.weight")
        ]

    def slot(self, *sources, key=None, **options):
        key = str(sources[0]) if key is None else key

        def load(*parts):
            with self._lock:
                assert key not in self.got
                self.got[key] = [part.clone() for part in parts]
                self.order.append(key)
                self.threads.add(threading.get_ident())

        return WeightSlot((sources,), load, **options)
