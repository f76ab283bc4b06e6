"""TPU detection and libtpu settings that must be known before JAX is imported."""

import glob
import os

# What libtpu would otherwise request from the metadata server of a TPU VM.
_LIBTPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def has_tpu() -> bool:
    """Returns whether a TPU is attached to this machine, as a numbered device."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def silence_libtpu() -> None:
    """Prevents warnings of libtpu on a machine without a TPU, where `plan` uses it as a compiler.

    Must be called before JAX is imported. JAX detects the available devices as usual.
    """
    if not has_tpu():
        for name, value in _LIBTPU_ENV.items():
            os.environ.setdefault(name, value)
