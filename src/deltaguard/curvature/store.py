"""The CurvatureStore: what calibration leaves on disk, once per aligned model, for every fine-tune of it.

A store is a folder of safetensors files, each with whole groups, and `curvature.json`, which is written
last: a folder with it is complete. Opening one reads that file and the headers; matrices are read on demand.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from huggingface_hub import HfApi
from torch import Tensor

from deltaguard.checkpoints.hub import locate
from deltaguard.checkpoints.shards import TensorInfo, parse_header, read_header, read_tensor, shard_problem
from deltaguard.curvature.moments import Packed, merge, normalise, pack, unpack_factor, unpack_moment
from deltaguard.curvature.store_format import (
    MANIFEST,
    Group,
    Manifest,
    Provenance,
    StoredGroup,
    read_manifest,
    shapes,
    staged_folder,
    sync,
    versions,
    write_manifest,
    write_store,
)
from deltaguard.errors import DeltaguardError
from deltaguard.solvers.factor import Factor


@dataclass(frozen=True)
class CurvatureStore:
    """Curvature of an aligned model on safety conversations, and its factors, read from disk on demand.

    Attributes:
        folder: where it lies.
        manifest: what it is.

    Example:
        ```python
        store = CurvatureStore.from_pretrained("my-store")
        group = store.group_of("model.layers.0.mlp.down_proj.weight")
        H, factor = store.hessian(group.name), store.factor(group.name)
        ```
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def from_pretrained(cls, reference: str | Path) -> "CurvatureStore":
        """Open a store: `curvature.json` and the headers are read, no matrix.

        Args:
            reference: a local folder, a Hub id, or `id@revision`.

        Raises:
            DeltaguardError: there is no store, it is unfinished, of another version, or damaged.
        """
        folder = locate(reference)
        store = cls(folder, read_manifest(folder))
        store._check_headers()
        return store

    @property
    def provenance(self) -> Provenance:
        """Which model, conversations and libraries the store comes from."""
        return self.manifest.provenance

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the model's order."""
        return tuple(stored.group for stored in self.manifest.groups)

    def group_of(self, tensor: str) -> Group | None:
        """The group that a tensor of the aligned checkpoint belongs to; `None` where there is none."""
        return self._by_tensor.get(tensor)

    def hessian(self, group: str) -> Tensor:
        """H, the mean of x xᵀ over the tokens, (in, in), float32, symmetric.

        Raises:
            DeltaguardError: the store has no such group.
        """
        return normalise(unpack_moment(self.packed(group)))

    def factor(self, group: str) -> Factor:
        """The factor of the damped H, as `solvers.factor.factorise` gave it.

        Raises:
            DeltaguardError: the store has no such group.
        """
        return unpack_factor(self.packed(group))

    def packed(self, group: str) -> Packed:
        """What is stored of a group, in memory of its own (see `unpack_moment` and `unpack_factor`).

        Raises:
            DeltaguardError: the store has no such group.
        """
        stored = self._by_name.get(group)
        if stored is None:
            raise DeltaguardError(
                f"The store {self.folder} has no group `{group}`; it has {len(self.groups)}."
            )
        tensors = {
            field: read_tensor(self.folder, self._tensors[f"{group}.{field}"])
            for field in shapes(stored.group)
        }
        return Packed(
            **tensors,
            tokens=stored.group.tokens,
            damping=stored.damping,
            dampening=stored.dampening,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the store to a new folder.

        Raises:
            DeltaguardError: the folder exists and is not empty.
        """
        with staged_folder(Path(folder)) as staged:
            for shard in self._shards:
                shutil.copyfile(self.folder / shard, staged / shard)
                sync(staged / shard)
            write_manifest(staged, self.manifest)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the store to a model repository of the Hub, made if absent.

        Args:
            repo_id: `owner/name`.
            private: whether a repository made here is private.
            token: a token with write access; the one logged in with where absent.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=self.folder,
            allow_patterns=[MANIFEST, *self._shards],
            commit_message="Add a deltaguard CurvatureStore",
        )
        return commit.commit_url

    @staticmethod
    def merge(stores: Sequence["CurvatureStore"], output_dir: str | Path) -> "CurvatureStore":
        """The store over the conversations of several: sums are added and factorised again.

        Args:
            stores: at least one, all of the same aligned model.
            output_dir: a new folder.

        Raises:
            DeltaguardError: the stores differ in model, groups, dtype or dampening, or the folder is not
                empty.
        """
        _check_mergeable(stores)
        first = stores[0]
        groups = [
            Group(g.name, g.in_features, sum(s.groups[i].tokens for s in stores), g.layers)
            for i, g in enumerate(first.groups)
        ]

        def packed(group: Group) -> Packed:
            moment = merge([unpack_moment(store.packed(group.name)) for store in stores])
            return pack(group.name, moment, dampening=first.provenance.dampening)

        write_store(Path(output_dir), _merged_provenance(stores), groups, packed)
        return CurvatureStore.from_pretrained(output_dir)

    @cached_property
    def _by_name(self) -> dict[str, StoredGroup]:
        return {stored.group.name: stored for stored in self.manifest.groups}

    @cached_property
    def _by_tensor(self) -> dict[str, Group]:
        return {layer.tensor: group for group in self.groups for layer in group.layers}

    @cached_property
    def _shards(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stored.shard for stored in self.manifest.groups))

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        infos = (parse_header(read_header(self.folder / shard), shard) for shard in self._shards)
        return {info.name: info for shard in infos for info in shard}

    def _check_headers(self) -> None:
        problems = [p for shard in self._shards if (p := shard_problem(self.folder / shard)) is not None]
        if not problems:
            problems = [p for group in self.groups for p in self._group_problems(group)]
        if problems:
            raise DeltaguardError(
                f"The store {self.folder} is damaged; copy it again or calibrate again:\n  "
                + "\n  ".join(problems)
            )

    def _group_problems(self, group: Group) -> list[str]:
        found = {
            field: info.shape
            for field in shapes(group)
            if (info := self._tensors.get(f"{group.name}.{field}")) is not None
        }
        return [
            f"`{group.name}.{field}` is {found.get(field, 'missing')}; it should be {shape}"
            for field, shape in shapes(group).items()
            if found.get(field) != shape
        ]


def _check_mergeable(stores: Sequence[CurvatureStore]) -> None:
    first = stores[0]
    problems: list[str] = []
    for store in stores[1:]:
        for field in ("fingerprint", "dtype", "dampening"):
            mine, other = getattr(first.provenance, field), getattr(store.provenance, field)
            if mine != other:
                problems.append(f"  {field}: {mine} in {first.folder}, {other} in {store.folder}")
        if [(g.name, g.in_features, g.layers) for g in first.groups] != [
            (g.name, g.in_features, g.layers) for g in store.groups
        ]:
            problems.append(f"  the groups of layers differ between {first.folder} and {store.folder}")
    if problems:
        raise DeltaguardError(
            "These stores cannot be merged; calibrate one aligned model in one way:\n" + "\n".join(problems)
        )


def _merged_provenance(stores: Sequence[CurvatureStore]) -> Provenance:
    parts = [store.provenance for store in stores]
    judged = [p.refusal_share * p.conversations for p in parts if p.refusal_share is not None]
    conversations = sum(p.conversations for p in parts)
    return parts[0].model_copy(
        update={
            "prompts_sha256": _joint_hash(p.prompts_sha256 for p in parts),
            "conversations_sha256": _joint_hash(p.conversations_sha256 for p in parts),
            "conversations": conversations,
            "tokens": sum(p.tokens for p in parts),
            "truncated": sum(p.truncated for p in parts),
            "refusal_share": sum(judged) / conversations if len(judged) == len(parts) else None,
            "versions": versions(),
        }
    )


def _joint_hash(hashes: Iterable[str]) -> str:
    return sha256("".join(hashes).encode()).hexdigest()
