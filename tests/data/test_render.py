import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mini_distill.config import DataConfig
from mini_distill.data.render import Renderer
from mini_distill.data.row import Rendered, Row, RowError
from mini_distill.errors import DataError, ModelError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
PAIRS = DataConfig(prompt_column="question", completion_column="answer")
HARD_TEXTS = [
    "plain words",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and 漢字 and é",
    " leading and trailing \n",
    "\n\n\t\n",
    "nul \x00 and private use \ue000x\ue001",
    "</s><s> <bos><eos><|endoftext|> <unk><pad>",
    "e\u0301 ﬁ ① Ａ",  # changed by normalisers
]


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the words of the words", "question and answer, answer and question"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((char, -2.0) for char in "</s>abc ")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def shared_tokenizer(name: str) -> PreTrainedTokenizerFast:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"the shared model {name} is not here")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["byte-level", "tiny", "normalising", "stories260K", "babyllama-tok105"])
def any_tokenizer(request, tokenizer, tiny_tokenizer) -> PreTrainedTokenizerFast:
    if request.param == "normalising":
        changed = byte_level(eos_token="</s>")
        changed.backend_tokenizer.normalizer = normalizers.NFKC()
        return changed
    own = {"byte-level": tokenizer, "tiny": tiny_tokenizer}
    return own[request.param] if request.param in own else shared_tokenizer(request.param)


def render(tokenizer, text, config=None) -> Rendered | DataError:
    return Renderer(config or DataConfig(), tokenizer).render_many([Row("rows.jsonl:7", {"text": text})])[0]


# -------------------------------------------------------------------------------------------------------------------------- text


def test_a_text_is_supervised_whole_and_ends_with_eos(tokenizer):
    rendered = render(tokenizer, "the words")
    assert tokenizer.decode(rendered.input_ids) == "<s>the words</s>"
    assert rendered.supervised.tolist() == [False] + [True] * (len(rendered.input_ids) - 1)
    assert rendered.input_ids.dtype == rendered.num_bytes.dtype == np.int64
    assert rendered.supervised.dtype == bool


def test_eos_is_supervised_when_pad_is_eos():
    """With pad == eos, masks made from token ids hid the real EOS, and students never learned to stop (PITFALLS 9)."""
    tokenizer = byte_level(eos_token="</s>", pad_token="</s>")
    for config, columns in ((DataConfig(), {"text": "words"}), (PAIRS, {"question": "the", "answer": "words"})):
        rendered = Renderer(config, tokenizer).render_many([Row("", columns)])[0]
        assert rendered.input_ids[-1] == tokenizer.pad_token_id
        assert rendered.supervised[-1]


@pytest.mark.parametrize(
    ("special", "add_bos", "begins"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, True),
        ({"bos_token": "<s>", "eos_token": "</s>"}, False, False),
        ({"bos_token": "</s>", "eos_token": "</s>"}, None, False),  # GPT-2: one token for both
        ({"bos_token": "</s>", "eos_token": "</s>"}, True, True),
        ({"eos_token": "</s>"}, None, False),
    ],
)
def test_a_document_begins_with_bos_where_there_is_one_of_its_own_or_as_told(special, add_bos, begins):
    tokenizer = byte_level(**special)
    rendered = render(tokenizer, "words", DataConfig(add_bos=add_bos))
    assert (rendered.input_ids[0] == tokenizer.bos_token_id) == begins


def test_bos_that_is_not_there_cannot_be_asked_for():
    with pytest.raises(DataError, match=r"data\.mixture\.a\.add_bos: true, and the tokenizer has no"):
        Renderer(DataConfig(add_bos=True), byte_level(eos_token="</s>"), "data.mixture.a")


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Renderer(DataConfig(), byte_level(bos_token="<s>"))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="object is not a fast tokenizer"):
        Renderer(DataConfig(), object())


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(any_tokenizer, text):
    rendered = render(any_tokenizer, text)
    assert rendered.num_bytes.sum() == len(text.encode())
    assert (rendered.num_bytes >= 0).all()
    assert rendered.num_bytes[-1] == 0  # EOS is not of the text


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_the_bytes_add_up_for_any_text(text):
    for tokenizer in (PROPERTY_BYTE_LEVEL, PROPERTY_NORMALISING):
        rendered = render(tokenizer, text)
        assert isinstance(rendered, RowError) or rendered.num_bytes.sum() == len(text.encode())


PROPERTY_BYTE_LEVEL = byte_level(eos_token="</s>")
PROPERTY_NORMALISING = byte_level(eos_token="</s>")
PROPERTY_NORMALISING.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])


def test_each_token_of_a_byte_level_vocabulary_stands_for_its_own_bytes(tokenizer):
    rendered = render(tokenizer, "the é\U0001f600")
    spelled = tokenizer.convert_ids_to_tokens(rendered.input_ids[1:-1].tolist())
    assert rendered.num_bytes[1:-1].tolist() == [len(token) for token in spelled]


def test_the_blank_that_sentencepiece_puts_in_front_has_no_bytes():
    tokenizer = shared_tokenizer("stories260K")
    rendered = render(tokenizer, "\n")
    assert tokenizer.convert_ids_to_tokens(rendered.input_ids.tolist()) == ["<s>", "▁", "<0x0A>", "</s>"]
    assert rendered.num_bytes.tolist() == [0, 0, 1, 0]


def test_an_unknown_character_has_its_own_bytes_not_those_of_the_word_unk(tiny_tokenizer):
    """`<unk>` has five letters: beside a four-byte emoji it looked like a text with one blank in front."""
    assert render(tiny_tokenizer, "a\U0001f600b").num_bytes.tolist() == [0, 1, 4, 1, 0]
    tokenizer = shared_tokenizer("babyllama-tok105")
    rendered = render(tokenizer, "a\U0001f600b")
    assert tokenizer.convert_ids_to_tokens(rendered.input_ids.tolist()) == ["<s>", "▁", "a", "<unk>", "b", "</s>"]
    assert rendered.num_bytes.tolist() == [0, 0, 1, 4, 1, 0]


def test_special_tokens_inside_a_text_stay_text(any_tokenizer):
    """A document about `</s>` ended in its middle, and a hostile one could write the control tokens of a chat."""
    control = {any_tokenizer.eos_token, any_tokenizer.bos_token, any_tokenizer.pad_token} - {None}
    text = " ".join(f"a {token} b" for token in sorted(control))
    rendered = render(any_tokenizer, text)
    inside = rendered.input_ids[1 if any_tokenizer.bos_token else 0 : -1]
    assert not set(inside.tolist()) & {any_tokenizer.convert_tokens_to_ids(token) for token in control}
    assert any_tokenizer.encode("</s>" if "</s>" in control else any_tokenizer.eos_token, add_special_tokens=False) == [
        any_tokenizer.eos_token_id
    ]


def test_a_vocabulary_that_can_only_spell_a_special_token_as_itself_refuses_the_row():
    """A Unigram vocabulary holds `</s>` as a word, and finds it in plain text however it is told to encode special tokens."""
    error = render(unigram(), "a</s>b")
    assert isinstance(error, RowError)
    assert error.reason == "special token"
    assert "rows.jsonl:7: column 'text' holds a special token" in str(error)
    assert not isinstance(render(unigram(), "a</ s>b"), RowError)


def test_the_tokenizers_own_truncation_and_padding_are_not_for_data():
    tokenizer = byte_level(eos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokenizer.decode(render(tokenizer, "the words of the words and more").input_ids) == "the words of the words and more</s>"
    assert tokenizer.decode(render(tokenizer, "the").input_ids) == "the</s>"


def test_a_text_is_the_same_alone_and_in_company(any_tokenizer):
    renderer = Renderer(DataConfig(), any_tokenizer)
    rows = [Row(str(i), {"text": text}) for i, text in enumerate(HARD_TEXTS)]
    for row, together in zip(rows, renderer.render_many(rows), strict=True):
        alone = renderer.render_many([row])[0]
        assert all((getattr(alone, name) == getattr(together, name)).all() for name in ("input_ids", "supervised", "num_bytes"))


# --------------------------------------------------------------------------------------------------------- prompt and completion


def test_a_completion_is_supervised_with_its_eos_and_a_prompt_is_not(tokenizer):
    rendered = Renderer(PAIRS, tokenizer).render_many([Row("", {"question": "the question ", "answer": "the answer"})])[0]
    assert tokenizer.decode(rendered.input_ids) == "<s>the question the answer</s>"
    assert tokenizer.decode(rendered.input_ids[rendered.supervised]) == "the answer</s>"
    assert tokenizer.decode(rendered.input_ids[~rendered.supervised]) == "<s>the question "
    assert rendered.num_bytes[rendered.supervised].sum() == len("the answer")


def test_the_boundary_does_not_depend_on_what_stands_beside_it(tokenizer):
    """Tokenised as one string, ` wor` + `ds` becomes the token ` words`, which is half prompt."""
    assert len(tokenizer.encode(" words", add_special_tokens=False)) == 1
    rendered = Renderer(PAIRS, tokenizer).render_many([Row("", {"question": " wor", "answer": "ds"})])[0]
    assert tokenizer.decode(rendered.input_ids[rendered.supervised]) == "ds</s>"


def test_an_empty_prompt_is_allowed_and_an_empty_completion_is_not(tokenizer):
    rows = [Row("1", {"question": "", "answer": "words"}), Row("2", {"question": "the", "answer": ""})]
    good, error = Renderer(PAIRS, tokenizer).render_many(rows)
    assert tokenizer.decode(good.input_ids) == "<s>words</s>"
    assert error.reason == "empty"
    assert "2: column 'answer' is empty" in str(error)


def test_gsm8k_is_rendered_as_prompts_and_completions():
    file = SHARED / "corpora/gsm8k/train.jsonl"
    if not file.exists():
        pytest.skip("gsm8k is not here")
    rows = [Row(f"train.jsonl:{i}", json.loads(line)) for i, line in enumerate(file.open(encoding="utf-8"), start=1) if i <= 200]
    tokenizer = shared_tokenizer("stories260K")
    for row, rendered in zip(rows, Renderer(PAIRS, tokenizer).render_many(rows), strict=True):
        assert rendered.num_bytes[rendered.supervised].sum() == len(row.columns["answer"].encode())
        assert rendered.num_bytes.sum() == len((row.columns["question"] + row.columns["answer"]).encode())
        assert rendered.input_ids[-1] == tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("columns", "reason", "message"),
    [
        ({"text": 17}, "wrong type", r"column 'text' holds int '17', expected text"),
        ({"text": None}, "wrong type", r"column 'text' holds null, expected text"),
        ({"text": ["a"]}, "wrong type", r"column 'text' holds list"),
        ({"text": float("nan")}, "wrong type", r"column 'text' holds float 'nan'"),
        ({"text": ""}, "empty", r"column 'text' is empty"),
        ({"text": "a \ud800 b"}, "lone surrogate", r"half a character \(a lone surrogate at 2\)"),
        ({"other": "a", "third": "b"}, "missing column", r"no column 'text' \(there: other, third\)"),
    ],
)
def test_a_bad_row_comes_back_as_an_error_that_names_it_and_the_others_are_rendered(tokenizer, columns, reason, message):
    rows = [Row("a.jsonl:1", {"text": "words"}), Row("a.jsonl:2", columns), Row("a.jsonl:3", {"text": "the"})]
    first, error, last = Renderer(DataConfig(), tokenizer).render_many(rows)
    assert isinstance(error, RowError)
    assert error.reason == reason
    assert str(error).startswith("a.jsonl:2: ")
    with pytest.raises(DataError, match=message):
        raise error
    assert tokenizer.decode(first.input_ids) == "<s>words</s>"
    assert tokenizer.decode(last.input_ids) == "<s>the</s>"


def test_a_text_of_which_the_tokenizer_keeps_nothing_is_empty():
    """Blanks alone, and a normaliser that strips them: there was no last token to give the rest of the bytes to."""
    assert render(PROPERTY_NORMALISING, "   ").reason == "empty"


def test_no_rows_are_rendered_as_none(tokenizer):
    assert Renderer(DataConfig(), tokenizer).render_many([]) == []


# ------------------------------------------------------------------------------------------------------------------- fingerprint


def test_whatever_changes_the_tokens_changes_the_fingerprint(tokenizer):
    others = [
        Renderer(DataConfig(text_column="body"), tokenizer),
        Renderer(DataConfig(add_bos=False), tokenizer),
        Renderer(PAIRS, tokenizer),
        Renderer(DataConfig(messages_column="text", chat_template="chatml"), tokenizer),
        Renderer(DataConfig(messages_column="text", chat_template="gemma"), tokenizer),
        Renderer(DataConfig(messages_column="text", chat_template="gemma", add_bos=False), tokenizer),
        Renderer(DataConfig(messages_column="text", chat_template="gemma", tools_column="tools"), tokenizer),
        Renderer(DataConfig(), byte_level(bos_token="<s>", eos_token="the")),
    ]
    prints = [json.dumps(renderer.fingerprint, sort_keys=True) for renderer in (Renderer(DataConfig(), tokenizer), *others)]
    assert len(set(prints)) == len(prints)
    assert prints[0] == json.dumps(Renderer(DataConfig(), tokenizer).fingerprint, sort_keys=True)


def test_a_prompt_is_what_decides_how_long_rows_are_cut(tokenizer):
    assert not Renderer(DataConfig(), tokenizer).has_prompt
    assert Renderer(PAIRS, tokenizer).has_prompt
    assert Renderer(DataConfig(messages_column="messages", chat_template="chatml"), tokenizer).has_prompt
