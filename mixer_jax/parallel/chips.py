"""What accelerators can do, by the name JAX gives them: the one table of chips."""

# Peak bfloat16 FLOP/s of one device as JAX counts devices (a TPU v2 or v3 device is a core, half a
# chip). TPU: Google Cloud's TPU system architecture pages; NVIDIA: data sheets, without sparsity.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2310e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's peak bfloat16 FLOP/s, or None where it is not known."""
    return PEAK_FLOPS.get(device_kind)
