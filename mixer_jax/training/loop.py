"""The training loop: `train_and_evaluate`."""

import contextlib
import functools
import signal
import time
from typing import NamedTuple

import jax

from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.config.schema import RunConfig
from mixer_jax.data.loader import Batch
from mixer_jax.distributed import multihost
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.registry import get_family
from mixer_jax.training.bad_images import BadImageLog
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.evaluators import EvalMetrics, make_evaluators
from mixer_jax.training.initialize import (
    InitSource,
    describe_init,
    find_init_source,
    restore_or_init,
)
from mixer_jax.training.metrics import MetricsLogger
from mixer_jax.training.setup import (
    Experiment,
    build_experiment,
    make_train_batches,
    throughput_metrics,
)
from mixer_jax.training.step import Metrics, TrainState
from mixer_jax.training.workdir import save_config

# Interval at which several hosts count bad images, for which their devices wait a moment.
_SYNC_EVERY_STEPS = 10


class TrainResult(NamedTuple):
    """Result of a run.

    Attributes:
        step: Steps taken.
        num_steps: Steps of the whole run.
        scores: Metrics at the last step by evaluation; empty if the run stopped before it.
        stopped_by: Signal that was received, or None; SIGTERM if another host received one.
    """

    step: int
    num_steps: int
    scores: dict[str, EvalMetrics]
    stopped_by: signal.Signals | None


def train_and_evaluate(
    config: RunConfig, workdir: str, weights: PretrainedWeights | None = None
) -> TrainResult:
    """Trains a model to the end of the run, resuming from the newest checkpoint in `workdir`.

    Args:
        config: Config of the run.
        workdir: Absolute path or URL of the run, checked by `check_workdir`.
        weights: Weights of `config.init_from`, if already loaded.

    Raises:
        UserError: Data is missing, or the batch cannot be split over the devices.
        RunError: Loss, gradients or parameters are not finite, or too many images are bad.
    """
    with contextlib.ExitStack() as stack:
        shutdown = stack.enter_context(multihost.GracefulShutdown())
        datasets = open_datasets(config)
        multihost.initialize_distributed(config.distributed, config.distributed_timeout)
        is_primary = multihost.is_primary_process()
        init = find_init_source(config, workdir, weights)
        experiment = build_experiment(config, datasets, init_info=init and init.model_info)
        num_steps = experiment.num_steps
        checkpoints = CheckpointManager(workdir, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        start_step = checkpoints.latest_step() or 0
        state, loss_window = restore_or_init(experiment, checkpoints, start_step, init)
        if is_primary:
            save_config(workdir, config)
        logger = MetricsLogger(
            workdir,
            start_step,
            num_steps,
            batch_size=config.batch_size,
            log_every_steps=config.log_every_steps,
            throughput_metrics=functools.partial(throughput_metrics, experiment),
            loss_window=loss_window,
            is_primary=is_primary,
            tensorboard=config.tensorboard,
        )
        stack.callback(logger.close)
        logger.progress.print(_describe_run(experiment, start_step, init))
        bad_images = BadImageLog(
            workdir,
            start_step,
            num_examples=len(datasets.train),
            batch_size=config.batch_size,
            max_fraction=config.bad_images.max_fraction,
            log=logger.progress.print,
        )

        evaluators = make_evaluators(experiment)
        shared_flags = multihost.SharedFlags()
        step = saved_step = start_step
        saved_at = time.monotonic()
        scores: dict[str, EvalMetrics] = {}
        if start_step == num_steps:
            scores = {name: evaluate(state.eval_params) for name, evaluate in evaluators.items()}
        batches = make_train_batches(experiment, start_step, bad_images.record)
        stack.callback(batches.close)
        for step, batch in enumerate(batches, start_step + 1):
            state, metrics = _take_step(experiment, state, batch, logger.should_log(step))
            is_last = step == num_steps
            try:
                logger.record(step, metrics)
                if _is_sync_step(step):
                    bad_images.sync_hosts(step)
                due_evals = [
                    name
                    for name, entry in config.evals.items()
                    if is_last or _is_due(step, entry.every_steps)
                ]
                seconds = time.monotonic() - saved_at
                is_late = 0 < config.checkpoint.every_minutes * 60 < seconds
                signaled, is_late = shared_flags.exchange(shutdown.received is not None, is_late)
                if signaled and shutdown.received is None:
                    shutdown.received = signal.SIGTERM
                is_stopping = signaled or bad_images.too_many
                is_saving = (
                    is_last
                    or is_stopping
                    or is_late
                    or _is_due(step, config.checkpoint.every_steps)
                )
                if due_evals or is_saving:
                    # Only finite parameters are evaluated and saved.
                    logger.flush_pending()
                    if not logger.should_log(step):
                        norm = float(experiment.param_norm(state.params))
                        logger.check_finite(step, {"parameter_norm": norm})
            except RunError as error:
                raise _with_resume_hint(error, workdir, saved_step) from error
            with logger.progress.pause():
                try:
                    for name in due_evals:
                        scores[name] = evaluators[name](state.eval_params)
                        logger.log_eval(
                            step, name, scores[name].as_dict(), scores[name].format_progress()
                        )
                except UserError:
                    # A bad evaluation image must not cost what has been trained.
                    save(experiment, checkpoints, state, step, logger.loss_window)
                    raise
                if is_saving:
                    save(experiment, checkpoints, state, step, logger.loss_window)
                    saved_step, saved_at = step, time.monotonic()
                    # A request sent before this save would cause another one.
                    shared_flags.clear()
            if is_stopping and shutdown.received is not None and not is_last:
                # Callers other than `mixer_jax.main` print nothing else about it.
                logger.progress.print(f"{shutdown.received.name}: stopped after step {step:,}")
            if is_stopping:
                break
        bad_images.close()
    if bad_images.too_many and step < num_steps:
        raise RunError(bad_images.stop_message(saved_step))
    return TrainResult(step, num_steps, scores if step == num_steps else {}, shutdown.received)


def _take_step(
    experiment: Experiment, state: TrainState, batch: Batch, should_log: bool
) -> tuple[TrainState, Metrics]:
    """Takes a training step, and computes norms of parameters and update if it is logged.

    The norms are not part of the step: for the norm of the update, XLA would copy parameters and
    moments, and with the norm of the parameters, it would update them at half the memory bandwidth.
    """
    if not should_log:
        return experiment.train_step(state, batch)
    has_update_norm = experiment.config.log_update_norm
    before = experiment.copy_params(state.params) if has_update_norm else None
    state, metrics = experiment.train_step(state, batch)
    metrics = metrics | {"parameter_norm": experiment.param_norm(state.params)}
    if before is not None:
        metrics["update_norm"] = experiment.update_norm(before, state.params)
    return state, metrics


def save(
    experiment: Experiment,
    checkpoints: CheckpointManager,
    state: TrainState,
    step: int,
    loss_window: list[float],
) -> None:
    """Starts saving a state, and the losses not logged yet, in the background."""
    items = {"params": state.params, "optimizer": state.opt_state}
    if state.ema_params is not None:
        items["ema_params"] = state.ema_params
    checkpoints.save(step, items, experiment.metadata | {"loss_window": list(loss_window)})


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _is_sync_step(step: int) -> bool:
    return jax.process_count() == 1 or step % _SYNC_EVERY_STEPS == 0


def _with_resume_hint(error: RunError, workdir: str, step: int) -> RunError:
    saved = f"{workdir}/checkpoints/{step}" if step else "none"
    return type(error)(
        f"{error} Last good checkpoint: {saved}. Try a lower learning rate or a longer warmup."
    )


def _describe_run(experiment: Experiment, start_step: int, init: InitSource | None) -> str:
    """Formats model, data, devices and, in the last line, the status of a run."""
    config, info, mesh = experiment.config, experiment.model_info, experiment.mesh
    train, num_steps = experiment.datasets.train, experiment.num_steps
    notes = "".join(f"{note}\n" for note in experiment.datasets.notes)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(experiment.state_shape.params))
    if start_step == num_steps:
        status = "training is finished: evaluating the last checkpoint"
    else:
        start = f"resuming after step {start_step:,}" if start_step else "starting training"
        status = (
            f"{start}: {num_steps:,} steps of {config.batch_size:,} images; "
            "the first step includes compilation"
        )
    return (
        f"{get_family(info.family).full_name(info.variant)}, {num_params:,} parameters, "
        f"{config.image_size} px\n"
        f"{describe_init(experiment, init)}"
        f"{train.name}: {len(train):,} images, {train.num_classes:,} classes\n"
        f"{notes}"
        f"{mesh.size} × {jax.devices()[0].device_kind}, mesh data={mesh.shape['data']} "
        f"fsdp={mesh.shape['fsdp']}, {experiment.model.execution.dtype}\n"
        f"{status}"
    )
