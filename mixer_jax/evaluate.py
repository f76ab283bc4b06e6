"""Score a checkpoint on a data set: `python -m mixer_jax.evaluate --checkpoint=RUN --dataset=…`."""

import json
from collections.abc import Sequence

from mixer_jax import command_line
from mixer_jax.errors import UserError
from mixer_jax.keys import KEYS
from mixer_jax.weights.steps import find_checkpoint


def main(arguments: Sequence[str]) -> int:
    """Scores as the command line says; returns the exit code."""
    parser = command_line.Parser(
        prog="python -m mixer_jax.evaluate",
        description="Score a checkpoint on every example of a split, each counted once.",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a run's folder, or RUN/checkpoints/STEP"
    )
    parser.add_argument("--dataset", help="TFDS name; default: the one trained on")
    parser.add_argument("--split", default="test", help="in TFDS syntax; default: test")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data; default: TFDS's own")
    parser.add_argument("--step", type=int, help="which checkpoint of the run; default: the newest")
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
    if known.batch_size < 1:
        raise UserError(f"--batch_size={known.batch_size} is out of range; pass 1 or more")
    run, step = find_checkpoint(known.checkpoint, known.step)

    # From here on the heavy libraries are needed.
    command_line.set_up_libraries(KEYS["compilation_cache"].default)
    from mixer_jax.data.mixture import relabel
    from mixer_jax.data.sources import open_source
    from mixer_jax.evaluation.classification import compile_judge, evaluate
    from mixer_jax.parallel.sharding import make_mesh
    from mixer_jax.weights.load import load_checkpoint

    mesh = make_mesh(data=0, fsdp=1)
    loaded = load_checkpoint(run, mesh, step)
    trained_on = loaded.metadata["config"]
    dataset = known.dataset or trained_on["dataset"]["name"]
    class_names = tuple(loaded.metadata["class_names"])
    source = open_source(
        dataset,
        known.split,
        known.data_dir or trained_on["dataset"]["data_dir"],
        num_classes=len(class_names),
    )
    try:
        source = relabel(source, class_names)
    except UserError as error:
        raise UserError(
            f"--dataset={dataset}: {error}; score the checkpoint on classes that it knows"
        ) from error
    scores = evaluate(
        compile_judge(loaded.model, mesh),
        loaded.params,
        source,
        mesh,
        batch_size=known.batch_size,
        image_size=loaded.metadata["image_size"],
        eval_crop=trained_on["preprocess"]["eval_crop"],
        exif_orientation=trained_on["preprocess"]["exif_orientation"],
        skip_bad=known.skip_bad_images,
        threads=trained_on["loader"]["threads"],
        prefetch_batches=trained_on["loader"]["prefetch_batches"],
    )
    if known.json:
        where = {"checkpoint": known.checkpoint, "step": step}
        data = {"dataset": dataset, "split": known.split}
        print(json.dumps(where | data | scores._asdict()))
    else:
        print(f"checkpoint         {known.checkpoint}, step {step:,}")
        print(f"data               {source.name}")
        print(f"counted            {scores.counted()}")
        print(f"top-1              {scores.top1:.2%}")
        print(f"top-5              {scores.top5:.2%}")
        print(f"log-likelihood     {scores.log_likelihood:.4f} nats an image")
        print(f"calibration error  {scores.calibration_error:.2%}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
