"""Projecting and solving are done on the device that is asked for, and give what the CPU gives."""

import pytest
import torch

from deltaguard import RestoreConfig, restore
from deltaguard.curvature.calibrate import calibrate
from deltaguard.device import enough_memory, exact_products
from deltaguard.errors import DeltaguardError
from deltaguard.methods import METHODS
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.restoration import trial
from deltaguard.restoration.trial import Trial
from other_device import DEVICE, Remote, play, tensors_of
from pairs import ANSWERED, pair, save_adapter
from variants import same_files

DIAL = {"max_safety_kl": 1e-4}


@pytest.fixture
def seen(monkeypatch):
    """Of what methods are given, prepare and solve while layers are elsewhere, whether it is there.

    The dial's model, which no GPU runs here, stays on the CPU.
    """
    found = []
    solve = Trial._solved

    def solving(self, ready, prepared, price):
        found.extend(isinstance(each, Remote) for each in tensors_of(prepared))
        tensor, outcome = solve(self, ready, prepared, price)
        found.append(isinstance(tensor, Remote))
        return tensor, outcome

    monkeypatch.setattr(Trial, "_solved", solving)
    return found


def elsewhere(monkeypatch):
    play(monkeypatch)
    monkeypatch.setattr(trial, "find_device", lambda _: DEVICE)
    monkeypatch.setattr(trial, "memory_bytes", {DEVICE: 1 << 20}.__getitem__)


@pytest.mark.parametrize(
    "options",
    [
        DIAL,
        {**DIAL, "memory": 0},
        {**DIAL, "output_format": "adapter"},
        {"method": "ridge", "strength": 0.3},
        {"method": "greedy"},
        {"method": "published", "strength": 0.5},
        {"method": "interpolate", "strength": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("tuned", ["checkpoint", "adapter"])
def test_layers_are_solved_there_as_on_the_cpu(options, tuned, tmp_path, monkeypatch, seen):
    made, config = pair("gpt2"), RestoreConfig(device="cpu", **options)
    store = made.whole_store if METHODS[config.method].needs & {"factor", "hessian"} else made.store
    finetuned = made.finetuned
    if tuned == "adapter":
        finetuned = tmp_path / "tuned"
        save_adapter(made.aligned, finetuned, ["c_attn", "c_proj"], fan_in_fan_out=True)
    restore(made.aligned, finetuned, tmp_path / "here", store=store, config=config)
    assert not any(seen)
    seen.clear()
    elsewhere(monkeypatch)
    restore(made.aligned, finetuned, tmp_path / "there", store=store, config=config)
    assert seen
    assert all(seen)
    names = [path.name for path in (tmp_path / "here").glob("*.safetensors")]
    assert same_files(tmp_path / "here", tmp_path / "there", names)
    assert (tmp_path / "there" / REPORT_NAME).is_file()


def test_a_tensor_that_stays_behind_is_noticed(monkeypatch):
    play(monkeypatch)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, 2).to(DEVICE) @ torch.ones(2)


@pytest.fixture
def tf32():
    """The precision that a process has chosen, which is put back."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    yield products
    products.fp32_precision = before


def test_float32_is_multiplied_in_float32_whatever_the_process_allows(tf32, monkeypatch, tmp_path):
    used, solve = [], Trial._solved
    monkeypatch.setattr(Trial, "_solved", lambda *given: (used.append(tf32.fp32_precision), solve(*given))[1])
    made, config = pair(), RestoreConfig(strength=0.5)
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert set(used) == {"ieee"}
    assert tf32.fp32_precision == "tf32"
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert tf32.fp32_precision == "tf32"


def test_curvature_is_summed_in_float32_whatever_the_process_allows(tf32, tmp_path):
    used = set()
    calibrate(
        pair().aligned,
        tmp_path / "store",
        conversations=ANSWERED,
        progress=lambda _: used.add(tf32.fp32_precision),
    )
    assert used == {"ieee"}
    assert tf32.fp32_precision == "tf32"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: Tried to allocate 2 GiB"),
        MemoryError("Tried to allocate 2 GiB"),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_too_little_memory_is_one_message(error):
    told = r"Too little memory: take less\. .*Tried to allocate"
    with pytest.raises(DeltaguardError, match=told), enough_memory("take less"):
        raise error


def test_another_error_is_not_taken_for_it():
    with pytest.raises(RuntimeError, match="a bug") as found, enough_memory("take less"):
        raise RuntimeError("a bug")
    assert not isinstance(found.value, DeltaguardError)
