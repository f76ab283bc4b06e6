"""MLP-Mixer in JAX and Flax: pre-train, fine-tune, evaluate and use (arXiv 2105.01601).

The public API. Names are imported on first use, so that `import mixer_jax` is instant:

- `list_models()`: names of all models, e.g. "Mixer-B/16".
- `create_model(name, num_classes, **overrides)`: Flax module, ready to `init` and `apply`.
- `load_pretrained(source, …)`: `Classifier` with the weights of a workdir, of Google, timm or the
  Hugging Face Hub, at any image size: images in, logits or named classes out.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "__version__",
    "create_model",
    "list_models",
    "load_pretrained",
]

if TYPE_CHECKING:
    from mixer_jax.inference import Classifier, load_pretrained
    from mixer_jax.models.registry import create_model, list_models

_MODULES = {
    "create_model": "mixer_jax.models.registry",
    "list_models": "mixer_jax.models.registry",
    "Classifier": "mixer_jax.inference",
    "load_pretrained": "mixer_jax.inference",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
