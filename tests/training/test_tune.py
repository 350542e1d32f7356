"""The stage that chooses a learning rate: by the validation split, resumable, and taken over by the runs it was chosen for."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from conftest import SmallWorld, command_line, run_stage
from runs import Run, exit_status, new_run, own_signals, signal_at_call, start

from routevl.errors import RoutevlError
from routevl.training.optimisation import Optimisation

RATES = ["0.00001", "0.01", "0.001"]


def tune(run: Run, output: Path, *rates: str, **changes: object) -> list[str]:
    """The command line that tries these learning rates."""
    options = {**run.options, "learning_rate": list(rates), "seed": 0, **changes}
    return command_line({**options, "output": output, "checkpoint": output.parent / "trials"})


@pytest.fixture(scope="module", params=["vqa", pytest.param("multitask", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return new_run(small_world, tmp_path_factory.mktemp("tune"), request.param)


@pytest.fixture(scope="module")
def tuned(run: Run) -> Path:
    """What the stage writes for that run."""
    output = run.root / "tuned.json"
    with own_signals():
        run_stage("tune", *tune(run, output, *RATES))
    return output


def test_the_rate_with_the_best_validation_score_is_chosen(run: Run, tuned: Path, tmp_path: Path) -> None:
    record = json.loads(tuned.read_text())
    scores, metric = {}, run.trainer().task.selection[0]
    for rate in RATES:  # what a run of its own says
        alone = Run(tmp_path / rate, {**run.options, "learning_rate": rate, "seed": 0}).train()
        scores[float(rate)] = json.loads((alone.model / "run.json").read_text())["best_epoch"][metric]
    assert {trial["learning_rate"]: trial[metric] for trial in record["trials"]} == scores
    assert len(set(scores.values())) > 1, "the rates do not differ, so nothing is tested"
    assert scores[record["learning_rate"]] == max(scores.values())
    assert not (tuned.parent / "trials").exists()


def test_stopped_in_a_later_trial_it_ends_in_the_same_bytes(run: Run, tuned: Path, tmp_path: Path) -> None:
    again, steps = Run(tmp_path, run.options), run.trainer().total_steps
    words = ["tune", *tune(again, tmp_path / "tuned.json", *RATES)]
    stopped = start(again, signal_at_call(Optimisation, "step", steps + 5, signal.SIGTERM), words)
    assert exit_status(stopped) == 143, (tmp_path / "log").read_text()
    assert not (tmp_path / "tuned.json").exists()
    assert exit_status(start(again, words=words)) == 0, (tmp_path / "log").read_text()
    assert f"resuming from step 5 of {steps}" in (tmp_path / "log").read_text()
    assert (tmp_path / "tuned.json").read_bytes() == tuned.read_bytes()


def test_a_rate_that_diverges_is_left_out(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "tuned.json"
    diverges = {"max_grad_norm": "none", "options": {"routing": "attn", "r": 4}}
    with own_signals():
        run_stage("tune", *tune(run, output, "1e30", "0.001", **diverges))
    record = json.loads(output.read_text())
    assert [trial["diverged"] for trial in record["trials"]] == [True, False]
    assert record["learning_rate"] == 0.001


def test_where_all_diverge_it_is_an_error(run: Run, tmp_path: Path) -> None:
    options = {"max_grad_norm": "none", "options": {"routing": "attn", "r": 4}}
    with own_signals(), pytest.raises(RoutevlError, match="training diverges with all of 2 learning rates"):
        run_stage("tune", *tune(run, tmp_path / "tuned.json", "1e30", "2e30", **options))
    assert not (tmp_path / "tuned.json").exists()


def test_a_run_takes_the_chosen_rate_and_keeps_the_trials(run: Run, tuned: Path, tmp_path: Path) -> None:
    record = json.loads(tuned.read_text())
    own = Run(tmp_path / "tuned", {**run.options, "tuned": tuned}).train()
    same = Run(tmp_path / "same", {**run.options, "learning_rate": record["learning_rate"]}).train()
    content = json.loads((own.model / "run.json").read_text())
    assert content["settings"]["learning_rate"] == record["learning_rate"]
    assert content["tuned"] == record
    run_stage("compare", own.model, same.model)


def test_a_choice_for_other_settings_is_refused(run: Run, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(RoutevlError, match="chosen with epochs 2, but the run has 3"):
        Run(tmp_path, {**run.options, "tuned": tuned, "epochs": 3}).train()
