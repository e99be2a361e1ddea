from __future__ import annotations

import pytest

from mini_distill.redaction import redact, redact_text


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "HF_TOKEN",
        "api_key",
        "apiKey",
        "key",
        "private-key",
        "client_secret",
        "password",
        "db.passwd",
        "credentials",
        "auth_tokens",
    ],
)
def test_texts_under_secret_keys_are_masked_at_any_depth(key: str) -> None:
    assert redact({"data": [{key: "abcdef"}]}) == {"data": [{key: "***"}]}
    assert redact({key: ["abcdef", "ghi"]}) == {key: ["***", "***"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "org/name"),
        ("tokenizer_path", "a/b"),
        ("max_tokens", "5"),
        ("sample_tokens", 48),
        ("eos_token", "</s>"),
        ("pad_token_id", "3"),
        ("num_kv_heads", 4),
        ("monkey", "george"),
        ("keep_checkpoints", "2"),
        ("token", None),
        ("token", False),
        ("special_tokens", ["<a>"]),
    ],
)
def test_what_only_sounds_like_a_secret_stays(key: str, value: object) -> None:
    assert redact({key: value}) == {key: value}


def test_credentials_within_urls_and_texts_are_masked() -> None:
    assert redact_text("get https://me:pa@ss@host.org/data?x=1&token=abc#top") == "get https://***@host.org/data?x=1&token=***#top"
    assert redact_text("s3://key:secret@bucket/x") == "s3://***@bucket/x"
    assert redact_text("https://h/x?X-Amz-Signature=0f1e&n=2") == "https://h/x?X-Amz-Signature=***&n=2"
    assert redact_text("pushed with hf_abcdefghijklmnopqrstuvwxyz0123 to org/name@main") == "pushed with *** to org/name@main"


def test_the_environments_own_secrets_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "4f1c9aXYZ0815")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-long")
    assert redact({"data": {"path": "/x/4f1c9aXYZ0815/y", "name": "false-and-long"}}) == {
        "data": {"path": "/x/***/y", "name": "false-and-long"}
    }


def test_what_a_header_authorizes_with_is_masked() -> None:
    assert redact_text("{'Authorization': 'Basic dXNlcjpwYXNzd29yZA=='}") == "{'Authorization': 'Basic ***'}"
    assert redact_text("sent bearer 0123456789abcdef to host") == "sent bearer *** to host"
    assert redact_text("the bearer of bad news") == "the bearer of bad news"
