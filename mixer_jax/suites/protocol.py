"""Sequential execution of the tasks of a suite.

A fine-tuning task sweeps learning rates, then trains with every seed and evaluates on the test
split. A probe task probes the checkpoint and, if asked, a randomly initialized network. Completed
runs have a small file in the suite's workdir and are skipped, so that a killed suite resumes.
"""

import posixpath
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixer_jax.checkpoints.weights import PretrainedWeights, replace_head, resize
from mixer_jax.data.preprocess import CROP_FRACTION
from mixer_jax.data.registry import open_dataset
from mixer_jax.distributed.multihost import any_host, compute_once, is_primary_process
from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
from mixer_jax.errors import NonFiniteError, OutputWriteError, WriteFailureError, describe_error
from mixer_jax.evaluation.features import make_feature_fn
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.probes import ProbeConfig, run_probe
from mixer_jax.suites.cost import training_seconds
from mixer_jax.suites.plan import Run, TransferPlan, default_config
from mixer_jax.suites.tasks import CHECKPOINT, NETWORK_TITLES, TEST, FineTuneTask, ProbeTask, Task
from mixer_jax.suites.workdir import (
    RunResult,
    clear_failure,
    delete_checkpoints,
    read_result,
    save_failure,
    save_result,
    select_learning_rate,
)
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.tracking import RunLabel
from mixer_jax.training.workdir import check_workdir
from mixer_jax.visualization.curves import save_curves

_RANDOM_INIT_SEED = 0


class TaskInterruptedError(Exception):
    """The current run was saved and stopped by a signal."""

    def __init__(self, received: signal.Signals | None):
        super().__init__(received)
        self.received = received


class TaskContext(NamedTuple):
    """Everything that the tasks of a suite share.

    Attributes:
        workdir: Absolute path or URL of the suite's workdir.
        weights: Checkpoint to evaluate.
        keep_checkpoints: Whether checkpoints of completed runs are kept.
        log: Prints a line.
    """

    plan: TransferPlan
    workdir: str
    weights: PretrainedWeights
    keep_checkpoints: bool
    log: Callable[[str], None]


def run_tasks(context: TaskContext, tasks: Sequence[Task]) -> dict[str, str]:
    """Runs tasks one after the other; returns the reasons of failed ones by name.

    With several hosts, those without an error would wait forever for one that has skipped a task.
    So all errors are raised there, except divergence, which is the same on all hosts.

    Raises:
        TaskInterruptedError: The current run was stopped.
        OutputWriteError, WriteFailureError: A result cannot be written.
    """
    failures = {}
    for index, task in enumerate(tasks, start=1):
        context.log(f"\n[{index}/{len(tasks)}] {task.name}")
        try:
            run_task(context, task)
        except (TaskInterruptedError, OutputWriteError, WriteFailureError):
            raise
        except Exception as error:
            # Any error, even running out of memory, ends only its own task.
            if jax.process_count() > 1 and not isinstance(error, NonFiniteError):
                raise
            failures[task.name] = reason = describe_error(error)
            if is_primary_process():
                save_failure(f"{context.workdir}/{task.name}", reason, traceback.format_exc())
        if task.name in failures:
            context.log(f"{task.name} failed: {failures[task.name]}")
    return failures


def run_task(context: TaskContext, task: Task) -> None:
    """Runs one task, or resumes it."""
    if is_primary_process():
        clear_failure(f"{context.workdir}/{task.name}")
    if isinstance(task, ProbeTask):
        run_probe_task(context, task)
    else:
        run_fine_tune_task(context, task)


def run_fine_tune_task(context: TaskContext, task: FineTuneTask) -> None:
    """Runs the remaining sweep and final runs of a fine-tuning task."""
    learning_rate = _select_learning_rate(context, task)
    for seed, run in context.plan.final_runs(task, learning_rate).items():
        # A divergence is not recorded: with another number of devices the run may converge.
        result = _complete_run(context, run, record_failure=False)
        if result.failed:
            raise NonFiniteError(f"the final run with seed {seed} failed: {result.failed}")


def _select_learning_rate(context: TaskContext, task: FineTuneTask) -> float:
    sweep = context.plan.sweep_runs(task)
    if not sweep:
        return task.learning_rates[0]
    results = {
        rate: _complete_run(context, run, record_failure=True) for rate, run in sweep.items()
    }
    selected = select_learning_rate(results)
    if selected is None:
        reasons = "; ".join(f"{rate:g}: {run.failed}" for rate, run in results.items())
        raise NonFiniteError(f"training failed with every learning rate: {reasons}")
    context.log(f"{task.name}: selected learning rate {selected:g}")
    return selected


def _complete_run(context: TaskContext, run: Run, record_failure: bool) -> RunResult:
    """Returns the result of a run, which is trained to the end if it is not complete."""
    folder = f"{context.workdir}/{run.folder}"
    result = compute_once(lambda: read_result(folder, run.config.evals))
    is_stopping = False
    if result is None or (result.failed and not record_failure):
        context.log(f"\n{run.folder}")
        result, received = _train(context, run, folder)
        if is_primary_process() and (record_failure or not result.failed):
            save_result(folder, result)
        # The signal may have reached a single host after the last step at which hosts synchronize.
        is_stopping = any_host(received is not None)
    if is_primary_process() and not context.keep_checkpoints:
        delete_checkpoints(folder)
    if is_stopping:
        raise TaskInterruptedError(received)
    return result


def _train(context: TaskContext, run: Run, folder: str) -> tuple[RunResult, signal.Signals | None]:
    """Trains to the end; returns the result and the signal received meanwhile, if any.

    Raises:
        TaskInterruptedError: The signal came before the end.
    """
    for change in check_workdir(folder, run.config):
        context.log(f"changed since this run was last started: {change}")
    scores: dict[str, dict[str, float]] = {}
    failed, stopped_by = "", None
    try:
        label = RunLabel(run.folder, posixpath.basename(context.workdir.rstrip("/")))
        result = train_and_evaluate(
            run.config, folder, context.weights, plot=save_curves, label=label
        )
        stopped_by = result.stopped_by
        if not result.is_finished:
            raise TaskInterruptedError(stopped_by)
        result.raise_failures()
        scores = {name: metrics.as_dict() for name, metrics in result.scores.items()}
    except NonFiniteError as error:
        # It would diverge again; the sweep is there to find such learning rates.
        failed = str(error)
        context.log(f"{run.folder} failed: {failed}")
    seconds = training_seconds(read_metrics(folder), run.config.batch_size)
    return RunResult(scores, seconds, failed), stopped_by


def run_probe_task(context: TaskContext, task: ProbeTask) -> None:
    """Probes the networks of a probe task that have no result yet."""
    folders = {network: f"{context.workdir}/{task.name}/{network}" for network in task.networks}
    networks = compute_once(
        lambda: [network for network in folders if read_result(folders[network]) is None]
    )
    if not networks:
        return
    plan, size = context.plan, context.plan.image_sizes[task.name]
    weights = replace_head(resize(context.weights, (size, size)), 0)
    info = weights.model_info
    # Listed once, so that all hosts have the same examples in the same order.
    train, test = compute_once(
        lambda: [
            open_dataset(task.dataset, split, plan.data_dir)
            for split in (task.train_split, task.test_split)
        ]
    )
    config = default_config(plan.overrides)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    model = info.build_model()
    feature_fn = make_feature_fn(model, mesh)
    input_config = EvalInputConfig(
        batch_size=config.eval_batch_size,
        image_size=info.image_size,
        eval_crop=task.eval_crop or info.eval_crop,
        eval_crop_fraction=CROP_FRACTION if task.eval_crop else info.eval_crop_fraction,
        exif_orientation=info.exif_orientation,
        skip_bad=config.bad_images.skip_in_evaluation,
        num_threads=config.loader.num_threads,
        prefetch_batches=config.loader.prefetch_batches,
        permutation=info.permutation,
    )
    for network in networks:
        params = weights.params if network == CHECKPOINT else _init_params(model, info.image_size)
        start = time.monotonic()
        metrics = run_probe(
            feature_fn,
            shard_inference_params(params, model, mesh),
            ProbeConfig(task.method, task.shots, task.seeds),
            train,
            test,
            mesh,
            input_config,
        )
        context.log(f"{task.name}, {NETWORK_TITLES[network]}: {metrics.format_progress()}")
        if is_primary_process():
            result = RunResult({TEST: metrics.as_dict()}, time.monotonic() - start)
            save_result(folders[network], result)


def _init_params(model: Any, image_size: tuple[int, int]) -> Any:
    """Initializes parameters at random, on the host."""
    rng = jax.random.key(_RANDOM_INIT_SEED)
    images = jnp.zeros((1, *image_size, 3))
    return jax.device_get(jax.jit(model.init)(rng, images)["params"])
