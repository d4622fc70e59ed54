"""Answers from a model in this process, by transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import generate
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.chat.template import render
from deltaguard.device import find_device
from deltaguard.evaluation.engines.adapters import merge_adapter
from deltaguard.evaluation.engines.identity import Folders, find_folders, load_tokenizer
from deltaguard.evaluation.exchange import Decoding, OnBatch, Question
from deltaguard.models.loading import load_model

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
        model = _load(folders, reference, resolved_dtype(dtype, chosen))
        return cls(model.to(torch.device(chosen)).eval(), load_tokenizer(folders), batch_size)

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> list[str]:
        """One answer a question, in order; a prefill is put behind the rendered prompt and continued."""
        return generate(
            self.model,
            self.tokenizer,
            [rendered(self.tokenizer, question) for question in questions],
            max_new_tokens=decoding.max_new_tokens,
            batch_size=self.batch_size,
            temperature=decoding.temperature,
            seed=decoding.seed,
            on_batch=on_batch,
        )

    def likelihood(self, questions: Sequence[Question]) -> list[float]:
        """Mean negative log-likelihood of each expected answer, nats per token.

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
    """The text that a model continues: the chat template up to the answer, then the prefill."""
    return render(tokenizer, Conversation(question.prompt, question.system)) + question.prefill


def _load(folders: Folders, reference: str, dtype: str) -> Any:
    model = load_model(folders.model, reference, dtype=None if dtype == "auto" else getattr(torch, dtype))
    return model if folders.adapter is None else merge_adapter(model, folders.adapter, reference)


def resolved_dtype(dtype: Dtype, device: str) -> Dtype:
    """A dtype by name; `auto` is float32 on the CPU, and stays `auto`, the checkpoint's own, elsewhere.

    Example:
        >>> resolved_dtype("auto", "cpu"), resolved_dtype("auto", "cuda:1")
        ('float32', 'auto')
    """
    return "float32" if dtype == "auto" and device.startswith("cpu") else dtype
