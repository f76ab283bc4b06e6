"""The map of a whole run: `train_and_evaluate`."""

import contextlib
import signal
import time
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.data.loader import Batch
from mixer_jax.distributed import multihost
from mixer_jax.errors import RunError, UserError
from mixer_jax.training.bad_images import BadImageLog
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import (
    InitSource,
    describe_init,
    find_init_source,
    restore_or_init,
)
from mixer_jax.training.journal import MetricsLogger
from mixer_jax.training.setup import (
    AnyScores,
    Experiment,
    build_experiment,
    make_evaluators,
    make_train_batches,
)
from mixer_jax.training.step import Metrics, TrainState
from mixer_jax.training.workdir import save_config

# Steps between exchanges of bad images, for which the devices of several hosts wait a moment.
_SYNC_EVERY_STEPS = 10


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        step: steps done.
        num_steps: steps the run has in all.
        scores: at the last step, by evaluation name; empty if the run was stopped before it.
        stopped_by: the signal that came, or None; SIGTERM where it came to another host.
    """

    step: int
    num_steps: int
    scores: dict[str, AnyScores]
    stopped_by: signal.Signals | None


def train_and_evaluate(
    config: ConfigDict, workdir: str, weights: PretrainedWeights | None = None
) -> TrainResult:
    """Trains a Mixer from the start, or from the newest checkpoint in `workdir`, to the end.

    Args:
        config: valid by `config.validate`.
        workdir: absolute path or URL of the run, checked by `workdir.check`.
        weights: those of `config.init_from`, where they are loaded already.

    Raises:
        UserError: data are missing, or the batch does not divide over the devices.
        RunFailedError: loss, gradients or parameters are no longer finite numbers, or too many
            images cannot be used.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(multihost.GracefulShutdown())
        sources = open_datasets(config)
        multihost.initialize_distributed(config.distributed, config.distributed_timeout)
        leader = multihost.is_primary_process()
        beginning = find_init_source(config, workdir, weights)
        experiment = build_experiment(config, sources, init_info=beginning and beginning.about)
        checkpoints = CheckpointManager(workdir, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        first_step = checkpoints.latest_step() or 0
        state, window = restore_or_init(experiment, checkpoints, first_step, beginning)
        if leader:
            save_config(workdir, config)
        journal = MetricsLogger(workdir, experiment, first_step, leader, window)
        stack.callback(journal.close)
        journal.progress.say(_describe(experiment, first_step, beginning))
        bad_images = BadImageLog(
            workdir,
            first_step,
            num_examples=len(sources.train),
            max_fraction=config.bad_images.max_fraction,
            say=journal.progress.say,
        )

        evals = make_evaluators(experiment)
        shared_flags = multihost.SharedFlags()
        step = saved_step = first_step
        saved_at = time.monotonic()
        scores: dict[str, AnyScores] = {}
        if first_step == experiment.num_steps:
            scores = {name: evaluate(state.eval_params) for name, evaluate in evals.items()}
        batches = make_train_batches(experiment, first_step, bad_images.record)
        stack.callback(batches.close)
        for step, batch in enumerate(batches, first_step + 1):
            state, metrics = _take_step(experiment, state, batch, journal.is_due(step))
            last = step == experiment.num_steps
            try:
                journal.record(step, metrics)
                if _is_sync_step(step):
                    bad_images.share()
                due = [name for name in evals if last or _due(step, config.evals[name].every_steps)]
                late = 0 < config.checkpoint.every_minutes * 60 < time.monotonic() - saved_at
                signalled, late = shared_flags.exchange(stop.received is not None, late)
                if signalled and stop.received is None:
                    stop.received = signal.SIGTERM
                stopping = signalled or bad_images.too_many
                saving = last or stopping or late or _due(step, config.checkpoint.every_steps)
                if due or saving:
                    # What is scored and saved is known to be finite.
                    journal.settle()
                    if not journal.is_due(step):
                        norm = experiment.parameter_norm(state.params)
                        journal.check(step, {"parameter_norm": float(norm)})
            except RunError as error:
                raise _with_last_checkpoint(error, workdir, saved_step) from error
            with journal.progress.pause():
                try:
                    for name in due:
                        scores[name] = evals[name](state.eval_params)
                        journal.log_eval(step, name, scores[name])
                except UserError:
                    # What has been trained is not lost over an image that cannot be scored.
                    save(experiment, checkpoints, state, step, journal.window)
                    raise
                if saving:
                    save(experiment, checkpoints, state, step, journal.window)
                    saved_step, saved_at = step, time.monotonic()
                    # A request that was sent before this save would cause another one.
                    shared_flags.clear()
            if stopping and stop.received is not None and not last:
                # Callers other than `mixer_jax.main` would otherwise see a run end without a word.
                journal.progress.say(f"{stop.received.name} received: stopped after step {step:,}")
            if stopping:
                break
        bad_images.close()
    if bad_images.too_many and step < experiment.num_steps:
        raise RunError(bad_images.verdict(saved_step))
    finished = step == experiment.num_steps
    return TrainResult(step, experiment.num_steps, scores if finished else {}, stop.received)


def _take_step(
    experiment: Experiment, state: TrainState, batch: Batch, measured: bool
) -> tuple[TrainState, Metrics]:
    """Takes a training step; where it is measured, norms are among its metrics.

    They are no part of the step: XLA would copy parameters and moments for the one, and change them
    at half the memory's speed for the other.
    """
    if not measured:
        return experiment.train_step(state, batch)
    with_update = experiment.config.log_update_norm
    before = experiment.copy_params(state.params) if with_update else None
    state, metrics = experiment.train_step(state, batch)
    metrics = metrics | {"parameter_norm": experiment.parameter_norm(state.params)}
    if before is not None:
        metrics["update_norm"] = experiment.change_norm(before, state.params)
    return state, metrics


def save(
    experiment: Experiment,
    checkpoints: CheckpointManager,
    state: TrainState,
    step: int,
    window: list[float],
) -> None:
    """Begins to save a state, and the journal's open window, in the background."""
    items = {"params": state.params, "optimizer": state.opt_state}
    if state.ema_params is not None:
        items["ema_params"] = state.ema_params
    checkpoints.save(step, items, experiment.metadata | {"loss_window": list(window)})


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _is_sync_step(step: int) -> bool:
    return jax.process_count() == 1 or step % _SYNC_EVERY_STEPS == 0


def _with_last_checkpoint(error: RunError, workdir: str, step: int) -> RunError:
    kept = f"the last good checkpoint is {workdir}/checkpoints/{step}" if step else "none was saved"
    return type(error)(f"{error}; {kept}; try a lower learning rate or a longer warmup")


def _describe(experiment: Experiment, first_step: int, beginning: InitSource | None) -> str:
    config, mesh, train = experiment.config, experiment.mesh, experiment.sources.train
    count = sum(leaf.size for leaf in jax.tree.leaves(experiment.state_shape.params))
    device = jax.devices()[0]
    if first_step == experiment.num_steps:
        status = "training is finished: scoring the last checkpoint"
    else:
        begins = f"goes on after step {first_step:,}" if first_step else "begins"
        status = (
            f"training {begins}: {experiment.num_steps:,} steps of {config.batch_size:,} images; "
            "the first compiles the program"
        )
    return (
        f"Mixer {experiment.about.variant}, {count:,} parameters, {config.image_size} px\n"
        f"{describe_init(experiment, beginning)}"
        f"{train.name}: {len(train):,} images, {train.num_classes:,} classes\n"
        f"{mesh.size} × {device.device_kind}, mesh data={mesh.shape['data']} "
        f"fsdp={mesh.shape['fsdp']}, {experiment.model.execution.dtype}\n"
        f"{status}"
    )
