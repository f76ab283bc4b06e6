"""Plot training batches and pages of runs: `python -m mixer_jax.visualize COMMAND --out=…`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.cli import common
from mixer_jax.config.config import parse, resolve_num_steps
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError
from mixer_jax.training.workdir import resolve_workdir

if TYPE_CHECKING:
    from mixer_jax.data.source import Source

_SUFFIXES = (".png", ".pdf", ".jpg")
# A plot of more images fits neither a screen nor, perhaps, memory.
_MAX_IMAGES = 512
# Images that are plotted by default, of batches that have as many.
_NUM_IMAGES, _NUM_NOTEBOOK_IMAGES = 32, 16


def main(argv: Sequence[str]) -> int:
    """Plots what the arguments request; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.visualize",
        description="Plot training batches, and make pages of training runs.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data = commands.add_parser(
        "data",
        help="images and labels of a training step",
        description="Plot the first images of a training batch, cropped, augmented, mixed and "
        "labeled as the model sees them. Runs on the CPU and loads only these images.",
    )
    data.add_argument("--config", required=True, metavar="FILE[:ARG]", help="as for training")
    data.add_argument("--out", required=True, type=Path, help=f"a file: {' '.join(_SUFFIXES)}")
    data.add_argument("--step", type=int, default=0, help="training step, from 0; default: 0")
    data.add_argument("--num_images", type=int, help=f"images to plot; default: {_NUM_IMAGES}")
    common.add_override_arg(data, "override a key, as for training")
    _add_run_command(commands)
    args, overrides = parser.parse_known_args(argv)
    if args.command == "run":
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        return _write_run_page(args)
    common.check_out(args.out, _SUFFIXES)
    config = parse(load_config_with_overrides(args.config, overrides))
    num_images = _resolve_num_images("--num_images", args.num_images, _NUM_IMAGES, config)

    # Arguments are valid: only now import JAX.
    common.configure_jax(config.compilation_cache, cpu_only=True)
    from mixer_jax.training.datasets import open_train_dataset
    from mixer_jax.visualization.figures import render_figure

    source = open_train_dataset(config)
    common.print_notes(source)
    _check_step("--step", args.step, config, len(source))
    figure, title = _draw_batch(args.config, config, source, args.step, num_images)
    plot = render_figure(figure, args.out.suffix.lower().removeprefix("."))
    common.write_out(args.out, plot)
    print(f"{args.out}: {title}")
    return 0


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


class _Drawing(NamedTuple):
    figure: Any
    title: str


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
    return _Drawing(draw_train_batch(batch, source.class_names, caption), caption[0])


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


if __name__ == "__main__":
    common.run_cli(main)
