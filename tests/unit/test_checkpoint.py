"""The lazy view of a checkpoint: what is read, what is refused, and how models are told apart."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from deltaguard import hub
from deltaguard.checkpoint import Checkpoint, name_map
from deltaguard.errors import DeltaguardError
from deltaguard.shards import DTYPES
from models import DENSE, save, tiny_model


def write(folder: Path, shards: dict[str, dict[str, torch.Tensor]], config: dict | None = None) -> Path:
    """A checkpoint folder with the given shards, and an index where there are several."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if len(shards) > 1:
        write_index(folder, {tensor: name for name, tensors in shards.items() for tensor in tensors})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def write_index(folder: Path, weight_map: dict[str, str]):
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def two_shards(folder: Path) -> Path:
    return write(
        folder,
        {
            "model-00001-of-00002.safetensors": {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2)},
            "model-00002-of-00002.safetensors": {"c.weight": torch.zeros(4)},
        },
    )


def refusal(reference) -> str:
    with pytest.raises(DeltaguardError) as error:
        Checkpoint.open(reference)
    return str(error.value)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Reading


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read_as_stored(tmp_path, code):
    dtype = DTYPES[code]
    data = bytes(i % 2 for i in range(6 * dtype.itemsize))
    shapes = {"matrix": [3, 2], "number": [], "empty": [0, 4]}
    header, offset, payload = {}, 0, b""
    for name, shape in shapes.items():
        part = data[: torch.Size(shape).numel() * dtype.itemsize]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + len(part)]}
        offset += len(part)
        payload += part
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + payload)
    checkpoint = Checkpoint.open(tmp_path)
    for name, shape in shapes.items():
        tensor = checkpoint.read(name)
        assert (tensor.dtype, list(tensor.shape)) == (dtype, shape)
        assert as_bytes(tensor) == data[: checkpoint.tensors[name].nbytes]


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_reads_what_safetensors_reads(tmp_path, architecture, shard_size):
    save(tiny_model(architecture), tmp_path, dtype=torch.bfloat16, max_shard_size=shard_size)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.index_name is None) == (shard_size == "5GB")
    order = []
    for shard in checkpoint.shards:
        stored = load_file(tmp_path / shard)
        order += [info.name for info in checkpoint.tensors.values() if info.shard == shard]
        assert order[-len(stored) :] == sorted(stored, key=lambda name: checkpoint.tensors[name].start)
        for name, tensor in stored.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.read(name).dtype == torch.bfloat16
        assert (tmp_path / shard).read_bytes().startswith(checkpoint.header(shard))
        assert len(checkpoint.header(shard)) == min(
            info.start for info in checkpoint.tensors.values() if info.shard == shard
        )
    assert order == list(checkpoint.tensors)


def test_a_tensor_that_was_read_belongs_to_the_reader(tmp_path):
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    checkpoint.read("a.weight").zero_()
    assert torch.equal(checkpoint.read("a.weight"), torch.ones(3, 2))


def test_reading_maps_no_file_into_memory(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    tensor = checkpoint.read("a.weight")
    assert str(tmp_path) not in maps.read_text()
    assert tensor.shape == (3, 2)


def test_threads_may_read_at_once(tmp_path):
    save(tiny_model("llama"), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    names = list(checkpoint.tensors) * 20
    with ThreadPoolExecutor(4) as pool:
        for name, tensor in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert torch.equal(tensor, expected[name])


def test_a_file_that_shrinks_while_it_is_used_is_named(tmp_path):
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    last = max(checkpoint.tensors.values(), key=lambda info: (info.shard == path.name, info.end))
    with pytest.raises(DeltaguardError, match=rf"{path.name} ends at byte"):
        checkpoint.read(last.name)
    path.unlink()
    with pytest.raises(DeltaguardError, match="No such file"):
        checkpoint.read("a.weight")


# Which files hold the weights


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


# Refusals


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


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_configurations_are_refused(tmp_path, nested):
    config = {"quantization_config": {"quant_method": "gptq"}}
    write(
        tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, {"text_config": config} if nested else config
    )
    message = refusal(tmp_path)
    assert "quantised (gptq)" in message
    assert "dequantise" in message


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


# Local folders and the Hub


@pytest.mark.parametrize("reference", ["./none", "/no/such/folder", "a/b/c", "~/nothing-here", "x@y@z"])
def test_an_absent_folder_is_named_without_asking_the_hub(monkeypatch, reference):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert "There is no folder" in refusal(reference)
    assert "There is no folder" in refusal(Path("organisation/name"))


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "give the folder" in refusal(path)


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "organisation").mkdir()
    two_shards(tmp_path / "organisation" / "name@v1")
    assert Checkpoint.open("organisation/name@v1").folder == Path("organisation/name@v1")


def test_a_hub_reference_is_fetched_small_files_first(tmp_path, monkeypatch):
    calls = []

    def fetch(repository, **options):
        calls.append((repository, options["revision"], "*.safetensors" in options["allow_patterns"]))
        return str(two_shards(tmp_path / "snapshot"))

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    checkpoint = Checkpoint.open("organisation/name@refs/pr/1")
    assert calls == [("organisation/name", "refs/pr/1", False), ("organisation/name", "refs/pr/1", True)]
    assert checkpoint.reference == "organisation/name@refs/pr/1"
    assert checkpoint.folder == tmp_path / "snapshot"
    (tmp_path / "snapshot" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path / "snapshot"))
    assert "awq" in refusal("organisation/name")


@pytest.mark.parametrize(
    ("kind", "word"),
    [(GatedRepoError, "gated"), (RepositoryNotFoundError, "neither a local folder nor")],
)
def test_refusals_of_the_hub_say_what_to_do(monkeypatch, kind, word):
    def fetch(*args, **options):
        # Its constructor wants the HTTP library's response, which differs between versions.
        raise kind.__new__(kind, "no")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    message = refusal("organisation/name")
    assert word in message
    assert "hf auth login" in message


def test_no_connection_is_a_known_failure(monkeypatch):
    def fetch(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert "could not be fetched from the Hub: offline" in refusal("organisation/name@v2")


# Configuration


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False}, ["embed.weight"], False),
        ({"text_config": {"tie_word_embeddings": True}}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, ["a"], False),
        ({}, ["embed.weight"], True),
        ({}, ["embed.weight", "language_model.lm_head.weight"], False),
    ],
)
def test_tied_embeddings(tmp_path, config, names, tied):
    write(tmp_path, {"model.safetensors": {name: torch.ones(2) for name in names}}, config)
    assert Checkpoint.open(tmp_path).tied_embeddings is tied


# Fingerprints


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    model = tiny_model("llama")
    one = Checkpoint.open(save(model, tmp_path / "one")).fingerprint()
    assert one == Checkpoint.open(save(model, tmp_path / "sharded", max_shard_size="40KB")).fingerprint()
    assert one != Checkpoint.open(save(model, tmp_path / "half", dtype=torch.bfloat16)).fingerprint()
    assert one != Checkpoint.open(save(tiny_model("llama", seed=1), tmp_path / "other")).fingerprint()


@pytest.mark.parametrize("position", [0, 9_999, 20_000 - 1])
def test_the_fingerprint_sees_the_ends_and_the_middle_of_a_tensor(tmp_path, position):
    tensor = torch.zeros(20_000, dtype=torch.int8)
    before = Checkpoint.open(write(tmp_path, {"model.safetensors": {"a": tensor}})).fingerprint()
    tensor[position] = 1
    assert Checkpoint.open(write(tmp_path, {"model.safetensors": {"a": tensor}})).fingerprint() != before


def test_the_fingerprint_sees_all_of_a_small_tensor_and_its_name_and_shape(tmp_path):
    def fingerprint(tensors):
        return Checkpoint.open(write(tmp_path, {"model.safetensors": tensors})).fingerprint()

    different = [
        {"a": torch.zeros(12_288, dtype=torch.int8)},
        {"a": torch.zeros(12_288, dtype=torch.int8).index_fill(0, torch.tensor([5000]), 1)},
        {"b": torch.zeros(12_288, dtype=torch.int8)},
        {"a": torch.zeros(12_288, dtype=torch.uint8)},
        {"a": torch.zeros(2, 6_144, dtype=torch.int8)},
    ]
    assert len({fingerprint(tensors) for tensors in different}) == len(different)


def test_the_fingerprint_never_changes_between_versions(tmp_path):
    tensors = {"b": torch.arange(5000, dtype=torch.float32), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    checkpoint = Checkpoint.open(write(tmp_path, {"model.safetensors": tensors}))
    # Curvature stores name their model by it.
    assert checkpoint.fingerprint() == "87eac3cd24862dc8e63f5f70cbd846bc51dd316c9af0630af93777ac2c6ed18d"


# Names


LAYERS = [
    f"layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "transformer."),
        ("model.", "language_model.model."),
        ("model.", "model.language_model."),
        ("language_model.model.", "model.language_model."),
        ("base_model.model.model.", "model."),
    ],
)
def test_names_that_differ_by_one_prefix_meet_both_ways(old, new):
    source = [old + name for name in [*LAYERS, "embed_tokens.weight"]]
    target = [new + name for name in [*LAYERS, "embed_tokens.weight"]]
    expected = dict(zip(source, target, strict=True))
    assert name_map(source, target) == expected
    assert name_map(target, source) == {b: a for a, b in expected.items()}


def test_names_of_gpt2_meet_and_the_rest_is_left_out():
    source = ["wte.weight", "h.0.attn.c_attn.weight", "h.11.mlp.c_fc.bias", "h.0.attn.bias"]
    target = [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.11.mlp.c_fc.bias",
    ]
    assert name_map(source, [*target, "lm_head.weight"]) == dict(zip(source[:3], target, strict=True))


def test_equal_names_stand_for_themselves_beside_a_prefix():
    source = ["lm_head.weight", *(f"model.{name}" for name in LAYERS)]
    target = ["lm_head.weight", *(f"model.language_model.{name}" for name in LAYERS)]
    assert name_map(source, target) == dict(zip(source, target, strict=True))
    assert name_map(source, source) == {name: name for name in source}


def test_the_language_model_is_preferred_to_a_tower_of_the_same_layout():
    language = [f"language_model.model.{name}" for name in [*LAYERS, "norm.weight"]]
    vision = [f"vision_tower.{name}" for name in LAYERS]
    target = [f"model.{name}" for name in [*LAYERS, "norm.weight"]]
    assert name_map([*vision, *language], target) == dict(zip(language, target, strict=True))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([], ["a.weight"]),
        (["a.weight"], []),
        (["layers.0.q.weight"], ["layers.1.q.weight"]),
        (["encoder.layers.0.q.weight"], ["decoder.layers.0.q.weight"]),
        (["model.norm.weight"], ["lm_head.weight"]),
    ],
)
def test_names_without_a_partner_are_left_out(source, target):
    assert name_map(source, target) == {}
