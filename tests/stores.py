"""Stores made without a model, small ones and others as large as is asked, and what makes two alike."""

from copy import deepcopy
from functools import cache

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature.contents import group_curvature
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Provenance, write_store
from deltaguard.curvature.sums import LayerGroup, LinearLayer, Moment, RunningMoment, Sums
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify
from pairs import pair
from plain import relative_error

GROUPS = (
    LayerGroup(
        "a.q",
        5,
        40,
        (
            LinearLayer("a.q.weight", transposed=False, out_features=6),
            LinearLayer("a.k.weight", False, out_features=3),
        ),
    ),
    LayerGroup("a.down", 8, 40, (LinearLayer("a.down.weight", transposed=True, out_features=5),)),
    LayerGroup("b.q", 5, 40, (LinearLayer("b.q.weight", transposed=False, out_features=6),)),
)
HELD_OUT = (Conversation("How?", None, "No."), Conversation("Why?", "Be kind.", "Because."))


def sums(seed, groups=GROUPS, reached=None):
    """What calibration could have summed, by group; tokens may reach the first few directions alone."""
    generator = torch.Generator().manual_seed(seed)

    def moment(tokens, size):
        found = torch.randn(tokens, size, generator=generator)
        found[:, reached or size :] = 0
        running = RunningMoment(size)
        running.add(found)
        return running.taken()

    return {
        group.name: Sums(
            moment(group.tokens, group.in_features),
            tuple(moment(group.tokens, layer.out_features).total for layer in group.layers),
        )
        for group in groups
    }


def provenance(**changes):
    values = {
        "fingerprint": "f" * 64,
        "config_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "template_sha256": "c" * 64,
        "prompts_sha256": "0" * 64,
        "max_length": 512,
        "max_new_tokens": 64,
        "batch_size": 16,
        "dtype": "float32",
        "dampening": 0.02,
        "rank": "full",
        "aligned": "someone/model",
        "conversations_sha256": "1" * 64,
        "conversations": 4,
        "tokens": 40,
        "response_tokens": 16,
        "rank_share": 1.0,
        "truncated": 1,
        "system_role": "template",
        "refusal_share": 0.5,
        "uncovered": ("a.conv.weight",),
        "versions": {"torch": "2"},
    }
    return Provenance(**{**values, **changes})


CUT_OFF = {"rank": "auto", "rank_share": 0.5}


def written(
    folder, seed=0, *, groups=GROUPS, held_out=HELD_OUT, max_shard_bytes=10**9, reached=None, **changes
):
    made = provenance(**changes)
    content = contents(seed, groups, made, reached)
    write_store(folder, made, held_out, groups, content, max_shard_bytes=max_shard_bytes)
    return CurvatureStore.from_pretrained(folder)


def contents(seed, groups, made, reached=None):
    found = sums(seed, groups, reached)
    return lambda group: group_curvature(
        group,
        found[group.name],
        response_tokens=made.response_tokens,
        dampening=made.dampening,
        extent=made.extent,
    )


def write_curvature(folder, aligned, shapes, blocks, *, max_shard_bytes=None, **provenance):
    """Write a store of matrices in decoder blocks, all of which have the same random curvature.

    Args:
        folder: where to.
        aligned: the checkpoint that it is of.
        shapes: (out, in) of each kind of matrix, by its name within a block.
        blocks: how many.
        max_shard_bytes: of the store's files.
        provenance: what it says of itself otherwise than the store of `pair` does.
    """
    groups = [
        LayerGroup(name, shape[1], 100, (LinearLayer(f"{name}.weight", False, out_features=shape[0]),))
        for block in range(blocks)
        for kind, shape in shapes.items()
        for name in (f"model.layers.{block}.{kind}",)
    ]
    made = CurvatureStore.from_pretrained(pair().store)
    own = {**identify(Checkpoint.open(aligned)).model_dump(), "aligned": str(aligned), "tokens": 100}
    told = made.provenance.model_copy(update={**own, **provenance})

    @cache
    def content(inputs, outputs):
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(size, size + 100, generator=generator) for size in (inputs, outputs))
        group = next(g for g in groups if (g.in_features, g.layers[0].out_features) == (inputs, outputs))
        sums = Sums(Moment(x @ x.T, 100), (g @ g.T,))
        return group_curvature(group, sums, response_tokens=50, dampening=0.01, extent=told.extent)

    shards = {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
    of = lambda group: deepcopy(content(group.in_features, group.layers[0].out_features))
    write_store(folder, told, made.held_out, groups, of, **shards)
    return folder


def require_close(found, expected):
    """Hold two stores with their sums to be the same but for the order in which numbers were added up."""
    one, other = (CurvatureStore.from_pretrained(each) for each in (found, expected))
    assert one.provenance == other.provenance
    assert one.held_out == other.held_out
    assert one.groups == other.groups
    for group in one.groups:
        a, b = one.sums(group.name), other.sums(group.name)
        assert a.inputs.tokens == b.inputs.tokens
        assert a.reached == b.reached or a.reached.tokens == b.reached.tokens
        for x, y in zip((a.inputs.total, *a.outputs), (b.inputs.total, *b.outputs), strict=True):
            assert relative_error(x, y.double()) < 1e-5, group.name
        for layer in group.layers:
            x, y = (store.leaning(layer.key) for store in (one, other))
            assert (x is None) == (y is None)
            if x is not None:
                assert relative_error(x.up @ x.down, (y.up @ y.down).double()) < 1e-4, layer.key
        spectra = [store.input_spectrum(group.name).values for store in (one, other)]
        torch.testing.assert_close(*spectra, rtol=1e-4, atol=1e-4 * float(spectra[0][0]))
