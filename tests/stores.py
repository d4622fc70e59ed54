"""A store of three small groups of layers, made without a model."""

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature.contents import group_curvature
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Provenance, write_store
from deltaguard.curvature.sums import LayerGroup, LinearLayer, RunningMoment, Sums

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
