"""Measuring candidates block by block: the numbers of the whole model, in the memory of a block."""

import gc
import math
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import FalconMambaConfig

import models
from deltaguard import DeltaguardError, RestoreConfig, restore
from deltaguard.chat.tokens import Reader
from deltaguard.cli.app import run
from deltaguard.curvature.blocks import CutModel, UncutError
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.fitting import Fitting
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.sizes import MOST_ROWS, row_bytes, rows_within
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_tokenizer
from deltaguard.models.mirror import loadable
from deltaguard.progress import ignore
from deltaguard.reports.outcome import dial_facts
from deltaguard.restoration import footprint
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.block_passes import likelihood, own_blocks
from deltaguard.restoration.divergence import Asked
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.footprint import MOST_AT_ONCE, Footprint
from deltaguard.restoration.kept import Kept
from deltaguard.restoration.resident import Resident, _files
from deltaguard.restoration.streamed import StreamedCandidate
from deltaguard.restoration.trial import Trial
from pairs import ANSWERED, CONVERSATIONS, pair, save_adapter
from stores import write_curvature
from variants import variant, with_further_tokens

DIAL = RestoreConfig(max_safety_kl=1e-3, device="cpu")
PRICES = (1.0, 1e3, 1e6)


def trial_of(made, tmp_path, finetuned=None, **changes):
    config = DIAL.model_copy(update={"memory": 0, **changes})
    job = open_job(made.aligned, finetuned or made.finetuned, store=made.store, config=config)
    return Trial(job, job.plan(config), config, tmp_path)


def streamed(trial, tasks=(), dtype=torch.float64):
    with loadable(_files(trial)) as output:
        return StreamedCandidate.open(trial, output, tasks, dtype=dtype)


def check_same(trial, dtype=torch.float64, rel=1e-8, absolute=1e-15):
    """Whether both ways find the same of the whole fine-tune, of prices and of a task."""
    one, other = Resident().loaded(trial, ANSWERED), streamed(trial, ANSWERED, dtype)
    other.at_once = len(PRICES)
    assert (one.tokens, one.conversations) == (other.tokens, other.conversations)
    found = []
    for candidate in (one, other):
        probes = [candidate.whole(ignore)]
        numbers = [candidate.aligned_likelihood, candidate.likelihood(ANSWERED)]
        candidate.take_others()
        probes += candidate.probes(PRICES, ignore)
        numbers += [candidate.likelihood(ANSWERED)]
        assert {probe.conversations for probe in probes} == {one.conversations}
        found.append([*numbers, *(each for p in probes for each in (p.safety_kl, p.margin))])
    assert found[0][3] > found[0][-2]
    assert found[1] == pytest.approx(found[0], rel=rel, abs=absolute)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", models.DENSE)
def test_the_numbers_are_those_of_the_whole_model(name, tmp_path):
    check_same(trial_of(pair(name), tmp_path))


@pytest.mark.parametrize("name", models.EXPERTS)
def test_so_they_are_of_experts_that_torch_multiplies_in_float32_alone(name, tmp_path):
    check_same(trial_of(pair(name), tmp_path), torch.float32, rel=1e-4, absolute=1e-6)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("changes", [{}, {"output_format": "adapter"}], ids=str)
@pytest.mark.parametrize("name", models.EITHER_ORDER)
def test_so_they_are_of_an_adapter(name, changes, tmp_path):
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    save_adapter(pair(name).aligned, tmp_path / "adapter", targets, fan_in_fan_out=name == "gpt2")
    check_same(trial_of(pair(name), tmp_path, tmp_path / "adapter", **changes))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("other_params", ["aligned", "finetuned"])
def test_so_they_are_where_the_output_has_more_tokens_or_is_run_otherwise(other_params, tmp_path):
    longer = with_further_tokens(tmp_path / "longer", "<|word|>")
    changed = variant(longer, tmp_path / "changed", rms_norm_eps=1e-2)
    for tuned in (longer, changed):
        given = {"other_params": other_params, "config_from": "finetuned"}
        check_same(trial_of(pair("llama"), tmp_path, tuned, **given))


@pytest.mark.usefixtures("exact")
def test_so_they_are_in_half_precision_and_in_shards(tmp_path):
    check_same(trial_of(pair("llama", dtype=torch.bfloat16, max_shard_size="40KB"), tmp_path))


@pytest.mark.usefixtures("exact")
def test_a_task_that_is_longer_than_what_is_held_out_goes_in_several_passes():
    source, device = Checkpoint.open(pair("llama").aligned), torch.device("cpu")
    cut = CutModel(source, dtype=torch.float64, device=device)
    tokenizer = load_tokenizer(source.folder, source.reference)
    asked = Asked(Reader.of(tokenizer, cut.model.config, 512), 1, device)

    def measure(most):
        passes = []
        blocks = lambda: passes.append(most) or own_blocks(cut)
        found = likelihood(cut, asked.batches(ANSWERED), blocks, Fitting(), most=most)
        return found, len(passes)

    (whole, one), (parts, several) = measure(10**6), measure(1)
    assert (one, several) == (1, len(ANSWERED))
    assert parts == pytest.approx(whole, rel=1e-12)


def test_as_soon_as_a_mean_is_exceeded_no_more_is_compared(tmp_path):
    made, one_by_one = pair(), CalibrateConfig(device="cpu", batch_size=1)
    calibrate(made.aligned, tmp_path / "store", conversations=CONVERSATIONS, config=one_by_one)
    trial = trial_of(replace(made, store=tmp_path / "store"), tmp_path)
    one, other = Resident().loaded(trial), streamed(trial, dtype=torch.float32)
    limit = one.whole(ignore).safety_kl / 100
    found = [candidate.whole(ignore, enough=limit) for candidate in (one, other)]
    assert found[0].conversations == found[1].conversations < one.conversations
    assert found[1].safety_kl == pytest.approx(found[0].safety_kl, rel=1e-3)


# Which way is taken


def restored(tmp_path, name="llama", **changes):
    """The report of a restore by the dial, and what it told."""
    made, told, out = pair(name), [], tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    config = DIAL.model_copy(update=changes)
    report = restore(made.aligned, made.finetuned, out, store=made.store, config=config, progress=told.append)
    return report, " ".join(event.detail for event in told)


def test_what_fits_is_measured_as_a_whole_and_what_does_not_block_by_block(tmp_path):
    one, said = restored(tmp_path)
    other, told = restored(tmp_path, memory=0)
    assert (one.dial.by_blocks, other.dial.by_blocks) == (False, True)
    assert "block by block" not in said
    assert "more than 0 bytes: block by block, prices a pass: 1" in told
    assert ("block by block" in str(dial_facts(one)), "block by block" in str(dial_facts(other))) == (
        False,
        True,
    )
    assert other.mu == pytest.approx(one.mu, rel=1e-3)
    assert len(one.dial.probes) == len(other.dial.probes)


def test_where_there_is_room_several_prices_are_measured_a_pass(tmp_path, monkeypatch):
    passes, original = [], StreamedCandidate._measure
    watched = lambda self, prices, *given: (passes.append(len(prices)), original(self, prices, *given))[1]
    monkeypatch.setattr(StreamedCandidate, "_measure", watched)
    monkeypatch.setattr(Footprint, "at_once", 4)
    report, _ = restored(tmp_path, memory=0)
    assert sum(passes) == len(report.dial.probes) - 1 > len(passes)
    assert max(passes) == 4
    assert 0.9e-3 <= report.dial.restored_kl <= 1e-3


def test_a_model_that_cannot_be_cut_is_measured_as_a_whole_and_that_is_said(tmp_path, monkeypatch):
    def refuse(*_given, **_named):
        raise UncutError("its blocks dance")

    monkeypatch.setattr("deltaguard.restoration.streamed.CutModel", refuse)
    report, said = restored(tmp_path, memory=0)
    assert "the model cannot be taken block by block: its blocks dance" in said
    assert not report.dial.by_blocks


def test_refining_takes_the_model_as_a_whole(tmp_path):
    report, _ = restored(tmp_path, memory=0, refine=1)
    assert not report.dial.by_blocks


def test_weights_that_are_not_finite_are_named(tmp_path):
    made = pair()
    broken = models.tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    models.save(broken, tmp_path / "broken")
    with pytest.raises(DeltaguardError, match=r"mlp\.up_proj\.weight` holds 1 entries that are NaN"):
        restore(
            made.aligned,
            tmp_path / "broken",
            tmp_path / "out",
            store=made.store,
            config=DIAL.model_copy(update={"memory": 0}),
        )


def test_the_plan_says_which_way_is_taken_and_what_of_memory_each_part_takes(tmp_path, capsys):
    made = pair()
    plans = [
        plan_restore(
            made.aligned, made.finetuned, store=made.store, config=DIAL.model_copy(update={"memory": memory})
        )
        for memory in (None, 0, 10**6)
    ]
    assert [plan.dial.by_blocks for plan in plans] == [False, True, False]
    whole, blocks = plans[:2]
    assert whole.dial_bytes > 0 == whole.dial.block_bytes
    dial, source = blocks.dial, Checkpoint.open(made.finetuned)
    parameters = sum(info.nbytes for info in source.tensors.values())
    assert dial.ends_bytes / 2 + 2 * dial.block_bytes == parameters
    assert dial.at_once == 1
    assert dial.weights_bytes == dial.block_bytes
    parts = dial.ends_bytes + dial.block_bytes + dial.hidden_bytes + dial.weights_bytes
    assert blocks.dial_bytes == parts + blocks.peak_bytes
    command = [
        "restore",
        made.aligned,
        made.finetuned,
        "-o",
        tmp_path / "out",
        "--store",
        made.store,
        "--max-safety-kl",
        "1e-3",
    ]
    assert run([*map(str, command), "--dry-run", "--memory", "0", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "block by block, prices a pass: 1" in said
    assert "memory for the largest block" in said
    assert blocks.write_bytes == parameters
    assert f"{round(parameters / 1000)} kB" in next(line for line in said.splitlines() if "written " in line)
    assert run([*map(str, command), "--dry-run", "--device", "cpu"]) == 0
    assert "as a whole" in capsys.readouterr().out


def test_asking_takes_a_second_copy_of_the_weights_where_it_is_faster(tmp_path, monkeypatch):
    limit = trial_of(pair(), tmp_path).footprint.whole
    monkeypatch.setattr(footprint, "served_dtype", lambda _: torch.bfloat16)
    assert trial_of(pair(), tmp_path).footprint.whole == limit
    asking = trial_of(pair(), tmp_path, max_safety_kl=None, max_added_attack_success=2).footprint.whole
    weights = sum(math.prod(info.shape) for info in Checkpoint.open(pair().finetuned).tensors.values())
    assert asking == limit + 2 * weights


def test_a_block_of_an_adapters_candidate_is_held_in_float32(tmp_path):
    made = pair(dtype=torch.bfloat16)
    stored, computed = (
        trial_of(made, tmp_path, output_format=kind).footprint for kind in ("checkpoint", "adapter")
    )
    through = stored.reference
    assert computed.candidate - through == 2 * (stored.candidate - through)


def test_given_responses_may_be_longer_than_a_model_was_let_write(tmp_path):
    trial = trial_of(pair(), tmp_path)
    store = trial.job.store
    made = store.provenance.model_copy(
        update={"max_new_tokens": 2, "response_tokens": 1000, "conversations": 9}
    )
    manifest = store.manifest.model_copy(update={"provenance": made})
    job = replace(trial.job, store=replace(store, manifest=manifest))
    assert footprint.held_out_tokens(job)[1] == len(store.held_out) * 112


def test_how_deltas_are_spread_is_read_once(tmp_path, monkeypatch):
    trial = trial_of(pair(), tmp_path)
    found = trial.profile(ignore)
    monkeypatch.setattr(trial, "profiles", None)
    assert trial.profile(ignore) is found


def test_more_memory_carries_more_candidates(tmp_path):
    one, many = (trial_of(pair(), tmp_path, memory=memory).footprint for memory in (0, 10**9))
    assert (one.at_once, many.at_once) == (1, MOST_AT_ONCE)
    for count in (2, 3):
        room = replace(one, limit=one.taken + (count - 1) * one.candidate)
        assert (room.at_once, room.left) == (count, 0)
        assert replace(room, limit=room.limit - 1).at_once == count - 1


# Asked


@pytest.mark.parametrize(
    ("name", "whole_tokens"), [*((name, None) for name in models.FAMILIES), ("llama", 6), ("gemma3", 6)]
)
def test_it_answers_as_the_whole_model_does(name, whole_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(RestoreConfig, "whole_tokens", whole_tokens)
    # A random model ends no sentence.
    monkeypatch.setattr("deltaguard.chat.openings.OPENING_TOKENS", 12)
    # In batches of other sizes, a random model's likeliest token may be another by rounding.
    monkeypatch.setattr("deltaguard.restoration.streamed.rows_within", lambda *_, **__: 64)
    trial, rows = trial_of(pair(name), tmp_path), [*ANSWERED, *CONVERSATIONS[:3]]
    with loadable(_files(trial)) as output:
        other = StreamedCandidate.open(trial, output, (), rows)
    one = Resident().loaded(trial, (), rows)
    assert other.aligned_openings == one.aligned_openings
    for candidate in (one, other):
        candidate.whole(ignore)
    whole = one.openings(rows)
    assert other.openings(rows) == whole != one.aligned_openings
    for candidate in (one, other):
        candidate.take_others()
        candidate.put(1e3)
    assert other.openings(rows) == one.openings(rows) != whole
    # What was in the dtype that models are asked in is measured in float32 again.
    assert other.probe(1e3, ignore).safety_kl == pytest.approx(one.probe(1e3, ignore).safety_kl, rel=1e-3)


def test_as_many_rows_are_continued_as_the_memory_has_room_for():
    config = models.tiny_model("llama").config
    # Keys and values of two blocks with two heads of 8 numbers, and what is computed within one.
    row = 10 * 4 * (2 * 2 * 2 * 8 + 16 * 32)
    found = [rows_within(config, room, tokens=10, dtype=torch.float32) for room in (-1, row, 5 * row, 10**9)]
    assert found == [1, 1, 5, MOST_ROWS]


def test_a_model_without_attention_keeps_no_keys_and_values():
    config = FalconMambaConfig(hidden_size=32, num_hidden_layers=2)
    assert row_bytes(config, tokens=10, dtype=torch.float32) == 10 * 4 * 16 * 32


def test_a_batch_is_answered_in_a_pass_for_each_token(tmp_path, monkeypatch):
    monkeypatch.setattr(RestoreConfig, "whole_tokens", 5)
    trial, read = trial_of(pair(), tmp_path), []
    candidate = streamed(trial, dtype=torch.float32)
    candidate.put(1e3)
    monkeypatch.setattr("deltaguard.restoration.streamed.rows_within", lambda *_, **__: 64)
    original, solved = CutModel.loaded, Trial._solved
    watched = lambda self, *given: (read.append(given[0]), original(self, *given))[1]
    monkeypatch.setattr(CutModel, "loaded", watched)
    made = []
    monkeypatch.setattr(Trial, "_solved", lambda *given: (made.append(1), solved(*given))[1])
    candidate.openings(ANSWERED)
    assert read == [0, 1] * (len(read) // 2)
    assert len(read) // 2 <= 5 + 1
    # Not for each token.
    assert len(made) == len(trial.steps)


def test_where_there_is_no_room_for_a_candidate_its_blocks_are_made_for_each_token(tmp_path, monkeypatch):
    monkeypatch.setattr(RestoreConfig, "whole_tokens", 5)
    trial = trial_of(pair(), tmp_path)
    candidate = streamed(trial, dtype=torch.float32)
    candidate.put(1e3)
    expected = candidate.openings(ANSWERED)
    monkeypatch.setattr(Kept, "add", lambda *_: None)
    candidate.put(1e3)
    assert candidate.openings(ANSWERED) == expected


# Memory


def test_what_is_no_longer_used_leaves_the_memory_at_once(tmp_path):
    trial = trial_of(pair(), tmp_path)
    streamed(trial, dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        candidate = streamed(trial, dtype=torch.float32)
        candidate.whole(ignore)
        candidate.openings(ANSWERED)
        candidate.take_others()
        candidate.probe(1e3, ignore)
        candidate.openings(ANSWERED)
        candidate.likelihood(ANSWERED)
        held = [
            weakref.ref(each) for each in (candidate, candidate.cut, candidate.cut.model, candidate.known)
        ]
        del candidate
        assert [each() for each in held] == [None] * 4
    finally:
        gc.enable()


MEASURE = """
import sys
from deltaguard.memory import peak_memory_bytes
from deltaguard.progress import ignore
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.trial import Trial
peaks, config = [], RestoreConfig(max_safety_kl=1e-3, memory=0, device="cpu")
for folder in sys.argv[1:]:
    job = open_job(f"{folder}/aligned", f"{folder}/finetuned", store=f"{folder}/store", config=config)
    trial = Trial(job, job.plan(config), config, folder)
    candidate = Resident().candidate(trial)
    assert candidate.by_blocks
    candidate.whole(ignore)
    candidate.take_others()
    trial.profile(ignore)
    candidate.at_once = 2
    candidate.probes([1.0, 10.0], ignore)
    peaks.append(peak_memory_bytes())
print(peaks[-1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """A block takes 17 MB in float32: six more of them must not be held at once."""
    hidden, wide = 512, 2048
    for count in (4, 10):
        sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": count}
        model, folder = models.tiny_model("llama", **sizes), tmp_path / f"{count}"
        aligned = models.save(model, folder / "aligned", dtype=torch.bfloat16)
        models.save(models.perturbed(model, 0.05), folder / "finetuned", dtype=torch.bfloat16)
        shapes = {"mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
        write_curvature(folder / "store", aligned, shapes, count, rank_share=0.05)
    folders = [str(tmp_path / name) for name in ("4", "10")]
    command = [sys.executable, "-c", MEASURE, *folders]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    assert int(found.stdout) < 60e6
