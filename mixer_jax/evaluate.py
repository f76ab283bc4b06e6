"""Evaluate a checkpoint: `python -m mixer_jax.evaluate --checkpoint=CHECKPOINT --dataset=…`."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError
from mixer_jax.files import raise_open_file_limit

if TYPE_CHECKING:
    from mixer_jax.checkpoints.weights import PretrainedWeights
    from mixer_jax.data.source import Source
    from mixer_jax.evaluation.classification import ClassificationMetrics

# Suffix of the dataset with the same images and ReaL labels (arXiv 2006.07159).
_REAL = "_real"


def main(argv: Sequence[str]) -> int:
    """Evaluates the checkpoint named on the command line; returns the exit code."""
    args = _parse_args(argv)
    raise_open_file_limit()
    resolve_checkpoint(args.checkpoint, args.step)

    # JAX is imported only after the arguments are valid.
    common.configure_jax(FIELDS["compilation_cache"].default)
    from mixer_jax.checkpoints.load import load_checkpoint
    from mixer_jax.distributed.multihost import check_devices

    check_devices()
    weights = load_checkpoint(
        args.checkpoint,
        step=args.step,
        image_size=args.image_size,
        gelu=args.gelu,
        eval_crop=args.eval_crop,
    )
    if not weights.model_info.num_classes:
        raise UserError(
            f"--checkpoint must have a head, got {args.checkpoint} without one. Probe its features "
            "with mixer_jax.transfer --suite=few_shot."
        )
    dataset = args.dataset or (weights.train_config or {}).get("dataset", {}).get("name")
    if not dataset:
        raise UserError(
            f"--checkpoint={args.checkpoint} does not record its training data. Pass --dataset."
        )
    names = [dataset, dataset + _REAL] if args.real else [dataset]
    sources = [_open_source(name, weights, args) for name in names]
    common.warn_if_resized(weights.model_info)
    common.print_notes(sources[0])
    model = weights.model_info.build_model(args.dtype)
    metrics = _evaluate(weights, model, sources, args)
    if args.json:
        _print_json(args, weights, model.execution.dtype, dataset, metrics)
    else:
        _print_table(args, weights, model.execution.dtype, sources[0].name, metrics)
    return 0


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.evaluate",
        description="Evaluate a checkpoint on every example of a split, each counted once.",
    )
    common.add_checkpoint_args(parser)
    parser.add_argument("--dataset", help="TFDS name or folder:PATH; default: the training dataset")
    parser.add_argument("--split", default="test", help="split in TFDS syntax; default: test")
    parser.add_argument("--data_dir", default="", help="TFDS data directory; default: TFDS's own")
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
    args = parser.parse_args(argv)
    common.check_positive(args, "batch_size")
    return args


def _open_source(name: str, weights: "PretrainedWeights", args: argparse.Namespace) -> "Source":
    """Opens a dataset with the checkpoint's class indices as labels."""
    from mixer_jax.data.registry import open_dataset
    from mixer_jax.data.source import relabel

    info, trained_on = weights.model_info, (weights.train_config or {}).get("dataset", {})
    data_dir = args.data_dir or trained_on.get("data_dir", "")
    source = open_dataset(name, args.split, data_dir, num_classes=info.num_classes)
    if not info.class_names:
        if source.num_classes != info.num_classes:
            raise UserError(
                f"--dataset must have the {info.num_classes:,} classes of --checkpoint="
                f"{args.checkpoint}, got {name} with {source.num_classes:,}. Evaluate on the "
                "training dataset, or store class names in the checkpoint."
            )
        return source
    try:
        return relabel(source, info.class_names)
    except UserError as error:
        raise UserError(
            f"--dataset={name}: {error} Choose a dataset with classes of the checkpoint."
        ) from error


def _evaluate(
    weights: "PretrainedWeights",
    model: Any,
    sources: list["Source"],
    args: argparse.Namespace,
) -> list["ClassificationMetrics"]:
    from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
    from mixer_jax.evaluation.classification import evaluate, make_eval_step
    from mixer_jax.evaluation.loop import EvalInputConfig

    info, mesh = weights.model_info, make_mesh(data=0, fsdp=1)
    loader = (weights.train_config or {}).get("loader", {})
    eval_step = make_eval_step(model, mesh)
    params = shard_inference_params(weights.params, model, mesh)
    input_config = EvalInputConfig(
        batch_size=args.batch_size,
        image_size=info.image_size,
        eval_crop=info.eval_crop,
        exif_orientation=info.exif_orientation,
        skip_bad=args.skip_bad_images,
        num_threads=loader.get("num_threads", FIELDS["loader.num_threads"].default),
        prefetch_batches=loader.get("prefetch_batches", FIELDS["loader.prefetch_batches"].default),
    )
    return [evaluate(eval_step, params, source, mesh, input_config) for source in sources]


def _print_json(
    args: argparse.Namespace,
    weights: "PretrainedWeights",
    dtype: str,
    dataset: str,
    metrics: list["ClassificationMetrics"],
) -> None:
    first, *real = metrics
    info = weights.model_info
    result: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        "step": weights.step,
        "image_size": list(info.image_size),
        "resolution": info.resize_note,
        "dtype": dtype,
        "dataset": dataset,
        "split": args.split,
        **first._asdict(),
    }
    result |= {"real": real[0]._asdict()} if real else {}
    print(json.dumps(result))


def _print_table(
    args: argparse.Namespace,
    weights: "PretrainedWeights",
    dtype: str,
    source_name: str,
    metrics: list["ClassificationMetrics"],
) -> None:
    first, *real = metrics
    step = "" if weights.step is None else f", step {weights.step:,}"
    print(f"checkpoint         {args.checkpoint}{step}")
    print(f"model              {weights.model_info.name}, {dtype}")
    print(f"data               {source_name}")
    print(f"counted            {first.format_counts()}")
    print(f"top-1              {first.top1:.2%}")
    print(f"top-5              {first.top5:.2%}")
    print(f"log-likelihood     {first.log_likelihood:.4f} nats per image")
    print(f"calibration error  {first.calibration_error:.2%}")
    for real_metrics in real:
        print(f"ReaL               {real_metrics.top1:.2%}")
        print(f"counted            {real_metrics.format_counts()}")


if __name__ == "__main__":
    common.run_cli(main)
