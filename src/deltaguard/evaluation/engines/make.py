"""An engine by name."""

import math
from dataclasses import dataclass, field
from typing import Literal

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.openai import OpenAIEngine
from deltaguard.evaluation.engines.transformers import (
    Dtype,
    TransformersEngine,
    resolved_dtype,
)
from deltaguard.evaluation.engines.vllm import VLLMEngine
from deltaguard.evaluation.exchange import MAX_MISSING, Engine
from deltaguard.evaluation.server import Server, public_address, require_address

EngineName = Literal["transformers", "vllm", "openai"]


@dataclass(frozen=True)
class EngineConfig:
    """What generates answers, for all models alike.

    Attributes:
        name: `transformers`, `vllm` or `openai`.
        device: where transformers runs; `auto` is CUDA where there is one, else the CPU.
        dtype: of the weights; `auto` is the checkpoint's, and float32 on the CPU.
        batch_size: questions at a time; 8 by a server and 32 else where absent.
        base_url: of the server, for `openai`.
        api_key_env: the environment variable with the server's key.
        timeout: seconds for each request to the server, from its beginning to the end of the reply.
        max_missing: the share of a section's answers that a server may fail to give. What is missing is left
            out of every number and named in the report; above the share the run ends.

    Raises:
        DeltaguardError: `openai` has no `base_url` or one that is none, another engine has one, or a number
            is out of range.
    """

    name: EngineName = "transformers"
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    base_url: str | None = field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    max_missing: float = MAX_MISSING

    def __post_init__(self) -> None:
        if self.name == "openai" and not self.base_url:
            raise DeltaguardError("The openai engine needs the server's address: --base-url URL.")
        if self.name != "openai" and self.base_url:
            raise DeltaguardError(f"--base-url is for --engine openai; the engine is {self.name}.")
        if self.at_once < 1:
            raise DeltaguardError(f"The batch size must be at least 1, and is {self.batch_size}.")
        if not 0 < self.timeout < math.inf:
            raise DeltaguardError(f"The time limit must be more than 0 seconds, and is {self.timeout}.")
        if not 0 <= self.max_missing < 1:
            raise DeltaguardError(
                f"The share of answers that may be missing is 0 or more and below 1, not {self.max_missing}."
            )
        if self.base_url is not None:
            require_address(self.base_url)

    @property
    def at_once(self) -> int:
        """Questions at a time."""
        if self.batch_size is not None:
            return self.batch_size
        return 8 if self.name == "openai" else 32

    @property
    def described(self) -> str:
        """What answers may depend on: the name, with the kind of device and the arithmetic or the address.

        Raises:
            DeltaguardError: the device cannot be used.
        """
        if self.base_url is not None:
            return f"{self.name} at {public_address(self.base_url)}"
        device = "cuda" if self.name == "vllm" else str(find_device(self.device))
        dtype = resolved_dtype(self.dtype, device)
        kind = "the checkpoint's dtype" if dtype == "auto" else dtype
        return f"{self.name} on {device.split(':')[0]}, {kind}"


def make_engine(reference: str, config: EngineConfig) -> Engine:
    """Load a model, or connect to the server that has it.

    Args:
        reference: a folder, a Hub id, or `id@revision`; the model's name on the server for `openai`.
        config: which engine, and how it runs.

    Raises:
        DeltaguardError: it cannot be loaded, or a package is missing.
    """
    if config.base_url is not None:
        address, key = config.base_url, config.api_key_env
        server = Server(address, reference, key, timeout=config.timeout, workers=config.at_once)
        return OpenAIEngine(server)
    if config.name == "vllm":
        return VLLMEngine.open(reference, dtype=config.dtype, batch_size=config.at_once)
    return TransformersEngine.open(
        reference, device=config.device, dtype=config.dtype, batch_size=config.at_once
    )
