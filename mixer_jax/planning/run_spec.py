"""A training run in numbers: its config with every `auto` setting resolved, and its dataset."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from mixer_jax.checkpoints.weights import unflatten_params
from mixer_jax.config.config import check_schedule, resolve_num_steps
from mixer_jax.config.schema import RunConfig
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.models.execution import Remat, resolve_execution
from mixer_jax.models.family import INIT_FROM, ModelFamily, Shape
from mixer_jax.models.registry import get_family
from mixer_jax.training.datasets import RunDatasets
from mixer_jax.training.optimizer import make_optimizer

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
        moments: Path of the parameter and shape of each float32 array of the state besides the
            parameters: optimizer moments and averaged parameters.
        num_steps: Length of the run.
        num_gradients: Gradients computed per step; 2 with SAM.
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
    moments: Sequence[tuple[str, Shape]]
    mixup: bool
    num_steps: int
    num_gradients: int = 1

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
        """FLOPs of the model per step, over all devices: three forward passes per gradient."""
        flops = self.family.forward_flops(self.architecture, self.image_size, self.num_classes)
        return 3 * self.num_gradients * self.batch_size * flops

    @property
    def recomputed_flops(self) -> int:
        """FLOPs that rematerialization adds per step, over all devices, counting matmuls only."""
        costs = self.family.cost_model
        return (
            self.num_gradients
            * self.batch_size
            * costs.recomputed_flops(self.architecture, self.image_size, self.remat)
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


def run_spec(config: RunConfig, num_devices: int) -> RunSpec:
    """Extracts the numbers of a run from a config with every `auto` setting resolved.

    Raises:
        UserError: The config leaves the dataset's size open, or warmup is longer than the run.
    """
    dataset = placeholder_datasets(config).train
    num_steps = resolve_num_steps(config, len(dataset))
    check_schedule(config, num_steps)
    family = get_family(config.model.family)
    run = RunSpec(
        family=family,
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
        moments=(),
        mixup=config.recipe.mixup > 0 or config.recipe.cutmix > 0,
        num_steps=num_steps,
        num_gradients=2 if config.optimizer.sam_rho else 1,
    )
    averages = run.param_shapes.items() if config.recipe.ema_decay else ()
    return run._replace(moments=(*_optimizer_moments(config, run), *averages))


def _optimizer_moments(config: RunConfig, run: RunSpec) -> Iterator[tuple[str, Shape]]:
    """Yields the path of the parameter and the shape of each array of the optimizer's state."""
    params = unflatten_params(
        {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in run.param_shapes.items()}
    )
    tx = make_optimizer(config.optimizer, lambda step: 0.0, run.family, run.architecture)
    for path, array in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params)):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names:  # Other arrays are counters.
            yield "/".join(names), array.shape


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
    is_weighted = config.recipe.class_weights != "none"
    class_weights = np.ones(num_classes, np.float32) if is_weighted else None
    source = Source(dataset.name, range(num_examples), class_names)
    return RunDatasets(source, {}, {}, class_weights=class_weights)


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
