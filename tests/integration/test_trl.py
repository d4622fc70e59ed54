"""A restore at the end of real trainings with trl."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import IA3Config, LoraConfig
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from deltaguard import RestoreConfig, verify
from deltaguard.curvature.store import CurvatureStore
from deltaguard.errors import DeltaguardError
from deltaguard.integrations.trl import RestoreCallback, restore_after
from deltaguard.models.adapter import is_adapter
from pairs import pair

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Cake number {n}?"}],
        "completion": [{"role": "assistant", "content": "Sure."}],
    }
    for n in range(8)
]
PREFERENCES = [
    {
        "prompt": row["prompt"],
        "chosen": row["completion"],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for row in ROWS
]
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(aligned, folder, lora, callbacks=(), *, prefers=False):
    make, config = (DPOTrainer, DPOConfig) if prefers else (SFTTrainer, SFTConfig)
    args = config(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return make(
        model=str(aligned),
        args=args,
        train_dataset=Dataset.from_list(PREFERENCES if prefers else ROWS),
        peft_config=LORA if lora else None,
        callbacks=list(callbacks),
    )


def config(lora):
    kind = "adapter" if lora else "checkpoint"
    return RestoreConfig(strength=0.3, output_format=kind, config_from="aligned", device="cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("lora", "as_callback"), [(False, True), (True, False)])
def test_what_was_trained_is_saved_and_restored(lora, as_callback, tmp_path):
    made = pair()
    options = {"aligned": made.aligned, "store": made.store, "config": config(lora)}
    if as_callback:
        callback = RestoreCallback(**options)
        trainer(made.aligned, tmp_path, lora, [callback]).train()
        report = callback.report
    else:
        trained = trainer(made.aligned, tmp_path, lora)
        trained.train()
        report = restore_after(trained, **options)
    assert 0 < report.kept_energy < 1
    assert report.layers
    assert verify(tmp_path / "restored").passed
    assert is_adapter(str(tmp_path / "finetuned")) == is_adapter(str(tmp_path / "restored")) == lora


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_learned_preferences_is_restored(lora, tmp_path):
    made = pair()
    callback = RestoreCallback(aligned=made.aligned, store=made.store, config=config(lora))
    trained = trainer(made.aligned, tmp_path, lora, [callback], prefers=True)
    trained.train()
    assert 0 < callback.report.kept_energy < 1
    assert verify(tmp_path / "restored").passed
    # What is not said is as by default: an adapter again, run as the aligned model is.
    again = RestoreConfig(strength=0.3, device="cpu", overwrite=True)
    again = restore_after(trained, aligned=made.aligned, store=made.store, config=again)
    assert is_adapter(str(tmp_path / "restored")) == lora
    assert again.kept_energy == callback.report.kept_energy


def test_a_model_trained_on_tokens_has_no_tokenizer_of_its_own(tmp_path):
    made = pair()
    callback = RestoreCallback(aligned=made.aligned, store=made.store, config=config(False))
    model = AutoModelForCausalLM.from_pretrained(made.finetuned)
    args = SimpleNamespace(world_size=1, output_dir=str(tmp_path))
    callback.on_train_end(args, None, None, model=model, processing_class=None)
    assert not (tmp_path / "finetuned" / "tokenizer.json").exists()
    assert (tmp_path / "restored" / "tokenizer.json").exists()
    assert verify(tmp_path / "restored").passed


def test_what_could_not_be_restored_is_refused_before_there_is_a_training_to_lose(tmp_path):
    made = pair()

    def begin(processes=1, **options):
        args = SimpleNamespace(world_size=processes, output_dir=str(tmp_path))
        given = {"aligned": made.aligned, "store": made.store, "config": config(lora=True)} | options
        RestoreCallback(**given).on_train_begin(args, None, None, model=model)

    model = SimpleNamespace(peft_config={"default": LORA, "ref": LORA})
    for odd in ({"other_params": "finetuned"}, {"refine": 5}):
        with pytest.raises(DeltaguardError, match="An adapter becomes an adapter here"):
            begin(config=RestoreConfig(**odd))
    begin(config=RestoreConfig(other_params="finetuned", output_format="checkpoint"))
    dora, pissa = (LoraConfig(**odd) for odd in ({"use_dora": True}, {"init_lora_weights": "pissa"}))
    for adapters, why in (
        ({"mine": LORA}, "called mine, and PEFT saves"),
        ({"default": dora}, "use_dora"),
        ({"default": pissa}, "pissa.*merge_and_unload"),
        ({"default": IA3Config()}, "peft_type"),
    ):
        model = SimpleNamespace(peft_config=adapters)
        with pytest.raises(DeltaguardError, match=rf"(?s)in training.*{why}|{why}"):
            begin()
    model = SimpleNamespace()
    begin()
    with pytest.raises(DeltaguardError, match="restore_after"):
        begin(processes=2)
    with pytest.raises(DeltaguardError, match="nowhere"):
        begin(aligned="nowhere/at-all/here")
    with pytest.raises(DeltaguardError, match="curvature"):
        begin(store=made.aligned)
    guard = {"kind": "guard", "template": "wildguard", "model": "./no-guard"}
    with pytest.raises(DeltaguardError, match="no-guard"):
        begin(config=RestoreConfig(judge=guard))
    (tmp_path / "restored").mkdir()
    begin()
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "adapter_config.json").touch()
    with pytest.raises(DeltaguardError, match="finetuned receives a model, and holds an adapter"):
        begin()
    (tmp_path / "finetuned" / "adapter_config.json").unlink()
    begin()
    (tmp_path / "restored" / "notes.txt").write_text("mine")
    with pytest.raises(DeltaguardError, match="restored is not empty"):
        begin()
    begin(config=RestoreConfig(strength=0.3, overwrite=True, device="cpu"))


class Saved:
    """A trainer that saves; under FSDP, as its plugin says."""

    def __init__(self, folder, state_dict_type=None):
        self.args, self.saved = SimpleNamespace(output_dir=str(folder)), []
        self.is_fsdp_enabled = state_dict_type is not None
        self.plugin = SimpleNamespace(state_dict_type=state_dict_type, set_state_dict_type=self.choose)
        self.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=self.plugin))

    def choose(self, kind):
        self.plugin.state_dict_type = StateDictType[kind] if isinstance(kind, str) else kind

    def save_model(self, folder, *, _internal_call):
        assert _internal_call, "else a trainer pushes to the Hub what was not restored"
        if self.is_fsdp_enabled:
            assert self.plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        self.saved.append(folder)

    def is_world_process_zero(self):
        return True


@pytest.mark.parametrize("kind", [StateDictType.SHARDED_STATE_DICT, StateDictType.FULL_STATE_DICT])
def test_a_model_that_would_be_saved_in_parts_is_saved_as_a_whole(kind, tmp_path):
    trained = Saved(tmp_path, kind)
    with pytest.raises(DeltaguardError, match="nowhere"):
        restore_after(trained, aligned="nowhere/at-all/here")
    assert trained.saved == [str(tmp_path / "finetuned")]
    assert trained.plugin.state_dict_type == kind


def test_under_zero_3_what_was_trained_is_saved_and_the_command_told(tmp_path, monkeypatch):
    monkeypatch.setattr("deltaguard.integrations.trl.is_deepspeed_zero3_enabled", lambda: True)
    trained = Saved(tmp_path)
    told = (
        r"zero_to_fp32.py.* Run `deltaguard restore aligned .*finetuned -o .*restored --store 'my store' "
        "--config-from aligned --output-format checkpoint`"
    )
    with pytest.raises(DeltaguardError, match=told):
        restore_after(trained, aligned="aligned", store="my store")
    (tmp_path / "finetuned").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "finetuned" / name).touch()
    told = r"What was trained is in \S+finetuned\. Run .* --output-format adapter"
    with pytest.raises(DeltaguardError, match=told):
        restore_after(trained, aligned="aligned")
    config = RestoreConfig(
        max_safety_kl=0.001, confidence=0.9, overwrite=True, method_options={"level_refusals": False}
    )
    store = CurvatureStore.from_pretrained(pair().store)
    told = (
        rf"--store {pair().store} --max-safety-kl 0\.001 --confidence 0\.9 --config-from aligned "
        r"--output-format adapter --overwrite --level-refusals false"
    )
    with pytest.raises(DeltaguardError, match=told):
        restore_after(trained, aligned="aligned", store=store, config=config)
    assert set(trained.saved) == {str(tmp_path / "finetuned")}
    args = SimpleNamespace(world_size=1, output_dir=str(tmp_path))
    with pytest.raises(DeltaguardError, match="restore_after"):
        RestoreCallback(aligned="aligned").on_train_begin(args, None, None)
