"""Whole checkpoints of the peers, read back and compared with their equations in float64."""

import os
import shutil
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltaguard import RestoreConfig, restore
from deltaguard.errors import DeltaguardError
from deltaguard.methods import METHODS
from deltaguard.methods.method import Layer
from deltaguard.methods.safe_merge import MERGED_SHARE
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.restore import UnchangedError
from models import perturbed, save, tiny_model
from once import RUN
from pairs import save_adapter, weights


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@cache
def family(name: str = "llama") -> dict[str, Path]:
    """An aligned model and its relatives, in shards; tests must not write to the folders."""
    root = Path(mkdtemp(prefix=f"deltaguard-peers-{name}-", dir=os.environ[RUN]))
    model = tiny_model(name)
    folders = {"aligned": save(model, root / "aligned", max_shard_size="40KB")}
    for seed, role in enumerate(("finetuned", "unaligned", "pretrained", "safe"), start=1):
        folders[role] = save(perturbed(model, 0.05, seed), root / role, max_shard_size="40KB")
    return folders


PEERS = [name for name, method in METHODS.items() if not method.needs and method.ladder]


def write_peer(method, *, output, strength, aligned, finetuned, progress=None, **models):
    """Restore as the papers do: what is no linear layer stays fine-tuned where a method leaves it alone."""
    known = METHODS.get(method)
    needed = {role: models[role] for role in (known.models if known else ()) if models.get(role)}
    options = {"method": method, "strength": strength, **needed}
    if known and not known.everywhere:
        options["other_params"] = "finetuned"
    try:
        config = RestoreConfig(**options)
    except ValueError as error:
        raise DeltaguardError(str(error)) from error
    restore(aligned, finetuned, output, config=config, progress=progress)
    return output


def write(method, strength, output, **changed):
    models = {**family(), **changed}
    return weights(write_peer(method, output=output, strength=strength, **models))


def in_block(name, tensor):
    return ".layers." in name and tensor.ndim == 2


def check_close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_wise_ft_and_resta_edit_every_tensor(tmp_path):
    aligned, tuned, unaligned = (weights(family()[role]) for role in ("aligned", "finetuned", "unaligned"))
    mixed = write("wise-ft", 0.25, tmp_path / "wise-ft")
    added = write("resta", 0.4, tmp_path / "resta")
    assert mixed.keys() == added.keys() == tuned.keys()
    for name in tuned:
        a, f, u = (each[name].double() for each in (aligned, tuned, unaligned))
        check_close(mixed[name], 0.75 * a + 0.25 * f)
        check_close(added[name], f + 0.6 * (a - u))


def test_the_others_edit_the_linear_layers_of_the_blocks_alone(tmp_path):
    every = {role: weights(folder) for role, folder in family().items()}
    strength = 0.28
    projected = write("safe-lora", strength, tmp_path / "safe-lora")
    merged = write("safe-merge", strength, tmp_path / "safe-merge")
    edited = 0
    for name, tensor in every["finetuned"].items():
        a, f, p, s = (every[role][name].double() for role in ("aligned", "finetuned", "pretrained", "safe"))
        if in_block(name, tensor):
            moved = (a - p) @ (a - p).T @ (f - a) / torch.linalg.norm(a - p)
            cosine = torch.nn.functional.cosine_similarity(moved.flatten(), (f - a).flatten(), dim=0)
            if cosine < 1 - strength:
                edited += 1
                check_close(projected[name], a + moved)
                check_close(merged[name], a + MERGED_SHARE * (f - a) + (1 - MERGED_SHARE) * (s - a))
                continue
        assert torch.equal(projected[name], tensor)
        assert torch.equal(merged[name], tensor)
    assert 0 < edited < sum(in_block(*item) for item in every["finetuned"].items())


@pytest.mark.parametrize("name", PEERS)
def test_strength_one_is_the_finetuned_model_exactly(tmp_path, name):
    every = {role: weights(folder) for role, folder in family().items()}
    method = METHODS[name]
    for tensor in (t for t in every["finetuned"] if t.endswith("_proj.weight")):
        others = {role: every[role][tensor] for role in method.models}
        layer = Layer(every["aligned"][tensor], every["finetuned"][tensor], others=others)
        solution = method.prepare(layer, method.options()).at(1.0)
        assert torch.equal(solution.weight, every["finetuned"][tensor])
        assert (solution.kept_energy, solution.utility_loss) == (1, 0)
    with pytest.raises(UnchangedError, match="changes no tensor"):
        write(name, 1, tmp_path / "out")


@pytest.mark.parametrize("method", PEERS)
def test_more_strength_leaves_less_to_lose(tmp_path, method):
    tuned, peer = weights(family()["finetuned"]), METHODS[method]
    lowest = peer.strengths(peer.options()).low

    def lost(strength):
        try:
            found = write(method, strength, tmp_path / str(strength))
        except UnchangedError:
            return 0
        return sum(float((found[name] - tuned[name]).double().square().sum()) for name in tuned)

    losses = [lost(strength) for strength in sorted({lowest, *peer.ladder})]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    loadable = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(lowest))
    assert loadable.config.model_type == "llama"


def test_strength_zero_of_wise_ft_is_the_aligned_model(tmp_path):
    aligned = weights(family()["aligned"])
    assert all(
        torch.equal(tensor, aligned[name]) for name, tensor in write("wise-ft", 0, tmp_path / "o").items()
    )


def test_adapters_and_bfloat16(tmp_path):
    """The fine-tuned and the unaligned model as LoRA adapters; the output is the aligned model's shape."""
    aligned = save(tiny_model("llama"), tmp_path / "aligned", dtype=torch.bfloat16)
    full = {}
    for seed, role in enumerate(("finetuned", "unaligned")):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        with warnings.catch_warnings():
            # peft asks transformers for a property under its old name.
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(model, config)
        wrapped.save_pretrained(tmp_path / role)
        full[role] = wrapped.merge_and_unload().state_dict()
    models = {"aligned": aligned, "finetuned": tmp_path / "finetuned", "unaligned": tmp_path / "unaligned"}
    found = weights(write_peer("resta", output=tmp_path / "out", strength=0.5, **models))
    for name, base in weights(aligned).items():
        expected = full["finetuned"][name] + 0.5 * (base.float() - full["unaligned"][name])
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), expected, rtol=2**-7, atol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_resta_adds_its_vector_to_what_fine_tuning_left_alone_too(tmp_path):
    folders, aligned = family(), weights(family()["aligned"])
    save_adapter(folders["aligned"], tmp_path / "finetuned", ["q_proj"])
    found = write("resta", 0.5, tmp_path / "out", finetuned=tmp_path / "finetuned")
    unaligned = weights(folders["unaligned"])
    for name in (n for n in aligned if "q_proj" not in n):
        a, u = aligned[name].double(), unaligned[name].double()
        check_close(found[name], a + 0.5 * (a - u))
    # Where the two adapters have no layer in common, the vector is all that changes anything.
    save_adapter(folders["aligned"], tmp_path / "other", ["v_proj"])
    other = {"finetuned": tmp_path / "finetuned", "unaligned": tmp_path / "other"}
    added = write("resta", 0.5, tmp_path / "added", **other)
    assert not torch.equal(*(each["model.layers.0.self_attn.v_proj.weight"] for each in (added, aligned)))


def test_gpt2_is_projected_on_its_outputs(tmp_path):
    """Its matrices are stored (in, out): the subspace of V is that of V transposed."""
    every = {role: weights(folder) for role, folder in family("gpt2").items()}
    found = weights(write_peer("safe-lora", output=tmp_path / "out", strength=0, **family("gpt2")))
    name = next(name for name in found if name.endswith("h.1.mlp.c_fc.weight"))
    a, f, p = (every[role][name].double().T for role in ("aligned", "finetuned", "pretrained"))
    check_close(found[name].T, a + (a - p) @ (a - p).T @ (f - a) / torch.linalg.norm(a - p))


def test_new_rows_of_the_vocabulary_stay_finetuned(tmp_path):
    longer = perturbed(tiny_model("llama"), 0.05)
    longer.resize_token_embeddings(400, mean_resizing=False)
    tuned = save(longer, tmp_path / "finetuned")
    found = write("wise-ft", 0, tmp_path / "out", finetuned=tuned)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(found[embedding][:384], weights(family()["aligned"])[embedding])
    assert torch.equal(found[embedding][384:], weights(tuned)[embedding][384:])


def test_an_interrupted_run_goes_on(tmp_path):
    seen = []

    def failing(event):
        seen.append(event)
        if len(seen) == 12:
            raise KeyboardInterrupt

    models = {role: family()[role] for role in ("aligned", "finetuned")}
    with pytest.raises(KeyboardInterrupt):
        write_peer("wise-ft", output=tmp_path / "out", strength=0.5, progress=failing, **models)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    config = RestoreConfig(method="wise-ft", strength=0.5, resume=True)
    restore(*models.values(), tmp_path / "out", config=config, progress=seen.append)
    found, expected = weights(tmp_path / "out"), write("wise-ft", 0.5, tmp_path / "other")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(seen) < 12 + len(expected)


def test_the_same_job_is_known_whatever_its_models_are_called(tmp_path, monkeypatch):
    models, out = family(), tmp_path / "out"

    def restored(**roles):
        config = RestoreConfig(method="safe-merge", strength=0.28, resume=True, **roles)
        return restore(models["aligned"], models["finetuned"], out, config=config)

    first = restored(safe=models["safe"], pretrained=models["pretrained"])
    monkeypatch.chdir(models["safe"].parent)
    assert restored(safe="./safe", pretrained="pretrained") == first
    assert restored(models={"pretrained": Path("pretrained"), "safe": "safe"}) == first
    with pytest.raises(DeltaguardError, match="another job"):
        restored(safe="pretrained", pretrained="safe")


def test_unfit_requests_are_refused(tmp_path):
    def refusal(method="resta", strength=0.5, **changed):
        with pytest.raises(DeltaguardError) as error:
            write(method, strength, tmp_path / "out", **changed)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "there are kfac, ridge, greedy, published, interpolate, wise-ft, resta" in refusal("dare")
    assert "must lie in [-1, 1]" in refusal(strength=1.5)
    assert "must lie in [0, 1]" in refusal("safe-lora", strength=-0.1)
    assert "safe-merge needs safe (the aligned model after fine-tuning on safety data" in refusal(
        "safe-merge", safe=None
    )
    other = save(tiny_model("llama", intermediate_size=40), tmp_path / "narrow")
    assert "(48, 32) in the aligned model and (40, 32) in the unaligned one" in refusal(unaligned=other)
    missing = shutil.copytree(save(tiny_model("llama"), tmp_path / "single"), tmp_path / "missing")
    tensors = load_file(missing / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, missing / "model.safetensors")
    assert "`model.norm.weight` is in the aligned model and not in the unaligned one" in refusal(
        unaligned=missing
    )


@pytest.mark.parametrize("name", PEERS)
def test_a_plan_counts_what_is_read_of_every_model(name, tmp_path):
    models, method = family(), METHODS[name]
    config = RestoreConfig(method=name, strength=0.5, **{role: models[role] for role in method.models})
    plan = plan_restore(models["aligned"], models["finetuned"], tmp_path / "out", config=config)
    own = weights(models["aligned"])
    restored = {n: t for n, t in own.items() if method.everywhere or in_block(n, t)}
    assert plan.restored == len(restored)
    read = 2 * sum(t.nbytes for t in own.values()) + len(method.models) * sum(
        t.nbytes for t in restored.values()
    )
    assert plan.read_bytes == read


def test_the_registry_is_sound():
    for method in METHODS.values():
        strengths = method.strengths(method.options())
        # Without a ladder a method is not benched.
        assert len(method.ladder) in (0, 7)
        assert all(strengths.low <= strength <= strengths.high for strength in method.ladder)
        assert list(method.ladder) == sorted(set(method.ladder))


def test_an_output_does_not_lie_in_a_further_model(tmp_path):
    made = family()
    unaligned = tmp_path / "unaligned"
    shutil.copytree(made["unaligned"], unaligned)
    config = RestoreConfig(method="resta", strength=0.5, unaligned=str(unaligned), overwrite=True)
    for output in (unaligned, unaligned / "inside"):
        with pytest.raises(DeltaguardError, match="input"):
            restore(made["aligned"], made["finetuned"], output, config=config)
    assert contents_of(unaligned) == contents_of(made["unaligned"])


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
