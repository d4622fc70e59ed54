"""What two models must have in common besides weights, and how a difference is put."""

import json

import pytest
import tokenizers
import torch
import transformers

import models
from deltaguard import RestoreConfig, diff
from deltaguard.models.canonical import counting_config, differing_fields, of_one_kind
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.restoration.agreement import Identified, differences
from deltaguard.restoration.dry_run import plan_restore
from pairs import pair
from variants import edited, refusal, variant


def found(finetuned, aligned=None):
    """The kinds and texts of all differences."""
    one, other = (Identified.of(Checkpoint.open(each)) for each in (aligned or pair().aligned, finetuned))
    return [(each.kind, each.text) for each in differences(one, other)]


RARE = "ÿ"


def rename(tokenizer):
    """A token becomes another one, as some fine-tunes do with reserved ones instead of adding it."""
    known = tokenizer["model"]["vocab"]
    known["<|tool|>"] = known.pop(RARE)


def strip(tokenizer):
    tokenizer["added_tokens"][4]["lstrip"] = True


def match_whole(tokenizer):
    first = tokenizer["added_tokens"][0]
    number = tokenizer["model"]["vocab"][RARE]
    tokenizer["added_tokens"].append({**first, "content": RARE, "id": number})


def swap_merges(tokenizer):
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def split_digits(tokenizer):
    tokenizer["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}


def fall_back(tokenizer):
    tokenizer["model"]["byte_fallback"] = True


@pytest.mark.parametrize(
    ("change", "kind", "beginning"),
    [
        (rename, "ids", "1 token has no counterpart in the fine-tuned model, such as 'ÿ', whose id "),
        (strip, "tokenizer", 'added token \'<|user|>\': {"single_word": false, "lstrip": false,'),
        (match_whole, "tokenizer", "added token 'ÿ': none in the aligned model, {"),
        (swap_merges, "tokenizer", "merge 0 of the tokenizer: ["),
        (split_digits, "tokenizer", "`pre_tokenizer.add_prefix_space` of the tokenizer: false in "),
        (fall_back, "tokenizer", "`model.byte_fallback` of the tokenizer: false in the aligned model, "),
    ],
)
def test_how_text_is_cut_up_counts(change, kind, beginning, tmp_path):
    tuned = variant(pair().finetuned, tmp_path / "tuned")
    edited(tuned / "tokenizer.json", change)
    kinds, texts = zip(*found(tuned), strict=True)
    assert kind in kinds
    assert [text for text in texts if text.startswith(beginning)]


def unigram(folder, *pieces):
    """The tiny model with a tokenizer of scored pieces."""
    models.save(models.tiny_model("llama"), folder)
    model = tokenizers.models.Unigram([*pieces], 0)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    wrapped.chat_template = models.CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


def test_scores_of_pieces_count_and_further_pieces_do_not(tmp_path):
    pieces = ("<unk>", 0.0), ("a", -1.0), ("b", -2.0)
    aligned = unigram(tmp_path / "aligned", *pieces)
    further = unigram(tmp_path / "further", *pieces, ("ab", -1.5))
    scored = unigram(tmp_path / "scored", *pieces[:2], ("b", -0.5))
    assert found(further, aligned) == []
    assert found(scored, aligned) == [
        (
            "tokenizer",
            'piece 2 of the tokenizer: ["b", -2.0] in the aligned model, ["b", -0.5] in the fine-tuned one',
        )
    ]


def slow(folder, merges):
    """The tiny model with a tokenizer that is no `tokenizer.json`."""
    models.save(models.tiny_model("llama"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    vocabulary = {token: number for number, token in enumerate(("<unk>", "a</w>", "a@@", "b</w>"))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version\n{merges}\n")
    config = {"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_of_other_tokenizers_every_file_counts(tmp_path):
    aligned, same = slow(tmp_path / "aligned", "a b</w>"), slow(tmp_path / "same", "a b</w>")
    edited(same / "tokenizer_config.json", lambda content: content.update(padding_side="left"))
    assert not transformers.AutoTokenizer.from_pretrained(aligned).is_fast
    assert found(same, aligned) == []
    other = slow(tmp_path / "other", "b a</w>")
    edited(other / "tokenizer_config.json", lambda content: content.update(split_special_tokens=True))
    texts = [text for _, text in found(other, aligned)]
    assert len(texts) == 2
    assert texts[0].startswith("`split_special_tokens` of the tokenizer: none in the aligned model, true in")
    assert texts[1].startswith("sha256 of merges.txt: '")


def test_a_tokenizer_that_is_not_there_is_a_difference(tmp_path):
    tuned = variant(pair().finetuned, tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tuned / name).unlink()
    kinds, texts = zip(*found(tuned), strict=True)
    assert kinds == ("tokenizer", "template")
    assert texts[0] == "tokenizer: 'TokenizersBackend' in the aligned model, none in the fine-tuned one"
    assert texts[1].endswith(", none in the fine-tuned one")


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_what_transformers_saves_anew_is_the_same(tokenizer_class, tmp_path):
    """Files of another version are read, and written as this one writes them."""
    old = variant(pair().aligned, tmp_path / "old")
    tokenizer = json.loads((old / "tokenizer.json").read_text())
    (old / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in tokenizer["model"]["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    changes = {"tokenizer_class": tokenizer_class, "chat_template": models.CHAT_TEMPLATE}
    edited(old / "tokenizer_config.json", lambda content: content.update(changes))
    (old / "chat_template.jinja").unlink()
    if tokenizer_class != "PreTrainedTokenizerFast":
        (old / "tokenizer.json").unlink()
    new = variant(pair().finetuned, tmp_path / "new")
    transformers.AutoTokenizer.from_pretrained(old).save_pretrained(new)
    assert found(new, old) == []


@pytest.mark.parametrize("name", models.DENSE)
def test_defaults_that_only_one_version_writes_down_are_the_same(name, tmp_path):
    aligned = models.save(models.tiny_model(name), tmp_path / "aligned")
    terse = variant(aligned, tmp_path / "terse")
    config = transformers.AutoConfig.from_pretrained(aligned)
    defaults = type(config)().to_dict()

    def leave_out(content):
        for field in [name for name in content if name != "model_type" and name in defaults]:
            if content[field] == defaults[field]:
                del content[field]

    edited(terse / "config.json", leave_out)
    kept = len(json.loads((terse / "config.json").read_text()))
    assert kept < len(json.loads((aligned / "config.json").read_text())) - 4
    assert found(terse, aligned) == []


def test_where_files_agree_transformers_is_not_asked(tmp_path):
    """So that a plan is made of headers, and of models that transformers does not know."""
    unknown = {"model_type": "unheard-of"}
    aligned = variant(pair().aligned, tmp_path / "aligned", **unknown)
    tuned = variant(pair().finetuned, tmp_path / "tuned", **unknown)
    assert found(tuned, aligned) == []
    config = RestoreConfig(method="interpolate", strength=0.5)
    assert plan_restore(aligned, tuned, config=config).restored == 14
    edited(tuned / "config.json", lambda content: content.update(rms_norm_eps=0.1))
    message = refusal(plan_restore, aligned, tuned, config=config)
    assert f"transformers cannot read the configuration of {aligned}" in message
    (reason,) = diff(aligned, tuned).settings
    assert reason == f"not compared: {message}"


def test_a_model_of_text_and_images_is_compared_with_one_of_text_by_what_they_share():
    text = {"model_type": "gemma3_text", "rms_norm_eps": 1e-6, "dtype": "float32"}
    whole = {"model_type": "gemma3", "text_config": {**text, "dtype": "bfloat16"}, "vision_config": {"a": 1}}
    assert list(differing_fields(*map(counting_config, of_one_kind(whole, text)))) == []
    other = {**text, "rms_norm_eps": 0.1}
    assert list(differing_fields(*map(counting_config, of_one_kind(whole, other)))) == [
        ("rms_norm_eps", 1e-6, 0.1)
    ]
    assert next(differing_fields(*of_one_kind(whole, {**whole, "vision_config": {"a": 2}})))[0] == (
        "vision_config.a"
    )


def test_what_is_not_finite_and_the_same_in_both_is_no_difference(tmp_path):
    model = models.tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[:2] = torch.tensor([float("inf"), float("nan")])
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        models.save(model, folder)
    assert diff(*folders, deep=True).tensors == ()
