"""A written adapter: PEFT merges it, deltaguard reads it back, and no kill leaves half of it.

As a program, `python test_adapter_writer.py ALIGNED WORK`, it writes adapters and is killed at every step.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import peft
import pytest
import torch
import transformers
from killed_writer import kill_at
from safetensors.torch import load_file, save_file

from copies import report_of
from deltaguard.errors import DeltaguardError
from deltaguard.models.adapter import AdapterCheckpoint, is_adapter
from deltaguard.models.adapter_writer import commit_adapter, stage_adapter
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.writer import CheckpointWriter
from deltaguard.solvers.low_rank import LowRank, low_rank
from models import DENSE, STORED_IN_OUT, save, tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
BLOCK_MATRIX = re.compile(r"\.\d+\..*\.weight$")
Q0 = "model.layers.0.self_attn.q_proj"
# PEFT asks transformers by the older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def llama(tmp_path):
    return tiny(tmp_path)


def tiny(tmp_path, architecture="llama", *, dtype=None, **overrides):
    return Checkpoint.open(save(tiny_model(architecture, **overrides), tmp_path / "aligned", dtype=dtype))


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def adapted(aligned, out):
    return peft.PeftModel.from_pretrained(load(aligned.folder), out)


def layers_of(aligned, ranks=(3,), size=0.1):
    """Random deltas of the matrices of the decoder blocks; the ranks take turns."""
    generator = torch.Generator().manual_seed(3)
    transposed = aligned.config["model_type"] in STORED_IN_OUT
    layers, turns = [], itertools.cycle(ranks)
    for name, info in aligned.tensors.items():
        if BLOCK_MATRIX.search(name) and len(info.shape) == 2:
            rows, columns = info.shape[::-1] if transposed else info.shape
            rank = next(turns)
            up = size * torch.randn(rows, rank, generator=generator)
            down = size * torch.randn(rank, columns, generator=generator)
            layers.append((name.removesuffix(".weight"), LowRank(down, up, 0.0)))
    return layers


def write(out, aligned, layers, *, modules=None, writer=None, **options):
    """Write and commit an adapter; returns the ranks."""
    modules = modules or [name for name, _ in load(aligned.folder).named_modules()]
    with CheckpointWriter(out, plan_hash="plan", **(writer or {})) as opened:
        ranks = stage_adapter(opened, aligned, layers, modules=modules, **options)
        commit_adapter(opened)
    return ranks


def restored(aligned, layer):
    """The aligned weight of a layer with its delta, in float64."""
    name, factors = layer
    transposed = aligned.config["model_type"] in STORED_IN_OUT
    delta = factors.up.double() @ factors.down.double()
    return aligned.read(f"{name}.weight").double() + (delta.T if transposed else delta)


def check_equal(found, expected, *, rtol=1e-6):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)


def read_config(out):
    return json.loads((out / CONFIG).read_text())


@pytest.mark.parametrize("architecture", DENSE)
def test_peft_merges_it_and_deltaguard_reads_it_as_it_was_given(tmp_path, architecture):
    aligned, out = tiny(tmp_path, architecture), tmp_path / "out"
    layers = layers_of(aligned, ranks=(2, 5, 3))
    assert write(out, aligned, layers) == {name: len(factors.down) for name, factors in layers}
    merged, before = adapted(aligned, out).merge_and_unload().state_dict(), load(aligned.folder).state_dict()
    assert is_adapter(out)
    read, stored = AdapterCheckpoint.open(aligned, out), load_file(out / WEIGHTS)
    for layer in layers:
        name, factors = layer
        check_equal(merged.pop(f"{name}.weight"), restored(aligned, layer))
        check_equal(read.read(f"{name}.weight"), restored(aligned, layer))
        assert torch.equal(stored.pop(f"base_model.model.{name}.lora_A.weight"), factors.down)
        assert torch.equal(stored.pop(f"base_model.model.{name}.lora_B.weight"), factors.up)
    assert not stored
    assert read.adapted == {f"{name}.weight" for name, _ in layers}
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.items())


def test_names_of_the_checkpoint_may_lack_the_prefix_of_the_model(tmp_path):
    folder = tiny(tmp_path, "gpt2").folder
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    aligned, out = Checkpoint.open(folder), tmp_path / "out"
    layers = layers_of(aligned)
    assert "h.0.attn.c_attn" in write(out, aligned, layers)
    merged, read = adapted(aligned, out).merge_and_unload().state_dict(), AdapterCheckpoint.open(aligned, out)
    for layer in layers:
        check_equal(merged[f"transformer.{layer[0]}.weight"], restored(aligned, layer))
        check_equal(read.read(f"{layer[0]}.weight"), restored(aligned, layer))


def test_every_layer_has_its_own_rank_and_the_scale_one(llama, tmp_path):
    ranks = write(tmp_path / "out", llama, layers_of(llama, ranks=range(1, 8)))
    assert len(set(ranks.values())) == 7
    config = read_config(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    wrapped = adapted(llama, tmp_path / "out")
    for name, rank in ranks.items():
        module = wrapped.get_submodule(f"base_model.model.{name}")
        assert (module.r["default"], module.scaling["default"]) == (rank, 1.0)


def test_the_configuration_says_no_more_than_it_must(llama, tmp_path):
    write(tmp_path / "out", llama, layers_of(llama))
    config = read_config(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == leaves
    assert config["base_model_name_or_path"] == str(llama.folder)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    published = dataclasses.replace(llama, reference="somebody/llama@v2")
    write(tmp_path / "published", published, layers_of(llama))
    config = read_config(tmp_path / "published")
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/llama", "v2")


def test_layers_without_a_delta_are_left_out(tmp_path):
    # Layer 1 must not be taken for layer 11, nor its modules for those of the same last name.
    aligned, out = tiny(tmp_path, num_hidden_layers=12), tmp_path / "out"
    zero = low_rank(torch.zeros(32, 32), rank=None)
    layers = [
        (name, factors if ".1.mlp." in name else zero) for name, factors in layers_of(aligned, ranks=(2, 4))
    ]
    ranks = write(out, aligned, layers)
    assert ranks.keys() == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert AdapterCheckpoint.open(aligned, out).adapted == {f"{name}.weight" for name in ranks}
    # Of a module that it finds without factors, PEFT would warn, which is an error here.
    found = {name for name, module in adapted(aligned, out).named_modules() if hasattr(module, "lora_A")}
    assert found == {f"base_model.model.{name}" for name in ranks}


def test_the_dtype_is_that_of_the_aligned_model(tmp_path):
    aligned = tiny(tmp_path, dtype=torch.bfloat16)
    layers = layers_of(aligned)
    write(tmp_path / "out", aligned, layers)
    merged = adapted(aligned, tmp_path / "out").merge_and_unload().state_dict()
    for name, factors in layers:
        rounded = LowRank(factors.down.bfloat16(), factors.up.bfloat16(), 0.0)
        assert merged[f"{name}.weight"].dtype == torch.bfloat16
        check_equal(merged[f"{name}.weight"], restored(aligned, (name, rounded)), rtol=2**-8)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_the_tokenizer_comes_along_and_the_model_does_not(llama, tmp_path):
    (llama.folder / "LICENSE").write_text("yours")
    # With the files that were there when it was opened.
    write(tmp_path / "early", llama, layers_of(llama))
    assert not (tmp_path / "early" / "LICENSE").exists()
    write(tmp_path / "out", Checkpoint.open(llama.folder), layers_of(llama))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG, "LICENSE", *TOKENIZER}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_files_that_are_named_come_along_and_a_models_configuration_does_not(llama, tmp_path):
    template = tmp_path / "tuned.jinja"
    template.write_text("tuned")
    named = {"chat_template.jinja": template, "config.json": llama.folder / "config.json"}
    write(tmp_path / "out", llama, layers_of(llama), companions=named)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "tuned"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG, "chat_template.jinja"}


def test_layers_are_taken_one_at_a_time(llama, tmp_path):
    alive = []

    def one_by_one():
        for name, factors in layers_of(llama):
            copy = LowRank(factors.down.clone(), factors.up.clone(), 0.0)
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy
            assert sum(ref() is not None for ref in alive) <= 1

    write(tmp_path / "out", llama, one_by_one())
    assert len(alive) == 14


def test_a_folder_that_is_not_empty_is_refused_and_may_be_overwritten(llama, tmp_path):
    out = tmp_path / "out"
    write(out, llama, layers_of(llama))
    before = contents(out)
    layers = layers_of(llama, size=0.2, ranks=(2, 4))
    with pytest.raises(DeltaguardError, match="is not empty"):
        write(out, llama, layers)
    assert contents(out) == before
    (out / "deltaguard_report.json").write_text(report_of(before))
    write(out, llama, layers, writer={"overwrite": True})
    read = AdapterCheckpoint.open(llama, out)
    for layer in layers:
        check_equal(read.read(f"{layer[0]}.weight"), restored(llama, layer))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layers": {"size": 0.0}}, DeltaguardError, "is zero"),
        ({"modules": [Q0]}, DeltaguardError, "is no module of the model"),
        ({"extra": [(Q0, low_rank(torch.ones(32, 31), rank=1))]}, ValueError, r"\(32, 31\)"),
        ({"extra": [(Q0, low_rank(torch.ones(32, 32), rank=1))]}, ValueError, "twice"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(llama, tmp_path, options, kind, message):
    layers = [*layers_of(llama, **options.pop("layers", {})), *options.pop("extra", [])]
    with pytest.raises(kind, match=message):
        write(tmp_path / "out", llama, iter(layers), **options)
    assert not (tmp_path / "out").exists()


def test_factors_that_the_models_dtype_cannot_hold_are_refused(tmp_path):
    aligned = tiny(tmp_path, dtype=torch.float16)
    with pytest.raises(DeltaguardError, match="bfloat16 or float32"):
        write(tmp_path / "out", aligned, layers_of(aligned, size=1e6))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step_it_is_never_half(llama, tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, llama.folder, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # The sources that this process runs, and the helpers of tests.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    fresh, replacing = map(int, done.stdout.split())
    # Five files, each flushed, renamed, recorded, and moved into place.
    assert fresh > 5 * 4
    assert replacing > fresh


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def kill_everywhere(aligned, out, old, new, **options):
    """Kill a run before its first, second, ... durable step, and resume it. Returns the number of steps."""
    layers = layers_of(aligned, ranks=(2, 3))
    modules = [name for name, _ in layers]
    for step in itertools.count():
        out.mkdir()
        for name, content in old.items():
            (out / name).write_bytes(content)
        child = os.fork()
        if child == 0:
            kill_at(step)
            write(out, aligned, layers, modules=modules, writer=options)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, "it failed by itself"
        left = contents(out)
        if CONFIG in left:
            assert left.items() >= (old if left[CONFIG] == old.get(CONFIG) else new).items(), step
        if left != new:
            write(out, aligned, layers, modules=modules, writer={**options, "resume": True})
        assert contents(out) == new, step
        shutil.rmtree(out)
        if not killed:
            return step
    raise AssertionError


if __name__ == "__main__":
    # A kill, unlike a power cut, loses nothing that was written, and flushing takes most of the time.
    os.fsync = lambda descriptor: None
    source, work = Checkpoint.open(sys.argv[1]), Path(sys.argv[2])
    given = layers_of(source, ranks=(2, 3))
    write(work / "new", source, given, modules=[name for name, _ in given])
    finished = contents(work / "new")
    earlier = {**finished, CONFIG: b"old", WEIGHTS: b"old weights"}
    earlier["deltaguard_report.json"] = report_of(earlier).encode()
    steps = (
        kill_everywhere(source, work / "fresh", {}, finished),
        kill_everywhere(source, work / "replacing", earlier, finished, overwrite=True),
    )
    sys.stdout.write(" ".join(map(str, steps)))
