"""resolve_model: folders, the bundled model, and what the hub's answers become."""

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from moecore.hub import resolve_model


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: `hub.answer` is a folder or an exception, `hub.asked` its calls."""

    class Hub:
        answer = None
        asked = ()

        def snapshot_download(self, repo_id, **options):
            self.asked = (*self.asked, (repo_id, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def http_error(kind):
    return kind("no", response=Mock(headers={}))


@pytest.mark.parametrize("as_type", [str, Path])
def test_an_existing_folder_is_taken_without_asking_the_hub(tmp_path, hub, as_type):
    assert resolve_model(as_type(tmp_path)) == tmp_path
    assert hub.asked == ()


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, hub, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")
    assert hub.asked == ()


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_downloads_only_what_is_read(tmp_path, hub, weights):
    hub.answer = tmp_path
    assert resolve_model("owner/name", revision="v2", weights=weights) == tmp_path
    [(repo_id, options)] = hub.asked
    assert (repo_id, options["revision"]) == ("owner/name", "v2")
    files = [
        "config.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "original/model.safetensors",
        "consolidated.safetensors",
        "README.md",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(kept) == files[: 3 if weights else 2]


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a/b/c", Path("owner/name"), ""])
def test_a_path_that_does_not_exist_never_goes_to_the_hub(tmp_path, hub, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be an existing folder or a hub id"):
        resolve_model(model)
    assert hub.asked == ()


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match=r"must be a folder, got the file .*safetensors"):
        resolve_model(tmp_path / "model.safetensors")


FAILURES = {
    "offline": (errors.LocalEntryNotFoundError("x"), FileNotFoundError, "cannot be reached"),
    "gated": (http_error(errors.GatedRepoError), PermissionError, "gated: accept its terms at"),
    "no-revision": (http_error(errors.RevisionNotFoundError), FileNotFoundError, "no revision v9"),
    "no-model": (
        http_error(errors.RepositoryNotFoundError),
        FileNotFoundError,
        "check the spelling",
    ),
    "http": (http_error(errors.HfHubHTTPError), ConnectionError, "run again to resume"),
    "disk": (OSError("No space left on device"), ConnectionError, "No space left"),
    "no-id": (errors.HFValidationError("two dashes"), FileNotFoundError, "no hub id: two dashes"),
}


@pytest.mark.parametrize(("answer", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_what_the_hub_answers_becomes_an_error_that_says_what_to_do(hub, answer, kind, message):
    hub.answer = answer
    with pytest.raises(kind, match=message) as caught:
        resolve_model("owner/name", revision="v9")
    assert "owner/name at revision v9" in str(caught.value)


def test_offline_the_error_names_the_folder_and_the_cache_that_were_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set") as caught:
        resolve_model("owner/name")
    assert str(tmp_path / "owner" / "name") in str(caught.value)
    assert str(tmp_path / "cache") in str(caught.value)


def test_offline_a_cached_model_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert resolve_model("owner/name").resolve() == snapshot.resolve()


def test_the_bundled_model_is_a_folder_or_its_absence_is_named(tmp_path, monkeypatch):
    package = tmp_path / "moecore"
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no bundled model .*config.json"):
        resolve_model()
    (package / "bundled").mkdir(parents=True)
    (package / "bundled" / "config.json").write_text("{}")
    assert resolve_model() == package / "bundled"
