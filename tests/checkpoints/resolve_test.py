"""Tests of names of checkpoints: files, runs, the Hub, and URLs."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath
from safetensors.numpy import save_file

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.errors import UserError
from tests.helpers import pretrained_files
from tests.helpers.messages import mentions, raises
from tests.helpers.object_store import BUCKET, object_store
from tests.helpers.random_weights import assert_params_equal, random_weights, save_run


def test_resolve_checkpoint_finds_the_format(tmp_path: Path) -> None:
    formats = {
        "a.npz": "npz",
        "a.safetensors": "safetensors",
        "a.pth": "torch",
        "a.pt": "torch",
        "a.bin": "torch",
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
        assert resolve_checkpoint(f"hf:{name}") == ("hub", name, None)


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


def test_a_missing_url_library_is_reported_with_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
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


def test_a_workdir_that_does_not_exist_differs_from_one_without_checkpoints(tmp_path: Path) -> None:
    with raises(UserError, f"{tmp_path}/nope", "exist"):
        resolve_checkpoint(f"{tmp_path}/nope")
    with raises(UserError, str(tmp_path)) as caught:
        resolve_checkpoint(str(tmp_path))
    assert not mentions(str(caught.value), "exist")
