"""Adapters that PEFT would not write: one message names the tensor, whatever is made of them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaguard import DeltaguardError, RestoreConfig, restore
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.checkpoint import Checkpoint
from models import EITHER_ORDER, STORED_IN_OUT
from pairs import load_over, pair, save_adapter

NAME = "model.layers.1.mlp.down_proj"
A, B = (f"base_model.model.{NAME}.lora_{letter}.weight" for letter in "AB")


def integers(tensors):
    tensors[A] = tensors[A].to(torch.int8)


def eight_bits(tensors):
    tensors[B] = tensors[B].to(torch.float8_e4m3fn)


def truths(tensors):
    tensors[B] = tensors[B] > 0


def one_dimension(tensors):
    tensors[A] = tensors[A][:, 0].contiguous()


def three_dimensions(tensors):
    tensors[A] = tensors[A][None]


def no_rank(tensors):
    tensors[A], tensors[B] = tensors[A][:0], tensors[B][:, :0]


def no_entries(tensors):
    tensors[A] = torch.zeros(3, 0)


def no_number(tensors):
    tensors[A][0, 0] = float("nan")


def no_number_beside_zeros(tensors):
    tensors[A].zero_()
    tensors[B][0, 0] = float("nan")


def infinite(tensors):
    tensors[B][0, 0] = float("inf")


def overflowing(tensors):
    tensors[A].fill_(1e30)
    tensors[B].fill_(1e30)


SPOILED = [
    integers,
    eight_bits,
    truths,
    one_dimension,
    three_dimensions,
    no_rank,
    no_entries,
    no_number,
    no_number_beside_zeros,
    infinite,
    overflowing,
]
OPTIONS = {
    "kfac at a strength": {"strength": 0.5},
    "kfac with the dial": {"max_safety_kl": 1e-3},
    "interpolate": {"method": "interpolate", "strength": 0.5},
}


FORMATS = ("checkpoint", "adapter")
CASES = [
    pytest.param(spoil, of_them, FORMATS[(i + j) % 2], id=f"{spoil.__name__}-{name}-{FORMATS[(i + j) % 2]}")
    for i, spoil in enumerate(SPOILED)
    for j, (name, of_them) in enumerate(OPTIONS.items())
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An adapter that tests copy and spoil."""
    folder = tmp_path_factory.mktemp("sound") / "tuned"
    save_adapter(pair().aligned, folder, ["q_proj", "down_proj"])
    return folder


@pytest.mark.parametrize(("spoil", "options", "output_format"), CASES)
def test_an_odd_adapter_is_one_message_with_the_name_of_the_tensor(
    sound, tmp_path, spoil, options, output_format
):
    made = pair()
    path = shutil.copytree(sound, tmp_path / "tuned") / "adapter_model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    config = RestoreConfig(**options, output_format=output_format)
    with pytest.raises(DeltaguardError, match=NAME.replace(".", r"\.")) as error:
        restore(made.aligned, tmp_path / "tuned", tmp_path / "out", store=made.store, config=config)
    assert str(error.value).count(NAME) <= 2
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("name", EITHER_ORDER)
@pytest.mark.parametrize("claimed", [True, False])
def test_how_the_file_says_weights_are_stored_decides_nothing_as_in_peft(tmp_path, name, claimed):
    made, targets = pair(name), {"llama": ["q_proj"], "gpt2": ["c_proj"]}[name]
    save_adapter(made.aligned, tmp_path / "tuned", targets, fan_in_fan_out=name in STORED_IN_OUT)
    path = tmp_path / "tuned" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": claimed}))
    adapter = AdapterCheckpoint.open(Checkpoint.open(made.aligned), tmp_path / "tuned")
    merged = load_over(made.aligned, tmp_path / "tuned").merge_and_unload().state_dict()
    assert adapter.adapted
    for tensor in adapter.adapted:
        torch.testing.assert_close(adapter.read(tensor), merged[tensor])
