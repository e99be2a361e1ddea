"""Trunk and head, taken apart, give the model's own logits and gradients at the supervised positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from mini_distill.data.batch import Batch
from mini_distill.errors import ModelError
from mini_distill.losses.reduction import IGNORE_INDEX, loss_mask, supervised_targets
from mini_distill.models.head import LanguageModel, OutputHead

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2_SIZES = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma2-uncapped": lambda: Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=None),
    "cohere": lambda: CohereConfig(**GROUPED, logit_scale=0.0625),
    "granite": lambda: GraniteConfig(**GROUPED, logits_scaling=6.0),
    "gpt2": lambda: GPT2Config(**GPT2_SIZES, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "opt-projected": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16),
}
CHANGES_ITS_LOGITS = ("gemma2", "cohere", "granite")


def build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return build(CONFIGS[family]())


@pytest.fixture
def batch() -> Batch:
    """Two rows with prompts of different length, padding on the right, and a gap in the supervision."""
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3], labels[0, 5], labels[1, :1] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    ids[1, 6:], labels[1, 6:] = 3, IGNORE_INDEX
    positions = torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 0])])
    return Batch(ids, labels, positions, torch.arange(2), torch.ones_like(ids))


def own_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Those of the model's own forward, at the supervised positions."""
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[loss_mask(batch.labels)]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def test_logits_are_the_models_own_at_the_supervised_positions(model: PreTrainedModel, batch: Batch) -> None:
    """Capping or scaling of logits ignored by the fused path: Gemma 2, Cohere (trl#6629)."""
    logits = LanguageModel(model).logits(batch)
    assert logits.shape == (5 + 5, 64)
    torch.testing.assert_close(logits, own_logits(model, batch), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_models_own_logits(model: PreTrainedModel, batch: Batch) -> None:
    direction = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    ours = gradients(model, (LanguageModel(model).logits(batch) * direction).sum())
    own = gradients(model, (own_logits(model, batch) * direction).sum())
    for name, gradient in own.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5 * max(1.0, gradient.abs().max().item()), msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_models_own_logits_to_the_bit(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> None:
    language_model = LanguageModel(model.to(dtype))
    with torch.no_grad():
        assert torch.equal(language_model.logits(batch), own_logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_in_half_precision_are_no_reason_to_refuse(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> None:
    """GPT-2's logits lie around −100."""
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits - 100)
    language_model = LanguageModel(model.to(dtype))
    with torch.no_grad():
        assert torch.equal(language_model.logits(batch), own_logits(model, batch))


@pytest.mark.parametrize("family", CHANGES_ITS_LOGITS)
def test_leaving_out_what_a_family_does_to_its_logits_would_show(model: PreTrainedModel, batch: Batch) -> None:
    """The fixtures are able to fail: without scaling or capping the logits are far from the model's own."""
    language_model = LanguageModel(model)
    language_model.head = OutputHead(model.get_output_embeddings())
    assert (language_model.logits(batch) - own_logits(model, batch)).abs().max() > 0.5


def test_only_supervised_positions_reach_the_head(model: PreTrainedModel, batch: Batch) -> None:
    """Prompts and padding cost no vocabulary-sized work."""
    language_model, rows = LanguageModel(model), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[:-1].numel()))
    language_model.logits(batch)
    assert rows == [int(loss_mask(batch.labels).sum())]
    assert language_model.hidden(batch).shape[0] == supervised_targets(batch.labels).shape[0]


def test_padding_and_prompt_labels_do_not_matter(model: PreTrainedModel, batch: Batch) -> None:
    """The trunk sees the tokens alone; what is supervised only chooses rows."""
    language_model = LanguageModel(model)
    some = language_model.logits(batch)
    everything = Batch(batch.input_ids, batch.input_ids.clone(), batch.position_ids, batch.row_ids, batch.num_bytes)
    chosen = loss_mask(batch.labels)[:, :-1].flatten()
    torch.testing.assert_close(language_model.logits(everything)[chosen], some)


def test_no_supervised_position_gives_no_logits_and_a_zero_gradient(model: PreTrainedModel, batch: Batch) -> None:
    batch.labels.fill_(IGNORE_INDEX)
    logits = LanguageModel(model).logits(batch)
    assert logits.shape == (0, 64)
    logits.sum().backward()
    used = [p.grad for p in model.parameters() if p.grad is not None]
    assert used and not any(grad.any() for grad in used)


def test_checking_the_head_leaves_the_model_as_it_was(model: PreTrainedModel, batch: Batch) -> None:
    before, expected = {name: p.clone() for name, p in model.state_dict().items()}, own_logits(model, batch)
    state = torch.get_rng_state()
    LanguageModel(model.train())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(own_logits(model.eval(), batch), expected)  # and no hook stays behind
    assert all(p.grad is None for p in model.parameters())


def test_the_head_is_the_models_module_and_not_a_copy(model: PreTrainedModel) -> None:
    """Tied weights stay tied, and the student's parameters are counted once."""
    language_model = LanguageModel(model)
    assert language_model.head.module is model.get_output_embeddings()
    assert [p.data_ptr() for p in language_model.parameters()] == [p.data_ptr() for p in model.parameters()]


# ------------------------------------------------------------------------------------------------------------------ refusals


class Changed(LlamaForCausalLM):
    """A Llama that does something to its logits which no setting tells."""

    change: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize("initializer_range", [0.002, 0.2])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 2,
        lambda logits: logits + torch.arange(64) / 64,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.masked_fill(torch.arange(64) == 63, -1e30),
        lambda logits: logits.roll(1, dims=-1),
    ],
    ids=["scaled", "biased", "soft-capped", "masked", "permuted"],
)
def test_an_unknown_change_of_the_logits_is_refused(change: Callable[[Tensor], Tensor], initializer_range: float) -> None:
    """Logits of random weights lie near 0, where soft-capping at 30 changes nothing: a check of their values alone let
    RecurrentGemma pass, whose capping was then ignored for the whole of training."""
    config = LlamaConfig(**{**GROUPED, "initializer_range": initializer_range})
    model = Changed(config).eval()
    LanguageModel(model)
    model.change = change
    with pytest.raises(ModelError, match=r"teacher\.path") as caught:
        LanguageModel(model, "teacher.path")
    assert "Changed" in str(caught.value) and "\n" not in str(caught.value)


def test_a_softcap_of_an_unknown_name_is_refused() -> None:
    settings = {**GROUPED, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 8}
    with pytest.raises(ModelError, match="changes its logits"):
        LanguageModel(build(RecurrentGemmaConfig(**settings)))


def test_a_head_with_layers_of_its_own_is_refused() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "bos_token_id"}
    with pytest.raises(ModelError, match="BertLMHeadModel"):
        LanguageModel(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no output head"):
        LanguageModel(BertModel(BertConfig(**SIZES)))


def test_a_model_that_is_its_own_trunk_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    model.base_model_prefix = "language_model"  # as with Llama 4, whose trunk is called `model`
    with pytest.raises(ModelError, match=r"student\.path"):
        LanguageModel(model)
