"""What a calibration would take: told from headers and prompts, and not far from what it does take."""

import json
import shutil
from math import prod

import pytest
import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.tokens import encode
from deltaguard.cli.app import run
from deltaguard.curvature import calibrate as calibrate_module
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.dry_run import plan_calibration
from deltaguard.curvature.request import CalibrateConfig, asked_for
from deltaguard.curvature.sizes import blocks_of, row_bytes, whole_bytes
from deltaguard.device import served_dtype
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_config, load_tokenizer
from deltaguard.ranks import Ranks
from pairs import CONVERSATIONS, pair
from refusing import refusing_pair

SMALL = CalibrateConfig(num_samples=12, num_held_out=6, max_new_tokens=12, device="cpu")


@pytest.fixture(scope="module")
def aligned():
    return refusing_pair().aligned


def test_the_parts_of_a_model_are_all_of_it(aligned):
    source = Checkpoint.open(aligned)
    outside, blocks = blocks_of(source)
    parts = [outside, *blocks]
    assert sum(part.weights for part in parts) == sum(prod(info.shape) for info in source.tensors.values())
    assert sum(part.bytes(torch.bfloat16) for part in parts) == whole_bytes(source, torch.bfloat16)
    assert (outside.sums, outside.passed) == (0, 0)
    assert len({part.sums for part in blocks}) == 1


def test_the_plan_bounds_the_tokens_and_chooses_as_the_calibration_does(aligned, tmp_path):
    plan = plan_calibration(aligned, config=SMALL)
    made = calibrate(aligned, tmp_path / "store", config=SMALL)
    tokenizer = load_tokenizer(aligned, "aligned")
    held_out = sum(len(encode(tokenizer, row, max_length=512).ids) for row in made.held_out)
    answers = (12 + 1) * plan.conversations
    used = made.provenance.tokens + held_out
    assert used <= plan.tokens <= used + answers
    assert plan.conversations == len(asked_for(None, SMALL).all) == 30
    assert not plan.by_blocks
    assert plan.hidden_bytes == plan.disk_bytes == 0
    served = served_dtype(torch.device("cpu"))
    kept = 0 if served == torch.float32 else torch.float32.itemsize
    assert plan.answering_bytes == plan.weights_bytes // torch.float32.itemsize * (served.itemsize + kept)


def test_block_by_block_it_holds_one_block_and_spills_what_goes_into_each(aligned):
    whole = plan_calibration(aligned, config=SMALL)
    plan = plan_calibration(aligned, config=SMALL.model_copy(update={"memory": 0}))
    outside, blocks = blocks_of(Checkpoint.open(aligned))
    assert plan.by_blocks
    assert plan.weights_bytes == 4 * (outside.weights + blocks[0].weights)
    served, shape = served_dtype(torch.device("cpu")), load_config(aligned, "aligned")
    held = served.itemsize * plan.weights_bytes // 4
    # A row at least is continued at a time.
    assert held < plan.answering_bytes <= held + row_bytes(shape, tokens=512, dtype=served)
    assert plan.sums_bytes * len(blocks) == whole.sums_bytes
    assert plan.pass_bytes * len(blocks) == whole.pass_bytes
    assert plan.disk_bytes == (len(blocks) + 5) * plan.hidden_bytes // 2 + plan.store_bytes
    assert plan.hidden_bytes > 0


@pytest.mark.parametrize("rank", ["auto", "full"])
def test_the_disk_that_it_tells_is_enough(aligned, tmp_path, rank, monkeypatch):
    config = SMALL.model_copy(update={"memory": 0, "rank": rank})
    folder, found = tmp_path / "store.partial", []
    write = calibrate_module.write_store

    def measured(*given, **named):
        found.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        return write(*given, **named)

    def listen(event):
        if event.stage == "backwards":
            found.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))

    monkeypatch.setattr(calibrate_module, "write_store", measured)
    calibrate(aligned, tmp_path / "store", config=config, progress=listen)
    plan = plan_calibration(aligned, config=config)
    # Headers of files, names and settings are not counted, and weigh little beside those of real models.
    assert 0.4 * plan.disk_bytes < max(found) < 1.1 * plan.disk_bytes


def test_predictions_grow_with_answers_and_vocabulary(aligned):
    def rows(words):
        return [Conversation(f"Why {i}?", None, "no " * words) for i in range(12)]

    few, many = (plan_calibration(aligned, conversations=rows(words), config=SMALL) for words in (5, 50))
    vocabulary = load_config(aligned, "aligned").vocab_size
    tokenizer = load_tokenizer(aligned, "aligned")
    for plan, words in ((few, 5), (many, 50)):
        known = encode(tokenizer, rows(words)[0], max_length=512)
        response = len(known.ids) - known.prompt_length
        assert plan.predicted_bytes == 2 * 10 * response * vocabulary * 4


def test_thoughts_and_ends_of_turns_are_counted(aligned, tmp_path):
    thinking = tmp_path / "thinking"
    shutil.copytree(aligned, thinking)
    template = thinking / "chat_template.jinja"
    begin = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    template.write_text(template.read_text() + begin)
    plan = plan_calibration(thinking, config=SMALL)
    made = calibrate(thinking, tmp_path / "store", config=SMALL)
    tokenizer = load_tokenizer(thinking, "thinking")
    held_out = sum(len(encode(tokenizer, row, max_length=512).ids) for row in made.held_out)
    assert made.provenance.tokens + held_out <= plan.tokens
    assert plan.tokens > 2 * plan_calibration(aligned, config=SMALL).tokens


def test_processes_of_one_machine_share_its_memory(aligned):
    alone = plan_calibration(aligned, config=SMALL)
    shared = plan_calibration(aligned, config=SMALL, ranks=Ranks(rank=1, size=4, here=4, local=1))
    assert shared.limit_bytes == alone.limit_bytes // 4


def test_with_all_answers_given_no_model_is_loaded_to_answer_block_by_block(aligned):
    for memory in (0, None):
        config = SMALL.model_copy(update={"memory": memory})
        assert plan_calibration(aligned, config=config, conversations=CONVERSATIONS).answering_bytes == 0


def test_an_answer_has_no_more_tokens_than_its_prompt_leaves_it(aligned):
    rows = [Conversation("why " * 200 + str(i)) for i in range(12)]
    assert plan_calibration(aligned, conversations=rows, config=SMALL).predicted_bytes == 0


def test_of_experts_a_batch_leaves_what_its_tokens_are_routed_to():
    """Two of four experts, each with three matrices between 32 and 48 wide; attention, and the router."""
    _, (block, _) = blocks_of(Checkpoint.open(pair("mixtral").aligned))
    attention = 2 * (32 + 32) + 2 * (32 + 16)
    assert block.passed == attention + (32 + 4) + 2 * 3 * (32 + 48)


def test_the_command_tells_and_writes_nothing(aligned, tmp_path, capsys):
    command = ["calibrate", str(aligned), "-o", str(tmp_path / "store"), "--device", "cpu", "--dry-run"]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "as a whole" in told
    assert "disk" not in told
    assert run([*command, "--memory", "0", "--rank", "full", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["by_blocks"], plan["store_bytes"]) == (True, None)
    assert list(tmp_path.iterdir()) == []
