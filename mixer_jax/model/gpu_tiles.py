"""Matrices in tiles, for GPU kernels that read and write every element once (Pallas on Triton)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Tiling(NamedTuple):
    """How a kernel cuts a matrix.

    Attributes:
        rows: of a tile; a power of two.
        columns: of a piece of a tile, at most; a power of two. 256 bfloat16 numbers of a row are
            16 bytes for each thread of a warp, which is what memory gives fastest.
        warps: of a program.
        programs: of the kernel, at most; each visits tiles in turn and sums over its rows. As all
            have the same to do, their number is best a multiple of what the device runs at once.
    """

    rows: int
    columns: int
    warps: int
    programs: int

    def width(self, num_columns: int) -> int:
        """Returns the columns of a piece: a whole row, or what divides it if that is not little."""
        if num_columns <= self.columns:
            return pl.next_power_of_2(num_columns)
        divisor = math.gcd(num_columns, self.columns)
        return divisor if divisor >= 64 else self.columns

    def num_programs(self, num_rows: int, across: int = 1) -> int:
        """Returns how many programs share the rows, where `across` share the columns."""
        return min(max(self.programs // across, 1), pl.cdiv(num_rows, self.rows))


class Tiles:
    """The tiles that one program visits, of a matrix or several of its shape.

    Values in registers: a tile is a list of pieces (rows, width), a vector over columns a list of
    pieces (1, width), a vector over rows (rows, 1). Outside of the matrix they are 0. Vectors are
    float32; tiles are loaded in the matrix' own type, and `widen` makes them float32.

    Args:
        shape: of the matrix.
        tiling: how it is cut.
        columns: first column of each piece.
        program: number of this program along the rows.
        programs: that share the rows.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tiling: Tiling,
        columns: list[Any],
        program: Any,
        programs: int,
    ):
        self.num_rows, self.num_columns = shape
        self.rows, self.width = tiling.rows, tiling.width(self.num_columns)
        self.program, self.programs = program, programs
        # A slice at a constant has to end within its array; one at a computed place may be masked.
        masked = self.num_columns % self.width > 0
        self.columns = [program * 0 + column for column in columns] if masked else columns

    def loop(
        self, fetch: Callable[[Any], Any], body: Callable[[Any, Any, Any], Any], init: Any
    ) -> Any:
        """Runs `carry = body(row, fetch(row), carry)` for the first rows of this program's tiles.

        A tile is fetched while the one before it is worked on, so that memory is not waited for.
        """
        left = pl.cdiv(self.num_rows, self.rows) - self.program + self.programs - 1
        count = lax.div(left, self.programs)

        def row_of(i: Any) -> Any:
            return (self.program + i * self.programs) * self.rows

        def step(i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            fetched, carry = state
            later = fetch(row_of(jnp.minimum(i + 1, count - 1)))
            return later, body(row_of(i), fetched, carry)

        return lax.fori_loop(0, count, step, (fetch(row_of(0)), init))[1]

    def load(self, ref: Any, row: Any) -> list[Any]:
        """Returns a tile."""
        return [load(*self._place(ref, row, column)) for column in self.columns]

    def widen(self, tile: list[Any]) -> list[Any]:
        """Returns a tile as float32."""
        return [piece.astype(jnp.float32) for piece in tile]

    def store(self, ref: Any, row: Any, tile: list[Any]) -> None:
        """Stores a tile."""
        for column, piece in zip(self.columns, tile, strict=True):
            place, mask = self._place(ref, row, column)
            plgpu.store(place, piece.astype(ref.dtype), mask=mask)

    def load_across(self, ref: Any) -> list[Any]:
        """Returns a vector over columns."""
        places = [pl.ds(column, self.width) for column in self.columns]
        return [
            load(ref.at[place], self._mask_across(column)).astype(jnp.float32)[None, :]
            for place, column in zip(places, self.columns, strict=True)
        ]

    def load_down(self, ref: Any, row: Any, period: int | None = None) -> Any:
        """Returns a tile's part of a vector over rows.

        Args:
            ref: the vector.
            row: first of the tile.
            period: the vector's length, if row r's number is at r % period.
        """
        numbers = self._numbers(row)
        place = (
            pl.ds(row, self.rows)
            if period is None
            else lax.rem(numbers, jnp.full_like(numbers, period))
        )
        return load(ref.at[place], self._mask_down(row)).astype(jnp.float32)[:, None]

    def store_down(self, ref: Any, row: Any, values: Any) -> None:
        """Stores a tile's part of a vector over rows."""
        place = ref.at[pl.ds(row, self.rows)]
        plgpu.store(place, values.reshape(self.rows), mask=self._mask_down(row))

    def store_sums(self, ref: Any, offset: int, tile: list[Any]) -> None:
        """Stores the sums down a tile's columns in `ref[program]`, from there on."""
        for column, piece in zip(self.columns, tile, strict=True):
            place = ref.at[self.program, pl.ds(column + offset, self.width)]
            plgpu.store(place, jnp.sum(piece, axis=0), mask=self._mask_across(column))

    def sum_across(self, tile: list[Any]) -> Any:
        """Returns the sums of a tile's rows, as a vector over rows."""
        return jnp.sum(sum(tile[1:], start=tile[0]), axis=1)[:, None]

    def zeros(self) -> list[Any]:
        """Returns a tile of zeros."""
        return [jnp.zeros((self.rows, self.width), jnp.float32) for _ in self.columns]

    def clear(self, tile: list[Any]) -> list[Any]:
        """Returns a tile with 0 in the columns outside of the matrix."""
        if self.num_columns % self.width == 0:
            return tile
        masks = [self._mask_across(column)[None, :] for column in self.columns]
        shape = (self.rows, self.width)
        return [
            jnp.where(jnp.broadcast_to(mask, shape), piece, 0.0)
            for mask, piece in zip(masks, tile, strict=True)
        ]

    def _numbers(self, row: Any) -> Any:
        return row + jnp.arange(self.rows)

    def _mask_down(self, row: Any) -> Any:
        return self._numbers(row) < self.num_rows if self.num_rows % self.rows else None

    def _mask_across(self, column: Any) -> Any:
        if self.num_columns % self.width == 0:
            return None
        return column + jnp.arange(self.width) < self.num_columns

    def _place(self, ref: Any, row: Any, column: Any) -> tuple[Any, Any]:
        """Returns where a piece lies, and which of it is within the matrix; None means all."""
        down, across = self._mask_down(row), self._mask_across(column)
        shape = (self.rows, self.width)
        down = None if down is None else jnp.broadcast_to(down[:, None], shape)
        across = None if across is None else jnp.broadcast_to(across[None, :], shape)
        mask = across if down is None else down if across is None else down & across
        return ref.at[pl.ds(row, self.rows), pl.ds(column, self.width)], mask


def load(place: Any, mask: Any) -> Any:
    """Returns what lies there, 0 where the mask is false."""
    return plgpu.load(place, mask=mask, other=None if mask is None else 0.0)
