"""The gradients of refusing, as a store keeps them: of each layer a matrix of low rank.

What they are, and how they are taken, is in `decisions`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaguard.curvature.contents import Form
from deltaguard.curvature.sums import LayerGroup
from deltaguard.solvers.low_rank import LowRank, low_rank

RANK = 16
"""Of a gradient, at most; of the aligned model of the demo, 99.6 % of their squared norm lie within that."""


def leaning_tensors(found: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Lay gradients out by their tensors' names.

    Args:
        found: by `LinearLayer.key`.
    """
    tensors: dict[str, Tensor] = {}
    for key, each in found.items():
        tensors[f"{key}.up"] = each.up.float().cpu().contiguous()
        tensors[f"{key}.down"] = each.down.float().cpu().contiguous()
    return tensors


def leaning_forms(group: LayerGroup) -> dict[str, Form]:
    """Say how those of a group's layers are stored, by name."""
    forms: dict[str, Form] = {}
    for layer in group.layers:
        rank = min(RANK, layer.out_features, group.in_features)
        forms[f"{layer.key}.up"] = Form(torch.float32, (layer.out_features, rank))
        forms[f"{layer.key}.down"] = Form(torch.float32, (rank, group.in_features))
    return forms


def leaning_bytes(group: LayerGroup) -> int:
    """Count the bytes that those of a group's layers take."""
    return sum(form.nbytes for form in leaning_forms(group).values())


def merged(parts: Sequence[tuple[LowRank, int]]) -> LowRank:
    """Join a layer's gradients of several calibrations: their mean, weighted by the harmful requests judged.

    That is the gradient over all of them where they had look-alikes in proportion; look-alikes of a
    calibration that had more of them count for less, and of one that had fewer for more.
    """
    whole = sum(count for _, count in parts)
    up = torch.cat([found.up * (count / whole) for found, count in parts], 1)
    down = torch.cat([found.down for found, _ in parts])
    left, upper = torch.linalg.qr(up)
    core = low_rank(upper @ down, rank=RANK)
    return LowRank(core.down, left @ core.up, core.residual)
