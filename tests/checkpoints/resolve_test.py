"""Tests of names of checkpoints: files, runs, the Hub, and URLs."""

import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath
from safetensors.numpy import save_file

from mixer_jax.checkpoints.load import load_checkpoint, pin_checkpoint
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config
from mixer_jax.config.schema import CheckpointConfig, RunConfig
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import DiskFullError, RunError, UserError
from mixer_jax.training.workdir import check_workdir, save_config
from tests.helpers import pretrained_files
from tests.helpers.hub_cache import COMMIT, GOOGLE, NAME, OTHER_COMMIT, add_to_cache
from tests.helpers.messages import mentions, raises
from tests.helpers.object_store import BUCKET, object_store
from tests.helpers.random_weights import assert_params_equal, random_weights, save_npz, save_run


def test_resolve_checkpoint_finds_the_format(tmp_path: Path) -> None:
    formats = {
        "a.npz": "npz",
        "a.safetensors": "safetensors",
        "a.pth": "torch",
        "a.pt": "torch",
        "a.bin": "torch",
        "last.ckpt": "torch",
        "model_best.pth.tar": "torch",
    }
    (tmp_path / "folder").mkdir()
    for name in (*formats, "folder/model.safetensors"):
        (tmp_path / name).touch()
    for name, format in formats.items():
        assert resolve_checkpoint(str(tmp_path / name)) == (format, str(tmp_path / name), None)
    file = str(tmp_path / "folder/model.safetensors")
    assert resolve_checkpoint(str(tmp_path / "folder")) == ("safetensors", file, None)
    for name in ("timm/mixer_b16_224.goog_in21k", "a/b@v1.0", "a/b@refs/pr/1"):
        for prefix in ("hf:", "hf-hub:", "hf_hub:", ""):
            assert resolve_checkpoint(f"{prefix}{name}") == ("hub", name, None)


def test_folders_come_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = save_run(random_weights(), tmp_path / "runs/mine", step=7)
    assert resolve_checkpoint("runs/mine") == ("run", run, 7)
    # In an existing folder, a name is that of a workdir.
    with raises(UserError, "'runs/mime'", "exist", "hf:runs/mime"):
        resolve_checkpoint("runs/mime")
    with raises(UserError, "hf:OWNER/NAME", "hf-hub:mixer"):
        resolve_checkpoint("hf-hub:mixer")


def test_folders_with_a_file_of_pytorch_are_found(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    file = str(tmp_path / "pytorch_model.bin")
    assert resolve_checkpoint(str(tmp_path)) == ("torch", file, None)
    (tmp_path / "model.safetensors").touch()
    assert resolve_checkpoint(str(tmp_path)).path == str(tmp_path / "model.safetensors")


def test_a_folder_with_other_files_of_weights_is_rejected_with_their_name(tmp_path: Path) -> None:
    for name in ("notes.txt", "last.ckpt"):
        (tmp_path / name).touch()
    with raises(UserError, str(tmp_path), "'last.ckpt'"):
        resolve_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["best", "20", "checkpoints/best"])
def test_a_copied_checkpoint_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = random_weights()
    run = Path(save_run(weights, tmp_path / "run", step=20))
    shutil.copytree(run / "checkpoints/20", name)
    shutil.rmtree(run)
    loaded = load_checkpoint(name)
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info
    assert loaded.step == (20 if name == "20" else None)
    with raises(UserError, name, "step"):
        load_checkpoint(name, step=20)


def test_a_damaged_copy_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    run = Path(save_run(random_weights(), tmp_path / "run", step=20))
    copy = shutil.copytree(run / "checkpoints/20", tmp_path / "best")
    shutil.rmtree(copy / "params")
    with raises(UserError, str(copy)) as caught:
        load_checkpoint(str(copy))
    assert "\n" not in str(caught.value)
    assert "/tmp/tmp" not in str(caught.value)


def test_a_copied_checkpoint_at_a_url_must_be_moved(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best/commit_success.txt").touch()
    with object_store(tmp_path), raises(UserError, f"{BUCKET}best", "'checkpoints'"):
        load_checkpoint(f"{BUCKET}best")


@pytest.mark.parametrize(
    "name", ["Mixer.npz", "model.safetensors", "model.pth", "last.ckpt", "pytorch_model.bin"]
)
def test_pointers_of_git_lfs_are_rejected(name: str, tmp_path: Path) -> None:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 239585000\n"
    (tmp_path / name).write_text(pointer)
    for source in (tmp_path / name, tmp_path):
        if source.is_dir() and name not in ("model.safetensors", "pytorch_model.bin"):
            continue
        with raises(UserError, str(tmp_path / name), "git lfs pull") as caught:
            load_checkpoint(source)
        assert "\n" not in str(caught.value)


def test_resolve_checkpoint_finds_runs_by_any_of_their_folders(tmp_path: Path) -> None:
    run = save_run(random_weights(), tmp_path / "run.npz", step=7)
    for name in (run, f"{run}/checkpoints", f"{run}/checkpoints/7"):
        assert resolve_checkpoint(name) == ("run", run, 7)


def test_resolve_checkpoint_expands_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.npz").touch()
    assert resolve_checkpoint("~/a.npz").path == str(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("nothing.npz", []),
        ("nothing", []),
        ("", []),
        ("empty", []),
        ("notes.txt", [".npz", ".safetensors"]),
        ("x" * 5000 + ".npz", []),
        ("x" * 5000, []),
        ("hf:", ["hf:OWNER/NAME"]),
        ("hf:name", ["hf:OWNER/NAME"]),
        ("hf:/name", ["hf:OWNER/NAME"]),
        ("hf:owner/", ["hf:OWNER/NAME"]),
        ("hf:a/b/c", ["hf:OWNER/NAME"]),
        ("hf:@a/b", ["hf:OWNER/NAME"]),
        ("data.tar", [".npz", ".safetensors"]),
        ("https://some.where/Mixer.npz", ["gs://", "s3://", "az://"]),
        ("https://some.where/run", ["gs://", "s3://", "az://"]),
        ("file:///tmp/Mixer.npz", ["gs://", "s3://", "az://"]),
        ("hf://timm/mixer", ["hf:OWNER/NAME"]),
        ("two\nlines.npz", []),
    ],
)
def test_resolve_checkpoint_fails_with_one_line(
    source: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "data.tar"):
        (tmp_path / name).write_text("notes")
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(source)
    assert mentions(str(caught.value), repr(source), *parts)
    assert "\n" not in str(caught.value)


def test_only_runs_have_steps(tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch()
    for source in (str(tmp_path / "a.npz"), "hf:a/b"):
        with raises(UserError, source):
            resolve_checkpoint(source, step=3)


def test_files_at_urls_are_loaded_with_their_metadata(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32))
    np.savez(tmp_path / "Mixer.npz", **pretrained_files.google(weights.params))
    (tmp_path / "Mixer.npz.json").write_text('{"image_size": [32, 16]}')
    with object_store(tmp_path):
        assert not epath.Path(f"{BUCKET}nothing.npz").exists()
        loaded = load_checkpoint(f"{BUCKET}Mixer.npz")
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info.image_size == (32, 16)


def test_folders_at_urls_are_loaded_with_their_config(tmp_path: Path) -> None:
    save_file(pretrained_files.timm(random_weights().params), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"interpolation": "bilinear"}')
    with object_store(tmp_path):
        assert load_checkpoint(BUCKET.rstrip("/")).model_info.eval_crop == "bilinear"


def test_errors_name_the_url(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not weights")
    with object_store(tmp_path):
        for name in ("text.npz", "nothing.npz"):
            with raises(UserError, f"{BUCKET}{name}"):
                load_checkpoint(f"{BUCKET}{name}")


def test_errors_of_url_libraries_are_reported_in_one_line(tmp_path: Path) -> None:
    def unreachable(original: Any, path: Any) -> bool:
        raise RuntimeError(f"no credentials\n for {path}")

    cause = f"no credentials for {BUCKET}text.npz"
    with (
        object_store(tmp_path),
        mock_epath(exists=unreachable, isdir=unreachable),
        raises(UserError, f"'{BUCKET}text.npz'", cause) as caught,
    ):
        load_checkpoint(f"{BUCKET}text.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_a_usage_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    save_npz(random_weights(), tmp_path / "Mixer.npz")
    with object_store(tmp_path):
        for module, name in ((shutil, "copyfileobj"), (tempfile, "TemporaryDirectory")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                with raises(DiskFullError, f"{BUCKET}Mixer.npz", os.strerror(code), "TMPDIR"):
                    load_checkpoint(f"{BUCKET}Mixer.npz")


def test_a_disk_that_is_full_during_a_download_is_not_a_usage_error(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with raises(DiskFullError, f"hf:{NAME}", "No space left", "HF_HOME"):
        load_checkpoint(f"hf:{NAME}")


def test_a_missing_url_library_is_reported_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with raises(UserError, f"{BUCKET}Mixer.npz", "gcsfs", "pip install gcsfs"):
        load_checkpoint(f"{BUCKET}Mixer.npz")
    with raises(UserError, f"{BUCKET}run", "gcsfs", "pip install gcsfs"):
        check_workdir(f"{BUCKET}run", parse(load_config("digits")))
    with raises(UserError, f"{BUCKET}data", "gcsfs", "pip install gcsfs"):
        open_dataset("digits", "train", f"{BUCKET}data")
    assert "\ngcsfs==" in (root / "requirements-gcs.txt").read_text()


def test_torch_files_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pth").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises(UserError, str(tmp_path / "model.pth"), "pip install torch"):
        load_checkpoint(str(tmp_path / "model.pth"))


def test_a_workdir_that_does_not_exist_differs_from_one_without_checkpoints(tmp_path: Path) -> None:
    with raises(UserError, f"{tmp_path}/nope", "exist"):
        resolve_checkpoint(f"{tmp_path}/nope")
    with raises(UserError, str(tmp_path)) as caught:
        resolve_checkpoint(str(tmp_path))
    assert not mentions(str(caught.value), "exist")


def test_a_revision_can_be_named(hub_cache: Path) -> None:
    add_to_cache(hub_cache, random_weights(seed=0).params, GOOGLE)
    add_to_cache(hub_cache, random_weights(seed=1).params, GOOGLE, OTHER_COMMIT)
    for source, seed in ((f"hf:{NAME}", 0), (f"hf:{NAME}@{OTHER_COMMIT}", 1)):
        assert_params_equal(load_checkpoint(source).params, random_weights(seed=seed).params)


def test_pin_checkpoint_names_the_step_and_the_commit(hub_cache: Path, tmp_path: Path) -> None:
    run = save_run(random_weights(), tmp_path / "run", step=7)
    assert pin_checkpoint(run) == (run, 7)
    assert pin_checkpoint(f"{run}/checkpoints/7") == (f"{run}/checkpoints/7", 7)
    add_to_cache(hub_cache, random_weights(seed=0).params, GOOGLE)
    add_to_cache(hub_cache, random_weights(seed=1).params, GOOGLE, OTHER_COMMIT)
    pinned = [pin_checkpoint(name) for name in (f"hf:{NAME}", NAME, f"hf:{NAME}@main")]
    assert pinned == [(f"hf:{NAME}@{COMMIT}", None)] * 3
    assert pin_checkpoint(f"hf:{NAME}@{OTHER_COMMIT}") == (f"hf:{NAME}@{OTHER_COMMIT}", None)
    # The repository changes after one host has resolved its name.
    (hub_cache / f"models--{NAME.replace('/', '--')}" / "refs/main").write_text(OTHER_COMMIT)
    source, step = pinned[0]
    assert_params_equal(load_checkpoint(source, step=step).params, random_weights(seed=0).params)
    with raises(UserError, "someone/other"):
        pin_checkpoint("hf:someone/other")


def write_records(workdir: str, best_metric: str, top1: dict[int, float]) -> None:
    """Writes config.json and metrics.jsonl of a run."""
    checkpoint = CheckpointConfig(best_metric=best_metric)
    save_config(workdir, RunConfig(checkpoint=checkpoint))
    lines = [json.dumps({"step": step, "val/top1": value}) for step, value in top1.items()]
    Path(workdir, "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_best_is_the_saved_step_with_the_best_logged_value(tmp_path: Path) -> None:
    run = ""
    for step in (10, 20, 40):
        run = save_run(random_weights(seed=step), tmp_path / "run", step=step, keep=3)
    write_records(run, "val/top1", {10: 0.5, 20: 0.7, 30: 0.9, 40: 0.7})
    for name in (run, f"{run}/checkpoints", f"{run}/checkpoints/40"):
        assert resolve_checkpoint(name, "best") == ("run", run, 20)
    named = f"{run}/checkpoints/best"
    assert resolve_checkpoint(named) == ("run", run, 20)
    assert resolve_checkpoint(named, 40) == ("run", run, 40)
    # The best step may change between the calls of two hosts.
    source, pinned = pin_checkpoint(named)
    write_records(run, "val/top1", {10: 0.8, 20: 0.7})
    assert_params_equal(load_checkpoint(source, step=pinned).params, random_weights(seed=20).params)
    best = load_checkpoint(run, step="best")
    assert best.step == 10
    assert_params_equal(best.params, random_weights(seed=10).params)


def test_best_needs_a_metric_with_values(tmp_path: Path) -> None:
    run = save_run(random_weights(), tmp_path / "run", step=10)
    for _ in range(2):
        # Without config.json, and with that of a run without the metric.
        with raises(UserError, "'best'", "config.checkpoint.best_metric", "10"):
            resolve_checkpoint(run, "best")
        write_records(run, "", {10: 0.5})
    write_records(run, "val/top1", {20: 0.5})
    with raises(UserError, "'best'", "val/top1", "10"):
        resolve_checkpoint(f"{run}/checkpoints/best")
    Path(run, "config.json").write_text("[]")
    with raises(UserError, "config.json"):
        resolve_checkpoint(run, "best")
    with raises(UserError, "steps"):
        resolve_checkpoint(save_npz(random_weights(), tmp_path / "weights.npz"), "best")


def test_a_copy_named_best_is_that_copy(tmp_path: Path) -> None:
    run = save_run(random_weights(), tmp_path / "run", step=10)
    shutil.copytree(f"{run}/checkpoints/10", f"{run}/checkpoints/best")
    assert resolve_checkpoint(f"{run}/checkpoints/best").format == "copy"


def record_requests(monkeypatch: pytest.MonkeyPatch, is_offline: bool = False) -> list[str]:
    """Records the files that are requested from the Hub; offline, the cache answers instead."""
    import huggingface_hub

    hf_hub_download = huggingface_hub.hf_hub_download
    requested: list[str] = []

    def record(repo: str, file: str, *, local_files_only: bool, **kwargs: Any) -> str:
        if not local_files_only:
            requested.append(file)
        local_files_only = local_files_only or is_offline
        return hf_hub_download(repo, file, local_files_only=local_files_only, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", record)
    return requested


def test_pin_checkpoint_downloads_no_weights(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_cache(hub_cache, random_weights().params, GOOGLE)
    (model,) = hub_cache.rglob("model.safetensors")
    model.unlink()
    requested = record_requests(monkeypatch, is_offline=True)
    assert pin_checkpoint(f"hf:{NAME}") == (f"hf:{NAME}@{COMMIT}", None)
    assert requested == ["config.json"]


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:", ""])
def test_spellings_of_the_hub(prefix: str, hub_cache: Path) -> None:
    weights = random_weights()
    add_to_cache(hub_cache, weights.params, GOOGLE)
    assert_params_equal(load_checkpoint(f"{prefix}{NAME}").params, weights.params)
    with raises(UserError, "hf:someone/other", "model.safetensors") as caught:
        load_checkpoint(f"{prefix}someone/other")
    assert ("folder, and" in str(caught.value)) == (not prefix)


def test_a_file_of_pytorch_in_the_cache_is_found(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_cache(hub_cache, random_weights().params, GOOGLE)
    (model,) = hub_cache.rglob("model.safetensors")
    model.rename(model.with_name("pytorch_model.bin"))
    # Reading it needs PyTorch, of which the message speaks.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises(UserError, "pytorch_model.bin", "PyTorch"):
        load_checkpoint(f"hf:{NAME}")


@pytest.mark.parametrize("name", ["someone/other", f"{NAME}@no_such_revision"])
def test_download_fails_fast_without_a_network(name: str, hub_cache: Path) -> None:
    add_to_cache(hub_cache, random_weights().params, GOOGLE)
    start = time.monotonic()
    with raises(UserError, f"hf:{name}", "model.safetensors", "config.json") as caught:
        load_checkpoint(f"hf:{name}")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "use"),
    [
        ("https://no-such-host.invalid", load_checkpoint),
        ("http://127.0.0.1:{port}", pin_checkpoint),
    ],
    ids=["unknown", "refused"],
)
def test_hub_that_cannot_be_reached_is_no_usage_error(
    endpoint: str, use: Any, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    with socket.socket() as unused:
        # Bound, but not listening: connections are refused.
        unused.bind(("127.0.0.1", 0))
        endpoint = endpoint.format(port=unused.getsockname()[1])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("urllib.request.getproxies", dict)
        start = time.monotonic()
        with raises(RunError, f"hf:{NAME}", "model.safetensors", "config.json") as caught:
            use(f"hf:{NAME}")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(401, UserError), (403, UserError), (408, RunError), (429, RunError), (503, RunError)],
)
def test_only_requests_that_the_hub_rejects_are_usage_errors(
    code: int, expected: type[Exception], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    response: Any = SimpleNamespace(status_code=code, headers={}, request=None)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise HfHubHTTPError(f"{code} from the server", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with raises(expected, f"hf:{NAME}", str(code)):
        load_checkpoint(f"hf:{NAME}")


def test_lost_connection_to_the_hub_is_no_usage_error(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadError(Exception):
        """Error of a library for HTTP, which is not an OSError."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ReadError("connection lost")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with raises(RunError, f"hf:{NAME}", "connection lost"):
        load_checkpoint(f"hf:{NAME}")


@pytest.mark.parametrize("name", ["--/x", "a b/c", "a/b..c", "a/b--c", "a/" + "x" * 200])
def test_download_rejects_invalid_names(name: str, hub_cache: Path) -> None:
    with raises(UserError, f"hf:{name}", "hf:OWNER/NAME") as caught:
        load_checkpoint(f"hf:{name}")
    assert "\n" not in str(caught.value)


def test_download_requests_both_files_if_one_is_missing(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of one revision must not be read with the weights of another."""
    add_to_cache(hub_cache, random_weights().params, GOOGLE)
    (model,) = hub_cache.rglob("model.safetensors")
    model.unlink()
    requested = record_requests(monkeypatch)
    with raises(UserError, f"hf:{NAME}"):
        load_checkpoint(f"hf:{NAME}")
    assert requested == ["config.json", "model.safetensors"]
