"""What a bench's report tells its readers beside the numbers."""

from types import SimpleNamespace

import pytest

from deltaguard.evaluation.exchange import Question
from deltaguard.studies.data import Attacks
from deltaguard.studies.defences import defences
from deltaguard.studies.describe import notes
from deltaguard.studies.protocol import FULL, QUICK


def told(preset, attacks=Attacks(), left_out=(), beside=()):  # noqa: B008  # frozen
    setting = SimpleNamespace(
        preset=preset, attacks=attacks, left_out=left_out, methods=tuple(defences().values())
    )
    asked = SimpleNamespace(
        attack="c" * preset.attack, harmless="c" * preset.harmless, general=(0.0,) * preset.general
    )
    return notes(setting, [asked], beside)


def test_attacks_that_were_left_out_are_counted():
    attacks = Attacks(questions=(), given=12, repeated=3, trained=4)
    (note,) = [note for note in told(QUICK, attacks) if "attack prompts" in note]
    assert note.startswith("Of 12 attack prompts given, 3 were left out as repeated and 4 as trained, ")
    assert not [note for note in told(QUICK, Attacks(given=12)) if "attack prompts" in note]


def test_attacks_that_the_preset_has_no_room_for_are_counted():
    given = tuple(Question(f"Do harm {i}.") for i in range(QUICK.attack + 3))
    (note,) = [note for note in told(QUICK, Attacks(given, len(given))) if "attack prompts" in note]
    assert note == "Of 153 usable attack prompts 150 are asked, as many as the preset asks for."
    assert not [note for note in told(QUICK, Attacks(given[3:], 150)) if "attack prompts" in note]


def test_defaults_beside_a_search_are_named_with_the_fine_tunes_where_they_were():
    found = told(QUICK, beside=[("a", "kfac", 6e-4), ("b", "kfac", 6e-4), ("b", "ridge", 6e-4)])
    (note,) = [each for each in found if "beside these" in each]
    assert note.endswith("no score there: 0.0006 of kfac on a, b; 0.0006 of ridge on b.")
    assert not [each for each in told(QUICK) if "beside these" in each]


def test_methods_that_were_not_run_everywhere_are_named():
    assert (
        "Methods that train anew at every strength (safe-instruct, bea) were run on task-harmful-14 alone."
        in told(QUICK)
    )
    assert not [note for note in told(FULL) if "train anew" in note]


def test_fine_tunes_that_repeat_their_prompts_are_named():
    (note,) = [note for note in told(FULL) if "repeat" in note]
    assert "harmful-1000, harmful-10000, harmful-1000-lora, harmful-10000-lora repeat 200 prompts" in note
    assert not [note for note in told(QUICK) if "repeat" in note]


@pytest.mark.parametrize(("preset", "seeds"), [(QUICK, "0"), (FULL, "0, 1, 2")])
def test_intervals_are_said_to_hold_for_these_seeds(preset, seeds):
    assert any(f"hold for these seeds of the fine-tunes alone: {seeds}." in note for note in told(preset))
