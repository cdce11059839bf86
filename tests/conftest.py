from collections import Counter

import pytest
import torch

import moecore

DEVICES = ["cpu"]
if torch.cuda.is_available() and moecore.build_info()["has_cuda"]:
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def any_num_threads():
    yield
    moecore.set_num_threads(0)


@pytest.fixture
def calls(monkeypatch):
    """Register the transformers integration, and count its calls by experts module."""
    pytest.importorskip("transformers", minversion="5.20")
    from moecore.integrations import transformers as integration

    counts = Counter()
    forward = integration._experts_forward

    def counted(self, *args, **kwargs):
        counts[self] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(integration, "_experts_forward", counted)
    integration.register()
    yield counts
    monkeypatch.undo()
    integration.register()
