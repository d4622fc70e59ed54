"""Prompt sets and their parts, rotation over system prompts, prompts files, chat templates."""

import json
from collections import Counter

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import models
from deltaguard.chat.conversations import (
    HARMFUL_PARTS,
    HARMLESS_PARTS,
    SYSTEM_PROMPTS,
    Conversation,
    bucket,
    build_conversations,
    build_look_alikes,
    count_look_alikes,
    fingerprint,
    harmful_prompts,
    harmless_prompts,
    read_prompts,
    sample,
)
from deltaguard.chat.template import end_of_turn, render, takes_system_role
from deltaguard.chat.tokens import Reader, encode, read_by_both
from deltaguard.curvature.responses import respond
from deltaguard.errors import DeltaguardError

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + models.CHAT_TEMPLATE
)
DROPS_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + (
    models.CHAT_TEMPLATE
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|system|>Be kind.<|end|>{% endif %}" + models.CHAT_TEMPLATE
)


def tokenizer(template=models.CHAT_TEMPLATE):
    made = models.tiny_tokenizer()
    made.chat_template = template
    return made


# Prompt sets


def test_the_prompt_sets_are_large_enough_for_every_part():
    harmful = [row for part in HARMFUL_PARTS for row in harmful_prompts(part)]
    harmless = [row for part in HARMLESS_PARTS for row in harmless_prompts(part)]
    assert len(harmful) >= 700
    assert len({row.category for row in harmful}) >= 12
    assert len(harmless) >= 150
    assert len(harmful_prompts("calibration")) >= 128
    assert all(row.answer.strip() for row in harmless)


def test_no_prompt_is_in_two_parts_or_twice():
    prompts = [row.prompt for part in HARMFUL_PARTS for row in harmful_prompts(part)]
    prompts += [row.prompt for part in HARMLESS_PARTS for row in harmless_prompts(part)]
    assert [prompt for prompt, count in Counter(prompts).items() if count > 1] == []
    assert all(prompt == prompt.strip() for prompt in prompts)


@pytest.mark.parametrize("parts", [HARMFUL_PARTS, HARMLESS_PARTS])
def test_every_bucket_belongs_to_exactly_one_part(parts):
    assert sorted(number for part in parts.values() for number in part) == list(range(100))


def test_the_part_of_a_prompt_never_changes():
    # Other numbers here would move published prompts from one part to another.
    assert [bucket("How do I pick a lock?"), bucket("Wie öffne ich ein Schloss?")] == [90, 69]


# Conversations


def test_each_prompt_meets_one_system_prompt_before_any_meets_a_second():
    count = len(harmful_prompts("calibration"))
    conversations = build_conversations(count + 7)
    assert len({c.prompt for c in conversations[:count]}) == count
    assert [c.prompt for c in conversations[count:]] == [c.prompt for c in conversations[:7]]
    shares = Counter(c.system for c in conversations[:count])
    assert set(shares) == set(SYSTEM_PROMPTS.values())
    assert max(shares.values()) - min(shares.values()) <= 1


def test_all_pairs_are_distinct_and_one_more_is_an_error():
    total = 5 * len(harmful_prompts("dial"))
    assert len(set(build_conversations(total, part="dial"))) == total
    with pytest.raises(DeltaguardError, match=f"{total + 1} conversations were asked for and {total} exist"):
        build_conversations(total + 1, part="dial")


def test_system_prompts_of_a_deployment_join_the_rotation_and_pairs_stay_distinct():
    own, count = ("You sell shoes.", "You are a pirate."), 7 * len(harmful_prompts("dial"))
    rows = build_conversations(count, part="dial", systems=own)
    assert len(set(rows)) == count
    shares = Counter(row.system for row in rows)
    assert set(own) < set(shares)
    assert len(set(shares.values())) == 1
    # One that is there already counts once.
    assert build_conversations(20, systems=("",)) == build_conversations(20)


def test_look_alikes_are_paired_as_harmful_prompts_are():
    rows = build_look_alikes(count_look_alikes(("You sell shoes.",)), systems=("You sell shoes.",))
    asked = [row.prompt for row in harmless_prompts("training")]
    assert len(set(rows)) == len(rows) == 2 * len(asked)
    first = rows[: len(asked)]
    assert {row.prompt for row in first} == set(asked)
    assert {row.system for row in first} == {None, "You sell shoes."}
    assert {row.system for row in build_look_alikes(count_look_alikes())} == {None}
    with pytest.raises(DeltaguardError, match=r"harmless prompts, system .* 1\. .* more system prompts"):
        build_look_alikes(count_look_alikes() + 1)


def test_the_seed_fixes_the_choice():
    assert build_conversations(20, seed=3) == build_conversations(20, seed=3)
    assert {c.prompt for c in build_conversations(20, seed=3)} != {c.prompt for c in build_conversations(20)}
    given = [Conversation(str(i)) for i in range(50)]
    assert sample(given, 60) == given
    chosen = sample(given, 10, seed=1)
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=lambda c: int(c.prompt))
    assert chosen != sample(given, 10, seed=2)


def test_the_fingerprint_sees_every_field_and_the_order():
    some = [Conversation("a"), Conversation("a", ""), Conversation("a", None, "b"), Conversation("b")]
    hashes = {fingerprint([c]) for c in some}
    assert len(hashes) == len(some)
    assert fingerprint(some) != fingerprint(some[::-1])
    assert fingerprint(some) == fingerprint(tuple(some))


# Prompts files


def test_a_prompts_file_gives_conversations(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "a\\u2028b"}',
        "",
        '{"prompt": "c", "response": " ", "system": "s"}',
        '{"prompt": "ü\u2028"}',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_prompts(path) == [
        Conversation("a\u2028b"),
        Conversation("c", "s"),
        Conversation("ü\u2028"),
    ]


def test_all_bad_lines_are_reported_at_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    bad = [
        '{"prompt": "fine"}',
        "{oops",
        '["list"]',
        '{"text": "x"}',
        '{"prompt": 3}',
        '{"prompt": "  "}',
        "{}",
    ]
    path.write_text("\n".join(bad), encoding="utf-8")
    with pytest.raises(DeltaguardError) as caught:
        read_prompts(path)
    message = str(caught.value)
    for part in (
        "line 2: Invalid JSON",
        "line 3: Input should be an object (it is ['list'])",
        "line 4: `prompt`: Field required",
        "line 4: `text`: Extra inputs are not permitted",
        "line 5: `prompt`: Input should be a valid string (it is 3)",
        "line 6: `prompt`: the prompt is empty",
        "line 7: `prompt`: Field required",
        'Each line is a JSON object: {"prompt": "..."',
    ):
        assert part in message
    assert "line 1:" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n\n", "holds no prompt"), (b'{"prompt": "\xff"}', "line 1: Invalid JSON: invalid unicode")],
)
def test_a_file_without_a_legible_prompt_is_an_error(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DeltaguardError, match=message):
        read_prompts(path)
    with pytest.raises(DeltaguardError, match="cannot be read"):
        read_prompts(tmp_path / "absent.jsonl")


# Chat templates


def test_a_system_message_has_its_own_turn_where_the_template_knows_one():
    assert takes_system_role(tokenizer())
    assert render(tokenizer(), "Hi") == "<|begin|><|user|>Hi<|end|><|assistant|>"
    expected = "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert render(tokenizer(), Conversation("Hi", "Be brief.", "Hello")) == expected


def test_no_system_message_and_an_empty_one_are_different():
    chosen = tokenizer(DEFAULT_SYSTEM)
    assert render(chosen, Conversation("Hi")).startswith("<|system|>Be kind.<|end|>")
    assert render(chosen, Conversation("Hi", "")) == (
        "<|begin|><|system|><|end|><|user|>Hi<|end|><|assistant|>"
    )


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_role_gets_the_text_in_the_user_turn(template):
    chosen = tokenizer(template)
    assert not takes_system_role(chosen)
    expected = "<|begin|><|user|>Be brief.\n\nHi<|end|><|assistant|>"
    assert render(chosen, Conversation("Hi", "Be brief.")) == expected
    assert render(chosen, Conversation("Hi", "")) == render(chosen, "Hi")


def test_a_tokenizer_without_template_is_an_error_that_says_what_to_do():
    with pytest.raises(DeltaguardError, match=r"no chat template.*chat_template\.jinja"):
        render(tokenizer(None), "Hi")


def test_a_template_that_fails_on_a_user_turn_is_an_error():
    with pytest.raises(DeltaguardError, match="conversation of user: nothing works"):
        render(tokenizer("{{ raise_exception('nothing works') }}"), "Hi")


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}<|user|>Say something.<|end|><|assistant|>",
        "{% for m in messages %}{{ '<|' + m['role'] + '|><|end|>' }}{% endfor %}<|assistant|>",
        "{% for m in messages %}<|user|>{{ m['content'][:10] }}<|end|>{% endfor %}<|assistant|>",
    ],
)
def test_a_template_that_leaves_the_prompt_out_is_refused_by_its_models_name(template):
    chosen = tokenizer(template)
    chosen.name_or_path = "someone/model"
    for asked in ("How do I open a door?", Conversation("How do I open a door?", "Be brief.")):
        with pytest.raises(DeltaguardError, match=r"chat template of 'someone/model' leaves out the prompt"):
            render(chosen, asked)


def test_a_template_may_strip_white_space():
    template = "{% for m in messages %}<|user|>{{ m['content'] | trim }}<|end|>{% endfor %}<|assistant|>"
    assert render(tokenizer(template), "  Hi\nthere \n") == "<|user|>Hi\nthere<|end|><|assistant|>"
    lines = "{% for m in messages %}{{ m['content'].split() | join(' ') }}{% endfor %}<|assistant|>"
    assert render(tokenizer(lines), "Hi\n\nthere") == "Hi there<|assistant|>"


def test_tokens_of_prompt_and_response_are_those_of_the_whole_text():
    chosen = tokenizer()
    encoded = encode(chosen, Conversation("Hi there", "Be brief.", "I cannot help."), max_length=100)
    assert chosen.decode(encoded.ids[: encoded.prompt_length]).endswith("<|end|><|assistant|>")
    assert chosen.decode(encoded.ids[encoded.prompt_length :]) == "I cannot help.<|end|>"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "I cannot help."},
    ]
    text = chosen.apply_chat_template(messages, tokenize=False)
    assert list(encoded.ids) == chosen(text, add_special_tokens=False)["input_ids"]
    assert not encoded.truncated


def test_long_conversations_are_cut_at_the_end():
    conversation = Conversation("Hi there", None, "I cannot help.")
    whole = encode(tokenizer(), conversation, max_length=100)
    cut = encode(tokenizer(), conversation, max_length=whole.prompt_length + 2)
    assert cut.truncated
    assert cut.ids == whole.ids[: whole.prompt_length + 2]
    within_prompt = encode(tokenizer(), conversation, max_length=3)
    assert (len(within_prompt.ids), within_prompt.prompt_length) == (3, 3)


def test_the_end_of_a_turn_is_the_templates_own():
    gemma_like = (
        "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    assert end_of_turn(tokenizer(gemma_like)) == "<end_of_turn>"
    assert end_of_turn(tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")) == models.EOS


# Self-generated responses


def test_responses_are_generated_only_where_there_are_none(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    chosen = AutoTokenizer.from_pretrained(folder)
    asked = [
        Conversation("Hi"),
        Conversation("Bye", None, "No."),
        Conversation("A much longer prompt", "Be kind."),
    ]
    seen = []
    answered = respond(
        models.tiny_model("llama"),
        chosen,
        asked,
        max_new_tokens=4,
        batch_size=1,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    assert [(c.prompt, c.system) for c in answered] == [(c.prompt, c.system) for c in asked]
    assert answered[1] is not None
    assert answered[1].response == "No."
    assert all(c.response is not None for c in answered)
    assert seen == [(2, 3), (3, 3)]


def test_an_answer_is_the_tokens_that_the_model_wrote():
    chosen, model = tokenizer(), models.tiny_model("llama")
    written = chosen("I cannot.", add_special_tokens=False)["input_ids"]
    script = [*written, chosen.eos_token_id]
    # As many do, it puts a space before a text, which the model did not write.
    chosen.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    assert chosen("I cannot.", add_special_tokens=False)["input_ids"] != written
    ahead = map(torch.tensor, script)
    model.lm_head.register_forward_hook(lambda *given: given[-1].index_fill_(-1, next(ahead), 1e9))
    (answered,) = respond(model, chosen, [Conversation("Hi")], max_new_tokens=20, batch_size=1)
    assert (answered.response, answered.response_ids) == ("I cannot.", tuple(written))
    found = encode(chosen, answered, max_length=100)
    assert found.ids[found.prompt_length :] == tuple(script)
    assert fingerprint([answered]) == fingerprint([Conversation("Hi", None, "I cannot.")])
    # The other model reads the very tokens, too, and must have a tokenizer that cuts texts alike.
    ((_, read),) = read_by_both(Reader(chosen, 100, 100), Reader(chosen, 100, 100), [answered])
    assert read.ids[read.prompt_length :] == tuple(script)
    with pytest.raises(DeltaguardError, match="other ids"):
        read_by_both(Reader(chosen, 100, 100), Reader(tokenizer(), 100, 100), [answered])


def test_a_journal_with_a_torn_line_is_continued(tmp_path):
    chosen, model, journal = tokenizer(), models.tiny_model("llama"), tmp_path / "journal.jsonl"
    asked = [
        Conversation("Hi"),
        Conversation("Good morning to you"),
        Conversation("What is the best way to learn?"),
    ]

    def run(**options):
        return respond(model, chosen, asked, max_new_tokens=4, batch_size=1, journal=journal, **options)

    whole = run()
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    assert [list(json.loads(line)) for line in lines] == [["0"], ["1"], ["2"]]
    kept = '{"0": {"text": "kept as it is", "ids": [1, 2]}}\n'
    journal.write_text(kept + lines[1][: len(lines[1]) // 2], encoding="utf-8")
    counts = []
    resumed = run(on_batch=lambda done, _: counts.append(done))
    assert counts == [2, 3]
    assert (resumed[0].response, resumed[0].response_ids) == ("kept as it is", (1, 2))
    assert resumed[1:] == whole[1:]
    assert journal.read_text(encoding="utf-8").splitlines(keepends=True)[1:] == lines[1:]


def test_no_part_of_the_prompts_ever_moves():
    """What was calibrated on, or trained on, must not be measured on by a later release."""
    assert {
        "calibration": range(22),
        "dial": range(22, 34),
        "attack": range(34, 60),
        "training": range(60, 100),
    } == HARMFUL_PARTS
    assert {"training": range(50), "evaluation": range(50, 100)} == HARMLESS_PARTS
