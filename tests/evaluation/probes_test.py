"""Tests of whole probes: from two sources to accuracies, judged by scikit-learn."""

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
from tests.evaluation.conftest import pixels_as_features, read_by
from tests.evaluation.few_shot_test import judge_by_ridge
from tests.evaluation.knn_test import judge_by_sklearn
from tests.helpers.messages import mentions, raises

TEN = tuple("0123456789")


def share_right(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


@pytest.fixture(scope="module")
def feature_fn(small_model: MlpMixer) -> FeatureFn:
    return make_feature_fn(small_model, make_mesh(0, 1))


@pytest.mark.parametrize("batch_size", [100, 512])
def test_few_shot_on_digits(
    batch_size: int,
    feature_fn: FeatureFn,
    small_params: Any,
    digits_train: Source,
    digits_test: Source,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    settings = ProbeConfig("few_shot", shots=(1, 5, 25), seeds=(0, 7))
    reading = read_by(batch_size)
    found = run_probe(
        feature_fn, small_params, settings, digits_train, digits_test, make_mesh(0, 1), reading
    )
    features, labels = train_features
    everything = set()
    for shots in settings.shots:
        expected = []
        for seed in settings.seeds:
            drawn = sample_few_shot(labels.tolist(), TEN, shots=shots, seed=seed, name="").ravel()
            everything |= set(drawn.tolist())
            scores = judge_by_ridge(features[drawn], labels[drawn], test_features[0], 10)
            expected.append(share_right(scores, test_features[1]))
        assert found.accuracies[f"{shots}_shot"] == pytest.approx(np.mean(expected), abs=1e-12)
        spread = np.std(expected, ddof=1)
        assert found.deviations[f"{shots}_shot"] == pytest.approx(spread, abs=1e-12)
    assert 0.15 < found.accuracies["1_shot"] < found.accuracies["25_shot"] < 0.9
    assert (found.num_train, found.num_examples, found.num_bad) == (len(everything), 360, 0)


def test_linear_on_digits(
    feature_fn: FeatureFn,
    small_params: Any,
    digits_train: Source,
    digits_test: Source,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    train, (features, labels) = subset(digits_train, range(300)), train_features
    fit, held_out, whole = slice(270), slice(270, 300), slice(300)
    found = run_probe(
        feature_fn,
        small_params,
        ProbeConfig("linear"),
        train,
        digits_test,
        make_mesh(0, 1),
        read_by(64),
    )
    chosen_on = {}
    for penalty in L2_REGS:
        scores = judge_by_ridge(features[fit], labels[fit], features[held_out], 10, penalty)
        chosen_on[penalty] = share_right(scores, labels[held_out])
    # Of equals, the strongest; neither the first nor the last of the list.
    best = max(p for p in L2_REGS if chosen_on[p] == max(chosen_on.values()))
    assert L2_REGS[0] < best < L2_REGS[-1]
    scores = judge_by_ridge(features[whole], labels[whole], test_features[0], 10, best)
    assert found.penalty == best
    assert found.accuracies == {"linear": share_right(scores, test_features[1])}
    assert (found.num_train, found.num_examples, found.deviations) == (300, 360, {})


def test_neighbours_on_digits(
    feature_fn: FeatureFn,
    small_params: Any,
    digits_train: Source,
    digits_test: Source,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    found = run_probe(
        feature_fn,
        small_params,
        ProbeConfig("knn"),
        digits_train,
        digits_test,
        make_mesh(0, 1),
        read_by(256),
    )
    expected = share_right(judge_by_sklearn(*train_features, test_features[0]), test_features[1])
    assert found.accuracies == {"knn": expected}
    assert (found.num_train, found.num_examples, found.penalty) == (1437, 360, None)


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
        read_by(64, skip_bad),
    )


METHODS = ("few_shot", "linear", "knn")


@pytest.mark.parametrize("method", METHODS)
def test_classes_are_matched_by_name(
    method: str, digits_train: Source, digits_test: Source
) -> None:
    backwards = [dict(digits_test.examples[index]) for index in range(100)]
    for example in backwards:
        example["labels"] = (9 - example["labels"][0],)
    test = Source("backwards", backwards, TEN[::-1])
    found = run_on_pixels(method, digits_train, test, shots=(5,), seeds=(0,))
    same = run_on_pixels(
        method, digits_train, subset(digits_test, range(100)), shots=(5,), seeds=(0,)
    )
    assert found == same
    assert min(found.accuracies.values()) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_what_no_probe_can_learn_from(
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


def test_more_shots_than_examples(digits_train: Source, digits_test: Source) -> None:
    counts = Counter(example["labels"][0] for example in digits_train.examples)
    with raises(UserError, digits_train.name, "200") as caught:
        run_on_pixels("few_shot", digits_train, digits_test, shots=(1, 200))
    # A class, and how many examples it has.
    assert any(mentions(str(caught.value), TEN[k], str(count)) for k, count in counts.items())


@pytest.mark.parametrize("method", METHODS)
def test_for_images_that_cannot_be_used_others_are_taken(
    method: str, digits_train: Source, digits_test: Source
) -> None:
    # Every fourth image is broken, which shows when it is decoded and not when its label is read.
    examples = [dict(digits_train.examples[index]) for index in range(400)]
    whole = [example for index, example in enumerate(examples) if index % 4]
    broken = [
        example if index % 4 else example | {"image": b"broken"}
        for index, example in enumerate(examples)
    ]
    found = run_on_pixels(
        method, Source("broken", broken, TEN), digits_test, True, shots=(5,), seeds=(0, 1)
    )
    if method == "knn":
        assert found._replace(num_bad=0) == run_on_pixels(
            method, Source("whole", whole, TEN), digits_test
        )
    if method == "few_shot":
        # Each seed has its fifty in spite of them.
        assert 50 < found.num_train <= 100
        assert 5 < found.num_bad < 50
    else:
        assert (found.num_train, found.num_bad) == (300, 100)
    with raises(UserError, "broken", broken[0]["name"]):
        run_on_pixels(method, Source("broken", broken, TEN), digits_test, shots=(5,))


class Forgetful(FeatureExtractor):
    """Makes chunks up, and sees that nobody keeps those of the test split."""

    def __init__(
        self,
        feature_fn: FeatureFn,
        params: Any,
        source: Source,
        mesh: Mesh,
        reading: EvalInputConfig,
    ):
        super().__init__(feature_fn, params, source, mesh, reading)
        self.source, self.may_keep = source, source.name in params

    def __iter__(self) -> Iterator[Chunk]:
        made: list[weakref.ref[np.ndarray]] = []
        for start in range(0, len(self.source), 20):
            places = np.arange(start, min(start + 20, len(self.source)))
            features = np.random.default_rng(start).normal(size=(len(places), 8))
            chunk = Chunk(features.astype(np.float32), places % 10, places)
            made.append(weakref.ref(chunk.features))
            yield chunk
            del chunk
            # The consumer still holds the last one until it is given the next.
            assert self.may_keep or sum(one() is not None for one in made) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_of_images_that_were_looked_at(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "FeatureExtractor", Forgetful)
    monkeypatch.setattr(probes, "_ROWS_TOGETHER", 20)
    example = {"image": b"", "labels": (0,), "name": ""}
    labelled = [example | {"labels": (index % 10,)} for index in range(400)]
    train, test = Source("train", labelled, TEN), Source("test", [example] * 1000, TEN)
    found = run_probe(
        pixels_as_features,
        # Few shots are few, and neighbours copied; a linear probe does not even keep the training.
        {"train"} if method == "few_shot" else set(),
        ProbeConfig(method),
        train,
        test,
        make_mesh(0, 1),
        read_by(20),
    )
    assert found.num_examples == 1000


def test_what_is_told_and_written() -> None:
    few = ProbeMetrics(
        "few_shot", {"1_shot": 0.41, "5_shot": 0.5}, {"1_shot": 0.021}, None, 30, 360
    )
    assert re.search(r"\b1.shot\W+41\.00%\W+2\.10%", few.told())
    assert re.search(r"\b5.shot\W+50\.00%", few.told())
    assert mentions(few.told(), "360", "30")
    assert few.values() == {
        "1_shot": 0.41,
        "5_shot": 0.5,
        "1_shot_std": 0.021,
        "num_train": 30.0,
        "num_examples": 360.0,
        "num_bad": 0.0,
    }
    linear = ProbeMetrics("linear", {"linear": 0.9}, {}, 1024.0, 1437, 360, 2)
    assert re.search(r"\blinear\W+90\.00%", linear.summary())
    assert re.search(r"\bpenalty\W+1024\b", linear.summary())
    assert mentions(linear.summary(), "360", "1437", "2")
    assert linear.values()["penalty"] == 1024.0
