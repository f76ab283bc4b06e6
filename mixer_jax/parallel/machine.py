"""What this machine has, as far as can be said before JAX is imported."""

import ctypes
import glob
import os
import platform

# What libtpu asks the metadata server of a TPU VM for.
_TOLD_TO_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


# Parameters of glibc's `mallopt`, and what they are set to: one heap for all threads, for only the
# first can grow large; nothing mapped by itself; nothing given back.
_KEEP_MEMORY = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
# By which users set the same.
_ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")


def has_tpu() -> bool:
    """Returns whether a TPU is attached to this machine, as a numbered device."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def has_gpu() -> bool:
    """Returns whether a GPU of NVIDIA's or AMD's is attached to this machine."""
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/kfd"))


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees, where it computes on CPUs.

    A step takes memory for all that lies between its arguments and its results, and frees it at the
    end. The C library gives so large a piece back to Linux, which finds and clears as many pages
    anew for the next step: a tenth of a training step's time (BENCHMARKS.md). To be called before
    JAX starts its threads.

    Returns:
        Whether it does. Not if there is an accelerator to compute on, nor under another C library
        than GNU's, nor where the environment says how memory is allocated.
    """
    first = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    on_cpu = first == "cpu" if first else not (has_tpu() or has_gpu())
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith(_ALLOCATOR_VARIABLES) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in _KEEP_MEMORY.values())


def quieten_libtpu() -> None:
    """Keeps libtpu, which `plan` needs without a TPU, from complaining that there is none.

    To be called before JAX is imported. JAX then finds the devices that there are, as ever.
    """
    if not has_tpu():
        for name, value in _TOLD_TO_LIBTPU.items():
            os.environ.setdefault(name, value)
