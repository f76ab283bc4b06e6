"""Classify image files: `python -m mixer_jax.predict --checkpoint=WEIGHTS photo.jpg folder/`."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError

if TYPE_CHECKING:
    from mixer_jax.inference import Prediction

# Number of images from which on a progress bar is shown.
_MIN_FOR_PROGRESS = 32
_HTML = "html"
# Images on a page, which then has about 8 MB.
_MAX_HTML_IMAGES = 1_000


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 if any image is unreadable."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.predict",
        description="Classify images. Exits with code 1 if any image is unreadable.",
    )
    common.add_checkpoint_args(parser)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help='file, folder, pattern, or "-": standard input'
    )
    parser.add_argument(
        "--files_from", metavar="FILE", help='more images, one per line; "-": standard input'
    )
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one per line")
    parser.add_argument("--topk", type=int, default=5, help="classes per image; default: 5")
    parser.add_argument(
        "--ignore_exif",
        action="store_true",
        help="use images as they are stored; default: rotate them by their EXIF orientation",
    )
    parser.add_argument(
        "--format", choices=(*_WRITERS, _HTML), default="table", help="output format"
    )
    parser.add_argument("--out", type=Path, help="file of --format=html, which ends in .html")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch; default: 32")
    args = parser.parse_args(argv)
    common.check_positive(args, "topk", "batch_size")
    if args.format == _HTML and args.out is None:
        raise UserError("--format=html must have a file. Name it by --out=FILE.html.")
    if args.format != _HTML and args.out is not None:
        raise UserError(f"--out must be used with --format=html, got --format={args.format}.")
    names = [*args.images]
    if args.files_from:
        names += common.read_path_list(args.files_from, "--files_from")
    if not names:
        raise UserError("IMAGE is required. Name files, folders, patterns, or - (standard input).")
    if [args.files_from, args.labels, *names].count("-") > 1:
        raise UserError('"-" must occur only once, because standard input can be read only once.')
    if args.out is not None:
        common.check_out(args.out, (".html",))
    resolve_checkpoint(args.checkpoint, args.step)
    class_names = common.read_class_names(args.labels)

    # Imported here, once the arguments are valid: these are heavy.
    common.configure_jax(FIELDS["compilation_cache"].default)
    from tqdm import tqdm

    from mixer_jax.data.decode import disable_opencv_threads
    from mixer_jax.data.image_files import expand_image_paths
    from mixer_jax.distributed.multihost import check_devices
    from mixer_jax.inference import load_pretrained

    check_devices()
    # Images are already loaded in parallel.
    disable_opencv_threads()
    images = expand_image_paths(names)
    classifier = load_pretrained(
        args.checkpoint,
        step=args.step,
        image_size=args.image_size,
        class_names=class_names,
        gelu=args.gelu,
        eval_crop=args.eval_crop,
        eval_crop_fraction=args.eval_crop_fraction,
        dtype=args.dtype,
    )
    common.warn_if_resized(classifier.model_info)
    num_found = len(images)
    if args.format == _HTML:
        from mixer_jax.visualization.prediction_page import Thumbnails, render_prediction_page

        if num_found > _MAX_HTML_IMAGES:
            print(
                f"--format=html classifies the first {_MAX_HTML_IMAGES:,} of {num_found:,} images. "
                "--format=csv classifies all.",
                file=sys.stderr,
            )
        thumbnails = Thumbnails(images[:_MAX_HTML_IMAGES], not args.ignore_exif)
        images = thumbnails.images
    predictions = classifier.iter_predictions(
        images,
        topk=args.topk,
        batch_size=min(args.batch_size, len(images)),
        exif_orientation=not args.ignore_exif,
    )
    num_bad = 0

    def with_progress() -> Iterator["Prediction"]:
        nonlocal num_bad
        # None shows the bar on terminals only.
        disable = len(images) < _MIN_FOR_PROGRESS or None
        for prediction in tqdm(predictions, total=len(images), unit="image", disable=disable):
            if prediction.error:
                num_bad += 1
                tqdm.write(f"{prediction.image}: {prediction.error}", file=sys.stderr)
            yield prediction

    if args.format == _HTML:
        page = render_prediction_page(
            [*with_progress()],
            thumbnails,
            model=classifier.model_info.name,
            checkpoint=args.checkpoint,
            num_found=num_found,
        )
        common.write_out(args.out, page)
        print(f"{args.out}: {len(images):,} images")
    else:
        _WRITERS[args.format](with_progress())
    if num_bad:
        print(f"{num_bad:,} of {len(images):,} images are unreadable", file=sys.stderr)
    return 1 if num_bad else 0


def _write_table(predictions: Iterator["Prediction"]) -> None:
    """Prints each image and its classes below it."""
    for prediction in predictions:
        if prediction.error:
            continue
        print(prediction.image)
        for entry in prediction.classes:
            words = f"  {entry.description}" if entry.description else ""
            print(f"  {entry.probability:7.2%}  {entry.name}{words}", flush=True)


def _write_json(predictions: Iterator["Prediction"]) -> None:
    """Prints one JSON array, with one object per line."""
    separator = "[\n"
    for prediction in predictions:
        entry: dict[str, object] = {"image": prediction.image}
        if prediction.error:
            entry["error"] = prediction.error
        else:
            entry["classes"] = [probability._asdict() for probability in prediction.classes]
        print(separator + json.dumps(entry, ensure_ascii=False), end="", flush=True)
        separator = ",\n"
    print("[]" if separator == "[\n" else "\n]")


def _write_csv(predictions: Iterator["Prediction"]) -> None:
    """Prints CSV with one line per predicted class, and one per unreadable image."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = ["class_index", "name", "probability", "description"]
    writer.writerow(["image", "rank", *columns, "error"])
    for prediction in predictions:
        for rank, entry in enumerate(prediction.classes, 1):
            writer.writerow([prediction.image, rank, *entry, ""])
        if prediction.error:
            writer.writerow([prediction.image, "", *[""] * len(columns), prediction.error])


_WRITERS: dict[str, Callable[[Iterator["Prediction"]], None]] = {
    "table": _write_table,
    "json": _write_json,
    "csv": _write_csv,
}


if __name__ == "__main__":
    common.run_cli(main)
