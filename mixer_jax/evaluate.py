"""Evaluate a checkpoint: `python -m mixer_jax.evaluate --checkpoint=CHECKPOINT --dataset=…`.

In Python, call `mixer_jax.evaluate(checkpoint, dataset)`. That name is this module, which is
therefore callable: importing a module `mixer_jax.evaluate` replaces whatever else has its name.
"""

import argparse
import inspect
import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixer_jax import __version__
from mixer_jax.checkpoints.best import Step
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError

if TYPE_CHECKING:
    from mixer_jax.checkpoints.load import ImageSize
    from mixer_jax.checkpoints.weights import PretrainedWeights
    from mixer_jax.data.source import Source
    from mixer_jax.evaluation.classification import ClassificationMetrics
    from mixer_jax.evaluation.multi_label import MultiLabelMetrics
    from mixer_jax.evaluation.predictions import MultiLabelPredictions, Predictions

    Metrics = ClassificationMetrics | MultiLabelMetrics

# Suffix of the dataset with the same images and ReaL labels (arXiv 2006.07159).
_REAL = "_real"


def main(argv: Sequence[str]) -> int:
    """Evaluates the checkpoint named on the command line; returns the exit code."""
    args = _parse_args(argv)
    resolve_checkpoint(args.checkpoint, args.step)

    # JAX is imported only after the arguments are valid.
    common.configure_jax(FIELDS["compilation_cache"].default)
    from mixer_jax.checkpoints.load import load_checkpoint
    from mixer_jax.checkpoints.weights import check_trained_head
    from mixer_jax.distributed.multihost import check_devices
    from mixer_jax.evaluation.checkpoint import open_eval_source

    check_devices()
    if args.report:
        _check_one_process()
    weights = load_checkpoint(
        args.checkpoint,
        step=args.step,
        image_size=args.image_size,
        gelu=args.gelu,
        eval_crop=args.eval_crop,
        eval_crop_fraction=args.eval_crop_fraction,
    )
    check_trained_head(weights, f"--checkpoint={args.checkpoint}")
    dataset = args.dataset or _training_dataset(weights)
    if not dataset:
        raise UserError(
            f"--checkpoint={args.checkpoint} does not record its training data. Pass --dataset."
        )
    multi_label = weights.model_info.multi_label
    if args.real and multi_label:
        raise UserError(
            f"--real must be used with a model of one label per image, got --checkpoint="
            f"{args.checkpoint}, a multi-label model. Leave out --real."
        )
    names = [dataset, dataset + _REAL] if args.real else [dataset]
    sources = [
        open_eval_source(
            weights,
            name,
            args.split,
            args.data_dir,
            argument="--dataset",
            model=f"--checkpoint={args.checkpoint}",
            fix="Evaluate on the training dataset, or store class names in the checkpoint.",
        )
        for name in names
    ]
    if args.report and sources[0].multi_label and not multi_label:
        other = dataset.removesuffix(_REAL) if dataset.endswith(_REAL) else "another dataset"
        raise UserError(
            f"--report must be used with a dataset of one label per image, got {dataset} with any "
            f"number. Leave out --report, or evaluate on {other}."
        )
    common.warn_if_resized(weights.model_info)
    common.print_notes(sources[0])
    model = weights.model_info.build_model(args.dtype)
    metrics, predictions = _evaluate(weights, model, sources, args)
    dtype = model.execution.dtype
    summary = _summarize(args.checkpoint, weights, dtype, dataset, args.split, metrics)
    if args.json:
        print(json.dumps(summary), flush=True)
    else:
        _print_table(args, weights, model.execution.dtype, sources[0].name, metrics)
    if predictions is not None:
        from mixer_jax.visualization.evaluation_report import PAGE, write_report
        from mixer_jax.visualization.multi_label_report import write_multi_label_report

        write: Any = write_multi_label_report if multi_label else write_report
        write(
            Path(args.report),
            f"{args.checkpoint} on {sources[0].name}",
            _describe_model(weights, model.execution.dtype),
            sources[0],
            metrics[0],
            predictions,
            summary,
            weights.model_info.exif_orientation,
        )
        if not args.json:
            print(f"report             {Path(args.report) / PAGE}")
    return 0


def evaluate(
    checkpoint: str | os.PathLike,
    dataset: str = "",
    split: str = "test",
    *,
    step: Step | None = None,
    image_size: "ImageSize | None" = None,
    data_dir: str = "",
    batch_size: int = 256,
    skip_bad_images: bool = False,
    dtype: str = "",
) -> dict[str, Any]:
    """Evaluates a checkpoint on every example of a split, like the command `evaluate`.

    Classes are matched by name. The devices of one host are used.

    Args:
        checkpoint: Workdir of a run, file of weights, or name on the Hub; see `load_pretrained`.
        dataset: TFDS name, folder:PATH, manifest:FILE, hf:NAME or wds:PATH; empty: the training
            dataset.
        split: Split in TFDS syntax.
        step: Step of a run's checkpoint, or "best" by its `checkpoint.best_metric`; None: the
            newest.
        image_size: Side, or height and width, of the images in pixels; None: the checkpoint's own.
        data_dir: TFDS data directory; empty: that of the training run, or TFDS's own.
        batch_size: Images per batch.
        skip_bad_images: Whether unusable images are skipped and counted instead of failing.
        dtype: "float32" or "bfloat16"; empty: that of the checkpoint, or by device.

    Returns:
        What the command prints with `--json`: `top1`, `top5`, `log_likelihood`,
        `calibration_error`, `num_examples`, `num_bad` and `num_unlabeled`, and what was evaluated.
        For a multi-label model, `mean_average_precision`, `micro_average_precision`, `loss`,
        `num_scored_classes`, `num_examples`, `num_bad`, and `classes` with the average precision
        of each.

    Raises:
        UserError: The checkpoint does not exist or has no trained head, data is missing, the data
            has classes that the model lacks, images are unusable, or an argument is invalid.
    """
    from mixer_jax.checkpoints.load import collect_overrides, load_checkpoint
    from mixer_jax.inference import Classifier

    collect_overrides(dtype=dtype)
    weights = load_checkpoint(checkpoint, step=step, image_size=image_size)
    dataset = dataset or _training_dataset(weights)
    if not dataset:
        raise UserError(f"{checkpoint} does not record its training data. Pass dataset.")
    source = os.fspath(checkpoint)
    classifier = Classifier(weights, dtype, source)
    metrics = classifier.evaluate(
        dataset, split, data_dir=data_dir, batch_size=batch_size, skip_bad_images=skip_bad_images
    )
    return _summarize(source, weights, classifier.model.execution.dtype, dataset, split, [metrics])


class CallableModule(types.ModuleType):
    """Module that is called like `evaluate`."""

    __call__ = staticmethod(evaluate)
    __signature__ = inspect.signature(evaluate)


sys.modules[__name__].__class__ = CallableModule


def _training_dataset(weights: "PretrainedWeights") -> str:
    """Returns the name of the dataset that a run was trained on; empty if it is unknown."""
    return (weights.train_config or {}).get("dataset", {}).get("name", "")


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.evaluate",
        description="Evaluate a checkpoint on every example of a split, each counted once.",
    )
    common.add_checkpoint_args(parser)
    parser.add_argument("--dataset", help=f"{common.DATASET_HELP}; default: the training dataset")
    parser.add_argument("--split", default="test", help="split in TFDS syntax; default: test")
    parser.add_argument(
        "--data_dir",
        default="",
        help="TFDS data directory; default: that of the training run, or TFDS's own",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="also evaluate with ReaL labels (arXiv 2006.07159), of the dataset DATASET_real",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="batch size; default: 256")
    parser.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="skip and count unusable images instead of failing",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a new folder: a page with metrics per class, confusions, calibration and the "
        "most confident mistakes (index.html), all predictions (predictions.csv) and metrics "
        "(metrics.json)",
    )
    args = parser.parse_args(argv)
    common.check_positive(args, "batch_size")
    if args.report is not None:
        _check_report(args.report)
    return args


def _check_report(report: str) -> None:
    """Raises UserError if the report could not be written, before any work is done."""
    if not report or "://" in report:
        raise UserError(f"--report must be a local folder, got {report!r}. Copy it afterwards.")
    path = Path(report)
    if path.exists() and not path.is_dir():
        raise UserError(f"--report must be a folder, got the file {path}.")
    if os.access(path, os.R_OK) and any(path.iterdir()):
        raise UserError(f"--report={path} exists. Name a new folder, or delete this one.")
    common.check_parent_writable(f"--report={path}", path.absolute().parent)


def _check_one_process() -> None:
    import jax

    if jax.process_count() > 1:
        raise UserError(
            "--report must be used on one host, got a process that has joined "
            f"{jax.process_count():,}. Run the command on one of them, or without --report."
        )


def _evaluate(
    weights: "PretrainedWeights",
    model: Any,
    sources: list["Source"],
    args: argparse.Namespace,
) -> tuple[list["Metrics"], "Predictions | MultiLabelPredictions | None"]:
    """Evaluates on every source; for a report, also returns the predictions for the first."""
    from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
    from mixer_jax.evaluation.checkpoint import make_input_config
    from mixer_jax.evaluation.classification import make_evaluator
    from mixer_jax.evaluation.multi_label import make_score_step
    from mixer_jax.evaluation.predictions import (
        make_prediction_step,
        predict_multi_label_source,
        predict_source,
    )

    mesh = make_mesh(data=0, fsdp=1)
    params = shard_inference_params(weights.params, model, mesh)
    input_config = make_input_config(weights, args.batch_size, args.skip_bad_images)
    multi_label = weights.model_info.multi_label
    metrics: list[Metrics] = []
    first: Metrics
    step: Any
    predictions: Predictions | MultiLabelPredictions | None = None
    if args.report:
        inputs = params, sources[0], mesh, input_config
        if multi_label:
            step = make_score_step(model, mesh)
            first, predictions = predict_multi_label_source(step, *inputs)
        else:
            step = make_prediction_step(model, mesh)
            first, predictions = predict_source(step, *inputs)
        metrics.append(first)
    evaluate = make_evaluator(model, mesh, input_config, multi_label)
    metrics += [evaluate(source, params) for source in sources[len(metrics) :]]
    return metrics, predictions


def _summarize(
    checkpoint: str,
    weights: "PretrainedWeights",
    dtype: str,
    dataset: str,
    split: str,
    metrics: list["Metrics"],
) -> dict[str, Any]:
    """Collects what was evaluated, and its metrics, for JSON."""
    first, *real = metrics
    info = weights.model_info
    summary: dict[str, Any] = {
        "checkpoint": checkpoint,
        "step": weights.step,
        "image_size": list(info.image_size),
        "resolution": info.resize_note,
        "dtype": dtype,
        "dataset": dataset,
        "split": split,
        **first.as_json(),
    }
    return summary | ({"real": real[0].as_json()} if real else {})


def _describe_model(weights: "PretrainedWeights", dtype: str) -> str:
    step = "" if weights.step is None else f", step {weights.step:,}"
    return f"{weights.model_info.name}{step}, {dtype}, mixer_jax {__version__}"


def _print_table(
    args: argparse.Namespace,
    weights: "PretrainedWeights",
    dtype: str,
    source_name: str,
    metrics: list["Metrics"],
) -> None:
    first, *real = metrics
    step = "" if weights.step is None else f", step {weights.step:,}"
    print(f"checkpoint         {args.checkpoint}{step}")
    print(f"model              {weights.model_info.name}, {dtype}")
    print(f"data               {source_name}")
    print(f"counted            {first.format_counts()}")
    for line in first.format_table():
        print(line)
    for real_metrics in real:
        print(f"ReaL               {real_metrics.as_dict()['top1']:.2%}")
        print(f"counted            {real_metrics.format_counts()}")


if __name__ == "__main__":
    common.run_cli(main)
