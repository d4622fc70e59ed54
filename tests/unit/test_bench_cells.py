"""What a cell's key holds: values, and functions by their names."""

import json
from dataclasses import dataclass

import pytest

from bench_reports import cell
from deltaguard.errors import DeltaguardError
from deltaguard.reports.records.bench import Cell
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.cells import CellStore, content_key
from deltaguard.studies.defences import defences


@dataclass(frozen=True)
class Recipe:
    rate: float


def made(**options):
    def make(request, strength):
        return request, strength, options

    return make


def combined(request, strength, share):
    return request, strength, share


def test_values_that_differ_have_keys_that_differ():
    parts = (
        Recipe(0.1),
        Recipe(0.2),
        RestoreConfig(strength=0.5),
        RestoreConfig(strength=0.5, other_params="finetuned"),
        combined,
        Recipe,
    )
    keys = [content_key(part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert keys[0] == content_key(Recipe(0.1))


def test_the_name_of_a_method_is_not_all_that_tells_it():
    keys = {content_key(method.make) for method in defences().values()}
    assert len(keys) == len(defences())


def test_ladders_rise_and_hold_their_defaults():
    for method in defences().values():
        assert list(method.ladder) == sorted(set(method.ladder))
        assert method.default is None or method.default in method.ladder
    assert defences()["kfac"].default == defences()["ridge"].default == RestoreConfig().dial


def test_what_has_no_content_of_its_own_is_refused():
    with pytest.raises(TypeError, match="object has no content"):
        content_key(object())
    # Two that differ in what they hold would have one name.
    with pytest.raises(TypeError, match="function has no content"):
        content_key(made(compensation="joint"))


def stored(shelf, kept):
    return shelf.cell(kept.key, Cell, lambda found: found.method == "greedy", lambda: kept)


def test_a_cell_is_the_one_that_its_name_says(tmp_path):
    shelf, kept = CellStore(tmp_path), cell("task", 0, "greedy", 0.2, 0.1, 2.0)
    assert stored(shelf, kept) == stored(shelf, kept) == kept
    path = tmp_path / "cells" / f"{kept.key}.json"
    for changed in ({"key": "other"}, {"method": "ridge"}):
        path.write_text(kept.model_copy(update=changed).model_dump_json())
        with pytest.raises(DeltaguardError, match=r"holds another cell than its name says. Remove it"):
            stored(shelf, kept)
    for field, value in (("attack", "xyz"), ("utility", [1e999]), ("seconds", {"request": -1})):
        path.write_text(json.dumps(kept.model_dump(mode="json") | {field: value}))
        with pytest.raises(DeltaguardError, match=rf"cannot be used: `{field}"):
            stored(shelf, kept)
