"""What is watched is what the models compute, and nothing of the watching stays."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    DbrxConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from mini_distill.errors import ConfigError, ModelError
from mini_distill.losses.attention import attention_kl, relation_kl
from mini_distill.losses.hidden import hidden_mse
from mini_distill.models.inner_states import InnerStates, _caller_of, blocks_of, blocks_path, layer_map

IDS: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES: dict[str, Any] = {**IDS, "hidden_size": 32, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OLDER: dict[str, Any] = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2: dict[str, Any] = {**IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, **NO_DROPOUT}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**HEADS),
    "gpt2": GPT2Config(**GPT2),
    "gpt_neox": GPTNeoXConfig(**OLDER),
    "gemma2": Gemma2Config(**HEADS, sliding_window=4),
    "qwen2": Qwen2Config(**{**HEADS, "num_attention_heads": 4}),
    "qwen3": Qwen3Config(**HEADS),
    "phi3": Phi3Config(**{name: value for name, value in HEADS.items() if name != "head_dim"}),
}
FURTHER: dict[str, PreTrainedConfig] = {
    "gpt_bigcode": GPTBigCodeConfig(**GPT2, multi_query=True),
    "gpt_bigcode-heads": GPTBigCodeConfig(**GPT2, multi_query=False),
    "persimmon": PersimmonConfig(**OLDER, qk_layernorm=False),
    "dbrx": DbrxConfig(
        **IDS,
        d_model=32,
        n_layers=3,
        n_heads=4,
        attn_config={"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32},
    ),
}
SPLIT_BY_THEMSELVES: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(**SIZES, n_head=4),
    "falcon": FalconConfig(**SIZES, num_attention_heads=4),
    "falcon-heads": FalconConfig(**SIZES, num_attention_heads=4, multi_query=False),
    "falcon-groups": FalconConfig(**SIZES, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
}

INPUT_IDS = torch.arange(20).view(2, 10) * 7919 % 60 + 4


def build(config: PreTrainedConfig, attention: str = "eager") -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # biases of zero would not show in what order they are cut
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(CONFIGS[request.param])


@pytest.fixture
def llama() -> PreTrainedModel:
    return build(CONFIGS["llama"])


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


ALL = [(state, i) for state in ("hidden", "query", "key", "value", "attention") for i in range(3)]

# ------------------------------------------------------------------------------------------------------------ what is recorded


def test_hidden_states_are_those_of_transformers(model: PreTrainedModel) -> None:
    with InnerStates(model, [("hidden", i) for i in range(3)]) as states:
        expected = model(INPUT_IDS, output_hidden_states=True).hidden_states
        for i in range(2):
            assert torch.equal(states["hidden", i], expected[i + 1])
        norm = next(module for path, module in model.base_model.named_children() if path in ("norm", "ln_f", "final_layer_norm"))
        assert torch.equal(norm(states["hidden", 2]), expected[3])  # the last of transformers has been through the final norm


def test_attention_is_that_of_transformers(model: PreTrainedModel) -> None:
    with InnerStates(model, [("attention", i) for i in range(3)]) as states:
        expected = model(INPUT_IDS, output_attentions=True).attentions
        for i in range(3):
            assert states["attention", i].shape == (2, 4, 10, 10) and torch.equal(states["attention", i], expected[i])


@pytest.mark.parametrize("name", [*CONFIGS, *FURTHER])
def test_queries_keys_and_values_are_what_reaches_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At position 0 rotary embedding does nothing."""
    model = build((CONFIGS | FURTHER)[name])
    source, given = sys.modules[type(model).__module__], []
    original = source.eager_attention_forward

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append({"query": query, "key": key, "value": value})
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(source, "eager_attention_forward", watched)
    with InnerStates(model, [(state, i) for state in ("query", "key", "value") for i in (0, 2)]) as states:
        model(INPUT_IDS, position_ids=torch.zeros_like(INPUT_IDS), use_cache=False)
        for i in (0, 2):
            for state in ("query", "key", "value") if name != "qwen3" else ("value",):  # it norms queries and keys first
                torch.testing.assert_close(states[state, i], given[i][state].transpose(1, 2).flatten(2), msg=f"{state} {i}")


@pytest.mark.parametrize("name", SPLIT_BY_THEMSELVES)
def test_fused_projections_are_cut_as_the_model_cuts_them(name: str) -> None:
    model = build(SPLIT_BY_THEMSELVES[name])
    module = model.transformer.h[1].self_attention
    fused: list[Tensor] = []
    handle = module.query_key_value.register_forward_hook(lambda module, inputs, output: fused.append(output))
    with InnerStates(model, [("query", 1), ("key", 1), ("value", 1)]) as states:
        model(INPUT_IDS, use_cache=False)
        handle.remove()
        parts = [part.transpose(1, 2) for part in module._reshape(fused[0])] if name == "bloom" else module._split_heads(fused[0])
        expected = list(parts)  # (B, S, heads, width)
        if name == "falcon-groups":  # which repeats them for each query of the group
            expected[1:] = [part[:, :, ::2] for part in expected[1:]]
        for state, part in zip(("query", "key", "value"), expected, strict=True):
            assert torch.equal(states[state, 1], part.flatten(2)), state


def test_the_parts_of_mpt_lie_one_after_the_other() -> None:
    model = build(MptConfig(**IDS, d_model=32, n_layers=2, n_heads=4))
    outputs: list[Tensor] = []
    handle = model.transformer.blocks[0].attn.Wqkv.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with InnerStates(model, [("query", 0), ("value", 0)]) as states:
        model(INPUT_IDS, use_cache=False)
        assert torch.equal(states["query", 0], outputs[0][..., :32]) and torch.equal(states["value", 0], outputs[0][..., 64:])
    handle.remove()


def test_grouped_keys_and_values_are_not_repeated(llama: PreTrainedModel) -> None:
    with InnerStates(llama, [("query", 0), ("key", 0), ("value", 0)]) as states:
        llama(INPUT_IDS)
        assert [states[state, 0].shape for state in ("query", "key", "value")] == [(2, 10, 32), (2, 10, 16), (2, 10, 16)]


def test_the_models_output_and_gradients_are_those_without_watching(model: PreTrainedModel) -> None:
    plain = model(INPUT_IDS, labels=INPUT_IDS).loss
    expected = torch.autograd.grad(plain, list(model.parameters()))
    with InnerStates(model, ALL):
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    assert torch.equal(loss, plain)
    assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))


def test_the_trunk_alone_is_a_pass_too(llama: PreTrainedModel) -> None:
    """Training asks it for hidden states, and not the head for logits."""
    with InnerStates(llama, [("hidden", 1)]) as states:
        output = llama.base_model(INPUT_IDS, output_hidden_states=True)
        assert torch.equal(states["hidden", 1], output.hidden_states[2])


def test_a_model_that_passes_over_its_own_trunk_is_watched_too() -> None:
    """OPTForCausalLM calls `model.decoder`, and never its base model."""
    model = build(OPTConfig(**SIZES, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=128))
    with InnerStates(model, [("hidden", 0), ("query", 1)]) as states:
        for call in (model, model.base_model):
            expected = call(INPUT_IDS, output_hidden_states=True).hidden_states
            assert torch.equal(states["hidden", 0], expected[1]) and states["query", 1].shape == (2, 10, 32)


def test_a_container_that_nobody_calls_is_not_taken_for_the_caller() -> None:
    """Code of hub repositories keeps its blocks in an nn.ModuleDict."""
    model = nn.Module()
    model.transformer = nn.ModuleDict({"h": nn.ModuleList([nn.Identity()])})
    assert _caller_of(model, "transformer.h") is model


def test_the_latest_pass_replaces_the_one_before(llama: PreTrainedModel) -> None:
    with InnerStates(llama, [("hidden", 1)]) as states:
        llama(INPUT_IDS)
        first = states["hidden", 1]
        llama(INPUT_IDS[:1])
        assert first.shape[0] == 2 and states["hidden", 1].shape[0] == 1


def test_without_gradients_nothing_of_a_graph_is_recorded(model: PreTrainedModel) -> None:
    with InnerStates(model, ALL) as states, torch.no_grad():
        model(INPUT_IDS)
        assert not any(states[key].requires_grad for key in ALL)


# ------------------------------------------------------------------------------------------------------------------- gradients


def inner_loss(states: InnerStates, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    positions = torch.arange(10).expand(2, 10)
    loss = torch.zeros(())
    for i in range(3):
        hidden, attention = states["hidden", i], states["attention", i]
        loss = loss + hidden_mse(hidden, torch.randn(hidden.shape, generator=draw)).sum()
        loss = loss + attention_kl(attention, torch.rand(attention.shape, generator=draw).tril().softmax(-1)).sum()
        for state in ("query", "key", "value"):
            part = states[state, i]
            loss = loss + relation_kl(part, torch.randn(part.shape, generator=draw), positions, num_relation_heads=4).sum()
    return loss


def gradients(model: nn.Module, run: Callable[[], Any], states: InnerStates, *, backward_within: bool) -> list[Tensor]:
    model.zero_grad()
    with states:
        loss = run().float().square().mean() + inner_loss(states)
        if backward_within:
            loss.backward()
    if not backward_within:
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("backward_within", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model: PreTrainedModel, backward_within: bool) -> None:
    """Each block runs again during backward, its hooks too: what is recorded then belongs to no loss."""
    model.train()
    states = InnerStates(model, ALL)
    expected = gradients(model, lambda: model(INPUT_IDS, use_cache=False).logits, states, backward_within=False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, lambda: model(INPUT_IDS, use_cache=False).logits, states, backward_within=backward_within)
    assert len(expected) == len(found) == len(list(model.parameters()))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_recomputation_is_not_recorded(llama: PreTrainedModel) -> None:
    llama.train().activation_checkpointing_enable({"use_reentrant": False})
    with InnerStates(llama, ALL) as states:
        loss = llama(INPUT_IDS, use_cache=False).logits.sum() + inner_loss(states)
        before = {key: states[key] for key in ALL}
        calls: list[int] = []
        counter = llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        loss.backward()
        counter.remove()
        assert calls and all(states[key] is before[key] for key in ALL)


def test_reentrant_checkpointing_which_would_cut_the_graph_is_refused(llama: PreTrainedModel) -> None:
    llama.train().activation_checkpointing_enable({"use_reentrant": True})
    llama.enable_input_require_grads()
    with InnerStates(llama, [("query", 1)]), pytest.raises(RuntimeError, match="use_reentrant=False"):
        llama(INPUT_IDS, use_cache=False)
    with InnerStates(llama, [("hidden", 1)]) as states:  # comes out of the checkpoint
        llama(INPUT_IDS, use_cache=False)
        assert states["hidden", 1].requires_grad


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_wrapped_for_several_processes_is_watched_inside(llama: PreTrainedModel, checkpointing: bool) -> None:
    llama.train()
    states = InnerStates(llama, ALL)
    expected = gradients(llama, lambda: llama(INPUT_IDS, use_cache=False).logits, states, backward_within=True)
    if checkpointing:
        llama.activation_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(llama)
    found = gradients(wrapped, lambda: wrapped(INPUT_IDS, use_cache=False).logits, states, backward_within=True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------------------- nothing is left


def test_no_hook_and_no_tensor_stays(model: PreTrainedModel) -> None:
    before = hooks(model)
    states = InnerStates(model, ALL)
    assert hooks(model) == before
    with states:
        model(INPUT_IDS)
        kept = [weakref.ref(states[key]) for key in ALL if key[0] in ("hidden", "attention")]
        assert hooks(model) > before and all(ref() is not None for ref in kept)
    gc.collect()
    assert hooks(model) == before and not [ref for ref in kept if ref() is not None]
    with pytest.raises(RuntimeError, match="no forward pass"):
        states["hidden", 0]


def test_an_exception_leaves_nothing_behind(llama: PreTrainedModel) -> None:
    states, before = InnerStates(llama, ALL), hooks(llama)
    with pytest.raises(ZeroDivisionError), states:
        llama(INPUT_IDS)
        raise ZeroDivisionError
    assert hooks(llama) == before and not states._recorded


def test_a_pass_that_fails_is_over(llama: PreTrainedModel) -> None:
    """Else whatever runs afterwards, in no pass, would be recorded."""
    with InnerStates(llama, [("hidden", 0), ("hidden", 2)]) as states:
        stumble = llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama(INPUT_IDS)
        stumble.remove()
        assert not states._in_pass
        llama(INPUT_IDS)
        assert states["hidden", 2].shape == (2, 10, 32)


def test_it_can_be_entered_again_but_not_twice_at_once(llama: PreTrainedModel) -> None:
    states = InnerStates(llama, [("hidden", 0)])
    for rows in (2, 1):
        with states:
            with pytest.raises(RuntimeError, match="no forward pass"):
                states["hidden", 0]
            llama(INPUT_IDS[:rows])
            assert states["hidden", 0].shape[0] == rows
            with pytest.raises(RuntimeError, match="second time"):
                states.__enter__()


# ---------------------------------------------------------------------------------------------------------- what is refused


def test_attention_that_is_never_held_names_the_setting_to_change() -> None:
    model = build(CONFIGS["llama"], attention="sdpa")
    with pytest.raises(ModelError) as caught:
        InnerStates(model, [("attention", 0)], group="student")
    assert str(caught.value).startswith("student.attn_implementation: got sdpa") and "student.attn_implementation=eager" in str(
        caught.value
    )
    InnerStates(model, [("hidden", 0), ("query", 0)])


def test_attention_after_dropout_is_refused_in_training() -> None:
    model = build(GPT2Config(**{**GPT2, "attn_pdrop": 0.1}))
    with InnerStates(model, [("attention", 0)]) as states:
        model(INPUT_IDS)
        model.train()
        with pytest.raises(ModelError, match=r"attn_pdrop=0\.1"):
            model(INPUT_IDS)
        assert not states._in_pass


@pytest.mark.parametrize(
    ("config", "state"),
    [
        (CodeGenConfig(**{**GPT2, "n_ctx": 32}, rotary_dim=4), "query"),
        (FalconMambaConfig(**SIZES), "key"),
    ],
    ids=["codegen", "falcon_mamba"],
)
def test_an_architecture_without_the_projection_is_named(config: PreTrainedConfig, state: str) -> None:
    with pytest.raises(ModelError) as caught:
        InnerStates(build(config), [(state, 0)], group="teacher")
    line = str(caught.value)
    assert line.startswith("teacher.path: ") and f"({config.model_type})" in line and "Match hidden states instead" in line


def test_a_projection_that_holds_more_than_queries_is_refused() -> None:
    """Half of Qwen3-Next's q_proj is a gate, head by head; and most of its blocks have no attention at all."""
    experts: dict[str, Any] = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    linear: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    config = Qwen3NextConfig(**HEADS, **experts, **linear, layer_types=["linear_attention", "linear_attention", "full_attention"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="more in it than queries"):
        InnerStates(model, [("query", 2)])
    with pytest.raises(ModelError, match="no modules called k_proj in block 0"):
        InnerStates(model, [("key", 0)])


@pytest.mark.parametrize("wanted", [("logits", 0), ("hidden", 3), ("hidden", -1)])
def test_a_state_or_block_that_is_not_there_is_a_mistake(llama: PreTrainedModel, wanted: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        InnerStates(llama, [wanted])


def test_a_state_that_was_not_wanted_is_a_mistake(llama: PreTrainedModel) -> None:
    with InnerStates(llama, [("hidden", 0)]) as states:
        llama(INPUT_IDS)
        with pytest.raises(KeyError):
            states["hidden", 1]


# ------------------------------------------------------------------------------------------------------------ blocks and pairs


@pytest.mark.parametrize("name", CONFIGS | FURTHER | SPLIT_BY_THEMSELVES)
def test_the_blocks_are_found(name: str) -> None:
    model = build((CONFIGS | FURTHER | SPLIT_BY_THEMSELVES)[name])
    assert len(blocks_of(model)) == 3 and blocks_of(model) is model.get_submodule(blocks_path(model))


def test_a_model_whose_blocks_cannot_be_told_is_refused(llama: PreTrainedModel) -> None:
    llama.more = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ModelError, match=r"teacher\.path: cannot tell which list of LlamaForCausalLM holds its 3 blocks"):
        blocks_of(llama, "teacher.path")


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "expected"),
    [
        ("last", 2, 12, [(1, 11)]),
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 3, 32, [(0, 10), (1, 20), (2, 31)]),
        ("uniform", 1, 5, [(0, 4)]),
        ("uniform", 6, 2, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]),
        ({0: 3}, 2, 12, [(0, 3)]),
        ({-1: -1, 0: 5}, 4, 12, [(0, 5), (3, 11)]),
        ({0: -12, 1: -12}, 2, 12, [(0, 0), (1, 0)]),
    ],
)
def test_the_pairs_of_blocks(spec: Any, student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert layer_map(spec, student, teacher) == expected


def test_uniform_ends_at_the_last_never_goes_back_and_stays_within() -> None:
    for student, teacher in itertools.product(range(1, 20), repeat=2):
        pairs = layer_map("uniform", student, teacher)
        theirs = [pair[1] for pair in pairs]
        assert [pair[0] for pair in pairs] == list(range(student))
        assert theirs == sorted(theirs) and theirs[0] >= 0 and theirs[-1] == teacher - 1
        assert student > teacher or len(set(theirs)) == student


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "is empty"),
        ({2: 0}, "student block 2, expected a whole number from 0 to 1, or from -2 to -1"),
        ({0: 12}, "teacher block 12, expected a whole number from 0 to 11, or from -12 to -1"),
        ({0: -13}, "teacher block -13"),
        ({0: True}, "teacher block True"),
        ({0: 1.0}, "teacher block 1.0"),
        ({-1: 3, 1: 4}, "student block 1 twice"),
        ("first", "got 'first', expected uniform, last"),
    ],
)
def test_a_map_that_cannot_be_names_the_setting_and_the_range(spec: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer_map(spec, 2, 12, where="objective.terms.hidden_mse.layer_map")
    assert str(caught.value).startswith("objective.terms.hidden_mse.layer_map: ") and said in str(caught.value)


def test_all_problems_of_a_map_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        layer_map({5: 99, 1: 4, 0: 12}, 2, 12)
    assert len(caught.value.problems) == 3


def test_both_sides_together_give_a_loss_that_trains_the_student_only(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    student, teacher = tiny_llama(num_hidden_layers=2), tiny_llama(seed=1, num_hidden_layers=4).requires_grad_(False)
    pairs = layer_map("uniform", len(blocks_of(student)), len(blocks_of(teacher)))
    assert pairs == [(0, 1), (1, 3)]
    ours, theirs = (InnerStates(m, [("hidden", p[side]) for p in pairs]) for side, m in enumerate((student, teacher)))
    with ours, theirs:
        with torch.no_grad():
            teacher(INPUT_IDS)
        student(INPUT_IDS)
        sum(hidden_mse(ours["hidden", i], theirs["hidden", j]).sum() for i, j in pairs).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in teacher.parameters())
    blocks = [p for name, p in student.named_parameters() if ".layers." in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in blocks)
