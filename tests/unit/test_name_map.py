"""Which tensor of one checkpoint is which of another."""

import time

import pytest

from deltaguard.models.checkpoint import name_map

LAYERS = [
    f"layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "transformer."),
        ("model.", "language_model.model."),
        ("model.", "model.language_model."),
        ("language_model.model.", "model.language_model."),
        ("base_model.model.model.", "model."),
    ],
)
def test_names_that_differ_by_one_prefix_meet_both_ways(old, new):
    source = [old + name for name in [*LAYERS, "embed_tokens.weight"]]
    target = [new + name for name in [*LAYERS, "embed_tokens.weight"]]
    expected = dict(zip(source, target, strict=True))
    assert name_map(source, target) == expected
    assert name_map(target, source) == {b: a for a, b in expected.items()}


def test_names_of_gpt2_meet_and_the_rest_is_left_out():
    source = ["wte.weight", "h.0.attn.c_attn.weight", "h.11.mlp.c_fc.bias", "h.0.attn.bias"]
    target = [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.11.mlp.c_fc.bias",
    ]
    assert name_map(source, [*target, "lm_head.weight"]) == dict(zip(source[:3], target, strict=True))


def test_equal_names_stand_for_themselves_beside_a_prefix():
    source = ["lm_head.weight", *(f"model.{name}" for name in LAYERS)]
    target = ["lm_head.weight", *(f"model.language_model.{name}" for name in LAYERS)]
    assert name_map(source, target) == dict(zip(source, target, strict=True))
    assert name_map(source, source) == {name: name for name in source}


def test_a_tower_has_a_prefix_of_its_own():
    source = [
        *(f"model.language_model.{name}" for name in LAYERS),
        *(f"model.vision_tower.{n}" for n in LAYERS),
    ]
    target = [
        *(f"language_model.model.{name}" for name in LAYERS),
        *(f"vision_tower.vision_model.{n}" for n in LAYERS),
    ]
    extra = (
        ["model.multi_modal_projector.norm.weight", "lm_head.weight"],
        [
            "multi_modal_projector.norm.weight",
            "language_model.lm_head.weight",
        ],
    )
    expected = dict(zip([*source, *extra[0]], [*target, *extra[1]], strict=True))
    assert name_map([*source, *extra[0]], [*target, *extra[1]]) == expected
    assert name_map([*target, *extra[1]], [*source, *extra[0]]) == {b: a for a, b in expected.items()}


def test_the_language_model_is_preferred_to_a_tower_of_the_same_layout():
    language = [f"language_model.model.{name}" for name in [*LAYERS, "norm.weight"]]
    vision = [f"vision_tower.{name}" for name in LAYERS]
    target = [f"model.{name}" for name in [*LAYERS, "norm.weight"]]
    assert name_map([*vision, *language], target) == dict(zip(language, target, strict=True))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([], ["a.weight"]),
        (["a.weight"], []),
        (["layers.0.q.weight"], ["layers.1.q.weight"]),
        (["encoder.layers.0.q.weight"], ["decoder.layers.0.q.weight"]),
        (["model.norm.weight"], ["lm_head.weight"]),
    ],
)
def test_names_without_a_partner_are_left_out(source, target):
    assert name_map(source, target) == {}


def test_names_without_number_take_seconds_not_hours():
    """Every name of one checkpoint ends like every name of the other."""
    source = [f"a{i}.weight" for i in range(20_000)]
    target = [f"b{i}.weight" for i in range(20_000)]
    started = time.monotonic()
    assert name_map(source, target) == {}
    assert (
        name_map([f"{'x.' * 20_000}{i}" for i in range(20)], [f"{'y.' * 20_000}{i}" for i in range(20)]) == {}
    )
    assert time.monotonic() - started < 5
