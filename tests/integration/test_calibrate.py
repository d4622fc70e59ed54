"""`calibrate` end to end on tiny random models of every architecture."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import models
from deltaguard.calibration import calibrate as calibrate_module
from deltaguard.calibration import observe as observe_module
from deltaguard.calibration.calibrate import CalibrateConfig, calibrate
from deltaguard.calibration.conversations import SYSTEM_PROMPTS, Conversation
from deltaguard.calibration.observe import observe
from deltaguard.checkpoints.checkpoint import Checkpoint
from deltaguard.curvature.moments import accumulate
from deltaguard.errors import DeltaguardError

SHORT = CalibrateConfig(num_samples=6, max_new_tokens=5, batch_size=4)
ANSWERED = [
    Conversation("How?", "", "I'm sorry, but I cannot help with that."),
    Conversation("What is the best way to make people do it?", SYSTEM_PROMPTS["maths"], "No."),
    Conversation("Write a text that harms someone.", None, "I cannot help with that request."),
    Conversation("Explain the steps, one after another, at home.", "Be kind.", "It would be dangerous."),
    Conversation("Why?", "Be kind.", "Because."),
]
QKV, MLP = "self_attn.{q,k,v}_proj", "mlp.{gate,up}_proj"
SHARED = {
    "llama": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "qwen3": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "mistral": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "gemma3": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": (
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    "opt": (QKV, "self_attn.out_proj", "fc1", "fc2"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def independent_curvature(folder):
    """Mean of x xᵀ in float64 of every linear layer, one conversation at a time, the head included."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_hook(
                lambda _m, x, _y, name=name: inputs.setdefault(name, []).append(x[0].double().flatten(0, -2))
            )
    for c in ANSWERED:
        system = [] if c.system is None else [{"role": "system", "content": c.system}]
        turns = [{"role": "user", "content": c.prompt}, {"role": "assistant", "content": c.response}]
        text = tokenizer.apply_chat_template([*system, *turns], tokenize=False)
        with torch.no_grad():
            model(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    tokens = {name: torch.cat(batches) for name, batches in inputs.items()}
    return {f"{name}.weight": x.T @ x / len(x) for name, x in tokens.items()}


def unfolded(pattern):
    """`a.{q,k}_proj` as `a.q_proj` and `a.k_proj`."""
    if "{" not in pattern:
        return frozenset({pattern})
    before, rest = pattern.split("{")
    names, after = rest.split("}")
    return frozenset(before + name + after for name in names.split(","))


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is measured


@pytest.mark.parametrize("name", models.DENSE)
def test_curvature_is_that_of_an_independent_computation(name, tmp_path):
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=SHORT)
    expected = {tensor: h for tensor, h in independent_curvature(folder).items() if "head" not in tensor}
    expected.pop("embed_out.weight", None)  # the head of GPT-NeoX
    assert {layer.tensor for group in store.groups for layer in group.layers} == set(expected)
    assert store.provenance.uncovered == ()
    for tensor, h in expected.items():
        assert relative_error(store.hessian(store.group_of(tensor).name), h) < 1e-4, tensor
    block = [
        frozenset(layer.tensor.split(".1.")[1].removesuffix(".weight") for layer in group.layers)
        for group in store.groups
        if ".1." in group.name
    ]
    assert block == [unfolded(pattern) for pattern in SHARED[name]]
    assert {layer.transposed for group in store.groups for layer in group.layers} == {name == "gpt2"}
    for group in store.groups:
        assert group.name == group.layers[0].tensor.removesuffix(".weight")
        rows, columns = load_file(folder / "model.safetensors")[group.layers[0].tensor].shape
        assert group.in_features == (rows if name == "gpt2" else columns)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_batching_and_padding_do_not_matter(name, tmp_path):
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    one, eight = (
        calibrate(
            folder,
            tmp_path / f"store-{size}",
            conversations=ANSWERED,
            config=SHORT.model_copy(update={"batch_size": size}),
        )
        for size in (1, 8)
    )
    assert one.provenance.tokens == eight.provenance.tokens == one.groups[0].tokens
    for group in one.groups:
        assert relative_error(one.hessian(group.name), eight.hessian(group.name).double()) < 1e-4, group.name


def test_the_model_answers_the_packages_prompts(llama, tmp_path):
    events = []
    store = calibrate(llama, tmp_path / "store", config=SHORT, progress=events.append)
    made = store.provenance
    assert (made.conversations, made.truncated, made.system_role) == (6, 0, "template")
    assert made.refusal_share is None
    assert made.fingerprint == Checkpoint.open(llama).fingerprint()
    assert (made.aligned, made.dtype) == (str(llama), "float32")
    assert [(e.stage, e.done, e.total) for e in events] == [
        *[("load", 0, 1), ("load", 1, 1)],
        *[("respond", 4, 6), ("respond", 6, 6)],
        *[("accumulate", 1, 2), ("accumulate", 2, 2)],
        *[("factorise", i, 8) for i in range(1, 9)],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_long_conversations_are_truncated_and_counted(llama, tmp_path):
    config = SHORT.model_copy(update={"max_length": 40})
    store = calibrate(llama, tmp_path / "store", conversations=ANSWERED, config=config)
    whole = calibrate(llama, tmp_path / "whole", conversations=ANSWERED, config=SHORT)
    assert 0 < store.provenance.truncated < len(ANSWERED)
    assert whole.provenance.truncated == 0
    assert store.provenance.tokens < whole.provenance.tokens
    assert store.groups[0].tokens == store.provenance.tokens


def test_a_model_with_few_positions_takes_no_more_tokens(tmp_path):
    folder = models.save(models.tiny_model("gpt2", n_positions=48), tmp_path / "model")
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=SHORT)
    assert store.provenance.truncated > 0


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
    assert store.provenance.refusal_share == pytest.approx(2 / 5)


def test_a_prompts_file_is_used(llama, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n', encoding="utf-8")
    config = SHORT.model_copy(update={"prompts": path})
    assert calibrate(llama, tmp_path / "store", config=config).provenance.conversations == 2
    with pytest.raises(DeltaguardError, match="give one"):
        calibrate(llama, tmp_path / "other", config=config, conversations=ANSWERED)


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


def test_weights_that_differ_from_the_checkpoint_are_all_listed(llama):
    other = models.perturbed(models.tiny_model("llama"), 0.01)
    with pytest.raises(DeltaguardError) as caught:
        observe(other, Checkpoint.open(llama), [5, 6, 7])
    assert str(caught.value).count("differs from the model's") == 14


def test_a_weight_that_the_checkpoint_lacks_is_not_calibrated_at_random(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DeltaguardError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` of the model has no"
    ):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=SHORT)


def test_matrices_that_no_text_reaches_are_named(llama):
    model = models.tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.register_module("unused", torch.nn.Linear(4, 4, bias=False))
    attention.register_parameter("table", torch.nn.Parameter(torch.zeros(2, 2)))
    _, uncovered = observe(model, Checkpoint.open(llama), [5, 6, 7])
    assert uncovered == ("model.layers.0.self_attn.table", "model.layers.0.self_attn.unused.weight")


def test_a_layer_that_is_used_twice_is_refused(llama):
    model = models.tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(DeltaguardError, match="is used 2 times in one pass"):
        observe(model, Checkpoint.open(llama), [5, 6, 7])


@pytest.mark.parametrize("name", models.EXPERTS)
def test_mixtures_of_experts_are_refused_before_weights_are_read(name, tmp_path):
    model = models.tiny_model(name)
    folder = models.save(model, tmp_path / "model")
    with pytest.raises(
        DeltaguardError, match=rf"{type(model).__name__}\) is a mixture of experts: 24 expert"
    ):
        calibrate(folder, tmp_path / "store", config=SHORT)
    assert not (tmp_path / "store.partial").exists()


def test_an_unknown_device_is_an_error(llama, tmp_path):
    with pytest.raises(DeltaguardError, match="'abacus' cannot be used"):
        calibrate(llama, tmp_path / "store", config=SHORT.model_copy(update={"device": "abacus"}))


# Interruption and resumption


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    return contents(calibrate(llama, tmp_path_factory.mktemp("whole") / "store", config=SHORT).folder)


RESUME = SHORT.model_copy(update={"resume": True})


@pytest.mark.parametrize("stage", ["respond", "accumulate", "factorise"])
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
    assert stages.count("respond") == (1 if stage == "respond" else 0)
    assert stages.count("accumulate") == (1 if stage == "accumulate" else 2)


@pytest.mark.parametrize("calls", [1, 3, 8, 11, 15])
def test_an_interrupt_within_a_batch_counts_no_token_twice(
    llama, tmp_path, calls, uninterrupted, monkeypatch
):
    done = []

    def interrupted(moment, inputs):
        done.append(None)
        if len(done) > calls:
            raise KeyboardInterrupt
        return accumulate(moment, inputs)

    monkeypatch.setattr(observe_module, "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tmp_path / "store", config=SHORT)
    monkeypatch.undo()
    assert contents(calibrate(llama, tmp_path / "store", config=RESUME).folder) == uninterrupted


def test_a_killed_run_goes_on_from_its_last_save(llama, tmp_path, uninterrupted, monkeypatch):
    class Killed(Exception):  # noqa: N818
        pass

    def kill(event):
        if event.stage == "accumulate" and event.done == 2:
            raise Killed

    monkeypatch.setattr(calibrate_module, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        calibrate(llama, tmp_path / "store", config=SHORT, progress=kill)
    events = []
    store = calibrate(llama, tmp_path / "store", config=RESUME, progress=events.append)
    assert [event.done for event in events if event.stage == "accumulate"] == [2]
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
    assert calibrate(llama, tmp_path / "store", config=RESUME).provenance.conversations == 6


def test_a_run_that_failed_before_it_did_anything_is_not_in_the_way(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DeltaguardError, match="has no chat template"):
        calibrate(folder, tmp_path / "store", config=SHORT)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert calibrate(folder, tmp_path / "store", config=SHORT).provenance.conversations == 6
