"""CurvatureStore on disk: what is written is read, or nothing is there."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature import store as store_module
from deltaguard.curvature.contents import pack, share_within, unpack_factor
from deltaguard.curvature.staged import save_tensors
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import write_store
from deltaguard.curvature.sums import merge, normalise
from deltaguard.errors import DeltaguardError
from deltaguard.solvers import spectrum
from stores import CUT_OFF, GROUPS, HELD_OUT, contents, provenance, sums, written


def equal_factors(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("order", "lower", "inverse_diagonal"))


def equal_spectra(found, expected, dtype):
    expected = expected.floored()
    vectors = expected.vectors.to(dtype)
    same = torch.equal(found.values, expected.values) and torch.equal(found.vectors, vectors)
    return same and found.vectors.dtype == dtype and found.tail == expected.tail


def test_what_was_written_is_read_exactly(tmp_path):
    store = written(tmp_path / "store")
    assert store.groups == GROUPS
    assert store.provenance == provenance()
    assert store.held_out == HELD_OUT
    assert store.is_full
    for name, expected in sums(0).items():
        assert torch.equal(store.hessian(name), normalise(expected.inputs))
        factor = unpack_factor(pack(name, expected.inputs, dampening=0.02))
        assert equal_factors(store.factor(name), factor)
        assert (store.factor(name).damping, store.factor(name).dampening) == (factor.damping, 0.02)
        found = store.sums(name)
        assert found.inputs.tokens == 40
        assert torch.equal(found.inputs.total, expected.inputs.total)
        assert all(torch.equal(a, b) for a, b in zip(found.outputs, expected.outputs, strict=True))


@pytest.mark.parametrize(
    ("changes", "ranks", "dtype"),
    [
        ({}, {3: 3, 5: 5, 6: 6, 8: 8}, torch.float32),
        (CUT_OFF, {3: 1, 5: 2, 6: 3, 8: 4}, torch.float16),
        ({"rank": "auto", "rank_share": 0.01}, {3: 1, 5: 1, 6: 1, 8: 1}, torch.float16),
    ],
)
def test_spectra_are_read_as_they_were_computed(tmp_path, changes, ranks, dtype):
    store = written(tmp_path / "store", **changes)
    for group in GROUPS:
        expected = sums(0)[group.name]
        H = normalise(expected.inputs)
        assert equal_spectra(store.input_spectrum(group.name), spectrum(H, ranks[len(H)]), dtype)
        for layer, total in zip(group.layers, expected.outputs, strict=True):
            G = total / 16
            assert equal_spectra(store.output_spectrum(layer.tensor), spectrum(G, ranks[len(G)]), dtype)
            assert store.output_mean(layer.tensor) == pytest.approx(float(G.trace()) / len(G), rel=1e-6)


@pytest.mark.parametrize("reached", [8, 5, 2])
def test_a_store_that_happens_to_keep_everything_prices_as_the_whole_one_does(tmp_path, reached):
    """Tokens and gradients leave directions out: of these no store says that they are free."""
    whole = written(tmp_path / "whole", reached=reached)
    auto = written(tmp_path / "auto", reached=reached, rank="auto", rank_share=1.0)
    for group in GROUPS:
        pairs = [(whole.input_spectrum(group.name), auto.input_spectrum(group.name))]
        pairs += [(whole.output_spectrum(x.tensor), auto.output_spectrum(x.tensor)) for x in group.layers]
        for full, found in pairs:
            assert torch.equal(found.values, full.values)
            assert found.tail == full.tail
            assert torch.equal(found.vectors, full.vectors.half())
            assert float(full.values[-1]) > 0


@pytest.mark.parametrize(("rank", "share"), [("auto", 0.1), ("auto", 0.4), ("auto", 1.0), ("full", 1.0)])
@pytest.mark.parametrize("reached", [8, 5, 2])
def test_no_direction_of_a_store_is_free(tmp_path, rank, share, reached):
    store = written(tmp_path / "store", reached=reached, rank=rank, rank_share=share)
    for group in GROUPS:
        spectra = [store.input_spectrum(group.name), *(store.output_spectrum(x.tensor) for x in group.layers)]
        for found in spectra:
            assert float(found.values[-1]) > 0
            assert found.tail > 0 or len(found.values) == found.size


def test_a_store_that_is_cut_off_holds_eigenpairs_and_nothing_else(tmp_path):
    store = written(tmp_path / "store", **CUT_OFF)
    assert not store.is_full
    names = {name for shard in store.folder.glob("*.safetensors") for name in load_file(shard)}
    matrices = ("a.q.input", "a.q.output", "a.k.output", "a.down.input", "a.down.output")
    matrices += ("b.q.input", "b.q.output")
    assert names == {f"{matrix}.{part}" for matrix in matrices for part in ("values", "vectors")}
    for asked in (store.hessian, store.factor, store.packed, store.sums):
        with pytest.raises(DeltaguardError, match=r"calibrate someone/model -o STORE --rank full"):
            asked("a.q")


def test_layers_are_found_by_their_tensors(tmp_path):
    store = written(tmp_path / "store")
    assert store.group_of("a.k.weight") == GROUPS[0]
    assert store.group_of("a.down.weight").layers[0].transposed
    assert store.group_of("lm_head.weight") is None
    for asked in (store.hessian, store.input_spectrum):
        with pytest.raises(DeltaguardError, match=r"has no group `c\.q`; it has 3"):
            asked("c.q")
    for asked in (store.output_spectrum, store.output_mean):
        with pytest.raises(DeltaguardError, match=r"has no layer `lm_head\.weight`"):
            asked("lm_head.weight")


class Counted(tuple):
    """Counts how often all of it is gone through."""

    __slots__ = ()
    walks = 0

    def __iter__(self):
        type(self).walks += 1
        return super().__iter__()


def test_a_group_is_found_without_going_through_all(tmp_path):
    """A mixture of experts has ten thousand."""
    groups = Counted(written(tmp_path / "store").manifest.groups)
    store = CurvatureStore(tmp_path, SimpleNamespace(groups=groups), {}, {})
    for stored in groups[:]:
        store.reached(stored.group.name)
    assert Counted.walks == 1


# What groups take in full: their eigenpairs, sums and factor.
A_Q, A_DOWN = 4 * (30 + 42 + 12 + 40 + 45), 4 * (72 + 30 + 88 + 25)


def layers_in(shard):
    return {".".join(name.split(".")[:2]) for name in load_file(shard)}


def test_shards_hold_whole_groups_and_are_read_on_demand(tmp_path):
    store = written(tmp_path / "store", max_shard_bytes=A_Q + A_DOWN)
    shards = sorted(path.name for path in store.folder.glob("*.safetensors"))
    assert shards == [f"curvature-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert layers_in(store.folder / shards[0]) == {"a.q", "a.k", "a.down"}
    assert store.hessian("a.down").shape == store.hessian("a.down").shape == (8, 8)
    smaller = written(tmp_path / "smaller", max_shard_bytes=A_Q + A_DOWN - 1)
    assert layers_in(smaller.folder / shards[0]) == {"a.q", "a.k"}


def test_a_group_larger_than_a_shard_has_its_own(tmp_path):
    store = written(tmp_path / "store", max_shard_bytes=1)
    assert len(list(store.folder.glob("*.safetensors"))) == 3
    assert torch.equal(store.hessian("b.q"), normalise(sums(0)["b.q"].inputs))


def test_a_run_that_fails_leaves_nothing(tmp_path):
    found = contents(0, GROUPS, provenance())

    def fail(group):
        if group.name == "b.q":
            raise DeltaguardError("no")
        return found(group)

    with pytest.raises(DeltaguardError, match=r"^no$"):
        write_store(tmp_path / "store", provenance(), HELD_OUT, GROUPS, fail, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_known_failure(tmp_path):
    with pytest.raises(DeltaguardError, match=r"absent/sums\.safetensors cannot be written"):
        save_tensors({"x": torch.zeros(2)}, tmp_path / "absent" / "sums.safetensors")


def test_an_empty_output_folder_is_used_and_a_full_one_is_not(tmp_path):
    (tmp_path / "store").mkdir()
    written(tmp_path / "store")
    with pytest.raises(DeltaguardError, match="not empty"):
        written(tmp_path / "store")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DeltaguardError, match="is a file"):
        written(tmp_path / "file")


def test_a_mount_point_is_refused_before_anything_is_summed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(DeltaguardError, match="is a mount point; name a folder in it"):
        written(tmp_path / "volume")
    written(tmp_path / "volume" / "store")


def test_a_folder_without_manifest_is_no_store(tmp_path):
    store = written(tmp_path / "store")
    (store.folder / "curvature.json").unlink()
    with pytest.raises(DeltaguardError, match=r"holds no curvature\.json"):
        CurvatureStore.from_pretrained(store.folder)
    with pytest.raises(DeltaguardError, match="no folder"):
        CurvatureStore.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("version", [2, 4])
def test_a_store_of_another_schema_is_refused_by_its_number(tmp_path, version):
    path = written(tmp_path / "store").folder / "curvature.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["held_out"], manifest["provenance"]["rank"]
    path.write_text(json.dumps({**manifest, "schema_version": version}), encoding="utf-8")
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.from_pretrained(path.parent)
    assert str(caught.value) == (
        f"{path} has schema version {version}, and this release reads version 3. "
        "Calibrate again, or install the release that wrote the store."
    )


def test_all_that_is_wrong_with_a_manifest_is_listed(tmp_path):
    path = written(tmp_path / "store").folder / "curvature.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["groups"][1]["tails"] = "none"
    del manifest["provenance"]["dtype"]
    manifest["held_out"][0]["response"] = None
    path.write_text(json.dumps(manifest), encoding="utf-8")
    listed = (
        r"`provenance\.dtype`: Field required\n- `held_out\.0`: .* no response .*\n- `groups\.1\.tails`: "
    )
    with pytest.raises(DeltaguardError, match=listed):
        CurvatureStore.from_pretrained(path.parent)
    for text in ("[]", "{", "null"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DeltaguardError, match=r"curvature\.json cannot be used"):
            CurvatureStore.from_pretrained(path.parent)


def test_damaged_shards_are_seen_before_they_are_needed(tmp_path):
    folder = written(tmp_path / "store", max_shard_bytes=A_Q + A_DOWN).folder
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    tensors["a.q.matrix"] = torch.zeros(4, 4)
    del tensors["a.down.order"], tensors["a.k.output.vectors"]
    save_file(tensors, first)
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.from_pretrained(folder)
    assert "`a.q.matrix` is float32 (4, 4); it should be float32 (5, 5)" in str(caught.value)
    for name in ("a.down.order", "a.k.output.vectors"):
        assert f"`{name}` is missing in {first.name}" in str(caught.value)
    assert f"{first.name} has {first.stat().st_size:,} bytes; curvature.json says" in str(caught.value)
    assert str(caught.value).endswith("or calibrate again: `deltaguard calibrate someone/model -o STORE`.")
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(DeltaguardError, match="truncated"):
        CurvatureStore.from_pretrained(folder)


def test_a_saved_copy_is_the_same_store(tmp_path):
    store = written(tmp_path / "store", max_shard_bytes=A_Q + A_DOWN)
    store.save_pretrained(tmp_path / "copy")
    files = sorted(path.name for path in store.folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert all((tmp_path / "copy" / f).read_bytes() == (store.folder / f).read_bytes() for f in files)


def test_merging_adds_the_sums_and_factorises_them_anew(tmp_path):
    one = written(tmp_path / "one")
    more = tuple(replace(group, tokens=30) for group in GROUPS)
    new = Conversation("Who?", None, "Nobody.")
    changes = {"tokens": 30, "response_tokens": 9, "conversations": 2, "truncated": 0, "refusal_share": 1.0}
    changes |= {"conversations": 5, "look_alikes": 3}
    # Refusals were counted of one of its two harmful requests.
    changes["framed"] = 1
    two = written(tmp_path / "two", 1, groups=more, held_out=(HELD_OUT[1], new), **changes)
    merged = CurvatureStore.merge([one, two], tmp_path / "merged")
    a, b = sums(0), sums(1, more)
    for group in GROUPS:
        total = merge([a[group.name].inputs, b[group.name].inputs])
        assert total.tokens == 70
        torch.testing.assert_close(merged.hessian(group.name), normalise(total))
        torch.testing.assert_close(merged.input_spectrum(group.name).dense(), normalise(total))
        expected = unpack_factor(pack(group.name, total, dampening=0.02))
        torch.testing.assert_close(merged.factor(group.name).lower, expected.lower)
        for i, layer in enumerate(group.layers):
            gradients = a[group.name].outputs[i] + b[group.name].outputs[i]
            torch.testing.assert_close(merged.sums(group.name).outputs[i], gradients)
            torch.testing.assert_close(merged.output_spectrum(layer.tensor).dense(), gradients / 25)
    assert [group.tokens for group in merged.groups] == [70, 70, 70]
    assert merged.held_out == (*HELD_OUT, new)
    made = merged.provenance
    assert (made.conversations, made.tokens, made.response_tokens, made.truncated) == (9, 70, 25, 1)
    # Two harmful requests of four refused, and one of one.
    assert (made.look_alikes, made.harmful, made.framed) == (3, 6, 1)
    assert made.refusal_share == pytest.approx(3 / 5)
    assert made.conversations_sha256 not in {p.provenance.conversations_sha256 for p in (one, two)}


def test_stores_of_different_models_do_not_merge(tmp_path):
    one = written(tmp_path / "one")
    changes = {"fingerprint": "e" * 64, "template_sha256": "d" * 64, "dampening": 0.5, "dtype": "float16"}
    two = written(tmp_path / "two", groups=GROUPS[:2], **changes)
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.merge([one, two], tmp_path / "merged")
    for part in (
        "f" * 64,
        "e" * 64,
        "c" * 64,
        "d" * 64,
        "dampening: 0.02",
        "dtype: float32",
        "groups of layers differ",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_stores_that_are_cut_off_do_not_merge(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two", 1, **CUT_OFF)
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.merge([one, two], tmp_path / "merged")
    assert f"The store {two.folder} keeps the largest eigenpairs" in str(caught.value)
    assert "deltaguard calibrate someone/model -o STORE --rank full" in str(caught.value)
    assert str(one.folder) not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_store_cut_from_a_whole_one_is_the_one_that_calibration_would_have_written(tmp_path):
    limit = 200
    share = share_within(GROUPS, limit)
    assert 0 < share < 1
    cut = written(tmp_path / "whole").cut(tmp_path / "cut", limit=limit)
    expected = written(tmp_path / "expected", **CUT_OFF | {"rank_share": share})
    assert not cut.is_full
    for path in expected.folder.iterdir():
        assert (cut.folder / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(DeltaguardError, match="keeps the largest eigenpairs"):
        cut.cut(tmp_path / "again", limit=limit)
    assert not (tmp_path / "again").exists()


def test_pushing_uploads_the_stores_own_files(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, *args, **options):
            calls.append((args, options))

        def repo_info(self, repo_id):
            return SimpleNamespace(private=True)

        def upload_folder(self, **options):
            calls.append(options)
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(store_module, "HfApi", Hub)
    store = written(tmp_path / "store")
    assert store.push_to_hub("me/store", private=True, token=None) == "https://hub/commit"
    assert calls[:2] == [None, (("me/store",), {"private": True, "exist_ok": True})]
    assert calls[2]["folder_path"] == store.folder
    assert set(calls[2]["allow_patterns"]) == {path.name for path in store.folder.iterdir()}


@pytest.mark.parametrize(("share", "warned"), [(0.49, True), (0.5, False), (None, False)])
def test_a_store_says_whether_its_model_refuses(share, warned):
    assert bool(provenance(refusal_share=share).warnings) == warned
