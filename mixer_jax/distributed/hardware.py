"""Accelerators: peak rates, memory, links; detection of TPUs and clusters; does not import JAX."""

import dataclasses
import glob
import importlib.util
import os

from mixer_jax.errors import RunError, UserError, summarize_error

# What libtpu would otherwise request from the metadata server of a TPU VM.
_LIBTPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # By default /tmp/tpu_logs, which belongs to the first user of a machine.
    "TPU_LOG_DIR": "disabled",
}
# Set by launchers that start several processes: a JAX coordinator, TPU multislice.
_ADDRESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
# Number of processes that SLURM and Open MPI start.
_SIZE_VARIABLES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")

# Parts of JAX's messages about a platform that is unknown or has no device, and their last part.
_ABSENT = ("is not in the list of known backends", "NOT_FOUND", "No visible")
_JAX_HINT = " (set JAX_PLATFORMS="

_CLOUD = "Google Cloud documentation, Cloud TPU,"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """Specification of one type of chip. Figures are per chip unless they say otherwise.

    Attributes:
        name: Name in topologies, e.g. "v5e".
        device_kinds: Values of `jax.Device.device_kind`.
        devices_per_chip: Number of JAX devices per chip.
        flops: Peak bfloat16 FLOP/s without sparsity.
        memory_gib: Memory of one device that programs can use, in GiB. TPUs: the limit of their
            compiler. GPUs: the capacity without what drivers and JAX reserve.
        memory_bandwidth: Bytes/s.
        link_bandwidth: Bytes/s that a chip sends over one link, or a GPU over all of its NVLinks.
        torus_dims: Dimensions of the torus of chips, with two links per dimension and chip; 0:
            connected by switches.
        nvlink_domain: Number of chips that NVLink connects; 0: links connect the whole slice.
        network_bandwidth: Bytes/s that a chip sends over the data center network; None: not
            documented.
        source: Origin of the figures.
    """

    name: str
    device_kinds: tuple[str, ...]
    devices_per_chip: int = 1
    flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    torus_dims: int = 0
    nvlink_domain: int = 0
    network_bandwidth: float | None
    source: str

    @property
    def is_tpu(self) -> bool:
        """True for TPUs, for which programs can be compiled without the hardware."""
        return self.torus_dims > 0

    @property
    def platform(self) -> str:
        """Value of `jax.Device.platform`."""
        return "tpu" if self.is_tpu else "gpu"


# Google documents the sum over all links of a chip, for newer chips in both directions. Here it is
# divided by the number of links and, where it counts both directions, by two.
_TPUS = [
    ChipSpec(
        name="v2",
        device_kinds=("TPU v2",),
        devices_per_chip=2,
        flops=46e12,
        memory_gib=7.5,
        memory_bandwidth=700e9,
        link_bandwidth=62e9,
        torus_dims=2,
        network_bandwidth=None,
        source=f'{_CLOUD} "TPU v2"; links: Jouppi et al., CACM 63(7), 2020, Table 3',
    ),
    ChipSpec(
        name="v3",
        device_kinds=("TPU v3",),
        devices_per_chip=2,
        flops=123e12,
        memory_gib=15.5,
        memory_bandwidth=900e9,
        link_bandwidth=82e9,
        torus_dims=2,
        network_bandwidth=None,
        source=f'{_CLOUD} "TPU v3"; links: Jouppi et al., CACM 63(7), 2020, Table 3',
    ),
    ChipSpec(
        name="v4",
        device_kinds=("TPU v4",),
        flops=275e12,
        memory_gib=30.8,
        memory_bandwidth=1200e9,
        link_bandwidth=50e9,
        torus_dims=3,
        network_bandwidth=None,
        source=f'{_CLOUD} "TPU v4"; links: Jouppi et al., arXiv 2304.01433, Table 4',
    ),
    ChipSpec(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        memory_gib=15.75,
        memory_bandwidth=819e9,
        link_bandwidth=50e9,
        torus_dims=2,
        network_bandwidth=3.125e9,
        source=f'{_CLOUD} "TPU v5e"',
    ),
    ChipSpec(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        memory_gib=95.7,
        memory_bandwidth=2765e9,
        link_bandwidth=100e9,
        torus_dims=3,
        network_bandwidth=6.25e9,
        source=f'{_CLOUD} "TPU v5p"',
    ),
    ChipSpec(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        memory_gib=31.25,
        memory_bandwidth=1640e9,
        link_bandwidth=100e9,
        torus_dims=2,
        network_bandwidth=12.5e9,
        source=f'{_CLOUD} "TPU v6e"',
    ),
    ChipSpec(
        name="tpu7x",
        device_kinds=("TPU7x",),
        devices_per_chip=2,
        flops=2307e12,
        memory_gib=94.75,
        memory_bandwidth=7380e9,
        link_bandwidth=100e9,
        torus_dims=3,
        network_bandwidth=12.5e9,
        source=f'{_CLOUD} "TPU7x (Ironwood)"',
    ),
]
# In machines of eight.
_GPUS = [
    ChipSpec(
        name="a100-40",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12,
        memory_gib=38,
        memory_bandwidth=1555e9,
        link_bandwidth=300e9,
        nvlink_domain=8,
        network_bandwidth=25e9,
        source='NVIDIA, "A100 Tensor Core GPU" data sheet; "DGX A100" data sheet',
    ),
    ChipSpec(
        name="a100-80",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        memory_gib=77,
        memory_bandwidth=2039e9,
        link_bandwidth=300e9,
        nvlink_domain=8,
        network_bandwidth=25e9,
        source='NVIDIA, "A100 Tensor Core GPU" data sheet; "DGX A100" data sheet',
    ),
    ChipSpec(
        name="h100",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        flops=989e12,
        memory_gib=77,
        memory_bandwidth=3350e9,
        link_bandwidth=450e9,
        nvlink_domain=8,
        network_bandwidth=50e9,
        source='NVIDIA, "H100 Tensor Core GPU" data sheet; "DGX H100" user guide',
    ),
    ChipSpec(
        name="h200",
        device_kinds=("NVIDIA H200",),
        flops=989e12,
        memory_gib=137,
        memory_bandwidth=4800e9,
        link_bandwidth=450e9,
        nvlink_domain=8,
        network_bandwidth=50e9,
        source='NVIDIA, "H200 Tensor Core GPU" data sheet; "DGX H200" user guide',
    ),
    ChipSpec(
        name="b200",
        device_kinds=("NVIDIA B200",),
        flops=2250e12,
        memory_gib=175,
        memory_bandwidth=8000e9,
        link_bandwidth=900e9,
        nvlink_domain=8,
        network_bandwidth=50e9,
        source='NVIDIA, "HGX B200" data sheet; "DGX B200" data sheet',
    ),
]
CHIPS: dict[str, ChipSpec] = {chip.name: chip for chip in [*_TPUS, *_GPUS]}
_BY_DEVICE_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}


def get_chip(device_kind: str) -> ChipSpec | None:
    """Returns the chip of a `jax.Device.device_kind`, or None if it is unknown."""
    return _BY_DEVICE_KIND.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 FLOP/s of one device, or None if it is unknown."""
    chip = get_chip(device_kind)
    return None if chip is None else chip.flops / chip.devices_per_chip


def has_tpu() -> bool:
    """Returns whether a TPU is attached to this machine, as a numbered device."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def joins_hosts(mode: str) -> bool:
    """Returns whether this process is, or may be, one of several that form a run.

    Args:
        mode: "yes", "no", or "auto"; see `multihost.initialize_distributed`.
    """
    if mode != "auto":
        return mode == "yes"
    if is_started_by_launcher():
        return True
    # A TPU VM may be one of several; a single one joins itself at once.
    return has_tpu() and importlib.util.find_spec("libtpu") is not None


def is_started_by_launcher() -> bool:
    """Returns whether environment variables announce other processes of the same run."""
    if any(os.environ.get(name) for name in _ADDRESS_VARIABLES):
        return True
    return any((read_int(name) or 1) > 1 for name in _SIZE_VARIABLES)


def read_int(variable: str) -> int | None:
    """Returns the value of an environment variable, or None if it is not a decimal number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def device_error(message: str) -> UserError | RunError:
    """Returns the error to raise if JAX cannot initialize its devices.

    Only absent devices are a usage error. Others, e.g. devices that another process uses, may be
    available to a later attempt.

    Args:
        message: Message of JAX's error, or of its assertion, which fails without a message if a
            platform is known but has no device.
    """
    is_assertion = message in ("", AssertionError.__name__)
    reason = "no device found" if is_assertion else message.partition(_JAX_HINT)[0]
    reason = summarize_error(RuntimeError(reason))
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and (is_assertion or any(part in message for part in _ABSENT)):
        return UserError(
            f"JAX_PLATFORMS must name devices that are present, got {platforms!r} ({reason}). "
            "Unset it to use the devices that JAX finds."
        )
    return RunError(f"JAX cannot use its devices: {reason}.")


def silence_libtpu() -> None:
    """Prevents warnings of libtpu on a machine without a TPU, where `plan` uses it as a compiler.

    Must be called before JAX is imported. JAX detects the available devices as usual.
    """
    if not has_tpu():
        for name, value in _LIBTPU_ENV.items():
            os.environ.setdefault(name, value)
