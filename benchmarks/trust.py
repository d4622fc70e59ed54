"""What restores of unknown and of trusted data keep and leave: `python -m benchmarks.trust ALIGNED`.

Fine-tunes of attackers and of a task are restored without options, and with `--training-data trusted`, and
asked on requests on which nothing was chosen, of seeds with which nothing was. Cells stay in the folder
`--work` and are not measured again. It takes an hour on two CPU cores.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.command import command
from benchmarks.guard import ATTACKERS, TASK, measured
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.protocol import ATTACKS, DEFAULT, UNCHOSEN

SETTINGS = {"unknown": RestoreConfig(), "trusted": RestoreConfig(training_data="trusted")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*ATTACKERS, TASK)
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/trust.json"))
    parser.add_argument("--work", type=Path, default=Path("build/trust"))
    parser.add_argument("--seeds", type=int, nargs="+", default=UNCHOSEN[:1])
    parser.add_argument("--finetune", nargs="+", choices=known, default=known)
    chosen = parser.parse_args(arguments)
    all_known = (*ATTACKS.finetunes, *DEFAULT.finetunes)
    finetunes = tuple(each for each in all_known if each.name in chosen.finetune)
    preset = replace(ATTACKS, finetunes=finetunes, seeds=tuple(chosen.seeds))
    names = [each.name for each in finetunes]
    told = command("trust", chosen.aligned, "--seeds", *preset.seeds, "--finetune", *names)
    found = measured(chosen.aligned, chosen.work, preset, SETTINGS, command=told)
    chosen.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
