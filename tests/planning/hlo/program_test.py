"""Tests of reading a compiled program: types, loops, memory traffic, by hand-written texts."""

import pytest

from mixer_jax.planning.hlo.instruction import ArrayType
from mixer_jax.planning.hlo.program import read_program
from mixer_jax.planning.hlo.traffic import traffic
from tests.helpers.hlo_programs import COLLECTIVES, LOOP, SLICES


def test_arrays_know_what_they_take() -> None:
    text = "ENTRY %main (x: bf16[3,196]) -> bf16[3,196] {\n  ROOT %x = TYPE parameter(0)\n}\n"
    typed = text.replace("TYPE", "bf16[3,196]{1,0:T(8,128)(2,1)S(1)}")
    program = read_program(typed)
    (array,) = program.computations["main"].instructions["x"].arrays
    assert array == ArrayType("bf16", (3, 196), (1, 0), (8, 128), 1)
    assert array.num_bytes == 3 * 196 * 2
    # Whole tiles of 8 × 128.
    assert array.padded_bytes == 8 * 256 * 2
    across = ArrayType("f32", (3, 196), (0, 1), (8, 128))
    assert across.padded_bytes == 128 * 200 * 4
    assert ArrayType("pred", (5,)).num_bytes == 5
    assert ArrayType("token", ()).num_bytes == 0


def test_a_loop_is_run_as_often_as_it_counts() -> None:
    program = read_program(LOOP)
    main = program.computations["main"]
    assert program.trips(main, main.instructions["while.1"]) == 6
    times = {run.instruction.name: run.times for run in program.runs()}
    assert times["y"] == times["more"] == 6
    assert times["on_chip"] == 1


@pytest.mark.parametrize(
    ("before", "after", "trips"),
    [
        ("constant(6)", "constant(9)", 9),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(4)", 2),
        ("direction=LT", "direction=LE", None),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_trips(before: str, after: str, trips: int | None) -> None:
    assert before in LOOP
    program = read_program(LOOP.replace(before, after))
    main = program.computations["main"]
    assert program.trips(main, main.instructions["while.1"]) == trips


@pytest.mark.parametrize(
    ("before", "after", "times", "uncounted"),
    [
        ("constant(6)", "constant(9)", [9], []),
        ("constant(6)", "constant(0)", [], []),
        # Of a product: the fusion multiplies.
        ("direction=LT", "direction=LE", [1], ["while.1"]),
    ],
)
def test_loops_that_are_not_understood_run_once_and_are_told(
    before: str, after: str, times: list[int], uncounted: list[str]
) -> None:
    program = read_program(LOOP.replace(before, after))
    assert [run.times for run in program.runs() if run.instruction.name == "y"] == times
    assert program.uncounted() == uncounted


def test_loops_without_products_may_run_as_often_as_they_like() -> None:
    text = LOOP.replace("direction=LT", "direction=LE")
    text = text.replace("convolution(%param_2, %bitcast.1)", "add(%param_2, %bitcast.1)")
    assert not read_program(text).uncounted()
    summed = text.replace("fusion(%kept, %y, %at)", "all-reduce(%kept)")
    assert read_program(summed).uncounted() == ["while.1"]


def test_traffic_by_hand() -> None:
    moved = traffic(read_program(LOOP))
    kernel, kept = 256 * 512 * 2, 32 * 512 * 2
    # The input of a product and its output lie on chip; six kernels are read, six outputs kept,
    # and the counter, a number of four bytes, is read by both fusions.
    assert moved["fusion"] == 6 * (kernel + kept + 2 * 4)
    # Images are read, in float32; what they are turned to lies on chip.
    assert moved["convert"] == 32 * 256 * 4
    assert moved.total() - moved["fusion"] - moved["convert"] < 200


@pytest.mark.parametrize(
    ("inside", "num_bytes"),
    [
        # Both read 4 bytes a number; one writes 2, the other nothing: it is the same array.
        ("bf16[8,64] convert(%given)", 8 * 64 * (4 + 2)),
        ("f32[512] bitcast(%given)", 8 * 64 * 4),
        # Columns of a row of eight are written where they lie.
        ("f32[8,64] dynamic-update-slice(%given, %row, %zero, %zero)", 2 * 64 * 4),
    ],
)
def test_fusions_write_what_is_new(inside: str, num_bytes: int) -> None:
    made = inside.split(" ", 1)[0]
    text = f"""
%fused (given: f32[8,64], row: f32[1,64]) -> {made} {{
  %given = f32[8,64] parameter(0)
  %row = f32[1,64] parameter(1)
  %zero = s32[] constant(0)
  ROOT %made = {inside}
}}

ENTRY %main (x: f32[8,64], y: f32[1,64]) -> {made} {{
  %x = f32[8,64] parameter(0)
  %y = f32[1,64] parameter(1)
  ROOT %fusion = {made} fusion(%x, %y), kind=kLoop, calls=%fused
}}
"""
    assert traffic(read_program(text)).total() == num_bytes


def test_traffic_of_collectives_by_hand() -> None:
    moved = traffic(read_program(COLLECTIVES))
    whole, part, tokens, head = 4 * 256 * 512, 4 * 64 * 512, 32 * 196 * 512, 512 * 10
    # A sum of which a part is kept, in float32; and a gathering that is counted where it begins.
    assert moved["fusion"] == (2 * whole + 4 * part) + (2 * part + 2 * whole)
    assert moved["all-to-all"] == 2 * 2 * tokens
    # Three times in a loop, and once more with the loss.
    assert moved["all-reduce"] == 2 * 4 * (4 * head + 1)
    # With its two signals.
    assert moved["collective-permute"] == 2 * 3 * 224 * 224 + 2 * 4


def test_what_is_sent_between_slices_is_read_once() -> None:
    moved = traffic(read_program(SLICES))
    assert moved["send"] == moved["recv"] - 4 == 4 * 128 * 8 * 128
