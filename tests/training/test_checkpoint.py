from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.injection import killed_before_operation, with_file_size_limit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mini_distill.config import TrainerConfig
from mini_distill.errors import NumericsError, StorageError
from mini_distill.storage import atomic_folder, verify_folder
from mini_distill.training.checkpoint import Checkpoints, load_optimizer, optimizer_to_tensors
from mini_distill.training.optimizer import build_optimizer


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints: Checkpoints, step: int, best: bool = False, value: float | None = None) -> Path:
    weights = {"weight": torch.full((4, 3), float(step) if value is None else value)}
    moments = {"weight.exp_avg": torch.zeros(4, 3), "weight.step": torch.tensor(float(step))}
    return checkpoints.save(step, {"model": weights, "optimizer": moments}, {"step": step, "lr": 0.1}, best=best).path


def names(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(checkpoints.folder))


# -------------------------------------------------------------------------------------------------------- what goes in comes out


def test_tensors_come_back_to_the_bit_in_every_dtype(checkpoints: Checkpoints) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): (torch.randn(5, 3, generator=generator) * 9).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "transposed": torch.arange(6.0).view(2, 3).T}
    checkpoints.save(7, {"model": tensors}, {})
    found = checkpoints.newest()
    assert found is not None and found.step == 7 and found.names == ["model"]
    loaded = found.tensors("model")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_state_comes_back_to_the_bit(checkpoints: Checkpoints) -> None:
    state = {"best": {"value": 0.1 + 0.2}, "rng": [2**63, -1], "text": "é\u2028", "none": None}
    checkpoints.save(1, {}, state)
    found = checkpoints.newest()
    assert found is not None and found.state == state


def test_tied_weights_are_stored_once_and_views_are_stored_apart(checkpoints: Checkpoints) -> None:
    embedding = torch.arange(12.0).view(4, 3)
    tensors = {"embed": embedding, "head": embedding, "first_rows": embedding[:2], "flat": embedding.view(-1)}
    path = checkpoints.save(1, {"model": tensors}, {}).path
    assert json.loads((path / "state.json").read_text())["aliases"] == {"model": {"head": "embed"}}
    found = checkpoints.newest()
    assert found is not None
    loaded = found.tensors("model")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_tied_model_comes_back_whole(checkpoints: Checkpoints, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, other = tiny_llama(seed=1, tie_word_embeddings=True), tiny_llama(seed=2, tie_word_embeddings=True)
    checkpoints.save(1, {"model": model.state_dict()}, {})
    found = checkpoints.newest()
    assert found is not None
    other.load_state_dict(found.tensors("model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_can_be_read_by_others_than_its_owner(checkpoints: Checkpoints) -> None:
    path = save(checkpoints, 1)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_ever_saved(checkpoints: Checkpoints, bad: float) -> None:
    """A framework's trainer ended a run whose loss was NaN with success and a checkpoint of NaN weights."""
    save(checkpoints, 1)
    with pytest.raises(NumericsError, match="model tensor weight: not finite"):
        save(checkpoints, 2, value=bad)
    with pytest.raises(NumericsError, match=r"state.json.best\[0\].value"):
        checkpoints.save(2, {}, {"best": [{"value": bad}]})
    assert names(checkpoints) == [1]


# --------------------------------------------------------------------------------------------------------------------- retention


def test_the_newest_and_the_best_are_kept(checkpoints: Checkpoints) -> None:
    for step in range(1, 7):
        save(checkpoints, step, best=step in (1, 3))
    assert names(checkpoints) == [3, 5, 6]
    best = checkpoints.best()
    assert best is not None and best.step == 3


def test_the_best_is_remembered_by_the_next_process(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, best=True)
    again = Checkpoints(checkpoints.folder, keep=1)
    for step in (2, 3, 4):
        save(again, step)
    assert names(again) == [1, 4]
    save(again, 5, best=True)
    assert names(again) == [5]


def test_damaged_newer_checkpoints_do_not_crowd_out_the_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    for step in (8, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    save(checkpoints, 2)
    found = checkpoints.newest()
    assert found is not None and found.step == 2
    save(checkpoints, 8)
    assert verify_folder(tmp_path / "step-00000008") == []


def test_going_back_sets_the_later_ones_aside(checkpoints: Checkpoints) -> None:
    first = save(checkpoints, 1)
    save(checkpoints, 2)
    assert checkpoints.at(first).step == 1
    checkpoints.rewind(1)
    found = checkpoints.newest()
    assert found is not None and found.step == 1
    assert sorted(os.listdir(checkpoints.folder)) == ["step-00000001", "step-00000002.old-1"]


# ------------------------------------------------------------------------------------------------------------------------ damage


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def _flip(position: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return flip


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": _cut,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "bit at the start": _flip(0.0),
    "bit in the middle": _flip(0.5),
    "bit at the end": _flip(1.0),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    """35 of 42 single flipped bits were loaded silently by a framework's trainer."""
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    before = path.joinpath(file).read_bytes()
    DAMAGES[damage](path / file)
    found = checkpoints.newest()
    assert found is not None
    if file == "MANIFEST.json" and found.step == 2:  # a byte of white space: the content still says the same, and all of it is true
        assert json.loads(path.joinpath(file).read_bytes()) == json.loads(before)
        return
    assert found.step == 1 and "step-00000002: damaged: " in caplog.text and "skipped" in caplog.text
    assert file in caplog.text or file == "MANIFEST.json"


def test_when_every_checkpoint_is_damaged_nothing_starts_over_silently(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        _cut(save(checkpoints, step) / "model.safetensors")
    with pytest.raises(StorageError, match=r"checkpoints: all 2 checkpoints are damaged\. Bring back a copy of one, or .* resume=never"):
        checkpoints.newest()


def test_no_checkpoint_at_all_is_a_new_run(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None and checkpoints.best() is None
    checkpoints.folder.mkdir()
    (checkpoints.folder / ".tmp-step-00000001-4000000-00").mkdir()
    assert checkpoints.newest() is None
    assert os.listdir(checkpoints.folder) == []


def test_a_renamed_or_linked_checkpoint_is_not_believed(checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(checkpoints, 1)
    os.symlink(path, checkpoints.folder / "step-00000009")
    elsewhere = Checkpoints(tmp_path / "other", keep=2)
    os.rename(save(elsewhere, 3), checkpoints.folder / "step-00000008")
    found = checkpoints.newest()
    assert found is not None and found.step == 1
    assert "step-00000009: damaged: a link" in caplog.text and "step-00000008: damaged: it holds step 3" in caplog.text


def test_a_path_that_is_no_checkpoint_is_one_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a checkpoint"):
        checkpoints.at(tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"damaged: MANIFEST.json: missing"):
        checkpoints.at(tmp_path)
    with pytest.raises(StorageError, match="holds no 'ema'"):
        checkpoints.at(save(checkpoints, 1)).tensors("ema")


def test_a_pickle_under_our_names_is_never_opened(checkpoints: Checkpoints, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    path = checkpoints.folder / "step-00000001"
    content = {"format": 1, "step": 1, "best_step": None, "aliases": {"model": {}}, "state": {}}
    with atomic_folder(path) as folder:
        (folder / "model.safetensors").write_bytes(pickle.dumps(Attack()))
        (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match="not a safetensors file"):
        checkpoints.at(path).tensors("model")
    assert not canary.exists()


@pytest.mark.parametrize("aliases", [{"../../x": {}}, {"/x": {}}, {"model": 3}, ["model"], {"gone": {}}, {"model": {"a": "gone"}}])
def test_a_hostile_list_of_contents_is_refused(checkpoints: Checkpoints, aliases: Any) -> None:
    path = checkpoints.folder / "step-00000001"
    with atomic_folder(path) as folder:
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "state.json").write_text(json.dumps({"format": 1, "step": 1, "best_step": None, "aliases": aliases, "state": {}}))
    save_file({"weight": torch.zeros(1)}, checkpoints.folder.parent / "x.safetensors")
    with pytest.raises(StorageError):
        checkpoint = checkpoints.at(path)
        checkpoint.tensors(checkpoint.names[0])


# -------------------------------------------------------------------------------------------------------------- kills, full disks


def test_killed_anywhere_in_a_save_the_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """A framework's trainer, killed at each of 59 file operations of a save, left 58 states that could not be resumed."""
    found_steps = []
    for number in range(200):
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        save(checkpoints, 1)
        status = killed_before_operation(number, lambda c=checkpoints: save(c, 2))
        found = checkpoints.newest()
        assert found is not None
        assert torch.equal(found.tensors("model")["weight"], torch.full((4, 3), float(found.step)))
        found_steps.append(found.step)
        save(checkpoints, 2)  # the run that goes on
        assert names(checkpoints) == [2]
        if status == 0:
            break
    assert status == 0 and len(found_steps) > 15 and found_steps == sorted(found_steps) and set(found_steps) == {1, 2}


@pytest.mark.parametrize("limit", [0, 50, 150, 300])
def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before(checkpoints: Checkpoints, limit: int) -> None:
    save(checkpoints, 1)

    def fill() -> None:
        with pytest.raises(StorageError, match="step-00000002: cannot write: File too large"):
            save(checkpoints, 2)

    assert with_file_size_limit(limit, fill) == 0
    assert os.listdir(checkpoints.folder) == ["step-00000001"]


def test_too_little_space_for_the_checkpoints_is_found_before_training(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1000, 250, bias=False)  # 1 MB of weights, 3 MB with AdamW's moments, kept four times at most
    checkpoints.folder.mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 11_000_000}))
    with pytest.raises(StorageError, match="11 MB of free space, expected at least 12 MB"):
        checkpoints.check_space(model)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 12_000_000}))
    checkpoints.check_space(model)


# --------------------------------------------------------------------------------------------------------------------- optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_stopped_and_resumed_is_never_stopped_to_the_bit(checkpoints: Checkpoints, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    optimizer = build_optimizer(model, TrainerConfig())
    train(model, optimizer, range(3))
    tensors, state = optimizer_to_tensors(optimizer, model)
    checkpoints.save(3, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": state})
    train(model, optimizer, range(3, 6))

    found = checkpoints.newest()
    assert found is not None
    resumed = tiny_llama(seed=5)
    resumed.load_state_dict(found.tensors("model"))
    resumed_optimizer = build_optimizer(resumed, TrainerConfig())
    load_optimizer(resumed_optimizer, resumed, found.tensors("optimizer"), found.state["optimizer"])
    train(resumed, resumed_optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    ours, theirs = (optimizer_to_tensors(o, m)[0] for o, m in ((optimizer, model), (resumed_optimizer, resumed)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def _two_parameters() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Module()
    model.first, model.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    return model, model.first, model.second


def test_optimizer_state_follows_names_not_positions_and_keeps_its_dtype() -> None:
    """torch's load_state_dict goes by position and casts moments to the parameter's dtype."""
    model, first, second = _two_parameters()
    optimizer = torch.optim.AdamW([first, second])
    for parameter, value in ((first, 1.0), (second, 2.0)):
        optimizer.state[parameter] = {"step": torch.tensor(4.0), "exp_avg": torch.full((2,), value), "exp_avg_sq": torch.ones(2)}
    tensors, state = optimizer_to_tensors(optimizer, model)
    state = json.loads(json.dumps(state))

    other_model, other_first, other_second = _two_parameters()
    other = torch.optim.AdamW([other_second, other_first], lr=0.5)
    load_optimizer(other, other_model, tensors, state)
    assert other.state[other_first]["exp_avg"].tolist() == [1.0, 1.0] and other.state[other_second]["exp_avg"].tolist() == [2.0, 2.0]
    assert other.state[other_second]["exp_avg"].dtype == torch.float32
    assert other.param_groups[0]["lr"] == 0.5  # the configuration's, which resume_allow may have changed


def test_optimizer_state_of_another_model_is_refused() -> None:
    model, first, second = _two_parameters()
    tensors, state = optimizer_to_tensors(torch.optim.AdamW([first]), model)
    with pytest.raises(StorageError, match="its parameters are not the model's"):
        load_optimizer(torch.optim.AdamW([first, second]), model, tensors, state)
