"""Inputs that once got past every check: each by a way that only a reader of other libraries' code knows."""

import json
import shutil

import pytest

from deltaguard import DeltaguardError, RestoreConfig, restore, verify
from deltaguard.chat.template import apply_template
from deltaguard.cli.app import run
from deltaguard.curvature.store import CurvatureStore
from deltaguard.evaluation.journal import AnswerFile
from deltaguard.evaluation.replies import Failure, read_reply
from deltaguard.files import ANY_OBJECT, read_journal
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify
from deltaguard.models.loading import load_config
from models import tiny_tokenizer
from pairs import pair, save_adapter


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pair("llama").finetuned, folder)
    return folder


def change(path, **fields):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("text", ["my only line of notes", '{"mine": 1}'])
def test_no_file_but_a_journal_is_cut(tmp_path, text, link):
    precious = tmp_path / "precious"
    precious.write_text(text)
    path = tmp_path / "journal.jsonl" if link else precious
    if link:
        path.symlink_to(precious)
    for read in (
        lambda: read_journal(path, ANY_OBJECT, remedy="Remove it."),
        lambda: AnswerFile(path, prompts=["a"], made_by={}),
    ):
        with pytest.raises(DeltaguardError, match="is a link" if link else "beginning of one line"):
            read()
    assert precious.read_text() == text


@pytest.mark.parametrize("options", [["--dry-run", "--overwrite"], ["--resume"]])
def test_a_link_in_the_place_of_a_runs_progress_is_refused(tmp_path, capsys, options):
    made = pair("llama")
    precious = tmp_path / "precious"
    precious.write_text("line\nhalf")
    staging = tmp_path / "out" / ".deltaguard-partial"
    staging.mkdir(parents=True)
    (staging / "journal.jsonl").symlink_to(precious)
    command = ["restore", str(made.aligned), str(made.finetuned), "-o", str(tmp_path / "out")]
    assert run([*command, "--store", str(made.store), *options]) == 1
    assert "is a link" in capsys.readouterr().err
    assert precious.read_text() == "line\nhalf"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("config.json", "configuration_files"),
        ("config.json", "transformers_weights"),
        ("tokenizer_config.json", "fast_tokenizer_files"),
    ],
)
def test_no_file_stands_in_for_the_one_that_is_compared(model, name, field):
    change(model / name, **{field: ["other.4.0.0.json"]})
    with pytest.raises(DeltaguardError, match=field):
        Checkpoint.open(model)


def test_an_adapter_beside_a_model_is_not_put_on_it(model):
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltaguardError, match="both a model and an adapter"):
        Checkpoint.open(model)


def test_of_several_chat_templates_each_is_looked_at():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 10 ** (10 ** 8) }}"}
    with pytest.raises(DeltaguardError, match="raises a number to a power"):
        apply_template(tokenizer, [{"role": "user", "content": "How?"}])


@pytest.mark.parametrize("template", [["abc"], [{"template": "x"}], 5, {"default": "x"}])
def test_odd_chat_templates_are_one_message(model, template):
    (model / "chat_template.jinja").unlink()
    change(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(DeltaguardError, match="`chat_template"):
        identify(Checkpoint.open(model))


def test_a_generation_configuration_of_lists_is_read(model):
    change(model / "generation_config.json", text_config=[1])
    assert identify(Checkpoint.open(model)).config_sha256


def test_a_configuration_of_endless_labels_is_refused(model):
    change(model / "config.json", num_labels=10**9)
    with pytest.raises(DeltaguardError, match="num_labels"):
        load_config(model, "model")


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {}},
        {"message": {"content": "Sure, he"}, "finish_reason": "abort"},
        {"message": {"content": None}, "finish_reason": "tool_calls"},
        {"message": {"reasoning_content": "Let me"}, "finish_reason": "length"},
    ],
)
def test_what_a_server_broke_off_is_no_answer(choice):
    assert isinstance(read_reply(200, json.dumps({"choices": [choice]})), Failure)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "merges.txt", "adapter_config.json"])
def test_verify_names_what_would_be_loaded_besides(tmp_path, name):
    made = pair("llama")
    out = tmp_path / "out"
    restore(made.aligned, made.finetuned, out, store=made.store, config=RestoreConfig(strength=0.3))
    assert verify(out).passed
    (out / name).write_text("{}")
    assert any(name in problem for problem in verify(out).problems)


def test_a_scale_that_no_weight_can_hold_is_refused(tmp_path):
    made = pair("llama")
    folder = tmp_path / "adapter"
    save_adapter(made.aligned, folder, ["q_proj"])
    change(folder / "adapter_config.json", lora_alpha=1e300)
    with pytest.raises(DeltaguardError, match="lora_alpha"):
        AdapterCheckpoint.open(Checkpoint.open(made.aligned), folder)


def test_a_layer_larger_than_any_number_is_refused(tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(pair("llama").store, folder)
    manifest = json.loads((folder / "curvature.json").read_text())
    manifest["groups"][0]["group"]["in_features"] = 10**400
    (folder / "curvature.json").write_text(json.dumps(manifest))
    with pytest.raises(DeltaguardError, match="in_features"):
        CurvatureStore.from_pretrained(folder)
