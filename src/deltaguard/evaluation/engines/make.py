"""An engine by name."""

from dataclasses import dataclass
from typing import Literal

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.address import public_address
from deltaguard.evaluation.engines.identity import Identity, identify
from deltaguard.evaluation.engines.openai import OpenAIEngine
from deltaguard.evaluation.engines.transformers import (
    Dtype,
    TransformersEngine,
    resolved_dtype,
)
from deltaguard.evaluation.engines.vllm import VLLMEngine
from deltaguard.evaluation.exchange import Engine

EngineName = Literal["transformers", "vllm", "openai"]


@dataclass(frozen=True)
class EngineConfig:
    """What generates answers, for all models alike.

    Attributes:
        name: `transformers`, `vllm` or `openai`.
        device: where transformers runs; `auto` is CUDA where there is one, else the CPU.
        dtype: of the weights; `auto` is the checkpoint's, and float32 on the CPU.
        batch_size: questions at a time.
        base_url: of the server, for `openai`.
        api_key_env: the environment variable with the server's key.

    Raises:
        DeltaguardError: `openai` has no `base_url`, another engine has one, or `batch_size` is not positive.
    """

    name: EngineName = "transformers"
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int = 32
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if self.name == "openai" and not self.base_url:
            raise DeltaguardError("The openai engine needs the server's address: --base-url URL.")
        if self.name != "openai" and self.base_url:
            raise DeltaguardError(f"--base-url is for --engine openai; the engine is {self.name}.")
        if self.batch_size < 1:
            raise DeltaguardError(f"The batch size must be at least 1, and is {self.batch_size}.")

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
        return OpenAIEngine(config.base_url, reference, config.api_key_env)
    if config.name == "vllm":
        return VLLMEngine.open(reference, dtype=config.dtype, batch_size=config.batch_size)
    return TransformersEngine.open(
        reference, device=config.device, dtype=config.dtype, batch_size=config.batch_size
    )


def identity(reference: str, config: EngineConfig) -> Identity:
    """What the engine would answer from, without loading weights; of a server nothing can be seen."""
    return Identity(None, None) if config.name == "openai" else identify(reference)
