"""Files of models, adapters and curvature stores."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from mutators import damage, damage_json, damage_tensors

import models
from deltaguard.chat.conversations import Conversation
from deltaguard.chat.template import apply_template
from deltaguard.chat.tokens import encode
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import find_device
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Decoding, Question
from deltaguard.evaluation.judges.guards import GuardJudge, GuardSpec
from deltaguard.evaluation.judges.templates import template_in_card
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import empty_model, load_config, load_tokenizer, vocabulary_size
from deltaguard.restoration.diff import diff
from deltaguard.restoration.dry_run import plan_restore
from pairs import pair, save_adapter
from targets import Kind, Target, in_file

SINGLE = "model.safetensors"
GENERATION = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "eos_token_id": [2], "top_k": 5}
CARD = "# Guard\n\n```python\nformat = \"\"\"Rate {prompt} and {response}.\"\"\"\nother = '''{a}'''\n```\n"


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def config(folder: Path) -> Target:
    model = copied(pair().finetuned, folder)
    return in_file(model / "config.json", damage_json, lambda: diff(pair().aligned, model))


def config_of_transformers(folder: Path) -> Target:
    model = copied(pair().aligned, folder)

    def read() -> None:
        load_config(model, "model")
        empty_model(model, "model")

    return in_file(model / "config.json", damage_json, read)


def answered(model: Path) -> None:
    engine = TransformersEngine.open(str(model), device="cpu")
    questions = [Question("How?", expected="So."), Question("What is it, then?", expected="It is so.")]
    engine.answer(questions, Decoding(2))
    engine.answer(questions, Decoding(2, temperature=0.5))
    engine.likelihood(questions)


def generation_config(folder: Path) -> Target:
    model = copied(pair().aligned, folder)
    content = json.dumps(GENERATION).encode()
    return in_file(model / "generation_config.json", damage_json, lambda: answered(model), content)


def compared(name: str) -> Callable[[Path], Target]:
    """A file of a model that is compared with another."""

    def make(folder: Path) -> Target:
        model = copied(pair().aligned, folder)
        (model / "generation_config.json").write_text(json.dumps(GENERATION))

        def read() -> None:
            diff(pair().aligned, model)
            plan_restore(pair().aligned, model, store=pair().store)

        return in_file(model / name, damage if name.endswith(".jinja") else damage_json, read)

    return make


def loaded_config(folder: Path) -> Target:
    model = copied(pair().aligned, folder)
    return in_file(model / "config.json", damage_json, lambda: answered(model))


def index(folder: Path) -> Target:
    model = copied(pair("llama", dtype=torch.bfloat16, max_shard_size="30KB").aligned, folder)
    path = model / "model.safetensors.index.json"
    return in_file(path, damage_json, lambda: Checkpoint.open(model))


def weights(folder: Path) -> Target:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    small = models.tiny_model("llama", num_hidden_layers=1, vocab_size=32)
    small.save_pretrained(model)

    def read() -> None:
        checkpoint = Checkpoint.open(model)
        checkpoint.fingerprint()
        for name in checkpoint.tensors:
            checkpoint.read(name)

    return in_file(model / SINGLE, damage_tensors, read)


def weights_of_a_pair(folder: Path) -> Target:
    model = copied(pair().finetuned, folder)

    def read() -> None:
        diff(pair().aligned, model)
        plan_restore(pair().aligned, model, store=pair().store)

    return in_file(model / SINGLE, damage_tensors, read)


def encoded(model: Path) -> None:
    vocabulary_size(model)
    tokenizer = load_tokenizer(model, "model")
    encode(tokenizer, Conversation("How can I?", "Be kind.", "No."), max_length=99)


def tokenizer(folder: Path) -> Target:
    model = copied(pair().aligned, folder)
    return in_file(model / "tokenizer.json", damage_json, lambda: encoded(model))


def answering_tokenizer(folder: Path) -> Target:
    model = copied(pair().aligned, folder)
    return in_file(model / "tokenizer.json", damage_json, lambda: answered(model))


def tokenizer_config(folder: Path) -> Target:
    model = copied(pair().aligned, folder)
    return in_file(model / "tokenizer_config.json", damage_json, lambda: encoded(model))


def chat_template(_: Path) -> Target:
    chosen = models.tiny_tokenizer()
    pieces = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        *(
            "{{ 1 / 0 }}",
            "{{ messages[7].content }}",
            "{{ 9 ** 99999999 }}",
            "{{ 'a' * 10 ** 9 }}",
            "{% for %}",
        ),
        "{{ raise_exception('no') }}{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}{{ ''.__class__ }}{{ cycler.__init__ }}",
    )

    def damage_template(content, draw):
        if draw.random() < 0.5:
            return damage(content, draw)
        at = draw.choice([i for i in range(len(content) + 1) if content[i : i + 1] in (b"{", b"")])
        return content[:at] + draw.choice(pieces).encode() + content[at:]

    def read(content: bytes) -> None:
        chosen.chat_template = content.decode(errors="replace")
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How?"}]
        for each in (messages, messages[1:]):
            apply_template(chosen, each, seconds=0.5)

    return Target(models.CHAT_TEMPLATE.encode(), damage_template, read)


def adapter(folder: Path) -> Path:
    save_adapter(pair().aligned, folder / "adapter", ["q_proj", "down_proj"])
    return folder / "adapter"


def opened_adapter(folder: Path) -> None:
    opened = AdapterCheckpoint.open(Checkpoint.open(pair().aligned), folder)
    for name in sorted(opened.adapted):
        opened.read(name)
        opened.thin_delta(name)


def adapter_config(folder: Path) -> Target:
    made = adapter(folder)
    return in_file(made / "adapter_config.json", damage_json, lambda: opened_adapter(made))


def adapter_weights(folder: Path) -> Target:
    made = adapter(folder)
    return in_file(made / "adapter_model.safetensors", damage_tensors, lambda: opened_adapter(made))


def read_store(folder: Path) -> None:
    store = CurvatureStore.from_pretrained(folder)
    for group in store.groups:
        store.input_spectrum(group.name)
        for layer in group.layers:
            store.output_spectrum(layer.tensor)
    plan_restore(pair().aligned, pair().finetuned, store=folder)


def curvature(folder: Path) -> Target:
    store = copied(pair().store, folder)
    return in_file(store / "curvature.json", damage_json, lambda: read_store(store))


def curvature_tensors(folder: Path) -> Target:
    store = copied(pair().store, folder)
    return in_file(next(iter(store.glob("*.safetensors"))), damage_tensors, lambda: read_store(store))


def guards_card(_: Path) -> Target:
    wanted = frozenset({"prompt", "response"})
    return Target(
        CARD.encode(),
        damage,
        lambda content: template_in_card(content.decode(errors="replace"), wanted, source="README.md"),
    )


def prompt_file(folder: Path) -> Target:
    path = folder / "prompt.txt"
    spec = GuardSpec(model="nowhere/at all", template="wildguard", prompt_file=path)
    # Of a new judge each time, since one reads it once, and before it looks for the model.
    return in_file(path, damage, lambda: GuardJudge(spec)._format, b"{prompt} {response}")


def device_name(_: Path) -> Target:
    return Target(b"cuda:0", damage, lambda content: find_device(content.decode(errors="replace")))


def reference(_: Path) -> Target:
    def read(content: bytes) -> None:
        name = os.fsdecode(content)
        # What may be a repository would be fetched.
        if not re.fullmatch(r"\w[\w./@-]*", name):
            Checkpoint.open(name)

    return Target(b"~someone/models/mine@main", damage, read)


KINDS = (
    Kind("config.json", 200, config),
    Kind("config.json in transformers", 60, config_of_transformers),
    Kind("config.json of a model that answers", 12, loaded_config),
    Kind("generation_config.json", 12, generation_config),
    Kind("config.json of a pair", 20, compared("config.json")),
    Kind("generation_config.json of a pair", 20, compared("generation_config.json")),
    Kind("tokenizer.json of a pair", 20, compared("tokenizer.json")),
    Kind("tokenizer_config.json of a pair", 20, compared("tokenizer_config.json")),
    Kind("chat template of a pair", 20, compared("chat_template.jinja")),
    Kind("index", 200, index),
    Kind("weights", 200, weights),
    Kind("weights of a pair", 60, weights_of_a_pair),
    Kind("tokenizer.json", 60, tokenizer),
    Kind("tokenizer.json of a model that answers", 12, answering_tokenizer),
    Kind("tokenizer_config.json", 60, tokenizer_config),
    Kind("chat template", 60, chat_template),
    Kind("adapter_config.json", 100, adapter_config),
    Kind("adapter weights", 60, adapter_weights),
    Kind("curvature.json", 100, curvature),
    Kind("curvature tensors", 60, curvature_tensors),
    Kind("card of a guard", 40, guards_card),
    Kind("prompt file of a guard", 20, prompt_file),
    Kind("name of a device", 40, device_name),
    Kind("reference to a model", 40, reference),
)
