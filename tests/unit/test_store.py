"""CurvatureStore on disk: what is written is read, or nothing is there."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaguard.curvature import store as store_module
from deltaguard.curvature.moments import accumulate, empty_moment, merge, normalise, pack, unpack_factor
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Group, Layer, Provenance, save_tensors, write_store
from deltaguard.errors import DeltaguardError

GROUPS = (
    Group("a.q", 5, 40, (Layer("a.q.weight", transposed=False), Layer("a.k.weight", transposed=False))),
    Group("a.down", 8, 40, (Layer("a.down.weight", transposed=True),)),
    Group("b.q", 5, 40, (Layer("b.q.weight", transposed=False),)),
)


def moments(seed, groups=GROUPS):
    generator = torch.Generator().manual_seed(seed)
    inputs = {g.name: torch.randn(g.tokens, g.in_features, generator=generator) for g in groups}
    return {name: accumulate(empty_moment(x.shape[1]), x) for name, x in inputs.items()}


def provenance(**changes):
    values = {
        "fingerprint": "f" * 64,
        "prompts_sha256": "0" * 64,
        "max_length": 512,
        "max_new_tokens": 64,
        "batch_size": 16,
        "dtype": "float32",
        "dampening": 0.02,
        "aligned": "someone/model",
        "conversations_sha256": "1" * 64,
        "conversations": 4,
        "tokens": 40,
        "truncated": 1,
        "system_role": "template",
        "refusal_share": 0.5,
        "uncovered": ("a.conv.weight",),
        "versions": {"torch": "2"},
    }
    return Provenance(**{**values, **changes})


def written(folder, seed=0, *, groups=GROUPS, max_shard_bytes=10**9, **changes):
    sums = moments(seed, groups)
    write_store(
        folder,
        provenance(**changes),
        groups,
        lambda group: pack(group.name, sums[group.name], dampening=0.02),
        max_shard_bytes=max_shard_bytes,
    )
    return CurvatureStore.from_pretrained(folder)


def equal_factors(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("order", "lower", "inverse_diagonal"))


def test_what_was_written_is_read_exactly(tmp_path):
    store = written(tmp_path / "store")
    assert store.groups == GROUPS
    assert store.provenance == provenance()
    for name, moment in moments(0).items():
        assert torch.equal(store.hessian(name), normalise(moment))
        expected = unpack_factor(pack(name, moment, dampening=0.02))
        assert equal_factors(store.factor(name), expected)
        assert (store.factor(name).damping, store.factor(name).dampening) == (expected.damping, 0.02)


def test_layers_are_found_by_their_tensors(tmp_path):
    store = written(tmp_path / "store")
    assert store.group_of("a.k.weight") == GROUPS[0]
    assert store.group_of("a.down.weight").layers[0].transposed
    assert store.group_of("lm_head.weight") is None
    with pytest.raises(DeltaguardError, match=r"has no group `c\.q`; it has 3"):
        store.hessian("c.q")


def test_shards_hold_whole_groups_and_are_read_on_demand(tmp_path):
    # A group of 5 inputs takes 160 bytes and one of 8 takes 352.
    store = written(tmp_path / "store", max_shard_bytes=520)
    shards = sorted(path.name for path in store.folder.glob("*.safetensors"))
    assert shards == [f"curvature-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert {name.rpartition(".")[0] for name in load_file(store.folder / shards[0])} == {"a.q", "a.down"}
    (store.folder / shards[1]).unlink()
    assert store.hessian("a.down").shape == (8, 8)
    with pytest.raises(DeltaguardError, match="cannot be read"):
        store.hessian("b.q")


def test_a_group_larger_than_a_shard_has_its_own(tmp_path):
    store = written(tmp_path / "store", max_shard_bytes=1)
    assert len(list(store.folder.glob("*.safetensors"))) == 3
    assert torch.equal(store.hessian("b.q"), normalise(moments(0)["b.q"]))


def test_a_run_that_fails_leaves_nothing(tmp_path):
    def fail(group):
        if group.name == "b.q":
            raise DeltaguardError("no")
        return pack(group.name, moments(0)[group.name], dampening=0.02)

    with pytest.raises(DeltaguardError, match="no"):
        write_store(tmp_path / "store", provenance(), GROUPS, fail, max_shard_bytes=1)
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


def test_a_folder_without_manifest_is_no_store(tmp_path):
    store = written(tmp_path / "store")
    (store.folder / "curvature.json").unlink()
    with pytest.raises(DeltaguardError, match=r"holds no curvature\.json"):
        CurvatureStore.from_pretrained(store.folder)
    with pytest.raises(DeltaguardError, match="no folder"):
        CurvatureStore.from_pretrained(tmp_path / "absent")


def test_a_manifest_of_another_version_is_refused(tmp_path):
    path = written(tmp_path / "store").folder / "curvature.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["schema_version"] = 2
    del manifest["provenance"]["dtype"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DeltaguardError, match=r"schema_version: .*\n.*provenance\.dtype: Field required"):
        CurvatureStore.from_pretrained(path.parent)


def test_damaged_shards_are_seen_before_they_are_needed(tmp_path):
    folder = written(tmp_path / "store", max_shard_bytes=520).folder
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    tensors["a.q.matrix"] = torch.zeros(4, 4)
    del tensors["a.down.order"]
    save_file(tensors, first)
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.from_pretrained(folder)
    assert "`a.q.matrix` is (4, 4); it should be (5, 5)" in str(caught.value)
    assert "`a.down.order` is missing; it should be (8,)" in str(caught.value)
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(DeltaguardError, match="truncated"):
        CurvatureStore.from_pretrained(folder)


def test_a_saved_copy_is_the_same_store(tmp_path):
    store = written(tmp_path / "store", max_shard_bytes=520)
    store.save_pretrained(tmp_path / "copy")
    files = sorted(path.name for path in store.folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert all((tmp_path / "copy" / f).read_bytes() == (store.folder / f).read_bytes() for f in files)


def test_merging_adds_the_sums_and_factorises_them_anew(tmp_path):
    one = written(tmp_path / "one")
    more = tuple(replace(group, tokens=30) for group in GROUPS)
    two = written(
        tmp_path / "two", 1, groups=more, tokens=30, conversations=2, truncated=0, refusal_share=1.0
    )
    merged = CurvatureStore.merge([one, two], tmp_path / "merged")
    a, b = moments(0), moments(1, more)
    for name in a:
        total = merge([a[name], b[name]])
        assert total.tokens == 70
        torch.testing.assert_close(merged.hessian(name), normalise(total))
        expected = unpack_factor(pack(name, total, dampening=0.02))
        torch.testing.assert_close(merged.factor(name).lower, expected.lower)
    assert [group.tokens for group in merged.groups] == [70, 70, 70]
    made = merged.provenance
    assert (made.conversations, made.tokens, made.truncated) == (6, 70, 1)
    assert made.refusal_share == pytest.approx(4 / 6)
    assert made.conversations_sha256 not in {p.provenance.conversations_sha256 for p in (one, two)}


def test_stores_of_different_models_do_not_merge(tmp_path):
    one = written(tmp_path / "one")
    two = written(tmp_path / "two", groups=GROUPS[:2], fingerprint="e" * 64, dampening=0.5)
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.merge([one, two], tmp_path / "merged")
    for part in ("f" * 64, "e" * 64, "dampening: 0.02", "groups of layers differ"):
        assert part in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_pushing_uploads_the_stores_own_files(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, *args, **options):
            calls.append((args, options))

        def upload_folder(self, **options):
            calls.append(options)
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(store_module, "HfApi", Hub)
    store = written(tmp_path / "store")
    assert store.push_to_hub("me/store", private=True, token=None) == "https://hub/commit"
    assert calls[:2] == [None, (("me/store",), {"private": True, "exist_ok": True})]
    assert calls[2]["folder_path"] == store.folder
    assert set(calls[2]["allow_patterns"]) == {path.name for path in store.folder.iterdir()}
