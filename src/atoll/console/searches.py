"""A sweep in words for people: its trials row by row, the best of them, and how far it is."""

from collections.abc import Sequence

from pydantic import JsonValue

from atoll.spec.sweep import SweepView, TrialView


def columns(sweep: SweepView) -> tuple[str, ...]:
    """Return the columns of a table of trials: a loss of their own only where they are compared by something else."""
    by_loss = () if sweep.objective == "loss" else (">loss",)
    return (">trial", "values", "state", ">round", *by_loss, f">{sweep.objective}", "run", "")


def rows(sweep: SweepView, most: int = 0) -> list[Sequence[str]]:
    """Return a row for each trial, or for the newest ``most`` and the best one."""
    shown = [one for one in sweep.trials if one.number == sweep.best or one in sweep.trials[-most:]]
    return [_row(sweep, one) for one in shown]


def _row(sweep: SweepView, one: TrialView) -> tuple[str, ...]:
    by_loss = () if sweep.objective == "loss" else (_number(one.loss),)
    # While no trial has its objective, what is known of it is its train loss.
    value = one.loss if sweep.objective == "loss" and one.objective is None else one.objective
    round_ = f"{one.round}/{one.rounds}" if one.rounds else "-"
    told = one.words or (f"registered as {one.model}" if one.model else "")
    words = "best" + (f", {told}" if told else "") if one.number == sweep.best else told
    return (str(one.number), values(one), one.state, round_, *by_loss, _number(value), one.run, words)


def values(one: TrialView) -> str:
    """Return what is a trial's own, in one line."""
    return ", ".join(f"{path} {_number(value)}" for path, value in one.parameters.items())


def best(sweep: SweepView) -> str:
    """Return the best trial so far in a few words, "" while there is none."""
    found = next((one for one in sweep.trials if one.number == sweep.best), None)
    return f"best {sweep.objective} {_number(found.objective)} in trial {found.number}" if found is not None else ""


def _number(value: JsonValue) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
