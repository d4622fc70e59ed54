"""Fine-tunes one after another: what one failure means for the others."""

from pathlib import Path

import pytest

from deltaguard import DeltaguardError
from deltaguard.reports.records.batch import BatchRow
from deltaguard.restoration.aligned import SharedInputError
from deltaguard.restoration.batch import each_of

OUTPUTS = {name: Path("out") / name for name in ("one", "two", "three", "four")}


def carried_out(failures):
    told, done = [], []

    def work(finetuned, output):
        done.append(finetuned)
        if finetuned in failures:
            raise failures[finetuned]
        return BatchRow(finetuned=finetuned, output=str(output))

    report = each_of(OUTPUTS, work, lambda *failed: told.append(failed))
    return [row.error for row in report.rows], told, done


def test_one_that_fails_leaves_the_others():
    errors, told, done = carried_out({"two": DeltaguardError("odd")})
    assert errors == [None, "odd", None, None]
    assert told == [("two", "odd")]
    assert done == list(OUTPUTS)


def test_where_what_all_share_breaks_half_way_what_is_finished_is_still_told():
    errors, told, done = carried_out({"two": SharedInputError("the store has changed")})
    assert errors == [None, *["the store has changed"] * 3]
    assert [finetuned for finetuned, _ in told] == ["two", "three", "four"]
    assert done == ["one", "two"]


def test_where_it_is_broken_from_the_start_that_is_one_error():
    with pytest.raises(SharedInputError, match="no store"):
        carried_out({"one": SharedInputError("no store")})
