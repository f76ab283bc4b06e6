"""Tests of probes from two sources to accuracies, against scikit-learn."""

import dataclasses
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from mixer_jax.data.source import Source, subset
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.errors import UserError
from mixer_jax.evaluation import probes
from mixer_jax.evaluation.features import Chunk, FeatureExtractor, FeatureFn, make_feature_fn
from mixer_jax.evaluation.few_shot import sample_few_shot
from mixer_jax.evaluation.linear_probe import L2_REGS
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.probes import ProbeConfig, ProbeMetrics, run_probe
from mixer_jax.models.mixer import MlpMixer
from tests.evaluation.conftest import make_input_config, pixels_as_features
from tests.evaluation.few_shot_test import reference_ridge_scores
from tests.evaluation.knn_test import reference_knn_scores
from tests.helpers.messages import mentions, raises

TEN = tuple("0123456789")


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


@pytest.fixture(scope="module")
def feature_fn(tiny_model: MlpMixer) -> FeatureFn:
    return make_feature_fn(tiny_model, make_mesh(0, 1))


@pytest.mark.parametrize("batch_size", [100, 512])
def test_run_probe_few_shot(
    batch_size: int,
    feature_fn: FeatureFn,
    tiny_params: Any,
    digits_train: Source,
    digits_test: Source,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    config = ProbeConfig("few_shot", shots=(1, 5, 25), seeds=(0, 7))
    input_config = make_input_config(batch_size)
    found = run_probe(
        feature_fn, tiny_params, config, digits_train, digits_test, make_mesh(0, 1), input_config
    )
    features, labels = train_features
    all_indices = set()
    for shots in config.shots:
        expected = []
        for seed in config.seeds:
            sample = sample_few_shot(labels.tolist(), TEN, shots=shots, seed=seed, name="").ravel()
            all_indices |= set(sample.tolist())
            scores = reference_ridge_scores(features[sample], labels[sample], test_features[0], 10)
            expected.append(accuracy(scores, test_features[1]))
        assert found.accuracies[f"{shots}_shot"] == pytest.approx(np.mean(expected), abs=1e-12)
        std = np.std(expected, ddof=1)
        assert found.stds[f"{shots}_shot"] == pytest.approx(std, abs=1e-12)
    assert 0.15 < found.accuracies["1_shot"] < found.accuracies["25_shot"] < 0.9
    assert (found.num_train, found.num_examples, found.num_bad) == (len(all_indices), 360, 0)


def test_run_probe_linear(
    feature_fn: FeatureFn,
    tiny_params: Any,
    digits_train: Source,
    digits_test: Source,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    train, (features, labels) = subset(digits_train, range(300)), train_features
    fit, held_out, both = slice(270), slice(270, 300), slice(300)
    found = run_probe(
        feature_fn,
        tiny_params,
        ProbeConfig("linear"),
        train,
        digits_test,
        make_mesh(0, 1),
        make_input_config(64),
    )
    held_out_accuracy = {}
    for l2_reg in L2_REGS:
        scores = reference_ridge_scores(features[fit], labels[fit], features[held_out], 10, l2_reg)
        held_out_accuracy[l2_reg] = accuracy(scores, labels[held_out])
    # The strongest among equals; neither the first nor the last of the list.
    highest = max(held_out_accuracy.values())
    best = max(l2_reg for l2_reg in L2_REGS if held_out_accuracy[l2_reg] == highest)
    assert L2_REGS[0] < best < L2_REGS[-1]
    scores = reference_ridge_scores(features[both], labels[both], test_features[0], 10, best)
    assert found.l2_reg == best
    assert found.accuracies == {"linear": accuracy(scores, test_features[1])}
    assert (found.num_train, found.num_examples, found.stds) == (300, 360, {})


def test_run_probe_knn(
    feature_fn: FeatureFn,
    tiny_params: Any,
    digits_train: Source,
    digits_test: Source,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    found = run_probe(
        feature_fn,
        tiny_params,
        ProbeConfig("knn"),
        digits_train,
        digits_test,
        make_mesh(0, 1),
        make_input_config(256),
    )
    expected = accuracy(reference_knn_scores(*train_features, test_features[0]), test_features[1])
    assert found.accuracies == {"knn": expected}
    assert (found.num_train, found.num_examples, found.l2_reg) == (1437, 360, None)


def run_on_pixels(
    method: str, train: Source, test: Source, skip_bad: bool = False, **settings: Any
) -> ProbeMetrics:
    return run_probe(
        pixels_as_features,
        None,
        ProbeConfig(method, **settings),
        train,
        test,
        make_mesh(0, 1),
        make_input_config(64, skip_bad),
    )


METHODS = ("few_shot", "linear", "knn")


@pytest.mark.parametrize("method", METHODS)
def test_run_probe_matches_classes_by_name(
    method: str, digits_train: Source, digits_test: Source
) -> None:
    examples = [dict(digits_test.examples[index]) for index in range(100)]
    for example in examples:
        example["labels"] = (9 - example["labels"][0],)
    test = Source("reversed", examples, TEN[::-1])
    found = run_on_pixels(method, digits_train, test, shots=(5,), seeds=(0,))
    same = run_on_pixels(
        method, digits_train, subset(digits_test, range(100)), shots=(5,), seeds=(0,)
    )
    assert found == same
    assert min(found.accuracies.values()) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_run_probe_rejects_unsuitable_sources(
    method: str, digits_train: Source, digits_test: Source
) -> None:
    several = dataclasses.replace(digits_test, multi_label=True, name="several_labels")
    for pair in [(digits_train, several), (several, digits_test)]:
        with raises(UserError, "several_labels"):
            run_on_pixels(method, *pair)
    letters = Source("letters", list(digits_test.examples), tuple("abcdefghij"))
    with raises(UserError, "letters", "10", "b", "c", "0", "1"):
        run_on_pixels(method, digits_train, letters)
    with raises(UserError, "no_training"):
        run_on_pixels(method, Source("no_training", [], TEN), digits_test)
    with raises(UserError, "no_test"):
        run_on_pixels(method, digits_train, Source("no_test", [], TEN), shots=(1,))


def test_run_probe_rejects_more_shots_than_examples(
    digits_train: Source, digits_test: Source
) -> None:
    counts = Counter(example["labels"][0] for example in digits_train.examples)
    with raises(UserError, digits_train.name, "200") as caught:
        run_on_pixels("few_shot", digits_train, digits_test, shots=(1, 200))
    # A class, and how many examples it has.
    assert any(mentions(str(caught.value), TEN[k], str(count)) for k, count in counts.items())


@pytest.mark.parametrize("method", METHODS)
def test_run_probe_replaces_bad_images(
    method: str, digits_train: Source, digits_test: Source
) -> None:
    # Every fourth image is broken, which is found when it is decoded, not when its label is read.
    examples = [dict(digits_train.examples[index]) for index in range(400)]
    intact = [example for index, example in enumerate(examples) if index % 4]
    broken = [
        example if index % 4 else example | {"image": b"broken"}
        for index, example in enumerate(examples)
    ]
    found = run_on_pixels(
        method, Source("broken", broken, TEN), digits_test, True, shots=(5,), seeds=(0, 1)
    )
    if method == "knn":
        assert found._replace(num_bad=0) == run_on_pixels(
            method, Source("intact", intact, TEN), digits_test
        )
    if method == "few_shot":
        # Each seed has its fifty images nevertheless.
        assert 50 < found.num_train <= 100
        assert 5 < found.num_bad < 50
    else:
        assert (found.num_train, found.num_bad) == (300, 100)
    with raises(UserError, "broken", broken[0]["name"]):
        run_on_pixels(method, Source("broken", broken, TEN), digits_test, shots=(5,))


class CheckedExtractor(FeatureExtractor):
    """Synthetic chunks; asserts that those of the test split are not held on to."""

    def __init__(
        self,
        feature_fn: FeatureFn,
        params: Any,
        source: Source,
        mesh: Mesh,
        input_config: EvalInputConfig,
    ):
        super().__init__(feature_fn, params, source, mesh, input_config)
        self.source, self.may_hold = source, source.name in params

    def __iter__(self) -> Iterator[Chunk]:
        refs: list[weakref.ref[np.ndarray]] = []
        for start in range(0, len(self.source), 20):
            indices = np.arange(start, min(start + 20, len(self.source)))
            features = np.random.default_rng(start).normal(size=(len(indices), 8))
            chunk = Chunk(features.astype(np.float32), indices % 10, indices)
            refs.append(weakref.ref(chunk.features))
            yield chunk
            del chunk
            # The consumer holds the last chunk until it receives the next one.
            assert self.may_hold or sum(ref() is not None for ref in refs) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_run_probe_does_not_hold_on_to_test_features(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "FeatureExtractor", CheckedExtractor)
    monkeypatch.setattr(probes, "_TEST_ROWS", 20)
    example = {"image": b"", "labels": (0,), "name": ""}
    labelled = [example | {"labels": (index % 10,)} for index in range(400)]
    train, test = Source("train", labelled, TEN), Source("test", [example] * 1000, TEN)
    found = run_probe(
        pixels_as_features,
        # Few-shot probes hold the few training features; k-NN copies them; linear holds none.
        {"train"} if method == "few_shot" else set(),
        ProbeConfig(method),
        train,
        test,
        make_mesh(0, 1),
        make_input_config(20),
    )
    assert found.num_examples == 1000


def test_probe_metrics_format_and_as_dict() -> None:
    few = ProbeMetrics(
        "few_shot", {"1_shot": 0.41, "5_shot": 0.5}, {"1_shot": 0.021}, None, 30, 360
    )
    assert re.search(r"\b1.shot\W+41\.00%\W+2\.10%", few.format_progress())
    assert re.search(r"\b5.shot\W+50\.00%", few.format_progress())
    assert mentions(few.format_progress(), "360", "30")
    assert few.as_dict() == {
        "1_shot": 0.41,
        "5_shot": 0.5,
        "1_shot_std": 0.021,
        "num_train": 30.0,
        "num_examples": 360.0,
        "num_bad": 0.0,
    }
    linear = ProbeMetrics("linear", {"linear": 0.9}, {}, 1024.0, 1437, 360, 2)
    assert re.search(r"\blinear\W+90\.00%", linear.format_summary())
    assert re.search(r"\bpenalty\W+1024\b", linear.format_summary())
    assert mentions(linear.format_summary(), "360", "1437", "2")
    assert linear.as_dict()["penalty"] == 1024.0
