"""Versions and devices that a report of a problem should name."""

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata

from mixer_jax import __version__
from mixer_jax.distributed.hardware import device_error, joins_hosts
from mixer_jax.errors import describe_error

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
    "wandb",
)


def list_versions() -> dict[str, str]:
    """Returns the versions of this package, Python, the platform and installed libraries."""
    versions = {
        "mixer-jax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def describe_environment() -> Iterator[str]:
    """Yields lines with the versions of this package, Python and libraries, and the devices."""
    for name, version in list_versions().items():
        yield f"{name} {version}"
    # Last, because JAX takes seconds to initialize devices.
    yield f"devices {_describe_devices()}"


def _describe_devices() -> str:
    if joins_hosts("auto"):
        # JAX could wait for the other hosts.
        return "not queried, because this may be one of several hosts"
    # A run on this machine may need the rest of the memory of its GPUs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except Exception as error:
        # The report is for such installations too.
        return f"not queried, because JAX cannot be imported: {describe_error(error)}"
    try:
        devices = jax.devices()
    except (AssertionError, RuntimeError) as error:
        return f"none: {device_error(str(error))}"
    except Exception as error:
        return f"none: {describe_error(error)}"
    return f"{len(devices)} {devices[0].device_kind}"
