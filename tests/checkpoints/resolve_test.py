"""Tests of what the name of a checkpoint means, on this machine and behind a URL."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.errors import UserError
from tests.helpers import pretrained_files
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import assert_params_equal, random_weights, save_run

BUCKET = "gs://some_bucket/"


def test_a_name_tells_its_kind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    files = ("a.npz", "a.safetensors", "a.pth", "a.pt", "a.bin", "model_best.pth.tar")
    for name in (*files, "folder/model.safetensors"):
        (tmp_path / name).touch()
    kinds = {
        "a.npz": "npz",
        "a.safetensors": "safetensors",
        "a.pth": "torch",
        "a.pt": "torch",
        "a.bin": "torch",
        "model_best.pth.tar": "torch",
    }
    for name, kind in kinds.items():
        assert resolve_checkpoint(str(tmp_path / name)) == (kind, str(tmp_path / name), None)
    inside = str(tmp_path / "folder/model.safetensors")
    assert resolve_checkpoint(str(tmp_path / "folder")) == ("safetensors", inside, None)
    for name in ("timm/mixer_b16_224.goog_in21k", "a/b@v1.0", "a/b@refs/pr/1"):
        assert resolve_checkpoint(f"hf:{name}") == ("hub", name, None)


def test_a_run_is_known_by_its_folder_and_by_its_steps(tmp_path: Path) -> None:
    run = save_run(random_weights(), tmp_path / "run.npz", step=7)
    for name in (run, f"{run}/checkpoints", f"{run}/checkpoints/7"):
        assert resolve_checkpoint(name) == ("run", run, 7)


def test_a_name_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_is_nowhere_is_told_in_one_line(
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


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[None]:
    """Makes a folder the contents of `BUCKET`; all but the way to it is real."""

    def local(original: Any, path: Any, *rest: Any, **named: Any) -> Any:
        return original(os.fspath(path).replace(BUCKET, f"{folder}/"), *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        # Where TensorFlow is installed, epath would ask it.
        patch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
        with mock_epath(open=local, exists=local, isdir=local, listdir=local, stat=local):
            yield


def test_weights_behind_a_url_are_read_with_what_is_beside_them(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32))
    np.savez(tmp_path / "Mixer.npz", **pretrained_files.google(weights.params))
    (tmp_path / "Mixer.npz.json").write_text('{"image_size": [32, 16]}')
    with bucket(tmp_path):
        assert not epath.Path(f"{BUCKET}nothing.npz").exists()
        loaded = load_checkpoint(f"{BUCKET}Mixer.npz")
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info.image_size == (32, 16)


def test_a_folder_behind_a_url_is_read_with_its_config(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(pretrained_files.timm(random_weights().params), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"interpolation": "bilinear"}')
    with bucket(tmp_path):
        assert load_checkpoint(BUCKET.rstrip("/")).model_info.eval_crop == "bilinear"


def test_errors_behind_a_url_name_the_url_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no weights")
    with bucket(tmp_path):
        with raises(UserError, f"{BUCKET}text.npz"):
            load_checkpoint(f"{BUCKET}text.npz")
        with raises(UserError, f"{BUCKET}nothing.npz"):
            load_checkpoint(f"{BUCKET}nothing.npz")

    def unreachable(original: Any, path: Any) -> bool:
        raise RuntimeError(f"no credentials\n for {path}")

    # The cause's own words, in one line.
    cause = f"no credentials for {BUCKET}text.npz"
    with (
        bucket(tmp_path),
        mock_epath(exists=unreachable, isdir=unreachable),
        raises(UserError, f"'{BUCKET}text.npz'", cause) as caught,
    ):
        load_checkpoint(f"{BUCKET}text.npz")
    assert "\n" not in str(caught.value)


def test_a_bucket_without_a_library_to_read_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    # As without TensorFlow.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with raises(UserError, f"{BUCKET}Mixer.npz", "gcsfs", 'pip install "mixer-jax[gcs]"'):
        load_checkpoint(f"{BUCKET}Mixer.npz")
    assert '"gcs": [' in (root / "setup.py").read_text()


def test_torch_files_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pth").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises(UserError, str(tmp_path / "model.pth"), "pip install torch"):
        load_checkpoint(str(tmp_path / "model.pth"))
