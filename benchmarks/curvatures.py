"""Stores of the synthetic pair: all blocks have the same curvature, so every kind is decomposed once."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.layout import SHARED_INPUTS, Shape
from deltaguard.curvature import Rank
from deltaguard.curvature.contents import GroupCurvature, group_curvature, share_within, stored_bytes
from deltaguard.curvature.sizes import STORE_SHARE
from deltaguard.curvature.store_format import Provenance, versions, write_store
from deltaguard.curvature.sums import LayerGroup, LinearLayer, Moment, RunningMoment, Sums
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify

TOKENS, RESPONSE_TOKENS = 8192, 4096
COLUMN_SPREAD, MASSIVE_COLUMNS, MASSIVE_SCALE = 0.5, 4, 20.0
DAMPENING = 0.01


def groups(shape: Shape, blocks: int | None = None) -> list[LayerGroup]:
    """Find the groups of layers of all blocks, or of the first ones."""
    count = shape.blocks if blocks is None else blocks
    return [_group(shape, block, members) for block in range(count) for members in SHARED_INPUTS]


def fabricate_store(
    folder: Path, aligned: Path, shape: Shape, covered: Sequence[LayerGroup], *, rank: Rank
) -> None:
    """Write a store.

    A file holds the groups of one block: in it no tensor occurs twice, which safetensors would refuse.

    Args:
        folder: where to.
        aligned: the model that it is a store of.
        shape: of that model.
        covered: the groups that it holds.
        rank: `auto` keeps the largest eigenpairs, as many as `calibrate` does, `full` everything.
    """
    provenance = provenance_of(aligned, shape, rank)
    made: dict[str, GroupCurvature] = {}

    def content(group: LayerGroup) -> GroupCurvature:
        kind = group.name.split(".", 3)[3]
        if kind not in made:
            made[kind] = group_curvature(
                group,
                _sums(shape, kind),
                response_tokens=RESPONSE_TOKENS,
                dampening=DAMPENING,
                extent=provenance.extent,
            )
        return made[kind]

    block = sum(stored_bytes(group, provenance.extent) for group in groups(shape, 1))
    write_store(folder, provenance, (), covered, content, max_shard_bytes=block)


def _group(shape: Shape, block: int, members: tuple[str, ...]) -> LayerGroup:
    prefix = f"model.layers.{block}"
    sizes = shape.matrices
    layers = (LinearLayer(f"{prefix}.{member}.weight", False, sizes[member][0]) for member in members)
    return LayerGroup(f"{prefix}.{members[0]}", sizes[members[0]][1], TOKENS, tuple(layers))


def _sums(shape: Shape, kind: str) -> Sums:
    """Say what calibration would have summed for the layers that see the same input as one of this kind."""
    members = next(members for members in SHARED_INPUTS if members[0] == kind)
    sizes = shape.matrices
    seeds = {name: seed for seed, name in enumerate(sizes)}
    outputs = (_moment(sizes[m][0], RESPONSE_TOKENS, seed=100 + seeds[m]).total for m in members)
    return Sums(_moment(sizes[kind][1], TOKENS, seed=seeds[kind]), tuple(outputs))


def _moment(size: int, tokens: int, *, seed: int) -> Moment:
    """Over random vectors: eigenvalues fall as 1/j, a few entries are massive."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, size + 1).rsqrt()
    mixing = torch.randn(size, size, generator=generator)
    columns = (COLUMN_SPREAD * torch.randn(size, generator=generator)).exp()
    columns[torch.randperm(size, generator=generator)[:MASSIVE_COLUMNS]] *= MASSIVE_SCALE
    vectors = (torch.randn(tokens, size, generator=generator) * spectrum) @ mixing * columns
    running = RunningMoment(size)
    running.add(vectors)
    return running.taken()


def provenance_of(aligned: Path, shape: Shape, rank: Rank) -> Provenance:
    """Say what a store of a synthetic model comes from.

    Args:
        aligned: the model.
        shape: of the model.
        rank: as in `fabricate_store`.
    """
    limit = int(STORE_SHARE * shape.nbytes)
    return Provenance(
        **identify(Checkpoint.open(aligned)).model_dump(),
        prompts_sha256="",
        max_length=512,
        max_new_tokens=64,
        batch_size=16,
        dtype="bfloat16",
        dampening=DAMPENING,
        rank=rank,
        aligned="synthetic",
        conversations_sha256="",
        conversations=128,
        tokens=TOKENS,
        response_tokens=RESPONSE_TOKENS,
        rank_share=1.0 if rank == "full" else share_within(groups(shape), limit),
        truncated=0,
        system_role="template",
        refusal_share=None,
        uncovered=(),
        versions=versions(),
    )
