"""The plugin as Axolotl calls it: by its own plugin manager where it is installed, else by a stand-in."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
from pydantic import ValidationError

from deltaguard import DeltaguardError, verify
from pairs import pair, save_adapter

PLUGIN = "deltaguard.integrations.axolotl.RestorePlugin"


class BasePlugin:
    """The documented methods that are called here."""

    def get_input_args(self):
        return None

    def post_trainer_create(self, cfg, trainer):
        return None

    def post_train_unload(self, cfg):
        return None


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, loaded by its name as `plugins:` has it."""
    if find_spec("axolotl") is None:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = BasePlugin
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
        monkeypatch.delitem(sys.modules, "deltaguard.integrations.axolotl", raising=False)
        yield _named(PLUGIN)()
        sys.modules.pop("deltaguard.integrations.axolotl", None)
    else:
        from axolotl.integrations.base import PluginManager

        manager = PluginManager.get_instance()
        manager.register(PLUGIN)
        yield manager.plugins[PLUGIN]
        manager.plugins.clear()


def _named(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def settings(plugin, *, adapter=False, **given):
    """What Axolotl hands over: what the class that the plugin names makes of it, without what is absent."""
    arguments = _named(plugin.get_input_args())
    config = {"deltaguard": given, "adapter": "lora" if adapter else None}
    return arguments.model_validate(config).model_dump(exclude_none=True)


def trained(folder, *, adapter):
    made = pair()
    if adapter:
        save_adapter(made.aligned, folder, ["q_proj", "down_proj"])
        return folder
    return made.finetuned


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [False, True])
def test_what_was_trained_is_restored_beside_it(plugin, tmp_path, adapter):
    made = pair()
    given = {"store": str(made.store), "output": str(tmp_path / "restored"), "options": {"strength": 0.3}}
    if adapter:
        given.pop("output")
    output = trained(tmp_path / "output", adapter=adapter)
    cfg = {"base_model": str(made.aligned), "output_dir": str(output), **settings(plugin, **given)}
    plugin.post_trainer_create(cfg, None)
    plugin.post_train_unload(cfg)
    assert 0 < plugin.report.kept_energy < 1
    restored = tmp_path / ("output-restored" if adapter else "restored")
    assert verify(restored).passed
    assert (restored / "adapter_config.json").exists() == adapter
    # The next training would lose what it trained.
    with pytest.raises(DeltaguardError, match="is not empty"):
        plugin.post_trainer_create(cfg, None)
    with pytest.raises(DeltaguardError, match="no-store"):
        plugin.post_trainer_create(cfg | settings(plugin, store="./no-store"), None)


def test_only_the_first_process_restores(plugin, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    plugin.post_trainer_create({"base_model": "nowhere", "output_dir": "nothing"}, None)
    plugin.post_train_unload({"base_model": "nowhere", "output_dir": "nothing"})
    assert plugin.report is None


def test_under_zero_3_no_model_is_loaded(plugin, monkeypatch, tmp_path):
    monkeypatch.setattr("deltaguard.integrations.trl.is_deepspeed_zero3_enabled", lambda: True)
    output = trained(tmp_path / "output", adapter=True)
    with pytest.raises(DeltaguardError, match=r"Run `deltaguard restore me/model .*output -o .*-restored"):
        plugin.post_train_unload({"base_model": "me/model", "output_dir": str(output)})


def test_options_that_cannot_be_are_told_before_the_training(plugin):
    with pytest.raises(ValidationError, match="Did you mean strength"):
        settings(plugin, options={"strenth": 0.3})
    with pytest.raises(ValidationError, match="Extra inputs"):
        settings(plugin, stor="./store")
    # Of what is trained: an adapter, or all weights.
    with pytest.raises(ValidationError, match="refine changes whole layers"):
        settings(plugin, adapter=True, options={"refine": 5})
    with pytest.raises(ValidationError, match="adapter_rank is an option of output_format adapter"):
        settings(plugin, options={"adapter_rank": 8})
    assert settings(plugin, adapter=True, options={"adapter_rank": 8})["deltaguard"]["options"]
    assert settings(plugin, options={"refine": 5})["deltaguard"]["options"]


def test_a_revision_of_the_base_model_is_that_of_the_aligned_one(plugin, monkeypatch, tmp_path):
    asked = []

    def fetch(reference, **_):
        asked.append(reference)
        raise DeltaguardError("far enough")

    monkeypatch.setattr("deltaguard.integrations.axolotl.restore", lambda aligned, *_, **__: fetch(aligned))
    cfg = {
        "base_model": "me/model",
        "revision_of_model": "v2",
        "output_dir": str(trained(tmp_path, adapter=False)),
    }
    with pytest.raises(DeltaguardError, match="far enough"):
        plugin.post_train_unload(cfg)
    assert asked == ["me/model@v2"]


@pytest.mark.skipif(find_spec("axolotl") is None, reason="Axolotl is not installed")
def test_axolotl_takes_the_settings_into_its_own_configuration(plugin):
    from axolotl.integrations.config import merge_input_args

    _, merged = merge_input_args()
    assert merged.model_fields["deltaguard"].default_factory().options == {}
