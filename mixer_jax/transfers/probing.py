"""Probe tasks: features of the checkpoint, and of a fresh network beside it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mixer_jax.data.sources import open_source
from mixer_jax.evaluation.features import compile_features
from mixer_jax.evaluation.passes import Reading
from mixer_jax.evaluation.probes import ProbeSettings, run_probe
from mixer_jax.evaluation.tasks import Probe
from mixer_jax.parallel.hosts import is_leader
from mixer_jax.parallel.sharding import make_mesh
from mixer_jax.transfers.plan import Plan
from mixer_jax.transfers.results import (
    CHECKPOINT,
    FRESH,
    RunResult,
    read_result,
    save_result,
)
from mixer_jax.transfers.runs import TEST
from mixer_jax.weights.load import Weights, resize
from mixer_jax.weights.ready import make_model, place_for_prediction

_SEED_OF_FRESH = 0


def probe_task(
    plan: Plan, task: Probe, weights: Weights, workdir: str, say: Callable[[str], None]
) -> None:
    """Does what is left of a probe task.

    Args:
        plan: of the suite.
        task: to do.
        weights: to judge.
        workdir: of the suite.
        say: tells people something.
    """
    todo = [CHECKPOINT, FRESH] if task.beside_fresh else [CHECKPOINT]
    todo = [name for name in todo if read_result(f"{workdir}/{task.name}/{name}") is None]
    if not todo:
        return
    side = plan.image_sizes[task.name]
    weights = resize(weights, (side, side))
    train, test = (
        open_source(task.dataset, split, plan.setting.data_dir)
        for split in (task.train_split, task.test_split)
    )
    config = plan.setting.config()
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    model = make_model(weights.about)
    features_of = compile_features(model, mesh)
    reading = Reading(
        batch_size=config.eval_batch_size,
        image_size=weights.about.image_size,
        eval_crop=task.eval_crop or weights.about.eval_crop,
        exif_orientation=weights.about.exif_orientation,
        skip_bad=config.bad_images.skip_in_evaluation,
        threads=config.loader.threads,
        prefetch_batches=config.loader.prefetch_batches,
    )
    for name, params in _networks(weights, todo):
        start = time.monotonic()
        scores = run_probe(
            features_of,
            place_for_prediction(params, model, mesh),
            ProbeSettings(task.method, task.shots, task.seeds),
            train,
            test,
            mesh,
            reading,
        )
        say(f"{task.name}, {name}: {scores.told()}")
        if is_leader():
            result = RunResult({TEST: scores.values()}, time.monotonic() - start)
            save_result(f"{workdir}/{task.name}/{name}", result)


def _networks(weights: Weights, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields parameters without head, of the checkpoint or drawn at random, on the host."""
    for name in names:
        params = weights.params
        if name == FRESH:
            model = make_model(weights.about).clone(num_classes=0)
            images = jnp.zeros((1, *weights.about.image_size, 3))
            rng = jax.random.key(_SEED_OF_FRESH)
            params = jax.device_get(jax.jit(model.init)(rng, images)["params"])
        yield name, {part: value for part, value in params.items() if part != "head"}
