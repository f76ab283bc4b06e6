"""Tests of the evaluation loop: the same metrics for any batch size and number of devices."""

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
from tests.evaluation.conftest import IMAGE_SIZE, make_input_config
from tests.helpers.messages import raises
from tests.helpers.reference_metrics import log_softmax, reference_calibration_error


@pytest.fixture(scope="module")
def expected(tiny_model: MlpMixer, tiny_params: Any, digits_test: Source) -> ClassificationMetrics:
    """Metrics by definition, in float64, without batches."""
    examples = [digits_test.examples[index] for index in range(len(digits_test))]
    labels = np.array([example["labels"][0] for example in examples])
    images = np.stack(
        [eval_image(e["image"], image_size=IMAGE_SIZE, eval_crop="resize") for e in examples]
    )
    logits = jax.jit(tiny_model.apply)(
        {"params": tiny_params}, images.astype(np.float32) / 127.5 - 1
    )
    log_probs = log_softmax(np.asarray(logits))
    ranking = np.argsort(-log_probs, axis=1)
    is_correct = ranking[:, 0] == labels
    return ClassificationMetrics(
        top1=is_correct.mean(),
        top5=(ranking[:, :5] == labels[:, None]).any(1).mean(),
        log_likelihood=log_probs[range(360), labels].mean(),
        calibration_error=reference_calibration_error(np.exp(log_probs.max(1)), is_correct),
        num_examples=360,
    )


@pytest.fixture(scope="module", params=[1, 8])
def run_evaluation(
    request: pytest.FixtureRequest, tiny_model: MlpMixer, tiny_params: Any
) -> Callable[[Source, int], ClassificationMetrics]:
    mesh = make_mesh(0, 1, jax.devices()[: request.param])
    eval_step: EvalStep = make_eval_step(tiny_model, mesh)

    def run(source: Source, batch_size: int, skip_bad: bool = False) -> ClassificationMetrics:
        return evaluate(
            eval_step, tiny_params, source, mesh, make_input_config(batch_size, skip_bad)
        )

    return run


@pytest.mark.parametrize("batch_size", [7, 64, 360, 1000])
def test_evaluate_is_independent_of_batch_size_and_devices(
    batch_size: int,
    run_evaluation: Callable[[Source, int], ClassificationMetrics],
    digits_test: Source,
    expected: ClassificationMetrics,
) -> None:
    metrics = run_evaluation(digits_test, batch_size)
    assert metrics[:2] == expected[:2]
    assert metrics.num_examples == 360
    assert metrics.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-6)
    assert metrics.calibration_error == pytest.approx(expected.calibration_error, abs=1e-6)


def test_expected_metrics_are_not_trivial(expected: ClassificationMetrics) -> None:
    assert 0.02 < expected.top1 < 0.5 < expected.top5 + 0.2 < 1
    assert 0.05 < expected.calibration_error < 0.95


def test_evaluate_rejects_an_empty_source(
    run_evaluation: Callable[[Source, int], ClassificationMetrics],
) -> None:
    with raises(UserError, "empty"):
        run_evaluation(Source("empty", [], tuple("0123456789")), 8)


@pytest.fixture(scope="module")
def real(digits_test: Source) -> Source:
    """The test digits with several correct classes each, or none for every ninth of them."""
    examples = [dict(digits_test.examples[index]) for index in range(100)]
    for index, example in enumerate(examples):
        (label,) = example["labels"]
        example["labels"] = () if index % 9 == 0 else (label, (label + index) % 10)
        example["image"] = b"broken" if index in (10, 18) else example["image"]
    return Source("real", examples, digits_test.class_names, multi_label=True)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_evaluate_with_real_labels(
    batch_size: int,
    tiny_model: MlpMixer,
    tiny_params: Any,
    real: Source,
    run_evaluation: Callable[..., ClassificationMetrics],
) -> None:
    metrics = run_evaluation(real, batch_size, skip_bad=True)
    counted = [e for e in real.examples if e["labels"] and e["image"] != b"broken"]
    images = np.stack(
        [eval_image(e["image"], image_size=IMAGE_SIZE, eval_crop="resize") for e in counted]
    )
    logits = jax.jit(tiny_model.apply)(
        {"params": tiny_params}, images.astype(np.float32) / 127.5 - 1
    )
    best = np.asarray(logits).argmax(1)
    is_correct = [top in example["labels"] for top, example in zip(best, counted, strict=True)]
    assert metrics.top1 == np.mean(is_correct)
    assert 0 < metrics.top1 < 1
    # The second of the two bad images has no correct class either.
    assert (metrics.num_examples, metrics.num_bad, metrics.num_unlabeled) == (87, 2, 11)


def test_evaluate_names_bad_images_and_the_fix(
    real: Source, run_evaluation: Callable[..., ClassificationMetrics]
) -> None:
    names = ("digits test, example 10", "digits test, example 18")
    with raises(UserError, "real", "2", *names, "--skip_bad_images"):
        run_evaluation(real, 8)


def test_make_eval_step_replicates_outputs(tiny_model: MlpMixer, tiny_params: Any) -> None:
    mesh = make_mesh(8, 1)
    batch: dict[str, Any] = {
        "image": np.zeros((16, *IMAGE_SIZE, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    for column in make_eval_step(tiny_model, mesh)(tiny_params, batch):
        assert column.sharding.is_fully_replicated
        assert len(column.sharding.device_set) == 8
