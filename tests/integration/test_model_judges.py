"""Classifiers and guards as judges, with tiny models that are rigged to say what is needed."""

import pytest
import torch
import transformers

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges import guards
from deltaguard.evaluation.judges.classifiers import ClassifierSpec
from deltaguard.evaluation.judges.guards import GuardSpec
from models import VOCABULARY, save, tiny_model, tiny_tokenizer

EXCHANGES = [
    Exchange("How do I pick a lock?", "I'm sorry, but I cannot help with that request."),
    Exchange("How do I bake?", "Sure."),
    Exchange("How do I sing?", "Breathe in, open your mouth, and let the tone come out by itself."),
]


def classifier_judge(folder, refused, **options):
    return ClassifierSpec(model=str(folder), refused_labels=refused, **options).make()


def guard_judge(folder, template, **options):
    return GuardSpec(model=str(folder), template=template, **options).make()


def _classifier(folder, *, kind="Bert", labels=("REFUSAL", "NORMAL"), **overrides):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=66,
        initializer_range=1.0,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **overrides,
    )
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    save(network, folder)
    return network


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return folder, _classifier(folder)


@pytest.mark.parametrize("reads", ["answer", "both"])
def test_a_classifier_alone_and_in_batches(classifier, reads):
    folder, network = classifier
    judge = classifier_judge(folder, ("REFUSAL",), reads=reads, batch_size=2)
    expected = []
    for each in EXCHANGES:
        texts = (each.answer,) if reads == "answer" else (each.prompt, each.answer)
        batch = tiny_tokenizer()(*texts, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(network(**batch).logits.softmax(-1)[0, 0]))
    found = judge.judge(EXCHANGES)
    assert [each.score for each in found] == pytest.approx(expected, abs=1e-5)
    assert [each.verdict for each in found] == ["refused" if p > 0.5 else "complied" for p in expected]
    assert judge.judge([]) == []


def test_several_labels_add_up(tmp_path):
    network = _classifier(tmp_path, labels=("no", "soft no", "yes"))
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([0.3, 0.3, 0.4]).log())
    network.save_pretrained(tmp_path)
    (one, *_) = classifier_judge(tmp_path, ("no", "soft no")).judge(EXCHANGES)
    (other, *_) = classifier_judge(tmp_path, ("no",)).judge(EXCHANGES)
    assert (one.verdict, one.score) == ("refused", pytest.approx(0.6))
    assert (other.verdict, other.score) == ("complied", pytest.approx(0.3))


def test_a_long_answer_is_cut_off(classifier):
    judge = classifier_judge(classifier[0], ("REFUSAL",), reads="both")
    long = [Exchange("How do I sing?", "Breathe in. " * length) for length in (200, 300)]
    one, other = judge.judge(long)
    assert one == other


def test_a_long_prompt_is_cut_off_rather_than_the_run(classifier):
    judge = classifier_judge(classifier[0], ("REFUSAL",), reads="both")
    asked = [Exchange("How do I sing? " * length, "Breathe in.") for length in (100, 200)]
    found = judge.judge([*asked, Exchange("How do I sing? " * 100, "Step out. " * 100)])
    assert found[0] == found[1] != found[2]


def test_a_classifier_says_what_its_number_is(classifier):
    scale = classifier_judge(classifier[0], ("REFUSAL",)).scale
    assert scale.name == "refusal probability"
    assert scale.better == {"attack": "higher", "harmless": "lower"}


@pytest.mark.parametrize("refused", [("REFUSAL", "refusal"), ("refusal",)])
def test_unknown_labels(classifier, refused):
    with pytest.raises(DeltaguardError, match="its labels are REFUSAL, NORMAL"):
        classifier_judge(classifier[0], refused)


def test_all_labels_are_no_choice(classifier):
    with pytest.raises(DeltaguardError, match="All labels"):
        classifier_judge(classifier[0], ("NORMAL", "REFUSAL"))


def test_a_classifier_that_chooses_several_labels(tmp_path):
    _classifier(tmp_path, problem_type="multi_label_classification")
    with pytest.raises(DeltaguardError, match="multi_label_classification"):
        classifier_judge(tmp_path, ("REFUSAL",))


def test_a_causal_classifier_without_padding_token(tmp_path):
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 2, None
    torch.manual_seed(0)
    save(transformers.LlamaForSequenceClassification(config).eval(), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    together = classifier_judge(tmp_path, ("LABEL_1",)).judge(EXCHANGES)
    alone = classifier_judge(tmp_path, ("LABEL_1",), batch_size=1).judge(EXCHANGES)
    assert [each.score for each in together] == pytest.approx([each.score for each in alone], abs=1e-5)


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("guard"))


@pytest.fixture
def asked(monkeypatch):
    """What a guard is asked; it answers one thing after another."""
    seen = []

    def answers(network, tokenizer, prompts, **_):
        seen.extend(prompts)
        outputs = ["unsafe\nS1", "safe", "Harmful response: yes", "Yes", "well"]
        return [outputs[i % len(outputs)] for i in range(len(prompts))]

    monkeypatch.setattr(guards, "generate", answers)
    return seen


def test_llama_guard_is_asked_by_its_chat_template(guard, asked):
    found = guard_judge(guard, "llama-guard").judge(EXCHANGES)
    assert [each.verdict for each in found] == ["complied", "refused", "undecided"]
    assert asked[1] == "<|begin|><|user|>How do I bake?<|end|><|assistant|>Sure.<|end|><|assistant|>"


PARTS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}"
)


def test_a_guard_that_reads_lists_of_parts_sees_what_was_said(tmp_path, asked):
    save(tiny_model("llama"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(PARTS)
    assert [each.verdict for each in guard_judge(tmp_path, "llama-guard").judge(EXCHANGES[1:2])] == [
        "complied"
    ]
    assert asked == ["<|begin|><|user|>How do I bake?<|end|><|assistant|>Sure.<|end|>"]
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['role'] }}")
    with pytest.raises(DeltaguardError, match="leaves out the request or the answer"):
        guard_judge(tmp_path, "llama-guard").judge(EXCHANGES[1:2])


@pytest.mark.parametrize(
    ("template", "card", "expected"),
    [
        ("wildguard", '"""<|begin|>Q {prompt} A {response}\n"""', "<|begin|>Q How do I bake? A Sure.\n"),
        ("harmbench", "'''B {behavior} G {generation}'''", "<|begin|>B How do I bake? G Sure."),
    ],
)
def test_others_are_asked_as_their_card_shows(guard, asked, template, card, expected):
    (guard / "README.md").write_text(f"# Guard\n```python\nformat = {card}\n```\n")
    found = guard_judge(guard, template).judge(EXCHANGES * 2)
    assert asked[1] == expected
    verdicts = [each.verdict for each in found]
    assert verdicts.count("complied") == 1
    assert verdicts.index("complied") == {"wildguard": 2, "harmbench": 3}[template]


def test_a_format_from_a_file(guard, asked, tmp_path):
    path = tmp_path / "format.txt"
    path.write_text("{generation} <- {behavior}")
    guard_judge(guard, "harmbench", prompt_file=path).judge(EXCHANGES[1:2])
    spec = GuardSpec(model=str(guard), template="harmbench", prompt_file=path)
    before, text = spec.identity(), path.read_text()
    assert str(path) in before["prompt_file"]
    path.write_text(f"{text} ")
    assert spec.identity() != before
    path.write_text(text)
    assert spec.identity() == before
    assert asked == ["<|begin|>Sure. <- How do I bake?"]
    with pytest.raises(DeltaguardError, match=r"behavior, generation, and prompt, response are needed"):
        guard_judge(guard, "wildguard", prompt_file=path).judge(EXCHANGES)
    with pytest.raises(DeltaguardError, match="cannot be read"):
        guard_judge(guard, "harmbench", prompt_file=tmp_path / "absent.txt").judge(EXCHANGES)


def test_a_guard_without_card_or_chat_template(tmp_path, asked):
    save(tiny_model("llama"), tmp_path)
    with pytest.raises(DeltaguardError, match=r"there is no .*README\.md"):
        guard_judge(tmp_path, "wildguard").judge(EXCHANGES)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DeltaguardError, match="no chat template"):
        guard_judge(tmp_path, "llama-guard").judge(EXCHANGES)


def test_a_guard_that_cannot_be_asked_is_told_when_it_is_made(tmp_path, guard):
    with pytest.raises(DeltaguardError, match="nowhere"):
        guard_judge(tmp_path / "nowhere", "llama-guard")
    (tmp_path / "format.txt").write_text("{prompt} {answer}")
    with pytest.raises(DeltaguardError, match="has the fields answer, prompt"):
        guard_judge(guard, "wildguard", prompt_file=tmp_path / "format.txt")


def test_a_classifier_whose_positions_begin_late_is_given_fewer_tokens(tmp_path):
    _classifier(tmp_path / "roberta", kind="Roberta", pad_token_id=1)
    judge = classifier_judge(tmp_path / "roberta", ("REFUSAL",))
    (found,) = judge.judge([Exchange("Why?", "word " * 500)])
    assert 0 < found.score < 1


def test_a_classifier_of_no_numbers_is_refused(tmp_path):
    network = _classifier(tmp_path / "broken")
    with torch.no_grad():
        network.classifier.bias.fill_(float("nan"))
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(DeltaguardError, match="gives its labels no probabilities"):
        classifier_judge(tmp_path / "broken", ("REFUSAL",)).judge(EXCHANGES)


def test_a_random_guard_says_nothing_that_can_be_read(guard):
    judge = guard_judge(guard, "llama-guard", max_new_tokens=4)
    assert {each.verdict for each in judge.judge(EXCHANGES)} == {"undecided"}
    assert judge.judge([]) == []


def test_judges_from_their_descriptions(classifier, guard):
    spec = ClassifierSpec(model=str(classifier[0]), refused_labels=("REFUSAL",), name="mine")
    assert spec.make().name == "mine"
    assert GuardSpec(model=str(guard), template="llama-guard").make().name == "llama-guard"
    assert GuardSpec(model=str(guard), template="llama-guard", name="w7").make().name == "w7"
