"""Small hand-written programs in XLA's text format."""

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "planning" / "hlo"

# A loop over six stacked blocks. Each iteration reads one block's kernel in a fusion that slices
# it, updates a stack of residuals in place, and keeps everything else in on-chip memory.
LOOP = (_FOLDER / "loop.hlo").read_text()
# Collectives in all their forms: asynchronous, fused, in a loop. The model has a kernel of four
# blocks, (4, 256, 512), and a head, (512, 10).
COLLECTIVES = (_FOLDER / "collectives.hlo").read_text()
# A reduction between two slices, through their hosts.
MULTI_SLICE = (_FOLDER / "multi_slice.hlo").read_text()
# Parts of a training step on one chip: fusions with and without a matmul, a custom kernel whose
# result aliases its operand, copies to and from on-chip memory.
TRAIN_STEP = (_FOLDER / "train_step.hlo").read_text()
