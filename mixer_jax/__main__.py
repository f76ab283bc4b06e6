"""All commands: `mixer-jax NAME …`, or `python -m mixer_jax NAME …`, runs one of them.

`mixer-jax NAME` is `python -m mixer_jax.NAME`, and `mixer-jax train` is `python -m mixer_jax.main`.
"""

import runpy
import sys
from collections.abc import Sequence

from mixer_jax.errors import UserError, suggest

# Name, module in this package, and description of each command.
COMMANDS = (
    ("train", "main", "train or fine-tune a model from a config file"),
    ("evaluate", "evaluate", "evaluate a checkpoint on every example of a split"),
    ("predict", "predict", "classify image files"),
    ("extract", "extract", "write features of images to a file"),
    ("transfer", "transfer", "evaluate a checkpoint by transfer to a suite of tasks"),
    ("compare", "compare", "compare models in accuracy, throughput and training cost"),
    ("convert", "convert", "convert weights between formats"),
    ("prepare", "prepare", "prepare or convert a dataset"),
    ("visualize", "visualize", "plot batches, runs, weights, and what predictions depend on"),
    ("plan", "plan", "predict memory and time of a run on accelerators that are not attached"),
    ("benchmark", "benchmark", "measure speed and memory on this machine"),
)


def main() -> None:
    """Runs the command that the first argument names, with the remaining arguments."""
    modules = {name: module for name, module, _ in COMMANDS}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in modules:
        del sys.argv[1]
        runpy.run_module(f"mixer_jax.{modules[name]}", run_name="__main__", alter_sys=True)
        return
    from mixer_jax.cli.common import run_cli

    run_cli(_list_commands)


def _list_commands(argv: Sequence[str]) -> int:
    """Prints the commands, or versions of libraries; returns the exit code."""
    name = argv[0] if argv else "--help"
    if name == "--version":
        from mixer_jax.cli.versions import describe_environment

        for line in describe_environment():
            print(line, flush=True)
        return 0
    if name not in ("-h", "--help"):
        names = [name for name, _, _ in COMMANDS]
        # The command of a module that is named differently.
        modules = {module: name for name, module, _ in COMMANDS}
        hint = f" Did you mean {modules[name]}?" if name in modules else suggest(name, names)
        raise UserError(f"command must be one of {', '.join(names)}, got {name!r}.{hint}")
    print("usage: mixer-jax COMMAND [ARGUMENT …]\n\nMLP-Mixer, ViT and BiT in JAX and Flax.\n")
    print("commands:")
    for name, _, description in COMMANDS:
        print(f"  {name:<11} {description}")
    print("\nmixer-jax COMMAND --help lists the arguments of a command.")
    print("mixer-jax --version prints the versions of libraries, for reports of problems.")
    print("python -m mixer_jax COMMAND is the same as mixer-jax COMMAND.")
    return 0


if __name__ == "__main__":
    main()
