"""Versions and devices that a report of a problem should name."""

import platform
from collections.abc import Iterator
from importlib import metadata

from mixer_jax import __version__
from mixer_jax.distributed.hardware import device_error, joins_hosts

# Distributions that matter if they are installed.
_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "tensorflow",
    "tensorflow-cpu",
    "torch",
)


def describe_environment() -> Iterator[str]:
    """Yields lines with the versions of this package, Python and libraries, and the devices."""
    yield f"mixer-jax {__version__}"
    yield f"python {platform.python_version()}"
    yield f"platform {platform.platform()}"
    for name in _LIBRARIES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    # Last, because JAX takes seconds to initialize devices.
    yield f"devices {_describe_devices()}"


def _describe_devices() -> str:
    if joins_hosts("auto"):
        # JAX could wait for the other hosts.
        return "not queried, because this may be one of several hosts"
    import jax

    try:
        devices = jax.devices()
    except (AssertionError, RuntimeError) as error:
        return f"none: {device_error(str(error))}"
    return f"{len(devices)} {devices[0].device_kind}"
