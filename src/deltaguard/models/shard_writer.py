"""The tensors of one safetensors file, taken one at a time in the order of its header."""

from typing import Any

from torch import Tensor

from deltaguard.models.durable import HashedFile
from deltaguard.models.shards import DTYPES, TensorInfo, tensor_bytes


class ShardWriter:
    """Takes the tensors of one shard, in the order of its header.

    Attributes:
        notes: kept in the shard's record; anything that JSON can hold.
    """

    def __init__(self, file: HashedFile, expected: list[TensorInfo]) -> None:
        self.notes: Any = None
        self._file = file
        self._expected = expected
        self._written = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor.

        Args:
            name: its name, which must be the next of the header.
            tensor: with the dtype and shape that the header says, on any device. It must not be modified
                before the next call or the end of the block: it is hashed while the next one is prepared.

        Raises:
            DeltaguardError: the file cannot be written.
            ValueError: the header has another tensor at this place.
        """
        info = self._expected[self._written] if self._written < len(self._expected) else None
        given = (name, tensor.dtype, tuple(tensor.shape))
        if info is None or given != (info.name, DTYPES[info.dtype], info.shape):
            raise ValueError(f"{given} was given to the writer where the header of the shard has {info}.")
        self._file.write(tensor_bytes(tensor))
        self._written += 1

    def check_complete(self) -> None:
        """Refuse to finish a shard that lacks tensors of its header.

        Raises:
            ValueError: with the next tensor that was expected.
        """
        if self._written < len(self._expected):
            raise ValueError(f"The shard ends before {self._expected[self._written]}.")
