"""Prepare or convert a dataset: `python -m mixer_jax.prepare NAME --data_dir=DIR`."""

import shlex
import sys
from collections.abc import Sequence

from mixer_jax.cli import common
from mixer_jax.data.names import PATH_PREFIXES
from mixer_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Prepares a dataset; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.prepare",
        description="Prepare a dataset in TFDS's array_record format, which has random access: "
        "download and write it, convert a dataset that TFDS has prepared in another format, or "
        "pack your own images, of any format that training reads, into few files.",
        epilog="An interrupted preparation is never mistaken for a complete one. Run the same "
        "command again to restart it.",
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="dataset of TFDS or mixer_jax, e.g. cifar10, imagenet2012:5.1.0, imagenet21k, where a "
        "label after an @ is ignored; or your own, e.g. folder:photos, with --name",
    )
    parser.add_argument(
        "--name", default="", help="name to give to your own dataset, e.g. my_photos"
    )
    parser.add_argument(
        "--data_dir", default="", help="directory of the TFDS datasets; default: TFDS's default"
    )
    parser.add_argument(
        "--manual_dir",
        default="",
        help="directory of manual downloads; default: DATA_DIR/downloads/manual",
    )
    args = parser.parse_args(argv)
    is_own = args.dataset.startswith(PATH_PREFIXES)
    if is_own and not args.name:
        raise UserError(
            f"--name must be set to convert {args.dataset!r}, e.g. --name=my_images. Training does "
            "not need the conversion."
        )
    if args.name and not is_own:
        raise UserError(
            f"--name must only be set for your own images, such as folder:PATH, got {args.name!r} "
            f"for {args.dataset!r}."
        )

    # Heavy libraries are imported only after the arguments are valid.
    common.configure_jax(compilation_cache="")
    from mixer_jax.data.preparation import format_splits
    from mixer_jax.data.tfds import prepare_tfds, resolve_data_dir

    if is_own:
        from mixer_jax.data.conversion import convert_dataset, format_counts

        conversion = convert_dataset(args.dataset, args.name, args.data_dir)
        for note in conversion.notes:
            print(note, file=sys.stderr)
        print(format_counts(conversion), end="\n\n")
        builder = conversion.builder
    else:
        builder, already_prepared = prepare_tfds(args.dataset, args.data_dir, args.manual_dir)
        if already_prepared:
            print(f"{builder.info.full_name} is already prepared")
    print(format_splits(builder))
    keys = {"name": args.name or args.dataset, "data_dir": resolve_data_dir(args.data_dir)}
    overrides = (f"--config.dataset.{key}={shlex.quote(value)}" for key, value in keys.items())
    print(f"use with     {' '.join(overrides)}")
    return 0


if __name__ == "__main__":
    common.run_cli(main)
