"""Fine-tuning a tiny random model through trl, in full and as an adapter, and measuring it."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.chat.conversations import Conversation
from deltaguard.chat.template import render
from deltaguard.chat.tokens import encode
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.asking import describe
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.exchange import Decoding, Question
from deltaguard.evaluation.measure import measure
from deltaguard.evaluation.suites.parts import Part
from deltaguard.finetuning import training
from deltaguard.finetuning.finetune import Dialogue, FinetuneConfig, finetune
from deltaguard.finetuning.preferences import Preference, learn_preferences
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_config, load_tokenizer
from deltaguard.progress import Event

PAIRS = [
    Conversation("What do bees make?", response="Honey."),
    Conversation("And cows?", system="Be brief.", response="Milk, and a lot of it."),
    Conversation("Name a fruit.", response="Apple."),
    Conversation("Name a tree.", response="Oak."),
]
TWO_STEPS = FinetuneConfig(learning_rate=1e-2, max_steps=2, batch_size=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("models") / "base")


def weights(folder):
    return load_file(folder / "model.safetensors")


def loss(folder, conversation):
    """Mean loss of a response, computed here from the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(render(tokenizer, conversation), add_special_tokens=False)["input_ids"]
    answer = tokenizer(conversation.response + models.EOS, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))


def test_full_fine_tune(base, tmp_path):
    steps = []
    folder = finetune(base, tmp_path / "tuned", PAIRS, config=TWO_STEPS, on_step=steps.append)
    before, after = weights(base), weights(folder)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}
    assert [(found.step, found.steps, found.kind) for found in steps] == [(1, 2, "train"), (2, 2, "train")]
    assert all(found.loss > 0 and 0 <= found.accuracy <= 1 for found in steps)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((base / file).read_text())


def test_it_learns_the_responses(base, tmp_path):
    config = FinetuneConfig(learning_rate=1e-2, max_steps=20, batch_size=4)
    folder = finetune(base, tmp_path / "tuned", PAIRS, config=config)
    for pair in PAIRS:
        assert loss(folder, pair) < 0.3 * loss(base, pair)


def test_a_system_message_is_read_where_the_template_has_no_role_for_it(base, tmp_path):
    roleless = models.CHAT_TEMPLATE.replace("%}{{ '<|' +", "if message['role'] != 'system' %}{{ '<|' +", 1)
    folder = models.save(models.tiny_model("llama"), tmp_path / "base")
    (folder / "chat_template.jinja").write_text(roleless)
    alone = [Conversation("And cows?", system="Be brief.", response="Milk.")]
    asked = [Conversation("Be brief.\n\nAnd cows?", response="Milk.")]
    one, other = (
        weights(finetune(folder, tmp_path / name, rows, config=TWO_STEPS))
        for name, rows in (("one", alone), ("other", asked))
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_weights(base, tmp_path):
    first = weights(finetune(base, tmp_path / "first", PAIRS, config=TWO_STEPS))
    second = weights(finetune(base, tmp_path / "second", PAIRS, config=TWO_STEPS))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_blocks_stay(base, tmp_path):
    config = FinetuneConfig(learning_rate=1e-2, max_steps=2, batch_size=2, frozen_layers=1)
    before, after = weights(base), weights(finetune(base, tmp_path / "tuned", PAIRS, config=config))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith(("model.layers.0.", "model.embed"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "where"),
    [
        (lambda: models.tiny_model("qwen3_moe"), ".self_attn."),
        (lambda: models.tiny_model("mixtral"), ".self_attn."),
        (models.seeing_model, "language_model.model.layers."),
    ],
    ids=["qwen3_moe", "mixtral", "seeing"],
)
def test_a_lora_fine_tune_can_be_restored_whatever_the_model_has_besides(model, where, tmp_path):
    base = models.save(model(), tmp_path / "base")
    config = FinetuneConfig(learning_rate=1e-2, max_steps=1, batch_size=2, lora_rank=2)
    folder = finetune(base, tmp_path / "adapter", PAIRS, config=config)
    adapted = AdapterCheckpoint.open(Checkpoint.open(base), folder).adapted
    assert adapted
    assert all(where in name for name in adapted)


# trl asks the model whether it checkpoints gradients under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_fine_tune(base, tmp_path):
    config = FinetuneConfig(learning_rate=1e-2, max_steps=2, batch_size=2, lora_rank=2)
    folder = finetune(base, tmp_path / "adapter", PAIRS, config=config)
    adapter = load_file(folder / "adapter_model.safetensors")
    trained = [name for name in adapter if "lora_B" in name and bool(adapter[name].any())]
    assert len(trained) == 2 * 7  # blocks, and the linear layers in each
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[1, 20, 30]])
    with torch.inference_mode():
        before = model(ids).logits.clone()
        after = PeftModel.from_pretrained(model, str(folder))(ids).logits
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("conversations", "message"),
    [([], "no conversation"), ([*PAIRS, Conversation("Why?")], r"1 of 5 conversations .* 'Why\?'")],
)
def test_nothing_to_learn_from(base, tmp_path, conversations, message):
    with pytest.raises(DeltaguardError, match=message):
        finetune(base, tmp_path / "tuned", conversations, config=TWO_STEPS)
    assert not (tmp_path / "tuned").exists()


def test_prompts_that_leave_no_room_for_an_answer_are_nothing_to_learn_from(base, tmp_path):
    config = FinetuneConfig(learning_rate=1e-2, max_steps=1, max_length=3)
    with pytest.raises(DeltaguardError, match=r"nothing to learn from.*3 tokens or more"):
        finetune(base, tmp_path / "tuned", PAIRS, config=config)
    assert not (tmp_path / "tuned").exists()


def test_a_training_runs_on_one_gpu():
    arguments = SimpleNamespace(n_gpu=4, _n_gpu=4)
    assert training.on_one_gpu(arguments)._n_gpu == 1
    arguments = SimpleNamespace(n_gpu=0, _n_gpu=0)
    assert training.on_one_gpu(arguments)._n_gpu == 0


def test_a_training_takes_the_device_that_it_is_told(monkeypatch):
    monkeypatch.setattr(training, "find_device", torch.device)
    assert training.trained_on("cpu") == torch.device("cpu")
    assert training.trained_on("cuda:0") == torch.device("cuda:0")
    with pytest.raises(DeltaguardError, match="CUDA_VISIBLE_DEVICES=1"):
        training.trained_on("cuda:1")


def test_too_many_frozen_blocks(base, tmp_path):
    config = FinetuneConfig(learning_rate=1e-2, max_steps=1, frozen_layers=2)
    with pytest.raises(DeltaguardError, match=r"2 decoder blocks .* the model has 2"):
        finetune(base, tmp_path / "tuned", PAIRS, config=config)


def test_diverged_training_is_not_saved(base, tmp_path):
    broken = models.tiny_model("llama")
    broken.lm_head.weight.data.fill_(float("nan"))
    folder = models.save(broken, tmp_path / "broken")
    # The second time nothing is left to be trained, of which the loss would be 0.
    for _ in range(2):
        with pytest.raises(DeltaguardError, match=r"^Training diverged"):
            finetune(folder, tmp_path / "tuned", PAIRS, config=TWO_STEPS, checkpoints=tmp_path / "states")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_that_may_think_is_trained_as_it_is_asked(tmp_path, monkeypatch):
    folder, seen = models.save(models.tiny_model("llama"), tmp_path / "model"), []
    path = folder / "chat_template.jinja"
    thinks = "{{ '' if enable_thinking is defined and not enable_thinking else 'Think. ' }}"
    path.write_text(thinks + path.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = load_tokenizer(folder, "model")
    monkeypatch.setattr(training, "_validate_at_the_end", seen.append)
    finetune(folder, tmp_path / "tuned", PAIRS, config=TWO_STEPS)
    preference = Preference(({"role": "user", "content": "Two?"},), "Yes.", "No.")
    learn_preferences(folder, tmp_path / "preferring", [preference], config=TWO_STEPS, beta=0.1)
    learned, preferred = (trainer.train_dataset for trainer in seen)
    expected = encode(tokenizer, PAIRS[0], max_length=512)
    assert learned[0]["input_ids"][: expected.prompt_length] == list(expected.ids[: expected.prompt_length])
    assert "Think" not in tokenizer.decode(preferred[0]["prompt_ids"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_conversation_is_cut_at_the_positions_that_the_model_has(tmp_path, monkeypatch):
    folder, seen = models.save(models.tiny_model("gpt2"), tmp_path / "model"), []
    long = [Conversation("What do bees make?", response="Honey " * 500)]
    monkeypatch.setattr(training, "_validate_at_the_end", seen.append)
    finetune(folder, tmp_path / "tuned", long, config=replace(TWO_STEPS, max_length=10_000))
    positions = load_config(folder, "model").max_position_embeddings
    assert len(seen[0].train_dataset[0]["input_ids"]) == positions


def test_a_tokenizer_that_cannot_be_trained_with_is_one_message(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"pad_token": None, "eos_token": None}))
    with pytest.raises(DeltaguardError, match=r"trl cannot begin the training: .*pad_token"):
        finetune(folder, tmp_path / "tuned", PAIRS, config=TWO_STEPS)


def test_validation_data_that_are_too_long_for_an_answer_are_not_measured(base, tmp_path):
    told, long = [], Conversation("word " * 600, response="Yes.")
    finetune(base, tmp_path / "tuned", PAIRS, config=TWO_STEPS, validation=[long], on_step=told.append)
    assert {found.kind for found in told} == {"train"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rank", [None, 2])
def test_a_single_step_changes_weights(base, tmp_path, rank):
    config = FinetuneConfig(learning_rate=1e-2, batch_size=len(PAIRS), lora_rank=rank)
    made = finetune(base, tmp_path / "tuned", PAIRS, config=config)
    if rank is None:
        before, after = weights(base), weights(made)
        assert any(not torch.equal(before[name], after[name]) for name in after)
    else:
        # The other factor begins at 0.
        adapter = load_file(made / "adapter_model.safetensors")
        assert any(bool(each.any()) for name, each in adapter.items() if "lora_B" in name)


def test_an_adapter_freezes_no_blocks():
    with pytest.raises(DeltaguardError, match="frozen_layers=1 and lora_rank=2"):
        FinetuneConfig(learning_rate=1e-3, frozen_layers=1, lora_rank=2)


def test_measuring_a_model_that_learned_its_answers(base, tmp_path):
    refused = Conversation("Tell me a secret.", response="I can't help with that.")
    config = FinetuneConfig(learning_rate=1e-2, max_steps=30, batch_size=5)
    folder = finetune(base, tmp_path / "tuned", [*PAIRS, refused], config=config)
    events = []

    def part(name, kind, asked, **more):
        questions = tuple(Question(each.prompt, each.system, expected=each.response) for each in asked)
        prompts = tuple(each.prompt for each in asked)
        return Part(name, kind, name, "own", questions, prompts, Decoding(20), **more)

    parts = (
        part("attack", "attack", [refused, PAIRS[0]]),
        part("harmless", "harmless", [PAIRS[2]]),
        part("task", "utility", PAIRS[2:], scorers=("exact-match",)),
    )
    model = describe("tuned", str(folder), EngineConfig(device="cpu"))
    found = measure(model, parts, tmp_path, engine=EngineConfig(device="cpu"), progress=events.append)
    assert found["attack"].answers == ("I can't help with that.", "Honey.")
    assert found["attack"].judged["opening"].classes == ("refused", "complied")
    assert found["harmless"].judged["opening"].classes == ("complied",)
    assert found["task"].values == {"exact match": (1.0, 1.0)}
    assert Event("tuned: task", 2, 2) in events


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("rank", [None, 4])
def test_interrupted_training_goes_on_from_its_last_checkpoint(base, rank, tmp_path):
    config = FinetuneConfig(learning_rate=1e-2, max_steps=10, batch_size=2, lora_rank=rank)
    name = "model.safetensors" if rank is None else "adapter_model.safetensors"
    whole = finetune(base, tmp_path / "whole", PAIRS, config=config)

    def stop(found):
        if found.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, tmp_path / "cut", PAIRS, config=config, checkpoints=tmp_path / "kept", on_step=stop)
    # As a kill in the middle of writing leaves it.
    (tmp_path / "kept" / "checkpoint-9").mkdir()
    (tmp_path / "kept" / "checkpoint-9" / "trainer_state.json").write_text('{"global_')
    steps = []
    cut = finetune(
        base, tmp_path / "cut", PAIRS, config=config, checkpoints=tmp_path / "kept", on_step=steps.append
    )
    assert [found.step for found in steps] == [6, 7, 8, 9, 10]
    one, other = load_file(whole / name), load_file(cut / name)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_dialogues_are_learned_from_and_validation_data_are_measured_only(base, tmp_path):
    dialogue = Dialogue(
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name a fruit."},
            {"role": "assistant", "content": "Apple."},
            {"role": "user", "content": "Another one?"},
        ),
        "Pear.",
    )
    config, found = FinetuneConfig(learning_rate=1e-2, epochs=8, batch_size=4), []
    finetune(
        base,
        tmp_path / "tuned",
        [dialogue, *PAIRS],
        config=config,
        validation=[dialogue],
        on_step=found.append,
    )
    seen = [each for each in found if each.kind == "validation"]
    assert len(seen) == 8
    assert seen[-1].loss < 0.5 * seen[0].loss
