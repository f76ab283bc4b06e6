"""Parsing of compiled programs: array types, trip counts, number of executions."""

import pytest

from mixer_jax.planning import hlo
from mixer_jax.planning.hlo import ArrayType, Program, parse_program
from tests.helpers.hlo_programs import LOOP


def trip_count(program: Program) -> int | None:
    return hlo.trip_count(program.computations["main"].instructions["while.1"])


def test_array_type_sizes() -> None:
    text = (
        "ENTRY %main (x: bf16[3,196]) -> bf16[3,196] {\n"
        "  ROOT %x = bf16[3,196]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n"
        "}\n"
    )
    (array,) = parse_program(text).computations["main"].instructions["x"].outputs
    assert array == ArrayType("bf16", (3, 196), (1, 0), (8, 128), 1)
    assert array.num_bytes == 3 * 196 * 2
    assert array.padded_bytes == 8 * 256 * 2
    assert array.hbm_bytes == 0
    assert array._replace(memory_space=0).hbm_bytes == 8 * 256 * 2
    column_major = ArrayType("f32", (3, 196), (0, 1), (8, 128))
    assert column_major.padded_bytes == 128 * 200 * 4
    assert ArrayType("pred", (5,)).num_bytes == 5
    assert ArrayType("token", ()).num_bytes == 0


def test_executed_instructions_repeat_loop_bodies() -> None:
    program = parse_program(LOOP)
    assert trip_count(program) == 6
    counts = {instruction.name: count for instruction, count in program.executed_instructions()}
    assert counts["y"] == counts["updated_residuals"] == 6
    assert counts["on_chip"] == 1


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("constant(6)", "constant(9)", 9),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(4)", 2),
        ("direction=LT", "direction=LE", None),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_trip_count(before: str, after: str, expected: int | None) -> None:
    assert before in LOOP
    assert trip_count(parse_program(LOOP.replace(before, after))) == expected


@pytest.mark.parametrize(
    ("before", "after", "counts", "unknown"),
    [
        ("constant(6)", "constant(9)", [9], []),
        ("constant(6)", "constant(0)", [], []),
        # The fusion in the loop has a matmul.
        ("direction=LT", "direction=LE", [1], ["while.1"]),
    ],
)
def test_loops_with_unknown_trip_count_run_once_and_are_reported(
    before: str, after: str, counts: list[int], unknown: list[str]
) -> None:
    program = parse_program(LOOP.replace(before, after))
    executed = program.executed_instructions()
    assert [count for instruction, count in executed if instruction.name == "y"] == counts
    assert program.unknown_trip_count_loops() == unknown


def test_unknown_trip_count_loops_without_matmuls_are_not_reported() -> None:
    text = LOOP.replace("direction=LT", "direction=LE")
    text = text.replace("convolution(%param_2, %bitcast.1)", "add(%param_2, %bitcast.1)")
    assert not parse_program(text).unknown_trip_count_loops()
    fusion = "fusion(%residuals, %y, %index)"
    assert fusion in text
    with_collective = text.replace(fusion, "all-reduce(%residuals)")
    assert parse_program(with_collective).unknown_trip_count_loops() == ["while.1"]
