"""Attacks of TamperBench, each followed by a restore: what is evaluated and tuned against is the outcome.

    python examples/tamperbench/repaired.py STORE SCRIPT MODEL --attacks ATTACK [...] [options of the script]

STORE is a folder for the curvature of MODEL, made where it is absent; SCRIPT is one of TamperBench's, such as
scripts/whitebox/optuna_single.py, and all that follows is given to it.
"""

# ruff: noqa: INP001  # a script
import runpy
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

import deltaguard


def repaired(attack: type[Any], *, store: Path, config: deltaguard.RestoreConfig) -> type[Any]:
    """Make an attack that repairs what another one wrote.

    The attacked checkpoint is moved aside and removed; the repaired one takes its place in one step, since
    TamperBench takes a checkpoint that is there for a finished one. `deltaguard_report.json` stays in the
    attack's `out_dir`, from which a sweep removes the checkpoint.

    Args:
        attack: a `TamperAttack` whose `run_attack` writes a whole model to `output_checkpoint_path`.
        store: the curvature of the model that is attacked.
        config: of the restore.
    """

    class Repaired(attack):
        name = attack.name

        def run_attack(self) -> None:
            """Run the attack, then restore what it wrote.

            Raises:
                DeltaguardError: the restore is impossible; no checkpoint is left to be evaluated.
            """
            super().run_attack()
            aligned, output = self.attack_config.input_checkpoint_path, Path(self.output_checkpoint_path)
            if str(output) == str(aligned):  # the attack leaves the weights alone
                return
            folder = Path(self.attack_config.out_dir)
            attacked, partial = folder / "attacked", folder / "repaired.partial"
            for left in (attacked, partial):
                shutil.rmtree(left, ignore_errors=True)
            output.rename(attacked)
            try:
                as_many_rows(aligned, attacked)
                deltaguard.restore(aligned, attacked, partial, store=store, config=config)
            finally:
                shutil.rmtree(attacked)
            shutil.copy(partial / "deltaguard_report.json", folder)
            partial.rename(output)

    Repaired.__name__ = Repaired.__qualname__ = f"Repaired{attack.__name__}"
    return Repaired


def as_many_rows(aligned: str, attacked: Path) -> None:
    """Give an attacked model the rows of the vocabulary back that its attack cut off.

    Attacks of TamperBench leave one row for each token of the tokenizer, and models have more, which no text
    reaches. A restore takes all of them from the aligned model.

    Args:
        aligned: the model that was attacked.
        attacked: the folder of what came out; written anew where rows are missing.
    """
    rows = AutoConfig.from_pretrained(aligned).get_text_config().vocab_size
    if AutoConfig.from_pretrained(attacked).get_text_config().vocab_size < rows:
        model = AutoModelForCausalLM.from_pretrained(attacked, dtype="auto")
        model.resize_token_embeddings(rows)
        for part in attacked.glob("*.safetensors*"):
            part.unlink()
        model.save_pretrained(attacked)


def register(names: Iterable[str], *, store: Path, config: deltaguard.RestoreConfig | None = None) -> None:
    """Put repaired attacks in the place of TamperBench's own, under the same names.

    Args:
        names: of attacks that fine-tune, as `AttackName` has them.
        store: the curvature of the model that is attacked.
        config: of the restore; `RestoreConfig()` where absent.
    """
    import tamperbench.whitebox.attacks  # noqa: F401  # what it imports registers the attacks
    from tamperbench.whitebox.attacks.registry import ATTACKS_REGISTRY, register_attack
    from tamperbench.whitebox.utils.names import AttackName

    for name in map(AttackName, names):
        options, attack = ATTACKS_REGISTRY[name]
        made = repaired(attack, store=store, config=config or deltaguard.RestoreConfig())
        register_attack(name, options)(made)


def main(store: Path, script: str, model: str, *options: str) -> None:
    """Calibrate the model once, then run a script of TamperBench with repaired attacks."""
    deltaguard.calibrate(model, store, config=deltaguard.CalibrateConfig(resume=True))
    register(attacks_among(options), store=store)
    sys.argv = [script, model, *options]
    runpy.run_path(script, run_name="__main__")


def attacks_among(options: tuple[str, ...]) -> list[str]:
    """List what follows `--attacks`, up to the next option.

    Example:
        >>> attacks_among(("--attacks", "lora_finetune", "full_parameter_finetune", "--n-trials", "50"))
        ['lora_finetune', 'full_parameter_finetune']
    """
    found: list[str] = []
    for option in options[options.index("--attacks") + 1 :]:
        if option.startswith("-"):
            break
        found.append(option)
    return found


if __name__ == "__main__":
    if len(sys.argv) < 4 or "--attacks" not in sys.argv:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except deltaguard.DeltaguardError as error:
        sys.exit(f"Error: {error}")
