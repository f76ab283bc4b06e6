"""MLP-Mixer, ViT and BiT in JAX and Flax: pre-train, fine-tune, evaluate and use.

The public API. Names are imported on first use, so that `import mixer_jax` is instant:

- `list_models(filter, pretrained)`: names of models, e.g. "Mixer-B/16", or of published weights.
- `create_model(name, num_classes, **overrides)`: Flax module, ready to `init` and `apply`.
- `load_pretrained(source, …)`: `Classifier` with the weights of a workdir, of Google, timm or the
  Hugging Face Hub, at any image size: images in, logits or named classes out. `from_pretrained` is
  the same function.
- `load_config(name)`: configuration of a run, from a file or by the name of one in configs/.
- `train(config, workdir)`: trains or fine-tunes a model, or resumes the run in `workdir`.
- `evaluate(checkpoint, dataset)`: metrics of a checkpoint on every example of a split.
- `plot_batch(config)`, `plot_curves(workdir)`: figures of a training batch and of a run.
- `plot_units(classifier)`, `plot_filters(classifier)`: figures of weights over the image.
- `plot_saliency(saliencies)`: figure of what predictions depend on, from `Classifier.saliency`.
- `forward_intermediates(model, params, images)`: outputs and the activations of every layer.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "__version__",
    "create_model",
    "evaluate",
    "forward_intermediates",
    "from_pretrained",
    "list_models",
    "load_config",
    "load_pretrained",
    "plot_batch",
    "plot_curves",
    "plot_filters",
    "plot_saliency",
    "plot_units",
    "train",
]

if TYPE_CHECKING:
    from mixer_jax.checkpoints.model_zoo import list_models
    from mixer_jax.config.loading import load_config
    from mixer_jax.evaluate import CallableModule
    from mixer_jax.inference import Classifier, from_pretrained, load_pretrained
    from mixer_jax.main import train
    from mixer_jax.models.registry import create_model
    from mixer_jax.models.stack import forward_intermediates
    from mixer_jax.visualization.curves import plot_curves
    from mixer_jax.visualization.saliency import plot_saliency
    from mixer_jax.visualization.units import plot_filters, plot_units
    from mixer_jax.visualize import plot_batch

    evaluate: CallableModule

_MODULES = {
    "create_model": "mixer_jax.models.registry",
    "list_models": "mixer_jax.checkpoints.model_zoo",
    "Classifier": "mixer_jax.inference",
    "load_pretrained": "mixer_jax.inference",
    "from_pretrained": "mixer_jax.inference",
    "load_config": "mixer_jax.config.loading",
    "train": "mixer_jax.main",
    "plot_batch": "mixer_jax.visualize",
    "plot_curves": "mixer_jax.visualization.curves",
    "plot_filters": "mixer_jax.visualization.units",
    "plot_saliency": "mixer_jax.visualization.saliency",
    "plot_units": "mixer_jax.visualization.units",
    "forward_intermediates": "mixer_jax.models.stack",
}


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        # The module itself, as after `import mixer_jax.evaluate`; it is callable.
        return importlib.import_module("mixer_jax.evaluate")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
