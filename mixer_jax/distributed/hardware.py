"""What accelerators can do: the one table of chips, by the names people and JAX give them."""

import dataclasses

_GB = 1e9
_TERA = 1e12
_CLOUD = "Google Cloud documentation, Cloud TPU,"


@dataclasses.dataclass(frozen=True)
class ChipSpec:
    """One kind of chip; numbers are of a chip, not of a device, unless they say so.

    Attributes:
        name: as a topology is written, e.g. "v5e".
        kinds: names that JAX gives its devices.
        devices: as JAX counts them, of one chip.
        flops: peak bfloat16 FLOP/s, without sparsity.
        memory_gib: that programs may use of one device, GiB; for TPUs as their compiler says.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s that a chip sends over one link to a neighbour; for GPUs over all
            its NVLinks.
        axes: of the torus that links chips, two links an axis; 0: all to all by switches.
        neighbours: chips that reach each other by links; 0: all of a slice.
        network_bandwidth: bytes/s that a chip sends over the network beyond those; None: not
            documented.
        source: where the numbers are from.
    """

    name: str
    kinds: tuple[str, ...]
    devices: int
    flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    axes: int
    neighbours: int
    network_bandwidth: float | None
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, for which programs can be compiled without one."""
        return self.axes > 0

    @property
    def platform(self) -> str:
        """Its kind's name in JAX."""
        return "tpu" if self.is_tpu else "gpu"


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    devices: int,
    *,
    tflops: float,
    memory_gib: float,
    memory_gbps: float,
    link_gbps: float,
    axes: int,
    network_gbps: float | None,
    source: str,
) -> ChipSpec:
    network = None if network_gbps is None else network_gbps * _GB
    return ChipSpec(
        name,
        kinds,
        devices,
        tflops * _TERA,
        memory_gib,
        memory_gbps * _GB,
        link_gbps * _GB,
        axes,
        0,
        network,
        source,
    )


def _gpu(
    name: str,
    kinds: tuple[str, ...],
    *,
    tflops: float,
    memory_gib: float,
    memory_gbps: float,
    nvlink_gbps: float,
    network_gbps: float,
    source: str,
) -> ChipSpec:
    """A GPU of machines of eight; its memory less what drivers and JAX keep for themselves."""
    return ChipSpec(
        name,
        kinds,
        1,
        tflops * _TERA,
        memory_gib,
        memory_gbps * _GB,
        nvlink_gbps * _GB,
        0,
        8,
        network_gbps * _GB,
        source,
    )


# Links: what is documented is the sum over a chip's links, for the newer ones of both directions;
# here it is divided by the links and, where both are meant, by two.
CHIPS: dict[str, ChipSpec] = {
    chip.name: chip
    for chip in [
        _tpu(
            "v2",
            ("TPU v2",),
            2,
            tflops=46,
            memory_gib=7.5,
            memory_gbps=700,
            link_gbps=62,
            axes=2,
            network_gbps=None,
            source=f'{_CLOUD} "TPU v2"; links: Jouppi et al., CACM 63(7), 2020, Table 3',
        ),
        _tpu(
            "v3",
            ("TPU v3",),
            2,
            tflops=123,
            memory_gib=15.5,
            memory_gbps=900,
            link_gbps=82,
            axes=2,
            network_gbps=None,
            source=f'{_CLOUD} "TPU v3"; links: Jouppi et al., CACM 63(7), 2020, Table 3',
        ),
        _tpu(
            "v4",
            ("TPU v4",),
            1,
            tflops=275,
            memory_gib=30.8,
            memory_gbps=1200,
            link_gbps=50,
            axes=3,
            network_gbps=None,
            source=f'{_CLOUD} "TPU v4"; links: Jouppi et al., arXiv 2304.01433, Table 4',
        ),
        _tpu(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            1,
            tflops=197,
            memory_gib=15.75,
            memory_gbps=819,
            link_gbps=50,
            axes=2,
            network_gbps=3.125,
            source=f'{_CLOUD} "TPU v5e"',
        ),
        _tpu(
            "v5p",
            ("TPU v5", "TPU v5p"),
            1,
            tflops=459,
            memory_gib=95.7,
            memory_gbps=2765,
            link_gbps=100,
            axes=3,
            network_gbps=6.25,
            source=f'{_CLOUD} "TPU v5p"',
        ),
        _tpu(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            1,
            tflops=918,
            memory_gib=31.25,
            memory_gbps=1640,
            link_gbps=100,
            axes=2,
            network_gbps=12.5,
            source=f'{_CLOUD} "TPU v6e"',
        ),
        _tpu(
            "tpu7x",
            ("TPU7x",),
            2,
            tflops=2307,
            memory_gib=94.75,
            memory_gbps=7380,
            link_gbps=100,
            axes=3,
            network_gbps=12.5,
            source=f'{_CLOUD} "TPU7x (Ironwood)"',
        ),
        _gpu(
            "a100-40",
            ("NVIDIA A100-SXM4-40GB",),
            tflops=312,
            memory_gib=38,
            memory_gbps=1555,
            nvlink_gbps=300,
            network_gbps=25,
            source='NVIDIA, "A100 Tensor Core GPU" data sheet; "DGX A100" data sheet',
        ),
        _gpu(
            "a100-80",
            ("NVIDIA A100-SXM4-80GB",),
            tflops=312,
            memory_gib=77,
            memory_gbps=2039,
            nvlink_gbps=300,
            network_gbps=25,
            source='NVIDIA, "A100 Tensor Core GPU" data sheet; "DGX A100" data sheet',
        ),
        _gpu(
            "h100",
            ("NVIDIA H100 80GB HBM3",),
            tflops=989,
            memory_gib=77,
            memory_gbps=3350,
            nvlink_gbps=450,
            network_gbps=50,
            source='NVIDIA, "H100 Tensor Core GPU" data sheet; "DGX H100" user guide',
        ),
        _gpu(
            "h200",
            ("NVIDIA H200",),
            tflops=989,
            memory_gib=137,
            memory_gbps=4800,
            nvlink_gbps=450,
            network_gbps=50,
            source='NVIDIA, "H200 Tensor Core GPU" data sheet; "DGX H200" user guide',
        ),
        _gpu(
            "b200",
            ("NVIDIA B200",),
            tflops=2250,
            memory_gib=175,
            memory_gbps=8000,
            nvlink_gbps=900,
            network_gbps=50,
            source='NVIDIA, "HGX B200" data sheet; "DGX B200" data sheet',
        ),
    ]
}
_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}


def get_chip(device_kind: str) -> ChipSpec | None:
    """Returns the chip whose devices JAX calls so, or None where it is not known."""
    return _BY_KIND.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's peak bfloat16 FLOP/s, or None where it is not known."""
    chip = get_chip(device_kind)
    return None if chip is None else chip.flops / chip.devices
