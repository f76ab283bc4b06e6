"""HTML page of training runs: curves, metrics, configs, data, hardware, also while they train."""

import collections
import dataclasses
import datetime
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import markupsafe
from etils import epath
from ml_collections import ConfigDict

import mixer_jax
from mixer_jax.checkpoints.best import MetricHistory, format_metric, has_stopped_early, is_fraction
from mixer_jax.checkpoints.resolve import list_saved_steps
from mixer_jax.config.config import fill_defaults, flatten
from mixer_jax.config.schema import RunConfig, from_dict
from mixer_jax.distributed.hardware import peak_flops
from mixer_jax.errors import UserError, describe_error
from mixer_jax.files import is_locked, parse_json
from mixer_jax.training.bad_images import read_bad_images
from mixer_jax.training.metrics import METRICS_FILE, TIMINGS, read_metrics
from mixer_jax.training.workdir import CONFIG_FILE, LOCK_FILE, read_starts
from mixer_jax.visualization.curves import (
    MFU,
    draw_panel,
    is_accuracy,
    last_by_step,
    list_panels,
)
from mixer_jax.visualization.html import encode_figure, encode_thumbnail, render_page

# Images of a training batch, and bad images, that a page shows per run.
_NUM_EXAMPLES, _MAX_BAD_IMAGES = 8, 100
# Points of all curves from which on figures are pixels: SVG would be larger.
_MAX_SVG_POINTS = 5_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Records of a run in its workdir.

    Attributes:
        name: Name that distinguishes the run from the others on the page.
        workdir: Absolute path or URL.
        lines: Lines of metrics.jsonl.
        config: Config as saved, with the default of every missing key.
        starts: Lines of starts.jsonl; empty for runs of older versions.
        bad_images: Step, name and reason of the training images that could not be used.
        saved_steps: Steps of the checkpoints.
        is_training: Whether a process trains in the workdir; None if that is unknown.
        written: Time at which metrics.jsonl was last written.
    """

    name: str
    workdir: str
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    bad_images: list[dict[str, Any]]
    saved_steps: list[int]
    is_training: bool | None
    written: datetime.datetime

    @property
    def step(self) -> int:
        """Last step in metrics.jsonl."""
        return max(line["step"] for line in self.lines)

    @property
    def num_steps(self) -> int | None:
        """Planned number of steps; None if it is unknown."""
        configured = self.config["num_steps"] or None
        return self.starts[-1].get("num_steps", configured) if self.starts else configured

    @property
    def history(self) -> MetricHistory:
        """Values of `checkpoint.best_metric`."""
        return MetricHistory(self.config["checkpoint"]["best_metric"], self.lines)

    @property
    def has_stopped_early(self) -> bool:
        """True if `early_stopping_patience` ends the run at its last step."""
        is_possible = self.config["early_stopping_patience"] and self.step != self.num_steps
        return bool(is_possible) and has_stopped_early(from_dict(self.config), self.history)

    @property
    def is_finished(self) -> bool:
        """True if the run has ended at a step that is saved, and no process is training."""
        is_saved = self.step in self.saved_steps or not self.saved_steps
        has_ended = self.step == self.num_steps or self.has_stopped_early
        return has_ended and is_saved and not self.is_training

    @property
    def state(self) -> str:
        """State in one word."""
        if self.is_training:
            return "training"
        if self.is_finished:
            return "finished"
        return "unfinished" if self.is_training is None or not self.num_steps else "interrupted"

    @property
    def progress(self) -> str:
        """Last step, and the number of steps if it is known."""
        end = ", stopped early" if self.has_stopped_early else ""
        return f"{self.step:,}" + (f" of {self.num_steps:,}" if self.num_steps else "") + end

    @property
    def best_checkpoint(self) -> str:
        """Step and value of the best checkpoint; empty if the run has none."""
        step = self.history.best_step(self.saved_steps)
        if step is None:
            return ""
        return f"step {step:,}, {format_metric(self.history.name, self.history.values[step])}"

    @property
    def missing_evals(self) -> list[str]:
        """Evaluations without a result at the last step of a finished run."""
        if not self.is_finished:
            return []
        last = {key for line in self.lines if line["step"] == self.step for key in line}
        logged = {key.rpartition("/")[0] for key in last}
        return [name for name in self.config.get("evals", {}) if name not in logged]

    @property
    def flat_config(self) -> dict[str, Any]:
        """Every key of the config by its dotted path."""
        return flatten(ConfigDict(self.config))


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Reads what workdirs record about their runs, without writing to them.

    Args:
        workdirs: Absolute paths or URLs, also of runs that are being trained.

    Raises:
        UserError: A workdir does not exist, is not one of a run, is named twice, has no metrics
            yet, or has damaged files.
    """
    for workdir, count in collections.Counter(workdirs).items():
        if count > 1:
            raise UserError(f"--workdir must name each run once, got {workdir!r} {count} times.")
    names = _short_names(workdirs)
    return [_read_run(workdir, name) for workdir, name in zip(workdirs, names, strict=True)]


def _read_run(workdir: str, name: str) -> Run:
    folder = epath.Path(workdir)
    if not folder.exists():
        raise UserError(f"--workdir={workdir} does not exist. Name the workdir of a run.")
    config_path, metrics_path = folder / CONFIG_FILE, folder / METRICS_FILE
    if not config_path.exists():
        raise UserError(
            f"--workdir={workdir} must be the workdir of a run, but has no {CONFIG_FILE}. Name the "
            "folder that training was started with."
        )
    # Before the metrics: a run may finish while its files are read.
    is_training = None if "://" in workdir else is_locked(Path(workdir, LOCK_FILE))
    lines = read_metrics(workdir)
    if not lines:
        raise UserError(
            f"--workdir={workdir} has no metrics yet. Try again when the run has logged its first "
            "steps."
        )
    try:
        config = fill_defaults(parse_json(config_path.read_bytes()))
        flatten(ConfigDict(config))
        _check_early_stopping(config)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{str(config_path)!r} is not the config of a run.") from error
    return Run(
        name=name,
        workdir=workdir,
        lines=lines,
        config=config,
        starts=read_starts(workdir),
        bad_images=read_bad_images(workdir),
        saved_steps=list_saved_steps(workdir),
        is_training=is_training,
        written=datetime.datetime.fromtimestamp(metrics_path.stat().mtime, datetime.UTC),
    )


def _check_early_stopping(config: dict[str, Any]) -> None:
    """Raises an error if a saved config stops early by an evaluation that it does not have."""
    # The config of a run that cannot stop early may be of a version with other keys.
    if config["early_stopping_patience"]:
        name = config["checkpoint"]["best_metric"].rpartition("/")[0]
        if from_dict(config).evals[name].every_steps < 1:
            raise ValueError


def _short_names(workdirs: Sequence[str]) -> list[str]:
    """Returns the shortest ends of the paths that differ from each other."""
    paths = [PurePosixPath(workdir).parts for workdir in workdirs]
    for length in range(1, max(map(len, paths))):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [*workdirs]


class Examples(NamedTuple):
    """Images of the first training batch of some runs, which have the same data.

    Attributes:
        names: Names of the runs.
        caption: Paragraphs that say how images and labels were made.
        images: Images for the gallery.
        problem: Reason why the data cannot be shown; empty if it is.
    """

    names: list[str]
    caption: Sequence[str] = ()
    images: Sequence[dict[str, Any]] = ()
    problem: str = ""


def load_examples(runs: Sequence[Run]) -> list[Examples]:
    """Loads images of the first batch of each run, as augmented, once for runs with equal data."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        data = {key: value for key, value in run.flat_config.items() if _affects_batches(key)}
        groups.setdefault(json.dumps(data, default=str), []).append(run)
    return [_load_examples(group) for group in groups.values()]


def _affects_batches(key: str) -> bool:
    sections = ("dataset.", "mixture.", "preprocess.")
    keys = ("batch_size", "image_size", "seed", "recipe.label_smoothing", "recipe.min_target")
    mixing = ("recipe.mixup", "recipe.cutmix", "recipe.mixup_switch_prob")
    return key.startswith(sections) or key in (*keys, *mixing)


def _load_examples(group: Sequence[Run]) -> Examples:
    names = [run.name for run in group]
    try:
        return _load_batch(names, from_dict(group[0].config))
    except Exception as error:
        # The rest of the page is worth having. Data sets and file systems raise various exceptions.
        return Examples(names, problem=describe_error(error))


def _load_batch(names: list[str], config: RunConfig) -> Examples:
    from mixer_jax.training.datasets import open_train_dataset
    from mixer_jax.visualization.train_batch import (
        denormalize,
        format_caption,
        format_label,
        load_train_batch,
    )

    source = open_train_dataset(config)
    batch = load_train_batch(config, source, 0, min(_NUM_EXAMPLES, config.batch_size))
    _, *caption = format_caption(names[0], config, source, 0, batch)
    images = []
    for row, pixels in enumerate(denormalize(batch.images)):
        label = format_label(batch, row, source.class_names, max_chars=200)
        images.append({"uri": encode_thumbnail(pixels), "name": "", "lines": label.split("\n")})
    return Examples(names, caption, images)


def render_run_page(runs: Sequence[Run], examples: Sequence[Examples]) -> str:
    """Renders the page of some runs.

    Args:
        runs: Runs from `read_runs`.
        examples: Their images from `load_examples`.
    """
    now = datetime.datetime.now(datetime.UTC)
    colors = _run_colors(len(runs))
    return render_page(
        "run.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} training runs",
        subtitle=f"Written {_format_time(now)} by mixer-jax {mixer_jax.__version__}",
        runs=[
            {
                "name": run.name,
                "color": color,
                "bad_images": [
                    [bad["name"], bad["reason"], f"{bad['step']:,}"]
                    for bad in run.bad_images[:_MAX_BAD_IMAGES]
                ],
                "num_bad_images": len(run.bad_images),
                "bad_reasons": collections.Counter(
                    bad["reason"] for bad in run.bad_images
                ).most_common(),
            }
            for run, color in zip(runs, colors, strict=True)
        ],
        facts=[_list_facts(run) for run in runs],
        warnings=[warning for run in runs for warning in _list_warnings(run, now)],
        panels=_draw_panels(runs, colors),
        metrics=_metric_rows(runs),
        throughput=_throughput_rows(runs),
        without_mfu=_explain_missing_mfu(runs),
        differences=_difference_rows(run.flat_config for run in runs) if runs[1:] else [],
        examples=examples,
        starts=[row for run in runs for row in _start_rows(run)],
        versions=_value_rows(
            (run.starts[-1].get("versions", {}) if run.starts else {}) for run in runs
        ),
        config=_value_rows(run.flat_config for run in runs),
    )


def _run_colors(count: int) -> list[str]:
    """Returns distinct colors, as hexadecimal RGB."""
    import matplotlib

    if count <= 10:
        colors = matplotlib.colormaps["tab10"](range(count))
    else:
        colors = matplotlib.colormaps["turbo"]([k / (count - 1) for k in range(count)])
    return ["#" + "".join(f"{round(255 * level):02x}" for level in color[:3]) for color in colors]


def _list_facts(run: Run) -> list[tuple[str, str]]:
    start = run.starts[-1] if run.starts else {}
    return [
        ("state", run.state),
        ("step", run.progress),
        ("best checkpoint", run.best_checkpoint or "–"),
        ("model", str(start.get("model", "–"))),
        ("parameters", _format_value(start.get("num_parameters", "–"))),
        ("data", str(start.get("train_data", "–"))),
        ("training images", _format_value(start.get("num_train_examples", "–"))),
        ("devices", _format_devices(start)),
        ("first started", _format_time(run.starts[0].get("time", "–") if run.starts else "–")),
        ("metrics last written", _format_time(run.written)),
        ("workdir", run.workdir),
    ]


def _list_warnings(run: Run, now: datetime.datetime) -> Iterator[str]:
    saved = "it has no checkpoint"
    if run.saved_steps:
        saved = f"its newest checkpoint is step {run.saved_steps[-1]:,}"
    if run.state == "interrupted":
        yield (
            f"{run.name} was interrupted after step {run.progress}; {saved}. The command that "
            "started it resumes it."
        )
    if run.state == "unfinished":
        minutes = (now - run.written).total_seconds() / 60
        yield (
            f"{run.name} has reached step {run.progress}, and its metrics were written "
            f"{minutes:,.0f} min before this page; {saved}. Whether a process is training in it is "
            "unknown."
        )
    if run.missing_evals:
        yield (
            f"{run.name} has no result of {', '.join(run.missing_evals)} at its last step. The "
            "command that started it evaluates again."
        )
    if run.bad_images:
        images = "image was" if len(run.bad_images) == 1 else "images were"
        yield f"{run.name}: {len(run.bad_images):,} training {images} unusable and replaced."
    if not run.starts:
        yield f"{run.name} was trained by a version that records no devices and versions."


def _draw_panels(runs: Sequence[Run], colors: Sequence[str]) -> list[dict[str, str]]:
    lines = [run.lines for run in runs]
    panels = list_panels(lines)
    num_points = sum(len(run.lines) for run in runs)
    file_format = "svg" if num_points <= _MAX_SVG_POINTS else "png"
    return [
        {
            "title": title,
            "uri": encode_figure(draw_panel(title, keys, lines, colors), file_format),
        }
        for title, keys in panels.items()
        if any(key in line for run in lines for line in run for key in keys)
    ]


def _metric_rows(runs: Sequence[Run]) -> list[list[Any]]:
    """Lists the last value of every metric, and the best of accuracies and best metrics, by run."""
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    rows = []
    for key in [key for key in keys if key not in ("step", *TIMINGS)]:
        values = [last_by_step(run.lines, key) for run in runs]
        rows.append([key, *(_format_last(key, points) for points in values)])
        if is_accuracy(key) or any(key == run.history.name for run in runs):
            rows.append([f"{key}, best", *(_format_best(key, run.lines) for run in runs)])
    return rows


def _format_last(key: str, points: dict[int, float]) -> Any:
    return _format_point(key, points, max(points)) if points else ""


def _format_best(key: str, lines: Sequence[dict[str, Any]]) -> Any:
    history = MetricHistory(key, lines)
    step = history.best_step()
    return "" if step is None else _format_point(key, history.values, step)


def _format_point(key: str, points: dict[int, float], step: int) -> markupsafe.Markup:
    number = _format_number(key, points[step])
    return markupsafe.Markup('{} <span class="muted">step {}</span>').format(number, f"{step:,}")


def _format_number(key: str, value: float) -> markupsafe.Markup:
    """Formats a metric for reading, with its exact value as an attribute."""
    if is_fraction(key) or key == MFU:
        text = f"{value:.2%}"
    elif key in TIMINGS:
        text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    elif abs(value) < 1e15 and value == int(value):
        text = f"{int(value):,}"
    else:
        text = f"{value:.4g}"
    return markupsafe.Markup('<data value="{}">{}</data>').format(json.dumps(value), text)


def _throughput_rows(runs: Sequence[Run]) -> list[list[Any]]:
    """Lists median, range and last value of the logged throughput and MFU by run."""
    rows: list[list[Any]] = []
    for run in runs:
        for key in TIMINGS:
            values = [line[key] for line in run.lines if key in line]
            if values:
                numbers = [statistics.median(values), min(values), max(values), values[-1]]
                cells = [_format_number(key, number) for number in numbers]
                rows.append([run.name, key, *cells, f"{len(values):,}"])
    return rows


def _explain_missing_mfu(runs: Sequence[Run]) -> list[str]:
    """Names the devices on which no MFU is logged, because their peak FLOP/s is unknown."""
    kinds = {start.get("device_kind", "") for run in runs for start in run.starts}
    return sorted(kind for kind in kinds if kind and peak_flops(kind) is None)


def _difference_rows(configs: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Lists the keys whose values differ between the runs."""
    return [row for row in _value_rows(configs) if len(set(row[1:])) > 1]


def _value_rows(runs: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Lists every key with its value in each run; "–" where a run lacks it."""
    runs = list(runs)
    keys = dict.fromkeys(key for values in runs for key in values)
    return [
        [key, *(_format_setting(values[key]) if key in values else "–" for values in runs)]
        for key in keys
    ]


def _format_setting(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _start_rows(run: Run) -> Iterator[list[str]]:
    for start in run.starts:
        mesh = start.get("mesh", {})
        yield [
            run.name,
            _format_time(start.get("time", "")),
            _format_value(start.get("step", "–")),
            _format_devices(start),
            str(start.get("num_hosts", "–")),
            " ".join(f"{axis}={size}" for axis, size in mesh.items()),
            str(start.get("dtype", "–")),
            str(start.get("backend", "–")),
            str(start.get("versions", {}).get("mixer-jax", "–")),
            str(start.get("versions", {}).get("jax", "–")),
        ]


def _format_devices(start: dict[str, Any]) -> str:
    if "num_devices" not in start:
        return "–"
    return f"{start['num_devices']:,} × {start.get('device_kind', '–')}"


def _format_value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _format_time(time: datetime.datetime | str) -> str:
    """Formats a time in UTC, or an ISO 8601 text of one, to the second."""
    text = time if isinstance(time, str) else time.isoformat(timespec="seconds")
    return text.replace("T", " ").replace("+00:00", " UTC")
