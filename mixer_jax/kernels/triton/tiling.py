"""Tiling of matrices for GPU kernels that read and write every element once."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class TileConfig(NamedTuple):
    """Tile shape and launch configuration of a kernel.

    Attributes:
        block_rows: Rows per tile; a power of two.
        block_cols: Maximum columns per segment of a tile; a power of two. 256 bfloat16 numbers of
            a row are 16 bytes for each thread of a warp, the fastest access to memory.
        num_warps: Warps per program.
        num_programs: Maximum number of programs. Each visits several tiles and sums over its rows.
            As all have the same work, this is best a multiple of what the device runs at once.
    """

    block_rows: int
    block_cols: int
    num_warps: int
    num_programs: int

    def segment_width(self, num_cols: int) -> int:
        """Returns the columns per segment: a whole row, or a divisor of it if that is not small."""
        if num_cols <= self.block_cols:
            return pl.next_power_of_2(num_cols)
        divisor = math.gcd(num_cols, self.block_cols)
        return divisor if divisor >= 64 else self.block_cols

    def grid_size(self, num_rows: int, num_segments: int = 1) -> int:
        """Returns the number of programs along the rows, per segment of columns."""
        return min(max(self.num_programs // num_segments, 1), pl.cdiv(num_rows, self.block_rows))


class TileIterator:
    """Tiles visited by one program, of one matrix or several of the same shape.

    Values in registers: a tile is a list of segments (block_rows, width); a row vector, with a
    number per column, is a list of segments (1, width); a column vector, with a number per row, is
    (block_rows, 1). Elements outside the matrix are 0. Vectors are float32. Tiles are loaded in the
    matrix's own dtype and converted by `to_f32`.

    Args:
        shape: Rows and columns of the matrix.
        config: Tile shape.
        columns: First column of each segment.
        program: Index of this program along the rows.
        num_programs: Number of programs along the rows.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        config: TileConfig,
        columns: list[Any],
        program: Any,
        num_programs: int,
    ):
        self.num_rows, self.num_cols = shape
        self.block_rows, self.width = config.block_rows, config.segment_width(self.num_cols)
        self.program, self.num_programs = program, num_programs
        # A slice at a constant must end within its array; one at a computed index may be masked.
        is_masked = self.num_cols % self.width > 0
        self.columns = [program * 0 + column for column in columns] if is_masked else columns

    def pipelined_loop(
        self, fetch: Callable[[Any], Any], body: Callable[[Any, Any, Any], Any], init: Any
    ) -> Any:
        """Runs `carry = body(row, fetch(row), carry)` for the first row of each tile.

        The next tile is fetched while the present one is processed, to hide memory latency.
        """
        remaining = pl.cdiv(self.num_rows, self.block_rows) - self.program + self.num_programs - 1
        count = lax.div(remaining, self.num_programs)

        def row_of(i: Any) -> Any:
            return (self.program + i * self.num_programs) * self.block_rows

        def step(i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            fetched, carry = state
            prefetched = fetch(row_of(jnp.minimum(i + 1, count - 1)))
            return prefetched, body(row_of(i), fetched, carry)

        return lax.fori_loop(0, count, step, (fetch(row_of(0)), init))[1]

    def load(self, ref: Any, row: Any) -> list[Any]:
        """Loads a tile."""
        return [masked_load(*self._slice(ref, row, column)) for column in self.columns]

    def to_f32(self, tile: list[Any]) -> list[Any]:
        """Converts a tile to float32."""
        return [segment.astype(jnp.float32) for segment in tile]

    def store(self, ref: Any, row: Any, tile: list[Any]) -> None:
        """Stores a tile."""
        for column, segment in zip(self.columns, tile, strict=True):
            target, mask = self._slice(ref, row, column)
            plgpu.store(target, segment.astype(ref.dtype), mask=mask)

    def load_row_vector(self, ref: Any) -> list[Any]:
        """Loads a vector with a number per column."""
        slices = [pl.ds(column, self.width) for column in self.columns]
        return [
            masked_load(ref.at[s], self._col_mask(column)).astype(jnp.float32)[None, :]
            for s, column in zip(slices, self.columns, strict=True)
        ]

    def load_col_vector(self, ref: Any, row: Any, period: int | None = None) -> Any:
        """Loads a tile's part of a vector with a number per row.

        With a period, row r reads element r % period.
        """
        rows = self._row_indices(row)
        index: Any = pl.ds(row, self.block_rows)
        if period is not None:
            index = lax.rem(rows, jnp.full_like(rows, period))
        return masked_load(ref.at[index], self._row_mask(row)).astype(jnp.float32)[:, None]

    def store_col_vector(self, ref: Any, row: Any, values: Any) -> None:
        """Stores a tile's part of a vector with a number per row."""
        target = ref.at[pl.ds(row, self.block_rows)]
        plgpu.store(target, values.reshape(self.block_rows), mask=self._row_mask(row))

    def store_col_sums(self, ref: Any, offset: int, tile: list[Any]) -> None:
        """Stores the sum of each of a tile's columns in `ref[program]`, from `offset` on."""
        for column, segment in zip(self.columns, tile, strict=True):
            target = ref.at[self.program, pl.ds(column + offset, self.width)]
            plgpu.store(target, jnp.sum(segment, axis=0), mask=self._col_mask(column))

    def row_sums(self, tile: list[Any]) -> Any:
        """Sums each row of a tile, as a column vector."""
        return jnp.sum(sum(tile[1:], start=tile[0]), axis=1)[:, None]

    def zeros(self) -> list[Any]:
        """Returns a tile of zeros."""
        return [jnp.zeros((self.block_rows, self.width), jnp.float32) for _ in self.columns]

    def zero_padding(self, tile: list[Any]) -> list[Any]:
        """Sets columns outside the matrix to 0."""
        if self.num_cols % self.width == 0:
            return tile
        masks = [self._col_mask(column)[None, :] for column in self.columns]
        shape = (self.block_rows, self.width)
        return [
            jnp.where(jnp.broadcast_to(mask, shape), segment, 0.0)
            for mask, segment in zip(masks, tile, strict=True)
        ]

    def _row_indices(self, row: Any) -> Any:
        return row + jnp.arange(self.block_rows)

    def _row_mask(self, row: Any) -> Any:
        is_partial = self.num_rows % self.block_rows
        return self._row_indices(row) < self.num_rows if is_partial else None

    def _col_mask(self, column: Any) -> Any:
        if self.num_cols % self.width == 0:
            return None
        return column + jnp.arange(self.width) < self.num_cols

    def _slice(self, ref: Any, row: Any, column: Any) -> tuple[Any, Any]:
        """Returns a segment's slice of a matrix, and its mask; None if all of it is inside."""
        row_mask, col_mask = self._row_mask(row), self._col_mask(column)
        shape = (self.block_rows, self.width)
        rows = None if row_mask is None else jnp.broadcast_to(row_mask[:, None], shape)
        cols = None if col_mask is None else jnp.broadcast_to(col_mask[None, :], shape)
        mask = cols if rows is None else rows if cols is None else rows & cols
        return ref.at[pl.ds(row, self.block_rows), pl.ds(column, self.width)], mask


def masked_load(ref: Any, mask: Any) -> Any:
    """Loads a slice, with 0 where the mask is false."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)
