"""Evaluate a checkpoint: `python -m mixer_jax.evaluate --checkpoint=CHECKPOINT --dataset=…`."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError

if TYPE_CHECKING:
    from mixer_jax.checkpoints.weights import PretrainedWeights
    from mixer_jax.data.source import Source
    from mixer_jax.evaluation.classification import ClassificationMetrics

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
    weights = load_checkpoint(
        args.checkpoint,
        step=args.step,
        image_size=args.image_size,
        gelu=args.gelu,
        eval_crop=args.eval_crop,
        eval_crop_fraction=args.eval_crop_fraction,
    )
    check_trained_head(weights, f"--checkpoint={args.checkpoint}")
    dataset = args.dataset or (weights.train_config or {}).get("dataset", {}).get("name")
    if not dataset:
        raise UserError(
            f"--checkpoint={args.checkpoint} does not record its training data. Pass --dataset."
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
    args = parser.parse_args(argv)
    common.check_positive(args, "batch_size")
    return args


def _evaluate(
    weights: "PretrainedWeights",
    model: Any,
    sources: list["Source"],
    args: argparse.Namespace,
) -> list["ClassificationMetrics"]:
    from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
    from mixer_jax.evaluation.checkpoint import make_input_config
    from mixer_jax.evaluation.classification import evaluate, make_eval_step

    mesh = make_mesh(data=0, fsdp=1)
    eval_step = make_eval_step(model, mesh)
    params = shard_inference_params(weights.params, model, mesh)
    input_config = make_input_config(weights, args.batch_size, args.skip_bad_images)
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
