"""Entry point of transfer suites: `run_suite`."""

import contextlib
import itertools
import os
import signal
from typing import NamedTuple

from mixer_jax.checkpoints.load import load_checkpoint, pin_checkpoint
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, HUB, RUN, CheckpointRef
from mixer_jax.checkpoints.weights import PretrainedWeights, params_digest, resize
from mixer_jax.config.loading import Overrides
from mixer_jax.distributed import multihost
from mixer_jax.models.registry import get_family
from mixer_jax.suites import datasets
from mixer_jax.suites.cost import device_days, format_dry_run, measure_throughput
from mixer_jax.suites.datasets import SuiteData
from mixer_jax.suites.paper_results import infer_pretrain_dataset
from mixer_jax.suites.plan import TransferPlan, default_config, select_tasks, validate_run_configs
from mixer_jax.suites.protocol import TaskContext, TaskInterruptedError, run_tasks
from mixer_jax.suites.table import report
from mixer_jax.suites.tasks import AUTO, Suite, for_model
from mixer_jax.suites.workdir import (
    check_not_run_workdir,
    lock_tasks,
    read_throughput,
    save_plan,
    save_throughput,
)
from mixer_jax.training.metrics import read_metrics


class TransferRequest(NamedTuple):
    """Suite to run, and how.

    Attributes:
        suite: Suite, validated by `check_suite`.
        workdir: Absolute path or URL of the suite's workdir.
        overrides: Config overrides, validated by `check_overrides`.
        image_size: Image size, as in `datasets.choose_image_size`.
        data_dir: TFDS data directory; empty for TFDS's default.
        tasks: Names of the tasks to run; empty for all.
        shard: i and n, for the i-th of n shards of them.
        keep_checkpoints: Whether checkpoints of completed runs are kept.
        pretrain_dataset: One of `paper_results.PRETRAIN_DATASETS`, or "none"; empty to infer it.
    """

    suite: Suite
    checkpoint: CheckpointRef
    workdir: str
    overrides: Overrides
    image_size: str
    data_dir: str
    tasks: tuple[str, ...]
    shard: tuple[int, int]
    dry_run: bool
    keep_checkpoints: bool
    throughput: bool
    pretrain_dataset: str


class TransferOutcome(NamedTuple):
    """Reasons of failed tasks by name, and the signal that stopped the suite, if any."""

    failures: dict[str, str]
    stopped_by: signal.Signals | None = None


def run_suite(request: TransferRequest) -> TransferOutcome:
    """Runs the remaining tasks of a suite, and prints the table.

    Raises:
        UserError: Data is missing, the workdir contains a different suite, or an argument is
            invalid.
        RunError: Another process runs one of the tasks in the workdir.
    """
    with contextlib.ExitStack() as stack:
        return _run_suite(request, stack)


def _run_suite(request: TransferRequest, stack: contextlib.ExitStack) -> TransferOutcome:
    """Runs a suite; locks are released with `stack`."""
    check_not_run_workdir(request.workdir)
    config = default_config(request.overrides)
    request = request._replace(suite=datasets.resolve_folders(request.suite))
    tasks = select_tasks(request.suite, request.tasks, request.shard)
    lock = lock_tasks(request.workdir, [task.name for task in tasks])
    is_alone = multihost.is_alone(config.distributed)
    if is_alone and not request.dry_run:
        # Before anything that takes time.
        stack.enter_context(lock)
    data = datasets.open_task_data(tasks, request.data_dir)
    if not request.dry_run:
        datasets.check_available(tasks, data)
    datasets.check_probe_data(tasks, data, config.bad_images.skip_in_evaluation)
    if not request.dry_run:
        # Before loading the checkpoint, which may use devices.
        multihost.initialize_distributed(config.distributed, config.distributed_timeout)
        multihost.check_devices()
        if not is_alone:
            stack.enter_context(multihost.enter_on_primary(lock))
    source = _absolute_name(request.checkpoint)
    if request.dry_run:
        weights = load_checkpoint(source)
        request = _select_protocol(request, weights.model_info)
        tasks = select_tasks(request.suite, request.tasks, request.shard)
        plan = make_plan(request, weights, data)
        validate_run_configs(plan, tasks)
        print(format_dry_run(plan, tasks, data))
        return TransferOutcome({})
    source, step = multihost.compute_once(lambda: pin_checkpoint(source))
    weights = load_checkpoint(source, step=step)
    request = _select_protocol(request, weights.model_info)
    tasks = select_tasks(request.suite, request.tasks, request.shard)
    # It depends on the listed images, which must not differ between hosts.
    plan = multihost.compute_once(lambda: make_plan(request, weights, data))
    validate_run_configs(plan, tasks)
    is_primary = multihost.is_primary_process()

    def log(text: str) -> None:
        if is_primary:
            print(text, flush=True)

    def save() -> list[str]:
        return save_plan(request.workdir, plan._replace(digest=params_digest(weights.params)))

    for change in multihost.compute_once(save):
        log(f"changed since this suite was last started: {change}")
    sources = itertools.chain.from_iterable(data.sources.values())
    for note in [*data.notes, *dict.fromkeys(note for source in sources for note in source.notes)]:
        log(note)
    try:
        context = TaskContext(plan, request.workdir, weights, request.keep_checkpoints, log)
        failures = run_tasks(context, tasks)
    except TaskInterruptedError as stopped:
        log("\nstopped; rerun the same command to resume")
        return TransferOutcome({}, stopped.received)
    if is_primary:
        if request.throughput and read_throughput(request.workdir) is None:
            size = plan.largest_image_size
            throughput = measure_throughput(resize(weights, (size, size)))
            save_throughput(request.workdir, throughput)
        report(request.workdir)
    return TransferOutcome(failures)


def _select_protocol(request: TransferRequest, info: ModelInfo) -> TransferRequest:
    """Applies the settings that tasks have for the checkpoint's model."""
    model = get_family(info.family).full_name(info.variant)
    return request._replace(suite=for_model(request.suite, info.family, model))


def make_plan(
    request: TransferRequest, weights: PretrainedWeights, data: SuiteData
) -> TransferPlan:
    """Plans a suite: image sizes, pre-training data and cost.

    Raises:
        UserError: The model does not accept the requested image size.
    """
    info, config, checkpoint = weights.model_info, weights.train_config, request.checkpoint
    sources = data.sources
    # Tasks of other shards must get the same sizes here and there.
    unmeasured = [task for task in request.suite.tasks if task.is_large_image is None]
    if request.image_size == AUTO and unmeasured:
        sources = datasets.open_task_data(unmeasured, request.data_dir).sources
    sizes = {
        task.name: datasets.choose_image_size(
            task, request.image_size, info, sources.get(task.name, [])
        )
        for task in request.suite.tasks
    }
    dataset, init_from, mixture, days = "", "", False, None
    if config is not None:
        dataset, init_from = config["dataset"]["name"], config["init_from"]
        # Runs from before there were mixtures have no such section.
        mixture = bool(config.get("mixture"))
        if checkpoint.format == RUN:
            lines = read_metrics(checkpoint.path)
            lines = [line for line in lines if line["step"] <= (weights.step or 0)]
            days = device_days(lines, config["batch_size"]) or None
    inferred = infer_pretrain_dataset(dataset, init_from, info.num_classes, mixture)
    return TransferPlan(
        suite=request.suite,
        checkpoint=_absolute_name(checkpoint),
        model_info=info,
        data_dir=request.data_dir,
        overrides=request.overrides,
        image_sizes=sizes,
        pretrain_dataset={"": inferred, "none": ""}.get(
            request.pretrain_dataset, request.pretrain_dataset
        ),
        device_days=days,
        data_notes=tuple(data.notes),
        pretrain_dataset_assumed=bool(inferred) and not (dataset or request.pretrain_dataset),
    )


def _absolute_name(checkpoint: CheckpointRef) -> str:
    """Returns a name of the checkpoint that is valid in any folder, and later."""
    path = checkpoint.path
    if checkpoint.format == RUN:
        return f"{path}/{CHECKPOINT_DIR}/{checkpoint.step}"
    if checkpoint.format == "hub":
        return HUB + path
    return path if "://" in path else os.path.abspath(path)
