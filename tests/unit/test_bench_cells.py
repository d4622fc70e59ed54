"""What a cell's key holds: values, functions with what they were made with, and the code behind them."""

import json
from dataclasses import dataclass
from functools import partial

import pytest

from bench_reports import cell
from deltaguard.errors import DeltaguardError
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.cells import Shelf, content_key, source_hash
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
        made(compensation="joint"),
        made(compensation="none"),
        made(recipe=Recipe(0.1)),
        partial(combined, share=0.5),
        partial(combined, share=0.6),
        combined,
        Recipe,
    )
    keys = [content_key(part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert keys[4] == content_key(made(compensation="joint"))
    assert keys[7] == content_key(partial(combined, share=0.5))


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
        content_key(made(state=object()))


@pytest.fixture
def package(tmp_path):
    for name in ("solvers/greedy.py", "evaluation/judges/rules.py", "studies/peers.py", "reports/page.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("SHARE = 0.5\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    "edited",
    [
        "solvers/greedy.py",
        "evaluation/judges/rules.py",
        "studies/peers.py",
        "data/prompts.jsonl",
        "new.py",
    ],
)
def test_an_edit_of_what_makes_or_judges_models_gives_another_hash(package, edited):
    before = source_hash(package)
    assert source_hash(package) == before
    (package / edited).write_text("SHARE = 0.6\n")
    assert source_hash(package) != before


def test_an_edit_of_what_is_drawn_leaves_cells_as_they_are(package):
    before = source_hash(package)
    (package / "reports" / "page.py").write_text("SHARE = 0.6\n")
    assert source_hash(package) == before


def test_the_code_that_cells_depend_on_is_there():
    assert source_hash() == source_hash() != content_key([])


def stored(shelf, kept):
    return shelf.cell(kept.key, lambda found: found.method == "greedy", lambda: kept)


def test_a_cell_is_the_one_that_its_name_says(tmp_path):
    shelf, kept = Shelf(tmp_path), cell("task", 0, "greedy", 0.2, 0.1, 2.0)
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
