"""What is fuzzed: content that is right, ways to damage it, and the function that reads it in real use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mutators import Mutator


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        content: as it should be.
        damage: makes other content of it.
        read: reads content as deltaguard does.
    """

    content: bytes
    damage: Mutator
    read: Callable[[bytes], object]


@dataclass(frozen=True)
class Kind:
    """A target that is made when its turn comes.

    Attributes:
        name: of the kind.
        share: inputs out of 3,000.
        make: given an empty folder.
    """

    name: str
    share: int
    make: Callable[[Path], Target]


def in_file(path: Path, damage: Mutator, read: Callable[[], object], content: bytes | None = None) -> Target:
    """A target whose content lies in a file, the one that is there if no other is given."""

    def read_from_file(changed: bytes) -> object:
        path.write_bytes(changed)
        return read()

    return Target(path.read_bytes() if content is None else content, damage, read_from_file)
