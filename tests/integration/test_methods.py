"""A method that only this file knows: restored with, swept, benched and listed, as every other."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

import models
from benches import TINY
from deltaguard import DeltaguardError, RestoreConfig, restore, sweep
from deltaguard.cli.app import run
from deltaguard.methods import METHODS, find_method, registered
from deltaguard.methods.method import Options, PricedLayer, PricedMethod
from deltaguard.reports.records.restore import CARD_NAME
from deltaguard.solvers import Solution, profile
from deltaguard.studies.run import bench
from pairs import pair, save_adapter, weights


class ShrinkOptions(Options):
    """Options of the toy."""

    of: Literal["trace", "one"] = Field(default="trace", description="By what a layer's price is scaled.")


class Shrink(PricedMethod):
    """Δ / (1 + μ tr H): every layer shrinks as a whole, by its own price."""

    name = "shrink"
    title = "a toy: every layer shrinks as a whole"
    reference = "nowhere"
    needs = frozenset({"inputs"})
    options = ShrinkOptions
    ladder = (1e-4, 1e-3, 1e-2)

    def prepare(self, layer, options):
        inputs = layer.curvature.inputs
        trace = float(inputs.values.sum()) + inputs.tail * (inputs.size - len(inputs.values))
        return ShrunkLayer(*layer.weights, trace if options.of == "trace" else 1.0)


@dataclass(frozen=True)
class ShrunkLayer(PricedLayer):
    aligned: Tensor
    finetuned: Tensor
    trace: float

    def profile(self):
        energy = (self.finetuned - self.aligned).double().square().sum()
        return profile(torch.tensor([self.trace]), energy[None])

    def at(self, price):
        share, delta = 1 / (1 + price * self.trace), self.finetuned - self.aligned
        return Solution(
            weight=self.finetuned.clone() if price == 0 else self.aligned + share * delta,
            kept_energy=share,
            safety_cost=share**2,
            utility_loss=(1 - share) ** 2,
            detail={"delta_norm": float(delta.norm())},
        )


@pytest.fixture(autouse=True)
def _known():
    with registered(Shrink()):
        yield


@pytest.mark.parametrize("memory", [None, 0, 20_000])
def test_it_restores_by_the_dial_with_and_without_room_to_keep_what_is_prepared(tmp_path, memory):
    made = pair("llama")
    config = RestoreConfig(method="shrink", max_safety_kl=1e-3, memory=memory)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert 0.9e-3 <= report.dial.restored_kl <= 1e-3
    assert report.options.items() >= {"method": "shrink", "of": "trace"}.items()
    aligned, finetuned, restored = (weights(f) for f in (made.aligned, made.finetuned, tmp_path / "out"))
    row = report.layers[0]
    expected = aligned[row.name] + row.kept_energy * (finetuned[row.name] - aligned[row.name])
    torch.testing.assert_close(restored[row.name], expected)
    assert Shrink.title in (tmp_path / "out" / CARD_NAME).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("chosen", [{"strength": 0.3}, {"max_safety_kl": 1e-3}])
def test_it_restores_an_adapter_to_an_adapter(tmp_path, chosen):
    made = pair("llama")
    save_adapter(made.aligned, tmp_path / "finetuned", ["q_proj"])
    for output_format in ("adapter", "checkpoint"):
        config = RestoreConfig(method="shrink", output_format=output_format, **chosen)
        out = tmp_path / output_format
        report = restore(made.aligned, tmp_path / "finetuned", out, store=made.store, config=config)
        assert 0 < report.kept_energy < 1
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


class Plain(Shrink):
    """Needs no curvature, and selects entries in some layers alone."""

    name = "plain"
    needs = frozenset()

    def prepare(self, layer, options):
        return PlainLayer(*layer.weights, 1.0)


class PlainLayer(ShrunkLayer):
    def at(self, price):
        return replace(super().at(price), kept_entries=0.5 if len(self.aligned) == 48 else None)


def test_what_a_method_does_not_need_or_say_is_left_out(tmp_path):
    made = pair("llama")
    with registered(Plain()):
        report = restore(
            made.aligned,
            made.finetuned,
            tmp_path / "strength",
            config=RestoreConfig(method="plain", strength=0.3),
        )
        assert report.kept_entries == 0.5
        # The dial measures on the store's conversations, whatever the method needs.
        dial = RestoreConfig(method="plain", max_safety_kl=1e-3)
        assert dial.needs_curvature
        report = restore(made.aligned, made.finetuned, tmp_path / "dial", store=made.store, config=dial)
        assert 0.9e-3 <= report.dial.restored_kl <= 1e-3


def test_it_is_swept(tmp_path):
    made = pair("llama")
    config = RestoreConfig(method="shrink")
    found = sweep(
        made.aligned, made.finetuned, tmp_path / "out", store=made.store, limits=[1e-3], config=config
    )
    assert found.method == "shrink"
    assert found.budgets[0].mu > 0
    # The end of the sweep is exact: all of the delta, as fine-tuned.
    assert found.points[-1].mu == 0
    assert found.points[-1].kept_energy == 1


def test_it_is_benched(tmp_path):
    aligned = models.save(models.tiny_model("llama"), tmp_path / "aligned")
    one = replace(TINY, finetunes=TINY.finetunes[:1], probes=1)
    found = bench(tmp_path / "bench", preset=one, aligned=aligned, methods=("shrink",))
    assert {score.method for score in found.scores} == {"shrink"}


def test_the_command_line_lists_it_with_its_options_and_takes_them(tmp_path, capsys):
    made = pair("llama")
    assert run(["restore", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "shrink (dial or strength): a toy: every layer shrinks as a whole" in shown
    assert "--of: By what a layer's price is scaled." in shown
    asked = [str(made.aligned), str(made.finetuned), "-o", str(tmp_path / "out"), "--store", str(made.store)]
    assert run(["restore", *asked, "--method", "shrink", "--strength", "0.5", "--of", "one"]) == 0
    assert run(["restore", *asked, "--method", "shrink", "--of", "on"]) == 2
    assert 'Did you mean "one"?' in " ".join(capsys.readouterr().err.split())


def test_what_is_unknown_is_an_error_and_not_another_method():
    with pytest.raises(DeltaguardError, match="There is no method 'shrunk'"):
        find_method("shrunk")
    with pytest.raises(ValueError, match="of is an option of method shrink, and the method is kfac"):
        RestoreConfig(of="one")
    with pytest.raises(DeltaguardError, match="There is a method 'shrink' already"), registered(Shrink()):
        pass
    assert list(METHODS)[-1] == "shrink"
