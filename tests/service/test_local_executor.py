"""Processes of this machine: each job has a GPU of its own."""

import subprocess
import sys

import pytest
import torch

from deltaguard.service.executors import local
from deltaguard.service.executors.executor import Step
from deltaguard.service.settings import Settings


@pytest.fixture
def environments(monkeypatch):
    """What each process was given, in the place of a worker."""
    given, begin = [], subprocess.Popen

    def instead(_command, *, env, **options):
        given.append(env.get("CUDA_VISIBLE_DEVICES"))
        return begin([sys.executable, "-c", "import sys; sys.stdin.read()"], env=env, **options)

    monkeypatch.setattr(local.subprocess, "Popen", instead)
    return given


def test_processes_at_a_time_have_gpus_of_their_own(environments, tmp_path):
    executor, step = local.LocalExecutor(["0", "GPU-b"]), Step("train", tmp_path, tmp_path)
    assert executor.places == 2
    first, second = executor.begin(step, 1), executor.begin(step, 1)
    assert first.look() is None
    first.leave()
    third = executor.begin(step, 1)
    assert environments == ["0", "GPU-b", "0"]
    for process in (second, third):
        process.leave()
    assert second.look().way == "done"


def test_without_gpus_a_process_sees_what_the_service_does(environments, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    executor = local.LocalExecutor()
    executor.begin(Step("train", tmp_path, tmp_path), 1).leave()
    assert (executor.places, environments) == (1, [None])


def test_the_gpus_of_jobs_are_those_that_cuda_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.visible_gpus("auto") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b,9")
    assert local.visible_gpus("cuda") == ["3", "GPU-b"]
    assert local.visible_gpus("cuda:1") == ["GPU-b"]
    assert local.visible_gpus("cpu") == []


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_a_process_that_sees_one_gpu_knows_it_as_cuda(device):
    assert Settings(device=device).job_device == device.removesuffix(":1")


def test_a_process_that_cannot_be_begun_uses_no_gpu(environments, tmp_path):
    executor = local.LocalExecutor(["0", "GPU-b"])
    with pytest.raises(FileNotFoundError):
        executor.begin(Step("train", tmp_path / "gone", tmp_path), 1)
    process = executor.begin(Step("train", tmp_path, tmp_path), 1)
    assert environments == ["0"]
    process.leave()
