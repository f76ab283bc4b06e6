"""Versions and devices that a report of a problem should name."""

import http.client
import os
import platform
from collections.abc import Iterator
from importlib import metadata

from mixer_jax import __version__
from mixer_jax.distributed.hardware import device_error, is_started_by_launcher, joins_hosts
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
# Attribute of a TPU VM with the comma-separated hosts of its slice, where JAX finds them too.
_TPU_HOSTS_PATH = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_METADATA_TIMEOUT_SECONDS = 2.0


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
    if joins_hosts("auto") and not _is_single_tpu_vm():
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


def _is_single_tpu_vm() -> bool:
    """Returns whether this is a TPU VM whose slice has no other host."""
    if is_started_by_launcher():
        return False
    # GKE sets variables.
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    hosts = hosts or _query_tpu_hosts()
    return bool(hosts) and "," not in hosts


def _query_tpu_hosts() -> str:
    """Returns the hosts of a slice from the metadata server of Google Cloud; "" if none answers."""
    address = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    connection = http.client.HTTPConnection(address, timeout=_METADATA_TIMEOUT_SECONDS)
    try:
        connection.request("GET", _TPU_HOSTS_PATH, headers={"Metadata-Flavor": "Google"})
        response = connection.getresponse()
        return response.read().decode().strip() if response.status == http.client.OK else ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
