"""Tests of the datasets of a run: mixtures, and runs with bad images."""

import dataclasses
import errno
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.config.schema import BadImagesConfig, EvalConfig, MixtureConfig
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Example, Examples, Source, mix_sources
from mixer_jax.distributed import multihost
from mixer_jax.errors import RunError, UserError
from mixer_jax.training.datasets import (
    RunDatasets,
    balanced_class_weights,
    open_datasets,
    open_train_dataset,
)
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.bad_images import reason_of
from tests.helpers.images import encode, noise
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

PNG = encode(noise(8, 8), "PNG")


@pytest.mark.slow
def test_mixture_is_trained_on_and_its_parts_are_evaluated(digits_dir: str, tmp_path: Path) -> None:
    config = dataclasses.replace(
        small_config(digits_dir),
        mixture={
            "high": MixtureConfig("digits/high"),
            "low": MixtureConfig("digits/low", weight=3.0),
        },
        evals={"all": EvalConfig(), "low": EvalConfig(dataset="digits/low")},
    )
    datasets = open_datasets(config)
    assert datasets.train.class_names == tuple("5678901234")
    assert len(datasets.train) == 1437
    labels = next(make_train_batches(build_experiment(config, datasets), 0, print))["label"]
    assert np.mean(np.asarray(labels) < 5) == 4 / 16
    scores = train_and_evaluate(config, str(tmp_path)).scores
    assert (scores["all"].num_examples, scores["low"].num_examples) == (360, 193)


CLASSES = ("common", "unseen", "rare", "rarest")


def labeled_source(labels: list[int], name: str = "toy") -> Source:
    examples = [Example(image=PNG, labels=(label,), name=f"{label}") for label in labels]
    return Source(name, examples, CLASSES)


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 70 + [2] * 25 + [3] * 5
    weights = balanced_class_weights(labeled_source(labels))
    found = np.array([0, 2, 3])
    expected = compute_class_weight("balanced", classes=found, y=labels)
    np.testing.assert_allclose(weights[found], expected, rtol=1e-6)
    assert weights[1] == 0
    assert weights[labels].mean() == pytest.approx(1)


def test_balanced_class_weights_of_a_mixture_follow_what_is_sampled() -> None:
    sources = [labeled_source([0] * 90 + [2] * 10), labeled_source([3] * 10)]
    weights = balanced_class_weights(mix_sources(sources, (0.5, 1.5)))
    # Sampled fractions: 0.25 × 0.9, 0.25 × 0.1, and 0.75.
    assert weights.tolist() == pytest.approx([1 / (3 * 0.225), 0, 1 / (3 * 0.025), 1 / (3 * 0.75)])


def test_labels_that_cannot_be_read_have_no_weight() -> None:
    class Unreadable(Examples):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("images must not be read")

        def read_labels(self, index: int) -> tuple[int, ...]:
            if index == 2:
                raise BadImageError("damaged record")
            return (0,) if index < 3 else (2,)

    source = Source("toy", Unreadable(), CLASSES)
    assert balanced_class_weights(source, num_threads=2).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("loss", "softmax", "sigmoid"),
        ("label_smoothing", 0.1, "config.recipe.min_target"),
        ("class_weights", "balanced", "none"),
    ],
)
def test_recipes_for_one_label_are_refused_for_several(
    key: str, value: Any, fix: str, shapes_dir: str
) -> None:
    settings = {"recipe__loss": "sigmoid", f"recipe__{key}": value}
    config = small_config(shapes_dir, dataset__name="mixer_shapes", **settings)
    with raises(UserError, f"config.recipe.{key}", "mixer_shapes", repr(value), fix) as caught:
        open_train_dataset(config)
    assert "\n" not in str(caught.value)


def test_best_metrics_that_the_data_lack_are_refused(shapes_dir: str, digits_dir: str) -> None:
    multi_label = (shapes_dir, {"dataset__name": "mixer_shapes", "recipe__loss": "sigmoid"})
    for (data_dir, settings), metric, other in (
        (multi_label, "top1", "mean_average_precision"),
        ((digits_dir, {}), "loss", "log_likelihood"),
    ):
        accepted, refused = (
            small_config(data_dir, checkpoint__best_metric=f"test/{name}", **settings)
            for name in (other, metric)
        )
        open_datasets(accepted)
        with raises(
            UserError, "config.checkpoint.best_metric", f"test/{other}", f"'test/{metric}'"
        ):
            open_datasets(refused)


def write_class(folder: Path, count: int, content: bytes, suffix: str = ".png") -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}{suffix}").write_bytes(content)


def test_a_training_dataset_of_one_class_is_rejected(tmp_path: Path) -> None:
    write_class(tmp_path / "photos" / "cat", 3, PNG)
    write_class(tmp_path / "photos" / "dog", 3, PNG)
    config = small_config("", dataset__name=f"folder:{tmp_path}")
    with raises(UserError, "config.dataset.name", "photos", "cat, dog", f"{tmp_path}/photos"):
        open_train_dataset(config)
    assert open_dataset(config.dataset.name, "train").num_classes == 1
    config = small_config("", dataset__name=f"folder:{tmp_path}/photos")
    assert open_train_dataset(config).class_names == ("cat", "dog")


def test_a_class_without_a_readable_training_image_is_rejected(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", 30, PNG)
    write_class(tmp_path / "dog", 30, b"")
    for mixture in ({}, {"a": MixtureConfig(f"folder:{tmp_path}"), "b": MixtureConfig("digits")}):
        config = small_config("", dataset__name=f"folder:{tmp_path}")
        with raises(UserError, "dog", f"{tmp_path}/dog", reason_of(b"")):
            open_train_dataset(dataclasses.replace(config, mixture=mixture))
    assert len(open_dataset(config.dataset.name, "train")) == 54


def test_notes_of_all_datasets_are_collected_once(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_class(tmp_path / split / "cat", 3, PNG)
        write_class(tmp_path / split / "dog", 3, PNG)
    write_class(tmp_path / "train" / "dog" / "raw", 2, PNG, ".xyz")
    write_class(tmp_path / "test" / "dog" / "raw", 1, PNG, ".txt")
    config = small_config("", dataset__name=f"folder:{tmp_path}", evals__test__split="validation")
    notes = open_datasets(config).notes
    each = (("train", "2 .xyz"), ("test", "1 .txt"), (f"{tmp_path}", "test", "validation"))
    assert each_mentions(notes, *each)


def test_images_that_change_after_a_run_has_opened_its_data_are_bad(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_class(tmp_path / split / "cat", 1, PNG)
        write_class(tmp_path / split / "dog", 1, PNG)
    datasets = open_datasets(small_config("", dataset__name=f"folder:{tmp_path}"))
    for split, source in (("train", datasets.train), ("test", datasets.evals["test"])):
        (tmp_path / split / "cat" / "0.png").write_bytes(encode(noise(9, 9), "PNG"))
        with pytest.raises(BadImageError, match="changed"):
            source.examples[0]
        assert source.examples[1]["image"] == PNG


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_missing_data_are_a_usage_error(kind: str, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir)
    if kind == "folder":
        write_class(tmp_path / "cat", 3, PNG)
        write_class(tmp_path / "dog", 3, PNG)
        config = small_config(digits_dir, dataset__name=f"folder:{tmp_path}")
    else:
        shutil.copytree(f"{digits_dir}/digits", tmp_path / "digits")
        config = small_config(str(tmp_path))
    train = open_train_dataset(config)
    datasets = RunDatasets(train, {}, {}, train.fingerprint())
    datasets.check_hosts()
    # Another host opens the files only when it receives the datasets.
    received = pickle.dumps(datasets)
    for path in [*tmp_path.glob("*/*.png"), *tmp_path.rglob("*.array_record*")]:
        path.unlink()
    with raises(UserError, "host 0", str(tmp_path)):
        pickle.loads(received).check_hosts()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "the disk has failed"),
        RuntimeError("the disk has failed"),
        ValueError("the disk has failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_data_that_cannot_be_read_are_not_a_usage_error(
    error: Exception, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    write_class(tmp_path / "cat", 3, PNG)
    write_class(tmp_path / "dog", 3, PNG)
    train = open_train_dataset(small_config("", dataset__name=f"folder:{tmp_path}"))
    gathered: list[str] = []

    def gather_text(text: str) -> list[str]:
        gathered.append(text)
        return ["", text]

    monkeypatch.setattr(multihost, "gather_text", gather_text)
    monkeypatch.setattr(Path, "lstat", fail)
    with raises(RunError, "host 1", "disk has failed"):
        RunDatasets(train, {}, {}).check_hosts()
    # The other hosts got the text, which they wait for.
    assert some_line_mentions("\n".join(gathered), "disk has failed")


@pytest.fixture
def folder_with_bad_images(digits_dir: str, tmp_path: Path) -> str:
    """A folder of 200 digits, three of them broken, and of 20 good ones for evaluation."""
    source = open_dataset("digits", "train", digits_dir)
    for index in range(220):
        example = source.examples[index]
        split = "train" if index < 200 else "test"
        path = tmp_path / "images" / split / str(example["labels"][0]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example["image"] if index not in (17, 60, 150) else b"broken")
    return f"folder:{tmp_path}/images"


def logged_names(workdir: Path) -> list[str]:
    lines = (workdir / "bad_images_0.jsonl").read_text().splitlines()
    return sorted(Path(json.loads(line)["name"]).name for line in lines)


def test_training_replaces_bad_images_and_logs_them(
    folder_with_bad_images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(folder_with_bad_images.removeprefix("folder:"), "train", "3", "list.txt").touch()
    # 320 images are more than an epoch, so all have been seen.
    config = small_config(
        "",
        dataset__name=folder_with_bad_images,
        bad_images__max_fraction=0.02,
        **NO_REGULARIZATION,
    )
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert (result.step, result.scores["test"].num_examples) == (20, 20)
    assert logged_names(tmp_path / "run") == ["150.png", "17.png", "60.png"]
    out = capsys.readouterr().out
    reason, log = reason_of(b"broken"), f"{tmp_path}/run/bad_images_0.jsonl"
    assert some_line_mentions(out, "3", reason, log)
    assert some_line_mentions(out, "images/train", "1 .txt")
    # The first one is printed at once.
    names = ("150.png", "17.png", "60.png")
    assert sum(some_line_mentions(out, name, reason, log) for name in names) == 1


@pytest.mark.slow
def test_too_many_bad_images_stop_the_run_and_it_can_be_resumed(
    folder_with_bad_images: str, tmp_path: Path
) -> None:
    config = small_config(
        "",
        dataset__name=folder_with_bad_images,
        bad_images__max_fraction=0.01,
        bad_images__max_count=1,
        **NO_REGULARIZATION,
    )
    with pytest.raises(RunError) as caught:
        train_and_evaluate(config, str(tmp_path / "run"))
    assert mentions(str(caught.value), "3", "200", "config.bad_images.max_fraction", "0.01")
    (step,) = list_steps(str(tmp_path / "run"))[-1:]
    assert re.search(rf"\bstep\W*{step}\b", str(caught.value))
    assert step < 20
    config = dataclasses.replace(config, bad_images=BadImagesConfig(max_count=3))
    assert train_and_evaluate(config, str(tmp_path / "run")).step == 20
    # A run that was not stopped has the same log and the same result.
    config = dataclasses.replace(config, bad_images=BadImagesConfig(max_fraction=1.0))
    train_and_evaluate(config, str(tmp_path / "uninterrupted"))
    workdirs = [tmp_path / "run", tmp_path / "uninterrupted"]
    logs = [(workdir / "bad_images_0.jsonl").read_text() for workdir in workdirs]
    assert logs[0] == logs[1]
    last = [read_metrics(str(workdir))[-1] for workdir in workdirs]
    assert last[0]["test/log_likelihood"] == last[1]["test/log_likelihood"]


def test_bad_evaluation_image_fails_its_evaluation_or_is_counted(
    folder_with_bad_images: str, digits_dir: str, tmp_path: Path
) -> None:
    (broken,) = Path(folder_with_bad_images.removeprefix("folder:")).glob("test/*/207.png")
    broken.write_bytes(b"")
    config = small_config(
        "",
        dataset__name=folder_with_bad_images,
        dataset__data_dir=digits_dir,
        bad_images__max_fraction=1.0,
        **NO_REGULARIZATION,
    )
    other = EvalConfig("knn", "digits/all", "test[:20]", "train[:50]")
    config = dataclasses.replace(config, evals=dict(config.evals) | {"digits": other})
    key = "config.bad_images.skip_in_evaluation=true"
    # The second time, the run is finished.
    for _ in range(2):
        result = train_and_evaluate(config, str(tmp_path / "run"))
        assert (result.step, result.scores.keys()) == (20, {"digits"})
        with raises(UserError, "test", str(broken), reason_of(b""), key):
            result.raise_failures()
    skipping = BadImagesConfig(max_fraction=1.0, skip_in_evaluation=True)
    config = dataclasses.replace(config, bad_images=skipping)
    scores = train_and_evaluate(config, str(tmp_path / "run")).scores["test"]
    assert (scores.num_examples, scores.num_bad) == (19, 1)
