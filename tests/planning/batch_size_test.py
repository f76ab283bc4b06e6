"""Tests of the search for a batch size."""

from mixer_jax.planning.batch_size import Trial, search_batch_size


def test_search_batch_size_doubles_while_it_pays() -> None:
    rates = {8: 100.0, 16: 150.0, 32: 160.0, 64: 163.0, 128: 200.0}
    size, trials = search_batch_size(rates.__getitem__, 8)
    assert size == 32
    assert trials == [Trial(8, 100.0), Trial(16, 150.0), Trial(32, 160.0), Trial(64, 163.0)]


def test_search_batch_size_stops_at_the_end_of_memory() -> None:
    rates = {64: 100.0, 128: 200.0, 256: 300.0, 512: None}
    size, trials = search_batch_size(rates.__getitem__, 64)
    assert size == 256
    assert trials[-1] == Trial(512, None)


def test_search_batch_size_halves_a_start_that_does_not_fit() -> None:
    size, trials = search_batch_size(lambda size: 10.0 if size <= 16 else None, 64)
    assert size == 16
    # No size is tried twice.
    assert [trial.batch_size for trial in trials] == [64, 32, 16]
    none = [Trial(4, None), Trial(2, None), Trial(1, None)]
    assert search_batch_size(lambda size: None, 4) == (0, none)
