"""The catalogue is read from the source; it must say what Python would."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest

from mini_distill.losses import divergences
from mini_distill.losses.catalogue import divergence_parameters, tokens_looked_at

DEFINED = {
    name: function
    for name, function in inspect.getmembers(divergences, inspect.isfunction)
    if function.__module__ == divergences.__name__ and not name.startswith("_")
}


def test_every_divergence_is_listed_and_nothing_else() -> None:
    assert set(divergence_parameters()) == set(DEFINED)
    assert {"forward_kl", "reverse_kl", "jsd"} <= set(DEFINED)


@pytest.mark.parametrize("name", DEFINED)
def test_the_options_are_the_keyword_only_arguments(name: str) -> None:
    parameters = inspect.signature(DEFINED[name]).parameters.values()
    assert divergence_parameters()[name] == tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("name", DEFINED)
def test_every_divergence_takes_student_teacher_and_temperature_and_swallows_nothing(name: str) -> None:
    """**kwargs swallowed a misspelt option (KDFlow); frameworks disagree on whether teacher or student comes first."""
    parameters = inspect.signature(DEFINED[name]).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["student_logits", "teacher_logits", "temperature"] and parameters["temperature"].default == 1.0
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert all(p.default is not p.empty for p in parameters.values() if p.kind is p.KEYWORD_ONLY)


def test_divergences_of_single_tokens_say_at_how_many_they_look() -> None:
    looked_at = {name: tokens_looked_at(name, {}) for name in DEFINED if hasattr(DEFINED[name], "looks_at")}
    assert looked_at == {"teacher_argmax_ce": 1, "ranking_hinge": 16, "ranking_logistic": 16, "teacher_sample_ce": math.inf}
    assert tokens_looked_at("ranking_hinge", {"top_k": 5}) == 5 and tokens_looked_at("teacher_sample_ce", {"num_samples": 3}) == math.inf
    assert not any(tokens_looked_at(name, {}) for name in {*DEFINED, "my_package.divergence"} - set(looked_at))


def test_the_catalogue_is_read_without_torch() -> None:
    """A misspelt divergence is answered before the seconds that importing torch takes."""
    code = "import sys; from mini_distill.losses.catalogue import divergence_parameters; assert divergence_parameters(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
