"""Configuration: schema, building, overriding, validation and parsing.

Config files use `get_default`, `evals` and `mixture`. Names are imported on first use, so that the
schema can be read without ml_collections.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["evals", "fill_defaults", "get_default", "mixture", "parse", "validate"]

if TYPE_CHECKING:
    from mixer_jax.config.config import evals, fill_defaults, get_default, mixture, parse, validate


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mixer_jax.config import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
