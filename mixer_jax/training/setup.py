"""From a configuration to the parts of a run: data, mesh, model, optimizer, compiled functions."""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mixer_jax
from mixer_jax.checkpoints.manager import abstract_state
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.config.config import (
    architecture_overrides,
    check_scan_unroll,
    check_warmup,
    parse_shots,
    resolve_num_steps,
)
from mixer_jax.data.loader import BadImageCallback, Batch, train_batches
from mixer_jax.data.source import Source
from mixer_jax.distributed.hardware import peak_flops
from mixer_jax.distributed.sharding import (
    batch_sharding,
    check_divisible,
    make_mesh,
    replicated,
    state_sharding,
)
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.evaluation.classification import ClassificationMetrics, evaluate, make_eval_step
from mixer_jax.evaluation.features import make_feature_fn
from mixer_jax.evaluation.few_shot import LazyLabels
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.evaluation.probes import ProbeConfig, ProbeMetrics, run_probe, sample_all_shots
from mixer_jax.models.execution import check_backend
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.mixer_config import forward_flops, get_config
from mixer_jax.models.registry import from_config
from mixer_jax.models.stack import active_backend
from mixer_jax.training.datasets import RunDatasets
from mixer_jax.training.optimizer import make_optimizer, make_schedule
from mixer_jax.training.step import Metrics, TrainState, create_state, train_step, update_norm

AnyScores = ClassificationMetrics | ProbeMetrics
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Experiment(NamedTuple):
    """The parts of a run.

    Attributes:
        config: it was made from.
        sources: of examples.
        num_steps: of the whole run.
        mesh: over all devices of all hosts.
        model: from images to logits.
        about: what its weights say of themselves.
        state_shape: shapes, types and shardings of the state.
        create_state: makes the state before the first step.
        train_step: one step; the state given to it is used up.
        copy_params: of a state, which the next step uses up, for `update_norm` after it.
        change_norm: of that step's update, from the copy and the new parameters.
        parameter_norm: of parameters.
        metadata: what its checkpoints say of themselves.
    """

    config: ConfigDict
    sources: RunDatasets
    num_steps: int
    mesh: Mesh
    model: MlpMixer
    about: ModelInfo
    state_shape: TrainState
    create_state: Callable[[], TrainState]
    train_step: TrainStep
    copy_params: Callable[[Any], Any]
    change_norm: Callable[[Any, Any], jax.Array]
    parameter_norm: Callable[[Any], jax.Array]
    metadata: dict[str, Any]


def build_experiment(
    config: ConfigDict,
    sources: RunDatasets,
    devices: Sequence[jax.Device] | None = None,
    init_info: ModelInfo | None = None,
) -> Experiment:
    """Makes the parts of a run; compiles nothing and allocates nothing yet.

    Args:
        config: valid by `config.validate`.
        sources: from `open_sources`.
        devices: to run on; None: all of all hosts.
        init_info: of the weights that the run begins with or goes on from, which then say widths
            and GELU; None: the config says them.

    Raises:
        UserError: the batch does not divide over the devices, warmup outlasts the run, or kernels
            are for other devices.
    """
    num_steps = resolve_num_steps(config, len(sources.train))
    check_warmup(config, num_steps)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    pieces = config.recipe.grad_accum_steps
    check_divisible("config.batch_size", config.batch_size, mesh.size, pieces)
    about = _describe(config, sources, init_info)
    check_scan_unroll(config.model.scan_unroll, about.config.num_blocks)
    section = {"variant": about.variant, "gelu": about.gelu, **vars(about.config)}
    device = mesh.devices.flat[0]
    settings = config.model.to_dict() | section
    model = from_config(settings, about.num_classes, device.device_kind)
    check_backend(model.execution.backend, device.platform)
    schedule, tx = build_optimizer(config.optimizer, num_steps)

    rng = jax.random.key(config.seed)
    make_state = functools.partial(
        create_state, rng, model, tx, config.image_size, ema=config.recipe.ema_decay > 0
    )
    shape = jax.eval_shape(make_state)
    sharding = state_sharding(shape, mesh)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=schedule,
        mesh=mesh,
        num_classes=about.num_classes,
        seed=config.seed,
        **config.recipe,
    )
    return Experiment(
        config,
        sources,
        num_steps,
        mesh,
        model,
        about,
        state_shape=abstract_state(shape, sharding),
        create_state=jax.jit(make_state, out_shardings=sharding),
        train_step=jax.jit(
            step,
            in_shardings=(sharding, batch_sharding(mesh)),
            out_shardings=(sharding, replicated(mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(device.platform, active_backend(model, train=True)),
        ),
        copy_params=jax.jit(
            lambda params: jax.tree.map(jnp.copy, params), out_shardings=sharding.params
        ),
        change_norm=jax.jit(update_norm, out_shardings=replicated(mesh)),
        parameter_norm=jax.jit(optax.tree.norm, out_shardings=replicated(mesh)),
        metadata={
            "model_info": about.to_dict(),
            "ema": config.recipe.ema_decay > 0,
            "num_steps": num_steps,
            "num_train_examples": len(sources.train),
            "config": config.to_dict(),
            "versions": {"mixer_jax": mixer_jax.__version__, "jax": jax.__version__},
        },
    )


def build_optimizer(
    section: ConfigDict, num_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the schedule and the optax chain of a config's optimizer section."""
    settings = section.to_dict()
    names = ("learning_rate", "warmup_steps", "decay_type", "end_learning_rate")
    schedule = make_schedule(num_steps, **{name: settings.pop(name) for name in names})
    return schedule, make_optimizer(schedule, **settings)


def make_train_batches(
    experiment: Experiment, first_step: int, report: BadImageCallback
) -> Generator[Batch, None, None]:
    """Yields the training batches from `first_step` to the end of the run.

    Args:
        experiment: that is run.
        first_step: steps done already.
        report: as `train_batches` takes it.
    """
    config = experiment.config
    return train_batches(
        experiment.sources.train,
        seed=config.seed,
        start_step=first_step,
        num_steps=experiment.num_steps,
        batch_size=config.batch_size,
        image_size=config.image_size,
        preprocess=train_preprocess_args(config),
        sharding=batch_sharding(experiment.mesh),
        on_bad_images=report,
        **config.loader,
    )


def train_preprocess_args(config: ConfigDict) -> dict[str, Any]:
    """Returns what of the preprocess section is for training, as `train_image` takes it."""
    return {name: value for name, value in config.preprocess.items() if name != "eval_crop"}


def make_evaluators(experiment: Experiment) -> dict[str, Callable[[Any], AnyScores]]:
    """Returns, by name, functions from parameters to the scores of `config.evals`.

    Raises:
        UserError: a class has too few images for a few-shot probe.
    """
    config, mesh, sources = experiment.config, experiment.mesh, experiment.sources
    reading = EvalInputConfig(
        batch_size=config.eval_batch_size,
        image_size=(config.image_size, config.image_size),
        eval_crop=config.preprocess.eval_crop,
        exif_orientation=config.preprocess.exif_orientation,
        skip_bad=config.bad_images.skip_in_evaluation,
        num_threads=config.loader.num_threads,
        prefetch_batches=config.loader.prefetch_batches,
    )
    eval_step = make_eval_step(experiment.model, mesh)
    feature_fn = make_feature_fn(experiment.model, mesh)

    def score(source: Source, params: Any) -> ClassificationMetrics:
        return evaluate(eval_step, params, source, mesh, reading)

    def probe(name: str, settings: ProbeConfig, labels: LazyLabels, params: Any) -> ProbeMetrics:
        train, test = sources.probe_train[name], sources.evals[name]
        return run_probe(feature_fn, params, settings, train, test, mesh, reading, labels)

    made: dict[str, Callable[[Any], AnyScores]] = {}
    for name, source in sources.evals.items():
        if name not in sources.probe_train:
            made[name] = functools.partial(score, source)
            continue
        settings = _probe_settings(name, config.evals[name])
        labels = LazyLabels(sources.probe_train[name], config.bad_images.skip_in_evaluation)
        if settings.method == "few_shot":
            # Not only when it is scored: too few images are better told before the training.
            sample_all_shots(settings, sources.probe_train[name], labels)
        made[name] = functools.partial(probe, name, settings, labels)
    return made


def _probe_settings(name: str, entry: ConfigDict) -> ProbeConfig:
    shots = parse_shots(f"config.evals.{name}.shots", entry.shots)
    return ProbeConfig(entry.type, shots, tuple(range(entry.num_seeds)))


def flops_per_image(experiment: Experiment) -> int:
    """Returns the model FLOPs of training on one image: three forwards."""
    about = experiment.about
    return 3 * forward_flops(about.config, about.image_size[0], about.num_classes)


def throughput_metrics(experiment: Experiment, images_per_second: float) -> dict[str, float]:
    """Returns the rate, the rate a device, and the share of the devices' peak where it is known."""
    rates = {
        "images_per_second": images_per_second,
        "images_per_second_per_device": images_per_second / experiment.mesh.size,
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak:
        used = flops_per_image(experiment) * rates["images_per_second_per_device"]
        rates["model_flops_utilization"] = used / peak
    return rates


def _describe(config: ConfigDict, sources: RunDatasets, init_info: ModelInfo | None) -> ModelInfo:
    if init_info is None:
        variant, gelu = config.model.variant, config.model.gelu
        widths = get_config(variant, **architecture_overrides(config.model))
    else:
        variant, gelu, widths = init_info.variant, init_info.gelu, init_info.config
    return ModelInfo(
        "mixer",
        variant,
        widths,
        image_size=(config.image_size, config.image_size),
        num_classes=sources.train.num_classes,
        class_names=tuple(sources.train.class_names),
        gelu=gelu,
        eval_crop=config.preprocess.eval_crop,
        exif_orientation=config.preprocess.exif_orientation,
        loss=config.recipe.loss,
        dtype=config.model.dtype,
    )
