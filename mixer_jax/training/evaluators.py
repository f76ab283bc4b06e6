"""Evaluations during a run: classification by the head, and probes of frozen features."""

import functools
from collections.abc import Callable
from typing import Any

from mixer_jax.config.config import parse_shots
from mixer_jax.config.schema import EvalConfig
from mixer_jax.evaluation.classification import ClassificationMetrics, evaluate, make_eval_step
from mixer_jax.evaluation.features import make_feature_fn
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.probes import (
    LazyLabels,
    ProbeConfig,
    ProbeMetrics,
    run_probe,
    sample_all_shots,
)
from mixer_jax.training.setup import Experiment

EvalMetrics = ClassificationMetrics | ProbeMetrics
# From parameters to metrics.
Evaluator = Callable[[Any], EvalMetrics]


def make_evaluators(experiment: Experiment) -> dict[str, Evaluator]:
    """Creates the evaluations of `config.evals`, by name.

    Raises:
        UserError: Some class has too few images for a few-shot probe.
    """
    config, mesh, datasets = experiment.config, experiment.mesh, experiment.datasets
    skip_bad = config.bad_images.skip_in_evaluation
    input_config = EvalInputConfig(
        config.eval_batch_size,
        (config.image_size, config.image_size),
        config.preprocess.eval_crop,
        config.preprocess.exif_orientation,
        skip_bad,
        config.loader.num_threads,
        config.loader.prefetch_batches,
    )
    eval_step = make_eval_step(experiment.model, mesh)
    feature_fn = make_feature_fn(experiment.model, mesh)

    def classify(name: str, params: Any) -> ClassificationMetrics:
        return evaluate(eval_step, params, datasets.evals[name], mesh, input_config)

    def probe(
        name: str, probe_config: ProbeConfig, labels: LazyLabels, params: Any
    ) -> ProbeMetrics:
        train, test = datasets.probe_train[name], datasets.evals[name]
        return run_probe(feature_fn, params, probe_config, train, test, mesh, input_config, labels)

    evaluators: dict[str, Evaluator] = {}
    for name, entry in config.evals.items():
        if entry.type == "classify":
            evaluators[name] = functools.partial(classify, name)
            continue
        probe_config = _probe_config(name, entry)
        labels = LazyLabels(datasets.probe_train[name], skip_bad)
        if entry.type == "few_shot":
            # Raises if a class has too few images, before training rather than after it.
            sample_all_shots(probe_config, datasets.probe_train[name], labels)
        evaluators[name] = functools.partial(probe, name, probe_config, labels)
    return evaluators


def _probe_config(name: str, entry: EvalConfig) -> ProbeConfig:
    shots = parse_shots(f"config.evals.{name}.shots", entry.shots)
    return ProbeConfig(entry.type, shots, tuple(range(entry.num_seeds)))
