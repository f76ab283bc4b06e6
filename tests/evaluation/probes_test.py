"""Tests of probes from two sources to accuracies, against scikit-learn."""

import dataclasses
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.source import Examples, Source, subset
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.errors import UserError
from mixer_jax.evaluation import probes
from mixer_jax.evaluation.classifiers import L2_REGS
from mixer_jax.evaluation.features import FeatureChunk, FeatureExtractor, FeatureFn, make_feature_fn
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.probes import (
    UNUSABLE,
    LazyLabels,
    ProbeConfig,
    ProbeMetrics,
    run_probe,
    sample_few_shot,
)
from mixer_jax.models.mixer import MlpMixer
from tests.evaluation.classifiers_test import reference_knn_scores, reference_ridge_scores
from tests.evaluation.conftest import make_input_config, pixels_as_features
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

    def __iter__(self) -> Iterator[FeatureChunk]:
        refs: list[weakref.ref[np.ndarray]] = []
        for start in range(0, len(self.source), 20):
            indices = np.arange(start, min(start + 20, len(self.source)))
            features = np.random.default_rng(start).normal(size=(len(indices), 8))
            chunk = FeatureChunk(features.astype(np.float32), indices % 10, indices)
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
    labeled = [example | {"labels": (index % 10,)} for index in range(400)]
    train, test = Source("train", labeled, TEN), Source("test", [example] * 1000, TEN)
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


def sample(labels: Any, shots: int, seed: int = 0, names: tuple[str, ...] = TEN) -> np.ndarray:
    return sample_few_shot(labels, names, shots=shots, seed=seed, name="digits train")


def test_sample_few_shot_is_nested_balanced_and_seeded() -> None:
    labels = np.random.default_rng(0).integers(10, size=2000).tolist()
    most = sample(labels, 25)
    assert most.shape == (25, 10)
    assert len(np.unique(most)) == 250
    assert (np.array(labels)[most] == np.arange(10)).all()
    for shots in (1, 5, 10):
        assert (sample(labels, shots) == most[:shots]).all()
    assert (sample(labels, 25) == most).all()
    assert (sample(labels, 25, seed=1) != most).mean() > 0.9


def test_sample_few_shot_is_uniform() -> None:
    labels = [0, 1, 1, 0, 1, 1, 1, 0]
    counts = np.zeros(8)
    for seed in range(600):
        counts[sample(labels, 1, seed, ("a", "b"))[0]] += 1
    # Three standard deviations of the binomial distribution around 200 for class a, 120 for b.
    assert (abs(counts - np.where(labels, 120, 200)) < 36).all()


def test_sample_few_shot_rejects_too_few_examples() -> None:
    with raises(UserError, "digits train", "dog", "9", "10") as few:
        sample([0, 1] * 9 + [0] * 20, 10, names=("cat", "dog"))
    assert not mentions(str(few.value), "cat")
    with raises(UserError, "digits train", "dog", "0", "1"):
        sample([0] * 9, 1, names=("cat", "dog"))


class CountingList(list[Any]):
    """List that counts its reads."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        item = super().__getitem__(index)
        if item["image"] == b"broken":
            raise BadImageError("truncated", name=item["name"])
        return item


def make_source(count: int, broken: tuple[int, ...] = ()) -> tuple[Source, CountingList]:
    examples = CountingList()
    for index in range(count):
        image = b"broken" if index in broken else b""
        examples.append({"image": image, "labels": (index % 10,), "name": f"no. {index}"})
    return Source("many", examples, TEN), examples


def test_lazy_labels_read_only_what_is_needed_and_once() -> None:
    source, examples = make_source(10_000)
    labels = LazyLabels(source, skip_bad=False)
    first = sample(labels, 5)
    assert 50 <= examples.reads < 500
    before = examples.reads
    assert (sample(labels, 5) == first).all()
    assert examples.reads == before


class SimultaneousLabels(Examples):
    """Labels whose reads wait until another one is in progress."""

    def __init__(self, count: int):
        self._labels, self._barrier = np.arange(count) % 10, threading.Barrier(2, timeout=60)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError

    def read_labels(self, index: int) -> tuple[int, ...]:
        self._barrier.wait()
        return (int(self._labels[index]),)


def test_labels_are_read_by_several_threads() -> None:
    examples = SimultaneousLabels(1000)
    labels = LazyLabels(Source("slow", examples, TEN), skip_bad=False, num_threads=2)
    assert (sample(labels, 5) == sample(examples._labels.tolist(), 5)).all()


def test_labels_read_ahead_are_counted_as_bad_only_if_they_are_used() -> None:
    source, _ = make_source(20, broken=(3, 4))
    labels = LazyLabels(source, skip_bad=True)
    labels.read_ahead(range(20))
    assert labels.bad == set()
    assert (labels[3], labels.bad) == (UNUSABLE, {3})
    labels = LazyLabels(source, skip_bad=False)
    labels.read_ahead(range(20))
    assert labels[5] == 5
    with raises(UserError, "no. 4", "truncated"):
        labels[4]


def test_lazy_labels_skip_unreadable_examples_or_raise() -> None:
    intact, _ = make_source(200)
    broken = tuple(sample(LazyLabels(intact, skip_bad=False), 1)[0, :3].tolist())
    source, _ = make_source(200, broken)
    with raises(UserError, "many", "1", "truncated") as caught:
        sample(LazyLabels(source, skip_bad=False), 1)
    assert any(mentions(str(caught.value), f"no. {index}") for index in broken)
    labels = LazyLabels(source, skip_bad=True)
    indices = sample(labels, 1)[0]
    assert not set(indices) & set(broken)
    assert (indices % 10 == np.arange(10)).all()
    assert labels.bad == set(broken)
    assert labels[broken[0]] == UNUSABLE
