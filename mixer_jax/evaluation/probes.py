"""Probes of frozen features: few-shot (the paper's Section 3), linear and k-nearest neighbors.

Every probe is fitted first; then the test split is read once, and none of its features are stored.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.loader import available_cpus
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Source, relabel, subset
from mixer_jax.distributed import multihost
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classifiers import (
    L2_REGS,
    KnnClassifier,
    LinearClassifier,
    SufficientStatistics,
    fit_ridge,
)
from mixer_jax.evaluation.features import FeatureExtractor, FeatureFn, rechunk
from mixer_jax.evaluation.loop import EvalInputConfig, bad_images_error

# Label of an unusable example.
UNUSABLE = -1
# The last tenth of the training split chooses the regularization of the linear probe.
_HELD_OUT_FRACTION = 0.1
# Labels read at a time, by several threads.
_READ_AHEAD = 64
# Test features classified at a time.
_TEST_ROWS = 4096


class ProbeConfig(NamedTuple):
    """Probe by `method`, "few_shot", "linear" or "knn"; shots and seeds are for few_shot only."""

    method: str
    shots: Sequence[int] = (1, 5, 10, 25)
    seeds: Sequence[int] = (0, 1, 2)


class ProbeMetrics(NamedTuple):
    """Accuracies of a probe over a split, as fractions.

    Attributes:
        accuracies: Accuracies by name, "1_shot", "linear" or "knn"; means if there are seeds.
        stds: Sample standard deviations over the seeds, by the same names; 0 for a single seed.
            Empty for methods without seeds.
        l2_reg: Regularization chosen by the linear probe, called "penalty" in metrics.jsonl; None
            for other methods.
        num_train: Training images used by all seeds together.
        num_examples: Test images counted.
        num_bad: Training and test images skipped because they are unusable.
    """

    method: str
    accuracies: dict[str, float]
    stds: dict[str, float]
    l2_reg: float | None
    num_train: int
    num_examples: int
    num_bad: int = 0

    def format_counts(self) -> str:
        """Formats the numbers of examples counted and skipped."""
        text = f"{self.num_examples:,} images, trained on {self.num_train:,}"
        return text + (f", {self.num_bad:,} unusable skipped" if self.num_bad else "")

    def as_dict(self) -> dict[str, float]:
        """Returns every metric by name, as in metrics.jsonl."""
        values = dict(self.accuracies)
        values |= {f"{name}_std": std for name, std in self.stds.items()}
        values |= {} if self.l2_reg is None else {"penalty": self.l2_reg}
        names = ("num_train", "num_examples", "num_bad")
        return values | {name: float(getattr(self, name)) for name in names}

    def format_progress(self) -> str:
        """Formats the line that is logged during training."""
        parts = []
        for name, accuracy in self.accuracies.items():
            std = f" ± {self.stds[name]:.2%}" if name in self.stds else ""
            parts.append(f"{name.replace('_', '-')} {accuracy:.2%}{std}")
        parts += [] if self.l2_reg is None else [f"penalty {self.l2_reg:g}"]
        return f"{', '.join(parts)}, on {self.format_counts()}"

    def format_summary(self) -> str:
        """Formats the line that is printed at the end of a run."""
        return self.format_progress()


class LazyLabels(Sequence[int]):
    """Labels of the examples of a source, read on first use and cached; images are not read.

    An example whose label cannot be read, or that was found unusable, has the label `UNUSABLE`.
    """

    def __init__(self, source: Source, skip_bad: bool, num_threads: int = 0):
        """Initializes an empty cache.

        Unreadable examples raise UserError, or are labeled `UNUSABLE` if `skip_bad`.

        Args:
            source: Source of the examples.
            skip_bad: Whether unreadable examples are skipped.
            num_threads: Threads of `read_ahead`; 0: one per CPU core.
        """
        self._source, self._skip_bad = source, skip_bad
        self._num_threads = num_threads or available_cpus()
        self._outcomes: dict[int, int | BadImageError] = {}
        # Indices of examples found unusable.
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if index in self.bad:
            return UNUSABLE
        if index not in self._outcomes:
            self._outcomes[index] = self._read(index)
        outcome = self._outcomes[index]
        if not isinstance(outcome, BadImageError):
            return outcome
        if not self._skip_bad:
            bad = BadImage(outcome.name or f"example {index}", outcome.reason)
            raise bad_images_error(self._source, [bad], 1) from outcome
        self.bad.add(index)
        return UNUSABLE

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Reads the labels of some examples at the same time; errors are raised on first use."""
        missing = [index for index in indices if index not in self._outcomes]
        if missing:
            with ThreadPoolExecutor(self._num_threads) as pool:
                self._outcomes |= zip(missing, pool.map(self._read, missing), strict=True)

    def _read(self, index: int) -> int | BadImageError:
        try:
            (label,) = self._source.read_labels(index)
        except BadImageError as error:
            return error
        return label


def sample_few_shot(
    labels: Sequence[Any],  # Not Sequence[int]: a runtime type checker would read an element.
    class_names: tuple[str, ...],
    *,
    shots: int,
    seed: int,
    name: str,
) -> Int[np.ndarray, "shots classes"]:
    """Samples examples of every class and returns their indices.

    The result is a pure function of labels and seed. The first n rows are the sample for n shots.
    Labels are read in a random order until every class has enough, so that only a part of a large
    dataset is read.

    Args:
        labels: Labels of all examples; `UNUSABLE` excludes an example.
        class_names: Name of each class.
        shots: Examples per class.
        seed: Seed of the random order.
        name: Dataset and split, for the error.

    Raises:
        UserError: Some class has too few examples.
    """
    sampled: list[list[int]] = [[] for _ in class_names]
    num_incomplete = len(class_names)
    # Sorted raw bits, because NumPy does not promise that a generator's permutation is stable.
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    for start in range(0, len(order), _READ_AHEAD):
        indices = order[start : start + _READ_AHEAD].tolist()
        if isinstance(labels, LazyLabels):
            labels.read_ahead(indices)
        for index in indices:
            label = labels[index]
            if label == UNUSABLE or len(sampled[label]) == shots:
                continue
            sampled[label].append(index)
            num_incomplete -= len(sampled[label]) == shots
            if not num_incomplete:
                return np.array(sampled).T
    fewest = min(range(len(sampled)), key=lambda label: len(sampled[label]))
    count = len(sampled[fewest])
    fix = f"Lower shots to {count}" if count else "Train on a split that contains every class"
    raise UserError(
        f"{name}: shots must not exceed the examples of any class, got {shots} shots and {count} "
        f"examples of class {class_names[fewest]!r}. {fix}."
    )


_Classifier = LinearClassifier | KnnClassifier


class _FittedProbe(NamedTuple):
    """Fitted classifiers by name, one per seed."""

    classifiers: dict[str, list[_Classifier]]
    num_train: int
    num_bad: int
    l2_reg: float | None = None


_Extract = Callable[[Source], FeatureExtractor]


def run_probe(
    feature_fn: FeatureFn,
    params: Any,
    config: ProbeConfig,
    train: Source,
    test: Source,
    mesh: Mesh,
    input_config: EvalInputConfig,
    labels: LazyLabels | None = None,
) -> ProbeMetrics:
    """Fits a probe to the features of one split and evaluates it on another.

    All hosts must call it together.

    Args:
        feature_fn: Result of `make_feature_fn`.
        params: Parameters of the model.
        config: Method and settings of the probe.
        train: Split to fit the probe on.
        test: Split to evaluate on; classes are matched by name.
        mesh: Device mesh.
        input_config: Settings of the input pipeline.
        labels: Labels of `train` from an earlier probe, so that few_shot does not read them again.

    Raises:
        UserError: The sources do not fit a probe or each other, a class has too few examples,
            images are unusable and must not be skipped, or the split is empty.
    """
    test = align_labels(train, test)
    extract = functools.partial(
        FeatureExtractor, feature_fn, params, mesh=mesh, input_config=input_config
    )
    if config.method == "few_shot":
        if labels is None:
            labels = LazyLabels(train, input_config.skip_bad, input_config.num_threads)
        probe = _fit_few_shot(extract, train, config, labels)
    else:
        probe = {"linear": _fit_linear, "knn": _fit_knn}[config.method](extract, train)
    return _evaluate(probe, extract(test), config.method, test.name)


def align_labels(train: Source, test: Source) -> Source:
    """Relabels the test split with the classes of the training split.

    Raises:
        UserError: A source has several labels per image, or the test split has a class that the
            training split lacks.
    """
    for source in (train, test):
        if source.multi_label:
            raise UserError(
                f"{source.name} has several labels per image, and a probe needs exactly one. "
                "Choose a dataset with one label per image."
            )
    try:
        return relabel(test, train.class_names)
    except UserError as error:
        raise UserError(f"{error} Train on a split that contains all classes.") from error


def sample_all_shots(config: ProbeConfig, train: Source, labels: LazyLabels) -> list[np.ndarray]:
    """Samples the training images of each seed, (most shots, classes); fewer shots use a prefix.

    Raises:
        UserError: Some class has too few examples.
    """
    return [
        sample_few_shot(
            labels, train.class_names, shots=max(config.shots), seed=seed, name=train.name
        )
        for seed in config.seeds
    ]


def sample_once(config: ProbeConfig, train: Source, labels: LazyLabels) -> list[np.ndarray]:
    """Samples as `sample_all_shots` does, once for all hosts. All hosts must call it together.

    A host that cannot read some example would sample others. Examples that the primary process
    cannot read are added to `labels.bad` on all hosts.

    Raises:
        UserError: Some class has too few examples.
    """
    samples, bad = multihost.compute_once(
        lambda: (sample_all_shots(config, train, labels), labels.bad)
    )
    labels.bad |= bad
    return samples


def _fit_few_shot(
    extract: _Extract, train: Source, config: ProbeConfig, labels: LazyLabels
) -> _FittedProbe:
    features: dict[int, np.ndarray] = {}
    while True:
        samples = sample_once(config, train, labels)
        missing = sorted({*np.unique(samples).tolist()} - features.keys())
        if not missing:
            break
        for chunk in extract(subset(train, missing)):
            for row, index in enumerate(chunk.indices.tolist()):
                features[missing[index]] = chunk.features[row]
        # Images that proved unusable on any host are replaced by others in the next round.
        labels.bad |= {index for index in missing if index not in features}
    classifiers: dict[str, list[_Classifier]] = {}
    for shots in config.shots:
        indices_per_seed = [sample[:shots].ravel().tolist() for sample in samples]
        classifiers[f"{shots}_shot"] = [
            fit_ridge(
                np.stack([features[index] for index in indices]),
                np.tile(np.arange(train.num_classes), shots),
                train.num_classes,
            )
            for indices in indices_per_seed
        ]
    return _FittedProbe(classifiers, len(np.unique(samples)), len(labels.bad))


def _fit_linear(extract: _Extract, train: Source) -> _FittedProbe:
    num_fit = len(train) - max(1, round(_HELD_OUT_FRACTION * len(train)))
    fit = extract(subset(train, range(num_fit)))
    held_out = extract(subset(train, range(num_fit, len(train))))
    stats = SufficientStatistics(train.num_classes)
    for chunk in fit:
        stats.add(chunk.features, chunk.labels)
    num_used = stats.count
    if num_used:
        path, num_correct = stats.solve(), np.zeros(len(L2_REGS), np.int64)
        for chunk in held_out:
            num_correct += path.count_correct(chunk.features, chunk.labels, L2_REGS)
            stats.add(chunk.features, chunk.labels)
    if not num_used or stats.count == num_used:
        raise UserError(
            f"{train.name}: a linear probe needs images to train on and images to choose its "
            f"regularization by, got {stats.count} images. Choose a larger split."
        )
    # The strongest one among equals.
    l2_reg = max(zip(num_correct.tolist(), L2_REGS, strict=True))[1]
    classifiers: dict[str, list[_Classifier]] = {"linear": [stats.solve().classifier(l2_reg)]}
    return _FittedProbe(classifiers, stats.count, fit.num_bad + held_out.num_bad, l2_reg)


def _fit_knn(extract: _Extract, train: Source) -> _FittedProbe:
    extractor, bank, count = extract(train), np.zeros((0, 0), np.float32), 0
    labels = np.zeros(len(train), np.int64)
    for chunk in extractor:
        if not count:
            # Allocated at once: concatenating chunks at the end would double the memory.
            bank = np.zeros((len(train), chunk.features.shape[1]), np.float32)
        rows = slice(count, count + len(chunk.labels))
        bank[rows], labels[rows] = chunk.features, chunk.labels
        count = rows.stop
    if not count:
        raise UserError(f"{train.name} has no example to train on. Choose another split.")
    classifier = KnnClassifier(bank[:count], labels[:count], train.num_classes)
    return _FittedProbe({"knn": [classifier]}, count, extractor.num_bad)


def _evaluate(
    probe: _FittedProbe, chunks: FeatureExtractor, method: str, test_name: str
) -> ProbeMetrics:
    num_correct = {
        name: np.zeros(len(group), np.int64) for name, group in probe.classifiers.items()
    }
    count = 0
    # In large chunks, because a k-NN classifier reads its whole bank for each of them.
    for chunk in rechunk(chunks, _TEST_ROWS):
        count += len(chunk.labels)
        for name, group in probe.classifiers.items():
            for index, classifier in enumerate(group):
                predictions = classifier.scores(chunk.features).argmax(axis=1)
                num_correct[name][index] += int((predictions == chunk.labels).sum())
    if not count:
        raise UserError(f"{test_name} has no example to evaluate on. Choose another split.")
    accuracies = {name: (counts / count).tolist() for name, counts in num_correct.items()}
    stds = {}
    if method == "few_shot":
        stds = {
            name: statistics.stdev(values) if len(values) > 1 else 0.0
            for name, values in accuracies.items()
        }
    return ProbeMetrics(
        method,
        {name: statistics.fmean(values) for name, values in accuracies.items()},
        stds,
        probe.l2_reg,
        probe.num_train,
        count,
        probe.num_bad + chunks.num_bad,
    )
