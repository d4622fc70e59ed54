"""Which files of a folder hold the weights, and which folders are refused."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import save_file

from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import vocabulary_size
from folders import refusal, two_shards, write, write_index


def test_any_single_safetensors_file_will_do(tmp_path):
    write(tmp_path, {"weights.safetensors": {"a": torch.ones(2)}})
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.shards, checkpoint.index_name) == (("weights.safetensors",), None)


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path):
    two_shards(tmp_path)
    save_file({"z": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path).tensors) == ["z"]


def test_files_outside_the_index_are_not_read(tmp_path):
    two_shards(tmp_path)
    save_file({"a.weight": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a.weight", "b.weight", "c.weight"]


def test_all_problems_of_the_shards_are_listed_at_once(tmp_path):
    two_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    weight_map = {
        "a.weight": "model-00001-of-00002.safetensors",
        "c.weight": shard.name,
        "d": "gone.safetensors",
    }
    write_index(tmp_path, weight_map)
    (tmp_path / "config.json").unlink()
    message = refusal(tmp_path)
    size = shard.stat().st_size
    assert "gone.safetensors: no such file" in message
    assert f"{shard.name} is truncated: {size} bytes of the {size + 5} that" in message
    assert "config.json" in message
    assert message.startswith(str(tmp_path))


def test_an_index_that_contradicts_the_shards_is_refused(tmp_path):
    two_shards(tmp_path)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(tmp_path, {"a.weight": first, "b.weight": second, "c.weight": second, "d.weight": first})
    message = refusal(tmp_path)
    assert "d.weight, which no shard holds" in message
    assert f"places b.weight in {second}; {first} holds it" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    two_shards(tmp_path)
    save_file(
        {"c.weight": torch.zeros(4), "a.weight": torch.ones(3, 2)},
        tmp_path / "model-00002-of-00002.safetensors",
    )
    assert "a.weight is in two shards" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, None, {"a": "../elsewhere.safetensors"}])
def test_an_index_without_a_usable_map_is_refused(tmp_path, weight_map):
    two_shards(tmp_path)
    write_index(tmp_path, weight_map)
    assert "model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"nonsense" * 20, "not a safetensors file"),
        ((10_000).to_bytes(8, "little") + b'{"a":', "truncated: 13 bytes of the 10,008"),
        ((3).to_bytes(8, "little") + b'{"a', "(11 bytes) is not a safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path, content, word):
    write(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert word in message


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    assert "holds no tensors" in refusal(write(tmp_path, {"model.safetensors": {}}))


def test_trailing_bytes_are_corruption(tmp_path):
    write(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "corrupt" in refusal(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "incomplete" in refusal(tmp_path)
    (tmp_path / ".deltaguard-partial").mkdir()
    assert "--resume" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"pickle")
    message = refusal(tmp_path)
    assert name in message
    assert "save_pretrained" in message
    assert f"'{tmp_path}'" in message


def test_gguf_and_empty_folders_are_refused(tmp_path):
    assert "no config.json" in refusal(tmp_path) or "no weights" in refusal(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refusal(tmp_path)


def test_of_a_model_that_sees_pictures_the_command_converts_the_whole(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"pickle")
    for named, expected in (
        ("Gemma3ForConditionalGeneration", "import Gemma3ForConditionalGeneration as M"),
        ("M; print(1)#ForConditionalGeneration", "import AutoModelForCausalLM as M"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [named]}))
        assert expected in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_folder_of_checkpoints_names_one_of_them(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / name).write_text("{}")
    assert refusal(tmp_path).endswith(
        f"in 1 of its folders: give one, such as {tmp_path / 'checkpoint-500'}."
    )


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_configurations_are_refused(tmp_path, nested):
    config = {"quantization_config": {"quant_method": "gptq"}}
    write(
        tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, {"text_config": config} if nested else config
    )
    message = refusal(tmp_path)
    assert "quantised (gptq)" in message
    assert "dequantise" in message


@pytest.mark.parametrize(("method", "config"), [("fp8", "FineGrainedFP8Config"), ("mxfp4", "Mxfp4Config")])
def test_what_transformers_dequantises_is_refused_with_the_command_that_does(tmp_path, method, config):
    quantised = {"quantization_config": {"quant_method": method}}
    write(tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, quantised)
    message = refusal(tmp_path)
    assert f"quantised ({method})" in message
    command = message[message.index('python -c "') + len('python -c "') :].partition('"')[0]
    assert f"s, d = '{tmp_path}', '{tmp_path.name}-bf16'; " in command
    assert "quantization_config=Q(dequantize=True)" in command
    compile(command, "command", "exec")
    assert getattr(transformers, config)(dequantize=True).dequantize


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer.qweight": torch.zeros(2, 2, dtype=torch.int32)},
        {"layer.weight": torch.zeros(2, 2, dtype=torch.uint8)},
    ],
)
def test_packed_integers_are_refused(tmp_path, tensors):
    write(tmp_path, {"model.safetensors": tensors})
    assert "packed integers" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_refused_as_quantised_weights(tmp_path, dtype):
    write(tmp_path, {"model.safetensors": {"a.weight": torch.ones(2, 2).to(dtype), "b": torch.ones(2)}})
    message = refusal(tmp_path)
    assert "1 weights are 8-bit floats (a.weight, ...): they are quantised" in message
    assert "dequantise it first" in message


def test_dtypes_unknown_to_torch_are_refused(tmp_path):
    write(tmp_path, {"model.safetensors": {"a": torch.zeros(4, dtype=torch.uint8)}})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U8","shape":[4]', b'"F4","shape":[8]'))
    assert "a is stored as F4" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_configuration_is_named(tmp_path, content):
    write(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path)


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert "FINETUNED only" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "FINETUNED only" in refusal(tmp_path)


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path):
    write(tmp_path, {})
    os.mkfifo(tmp_path / "model.safetensors")
    assert "model.safetensors is no regular file" in refusal(tmp_path)


def test_a_pipe_in_the_place_of_a_configuration_is_not_waited_for(tmp_path):
    write(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert "config.json is no regular file" in refusal(tmp_path)


def test_a_link_to_nowhere_is_told_as_one(tmp_path):
    write(tmp_path, {})
    (tmp_path / "model.safetensors").symlink_to("blobs/gone")
    assert "is a link to blobs/gone, where nothing is" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"model_type": 5}', "`model_type`: Input should be a valid string (it is 5)"),
        ('{"text_config": [1]}', "`text_config`: Input should be"),
        ('{"text_config": {"quantization_config": "gptq"}}', "`text_config.quantization_config`"),
        ('{"architectures": "Llama"}', "`architectures`: Input should be a valid array"),
        ("[" * 3000 + "]" * 3000, "recursion limit"),
        ('{"a": "\\ud800"}', "Invalid JSON"),
    ],
)
def test_a_configuration_of_other_types_is_told_field_by_field(tmp_path, content, told):
    write(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "config.json").write_text(content)
    message = refusal(tmp_path)
    assert "config.json cannot be used" in message
    assert told in message


@pytest.mark.parametrize("shard", ["", ".", "..", "/etc/passwd", "a/b.safetensors", "a\0b"])
def test_an_index_names_plain_files_only(tmp_path, shard):
    two_shards(tmp_path)
    write_index(tmp_path, {"a": shard})
    assert "`weight_map.a`: a shard must be a file of the same folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "should be an object"),
        ('{"model": {"vocab": {"a": "b"}}}', "`model.vocab"),
        ('{"model": {"vocab": {"a": -1}}}', "`model.vocab"),
        ('{"model": 3}', "`model`"),
        ('{"added_tokens": [{"content": "a"}]}', "`added_tokens.0.id`: Field required"),
        ("{", "Invalid JSON"),
    ],
)
def test_a_vocabulary_of_another_form_is_told_field_by_field(tmp_path, content, told):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DeltaguardError, match=r"tokenizer\.json cannot be used") as caught:
        vocabulary_size(tmp_path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ('{"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 9, "content": "c"}]}', 10),
        ('{"model": {"vocab": [["a", -1.5], ["b", -2]]}, "added_tokens": []}', 2),
        ('{"model": {"type": "other"}}', None),
    ],
)
def test_tokens_are_counted(tmp_path, content, size):
    (tmp_path / "tokenizer.json").write_text(content)
    assert vocabulary_size(tmp_path) == size


def test_tokens_of_older_files_are_counted(tmp_path):
    assert vocabulary_size(tmp_path) is None
    (tmp_path / "added_tokens.json").write_text('{"<a>": 7}')
    assert vocabulary_size(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert vocabulary_size(tmp_path) == 8
    (tmp_path / "added_tokens.json").unlink()
    assert vocabulary_size(tmp_path) == 2
