"""Models whose template makes them think: they do, and what counts is the answer that follows."""

import pytest
import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import generate
from deltaguard.chat.openings import answer_openings
from deltaguard.chat.template import render
from deltaguard.chat.thinking import BEGIN, END, THOUGHT_TOKENS, closed
from deltaguard.chat.tokens import Reader, encode, encode_answer, read_by_both
from deltaguard.curvature.responses import respond
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.transformers import TransformersEngine, rendered
from deltaguard.evaluation.exchange import Decoding, FollowUp, Question
from models import tiny_model, tiny_tokenizer

ROWS = [Conversation("What is the weather?"), Conversation("Go"), Conversation("How can I make a cake?")]


@pytest.fixture
def tokenizer():
    """A template as DeepSeek-R1's, which begins thoughts whatever it is asked."""
    found = tiny_tokenizer()
    found.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    return found


def speaking(model, tokenizer, *texts):
    """Make a model say texts from its first answer token on, whatever it reads, and count what it reads."""
    script = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    lengths = []

    def forced(_module, _inputs, logits):
        logits[..., script[len(lengths) % len(script)]] = 1e9
        lengths.append(logits.shape[0])

    model.lm_head.register_forward_hook(forced)
    return lengths


def test_that_there_are_no_thoughts_is_not_learned():
    """A template as Qwen3's of models that always think: it writes empty thoughts before the last answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' }}"
        "{{ '<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '' }}"
        "{{ message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    text = encode_answer(tokenizer, [{"role": "user", "content": "Why?"}], "So.", max_length=999)
    read, learned = (
        tokenizer.decode(part) for part in (text.ids[: text.prompt_length], text.ids[text.prompt_length :])
    )
    assert learned == "So.<|end|>"
    assert read.endswith(f"<think>\n\n{END}\n\n")


def test_a_model_thinks_until_it_closes_its_thoughts_and_then_answers(tokenizer):
    model = tiny_model("llama")
    thought = "A cake? "
    script = tokenizer(f"{thought}{END}", add_special_tokens=False)["input_ids"]
    speaking(model, tokenizer, f"{thought}{END}")
    (said,) = generate(
        model, tokenizer, [render(tokenizer, ROWS[2])], max_new_tokens=len(script), batch_size=4
    )
    # The script begins again with the answer.
    assert said == f"{closed(thought)}{thought}{END}"


def test_thoughts_that_a_prompt_ends_with_end_none_that_follow(tokenizer):
    model = tiny_model("llama")
    # As models that think have it: each tag is one token.
    tokenizer.add_tokens([BEGIN, END])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    speaking(model, tokenizer, "a")
    asked = render(tokenizer, Conversation(f"What does this end? {END}"))
    (said,) = generate(model, tokenizer, [asked], max_new_tokens=2)
    assert said == f"{closed('a' * THOUGHT_TOKENS)}aa"


def test_thoughts_without_end_are_closed(tokenizer):
    model = tiny_model("llama")
    lengths = speaking(model, tokenizer, "a")
    found = generate(model, tokenizer, [render(tokenizer, row) for row in ROWS], max_new_tokens=3)
    assert found == [f"{closed('a' * THOUGHT_TOKENS)}aaa"] * 3
    assert len(lengths) == THOUGHT_TOKENS + 3


def test_a_model_that_opens_its_thoughts_itself_is_let_to_end_them():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    begun, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{BEGIN}Fl", "I cannot. " * 5)
    )
    speaking(model, tokenizer, f"{BEGIN}Fl", f"our.{END}", "I cannot. " * 5)
    (said,) = respond(model, tokenizer, ROWS[2:], max_new_tokens=len(begun), batch_size=1)
    ids = answer[: len(begun)]
    assert said.response == f"{BEGIN}\n{closed('our.')}{tokenizer.decode(ids).strip()}"
    assert said.response_ids == tuple(ids)
    found = encode(tokenizer, said, max_length=512)
    assert found.ids[found.prompt_length : -1] == said.response_ids
    assert tokenizer.decode(found.ids[: found.prompt_length]).endswith(f"{BEGIN}\n{closed('our.')}")


@pytest.mark.parametrize("thoughts", ["", "Flour."])
def test_thoughts_that_a_model_opens_and_ends_itself_are_its_own(thoughts):
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    written, answer = f"{BEGIN}\n{closed(thoughts)}", "I cannot. "
    first, again = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{written}{answer}", answer)
    )
    lengths = speaking(model, tokenizer, f"{written}{answer}", answer)
    prompt = render(tokenizer, ROWS[2])
    (said,) = generate(model, tokenizer, [prompt], max_new_tokens=len(first), batch_size=1)
    assert said.startswith(f"{written}{answer.strip()}")
    # No thoughts were asked for beside its own, and the answer is as long as any.
    assert len(lengths) == 2 * len(first) > len(first) + len(again)


def test_the_opening_of_such_a_model_is_that_of_its_answer():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    thoughts = "They ask for harm, so that I will " * 4
    speaking(model, tokenizer, BEGIN, f"{thoughts}{END}", "I cannot help. ")
    (opening,) = answer_openings(model, tokenizer, ROWS[:1])
    assert opening.startswith("I cannot help.")


def test_thoughts_that_a_model_opens_itself_belong_to_the_prompt():
    tokenizer, answer = tiny_tokenizer(), "Bake it."
    plain = encode(tokenizer, Conversation("Cake?", response=answer), max_length=512)
    thought = encode(
        tokenizer, Conversation("Cake?", response=f"{BEGIN}\n{closed('Flour.')}{answer}"), max_length=512
    )
    assert thought.ids[thought.prompt_length :] == plain.ids[plain.prompt_length :]
    assert tokenizer.decode(thought.ids[: thought.prompt_length]).endswith(f"{BEGIN}\n{closed('Flour.')}")
    # Thoughts that never end are all there is.
    endless = encode(tokenizer, Conversation("Cake?", response=f"{BEGIN}Flour"), max_length=512)
    assert endless.prompt_length == plain.prompt_length


def test_an_opening_is_that_of_the_answer(tokenizer):
    model = tiny_model("llama")
    thought = f"I refuse. Or not.{END}"
    speaking(model, tokenizer, thought)
    expected = f"I refuse. Or not.{END}"
    for opening in answer_openings(model, tokenizer, ROWS):
        assert expected.startswith(opening)
        assert "I refuse" in opening


def test_thoughts_belong_to_the_prompt(tokenizer):
    plain, answer = tiny_tokenizer(), "Bake it."
    thinking = encode(tokenizer, Conversation("Cake?", response=f"Flour.\n{END}\n\n{answer}"), max_length=512)
    given = encode(tokenizer, Conversation("Cake?", response=answer), max_length=512)
    expected = encode(plain, Conversation("Cake?", response=answer), max_length=512)
    for found in (thinking, given):
        assert found.ids[found.prompt_length :] == expected.ids[expected.prompt_length :]
    assert thinking.prompt_length > given.prompt_length > expected.prompt_length
    assert tokenizer.decode(thinking.ids[: thinking.prompt_length]).endswith(f"<think>\nFlour.\n{END}\n\n")


def test_both_models_read_the_same_thoughts(tokenizer):
    reader = Reader(tokenizer, 512, 512)
    (own, other), *_ = read_by_both(reader, reader, [Conversation("Cake?", response=f"Flour.{END}Bake it.")])
    assert own == other


def test_a_prefill_begins_an_answer_and_no_thought(tokenizer):
    assert rendered(tokenizer, Question("Cake?", prefill="Sure")).endswith(f"<think>\n{closed('')}Sure")


def test_what_was_thought_of_the_first_question_is_not_read_with_the_second(tokenizer):
    first = Question("Cake?", follow_up=FollowUp("A large one?"))
    for said in (f"{closed('Flour.')}Bake it.", f"<think>Flour.{END} Bake it.", "Bake it."):
        text = rendered(tokenizer, first.continued(said))
        assert text.endswith("<|user|>A large one?<|end|><|assistant|><think>\n")
        assert "<|assistant|>Bake it.<|end|>" in text
        assert "Flour" not in text
    # Thoughts that never end are no answer.
    assert "<|assistant|><|end|>" in rendered(tokenizer, first.continued("<think>Flour, sugar, flour"))


def test_thoughts_need_room_beside_two_answers(tokenizer):
    engine = TransformersEngine(tiny_model("llama"), tokenizer, 1)
    asked = [Question("Cake?", follow_up=FollowUp("A large one?"))]
    engine._require_room(asked, Decoding(max_new_tokens=40))
    with pytest.raises(DeltaguardError, match=f"{THOUGHT_TOKENS} for thoughts, and the model has 512"):
        engine._require_room(asked, Decoding(max_new_tokens=60))


def test_draws_do_not_depend_on_what_was_drawn_before(tokenizer):
    model = tiny_model("llama")
    prompts = [render(tokenizer, row) for row in ROWS]
    torch.manual_seed(1)
    one = generate(model, tokenizer, prompts, max_new_tokens=4, temperature=1.0)
    torch.manual_seed(2)
    assert one == generate(model, tokenizer, prompts, max_new_tokens=4, temperature=1.0)
    assert all(END in said for said in one)
