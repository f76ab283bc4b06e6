"""The map of a whole suite: `run_suite`."""

import os
import signal
from typing import NamedTuple

from mixer_jax.checkpoints.load import PretrainedWeights, load_checkpoint, resize
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, HUB, RUN, CheckpointRef
from mixer_jax.config.loading import Overrides
from mixer_jax.distributed import multihost
from mixer_jax.errors import UserError
from mixer_jax.suites import datasets, dry_run
from mixer_jax.suites.datasets import SuiteData
from mixer_jax.suites.notes import largest_image_size
from mixer_jax.suites.paper_results import infer_pretrain_dataset
from mixer_jax.suites.plan import (
    TransferPlan,
    check_workdir,
    params_digest,
    save_plan,
    select_tasks,
    validate_run_configs,
)
from mixer_jax.suites.protocol import TaskContext, TaskInterruptedError, run_tasks
from mixer_jax.suites.report import read_throughput, report, save_throughput
from mixer_jax.suites.run_configs import SuiteSettings, default_config
from mixer_jax.suites.tasks import AUTO, Suite
from mixer_jax.suites.throughput import device_days, measure_throughput
from mixer_jax.training.metrics import read_metrics


class TransferRequest(NamedTuple):
    """What is to be judged, and how.

    Attributes:
        suite: of tasks, checked by `check_suite`.
        place: of the weights.
        workdir: absolute path or URL of the suite.
        overrides: keys that the user changes, checked by `check_overrides`.
        image_size: as `data_sets.choose_image_size` takes it.
        data_dir: where TFDS keeps its data sets; empty: TFDS's default.
        tasks: names of those to do; empty: all.
        shard: i and n, for the i-th of n shares of them.
        dry_run: whether only to say what would be done.
        keep_checkpoints: of runs that have ended.
        throughput: whether to measure it.
        pretrain_dataset: one of `evaluation.paper.DATA`, or "none"; empty: as the weights tell.
    """

    suite: Suite
    place: CheckpointRef
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
    """How judging ended.

    Attributes:
        failures: of tasks, by name: why.
        stopped_by: the signal that stopped it, or None.
    """

    failures: dict[str, str]
    stopped_by: signal.Signals | None = None


def run_suite(wish: TransferRequest) -> TransferOutcome:
    """Does a suite's tasks, or what is left of them, and prints the table.

    Raises:
        UserError: data are missing, the folder holds another suite, or an argument is wrong.
    """
    check_workdir(wish.workdir)
    config = default_config(wish.overrides)
    wish = wish._replace(suite=datasets.resolve_folders(wish.suite))
    tasks = select_tasks(wish.suite, wish.tasks, wish.shard)
    data = datasets.open_task_data(tasks, wish.data_dir)
    if not wish.dry_run:
        datasets.check_available(tasks, data)
    datasets.check_probe_data(tasks, data, config.bad_images.skip_in_evaluation)
    if not wish.dry_run:
        # Before weights are loaded, which may use devices.
        multihost.initialize_distributed(config.distributed, config.distributed_timeout)
    weights = load_checkpoint(_name(wish.place))
    plan = _make_plan(wish, weights, data)
    validate_run_configs(plan, tasks)
    if wish.dry_run:
        print(dry_run.format_dry_run(plan, tasks, data))
        return TransferOutcome({})
    leader = multihost.is_primary_process()
    say = _say if leader else _say_nothing
    for change in _keep(plan, wish.workdir, weights):
        say(f"changed since this suite was last started: {change}")
    for note in data.notes:
        say(note)
    try:
        doing = TaskContext(plan, wish.workdir, weights, wish.keep_checkpoints, say)
        failures = run_tasks(doing, tasks)
    except TaskInterruptedError as stopped:
        say("\nstopped; the same command goes on from there")
        return TransferOutcome({}, stopped.received)
    if leader:
        if wish.throughput and read_throughput(wish.workdir) is None:
            side = largest_image_size(plan)
            save_throughput(wish.workdir, measure_throughput(resize(weights, (side, side))))
        report(wish.workdir)
    return TransferOutcome(failures)


def _keep(plan: TransferPlan, workdir: str, weights: PretrainedWeights) -> list[str]:
    """Keeps the plan in its folder, on one host for all; returns what `save_plan` does.

    Raises:
        UserError: as `save_plan`, on every host, so that none waits for one that has ended.
    """
    changes, refused = [], None
    if multihost.is_primary_process():
        try:
            changes = save_plan(workdir, plan._replace(digest=params_digest(weights.params)))
        except UserError as error:
            refused = error
    if multihost.any_host(refused is not None):
        raise refused or UserError("the first host refuses this suite; see what it says")
    return changes


def _make_plan(wish: TransferRequest, weights: PretrainedWeights, data: SuiteData) -> TransferPlan:
    about, config = weights.model_info, weights.train_config
    notes = tuple(data.notes)
    # Those of other shares must get the same sizes there and here.
    unknown = [task for task in wish.suite.tasks if task.large is None]
    if wish.image_size == AUTO and unknown:
        data = datasets.open_task_data(unknown, wish.data_dir)
    sizes = {
        task.name: datasets.choose_image_size(
            task, wish.image_size, about, data.sources.get(task.name, [])
        )
        for task in wish.suite.tasks
    }
    dataset, init_from, mixture = "", "", False
    if config is not None:
        dataset, init_from = config["dataset"]["name"], config["init_from"]
        # A run from before there were mixtures has no such section.
        mixture = bool(config.get("mixture"))
    told = infer_pretrain_dataset(dataset, init_from, about.num_classes, mixture)
    return TransferPlan(
        wish.suite,
        SuiteSettings(_name(wish.place), about, wish.data_dir, wish.overrides),
        sizes,
        {"": told, "none": ""}.get(wish.pretrain_dataset, wish.pretrain_dataset),
        _pretraining(wish.place, weights),
        data_notes=notes,
        pretrain_dataset_assumed=bool(told) and not (dataset or wish.pretrain_dataset),
    )


def _pretraining(place: CheckpointRef, weights: PretrainedWeights) -> float | None:
    """Returns the device-days of the run that weights come from; None: not known."""
    if place.format != RUN or weights.train_config is None:
        return None
    lines = [line for line in read_metrics(place.path) if line["step"] <= (weights.step or 0)]
    return device_days(lines, weights.train_config["batch_size"]) or None


def _name(place: CheckpointRef) -> str:
    """Returns a checkpoint's name that means the same from anywhere, and later."""
    if place.format == RUN:
        return f"{place.path}/{CHECKPOINT_DIR}/{place.step}"
    if place.format == "hub":
        return HUB + place.path
    return place.path if "://" in place.path else os.path.abspath(place.path)


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    del text
