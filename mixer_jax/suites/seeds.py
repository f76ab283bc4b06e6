"""Runs of one config with several seeds: `python -m mixer_jax.main --seeds=0,1,2`.

Each seed has its own workdir, WORKDIR/seed0, WORKDIR/seed1 and so on, which is that of an ordinary
run. Whether a run is finished, and its metrics, are read from there. The table and `seeds.json`
have all finished seeds of the workdir: after `--seeds=0,1`, `--seeds=2` adds one.
"""

import dataclasses
import functools
import json
import math
import posixpath
import re
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.checkpoints.best import (
    BestCheckpoint,
    MetricHistory,
    format_value,
    has_stopped_early,
)
from mixer_jax.checkpoints.resolve import CONFIG_FILE, list_saved_steps
from mixer_jax.config.schema import RunConfig
from mixer_jax.distributed import multihost
from mixer_jax.files import atomic_write, output_errors
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.tracking import RunLabel
from mixer_jax.training.workdir import (
    SEEDS_FILE,
    check_workdir,
    config_diff,
    read_config,
    read_starts,
    seed_workdir,
)
from mixer_jax.visualization.curves import save_curves
from mixer_jax.visualization.tables import align_columns

# Ending of the name of a metric at the step of the best checkpoint.
_BEST = ", best"


class SeedResult(NamedTuple):
    """Result of a finished run.

    Attributes:
        step: Steps taken.
        metrics: Metrics at this step, named as in metrics.jsonl.
        best: Best checkpoint, if the run has a `checkpoint.best_metric`.
    """

    seed: int
    step: int
    metrics: dict[str, float]
    best: BestCheckpoint | None = None


class SeedsOutcome(NamedTuple):
    """Results of all finished runs by seed, and the signal that stopped the others, if any."""

    results: list[SeedResult]
    stopped_by: signal.Signals | None = None


def run_seeds(
    config: RunConfig, workdir: str, seeds: Sequence[int], log: Callable[[str], None]
) -> SeedsOutcome:
    """Trains a config with every seed, one after the other, and writes seeds.json.

    Finished runs are skipped, unless the config has changed, and others are resumed. Finished runs
    of other seeds in the workdir are part of the result if they have the same config.

    Args:
        config: Config of the runs, whose seed is replaced.
        workdir: Absolute path or URL; its runs are checked by `check_workdir`.
        seeds: Different seeds.
        log: Prints a line.

    Raises:
        UserError, RunError: A run fails. Results of those that have finished are kept.
    """
    multihost.initialize_distributed(config.distributed, config.distributed_timeout)
    multihost.check_devices()
    others = multihost.compute_once(functools.partial(_read_others, config, workdir, seeds))
    results = {result.seed: result for result in others.values() if result is not None}
    for folder, result in others.items():
        if result is None:
            log(f"{folder} is left out: it is not finished, or has another config")
    for index, seed in enumerate(seeds, start=1):
        folder, run_config = seed_workdir(workdir, seed), dataclasses.replace(config, seed=seed)
        changes = multihost.compute_once(functools.partial(check_workdir, folder, run_config))
        result = multihost.compute_once(functools.partial(read_result, folder, run_config))
        title, stopped_by = f"seed {seed} ({index} of {len(seeds)}): {folder}", None
        if result is not None and not changes:
            log(f"{title} is finished")
        else:
            log(f"\n{title}")
            for change in changes:
                log(f"changed since this run was last started: {change}")
            label = RunLabel(f"seed{seed}", posixpath.basename(workdir.rstrip("/")))
            trained = train_and_evaluate(run_config, folder, plot=save_curves, label=label)
            stopped_by = trained.stopped_by
            if not trained.is_finished:
                return _outcome(results, stopped_by)
            trained.raise_failures()
            result = SeedResult(seed, trained.step, trained.metrics, trained.best)
        results[seed] = result
        if multihost.is_primary_process():
            with output_errors(workdir):
                text = json.dumps(to_json(_outcome(results).results), indent=2) + "\n"
                atomic_write(epath.Path(workdir) / SEEDS_FILE, text)
        # After the last step, at which hosts synchronize, a signal may reach only some of them.
        if multihost.any_host(stopped_by is not None) and index < len(seeds):
            return _outcome(results, stopped_by or signal.SIGTERM)
    return _outcome(results)


def _outcome(
    results: Mapping[int, SeedResult], stopped_by: signal.Signals | None = None
) -> SeedsOutcome:
    return SeedsOutcome([results[seed] for seed in sorted(results)], stopped_by)


def _read_others(
    config: RunConfig, workdir: str, seeds: Sequence[int]
) -> dict[str, SeedResult | None]:
    """Reads the results of the runs of other seeds by folder; None: another config, or unfinished.

    Raises:
        UserError: A file of a run is damaged.
    """
    results: dict[str, SeedResult | None] = {}
    for path in epath.Path(workdir).glob("seed*"):
        match = re.fullmatch("seed(0|[1-9][0-9]*)", path.name)
        if match is None or int(match[1]) in seeds or not (path / CONFIG_FILE).exists():
            continue
        run_config = dataclasses.replace(config, seed=int(match[1]))
        folder = seed_workdir(workdir, run_config.seed)
        is_same = not any(config_diff(read_config(folder), run_config))
        results[folder] = read_result(folder, run_config) if is_same else None
    return results


def read_result(workdir: str, config: RunConfig) -> SeedResult | None:
    """Reads the result of a run from its log; returns None if the run is not finished.

    Raises:
        UserError: A file of the run is damaged.
    """
    saved, starts = list_saved_steps(workdir), read_starts(workdir)
    if not saved or not starts:
        return None
    step, lines = saved[-1], read_metrics(workdir)
    history = MetricHistory(config.checkpoint.best_metric, lines)
    if step != starts[-1].get("num_steps") and not has_stopped_early(config, history):
        return None
    metrics = {
        key: value
        for line in lines
        if line["step"] == step
        for key, value in line.items()
        if key.rpartition("/")[0] in config.evals
    }
    if {key.rpartition("/")[0] for key in metrics} != config.evals.keys():
        return None
    return SeedResult(config.seed, step, metrics, history.best_checkpoint(saved))


def to_json(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Converts results to plain data: every run, the means and the sample standard deviations."""
    columns = _list_columns(results)
    return {
        "seeds": [result.seed for result in results],
        "mean": {name: _mean(values) for name, values in columns.items()},
        "std": {name: _sample_std(values) for name, values in columns.items()},
        "runs": {
            f"{result.seed}": {
                "step": result.step,
                "best": result.best and result.best._asdict(),
                "metrics": result.metrics,
            }
            for result in results
        },
    }


def format_table(results: Sequence[SeedResult]) -> str:
    """Formats the metrics of every seed; of several, with mean and sample standard deviation."""
    summary = ["mean ± std"] if len(results) > 1 else []
    lines = [["", *(f"seed {result.seed}" for result in results), *summary]]
    for name, values in _list_columns(results).items():
        # Counts are equal.
        if name.rpartition("/")[2].startswith("num_"):
            continue
        format_one = functools.partial(format_value, name.removesuffix(_BEST))
        mean, std = _mean(values), _sample_std(values)
        summary = [] if std is None else [f"{format_one(mean)} ± {format_one(std)}"]
        lines.append([name, *map(format_one, values), *summary])
    return "\n".join(align_columns(lines))


def _list_columns(results: Sequence[SeedResult]) -> dict[str, list[float]]:
    """Lists the values of each metric over the seeds: of the best checkpoint, and of the last."""
    columns: dict[str, list[float]] = {}
    if all(result.best for result in results):
        for result in results:
            assert result.best is not None
            columns.setdefault(f"{result.best.metric}{_BEST}", []).append(result.best.value)
    for name in results[0].metrics:
        if all(name in result.metrics for result in results):
            columns[name] = [result.metrics[name] for result in results]
    return columns


def _mean(values: Sequence[float]) -> float:
    """Computes the mean; NaN if a value is not finite or so large that the sum overflows."""
    try:
        return statistics.fmean(values)
    except (ValueError, OverflowError):
        return math.nan


def _sample_std(values: Sequence[float]) -> float | None:
    """Computes the standard deviation with n − 1; None for a single value."""
    if len(values) == 1:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
