"""The files of a CurvatureStore: the schema of `curvature.json`, and how a folder is written in one go."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature import Rank
from deltaguard.curvature.contents import (
    Extent,
    GroupCurvature,
    group_curvature,
    stored_bytes,
    stored_tensors,
)
from deltaguard.curvature.leaning import leaning_tensors
from deltaguard.curvature.staged import save_tensors, staged_folder
from deltaguard.curvature.sums import LayerGroup, Reached, Sums
from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically
from deltaguard.models.identity import ModelIdentity
from deltaguard.reports.text import short_reference

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.solvers.low_rank import LowRank

MANIFEST = "curvature.json"
LEANING = "leaning.safetensors"
"""The file of the gradients of refusing."""

MAX_SHARD_BYTES = 10**9
"""A file is put together in memory."""
SCHEMA_VERSION = 3

ENOUGH_REFUSALS = 0.5
"""Below this share of responses that refuse, there are few refusals that could be kept."""


def _answered(conversation: Conversation) -> Conversation:
    if conversation.response is None:
        raise ValueError("it has no response")
    return conversation


Share = Annotated[float, Field(gt=0, le=1)]
Eigenvalue = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CalibrationRequest(ModelIdentity):
    """What a calibration was asked for, of which model. The same request gives the same curvature.

    Attributes:
        prompts_sha256: hash of the conversations as they were given, most without responses, and of which
            are held out.
        max_length: tokens of a conversation at most.
        max_new_tokens: tokens of a self-generated response at most.
        batch_size: conversations per batch.
        dtype: the model's dtype while calibrating; sums are float32.
        answer_dtype: in which it answered; null in stores of before it was known.
        dampening: the dampening asked for, relative to mean diag H.
        rank: `full` keeps raw sums, factors and all eigenpairs; `auto` as many eigenpairs as a quarter of the
            model's bytes hold.
        systems: system prompts of a deployment, under which prompts that named none were asked.
    """

    prompts_sha256: str
    max_length: PositiveInt
    max_new_tokens: PositiveInt
    batch_size: PositiveInt
    dtype: str
    answer_dtype: str | None = None
    dampening: Share
    rank: Rank
    systems: tuple[str, ...] = ()


class Provenance(CalibrationRequest):
    """Where a store comes from. A merged store names the request of its first part.

    Attributes:
        aligned: the aligned model as it was named.
        conversations_sha256: hash of the conversations with their responses.
        conversations: how many, look-alikes among them.
        look_alikes: how many of them are harmless requests that look dangerous; 0 in stores of before they
            were calibrated on.
        framed: how many of the harmful requests stand in framings; 0 in stores of before they did.
        unanswered: how many of those in none were not asked, since their prompts leave an answer no room.
        tokens: over how many tokens H was summed.
        tokens_used: which tokens of a conversation those are.
        response_tokens: how many tokens of a response were drawn for G.
        rank_share: share of the eigenpairs that is kept.
        truncated: how many conversations were cut off at the maximal length.
        system_role: `user turn` where the chat template takes no system message and it was put at the
            head of the user turn.
        refusal_share: share of the harmful requests, those in framings left out, that were refused; `None`
            where nobody judged.
        uncovered: matrices in the decoder blocks about which the store says nothing.
        versions: of the libraries used.
    """

    aligned: str
    conversations_sha256: str
    conversations: PositiveInt
    look_alikes: NonNegativeInt = 0
    framed: NonNegativeInt = 0
    unanswered: NonNegativeInt = 0
    tokens: PositiveInt
    tokens_used: Literal["prompt and response"] = "prompt and response"
    response_tokens: PositiveInt
    rank_share: Share
    truncated: NonNegativeInt
    system_role: Literal["template", "user turn"]
    refusal_share: Annotated[float, Field(ge=0, le=1)] | None
    uncovered: tuple[str, ...]
    versions: Mapping[str, str]

    @staticmethod
    def merged(parts: Sequence["Provenance"]) -> "Provenance":
        """Say where the store comes from that several are merged into (see `CurvatureStore.merge`)."""
        refused = [part.refusal_share * part.judged for part in parts if part.refusal_share is not None]
        judged = sum(part.judged for part in parts)

        def together(name: str) -> str:
            return hashlib.sha256("".join(getattr(part, name) for part in parts).encode()).hexdigest()

        return parts[0].model_copy(
            update={
                **{name: together(name) for name in ("prompts_sha256", "conversations_sha256")},
                "conversations": sum(part.conversations for part in parts),
                "look_alikes": sum(part.look_alikes for part in parts),
                "framed": sum(part.framed for part in parts),
                "unanswered": sum(part.unanswered for part in parts),
                "systems": tuple(dict.fromkeys(system for part in parts for system in part.systems)),
                "tokens": sum(part.tokens for part in parts),
                "response_tokens": sum(part.response_tokens for part in parts),
                "truncated": sum(part.truncated for part in parts),
                "refusal_share": sum(refused) / judged if len(refused) == len(parts) else None,
                "versions": versions(),
            }
        )

    @model_validator(mode="after")
    def _asks_for_harm(self) -> Self:
        if self.look_alikes >= self.conversations:
            raise ValueError(f"all {self.conversations} conversations are look-alikes")
        if self.framed >= self.harmful:
            raise ValueError(f"all {self.harmful} harmful requests stand in framings")
        return self

    @property
    def harmful(self) -> int:
        """How many of the conversations are harmful requests."""
        return self.conversations - self.look_alikes

    @property
    def judged(self) -> int:
        """How many of the harmful requests stand in no framing and were asked: refusals are of those."""
        return self.harmful - self.framed - self.unanswered

    @property
    def extent(self) -> Extent:
        """How much of each group is stored."""
        return Extent(self.rank_share, full=self.rank == "full")

    def decompose(self, group: LayerGroup, sums: Sums) -> GroupCurvature:
        """Decompose the sums of one group as such a store keeps them (see `group_curvature`).

        Raises:
            DeltaguardError: the sums are of no use.
        """
        extent, tokens = self.extent, self.response_tokens
        return group_curvature(group, sums, response_tokens=tokens, dampening=self.dampening, extent=extent)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before a model is restored to this one's behaviour; nothing where it refuses."""
        if self.refusal_share is None or self.refusal_share >= ENOUGH_REFUSALS:
            return ()
        found = f"{self.refusal_share:.0%} of the {self.judged} responses of {short_reference(self.aligned)}"
        why = "A restored model does what this one does: where it does not refuse, neither will that."
        return (f"{found} to harmful requests refuse. {why} Calibrate a model that refuses.",)


class StoredGroup(BaseModel):
    """A group, the file that holds it, and numbers that are no tensors.

    Attributes:
        group: the group.
        shard: the file.
        tails: what stands for the eigenvalues that are not kept, of H and of each layer's G.
        means: of all eigenvalues, likewise.
        damping: of the factor, where there is one.
        dampening: likewise.
        reached: of an expert's layers, what their curvature rests on; null of layers that see every token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: LayerGroup
    shard: str
    tails: tuple[Eigenvalue, ...]
    means: tuple[Eigenvalue, ...]
    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    dampening: Share | None
    reached: Reached | None = None


class StoredFile(BaseModel):
    """A file of tensors: its name in the store's folder, its size, and the hash of all its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*\.safetensors$")]
    bytes: PositiveInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The content of `curvature.json`.

    Attributes:
        schema_version: others are not read.
        provenance: where the store comes from.
        held_out: conversations that safety KL is measured on.
        files: of groups.
        leaning: of the gradients of refusing (see `leaning`), of every layer that sees each token; null where
            they are not known.
        groups: in the model's order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[3] = SCHEMA_VERSION
    provenance: Provenance
    held_out: tuple[Annotated[Conversation, AfterValidator(_answered)], ...]
    files: tuple[StoredFile, ...]
    leaning: StoredFile | None = None
    groups: Annotated[tuple[StoredGroup, ...], Field(min_length=1)]


def versions() -> dict[str, str]:
    """List the versions of the libraries that a store's numbers depend on."""
    return {name: version(name) for name in ("deltaguard", "safetensors", "torch", "transformers")}


def read_manifest(folder: Path) -> Manifest:
    """Read a store's `curvature.json`.

    Raises:
        DeltaguardError: it is missing, of another version, or not what it should be.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DeltaguardError(
            f"{folder} holds no {MANIFEST}: it is no curvature store, or an unfinished copy of one. "
            "Make one with `deltaguard calibrate`."
        )
    return read_json(path, Manifest, remedy="Calibrate again, or install the release that wrote the store.")


def write_store(
    folder: Path,
    provenance: Provenance,
    held_out: Sequence[Conversation],
    groups: Sequence[LayerGroup],
    content: Callable[[LayerGroup], GroupCurvature],
    *,
    leaning: Mapping[str, "LowRank"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a store: to a temporary sibling first, renamed when complete.

    Args:
        folder: where to; absent or empty.
        provenance: where the store comes from.
        held_out: conversations that safety KL is measured on.
        groups: the groups, in the model's order.
        content: called once per group, in that order, when it is about to be written.
        leaning: the gradients of refusing, by layer; None where they are not known.
        max_shard_bytes: a file holds whole groups, and as many as fit, at least one.

    Raises:
        DeltaguardError: the folder exists and is not empty, or a group is of no use.
    """
    extent = provenance.extent
    plan = _shard_plan(groups, extent, max_shard_bytes)
    with staged_folder(folder) as staged:
        files: list[StoredFile] = []
        stored: list[StoredGroup] = []
        for number, members in enumerate(plan, start=1):
            shard = f"curvature-{number:05}-of-{len(plan):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for group in members:
                found = content(group)
                tensors |= stored_tensors(group, found, extent)
                stored.append(_stored_group(group, shard, found))
            files.append(_stored_file(tensors, staged / shard))
        manifest = Manifest(
            provenance=provenance,
            held_out=tuple(held_out),
            files=tuple(files),
            leaning=None if leaning is None else _stored_file(leaning_tensors(leaning), staged / LEANING),
            groups=tuple(stored),
        )
        write_manifest(staged, manifest)


def _stored_file(tensors: Mapping[str, "Tensor"], path: Path) -> StoredFile:
    """Write a file of a store, and say what it is known by."""
    save_tensors(tensors, path)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return StoredFile(name=path.name, bytes=path.stat().st_size, sha256=digest.hexdigest())


def _stored_group(group: LayerGroup, shard: str, content: GroupCurvature) -> StoredGroup:
    matrices = (content.inputs, *content.outputs)
    return StoredGroup(
        group=group,
        shard=shard,
        tails=tuple(matrix.spectrum.tail for matrix in matrices),
        means=tuple(matrix.mean for matrix in matrices),
        damping=content.packed.damping if content.packed else None,
        dampening=content.packed.dampening if content.packed else None,
        reached=content.reached,
    )


def _shard_plan(groups: Sequence[LayerGroup], extent: Extent, max_bytes: int) -> list[list[LayerGroup]]:
    plan: list[list[LayerGroup]] = []
    room = 0
    for group in groups:
        size = stored_bytes(group, extent)
        if not plan or size > room:
            plan.append([])
            room = max_bytes
        plan[-1].append(group)
        room -= size
    return plan


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `curvature.json`, which must come last."""
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def not_full(folder: Path, aligned: str) -> str:
    """Say what to do where a store that is cut off cannot serve."""
    return (
        f"The store {folder} keeps the largest eigenpairs of each layer's curvature and no more. This needs "
        f"the whole: make one with `deltaguard calibrate {aligned} -o STORE --rank full`."
    )
