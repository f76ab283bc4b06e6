"""Score weights on a data set: `python -m mixer_jax.evaluate --checkpoint=WEIGHTS --dataset=…`."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError

if TYPE_CHECKING:
    from mixer_jax.checkpoints.load import PretrainedWeights
    from mixer_jax.data.source import Source
    from mixer_jax.evaluation.classification import ClassificationMetrics
    from mixer_jax.models.mixer import MlpMixer

# The same images under the labels of arXiv 2006.07159.
_REAL = "_real"


def main(arguments: Sequence[str]) -> int:
    """Scores as the command line says; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.evaluate",
        description="Score weights on every example of a split, each counted once.",
    )
    common.add_checkpoint_args(parser)
    parser.add_argument("--dataset", help="TFDS name or folder:PATH; default: the one trained on")
    parser.add_argument("--split", default="test", help="in TFDS syntax; default: test")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data; default: TFDS's own")
    parser.add_argument(
        "--real",
        action="store_true",
        help="score by ReaL's labels too (arXiv 2006.07159), of the data set DATASET_real",
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="images at a time; default: 256"
    )
    parser.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="leave out images that cannot be used, and count them, rather than stop",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    known = parser.parse_args(arguments)
    common.check_positive(known, "batch_size")
    resolve_checkpoint(known.checkpoint, known.step)

    # From here on the heavy libraries are needed.
    common.configure_jax(FIELDS["compilation_cache"].default)
    from mixer_jax.checkpoints.load import load_checkpoint
    from mixer_jax.checkpoints.to_device import model_from_info

    weights = load_checkpoint(
        known.checkpoint,
        step=known.step,
        image_size=known.image_size,
        gelu=known.gelu,
        eval_crop=known.eval_crop,
    )
    if not weights.model_info.num_classes:
        raise UserError(f"--checkpoint={known.checkpoint} has no head, so there are no classes")
    dataset = known.dataset or (weights.train_config or {}).get("dataset", {}).get("name")
    if not dataset:
        raise UserError(f"--checkpoint={known.checkpoint} does not tell a data set; pass --dataset")
    names = [dataset, dataset + _REAL] if known.real else [dataset]
    sources = [_open(name, weights, known) for name in names]
    common.warn_if_resized(weights.model_info)
    model = model_from_info(weights.model_info, known.dtype)
    scores = _evaluate(weights, model, sources, known)
    _print_results(known, weights, model.execution.dtype, dataset, sources[0].name, scores)
    return 0


def _open(name: str, weights: "PretrainedWeights", known: argparse.Namespace) -> "Source":
    """Opens a data set, with labels that are the numbers of the weights' classes."""
    from mixer_jax.data.registry import open_dataset
    from mixer_jax.data.source import relabel

    about, trained_on = weights.model_info, (weights.train_config or {}).get("dataset", {})
    data_dir = known.data_dir or trained_on.get("data_dir", "")
    source = open_dataset(name, known.split, data_dir, num_classes=about.num_classes)
    if not about.class_names:
        if source.num_classes != about.num_classes:
            raise UserError(
                f"--dataset={name} has {source.num_classes:,} classes, and --checkpoint="
                f"{known.checkpoint} has {about.num_classes:,} whose names are not known; score it "
                "on the data that it was trained on"
            )
        return source
    try:
        return relabel(source, about.class_names)
    except UserError as error:
        raise UserError(
            f"--dataset={name}: {error}; score the checkpoint on classes that it knows"
        ) from error


def _evaluate(
    weights: "PretrainedWeights",
    model: "MlpMixer",
    sources: list["Source"],
    known: argparse.Namespace,
) -> list["ClassificationMetrics"]:
    from mixer_jax.checkpoints.to_device import shard_inference_params
    from mixer_jax.distributed.sharding import make_mesh
    from mixer_jax.evaluation.classification import evaluate, make_eval_step
    from mixer_jax.evaluation.loop import EvalInputConfig

    about, mesh = weights.model_info, make_mesh(data=0, fsdp=1)
    loader = (weights.train_config or {}).get("loader", {})
    eval_step = make_eval_step(model, mesh)
    params = shard_inference_params(weights.params, model, mesh)
    reading = EvalInputConfig(
        batch_size=known.batch_size,
        image_size=about.image_size,
        eval_crop=about.eval_crop,
        exif_orientation=about.exif_orientation,
        skip_bad=known.skip_bad_images,
        threads=loader.get("threads", FIELDS["loader.num_threads"].default),
        prefetch_batches=loader.get("prefetch_batches", FIELDS["loader.prefetch_batches"].default),
    )
    return [evaluate(eval_step, params, source, mesh, reading) for source in sources]


def _print_results(
    known: argparse.Namespace,
    weights: "PretrainedWeights",
    dtype: str,
    dataset: str,
    data: str,
    scores: list["ClassificationMetrics"],
) -> None:
    first, *real = scores
    if known.json:
        told: dict[str, Any] = {"checkpoint": known.checkpoint, "step": weights.step}
        about = weights.model_info
        told |= {"image_size": list(about.image_size), "resolution": about.resize_note}
        told |= {"dtype": dtype, "dataset": dataset}
        told |= {"split": known.split, **first._asdict()}
        told |= {"real": real[0]._asdict()} if real else {}
        print(json.dumps(told))
        return
    step = "" if weights.step is None else f", step {weights.step:,}"
    print(f"checkpoint         {known.checkpoint}{step}")
    print(f"model              {weights.model_info.name}, {dtype}")
    print(f"data               {data}")
    print(f"counted            {first.counted()}")
    print(f"top-1              {first.top1:.2%}")
    print(f"top-5              {first.top5:.2%}")
    print(f"log-likelihood     {first.log_likelihood:.4f} nats an image")
    print(f"calibration error  {first.calibration_error:.2%}")
    for one in real:
        print(f"ReaL               {one.top1:.2%}")
        print(f"counted            {one.counted()}")


if __name__ == "__main__":
    common.run_cli(main)
