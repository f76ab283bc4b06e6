"""Tests of the data of a run: mixtures, and images that cannot be used."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.config.config import evals, mixture, validate
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import RunError, UserError
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.bad_images import reason_of
from tests.helpers.lines import some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config


def test_a_mixture_is_trained_on_and_scored_on_its_parts(digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir)
    config.mixture = mixture(
        low={"dataset": "digits/low", "weight": 3.0}, high={"dataset": "digits/high"}
    )
    config.evals = evals(all={}, low={"dataset": "digits/low"})
    validate(config)
    sources = open_datasets(config)
    # Entries stand in the order of their names.
    assert sources.train.class_names == tuple("5678901234")
    assert len(sources.train) == 1437
    labels = next(make_train_batches(build_experiment(config, sources), 0, print))["label"]
    assert np.mean(np.asarray(labels) < 5) == 4 / 16
    scores = train_and_evaluate(config, str(tmp_path)).scores
    assert (scores["all"].num_examples, scores["low"].num_examples) == (360, 193)


@pytest.fixture
def some_broken(digits_dir: str, tmp_path: Path) -> str:
    """A folder of 200 digits, of which three are broken, and 20 whole ones held out."""
    source = open_dataset("digits", "train", digits_dir)
    for index in range(220):
        example = source.examples[index]
        split = "train" if index < 200 else "test"
        path = tmp_path / "images" / split / str(example["labels"][0]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example["image"] if index not in (17, 60, 150) else b"broken")
    return f"folder:{tmp_path}/images"


def names_of_bad(workdir: Path) -> list[str]:
    lines = (workdir / "bad_images_0.jsonl").read_text().splitlines()
    return sorted(Path(json.loads(line)["name"]).name for line in lines)


def test_training_goes_on_past_bad_images_and_names_them(
    some_broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 320 images are more than an epoch, so that all have been met.
    config = small_config(
        "", dataset__name=some_broken, bad_images__max_fraction=0.02, **NO_REGULARIZATION
    )
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert (result.step, result.scores["test"].num_examples) == (20, 20)
    assert names_of_bad(tmp_path / "run") == ["150.png", "17.png", "60.png"]
    told = capsys.readouterr().out
    reason, book = reason_of(b"broken"), f"{tmp_path}/run/bad_images_0.jsonl"
    assert some_line_mentions(told, "3", reason, book)
    # The first that was met is named at once.
    names = ("150.png", "17.png", "60.png")
    assert sum(some_line_mentions(told, name, reason, book) for name in names) == 1


def test_too_many_bad_images_stop_the_run_which_can_go_on(some_broken: str, tmp_path: Path) -> None:
    config = small_config(
        "", dataset__name=some_broken, bad_images__max_fraction=0.01, **NO_REGULARIZATION
    )
    with pytest.raises(RunError) as stop:
        train_and_evaluate(config, str(tmp_path / "run"))
    assert mentions(str(stop.value), "3", "200", "config.bad_images.max_fraction", "0.01")
    (step,) = list_steps(str(tmp_path / "run"))[-1:]
    assert re.search(rf"\bstep\W*{step}\b", str(stop.value))
    assert step < 20
    config.bad_images.max_fraction = 0.02
    assert train_and_evaluate(config, str(tmp_path / "run")).step == 20
    whole = small_config(
        "", dataset__name=some_broken, bad_images__max_fraction=1.0, **NO_REGULARIZATION
    )
    train_and_evaluate(whole, str(tmp_path / "whole"))
    books = [(tmp_path / name / "bad_images_0.jsonl").read_text() for name in ("run", "whole")]
    assert books[0] == books[1]
    last = [read_metrics(str(tmp_path / name))[-1] for name in ("run", "whole")]
    assert last[0]["test/log_likelihood"] == last[1]["test/log_likelihood"]


def test_a_bad_image_in_evaluation_is_named_or_counted(some_broken: str, tmp_path: Path) -> None:
    (broken,) = Path(some_broken.removeprefix("folder:")).glob("test/*/207.png")
    broken.write_bytes(b"")
    config = small_config(
        "", dataset__name=some_broken, bad_images__max_fraction=1.0, **NO_REGULARIZATION
    )
    way_out = "config.bad_images.skip_in_evaluation=true"
    with raises(UserError, str(broken), reason_of(b""), way_out):
        train_and_evaluate(config, str(tmp_path / "run"))
    # The evaluation of step 10 failed; of what was trained up to there, nothing is lost.
    assert list_steps(str(tmp_path / "run"))[-1] == 10
    config.bad_images.skip_in_evaluation = True
    scores = train_and_evaluate(config, str(tmp_path / "run")).scores["test"]
    assert (scores.num_examples, scores.num_bad) == (19, 1)
