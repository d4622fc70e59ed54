"""The CurvatureStore: what calibration leaves on disk, once per aligned model, for every fine-tune of it.

A store is a folder of safetensors files, each with whole groups, and `curvature.json`, which is written
last: a folder with it is complete. Opening one reads all of it once, to check it; matrices are read again on
demand. It holds the largest eigenpairs of each layer's H and G; one made with `rank="full"` holds all of
them, the raw sums, and the factors that `greedy` needs.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor

from deltaguard.chat.conversations import Conversation, fingerprint
from deltaguard.curvature.checks import open_files
from deltaguard.curvature.contents import (
    PACKED_FIELDS,
    Decomposed,
    GroupCurvature,
    Packed,
    share_within,
    unpack_factor,
    unpack_moment,
)
from deltaguard.curvature.merging import check_mergeable, joined_leaning
from deltaguard.curvature.staged import staged_folder, sync
from deltaguard.curvature.store_format import (
    MANIFEST,
    Manifest,
    Provenance,
    StoredGroup,
    not_full,
    read_manifest,
    write_manifest,
    write_store,
)
from deltaguard.curvature.sums import (
    LayerGroup,
    Moment,
    Reached,
    Sums,
    input_name,
    merge,
    normalise,
    output_name,
)
from deltaguard.errors import DeltaguardError
from deltaguard.models.hub import locate, make_repository, require_owner
from deltaguard.models.opened import OpenFile, refuse_changes
from deltaguard.models.shards import TensorInfo, read_tensor
from deltaguard.solvers.factor import Factor
from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.spectrum import Spectrum


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
        H = store.input_spectrum(group.name)
        G = store.output_spectrum("model.layers.0.mlp.down_proj.weight")
        ```
    """

    folder: Path
    manifest: Manifest
    _files: Mapping[str, OpenFile] = field(repr=False, compare=False)
    _tensors: Mapping[str, TensorInfo] = field(repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, reference: str | Path) -> "CurvatureStore":
        """Open a store and check it: every file is read once, from beginning to end.

        What is opened is a valid store. Its files are those that were written, by their sha256. All numbers
        are finite. Eigenvalues fall, none is negative (`spectrum` makes 0 of what rounding leaves below it),
        not all are zero, and what stands for the others fits them: the tail is at most 1.1 times the smallest
        that is kept and 1e-4 of the largest, and the mean lies within 1 % of what they allow. Vectors are
        orthonormal: in a random probe with entries of ±1, Vᵀ(V z) is z but for 0.01 in half precision and
        0.001 in single precision. Sums of squares are not negative, factors have positive diagonals, and an
        order of columns is one.

        Its files stay open as long as it lives.

        Args:
            reference: a local folder, a Hub id, or `id@revision`.

        Raises:
            DeltaguardError: there is no store, it is unfinished, of another version, or damaged. All that is
                wrong with its files is listed.
        """
        folder = locate(reference)
        manifest = read_manifest(folder)
        return cls(folder, manifest, *open_files(folder, manifest))

    @property
    def file_names(self) -> tuple[str, ...]:
        """All its files, the manifest first."""
        return (MANIFEST, *self._files)

    def changes(self) -> list[str]:
        """Say what happened to its files since it was opened."""
        return [change for file in self._files.values() if (change := file.change())]

    @property
    def provenance(self) -> Provenance:
        """Which model, conversations and libraries the store comes from."""
        return self.manifest.provenance

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups, in the model's order."""
        return tuple(stored.group for stored in self.manifest.groups)

    def group_of(self, tensor: str) -> LayerGroup | None:
        """Find the group of a weight of the aligned checkpoint; `None` where there is none.

        Args:
            tensor: the weight's name; of one in a stack of experts, followed by its number: `NAME.3`.
        """
        return self._by_tensor.get(tensor)

    @property
    def held_out(self) -> tuple[Conversation, ...]:
        """Safety conversations that the curvature does not know, answered by the aligned model."""
        return self.manifest.held_out

    @property
    def is_full(self) -> bool:
        """Whether raw sums and factors are there."""
        return self.provenance.rank == "full"

    def input_spectrum(self, group: str) -> Spectrum:
        """Read the eigenpairs of H, the mean of x xᵀ over the tokens, as prices (see `Spectrum.floored`).

        Raises:
            DeltaguardError: the store has no such group.
        """
        return self._spectrum(input_name(group), self._stored(group).tails[0])

    def output_spectrum(self, tensor: str) -> Spectrum:
        """Read the eigenpairs of G, the sum of g gᵀ for each response token, as prices, like those of H.

        Args:
            tensor: a layer's weight.

        Raises:
            DeltaguardError: the store has no such layer.
        """
        stored, number = self._stored_layer(tensor)
        return self._spectrum(output_name(stored.group.layers[number]), stored.tails[number + 1])

    def output_mean(self, tensor: str) -> float:
        """Read the mean of all eigenvalues of a layer's G.

        Raises:
            DeltaguardError: the store has no such layer.
        """
        stored, number = self._stored_layer(tensor)
        return stored.means[number + 1]

    @property
    def knows_leaning(self) -> bool:
        """Whether the gradients of refusing are there."""
        return self.manifest.leaning is not None

    def leaning(self, tensor: str) -> LowRank | None:
        """Read the gradient of refusing with a layer's weight, (out, in), see `curvature.leaning`.

        Args:
            tensor: a layer's weight.

        Returns:
            None where the store does not know it: of experts, and of all layers where `knows_leaning` is
            false.

        Raises:
            DeltaguardError: the store has no such layer.
        """
        stored, _ = self._stored_layer(tensor)
        if self.manifest.leaning is None or stored.reached is not None:
            return None
        return LowRank(self._read(f"{tensor}.down"), self._read(f"{tensor}.up"), 0.0)

    def hessian(self, group: str) -> Tensor:
        """Read H, the mean of x xᵀ over the tokens, (in, in), float32, symmetric.

        Raises:
            DeltaguardError: the store has no such group, or is cut off.
        """
        packed = self.packed(group)
        return normalise(Moment(packed.matrix, packed.tokens))

    def factor(self, group: str) -> Factor:
        """Read the factor of the damped H, as `solvers.factorise` gave it.

        Raises:
            DeltaguardError: the store has no such group, or is cut off.
        """
        return unpack_factor(self.packed(group))

    def packed(self, group: str) -> Packed:
        """Read the raw sum of H and its factor, in memory of its own (see `unpack_moment`, `unpack_factor`).

        Raises:
            DeltaguardError: the store has no such group, or is cut off.
        """
        stored = self._stored(group)
        if stored.damping is None or stored.dampening is None:
            raise DeltaguardError(not_full(self.folder, self.provenance.aligned))
        tensors = {field: self._read(f"{group}.{field}") for field in PACKED_FIELDS}
        return Packed(
            **tensors, tokens=stored.group.tokens, damping=stored.damping, dampening=stored.dampening
        )

    def sums(self, group: str) -> Sums:
        """Read the raw sums of a group; those of an expert are shrunk already.

        Raises:
            DeltaguardError: the store has no such group, or is cut off.
        """
        moment, stored = unpack_moment(self.packed(group)), self._stored(group)
        return Sums(moment, self._totals(stored.group), stored.reached)

    def _totals(self, group: LayerGroup) -> tuple[Tensor, ...]:
        return tuple(self._read(f"{output_name(layer)}.total") for layer in group.layers)

    def reached(self, group: str) -> Reached | None:
        """Say what the curvature of an expert's layers rests on; None of layers that see every token.

        Raises:
            DeltaguardError: the store has no such group.
        """
        return self._stored(group).reached

    def content(self, group: str) -> GroupCurvature:
        """Read all that is stored of a group, as it was given to be stored.

        Raises:
            DeltaguardError: the store has no such group.
        """
        stored = self._stored(group)
        matrices = [
            Decomposed(Spectrum(self._read(f"{name}.values"), self._read(f"{name}.vectors"), tail), mean)
            for (name, _), tail, mean in zip(stored.group.matrices(), stored.tails, stored.means, strict=True)
        ]
        return GroupCurvature(
            inputs=matrices[0],
            outputs=tuple(matrices[1:]),
            packed=self.packed(group) if self.is_full else None,
            totals=self._totals(stored.group) if self.is_full else (),
            reached=stored.reached,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the store to a new folder.

        Raises:
            DeltaguardError: the folder exists and is not empty, or the store was changed since it was opened.
        """
        with staged_folder(Path(folder)) as staged:
            for name, file in self._files.items():
                shutil.copyfile(file.path, staged / name)
                sync(staged / name)
            refuse_changes(self.changes())
            write_manifest(staged, self.manifest)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the store to a model repository of the Hub, made if absent.

        Args:
            repo_id: `owner/name`.
            private: whether the repository must be private; a new one is otherwise what its owner's are.
            token: a token with write access; the one logged in with where absent.

        Returns:
            The address of the commit.

        Raises:
            DeltaguardError: the store was changed since it was opened, the name has no owner, or the
                repository is there and public, and was to be private.
        """
        require_owner(repo_id)
        refuse_changes(self.changes())
        api = HfApi(token=token)
        make_repository(api, repo_id, private=private)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=self.folder,
            allow_patterns=list(self.file_names),
            commit_message="Add a deltaguard CurvatureStore",
        )
        return commit.commit_url

    def cut(self, output_dir: str | Path, *, limit: int) -> "CurvatureStore":
        """Write a store of as many of the largest eigenpairs as fit, decomposed from the raw sums.

        Args:
            output_dir: a new folder.
            limit: bytes that the store takes at most, about.

        Raises:
            DeltaguardError: this store does not keep its sums, or the folder is not empty.
        """
        provenance = self.provenance.model_copy(
            update={"rank": "auto", "rank_share": share_within(self.groups, limit)}
        )
        write_store(
            Path(output_dir),
            provenance,
            self.held_out,
            self.groups,
            lambda group: provenance.decompose(group, self.sums(group.name)),
            leaning=joined_leaning([self]),
        )
        return CurvatureStore.from_pretrained(output_dir)

    @staticmethod
    def merge(stores: Sequence["CurvatureStore"], output_dir: str | Path) -> "CurvatureStore":
        """Write the store over the conversations of several: sums are added and decomposed again.

        What any of them holds out, the merged one does. Give stores of different prompts: on one that another
        was calibrated on, safety KL would be measured where the curvature knows it.

        Args:
            stores: at least one, all of the same aligned model.
            output_dir: a new folder.

        Raises:
            DeltaguardError: the stores differ in model, groups, dtype or dampening, one does not keep its
                sums, they are of a mixture of experts, or the folder is not empty.
        """
        check_mergeable(stores)
        provenance = Provenance.merged([store.provenance for store in stores])

        def content(group: LayerGroup) -> GroupCurvature:
            parts = [store.sums(group.name) for store in stores]
            outputs = zip(*(part.outputs for part in parts), strict=True)
            totals = tuple(torch.stack(layer).sum(dim=0) for layer in outputs)
            return provenance.decompose(group, Sums(merge([part.inputs for part in parts]), totals))

        # What a model wrote may be known with its tokens in one store and as a text in another.
        held_out = tuple({fingerprint([row]): row for store in stores for row in store.held_out}.values())
        groups = [
            replace(group, tokens=sum(store.groups[i].tokens for store in stores))
            for i, group in enumerate(stores[0].groups)
        ]
        write_store(Path(output_dir), provenance, held_out, groups, content, leaning=joined_leaning(stores))
        return CurvatureStore.from_pretrained(output_dir)

    def _stored(self, group: str) -> StoredGroup:
        if group not in self._by_group:
            raise DeltaguardError(
                f"The store {self.folder} has no group `{group}`; it has {len(self.groups)}."
            )
        return self._by_group[group]

    def _stored_layer(self, tensor: str) -> tuple[StoredGroup, int]:
        group = self.group_of(tensor)
        if group is None:
            raise DeltaguardError(f"The store {self.folder} has no layer `{tensor}`.")
        return self._stored(group.name), [layer.key for layer in group.layers].index(tensor)

    def _spectrum(self, name: str, tail: float) -> Spectrum:
        return Spectrum(self._read(f"{name}.values"), self._read(f"{name}.vectors"), tail).floored()

    def _read(self, name: str) -> Tensor:
        info = self._tensors[name]
        return read_tensor(self._files[info.shard], info)

    @cached_property
    def _by_group(self) -> dict[str, StoredGroup]:
        return {stored.group.name: stored for stored in self.manifest.groups}

    @cached_property
    def _by_tensor(self) -> dict[str, LayerGroup]:
        return {layer.key: group for group in self.groups for layer in group.layers}
