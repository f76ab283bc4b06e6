"""Probes: what frozen features are worth, by a classifier learnt from them without gradients.

Every probe is learnt first; then the test split is passed over once, and nothing of it is kept.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mixer_jax.data.source import Source, relabel, subset
from mixer_jax.errors import UserError
from mixer_jax.evaluation.features import FeatureExtractor, FeatureFn, rechunk
from mixer_jax.evaluation.few_shot import LazyLabels, LinearClassifier, fit_ridge, sample_few_shot
from mixer_jax.evaluation.knn import KnnClassifier
from mixer_jax.evaluation.linear_probe import L2_REGS, SufficientStatistics
from mixer_jax.evaluation.loop import EvalInputConfig

# Of the training split, where the linear probe's penalty is chosen: its last tenth.
_HELD_OUT_SHARE = 0.1
# Of the test split, rows that are scored together.
_ROWS_TOGETHER = 4096


class ProbeConfig(NamedTuple):
    """Which probe.

    Attributes:
        method: "few_shot", "linear" or "knn".
        shots: of few_shot, training images a class.
        seeds: of few_shot; each draws other images.
    """

    method: str
    shots: Sequence[int] = (1, 5, 10, 25)
    seeds: Sequence[int] = (0, 1, 2)


class ProbeMetrics(NamedTuple):
    """What a split says of features; shares lie in [0, 1].

    Attributes:
        method: of the probe.
        accuracies: by name, "1_shot", "linear" or "knn"; of several seeds, their mean.
        deviations: sample standard deviation over the seeds, by the same names; 0 for one seed.
            Empty where there are no seeds.
        penalty: that the linear probe chose; None for others.
        num_train: training images learnt from, by all seeds together.
        num_examples: test images counted.
        num_bad: of training and test, left out because their images cannot be used.
    """

    method: str
    accuracies: dict[str, float]
    deviations: dict[str, float]
    penalty: float | None
    num_train: int
    num_examples: int
    num_bad: int = 0

    def counted(self) -> str:
        """Returns how many were counted and left out, for people."""
        learnt = f"{self.num_examples:,} images, learnt from {self.num_train:,}"
        return learnt + (f", {self.num_bad:,} left out that cannot be used" if self.num_bad else "")

    def values(self) -> dict[str, float]:
        """Returns every number by its name, for files and pictures."""
        values = dict(self.accuracies)
        values |= {f"{name}_std": deviation for name, deviation in self.deviations.items()}
        values |= {} if self.penalty is None else {"penalty": self.penalty}
        names = ("num_train", "num_examples", "num_bad")
        return values | {name: float(getattr(self, name)) for name in names}

    def told(self) -> str:
        """Returns what is said of an evaluation, for people."""
        parts = []
        for name, accuracy in self.accuracies.items():
            spread = f" ± {self.deviations[name]:.2%}" if name in self.deviations else ""
            parts.append(f"{name.replace('_', '-')} {accuracy:.2%}{spread}")
        parts += [] if self.penalty is None else [f"penalty {self.penalty:g}"]
        return f"{', '.join(parts)}, on {self.counted()}"

    def summary(self) -> str:
        """Returns what is said of an evaluation when a run ends: the same."""
        return self.told()


_Scorer = LinearClassifier | KnnClassifier


class _FittedProbe(NamedTuple):
    """Probes that are ready to be scored: by name, one for every seed."""

    scorers: dict[str, list[_Scorer]]
    num_train: int
    num_bad: int
    penalty: float | None = None


_Extract = Callable[[Source], FeatureExtractor]


def run_probe(
    feature_fn: FeatureFn,
    params: Any,
    settings: ProbeConfig,
    train: Source,
    test: Source,
    mesh: Mesh,
    reading: EvalInputConfig,
    labels: LazyLabels | None = None,
) -> ProbeMetrics:
    """Learns a probe from one split's features and scores it on another's.

    Args:
        feature_fn: from `compile_features`.
        params: of the model.
        settings: which probe.
        train: what it learns from.
        test: what it is scored on; classes are matched by their names.
        mesh: of devices.
        reading: how they are read and prepared.
        labels: of `train`, kept from an earlier probe, so that few_shot need not read them again.

    Raises:
        UserError: the sources do not suit a probe or each other, a class has too few examples,
            images cannot be used and none may be left out, or there are none.
    """
    test = align_labels(train, test)
    look = functools.partial(FeatureExtractor, feature_fn, params, mesh=mesh, reading=reading)
    if settings.method == "few_shot":
        labels = LazyLabels(train, reading.skip_bad) if labels is None else labels
        learnt = _learn_few_shot(look, train, settings, labels)
    else:
        learnt = {"linear": _learn_linear, "knn": _learn_knn}[settings.method](look, train)
    return _score(learnt, look(test), settings.method, test.name)


def align_labels(train: Source, test: Source) -> Source:
    """Returns the test split with the labels of the training split's classes.

    Raises:
        UserError: an example may have several labels, or the test split has a class of its own.
    """
    for source in (train, test):
        if source.multi_label:
            raise UserError(
                f"{source.name} has several labels an image, and a probe learns one; name a data "
                "set with one label an image"
            )
    try:
        return relabel(test, train.class_names)
    except UserError as error:
        raise UserError(f"{error}; learn from a split that has all classes") from error


def sample_all_shots(settings: ProbeConfig, train: Source, labels: LazyLabels) -> list[np.ndarray]:
    """Draws the training images of each seed, (most shots, classes); the first rows for fewer.

    Raises:
        UserError: a class has too few examples.
    """
    return [
        sample_few_shot(
            labels, train.class_names, shots=max(settings.shots), seed=seed, name=train.name
        )
        for seed in settings.seeds
    ]


def _learn_few_shot(
    look: _Extract, train: Source, settings: ProbeConfig, labels: LazyLabels
) -> _FittedProbe:
    known: dict[int, np.ndarray] = {}
    while True:
        drawn = sample_all_shots(settings, train, labels)
        wanted = sorted({*np.unique(drawn).tolist()} - known.keys())
        if not wanted:
            break
        for chunk in look(subset(train, wanted)):
            for row, place in enumerate(chunk.places.tolist()):
                known[wanted[place]] = chunk.features[row]
        # For those that turned out unusable, others are drawn.
        labels.bad |= {place for place in wanted if place not in known}
    scorers: dict[str, list[_Scorer]] = {}
    for shots in settings.shots:
        places = [rows[:shots].ravel().tolist() for rows in drawn]
        scorers[f"{shots}_shot"] = [
            fit_ridge(
                np.stack([known[place] for place in one]),
                np.array([labels[place] for place in one]),
                train.num_classes,
            )
            for one in places
        ]
    return _FittedProbe(scorers, len(np.unique(drawn)), len(labels.bad))


def _learn_linear(look: _Extract, train: Source) -> _FittedProbe:
    cut = len(train) - max(1, round(_HELD_OUT_SHARE * len(train)))
    fit, held_out = (look(subset(train, part)) for part in _parts(cut, len(train)))
    moments = SufficientStatistics(train.num_classes)
    for chunk in fit:
        moments.add(chunk.features, chunk.labels)
    num_fit = moments.count
    if num_fit:
        path, right = moments.solve(), np.zeros(len(L2_REGS), np.int64)
        for chunk in held_out:
            right += path.count_correct(chunk.features, chunk.labels, L2_REGS)
            moments.add(chunk.features, chunk.labels)
    if not num_fit or moments.count == num_fit:
        raise UserError(
            f"{train.name}: {moments.count} images are too few to learn a linear probe and to "
            "choose its penalty; name a larger split"
        )
    # Of equals, the strongest.
    penalty = max(zip(right.tolist(), L2_REGS, strict=True))[1]
    num_bad = fit.num_bad + held_out.num_bad
    scorers: dict[str, list[_Scorer]] = {"linear": [moments.solve().at(penalty)]}
    return _FittedProbe(scorers, moments.count, num_bad, penalty)


def _parts(cut: int, end: int) -> tuple[range, range]:
    return range(cut), range(cut, end)


def _learn_knn(look: _Extract, train: Source) -> _FittedProbe:
    seen, bank, count = look(train), np.zeros((0, 0), np.float32), 0
    labels = np.zeros(len(train), np.int64)
    for chunk in seen:
        if not count:
            # Whole from the start: to join chunks at the end would take the memory twice.
            bank = np.zeros((len(train), chunk.features.shape[1]), np.float32)
        rows = slice(count, count + len(chunk.labels))
        bank[rows], labels[rows] = chunk.features, chunk.labels
        count = rows.stop
    if not count:
        raise UserError(f"{train.name}: there is no example to learn from; name another split")
    scorer = KnnClassifier(bank[:count], labels[:count], train.num_classes)
    return _FittedProbe({"knn": [scorer]}, count, seen.num_bad)


def _score(learnt: _FittedProbe, chunks: FeatureExtractor, method: str, name: str) -> ProbeMetrics:
    right = {key: np.zeros(len(scorers), np.int64) for key, scorers in learnt.scorers.items()}
    count = 0
    # A neighbour scorer goes through all that it has learnt each time.
    for chunk in rechunk(chunks, _ROWS_TOGETHER):
        count += len(chunk.labels)
        for key, scorers in learnt.scorers.items():
            for number, scorer in enumerate(scorers):
                answers = scorer.scores(chunk.features).argmax(axis=1)
                right[key][number] += int((answers == chunk.labels).sum())
    if not count:
        raise UserError(f"{name}: there is no example to score")
    shares = {key: (counts / count).tolist() for key, counts in right.items()}
    deviations = {}
    if method == "few_shot":
        deviations = {
            key: statistics.stdev(found) if len(found) > 1 else 0.0 for key, found in shares.items()
        }
    return ProbeMetrics(
        method,
        {key: statistics.fmean(found) for key, found in shares.items()},
        deviations,
        learnt.penalty,
        learnt.num_train,
        count,
        learnt.num_bad + chunks.num_bad,
    )
