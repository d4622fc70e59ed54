"""What identifies a model: what counts changes its hashes, and nothing else does."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import models
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import ModelIdentity, identify, templates_of
from deltaguard.models.mirror import loadable, output_files
from pairs import pair, save_adapter
from variants import OTHER_TEMPLATE, edited, variant

PARTS = ("config_sha256", "tokenizer_sha256", "template_sha256")


def differing(folder):
    """The parts in which a copy of the tiny model is another one."""
    one, other = (identify(Checkpoint.open(each)) for each in (pair().aligned, folder))
    assert one.fingerprint == other.fingerprint
    return {part for part in PARTS if getattr(one, part) != getattr(other, part)}


def in_file(name, **changes):
    """A change of the fields of one JSON file."""
    return lambda folder: edited(folder / name, lambda content: content.update(changes))


def without(name, *fields):
    return lambda folder: edited(folder / name, lambda content: [content.pop(field) for field in fields])


def with_file(name, content):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return write


def template_in_config(folder):
    """As older versions of transformers save it."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    in_file("tokenizer_config.json", chat_template=template)(folder)


def templates_in_config(folder):
    template_in_config(folder)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    in_file("tokenizer_config.json", chat_template=named)(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (in_file("config.json", rms_norm_eps=0.1), "config_sha256"),
        (in_file("config.json", a_field_of_tomorrow=True), "config_sha256"),
        (in_file("config.json", rope_parameters={"rope_theta": 5.0}), "config_sha256"),
        (in_file("config.json", eos_token_id=[2, 5]), "config_sha256"),
        (in_file("generation_config.json", eos_token_id=[2, 5]), "config_sha256"),
        (in_file("generation_config.json", suppress_tokens=[7]), "config_sha256"),
        (in_file("generation_config.json", begin_suppress_tokens=[7]), "config_sha256"),
        (in_file("generation_config.json", bad_words_ids=[[7]]), "config_sha256"),
        (in_file("generation_config.json", forced_bos_token_id=7), "config_sha256"),
        (in_file("generation_config.json", forced_eos_token_id=7), "config_sha256"),
        (in_file("generation_config.json", decoder_start_token_id=7), "config_sha256"),
        (in_file("tokenizer.json", normalizer={"type": "Lowercase"}), "tokenizer_sha256"),
        (in_file("tokenizer_config.json", bos_token=models.USER), "tokenizer_sha256"),
        (with_file("special_tokens_map.json", '{"unk_token": "<|pad|>"}'), "tokenizer_sha256"),
        (with_file("tokenizer.model", "pieces"), "tokenizer_sha256"),
        (with_file("chat_template.jinja", OTHER_TEMPLATE), "template_sha256"),
        (with_file("additional_chat_templates/tool_use.jinja", "x"), "template_sha256"),
        (with_file("chat_template.json", '{"chat_template": "x"}'), "template_sha256"),
        (templates_in_config, "template_sha256"),
    ],
)
def test_what_changes_predictions_changes_one_hash(change, part, tmp_path):
    change(variant(pair().aligned, tmp_path / "copy"))
    assert differing(tmp_path / "copy") == {part}


@pytest.mark.parametrize(
    "change",
    [
        in_file("config.json", _name_or_path="x", transformers_version="4.0.0", architectures=["X"]),
        in_file("config.json", torch_dtype="bfloat16", use_cache=False, pad_token_id=7, bos_token_id=None),
        in_file("config.json", output_router_logits=True, router_aux_loss_coef=0.01),
        in_file("config.json", attention_dropout=0.5, initializer_range=1, id2label={"0": "x"}),
        in_file("config.json", rope_parameters={"rope_type": "default", "rope_theta": 10000}),
        in_file("config.json", eos_token_id=[2]),
        without("config.json", "eos_token_id"),
        in_file("generation_config.json", temperature=0.1, pad_token_id=7, max_new_tokens=5),
        in_file("tokenizer.json", padding={"strategy": "BatchLongest"}, truncation={"max_length": 5}),
        in_file("tokenizer_config.json", pad_token=models.USER, padding_side="left", model_max_length=9),
        with_file("chat_template.jinja", models.CHAT_TEMPLATE + "\n"),
        with_file("LICENSE", "mine"),
        with_file("README.md", "mine"),
        with_file("nested/tokenizer.model", "pieces"),
        template_in_config,
    ],
)
def test_what_changes_no_prediction_changes_none(change, tmp_path):
    change(variant(pair().aligned, tmp_path / "copy"))
    assert differing(tmp_path / "copy") == set()


def test_the_template_that_an_adapter_brings_is_its_own_wherever_it_stands(tmp_path):
    made = pair()
    folder = adapter_with_tokenizer(tmp_path)
    in_file("tokenizer_config.json", chat_template=OTHER_TEMPLATE)(folder)
    source = AdapterCheckpoint.open(Checkpoint.open(made.aligned), folder)
    assert templates_of(source.files()) == {"default": OTHER_TEMPLATE}


def test_a_processors_template_of_an_adapter_leaves_the_aligned_models(tmp_path):
    folder = adapter_with_tokenizer(tmp_path)
    (folder / "chat_template.json").write_text("{}")
    files = AdapterCheckpoint.open(Checkpoint.open(pair().aligned), folder).files()
    assert templates_of(files)["default"] == models.CHAT_TEMPLATE


def test_tokens_of_older_files_of_the_aligned_model_are_not_put_over_an_adapters(tmp_path):
    aligned = variant(pair().aligned, tmp_path / "aligned")
    (aligned / "special_tokens_map.json").write_text('{"eos_token": "x"}')
    folder = adapter_with_tokenizer(tmp_path)
    files = AdapterCheckpoint.open(Checkpoint.open(aligned), folder).files()
    assert "special_tokens_map.json" not in files
    (folder / "tokenizer_config.json").unlink()
    assert "special_tokens_map.json" in AdapterCheckpoint.open(Checkpoint.open(aligned), folder).files()


def test_a_file_of_its_own_comes_before_the_template_of_the_tokenizer_configuration(tmp_path):
    folder = variant(pair().aligned, tmp_path / "copy")
    in_file("tokenizer_config.json", chat_template="never used")(folder)
    assert differing(folder) == set()
    assert templates_of(Checkpoint.open(folder).files()) == {"default": models.CHAT_TEMPLATE}


def test_a_further_template_that_is_called_default_comes_before_the_models_own(tmp_path):
    folder = variant(pair().aligned, tmp_path / "copy")
    with_file("additional_chat_templates/default.jinja", OTHER_TEMPLATE)(folder)
    assert differing(folder) == {"template_sha256"}
    # As transformers reads them.
    assert AutoTokenizer.from_pretrained(folder).get_chat_template() == OTHER_TEMPLATE


def test_weights_are_a_part(tmp_path):
    one, other = (identify(Checkpoint.open(f)) for f in (pair().aligned, pair().finetuned))
    assert other.model_copy(update={"fingerprint": one.fingerprint}) == one
    assert one.differences(other) == (f"weights: {one.fingerprint} and {other.fingerprint}",)
    assert len({one.key, other.key, one.model_copy(update={"config_sha256": "0"}).key}) == 3


def test_another_order_of_files_and_another_dtype_on_disk_are_no_other_configuration(tmp_path):
    half = models.save(models.tiny_model("llama"), tmp_path / "half", dtype=torch.bfloat16)
    one, other = (identify(Checkpoint.open(f)) for f in (pair().aligned, half))
    assert one.fingerprint != other.fingerprint
    assert [getattr(one, part) for part in PARTS] == [getattr(other, part) for part in PARTS]
    assert isinstance(one, ModelIdentity)


def adapter_with_tokenizer(tmp_path):
    """An adapter that was saved with its tokenizer."""
    made, folder = pair(), tmp_path / "adapter"
    save_adapter(made.aligned, folder, ["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(made.aligned / name, folder / name)
    return folder


@pytest.fixture
def sources(tmp_path):
    """The aligned model, a fine-tuned one and an adapter, each with files of its own."""
    aligned = variant(pair().aligned, tmp_path / "aligned")
    tuned = variant(pair().finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE)
    for folder in (aligned, tuned):
        (folder / "LICENSE").write_text(folder.name)
    with_file("additional_chat_templates/tool_use.jinja", "x")(aligned)
    save_adapter(aligned, tmp_path / "adapter", ["q_proj"])
    (tmp_path / "adapter" / "chat_template.jinja").write_text("adapter's")
    opened = Checkpoint.open(aligned)
    return opened, Checkpoint.open(tuned), AdapterCheckpoint.open(opened, tmp_path / "adapter")


def homes(files):
    return {path: file.parents[path.count("/")].name for path, file in files.items()}


def test_an_adapters_files_lie_over_the_aligned_models(sources):
    aligned, _, adapter = sources
    found = homes(adapter.files())
    assert found["chat_template.jinja"] == "adapter"
    assert {found[name] for name in ("config.json", "tokenizer.json", "LICENSE")} == {"aligned"}
    assert "adapter_config.json" not in found
    assert identify(adapter).template_sha256 != identify(aligned).template_sha256
    assert identify(adapter).tokenizer_sha256 == identify(aligned).tokenizer_sha256


def test_an_output_has_all_that_decides_from_one_model(sources):
    aligned, tuned, adapter = sources
    for source in (tuned, adapter):
        assert output_files(aligned, source, config_from="finetuned") == source.files()
        assert output_files(aligned, source, config_from=None) == source.files()
        chosen = output_files(aligned, source, config_from="aligned")
        # Nor is one of the fine-tuned model's templates left that the aligned model does not have.
        assert {p: f for p, f in chosen.items() if p != "LICENSE"} == {
            p: f for p, f in aligned.files().items() if p != "LICENSE"
        }
    assert homes(output_files(aligned, tuned, config_from="aligned"))["LICENSE"] == "tuned"
    over_aligned = homes(output_files(aligned, tuned, config_from="finetuned", adapter=True))
    assert over_aligned["config.json"] == over_aligned["generation_config.json"] == "aligned"
    assert over_aligned["tokenizer.json"] == over_aligned["chat_template.jinja"] == "tuned"


def test_what_is_loaded_is_what_is_written(sources):
    aligned, tuned, adapter = sources
    with loadable(tuned.files()) as folder:
        assert folder == tuned.folder
    with loadable(output_files(aligned, tuned, config_from="aligned")) as folder:
        assert folder == aligned.folder
    files = output_files(aligned, adapter, config_from=None)
    with loadable(files) as folder:
        for path, file in files.items():
            if path != "LICENSE":
                assert (folder / path).read_bytes() == file.read_bytes()
    assert not folder.exists()
    assert all(file.exists() for file in files.values())
