"""Whatever is wrong with a store is said when it is opened: what opens is valid."""

import json
import math
import shutil
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaguard.curvature.store import CurvatureStore
from deltaguard.errors import DeltaguardError
from stores import CUT_OFF, GROUPS, written

KINDS = {"whole": {}, "cut off": CUT_OFF}
MANIFEST = "curvature.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    return {
        kind: written(root / kind, max_shard_bytes=1, **changes).folder for kind, changes in KINDS.items()
    }


@pytest.fixture
def copy(originals, tmp_path):
    """Makes a store of either kind, one group a file."""
    return lambda kind: shutil.copytree(originals[kind], tmp_path / "store")


def refusal(folder):
    with pytest.raises(DeltaguardError) as caught:
        CurvatureStore.from_pretrained(folder)
    return str(caught.value)


def edit_manifest(folder, change):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def seal(folder):
    """Write what the manifest says of the files anew, so that the numbers in them are all that is wrong."""

    def change(manifest):
        for entry in manifest["files"]:
            content = (folder / entry["name"]).read_bytes()
            entry |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}

    edit_manifest(folder, change)


def edit_tensor(folder, name, change):
    """Replace a tensor in its file."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    seal(folder)


def entry(value, *place):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def copied_column(vectors):
    vectors[:, 1] = vectors[:, 0]
    return vectors


SPECTRUM = {
    "vectors that are too long": ("vectors", lambda x: x * 60_000, "not orthonormal"),
    "vectors that are a little too long": ("vectors", lambda x: x * 1.02, "not orthonormal"),
    "one vector that is zero": ("vectors", entry(0.0, slice(None), 1), "not orthonormal"),
    "one vector twice": ("vectors", copied_column, "not orthonormal"),
    "NaN in a vector": ("vectors", entry(torch.nan, 0, 0), "1 entries that are NaN or infinite"),
    "infinity in a vector": ("vectors", entry(torch.inf, 2, 1), "1 entries that are NaN or infinite"),
    "vectors in another precision": ("vectors", lambda x: x.double(), "is float64 ("),
    "vectors as integers": ("vectors", lambda x: x.to(torch.int16), "is int16 ("),
    "vectors the other way": ("vectors", lambda x: torch.cat([x, x], 1)[:4], "(4, "),
    "eigenvalues that are negative": ("values", lambda x: -x, "a negative eigenvalue"),
    "one eigenvalue that is negative": ("values", entry(-1e-3, -1), "a negative eigenvalue, -0.001"),
    "eigenvalues of zero": ("values", lambda x: x * 0, "all zero"),
    "eigenvalues that rise": ("values", lambda x: x.flip(0), "do not fall"),
    "NaN among the eigenvalues": ("values", entry(torch.nan, 1), "NaN or infinite"),
    "infinity among the eigenvalues": ("values", entry(torch.inf, 0), "NaN or infinite"),
    "eigenvalues that are integers": ("values", lambda x: x.int(), "is int32 ("),
    "eigenvalues that are too large": ("values", lambda x: x * 100, "has the mean"),
    "eigenvalues that are too small": ("values", lambda x: x / 100, "has the mean|stands for the other"),
}
WHOLE = {
    "NaN in a sum": ("a.down.matrix", entry(torch.nan, 0, 1), "1 entries that are NaN"),
    "NaN in a factor": ("a.down.matrix", entry(torch.nan, 1, 0), "1 entries that are NaN"),
    "a negative square": ("a.down.matrix", entry(-1.0, 2, 2), "a negative sum of squares, -1"),
    "no squares": ("a.down.matrix", lambda x: x.triu(1), "all zero"),
    "a negative square of gradients": ("a.down.output.total", entry(-2.0, 0, 0), "sum of squares, -2"),
    "infinity in a sum of gradients": ("a.down.output.total", entry(torch.inf, 0, 1), "1 entries"),
    "a factor with zero on its diagonal": ("a.down.diagonal", entry(0.0, 3), "holds 0; all must be above 0"),
    "a factor with a negative diagonal": ("a.down.diagonal", lambda x: -x, "all must be above 0"),
    "NaN on the diagonal of a factor": ("a.down.diagonal", entry(torch.nan, 3), "1 entries that are NaN"),
    "a negative inverse": ("a.down.inverse_diagonal", entry(-1.0, 3), "holds -1; all must be above 0"),
    "a column twice": ("a.down.order", entry(0, slice(0, 2)), "is no order of 8 columns"),
    "a column that there is not": ("a.down.order", entry(8, 0), "is no order of 8 columns"),
    "an order of long integers": (
        "a.down.order",
        lambda x: x.long(),
        "is int64 (8,); it should be int32",
    ),
}


@pytest.mark.parametrize("matrix", ["input", "output"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", SPECTRUM)
def test_a_spectrum_that_is_none_is_refused(copy, kind, damage, matrix):
    part, change, problem = SPECTRUM[damage]
    name = f"a.down.{matrix}.{part}"
    folder = copy(kind)
    edit_tensor(folder, name, change)
    message = refusal(folder)
    assert f"`{name}` " in message
    assert any(each in message for each in problem.split("|"))
    assert message.endswith(
        "Copy it again, or calibrate again: `deltaguard calibrate someone/model -o STORE`."
    )
    assert "sha256" not in message


@pytest.mark.parametrize("damage", WHOLE)
def test_sums_and_factors_that_are_none_are_refused(copy, damage):
    name, change, problem = WHOLE[damage]
    folder = copy("whole")
    edit_tensor(folder, name, change)
    message = refusal(folder)
    assert f"`{name}` " in message
    assert problem in message


def nested(manifest, *path):
    for key in path:
        manifest = manifest[key]
    return manifest


def put(value, *path):
    def change(manifest):
        nested(manifest, *path[:-1])[path[-1]] = value

    return change


def twice(*path):
    def change(manifest):
        nested(manifest, *path).append(nested(manifest, *path)[0])

    return change


FIRST_FILE, FIRST_SHARD = ("files", 0, "name"), ("groups", 0, "shard")
MANIFESTS = {
    "a tail that is NaN": (put(math.nan, "groups", 0, "tails", 0), "`groups.0.tails.0`"),
    "a tail that is infinite": (put(math.inf, "groups", 0, "tails", 0), "`groups.0.tails.0`"),
    "a negative tail": (put(-1e-9, "groups", 0, "tails", 1), "`groups.0.tails.1`"),
    "a tail above what is kept": (put(50.0, "groups", 1, "tails", 0), "the tail that stands for"),
    "a mean that is NaN": (put(math.nan, "groups", 0, "means", 0), "`groups.0.means.0`"),
    "a negative mean": (put(-1.0, "groups", 0, "means", 2), "`groups.0.means.2`"),
    "a mean that is too large": (put(1e9, "groups", 1, "means", 1), "has the mean 1e+09"),
    "a mean that is too small": (put(0.0, "groups", 1, "means", 1), "has the mean 0"),
    "a tail too many": (twice("groups", 0, "tails"), "`a.q` has 4 tails for 3 matrices"),
    "a mean too few": (lambda m: m["groups"][0]["means"].pop(), "`a.q` has 2 means for 3 matrices"),
    "no tokens": (put(0, "groups", 0, "group", "tokens"), "`groups.0.group.tokens`"),
    "other tokens": (
        put(4, "groups", 0, "group", "tokens"),
        "summed over 4 tokens, the store over 40",
    ),
    "no tokens at all": (put(0, "provenance", "tokens"), "`provenance.tokens`"),
    "no response tokens": (put(-3, "provenance", "response_tokens"), "`provenance.response_tokens`"),
    "no inputs": (put(0, "groups", 0, "group", "in_features"), "`groups.0.group.in_features`"),
    "no outputs": (put(0, "groups", 0, "group", "layers", 0, "out_features"), "layers.0.out_features`"),
    "no layers": (put([], "groups", 0, "group", "layers"), "`groups.0.group.layers`"),
    "no groups": (put([], "groups"), "`groups`"),
    "a group twice": (twice("groups"), "the group `a.q` is there 2 times"),
    "a layer twice": (
        lambda m: m["groups"][2]["group"]["layers"].append(m["groups"][0]["group"]["layers"][1]),
        "the layer `a.k.weight` is there 2 times",
    ),
    "a tensor of two things": (
        put("a.down.output.x", "groups", 0, "group", "layers", 1, "tensor"),
        "`a.down.output.x.output.values` is missing",
    ),
    "a file twice": (twice("files"), "the file `curvature-00001-of-00003.safetensors` is there 2 times"),
    "a file too few": (
        lambda m: m["files"].pop(),
        "00003-of-00003.safetensors is in no list of files",
    ),
    "a file too many": (
        lambda m: m["files"].append({**m["files"][0], "name": "more.safetensors"}),
        "the file more.safetensors holds no group",
    ),
    "a file that is not there": (
        lambda m: (
            put("no.safetensors", "files", 0, "name")(m),
            put("no.safetensors", "groups", 0, "shard")(m),
        ),
        "the file no.safetensors is missing",
    ),
    "groups in each other's files": (
        put("curvature-00002-of-00003.safetensors", "groups", 2, "shard"),
        "curvature-00003-of-00003.safetensors holds no group",
    ),
    "no share": (put(0.0, "provenance", "rank_share"), "`provenance.rank_share`"),
    "a share that is NaN": (put(math.nan, "provenance", "rank_share"), "`provenance.rank_share`"),
    "a share above 1": (put(1.5, "provenance", "rank_share"), "`provenance.rank_share`"),
    "a share of another store": (put(0.9, "provenance", "rank_share"), "it should be"),
    "no dampening": (put(0, "provenance", "dampening"), "`provenance.dampening`"),
    "look-alikes alone": (put(4, "provenance", "look_alikes"), "all 4 conversations are look-alikes"),
    "refusals above 1": (put(2.0, "provenance", "refusal_share"), "`provenance.refusal_share`"),
    "a field more": (put(1, "provenance", "more"), "`provenance.more`"),
}
OF_A_WHOLE = {
    "no damping": (put(0.0, "groups", 0, "damping"), "`groups.0.damping`"),
    "damping that is NaN": (put(math.nan, "groups", 0, "damping"), "`groups.0.damping`"),
    "infinite damping": (put(math.inf, "groups", 0, "damping"), "`groups.0.damping`"),
    "dampening above 1": (put(2.0, "groups", 0, "dampening"), "`groups.0.dampening`"),
    "damping that is absent": (
        put(None, "groups", 0, "damping"),
        "the damping None in a store of rank",
    ),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_that_cannot_be_is_refused(copy, damage):
    change, problem = MANIFESTS[damage]
    folder = copy("cut off")
    edit_manifest(folder, change)
    message = refusal(folder)
    assert problem in message
    assert "alibrate again" in message


@pytest.mark.parametrize("damage", OF_A_WHOLE)
def test_a_manifest_of_a_whole_store_that_cannot_be_is_refused(copy, damage):
    change, problem = OF_A_WHOLE[damage]
    folder = copy("whole")
    edit_manifest(folder, change)
    assert problem in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../other/curvature-00001-of-00003.safetensors",
        "/etc/curvature.safetensors",
        "sub/curvature.safetensors",
        "..",
        ".safetensors",
        "sub\\curvature.safetensors",
        "curvature.safetensors\n",
        "",
    ],
)
def test_names_of_files_lead_nowhere_else(copy, tmp_path, name):
    folder = copy("cut off")
    shutil.copytree(folder, tmp_path / "other")
    for place in (FIRST_FILE, FIRST_SHARD):
        edit_manifest(folder, put(name, *place))
    assert "`files.0.name`" in refusal(folder)


def test_a_link_out_of_the_folder_is_refused_but_for_the_hubs_own(copy, tmp_path):
    folder = copy("cut off")
    file = folder / "curvature-00001-of-00003.safetensors"
    elsewhere = tmp_path / "elsewhere" / "blob"
    elsewhere.parent.mkdir()
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert f"{file.name} is a link to {elsewhere}, outside the store's folder" in refusal(folder)
    # The Hub's cache has the files of each snapshot as links to one place.
    snapshot = tmp_path / "models--me--store" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--store" / "blobs"
    blobs.mkdir(parents=True)
    file.unlink()
    elsewhere.rename(file)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (blobs / path.name[::-1]).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name[::-1]}")
    assert CurvatureStore.from_pretrained(snapshot).groups == GROUPS


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_changed_byte_is_seen_by_the_files_hash(copy):
    folder = copy("cut off")
    path = folder / "curvature-00002-of-00003.safetensors"
    known = sha256(path.read_bytes()).hexdigest()
    flip_a_bit(path)
    message = refusal(folder)
    assert f"{path.name} is not the file that was written" in message
    assert known in message
    assert sha256(path.read_bytes()).hexdigest() in message


def test_a_file_of_another_store_is_seen(copy, tmp_path):
    folder = copy("cut off")
    other = written(tmp_path / "other", 1, max_shard_bytes=1, **CUT_OFF).folder
    name = "curvature-00002-of-00003.safetensors"
    shutil.copyfile(other / name, folder / name)
    assert f"{name} is not the file that was written" in refusal(folder)


def test_a_tensor_that_does_not_belong_in_a_file_is_refused(copy):
    folder = copy("cut off")
    path = folder / "curvature-00002-of-00003.safetensors"
    save_file({**load_file(path), "a.q.input.values": torch.ones(2), "more": torch.ones(1)}, path)
    seal(folder)
    message = refusal(folder)
    for name in ("a.q.input.values", "more"):
        assert f"`{name}` does not belong in {path.name}" in message


def test_all_that_is_wrong_with_the_files_is_in_one_message(copy):
    folder = copy("whole")
    first_file, second, third = sorted(folder.glob("*.safetensors"))
    edit_tensor(folder, "b.q.input.values", lambda x: -x)
    edit_tensor(folder, "b.q.order", lambda x: x * 0)
    flip_a_bit(third)
    second.unlink()
    first_file.write_bytes(first_file.read_bytes()[:-4])
    message = refusal(folder)
    assert message.startswith(f"The store {folder} is damaged:\n- ")
    for problem in (
        f"{first_file.name} is truncated",
        f"the file {second.name} is missing",
        "`b.q.input.values` holds a negative eigenvalue",
        "`b.q.order` is no order of 5 columns",
        f"{third.name} is not the file that was written",
    ):
        assert problem in message
    assert message.count("alibrate again") == 1


# While it is open


def test_an_opened_store_reads_the_files_that_were_checked(copy, tmp_path):
    folder = copy("whole")
    store = CurvatureStore.from_pretrained(folder)
    before = [store.hessian(group.name) for group in GROUPS]
    assert store.changes() == []
    other = written(tmp_path / "other", 1, max_shard_bytes=1).folder
    first_file, second, third = sorted(folder.glob("*.safetensors"))
    (other / first_file.name).replace(first_file)
    second.unlink()
    assert all(torch.equal(store.hessian(g.name), H) for g, H in zip(GROUPS, before, strict=True))
    assert [change.split(" ")[0].rstrip(":") for change in store.changes()] == [str(first_file), str(second)]
    with third.open("ab") as file:
        file.write(b"more")
    assert any(change.startswith(str(third)) for change in store.changes())


def test_a_store_that_was_changed_is_not_copied(copy, tmp_path):
    folder = copy("cut off")
    store = CurvatureStore.from_pretrained(folder)
    flip_a_bit(folder / "curvature-00002-of-00003.safetensors")
    for publish in (lambda: store.save_pretrained(tmp_path / "copy"), lambda: store.push_to_hub("me/store")):
        with pytest.raises(DeltaguardError, match=r"00002-of-00003\.safetensors was written to"):
            publish()
    assert not (tmp_path / "copy").exists()
