"""Configurations of adapters: what is read, what is refused by name, and patterns that end."""

import json
import re
import time

import peft
import pytest
from peft.utils.other import get_pattern_key

from deltaguard.errors import DeltaguardError
from deltaguard.models.lora_config import LoraConfig, find_scalings, read_lora_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MODULES = [
    *(f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1, 10) for kind in "qkvo"),
    *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 10)),
    "lm_head",
]
PATTERNS = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    r"^model\.layers\.1\.mlp\.down_proj",
    r"layers\.1\..*",
    r".*layers\.(0|10)\..*_proj",
    "(?:[qk]|v)_proj",
    r"layers\.\d{2}\.mlp\.down_proj",
    r"(model\.)?layers\.[^.]+\.self_attn\.\w+",
    r"(\w+\.)+o_proj",
    "lm_head",
    "model",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_fits_the_modules_that_peft_finds(pattern):
    found = find_scalings(LoraConfig(**PLAIN, rank_pattern={pattern: 2}), MODULES, "adapter")
    expected = {name for name in MODULES if get_pattern_key([pattern], name) == pattern}
    assert {name for name, scaling in found.items() if scaling.rank == 2} == expected


def test_the_first_pattern_that_fits_decides_as_in_peft():
    ranks = {"layers.1.self_attn.q_proj": 2, ".*_proj": 3, "q_proj": 5}
    lora = LoraConfig(**PLAIN, rank_pattern=ranks, alpha_pattern={"down_proj": 0.5})
    for name, scaling in find_scalings(lora, MODULES, "adapter").items():
        assert scaling.rank == ranks.get(get_pattern_key(ranks, name), 4)
        assert scaling.alpha == (0.5 if name.endswith("down_proj") else 8)
        assert scaling.factor == scaling.alpha / scaling.rank


@pytest.mark.parametrize("pattern", ["(a|aa)+$", ".*a" * 12, r"([\w.]|[\w.][\w.])+"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_not_end_is_refused_by_name(field, pattern):
    lora = LoraConfig(**PLAIN, **{field: {"q_proj": 2, pattern: 3}})
    names = [f"model.{'a' * length}!" for length in range(500, 520)]
    started = time.monotonic()
    with pytest.raises(DeltaguardError) as error:
        find_scalings(lora, names, "my-adapter", seconds=0.2)
    assert time.monotonic() - started < 5
    assert all(word in str(error.value) for word in ("my-adapter", field, repr(pattern), "0.2 s"))


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a)|(b",
        "*",
        "[z-a]",
        "(?P<name",
        "(?i)q_proj",
        "(?R)",
        r"\p{L}+",
        "(?:q_proj){e<=3}",
        "x{99999999}",
        "((x?){99}){99}",
        "(" * 30 + "x" + ")+" * 30,
        "a" * 5000,
    ],
)
def test_a_pattern_that_is_none_or_costs_too_much_to_read_is_refused_by_name(pattern):
    with pytest.raises(DeltaguardError, match="rank_pattern") as error:
        find_scalings(LoraConfig(**PLAIN, rank_pattern={pattern: 3}), MODULES, "my-adapter")
    assert repr(pattern)[:60] in str(error.value)


def written(folder, content):
    (folder / "adapter_config.json").write_bytes(content)
    return folder


def test_names_of_a_configuration_are_peft_s_with_its_defaults(tmp_path):
    peft.LoraConfig(target_modules=["q_proj"], base_model_name_or_path="a/b", revision="c").save_pretrained(
        tmp_path
    )
    lora, own = read_lora_config(tmp_path, "adapter"), peft.LoraConfig.from_pretrained(tmp_path)
    for name in LoraConfig.model_fields:
        expected = getattr(own, name)
        assert getattr(lora, name) == (list(expected) if isinstance(expected, set) else expected), name
    bare = read_lora_config(written(tmp_path, b'{"peft_type": "LORA"}'), "adapter")
    assert (bare.r, bare.lora_alpha, bare.bias) == (own.r, own.lora_alpha, own.bias)


def test_what_axolotl_leaves_open_is_not_so(tmp_path):
    content = json.dumps({**PLAIN, "fan_in_fan_out": None})
    assert not read_lora_config(written(tmp_path, content.encode()), "adapter").fan_in_fan_out


DEEP = b"[" * 1000 + b"]" * 1000
MUTATIONS = {
    "r": [0, -1, 2.5, "8", True, None, [8], {}, 2**40],
    "lora_alpha": ["16", None, [1], True, "RAW NaN", "RAW 1e999", "RAW " + "9" * 5000],
    "rank_pattern": [[], "q_proj", {"q_proj": 0}, {"q_proj": "3"}, {"q_proj": [True]}, {"q_proj": None}, 7],
    "alpha_pattern": [[], {"q_proj": "3"}, {"q_proj": {}}, 'RAW {"q": Infinity}'],
    "target_modules": [3, [3], {"q_proj": 1}, True],
    "modules_to_save": ["lm_head", [None], 1],
    "fan_in_fan_out": ["no", 1],
    "use_rslora": ["yes", 0],
    "bias": [None, 3, "all"],
    "init_lora_weights": ["pissa", 3, [], {}],
    "base_model_name_or_path": [3, ["a"], {}, 'RAW "\\ud800"'],
    "revision": [3, True],
    "peft_type": [None, "IA3", "lora", 3, ["LORA"], {}],
    "use_dora": [True, "false", 1],
    "a_field_of_tomorrow": [True, {"x": 1}, [0], "yes"],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in MUTATIONS.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_a_field_of_another_kind_is_refused_by_its_name(tmp_path, field, value):
    raw = isinstance(value, str) and value.startswith("RAW ")
    content = json.dumps({**PLAIN, field: "RAW" if raw else value})
    if raw:
        content = content.replace('"RAW"', value.removeprefix("RAW "))
    with pytest.raises(DeltaguardError) as error:
        read_lora_config(written(tmp_path, content.encode()), "adapter")
    named = re.search(rf"(?<!\w){field}(?!\w)", str(error.value))
    assert named or "Invalid JSON" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"x"',
        b'{"peft_type"',
        b"\xff",
        DEEP,
        b'{"peft_type": "LORA", "x": ' + DEEP + b"}",
    ],
    ids=range(8),
)
def test_what_is_no_configuration_is_refused_by_the_name_of_the_file(tmp_path, content):
    with pytest.raises(DeltaguardError, match=r"adapter_config\.json"):
        read_lora_config(written(tmp_path, content), "adapter")


@pytest.mark.parametrize("value", [False, None, [], {}, 0, ""])
def test_an_unknown_field_that_asks_for_nothing_is_no_reason(tmp_path, value):
    content = json.dumps({**PLAIN, "a_field_of_tomorrow": value, "use_dora": value})
    assert read_lora_config(written(tmp_path, content.encode()), "adapter").r == 4
