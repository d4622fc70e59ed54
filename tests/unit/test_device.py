"""In which arithmetic a device asks models, and that a model's own weights come back after."""

import platform
from contextlib import nullcontext

import pytest
import torch

import models
from deltaguard import device, memory
from deltaguard.device import as_served, numbered, served_dtype


@pytest.mark.parametrize(("has_products", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_device_answers_in_bfloat16_where_it_multiplies_in_it(has_products, expected, monkeypatch):
    asked, seen = [], []

    def supported(**options):
        asked.append(options)
        return has_products

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    # It is asked of the current device.
    monkeypatch.setattr(torch.cuda, "device", lambda chosen: seen.append(chosen.index) or nullcontext())
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", supported)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert served_dtype(torch.device("cuda", 1)) == expected
    assert served_dtype(torch.device("cpu")) == expected
    assert seen == [1]
    # Emulated products are slower than those in float32.
    assert asked == [{"including_emulation": False}, {}]
    assert served_dtype(torch.device("meta")) == torch.float32


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_products_that_onednn_emulates_do_not_count(machine, avx512_bf16, amx, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    # What it says of any processor with AVX-512.
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert served_dtype(torch.device("cpu")) == expected


def test_without_onednn_a_processor_answers_in_float32(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    # Nor is there such an operator.
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert served_dtype(torch.device("cpu")) == torch.float32


def test_a_gpu_is_known_by_its_number_whichever_thread_asks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = [str(numbered(torch.device(name))) for name in ("cuda", "cuda:0", "cpu")]
    assert found == ["cuda:1", "cuda:0", "cpu"]


@pytest.fixture
def bfloat16(monkeypatch):
    """Let every device answer in bfloat16."""
    monkeypatch.setattr(device, "served_dtype", lambda _: torch.bfloat16)


def state(model):
    """Where each weight lies, and what it holds."""
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def check_unchanged(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (place, tensor) in before.items():
        assert after[name][0] == place
        assert after[name][1].dtype == tensor.dtype
        assert torch.equal(after[name][1], tensor)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("name", models.DENSE)
def test_a_float32_model_runs_in_it_and_its_own_weights_come_back(name):
    model = models.tiny_model(name)
    before, own = state(model), logits(model)
    with as_served(model):
        assert {parameter.dtype for parameter in model.parameters()} == {model.dtype} == {torch.bfloat16}
        served = logits(model)
    assert served.dtype == torch.bfloat16
    assert not torch.equal(served.float(), own)
    # Eight bits of each number are left.
    assert (served.float() - own).norm() <= 0.05 * own.norm()
    check_unchanged(model, before)
    assert torch.equal(logits(model), own)


@pytest.mark.usefixtures("bfloat16")
def test_its_own_weights_come_back_where_asking_fails():
    model = models.tiny_model("llama")
    before = state(model)

    def interrupted():
        with as_served(model):
            assert model.dtype == torch.bfloat16
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    check_unchanged(model, before)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_dtype_is_left_alone(dtype):
    model = models.tiny_model("llama").to(dtype)
    before = state(model)
    with as_served(model):
        check_unchanged(model, before)
    check_unchanged(model, before)


def test_where_the_device_answers_in_float32_nothing_changes(monkeypatch):
    monkeypatch.setattr(device, "served_dtype", lambda _: torch.float32)
    model = models.tiny_model("llama")
    before = state(model)
    with as_served(model):
        check_unchanged(model, before)


@pytest.mark.usefixtures("bfloat16")
def test_weights_that_are_tied_stay_tied():
    model = models.tiny_model("qwen3")

    def are_tied():
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        return head is embeddings and head.data_ptr() == embeddings.data_ptr()

    assert are_tied()
    before = state(model)
    with as_served(model):
        assert are_tied()
    assert are_tied()
    check_unchanged(model, before)


@pytest.mark.usefixtures("bfloat16")
def test_what_a_model_keeps_in_float32_stays_so_while_it_is_asked():
    model = models.tiny_model("deepseek_v3")
    model._keep_in_fp32_modules_strict = {"gate.weight", "layers.*.input_layernorm"}
    before = state(model)
    with as_served(model):
        kept = {name for name, each in model.named_parameters() if each.dtype == torch.float32}
    assert any(name.endswith("mlp.gate.weight") for name in kept)
    assert all(name.endswith(("gate.weight", "input_layernorm.weight")) for name in kept)
    check_unchanged(model, before)


def test_a_limit_on_any_group_of_the_process_is_seen(tmp_path, monkeypatch):
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", groups)
    monkeypatch.setattr(memory, "_OWN", own)
    machine = memory.usable_memory_bytes()
    (groups / "slurm" / "job_1").mkdir(parents=True)
    own.write_text("0::/slurm/job_1/step\n")
    (groups / "slurm" / "memory.max").write_text("max\n")
    assert memory.usable_memory_bytes() == machine
    (groups / "slurm" / "job_1" / "memory.max").write_text("4096\n")
    assert memory.usable_memory_bytes() == 4096
    own.write_text("4:cpu,memory:/old\n")
    assert memory.usable_memory_bytes() == machine
    (groups / "memory" / "old").mkdir(parents=True)
    (groups / "memory" / "old" / "memory.limit_in_bytes").write_text("8192\n")
    assert memory.usable_memory_bytes() == 8192
