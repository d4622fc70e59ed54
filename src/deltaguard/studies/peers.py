"""The methods that deltaguard is compared with, and what their one dial means here.

Every method reads a strength that grows with what is kept of the delta; strength 1 gives the fine-tuned
weights exactly. `bench.peer_writer` applies a method to whole checkpoints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from deltaguard.solvers import interpolate, resta, safe_lora, safe_merge
from deltaguard.solvers.solution import working_dtype

Role = Literal["unaligned", "pretrained", "safe"]
"""A model that some methods need besides the aligned and the fine-tuned one.

`unaligned` is the aligned model after fine-tuning on harmful data, `safe` the aligned model after fine-tuning
on safety data, `pretrained` the model before alignment.
"""

MERGED_SHARE = 0.5
"""SafeMERGE's alpha: how much of the fine-tuned delta a merged layer keeps. A choice made here."""

# Layers of SmolLM2-135M after the demo's fine-tunes have similarities of 0.11 to 0.58 (random matrices: about
# 0.7); those that its alignment froze have 0 and are edited at any of these.
_BY_LAYER = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Matrices:
    """One tensor of every model, as matrices (out, in)."""

    aligned: Tensor
    finetuned: Tensor
    others: Mapping[Role, Tensor]


@dataclass(frozen=True)
class Peer:
    """A method of others that restores a checkpoint after fine-tuning.

    Attributes:
        title: for people.
        paper: where its equation stands.
        dial: how the strength gives the paper's own parameter, in words.
        everywhere: whether it edits every tensor, or only the linear layers of the decoder blocks; all
            others then stay fine-tuned.
        needs: the models it needs besides the aligned and the fine-tuned one.
        lowest: the smallest strength that has a meaning; the largest is 1.
        ladder: strengths for a sweep, rising.
        edit: the equation for one tensor at a strength.
    """

    title: str
    paper: str
    dial: str
    everywhere: bool
    needs: tuple[Role, ...]
    lowest: float
    ladder: tuple[float, ...]
    edit: Callable[[Matrices, float], Tensor]


def _wise_ft(given: Matrices, strength: float) -> Tensor:
    return interpolate(given.aligned, given.finetuned, alpha=strength).weight


def _resta(given: Matrices, strength: float) -> Tensor:
    unaligned = given.others["unaligned"]
    dtype = working_dtype(given.aligned, unaligned)
    return resta(given.finetuned, given.aligned.to(dtype) - unaligned.to(dtype), gamma=1 - strength)


def _safe_lora(given: Matrices, strength: float) -> Tensor:
    pretrained = given.others["pretrained"]
    return safe_lora(given.aligned, given.finetuned, pretrained, threshold=1 - strength).weight


def _safe_merge(given: Matrices, strength: float) -> Tensor:
    return safe_merge(
        given.aligned,
        given.finetuned,
        given.others["safe"],
        given.others["pretrained"],
        threshold=1 - strength,
        alpha=MERGED_SHARE,
    ).weight


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "wise-ft": Peer(
            title="WiSE-FT interpolation",
            paper="Wortsman et al., CVPR 2022, arXiv:2109.01903",
            dial="alpha = strength, the share of the delta that is kept",
            everywhere=True,
            needs=(),
            lowest=0.0,
            ladder=(0.02, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5),
            edit=_wise_ft,
        ),
        "resta": Peer(
            title="RESTA",
            paper="Bhardwaj et al., ACL 2024, arXiv:2402.11746",
            dial="gamma = 1 - strength, how much of the safety vector is added; strength 0 adds it once",
            everywhere=True,
            needs=("unaligned",),
            lowest=-1.0,
            ladder=(-0.5, 0.0, 0.1, 0.25, 0.4, 0.5, 0.75),
            edit=_resta,
        ),
        "safe-lora": Peer(
            title="Safe LoRA",
            paper="Hsu et al., NeurIPS 2024, arXiv:2405.16833",
            dial="threshold = 1 - strength, the similarity below which a layer's delta is projected",
            everywhere=False,
            needs=("pretrained",),
            lowest=0.0,
            ladder=_BY_LAYER,
            edit=_safe_lora,
        ),
        "safe-merge": Peer(
            title="SafeMERGE",
            paper="Djuhera et al., 2025, arXiv:2503.17239",
            dial=(
                "threshold = 1 - strength, the similarity below which a layer is merged with the safe model; "
                f"a merged layer keeps {MERGED_SHARE:g} of the delta"
            ),
            everywhere=False,
            needs=("safe", "pretrained"),
            lowest=0.0,
            ladder=_BY_LAYER,
            edit=_safe_merge,
        ),
    }
)
"""The methods by the name that tables and options use."""
