"""mergekit, which merges checkpoints without a model class: the tool to compare the plain path with."""

import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "mergekit==0.1.5"

_CONFIG = """\
merge_method: linear
models:
  - model: {aligned}
    parameters: {{weight: 0.5}}
  - model: {finetuned}
    parameters: {{weight: 0.5}}
dtype: bfloat16
"""


@dataclass(frozen=True)
class MergeTool:
    """An installation of mergekit in a virtual environment of its own."""

    folder: Path

    def command(self, pair: Path, output: Path) -> list[str]:
        """Give a linear merge of the pair, reading lazily; the pair has no tokenizer to copy."""
        config = self.folder / "linear.yml"
        config.write_text(
            _CONFIG.format(aligned=(pair / "aligned").resolve(), finetuned=(pair / "finetuned").resolve())
        )
        program = self.folder / "bin" / "mergekit-yaml"
        return [str(program), str(config), str(output), "--lazy-unpickle", "--no-copy-tokenizer", "--quiet"]


def install(folder: Path) -> MergeTool | str:
    """Install mergekit, where it is not yet.

    Args:
        folder: of the virtual environment.

    Returns:
        The installation, or why there is none.
    """
    if not (folder / "bin" / "mergekit-yaml").exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", REQUIREMENT]
        installed = subprocess.run(command, capture_output=True, text=True, check=False)
        if installed.returncode:
            return f"{REQUIREMENT} cannot be installed: {installed.stderr.strip().splitlines()[-1]}"
    return MergeTool(folder)
