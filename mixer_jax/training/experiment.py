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
from mixer_jax.config import (
    check_unroll,
    check_warmup,
    parse_shots,
    resolve_num_steps,
    width_overrides,
)
from mixer_jax.data.examples import Source
from mixer_jax.data.pipeline import Batch, Report, train_batches
from mixer_jax.evaluation.classification import Scores, compile_judge, evaluate
from mixer_jax.evaluation.features import compile_features
from mixer_jax.evaluation.few_shot import Labels
from mixer_jax.evaluation.passes import Reading
from mixer_jax.evaluation.probes import ProbeScores, ProbeSettings, draw_all, run_probe
from mixer_jax.model.making import build_model, check_kernels
from mixer_jax.model.mixer import MlpMixer
from mixer_jax.model.variants import forward_flops, resolve_widths
from mixer_jax.parallel.chips import peak_flops
from mixer_jax.parallel.compiler import compiler_options
from mixer_jax.parallel.sharding import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    replicated,
    state_sharding,
)
from mixer_jax.training.optimizer import make_optimizer, make_schedule
from mixer_jax.training.run_sources import Sources
from mixer_jax.training.step import Metrics, TrainState, change_norm, create_state, train_step
from mixer_jax.weights.about import About
from mixer_jax.weights.checkpoint import abstract

AnyScores = Scores | ProbeScores
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
        copy_params: of a state, which the next step uses up, for `change_norm` after it.
        change_norm: of that step's update, from the copy and the new parameters.
        parameter_norm: of parameters.
        metadata: what its checkpoints say of themselves.
    """

    config: ConfigDict
    sources: Sources
    num_steps: int
    mesh: Mesh
    model: MlpMixer
    about: About
    state_shape: TrainState
    create_state: Callable[[], TrainState]
    train_step: TrainStep
    copy_params: Callable[[Any], Any]
    change_norm: Callable[[Any, Any], jax.Array]
    parameter_norm: Callable[[Any], jax.Array]
    metadata: dict[str, Any]


def build(
    config: ConfigDict,
    sources: Sources,
    devices: Sequence[jax.Device] | None = None,
    begins_with: About | None = None,
) -> Experiment:
    """Makes the parts of a run; compiles nothing and allocates nothing yet.

    Args:
        config: valid by `config.validate`.
        sources: from `open_sources`.
        devices: to run on; None: all of all hosts.
        begins_with: of the weights that the run begins with or goes on from, which then say widths
            and GELU; None: the config says them.

    Raises:
        UserError: the batch does not divide over the devices, warmup outlasts the run, or kernels
            are for other devices.
    """
    num_steps = resolve_num_steps(config, len(sources.train))
    check_warmup(config, num_steps)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    pieces = config.recipe.accumulation_steps
    check_batch_size("config.batch_size", config.batch_size, mesh, pieces)
    about = _describe(config, sources, begins_with)
    check_unroll(config, about.widths)
    section = {"variant": about.variant, "gelu": about.gelu, **vars(about.widths)}
    device = mesh.devices.flat[0]
    settings = config.model.to_dict() | section
    model = build_model(settings, about.num_classes, device.device_kind)
    check_kernels(model.kernels, device.platform)
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
        state_shape=abstract(shape, sharding),
        create_state=jax.jit(make_state, out_shardings=sharding),
        train_step=jax.jit(
            step,
            in_shardings=(sharding, batch_sharding(mesh)),
            out_shardings=(sharding, replicated(mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(device.platform, model.computed_by(train=True)),
        ),
        copy_params=jax.jit(
            lambda params: jax.tree.map(jnp.copy, params), out_shardings=sharding.params
        ),
        change_norm=jax.jit(change_norm, out_shardings=replicated(mesh)),
        parameter_norm=jax.jit(optax.tree.norm, out_shardings=replicated(mesh)),
        metadata={
            "about": about.to_json(),
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
    names = ("learning_rate", "warmup_steps", "decay", "end_learning_rate")
    schedule = make_schedule(num_steps, **{name: settings.pop(name) for name in names})
    return schedule, make_optimizer(schedule, **settings)


def training_batches(
    experiment: Experiment, first_step: int, report: Report
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
        first_step=first_step,
        num_steps=experiment.num_steps,
        batch_size=config.batch_size,
        image_size=config.image_size,
        preprocess=train_preprocess(config),
        sharding=batch_sharding(experiment.mesh),
        report=report,
        **config.loader,
    )


def train_preprocess(config: ConfigDict) -> dict[str, Any]:
    """Returns what of the preprocess section is for training, as `train_image` takes it."""
    return {name: value for name, value in config.preprocess.items() if name != "eval_crop"}


def evaluators(experiment: Experiment) -> dict[str, Callable[[Any], AnyScores]]:
    """Returns, by name, functions from parameters to the scores of `config.evals`.

    Raises:
        UserError: a class has too few images for a few-shot probe.
    """
    config, mesh, sources = experiment.config, experiment.mesh, experiment.sources
    reading = Reading(
        batch_size=config.eval_batch_size,
        image_size=(config.image_size, config.image_size),
        eval_crop=config.preprocess.eval_crop,
        exif_orientation=config.preprocess.exif_orientation,
        skip_bad=config.bad_images.skip_in_evaluation,
        threads=config.loader.threads,
        prefetch_batches=config.loader.prefetch_batches,
    )
    judge_batch = compile_judge(experiment.model, mesh)
    features_of = compile_features(experiment.model, mesh)

    def score(source: Source, params: Any) -> Scores:
        return evaluate(judge_batch, params, source, mesh, reading)

    def probe(name: str, settings: ProbeSettings, labels: Labels, params: Any) -> ProbeScores:
        train, test = sources.probe_train[name], sources.evals[name]
        return run_probe(features_of, params, settings, train, test, mesh, reading, labels)

    made: dict[str, Callable[[Any], AnyScores]] = {}
    for name, source in sources.evals.items():
        if name not in sources.probe_train:
            made[name] = functools.partial(score, source)
            continue
        settings = _probe_settings(name, config.evals[name])
        labels = Labels(sources.probe_train[name], config.bad_images.skip_in_evaluation)
        if settings.method == "few_shot":
            # Not only when it is scored: too few images are better told before the training.
            draw_all(settings, sources.probe_train[name], labels)
        made[name] = functools.partial(probe, name, settings, labels)
    return made


def _probe_settings(name: str, entry: ConfigDict) -> ProbeSettings:
    shots = parse_shots(f"evals.{name}.shots", entry.shots)
    return ProbeSettings(entry.kind, shots, tuple(range(entry.probe_seeds)))


def flops_per_image(experiment: Experiment) -> int:
    """Returns the model FLOPs of training on one image: three forwards."""
    about = experiment.about
    return 3 * forward_flops(about.widths, about.image_size[0], about.num_classes)


def throughput(experiment: Experiment, images_per_second: float) -> dict[str, float]:
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


def _describe(config: ConfigDict, sources: Sources, begins_with: About | None) -> About:
    if begins_with is None:
        variant, gelu = config.model.variant, config.model.gelu
        widths = resolve_widths(variant, **width_overrides(config.model))
    else:
        variant, gelu, widths = begins_with.variant, begins_with.gelu, begins_with.widths
    return About(
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
