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
    ("source", "message"),
    [
        ("nothing.npz", "checkpoint 'nothing.npz' does not exist"),
        ("nothing", "checkpoint 'nothing' holds no checkpoint; name a run's folder"),
        ("", "holds no checkpoint"),
        ("empty", "checkpoint 'empty' holds no checkpoint"),
        ("notes.txt", "checkpoint 'notes.txt' is of no known kind; files end in .npz, .safetens"),
        ("x" * 5000 + ".npz", "x.npz' does not exist"),
        ("x" * 5000, "x' holds no checkpoint"),
        ("hf:", "checkpoint 'hf:' is no name on the Hub; write hf:OWNER/NAME"),
        ("hf:name", "is no name on the Hub"),
        ("hf:/name", "is no name on the Hub"),
        ("hf:owner/", "is no name on the Hub"),
        ("hf:a/b/c", "is no name on the Hub"),
        ("hf:@a/b", "is no name on the Hub"),
        ("data.tar", "checkpoint 'data.tar' is of no known kind"),
        ("https://some.where/Mixer.npz", "at a URL that is not read; download the file and name"),
        ("https://some.where/Mixer.npz", "name a place at one of gs://, s3://, az://"),
        ("https://some.where/run", "at a URL that is not read"),
        ("file:///tmp/Mixer.npz", "at a URL that is not read"),
        ("hf://timm/mixer", "write hf:OWNER/NAME"),
        ("two\nlines.npz", r"checkpoint 'two\nlines.npz' does not exist"),
    ],
)
def test_what_is_nowhere_is_told_in_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "data.tar"):
        (tmp_path / name).write_text("notes")
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_runs_have_steps(tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch()
    for source in (str(tmp_path / "a.npz"), "hf:a/b"):
        with pytest.raises(UserError, match="has no steps, for it is no run; leave out the step"):
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
        with pytest.raises(UserError, match=f"^{BUCKET}text.npz is no npz archive"):
            load_checkpoint(f"{BUCKET}text.npz")
        with pytest.raises(UserError, match=f"'{BUCKET}nothing.npz' does not exist"):
            load_checkpoint(f"{BUCKET}nothing.npz")

    def unreachable(original: Any, path: Any) -> bool:
        raise RuntimeError(f"no credentials\n for {path}")

    message = f"^checkpoint '{BUCKET}text.npz' cannot be reached: no credentials for {BUCKET}"
    with (
        bucket(tmp_path),
        mock_epath(exists=unreachable, isdir=unreachable),
        pytest.raises(UserError, match=message),
    ):
        load_checkpoint(f"{BUCKET}text.npz")


def test_a_bucket_without_a_library_to_read_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    # As without TensorFlow.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"cannot be reached: .*gcsfs") as caught:
        load_checkpoint(f"{BUCKET}Mixer.npz")
    assert str(caught.value).endswith('; pip install "mixer-jax[gcs]"')
    assert '"gcs": [' in (root / "setup.py").read_text()


def test_torch_files_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pth").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model.pth can only be read by PyTorch: pip install torc"):
        load_checkpoint(str(tmp_path / "model.pth"))
