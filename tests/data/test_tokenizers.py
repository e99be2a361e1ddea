import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from mini_distill.data.tokenizers import check_same_tokenizer, tokenizer_fingerprint
from mini_distill.errors import ModelError

VOCABULARY = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}


def make(vocabulary=None, merges=(("a", "b"), ("b", "c")), normalizer=None, eos="<eos>"):
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary or VOCABULARY, merges=list(merges)))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def test_the_same_tokenizer_has_the_same_fingerprint_after_a_save_and_a_load(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    assert (
        tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path))
        == tokenizer_fingerprint(tokenizer)
        == tokenizer_fingerprint(make())
    )


@pytest.mark.parametrize(
    "other",
    [
        {"vocabulary": {**VOCABULARY, "a": 2, "b": 1}},
        {"merges": (("b", "c"), ("a", "b"))},
        {"normalizer": normalizers.Lowercase()},
        {"eos": "c"},
    ],
    ids=["ids", "order of merges", "normaliser", "special tokens"],
)
def test_whatever_changes_tokens_changes_the_fingerprint(other):
    assert tokenizer_fingerprint(make(**other)) != tokenizer_fingerprint(make())


def test_the_roles_of_the_special_tokens_are_in_the_fingerprint():
    tokenizer = make()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.bos_token = "<eos>"
    assert tokenizer_fingerprint(tokenizer) != before


def test_using_a_tokenizer_does_not_change_its_fingerprint():
    tokenizer = make()
    tokenizer.pad_token = "<eos>"
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def test_equal_vocabularies_are_the_same_tokenizer():
    check_same_tokenizer(make(), make())


def test_a_permuted_vocabulary_of_equal_size_is_another_tokenizer():
    """Sizes were compared in place of maps, and a permuted vocabulary passed: every logit was matched with a stranger's."""
    permuted = make({**VOCABULARY, "a": 2, "b": 1})
    assert len(permuted) == len(make())
    with pytest.raises(ModelError, match=r"student\.path: .*2 tokens have other ids, such as 'a': 1 and 2"):
        check_same_tokenizer(make(), permuted)


def test_tokens_on_one_side_are_counted_and_the_first_is_named():
    larger = make({**VOCABULARY, "x": 6, "d": 7})
    with pytest.raises(ModelError, match=r"teacher\.path: .*\(2 tokens such as 'x' only in the teacher's\)"):
        check_same_tokenizer(larger, make(), "teacher.path")
    with pytest.raises(ModelError, match=r"\(2 tokens such as 'x' only in the student's\)"):
        check_same_tokenizer(make(), larger)
