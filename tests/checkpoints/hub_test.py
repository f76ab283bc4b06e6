"""Tests of uploads to the Hugging Face Hub, against a server on this machine."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import logging

from mixer_jax import convert
from mixer_jax.checkpoints.hub import push_to_hub
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.errors import DiskFullError, RunError, UserError
from mixer_jax.inference import load_pretrained
from tests.helpers.cli import run_cli
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.hub_server import Hub, hub_environment, serve_hub, use_hub
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import assert_params_equal, random_weights, save_safetensors

# A warning of the Hub's library about its own use of another one.
_WARNING = "Use 'content=<...>' to upload raw"
pytestmark = pytest.mark.filterwarnings(f"ignore:{_WARNING}:DeprecationWarning")
NAME = "ada/mixer-tiny"
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that this process uses."""
    with serve_hub() as server:
        use_hub(server, str(tmp_path / "hub"), monkeypatch)
        yield server


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, weights: PretrainedWeights) -> str:
    """The same weights as a file."""
    path = tmp_path_factory.mktemp("source") / "w.safetensors"
    return save_safetensors(weights, path, weights.model_info.to_dict())


def test_upload_is_downloaded_again_bit_for_bit(hub: Hub, weights: PretrainedWeights) -> None:
    upload = push_to_hub(weights, NAME, card_license="mit")
    assert upload == (f"{hub.url}/{NAME}", False)
    assert sorted(hub.files(NAME)) == FILES
    # Large files are not part of the commit's request.
    assert list(hub.lfs.values()) == [hub.files(NAME)["model.safetensors"]]
    loaded = load_checkpoint(f"hf:{NAME}")
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.data.license == "mit"
    assert not hub.private


def test_second_upload_is_a_commit_that_keeps_the_card(
    hub: Hub, weights: PretrainedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(weights, NAME, private=True)
    assert hub.private == {NAME}
    hub.commits[NAME][-1]["README.md"] = b"written by hand"
    other = random_weights(seed=1)
    assert push_to_hub(other, NAME).kept_card
    assert hub.files(NAME)["README.md"] == b"written by hand"
    assert len(hub.commits[NAME]) == 2
    assert_params_equal(load_checkpoint(f"hf:{NAME}").params, other.params)
    assert_params_equal(load_checkpoint(f"hf:{NAME}@{1:040x}").params, weights.params)
    assert not push_to_hub(other, NAME, replace_card=True).kept_card
    assert b"mixer_jax" in hub.files(NAME)["README.md"]


def test_upload_keeps_the_verbosity_of_the_hubs_library(
    hub: Hub, weights: PretrainedWeights
) -> None:
    before = logging.get_verbosity()
    push_to_hub(weights, NAME)
    assert logging.get_verbosity() == before


def test_upload_without_a_head_prints_a_command_that_takes_it(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = random_weights(class_names=())
    path = save_safetensors(features, tmp_path / "w.safetensors", features.model_info.to_dict())
    assert convert.main([path, f"--push_to_hub={NAME}", "--license=mit"]) == 0
    out = capsys.readouterr().out
    assert f"--config.init_from=hf:{NAME}" in out
    assert "predict" not in out


def test_classifier_uploads_itself(hub: Hub, source: str, weights: PretrainedWeights) -> None:
    model = load_pretrained(source)
    assert model.push_to_hub(NAME, license="mit") == f"{hub.url}/{NAME}"
    assert load_pretrained(f"hf:{NAME}").model_info == weights.model_info


@pytest.mark.slow
def test_command_uploads_and_predict_loads(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: PretrainedWeights
) -> None:
    with serve_hub() as server:
        for variable, value in hub_environment(server, str(tmp_path / "hub")).items():
            monkeypatch.setenv(variable, value)
        preamble = f"import warnings; warnings.filterwarnings('ignore', {_WARNING!r})"
        flags = [f"--push_to_hub={NAME}", "--license=mit"]
        result = run_cli("convert", source, *flags, preamble=preamble)
        assert mentions(result.stdout, f"{server.url}/{NAME}", f"--checkpoint=hf:{NAME}")
        assert "hf_ada" not in result.stdout + result.stderr
        assert sorted(server.files(NAME)) == FILES
        target = f"{tmp_path}/again.npz"
        run_cli("convert", f"hf:{NAME}", target)
    assert_params_equal(load_checkpoint(target).params, weights.params)


def test_dry_run_prints_files_and_card_and_uses_no_network(
    source: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.delenv("HF_TOKEN")
    assert convert.main([source, f"--push_to_hub={NAME}", "--dry_run", "--license=mit"]) == 0
    out, err = capsys.readouterr()
    listed = [line.split()[0] for line in out.splitlines() if line.endswith(" bytes")]
    assert listed == FILES
    card = ModelCard(out[out.index("---\n") :])
    assert card.data.license == "mit"
    assert not err
    assert not hub.requests


def test_a_missing_license_is_named(
    source: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    convert.main([source, f"--push_to_hub={NAME}", "--dry_run"])
    (line,) = capsys.readouterr().err.splitlines()
    assert mentions(line, "--license")


def one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(error.value)
    assert "hf_" not in str(error.value).replace("hf:", "")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ada/mixer/tiny", ["'ada/mixer/tiny'", "OWNER/NAME", "one slash"]),
        ("tiny", ["'tiny'", "OWNER/NAME"]),
        ("/tiny", ["'/tiny'"]),
        ("", ["''"]),
        ("ada/ti ny", ["'ada/ti ny'"]),
        (f"ada/{'x' * 120}", ["96"]),
        ("ada/ti--ny", ["'ada/ti--ny'", "'--'"]),
        ("ada/tiny@main", ["'ada/tiny@main'"]),
    ],
)
def test_bad_names_are_usage_errors(
    name: str, parts: list[str], hub: Hub, source: str, weights: PretrainedWeights
) -> None:
    for use in (
        lambda: push_to_hub(weights, name),
        lambda: convert.main([source, f"--push_to_hub={name}", "--dry_run"]),
    ):
        with raises(UserError, *parts) as error:
            use()
        one_line(error)
    assert not hub.requests


@pytest.mark.parametrize("license", ["MIT", "apache 2.0", "mit\n---\n# Other"])
def test_bad_licenses_are_usage_errors(
    license: str, hub: Hub, source: str, weights: PretrainedWeights
) -> None:
    for use in (
        lambda: push_to_hub(weights, NAME, card_license=license),
        lambda: convert.main(
            [source, f"--push_to_hub={NAME}", f"--license={license}", "--dry_run"]
        ),
    ):
        with raises(UserError, "license", "apache-2.0", repr(license)) as error:
            use()
        one_line(error)
    assert not hub.requests


@pytest.mark.parametrize("token", ["hf_ada", "hf_\x1bada"], ids=["", "escaped"])
@pytest.mark.parametrize("before", [0, 190])
def test_tokens_in_errors_of_the_library_are_hidden(
    before: int,
    token: str,
    hub: Hub,
    weights: PretrainedWeights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    header = f"Bearer {token}".encode()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{'x' * before} illegal header {header!r}")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", fail)
    with raises(RunError, NAME) as error:
        push_to_hub(weights, NAME)
    assert "hf_" not in str(error.value)


@pytest.mark.parametrize(
    ("token", "name", "parts"),
    [
        ("", NAME, ["hf auth login", "HF_TOKEN"]),
        ("hf_stale", NAME, ["401", "hf auth login"]),
        ("hf_grace", NAME, ["403", "'ada'", "write"]),
    ],
)
def test_tokens_that_cannot_write_are_usage_errors(
    token: str,
    name: str,
    parts: list[str],
    hub: Hub,
    weights: PretrainedWeights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with raises(UserError, *parts) as error:
        push_to_hub(weights, name)
    one_line(error)
    assert not hub.commits
    assert not hub.lfs


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("commit", 0, RunError),
        ("commit", 500, RunError),
        ("commit", 413, UserError),
        ("lfs/objects", 403, UserError),
        ("preupload", 403, UserError),
    ],
)
def test_failed_uploads_leave_the_repository_as_it_was(
    path: str, code: int, expected: type[Exception], hub: Hub, weights: PretrainedWeights
) -> None:
    push_to_hub(weights, NAME)
    hub.failures[path] = code
    with raises(expected, f"hf:{NAME}", *([str(code)] if code else [])) as error:
        push_to_hub(random_weights(seed=1), NAME)
    one_line(error)
    assert len(hub.commits[NAME]) == 1
    hub.failures.clear()
    push_to_hub(random_weights(seed=1), NAME)
    assert len(hub.commits[NAME]) == 2


def test_rejected_license_names_the_rule(hub: Hub, weights: PretrainedWeights) -> None:
    with raises(UserError, "README.md", '"license" must be one of') as error:
        push_to_hub(weights, NAME, card_license="not-a-license")
    one_line(error)
    assert not hub.files(NAME)


def test_a_missing_network_fails_at_once(
    hub: Hub, weights: PretrainedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", unused)
    with raises(RunError, f"hf:{NAME}", "127.0.0.1", "network") as error:
        push_to_hub(weights, NAME)
    one_line(error)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises(UserError, "HF_HUB_OFFLINE"):
        push_to_hub(weights, NAME)


def test_a_full_disk_uploads_nothing(hub: Hub, tmp_path: Path) -> None:
    with file_size_limit(10_000), raises(DiskFullError, "TMPDIR") as error:
        push_to_hub(random_weights(), NAME)
    one_line(error)
    assert not hub.commits


def test_flags_of_uploads_need_one(source: str) -> None:
    for flag in ("--license=mit", "--private", "--dry_run"):
        with raises(UserError, flag.partition("=")[0], "--push_to_hub"):
            convert.main([source, "target.npz", flag])
    for arguments in (["target.npz"], ["--to=timm"]):
        with raises(UserError, "--push_to_hub", "TARGET"):
            convert.main([source, *arguments, f"--push_to_hub={NAME}"])
