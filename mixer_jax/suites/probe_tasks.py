"""Probe tasks: features of the checkpoint, and of a fresh network beside it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mixer_jax.checkpoints.load import PretrainedWeights, resize
from mixer_jax.checkpoints.to_device import model_from_info, shard_inference_params
from mixer_jax.data.registry import open_dataset
from mixer_jax.distributed.multihost import is_primary_process
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.evaluation.features import make_feature_fn
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.probes import ProbeConfig, run_probe
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.results import CHECKPOINT, RANDOM_INIT, RunResult, read_result, save_result
from mixer_jax.suites.run_configs import TEST
from mixer_jax.suites.tasks import ProbeTask

_SEED_OF_FRESH = 0


def run_probe_task(
    plan: TransferPlan,
    task: ProbeTask,
    weights: PretrainedWeights,
    workdir: str,
    say: Callable[[str], None],
) -> None:
    """Does what is left of a probe task.

    Args:
        plan: of the suite.
        task: to do.
        weights: to judge.
        workdir: of the suite.
        say: tells people something.
    """
    todo = [CHECKPOINT, RANDOM_INIT] if task.beside_fresh else [CHECKPOINT]
    todo = [name for name in todo if read_result(f"{workdir}/{task.name}/{name}") is None]
    if not todo:
        return
    side = plan.image_sizes[task.name]
    weights = resize(weights, (side, side))
    train, test = (
        open_dataset(task.dataset, split, plan.setting.data_dir)
        for split in (task.train_split, task.test_split)
    )
    config = plan.setting.config()
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    model = model_from_info(weights.model_info)
    feature_fn = make_feature_fn(model, mesh)
    reading = EvalInputConfig(
        batch_size=config.eval_batch_size,
        image_size=weights.model_info.image_size,
        eval_crop=task.eval_crop or weights.model_info.eval_crop,
        exif_orientation=weights.model_info.exif_orientation,
        skip_bad=config.bad_images.skip_in_evaluation,
        num_threads=config.loader.num_threads,
        prefetch_batches=config.loader.prefetch_batches,
    )
    for name, params in _networks(weights, todo):
        start = time.monotonic()
        scores = run_probe(
            feature_fn,
            shard_inference_params(params, model, mesh),
            ProbeConfig(task.method, task.shots, task.seeds),
            train,
            test,
            mesh,
            reading,
        )
        say(f"{task.name}, {name}: {scores.format_progress()}")
        if is_primary_process():
            result = RunResult({TEST: scores.as_dict()}, time.monotonic() - start)
            save_result(f"{workdir}/{task.name}/{name}", result)


def _networks(weights: PretrainedWeights, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields parameters without head, of the checkpoint or drawn at random, on the host."""
    for name in names:
        params = weights.params
        if name == RANDOM_INIT:
            model = model_from_info(weights.model_info).clone(num_classes=0)
            images = jnp.zeros((1, *weights.model_info.image_size, 3))
            rng = jax.random.key(_SEED_OF_FRESH)
            params = jax.device_get(jax.jit(model.init)(rng, images)["params"])
        yield name, {part: value for part, value in params.items() if part != "head"}
