"""One command in several processes: the output of one process, one message, and what a kill leaves."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import models
import ranked
from deltaguard.cli.app import run
from deltaguard.errors import DeltaguardError
from deltaguard.ranks import LostRankError, Ranks, joined
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME
from deltaguard.restoration.footprint import Footprint
from pairs import ANSWERED, pair, save_adapter
from stores import require_close


@pytest.fixture(scope="module")
def llama():
    """Checkpoints of several shards, of which every process gets some that hold layers."""
    return pair("llama", max_shard_size="20KB")


def restore_tokens(found, out, *options):
    return ["restore", found.aligned, found.finetuned, "-o", out, "--device", "cpu", *options]


def alone(tokens):
    assert run([str(token) for token in tokens]) == 0


def contents(folder):
    """Every file but those that say when it was made and how long it took."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.name not in (CARD_NAME, REPORT_NAME)}


@pytest.fixture(scope="module")
def alone_at_a_strength(llama, tmp_path_factory):
    """What one process restores at a strength."""
    out = tmp_path_factory.mktemp("alone") / "out"
    alone(restore_tokens(llama, out, "--strength", "0.3", "--store", llama.store))
    return out


def rows(folder):
    """What the report says of each tensor."""
    report = json.loads((folder / REPORT_NAME).read_text())
    return [row | {"seconds": 0} for row in (*report["layers"], *report["others"])]


# Restoring

RESTORES = {
    "a strength": (2, ["--strength", "0.3"]),
    "the dial": (4, ["--max-safety-kl", "0.01"]),
    "the dial block by block": (3, ["--max-safety-kl", "0.01", "--memory", "0"]),
    "the whole is safe": (2, ["--max-safety-kl", "100"]),
    "an adapter": (3, ["--strength", "0.3", "--output-format", "adapter", "--adapter-rank", "4"]),
    "no price": (2, ["--method", "interpolate", "--strength", "0.5"]),
    "refined": (2, ["--max-safety-kl", "0.01", "--refine", "2"]),
}


@pytest.mark.parametrize("what", RESTORES)
def test_the_output_is_that_of_one_process(what, llama, tmp_path):
    count, options = RESTORES[what]
    options = [*options, "--store", llama.store]
    alone(restore_tokens(llama, tmp_path / "one", *options))
    ended = ranked.run(count, restore_tokens(llama, tmp_path / "many", *options, "--json"), tmp_path / "said")
    assert ended.codes == [0] * count, ended.err
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert rows(tmp_path / "many") == rows(tmp_path / "one")
    assert json.loads(ended.out[0])["kept_energy"] > 0
    assert "restore ..." in ended.err[0]
    assert not any((*ended.out[1:], *ended.err[1:]))


def test_several_prices_a_pass_are_measured_as_by_one_process(llama, tmp_path, monkeypatch):
    options = ["--max-safety-kl", "0.01", "--memory", "0", "--store", llama.store]
    with monkeypatch.context() as patched:
        patched.setattr(Footprint, "at_once", 3)
        alone(restore_tokens(llama, tmp_path / "one", *options))
    tokens = restore_tokens(llama, tmp_path / "many", *options)
    ended = ranked.run(3, tokens, tmp_path / "said", at_once=3)
    assert ended.codes == [0] * 3, ended.err
    assert "block by block: prices a pass: 3" in ended.err[0]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert rows(tmp_path / "many") == rows(tmp_path / "one")
    one, many = (json.loads((tmp_path / each / REPORT_NAME).read_text())["dial"] for each in ("one", "many"))
    assert one["by_blocks"]
    assert one == many


SHAPES = {
    "one file": ("llama", "5GB", 3),
    "fewer files than processes": ("llama", "90KB", 3),
    "tied embeddings": ("qwen3", "40KB", 2),
    "experts": ("qwen3_moe", "40KB", 3),
    "stacks of experts": ("gpt_oss", "40KB", 2),
}


@pytest.mark.parametrize("what", SHAPES)
def test_whatever_lies_in_which_file_the_output_is_that_of_one_process(what, tmp_path):
    name, shards, count = SHAPES[what]
    made = pair(name, max_shard_size=shards)
    options = ["--strength", "0.3", "--store", made.store]
    alone(restore_tokens(made, tmp_path / "one", *options))
    ended = ranked.run(count, restore_tokens(made, tmp_path / "many", *options), tmp_path / "said")
    assert ended.codes == [0] * count, ended.err
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert rows(tmp_path / "many") == rows(tmp_path / "one")


def test_an_adapter_over_several_files_is_restored_as_by_one_process(llama, tmp_path):
    save_adapter(llama.aligned, tmp_path / "adapter", ["q_proj", "down_proj"])
    made = replace(llama, finetuned=tmp_path / "adapter")
    options = ["--strength", "0.3", "--store", made.store]
    alone(restore_tokens(made, tmp_path / "one", *options))
    ended = ranked.run(2, restore_tokens(made, tmp_path / "many", *options), tmp_path / "said")
    assert ended.codes == [0, 0], ended.err
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def finished_by(out):
    """The finished files of an interrupted run, by the journal that tells of them."""
    found = {}
    for path in sorted((out / ".deltaguard-partial").glob("journal*.jsonl")):
        events = map(json.loads, path.read_text().splitlines())
        found[path.name] = [event["finished"]["name"] for event in events if "finished" in event]
    return found


def test_every_process_writes_files_and_those_of_all_are_taken_over(llama, tmp_path):
    options = ["--strength", "0.3", "--store", llama.store]
    alone(restore_tokens(llama, tmp_path / "undisturbed", *options))
    out = tmp_path / "out"
    # Its files are written, and it has not told of them.
    dies = (1, "from_all", 3)
    ended = ranked.run(2, restore_tokens(llama, out, *options), tmp_path / "said", dies=dies)
    assert ended.codes == [1, -9]
    found = finished_by(out)
    shards = sorted(path.name for path in llama.finetuned.glob("*.safetensors"))
    assert sorted(name for names in found.values() for name in names) == shards
    assert all(found[name] for name in ("journal.jsonl", "journal-1.jsonl"))
    staged = {path.name: path.stat().st_ino for path in (out / ".deltaguard-partial" / "files").iterdir()}
    ended = ranked.run(3, restore_tokens(llama, out, *options, "--resume"), tmp_path / "said")
    assert ended.codes == [0] * 3, ended.err
    assert {name: (out / name).stat().st_ino for name in shards} == staged
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert rows(out) == rows(tmp_path / "undisturbed")


DEATHS = {
    "a helper as it writes": (1, "count", 5),
    "the first as it writes": (0, "count", 8),
    "a helper before anything": (1, "from_first", 2),
}


@pytest.mark.parametrize("what", DEATHS)
def test_after_a_kill_any_number_of_processes_goes_on(what, llama, alone_at_a_strength, tmp_path):
    options = ["--strength", "0.3", "--store", llama.store]
    out = tmp_path / "out"
    ended = ranked.run(2, restore_tokens(llama, out, *options), tmp_path / "said", dies=DEATHS[what])
    killed = DEATHS[what][0]
    assert ended.codes[killed] == -9
    assert ended.codes[1 - killed] == 1
    said = [line for text in ended.err for line in text.splitlines() if line.startswith("Error")]
    # Nobody is left to say whether the helper has spoken where the first is gone; torchrun says who died.
    assert len(said) == 1 - (killed == 0)
    assert all("Another process of this run has ended" in line for line in said)
    assert not (out / "model.safetensors.index.json").exists()
    if what == "a helper as it writes":
        assert any(finished_by(out).values())
    ended = ranked.run(3, restore_tokens(llama, out, *options, "--resume"), tmp_path / "said")
    assert ended.codes == [0] * 3, ended.err
    assert contents(out) == contents(alone_at_a_strength)


@pytest.mark.parametrize("dies", [(1, "send", 6), (0, "receive", 5)], ids=str)
def test_where_processes_work_at_one_file_a_kill_ends_them_all(dies, tmp_path):
    made = pair("llama")
    options = ["--strength", "0.3", "--store", made.store]
    out = tmp_path / "out"
    ended = ranked.run(2, restore_tokens(made, out, *options), tmp_path / "said", dies=dies)
    assert (ended.codes[dies[0]], ended.codes[1 - dies[0]]) == (-9, 1)
    ended = ranked.run(2, restore_tokens(made, out, *options, "--resume"), tmp_path / "said")
    assert ended.codes == [0, 0], ended.err
    alone(restore_tokens(made, tmp_path / "undisturbed", *options))
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_where_the_first_fails_the_others_end_at_once(shards, tmp_path):
    made, out = pair("llama", max_shard_size=shards), tmp_path / "out"
    options = ["--strength", "0.3", "--store", made.store]
    tokens = restore_tokens(made, out, *options)
    ended = ranked.run(3, tokens, tmp_path / "said", fails=(0, 2), slow=1)
    # The first is not killed, so it receives nothing that others still send.
    assert ended.codes == [1] * 3
    said = [line for text in ended.err for line in text.splitlines() if line.startswith("Error")]
    assert said == ["Error: the disk is broken"]
    assert "journal-1.jsonl" not in finished_by(out)


def test_a_failure_is_one_message(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    options = ["--strength", "0.3", "--store", llama.store]
    ended = ranked.run(3, restore_tokens(llama, tmp_path / "out", *options), tmp_path / "said")
    assert ended.codes == [1] * 3
    assert "is not empty (mine.txt)" in ended.err[0]
    assert not any((*ended.out, *ended.err[1:]))
    ended = ranked.run(2, restore_tokens(llama, tmp_path / "other", "--strength", "2"), tmp_path / "said")
    assert ended.codes == [2, 2]
    assert "".join(ended.err).count("Error:") == 1
    ended = ranked.run(2, ["diff", llama.aligned, llama.finetuned], tmp_path / "said")
    assert ended.codes == [2, 2]
    assert "`deltaguard diff` runs in one process, and 2 were started" in " ".join(ended.err[0].split())
    assert not ended.err[1]


def test_torchrun_starts_it(llama, alone_at_a_strength, tmp_path):
    options = ["--strength", "0.3", "--store", llama.store]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tokens = restore_tokens(llama, tmp_path / "many", *options, "--json")
    ended = subprocess.run(
        [*torchrun, "-m", "deltaguard", *map(str, tokens)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["kept_energy"] > 0
    assert contents(tmp_path / "many") == contents(alone_at_a_strength)


# Calibrating


def prompts(tmp_path, *, answered=True):
    """A prompts file of several batches."""
    lines = [
        {"prompt": row.prompt, "system": row.system} | ({"response": row.response} if answered else {})
        for row in ANSWERED
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def calibrate_tokens(folder, out, asked, *options):
    wanted = ["--prompts", asked, "--batch-size", "1", "--device", "cpu", "--rank", "full"]
    return ["calibrate", folder, "-o", out, *wanted, *options]


@pytest.mark.parametrize(
    ("name", "count", "memory"),
    [("llama", 2, "8GB"), ("llama", 2, "0"), ("gpt2", 4, "0"), ("qwen3_moe", 3, "8GB")],
)
def test_the_store_is_that_of_one_process(name, count, memory, tmp_path):
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    asked = prompts(tmp_path, answered=False)
    options = ["--memory", memory]
    alone(calibrate_tokens(folder, tmp_path / "one", asked, *options))
    tokens = calibrate_tokens(folder, tmp_path / "many", asked, *options, "--json")
    ended = ranked.run(count, tokens, tmp_path / "said")
    assert ended.codes == [0] * count, ended.err
    require_close(tmp_path / "many", tmp_path / "one")
    assert json.loads(ended.out[0])["conversations"] == 8
    assert ("backwards ..." in ended.err[0]) == (memory == "0")
    assert not any((*ended.out[1:], *ended.err[1:]))
    assert not (tmp_path / "many.partial").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with `model`, `prompts.jsonl`, and the store that two processes made block by block."""
    folder = tmp_path_factory.mktemp("undisturbed")
    models.save(models.tiny_model("llama"), folder / "model")
    asked = prompts(folder)
    tokens = calibrate_tokens(folder / "model", folder / "store", asked, "--memory", "0")
    ended = ranked.run(2, tokens, folder / "said")
    assert ended.codes == [0, 0], ended.err
    return folder


@pytest.mark.parametrize(
    "dies", [(1, "wait", 2), (0, "wait", 3), (1, "add_up", 4), (0, "receive", 9)], ids=str
)
def test_a_killed_calibration_goes_on(dies, undisturbed, tmp_path):
    asked = undisturbed / "prompts.jsonl"
    tokens = calibrate_tokens(undisturbed / "model", tmp_path / "out", asked, "--memory", "0")
    ended = ranked.run(2, tokens, tmp_path / "said", dies=dies)
    assert sorted(ended.codes) == [-9, 1]
    assert not (tmp_path / "out").exists()
    ended = ranked.run(2, [*tokens, "--resume"], tmp_path / "said")
    assert ended.codes == [0, 0], ended.err
    assert contents(tmp_path / "out") == contents(undisturbed / "store")


def test_another_number_of_processes_goes_on_with_answers_and_blocks(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    asked = prompts(tmp_path, answered=False)
    tokens = calibrate_tokens(folder, tmp_path / "out", asked, "--memory", "0")
    ended = ranked.run(2, tokens, tmp_path / "said", dies=(0, "receive", 9))
    assert sorted(ended.codes) == [-9, 1]
    left = tmp_path / "out.partial"
    answers = [path.read_text() for path in sorted(left.glob("responses*.jsonl"))]
    assert len(answers) == 2
    # Without `--resume` nobody may take what others were asked.
    assert ranked.run(3, tokens, tmp_path / "said").codes == [1] * 3
    (left / "responses.jsonl").unlink()
    assert ranked.run(3, tokens, tmp_path / "said").codes == [1] * 3
    (left / "responses.jsonl").write_text(answers[1])
    ended = ranked.run(3, [*tokens, "--resume"], tmp_path / "said")
    assert ended.codes == [0] * 3, ended.err
    alone(calibrate_tokens(folder, tmp_path / "one", asked, "--memory", "0"))
    require_close(tmp_path / "out", tmp_path / "one")


ALL = "from_first from_all wait add_up send receive count"
KILLS = int(os.environ.get("DELTAGUARD_KILLS", "1"))
"""How often at random; `make soak` asks for more."""


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("verb", ["calibrate", "restore"])
def test_killed_at_random_it_goes_on(verb, number, llama, undisturbed, alone_at_a_strength, tmp_path):
    draw = random.Random(f"{verb} {number}")
    out = tmp_path / "out"
    if verb == "calibrate":
        tokens = calibrate_tokens(undisturbed / "model", out, undisturbed / "prompts.jsonl", "--memory", "0")
        expected = undisturbed / "store"
    else:
        options = ["--strength", "0.3", "--store", llama.store]
        tokens, expected = restore_tokens(llama, out, *options), alone_at_a_strength
    for resume in ([], ["--resume"]):
        dies = draw.randrange(2), ALL, draw.randrange(1, 40)
        ended = ranked.run(2, [*tokens, *resume], tmp_path / "said", dies=dies)
        assert sorted(ended.codes) in ([-9, 1], [0, 0], [-9, 0]), (dies, ended.err)
        assert "bug of deltaguard" not in "".join(ended.err)
    ended = ranked.run(2, [*tokens, "--resume"], tmp_path / "said")
    assert ended.codes == [0, 0], ended.err
    assert contents(out) == contents(expected)


# What ranks are


def test_work_is_split_evenly():
    costs = [float(1 + i % 7) ** 3 for i in range(50)]
    for in_turn, slack in ((False, 1.01), (True, 1.15)):
        owners = Ranks(size=4).shares(costs, in_turn=in_turn)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(4)]
        assert max(loads) < slack * sum(costs) / 4
    assert Ranks(size=3).shares([1.0]) == [0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dist.DistBackendError("NCCL error: unhandled system error\nLast error:"), "NCCL error: unhandled"),
        (RuntimeError("Connection closed by peer"), "DELTAGUARD_DEBUG=1"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), None),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
    ],
    ids=["NCCL", "gloo", "a GPU", "memory"],
)
def test_what_ends_an_exchange_is_told_as_what_it_is(error, said, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(type(error) if said is None else LostRankError, match=said or str(error)):
        Ranks(size=2).add_up(torch.ones(1))


def test_who_shares_a_run_must_say_who_is_where(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(DeltaguardError, match="LOCAL_WORLD_SIZE must be set"), joined():
        pass


@pytest.mark.parametrize(("device", "refused"), [("cuda", False), ("cuda:1", False), ("cuda:0", True)])
def test_every_process_needs_a_gpu_of_its_own(device, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    groups = []
    monkeypatch.setattr("torch.distributed.new_group", lambda **given: groups.append(given) or "group")
    second = Ranks(rank=1, size=2, here=2, local=1)
    if refused:
        with pytest.raises(Exception, match="Give each a GPU of its own"):
            second.on(torch.device(device))
    else:
        assert second.on(torch.device(device))._sums == "group"
        assert groups[0]["backend"] == "nccl"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Exception, match="2 processes run on this machine, which has 1 GPUs"):
        second.on(torch.device(device))
    assert Ranks().on(torch.device(device)) == Ranks()
    assert (second.sharing(torch.device("cpu")), second.sharing(torch.device("cuda"))) == (2, 1)
