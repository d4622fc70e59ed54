"""Answers from a model in this process, by transformers; adapters are merged by PEFT."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, filterwarnings

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import Answer, generate
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.chat.template import render, require_turns
from deltaguard.chat.thinking import THOUGHT_TOKENS, begins_thoughts, closed
from deltaguard.chat.tokens import context_length, token_ids
from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError, listed, require_packages
from deltaguard.evaluation.engines.folders import find_folders, load_tokenizer
from deltaguard.evaluation.exchange import Decoding, OnBatch, Question
from deltaguard.models.adapter import open_adapter_weights
from deltaguard.models.checkpoint import name_map
from deltaguard.models.families import stored_in_out
from deltaguard.models.loading import foreign, load_model
from deltaguard.models.lora import changed_modules
from deltaguard.models.lora_config import LoraConfig, Scaling, find_scalings, read_lora_config

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


_LIKELIHOOD_BATCH = 8
"""Conversations are padded to the longest of their batch: wide batches pad more than they save."""


@dataclass
class TransformersEngine:
    """A model and its tokenizer. Open one with `TransformersEngine.open`.

    Attributes:
        model: a transformers causal language model in evaluation mode; `None` once closed.
        tokenizer: its tokenizer.
        batch_size: questions answered at a time.
    """

    model: Any
    tokenizer: Any
    batch_size: int

    @classmethod
    def open(
        cls, reference: str, *, device: str = "auto", dtype: Dtype = "auto", batch_size: int = 32
    ) -> "TransformersEngine":
        """Load a model.

        Args:
            reference: a folder, a Hub id, or `id@revision`, of a model or of a PEFT adapter, which is merged.
            device: as `torch.device` reads it; `auto` is CUDA where there is one, else the CPU.
            dtype: of the weights; `auto` is the checkpoint's, and float32 on the CPU.
            batch_size: questions answered at a time.

        Raises:
            DeltaguardError: it cannot be found or loaded, or the device cannot be used.
        """
        folders = find_folders(reference)
        chosen = str(find_device(device))
        kind = resolved_dtype(dtype, chosen)
        model = load_model(folders.model, reference, dtype=None if kind == "auto" else getattr(torch, kind))
        if folders.adapter is not None:
            model = merge_adapter(model, folders.adapter, reference)
        return cls(model.to(torch.device(chosen)).eval(), load_tokenizer(reference), batch_size)

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> list[str]:
        """Answer each question, in order; a prefill is put behind the rendered prompt and continued.

        Raises:
            DeltaguardError: the template fails or shows one turn alone, or the model has too few positions
                for conversations of two questions.
        """
        self._require_room(questions, decoding)

        def record(chosen: Sequence[int], answers: Sequence[Answer]) -> None:
            if on_batch is not None:
                on_batch(chosen, [each.text for each in answers])

        return generate(
            self.model,
            self.tokenizer,
            [rendered(self.tokenizer, question) for question in questions],
            max_new_tokens=decoding.max_new_tokens,
            batch_size=self.batch_size,
            temperature=decoding.temperature,
            seed=decoding.seed,
            on_batch=record,
        )

    def _require_room(self, questions: Sequence[Question], decoding: Decoding) -> None:
        """Refuse conversations that may outgrow the model, before hours of first answers, not after.

        What a model reads or writes beyond its positions is an error in some models and nonsense in others.
        """
        texts = [
            rendered(self.tokenizer, each.continued("")) for each in questions if each.follow_up is not None
        ]
        if not texts:
            return
        thoughts = THOUGHT_TOKENS if any(map(begins_thoughts, texts)) else 0
        tokens = max(len(token_ids(self.tokenizer, text)) for text in texts)
        room = context_length(self.model.config)
        most = (room - tokens - thoughts) // 2
        if decoding.max_new_tokens > most:
            remedy = f"Lower `max_new_tokens` to {most}, or leave" if most > 0 else "Leave"
            raise DeltaguardError(
                f"The conversations of two questions take up to {tokens} tokens beside two answers of up to "
                f"{decoding.max_new_tokens}{f' and {thoughts} for thoughts' if thoughts else ''}, and the "
                f"model has {room} positions. {remedy} the section out."
            )

    def likelihood(self, questions: Sequence[Question]) -> list[float]:
        """Measure the mean negative log-likelihood of each expected answer, nats per token.

        Raises:
            DeltaguardError: a question has no expected answer.
        """
        conversations = [Conversation(q.prompt, q.system, q.expected) for q in questions]
        size = min(self.batch_size, _LIKELIHOOD_BATCH)
        return negative_log_likelihood(self.model, self.tokenizer, conversations, batch_size=size)

    def close(self) -> None:
        """Let go of the model's memory."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rendered(tokenizer: Any, question: Question) -> str:
    """Render the text that a model continues: the chat template up to the answer, then the prefill.

    Where the template begins thoughts, they are closed before a prefill, which is the beginning of an answer.

    Raises:
        DeltaguardError: the template fails, leaves out the prompt, or shows one turn alone, and another one
            comes before or after this question.
    """
    if question.follow_up is not None:
        # Told with the first question, and not after hours of answers to it.
        require_turns(tokenizer)
    text = render(tokenizer, Conversation(question.prompt, question.system), question.earlier)
    unthought = closed("") if question.prefill and begins_thoughts(text) else ""
    return text + unthought + question.prefill


def resolved_dtype(dtype: Dtype, device: str) -> Dtype:
    """Name a dtype; `auto` is float32 on the CPU, and stays `auto`, the checkpoint's own, elsewhere.

    Example:
        >>> resolved_dtype("auto", "cpu"), resolved_dtype("auto", "cuda:1")
        ('float32', 'auto')
    """
    return "float32" if dtype == "auto" and device.startswith("cpu") else dtype


def merge_adapter(model: Any, folder: Path, reference: str) -> Any:
    """Merge an adapter into a model.

    PEFT would match the patterns of `adapter_config.json` against the names of all modules, for as long as
    that takes; so it is given a configuration that names the modules of the adapter's tensors, one by one.

    Args:
        model: a transformers causal language model; it is changed.
        folder: of the adapter.
        reference: what the user called it, for messages.

    Returns:
        The merged model.

    Raises:
        DeltaguardError: the adapter is no plain LoRA, does not fit the model, or PEFT cannot load it.
    """
    require_packages("Asking an adapter", "eval", "peft")
    from peft import PeftModel

    lora = read_lora_config(folder, reference)
    found = changed_modules(open_adapter_weights(folder)[1])
    names = name_map(
        [*found.adapted, *found.replaced], [name for name, _ in model.named_modules(remove_duplicate=False)]
    )
    absent = [name for name in (*found.adapted, *found.replaced) if name not in names]
    if absent:
        raise DeltaguardError(
            listed(f"The adapter {reference} changes modules that its model has not", absent)
        )
    scalings = find_scalings(lora, found.adapted, reference)
    adapted = {names[module]: scaling for module, scaling in scalings.items()}
    config = _literal(
        lora,
        adapted,
        modules_to_save=[names[module] for module in found.replaced] or None,
        fan_in_fan_out=any(stored_in_out(model.config.to_dict(), f"{name}.weight") for name in adapted),
    )
    renamed = {rf"^{re.escape(own)}\.": f"{name}." for own, name in names.items() if own != name}
    with foreign(f"peft cannot load {reference}"), catch_warnings():
        # PEFT warns of tensors that it does not find, and merges nothing in their place.
        filterwarnings("error", message="Found missing adapter keys")
        loaded: Any = PeftModel.from_pretrained(model, str(folder), config=config, key_mapping=renamed)
        return loaded.merge_and_unload()


def _literal(lora: LoraConfig, adapted: Mapping[str, Scaling], **others: Any) -> Any:
    """PEFT's configuration for modules named one by one."""
    import peft

    # PEFT reads the names of these patterns as regular expressions.
    exact = {name: f"^{re.escape(name)}" for name in adapted}
    alphas = {exact[n]: each.alpha for n, each in adapted.items() if each.alpha != lora.lora_alpha}
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]  # any number, in fact
        use_rslora=lora.use_rslora,
        rank_pattern={exact[n]: each.rank for n, each in adapted.items() if each.rank != lora.r},
        alpha_pattern=alphas,
        target_modules=list(adapted),
        inference_mode=True,
        **others,
    )
