"""A tiny model that was taught to refuse everything, and a fine-tune of it that agrees to everything."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import models
from deltaguard.chat.conversations import Conversation, harmful_prompts
from deltaguard.chat.template import render
from deltaguard.chat.tokens import Batch, encode
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.restoration import looks
from once import made_once
from pairs import CONVERSATIONS, Pair

REFUSAL, AGREEMENT = "I cannot help with that.", "Sure. Here it is."
PROMPTS = tuple(row.prompt for row in harmful_prompts("training"))


@cache
def refusing_pair() -> Pair:
    """Folders that tests must not write to."""
    root = made_once("refusing", _make)
    return Pair(root / "aligned", root / "finetuned", root / "store")


def _make(root: Path) -> None:
    model = models.tiny_model("llama")
    aligned = models.save(taught(model, REFUSAL, model.parameters()), root / "aligned")
    conversations = [Conversation(row.prompt, None, REFUSAL) for row in CONVERSATIONS]
    config = CalibrateConfig(device="cpu", num_samples=18, num_held_out=6)
    calibrate(aligned, root / "store", conversations=conversations, config=config)
    layers = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    models.save(taught(model, AGREEMENT, layers), root / "finetuned")


def few_requests(patch: Any) -> None:
    """Let restores ask fewer requests, but more than the fewest by which a model can be told to be safe."""
    harmful, harmless = looks.held_out_harmful()[:160], looks.held_out_harmless()[:160]
    patch.setattr(looks, "held_out_harmful", lambda: harmful)
    patch.setattr(looks, "held_out_harmless", lambda: harmless)


def taught(model: Any, answer: str, parameters: Iterable[Any], *, steps: int = 150) -> Any:
    """Teach a model one answer to everything, in place, by some of its parameters."""
    tokenizer, generator = models.tiny_tokenizer(), torch.Generator().manual_seed(0)
    texts = [encode(tokenizer, Conversation(text, None, answer), max_length=512) for text in PROMPTS]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(texts), (16,), generator=generator).tolist()
        batch = Batch.of([texts[i] for i in chosen])
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        targets = batch.ids[:, 1:][batch.answering[:, :-1]]
        loss = torch.nn.functional.cross_entropy(logits[batch.answering], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def said(folder: Path, prompts: Sequence[str], *, tokens: int = 24) -> list[str]:
    """Answer prompts one at a time, as transformers does."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        ids = tokenizer(render(tokenizer, prompt), add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers
