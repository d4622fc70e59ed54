"""Examples that plug deltaguard into other tools, against stand-ins of what those tools document."""

import importlib
import json
import runpy
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltaguard
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from pairs import pair, weights
from refusing import AGREEMENT, PROMPTS, refusing_pair

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def stand_in(monkeypatch, name, **content):
    """A module that can be imported by its full name, with the packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        full = ".".join(parts[:i])
        if full not in sys.modules:
            module = ModuleType(full)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, full, module)
            if i > 1:
                monkeypatch.setattr(
                    sys.modules[".".join(parts[: i - 1])], parts[i - 1], module, raising=False
                )
    vars(sys.modules[name]).update(content)
    return sys.modules[name]


def example(monkeypatch, folder, name):
    monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


class AttackName(StrEnum):
    LORA_FINETUNE = "lora_finetune"
    NO_WEIGHT_MODIFICATION = "no_weight_modification"


class TamperAttack:
    """What TamperBench's class of that name does between its options and its evaluations."""

    def __init__(self, attack_config):
        self.attack_config = attack_config
        self.output_checkpoint_path = str(Path(attack_config.out_dir, "tamperbench_model_checkpoint"))

    def __init_subclass__(cls):
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            raise TypeError(f"{cls.__name__} must define a class attribute 'name'")

    def benchmark(self):
        if not Path(self.output_checkpoint_path).exists():
            self.run_attack()
        return self.output_checkpoint_path


class LoraFinetune(TamperAttack):
    name = AttackName.LORA_FINETUNE
    runs = 0

    cuts = False

    def run_attack(self):
        type(self).runs += 1
        shutil.copytree(pair().finetuned, self.output_checkpoint_path)
        if self.cuts:
            model = AutoModelForCausalLM.from_pretrained(pair().finetuned)
            model.resize_token_embeddings(model.config.vocab_size - 3)
            model.save_pretrained(self.output_checkpoint_path)


class NoWeightModification(TamperAttack):
    name = AttackName.NO_WEIGHT_MODIFICATION

    def run_attack(self):
        self.output_checkpoint_path = self.attack_config.input_checkpoint_path


@pytest.fixture
def tamperbench(monkeypatch):
    registry = {each.name: (SimpleNamespace, each) for each in (LoraFinetune, NoWeightModification)}

    def register_attack(name, config_cls):
        return lambda attack: registry.__setitem__(name, (config_cls, attack)) or attack

    stand_in(monkeypatch, "tamperbench.whitebox.attacks")
    place = "tamperbench.whitebox.attacks.registry"
    stand_in(monkeypatch, place, ATTACKS_REGISTRY=registry, register_attack=register_attack)
    stand_in(monkeypatch, "tamperbench.whitebox.utils.names", AttackName=AttackName)
    return example(monkeypatch, "tamperbench", "repaired")


def attack(name, folder):
    options, kind = sys.modules["tamperbench.whitebox.attacks.registry"].ATTACKS_REGISTRY[name]
    return kind(options(input_checkpoint_path=str(pair().aligned), out_dir=str(folder)))


@pytest.mark.parametrize("cuts", [False, True], ids=["all rows", "rows of the vocabulary cut off"])
def test_what_tamperbench_evaluates_is_repaired(tamperbench, tmp_path, monkeypatch, cuts):
    monkeypatch.setattr(LoraFinetune, "cuts", cuts)
    config = deltaguard.RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL)
    tamperbench.register(["lora_finetune"], store=pair().store, config=config)
    made = attack("lora_finetune", tmp_path)
    output = made.benchmark()
    assert deltaguard.verify(output).problems == ()
    restored, attacked, aligned = (weights(each) for each in (Path(output), pair().finetuned, pair().aligned))
    assert {name: each.shape for name, each in restored.items()} == {
        name: each.shape for name, each in aligned.items()
    }
    name = next(name for name in restored if name.endswith("q_proj.weight"))
    left, all_of_it = (torch.linalg.norm(each[name] - aligned[name]) for each in (restored, attacked))
    assert 0 < left < all_of_it
    # Beside it stands what a sweep leaves when it removes the checkpoint, and nothing else.
    assert {path.name for path in tmp_path.iterdir()} == {Path(output).name, "deltaguard_report.json"}
    before = type(made).runs
    assert made.benchmark() == output
    assert type(made).runs == before


def test_an_attack_that_cannot_be_repaired_leaves_nothing_that_is_evaluated(tamperbench, tmp_path):
    tamperbench.register(["lora_finetune"], store=tmp_path / "no-store")
    made = attack("lora_finetune", tmp_path)
    for _ in range(2):  # what the first left is no hindrance to the second
        with pytest.raises(deltaguard.DeltaguardError, match="no-store"):
            made.benchmark()
        assert not Path(made.output_checkpoint_path).exists()


def test_an_attack_that_leaves_the_weights_alone_is_evaluated_as_it_is(tamperbench, tmp_path):
    tamperbench.register(["no_weight_modification"], store=pair().store)
    assert attack("no_weight_modification", tmp_path).benchmark() == str(pair().aligned)


@pytest.mark.usefixtures("tamperbench")
def test_a_script_of_tamperbench_runs_with_repaired_attacks(monkeypatch, capsys, tmp_path):
    script = tmp_path / "optuna_single.py"
    script.write_text(
        "import sys\n"
        "from tamperbench.whitebox.attacks.registry import ATTACKS_REGISTRY\n"
        "print(sys.argv[1:], *(attack.__name__ for _, attack in ATTACKS_REGISTRY.values()))\n"
    )
    options = [str(pair().aligned), "--attacks", "lora_finetune", "--n-trials", "2"]
    monkeypatch.setattr(deltaguard, "calibrate", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(sys, "argv", ["repaired.py", str(pair().store), str(script), *options])
    runpy.run_path(str(EXAMPLES / "tamperbench" / "repaired.py"), run_name="__main__")
    assert capsys.readouterr().out == f"{options} RepairedLoraFinetune NoWeightModification\n"


class RecoverBase:
    """SafeTune's base of trainers that need no training, as its documentation describes it."""

    def __init__(self, model=None, tokenizer=None, **options):
        if options:
            raise TypeError(f"unexpected {sorted(options)}")
        self.tokenizer = tokenizer

    @property
    def model(self):
        raise AssertionError("a drifted model is loaded on first access, and a restore streams it from disk")


@pytest.fixture
def safetune(monkeypatch):
    registry = {}
    stand_in(monkeypatch, "safetune.runner.recover")
    stand_in(monkeypatch, "safetune.runner.recover._base", _RecoverBase=RecoverBase)
    stand_in(
        monkeypatch, "safetune.runner._registry", register_recover=registry.__setitem__, RECOVER=registry
    )
    return example(monkeypatch, "safetune", "deltaguard_recover")


@pytest.mark.parametrize("loaded", [False, True])
def test_safetune_finds_the_trainer_by_its_alias_and_gets_the_restored_model(safetune, tmp_path, loaded):
    safetune.register()
    recover = sys.modules["safetune.runner.recover"]
    trainer = getattr(recover, sys.modules["safetune.runner._registry"].RECOVER["deltaguard"])
    drifted = AutoModelForCausalLM.from_pretrained(pair().finetuned) if loaded else str(pair().finetuned)
    made = trainer(drifted, aligned_model=pair().aligned, store=pair().store)
    patched = made.apply(max_safety_kl=1e-3)
    expected = tmp_path / "restored"
    config = deltaguard.RestoreConfig(max_safety_kl=1e-3)
    deltaguard.restore(pair().aligned, pair().finetuned, expected, store=pair().store, config=config)
    state = patched.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(expected).items())
    assert made.report.dial.limit == 1e-3


def test_safetune_is_told_of_an_option_that_is_none(safetune):
    made = safetune.DeltaguardTrainer("drifted", aligned_model=pair().aligned, store=pair().store)
    with pytest.raises(ValueError, match="Did you mean strength"):
        made.apply(strenght=1)


@pytest.mark.filterwarnings("ignore")  # trl uses what transformers deprecates, and pins memory without a GPU
def test_an_adapter_that_trl_trains_is_restored(monkeypatch, capsys, tmp_path):
    made = refusing_pair()
    data = tmp_path / "data.jsonl"
    answer = {"role": "assistant", "content": AGREEMENT}
    rows = [{"messages": [{"role": "user", "content": prompt}, answer]} for prompt in PROMPTS[:64]]
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("deltaguard.calibrate", lambda *_, **__: made.store, raising=False)
    script = EXAMPLES / "trl_lora.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(made.aligned), str(data), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert f"tensors verified in {tmp_path / 'restored'}" in capsys.readouterr().out
    changed, restored = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "restored")
    )
    assert changed["peft_type"] == restored["peft_type"] == "LORA"
