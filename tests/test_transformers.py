"""Registering the transformers integration."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", minversion="5.20")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moecore.integrations import transformers as integration


def test_register_twice() -> None:
    integration.register()
    first = ALL_EXPERTS_FUNCTIONS["moecore"]
    integration.register()
    assert ALL_EXPERTS_FUNCTIONS["moecore"] is first


@pytest.mark.parametrize("version", ["5.19.3", "4.57.0"])
def test_register_refuses_an_old_transformers(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers >= 5\.20, found {version}"):
        integration.register()
    monkeypatch.setattr("transformers.__version__", "5.20.0.dev0")
    integration.register()


def test_register_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="not installed"):
            integration.register()
