"""Batches in parts that fit: every conversation once, in its order, and to every sum once."""

import pytest
import torch

from deltaguard.curvature.fitting import Due, Fitting
from deltaguard.curvature.routed import Pool, RoutedMoment
from deltaguard.curvature.sums import RunningMoment
from deltaguard.errors import DeltaguardError


def lacking(*_):
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("room", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_every_conversation_is_run_once_in_parts_that_fit(rows, room):
    told, tried = [], []

    def work(part):
        tried.append(part)
        return list(range(rows))[part] if part.stop - part.start <= room else lacking()

    fitting = Fitting(told.append)
    assert [each for found in fitting.run(rows, work) for each in found] == list(range(rows))
    assert len(told) == sum(part.stop - part.start > room for part in tried)
    assert {event.stage for event in told} <= {"memory"}
    assert fitting.most >= min(room, rows) // 2 or not told
    # Later batches begin with what was found to fit.
    tried.clear()
    fitting.run(rows, work)
    assert all(part.stop - part.start <= room for part in tried)


def test_a_single_conversation_that_does_not_fit_is_an_error():
    fitting = Fitting()
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        fitting.run(4, lacking)
    assert fitting.most == 1


def test_rows_are_joined():
    rows = torch.arange(10.0).reshape(5, 2)
    fitting = Fitting(most=2)
    assert torch.equal(fitting.joined(5, lambda part: rows[part]), rows)
    assert fitting.joined(2, lambda part: rows[part]).data_ptr() == rows.data_ptr()


def test_what_was_added_before_memory_ran_out_is_not_added_again():
    mask = torch.tensor([[True, True, False]] * 5)
    added = {}
    first = Due(mask, slice(0, 5), added)
    first.note("early")
    half = Due(mask, slice(0, 2), added)
    assert not half.chosen("early").any()
    assert half.chosen("late").tolist() == [True, True, False] * 2
    half.note("late")
    # Parts need not end where the one ended that failed.
    over = Due(mask, slice(1, 4), added)
    assert over.chosen("late").tolist() == [False] * 3 + [True, True, False] * 2
    assert not over.chosen("early").any()
    assert Due(mask, slice(0, 5), {}).chosen("early").tolist() == [True, True, False] * 5


def vectors(count, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before", [0, 4, 9])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_expert_and_its_pool_are_added_to_together_or_not_at_all(before, count, monkeypatch):
    pool = Pool(6, experts=1)
    expert, alike = RoutedMoment(pool), RoutedMoment(Pool(6, experts=1))
    for each in (expert, alike):
        each.add(vectors(before))
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "add", lacking)
        with pytest.raises(torch.OutOfMemoryError):
            expert.add(vectors(count, 1))
    for each in (expert, alike):
        each.add(vectors(count, 1))
    assert expert.tokens == alike.tokens == before + count == pool.moment.tokens
    torch.testing.assert_close(expert.total(6), alike.total(6), rtol=0, atol=0)
    torch.testing.assert_close(pool.moment.total, alike.pool.moment.total, rtol=0, atol=0)


def test_memory_that_ends_within_a_sum_is_no_reason_to_try_again(monkeypatch):
    running = RunningMoment(3)
    monkeypatch.setattr(torch.Tensor, "addmm_", lacking)
    with pytest.raises(DeltaguardError, match="Too little memory"):
        running.add(vectors(2)[:, :3])
