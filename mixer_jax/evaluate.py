"""Score weights on a data set: `python -m mixer_jax.evaluate --checkpoint=WEIGHTS --dataset=…`."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixer_jax import command_line
from mixer_jax.errors import UserError
from mixer_jax.keys import KEYS
from mixer_jax.weights.places import find_weights

if TYPE_CHECKING:
    from mixer_jax.data.examples import Source
    from mixer_jax.evaluation.classification import Scores
    from mixer_jax.model.mixer import MlpMixer
    from mixer_jax.weights.load import Weights

# The same images under the labels of arXiv 2006.07159.
_REAL = "_real"


def main(arguments: Sequence[str]) -> int:
    """Scores as the command line says; returns the exit code."""
    parser = command_line.Parser(
        prog="python -m mixer_jax.evaluate",
        description="Score weights on every example of a split, each counted once.",
    )
    command_line.add_weights_arguments(parser)
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
    command_line.check_at_least_one(known, "batch_size")
    find_weights(known.checkpoint, known.step)

    # From here on the heavy libraries are needed.
    command_line.set_up_libraries(KEYS["compilation_cache"].default)
    from mixer_jax.weights.load import load_weights
    from mixer_jax.weights.ready import make_model

    weights = load_weights(
        known.checkpoint,
        step=known.step,
        image_size=known.image_size,
        gelu=known.gelu,
        eval_crop=known.eval_crop,
    )
    if not weights.about.num_classes:
        raise UserError(f"--checkpoint={known.checkpoint} has no head, so there are no classes")
    dataset = known.dataset or (weights.config or {}).get("dataset", {}).get("name")
    if not dataset:
        raise UserError(f"--checkpoint={known.checkpoint} does not tell a data set; pass --dataset")
    names = [dataset, dataset + _REAL] if known.real else [dataset]
    sources = [_open(name, weights, known) for name in names]
    command_line.tell_resolution(weights.about)
    model = make_model(weights.about, known.dtype)
    scores = _score(weights, model, sources, known)
    _tell(known, weights, str(model.dtype), dataset, sources[0].name, scores)
    return 0


def _open(name: str, weights: "Weights", known: argparse.Namespace) -> "Source":
    """Opens a data set, with labels that are the numbers of the weights' classes."""
    from mixer_jax.data.mixture import relabel
    from mixer_jax.data.sources import open_source

    about, trained_on = weights.about, (weights.config or {}).get("dataset", {})
    data_dir = known.data_dir or trained_on.get("data_dir", "")
    source = open_source(name, known.split, data_dir, num_classes=about.num_classes)
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


def _score(
    weights: "Weights", model: "MlpMixer", sources: list["Source"], known: argparse.Namespace
) -> list["Scores"]:
    from mixer_jax.evaluation.classification import compile_judge, evaluate
    from mixer_jax.evaluation.passes import Reading
    from mixer_jax.parallel.sharding import make_mesh
    from mixer_jax.weights.ready import place_for_prediction

    about, mesh = weights.about, make_mesh(data=0, fsdp=1)
    loader = (weights.config or {}).get("loader", {})
    judge_batch = compile_judge(model, mesh)
    params = place_for_prediction(weights.params, model, mesh)
    reading = Reading(
        batch_size=known.batch_size,
        image_size=about.image_size,
        eval_crop=about.eval_crop,
        exif_orientation=about.exif_orientation,
        skip_bad=known.skip_bad_images,
        threads=loader.get("threads", KEYS["loader.threads"].default),
        prefetch_batches=loader.get("prefetch_batches", KEYS["loader.prefetch_batches"].default),
    )
    return [evaluate(judge_batch, params, source, mesh, reading) for source in sources]


def _tell(
    known: argparse.Namespace,
    weights: "Weights",
    dtype: str,
    dataset: str,
    data: str,
    scores: list["Scores"],
) -> None:
    first, *real = scores
    if known.json:
        told: dict[str, Any] = {"checkpoint": known.checkpoint, "step": weights.step}
        about = weights.about
        told |= {"image_size": list(about.image_size), "resolution": about.resolution}
        told |= {"dtype": dtype, "dataset": dataset}
        told |= {"split": known.split, **first._asdict()}
        told |= {"real": real[0]._asdict()} if real else {}
        print(json.dumps(told))
        return
    step = "" if weights.step is None else f", step {weights.step:,}"
    print(f"checkpoint         {known.checkpoint}{step}")
    print(f"model              {weights.about.name}, {dtype}")
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
    command_line.run(main)
