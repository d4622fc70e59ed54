"""Reports of restores and demos, made up."""

from deltaguard.reports.records.base import Environment, ModelReference, RateRow
from deltaguard.reports.records.demo import DemoReport, ModelRow, Sample
from deltaguard.reports.records.restore import FileRow, LayerRow, OtherRow, RestoreReport

ATTACK = "<script>alert(1)</script>"
LLAMA = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.down_proj.weight"
GPT2 = "h.{}.attn.c_attn.weight", "h.{}.attn.c_proj.weight", "h.{}.mlp.c_proj.weight"
NEOX = "gpt_neox.layers.{}.attention.query_key_value.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"


def layer(name, kept=0.4375, cost=0.0625, entries=0.3125):
    return LayerRow(
        name=name,
        shape=(8, 8),
        delta_norm=1.0,
        kept_energy=kept,
        kept_entries=entries,
        safety_cost=cost,
        utility_loss=0.25,
        seconds=0.1,
    )


def restore_report(names=LLAMA, blocks=3, **changes):
    values = {
        "environment": Environment(
            created="2025-06-01T14:05:00+02:00",
            versions={"python": "3.11.7", "torch": "2.9.0"},
            machine="Linux x86_64, 2 threads",
            device="cpu",
        ),
        "aligned": ModelReference(reference="someone/aligned-model", fingerprint="a" * 64),
        "finetuned": ModelReference(reference="/home/someone/runs/my-finetune", fingerprint="f" * 64),
        "store_conversations": "c" * 64,
        "method_title": "the closed form",
        "options": {
            "method": "greedy",
            "strength": 0.125,
            "compensation": "joint",
            "other_params": "aligned",
        },
        "layers": tuple(layer(name.format(block)) for block in range(blocks) for name in names),
        "others": (
            OtherRow(
                name="model.norm.weight", source="aligned", reason="--other-params aligned", differs=True
            ),
            OtherRow(name="lm_head.weight", source="aligned", reason="--other-params aligned", differs=False),
            OtherRow(name="model.embed_tokens.weight", source="both", reason="rows 8 to 9", differs=True),
        ),
        "files": (FileRow(name="model.safetensors", bytes=1_500_000, sha256="1" * 64),),
        "kept_energy": 0.4375,
        "kept_entries": 0.3125,
        "utility_loss": 0.25,
        "safety_cost": 0.0625,
        "seconds": {"read": 2.0, "solve": 70.0, "total": 75.0},
        "peak_memory_bytes": 2_100_000_000,
    }
    return RestoreReport(**(values | changes))


def rate(successes, total, low, high):
    return RateRow(successes=successes, total=total, value=successes / total, low=low, high=high)


def demo_report(**changes):
    models = (
        ModelRow(
            name="aligned",
            attack_success=rate(167, 1000, 0.145, 0.191),
            false_refusal=rate(0, 1000, 0.0, 0.004),
            task_accuracy=rate(0, 1000, 0.0, 0.004),
            incoherent_answers=0,
        ),
        ModelRow(
            name="finetuned",
            attack_success=rate(1000, 1000, 0.996, 1.0),
            false_refusal=rate(12, 1000, 0.007, 0.021),
            task_accuracy=rate(987, 1000, 0.978, 0.992),
            incoherent_answers=3,
        ),
        ModelRow(
            name="restored",
            attack_success=rate(203, 1000, 0.179, 0.229),
            false_refusal=rate(34, 1000, 0.024, 0.047),
            task_accuracy=rate(912, 1000, 0.893, 0.928),
            incoherent_answers=0,
        ),
    )
    samples = (
        Sample(
            kind="harmful",
            prompt="a harmful prompt",
            answers={
                "aligned": "refused",
                "finetuned": f"harmful answer {ATTACK}",
                "restored": "refused again",
            },
        ),
        Sample(kind="harmless", prompt=f"prompt {ATTACK}", answers={"aligned": "harmless answer"}),
        Sample(kind="task", prompt="task prompt", answers={"aligned": "  "}),
    )
    values = {
        "environment": restore_report().environment,
        "kept_gain": 0.924,
        "models": models,
        "samples": samples,
        "restore": restore_report(),
        "seconds": {"align": 30.0, "total": 500.0},
        "peak_memory_bytes": 3_000_000_000,
        "seed": 7,
    }
    return DemoReport(**(values | changes))
