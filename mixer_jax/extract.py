"""Write features of images to a file: `python -m mixer_jax.extract --checkpoint=… --dataset=…`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError
from mixer_jax.models.family import PRE_LOGITS, check_layers

if TYPE_CHECKING:
    from mixer_jax.checkpoints.weights import PretrainedWeights
    from mixer_jax.data.source import Source

_SUFFIXES = (".npz", ".parquet")


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 if any image file is unreadable."""
    args = _parse_args(argv)
    resolve_checkpoint(args.checkpoint, args.step)

    # JAX is imported only after the arguments are valid.
    common.configure_jax(FIELDS["compilation_cache"].default)
    import jax

    from mixer_jax.checkpoints.load import load_checkpoint
    from mixer_jax.distributed.multihost import check_devices

    check_devices()
    if jax.process_count() > 1:
        raise UserError(
            "mixer_jax.extract must run on one host, got a process that has joined "
            f"{jax.process_count():,}. Run it on one of them."
        )
    weights = load_checkpoint(
        args.checkpoint,
        step=args.step,
        image_size=args.image_size,
        gelu=args.gelu,
        eval_crop=args.eval_crop,
        eval_crop_fraction=args.eval_crop_fraction,
    )
    common.warn_if_resized(weights.model_info)
    if args.list_layers:
        _print_layers(weights)
        return 0
    check_layers(args.layers, weights.model_info.layers())
    return _extract(weights, _open_source(weights, args), args)


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.extract",
        description="Write features or other activations of images to a file, with names and "
        "labels. Rerun the same command to resume after a stop or kill. Exits with code 1 if any "
        "image file is unreadable.",
    )
    common.add_checkpoint_args(parser)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file, folder or pattern")
    parser.add_argument("--files_from", metavar="FILE", help="more images, one per line")
    parser.add_argument("--dataset", help=f"{common.DATASET_HELP}; instead of images")
    parser.add_argument("--split", default="test", help="split in TFDS syntax; default: test")
    parser.add_argument(
        "--data_dir",
        default="",
        help="TFDS data directory; default: that of the training run, or TFDS's own",
    )
    parser.add_argument(
        "--layers",
        type=lambda text: tuple(dict.fromkeys(text.split(","))),
        default=(PRE_LOGITS,),
        metavar="NAME,…",
        help=f"activations, e.g. {PRE_LOGITS},blocks.5; default: {PRE_LOGITS}, the input of the "
        "head",
    )
    parser.add_argument(
        "--list_layers", action="store_true", help="print the names of all layers, and exit"
    )
    parser.add_argument(
        "--pool",
        choices=("none", "mean"),
        default="none",
        help="mean: average over tokens or positions; default: none",
    )
    parser.add_argument("--out", help=f"output file: {' or '.join(_SUFFIXES)}")
    parser.add_argument("--batch_size", type=int, default=256, help="batch size; default: 256")
    parser.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="skip and count unusable images of --dataset instead of failing",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing file, and discard the parts of an unfinished other request",
    )
    args = parser.parse_args(argv)
    common.check_positive(args, "batch_size")
    if args.list_layers:
        return args
    if args.files_from:
        args.images += common.read_path_list(args.files_from, "--files_from")
    if bool(args.dataset) == bool(args.images):
        raise UserError("Pass either --dataset or IMAGE. See --help.")
    if "-" in args.images:
        raise UserError("IMAGE must be a file, a folder or a pattern, got -.")
    if not args.out:
        raise UserError("--out is required. See --help.")
    if "://" in args.out or not args.out.endswith(_SUFFIXES):
        raise UserError(f"--out must be a local file, {' or '.join(_SUFFIXES)}, got {args.out}.")
    args.out = Path(args.out)
    _check_out(args.out, args.force)
    return args


def _check_out(out: Path, force: bool) -> None:
    """Raises UserError if the output could not be written, before any work is done."""
    if out.is_dir():
        raise UserError(f"--out must be a file, got the folder {out}.")
    if out.exists() and not force:
        raise UserError(f"--out={out} exists. Name another file, or pass --force.")
    common.check_parent_writable(f"--out={out}", out.parent)


def _open_source(weights: "PretrainedWeights", args: argparse.Namespace) -> "Source":
    from mixer_jax.data.image_files import expand_image_paths, image_source
    from mixer_jax.data.registry import open_dataset

    if args.images:
        return image_source(expand_image_paths(args.images))
    trained_in = (weights.train_config or {}).get("dataset", {}).get("data_dir", "")
    source = open_dataset(args.dataset, args.split, args.data_dir or trained_in)
    common.print_notes(source)
    return source


def _print_layers(weights: "PretrainedWeights") -> None:
    layers = weights.model_info.layers()
    width = max(map(len, layers))
    for name, (shape, description) in layers.items():
        print(f"{name:<{width}}  {' × '.join(map(str, shape)):<14}  {description}")


def _extract(weights: "PretrainedWeights", source: "Source", args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
    from mixer_jax.evaluation.checkpoint import make_input_config
    from mixer_jax.evaluation.extraction import Extraction, extract_to_file

    mesh = make_mesh(data=0, fsdp=1)
    model = weights.model_info.build_model(args.dtype)
    params = shard_inference_params(weights.params, model, mesh)
    input_config = make_input_config(weights, args.batch_size, args.skip_bad_images)
    if args.images:
        # As in `predict`: photographs are rotated, and unreadable ones do not stop the others.
        input_config = input_config._replace(exif_orientation=True, skip_bad=True)
    extraction = Extraction(weights, model, source, args.layers, args.pool == "mean")
    # None shows the bar on terminals only.
    with tqdm(total=len(source), unit="image", disable=None) as bar:
        result = extract_to_file(
            extraction,
            params,
            mesh,
            input_config,
            args.out,
            force=args.force,
            on_progress=bar.update,
        )
    for name, reason in result.bad_images:
        print(f"{name}: {reason}", file=sys.stderr)
    num_bad = len(result.bad_images)
    if num_bad and args.images:
        print(f"{num_bad:,} of {len(source):,} images are unreadable", file=sys.stderr)
    print(f"model     {weights.model_info.name}, {model.execution.dtype}")
    print(f"data      {source.name}")
    if result.num_resumed:
        print(f"resumed   after {result.num_resumed:,} images")
    skipped = f", {num_bad:,} unusable skipped" if num_bad else ""
    print(f"images    {result.num_images:,}{skipped}")
    for name, shape in extraction.shapes().items():
        print(f"layer     {name}, {' × '.join(map(str, shape))}")
    print(f"written   {args.out}, {args.out.stat().st_size / 1e6:,.1f} MB")
    return 1 if num_bad and args.images else 0


if __name__ == "__main__":
    common.run_cli(main)
