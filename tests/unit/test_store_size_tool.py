"""The table of what the size of a store changes, at the same safety KL and on the same answers."""

from tools.store_size import Finetune, Restored, StoreSizes, store_size_table

from deltaguard.reports.records.base import Environment


def restored(share, nll, *, iterated=False):
    return Restored(
        finetune="task",
        seed=0,
        share=share,
        iterated=iterated,
        rank_share=share / 2,
        nbytes=int(1000 * share),
        limit=0.001,
        safety_kl=0.001,
        nll=nll,
    )


def test_a_smaller_store_is_compared_with_the_reference_answer_by_answer():
    found = StoreSizes(
        environment=Environment(created="2026-01-01T00:00:00+00:00", versions={}, machine="m", device="cpu"),
        command="c",
        reference=0.25,
        finetunes=(Finetune(name="task", seed=0, aligned=(3.0, 2.0), finetuned=(1.0, 0.0)),),
        rows=(
            restored(0.12, (2.2, 1.2)),
            restored(0.25, (1.9, 0.9), iterated=True),
            restored(0.25, (2.0, 1.0)),
        ),
    )
    quarter, iterated, smaller = store_size_table(found.model_dump_json()).splitlines()[2:5]
    assert quarter == "| `task` | 0 | 25.0 % | exact | 250 bytes | 50.0 % |"
    assert iterated == "| `task` | 0 | 25.0 % | by iteration | 250 bytes | 55.0 % (+5.0: +5.0 to +5.0) |"
    assert smaller == "| `task` | 0 | 12.0 % | exact | 120 bytes | 40.0 % (-10.0: -10.0 to -10.0) |"
