"""Commands of the documentation, parsed by the programs that they start, and shortened to run."""

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import benchmark
from mixer_jax.__main__ import COMMANDS
from mixer_jax.cli import common
from mixer_jax.config.config import flatten
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import get_field
from mixer_jax.errors import UserError
from tests.helpers import launch_scripts

ROOT = Path(__file__).parents[2]
_MODULES = {name: module for name, module, _ in COMMANDS}
# Programs whose arguments are not checked, except for the files of this project in them.
_OTHER_PROGRAMS = frozenset(
    [
        "cat",
        "cd",
        "cp",
        "curl",
        "docker",
        "du",
        "echo",
        "export",
        "find",
        "gcloud",
        "git",
        "hf",
        "head",
        "jupyter",
        "jupytext",
        "kubectl",
        "less",
        "ls",
        "mkdir",
        "mkdocs",
        "mv",
        "mypy",
        "nvidia-smi",
        "pre-commit",
        "pytest",
        "rm",
        "ruff",
        "source",
        "ssh-add",
        "tail",
        "tar",
        "tensorboard",
        "tmux",
        "tree",
        "unzip",
        "wandb",
        "wc",
        "wget",
    ]
)
_FILES = re.compile(
    r"(?<![\w/.-])((?:configs|docs|launch|tests|requirements)[\w./-]*\.(?:md|py|sbatch|sh|txt|yaml))\b"
)
# Sizes of a training run that takes seconds.
_SHORT_RUN: dict[str, Any] = {
    "num_steps": 4,
    "batch_size": 16,
    "eval_batch_size": 128,
    "optimizer.warmup_steps": 1,
    "log_every_steps": 1,
    "checkpoint.every_steps": 0,
}
# Sizes of a model that compiles in seconds, unless the run takes the model of a checkpoint.
_SMALL_MODEL: dict[str, Any] = {
    "image_size": 32,
    "model.variant": "custom",
    "model.num_blocks": 1,
    "model.hidden_dim": 16,
    "model.tokens_mlp_dim": 8,
    "model.channels_mlp_dim": 16,
    "model.patch_size": 8,
    "model.stochastic_depth": 0.0,
    "model.dropout": 0.0,
    "preprocess.max_shift": 1,
    "recipe.mixup": 0.0,
    "recipe.ema_decay": 0.0,
}


class _ValidError(Exception):
    """Raised by a command whose arguments are valid."""


def split_command(line: str) -> list[list[str]]:
    """Splits a line into the simple commands of its list or pipeline, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if word and set(word) <= set(";|&"):
            commands.append([])
        elif word and set(word) <= set("<>&"):
            skip = True
        elif not skip:
            commands[-1].append(word)
        else:
            skip = False
    return [command for command in commands if command]


def mixer_arguments(words: Sequence[str]) -> list[str] | None:
    """Returns a module of mixer_jax and its arguments if a command starts one, else None."""
    words = without_variables(words)
    program = Path(words[0]).name if words else ""
    arguments = list(words[1:])
    if re.fullmatch(r"python[\d.]*", program) and arguments[:1] == ["-m"]:
        module, *arguments = arguments[1:]
        if module.startswith("mixer_jax."):
            return [module.removeprefix("mixer_jax."), *arguments]
        program = "mixer-jax" if module == "mixer_jax" else ""
    if program != "mixer-jax":
        return None
    if arguments and arguments[0] in _MODULES:
        return [_MODULES[arguments[0]], *arguments[1:]]
    return ["__main__", *arguments]


def without_variables(words: Sequence[str]) -> list[str]:
    """Returns a command without the environment variables that it sets first."""
    rest = list(words)
    while rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
        rest.pop(0)
    return rest


def check_command(words: Sequence[str]) -> None:
    """Checks a command in the current directory, without running it.

    Raises:
        UserError: A command of mixer_jax does not accept its arguments.
        AssertionError: Another program, or a file, does not exist.
    """
    arguments = mixer_arguments(words)
    if arguments is not None:
        check_mixer_command(arguments)
        return
    words = without_variables(words)
    if not words:
        return
    program, rest = Path(words[0]).name, words[1:]
    for file in _FILES.findall(" ".join(words)):
        assert (ROOT / file).exists() or Path(file).exists(), f"{file} does not exist"
    if re.fullmatch(r"python[\d.]*", program) and rest[:1] == ["-m"]:
        if rest[1] != "pip":
            assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
            return
        program, rest = "pip", rest[2:]
    if program == "pip":
        _check_pip(rest)
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, check=True)
    elif words[0].startswith("launch/"):
        _check_launch_script(program, rest)
    elif program == "sbatch":
        index = rest.index("launch/slurm.sbatch")
        check_mixer_command(["main", *rest[index + 1 :]])
    elif re.fullmatch(r"python[\d.]*", program):
        assert rest[0].startswith("-") or (ROOT / rest[0]).exists() or Path(rest[0]).exists(), (
            f"{rest[0]} does not exist"
        )
    else:
        known = program in _OTHER_PROGRAMS
        assert known, f"unknown program {program}; is this block output? Mark it as text."


def check_mixer_command(arguments: Sequence[str]) -> None:
    """Lets a command of mixer_jax check its arguments, up to where it would start its work.

    Raises:
        UserError: The command does not accept them.
    """
    name, *rest = arguments
    assert name == "__main__" or name in _MODULES.values(), f"mixer_jax.{name} is not a command"
    module = importlib.import_module(f"mixer_jax.{name}")
    run = module._list_commands if name == "__main__" else module.main
    if name == "main":
        # The workdir of the documentation is not locked.
        rest.append("--workdir=unused")
    with _stop_when_valid(), contextlib.redirect_stdout(io.StringIO()):
        try:
            run(rest)
        except _ValidError:
            pass
        except SystemExit as end:
            # --help ends a command. Anything else is a bug.
            if end.code:
                raise


@contextlib.contextmanager
def _stop_when_valid() -> Iterator[None]:
    """Makes commands raise _ValidError at the end of their checks; checkpoints need not exist."""

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise _ValidError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "configure_jax", stop)
        for name in _MODULES.values():
            module = importlib.import_module(f"mixer_jax.{name}")
            if hasattr(module, "resolve_checkpoint"):
                patch.setattr(module, "resolve_checkpoint", lambda *_args: None)
        for name in set(benchmark.MODES.values()):
            mode = importlib.import_module(f"mixer_jax.benchmarks.{name}")
            patch.setattr(mode, "measure", stop)
        yield


def _check_pip(words: Sequence[str]) -> None:
    """Checks the extras and requirements files that pip installs."""
    assert words[0] == "install", words
    extras = _setup_extras()
    for option, word in itertools.pairwise(words):
        if option in ("-r", "--requirement", "-c", "--constraint"):
            assert (ROOT / word).exists(), f"{word} does not exist"
        match = re.fullmatch(r"(?:\.|mixer[-_]jax\S*?)\[([\w,-]+)\](?: @ .*)?", word)
        for extra in match.group(1).split(",") if match else ():
            assert extra in extras, f"no extra {extra}"


def _setup_extras() -> set[str]:
    """Returns the names of the extras in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key}
    raise AssertionError("setup.py must have extras_require")


def _check_launch_script(script: str, words: Sequence[str]) -> None:
    """Checks the arguments of a script, and those that it passes to training."""
    words = list(words)
    assert (ROOT / "launch" / script).exists(), f"launch/{script} does not exist"
    env: dict[str, str] = {}
    training: list[str] = []
    if script == "tpu_vm.sh":
        position = words.index("--") if "--" in words else len(words)
        training = words[position + 1 :]
        words.insert(position, "--dry_run")
    elif script == "local_multiprocess.sh":
        own = ("--devices", "--grace")
        training = [word for word in words[1:] if word.partition("=")[0] not in own]
        # `true` stands in for Python: the arguments are accepted if it is started.
        env["PYTHON"] = "true"
    elif script == "setup_host.sh":
        words.append("--dry_run")
    else:
        assert script == "on_host.sh", script
        actions = {"start", "follow", "result", "stop"}
        assert words[0] in actions, words
        training, words = (words[1:] if words[0] == "start" else []), []
    if words:
        with contextlib.chdir(ROOT):
            result = launch_scripts.run(script, *words, **env)
        assert result.returncode == 0, result.stderr
    if training:
        check_mixer_command(["main", *training])


def check_python(code: str) -> None:
    """Checks that Python code compiles, and that what it names of mixer_jax exists."""
    compile(code, "<documentation>", "exec")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mixer_jax"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                exists = hasattr(module, alias.name) or importlib.util.find_spec(
                    f"{node.module}.{alias.name}"
                )
                assert exists, ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mixer_jax"):
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mixer_jax":
            assert hasattr(importlib.import_module("mixer_jax"), node.attr), ast.unparse(node)


def check_names(text: str) -> None:
    """Checks names in the prose of a page: commands, config keys on command lines, and files."""
    for name in re.findall(r"python -m mixer_jax\.(\w+)", text):
        assert name in {*_MODULES.values(), "NAME", "COMMAND"}, f"mixer_jax.{name}"
    for name in re.findall(r"`mixer-jax (\w+)", text):
        assert name in {*_MODULES, "NAME", "COMMAND"}, f"mixer-jax {name}"
    for key in re.findall(r"--(?:no)?config\.([a-z][\w.]*\w)", text):
        assert get_field(key), f"config key {key}"
    for file in re.findall(r"(?<![\w/.-])(?:configs|launch)/[\w./-]+\.(?:py|sh|sbatch|yaml)", text):
        assert (ROOT / file).exists(), f"{file} does not exist"


def shorten(words: Sequence[str], extra: Sequence[str] = ()) -> list[str]:
    """Returns a command of mixer_jax that takes seconds, as arguments of Python."""
    arguments = mixer_arguments(words)
    assert arguments is not None, words
    name, *rest = arguments
    if name == "main" and "--help" not in rest:
        rest += _short_run(rest)
    elif name == "transfer" and not {"--report", "--dry_run", "--help"} & {*rest}:
        rest.append("--no_throughput")
    elif name == "benchmark" and "--help" not in rest:
        rest += _short_benchmark(rest)
    elif name == "compare" and "--help" not in rest:
        rest += ["--no_throughput", "--config.num_steps=2", "--config.optimizer.warmup_steps=1"]
    module = "mixer_jax" if name == "__main__" else f"mixer_jax.{name}"
    return ["python", "-m", module, *rest, *extra]


def _short_run(arguments: Sequence[str]) -> list[str]:
    spec = next(word for word in arguments if word.startswith("--config=")).partition("=")[2]
    overrides = [word for word in arguments if word.startswith(("--config.", "--noconfig."))]
    try:
        config = flatten(load_config_with_overrides(spec, overrides))
    except UserError:
        # The page shows a command that is refused.
        return []
    changes = dict(_SHORT_RUN)
    if config["model.variant"] != "init_from":
        changes |= _SMALL_MODEL
    if any(word.startswith("--config.image_size=") for word in arguments):
        changes.pop("image_size", None)
    return [f"--config.{key}={value}" for key, value in changes.items()]


def _short_benchmark(arguments: Sequence[str]) -> list[str]:
    mode = next((word for word in arguments if word.startswith("--mode=")), "--mode=train")
    if mode == "--mode=input":
        return ["--image_size=32", "--rounds=1", "--images_per_round=128", "--no_baselines"]
    if mode in ("--mode=weights", "--mode=checkpoints"):
        return ["--model=S/32", "--rounds=1"]
    if mode == "--mode=hbm_traffic":
        # Compiling for TPUs is tested elsewhere.
        return ["--help"]
    sizes = ["--model=S/32", "--image_size=64", "--batch_size=1", "--scan_unroll=1"]
    return [*sizes, "--baselines=none", "--rounds=1"]
