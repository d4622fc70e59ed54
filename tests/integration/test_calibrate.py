"""`calibrate` end to end on tiny random models of every architecture."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from deltaguard.chat.conversations import (
    Conversation,
    count_look_alikes,
    harmful_prompts,
    harmless_prompts,
)
from deltaguard.chat.framings import FRAMINGS
from deltaguard.chat.thinking import THOUGHT_TOKENS
from deltaguard.chat.tokens import encode
from deltaguard.curvature import calibrate as calibrate_module
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import LOOK_ALIKE_TOKENS, Asked, CalibrateConfig, asked_for, requested
from deltaguard.curvature.room import answer_what_has_no_room
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_tokenizer
from pairs import ANSWERED

SHORT = CalibrateConfig(
    num_samples=6, num_look_alikes=2, num_held_out=3, max_new_tokens=5, batch_size=4, rank="full"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def used(store):
    """The conversations that were not held out."""
    prompts = {row.prompt for row in store.held_out}
    return [conversation for conversation in ANSWERED if conversation.prompt not in prompts]


# What is measured


def test_the_model_answers_the_packages_prompts(llama, tmp_path):
    events = []
    store = calibrate(llama, tmp_path / "store", config=SHORT, progress=events.append)
    made = store.provenance
    assert (made.conversations, made.look_alikes, made.truncated) == (8, 2, 0)
    assert made.system_role == "template"
    # The tests' model says nothing that makes sense.
    assert made.refusal_share == 0
    assert made.fingerprint == Checkpoint.open(llama).fingerprint()
    assert (made.aligned, made.dtype) == (str(llama), "float32")
    assert [(e.stage, e.done, e.total) for e in events] == [
        *[("load", 0, 1), ("load", 1, 1)],
        # Look-alikes are asked for by themselves, since they are answered shorter.
        *[("respond", 4, 11), ("respond", 8, 11), ("respond", 9, 11), ("respond", 11, 11)],
        # Half of the conversations are in framings, and nothing is leaned by those.
        *[("lean", 1, 1), ("accumulate", 1, 2), ("accumulate", 2, 2)],
        *[("decompose", i, 8) for i in range(1, 9)],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_long_conversations_are_truncated_and_counted(llama, tmp_path):
    config = SHORT.model_copy(update={"max_length": 40})
    store = calibrate(llama, tmp_path / "store", conversations=ANSWERED, config=config)
    whole = calibrate(llama, tmp_path / "whole", conversations=ANSWERED, config=SHORT)
    assert 0 < store.provenance.truncated < store.provenance.conversations == len(ANSWERED) - 1
    assert whole.provenance.truncated == 0
    assert store.provenance.tokens < whole.provenance.tokens
    assert 0 < store.provenance.response_tokens < whole.provenance.response_tokens
    assert store.groups[0].tokens == store.provenance.tokens


def test_a_model_with_few_positions_takes_no_more_tokens(tmp_path):
    folder = models.save(models.tiny_model("gpt2", n_positions=48), tmp_path / "model")
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=SHORT)
    assert store.provenance.truncated > 0


@pytest.mark.parametrize("words", [100, 14])
def test_a_prompt_without_room_for_an_answer_is_not_asked(tmp_path, monkeypatch, words):
    """A model of learned positions has none for the tokens of a longer one."""
    folder = models.save(models.tiny_model("gpt2", n_positions=48), tmp_path / "model")
    asked, answer = [], calibrate_module.respond

    def respond(model, tokenizer, rows, **named):
        asked.extend(row.prompt for row in rows if row.response is None)
        return answer(model, tokenizer, rows, **named)

    monkeypatch.setattr(calibrate_module, "respond", respond)
    path, long = tmp_path / "prompts.jsonl", "why " * words
    rows = [long, *(f"Why {i}?" for i in range(9))]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    config = SHORT.model_copy(update={"prompts": path, "num_samples": 10, "num_look_alikes": 0})
    store = calibrate(folder, tmp_path / "store", config=config)
    assert sorted(asked) == sorted(rows[1:])
    # It was to be calibrated on or held out, and the end of a turn is no answer of it.
    left_out = 10 - store.provenance.conversations - len(store.held_out)
    assert store.provenance.unanswered + left_out == 1
    assert long not in {row.prompt for row in store.held_out}


def test_what_is_not_asked_counts_neither_as_refused_nor_as_answered(llama, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = ["why " * 100 + str(i) for i in range(3)] + [f"Why {i}?" for i in range(9)]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    config = SHORT.model_copy(update={"prompts": path, "num_samples": 12, "max_length": 60})
    judged = []
    store = calibrate(
        llama, tmp_path / "store", config=config, is_refusal=lambda said: bool(judged.append(said) or said)
    )
    assert all(judged)
    assert store.provenance.unanswered > 0
    assert store.provenance.refusal_share == 1
    assert store.provenance.judged == store.provenance.harmful - store.provenance.unanswered


def test_an_empty_answer_counts_as_one_that_does_not_refuse(llama, tmp_path, monkeypatch):
    answer = calibrate_module.respond

    def respond(model, tokenizer, rows, **named):
        answered = answer(model, tokenizer, rows, **named)
        return [replace(answered[0], response="", response_ids=()), *answered[1:]]

    monkeypatch.setattr(calibrate_module, "respond", respond)
    judged = []
    store = calibrate(
        llama, tmp_path / "store", config=SHORT, is_refusal=lambda said: bool(judged.append(said) or said)
    )
    made = store.provenance
    assert "" in judged
    assert (made.unanswered, made.judged) == (0, made.harmful - made.framed)
    assert made.refusal_share == (made.judged - 1) / made.judged


@pytest.mark.parametrize("thoughts", ["", "<think>\n"])
def test_an_answer_has_room_up_to_the_last_position(llama, thoughts):
    tokenizer = load_tokenizer(llama, "model")
    tokenizer.chat_template += thoughts
    row = Conversation("Why is it so?")
    asked = Asked([row], [row], [row, replace(row, response="No.")])
    request = requested(Checkpoint.open(llama), asked, SHORT, torch.device("cpu"))
    request = request.model_copy(update={"max_new_tokens": 40, "max_length": 1000})
    thought = THOUGHT_TOKENS + len(tokenizer.encode("\n</think>\n\n")) if thoughts else 0
    read = len(encode(tokenizer, row, max_length=1000).ids) + thought

    def is_asked(positions):
        found = answer_what_has_no_room(asked, tokenizer, request, positions)
        assert found.held_out[1].response == "No."
        return [part[0].response is None for part in (found.safety, found.held_out, found.look_alikes)]

    assert is_asked(read + 40) == [True, True, True]
    assert is_asked(read + 39) == is_asked(read + LOOK_ALIKE_TOKENS) == [False, False, True]
    assert is_asked(read + LOOK_ALIKE_TOKENS - 1) == is_asked(1) == [False, False, False]


@pytest.mark.parametrize("memory", [None, 0])
def test_answers_that_are_there_load_no_model_to_give_them(llama, tmp_path, memory, monkeypatch):
    config = SHORT.model_copy(update={"memory": memory})

    def interrupt(event):
        if event.stage in ("accumulate", "backwards"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tmp_path / "store", config=config, progress=interrupt)
    loaded, load = [], calibrate_module.load_model
    monkeypatch.setattr(calibrate_module, "as_served", None)
    monkeypatch.setattr(calibrate_module, "load_model", lambda *a, **b: loaded.append(b) or load(*a, **b))
    resumed = config.model_copy(update={"resume": True})
    calibrate(llama, tmp_path / "store", config=resumed)
    # To be differentiated, as a whole: block by block not even that.
    assert len(loaded) == (memory is None)
    monkeypatch.undo()
    calibrate(llama, tmp_path / "other", config=config)
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_the_share_of_refusals_and_a_template_without_system_role_are_recorded(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    path = folder / "chat_template.jinja"
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path.write_text(refuse + path.read_text(encoding="utf-8"), encoding="utf-8")
    store = calibrate(
        folder,
        tmp_path / "store",
        conversations=ANSWERED,
        config=SHORT,
        is_refusal=lambda response: "cannot" in response,
    )
    assert store.provenance.system_role == "user turn"
    refusing = sum("cannot" in conversation.response for conversation in used(store))
    assert 0 < refusing < 4
    assert store.provenance.refusal_share == pytest.approx(refusing / 4)


def test_a_prompts_file_is_used(llama, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n', encoding="utf-8")
    config = SHORT.model_copy(update={"prompts": path})
    store = calibrate(llama, tmp_path / "store", config=config)
    assert store.provenance.harmful == len(store.held_out) == 1
    assert store.provenance.look_alikes == 2
    with pytest.raises(DeltaguardError, match="give one"):
        calibrate(llama, tmp_path / "other", config=config, conversations=ANSWERED)


def test_a_deployments_system_prompts_are_calibrated_on(llama, tmp_path, calibrated_on):
    path, own = tmp_path / "prompts.jsonl", ("You sell shoes.", "You are a pirate.")
    config = SHORT.model_copy(update={"systems": own, "num_samples": 7})
    store = calibrate(llama, tmp_path / "store", config=config)
    assert set(own) <= {row.system for row in (*calibrated_on(store), *store.held_out)}
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "system": ""}\n{"prompt": "c"}\n', encoding="utf-8")
    config = SHORT.model_copy(update={"prompts": path, "systems": own})
    asked = asked_for(None, config)
    written = (*asked.safety, *asked.held_out)
    assert {row.prompt: row.system for row in written} == {"a": own[0], "b": "", "c": own[1]}
    with pytest.raises(DeltaguardError, match="put these into those"):
        calibrate(
            llama, tmp_path / "other", config=SHORT.model_copy(update={"systems": own}), conversations=ROWS
        )


def test_look_alikes_are_calibrated_on_and_never_held_out(llama, tmp_path, calibrated_on):
    config = CalibrateConfig(num_samples=5, num_held_out=3, max_new_tokens=5, rank="full")
    store = calibrate(llama, tmp_path / "store", config=config)
    harmless = {row.prompt for row in harmless_prompts("training")}
    look_alikes = [row for row in calibrated_on(store) if any(each in row.prompt for each in harmless)]
    assert (len(look_alikes), store.provenance.look_alikes, store.provenance.conversations) == (5, 5, 10)
    assert not prompts(store.held_out) & harmless
    assert asked_for(None, config.model_copy(update={"num_look_alikes": 0})).harmless == []
    assert asked_for(ROWS, config).look_alikes == ()
    many = config.model_copy(update={"num_samples": 900})
    assert len(asked_for(None, many).harmless) == count_look_alikes()


def test_half_of_the_packages_prompts_stand_in_framings_and_none_that_is_held_out(tmp_path):
    asked = asked_for(None, CalibrateConfig(num_samples=33))
    harmful = {row.prompt for row in harmful_prompts("calibration")}
    harmless = {row.prompt for row in harmless_prompts("training")}
    parts = (asked.safety, asked.framed, asked.look_alikes, asked.framed_look_alikes)
    assert [len(rows) for rows in parts] == [17, 16, 17, 16]
    assert [not row for row in asked.is_framed] == [
        row.prompt in harmful | harmless for row in asked.calibration
    ]
    assert {row.prompt for row in asked.safety} <= harmful
    assert {row.prompt for row in asked.look_alikes} <= harmless
    for rows, known in ((asked.framed, harmful), (asked.framed_look_alikes, harmless)):
        assert all(framing_of(row)[1] in known for row in rows)
        assert len({framing_of(row)[0] for row in rows}) == len(FRAMINGS)
    assert {row.prompt for row in asked.held_out} <= {row.prompt for row in harmful_prompts("dial")}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(10)), encoding="utf-8")
    own = asked_for(None, CalibrateConfig(prompts=path))
    assert (own.framed, own.framed_look_alikes) == ((), ())
    assert {row.prompt for row in own.look_alikes} <= harmless


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_system_prompt_is_asked_under_with_framings_and_without(count):
    asked = asked_for(None, CalibrateConfig(systems=tuple(f"You are number {i}." for i in range(count))))
    pairs = ((asked.safety, asked.framed), (asked.look_alikes, asked.framed_look_alikes))
    for plain, in_framings in pairs:
        assert {row.system for row in plain} == {row.system for row in in_framings}
        for system in {row.system for row in plain}:
            own = [framing_of(row)[0] for row in in_framings if row.system == system]
            assert abs(len(own) - sum(row.system == system for row in plain)) <= 1
            assert len(set(own)) >= min(len(own), 5)


def framing_of(row):
    """The framing of a conversation, and the request within."""
    for framing in FRAMINGS:
        before, after = framing.split("{prompt}")
        if row.prompt.startswith(before) and row.prompt.endswith(after):
            return framing, row.prompt[len(before) : len(row.prompt) - len(after)]
    raise AssertionError(row.prompt)


def test_refusals_in_framings_do_not_count(llama, tmp_path, monkeypatch):
    def answered(model, tokenizer, conversations, **options):
        plain = {row.prompt for row in harmful_prompts("calibration")}
        return [replace(row, response="No." if row.prompt in plain else "Yes.") for row in conversations]

    monkeypatch.setattr(calibrate_module, "respond", answered)
    store = calibrate(llama, tmp_path / "store", config=SHORT, is_refusal="No.".__eq__)
    assert store.provenance.refusal_share == 1
    assert (store.provenance.harmful, store.provenance.framed, store.provenance.judged) == (6, 3, 3)


def test_look_alikes_answer_briefly_and_do_not_count_among_refusals(llama, tmp_path, monkeypatch):
    harmless, asked = {row.prompt for row in harmless_prompts("training")}, []

    def answered(model, tokenizer, conversations, **options):
        asked.append((len(conversations), options["max_new_tokens"]))
        return [
            replace(row, response="Yes." if any(each in row.prompt for each in harmless) else "No.")
            for row in conversations
        ]

    monkeypatch.setattr(calibrate_module, "respond", answered)
    config = SHORT.model_copy(update={"max_new_tokens": 40})
    store = calibrate(llama, tmp_path / "store", config=config, is_refusal="No.".__eq__)
    assert asked == [(9, 40), (2, LOOK_ALIKE_TOKENS)]
    assert store.provenance.refusal_share == 1


# What is held out


def prompts(rows):
    return {row.prompt for row in rows}


def with_seed(config, rows, wanted):
    """The configuration with a seed by which what is held out is as wanted."""
    configs = (config.model_copy(update={"seed": seed}) for seed in range(99))
    return next(each for each in configs if wanted(asked_for(rows, each).held_out))


@pytest.fixture
def calibrated_on(monkeypatch):
    """The conversations that were encoded to be calibrated on."""
    seen = []

    def spied(tokenizer, conversation, **options):
        # Prompts alone are encoded first, to see whether an answer has room.
        seen.extend([conversation] if conversation.response is not None else [])
        return encode(tokenizer, conversation, **options)

    monkeypatch.setattr(calibrate_module, "encode", spied)
    # Those that are held out are encoded too, later, to see whether they have a response.
    return lambda store: seen[: store.provenance.conversations]


def test_the_packages_prompts_are_measured_on_others_of_its_own(llama, tmp_path, calibrated_on):
    store = calibrate(llama, tmp_path / "store", config=SHORT)
    assert len(store.held_out) == 3
    assert prompts(store.held_out) <= {row.prompt for row in harmful_prompts("dial")}
    harmful = calibrated_on(store)[: store.provenance.harmful]
    known = {row.prompt for row in harmful_prompts("calibration")}
    assert all(any(each in row.prompt for each in known) for row in harmful)
    # They are answered by the model, as those it is calibrated on.
    assert all(row.response for row in store.held_out)


ROWS = tuple(Conversation(f"What is {i}?", system, "No.") for i in range(12) for system in (None, "Be kind."))


@pytest.mark.parametrize(
    ("asked", "held_out"),
    # A fifth of twelve prompts are two, each in two conversations.
    [({}, 4), ({"num_held_out": 3}, 3), ({"num_held_out": 1}, 1), ({"num_samples": 2}, 4), ({"seed": 5}, 4)],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_prompts_of_a_user_are_calibrated_on_or_measured_on(
    llama, tmp_path, calibrated_on, asked, held_out, from_file
):
    config = CalibrateConfig(**{"rank": "full", **asked})
    given = ROWS
    if from_file:
        lines = [json.dumps({k: v for k, v in asdict(row).items() if v is not None}) for row in ROWS]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        from_there = {"prompts": tmp_path / "prompts.jsonl", "num_look_alikes": 0}
        given, config = None, config.model_copy(update=from_there)
    store = calibrate(llama, tmp_path / "store", conversations=given, config=config)
    calibration = calibrated_on(store)
    assert len(store.held_out) == held_out
    assert not prompts(store.held_out) & prompts(calibration)
    assert prompts([*store.held_out, *calibration]) <= prompts(ROWS)
    left = len(ROWS) - 2 * len(prompts(store.held_out))
    assert len(calibration) == (2 if from_file and "num_samples" in asked else left)
    assert len({(row.prompt, row.system) for row in calibration}) == len(calibration)


def test_another_division_of_the_same_conversations_is_another_calibration(llama, tmp_path):
    rows = [Conversation(f"Why {i}?", None, "No.") for i in range(10)]

    def all_of(seed, held_out):
        config = CalibrateConfig(seed=seed, num_held_out=held_out)
        return asked_for(rows, config).all

    # Holding out one or two may leave all conversations in one order.
    seed = next(seed for seed in range(500) if all_of(seed, 1) == all_of(seed, 2))
    config = SHORT.model_copy(update={"seed": seed, "num_held_out": 1})
    calibrate(llama, tmp_path / "store", conversations=rows, config=config)
    other = config.model_copy(update={"num_held_out": 2, "resume": True})
    with pytest.raises(DeltaguardError, match="prompts_sha256 is"):
        calibrate(llama, tmp_path / "store", conversations=rows, config=other)


def test_the_seed_decides_what_is_held_out(llama, tmp_path):
    held_out = {
        calibrate(llama, tmp_path / f"{seed}", conversations=ROWS, config=CalibrateConfig(seed=seed)).held_out
        for seed in range(3)
    }
    assert len(held_out) == 3


@pytest.mark.parametrize("given", [[], ANSWERED[:1], [ANSWERED[0]] * 3])
def test_one_prompt_cannot_be_both_calibrated_on_and_measured_on(llama, tmp_path, given):
    message = rf"{len(given)} conversations with {len(given[:1])} different prompts .* two prompts are needed"
    with pytest.raises(DeltaguardError, match=message):
        calibrate(llama, tmp_path / "store", conversations=given, config=SHORT)


def test_what_leaves_no_room_for_a_response_is_not_measured_on(llama, tmp_path):
    long = Conversation("Why? " * 60, None, "No.")
    rows = [*(Conversation(f"Why {i}?", None, "No.") for i in range(9)), long]
    config = CalibrateConfig(max_length=60)
    with_another = with_seed(config, rows, lambda held_out: long in held_out)
    store = calibrate(llama, tmp_path / "store", conversations=rows, config=with_another)
    assert len(store.held_out) == 1
    assert long.prompt not in prompts(store.held_out)
    alone = with_seed(config, [long, rows[0]], lambda held_out: long in held_out)
    with pytest.raises(DeltaguardError, match="No held-out conversation has a response within 60 tokens"):
        calibrate(llama, tmp_path / "other", conversations=[long, rows[0]], config=alone)
    other = with_seed(config, [long, rows[0]], lambda held_out: long not in held_out)
    with pytest.raises(DeltaguardError, match="No conversation has a response within 60 tokens"):
        calibrate(llama, tmp_path / "other", conversations=[long, rows[0]], config=other)


# How much is kept


def test_by_default_a_store_takes_a_quarter_of_the_models_bytes(tmp_path):
    folder = models.save(
        models.tiny_model("llama", hidden_size=128, intermediate_size=256),
        tmp_path / "model",
        dtype=torch.bfloat16,
    )
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED)
    model, taken = (
        sum(path.stat().st_size for path in where.glob(names))
        for where, names in ((folder, "*.safetensors"), (store.folder, "curvature-*.safetensors"))
    )
    assert not store.is_full
    assert 0 < store.provenance.rank_share < 1
    # Eigenvalues and headers come on top, and eigenvectors are whole. Gradients of refusing come on top, too:
    # of layers as narrow as these they are as large as all else.
    assert 0.2 * model < taken < 0.27 * model


# Names and values of the checkpoint


def test_a_half_precision_checkpoint_runs_in_float32_on_the_cpu(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model", dtype=torch.bfloat16)
    assert (
        calibrate(folder, tmp_path / "a", conversations=ANSWERED, config=SHORT).provenance.dtype == "float32"
    )
    half = SHORT.model_copy(update={"dtype": "bfloat16"})
    store = calibrate(folder, tmp_path / "b", conversations=ANSWERED, config=half)
    assert store.provenance.dtype == "bfloat16"
    assert store.hessian(store.groups[0].name).dtype == torch.float32


def test_layers_have_the_checkpoints_names_where_the_models_differ(tmp_path):
    folder = models.save(models.tiny_model("gpt2"), tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=SHORT)
    assert store.group_of("h.1.mlp.c_fc.weight").name == "h.1.mlp.c_fc"


def test_a_weight_that_the_checkpoint_lacks_is_not_calibrated_at_random(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DeltaguardError, match=r"model lacks model\.layers\.1\.mlp\.up_proj\.weight, for which"
    ):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=SHORT)


def test_an_unknown_device_is_an_error(llama, tmp_path):
    with pytest.raises(DeltaguardError, match="'abacus' cannot be used"):
        calibrate(llama, tmp_path / "store", config=SHORT.model_copy(update={"device": "abacus"}))


# Interruption and resumption


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    return contents(calibrate(llama, tmp_path_factory.mktemp("whole") / "store", config=SHORT).folder)


RESUME = SHORT.model_copy(update={"resume": True})


@pytest.mark.parametrize("stage", ["respond", "accumulate", "decompose"])
def test_a_resumed_run_gives_the_same_store_bit_for_bit(llama, tmp_path, stage, uninterrupted):
    def interrupt(event):
        if event.stage == stage and event.done < event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tmp_path / "store", config=SHORT, progress=interrupt)
    assert not (tmp_path / "store").exists()
    events = []
    store = calibrate(llama, tmp_path / "store", config=RESUME, progress=events.append)
    assert contents(store.folder) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    stages = [event.stage for event in events]
    assert stages.count("respond") == (3 if stage == "respond" else 0)
    assert stages.count("accumulate") == 2


def test_a_killed_run_goes_on_with_its_responses_and_sums_anew(llama, tmp_path, uninterrupted):
    class Killed(Exception):  # noqa: N818
        pass

    def kill(event):
        if event.stage == "accumulate" and event.done == 2:
            raise Killed

    with pytest.raises(Killed):
        calibrate(llama, tmp_path / "store", config=SHORT, progress=kill)
    kept = [path.name for path in (tmp_path / "store.partial").iterdir()]
    assert sorted(kept) == ["look-alikes.jsonl", "request.json", "responses.jsonl"]
    events = []
    store = calibrate(llama, tmp_path / "store", config=RESUME, progress=events.append)
    assert not [event for event in events if event.stage == "respond"]
    assert [event.done for event in events if event.stage == "accumulate"] == [1, 2]
    assert contents(store.folder) == uninterrupted


def test_unfinished_work_is_neither_overwritten_nor_mixed_with_another_request(llama, tmp_path):
    def interrupt(event):
        if event.stage == "accumulate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tmp_path / "store", config=SHORT, progress=interrupt)
    before = contents(tmp_path / "store.partial")
    with pytest.raises(DeltaguardError, match=r"unfinished calibration lies in .*store\.partial"):
        calibrate(llama, tmp_path / "store", config=SHORT)
    other = RESUME.model_copy(update={"max_length": 100, "seed": 1})
    with pytest.raises(DeltaguardError) as caught:
        calibrate(llama, tmp_path / "store", config=other)
    assert "max_length is 100 now and was 512" in str(caught.value)
    assert "prompts_sha256 is" in str(caught.value)
    assert contents(tmp_path / "store.partial") == before


def test_look_alikes_alone_are_unfinished_work_too(llama, tmp_path):
    def interrupt(event):
        if event.stage == "accumulate":
            raise KeyboardInterrupt

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "response": "No."}}\n' for i in range(4)), encoding="utf-8")
    config = SHORT.model_copy(update={"prompts": path})
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tmp_path / "store", config=config, progress=interrupt)
    assert not (tmp_path / "store.partial" / "responses.jsonl").exists()
    with pytest.raises(DeltaguardError, match="unfinished calibration"):
        calibrate(llama, tmp_path / "store", config=config)
    resumed = config.model_copy(update={"resume": True})
    other = resumed.model_copy(update={"max_length": 100})
    with pytest.raises(DeltaguardError, match="max_length is 100 now"):
        calibrate(llama, tmp_path / "store", config=other)
    calibrate(llama, tmp_path / "store", config=resumed)


def test_blocks_alone_are_unfinished_work_too(llama, tmp_path):
    def interrupt(event):
        if event.stage == "backwards":
            raise KeyboardInterrupt

    given = {"conversations": ANSWERED}
    config = SHORT.model_copy(update={"memory": 0})
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tmp_path / "store", config=config, progress=interrupt, **given)
    assert not any((tmp_path / "store.partial").glob("*.jsonl"))
    with pytest.raises(DeltaguardError, match="unfinished calibration"):
        calibrate(llama, tmp_path / "store", config=config, **given)
    resumed = config.model_copy(update={"resume": True})
    other = resumed.model_copy(update={"dampening": 0.5})
    with pytest.raises(DeltaguardError, match=r"dampening is 0\.5 now"):
        calibrate(llama, tmp_path / "store", config=other, **given)
    calibrate(llama, tmp_path / "store", config=resumed, **given)


def test_a_store_may_not_lie_in_the_models_folder(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    with pytest.raises(DeltaguardError, match="lies in the input"):
        calibrate(folder, folder / "store", config=SHORT)
    assert not (folder / "store.partial").exists()


def test_a_store_may_lie_in_the_home_folder(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    store = calibrate(llama, "~/store", conversations=ANSWERED, config=SHORT)
    store.save_pretrained("~/other")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"store", "other"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_finished_store_is_returned_to_the_same_request_only(llama, tmp_path):
    store = calibrate(llama, tmp_path / "store", config=SHORT)
    before = contents(store.folder)
    events = []
    again = calibrate(llama, tmp_path / "store", config=RESUME, progress=events.append)
    assert again.provenance == store.provenance
    assert events == []
    with pytest.raises(DeltaguardError, match=r"dampening is 0\.5 now and was 0\.01"):
        calibrate(llama, tmp_path / "store", config=RESUME.model_copy(update={"dampening": 0.5}))
    with pytest.raises(DeltaguardError, match="not empty"):
        calibrate(llama, tmp_path / "store", config=SHORT)
    assert contents(store.folder) == before
    assert json.loads(before["curvature.json"])["provenance"]["batch_size"] == 4


def test_two_runs_never_continue_the_same_work(llama, tmp_path):
    def begin_another(event):
        if event.stage == "accumulate":
            calibrate(llama, tmp_path / "store", config=RESUME)

    with pytest.raises(DeltaguardError, match="Another process is working"):
        calibrate(llama, tmp_path / "store", config=SHORT, progress=begin_another)
    assert calibrate(llama, tmp_path / "store", config=RESUME).provenance.conversations == 8


def test_a_run_that_failed_before_it_did_anything_is_not_in_the_way(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DeltaguardError, match="has no chat template"):
        calibrate(folder, tmp_path / "store", config=SHORT)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert calibrate(folder, tmp_path / "store", config=SHORT).provenance.conversations == 8


def test_what_a_model_thinks_is_no_refusal_of_it(llama, tmp_path):
    said = "<think>Sure.</think>I cannot help with that."
    rows = [Conversation(f"What is {i}?", None, said) for i in range(6)]
    store = calibrate(llama, tmp_path / "store", config=SHORT, conversations=rows)
    assert store.provenance.refusal_share == 1


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "bfloat16"), ("float32", "float32")])
def test_who_names_a_dtype_has_the_answers_in_it(llama, monkeypatch, dtype, expected):
    monkeypatch.setattr("deltaguard.curvature.request.served_dtype", lambda _: torch.bfloat16)
    config = SHORT.model_copy(update={"dtype": dtype})
    made = requested(Checkpoint.open(llama), asked_for(None, config), config, torch.device("cpu"))
    assert (made.dtype, made.answer_dtype) == ("float32", expected)
