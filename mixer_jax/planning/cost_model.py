"""Numbers of a training run, and its memory and communication by formula."""

import dataclasses
import math
import re
from typing import Any, NamedTuple, get_args

from mixer_jax.config.config import check_warmup, resolve_num_steps
from mixer_jax.config.schema import RunConfig
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.models.execution import Remat, resolve_execution
from mixer_jax.models.family import INIT_FROM, ModelFamily
from mixer_jax.models.registry import get_family
from mixer_jax.planning.hlo_collectives import (
    GRADIENTS,
    MIXUP_EXAMPLES,
    PARAMETERS,
    SCALARS,
    Collective,
    ReplicaGroups,
)
from mixer_jax.training.datasets import RunDatasets

_FLOAT32 = 4
REMAT_POLICIES: tuple[str, ...] = get_args(Remat)
# Classes and training examples, from TFDS.
_KNOWN_DATASETS = {
    "imagenet2012": (1_000, 1_281_167),
    "cifar10": (10, 50_000),
    "cifar100": (100, 50_000),
    "digits/all": (10, 1_437),
    "digits/low": (5, 708),
    "digits/high": (5, 729),
}
_SPLIT = re.compile(r"train(?:\[(\d*)(%?):(\d*)(%?)\])?")


class RunSpec(NamedTuple):
    """A training run in numbers.

    Attributes:
        image_size: Side of the square input, in pixels.
        itemsize: Bytes per element of the computation's dtype.
        batch_size: Images per step.
        num_microbatches: Microbatches per batch (gradient accumulation).
        fsdp: Devices that parameters are sharded over.
        scan_unroll: Blocks per iteration of the scan; 0 unrolls all.
        num_moments: Float32 arrays per parameter, excluding the parameter itself: optimizer moments
            and averaged parameters.
        num_steps: Length of the run.
    """

    family: ModelFamily
    architecture: Any
    image_size: int
    num_classes: int
    itemsize: int
    batch_size: int
    num_microbatches: int
    fsdp: int
    num_devices: int
    remat: str
    scan_unroll: int
    num_moments: int
    mixup: bool
    num_steps: int

    @property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by path."""
        return self.family.param_shapes(self.architecture, self.image_size, self.num_classes)

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return self.family.num_params(self.architecture, self.image_size, self.num_classes)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that can be scanned over."""
        return self.family.num_blocks(self.architecture)

    @property
    def images_per_device(self) -> float:
        """Images per device and step."""
        return self.batch_size / self.num_devices

    @property
    def model_flops(self) -> int:
        """FLOPs of the model per step, over all devices: three forward passes."""
        flops = self.family.forward_flops(self.architecture, self.image_size, self.num_classes)
        return 3 * self.batch_size * flops

    @property
    def recomputed_flops(self) -> int:
        """FLOPs that rematerialization adds per step, over all devices, counting matmuls only."""
        costs = self.family.cost_model
        return self.batch_size * costs.recomputed_flops(
            self.architecture, self.image_size, self.remat
        )

    @property
    def executed_flops(self) -> float:
        """FLOPs per step and device, including recomputation."""
        return (self.model_flops + self.recomputed_flops) / self.num_devices

    @property
    def saved_activation_bytes(self) -> float:
        """Bytes of residuals saved for the backward pass, per image, in all blocks."""
        return self.family.cost_model.saved_activation_bytes(
            self.architecture, self.image_size, self.remat, self.itemsize
        )

    @property
    def live_block_bytes(self) -> float:
        """Bytes that are live in the middle of one block, per image."""
        costs = self.family.cost_model
        return costs.live_block_bytes(self.architecture, self.image_size, self.itemsize)


class Memory(NamedTuple):
    """Bytes of memory per device.

    Attributes:
        parameters: Float32 parameters.
        moments: Optimizer moments and averaged parameters.
        activations: Residuals saved for the backward pass, and live activations of one block.
        gradients: Float32 gradients, and parameters cast to the computation's dtype.
    """

    parameters: float
    moments: float
    batch: float
    activations: float
    gradients: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(self)

    @property
    def arguments(self) -> float:
        """Arguments of the training step: state and batch."""
        return self.parameters + self.moments + self.batch


def run_spec(config: RunConfig, num_devices: int) -> RunSpec:
    """Extracts the numbers of a run from a config with every `auto` setting resolved.

    Raises:
        UserError: The config leaves the dataset's size open, or warmup is longer than the run.
    """
    dataset = placeholder_datasets(config).train
    num_steps = resolve_num_steps(config, len(dataset))
    check_warmup(config, num_steps)
    adam_moments = 2 if config.optimizer.name == "adam" else 1
    return RunSpec(
        family=get_family(config.model.family),
        architecture=config.model.architecture,
        image_size=config.image_size,
        num_classes=dataset.num_classes,
        itemsize=4 if config.model.dtype == "float32" else 2,
        batch_size=config.batch_size,
        num_microbatches=config.recipe.grad_accum_steps,
        fsdp=config.mesh.fsdp,
        num_devices=num_devices,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        num_moments=adam_moments + (config.recipe.ema_decay > 0),
        mixup=config.recipe.mixup > 0,
        num_steps=num_steps,
    )


def resolve_for_platform(config: RunConfig, platform: str) -> RunConfig:
    """Returns a copy of a config with every `auto` setting resolved for a `jax.Device.platform`.

    Raises:
        UserError: The architecture is that of a checkpoint, which planning does not read.
    """
    if config.model.variant == INIT_FROM:
        raise UserError(
            "config.model.variant must name an architecture, because planning does not read "
            f"checkpoints, got {INIT_FROM!r}. Set it, for example --config.model.variant=B/16."
        )
    model, family = config.model, get_family(config.model.family)
    num_blocks = family.num_blocks(model.architecture)
    resolved = resolve_execution(model.settings, platform, num_blocks, family.block_backends)
    model = dataclasses.replace(model, **resolved)
    return dataclasses.replace(config, model=model, compilation_cache="")


def placeholder_datasets(config: RunConfig) -> RunDatasets:
    """Creates datasets with the number of examples and classes in a config.

    Raises:
        UserError: The config leaves a number open, and the dataset is not a known one.
    """
    dataset = config.dataset
    num_classes, num_examples = dataset.num_classes, dataset.num_examples
    known = _KNOWN_DATASETS.get(dataset.name)
    if known is not None:
        num_classes = num_classes or known[0]
        num_examples = num_examples or _count_examples(dataset.train_split, known[1])
    for key, value in (("num_classes", num_classes), ("num_examples", num_examples)):
        if not value:
            raise UserError(
                f"config.dataset.{key} must be set, because planning does not read "
                f"{dataset.name!r}, got 0. Set it, for example --config.dataset.{key}=1000."
            )
    class_names = tuple(map(str, range(num_classes)))
    return RunDatasets(Source(dataset.name, range(num_examples), class_names), {}, {})


def _count_examples(split: str, total: int) -> int:
    """Returns the number of examples of a split such as "train[:99%]"; 0 if it is not known."""
    match = _SPLIT.fullmatch(split.replace(" ", ""))
    if not match:
        return 0
    start, start_percent, stop, stop_percent = match.groups()
    bounds = [
        round(int(text) / 100 * total) if percent else int(text)
        for text, percent in ((start or "0", start_percent), (stop or f"{total}", stop_percent))
    ]
    return max(0, min(bounds[1], total) - bounds[0])


def estimate_memory(run: RunSpec) -> Memory:
    """Estimates the peak memory of a training step; compilers may do better or worse."""
    sharded = sum(
        math.prod(shape) / (run.fsdp if _is_fsdp_sharded(run, path, shape) else 1)
        for path, shape in run.param_shapes.items()
    )
    microbatch_per_device = run.images_per_device / run.num_microbatches
    # Microbatches' gradients are summed unsharded; kernels are gathered in the computation's dtype.
    gradients = _FLOAT32 * run.num_params * (2 if run.num_microbatches > 1 else 1)
    return Memory(
        parameters=_FLOAT32 * sharded,
        moments=_FLOAT32 * sharded * run.num_moments,
        batch=run.images_per_device * _example_bytes(run),
        activations=microbatch_per_device * (run.saved_activation_bytes + run.live_block_bytes),
        gradients=gradients + run.itemsize * run.num_params,
    )


def estimate_eval_memory(run: RunSpec, batch_size: int) -> float:
    """Estimates the bytes per device in an evaluation step of `batch_size` images in total."""
    images = batch_size / run.num_devices
    return (
        estimate_memory(run).parameters
        + run.itemsize * run.num_params
        + images * (_example_bytes(run) + run.live_block_bytes)
    )


def _example_bytes(run: RunSpec) -> int:
    return 3 * run.image_size**2 + _FLOAT32


def _is_fsdp_sharded(run: RunSpec, path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter is sharded over `fsdp` devices; see `state_sharding`."""
    is_divisible = any(size % run.fsdp == 0 for size in shape)
    return run.fsdp > 1 and is_divisible and run.family.is_fsdp_sharded(tuple(path.split("/")))


def min_hbm_bytes(run: RunSpec) -> float:
    """Returns a lower bound on memory traffic per device per training step, in bytes.

    The optimizer reads parameters, moments and gradients, and writes all but the gradients. Saved
    activations are written and read. Kernels are read in the forward and the backward pass.
    """
    memory = estimate_memory(run)
    update = 2 * (memory.parameters + memory.moments) + memory.parameters
    activations = 2 * run.images_per_device * run.saved_activation_bytes
    return update + activations + 2 * run.num_microbatches * run.itemsize * run.num_params


def estimate_collectives(run: RunSpec) -> list[Collective]:
    """Estimates the collectives of a training step; see `sharded_value_and_grad`."""
    if run.num_devices == 1:
        return []
    data, fsdp = run.num_devices // run.fsdp, run.fsdp
    devices = range(run.num_devices)
    world: ReplicaGroups = (tuple(devices),)
    ring: ReplicaGroups = tuple((n, (n + 1) % run.num_devices) for n in devices)
    fsdp_groups: ReplicaGroups = tuple(tuple(devices[n : n + fsdp]) for n in devices[::fsdp])
    data_groups: ReplicaGroups = tuple(tuple(devices[n::fsdp]) for n in range(fsdp))
    cast = not_cast = replicated = 0
    for path, shape in run.param_shapes.items():
        size = math.prod(shape)
        if not _is_fsdp_sharded(run, path, shape):
            replicated += size
        elif run.family.is_cast(tuple(path.split("/"))):
            cast += size  # Gathered in the computation's dtype.
        else:
            not_cast += size
    dtype = "bf16" if run.itemsize == 2 else "f32"
    axis = "all" if data > 1 and fsdp > 1 else "fsdp" if fsdp > 1 else "data"
    sharded = _FLOAT32 * (cast + not_cast)
    example = 3 * run.image_size**2 + _FLOAT32 * run.num_classes
    collectives = [
        Collective("all-reduce", "f32", axis, GRADIENTS, 1, _FLOAT32 * replicated, world),
        Collective("all-gather", dtype, "fsdp", PARAMETERS, 1, run.itemsize * cast, fsdp_groups),
        Collective("all-gather", "f32", "fsdp", PARAMETERS, 1, _FLOAT32 * not_cast, fsdp_groups),
        Collective("reduce-scatter", "f32", "fsdp", GRADIENTS, 1, sharded, fsdp_groups),
        Collective("all-reduce", "f32", "data", GRADIENTS, 1, sharded / fsdp, data_groups),
        Collective("collective-permute", "u8", axis, MIXUP_EXAMPLES, 1, example * run.mixup, ring),
        Collective("all-reduce", "f32", axis, SCALARS, 1, _FLOAT32, world),
    ]
    return [c for c in collectives if c.num_bytes and len(c.replica_groups[0]) > 1]
