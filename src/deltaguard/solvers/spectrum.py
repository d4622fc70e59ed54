"""A curvature matrix by its largest eigenpairs, and one number for all other directions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]  # torch documents it

from deltaguard.solvers.solution import damped_by, working_dtype

EXACT_SIZE = 1024
"""Up to this size the whole eigendecomposition is computed; it costs little. Beyond, a randomised one."""

_FLOOR = 0.01
"""Share of the mean of small eigenvalues that each of them counts for at least."""

_NEGATIVE = 0.01
"""Share of the largest eigenvalue beyond which negative ones are no rounding, not even to half precision."""

_OVERSAMPLING = 32
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Spectrum:
    """A symmetric, positive semi-definite matrix M ≈ V diag(values) Vᵀ + tail · (I - V Vᵀ).

    Attributes:
        values: (rank,), falling; none negative.
        vectors: V, (n, rank), orthonormal; column i belongs to value i.
        tail: the one eigenvalue that stands for the other n - rank; 0 where there are none.
    """

    values: Tensor
    vectors: Tensor
    tail: float

    @property
    def size(self) -> int:
        """The number of rows, n."""
        return self.vectors.shape[0]

    def dense(self) -> Tensor:
        """Write out the matrix it stands for, (n, n)."""
        vectors = self.vectors.to(self.values.dtype)
        matrix = (vectors * (self.values - self.tail)) @ vectors.T
        matrix.diagonal().add_(self.tail)
        return matrix

    def to(self, target: torch.dtype | torch.device) -> "Spectrum":
        """Convert values and vectors to another precision, or take them to a device."""
        return Spectrum(self.values.to(target), self.vectors.to(target), self.tail)

    def floored(self) -> "Spectrum":
        """Raise small eigenvalues to a floor, so that no direction of a delta is free, whatever the rank.

        A direction that no token reached has eigenvalue 0: nothing is known about it, which must not say that
        it costs nothing. The floor is a hundredth of the mean of the smaller three quarters of all n
        eigenvalues, the tail counted for each that is not kept. So a spectrum of which a quarter or less is
        kept stays as it is, its tail being that mean; one that keeps more comes ever closer to one that keeps
        everything. Where kept eigenvalues are lost in the rounding of the largest, that is the floor.
        """
        size, rank, first = self.size, len(self.values), self.size // 4
        if not rank:
            return self
        smaller = float(self.values[first:].double().sum()) + (size - max(rank, first)) * self.tail
        floor = _FLOOR * smaller / (size - first)
        rounding = torch.finfo(self.values.dtype).eps * float(self.values[0])
        if floor == 0 or float(self.values[-1]) < rounding:
            floor = max(floor, rounding)
        tail = max(self.tail, floor) if rank < size else self.tail
        return Spectrum(self.values.clamp_min(floor), self.vectors, tail)


def scaled_identity(size: int, value: float, *, like: Tensor) -> Spectrum:
    """Make the matrix value · I, (size, size), on the device and in the dtype of `like`."""
    return Spectrum(like.new_empty(0), like.new_empty(size, 0), value)


def spectrum(curvature: Tensor, rank: int | None = None) -> Spectrum:
    """Find the largest eigenpairs of a second moment, and the geometric mean of the other eigenvalues.

    The geometric mean is that of the other eigenvalues, each raised by a hundredth of their arithmetic mean:
    directions that no token reached have eigenvalue 0, which says that nothing is known about them, and would
    pull the mean to 0, which says that they are free. Beyond `EXACT_SIZE` the eigenpairs come from randomised
    subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061) and the geometric mean from the
    determinant, by a Cholesky factorisation; the same matrix gives the same result.

    Args:
        curvature: symmetric and positive semi-definite but for rounding, (n, n).
        rank: how many eigenpairs are kept; all where absent.

    Raises:
        ValueError: `rank` does not lie in [0, n], or an eigenvalue is negative beyond rounding: by more than
            a hundredth of the largest, or eigenvalues cannot be found.

    Example:
        >>> import torch
        >>> found = spectrum(torch.diag(torch.tensor([1.0, 9.0, 4.0])), rank=1)
        >>> found.values.tolist(), round(found.tail, 2)
        ([9.0], 2.03)
    """
    size = curvature.shape[0]
    kept = size if rank is None else rank
    if not 0 <= kept <= size:
        raise ValueError(f"rank is {rank}; it must lie in [0, {size}].")
    matrix = curvature.to(working_dtype(curvature))
    if size <= EXACT_SIZE or kept + _OVERSAMPLING >= size // 2:
        return _exact(matrix, kept)
    return _randomised(matrix, kept)


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a symmetric matrix; what a GPU cannot in float32 is done in float64 on the CPU.

    There iterations on large matrices of low rank may not converge.
    """
    try:
        return torch.linalg.eigh(matrix)
    except LinAlgError:
        try:
            values, vectors = torch.linalg.eigh(matrix.cpu().double())
        except LinAlgError as error:
            raise ValueError("The curvature's eigenvalues cannot be found.") from error
        return values.to(matrix), vectors.to(matrix)


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Find all eigenvalues of a symmetric matrix in float64, rising; what a GPU cannot is done on the CPU."""
    try:
        return torch.linalg.eigvalsh(matrix.double())
    except LinAlgError:
        try:
            return torch.linalg.eigvalsh(matrix.cpu().double())
        except LinAlgError as error:
            raise ValueError("The curvature's eigenvalues cannot be found.") from error


def _exact(matrix: Tensor, rank: int) -> Spectrum:
    values, vectors = _eigenpairs(matrix)
    _refuse_negative(values)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return Spectrum(values[:rank].clone(), vectors[:, :rank].contiguous(), _geometric_mean(values[rank:]))


def _geometric_mean(others: Tensor) -> float:
    """Find the geometric mean of eigenvalues, each raised by a hundredth of their arithmetic mean."""
    precise = others.double()
    return float((precise + _FLOOR * precise.mean()).log().mean().exp()) if bool(others.any()) else 0.0


def _refuse_negative(values: Tensor) -> None:
    """Refuse rising eigenvalues of which one is negative beyond rounding."""
    if float(values[0]) < -_NEGATIVE * max(float(values[-1]), 0.0):
        raise ValueError(
            f"The curvature is not positive semi-definite: its eigenvalues lie between "
            f"{float(values[0]):.4g} and {float(values[-1]):.4g}."
        )


def _randomised(matrix: Tensor, rank: int) -> Spectrum:
    """Iterate on a random subspace, and solve within it: of a symmetric M one product an iteration."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    shape = matrix.shape[0], rank + _OVERSAMPLING
    basis = torch.randn(shape, generator=generator, dtype=matrix.dtype, device=matrix.device)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, rotation = _eigenpairs(basis.T @ (matrix @ basis))
    _refuse_negative(values)
    values, vectors = values.flip(0)[:rank].clamp_min(0), basis @ rotation.flip(1)[:, :rank]
    return Spectrum(values, vectors, _tail_from_determinant(matrix, values))


def _tail_from_determinant(matrix: Tensor, values: Tensor) -> float:
    """Find the others' geometric mean from log det(M + floor · I), less the logarithms of those kept.

    In float64: the determinant multiplies eigenvalues that lie many orders of magnitude apart. Where rounding
    of M has made it indefinite, and so no determinant tells, all eigenvalues are computed.
    """
    others = matrix.shape[0] - len(values)
    trace, kept = float(matrix.diagonal().double().sum()), float(values.double().sum())
    if kept > trace + _NEGATIVE * abs(trace):
        raise ValueError(
            f"The curvature is not positive semi-definite: its trace is {trace:.4g}, and its {len(values)} "
            f"largest eigenvalues add up to {kept:.4g}."
        )
    floor = _FLOOR * max(trace - kept, 0.0) / others
    largest = float(values[0]) if len(values) else trace / others
    if floor == 0:
        # The others are lost in the rounding of the largest.
        return torch.finfo(matrix.dtype).eps * largest
    damped = damped_by(matrix, floor, torch.float64).mT
    # In its place: symmetric, and transposed it lies as LAPACK has its matrices.
    lower, info = torch.linalg.cholesky_ex(
        damped, out=(damped, torch.empty((), dtype=torch.int32, device=damped.device))
    )
    if int(info) != 0:
        del lower, damped
        every = _eigenvalues(matrix)
        _refuse_negative(every)
        return _geometric_mean(every[:others].clamp_min(0))
    log_determinant = 2 * lower.diagonal().log().sum()
    return float(((log_determinant - (values.double() + floor).log().sum()) / others).exp())
