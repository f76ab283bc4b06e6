"""Classify image files: `python -m mixer_jax.predict --checkpoint=WEIGHTS photo.jpg folder/`."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError

if TYPE_CHECKING:
    from mixer_jax.inference import Prediction

# From so many images on, a bar shows how far it is.
_MANY = 32


def main(arguments: Sequence[str]) -> int:
    """Classifies as the command line says; returns the exit code, 1 if an image cannot be used."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.predict",
        description="Say what images show. Exit code 1: some cannot be used, and are named.",
    )
    common.add_checkpoint_args(parser)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help='file, folder, pattern, or "-": standard input'
    )
    parser.add_argument(
        "--files_from", metavar="FILE", help='more of them, one a line; "-": standard input'
    )
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--topk", type=int, default=5, help="classes told of an image; default: 5")
    parser.add_argument(
        "--ignore_exif",
        action="store_true",
        help="take images as they are stored; default: turn them as their camera says",
    )
    parser.add_argument("--format", choices=tuple(_WRITERS), default="table", help="of the answer")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time; default: 32")
    known = parser.parse_args(arguments)
    common.check_positive(known, "topk", "batch_size")
    names = [*known.images]
    if known.files_from:
        names += common.read_path_list(known.files_from, "--files_from")
    if not names:
        raise UserError("no image is named; name files, folders, patterns, or - for standard input")
    if [known.files_from, known.labels, *names].count("-") > 1:
        raise UserError('"-" stands in two places; standard input can be read once, name files')
    resolve_checkpoint(known.checkpoint, known.step)
    labels = common.read_class_names(known.labels)

    # From here on the heavy libraries are needed.
    common.configure_jax(FIELDS["compilation_cache"].default)
    from tqdm import tqdm

    from mixer_jax.data.decode import disable_opencv_threads
    from mixer_jax.data.image_files import expand_image_paths
    from mixer_jax.inference import load_pretrained

    # Images are prepared side by side.
    disable_opencv_threads()
    images = expand_image_paths(names)
    classifier = load_pretrained(
        known.checkpoint,
        step=known.step,
        image_size=known.image_size,
        class_names=labels,
        gelu=known.gelu,
        eval_crop=known.eval_crop,
        dtype=known.dtype,
    )
    common.warn_if_resized(classifier.model_info)
    size = min(known.batch_size, len(images))
    predictions = classifier.iter_predictions(
        images, topk=known.topk, batch_size=size, exif_orientation=not known.ignore_exif
    )
    num_bad = 0

    def reported() -> Iterator["Prediction"]:
        nonlocal num_bad
        bar = tqdm(
            predictions, total=len(images), unit="image", disable=len(images) < _MANY or None
        )
        for prediction in bar:
            if prediction.error:
                num_bad += 1
                tqdm.write(f"{prediction.image}: {prediction.error}", file=sys.stderr)
            yield prediction

    _WRITERS[known.format](reported())
    if num_bad:
        print(f"{num_bad:,} of {len(images):,} images cannot be used", file=sys.stderr)
    return 1 if num_bad else 0


def _write_table(predictions: Iterator["Prediction"]) -> None:
    """Prints, for people, every image and below it its classes."""
    for prediction in predictions:
        if prediction.error:
            continue
        print(prediction.image)
        for one in prediction.classes:
            print(f"  {one.probability:7.2%}  {one.name}", flush=True)


def _write_json(predictions: Iterator["Prediction"]) -> None:
    """Prints one JSON array, with an object a line."""
    before = "[\n"
    for prediction in predictions:
        told: dict[str, object] = {"image": prediction.image}
        if prediction.error:
            told["error"] = prediction.error
        else:
            told["classes"] = [one._asdict() for one in prediction.classes]
        print(before + json.dumps(told, ensure_ascii=False), end="", flush=True)
        before = ",\n"
    print("[]" if before == "[\n" else "\n]")


def _write_csv(predictions: Iterator["Prediction"]) -> None:
    """Prints CSV, a line for every class of an image, and one for an image that has none."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class_index", "name", "probability", "error"])
    for prediction in predictions:
        for rank, one in enumerate(prediction.classes, 1):
            writer.writerow(
                [prediction.image, rank, one.class_index, one.name, one.probability, ""]
            )
        if prediction.error:
            writer.writerow([prediction.image, "", "", "", "", prediction.error])


_WRITERS: dict[str, Callable[[Iterator["Prediction"]], None]] = {
    "table": _write_table,
    "json": _write_json,
    "csv": _write_csv,
}


if __name__ == "__main__":
    common.run_cli(main)
