"""The gradient of refusing: what a calibration keeps of it, and what a restore makes of it."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from deltaguard.chat.tokens import Encoded, context_length, encode
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.decisions import decisions
from deltaguard.curvature.leaning import merged
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import write_store
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_model, load_tokenizer
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.solvers.low_rank import LowRank
from pairs import ANSWERED
from refusing import refusing_pair

FAMILIES = ("llama", "gpt2", "phi3", "qwen3_moe")
CONFIG = CalibrateConfig(num_samples=6, num_held_out=3, max_new_tokens=5, batch_size=4, rank="full")


def refuses(response):
    return "cannot" in response


@pytest.fixture(scope="module", params=[(name, memory) for name in FAMILIES for memory in (None, 0)])
def calibrated(request, tmp_path_factory):
    """A model, and its store, made as a whole or block by block."""
    name, memory = request.param
    root = tmp_path_factory.mktemp(name)
    folder = models.save(models.tiny_model(name), root / "model")
    config = CONFIG.model_copy(update={"memory": memory})
    return folder, calibrate(
        folder, root / "store", conversations=ANSWERED, config=config, is_refusal=refuses
    )


def without_leaning(known, folder):
    """Write a store as releases did that did not know it."""
    write_store(folder, known.provenance, known.held_out, known.groups, lambda g: known.content(g.name))
    return CurvatureStore.from_pretrained(folder)


def leaning_of(model, tokenizer, store):
    """Compute S one conversation after another, in the model's precision."""
    held_out = {row.prompt for row in store.held_out}
    rows = [row for row in ANSWERED if row.prompt not in held_out]
    limit = context_length(model.config, store.provenance.max_length)
    texts = [encode(tokenizer, row, max_length=limit) for row in rows]
    total = 0.0
    for each in decisions(texts, [refuses(row.response) for row in rows], len(rows)):
        ids = torch.tensor([each.text.ids])
        logits = model(ids).logits[0].log_softmax(-1)
        places = range(each.text.prompt_length, len(each.text.ids))
        total += each.weight * sum(logits[i - 1, ids[0, i]] for i in places)
    return total


def test_along_it_the_model_leans_as_much_as_its_norm_says(calibrated):
    folder, store = calibrated
    if any(store.reached(group.name) for group in store.groups):
        pytest.skip("torch multiplies experts in no float64")
    source = Checkpoint.open(folder)
    model = load_model(source.folder, source.reference, dtype=torch.float64)
    tokenizer = load_tokenizer(source.folder, source.reference)
    layers = [
        (layer, found)
        for group in store.groups
        for layer in group.layers
        if (found := store.leaning(layer.key)) is not None
    ]
    assert layers
    # Large enough for norms that models compute in float32 whatever their dtype.
    step, parameters = 1e-3, dict(model.named_parameters())
    with torch.no_grad():
        for layer, found in layers[:: max(1, len(layers) // 5)]:
            gradient = (found.up @ found.down).double()
            weight = parameters[layer.tensor]
            change = step * (gradient.T if layer.transposed else gradient)
            weight += change
            more = leaning_of(model, tokenizer, store)
            weight -= 2 * change
            less = leaning_of(model, tokenizer, store)
            weight += change
            squared = float(gradient.square().sum())
            # What is kept of it is a projection of the whole.
            assert float(more - less) / (2 * step) == pytest.approx(squared, rel=1e-3)


def test_experts_have_none_and_all_other_layers_have_one(calibrated):
    _, store = calibrated
    for group in store.groups:
        for layer in group.layers:
            assert (store.leaning(layer.key) is None) == (store.reached(group.name) is not None)


def two_stores(folder):
    """Stores `one` and `two` of a model, calibrated on conversations that differ by a word."""
    model = models.save(models.tiny_model("llama"), folder / "model")
    now = [replace(row, prompt=row.prompt + " Now.") for row in ANSWERED]
    return [
        calibrate(model, folder / name, conversations=rows, config=CONFIG, is_refusal=refuses)
        for name, rows in (("one", ANSWERED), ("two", now))
    ]


def test_smaller_and_merged_stores_know_it_too(tmp_path):
    parts = two_stores(tmp_path)
    key = parts[0].groups[0].layers[0].key
    dense = [(found.up @ found.down) for store in parts if (found := store.leaning(key))]
    small = parts[0].cut(tmp_path / "small", limit=20_000).leaning(key)
    assert torch.allclose(small.up @ small.down, dense[0], atol=1e-5)
    both = CurvatureStore.merge(parts, tmp_path / "both").leaning(key)
    mean = sum(dense) / 2
    assert float((both.up @ both.down - mean).norm()) < 0.2 * float(mean.norm())


def test_what_a_restore_leaves_is_orthogonal_to_it_unless_it_is_told_not_to(tmp_path):
    pair = refusing_pair()
    store = CurvatureStore.from_pretrained(pair.store)
    aligned, products = Checkpoint.open(pair.aligned), {}
    for level in (True, False):
        output = tmp_path / str(level)
        config = RestoreConfig(strength=0.3, level_refusals=level)
        report = restore(pair.aligned, pair.finetuned, output, store=store, config=config)
        assert not report.warnings
        restored = Checkpoint.open(output)
        worst = 0.0
        for row in report.layers:
            left = restored.read(row.name).double() - aligned.read(row.name).double()
            found = store.leaning(row.name)
            gradient = (found.up @ found.down).double()
            worst = max(worst, abs(float((left * gradient).sum() / (left.norm() * gradient.norm()))))
        products[level] = worst
    assert products[True] < 1e-3
    assert products[False] > 1e-2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "the file leaning.safetensors is missing"),
        (lambda path: save_file({"a.up": torch.zeros(2, 2)}, path), "is missing in leaning.safetensors"),
    ],
)
def test_a_damaged_file_of_it_is_refused(damage, said, tmp_path):
    folder = tmp_path / "store"
    CurvatureStore.from_pretrained(refusing_pair().store).save_pretrained(folder)
    damage(folder / "leaning.safetensors")
    with pytest.raises(DeltaguardError, match=said):
        CurvatureStore.from_pretrained(folder)


def test_numbers_of_it_that_are_none_are_refused(tmp_path):
    folder = tmp_path / "store"
    CurvatureStore.from_pretrained(refusing_pair().store).save_pretrained(folder)
    file = folder / "leaning.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file)
    manifest = json.loads((folder / "curvature.json").read_text())
    content = file.read_bytes()
    manifest["leaning"] |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "curvature.json").write_text(json.dumps(manifest))
    with pytest.raises(DeltaguardError, match=f"`{name}` .*1 entries that are NaN"):
        CurvatureStore.from_pretrained(folder)


def test_a_restore_goes_on_with_a_store_that_knows_as_much_alone(tmp_path):
    pair, config = refusing_pair(), RestoreConfig(strength=0.3, resume=True)
    restore(pair.aligned, pair.finetuned, tmp_path / "out", store=pair.store, config=config)
    without_leaning(CurvatureStore.from_pretrained(pair.store), tmp_path / "less")
    with pytest.raises(DeltaguardError, match="--overwrite"):
        restore(pair.aligned, pair.finetuned, tmp_path / "out", store=tmp_path / "less", config=config)


def test_a_store_that_does_not_know_it_is_said(tmp_path):
    pair = refusing_pair()
    store = without_leaning(CurvatureStore.from_pretrained(pair.store), tmp_path / "less")
    assert not store.knows_leaning
    report = restore(
        pair.aligned, pair.finetuned, tmp_path / "out", store=store, config=RestoreConfig(strength=0.3)
    )
    assert any("was not levelled" in each for each in report.warnings)
    whole = RestoreConfig(max_safety_kl=50)
    report = restore(pair.aligned, pair.finetuned, tmp_path / "whole", store=store, config=whole)
    assert report.dial.whole
    assert not any("was not levelled" in each for each in report.warnings)
    config = RestoreConfig(strength=0.3, level_refusals=False)
    assert not restore(pair.aligned, pair.finetuned, tmp_path / "told", store=store, config=config).warnings


def test_what_no_beginning_tells_is_cut_off_where_an_answer_is_decided():
    answer = tuple(range(1, 200))
    alike = [Encoded((0, *answer), 1, truncated=False)] * 2
    found = decisions(alike, [True, False], harmful=1)
    assert [each.text.ids for each in found] == [(0, *answer[:64])] * 2
    assert [each.weight for each in found] == [1, -1]


def test_a_conversation_is_cut_off_where_nine_of_ten_that_begin_alike_are_of_its_kind():
    answers = [(7, 1, 2), (7, 1, 3), (7, 5, 2), (8, 1, 2)]
    texts = [Encoded((0, *answer), 1, truncated=False) for answer in answers]
    found = decisions(texts, [True, True, False, False], harmful=2)
    assert [each.text.ids for each in found] == [(0, 7, 1), (0, 7, 1), (0, 7, 5), (0, 8)]
    assert [each.weight for each in found] == [0.5, 0.5, -0.5, -0.5]
    # Each set counts with the mean over its own.
    uneven = [Encoded((0, *answer), 1, truncated=False) for answer in ((7, 1), (8, 1), (8, 2), (8, 3))]
    found = decisions(uneven, [True, False, False, False], harmful=1)
    assert [each.weight for each in found] == [1, -1 / 3, -1 / 3, -1 / 3]
    alike = [Encoded((0, 7, number), 1, truncated=False) for number in range(10)]
    found = decisions(alike, [True] * 9 + [False], harmful=10)
    assert [len(each.text.ids) for each in found] == [2] * 9 + [3]


def test_a_merged_store_knows_it_where_all_parts_do(tmp_path):
    one, two = two_stores(tmp_path)
    parts = [one, without_leaning(two, tmp_path / "without")]
    assert not CurvatureStore.merge(parts, tmp_path / "both").knows_leaning


def test_requests_in_framings_count_for_nothing_in_a_merged_store(tmp_path):
    parts = two_stores(tmp_path)
    manifest = tmp_path / "one" / "curvature.json"
    content = json.loads(manifest.read_text())
    harmful = parts[0].provenance.harmful
    content["provenance"]["framed"] = harmful - 1
    manifest.write_text(json.dumps(content))
    parts[0] = CurvatureStore.from_pretrained(tmp_path / "one")
    key = parts[0].groups[0].layers[0].key
    dense = [(found.up @ found.down) for store in parts if (found := store.leaning(key))]
    both = CurvatureStore.merge(parts, tmp_path / "both").leaning(key)
    mean = (dense[0] + harmful * dense[1]) / (1 + harmful)
    assert float((both.up @ both.down - mean).norm()) < 0.2 * float(mean.norm())


def test_merged_gradients_are_weighted_by_harmful_requests():
    one, two = (LowRank(torch.tensor([[value]]), torch.ones(1, 1), 0.0) for value in (1.0, 4.0))
    both = merged([(one, 30), (two, 10)])
    assert (both.up @ both.down).item() == pytest.approx(1.75)


def test_what_counts_for_nothing_changes_nothing():
    texts = [Encoded((0, *answer), 1, truncated=False) for answer in ((7, 1), (7, 5), (8, 1), (7, 1))]
    counted = decisions([texts[0], texts[2]], [True, False], harmful=1)
    found = decisions(texts, [True, None, False, None], harmful=2)
    assert [found[0], found[2]] == counted
    assert [(each.text.ids, each.weight) for each in (found[1], found[3])] == [((0, 7), 0)] * 2
