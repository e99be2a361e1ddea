"""A user's own metrics, and what happens when they go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mini_distill.errors import ConfigError, StorageError
from mini_distill.evaluation.hooks import EvaluationContext, load_hooks, run_hooks

HERE = __name__


def good(context: EvaluationContext) -> dict[str, Any]:
    return {"step": context.step, "mine/tensor": torch.tensor(2.5), "array": np.float32(0.5)}


def same_name(context: EvaluationContext) -> dict[str, float]:
    return {"eval/step": 1.0}


not_a_function = 3


def run(*hooks: Any) -> dict[str, float]:
    device = torch.device("cpu")
    context = EvaluationContext(None, None, None, 7, list, device, Path(), lambda value: value)  # type: ignore[arg-type]
    return run_hooks(list(hooks), context)


def test_metrics_get_the_prefix_eval_unless_they_have_one() -> None:
    assert run(*load_hooks([f"{HERE}.good"])) == {"eval/step": 7.0, "mine/tensor": 2.5, "eval/array": 0.5}
    assert all(type(value) is float for value in run(good).values())


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no_such_module.hook", "cannot import 'no_such_module'"),
        (f"{HERE}.missing", "has no function 'missing'"),
        (f"{HERE}.not_a_function", "cannot be called"),
        ("hook", "expected an import path"),
        (".relative.hook", "expected an import path"),
    ],
)
def test_a_hook_that_cannot_be_had_is_named_with_its_place_in_the_list(path: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.hooks\[1\]") as caught:
        load_hooks([f"{HERE}.good", path])
    assert what in str(caught.value)


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_hook_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation\.hooks\[0\].*ZeroDivisionError"):
        load_hooks(["broken_hook_module.hook"])


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "returned NoneType"),
        (3.0, "returned float"),
        ({"a": "text"}, "returned str for 'a'"),
        ({"a": True}, "returned bool for 'a'"),
        ({"a": torch.zeros(2)}, "returned Tensor for 'a'"),
        ({3: 1.0}, "metric name 3"),
    ],
)
def test_a_hook_that_returns_no_metrics_is_named(returned: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.hooks\[1\]") as caught:
        run(good, lambda context: returned)
    assert what in str(caught.value)


def test_a_hook_that_raises_is_named_and_keeps_its_cause() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.hooks\[0\].*KeyError") as caught:
        run(lambda context: {}["missing"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_package_keeps_its_kind() -> None:
    def full_disk(context: EvaluationContext) -> dict[str, float]:
        raise StorageError("output_dir", "full")

    with pytest.raises(StorageError):
        run(full_disk)


def test_two_hooks_with_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.hooks\[1\].*'eval/step'"):
        run(good, same_name)
