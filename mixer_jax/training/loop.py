"""The training loop: `train_and_evaluate`."""

import contextlib
import datetime
import functools
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from mixer_jax.checkpoints.best import (
    BestCheckpoint,
    MetricHistory,
    format_value,
    has_stopped_early,
)
from mixer_jax.checkpoints.manager import (
    CheckpointManager,
    move_damaged_checkpoints,
    remove_unfinished_saves,
)
from mixer_jax.checkpoints.model_info import get_metadata
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, list_steps
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.cli.versions import list_versions
from mixer_jax.config.schema import RunConfig
from mixer_jax.data.loader import Batch
from mixer_jax.distributed import multihost
from mixer_jax.distributed.sharding import replicated
from mixer_jax.errors import (
    DiskFullError,
    NonFiniteError,
    RunError,
    UserError,
    WriteFailureError,
    describe_error,
    describe_full_memory,
    is_out_of_memory,
    no_space_path,
    no_space_reason,
    summarize_error,
    write_failure_reason,
)
from mixer_jax.models.param_groups import count_frozen, layer_factors
from mixer_jax.models.registry import get_family
from mixer_jax.training.bad_images import BadImageLog
from mixer_jax.training.datasets import RunDatasets, balanced_class_weights, open_datasets
from mixer_jax.training.initialize import (
    InitSource,
    describe_init,
    find_init_source,
    restore_or_init,
    save_state,
)
from mixer_jax.training.metrics import CURVES_FILE, MetricsLogger, read_metrics
from mixer_jax.training.profile import StepProfiler
from mixer_jax.training.setup import (
    EvalMetrics,
    Experiment,
    build_experiment,
    make_evaluators,
    make_train_batches,
    throughput_metrics,
)
from mixer_jax.training.tracking import RunLabel, WandbRun, check_wandb_installed
from mixer_jax.training.workdir import (
    lock_workdir,
    record_start,
    save_config,
    save_parameter_overview,
)

# Interval at which several hosts count bad images, for which their devices wait a moment.
_SYNC_EVERY_STEPS = 10


class EvalFailure(NamedTuple):
    """Failure of an evaluation; not the error itself, whose traceback holds arrays of devices."""

    message: str
    is_usage_error: bool


class TrainResult(NamedTuple):
    """Result of a run.

    Attributes:
        step: Steps taken.
        num_steps: Steps of the whole run.
        scores: Metrics at the last step by evaluation; empty if the run was interrupted before it.
        stopped_by: Signal that was received, or None; SIGTERM if another host received one.
        failures: Evaluations whose last attempt failed, by name.
        has_curves: Whether curves.png was drawn, on the primary process.
        stopped_early: Whether the run ended at `step` because of `early_stopping_patience`.
        best: Best checkpoint, if the run has a `checkpoint.best_metric` and has evaluated it.
    """

    step: int
    num_steps: int
    scores: dict[str, EvalMetrics]
    stopped_by: signal.Signals | None
    failures: Mapping[str, EvalFailure] = MappingProxyType({})
    has_curves: bool = False
    stopped_early: bool = False
    best: BestCheckpoint | None = None

    @property
    def is_finished(self) -> bool:
        """True if the run has ended, at its last step or early; otherwise it can be resumed."""
        return self.stopped_early or self.step == self.num_steps

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics at the last step by evaluation and name, e.g. "test/top1"; as metrics.jsonl."""
        return {
            f"{evaluation}/{name}": value
            for evaluation, metrics in self.scores.items()
            for name, value in metrics.as_dict().items()
        }

    @property
    def exit_code(self) -> int:
        """Exit code of a command that runs this: 2 means "do not retry"."""
        if self.failures:
            is_usage = all(failure.is_usage_error for failure in self.failures.values())
            return 2 if is_usage else 1
        if self.stopped_by is not None and not self.is_finished:
            return 128 + self.stopped_by
        return 0

    def raise_failures(self) -> None:
        """Raises an error if evaluations failed: UserError, or RunError if a retry may succeed."""
        if self.failures:
            reasons = (
                f"evaluation {name} failed: {failure.message}"
                for name, failure in self.failures.items()
            )
            raise (UserError if self.exit_code == 2 else RunError)(" ".join(reasons))


def train_and_evaluate(
    config: RunConfig,
    workdir: str,
    weights: PretrainedWeights | None = None,
    plot: Callable[[str], bool] | None = None,
    label: RunLabel | None = None,
) -> TrainResult:
    """Trains a model to the end of the run, resuming from the newest checkpoint in `workdir`.

    The run ends early after `early_stopping_patience` evaluations without improvement.
    An evaluation that fails does not end the run; see `TrainResult.raise_failures`.

    Args:
        config: Config of the run.
        workdir: Absolute path or URL of the run, checked by `check_workdir`.
        weights: Weights of `config.init_from`, if already loaded.
        plot: Function that draws curves.png in a workdir, called on the primary process after
            training; returns whether it succeeded.
        label: Name and group of the run in Weights & Biases, if it belongs to a suite.

    Raises:
        UserError: Data is missing, or the batch cannot be split over the devices.
        DiskFullError: `workdir`, or the file that the message names, cannot be written for lack of
            space.
        WriteFailureError: `workdir` cannot be written for another reason, such as a failing disk.
        RunError: Loss, gradients or parameters are not finite, too many images are bad, the memory
            of a device is full, or another process is training in `workdir`.
    """
    try:
        with contextlib.ExitStack() as stack:
            loop = TrainLoop(config, workdir, weights, label, stack)
            try:
                return loop.finish(loop.run(), plot)
            except NonFiniteError as error:
                saved = _last_checkpoint(workdir, loop.saved_step)
                raise NonFiniteError(
                    f"{error} Last good checkpoint: {saved}. Try a lower learning rate or a longer "
                    "warmup."
                ) from error
    except (UserError, RunError):
        raise
    except Exception as error:
        # Also those of saves in the background, which end with the stack.
        space, failure = no_space_reason(error), write_failure_reason(error, workdir)
        is_memory_full = _is_device_memory_full(error)
        if not space and not failure and not is_memory_full:
            raise
        saved = _find_last_checkpoint(workdir)
        if is_memory_full:
            raise RunError(
                f"{_describe_full_memory(error)} Last good checkpoint: {saved}. Try "
                "--config.recipe.grad_accum_steps=2 (microbatches) or --config.model.remat=full, "
                "and on several devices --config.mesh.fsdp=2; a run that has started resumes with "
                "them."
            ) from error
        if not space:
            raise WriteFailureError(
                f"workdir {workdir!r} cannot be written ({failure}). Last good checkpoint: {saved}."
                " Check the file system and run the same command to resume."
            ) from error
        path = no_space_path(error, workdir)
        name = f"workdir {path!r}" if path == workdir else repr(path)
        raise DiskFullError(
            f"{name} cannot be written ({space}). Last good checkpoint: {saved}. "
            "Free space and run the same command to resume."
        ) from error


def _is_device_memory_full(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and is_out_of_memory(error)


def _describe_full_memory(error: Exception) -> str:
    return f"the memory of a device is full ({summarize_error(error)})."


def _last_checkpoint(workdir: str, step: int) -> str:
    return f"{workdir}/{CHECKPOINT_DIR}/{step}" if step else "none"


def _find_last_checkpoint(workdir: str) -> str:
    try:
        return _last_checkpoint(workdir, max(list_steps(workdir), default=0))
    except OSError as error:
        return f"unknown ({error.strerror})"


def _free_space(workdir: str, _type: Any, error: BaseException | None, _traceback: Any) -> None:
    """Removes unfinished saves if a run ends for lack of space; a callback of `ExitStack.push`."""
    is_usage_or_run_error = isinstance(error, UserError | RunError)
    if "://" in workdir or is_usage_or_run_error or not no_space_reason(error):
        return
    if jax.process_count() == 1:
        remove_unfinished_saves(workdir)


class TrainLoop:
    """Loop over the training steps of one run, with the state and the logs that they share.

    Attributes:
        experiment: Model, compiled step and data of the run.
        hyperparams: Last argument of the compiled step, on the devices.
        start_step: Steps that the state has taken when `run` is called.
        state: State after the last step.
        batches: Batches of the steps that `run` takes.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: str,
        weights: PretrainedWeights | None,
        label: RunLabel | None,
        stack: contextlib.ExitStack,
    ):
        """Prepares a run; what it opens is closed with `stack`."""
        self.config, self.workdir = config, workdir
        check_wandb_installed(config.wandb)
        self.shutdown = stack.enter_context(multihost.GracefulShutdown())
        is_alone = multihost.is_alone(config.distributed)
        if is_alone:
            # Before anything that takes time.
            stack.enter_context(lock_workdir(workdir))
        multihost.initialize_distributed(config.distributed, config.distributed_timeout)
        multihost.check_devices()
        if not is_alone:
            stack.enter_context(multihost.enter_on_primary(lock_workdir(workdir)))
        # Called after the last save has ended and before another process may lock the workdir.
        stack.push(functools.partial(_free_space, workdir))
        # Listed once, so that all hosts have the same examples in the same order.
        datasets = multihost.compute_once(lambda: open_datasets(config))
        if not is_alone:
            datasets.check_hosts()
        is_primary = multihost.is_primary_process()
        init = find_init_source(config, workdir, weights)
        datasets = _add_class_weights(config, datasets, init)
        self.experiment = build_experiment(config, datasets, init_info=init and init.model_info)
        self.num_steps = self.experiment.num_steps
        if init is not None and init.damaged_steps:
            steps = init.damaged_steps
            multihost.compute_once(lambda: move_damaged_checkpoints(workdir, steps))
        # Finished after the last save.
        self.wandb_run = stack.enter_context(
            WandbRun(config.wandb if is_primary else "", workdir, config.to_dict(), label)
        )
        self.start_step = self.saved_step = 0 if init is None else init.resume_step
        self.history = multihost.compute_once(self.read_history)
        find_best = self.history.best_step if self.history.name else None
        self.checkpoints = CheckpointManager(workdir, config.checkpoint.keep, find_best=find_best)
        stack.callback(self.checkpoints.close)
        self.saved_at = time.monotonic()
        self.state, loss_window = restore_or_init(self.experiment, self.checkpoints, init)
        self.hyperparams = jax.device_put(
            self.experiment.hyperparams, replicated(self.experiment.mesh)
        )
        if is_primary:
            save_config(workdir, config)
            save_parameter_overview(workdir, self.state.params)
            record_start(workdir, _start_record(self.experiment, self.start_step))
        self.logger = MetricsLogger(
            workdir,
            self.start_step,
            self.num_steps,
            batch_size=config.batch_size,
            log_every_steps=config.log_every_steps,
            throughput_metrics=functools.partial(throughput_metrics, self.experiment),
            loss_window=loss_window,
            is_primary=is_primary,
            tensorboard=config.tensorboard,
            wandb_run=self.wandb_run,
        )
        stack.callback(self.logger.close)
        is_finished = self.start_step == self.num_steps or has_stopped_early(config, self.history)
        self.logger.progress.print(
            _describe_run(self.experiment, self.start_step, init, is_finished)
        )
        self.bad_images = BadImageLog(
            workdir,
            self.start_step,
            num_examples=len(datasets.train),
            batch_size=config.batch_size,
            config=config.bad_images,
            log=self.logger.progress.print,
        )
        stack.callback(self.bad_images.close)
        profiled = config.profile_range if is_primary else range(0)
        self.profiler = StepProfiler(profiled, workdir, self.logger.progress, self.start_step)
        stack.callback(self.profiler.close)
        self.evaluators = make_evaluators(self.experiment)
        self.shared_flags = multihost.SharedFlags()
        batches = make_train_batches(self.experiment, self.start_step, self.bad_images.record)
        stack.callback(batches.close)
        self.batches: Iterable[Batch] = batches

    def run(self) -> TrainResult:
        """Takes all remaining steps, or those until the run is asked to stop."""
        step = self.start_step
        scores: dict[str, EvalMetrics] = {}
        failures: dict[str, EvalFailure] = {}
        evaluated: list[str] = []
        if step:
            is_last = step == self.num_steps
            evaluated = [*self.evaluators] if is_last else self.find_missing_evals(step)
            self.evaluate(step, evaluated, scores, failures)
        stops_early = self.should_stop_early(step)
        for step, batch in () if stops_early else self.iter_batches():
            self.take_step(step, batch)
            is_last = step == self.num_steps
            is_stopping, is_late = self.sync_hosts(step)
            evaluated = self.list_due_evals(step)
            is_saving = (
                is_last
                or is_stopping
                or is_late
                or _is_due(step, self.config.checkpoint.every_steps)
                or self.best_eval in evaluated
            )
            if evaluated or is_saving:
                self.check_finite(step)
                with self.logger.progress.pause():
                    # Before the evaluations: a preempted machine leaves less time than they may
                    # take. A run that resumes from here first runs those that are missing.
                    if is_saving:
                        self.save(step)
                    if is_last or not is_stopping:
                        self.evaluate(step, evaluated, scores, failures)
            if is_stopping:
                break
            if stops_early := self.should_stop_early(step):
                break
        if stops_early:
            self.print_early_stop(step)
            # As at the last step.
            rest = [name for name in self.evaluators if name not in evaluated]
            self.evaluate(step, rest, scores, failures)
        is_finished, signaled = stops_early or step == self.num_steps, self.shutdown.received
        if is_finished:
            self.checkpoints.delete_outdated()
        elif signaled is not None:
            # Callers other than `mixer_jax.main` print nothing else about it.
            self.logger.progress.print(f"{signaled.name}: stopped after step {step:,}")
        self.bad_images.print_summary()
        if self.bad_images.too_many and not is_finished:
            raise RunError(self.bad_images.stop_message(self.saved_step))
        if not is_finished:
            scores, failures = {}, {}
        return TrainResult(
            step,
            self.num_steps,
            scores,
            signaled,
            failures,
            stopped_early=stops_early,
            # On disk once all saves have ended.
            best=self.history.best_checkpoint(self.checkpoints.all_steps()),
        )

    def finish(self, result: TrainResult, plot: Callable[[str], bool] | None) -> TrainResult:
        """Draws the curves of a run, and passes its result on to Weights & Biases."""
        if plot is not None and multihost.is_primary_process():
            try:
                self.logger.flush()
            except Exception as error:
                # The run is finished, and closing the log tries again. Errors of object stores are
                # of many types.
                self.logger.progress.print(
                    f"curves are drawn without the last lines, which cannot be written yet: "
                    f"{describe_error(error)}"
                )
            result = result._replace(has_curves=plot(self.workdir))
        if result.has_curves:
            self.wandb_run.log_image(result.step, "curves", f"{self.workdir}/{CURVES_FILE}")
        self.wandb_run.exit_code = result.exit_code
        self.wandb_run.is_preempted = result.exit_code == 128 + signal.SIGTERM
        return result

    def iter_batches(self) -> Iterator[tuple[int, Batch]]:
        """Yields steps and their batches; if loading fails, saves the state and raises RunError."""
        step = self.start_step
        try:
            for step, batch in enumerate(self.batches, self.start_step + 1):
                yield step, batch
        except RunError as error:
            # Several hosts can only save together; the others may be at another step.
            if step > self.saved_step and jax.process_count() == 1:
                self.check_finite(step)
                self.save(step)
            raise RunError(
                f"{error} The same command resumes from step {self.saved_step:,}."
            ) from error

    def take_step(self, step: int, batch: Batch) -> None:
        """Takes a training step, and computes norms of parameters and update if it is logged.

        The norms are not part of the step: for the norm of the update, XLA would copy parameters
        and moments, and with the norm of the parameters, it would update them at half the memory
        bandwidth.
        """
        experiment, is_logged = self.experiment, self.logger.should_log(step)
        before = None
        self.profiler.before_step(step, self.state)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            if is_logged and self.config.log_update_norm:
                before = experiment.copy_params(self.state.params)
            self.state, metrics = experiment.train_step(self.state, batch, self.hyperparams)
            if is_logged:
                metrics["parameter_norm"] = experiment.param_norm(self.state.params)
            if before is not None:
                metrics["update_norm"] = experiment.update_norm(before, self.state.params)
            self.logger.record(step, metrics)
        self.profiler.after_step(step, self.state)

    def sync_hosts(self, step: int) -> tuple[bool, bool]:
        """Returns whether the run must stop, and whether a checkpoint is due by time.

        Both are equal on all hosts.
        """
        if jax.process_count() == 1 or step % _SYNC_EVERY_STEPS == 0:
            self.bad_images.sync_hosts(step)
        seconds = time.monotonic() - self.saved_at
        is_late = 0 < self.config.checkpoint.every_minutes * 60 < seconds
        is_signaled = self.shutdown.received is not None
        is_signaled, is_late = self.shared_flags.exchange(is_signaled, is_late)
        if is_signaled and self.shutdown.received is None:
            self.shutdown.received = signal.SIGTERM
        return is_signaled or self.bad_images.too_many, is_late

    def check_finite(self, step: int) -> None:
        """Raises NonFiniteError unless metrics and parameters are finite, before they are used."""
        self.logger.flush_pending()
        if not self.logger.should_log(step):
            norm = float(self.experiment.param_norm(self.state.params))
            self.logger.check_finite(step, {"parameter_norm": norm})

    def list_due_evals(self, step: int) -> list[str]:
        """Returns the names of the evaluations that are due at a step."""
        return [
            name
            for name, entry in self.config.evals.items()
            if step == self.num_steps or _is_due(step, entry.every_steps)
        ]

    def find_missing_evals(self, step: int) -> list[str]:
        """Returns the names of the evaluations that are due at a step but not in metrics.jsonl.

        All hosts must call it together.
        """
        names = self.list_due_evals(step)
        if not names:
            return []
        logged = multihost.compute_once(
            lambda: {
                key.rpartition("/")[0]
                for line in read_metrics(self.workdir)
                if line["step"] == step
                for key in line
            }
        )
        return [name for name in names if name not in logged]

    def read_history(self) -> MetricHistory:
        """Reads the values of `checkpoint.best_metric` up to the step that the run resumes at."""
        name = self.config.checkpoint.best_metric
        lines = read_metrics(self.workdir) if name and self.start_step else []
        return MetricHistory(name, (line for line in lines if line["step"] <= self.start_step))

    @property
    def best_eval(self) -> str:
        """Evaluation of `checkpoint.best_metric`; empty if there is none."""
        return self.history.name.rpartition("/")[0]

    def should_stop_early(self, step: int) -> bool:
        """Returns whether the run ends at a step before its last one; the same on all hosts."""
        return step < self.num_steps and has_stopped_early(self.config, self.history)

    def print_early_stop(self, step: int) -> None:
        """Prints that training has stopped early, and why."""
        name, best = self.history.name, self.history.best_step()
        found = "it has had no finite value"
        if best is not None:
            found = f"the best is {format_value(name, self.history.values[best])} at step {best:,}"
        patience, delta = (
            self.config.early_stopping_patience,
            self.config.early_stopping_min_delta,
        )
        by = f" by more than {delta:g}" if delta else ""
        self.logger.progress.print(
            f"stopped early at step {step:,} of {self.num_steps:,}: {name} has not improved{by} in "
            f"{patience:,} evaluation{'s' if patience > 1 else ''}; {found}"
        )

    def evaluate(
        self,
        step: int,
        names: Iterable[str],
        scores: dict[str, EvalMetrics],
        failures: dict[str, EvalFailure],
    ) -> None:
        """Runs and logs some evaluations; adds the result of each to `scores` or `failures`."""
        # All hosts raise the same usage errors, but other errors may occur on a single host, which
        # then must end: the others wait for it.
        recoverable = Exception if jax.process_count() == 1 else UserError
        for name in names:
            scores.pop(name, None)
            failures.pop(name, None)
            try:
                result = self.run_evaluator(name)
            except recoverable as error:
                message = describe_error(error)
                is_known = isinstance(error, UserError | RunError | OSError)
                if not is_known and not describe_full_memory(error):
                    # Likely a bug, which the message alone does not locate.
                    traceback.print_exception(error)
                failures[name] = EvalFailure(message, isinstance(error, UserError))
                self.logger.progress.print(f"step {step:,}: {name} failed: {message}")
            else:
                scores[name] = result
                metrics = result.as_dict()
                self.logger.log_eval(step, name, metrics, result.format_progress())
                if name == self.best_eval:
                    value = metrics[self.history.name.rpartition("/")[2]]
                    # That of the primary process, which is logged.
                    self.history.add(step, multihost.compute_once(functools.partial(float, value)))

    def run_evaluator(self, name: str) -> EvalMetrics:
        """Runs an evaluation; raises RunError if the memory of a device is full."""
        try:
            return self.evaluators[name](self.state.eval_params)
        except Exception as error:
            if not _is_device_memory_full(error):
                raise
            raise RunError(
                f"{_describe_full_memory(error)} Try a smaller --config.eval_batch_size."
            ) from error

    def save(self, step: int) -> None:
        """Starts saving the state in the background."""
        # Before the checkpoint: a run that resumes from it does not write these lines again.
        self.logger.flush()
        self.bad_images.flush()
        save_state(self.experiment, self.checkpoints, self.state, step, self.logger.loss_window)
        self.saved_step, self.saved_at = step, time.monotonic()
        # A request sent before this save would cause another one.
        self.shared_flags.clear()


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _add_class_weights(
    config: RunConfig, datasets: RunDatasets, init: InitSource | None
) -> RunDatasets:
    """Adds the class weights of the recipe, if any; all hosts must call it together.

    A run that resumes takes those of its checkpoint: reading all labels may take long.
    """
    if config.recipe.class_weights == "none":
        return datasets
    if init is not None and init.metadata is not None:
        saved = get_metadata(init.metadata, "class_weights", "the checkpoint")
        return datasets._replace(class_weights=np.array(saved, np.float32))
    train, num_threads = datasets.train, config.loader.num_threads
    if multihost.is_primary_process():
        print(f"class weights: reading {len(train):,} labels", flush=True)
    weights = multihost.compute_once(lambda: balanced_class_weights(train, num_threads))
    return datasets._replace(class_weights=weights)


def _describe_class_weights(datasets: RunDatasets) -> str:
    """Formats a line with the range of the class weights, if any."""
    weights, names = datasets.class_weights, datasets.train.class_names
    if weights is None:
        return ""
    found = np.flatnonzero(weights)
    low, high = found[weights[found].argmin()], found[weights[found].argmax()]
    text = (
        f"class weights: {weights[low]:.4g} ({names[low]}) to {weights[high]:.4g} ({names[high]})"
    )
    if num_absent := len(weights) - len(found):
        text += f", {num_absent:,} classes without training images"
    return f"{text}\n"


def _describe_run(
    experiment: Experiment, start_step: int, init: InitSource | None, is_finished: bool
) -> str:
    """Formats model, data, devices and, in the last line, the status of a run."""
    config, info, mesh = experiment.config, experiment.model_info, experiment.mesh
    train, num_steps = experiment.datasets.train, experiment.num_steps
    notes = "".join(f"{note}\n" for note in experiment.datasets.notes)
    if is_finished:
        status = "training is finished: evaluating the last checkpoint"
    else:
        if start_step:
            start = f"resuming after step {start_step:,} of {num_steps:,}"
        else:
            start = f"starting training: {num_steps:,} steps"
        images = f"{config.batch_size:,} images per step"
        status = f"{start}, {images}; the first step includes compilation"
    labels = "classes, any number per image" if train.multi_label else "classes"
    return (
        f"{get_family(info.family).full_name(info.variant)}, "
        f"{_num_params(experiment):,} parameters, {config.image_size} px\n"
        f"{describe_init(experiment, init)}"
        f"{_describe_layers(experiment)}"
        f"{train.name}: {len(train):,} images, {train.num_classes:,} {labels}\n"
        f"{notes}"
        f"{_describe_class_weights(experiment.datasets)}"
        f"{mesh.size} × {jax.devices()[0].device_kind}, mesh data={mesh.shape['data']} "
        f"fsdp={mesh.shape['fsdp']}, {experiment.model.execution.dtype}\n"
        f"{status}"
    )


def _describe_layers(experiment: Experiment) -> str:
    """Formats lines about frozen parameters, and about layer-wise learning rates."""
    optimizer, info = experiment.config.optimizer, experiment.model_info
    family, lines = get_family(info.family), ""
    if optimizer.freeze_patterns:
        size = (experiment.config.image_size, info.num_classes)
        num_frozen = count_frozen(optimizer.freeze_patterns, family, info.config, *size)
        lines += (
            f"{_num_params(experiment) - num_frozen:,} parameters are trained, {num_frozen:,} are "
            f"frozen ({optimizer.freeze})\n"
        )
    if optimizer.layer_decay < 1:
        factors = layer_factors(optimizer.layer_decay, family, info.config)
        first, *blocks, head = (f"{layer} {factor:.3g}" for layer, factor in factors.items())
        middle = blocks if len(blocks) < 3 else [f"{blocks[0]} to {blocks[-1]}"]
        lines += f"learning-rate factors: {', '.join([first, *middle, head])}\n"
    return lines


def _num_params(experiment: Experiment) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(experiment.state_shape.params))


def _start_record(experiment: Experiment, start_step: int) -> dict[str, Any]:
    """Returns a line of starts.jsonl: time, model, data, devices and versions."""
    info, mesh, train = experiment.model_info, experiment.mesh, experiment.datasets.train
    return {
        "step": start_step,
        "num_steps": experiment.num_steps,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": get_family(info.family).full_name(info.variant),
        "num_parameters": _num_params(experiment),
        "train_data": train.name,
        "num_train_examples": len(train),
        "num_hosts": jax.process_count(),
        "num_devices": mesh.size,
        "device_kind": jax.devices()[0].device_kind,
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "dtype": str(experiment.model.execution.dtype),
        "backend": experiment.model.execution.backend,
        "versions": list_versions(),
    }
