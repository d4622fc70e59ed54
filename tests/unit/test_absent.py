"""What a fine-tuned checkpoint may do without, of models of several lists of blocks."""

from types import SimpleNamespace

import pytest

from deltaguard.models.checkpoint import TensorInfo
from deltaguard.models.families import is_block_matrix
from deltaguard.restoration.absent import find_absent

BLOCKS = (
    "decoder.layers.0.mlp.weight",
    "decoder.layers.0.norm.weight",
    "decoder.final_norm.weight",
    "encoder.layers.0.mlp.weight",
    "encoder.layers.0.norm.weight",
    "encoder.final_norm.weight",
)


def info(name):
    shape = (2,) if "norm" in name else (2, 2)
    return TensorInfo(name, "F32", shape, "model.safetensors", start=0, end=0)


def absent(lacking, *, weighed="decoder."):
    """Ask of a model of two lists, of which one has curvature, and of a fine-tune without some tensors."""
    tensors = {name: info(name) for name in BLOCKS}
    aligned = SimpleNamespace(tensors=tensors, config={"num_hidden_layers": 1})
    names = {name: name for name in BLOCKS if name not in lacking}

    def layer(tensor):
        return ("group" if tensor.name.startswith(weighed) else None, False) if is_matrix(tensor) else None

    def is_matrix(tensor):
        return is_block_matrix(tensor.name, tensor.shape)

    return find_absent(aligned, names, layer)


@pytest.mark.parametrize("weighed", ["decoder.", "encoder.", ("decoder.", "encoder.")])
@pytest.mark.parametrize("lacking", ["decoder.layers.0.mlp.weight", "encoder.layers.0.mlp.weight"])
def test_a_layer_with_curvature_must_be_there(weighed, lacking):
    may, problems = absent({lacking}, weighed=weighed)
    if lacking.startswith(weighed):
        assert not may
        assert [each.split()[1] for each in problems] == [f"`{lacking}`"]
    else:
        assert (may, problems) == ((lacking,), [])


def test_a_whole_list_without_curvature_may_be_absent():
    lacking = [name for name in BLOCKS if name.startswith("encoder.")]
    assert absent(lacking) == (tuple(lacking), [])


def test_every_layer_with_curvature_must_be_there_whatever_else_is():
    lacking = [name for name in BLOCKS if "layers" in name]
    may, problems = absent(lacking, weighed=("decoder.", "encoder."))
    assert {each.split()[1].strip("`") for each in problems} >= {each for each in lacking if "mlp" in each}
    assert not set(may) & {each for each in lacking if "mlp" in each}


@pytest.mark.parametrize("lacking", ["decoder.layers.0.norm.weight", "decoder.final_norm.weight"])
def test_what_lies_in_or_beside_a_restored_list_must_be_there(lacking):
    may, problems = absent({lacking})
    assert not may
    assert lacking in problems[0]
