"""Tests of the names in `mixer_jax`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import mixer_jax
from mixer_jax import config as config_lib
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS
from tests.helpers.messages import mentions, raises


def test_public_names_exist_and_are_listed() -> None:
    for name in mixer_jax.__all__:
        assert getattr(mixer_jax, name) is not None
        assert name in dir(mixer_jax)


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="create_modle"):
        mixer_jax.create_modle  # noqa: B018


def test_list_models_has_the_papers_models() -> None:
    assert {f"Mixer-{variant}" for variant in VARIANTS} <= set(mixer_jax.list_models())
    model = mixer_jax.create_model("Mixer-S/32", num_classes=3)
    assert model.num_classes == 3


@pytest.fixture(scope="module")
def config(digits_dir: str) -> ConfigDict:
    """Config that trains a small model for a few steps."""
    config = mixer_jax.load_config("digits")
    config.num_steps, config.batch_size, config.eval_batch_size = 4, 16, 128
    config.image_size = 16
    config.model.num_blocks = 1
    config.preprocess.max_shift = 1
    config.optimizer.warmup_steps = 2
    config.log_every_steps = 2
    config.checkpoint.every_steps = 2
    config.tensorboard = False
    config.dataset.data_dir = digits_dir
    return config


@pytest.fixture(scope="module")
def workdir(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("api") / "run"
    result = mixer_jax.train(config, workdir)
    assert (result.step, result.num_steps, result.stopped_by) == (4, 4, None)
    assert result.scores.keys() == {"test"}
    assert result.scores["test"].as_dict()["num_examples"] == 360
    return workdir


def test_train_writes_the_files_of_the_command_and_resumes(
    config: ConfigDict, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"checkpoints", "config.json", "curves.png", "metrics.jsonl"} <= {
        path.name for path in workdir.iterdir()
    }
    # As if the run had been killed after its first checkpoint.
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    result = mixer_jax.train(config, str(copy))
    assert (result.step, result.num_steps) == (4, 4)
    out, err = capsys.readouterr()
    assert mentions(out, "resuming", "2")
    assert err == ""


def test_train_refuses_an_invalid_config_and_writes_nothing(
    config: ConfigDict, tmp_path: Path
) -> None:
    invalid = config.copy_and_resolve_references()
    invalid.image_size = 15
    with raises(UserError, "image_size", "8", "15"):
        mixer_jax.train(invalid, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_train_in_a_script_without_a_guard_names_the_guard(digits_dir: str, tmp_path: Path) -> None:
    """Worker processes import the script of their parent, and would train again."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import mixer_jax
config = mixer_jax.load_config("digits")
config.num_steps, config.optimizer.warmup_steps = 2, 1
config.image_size, config.model.num_blocks, config.batch_size = 16, 1, 16
config.preprocess.max_shift = 1
config.loader.num_workers = 2
config.dataset.data_dir = {digits_dir!r}
mixer_jax.train(config, {str(tmp_path / "run")!r})
"""
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 1
    *rest, parent = done.stderr.strip().splitlines()
    for line in (next(line for line in rest if "UserError: " in line), parent):
        assert mentions(line, "mixer_jax.train", 'if __name__ == "__main__":')
    assert "locked" not in done.stderr


def test_classifier_evaluates_like_the_run(
    config: ConfigDict, workdir: Path, digits_dir: str
) -> None:
    classifier = mixer_jax.load_pretrained(workdir)
    metrics = classifier.evaluate("digits", data_dir=digits_dir, batch_size=100)
    final = mixer_jax.train(config_of(workdir), workdir).scores["test"]
    assert metrics.num_examples == 360
    assert metrics.top1 == final.as_dict()["top1"]
    # Classes are matched by name: those of the digits 5 to 9 have other indices in this data.
    high = classifier.evaluate("digits/high", data_dir=digits_dir)
    low = classifier.evaluate("digits/low", data_dir=digits_dir)
    num_correct = high.top1 * high.num_examples + low.top1 * low.num_examples
    assert num_correct == pytest.approx(metrics.top1 * 360)
    features = mixer_jax.load_pretrained(workdir, num_classes=0)
    with raises(UserError, "head"):
        features.evaluate("digits", data_dir=digits_dir)


def test_classifier_evaluates_with_the_data_folder_of_the_run(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where digits would be prepared by default.
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    assert mixer_jax.load_pretrained(workdir).evaluate("digits").num_examples == 360
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [0, -8])
def test_classifier_rejects_batch_sizes_that_are_not_positive(
    workdir: Path, batch_size: int
) -> None:
    with raises(UserError, "batch_size", "1", str(batch_size)):
        mixer_jax.load_pretrained(workdir).evaluate("digits", batch_size=batch_size)


def test_classifier_evaluates_on_one_host_only(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its devices are local, but the evaluation would wait for all hosts."""
    classifier = mixer_jax.load_pretrained(workdir)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with raises(UserError, "one host", "2", "python -m mixer_jax.evaluate"):
        classifier.evaluate("digits")


def test_classifier_rejects_data_with_other_classes(workdir: Path, digits_dir: str) -> None:
    renamed = mixer_jax.load_pretrained(workdir, class_names=[f"c{k}" for k in range(10)])
    with raises(UserError, "dataset=digits", "c0", "unknown", "Choose") as error:
        renamed.evaluate("digits", data_dir=digits_dir)
    assert "--" not in str(error.value)


def config_of(workdir: Path) -> ConfigDict:
    """Reads the config of a run."""
    saved = json.loads((workdir / "config.json").read_text())
    return ConfigDict(config_lib.fill_defaults(saved))


def test_classifier_preprocesses_images_as_in_prediction(workdir: Path, digits_dir: str) -> None:
    classifier = mixer_jax.load_pretrained(workdir)
    source = open_dataset("digits", "test", digits_dir)
    encoded = [source.examples[index]["image"] for index in range(5)]
    images = classifier.preprocess(encoded)
    assert (images.shape, images.dtype) == ((5, 16, 16, 3), np.float32)
    assert -1.0 <= images.min() < images.max() <= 1.0
    logits = np.asarray(classifier(images))
    for prediction, row in zip(classifier.predict(encoded, topk=1), logits, strict=True):
        assert prediction.classes[0].class_index == row.argmax()
    assert classifier.preprocess([]).shape == (0, 16, 16, 3)
    with pytest.raises(BadImageError, match="image 1"):
        classifier.preprocess([encoded[0], b"no image"])


def test_classifier_exports_in_the_format_of_the_suffix(workdir: Path, tmp_path: Path) -> None:
    classifier = mixer_jax.load_pretrained(workdir)
    target = tmp_path / "digits.npz"
    target.write_bytes(b"an older file")
    assert mentions(classifier.export(target), "bit-identical")
    images = np.zeros((2, 16, 16, 3), np.float32)
    np.testing.assert_array_equal(
        mixer_jax.load_pretrained(target)(images), classifier(images), strict=True
    )
    with raises(UserError, ".npz", "digits.txt"):
        classifier.export(tmp_path / "digits.txt")


def test_figures_are_shown_in_notebooks(config: ConfigDict) -> None:
    # The method that IPython calls.
    assert mixer_jax.plot_batch(config, num_images=1)._repr_png_().startswith(b"\x89PNG")


def test_plot_curves_draws_the_metrics_of_a_run(workdir: Path, tmp_path: Path) -> None:
    titles = [axes.get_title() for axes in mixer_jax.plot_curves(workdir).axes]
    assert titles == ["loss", "learning rate", "accuracy (%)"]
    with raises(UserError, str(tmp_path), "metrics.jsonl"):
        mixer_jax.plot_curves(tmp_path)


def test_plot_curves_expands_the_home_folder(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(workdir.parent))
    assert mixer_jax.plot_curves(f"~/{workdir.name}").axes


def test_plot_batch_draws_training_images(config: ConfigDict) -> None:
    figure = mixer_jax.plot_batch(config, step=1, num_images=3)
    assert [axes.get_images()[0].get_array().shape for axes in figure.axes] == [(16, 16, 3)] * 3
    # By default no more images than a batch has.
    small = config.copy_and_resolve_references()
    small.batch_size = 8
    assert len(mixer_jax.plot_batch(small).axes) == 8
    for arguments in ({"step": 4}, {"num_images": 17}, {"num_images": 0}):
        ((name, value),) = arguments.items()
        with raises(UserError, name, str(value)) as error:
            mixer_jax.plot_batch(config, **arguments)
        assert "--" not in str(error.value)
