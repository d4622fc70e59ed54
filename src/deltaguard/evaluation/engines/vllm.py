"""Answers from a model in this process, by vLLM, for machines where it is installed."""

import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.identity import find_folders, load_tokenizer, whole_model
from deltaguard.evaluation.engines.transformers import Dtype, rendered
from deltaguard.evaluation.exchange import Decoding, OnBatch, Question
from deltaguard.models.loading import foreign


@dataclass
class VLLMEngine:
    """A vLLM model and its tokenizer. Open one with `VLLMEngine.open`.

    Attributes:
        model: a `vllm.LLM`; `None` once closed.
        tokenizer: a transformers tokenizer.
        batch_size: questions handed to vLLM at a time, after which the answers are stored.
    """

    model: Any
    tokenizer: Any
    batch_size: int

    @classmethod
    def open(cls, reference: str, *, dtype: Dtype = "auto", batch_size: int = 256) -> "VLLMEngine":
        """Load a model on the GPU.

        Args:
            reference: a folder, a Hub id, or `id@revision`; no adapter.
            dtype: of the weights; `auto` is the checkpoint's.
            batch_size: questions handed to vLLM at a time.

        Raises:
            DeltaguardError: vLLM is not installed or cannot load the model, or the reference is an adapter.
        """
        folder, tokenizer = whole_model(reference), load_tokenizer(find_folders(reference))
        with foreign(f"vLLM cannot load {reference}"):
            try:
                from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
            except ImportError as error:
                raise DeltaguardError(
                    "The vllm engine needs vLLM, which has its own demands on GPU and torch: see "
                    "https://docs.vllm.ai, or use `--engine transformers`."
                ) from error
            model: Any = LLM(model=str(folder), dtype=dtype)
        return cls(model, tokenizer, batch_size)

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> list[str]:
        """Answer each question, in order; prompts are rendered and tokenised here, as for transformers.

        Raises:
            DeltaguardError: vLLM fails.
        """
        with foreign("vLLM cannot draw answers as the suite asks"):
            from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

            drawn: Any = SamplingParams(
                temperature=decoding.temperature, seed=decoding.seed, max_tokens=decoding.max_new_tokens
            )
        texts = [rendered(self.tokenizer, question) for question in questions]
        answers: list[str] = []
        for start in range(0, len(texts), self.batch_size):
            batch = [
                {"prompt_token_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
                for text in texts[start : start + self.batch_size]
            ]
            with foreign("vLLM cannot answer"):
                outputs = self.model.generate(batch, drawn, use_tqdm=False)
                found = [str(output.outputs[0].text).strip() for output in outputs]
            if on_batch is not None:
                on_batch(range(start, start + len(found)), found)
            answers += found
        return answers

    def close(self) -> None:
        """Stop vLLM and give back its memory, so that the next model finds room.

        Raises:
            DeltaguardError: vLLM fails to stop.
        """
        model, self.model = self.model, None
        if model is None:
            return
        with foreign("vLLM cannot be stopped"):
            _shut_down(model)
            # The last reference: what vLLM keeps of its own goes with the collection.
            del model
            _clean_up()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _shut_down(model: Any) -> None:
    """Stop the process that holds weights and cache; dropping the model does not wait for its end."""
    engine: Any = getattr(model.llm_engine, "engine_core", None)
    # Releases differ in which of the two can be stopped; older ones stop when they are collected.
    for part in (model, engine):
        if hasattr(part, "shutdown"):
            part.shutdown()
            return


def _clean_up() -> None:
    """Have vLLM end its process groups, which outlive the model and stand in the way of the next."""
    with suppress(ImportError):
        from vllm.distributed import (  # pyright: ignore[reportMissingImports]
            cleanup_dist_env_and_memory,
        )

        cleanup_dist_env_and_memory()
