"""Tests of the names in `mixer_jax`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import mixer_jax
from mixer_jax import config as config_lib
from mixer_jax.checkpoints.model_zoo import MODEL_ZOO
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import ClassificationMetrics
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.training.metrics import read_metrics
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


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ("mixer-b/*", ["Mixer-B/32", "Mixer-B/16"]),
        (["ViT-H/14", "BiT-R50x[13]"], ["ViT-H/14", "BiT-R50x1", "BiT-R50x3"]),
        ("Mixer", []),
    ],
)
def test_list_models_filters_by_wildcards(filter: str | list[str], expected: list[str]) -> None:
    assert sorted(mixer_jax.list_models(filter)) == sorted(expected)


def test_list_models_lists_pretrained_weights_by_their_name_or_model() -> None:
    everything = mixer_jax.list_models(pretrained=True)
    assert everything == [entry.source for entry in MODEL_ZOO]
    assert mixer_jax.list_models("*", pretrained=True) == everything
    on_hub = mixer_jax.list_models("hf:timm/mixer_*", pretrained=True)
    assert "hf:timm/mixer_b16_224.goog_in21k" in on_hub
    by_model = mixer_jax.list_models("Mixer-B/16", pretrained=True)
    assert {"gs://mixer_models/imagenet1k/Mixer-B_16.npz", on_hub[0]} < {*by_model}
    assert len(by_model) == sum(entry.model == "Mixer-B/16" for entry in MODEL_ZOO)
    # `load_pretrained` finds the format of each.
    for name in everything:
        if name.startswith("hf:"):
            assert resolve_checkpoint(name).format == "hub"


@pytest.mark.parametrize(
    "first",
    [
        "import mixer_jax",
        "import mixer_jax.evaluate",
        "from mixer_jax import evaluate",
        "import mixer_jax; mixer_jax.evaluate; import mixer_jax.evaluate",
    ],
)
def test_evaluate_is_function_and_command_in_any_order_of_imports(first: str) -> None:
    code = f"""
{first}
import inspect, sys, mixer_jax
before = mixer_jax.evaluate
from mixer_jax import evaluate
from mixer_jax.evaluate import main
import mixer_jax.evaluate
assert before is evaluate is mixer_jax.evaluate is sys.modules["mixer_jax.evaluate"]
assert callable(main) and evaluate.main is main
assert list(inspect.signature(mixer_jax.evaluate).parameters)[:3] == [
    "checkpoint", "dataset", "split"
]
assert "jax" not in sys.modules
try:
    mixer_jax.evaluate("none.npz")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert mentions(done.stdout, "none.npz")


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
    assert result.metrics["test/num_examples"] == 360
    last = {key: value for line in read_metrics(str(workdir)) for key, value in line.items()}
    assert {name: last[name] for name in result.metrics} == result.metrics
    return workdir


def test_evaluate_returns_what_the_command_prints(
    workdir: Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = mixer_jax.evaluate(workdir, "digits", data_dir=digits_dir)
    flags = [f"--checkpoint={workdir}", "--dataset=digits", f"--data_dir={digits_dir}", "--json"]
    assert mixer_jax.evaluate.main(flags) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert result == mixer_jax.evaluate(str(workdir)) | {"dataset": "digits"}
    smaller = mixer_jax.evaluate(workdir, "digits/low", "test[:50%]", step=2, image_size=32)
    assert (smaller["step"], smaller["image_size"], smaller["split"]) == (2, [32, 32], "test[:50%]")
    assert smaller["num_examples"] < 180


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"dataset": "digts"}, ["digts"]),
        ({"split": "tset"}, ["tset"]),
        ({"step": 3}, ["3"]),
        ({"dtype": "float16"}, ["dtype", "float16"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"image_size": 15}, ["image_size", "15"]),
    ],
)
def test_evaluate_refuses_invalid_arguments(
    workdir: Path, arguments: dict[str, Any], parts: list[str]
) -> None:
    with raises(UserError, *parts):
        mixer_jax.evaluate(workdir, **arguments)


def test_evaluate_needs_a_dataset_for_weights_that_do_not_record_it(
    workdir: Path, tmp_path: Path
) -> None:
    mixer_jax.load_pretrained(workdir).export(tmp_path / "digits.npz")
    with raises(UserError, "digits.npz", "dataset"):
        mixer_jax.evaluate(tmp_path / "digits.npz")


def test_train_takes_a_name_or_path_and_overrides(
    config: ConfigDict, digits_dir: str, tmp_path: Path
) -> None:
    overrides = {
        "num_steps": np.int64(2),
        "optimizer.warmup_steps": 1,
        "optimizer.learning_rate": np.float64(1e-3),
        "batch_size": 16,
        "model.num_blocks": 1,
        "tensorboard": False,
        "evals.test.every_steps": 1,
        "dataset.data_dir": digits_dir,
    }
    result = mixer_jax.train("digits:low", tmp_path / "name", overrides)
    assert (result.step, result.metrics["test/num_examples"] > 0) == (2, True)
    saved = config_of(tmp_path / "name")
    assert (saved.dataset.name, saved.num_steps, saved.evals.test.every_steps) == (
        "digits/low",
        2,
        1,
    )
    before = config.to_dict()
    short = {"num_steps": 2, "optimizer.warmup_steps": 1}
    assert mixer_jax.train(config, tmp_path / "config", short).num_steps == 2
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "overrides", "parts"),
    [
        ("digts", {}, ["digts", "digits"]),
        ("digits", {"num_step": 1}, ["num_step", "num_steps"]),
        ("digits", {"seed": "1"}, ["seed", "integer", "'1'"]),
        ("digits", {"seed": 1.5}, ["seed", "integer", "1.5"]),
        ("digits", {"tensorboard": 1}, ["tensorboard", "true or false", "1"]),
        ("digits", {"batch_size": True}, ["batch_size", "integer", "True"]),
        ("digits", {"recipe.loss": "hinge"}, ["recipe.loss", "softmax", "hinge"]),
    ],
)
def test_train_refuses_invalid_configs_and_overrides(
    config: Any, overrides: Any, parts: list[str], tmp_path: Path
) -> None:
    with raises(UserError, *parts):
        mixer_jax.train(config, tmp_path / "run", overrides)
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_wrong_types_are_refused_in_one_line(tmp_path: Path) -> None:
    # In a process without the checks of types that the tests add.
    calls = {
        "mixer_jax.list_models(3)": ["filter", "3"],
        "mixer_jax.list_models(['ViT*', None])": ["filter", "None"],
        "mixer_jax.load_config(None)": ["config", "None"],
        "mixer_jax.load_config('digits', ['seed'])": ["overrides", "seed"],
        "mixer_jax.train({'seed': 1}, 'run')": ["config", "seed"],
        "mixer_jax.train('digits', None)": ["workdir", "None"],
        "mixer_jax.train('digits', 'run', {3: 1})": ["overrides", "3"],
        "mixer_jax.evaluate(None)": ["source", "None"],
    }
    code = f"""
import mixer_jax
for call in {[*calls]!r}:
    try:
        eval(call)
    except mixer_jax.errors.UserError as error:
        print(error)
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", f"import mixer_jax.errors{code}"],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for (call, parts), line in zip(calls.items(), lines, strict=True):
        assert mentions(line, *parts), call
    assert list(tmp_path.iterdir()) == []


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
    assert isinstance(metrics, ClassificationMetrics)
    assert metrics.top1 == final.as_dict()["top1"]
    # Classes are matched by name: those of the digits 5 to 9 have other indices in this data.
    high = classifier.evaluate("digits/high", data_dir=digits_dir)
    low = classifier.evaluate("digits/low", data_dir=digits_dir)
    assert isinstance(high, ClassificationMetrics)
    assert isinstance(low, ClassificationMetrics)
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
