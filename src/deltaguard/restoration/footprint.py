"""What the dial takes of a device's memory: the model as a whole, or one decoder block after another."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

import torch

from deltaguard.device import find_device, memory_bytes, served_dtype
from deltaguard.models.families import block_of, is_input_embedding, is_vocabulary
from deltaguard.models.shards import TensorInfo
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Plan

MOST_AT_ONCE = 4
"""Candidates that a pass over the blocks carries at most: each costs its own arithmetic, whatever is read."""

_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that measuring candidates takes, by part, from headers; all are estimates.

    Attributes:
        limit: what the dial may take.
        whole: the model in float32, with what the aligned one predicts; and where it is asked in another
            arithmetic, its weights in that beside.
        ends: block by block, what is in no block, of the aligned model and of a candidate.
        block: the largest block in float32.
        layers: the layer at work and the next, with its curvature.
        reference: what the aligned model's last block puts out.
        candidate: for each that a pass carries, a block as it would be on disk (for an adapter in float32),
            and what goes through it.
        by_blocks: whether candidates are measured one block after another.
    """

    limit: int
    whole: int
    ends: int
    block: int
    layers: int
    reference: int
    candidate: int
    by_blocks: bool

    @classmethod
    def of(cls, job: Job, plan: Plan, config: RestoreConfig) -> "Footprint":
        """Estimate what the dial takes.

        Args:
            job: the models, and the store whose held-out conversations are measured on.
            plan: what becomes of every tensor.
            config: the options; with `refine` the model is taken as a whole, since it is refined so.
        """
        device = find_device(config.device)
        limit = memory_bytes(device) // 2 if config.memory is None else int(config.memory)
        infos = job.finetuned.tensors.values()
        ends, blocks = _by_block(infos)
        tokens, answered = held_out_tokens(job)
        vocabulary = max((info.shape[0] for info in infos if is_vocabulary(info.name)), default=0)
        hidden = max((info.shape[-1] for info in infos if is_input_embedding(info.name)), default=0)
        weights, asks = sum(map(_entries, (ends, *blocks))), config.added_attack_success is not None
        whole = _FLOAT * (weights + answered * vocabulary)
        if (asks or config.refine) and served_dtype(device) != torch.float32:
            whole += served_dtype(device).itemsize * weights
        through = _FLOAT * tokens * hidden
        return cls(
            limit=limit,
            whole=whole,
            ends=2 * _FLOAT * _entries(ends),
            block=_FLOAT * max(map(_entries, blocks), default=0),
            layers=plan.peak_bytes,
            reference=through,
            candidate=through + max((_candidate_bytes(block, config) for block in blocks), default=0),
            by_blocks=whole > limit and not config.refine,
        )

    @property
    def at_once(self) -> int:
        """How many candidates a pass over the blocks carries; one at least."""
        room = self.limit - self._without_candidates
        return max(1, min(MOST_AT_ONCE, room // max(self.candidate, 1)))

    @property
    def taken(self) -> int:
        """What the dial takes in the way that is taken."""
        return self._by_blocks if self.by_blocks else self.whole

    @property
    def left(self) -> int:
        """What of the limit measuring block by block leaves to layers that wait for the next price."""
        return max(0, self.limit - self._by_blocks)

    @property
    def _by_blocks(self) -> int:
        return self._without_candidates + self.at_once * self.candidate

    @property
    def _without_candidates(self) -> int:
        return self.ends + self.block + self.layers + self.reference


def held_out_tokens(job: Job) -> tuple[int, int]:
    """Estimate the tokens of a store's held-out conversations, and bound those of their responses.

    Responses that were given may be longer than a model was let write: they are taken to be as long as the
    others that were calibrated on.
    """
    if job.store is None:
        return 0, 0
    count, made = len(job.store.held_out), job.store.provenance
    answer = max(made.max_new_tokens, ceil(made.response_tokens / made.conversations))
    return count * made.tokens // made.conversations, count * answer


def _by_block(infos: Iterable[TensorInfo]) -> tuple[list[TensorInfo], list[list[TensorInfo]]]:
    """Sort tensors into those of no block and those of each."""
    found: dict[str | None, list[TensorInfo]] = {None: []}
    for info in infos:
        found.setdefault(block_of(info.name), []).append(info)
    ends = found.pop(None)
    return ends, list(found.values())


def _candidate_bytes(infos: list[TensorInfo], config: RestoreConfig) -> int:
    """Count a candidate's bytes: as it would be written, or as an adapter's layers compute it."""
    return _FLOAT * _entries(infos) if config.output_format == "adapter" else sum(i.nbytes for i in infos)


def _entries(infos: list[TensorInfo]) -> int:
    return sum(prod(info.shape) for info in infos)
