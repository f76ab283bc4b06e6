"""Lowered StableHLO programs as text files, to prove that a refactoring keeps them identical.

    python -m tests.lowered_programs write /tmp/old      # in the tree before the change
    python -m tests.lowered_programs write /tmp/new      # in the tree after it
    python -m tests.lowered_programs compare /tmp/old /tmp/new

`write` lowers training, evaluation and prediction for CPUs, TPUs (ahead of time) and CUDA GPUs. It
compiles nothing and needs no accelerator. `compare` exits with 0 if all programs are identical and
with 1 if not.

A file is named {cpu|tpu_v5e|tpu_v6e|cuda}_{tiny|s16}_{train|eval|predict}_{variant}.mlir and holds
the version of JAX, the options of the XLA compiler, the module, and the decoded code of each custom
kernel. Names and source locations do not count, so that a refactoring may rename and move code:

- Locations are left out, also those in the bytecode of custom kernels.
- Functions are numbered in the order of their definitions: @f0, @f1, … Modules are called @module,
  and the names of kernels are left out.
- The paths of results in their tree (`jax.result_info`) are left out; their order counts.

Everything else counts: operations and their order, functions and their calls, constants, shapes,
layouts, shardings, donation, and the block sizes and cost estimates of kernels. A program that
cannot be lowered becomes a .txt file with the reason.
"""

import argparse
import base64
import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib import triton
from jax.experimental.mosaic.dialects import tpu
from jax.interpreters import mlir
from jaxlib.mlir import ir, passmanager

Settings = dict[str, Any]


class Call(NamedTuple):
    """A jitted function, and its arguments or their shapes."""

    function: Any
    args: tuple[Any, ...]


# The interface to mixer_jax: only this section changes when modules, functions or keys are renamed.

CONFIG_KEYS = {
    "variant": "model.variant",
    "num_blocks": "model.num_blocks",
    "patch_size": "model.patch_size",
    "hidden_dim": "model.hidden_dim",
    "tokens_mlp_dim": "model.tokens_mlp_dim",
    "channels_mlp_dim": "model.channels_mlp_dim",
    "gelu": "model.gelu",
    "stochastic_depth": "model.stochastic_depth",
    "dropout": "model.dropout",
    "dtype": "model.dtype",
    "scan_unroll": "model.scan_unroll",
    "remat": "model.remat",
    "backend": "model.backend",
    "image_size": "image_size",
    "num_classes": "dataset.num_classes",
    "batch_size": "batch_size",
    "loss": "recipe.loss",
    "label_smoothing": "recipe.label_smoothing",
    "mixup": "recipe.mixup",
    "grad_accum_steps": "recipe.grad_accum_steps",
    "ema_decay": "recipe.ema_decay",
    "optimizer": "optimizer.name",
    "warmup_steps": "optimizer.warmup_steps",
    "decay_type": "optimizer.decay_type",
    "weight_decay": "optimizer.weight_decay",
    "clip_norm": "optimizer.clip_norm",
    "fsdp": "mesh.fsdp",
}


@functools.cache
def tpu_devices(topology: str) -> list[Any]:
    """Returns TPU devices of the ahead-of-time compiler."""
    from mixer_jax.distributed import hardware
    from mixer_jax.planning import topology as topologies

    hardware.silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.tpu_devices(topologies.parse_topology(topology))


def build_run(settings: Settings, platform: str, devices: Sequence[Any]) -> Any:
    """Builds mesh, model, optimizer and step functions from a configuration."""
    from mixer_jax import config as configuration
    from mixer_jax.planning.aot_compile import build_for_topology
    from mixer_jax.planning.run_spec import resolve_for_platform

    config = configuration.get_default()
    config.dataset.name, config.dataset.num_examples, config.num_steps = "synthetic", 1000, 100
    config.update_from_flattened_dict({CONFIG_KEYS[key]: v for key, v in settings.items()})
    run_config = resolve_for_platform(configuration.parse(config), platform)
    return build_for_topology(run_config, devices)


def train_calls(run: Any) -> dict[str, Call]:
    """Returns the functions of training."""
    params = run.state_shape.params
    batch = {
        "image": batch_shape(run, (*run.model_info.image_size, 3), jnp.uint8),
        "label": batch_shape(run, (), jnp.int32),
    }
    return {
        "step": Call(run.train_step, (run.state_shape, batch, run.hyperparams)),
        "init": Call(run.create_state.func, run.create_state.args),
        "update_norm": Call(run.update_norm, (params, params)),
        "param_norm": Call(run.param_norm, (params,)),
    }


def eval_calls(run: Any) -> dict[str, Call]:
    """Returns the functions of evaluation: with one label per image, with several, of features."""
    from mixer_jax.evaluation.classification import make_eval_step
    from mixer_jax.evaluation.features import make_feature_fn

    params = run.state_shape.eval_params
    batch = {
        "image": batch_shape(run, (*run.model_info.image_size, 3), jnp.uint8),
        "label": batch_shape(run, (), jnp.int32),
        "mask": batch_shape(run, (), jnp.bool_),
    }
    labels = batch_shape(run, (run.model_info.num_classes,), jnp.bool_)
    step = make_eval_step(run.model, run.mesh)
    return {
        "step": Call(step, (params, batch)),
        "multi_label": Call(step, (params, batch | {"label": labels})),
        "features": Call(make_feature_fn(run.model, run.mesh), (params, batch)),
    }


def predict_calls(run: Any, platform: str, devices: Sequence[Any]) -> dict[str, Call]:
    """Returns the functions of a classifier, and of one without a head."""
    from mixer_jax import inference as inference
    from mixer_jax.checkpoints.weights import PretrainedWeights
    from mixer_jax.distributed.sharding import state_sharding
    from mixer_jax.models.params import prepare_inference_params
    from mixer_jax.models.registry import get_family

    def shard_shapes(params: Any, model: Any, mesh: Any) -> Any:
        dtype, family = model.execution.dtype, get_family(model.family)
        shapes = jax.eval_shape(lambda: prepare_inference_params(params, dtype, platform, family))
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            state_sharding(shapes, mesh, family),
        )

    def load(params: Any, about: Any) -> Any:
        params = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), params)
        with contextlib.ExitStack() as patches:
            for name, value in (("local_devices", list(devices)), ("default_backend", platform)):
                patches.enter_context(mock.patch.object(jax, name, return_value=value))
            if platform != "cpu":
                # Arrays cannot be placed on devices that are not attached.
                patch = mock.patch.object(inference, "shard_inference_params", shard_shapes)
                patches.enter_context(patch)
            return inference.Classifier(PretrainedWeights(params, about))

    params, about = run.state_shape.params, run.model_info
    classifier = load(params, about)
    headless = load(
        {name: array for name, array in params.items() if name != "head"},
        dataclasses.replace(about, num_classes=0, class_names=()),
    )
    pixels = batch_shape(run, (*about.image_size, 3), jnp.uint8)
    images = batch_shape(run, (*about.image_size, 3), jnp.float32)
    return {
        "classes": Call(classifier._top_k, (classifier._params, pixels, 5)),
        "logits": Call(classifier._logits, (classifier._params, images)),
        "features": Call(headless._logits, (headless._params, images)),
    }


def batch_shape(run: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array with one row per image of the batch."""
    from mixer_jax.distributed.sharding import batch_sharding

    shape = (run.config.batch_size, *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(run.mesh))


@contextlib.contextmanager
def built_for(platform: str, device_kind: str) -> Iterator[None]:
    """Makes mixer_jax take the devices that it is given for devices of another kind."""
    from mixer_jax.distributed import xla_options
    from mixer_jax.models.family import ModelFamily
    from mixer_jax.training import setup

    build = ModelFamily.build

    def build_for_kind(family: ModelFamily, *args: Any, execution: Any, **attributes: Any) -> Any:
        execution = dataclasses.replace(execution, target_device_kind=device_kind)
        return build(family, *args, execution=execution, **attributes)

    options = xla_options.PLATFORM_OPTIONS.get(platform, {})
    with (
        mock.patch.object(ModelFamily, "build", build_for_kind),
        mock.patch.object(setup, "check_backend"),
        mock.patch.dict(xla_options.PLATFORM_OPTIONS, {"cpu": options}),
    ):
        yield


# The programs. Settings are the keys of CONFIG_KEYS, and num_devices.


class Target(NamedTuple):
    """Target that programs are lowered for.

    Attributes:
        platform: Name of the platform in JAX.
        lowering_platform: Its name in `jax.stages.Traced.lower`.
        topology: Topology of the ahead-of-time TPU compiler; empty: attached CPU devices.
        device_kind: Device kind that CPU devices represent.
    """

    platform: str
    lowering_platform: str
    topology: str = ""
    device_kind: str = ""


class Program(NamedTuple):
    """A program to lower.

    Attributes:
        target: Name in TARGETS.
        model: Name in MODELS.
        step: "train", "eval" or "predict".
        variant: Last part of the program's name.
        function: Which function of the step.
        settings: What differs from the settings of the model.
    """

    target: str
    model: str
    step: str
    variant: str
    function: str
    settings: Settings

    @property
    def name(self) -> str:
        """Name of the file, without extension."""
        return f"{self.target}_{self.model}_{self.step}_{self.variant}"


TARGETS = {
    "cpu": Target("cpu", "cpu"),
    "tpu_v5e": Target("tpu", "tpu", topology="v5e:2x2"),
    "tpu_v6e": Target("tpu", "tpu", topology="v6e:2x2"),
    "cuda": Target("gpu", "cuda", device_kind="NVIDIA H200"),
}
RECIPE: Settings = {
    "batch_size": 8,
    "mixup": 0.5,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "warmup_steps": 10,
}
MODELS: dict[str, Settings] = {
    # Three blocks: scan_unroll 0, 1 and 2 give three programs, 2 a loop with a remainder.
    "tiny": {
        **RECIPE,
        "variant": "custom",
        "num_blocks": 3,
        "patch_size": 16,
        "hidden_dim": 128,
        "tokens_mlp_dim": 32,
        "channels_mlp_dim": 256,
        "image_size": 32,
        "num_classes": 10,
    },
    "s16": {**RECIPE, "variant": "S/16", "image_size": 224, "num_classes": 1000},
}
MESH: Settings = {"num_devices": 4, "fsdp": 2}
EXECUTION: dict[str, Settings] = {
    "default": {},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "gelu_exact": {"gelu": "exact"},
    "unroll_0": {"scan_unroll": 0},
    "unroll_1": {"scan_unroll": 1},
    "unroll_2": {"scan_unroll": 2},
    "mesh": MESH,
}
TRAINING: dict[str, Settings] = EXECUTION | {
    "dropout": {"dropout": 0.1},
    "stochastic_depth": {"stochastic_depth": 0.1},
    "remat_none": {"remat": "none"},
    "remat_dots": {"remat": "dots"},
    "remat_mlp_hidden": {"remat": "mlp_hidden"},
    "remat_full": {"remat": "full"},
    "unroll_0_remat_dots": {"scan_unroll": 0, "remat": "dots"},
    "unroll_1_remat_full": {"scan_unroll": 1, "remat": "full"},
    "grad_accum_2": {"grad_accum_steps": 2, "stochastic_depth": 0.1},
}
# These do not depend on the target.
RECIPES: dict[str, Settings] = {
    "no_mixup": {"mixup": 0.0, "label_smoothing": 0.1},
    "ema": {"ema_decay": 0.99},
    "momentum": {"optimizer": "sgd", "decay_type": "cosine", "clip_norm": 0.0},
    "softmax": {"loss": "softmax", "decay_type": "none", "warmup_steps": 0},
    "mesh_data": {"num_devices": 4, "fsdp": 1},
    "mesh_grad_accum_2": {
        **MESH,
        "grad_accum_steps": 2,
        "dropout": 0.1,
        "stochastic_depth": 0.1,
        "ema_decay": 0.99,
    },
}
# Variants that are a target's default: dtype, scan_unroll and remat as `auto` resolves them there.
SAME_ON_CPU = ("float32", "unroll_1", "remat_dots", "unroll_1_remat_full")
SAME_ON_TPU = ("bfloat16", "unroll_1", "remat_dots", "unroll_1_remat_full")
SAME_ON_CUDA = ("bfloat16", "unroll_0", "remat_none", "unroll_0_remat_dots")
# A Mosaic kernel is a whole branch of a block, so that all remat policies save the same.
SAME_WITH_MOSAIC = (
    "bfloat16",
    "unroll_0",
    "remat_none",
    "remat_dots",
    "remat_mlp_hidden",
    "unroll_0_remat_dots",
)


def list_programs() -> list[Program]:
    """Returns all programs."""
    programs: list[Program] = []

    def add(
        target: str,
        step: str,
        variants: dict[str, Settings],
        *,
        model: str = "tiny",
        function: str = "",
        prefix: str = "",
        **settings: Any,
    ) -> None:
        function = function or ("classes" if step == "predict" else "step")
        for variant, changes in variants.items():
            name = prefix + variant
            programs.append(Program(target, model, step, name, function, settings | changes))

    def select(*names: str) -> dict[str, Settings]:
        return {name: TRAINING[name] for name in names}

    def drop(variants: dict[str, Settings], names: Sequence[str]) -> dict[str, Settings]:
        return {name: changes for name, changes in variants.items() if name not in names}

    add("cpu", "train", drop(TRAINING | RECIPES, SAME_ON_CPU))
    for function in ("init", "update_norm", "param_norm"):
        add("cpu", "train", {function: {}, f"{function}_mesh": MESH}, function=function)
    add("cpu", "eval", drop(EXECUTION, SAME_ON_CPU))
    for function in ("multi_label", "features"):
        add("cpu", "eval", {function: {}, f"{function}_mesh": MESH}, function=function)
    add("cpu", "predict", select("default", "bfloat16", "gelu_exact", "mesh"))
    for function in ("logits", "features"):
        variants = {function: {}, f"{function}_bfloat16": {"dtype": "bfloat16"}}
        add("cpu", "predict", variants, function=function)

    add("tpu_v5e", "train", drop(TRAINING, SAME_ON_TPU))
    add("tpu_v5e", "eval", drop(EXECUTION, SAME_ON_TPU))
    mosaic: Settings = {"prefix": "mosaic_", "backend": "mosaic"}
    add("tpu_v5e", "train", drop(TRAINING, SAME_WITH_MOSAIC), **mosaic)
    add("tpu_v5e", "eval", drop(EXECUTION, SAME_WITH_MOSAIC), **mosaic)
    for step in ("train", "eval"):
        add("tpu_v6e", step, select("default"))
        add("tpu_v6e", step, select("default", "float32"), **mosaic)
    add("cuda", "train", drop(TRAINING, SAME_ON_CUDA))
    add("cuda", "eval", drop(EXECUTION, SAME_ON_CUDA))
    xla: Settings = {"prefix": "xla_", "backend": "xla"}
    add("cuda", "train", select("default", "gelu_exact", "unroll_1", "mesh"), **xla)
    add("cuda", "eval", select("default"), **xla)
    for target in ("tpu_v5e", "tpu_v6e", "cuda"):
        variants = select("default") if target == "tpu_v6e" else select("default", "float32")
        add(target, "predict", variants)
        add(target, "predict", {"features": {}}, function="features")
        add(target, "eval", {"features": {}}, function="features")

    for target, backends in {
        "cpu": ("xla",),
        "tpu_v5e": ("xla", "mosaic"),
        "tpu_v6e": ("mosaic",),
        "cuda": ("triton", "xla"),
    }.items():
        for backend in backends:
            for step in ("train", "eval"):
                add(target, step, {backend: {"backend": backend}}, model="s16")
        dtypes = ("float32", "bfloat16") if target == "cpu" else ("bfloat16",)
        add(target, "predict", select(*dtypes), model="s16")
    return programs


def lower(program: Program) -> Any:
    """Lowers a program for its target."""
    target = TARGETS[program.target]
    settings = MODELS[program.model] | program.settings
    count = settings.pop("num_devices", 1)
    available = tpu_devices(target.topology) if target.topology else jax.devices()
    devices = available[:count]
    assert len(devices) == count, f"{program.name} needs {count} devices"
    calls: dict[str, Call]
    with contextlib.ExitStack() as contexts:
        if target.device_kind:
            contexts.enter_context(built_for(target.platform, target.device_kind))
        run = build_run(settings, target.platform, devices)
        if program.step == "train":
            calls = train_calls(run)
        elif program.step == "eval":
            calls = eval_calls(run)
        else:
            kind = target.device_kind or devices[0].device_kind
            contexts.enter_context(built_for(target.platform, kind))
            calls = predict_calls(run, target.platform, devices)
    function, args = calls[program.function]
    return function.trace(*args).lower(lowering_platforms=(target.lowering_platform,))


# From a lowered program to text.

_NAME = re.compile(r'@("[^"]*"|[\w.$-]+)')
_MODULE = re.compile(r"^(\s*module) " + _NAME.pattern, re.MULTILINE)
_FUNCTION = re.compile(r"^\s*(?:func|tt)\.func (?:public |private )?" + _NAME.pattern, re.MULTILINE)


def to_text(lowered: Any) -> str:
    """Returns a lowered program without names and locations, and with its kernels decoded."""
    module = lowered.compiler_ir("stablehlo")
    operations: list[Any] = []

    def collect(operation: Any) -> Any:
        operations.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    kernels: dict[str, str] = {}
    with module.context:
        for operation in operations:
            if operation.name == "func.func" and "res_attrs" in operation.attributes:
                results = [_pairs(result) for result in operation.attributes["res_attrs"]]
                for result in results:
                    result.pop("jax.result_info", None)
                attributes = [ir.DictAttr.get(result) for result in results]
                operation.attributes["res_attrs"] = ir.ArrayAttr.get(attributes)
            if operation.name == "stablehlo.custom_call":
                _take_out_kernel(operation.attributes, kernels)
    options = dict(sorted(lowered._lowering._compiler_options_kvs))
    parts = [
        f"// jax {jax.__version__}, compiler options {options}",
        number_functions(module.operation.get_asm(enable_debug_info=False)),
    ]
    parts += [f"// {name}\n{text}" for text, name in kernels.items()]
    return "\n".join(parts)


def number_functions(text: str) -> str:
    """Returns the text of a module with functions numbered by the order of their definitions."""
    text = _MODULE.sub(r"\1 @module", text)
    names = {name: f"@f{number}" for number, name in enumerate(_FUNCTION.findall(text))}
    return _NAME.sub(lambda found: names.get(found[1], found[0]), text)


def _pairs(attributes: Any) -> dict[str, Any]:
    attributes = ir.DictAttr(attributes)
    return {attributes[n].name: attributes[n].attr for n in range(len(attributes))}


def _take_out_kernel(attributes: Any, kernels: dict[str, str]) -> None:
    """Replaces the bytecode of a custom kernel by a number, and adds its text to `kernels`."""

    def number(text: str) -> str:
        return kernels.setdefault(number_functions(text), f"kernel {len(kernels)}")

    target = ir.StringAttr(attributes["call_target_name"]).value
    if target == "tpu_custom_call":
        config = json.loads(ir.StringAttr(attributes["backend_config"]).value)
        call = config["custom_call_config"]
        call["body"] = number(_decode_mosaic(base64.b64decode(call["body"])))
        attributes["backend_config"] = ir.StringAttr.get(json.dumps(config))
        del attributes["kernel_name"]
    elif target == "__gpu$xla.gpu.triton":
        config = _pairs(attributes["mhlo.backend_config"])
        config["ir"] = ir.StringAttr.get(number(_decode_triton(config["ir"].value_bytes)))
        del config["name"]
        attributes["mhlo.backend_config"] = ir.DictAttr.get(config)
    elif "kernel" in target or "triton" in target or "mosaic" in target:
        raise NotImplementedError(f"cannot decode the kernel of custom call {target!r}")


def _decode_mosaic(bytecode: bytes) -> str:
    context = mlir.make_ir_context()
    tpu.register_dialect(context)
    with context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(bytecode)
        pipeline = "builtin.module(mosaic-serde{serialize=false})"
        passmanager.PassManager.parse(pipeline).run(module.operation)
        return str(module.operation.get_asm(enable_debug_info=False))


def _decode_triton(bytecode: bytes) -> str:
    context = mlir.make_ir_context()
    triton.dialect.register_dialect(context)
    with context, ir.Location.unknown():
        return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))


# The commands.


def write(folder: Path, pattern: str = "*") -> int:
    """Writes the programs that match a pattern, and returns how many could not be lowered."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = [p for p in list_programs() if fnmatch.fnmatch(p.name, pattern)]
    if not programs:
        raise ValueError(f"no program is named {pattern}, e.g. {list_programs()[0].name}")
    for name in _files(folder, pattern):
        (folder / name).unlink()
    failed, begin = 0, time.perf_counter()
    for program in programs:
        start = time.perf_counter()
        try:
            text, extension = to_text(lower(program)), "mlir"
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            text, extension = f"{type(error).__name__}: {reason}\n", "txt"
            failed += 1
        (folder / f"{program.name}.{extension}").write_text(text)
        what = f"{text.count(chr(10)):,} lines" if extension == "mlir" else text.strip()
        print(f"{program.name}: {what}, {time.perf_counter() - start:.1f} s", flush=True)
    seconds = time.perf_counter() - begin
    print(f"{len(programs)} programs in {seconds:.0f} s, {failed} could not be lowered")
    return failed


def compare(old: Path, new: Path, pattern: str = "*") -> int:
    """Prints how the programs of two folders differ, and returns how many do."""
    names = [_files(folder, pattern) for folder in (old, new)]
    if not names[0] and not names[1]:
        raise ValueError(f"{old} and {new} have no program named {pattern}")
    lines = []
    for name in sorted(names[0] | names[1]):
        if name not in names[1]:
            lines.append(f"{name}: missing in {new}")
        elif name not in names[0]:
            lines.append(f"{name}: missing in {old}")
        elif difference := describe_difference((old / name).read_text(), (new / name).read_text()):
            lines.append(f"{name}: {difference}")
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{len(names[0] | names[1])} programs compared, {len(lines)} differ")
    return len(lines)


def describe_difference(old: str, new: str, context: int = 3) -> str:
    """Finds where two texts begin to differ, and the first lines there; empty if they are equal."""
    if old == new:
        return ""
    before, after = old.split("\n"), new.split("\n")
    first = _common_length(before, after)
    result = [f"differs from line {first + 1} on ({len(before):,} and {len(after):,} lines)"]
    rest = before[first : first + context], after[first : first + context]
    # Signatures are long lines: show the part that differs.
    column = max(0, _common_length(*("".join(lines[:1]) for lines in rest)) - 40)
    for sign, lines in zip("-+", rest, strict=True):
        columns = [column, *[0] * context]
        result += [f"    {sign} {_cut(*pair)}" for pair in zip(lines, columns, strict=False)]
    return "\n".join(result)


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Counts the elements of the common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def _cut(line: str, column: int, width: int = 160) -> str:
    column = column if len(line) > width else 0
    end = column + width
    return f"{'…' if column else ''}{line[column:end]}{'…' if len(line) > end else ''}"


def _files(folder: Path, pattern: str) -> set[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = [path for path in folder.iterdir() if path.suffix in {".mlir", ".txt"}]
    targets = tuple(f"{target}_" for target in TARGETS)
    return {
        path.name
        for path in paths
        if path.stem.startswith(targets) and fnmatch.fnmatch(path.stem, pattern)
    }


def main(argv: Sequence[str]) -> int:
    """Writes or compares programs, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lowered_programs",
        description="Write lowered programs, or compare those of two trees.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="lower all programs; takes about three minutes")
    writing.add_argument("folder", type=Path, metavar="DIR")
    comparing = commands.add_parser("compare", help="exit with 1 if a program differs")
    comparing.add_argument("old", type=Path, metavar="OLD")
    comparing.add_argument("new", type=Path, metavar="NEW")
    for command in (writing, comparing):
        command.add_argument("--only", default="*", metavar="PATTERN", help="e.g. 'cpu_tiny_*'")
    args = parser.parse_args(argv)
    try:
        if args.command == "compare":
            return 1 if compare(args.old, args.new, args.only) else 0
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_enable_compilation_cache", False)
        write(args.folder, args.only)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
