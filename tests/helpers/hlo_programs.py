"""Small programs as XLA writes them, by hand."""

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "planning" / "hlo"

# A loop of 6 over a stack of blocks: each round reads one block's kernel by a fusion that slices,
# writes what it keeps into a stack in place, and keeps the rest on chip.
LOOP = (_FOLDER / "loop.hlo").read_text()
# What devices send, begun and awaited, in fusions, in loops. The model has one kernel
# (4, 256, 512) of four blocks, and a head (512, 10).
COLLECTIVES = (_FOLDER / "collectives.hlo").read_text()
# Of two slices: a sum between them, by their hosts.
SLICES = (_FOLDER / "slices.hlo").read_text()
# A piece of a training step on one chip: fusions with and without a product, a kernel by hand whose
# result lies in the place of its input, copies on and off the chip.
PARTED = (_FOLDER / "parts.hlo").read_text()
