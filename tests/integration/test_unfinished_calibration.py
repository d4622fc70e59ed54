"""Damage to an unfinished calibration: one message says what and how to start anew, and the rest is kept."""

import json
import re
import shutil

import pytest

import models
from deltaguard.curvature import responses as responses_module
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.errors import DeltaguardError
from pairs import pair

ASKED = CalibrateConfig(num_samples=6, num_held_out=3, max_new_tokens=5, batch_size=4, rank="full")
RESUME = ASKED.model_copy(update={"resume": True})
REQUEST, RESPONSES, LOOK_ALIKES = "request.json", "responses.jsonl", "look-alikes.jsonl"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def interrupted(llama, tmp_path_factory):
    """The folder of a calibration that was stopped after its first batch."""

    def interrupt(event):
        if event.stage == "accumulate":
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, folder / "store", config=ASKED, progress=interrupt)
    return folder / "store.partial"


@pytest.fixture
def partial(interrupted, tmp_path):
    """A copy of it beside the output `store`."""
    return shutil.copytree(interrupted, tmp_path / "store.partial")


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    return contents(calibrate(llama, tmp_path_factory.mktemp("whole") / "store", config=ASKED).folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(llama, partial):
    """What a resumed run says, which must leave everything as it is."""
    before = contents(partial)
    with pytest.raises(DeltaguardError) as caught:
        calibrate(llama, partial.with_name("store"), config=RESUME)
    assert contents(partial) == before
    assert not partial.with_name("store").exists()
    return str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"rank": "auto"}', None])
def test_a_damaged_request_is_named_with_the_way_to_start_anew(llama, partial, uninterrupted, content):
    path = partial / REQUEST
    path.unlink() if content is None else path.write_bytes(content)
    message = refusal(llama, partial)
    assert str(path) in message
    assert f"Delete the folder {partial} and run the same command again: it starts anew." in message
    shutil.rmtree(partial)
    store = calibrate(llama, partial.with_name("store"), config=RESUME)
    assert contents(store.folder) == uninterrupted


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", "line 2: Input should be"),
        ('{"0": 1}', "line 2: `0`: Input should be an object"),
        ('{"0": {"text": 1, "ids": []}}', r"line 2: `0\.text`: Input should be a valid string \(it is 1\)"),
        ('{"0": "a"}', "line 2: `0`: Input should be an object"),
        ('{"first": "a"}', "line 2: `first"),
        ('{"0": "\\ud800"}', "line 2: "),
        ("oops", "line 2: "),
        ('{"9": {"text": "a", "ids": [1]}}', r"it answers 9; 9 conversations were asked, counted from 0"),
        ('{"-1": {"text": "a", "ids": [1]}}', "it answers -1;"),
    ],
)
def test_a_damaged_line_of_responses_is_named_with_the_way_to_start_anew(llama, partial, line, problem):
    path = partial / RESPONSES
    first, *others = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([first, line, *others]) + "\n", encoding="utf-8")
    message = refusal(llama, partial)
    assert str(path) in message
    assert re.search(problem, message)
    assert f"Delete the folder {partial} and run the same command again: it starts anew." in message


def test_no_response_of_the_users_own_is_replaced(llama, tmp_path):
    path = tmp_path / "store.partial" / RESPONSES
    calibrate_on = pair().aligned, tmp_path / "store"
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "Why?", "response": "No."}\n{"prompt": "How?"}\n', encoding="utf-8")
    config = CalibrateConfig(prompts=rows, resume=True, max_new_tokens=5)

    def interrupt(event):
        if event.stage == "accumulate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(*calibrate_on, config=config, progress=interrupt)
    (answered,) = json.loads(path.read_text(encoding="utf-8"))
    own = 1 - int(answered)
    path.write_text(json.dumps({own: {"text": "Sure.", "ids": [1]}}) + "\n", encoding="utf-8")
    with pytest.raises(DeltaguardError, match=rf"it answers {own}; "):
        calibrate(*calibrate_on, config=config)


def told(llama, output):
    """What a resumed run says where it cannot go on."""
    try:
        calibrate(llama, output, config=RESUME)
    except DeltaguardError as error:
        return str(error)
    return None


def test_a_run_that_waited_for_another_finds_the_finished_store(llama, tmp_path, uninterrupted, monkeypatch):
    """The second one saw no store yet when it began; the first finished before the second had the lock."""
    output, lock_folder = tmp_path / "store", responses_module.lock_folder

    def lock_after_the_other(folder):
        monkeypatch.undo()
        calibrate(llama, output, config=RESUME)
        folder.mkdir()
        return lock_folder(folder)

    monkeypatch.setattr(responses_module, "lock_folder", lock_after_the_other)
    store = calibrate(llama, output, config=RESUME)
    assert contents(store.folder) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", [REQUEST, RESPONSES, LOOK_ALIKES])
def test_whatever_a_file_holds_there_is_a_store_or_one_message(llama, partial, name):
    """Cut off anywhere, and overwritten anywhere in its first bytes: where headers and names are."""
    whole = (partial / name).read_bytes()
    spoiled = [whole[:size] for size in range(0, len(whole), len(whole) // 7 + 1)]
    for place in range(0, min(len(whole), 200), 25):
        spoiled += [whole[:place] + byte + whole[place + 1 :] for byte in (b"\x00", b"\xff", b"}")]
    kept = contents(partial)
    for content in spoiled:
        partial.mkdir(exist_ok=True)
        for path, whole in kept.items():
            (partial / path).write_bytes(content if path == name else whole)
        message = told(llama, partial.with_name("store"))
        assert message is None or "Delete" in message or "belongs to another calibration" in message
        shutil.rmtree(partial.with_name("store"), ignore_errors=True)
