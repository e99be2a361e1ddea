"""A teacher that was asked before: the same targets, found by the number of a sequence, and nothing impossible is given out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from caches import KINDS, build, cache_config, change_column, change_numbers, sign
from faults.record import record
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mini_distill.data.batch import Batch
from mini_distill.data.order import Stream
from mini_distill.data.prepare import prepare_data
from mini_distill.errors import CacheError
from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.reduction import IGNORE_INDEX, count_valid_tokens
from mini_distill.losses.sparse import SampledRows, TopKRows
from mini_distill.models.head import OutputHead
from mini_distill.storage import atomic_folder, verify_folder
from mini_distill.teachers.bit_packing import pack_rising
from mini_distill.teachers.cached import CachedTeacher, load_head, save_head
from mini_distill.teachers.online import OnlineTeacher

VOCAB = 62


@dataclass
class Made:
    """A cache of each kind, the teacher they are of, and the data."""

    folders: dict[str, Path]
    teacher: OnlineTeacher
    train: Stream
    held_out: Stream

    def open(self, kind: str, side: str = "train") -> CachedTeacher:
        return CachedTeacher(self.folders[kind], {}, side)


@pytest.fixture(scope="module")
def made(
    tiny_command: list[str], tiny_teacher: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    root = tmp_path_factory.mktemp("caches")
    settings = {**KINDS, "full at 2": ["cache.kind=full", "cache.temperature=2"], "topk at 2": ["cache.kind=topk", "cache.temperature=2"]}
    settings["sampled at 2"] = [*KINDS["sampled"], "cache.temperature=2"]
    for name, more in settings.items():
        build(tiny_command, root / name, *more, "cache.batch_size=5", "cache.shard_sequences=7")
    data = prepare_data(cache_config(tiny_command, root).data, tiny_tokenizer, show_progress=False)
    assert data.held_out is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    return Made({name: root / name for name in settings}, OnlineTeacher(model), data.train, data.held_out)


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Callable[[str], Path]:
    """A cache that may be damaged."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(made.folders[kind], tmp_path / kind))

    return copy


def logits(targets: Any, count: int) -> Tensor:
    return targets.rows(slice(0, count), VOCAB)


def both(made: Made, kind: str, batch: Batch, side: str = "train") -> tuple[Any, Tensor]:
    """What the cache says of a batch, and the live teacher's logits."""
    count = int(count_valid_tokens(batch.labels))
    return logits(made.open(kind, side)(batch), count), logits(made.teacher(batch), count)


# -------------------------------------------------------------------------------------------------------- equal to the live one


@pytest.mark.parametrize("numbers", [[0], [3, 17, 1, 30, 4, 4], list(range(35))], ids=["one", "shuffled", "many"])
def test_hidden_states_are_the_live_teachers_to_rounding(made: Made, numbers: list[int]) -> None:
    cached, live = both(made, "hidden", made.train.batch(numbers))
    torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_bit_equal_where_the_batch_is_the_same(made: Made) -> None:
    """Shards of 7 are scored whole or in fives, sorted by length; a product of matrices rounds by its shape alone."""
    builder = CachedTeacher(made.folders["hidden"], {})
    batch = made.train.batch([0])
    assert torch.equal(logits(builder(batch), 3), logits(builder(made.train.batch([0, 9, 2])), 3))


def test_full_is_the_live_distribution_to_the_rounding_of_bfloat16(made: Made) -> None:
    cached, live = both(made, "full", made.train.batch([5, 2, 8]))
    log_probs = live.log_softmax(-1)
    torch.testing.assert_close(cached, log_probs, rtol=2**-8, atol=1e-5)
    assert forward_kl(live, cached).max() < 1e-3


def test_full_at_a_temperature_gives_logits_before_temperature(made: Made) -> None:
    """The divergence divides what the teacher gives by the temperature: written at 2 and divided again, it would be at 4."""
    cached, live = both(made, "full at 2", made.train.batch([5, 2, 8]))
    assert forward_kl(live, cached, 2.0).max() < 1e-3 and forward_kl(live, cached).max() < 1e-3


@pytest.mark.parametrize("kind", ["topk", "topk at 2"])
def test_topk_is_the_most_likely_tokens_and_the_rest_of_the_mass(made: Made, kind: str) -> None:
    temperature = 2.0 if kind.endswith("2") else 1.0
    rows, live = both(made, kind, made.train.batch([5, 2, 8]))
    assert isinstance(rows, TopKRows) and not rows.spread
    probs = (live / temperature).softmax(-1)
    wanted, ids = probs.topk(rows.ids.shape[-1], -1)
    assert torch.equal(rows.ids, ids)
    torch.testing.assert_close(rows.log_probs, wanted.log(), rtol=2e-3, atol=0.02)
    torch.testing.assert_close(rows.tail, 1 - wanted.sum(-1), rtol=2e-3, atol=1e-5)
    assert rows.compare("forward_kl", forward_kl, (live / temperature).log_softmax(-1), {}).max() < 1e-3


@pytest.mark.parametrize("kind", ["sampled", "draws", "sampled at 2"])
def test_sampled_rows_are_near_the_live_teacher_on_average(made: Made, kind: str) -> None:
    temperature = 2.0 if kind.endswith("2") else 1.0
    rows, live = both(made, kind, made.train.batch(list(range(len(made.train)))))
    assert isinstance(rows, SampledRows)
    values = rows.compare("forward_kl", forward_kl, (live / temperature).log_softmax(-1), {})
    assert abs(values.mean()) < 5 * values.std() / len(values) ** 0.5
    mean = torch.zeros(VOCAB).index_add_(0, rows.ids, rows.weights) / len(rows)  # over all tokens it is nearly the mean distribution
    torch.testing.assert_close(mean, (live / temperature).softmax(-1).mean(0), rtol=0, atol=0.02)


def test_threshold_entries_are_the_likely_tokens(made: Made) -> None:
    rows, live = both(made, "sampled", made.train.batch([5, 2, 8]))
    counts = rows.offsets.diff()
    assert counts.min() >= 1 and counts.max() <= 9
    torch.testing.assert_close(rows.entropy, torch.special.entr(live.softmax(-1)).sum(-1), rtol=0, atol=0.02)
    for token, probs in enumerate(live.softmax(-1)):
        ids = rows.ids[rows.offsets[token] : rows.offsets[token + 1]].tolist()
        assert {int(i) for i in (probs >= 1 / 8).nonzero()} <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_its_targets_wherever_it_stands(made: Made, kind: str) -> None:
    """Targets addressed by step or batch are another row's with another batch size, shuffle or number of processes."""
    teacher = made.open(kind)
    alone = {number: logits(teacher(made.train.batch([number])), 10_000) for number in (0, 6, 7, 20)}
    for numbers in ([20, 7, 0, 6], [6, 6, 0], [7, 20]):
        batch = made.train.batch(numbers)
        together = logits(teacher(batch), 10_000)
        at = 0
        for number, labels in zip(numbers, batch.labels, strict=True):
            count = int(count_valid_tokens(labels[None]))
            part, wanted = together[at : at + count], alone[number]
            at += count
            assert len(wanted) == count
            if isinstance(part, Tensor):
                torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-5)
            else:
                names = [field.name for field in fields(part) if isinstance(getattr(part, field.name), Tensor)]
                assert all(torch.equal(getattr(part, name), getattr(wanted, name)) for name in names)
        assert at == len(together)


def test_more_padding_changes_nothing(made: Made) -> None:
    batch = made.train.batch([4, 9])
    wide = Batch(
        **{
            f.name: nn.functional.pad(getattr(batch, f.name), (0, 9), value=IGNORE_INDEX if f.name == "labels" else 0)
            for f in fields(batch)
            if f.name != "row_ids"
        },
        row_ids=batch.row_ids,
    )
    teacher = made.open("full")
    assert torch.equal(logits(teacher(wide), 10_000), logits(teacher(batch), 10_000))


# ----------------------------------------------------------------------------------------------------------- the held-out side


@pytest.mark.parametrize("kind", ["sampled", "topk", "sampled at 2", "topk at 2", "draws"])
def test_what_the_evaluation_says_of_the_teacher_is_exact(made: Made, kind: str) -> None:
    """At temperature 1, whatever the targets were written at."""
    batch = made.held_out.batch(list(range(len(made.held_out))))
    count = int(count_valid_tokens(batch.labels))
    about = made.open(kind, "held_out").about_teacher(batch)
    log_probs = logits(made.teacher(batch), count).log_softmax(-1)
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
    assert about is not None and torch.equal(about["top_id"].long(), log_probs.argmax(-1))
    wanted = {
        "target_log_prob": log_probs.gather(-1, targets[:, None])[:, 0],
        "top_log_prob": log_probs.max(-1).values,
        "exact_entropy": torch.special.entr(log_probs.exp()).sum(-1),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(about[name], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full at 2", "topk at 2", "sampled at 2"])
def test_held_out_targets_are_at_temperature_one(made: Made, kind: str) -> None:
    """The evaluation compares at 1: targets of 2 made the teacher's perplexity that of another model."""
    rows, live = both(made, kind, made.held_out.batch(list(range(len(made.held_out)))), "held_out")
    if isinstance(rows, Tensor):
        assert forward_kl(live, rows).max() < 1e-3
    else:
        values = rows.compare("forward_kl", forward_kl, live.log_softmax(-1), {})
        assert abs(values.mean()) < 5 * values.std() / len(values) ** 0.5 + 1e-3


def test_dense_targets_tell_it_all(made: Made) -> None:
    for kind in ("full", "hidden"):
        teacher = made.open(kind, "held_out")
        assert teacher.is_dense and teacher.about_teacher(made.held_out.batch([0])) is None


def test_the_sides_draw_differently(made: Made) -> None:
    assert made.open("sampled").side.folder(0) != made.open("sampled", "held_out").side.folder(0)


def test_a_side_that_there_is_not_is_one_line(made: Made) -> None:
    with pytest.raises(CacheError, match="no validation side"):
        made.open("full", "validation")


# ------------------------------------------------------------------------------------------------- what must never be trained on


def test_other_tokens_under_an_equal_identity_are_found(made: Made) -> None:
    teacher, batch = made.open("full"), made.train.batch([3, 4])
    batch.row_ids = batch.row_ids.flip(0)
    with pytest.raises(CacheError, match=r"shard-00000: sequence 4 is not the one that was scored"):
        teacher(batch)


@pytest.mark.parametrize("name", ["input_ids", "labels", "position_ids"])
def test_one_other_token_label_or_position_is_found(made: Made, name: str) -> None:
    teacher, batch = made.open("sampled"), made.train.batch([3, 4])
    values = getattr(batch, name).clone()
    values[1, 2] = values[1, 2] + 1 if name != "labels" or values[1, 2] == IGNORE_INDEX else IGNORE_INDEX
    setattr(batch, name, values)
    with pytest.raises(CacheError, match="sequence 4 is not the one"):
        teacher(batch)


def test_sequences_swapped_on_disk_are_found(made: Made, copied: Callable[[str], Path]) -> None:
    folder = copied("full")
    change_column(folder / "train" / "shard-00000", "checksums", lambda sums: sums[::-1].copy())
    with pytest.raises(CacheError, match="is not the one that was scored"):
        CachedTeacher(folder, {})(made.train.batch([0]))


def set_to(value: Any, place: Any = 5) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


NAN16, NAN_BF16 = np.float16("nan"), 0x7FC0
IMPOSSIBLE: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray | None], str]] = {
    "sampled: a mass above 1": ("sampled", "head_levels", set_to(255, slice(None)), "head_levels give a token a mass of"),
    "sampled: fewer levels": ("sampled", "head_levels", lambda v: v[:-1], "head_levels has shape"),
    "sampled: fewer ids": ("sampled", "ids", lambda v: v[:-1], "ids has shape"),
    "sampled: counts moved": ("sampled", "counts", lambda v: np.roll(v, 1), "counts do not match"),
    "sampled: fewer counts": ("sampled", "counts", lambda v: v[:-1], "counts has shape"),
    "sampled: many entries": ("sampled", "entries", set_to(2**32 - 1, 1), "ids has shape"),
    "sampled: entries moved": ("sampled", "entries", lambda v: v[::-1].copy(), "counts do not match"),
    "sampled: entries of fewer": ("sampled", "entries", lambda v: v[:-1], "entries has shape"),
    "sampled: ids of floats": ("sampled", "ids", lambda v: v.astype(np.float32), "of float32, expected"),
    "sampled: fewer entropies": ("sampled", "entropy", lambda v: v[1:], "entropy has shape"),
    "topk: NaN at an end": ("topk", "ends", set_to(NAN16, (3, 1)), "not finite"),
    "topk: infinite end": ("topk", "ends", set_to(-np.inf, (3, 1)), "not finite"),
    "topk: rising ends": ("topk", "ends", lambda v: v[:, ::-1].copy(), "not those of probabilities"),
    "topk: NaN tail": ("topk", "log_tail", set_to(NAN16), "not finite"),
    "topk: infinite tail": ("topk", "log_tail", set_to(np.inf), "not those of probabilities"),
    "topk: a tail above 1": ("topk", "log_tail", set_to(0.1), "not those of probabilities"),
    "topk: a mass above 1": ("topk", "log_tail", set_to(np.log(0.9), slice(None)), "a mass of"),
    "topk: levels up": ("topk", "levels", lambda v: np.repeat(pack_rising(np.zeros((1, 8), np.uint8)), len(v), 0), "a mass of"),
    "topk: no level": ("topk", "levels", set_to(0, 3), "levels are not 8 of a token"),
    "topk: nothing but levels": ("topk", "levels", set_to(255, 3), "levels are not 8 of a token"),
    "topk: levels of one k less": ("topk", "levels", lambda v: v[:, :-1].copy(), "levels has shape"),
    "topk: fewer ids": ("topk", "ids", lambda v: v[:-1].copy(), "ids has shape"),
    "full: NaN": ("full", "log_probs", set_to(NAN_BF16, (4, 7)), "a mass of nan"),
    "full: a mass above 1": ("full", "log_probs", set_to(0, (4, 7)), "a mass of"),
    "full: nothing at all": ("full", "log_probs", set_to(0xFF80, 4), "a mass of 0"),
    "full: another vocabulary": ("full", "log_probs", lambda v: v[:, :-1].copy(), "log_probs has shape"),
    "full: one token less": ("full", "log_probs", lambda v: v[:-1], "log_probs has shape"),
    "hidden: NaN": ("hidden", "hidden", set_to(np.nan, (2, 3)), "not finite"),
    "hidden: infinite": ("hidden", "hidden", set_to(np.inf, (2, 3)), "not finite"),
    "hidden: another width": ("hidden", "hidden", lambda v: v[:, :-1].copy(), "hidden has shape"),
    "hidden: whole numbers": ("hidden", "hidden", lambda v: v.astype(np.int64), "hidden has shape"),
    "any: fewer checksums": ("full", "checksums", lambda v: v[:-1], "checksums has shape"),
    "any: starts": ("full", "starts", set_to(10**6, 2), "starts does not begin at 0 and rise"),
    "any: more tokens": ("full", "starts", lambda v: v + (np.arange(len(v)) == len(v) - 1), "log_probs has shape"),
}
PACKED: dict[str, tuple[str, str, int, Callable[[np.ndarray], np.ndarray | None], str]] = {
    "sampled: an id": ("sampled", "ids", 6, set_to(VOCAB), "ids hold token 62, and the vocabulary has 62"),
    "sampled: the last id": ("sampled", "ids", 6, set_to(63, -1), "ids hold token 63"),
    "sampled: a count": ("sampled", "counts", 4, lambda v: v + (np.arange(len(v)) == 3), "counts do not match"),
    "sampled: a head for a tail": (
        "sampled",
        "counts",
        4,
        lambda v: v + np.eye(len(v), dtype=int)[0] - np.eye(len(v), dtype=int)[np.flatnonzero(v[1::2])[0] * 2 + 1],
        "counts do not match",
    ),
    "sampled: a count moved": (
        "sampled",
        "counts",
        4,
        lambda v: v + np.eye(len(v), dtype=int)[0] - np.eye(len(v), dtype=int)[-2],
        "counts do",
    ),
    "draws: none of a token": (
        "draws",
        "counts",
        5,
        lambda v: np.append([0, v[0] + v[1]], v[2:]),
        "counts are 0 for some token",
    ),
    "draws: a mass above 1": ("draws", "head_levels", 5, set_to(20), "head_levels give a token a mass of"),
    "draws: more than there are": ("draws", "head_levels", 5, set_to(21), "head_levels give a token a mass of inf"),
    "topk: an id": ("topk", "ids", 6, set_to(62, 33), "ids hold token 62"),
}


def assert_impossible(folder: Path, made: Made, words: str) -> None:
    """The second shard cannot be used, the first can."""
    teacher = CachedTeacher(folder, {})
    teacher(made.train.batch([0, 1]))
    with pytest.raises(CacheError) as caught:
        teacher(made.train.batch([0, *range(7, 14), 15]))
    assert caught.value.exit_code == 5 and words in str(caught.value)
    assert "shard-00001" in str(caught.value) and "Delete this folder and build" in str(caught.value) and "\n" not in str(caught.value)
    record("impossible targets under right checksums", injected=1, fired=1, refused=1)


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_content_under_right_checksums_is_one_line(case: str, made: Made, copied: Callable[[str], Path]) -> None:
    """Changed by a bug, or by somebody who recomputed the manifest."""
    kind, column, change, words = IMPOSSIBLE[case]
    folder = copied(kind)
    change_column(folder / "train" / "shard-00001", column, change)
    assert_impossible(folder, made, words)


@pytest.mark.parametrize("case", PACKED)
def test_impossible_numbers_under_right_checksums_are_one_line(case: str, made: Made, copied: Callable[[str], Path]) -> None:
    kind, column, width, change, words = PACKED[case]
    folder = copied(kind)
    change_numbers(folder / "train" / "shard-00001", column, width, change)
    assert_impossible(folder, made, words)


def test_what_is_impossible_is_found_in_what_is_read_at_every_reading(made: Made, copied: Callable[[str], Path]) -> None:
    """A shard used to be looked through whole within the step that met it first, and believed from then on."""
    folder = copied("topk")
    change_numbers(folder / "train" / "shard-00001", "ids", 6, set_to(63, -1))  # of the last sequence
    teacher = CachedTeacher(folder, {})
    for _ in range(2):
        teacher(made.train.batch([7, 8, 12]))
        with pytest.raises(CacheError, match="ids hold token 63"):
            teacher(made.train.batch([7, 13]))


@pytest.mark.parametrize(("name", "value"), [("top_id", VOCAB), ("top_id", -1), ("target_log_prob", np.nan), ("exact_entropy", -1.0)])
def test_impossible_numbers_about_the_teacher_are_refused(name: str, value: Any, made: Made, copied: Callable[[str], Path]) -> None:
    folder = copied("sampled")
    change_column(folder / "held_out" / "shard-00000", name, set_to(value))
    with pytest.raises(CacheError, match=f"{name} holds a number out of range"):
        CachedTeacher(folder, {}, "held_out").about_teacher(made.held_out.batch([0, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_cache_passes(kind: str, made: Made) -> None:
    for side, stream in (("train", made.train), ("held_out", made.held_out)):
        made.open(kind, side)(stream.batch(list(range(len(stream)))))


def test_a_damaged_shard_is_named_before_the_first_batch(made: Made, copied: Callable[[str], Path]) -> None:
    folder = copied("full")
    for number in (1, 2):
        (folder / "train" / f"shard-{number:05d}" / "log_probs.npy").write_bytes(b"")
    with pytest.raises(CacheError, match=r"train/shard-00001: log_probs.npy: 0 bytes.* \(and 1 more shards\)\. Build it again"):
        CachedTeacher(folder, {})
    shutil.rmtree(folder / "train" / "shard-00000")
    with pytest.raises(CacheError, match=r"train/shard-00000: missing"):
        CachedTeacher(folder, {})


# ----------------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0625, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_comes_back_with_all_that_it_does(
    bias: bool, scale: float, softcap: float | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Gemma 2 caps its logits, Cohere and Granite scale them."""
    head = OutputHead(nn.Linear(8, 12, bias=bias, dtype=dtype), scale, softcap)
    with atomic_folder(tmp_path / "head") as folder:
        save_head(folder, head)
    for again in range(5):  # to the byte, so that two builds are equal
        save_head(tmp_path, head)
        assert (tmp_path / "head.safetensors").read_bytes() == (tmp_path / "head" / "head.safetensors").read_bytes(), again
    hidden = torch.randn(5, 8, dtype=dtype)
    assert torch.equal(load_head(tmp_path / "head").logits(hidden), head.logits(hidden))
    assert not any(p.requires_grad for p in load_head(tmp_path / "head").module.parameters())


HEAD_DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda folder: shutil.rmtree(folder),
    "emptied": lambda folder: (folder / "head.safetensors").write_bytes(b""),
    "a bit flipped": lambda folder: flip(folder / "head.safetensors"),
    "signed junk": lambda folder: ((folder / "head.safetensors").write_bytes(b"junk"), sign(folder)),
    "signed and without numbers": lambda folder: (_head_without_numbers(folder), sign(folder)),
    "signed NaN": lambda folder: (_nan_head(folder), sign(folder)),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _head_without_numbers(folder: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(folder / "head.safetensors"), folder / "head.safetensors")


def _nan_head(folder: Path) -> None:
    save_head(folder, OutputHead(nn.Linear(32, 64, bias=False)))
    tensors = safetensors.torch.load_file(folder / "head.safetensors")
    tensors["weight"][3, 4] = float("nan")
    safetensors.torch.save_file(tensors, folder / "head.safetensors", metadata={"head": '{"scale": 1.0, "softcap": null}'})


@pytest.mark.parametrize("damage", HEAD_DAMAGE)
def test_a_damaged_head_is_found(damage: str, copied: Callable[[str], Path]) -> None:
    """One flipped bit of the head changes the targets of every token, and no shard."""
    folder = copied("hidden")
    assert verify_folder(folder / "head") == []
    HEAD_DAMAGE[damage](folder / "head")
    with pytest.raises(CacheError, match="head"):
        CachedTeacher(folder, {})
