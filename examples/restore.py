"""Restore a fine-tuned model from Python: see what limits of safety KL keep, restore, and verify.

    python examples/restore.py ALIGNED FINETUNED OUTPUT

ALIGNED and FINETUNED are folders or Hub ids; FINETUNED may be a LoRA adapter folder.
"""

# ruff: noqa: INP001, T201  # a script that prints what it found
import sys
from pathlib import Path

import deltaguard


def main(aligned: str, finetuned: str, output: Path) -> None:
    """Calibrate once, then compare limits, restore and verify."""
    store = deltaguard.calibrate(aligned, output / "store", config=deltaguard.CalibrateConfig(resume=True))

    # Writes no model. `utility=Path("my-task.jsonl")` measures as well what your task keeps at each limit.
    limits = (3e-4, 6e-4, 1e-3)
    show_limits(deltaguard.sweep(aligned, finetuned, output / "sweep", store=store, limits=limits))

    # Adds at most 2 points to the aligned model's attack success, by asking it and the candidates;
    # `config=deltaguard.RestoreConfig(max_safety_kl=...)` holds to a safety KL, without asking.
    report = deltaguard.restore(aligned, finetuned, output / "restored", store=store)
    show_restored(report)

    found = deltaguard.verify(output / "restored")
    print("\n".join(found.problems) or f"{found.tensors} tensors verified in {found.folder}")


def show_limits(report: deltaguard.SweepReport) -> None:
    """Print how much of the delta each limit keeps."""
    kept = {point.mu: point.kept_energy for point in report.points}
    print(f"fine-tuned model: safety KL {report.finetuned_kl:.2g} nats per response token")
    for budget in report.budgets:
        share = (
            "no price is within it"
            if budget.mu is None
            else f"{kept[budget.mu]:.1%} of the delta's energy kept"
        )
        print(f"  at most {budget.limit:g}: {share}")


def show_restored(report: deltaguard.RestoreReport) -> None:
    """Print what the dial measured, and the five layers that lost most of their delta."""
    dial = report.dial
    if dial is not None:  # None where a strength decided
        print(f"{len(dial.probes)} models measured on {dial.conversations} safety conversations:")
        for probe in dial.probes:
            print(f"  price {probe.mu:.3g}: safety KL {probe.safety_kl:.2g}")
        print(f"restored: safety KL {dial.restored_kl:.2g}, at most {dial.limit:g} allowed")
        if dial.attack is not None:  # None where safety KL alone decided
            before, after = (
                look.attack_success.added for look in (dial.attack.finetuned, dial.attack.restored)
            )
            print(
                f"attack success over the aligned model: {100 * before:+.1f} points, now {100 * after:+.1f}"
            )
        if dial.whole:
            print("The fine-tuned model was within the limit: nothing was taken from it.")
    print(f"{report.kept_energy:.1%} of the delta's energy kept; the layers that lost most:")
    for layer in sorted(report.layers, key=lambda layer: layer.utility_loss, reverse=True)[:5]:
        print(f"  {layer.name}: utility loss {layer.utility_loss:.1%}")


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except IndexError:
        sys.exit(__doc__)
    except deltaguard.DeltaguardError as error:
        sys.exit(f"Error: {error}")
