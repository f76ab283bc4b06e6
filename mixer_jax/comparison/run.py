"""Entry point of comparisons: `run_comparison`."""

import contextlib
import dataclasses
import itertools
import posixpath
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from mixer_jax.checkpoints.load import load_checkpoint, pin_checkpoint
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import RUN, resolve_checkpoint
from mixer_jax.checkpoints.weights import PretrainedWeights, params_digest
from mixer_jax.comparison.core_days import plan_core_days
from mixer_jax.comparison.figure import draw_comparison
from mixer_jax.comparison.plan import (
    Entry,
    EvalData,
    Variation,
    find_eval,
    scale_num_steps,
    train_flops,
    with_num_steps,
    with_seed,
)
from mixer_jax.comparison.results import (
    MODEL_FILE,
    Result,
    check_same_model,
    check_same_run,
    config_digest,
    read_json,
    read_result,
    save_json,
    save_result,
)
from mixer_jax.comparison.table import Row, Table, find_paper_rows, format_table
from mixer_jax.config.config import fill_defaults
from mixer_jax.config.schema import FIELDS, RunConfig, from_dict
from mixer_jax.distributed import multihost
from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
from mixer_jax.errors import (
    NonFiniteError,
    UserError,
)
from mixer_jax.evaluation.checkpoint import make_input_config, open_eval_source
from mixer_jax.evaluation.classification import evaluate, make_eval_step
from mixer_jax.files import atomic_write, output_errors
from mixer_jax.models.family import INIT_FROM
from mixer_jax.models.registry import get_family, parse_model_name
from mixer_jax.suites.cost import (
    assumed_rate,
    device_days,
    format_duration,
    measure_throughput,
)
from mixer_jax.suites.paper_results import infer_pretrain_dataset
from mixer_jax.suites.workdir import (
    Throughput,
    check_not_run_workdir,
    delete_checkpoints,
    read_throughput,
    save_throughput,
)
from mixer_jax.training.datasets import RunDatasets, open_datasets
from mixer_jax.training.initialize import find_init_source
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.setup import make_model_info
from mixer_jax.training.tracking import RunLabel
from mixer_jax.training.workdir import check_workdir, lock_workdir
from mixer_jax.visualization.curves import save_curves
from mixer_jax.visualization.figures import render_figure

_SECONDS_PER_DAY = 86_400
_EVAL_BATCH_SIZE = 256
# Image size and classes of models that are compared by name, as in the paper.
_IMAGE_SIZE, _NUM_CLASSES = 224, 1_000


class ComparisonRequest(NamedTuple):
    """Models to compare, and how.

    Attributes:
        entries: Rows of the table.
        workdir: Absolute path or URL.
        seeds: Seeds of every config; None: the config's own.
        data: Data that checkpoints are evaluated on; None: that of the configs' evaluations, or of
            the first checkpoint.
        data_dir: TFDS data directory of `data`.
        image_size: Image size of checkpoints and of models by name; None: their own, and 224 px.
        equal_flops: Whether the steps of every config are scaled to the FLOPs of the first one.
        topology: Topology whose core-days are planned; empty for none.
        throughput: Whether throughput is measured.
    """

    entries: Sequence[Entry]
    workdir: str
    seeds: tuple[int, ...] | None = None
    variation: Variation | None = None
    data: EvalData | None = None
    data_dir: str = ""
    image_size: tuple[int, int] | None = None
    equal_flops: bool = False
    topology: str = ""
    dry_run: bool = False
    keep_checkpoints: bool = False
    throughput: bool = True


class Outcome(NamedTuple):
    """Result of a comparison.

    Attributes:
        table: None after a dry run, or if a signal stopped the comparison.
        text: Text of a dry run.
        stopped_by: Signal that stopped the comparison.
    """

    table: Table | None = None
    text: str = ""
    stopped_by: signal.Signals | None = None


class _Model(NamedTuple):
    """A row before its runs.

    Attributes:
        entry: Row of the comparison.
        info: Description of the model.
        folder: Absolute folder of the row.
        runs: Configs of training runs by seed, with `num_steps`.
        eval_name: Name of the evaluation in these configs.
        weights: Weights of a checkpoint to evaluate.
        num_train: Training examples; None if unknown.
        num_steps: Steps of training; None if unknown.
        train_flops: FLOPs of training; None if unknown.
        device_seconds: Measured cost of a run that wrote a checkpoint.
        dataset: Training data that the paper's rows are selected by, as in `PaperRow.data`.
    """

    entry: Entry
    info: ModelInfo
    folder: str
    runs: dict[int, RunConfig]
    eval_name: str = ""
    weights: PretrainedWeights | None = None
    num_train: int | None = None
    num_steps: int | None = None
    train_flops: int | None = None
    device_seconds: float | None = None
    dataset: str = ""

    @property
    def forward_flops(self) -> int:
        info = self.info
        family = get_family(info.family)
        return family.forward_flops(info.config, info.image_size, info.num_classes)

    def run_folder(self, seed: int) -> str:
        """Returns the workdir of a run."""
        return f"{self.folder}/seed={seed}"

    def to_dict(self) -> dict[str, Any]:
        """Describes what throughput depends on, for `check_same_model`."""
        info = self.info
        return {
            "family": info.family,
            "config": dataclasses.asdict(info.config),
            "image_size": list(info.image_size),
            "num_classes": info.num_classes,
        }


class _StoppedError(Exception):
    """The current run was saved and stopped by a signal."""

    def __init__(self, received: signal.Signals | None):
        super().__init__(received)
        self.received = received


def run_comparison(request: ComparisonRequest, log: Callable[[str], None]) -> Outcome:
    """Trains, evaluates and measures what is missing in the workdir; returns the table.

    Args:
        request: Models to compare.
        log: Prints a line of progress.

    Raises:
        UserError: Data are missing, a model does not fit the data, or the workdir has results of
            other settings.
        RunError: Another process uses the workdir.
    """
    check_not_run_workdir(request.workdir)
    with contextlib.ExitStack() as stack:
        if not request.dry_run:
            stack.enter_context(lock_workdir(request.workdir))
        _check_one_host(request.entries)
        models, data, notes = _open_models(request)
        for model in models:
            check_same_model(model.folder, model.to_dict())
            for seed, config in model.runs.items():
                read_result(model.run_folder(seed), _data_title(data))
                check_same_run(model.run_folder(seed), config)
        core_days = [_plan(request, model) for model in models]
        if request.dry_run:
            return Outcome(text=_format_dry_run(request, models, core_days, data))
        for note in notes:
            log(note)
        try:
            rows = _measure(request, models, data, log)
        except _StoppedError as stopped:
            log("\nstopped; rerun the same command to resume")
            return Outcome(stopped_by=stopped.received)
        rows = [row._replace(core_days=days) for row, days in zip(rows, core_days, strict=True)]
        table = _make_table(request, models, rows, data)
        _save(request.workdir, table, log)
        return Outcome(table)


def _check_one_host(entries: Sequence[Entry]) -> None:
    config = next((entry.config for entry in entries if entry.config), None)
    mode = config.distributed if config else FIELDS["distributed"].default
    timeout = config.distributed_timeout if config else FIELDS["distributed_timeout"].default
    multihost.initialize_distributed(mode, timeout)
    multihost.check_devices()
    if jax.process_count() > 1:
        raise UserError(
            f"compare must run on one host, got {jax.process_count()}. Train with mixer_jax.main "
            "on all of them, and compare the workdirs."
        )


def _data_title(data: EvalData | None) -> str:
    return data.title if data else ""


def _open_models(
    request: ComparisonRequest,
) -> tuple[list[_Model], EvalData | None, list[str]]:
    """Opens datasets and checkpoints; returns the models, their evaluation data, and notes."""
    opened: dict[int, RunDatasets] = {}
    data, data_dir = request.data, request.data_dir
    for index, entry in enumerate(request.entries):
        if entry.config is not None:
            opened[index] = open_datasets(entry.config)
            data_dir = data_dir or entry.config.dataset.data_dir
    models: list[_Model] = []
    reference: dict[str, int] = {}
    for index, entry in enumerate(request.entries):
        if entry.model.kind == "config":
            model = _open_config(request, entry, opened[index], reference)
        elif entry.model.kind == "checkpoint":
            model = _open_checkpoint(request, entry)
            data = data or _find_checkpoint_data(model)
        else:
            model = _open_architecture(request, entry)
        if model.info.multi_label:
            raise UserError(
                f"{entry.model.label} must have one label per image to be compared by top-1 "
                "accuracy, got a multi-label model. Evaluate it with mixer_jax.evaluate."
            )
        models.append(model)
    if data is None and any(model.weights for model in models):
        raise UserError(
            "--dataset must be set, because no checkpoint records an evaluation. For example: "
            "--dataset=imagenet2012 --split=validation"
        )
    notes = itertools.chain.from_iterable(datasets.notes for datasets in opened.values())
    return models, data, list(dict.fromkeys(notes))


def _open_config(
    request: ComparisonRequest, entry: Entry, datasets: RunDatasets, reference: dict[str, int]
) -> _Model:
    """Describes a config to train; `reference` has the FLOPs of the first one, by varied value."""
    config = entry.config
    assert config is not None
    folder = f"{request.workdir}/{entry.folder}"
    config = with_num_steps(config, len(datasets.train))
    seeds = request.seeds or (config.seed,)
    init = None
    if config.model.variant == INIT_FROM:
        init = find_init_source(config, f"{folder}/seed={seeds[0]}")
    info = make_model_info(config, datasets, init and init.model_info)
    family = get_family(info.family)
    flops = train_flops(family, info.config, info.num_classes, config)
    first = reference.setdefault(entry.value, flops)
    if request.equal_flops and flops != first:
        config = scale_num_steps(config, first / flops)
        flops = train_flops(family, info.config, info.num_classes, config)
    name, _ = find_eval(config, entry.model.label)
    dataset = infer_pretrain_dataset(
        config.dataset.name, config.init_from, info.num_classes, bool(config.mixture)
    )
    return _Model(
        entry,
        info,
        folder,
        {seed: with_seed(config, seed) for seed in seeds},
        name,
        num_train=len(datasets.train),
        num_steps=config.num_steps,
        train_flops=flops,
        dataset=dataset,
    )


def _open_checkpoint(request: ComparisonRequest, entry: Entry) -> _Model:
    source = entry.model.source
    ref = resolve_checkpoint(source)
    pinned, step = pin_checkpoint(source)
    weights = load_checkpoint(pinned, step=step, image_size=request.image_size)
    if not weights.model_info.num_classes:
        raise UserError(
            f"checkpoint {source!r} must have a head to be compared, got none. Fine-tune it, and "
            "compare the workdir."
        )
    model = _Model(
        entry, weights.model_info, f"{request.workdir}/{entry.folder}", {}, weights=weights
    )
    if weights.train_config is None or ref.format != RUN:
        return model
    config = from_dict(fill_defaults(weights.train_config))
    # An evaluation at another image size does not change the cost of training.
    trained = load_checkpoint(pinned, step=step).model_info if request.image_size else model.info
    num_steps = weights.step or 0
    lines = [line for line in read_metrics(ref.path) if line["step"] <= num_steps]
    seconds = device_days(lines, config.batch_size) * _SECONDS_PER_DAY
    return model._replace(
        num_steps=num_steps,
        train_flops=train_flops(
            get_family(trained.family),
            trained.config,
            trained.num_classes,
            dataclasses.replace(config, num_steps=num_steps),
        ),
        device_seconds=seconds or None,
    )


def _find_checkpoint_data(model: _Model) -> EvalData | None:
    """Returns the evaluation data of the run that wrote a checkpoint, if it had any."""
    weights = model.weights
    if weights is None or weights.train_config is None:
        return None
    config = from_dict(fill_defaults(weights.train_config))
    try:
        return find_eval(config, model.entry.model.label)[1]
    except UserError:
        return None


def _open_architecture(request: ComparisonRequest, entry: Entry) -> _Model:
    """Describes an untrained model for 1,000 classes."""
    name, variant = parse_model_name(entry.model.source)
    family = get_family(name)
    config = family.get_config(variant)
    size = request.image_size or (_IMAGE_SIZE, _IMAGE_SIZE)
    family.check_image_size(config, *size)
    info = ModelInfo(
        name,
        variant,
        config,
        size,
        _NUM_CLASSES,
        (),
        gelu=FIELDS["model.gelu"].default,
        eval_crop=FIELDS["preprocess.eval_crop"].default,
        exif_orientation=False,
        loss="softmax",
    )
    return _Model(entry, info, f"{request.workdir}/{entry.folder}", {})


def _plan(request: ComparisonRequest, model: _Model) -> float | None:
    """Returns the core-days of a run on the topology; None if there is none, or it does not fit."""
    if not request.topology or not model.runs or model.num_train is None:
        return None
    config = next(iter(model.runs.values()))
    name = f"plan_{request.topology.replace(':', '_')}.json"
    digest = config_digest(with_seed(config, 0))
    saved = read_json(model.folder, name)
    if saved is None or saved.get("config") != digest:
        days = plan_core_days(config, model.info.num_classes, model.num_train, request.topology)
        saved = {"config": digest, "core_days": days}
        if not request.dry_run:
            save_json(model.folder, name, saved)
    return saved["core_days"]


def _measure(
    request: ComparisonRequest,
    models: Sequence[_Model],
    data: EvalData | None,
    log: Callable[[str], None],
) -> list[Row]:
    """Evaluates, trains and times what is missing; returns a row per model."""
    results: list[list[Result]] = [[] for _ in models]
    seeds: list[list[int]] = [[] for _ in models]
    failures = [""] * len(models)
    for model, found in zip(models, results, strict=True):
        save_json(model.folder, MODEL_FILE, model.to_dict())
        if model.weights is not None:
            assert data is not None
            found.append(_evaluate_checkpoint(request, model, data, log))
    # Seed by seed, so that all models have results early.
    for seed in dict.fromkeys(seed for model in models for seed in model.runs):
        for index, model in enumerate(models):
            if seed not in model.runs:
                continue
            try:
                results[index].append(_complete_run(request, model, seed, data, log))
                seeds[index].append(seed)
            except NonFiniteError as error:
                # The other models can still be compared. A divergence is not recorded, as in
                # transfer suites: the run may converge with another number of devices.
                failures[index] = str(error)
                log(f"{model.entry.title}, seed {seed} failed: {error}")
    throughputs = _measure_throughputs(models, log) if request.throughput else {}
    return [
        _make_row(model, trained, found, throughputs.get(model.folder), failed)
        for model, trained, found, failed in zip(models, seeds, results, failures, strict=True)
    ]


def _evaluate_checkpoint(
    request: ComparisonRequest, model: _Model, data: EvalData, log: Callable[[str], None]
) -> Result:
    """Evaluates a checkpoint, or reads its metrics if the weights are the same."""
    weights, label = model.weights, model.entry.model.label
    assert weights is not None
    digest = params_digest(weights.params)
    saved = read_result(model.folder, data.title)
    if saved is not None:
        if saved.digest != digest:
            raise UserError(
                f"{model.folder!r} has results of other weights: {model.entry.model.source} has "
                "changed since. Choose another --workdir."
            )
        return saved
    log(f"evaluating {label} on {data.title}")
    source = open_eval_source(
        weights,
        data.dataset,
        data.split,
        request.data_dir,
        argument="--dataset",
        model=label,
        fix="Evaluate on the training dataset, or store class names in the checkpoint.",
    )
    mesh = make_mesh(data=0, fsdp=1)
    network = weights.model_info.build_model()
    metrics = evaluate(
        make_eval_step(network, mesh),
        shard_inference_params(weights.params, network, mesh),
        source,
        mesh,
        make_input_config(weights, _EVAL_BATCH_SIZE, skip_bad=False),
    )
    result = Result(data.title, metrics.as_dict(), model.device_seconds, digest)
    save_result(model.folder, result)
    return result


def _complete_run(
    request: ComparisonRequest,
    model: _Model,
    seed: int,
    data: EvalData | None,
    log: Callable[[str], None],
) -> Result:
    """Returns the result of a run, which is trained to the end if it is not complete.

    Raises:
        _StoppedError: A signal stopped the run.
    """
    config, folder = model.runs[seed], model.run_folder(seed)
    stopped_by: signal.Signals | None = None
    is_stopping = False
    result = read_result(folder, _data_title(data))
    if result is None:
        log(f"\n{model.entry.title}, seed {seed}")
        for change in check_workdir(folder, config):
            log(f"changed since this run was last started: {change}")
        label = RunLabel(
            f"{model.entry.folder}/seed={seed}", posixpath.basename(request.workdir.rstrip("/"))
        )
        trained = train_and_evaluate(config, folder, plot=save_curves, label=label)
        stopped_by = trained.stopped_by
        if not trained.is_finished:
            raise _StoppedError(stopped_by)
        trained.raise_failures()
        seconds = device_days(read_metrics(folder), config.batch_size) * _SECONDS_PER_DAY
        metrics = trained.scores[model.eval_name].as_dict()
        result = Result(_data_title(data), metrics, seconds or None)
        save_result(folder, result)
        is_stopping = stopped_by is not None
    if not request.keep_checkpoints:
        delete_checkpoints(folder)
    if is_stopping:
        raise _StoppedError(stopped_by)
    return result


def _measure_throughputs(
    models: Sequence[_Model], log: Callable[[str], None]
) -> dict[str, Throughput]:
    """Measures each architecture once; returns the throughput of every model by its folder."""
    by_folder: dict[str, Throughput] = {}
    by_model: dict[str, Throughput] = {}
    for model in models:
        if saved := read_throughput(model.folder):
            by_folder[model.folder] = by_model[str(model.to_dict())] = saved
    for model in models:
        if model.folder in by_folder:
            continue
        key = str(model.to_dict())
        if key not in by_model:
            log(f"measuring the throughput of {model.entry.title}")
            weights = model.weights or PretrainedWeights(_init_params(model.info), model.info)
            by_model[key] = measure_throughput(weights)
        by_folder[model.folder] = by_model[key]
        save_throughput(model.folder, by_model[key])
    return by_folder


def _init_params(info: ModelInfo) -> Any:
    """Initializes parameters at random, on the host."""
    images = jnp.zeros((1, *info.image_size, 3))
    init = jax.jit(info.build_model().init)
    return jax.device_get(init(jax.random.key(0), images)["params"])


def _make_row(
    model: _Model,
    seeds: Sequence[int],
    results: Sequence[Result],
    throughput: Throughput | None,
    failed: str,
) -> Row:
    info, family = model.info, get_family(model.info.family)
    seconds = [result.device_seconds for result in results if result.device_seconds is not None]
    return Row(
        model=model.entry.model.label,
        value=model.entry.value,
        name=family.full_name(info.variant),
        family=family.name,
        image_size=info.image_size,
        seeds=tuple(seeds),
        top1=tuple(100 * result.metrics["top1"] for result in results),
        num_examples=int(results[0].metrics["num_examples"]) if results else None,
        num_runs=max(1, len(model.runs)) if model.runs or model.weights else 0,
        num_params=family.num_params(info.config, info.image_size, info.num_classes),
        forward_flops=model.forward_flops,
        num_train=model.num_train,
        num_steps=model.num_steps,
        train_flops=model.train_flops,
        images_per_second=throughput.images_per_second if throughput else None,
        batch_size=throughput.batch_size if throughput else None,
        device=throughput.device if throughput else None,
        device_seconds=sum(seconds) / len(seconds) if seconds else None,
        failed=failed,
    )


def _make_table(
    request: ComparisonRequest,
    models: Sequence[_Model],
    rows: list[Row],
    data: EvalData | None,
) -> Table:
    dataset = next((model.dataset for model in models if model.dataset), "")
    paper = find_paper_rows([row.name for row in rows], dataset)
    notes = []
    counts = {row.num_examples for row in rows if row.num_examples}
    if data and counts:
        notes.append(f"top-1 accuracy on all {max(counts):,} images of {data.title}")
    if any(row.images_per_second for row in rows):
        devices = dict.fromkeys(row.device for row in rows if row.device)
        notes.append(f"images/s and batch: measured on one {', '.join(map(str, devices))}")
    if any(row.device_seconds for row in rows):
        notes.append(
            "device time: measured training steps × devices, without compilation and evaluation"
        )
    if request.equal_flops:
        notes.append("equal FLOPs: the steps of every config are scaled to those of the first")
    if request.topology:
        notes.append(f"core-days on {request.topology}: a lower bound by mixer_jax.plan")
        for model, row in zip(models, rows, strict=True):
            if model.runs and row.core_days is None:
                notes.append(f"{model.entry.title} does not fit on {request.topology}")
    if paper:
        notes.append("from the paper: cores are TPU v3 cores, accuracies after fine-tuning")
    notes += [
        f"{model.entry.title} failed: {row.failed}"
        for model, row in zip(models, rows, strict=True)
        if row.failed
    ]
    return Table(rows, data, request.variation, request.topology, paper, notes)


def _save(workdir: str, table: Table, log: Callable[[str], None]) -> None:
    """Writes the table in every format, and the picture."""
    files: dict[str, str | bytes] = {
        "results.txt": format_table(table, "text"),
        "results.csv": format_table(table, "csv"),
        "results.md": format_table(table, "markdown"),
        "results.json": format_table(table, "json"),
    }
    if figure := draw_comparison(table):
        files["results.png"] = render_figure(figure, "png")
    with output_errors(workdir):
        for name, content in files.items():
            atomic_write(epath.Path(workdir) / name, content)
    suffixes = ",".join(name.removeprefix("results.") for name in files)
    log(f"\nwritten: {workdir}/results.{{{suffixes}}}\n")


def _format_dry_run(
    request: ComparisonRequest,
    models: Sequence[_Model],
    core_days: Sequence[float | None],
    data: EvalData | None,
) -> str:
    """Formats every run with its steps, FLOPs and estimated time."""
    flops_per_second, assumption = assumed_rate()
    lines, total, num_runs, num_done = [], 0.0, 0, 0
    for model, days in zip(models, core_days, strict=True):
        info = model.info
        family = get_family(info.family)
        num_params = family.num_params(info.config, info.image_size, info.num_classes)
        planned = ""
        if days is not None:
            planned = f", {days:.3g} core-days on {request.topology}"
        elif request.topology and model.runs:
            planned = f", does not fit on {request.topology}"
        lines.append(
            f"{model.entry.title}  {info.name}, {num_params:,} parameters, "
            f"{model.forward_flops / 1e6:,.4g} MFLOPs per image{planned}"
        )
        for seed, config in model.runs.items():
            is_done = read_result(model.run_folder(seed), _data_title(data)) is not None
            seconds = (model.train_flops or 0) / flops_per_second
            num_runs, num_done = num_runs + 1, num_done + is_done
            total += 0.0 if is_done else seconds
            time = "completed" if is_done else f"about {format_duration(seconds)}"
            lines.append(
                f"  seed {seed}: {config.num_steps:,} steps of {config.batch_size:,} of "
                f"{model.num_train:,} images, {(model.train_flops or 0) / 1e12:,.4g} TFLOPs, {time}"
            )
        if model.weights is not None and data is not None:
            lines.append(f"  evaluated on {data.title}")
    lines += [
        "",
        f"{num_runs} runs, {num_done} completed; {format_duration(total)} of computing "
        f"{assumption}",
    ]
    return "\n".join(lines) + "\n"
