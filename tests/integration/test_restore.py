"""`restore` end to end on tiny models of every architecture."""

import json
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from crossed import in_turn
from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore, verify
from deltaguard.chat.framings import FRAMINGS
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME, RestoreReport
from deltaguard.restoration.beforehand import front_matter
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.job import cache_folder, default_store_folder
from deltaguard.solvers import greedy, kfac, published, spectrum
from pairs import CONVERSATIONS, pair, save_adapter, weights

HALF = RestoreConfig(strength=0.5)


GREEDY = RestoreConfig(method="greedy", strength=0.5)


def expected_layers(config, report, store, aligned, finetuned):
    """What each layer's weight should be, (out, in), from the store's raw sums in float64."""

    def priced(matrix):
        return spectrum(matrix.double()).floored().dense()

    for group in store.groups:
        H, sums = store.hessian(group.name), store.sums(group.name)
        for layer, total in zip(group.layers, sums.outputs, strict=True):
            a, f = aligned[layer.tensor], finetuned[layer.tensor]
            a, f = (a.T, f.T) if layer.transposed else (a, f)
            G = total.double() / store.provenance.response_tokens
            if config.method == "greedy":
                solution = greedy(a, f, H, strength=0.5)
            else:
                G = priced(G) if config.method == "kfac" else G.trace() / len(G) * torch.eye(len(G)).double()
                solution = kfac(a.double(), f.double(), priced(H), G, mu=report.mu)
            found = solution.weight
            if config.method == "kfac":
                leaning = store.leaning(layer.key)
                unit = leaning.up.double() @ leaning.down.double()
                unit /= unit.norm()
                found = found - ((found - a.double()) * unit).sum() * unit
            yield layer, found


@pytest.mark.parametrize(
    ("name", "config"), in_turn(models.DENSE, [HALF, RestoreConfig(method="ridge", strength=0.5), GREEDY])
)
def test_every_layer_is_what_the_solver_gives_and_the_model_loads(name, config, tmp_path):
    made = pair(name)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.whole_store, config=config)
    aligned, finetuned, restored = (weights(f) for f in (made.aligned, made.finetuned, tmp_path / "out"))
    store = CurvatureStore.from_pretrained(made.whole_store)
    assert len(report.layers) == sum(len(group.layers) for group in store.groups)
    for layer, expected in expected_layers(config, report, store, aligned, finetuned):
        found = restored[layer.tensor].T if layer.transposed else restored[layer.tensor]
        torch.testing.assert_close(found, expected.to(found), rtol=1e-4, atol=1e-5)
    for row in report.others:
        assert row.source == "aligned"
        assert torch.equal(restored[row.name], aligned[row.name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("How are you?", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert verify(tmp_path / "out").passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_shards_mirror_the_finetuned_checkpoint(dtype, tmp_path):
    made = pair("llama", dtype=dtype, max_shard_size="30KB")
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=HALF)
    shards = sorted(path.name for path in made.finetuned.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    for shard in shards:
        theirs, ours = load_file(made.finetuned / shard), load_file(tmp_path / "out" / shard)
        assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {
            k: (v.dtype, v.shape) for k, v in theirs.items()
        }
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (made.finetuned / index).read_bytes()


@pytest.mark.parametrize("method", ["kfac", "ridge", "greedy", "interpolate"])
def test_strength_0_gives_the_aligned_weights_and_1_the_finetuned_layers(method, tmp_path):
    made = pair()

    def restored(strength):
        config = RestoreConfig(method=method, strength=strength)
        out = tmp_path / f"{strength}"
        return restore(made.aligned, made.finetuned, out, store=made.whole_store, config=config), weights(out)

    aligned, finetuned = weights(made.aligned), weights(made.finetuned)
    report, zero = restored(0)
    assert all(torch.equal(zero[name], aligned[name]) for name in aligned)
    assert RestoreReport.model_validate_json((tmp_path / "0" / REPORT_NAME).read_text()) == report
    assert report.kept_energy == 0
    report, one = restored(1)
    assert all(torch.equal(one[row.name], finetuned[row.name]) for row in report.layers)
    assert report.kept_energy == 1


def test_other_params_may_come_from_the_finetuned_model(tmp_path):
    made = pair()
    config = RestoreConfig(strength=0.5, other_params="finetuned")
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    finetuned, restored = weights(made.finetuned), weights(tmp_path / "out")
    assert report.others
    assert all(torch.equal(restored[row.name], finetuned[row.name]) for row in report.others)
    assert {row.source for row in report.others} == {"finetuned"}


def test_published_uses_the_store_and_interpolate_needs_none(tmp_path):
    made = pair()
    config = RestoreConfig(method="published", strength=1.0)
    out = tmp_path / "published"
    report = restore(made.aligned, made.finetuned, out, store=made.whole_store, config=config)
    store = CurvatureStore.from_pretrained(made.whole_store)
    aligned, finetuned, restored = (weights(f) for f in (made.aligned, made.finetuned, out))
    for name in (row.name for row in report.layers):
        hessian = store.hessian(store.group_of(name).name)
        expected = published(aligned[name], finetuned[name], hessian, strength=1.0)
        torch.testing.assert_close(restored[name], expected.weight)
    restore(
        made.aligned,
        made.finetuned,
        tmp_path / "mixed",
        config=RestoreConfig(method="interpolate", strength=0.25),
    )
    mixed = weights(tmp_path / "mixed")
    torch.testing.assert_close(mixed[name], 0.75 * aligned[name] + 0.25 * finetuned[name])


def test_vocabulary_rows_that_only_the_finetuned_model_has_come_from_it(tmp_path):
    made = pair("llama")
    wide = tmp_path / "wide"
    model = models.perturbed(models.tiny_model("llama"), 0.05)
    model.resize_token_embeddings(models.VOCABULARY + 3, mean_resizing=False)
    models.save(model, wide)
    report = restore(made.aligned, wide, tmp_path / "out", store=made.store, config=HALF)
    aligned, finetuned, restored = (weights(f) for f in (made.aligned, wide, tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(restored[name][:-3], aligned[name])
        assert torch.equal(restored[name][-3:], finetuned[name][-3:])
    assert sum(row.source == "both" for row in report.others) == 2
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 387


def test_a_head_that_only_the_finetuned_model_stores_is_the_tied_embedding(tmp_path):
    made = pair("qwen3")
    untied = tmp_path / "untied"
    shutil.copytree(made.finetuned, untied)
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    restore(made.aligned, untied, tmp_path / "out", store=made.store, config=HALF)
    restored, aligned = weights(tmp_path / "out"), weights(made.aligned)
    assert torch.equal(restored["lm_head.weight"], aligned["model.embed_tokens.weight"])


def test_names_may_differ_by_a_prefix(tmp_path):
    made = pair("gpt2")
    bare = tmp_path / "bare"
    shutil.copytree(made.finetuned, bare)
    tensors = load_file(bare / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    restore(made.aligned, bare, tmp_path / "out", store=made.store, config=HALF)
    restore(made.aligned, made.finetuned, tmp_path / "same", store=made.store, config=HALF)
    out, same = weights(tmp_path / "out"), weights(tmp_path / "same")
    assert out.keys() == renamed.keys()
    assert all(torch.equal(out[name.removeprefix("transformer.")], same[name]) for name in same)


def test_non_weight_files_come_along_and_training_state_does_not(tmp_path):
    made = pair()
    dressed = tmp_path / "dressed"
    shutil.copytree(made.finetuned, dressed)
    (dressed / "chat_templates").mkdir()
    (dressed / "chat_templates" / "tool.jinja").write_text("x")
    (dressed / "optimizer.pt").write_bytes(b"state")
    (dressed / "trainer_state.json").write_text("{}")
    # As FSDP saves them.
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        (dressed / name).mkdir()
        (dressed / name / "__0_0.distcp").write_bytes(b"state")
        (dressed / name / "note.txt").write_text("x")
    (dressed / "random_states_0.pkl").write_bytes(b"state")
    (dressed / "checkpoint-5").mkdir()
    (dressed / "checkpoint-5" / "config.json").write_text("{}")
    restore(made.aligned, dressed, tmp_path / "out", store=made.store, config=HALF)
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"config.json", "tokenizer.json", "chat_templates/tool.jinja", "README.md", REPORT_NAME} <= names
    left_out = ("optimizer", "trainer", "checkpoint-5", "fsdp", "random_states")
    assert not {name for name in names if any(part in name for part in left_out)}
    assert not list((tmp_path / "out").glob(".*"))


def test_the_report_on_disk_is_the_report_returned(tmp_path):
    made = pair()
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=HALF)
    text = (tmp_path / "out" / REPORT_NAME).read_text()
    assert RestoreReport.model_validate_json(text) == report
    assert report.options["strength"] == 0.5
    assert report.options["method"] == "kfac"
    assert 0 < report.kept_energy < 1
    assert report.mu > 0
    assert report.dial is None
    assert 0 < report.safety_cost < 1
    assert json.loads(text)["aligned"]["fingerprint"] == report.aligned.fingerprint


@pytest.mark.parametrize("config", [HALF, GREEDY, RestoreConfig(method="interpolate", strength=0.5)])
def test_what_is_kept_is_said_of_energy_for_every_method_and_of_entries_where_some_are_chosen(
    config, tmp_path
):
    made = pair()
    store = None if config.method == "interpolate" else made.whole_store
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=store, config=config)
    aligned, finetuned, written = (weights(f) for f in (made.aligned, made.finetuned, tmp_path / "out"))
    kept = energy = chosen = entries = 0.0
    for row in report.layers:
        a, f, r = (of[row.name].double() for of in (aligned, finetuned, written))
        kept += float(((r - a) * (f - a)).sum())
        energy += float((f - a).square().sum())
        chosen += int((r == f).sum())
        entries += r.numel()
    assert report.kept_energy == pytest.approx(kept / energy, rel=1e-4)
    if config.method == "greedy":
        assert report.kept_entries == pytest.approx(chosen / entries, abs=1e-3)
    else:
        assert report.kept_entries is None
        assert all(row.kept_entries is None for row in report.layers)


def test_a_report_of_before_the_two_shares_is_one_message(tmp_path):
    made = pair()
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=HALF)
    path = tmp_path / "out" / REPORT_NAME
    older = json.loads(path.read_text()) | {"schema_version": 1, "kept_fraction": 0.5}
    del older["kept_energy"], older["kept_entries"]
    path.write_text(json.dumps(older))
    with pytest.raises(DeltaguardError, match=r"has schema version 1, .* reads version 2\. Restore again"):
        verify(tmp_path / "out")


def test_memory_that_the_process_held_before_is_not_told_as_the_restores_own(tmp_path, monkeypatch):
    made = pair()
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5_500_000))
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=HALF)
    assert report.peak_memory_bytes is None
    assert "peak memory" not in (tmp_path / "out" / CARD_NAME).read_text()


def test_a_plan_reads_no_tensor_and_writes_nothing(tmp_path, monkeypatch):
    made = pair()
    headers = tmp_path / "headers"
    shutil.copytree(made.finetuned, headers)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    plan = plan_restore(made.aligned, headers, store=made.store)
    weight_bytes = sum(t.numel() * t.element_size() for t in weights(headers).values())
    assert plan.write_bytes == weight_bytes
    assert plan.read_bytes == 2 * weight_bytes
    assert plan.restored == 14
    assert plan.peak_bytes > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["headers"]


def without_card(report):
    """The files of a report but the card, which says when it was written."""
    return [row for row in report.files if row.name != CARD_NAME]


def test_a_model_without_a_store_is_calibrated_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    made = pair()
    assert plan_restore(made.aligned, made.finetuned).note
    first = restore(made.aligned, made.finetuned, tmp_path / "one", config=HALF)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    stages = []
    second = restore(
        made.aligned, made.finetuned, tmp_path / "two", config=HALF, progress=lambda e: stages.append(e.stage)
    )
    assert set(stages) == {"project", "restore"}
    assert second.store_conversations == first.store_conversations
    assert without_card(second) == without_card(first)
    assert not plan_restore(made.aligned, made.finetuned).note
    # What is cut off does not serve every method.
    assert plan_restore(made.aligned, made.finetuned, config=GREEDY).note


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DELTAGUARD_CACHE": "~/dg"}, "dg"),
        ({"DELTAGUARD_CACHE": "", "XDG_CACHE_HOME": ""}, ".cache/deltaguard"),
        ({"XDG_CACHE_HOME": "~/x"}, "x/deltaguard"),
    ],
)
def test_the_cache_lies_where_its_variables_say_in_the_home_folder_too(
    tmp_path, monkeypatch, variables, folder
):
    monkeypatch.delenv("DELTAGUARD_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == tmp_path / folder


def test_the_calibration_of_a_restore_keeps_to_its_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))

    def calibrated(aligned, folder, *, config, **others):
        raise DeltaguardError(f"calibrated within {config.memory} bytes")

    monkeypatch.setattr("deltaguard.curvature.calibrate.calibrate", calibrated)
    config = RestoreConfig(strength=0.5, memory="8GB")
    with pytest.raises(DeltaguardError, match="within 8000000000 bytes"):
        restore(pair().aligned, pair().finetuned, tmp_path / "one", config=config)


def test_a_damaged_store_of_the_cache_is_named_with_the_way_to_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    made = pair()
    folder = default_store_folder(identify(Checkpoint.open(made.aligned)), "auto")
    shutil.copytree(made.store, folder)
    (folder / "curvature-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(DeltaguardError) as caught:
        plan_restore(made.aligned, made.finetuned)
    assert "is not a safetensors file" in str(caught.value)
    assert f"Delete {folder} and run the same command again: it is made anew." in str(caught.value)


def test_a_model_that_another_process_calibrates_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    made = pair()
    told = []

    def begin_another(event):
        if event.stage == "accumulate" and not told:
            with pytest.raises(DeltaguardError) as caught:
                restore(made.aligned, made.finetuned, tmp_path / "two", config=HALF)
            told.append(str(caught.value))

    restore(made.aligned, made.finetuned, tmp_path / "one", config=HALF, progress=begin_another)
    (message,) = told
    assert message.startswith(f"Another process is calibrating {made.aligned} right now")
    assert "Run this again when it is done, or give a store with `--store`" in message
    assert "another output folder" not in message
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("method", ["greedy", "published"])
def test_methods_that_need_the_whole_refuse_a_store_that_is_cut_off(method, tmp_path):
    made = pair()
    config = RestoreConfig(method=method, strength=0.5)
    message = rf"deltaguard calibrate {made.aligned} -o STORE --rank full"
    with pytest.raises(DeltaguardError, match=message):
        restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    with pytest.raises(DeltaguardError, match=message):
        plan_restore(made.aligned, made.finetuned, store=made.store, config=config)
    assert not (tmp_path / "out").exists()


def test_inputs_are_left_untouched(tmp_path):
    made = pair()
    before = {p: p.read_bytes() for f in (made.aligned, made.finetuned, made.store) for p in f.iterdir()}
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=HALF)
    after = {p: p.read_bytes() for f in (made.aligned, made.finetuned, made.store) for p in f.iterdir()}
    assert before == after


def test_the_output_may_not_be_an_input(tmp_path):
    made = pair()
    for target in (made.aligned, made.finetuned, made.finetuned / "inside"):
        with pytest.raises(DeltaguardError, match="input"):
            restore(
                made.aligned,
                made.finetuned,
                target,
                store=made.store,
                config=RestoreConfig(strength=0.5, overwrite=True),
            )


def test_the_card_keeps_the_licence_of_the_finetuned_model(tmp_path):
    made = pair()
    carded = tmp_path / "carded"
    shutil.copytree(made.finetuned, carded)
    (carded / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Mine\n")
    restore(made.aligned, carded, tmp_path / "out", store=made.store, config=HALF)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "deltaguard" in card


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_an_adapter_is_restored_as_its_merged_model_is(name, targets, tmp_path):
    made = pair(name)
    tuned = save_adapter(
        made.aligned, tmp_path / "adapter", targets, fan_in_fan_out=name in models.STORED_IN_OUT
    )
    (tmp_path / "adapter" / "LICENSE").write_text("mine")
    models.save(tuned.merge_and_unload(), tmp_path / "merged")
    from_adapter = restore(
        made.aligned, tmp_path / "adapter", tmp_path / "one", store=made.store, config=HALF
    )
    restore(made.aligned, tmp_path / "merged", tmp_path / "two", store=made.store, config=HALF)
    one, two, aligned = (weights(f) for f in (tmp_path / "one", tmp_path / "two", made.aligned))
    assert one.keys() == two.keys() == aligned.keys()
    for tensor in one:
        torch.testing.assert_close(one[tensor], two[tensor], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(one[tensor], aligned[tensor]) for tensor in one)
    assert {row.name for row in from_adapter.layers if row.delta_norm} == {
        row.name for row in from_adapter.layers if any(target in row.name for target in targets)
    }
    assert (tmp_path / "one" / "LICENSE").read_text() == "mine"
    assert not list((tmp_path / "one").glob("adapter_*"))
    assert verify(tmp_path / "one").passed


def test_new_tokens_in_padding_rows_come_from_the_finetuned_model(tmp_path):
    """As with embeddings that have more rows than the tokenizer has tokens: the shapes do not change."""
    made = pair("llama")
    tuned, small = tmp_path / "tuned", tmp_path / "small"
    shutil.copytree(made.finetuned, tuned)
    shutil.copytree(made.aligned, small)
    for folder, size in ((small, 300), (tuned, 310)):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        known = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < size}
        merges = tokenizer["model"]["merges"]
        tokenizer["model"] |= {"vocab": known, "merges": [m for m in merges if "".join(m) in known]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = CalibrateConfig(device="cpu")
    store = calibrate(small, tmp_path / "store", conversations=CONVERSATIONS, config=config)
    report = restore(small, tuned, tmp_path / "out", store=store, config=HALF)
    aligned, finetuned, restored = (weights(f) for f in (small, tuned, tmp_path / "out"))
    name = "model.embed_tokens.weight"
    assert torch.equal(restored[name][:300], aligned[name][:300])
    assert torch.equal(restored[name][300:], finetuned[name][300:])
    assert {row.source for row in report.others if "embed" in row.name or "lm_head" in row.name} == {"both"}


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\n---\n# Mine\n---\n", {"license": "mit"}),
        ("\ufeff\r\n---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("\n---\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("# Mine\n---\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_metadata_stand_between_the_first_two_lines_of_dashes(tmp_path, card, found):
    (tmp_path / "README.md").write_text(card, encoding="utf-8", newline="")
    assert front_matter(tmp_path) == found


@pytest.mark.parametrize(
    "metadata", ["license: [mit", "a: &a [*a]", "- mit", "date: 2025-02-30", "[" * 99, "a: !!python/none x"]
)
def test_metadata_that_are_none_name_the_card(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(
        DeltaguardError, match=r"metadata at the head of .*README\.md cannot be .*(.|\n)*Correct it"
    ):
        front_matter(tmp_path)


def test_metadata_that_cannot_be_read_is_said_before_any_work(tmp_path):
    made = pair()
    broken = tmp_path / "broken"
    shutil.copytree(made.finetuned, broken)
    (broken / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(DeltaguardError, match="metadata at the head of"):
        restore(made.aligned, broken, tmp_path / "out", store=made.store, config=HALF)
    assert not (tmp_path / "out").exists()


def test_a_release_that_asks_other_prompts_does_not_take_an_earlier_ones_store(monkeypatch):
    identity = identify(Checkpoint.open(pair().aligned))
    before = default_store_folder(identity, "auto")
    assert before == default_store_folder(identity, "auto")
    monkeypatch.setattr("deltaguard.chat.framings.FRAMINGS", FRAMINGS[1:])
    assert default_store_folder(identity, "auto") != before


def test_old_masks_may_hold_the_least_number_there_is(tmp_path):
    """As GPT-NeoX once stored -1e9, which is -inf in float16; no code of transformers reads it."""
    made = pair("gpt_neox")
    mask = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(float("-inf"), dtype=torch.float16)}
    folders = tmp_path / "aligned", tmp_path / "finetuned"
    for source, folder in zip((made.aligned, made.finetuned), folders, strict=True):
        shutil.copytree(source, folder)
        path = folder / "model.safetensors"
        save_file(load_file(path) | mask, path, metadata={"format": "pt"})
    restore(*folders, tmp_path / "out", config=RestoreConfig(method="interpolate", strength=0.5))
    assert verify(tmp_path / "out").passed
