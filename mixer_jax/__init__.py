"""MLP-Mixer in JAX and Flax: pre-train, restore and evaluate (arXiv 2105.01601).

The public face. Names are imported when first used, so that `import mixer_jax` costs nothing:

- `create_model(variant, num_classes, **overrides)`: a Flax module, ready to `init` and `apply`.
- `VARIANTS`: the widths of the paper's seven models (Table 1).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VARIANTS", "__version__", "create_model"]

if TYPE_CHECKING:
    from mixer_jax.model.mixer import create_model
    from mixer_jax.model.variants import VARIANTS


def __getattr__(name: str) -> Any:
    if name == "create_model":
        from mixer_jax.model.mixer import create_model

        return create_model
    if name == "VARIANTS":
        from mixer_jax.model.variants import VARIANTS

        return VARIANTS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
