"""Setup of an experiment from a config: mesh, model, optimizer, compiled functions, evaluations."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import mixer_jax
from mixer_jax.checkpoints.manager import abstract_state
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.config.config import (
    check_profile_steps,
    check_scan_unroll,
    check_schedule,
    resolve_num_steps,
)
from mixer_jax.config.schema import PreprocessConfig, RunConfig
from mixer_jax.data.loader import BadImageCallback, Batch, train_batches
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.distributed.hardware import peak_flops
from mixer_jax.distributed.sharding import (
    batch_sharding,
    check_divisible,
    make_mesh,
    replicated,
    state_sharding,
)
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import ClassificationMetrics, make_evaluator
from mixer_jax.evaluation.features import make_feature_fn
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.multi_label import MultiLabelMetrics
from mixer_jax.evaluation.probes import (
    LazyLabels,
    ProbeConfig,
    ProbeMetrics,
    run_probe,
    sample_once,
)
from mixer_jax.models.execution import check_backend
from mixer_jax.models.family import INIT_FROM
from mixer_jax.models.param_groups import check_freeze
from mixer_jax.models.registry import build_model, get_family
from mixer_jax.training.datasets import RunDatasets
from mixer_jax.training.optimizer import frozen_mask, make_optimizer, make_schedule
from mixer_jax.training.step import (
    Hyperparams,
    TrainState,
    TrainStep,
    create_state,
    jit_train_step,
    train_step,
    update_norm,
)

EvalMetrics = ClassificationMetrics | MultiLabelMetrics | ProbeMetrics
# From parameters to metrics.
Evaluator = Callable[[Any], EvalMetrics]


class Experiment(NamedTuple):
    """Everything that a run computes with. Functions are jitted.

    Attributes:
        model: Flax module, from images to logits.
        model_info: Metadata of the model, stored in checkpoints.
        state_shape: Shapes, dtypes and shardings of the state.
        hyperparams: Arguments of `train_step`, on the host.
        train_step: Takes one step; donates the state.
        copy_params: Copies the parameters of a state that the next step donates.
        update_norm: Computes the norm of an update from the parameters before and after it.
        metadata: Metadata of checkpoints.
    """

    config: RunConfig
    datasets: RunDatasets
    num_steps: int
    mesh: Mesh
    model: Any
    model_info: ModelInfo
    state_shape: TrainState
    hyperparams: Hyperparams
    create_state: Callable[[], TrainState]
    train_step: TrainStep
    copy_params: Callable[[Any], Any]
    update_norm: Callable[[Any, Any], jax.Array]
    param_norm: Callable[[Any], jax.Array]
    metadata: dict[str, Any]


def build_experiment(
    config: RunConfig,
    datasets: RunDatasets,
    devices: Sequence[jax.Device] | None = None,
    init_info: ModelInfo | None = None,
) -> Experiment:
    """Builds an experiment; compiles nothing and allocates nothing yet.

    Args:
        config: Config of the run.
        datasets: Result of `open_datasets`.
        devices: Devices to run on; None: the devices of all hosts.
        init_info: Metadata of the checkpoint that the run starts or resumes from, whose
            architecture it takes; None: the architecture of the config.

    Raises:
        UserError: The batch cannot be split over the devices, the schedule is longer than the run,
            the run does not have the steps to profile, the backend is for other devices, or
            patterns of frozen parameters match none or all.
    """
    num_steps = resolve_num_steps(config, len(datasets.train))
    check_schedule(config, num_steps)
    check_profile_steps(config, num_steps)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    check_divisible(
        "config.batch_size", config.batch_size, mesh.size, config.recipe.grad_accum_steps
    )
    device = mesh.devices.flat[0]
    model_info = make_model_info(config, datasets, init_info)
    model = _build_model(config, model_info, device)
    family = get_family(model_info.family)
    patterns = config.optimizer.freeze_patterns
    check_freeze(patterns, family, model_info.config, config.image_size)
    hyperparams = Hyperparams(np.float32(config.optimizer.learning_rate), np.uint32(config.seed))
    schedule_by_peak = functools.partial(make_schedule, config.optimizer, num_steps)
    make_tx = functools.partial(
        make_optimizer, config.optimizer, family=family, architecture=model_info.config
    )

    class_weights, has_ema = datasets.class_weights, config.recipe.ema_decay > 0
    make_state = functools.partial(
        create_state,
        model=model,
        tx=make_tx(schedule_by_peak()),
        image_size=config.image_size,
        ema=has_ema,
    )
    shape = jax.eval_shape(make_state, hyperparams.seed)
    sharding = state_sharding(shape, mesh, family)
    step = functools.partial(
        train_step,
        recipe=config.recipe,
        model=model,
        make_schedule=schedule_by_peak,
        make_tx=make_tx,
        mesh=mesh,
        class_weights=class_weights,
        sam_rho=config.optimizer.sam_rho,
        frozen=frozen_mask(shape.params, config.optimizer, family, model_info.config),
    )
    return Experiment(
        config,
        datasets,
        num_steps,
        mesh,
        model,
        model_info,
        state_shape=abstract_state(shape, sharding),
        hyperparams=hyperparams,
        create_state=functools.partial(
            jax.jit(make_state, out_shardings=sharding), hyperparams.seed
        ),
        train_step=jit_train_step(step, sharding, mesh, model),
        copy_params=jax.jit(
            lambda params: jax.tree.map(jnp.copy, params), out_shardings=sharding.params
        ),
        update_norm=jax.jit(update_norm, out_shardings=replicated(mesh)),
        param_norm=jax.jit(optax.tree.norm, out_shardings=replicated(mesh)),
        metadata={
            "model_info": model_info.to_dict(),
            "ema": has_ema,
            "num_steps": num_steps,
            "num_train_examples": len(datasets.train),
            "train_data": dict(datasets.fingerprint),
            "class_weights": None if class_weights is None else class_weights.tolist(),
            "config": config.to_dict(),
            "versions": {"mixer_jax": mixer_jax.__version__, "jax": jax.__version__},
        },
    )


def make_train_batches(
    experiment: Experiment, start_step: int, on_bad_images: BadImageCallback
) -> Generator[Batch, None, None]:
    """Yields the training batches after `start_step` to the end of the run; see `train_batches`."""
    config = experiment.config
    return train_batches(
        experiment.datasets.train,
        seed=config.seed,
        start_step=start_step,
        num_steps=experiment.num_steps,
        batch_size=config.batch_size,
        image_size=config.image_size,
        preprocess=train_preprocess_args(config.preprocess),
        num_threads=config.loader.num_threads,
        num_workers=config.loader.num_workers,
        prefetch_batches=config.loader.prefetch_batches,
        sharding=batch_sharding(experiment.mesh),
        on_bad_images=on_bad_images,
    )


def make_evaluators(experiment: Experiment) -> dict[str, Evaluator]:
    """Creates the evaluations of `config.evals`, by name. All hosts must call it together.

    For few-shot probes, it reads labels of training images, on the primary process.

    Raises:
        UserError: Some class has too few images for a few-shot probe.
    """
    config, mesh, datasets = experiment.config, experiment.mesh, experiment.datasets
    input_config = EvalInputConfig(
        config.eval_batch_size,
        (config.image_size, config.image_size),
        config.preprocess.eval_crop,
        config.preprocess.exif_orientation,
        config.bad_images.skip_in_evaluation,
        config.loader.num_threads,
        config.loader.prefetch_batches,
        config.preprocess.eval_crop_fraction,
        PixelPermutation.from_config(config.preprocess),
    )
    evaluate = make_evaluator(
        experiment.model, mesh, input_config, experiment.model_info.multi_label
    )
    feature_fn = make_feature_fn(experiment.model, mesh)
    evaluators: dict[str, Evaluator] = {}
    for name, entry in config.evals.items():
        source = datasets.evals[name]
        if entry.type == "classify":
            evaluators[name] = functools.partial(evaluate, source)
            continue
        train = datasets.probe_train[name]
        probe = ProbeConfig(entry.type, entry.shot_counts, tuple(range(entry.num_seeds)))
        labels = LazyLabels(train, input_config.skip_bad, input_config.num_threads)
        if entry.type == "few_shot":
            # Raises if a class has too few images, before training rather than after it.
            sample_once(probe, train, labels)
        evaluators[name] = functools.partial(
            run_probe,
            feature_fn,
            config=probe,
            train=train,
            test=source,
            mesh=mesh,
            input_config=input_config,
            labels=labels,
        )
    return evaluators


def train_preprocess_args(config: PreprocessConfig) -> dict[str, Any]:
    """Selects the settings that `train_image` takes as keyword arguments."""
    settings = dataclasses.asdict(config)
    settings = {k: x for k, x in settings.items() if not k.startswith(("eval_", "permute"))}
    return settings | {"permutation": PixelPermutation.from_config(config)}


def train_flops_per_image(experiment: Experiment) -> int:
    """Computes the model FLOPs of training on one image: three times those of a forward pass.

    SAM computes two gradients.
    """
    info = experiment.model_info
    family = get_family(info.family)
    num_gradients = 2 if experiment.config.optimizer.sam_rho else 1
    return 3 * num_gradients * family.forward_flops(info.config, info.image_size, info.num_classes)


def throughput_metrics(experiment: Experiment, images_per_second: float) -> dict[str, float]:
    """Computes throughput in total and per device, and MFU on devices of known peak FLOP/s.

    Without MFU if parameters are frozen, because the FLOPs depend on which.
    """
    per_device = images_per_second / experiment.mesh.size
    metrics = {
        "images_per_second": images_per_second,
        "images_per_second_per_device": per_device,
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak and not experiment.config.optimizer.freeze_patterns:
        metrics["model_flops_utilization"] = train_flops_per_image(experiment) * per_device / peak
    return metrics


def should_keep_head(config: RunConfig, class_names: Sequence[str], pretrained: ModelInfo) -> bool:
    """Returns whether a run on data with these classes keeps the head of its pretrained weights.

    Raises:
        UserError: `config.init_head` is "keep", but the head has other classes.
    """
    is_same = pretrained.class_names == tuple(class_names)
    fits = is_same or (not pretrained.class_names and pretrained.num_classes == len(class_names))
    if config.init_head == "keep" and not fits:
        raise UserError(
            f"config.init_head must be 'new' or 'auto', got 'keep': the {pretrained.num_classes} "
            f"classes of config.init_from={config.init_from!r} are not the {len(class_names)} "
            "classes of the data."
        )
    return config.init_head == "keep" or (config.init_head == "auto" and is_same)


def make_model_info(
    config: RunConfig, datasets: RunDatasets, init_info: ModelInfo | None
) -> ModelInfo:
    """Describes the model of a run; `init_info` as in `build_experiment`."""
    declared = init_info or config.model
    architecture = config.model.architecture
    if init_info is not None:
        architecture = init_info.config
        new = get_family(init_info.family).config_for_new_head(architecture)
        # A checkpoint of the run itself already has the layers of its new head.
        if new != architecture and config.init_from:
            is_kept = should_keep_head(config, datasets.train.class_names, init_info)
            architecture = architecture if is_kept else new
    return ModelInfo(
        declared.family,
        declared.variant,
        architecture,
        image_size=(config.image_size, config.image_size),
        num_classes=datasets.train.num_classes,
        class_names=tuple(datasets.train.class_names),
        gelu=declared.gelu,
        eval_crop=config.preprocess.eval_crop,
        eval_crop_fraction=config.preprocess.eval_crop_fraction,
        exif_orientation=config.preprocess.exif_orientation,
        loss=config.recipe.loss,
        dtype=config.model.dtype,
        permutation=PixelPermutation.from_config(config.preprocess),
        multi_label=datasets.train.multi_label,
    )


def _build_model(config: RunConfig, info: ModelInfo, device: jax.Device) -> Any:
    family = get_family(info.family)
    check_backend(config.model.backend, device.platform, family.block_backends)
    if config.model.variant == INIT_FROM:  # `parse` has checked other architectures.
        check_scan_unroll(config.model.scan_unroll, family.num_blocks(info.config))
    settings = config.model.settings | {"gelu": info.gelu}
    model = (family, info.config, info.num_classes)
    return build_model(*model, settings, device.platform, device.device_kind)
