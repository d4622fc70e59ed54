"""The public data sets that `load_questions` knows: where they lie, their columns, their terms.

Columns are listed for the release on the Hub and for the files of the original release, and are compared
without regard to case. The terms are a pointer for people, not legal advice: what the page says, holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class DatasetSpec:
    """One set of questions, or the part of it that is used.

    Attributes:
        name: what users call it.
        title: the same for people.
        hub_id: the repository on the Hub.
        config: the repository's configuration, `None` for its only one.
        split: the split that is used.
        prompt_columns: what the request's column is called; the first that a file has counts.
        expected_columns: likewise of the right answer; empty where there is none.
        keep: which rows belong to the set, by column, from that column's text; the first column that a file
            has counts, and a file that has none of them is refused unless `all_without_filter`.
        all_without_filter: releases without any of the columns of `keep` hold nothing but the set.
        instruction: written before each request, a blank line between.
        hub_files: pattern of the repository's files, where it does not say itself which belong to the split.
        headerless: the CSV files of the release have no header: one request a row.
        terms: licence and terms of use.
        homepage: where to get it, and to read its terms.
        paper: what to cite.
    """

    name: str
    title: str
    hub_id: str
    split: str
    prompt_columns: tuple[str, ...]
    terms: str
    homepage: str
    paper: str
    config: str | None = None
    expected_columns: tuple[str, ...] = ()
    keep: Mapping[str, Callable[[str], bool]] = field(default_factory=dict[str, Callable[[str], bool]])
    all_without_filter: bool = False
    instruction: str = ""
    hub_files: str | None = None
    headerless: bool = False


def _is(wanted: str) -> Callable[[str], bool]:
    return lambda text: text.strip().casefold() == wanted


def _contrast(text: str) -> bool:
    return text.startswith("contrast_")


_XSTEST_SAFE = MappingProxyType({"label": _is("safe"), "type": lambda text: not _contrast(text)})
_XSTEST_UNSAFE = MappingProxyType({"label": _is("unsafe"), "type": _contrast})
_XSTEST_TERMS = "CC-BY-4.0; the copy on the Hub asks to accept its terms."
_XSTEST_HOME = "https://github.com/paul-rottger/xstest"
_XSTEST_PAPER = "Röttger et al. 2024, arXiv:2308.01263"
_JAILBREAKBENCH_HOME = "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors"
_JAILBREAKBENCH_PAPER = "Chao et al. 2024, arXiv:2404.01318"
_OR_BENCH_HOME = "https://huggingface.co/datasets/bench-llm/or-bench"
_OR_BENCH_PAPER = "Cui et al. 2024, arXiv:2405.20947"

_SPECS = (
    DatasetSpec(
        name="hex-phi",
        title="HEx-PHI",
        hub_id="LLM-Tuning-Safety/HEx-PHI",
        hub_files="category_*.csv",
        split="train",
        headerless=True,
        prompt_columns=("prompt", "instruction"),
        terms=(
            "the HEx-PHI Dataset License Agreement: access is granted by hand after it is accepted, no "
            "training for a harmful purpose, no prompts to models that generate anything but text."
        ),
        homepage="https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI",
        paper="Qi et al. 2024, arXiv:2310.03693",
    ),
    DatasetSpec(
        name="advbench",
        title="AdvBench, harmful behaviours",
        hub_id="walledai/AdvBench",
        split="train",
        prompt_columns=("prompt", "goal"),
        terms="MIT; the copy on the Hub asks to accept its terms.",
        homepage="https://github.com/llm-attacks/llm-attacks (data/advbench/harmful_behaviors.csv)",
        paper="Zou et al. 2023, arXiv:2307.15043",
    ),
    DatasetSpec(
        name="harmbench",
        title="HarmBench, standard behaviours",
        hub_id="walledai/HarmBench",
        config="standard",
        split="train",
        prompt_columns=("prompt", "behavior"),
        keep=MappingProxyType({"functionalcategory": _is("standard")}),
        all_without_filter=True,
        terms="MIT; the copy on the Hub asks to accept its terms.",
        homepage=(
            "https://github.com/centerforaisafety/HarmBench "
            "(data/behavior_datasets/harmbench_behaviors_text_all.csv)"
        ),
        paper="Mazeika et al. 2024, arXiv:2402.04249",
    ),
    DatasetSpec(
        name="strongreject",
        title="StrongREJECT",
        hub_id="walledai/StrongREJECT",
        split="train",
        prompt_columns=("prompt", "forbidden_prompt"),
        terms="MIT; the copy on the Hub asks to accept its terms.",
        homepage=(
            "https://github.com/alexandrasouly/strongreject (strongreject_dataset/strongreject_dataset.csv)"
        ),
        paper="Souly et al. 2024, arXiv:2402.10260",
    ),
    DatasetSpec(
        name="jailbreakbench",
        title="JailbreakBench, harmful behaviours",
        hub_id="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        split="harmful",
        prompt_columns=("goal",),
        terms="MIT.",
        homepage=_JAILBREAKBENCH_HOME,
        paper=_JAILBREAKBENCH_PAPER,
    ),
    DatasetSpec(
        name="jailbreakbench-benign",
        title="JailbreakBench, benign behaviours",
        hub_id="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        split="benign",
        prompt_columns=("goal",),
        terms="MIT.",
        homepage=_JAILBREAKBENCH_HOME,
        paper=_JAILBREAKBENCH_PAPER,
    ),
    DatasetSpec(
        name="beavertails",
        title="BeaverTails, requests that drew an unsafe answer",
        hub_id="PKU-Alignment/BeaverTails",
        split="30k_test",
        prompt_columns=("prompt",),
        # The label is that of an answer: a request is in the set where one of its answers was unsafe.
        keep=MappingProxyType({"is_safe": _is("false")}),
        terms="CC-BY-NC-4.0: no commercial use.",
        homepage="https://huggingface.co/datasets/PKU-Alignment/BeaverTails",
        paper="Ji et al. 2023, arXiv:2307.04657",
    ),
    DatasetSpec(
        name="xstest-safe",
        title="XSTest, safe requests that look unsafe",
        hub_id="walledai/XSTest",
        split="test",
        prompt_columns=("prompt",),
        keep=_XSTEST_SAFE,
        terms=_XSTEST_TERMS,
        homepage=_XSTEST_HOME,
        paper=_XSTEST_PAPER,
    ),
    DatasetSpec(
        name="xstest-unsafe",
        title="XSTest, unsafe contrasts",
        hub_id="walledai/XSTest",
        split="test",
        prompt_columns=("prompt",),
        keep=_XSTEST_UNSAFE,
        terms=_XSTEST_TERMS,
        homepage=_XSTEST_HOME,
        paper=_XSTEST_PAPER,
    ),
    DatasetSpec(
        name="or-bench-hard",
        title="OR-Bench-Hard-1K, safe requests that are often refused",
        hub_id="bench-llm/or-bench",
        config="or-bench-hard-1k",
        split="train",
        prompt_columns=("prompt",),
        terms="CC-BY-4.0.",
        homepage=_OR_BENCH_HOME,
        paper=_OR_BENCH_PAPER,
    ),
    DatasetSpec(
        name="or-bench-toxic",
        title="OR-Bench-Toxic",
        hub_id="bench-llm/or-bench",
        config="or-bench-toxic",
        split="train",
        prompt_columns=("prompt",),
        terms="CC-BY-4.0.",
        homepage=_OR_BENCH_HOME,
        paper=_OR_BENCH_PAPER,
    ),
    DatasetSpec(
        name="samsum",
        title="SAMSum, summaries of chats",
        hub_id="knkarthick/samsum",
        split="test",
        prompt_columns=("dialogue",),
        expected_columns=("summary",),
        instruction="Summarise this conversation in one or two sentences.",
        terms="CC-BY-NC-ND-4.0: no commercial use, no changed copies.",
        homepage="https://huggingface.co/datasets/knkarthick/samsum",
        paper="Gliwa et al. 2019, arXiv:1911.12237",
    ),
    DatasetSpec(
        name="gsm8k",
        title="GSM8K, grade-school maths",
        hub_id="openai/gsm8k",
        config="main",
        split="test",
        prompt_columns=("question",),
        expected_columns=("answer",),
        terms="MIT.",
        homepage="https://huggingface.co/datasets/openai/gsm8k",
        paper="Cobbe et al. 2021, arXiv:2110.14168",
    ),
)

DATASETS: Mapping[str, DatasetSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""All of them by name."""
