"""How large the parts of a calibration are, from the headers of the model alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from deltaguard.curvature.leaning import RANK
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.experts import is_expert, routed_share
from deltaguard.models.families import block_of, is_block_matrix, is_stack
from deltaguard.models.shards import TensorInfo

STORE_SHARE = 0.25
"""Of the model's bytes, that a store with `rank="auto"` takes at most, about."""

MOST_ROWS = 512
"""Rows that a pass over the blocks continues at most."""

_WITHIN_BLOCK = 16
"""Numbers a token that a block computes at once, as a multiple of its hidden size, about."""


@dataclass(frozen=True)
class Sizes:
    """Entries of the tensors of a model, or of one of its decoder blocks.

    Attributes:
        weights: of all tensors.
        sums: of the sums over the inputs and output gradients of its matrices.
        matrices: of those that see every token.
        sides: rows and columns of these, added up.
        passed: numbers a token that a pass forwards keeps for the one backwards, about: what goes into the
            matrices, and what comes out; of experts, into and out of as many as a token is routed to.
    """

    weights: int
    sums: int
    matrices: int
    sides: int
    passed: int

    @classmethod
    def of(cls, infos: Iterable[TensorInfo], routed: float = 1.0) -> "Sizes":
        """Add up tensors.

        Args:
            infos: from a checkpoint's headers.
            routed: share of a block's experts that each token passes.
        """
        weights = sums = matrices = sides = 0
        passed = 0.0
        for info in infos:
            weights += prod(info.shape)
            if is_block_matrix(info.name, info.shape) or is_stack(info.name, info.shape):
                *experts, rows, columns = info.shape
                sums += prod(experts) * (rows**2 + columns**2)
                share = routed if is_expert(info.name) else 1.0
                if not is_expert(info.name):
                    matrices += prod(info.shape)
                    sides += rows + columns
                passed += share * prod(experts) * (rows + columns)
        return cls(weights, sums, matrices, sides, round(passed))

    def bytes(self, dtype: torch.dtype) -> int:
        """Say what the weights in a dtype and the sums in float32 take."""
        return self.weights * dtype.itemsize + self.sums_bytes(dtype)

    def sums_bytes(self, dtype: torch.dtype) -> int:
        """Say what the sums take, or the gradients before them: sums of these and those of a batch."""
        gradients = self.matrices * (torch.float32.itemsize + dtype.itemsize)
        return max(self.sums * torch.float32.itemsize, gradients)

    @property
    def full_bytes(self) -> int:
        """Say what a store keeps of all: raw sums, in whose other half factors lie, and all eigenvectors."""
        return 2 * self.sums * torch.float32.itemsize

    @property
    def leaning_bytes(self) -> int:
        """Say what the gradients of refusing take in a store, at most."""
        return RANK * self.sides * torch.float32.itemsize


def blocks_of(model: Checkpoint) -> tuple[Sizes, tuple[Sizes, ...]]:
    """Measure what is in no decoder block, and each block.

    Args:
        model: whose headers are read.
    """
    found: dict[str | None, list[TensorInfo]] = {None: []}
    for info in model.tensors.values():
        found.setdefault(block_of(info.name), []).append(info)
    outside, routed = Sizes.of(found.pop(None)), routed_share(model.config)
    return outside, tuple(Sizes.of(infos, routed) for infos in found.values())


def whole_bytes(aligned: Checkpoint, dtype: torch.dtype) -> int:
    """Estimate the bytes that calibrating a model as a whole takes: its weights, and all sums in float32.

    Args:
        aligned: the model.
        dtype: of its weights as it is run.
    """
    return Sizes.of(aligned.tensors.values()).bytes(dtype)


def store_limit(aligned: Checkpoint) -> int:
    """Compute the bytes that a store with `rank="auto"` takes at most, about."""
    return int(STORE_SHARE * sum(info.nbytes for info in aligned.tensors.values()))


def held_bytes(outside: Sizes, blocks: Sequence[Sizes], dtype: torch.dtype) -> int:
    """Say what of a model's weights a pass over its blocks has in memory.

    Args:
        outside: what is in no block.
        blocks: each.
        dtype: of the weights.
    """
    return (outside.weights + max(block.weights for block in blocks)) * dtype.itemsize


def rows_within(config: Any, memory: int, *, tokens: int, dtype: torch.dtype) -> int:
    """Say how many rows of tokens a model may continue at once, which a pass over its blocks serves.

    Args:
        config: the model's configuration, of transformers.
        memory: bytes that keys and values, and what goes through a block, may take.
        tokens: of a row.
        dtype: that they are in.

    Returns:
        From 1 to `MOST_ROWS`, about.
    """
    return max(1, min(MOST_ROWS, memory // row_bytes(config, tokens=tokens, dtype=dtype)))


def row_bytes(config: Any, *, tokens: int, dtype: torch.dtype) -> int:
    """Say what a row takes while it is continued: keys and values, and what goes through a block, about.

    Args:
        config: the model's configuration, of transformers.
        tokens: of the row.
        dtype: that they are in.
    """
    text = config.get_text_config()
    heads, hidden, kept = getattr(text, "num_attention_heads", None), text.hidden_size, 0
    # Recurrent models keep no keys and values.
    if heads:
        kept = getattr(text, "num_key_value_heads", None) or heads
        kept *= getattr(text, "head_dim", None) or hidden // heads
    numbers = 2 * text.num_hidden_layers * kept + _WITHIN_BLOCK * hidden
    return tokens * numbers * dtype.itemsize
