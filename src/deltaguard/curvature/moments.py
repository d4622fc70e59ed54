"""The second moment H of a layer's inputs: accumulated, merged, normalised and packed with its factor.

Raw sums and token counts are kept until the end, so that runs merge by addition. A symmetric matrix and a
triangular one of the same size fit into one: the upper triangle with the diagonal holds the raw sum, the
part below the diagonal that of the Cholesky factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.solvers.factor import Factor, factorise


@dataclass(frozen=True)
class Moment:
    """A raw sum over tokens.

    Attributes:
        total: Σ x xᵀ, (in, in).
        tokens: how many x were summed.
    """

    total: Tensor
    tokens: int


@dataclass(frozen=True)
class Packed:
    """A moment and the factor of its mean, as they are stored.

    Attributes:
        matrix: (in, in); upper triangle with the diagonal: the raw sum; below it: `Factor.lower`.
        diagonal: (in,); diagonal of `Factor.lower`.
        order: (in,) int32; see `Factor`.
        inverse_diagonal: (in,); see `Factor`.
        tokens: how many tokens were summed.
        damping: see `Factor`.
        dampening: see `Factor`.
    """

    matrix: Tensor
    diagonal: Tensor
    order: Tensor
    inverse_diagonal: Tensor
    tokens: int
    damping: float
    dampening: float


def empty_moment(
    size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Moment:
    """The sum over no tokens, (size, size)."""
    return Moment(torch.zeros(size, size, dtype=dtype, device=device), 0)


def accumulate(moment: Moment, inputs: Tensor) -> Moment:
    """Add a batch of tokens; the moment given is left as it was.

    Args:
        moment: what was summed so far.
        inputs: (tokens, in), in any dtype; the products are taken in the moment's dtype.

    Example:
        >>> import torch
        >>> accumulate(empty_moment(2), torch.tensor([[1.0, 2.0]])).total.tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    x = inputs.to(moment.total)
    return Moment(torch.addmm(moment.total, x.T, x), moment.tokens + x.shape[0])


def merge(moments: Sequence[Moment]) -> Moment:
    """The moment over all tokens of at least one moment: sums and counts are added."""
    total = moments[0].total.clone()
    for moment in moments[1:]:
        total += moment.total
    return Moment(total, sum(moment.tokens for moment in moments))


def normalise(moment: Moment) -> Tensor:
    """H, the mean of x xᵀ, (in, in): exactly symmetric, the upper triangle being the one that counts."""
    upper = moment.total.triu()
    return (upper + upper.triu(1).T) / moment.tokens


def check_sum(name: str, total: Tensor, what: str) -> None:
    """Refuse a sum that nothing can be learned from.

    Args:
        name: of the group or layer, for the messages.
        total: the sum.
        what: it was summed over, `inputs` or `gradients`.

    Raises:
        DeltaguardError: an entry is not finite, or the sum is zero.
    """
    bad = int(total.numel() - total.isfinite().sum())
    if bad:
        raise DeltaguardError(
            f"The curvature of `{name}` holds {bad} entries that are NaN or infinite: the aligned model's "
            f"{what} overflow there. Calibrate in float32 or bfloat16."
        )
    if not bool(total.any()):
        raise DeltaguardError(
            f"The curvature of `{name}` is zero: its {what} are all zero, or too small for the dtype, so "
            "nothing can be said about its safety. Calibrate in float32."
        )


def pack(name: str, moment: Moment, *, dampening: float) -> Packed:
    """Factorise the mean of a moment and pack both.

    Args:
        name: the group, for the messages.
        moment: at least one token, finite and not zero (see `check_sum`).
        dampening: see `solvers.factor.factorise`.

    Raises:
        DeltaguardError: the sum cannot be factorised.
    """
    try:
        factor = factorise(normalise(moment), dampening=dampening)
    except ValueError as error:
        raise DeltaguardError(f"The curvature of `{name}` is of no use: {error}") from error
    return Packed(
        matrix=moment.total.triu().add_(factor.lower.tril(-1)),
        diagonal=factor.lower.diagonal().clone(),
        order=factor.order.to(torch.int32),
        inverse_diagonal=factor.inverse_diagonal,
        tokens=moment.tokens,
        damping=factor.damping,
        dampening=factor.dampening,
    )


def unpack_moment(packed: Packed) -> Moment:
    """The raw sum, exactly symmetric."""
    upper = packed.matrix.triu()
    return Moment(upper + upper.triu(1).T, packed.tokens)


def unpack_factor(packed: Packed) -> Factor:
    """The factor that `pack` computed, bit for bit, in the memory of `packed.matrix`: the moment is lost."""
    lower = packed.matrix.tril_(-1)
    lower.diagonal().copy_(packed.diagonal)
    return Factor(
        order=packed.order.long(),
        lower=lower,
        inverse_diagonal=packed.inverse_diagonal,
        damping=packed.damping,
        dampening=packed.dampening,
    )
