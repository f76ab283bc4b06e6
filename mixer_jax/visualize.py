"""Plot batches, runs, weights and saliency: `python -m mixer_jax.visualize COMMAND --out=…`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.config import parse, resolve_num_steps
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import FIELDS, RunConfig
from mixer_jax.errors import UserError
from mixer_jax.training.workdir import resolve_workdir

if TYPE_CHECKING:
    from mixer_jax.checkpoints.weights import PretrainedWeights
    from mixer_jax.data.source import Source

_SUFFIXES = (".png", ".pdf", ".jpg")
# A plot of more images fits neither a screen nor, perhaps, memory.
_MAX_IMAGES = 512
# Images that are plotted by default, of batches that have as many.
_NUM_IMAGES, _NUM_NOTEBOOK_IMAGES = 32, 16
# Value of --block for all blocks.
_ALL = "all"


def main(argv: Sequence[str]) -> int:
    """Plots what the arguments request; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.visualize",
        description="Plot training batches, runs, weights, and what predictions depend on.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_data_command(commands)
    _add_run_command(commands)
    _add_units_command(commands)
    _add_filters_command(commands)
    _add_saliency_command(commands)
    args, overrides = parser.parse_known_args(argv)
    # Only the config of `data` has keys to override.
    if overrides and args.command != "data":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if args.command == "run":
        return _write_run_page(args)
    common.check_out(args.out, _SUFFIXES)
    if args.command == "data":
        figure, lines = _plot_data(args, overrides)
    else:
        plot = {"units": _plot_units, "filters": _plot_filters, "saliency": _plot_saliency}
        figure, lines = plot[args.command](args)
    from mixer_jax.visualization.figures import render_figure

    common.write_out(args.out, render_figure(figure, args.out.suffix.lower().removeprefix(".")))
    for line in lines:
        print(line)
    return 0


class _Drawing(NamedTuple):
    """Figure, and the lines that are printed when it is written."""

    figure: Any
    lines: Sequence[str]


def _add_out_arg(parser: common.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help=f"a file: {' '.join(_SUFFIXES)}")


def _add_data_command(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="images and labels of a training step",
        description="Plot the first images of a training batch, cropped, augmented, mixed and "
        "labeled as the model sees them. Runs on the CPU and loads only these images.",
    )
    data.add_argument("--config", required=True, metavar="FILE[:ARG]", help="as for training")
    _add_out_arg(data)
    data.add_argument("--step", type=int, default=0, help="training step, from 0; default: 0")
    data.add_argument("--num_images", type=int, help=f"images to plot; default: {_NUM_IMAGES}")
    common.add_override_arg(data, "override a key, as for training")


def _plot_data(args: argparse.Namespace, overrides: Sequence[str]) -> _Drawing:
    config = parse(load_config_with_overrides(args.config, overrides))
    num_images = _resolve_num_images("--num_images", args.num_images, _NUM_IMAGES, config)

    # Arguments are valid: only now import JAX.
    common.configure_jax(config.compilation_cache, cpu_only=True)
    from mixer_jax.training.datasets import open_train_dataset

    source = open_train_dataset(config)
    common.print_notes(source)
    _check_step("--step", args.step, config, len(source))
    figure, (title, *_) = _draw_batch(args.config, config, source, args.step, num_images)
    return _Drawing(figure, [f"{args.out}: {title}"])


def _add_run_command(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="HTML page of training runs, also while they train",
        description="Write a page with the curves of training runs over each other, their metrics, "
        "throughput, configurations and differences, training images, bad images, hardware and "
        "versions, as one HTML file. Reads the workdirs only, also while training writes to them.",
    )
    run.add_argument(
        "--workdir",
        required=True,
        action="append",
        help="folder or gs:// URL of a run; repeat it to compare runs",
    )
    run.add_argument("--out", required=True, type=Path, help="a file: .html")


def _write_run_page(args: argparse.Namespace) -> int:
    common.check_out(args.out, (".html",))
    workdirs = [resolve_workdir(workdir) for workdir in args.workdir]

    # Imported here, once the arguments are valid: these are heavy.
    common.configure_jax("", cpu_only=True)
    from mixer_jax.visualization.run_page import load_examples, read_runs, render_run_page

    runs = read_runs(workdirs)
    page = render_run_page(runs, load_examples(runs))
    common.write_out(args.out, page)
    for run in runs:
        print(f"{args.out}: {run.name}, step {run.step:,}")
    return 0


def plot_batch(config: ConfigDict, step: int = 0, num_images: int | None = None) -> Any:
    """Plots the first images of a training batch, as a figure of Matplotlib.

    Images are cropped, augmented, mixed and labeled as the model sees them.

    Args:
        config: Config from `load_config` or `mixer_jax.config.get_default`.
        step: Training step, from 0.
        num_images: Images to plot, and to load; None: 16, or all if the batch is smaller.

    Raises:
        UserError: The config is invalid, data is missing, or an argument is out of range.
    """
    run = parse(config)
    num_images = _resolve_num_images("num_images", num_images, _NUM_NOTEBOOK_IMAGES, run)
    common.configure_jax(run.compilation_cache)
    from mixer_jax.training.datasets import open_train_dataset

    source = open_train_dataset(run)
    _check_step("step", step, run, len(source))
    return _draw_batch("training data", run, source, step, num_images).figure


def _draw_batch(
    name: str, config: RunConfig, source: "Source", step: int, num_images: int
) -> _Drawing:
    from mixer_jax.visualization.train_batch import (
        draw_train_batch,
        format_caption,
        load_train_batch,
    )

    batch = load_train_batch(config, source, step, num_images)
    caption = format_caption(name, config, source, step, batch)
    return _Drawing(draw_train_batch(batch, source.class_names, caption), caption)


def _resolve_num_images(name: str, num_images: int | None, default: int, config: RunConfig) -> int:
    """Returns the number of images to plot: by default, at most a batch."""
    max_images = min(config.batch_size, _MAX_IMAGES)
    if num_images is None:
        return min(default, max_images)
    if not 1 <= num_images <= max_images:
        raise UserError(
            f"{name} must be between 1 and {max_images} for a batch of {config.batch_size}, "
            f"got {num_images}."
        )
    return num_images


def _check_step(name: str, step: int, config: RunConfig, num_examples: int) -> None:
    num_steps = resolve_num_steps(config, num_examples)
    if not 0 <= step < num_steps:
        raise UserError(
            f"{name} must be between 0 and {num_steps - 1} in a run of {num_steps} steps, "
            f"got {step}."
        )


def _add_units_command(commands: Any) -> None:
    units = commands.add_parser(
        "units",
        help="hidden units of token mixing, as maps over the image",
        description="Plot the input weights of the hidden units of token-mixing MLPs over the "
        "image, next to the unit of opposite phase and sorted by frequency (the MLP-Mixer paper's "
        "Figures 5 and 6).",
    )
    _add_weights_args(units)
    units.add_argument(
        "--block",
        type=_parse_block,
        default=0,
        metavar=f"INDEX or {_ALL}",
        help="block, from 0; default: 0",
    )


def _add_filters_command(commands: Any) -> None:
    filters = commands.add_parser(
        "filters",
        help="filters of the first layer, in color",
        description="Plot the filters of the patch embedding or root convolution in color, sorted "
        "by frequency (the MLP-Mixer paper's Figure 7). Each is scaled by its largest weight; gray "
        "is zero.",
    )
    _add_weights_args(filters)
    filters.add_argument(
        "--gray",
        action="store_true",
        help="draw the mean over colors, the only part that acts on gray images",
    )


def _add_weights_args(parser: common.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help=common.CHECKPOINT_HELP
    )
    common.add_step_arg(parser)
    _add_out_arg(parser)


def _parse_block(text: str) -> int | None:
    if text == _ALL:
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an index from 0 or {_ALL}, got {text!r}.")
    return int(text)


def _load_weights(args: argparse.Namespace) -> "PretrainedWeights":
    resolve_checkpoint(args.checkpoint, args.step)
    common.configure_jax(FIELDS["compilation_cache"].default, cpu_only=True)
    from mixer_jax.checkpoints.load import load_checkpoint

    return load_checkpoint(args.checkpoint, step=args.step)


def _plot_units(args: argparse.Namespace) -> _Drawing:
    weights = _load_weights(args)
    from mixer_jax.visualization.units import (
        describe_units,
        draw_units,
        read_units,
        select_blocks,
        sort_units,
    )

    units = read_units(weights)
    blocks = select_blocks("--block", args.block, len(units))
    sorted_units = {block: sort_units(units[block]) for block in blocks}
    figure = draw_units(sorted_units, weights.model_info)
    name = weights.model_info.name
    texts = (f"block {block}: {describe_units(sorted_units[block])}" for block in blocks)
    return _Drawing(figure, [f"{args.out}: {name}", *texts])


def _plot_filters(args: argparse.Namespace) -> _Drawing:
    weights = _load_weights(args)
    from mixer_jax.visualization.units import (
        describe_filters,
        draw_filters,
        read_filters,
        sort_filters,
    )

    filters = sort_filters(read_filters(weights, args.gray))
    figure = draw_filters(filters, weights.model_info)
    return _Drawing(figure, [f"{args.out}: {weights.model_info.name}, {describe_filters(filters)}"])


def _add_saliency_command(commands: Any) -> None:
    saliency = commands.add_parser(
        "saliency",
        help="what a prediction depends on, over the image",
        description="Plot which pixels the log-odds of a class depend on, over the images as the "
        "model sees them. occlusion: how much the log-odds drop when a square with the image's "
        "mean color hides the pixel, as a mean over the positions of the square that cover it. "
        "gradient: absolute value of their gradient, the largest of red, green and blue.",
    )
    saliency.add_argument(
        "images", nargs="+", metavar="IMAGE", help='file, folder, pattern, or "-": standard input'
    )
    common.add_checkpoint_args(saliency)
    _add_out_arg(saliency)
    saliency.add_argument(
        "--class",
        dest="target",
        metavar="NAME or INDEX",
        help="class to explain; default: the prediction for each image",
    )
    saliency.add_argument(
        "--method",
        choices=("occlusion", "gradient"),
        default="occlusion",
        help="default: occlusion",
    )
    saliency.add_argument(
        "--square_size",
        type=int,
        metavar="PIXELS",
        help="side of the square of occlusion; default: a seventh of the image's shorter side",
    )
    saliency.add_argument(
        "--stride",
        type=int,
        metavar="PIXELS",
        help="step between positions of the square; default: half of its side",
    )
    saliency.add_argument("--labels", metavar="FILE", help="names of the classes, one per line")
    saliency.add_argument(
        "--batch_size", type=int, default=32, help="images per batch; default: 32"
    )


def _plot_saliency(args: argparse.Namespace) -> _Drawing:
    common.check_positive(args, "batch_size")
    resolve_checkpoint(args.checkpoint, args.step)
    class_names = common.read_class_names(args.labels)

    # Arguments are valid: only now import JAX.
    common.configure_jax(FIELDS["compilation_cache"].default)
    from mixer_jax.data.decode import BadImageError, disable_opencv_threads
    from mixer_jax.data.image_files import expand_image_paths
    from mixer_jax.distributed.multihost import check_devices
    from mixer_jax.inference import load_pretrained
    from mixer_jax.visualization.saliency import (
        check_num_images,
        describe_saliency,
        plot_saliency,
    )

    check_devices()
    disable_opencv_threads()
    images = expand_image_paths(args.images)
    check_num_images(len(images))
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
    try:
        saliencies = list(
            classifier.iter_saliency(
                images,
                args.target,
                args.method,
                square_size=args.square_size,
                stride=args.stride,
                batch_size=args.batch_size,
                exif_orientation=True,
            )
        )
    except BadImageError as error:
        raise UserError(f"images must be readable, got {error}.") from error
    title = f"{args.out}: {classifier.model_info.name}, {args.method}"
    lines = (describe_saliency(saliency) for saliency in saliencies)
    return _Drawing(plot_saliency(saliencies), [title, *lines])


if __name__ == "__main__":
    common.run_cli(main)
