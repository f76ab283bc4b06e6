"""MLP-Mixer in JAX and Flax: pre-train, fine-tune, evaluate and use (arXiv 2105.01601).

The public face. Names are imported when first used, so that `import mixer_jax` costs nothing:

- `create_model(variant, num_classes, **overrides)`: a Flax module, ready to `init` and `apply`.
- `load_pretrained(source, …)`: weights of a run, of Google, of timm or of the Hugging Face Hub, at
  any image size, as a `Classifier`: from images to logits, from files to named classes.
- `VARIANTS`: the widths of the paper's seven models (Table 1).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VARIANTS", "Classifier", "__version__", "create_model", "load_pretrained"]

if TYPE_CHECKING:
    from mixer_jax.inference import Classifier, load_pretrained
    from mixer_jax.models.mixer_config import VARIANTS
    from mixer_jax.models.registry import create_model

_HOMES = {
    "VARIANTS": "mixer_jax.models.mixer_config",
    "create_model": "mixer_jax.models.registry",
    "Classifier": "mixer_jax.inference",
    "load_pretrained": "mixer_jax.inference",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
