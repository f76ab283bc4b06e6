"""What this machine has, as far as can be said before JAX is imported."""

import glob
import os

# What libtpu asks the metadata server of a TPU VM for.
_LIBTPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def has_tpu() -> bool:
    """Returns whether a TPU is attached to this machine, as a numbered device."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def silence_libtpu() -> None:
    """Keeps libtpu, which `plan` needs without a TPU, from complaining that there is none.

    To be called before JAX is imported. JAX then finds the devices that there are, as ever.
    """
    if not has_tpu():
        for name, value in _LIBTPU_ENV.items():
            os.environ.setdefault(name, value)
