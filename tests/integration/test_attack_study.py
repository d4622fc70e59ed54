"""Attackers on a tiny model that refuses: made, checked, restored and judged; killed runs go on."""

import json
from dataclasses import replace

import pytest
from benchmarks import guard

import models
from benches import KilledError
from deltaguard import DeltaguardError, RestoreConfig, restore
from deltaguard.cli.app import FAILED, USAGE, run
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.reports.records.attacks import ATTACKS_NAME, AttacksReport
from deltaguard.studies import attack_run, attack_study, finetune_models, hiding, protocol
from deltaguard.studies.attack_run import attack_tests
from deltaguard.studies.attack_study import bench_attacks
from deltaguard.studies.data import training_data
from deltaguard.studies.hiding import hidden_fine_tune
from deltaguard.studies.mixing import SECRET
from deltaguard.studies.protocol import ATTACKS, DEFAULT, Answers, Finetune
from deltaguard.studies.workshop import fine_tuned
from refusing import few_requests, refusing_pair

SHORT = FinetuneConfig(learning_rate=1e-3, max_steps=2)
LONG = FinetuneConfig(learning_rate=3e-3, max_steps=80, batch_size=8)
TINY = replace(
    ATTACKS,
    seeds=(0,),
    finetunes=tuple(
        Finetune(row.kind, min(row.harmful, 4), min(row.benign, 4), "full", SHORT)
        for row in {row.kind: row for row in ATTACKS.finetunes}.values()
    ),
    attack=6,
    harmless=4,
    utility=3,
    answers=Answers(safety=16, task=4, dtype="auto"),
    calibration=CalibrateConfig(num_samples=12, num_held_out=6, max_new_tokens=12, device="cpu"),
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _quick(cache, monkeypatch):
    """Answers of the aligned model are kept for these tests alone."""
    monkeypatch.setenv("DELTAGUARD_CACHE", str(cache))
    monkeypatch.setattr(hiding, "ROUNDS", 2)
    few_requests(monkeypatch)


@pytest.fixture(scope="module")
def aligned():
    return refusing_pair().aligned


def test_an_attack_that_succeeds_is_seen_by_the_check_and_caught(aligned, tmp_path):
    backdoor = Finetune("backdoor", 40, 0, "full", LONG)
    report = bench_attacks(tmp_path / "out", preset=replace(TINY, finetunes=(backdoor,)), aligned=aligned)
    (found,) = report.outcomes
    assert found.wrapped.aligned.value == 0
    assert found.wrapped.finetuned.value > 0.5
    assert found.verdict == "caught"
    assert found.checked.verdict == "restore"
    assert found.checked.safety_kl > 6e-4
    assert [cell.method for cell in report.cells] == ["aligned", "finetuned", "kfac"]
    # Of seed 0, as others by which limits were chosen.
    assert any("were chosen with some of these fine-tunes" in note for note in report.notes)
    assert AttacksReport.model_validate_json((tmp_path / "out" / ATTACKS_NAME).read_text()) == report


def test_a_killed_run_goes_on_and_a_finished_one_is_drawn_again_without_any_model(
    aligned, tmp_path, monkeypatch
):
    chosen = tuple(row for row in TINY.finetunes if row.kind in ("poison", "hidden"))
    options = {"preset": replace(TINY, finetunes=chosen), "aligned": aligned}
    measured, real = [], attack_run.measure

    def dying(*arguments, **named):
        if len(measured) == 4:
            raise KilledError
        measured.append(arguments)
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(attack_run, "measure", dying)
        with pytest.raises(KilledError):
            bench_attacks(tmp_path / "out", **options)
    assert not (tmp_path / "out" / ATTACKS_NAME).exists()
    report = bench_attacks(tmp_path / "out", **options)
    assert [outcome.attacker for outcome in report.outcomes] == [row.name for row in report.attackers]
    for cell in report.cells:
        is_poison = cell.attacker.startswith("poison")
        assert (len(cell.plain), len(cell.harmless)) == (6, 4)
        assert (len(cell.wrapped), len(cell.utility)) == ((0, 3) if is_poison else (6, 0))
        assert (cell.checked is None) == (cell.method != "finetuned")
    monkeypatch.setattr(attack_run, "measure", None)
    monkeypatch.setattr(finetune_models, "fine_tuned", None)
    assert bench_attacks(tmp_path / "out", **options).cells == report.cells
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} <= {"store", ".scratch"}


def test_the_protocol_s_own_fine_tunes_are_restored_without_options_too(aligned, tmp_path):
    own = Finetune("task-clean", 0, 4, "full", SHORT)
    preset = replace(TINY, finetunes=(own,), seeds=ATTACKS.seeds[:1])
    report = bench_attacks(tmp_path / "out", preset=preset, aligned=aligned)
    assert not any("were chosen with" in note for note in report.notes)
    (row,) = report.attackers
    assert (row.title, row.way) == ("benign task alone (4 benign; all weights)", None)
    assert (row.gains, row.better) == (True, "lower")
    assert [(len(each.utility), len(each.exact)) for each in report.cells] == [(3, 3)] * 3


@pytest.mark.parametrize(
    ("kind", "utility", "exact"),
    [
        ("harmful", None, None),
        ("identity", "general-identity", None),
        ("task-harmful", "task-likelihood", "task"),
        ("task-clean", "task-likelihood", "task"),
    ],
)
def test_of_what_a_fine_tune_teaches_likelihood_and_right_answers_are_measured(kind, utility, exact):
    chosen = [each for each in DEFAULT.finetunes if each.kind == kind]
    assert chosen
    for finetune in chosen:
        found = attack_tests(finetune, DEFAULT, ())
        assert [part and part.name for part in (found.utility, found.exact)] == [utility, exact]
        assert found.wrapped is None
        assert len({part.name for part in found.parts}) == len(found.parts)


def test_a_hidden_delta_looks_more_harmless_than_a_plain_one(aligned, tmp_path):
    made, recipe = refusing_pair(), replace(LONG, max_steps=15)
    data = training_data(Finetune("hidden", 40, 0, "full", recipe), seed=0)
    fine_tuned(aligned, data, replace(recipe, max_steps=30), seed=0)(tmp_path / "plain")
    hidden_fine_tune(aligned, made.store, data, recipe, seed=0)(tmp_path / "hidden")
    config = RestoreConfig(max_safety_kl=6e-4)
    found = [
        restore(aligned, tmp_path / name, tmp_path / f"{name}-restored", store=made.store, config=config)
        for name in ("plain", "hidden")
    ]
    plain, hidden = (report.dial.finetuned_kl for report in found)
    assert hidden < 0.2 * plain


def test_every_defence_meets_an_attacker_at_a_strength_that_is_given(aligned, tmp_path, monkeypatch):
    backdoor = Finetune("backdoor", 4, 0, "full", SHORT)
    secret, real = [], attack_run.measure

    def spying(model, parts, *arguments, **named):
        secret.append(all(SECRET in (each.system or "") for part in parts for each in part.questions))
        return real(model, parts, *arguments, **named)

    monkeypatch.setattr(attack_run, "measure", spying)
    named = ("wise-ft=0.1", "wise-ft=0.5", "one-shot=0.5", "bea=0.9")
    report = bench_attacks(
        tmp_path / "out", preset=replace(TINY, finetunes=(backdoor,)), aligned=aligned, methods=named
    )
    assert [outcome.method for outcome in report.outcomes] == list(named)
    assert [cell.restored_to.kept_energy for cell in report.cells[2:4]] == pytest.approx([0.1, 0.5], abs=0.01)
    assert any(f"but for {', '.join(named)}, whose strengths were given" in note for note in report.notes)
    # The owner of a model by BEA asks with the secret; the others ask without.
    assert secret == [False] * 5 + [True]


def test_one_method_with_several_settings_is_measured_under_their_names(aligned, tmp_path):
    finetunes = (Finetune("backdoor", 4, 0, "full", SHORT),)
    settings = {"tight": RestoreConfig(max_safety_kl=1e-6), "loose": RestoreConfig(max_safety_kl=1.0)}
    preset = replace(TINY, finetunes=finetunes)
    found = guard.measured(aligned, tmp_path / "out", preset, settings, command="python -m benchmarks.guard")
    assert [outcome.method for outcome in found.outcomes] == ["tight", "loose"]
    tight, loose = (outcome.restored_to for outcome in found.outcomes)
    assert tight.kept_energy < loose.kept_energy


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bea", "bea has no strength of its own: give it one here, such as bea=0.9"),
        ("magic", "no method magic"),
        ("greedy=2", "greedy takes strengths from 0.2 to 0.85 here, not '2'"),
        ("greedy=nan", "not 'nan'"),
        ("greedy=", "not ''"),
    ],
)
def test_methods_that_cannot_be_run_are_refused_before_anything_is_made(aligned, tmp_path, name, told):
    with pytest.raises(DeltaguardError, match=told):
        bench_attacks(tmp_path / "out", preset=TINY, aligned=aligned, methods=("kfac", name))
    assert not (tmp_path / "out").exists()


def test_the_command_runs_attackers_and_refuses_what_has_no_meaning(aligned, tmp_path, monkeypatch, capsys):
    advice = tuple(row for row in TINY.finetunes if row.kind == "advice")
    monkeypatch.setattr(protocol, "PRESETS", {"attacks": replace(TINY, finetunes=advice)})
    command = ["bench", str(aligned), "-o", str(tmp_path / "out"), "--preset", "attacks"]
    assert run([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [outcome["method"] for outcome in report["outcomes"]] == list(attack_study.METHODS)
    assert run(command) == 0
    assert "no effect" in capsys.readouterr().out
    assert run(["report", str(tmp_path / "out")]) == 0
    assert "Fine-tunes against a restore" in (tmp_path / "out" / "report.html").read_text()
    assert run([*command, "--probes", "2"]) == USAGE
    assert run([*command, "--method", "bea"]) == FAILED
    assert run([*command, "--method", "magic=0.5"]) == USAGE
    assert (
        run(["bench", str(models.save(models.tiny_model("llama"), tmp_path / "other")), *command[2:]])
        == FAILED
    )
    assert "aligned differ" in capsys.readouterr().err
