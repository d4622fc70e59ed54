"""Restore a fine-tuned model from Python, and see where the delta was given up.

    python examples/restore.py ALIGNED FINETUNED OUTPUT

ALIGNED and FINETUNED are folders or Hub ids; FINETUNED may be a LoRA adapter folder.
"""

# ruff: noqa: INP001, T201  # a script that prints what it found
import sys
from pathlib import Path

import deltaguard


def main(aligned: str, finetuned: str, output: Path) -> None:
    """Calibrate, restore and verify; print the five layers that lost most of their delta."""
    store = deltaguard.calibrate(aligned, output / "store", config=deltaguard.CalibrateConfig(resume=True))
    config = deltaguard.RestoreConfig()
    report = deltaguard.restore(aligned, finetuned, output / "restored", store=store, config=config)

    print(f"strength {config.chosen_strength}: {report.kept_fraction:.1%} of the entries kept,")
    print(f"safety cost {report.safety_cost:.1%} of the fine-tuned model's (median over layers)")
    for layer in sorted(report.layers, key=lambda layer: layer.utility_loss, reverse=True)[:5]:
        print(f"  {layer.name}: utility loss {layer.utility_loss:.1%}, safety cost {layer.safety_cost:.1%}")

    found = deltaguard.verify(output / "restored")
    print("\n".join(found.problems) or f"{found.tensors} tensors verified in {found.folder}")


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except IndexError:
        sys.exit(__doc__)
    except deltaguard.DeltaguardError as error:
        sys.exit(f"Error: {error}")
