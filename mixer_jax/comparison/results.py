"""Files in the workdir of a comparison.

WORKDIR/MODEL/[VALUE/] has model.json, throughput.json and, for models that are trained, a workdir
for each seed; a completed run or evaluation has a result.json in its folder. Measured times are
read from there, so that a later call prints the same.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

from etils import epath

from mixer_jax.checkpoints.resolve import list_saved_steps
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write, is_number, output_errors, parse_json
from mixer_jax.training.workdir import CONFIG_FILE, config_diff, to_json

RESULT_FILE = "result.json"
MODEL_FILE = "model.json"
_MAX_DIFFERENCES = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one run, or of the evaluation of one checkpoint.

    Attributes:
        data: Dataset and split that the metrics are of.
        metrics: `ClassificationMetrics` by name, as fractions.
        device_seconds: Measured training time × devices; None if unknown.
        digest: `weights.params_digest` of a checkpoint; empty for a run.
    """

    data: str
    metrics: dict[str, float]
    device_seconds: float | None = None
    digest: str = ""


def save_result(folder: str, result: Result) -> None:
    """Writes the result in `folder`, or raises OutputWriteError or WriteFailureError."""
    save_json(folder, RESULT_FILE, dataclasses.asdict(result))


def read_result(folder: str, data: str) -> Result | None:
    """Reads the result in `folder`; returns None if there is none yet.

    Raises:
        UserError: The file is damaged, or the result is of other data than `data`.
    """
    fields = read_json(folder, RESULT_FILE)
    if fields is None:
        return None
    path = f"{folder}/{RESULT_FILE}"
    try:
        result = Result(**fields)
        if not all(map(is_number, [*result.metrics.values(), result.device_seconds or 0.0])):
            raise TypeError
        top1, num_examples = result.metrics["top1"], result.metrics["num_examples"]
        if not 0 <= top1 <= 1 or not math.isfinite(num_examples):
            raise TypeError
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a result. Remove it to repeat the run.") from error
    if result.data != data:
        raise UserError(
            f"{folder!r} has a result on {result.data}, not on {data}. Choose another --workdir."
        )
    return result


def save_json(folder: str, name: str, data: Any) -> None:
    """Writes a JSON file in `folder`, or raises OutputWriteError or WriteFailureError."""
    with output_errors(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        atomic_write(epath.Path(folder) / name, json.dumps(data, indent=2) + "\n")


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """Reads a JSON file in `folder`; returns None if it does not exist.

    Raises:
        UserError: It is damaged.
    """
    path = epath.Path(folder) / name
    if not path.exists():
        return None
    try:
        data = parse_json(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{path} is damaged. Remove it.") from error
    return data


def check_same_run(folder: str, config: RunConfig) -> None:
    """Raises UserError if `folder` has a result or checkpoints of a run with other settings.

    Settings with which a run can resume may differ.
    """
    saved = read_json(folder, CONFIG_FILE)
    if saved is not None and (
        (epath.Path(folder) / RESULT_FILE).exists() or list_saved_steps(folder)
    ):
        try:
            _, differences = config_diff(saved, config)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"{folder}/{CONFIG_FILE} is not the config of a run.") from error
        _check_no_differences(folder, differences)


def check_same_model(folder: str, model: dict[str, Any]) -> None:
    """Raises UserError if `folder` has measurements of another model."""
    saved = read_json(folder, MODEL_FILE)
    new = json.loads(json.dumps(model))
    if saved is not None:
        differences = [
            f"{name}: {saved.get(name)!r} -> {new.get(name)!r}"
            for name in {**saved, **new}
            if saved.get(name) != new.get(name)
        ]
        _check_no_differences(folder, differences)


def _check_no_differences(folder: str, differences: list[str]) -> None:
    if differences:
        listed = "; ".join(differences[:_MAX_DIFFERENCES])
        listed += "; …" if differences[_MAX_DIFFERENCES:] else ""
        raise UserError(
            f"{folder!r} has results of other settings ({listed}). Choose another --workdir, or "
            "undo the change."
        )


def config_digest(config: RunConfig) -> str:
    """Computes the SHA-256 digest of a config."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()
