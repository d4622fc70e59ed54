"""Every command in the documentation is run, on tiny models in the place of those it names, or listed.

The commands of a page are run in its order, each with what those before it wrote: one test alone, or those
of this file in several processes (`-n` without `--dist loadfile`), find less than they need.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest

from deltaguard.cli.app import run
from deltaguard.evaluation.suites import parts
from deltaguard.restoration import looks
from documents import PAGES, Typed, typed
from hub import played_hub
from pairs import save_adapter
from refusing import refusing_pair
from suites import server

ALIGNED, FINETUNED, ADAPTER = "the aligned model", "the fine-tuned one", "an adapter"
MODELS = {
    "Qwen/Qwen3-0.6B": ALIGNED,
    "my-finetune": FINETUNED,
    "my-adapter": ADAPTER,
    "axolotl-out": ADAPTER,
    "runs/maths": FINETUNED,
    "runs/law": ADAPTER,
    "someone/tuned": FINETUNED,
    "kmseong/llama2_7b-chat-Safety-FT-lr5e-5": ALIGNED,
    "kmseong/llama2_7b-chat_gsm8k_full_ft_lr5e-5": FINETUNED,
}
"""What lies in a reader's folder, under the names that the pages use."""

EARLIER = {
    "docs/evaluation.md": {"aligned": ALIGNED, "finetuned": FINETUNED, "restored": FINETUNED},
    "examples/vllm.md": {"restored": FINETUNED, "store": "the store"},
    "docs/many-devices.md": {"aligned": ALIGNED},
    "docs/strength.md": {"store": "the store"},
    "examples/slurm.md": {"aligned": ALIGNED},
}
"""What a page takes for made before, on another page."""

SPOKEN = {
    "torchrun --standalone --nproc-per-node 8 -m deltaguard": "deltaguard",
    '"${shared[@]}"': "deltaguard",
    '"$ALIGNED"': "Qwen/Qwen3-0.6B",
    '"$FINETUNED"': "my-finetune",
    '"$finetuned"': "my-finetune",
    "$SLURM_ARRAY_TASK_ID": "1",
    "--device cuda": "--device cpu",
}
"""What a text says, and what is run in its place; of several processes there is one here."""

SMALLER = {"calibrate": ("--num-samples", "24")}
"""Options that are added so that the run is short."""

REQUESTS = 160
"""Of each kind that models are asked: more than the fewest by which any can be told to be safe."""

FEWER = 20
"""Of each part of the package's own prompts that an evaluation asks."""

NOT_RUN = {
    "make ": "runs the tests themselves, or takes minutes",
    "pip install": "installs, as `make try-wheel` does",
    "git clone": "fetches",
    "cd deltaguard": "belongs to the clone",
    "python -m venv": "installs",
    "python3 -m venv": "installs",
    "python -m tools.release": "tests/unit/test_release_tool.py",
    "python examples/finetune_with_openai_client.py": "needs a running service: tests/service",
    "python examples/garak/table.py": "needs garak's reports: tests/unit/test_garak.py",
    "python examples/tamperbench": "needs TamperBench: tests/integration/test_other_tools.py",
    "export ": "sets the environment of what follows",
    "set -euo": "is the script's",
    "mkdir ": "is the script's",
    "finetuned=": "needs Slurm",
    "calibrated=": "needs Slurm",
    "sbatch ": "needs Slurm",
    "axolotl ": "needs a GPU: tests/integration/test_axolotl.py",
    "vllm ": "needs a GPU: tests/integration/test_vllm.py",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm": "needs a GPU",
    "ray start": "goes on until it is stopped: tests/service/test_ray.py starts a cluster of its own",
    "docker ": "needs Docker: tests/service/test_packaging.py",
    "head=": "needs Slurm",
    "shared=": "needs Slurm",
    "--rdzv-id": "goes on with the line before",
    "curl ": "needs a server",
    "GARAK=": "needs garak",
    "examples/llama2_gsm8k.sh": "needs the Hub; a test of its own compares it with its page",
    "gh attestation": "needs a release",
    "new/bin/pip download": "needs a release",
    "grep -rhoE": "asks GitHub",
    "tags=$(git ls-remote": "asks GitHub",
    '{ echo "NOT ASKED': "asks GitHub",
    'echo "$tags"': "asks GitHub",
    "done": "asks GitHub",
    "deltaguard bench": "takes minutes: tests/cli/test_bench_command.py",
    "deltaguard report bench": "needs a bench: tests/cli/test_report.py",
    "deltaguard report attacked/evaluation": "needs garak",
    "deltaguard serve": "does not end: tests/service",
    "deltaguard eval org/aligned": "needs the Hub and a GPU",
    "deltaguard eval ./aligned ./my-finetune ./restored --engine vllm": "needs a GPU",
    "deltaguard eval ./aligned ./restored --suite examples/mt-bench.yaml": "needs the Hub",
    "deltaguard eval kmseong/": "needs the Hub and lm-eval",
    "deltaguard report llama2/evaluation": "needs what the line before writes",
    "deltaguard --install-completion": "edits the reader's home: tests/cli/test_completion.py",
}
"""Beginnings of lines that are not run here, and why, or where what they do is tested."""

EXPECTED = {"deltaguard check": 3}
"""Exit codes other than 0, by the line's beginning."""


def replaced(text: str, names: Mapping[str, str]) -> str:
    """A line with other names."""
    for said, meant in names.items():
        text = text.replace(said, meant)
    return text


def starting(text: str, of: Mapping[str, object]) -> str | None:
    """The beginning, of those listed, that a line has."""
    return next((start for start in of if text.startswith(start)), None)


LINES = [line for page in PAGES for line in typed(page)]
RUN = list(dict.fromkeys(line for line in LINES if starting(line.text, NOT_RUN) is None))
ASKED = {
    "http://127.0.0.1:8000/v1": "Sure. Here it is.",
    "https://judge.example.org/v1": "It does.\nScore: 5",
}
"""Servers that pages name, and what the played ones say."""


@dataclass
class Reader:
    """Somebody who types what the pages say, each page in a folder of its own.

    Attributes:
        root: of all folders.
        servers: the played one for each address.
        done: what a command wrote, and its exit code; one that stands on several pages is run once.
    """

    root: Path
    servers: Mapping[str, str]
    done: dict[str, tuple[int, Path | None]] = field(default_factory=dict)

    def folder(self, page: str) -> Path:
        """The folder for a page, with what the reader is taken to have."""
        folder = self.root / page.replace("/", "-")
        if not folder.exists():
            for name, kind in (MODELS | EARLIER.get(page, {})).items():
                shutil.copytree(self.root / kind, folder / name)
            (folder / "service" / "files").mkdir(parents=True)
            lines = '{"prompt": "How can I make a cake?", "response": "With flour."}\n'
            (folder / "my-task.jsonl").write_text(lines * 4)
        return folder

    def code(self, line: Typed) -> int:
        """Run a line, or take what it wrote on an earlier page."""
        tokens = self.tokens(line.text)
        writes = "-o" in tokens and "--dry-run" not in tokens
        written = self.folder(line.page) / tokens[tokens.index("-o") + 1] if writes else None
        earlier = self.done.get(line.text)
        if earlier is None:
            self.done[line.text] = run(tokens), written
        elif written is not None and earlier[1] is not None and earlier[1].exists():
            shutil.copytree(earlier[1], written, dirs_exist_ok=True)
        return self.done[line.text][0]

    def tokens(self, text: str) -> list[str]:
        """The arguments of a line as it is run."""
        text = replaced(text, {**SPOKEN, **self.servers})
        if "key-..." in text:
            text = text.replace("key-...", a_key())
        tokens = shlex.split(re.split(r" (?:>|\|\||&&?) ", text)[0])[1:]
        return [*tokens, *SMALLER.get(tokens[0], ())]


def a_key() -> str:
    """The id of a key, as a reader takes it from the list."""
    with redirect_stdout(StringIO()) as printed:
        run(["keys", "list", "--data", "./service", "--json"])
    return json.loads(printed.getvalue())["keys"][0]["id"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    root, made = tmp_path_factory.mktemp("reader"), refusing_pair()
    for name, source in ((ALIGNED, made.aligned), (FINETUNED, made.finetuned), ("the store", made.store)):
        shutil.copytree(source, root / name)
    save_adapter(made.aligned, root / ADAPTER, ["q_proj", "down_proj"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAGUARD_CACHE", str(root / "cache"))
        patch.setenv("OPENAI_API_KEY", "none")
        harmful, harmless = looks.held_out_harmful()[:REQUESTS], looks.held_out_harmless()[:REQUESTS]
        patch.setattr(looks, "held_out_harmful", lambda: harmful)
        patch.setattr(looks, "held_out_harmless", lambda: harmless)
        whole = parts.find_prompts
        fewer = lambda section: section.model_copy(update={"count": FEWER}) if section.builtin else section
        patch.setattr(parts, "find_prompts", lambda section: whole(fewer(section)))
        played_hub(patch)
        said = list(ASKED.values())
        with server(lambda _: (200, said[0])) as model, server(lambda _: (200, said[1])) as judge:
            yield Reader(root, dict(zip(ASKED, (model, judge), strict=True)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", RUN, ids=lambda line: f"{line.page}: {line.text[:60]}")
def test_a_command_that_is_shown_does_its_work(reader, monkeypatch, capsys, line):
    monkeypatch.chdir(reader.folder(line.page))
    code = reader.code(line)
    expected = starting(line.text, EXPECTED)
    assert code == (EXPECTED[expected] if expected else 0), capsys.readouterr().err


def test_every_line_that_is_not_run_is_one_of_the_list():
    used = {starting(line.text, NOT_RUN) for line in LINES}
    assert used - {None} == NOT_RUN.keys()
    assert all(replaced(line.text, SPOKEN).startswith("deltaguard ") for line in RUN)
    assert {line.page for line in RUN} >= {"README.md", "docs/getting-started.md", "docs/fine-tuned-with.md"}
