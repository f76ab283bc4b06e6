"""Tests of evaluating a source: the same scores for any batch size and number of devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.data.preprocess import eval_image
from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import (
    ClassificationMetrics,
    EvalStep,
    evaluate,
    make_eval_step,
)
from mixer_jax.models.mixer import MlpMixer
from tests.evaluation.conftest import IMAGE_SIZE, read_by
from tests.helpers.reference_metrics import log_softmax, reference_calibration_error


@pytest.fixture(scope="module")
def expected(
    small_model: MlpMixer, small_params: Any, digits_test: Source
) -> ClassificationMetrics:
    """The scores from the definitions, in float64, without batches."""
    examples = [digits_test.examples[index] for index in range(len(digits_test))]
    labels = np.array([example["labels"][0] for example in examples])
    images = np.stack(
        [eval_image(e["image"], image_size=IMAGE_SIZE, eval_crop="resize") for e in examples]
    )
    logits = jax.jit(small_model.apply)(
        {"params": small_params}, images.astype(np.float32) / 127.5 - 1
    )
    log_probs = log_softmax(np.asarray(logits))
    ranking = np.argsort(-log_probs, axis=1)
    right = ranking[:, 0] == labels
    return ClassificationMetrics(
        top1=right.mean(),
        top5=(ranking[:, :5] == labels[:, None]).any(1).mean(),
        log_likelihood=log_probs[range(360), labels].mean(),
        calibration_error=reference_calibration_error(np.exp(log_probs.max(1)), right),
        num_examples=360,
    )


@pytest.fixture(scope="module", params=[1, 8])
def run_evaluation(
    request: pytest.FixtureRequest, small_model: MlpMixer, small_params: Any
) -> Callable[[Source, int], ClassificationMetrics]:
    mesh = make_mesh(0, 1, jax.devices()[: request.param])
    eval_step: EvalStep = make_eval_step(small_model, mesh)

    def run(source: Source, batch_size: int, skip_bad: bool = False) -> ClassificationMetrics:
        return evaluate(eval_step, small_params, source, mesh, read_by(batch_size, skip_bad))

    return run


@pytest.mark.parametrize("batch_size", [7, 64, 360, 1000])
def test_batch_size_and_devices_do_not_matter(
    batch_size: int,
    run_evaluation: Callable[[Source, int], ClassificationMetrics],
    digits_test: Source,
    expected: ClassificationMetrics,
) -> None:
    scores = run_evaluation(digits_test, batch_size)
    assert scores[:2] == expected[:2]
    assert scores.num_examples == 360
    assert scores.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-6)
    assert scores.calibration_error == pytest.approx(expected.calibration_error, abs=1e-6)


def test_the_scores_compared_are_not_trivial(expected: ClassificationMetrics) -> None:
    assert 0.02 < expected.top1 < 0.5 < expected.top5 + 0.2 < 1
    assert 0.05 < expected.calibration_error < 0.95


def test_nothing_to_evaluate(
    run_evaluation: Callable[[Source, int], ClassificationMetrics],
) -> None:
    with pytest.raises(UserError, match="no example"):
        run_evaluation(Source("nothing", [], tuple("0123456789")), 8)


@pytest.fixture(scope="module")
def real(digits_test: Source) -> Source:
    """The test digits with several right answers each, or none for every ninth of them."""
    examples = [dict(digits_test.examples[index]) for index in range(100)]
    for index, example in enumerate(examples):
        (label,) = example["labels"]
        example["labels"] = () if index % 9 == 0 else (label, (label + index) % 10)
        example["image"] = b"broken" if index in (10, 18) else example["image"]
    return Source("real", examples, digits_test.class_names, multi_label=True)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_real_labels(
    batch_size: int,
    small_model: MlpMixer,
    small_params: Any,
    real: Source,
    run_evaluation: Callable[..., ClassificationMetrics],
) -> None:
    scores = run_evaluation(real, batch_size, skip_bad=True)
    counted = [e for e in real.examples if e["labels"] and e["image"] != b"broken"]
    images = np.stack(
        [eval_image(e["image"], image_size=IMAGE_SIZE, eval_crop="resize") for e in counted]
    )
    logits = jax.jit(small_model.apply)(
        {"params": small_params}, images.astype(np.float32) / 127.5 - 1
    )
    best = np.asarray(logits).argmax(1)
    right = [top in example["labels"] for top, example in zip(best, counted, strict=True)]
    assert scores.top1 == np.mean(right)
    assert 0 < scores.top1 < 1
    # Of the two bad ones, the second has no right answer besides.
    assert (scores.num_examples, scores.num_bad, scores.num_unlabelled) == (87, 2, 11)


def test_a_bad_image_is_named_with_the_way_out(
    real: Source, run_evaluation: Callable[..., ClassificationMetrics]
) -> None:
    named = "2 images cannot be used: digits test, example 10 .*, digits test, example 18 "
    with pytest.raises(UserError, match=rf"^real: {named}.*--skip_bad_images"):
        run_evaluation(real, 8)


def test_every_host_can_read_all_judgements(small_model: MlpMixer, small_params: Any) -> None:
    mesh = make_mesh(8, 1)
    batch: dict[str, Any] = {
        "image": np.zeros((16, *IMAGE_SIZE, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    for column in make_eval_step(small_model, mesh)(small_params, batch):
        assert column.sharding.is_fully_replicated
        assert len(column.sharding.device_set) == 8
