"""Secrets, as services, libraries and users put them into messages and addresses."""

from __future__ import annotations

import pytest

from ddk.errors import UserError
from ddk.redaction import hide, holds_credentials, redacted

ADDRESSES = [
    "s3://SECRETID:s3cr3tword@bucket/prefix",
    "s3://SECRETID:s3cr3t/word+x@bucket/prefix",
    "s3a://SECRETID@bucket/prefix",
    "simplecache::s3://SECRETID:s3cr3tword@bucket/prefix",
    "https://s3cr3tword@host/x",
    "https://user:s3cr3tword@host:8443/x",
    "https://user:12345s3cr3tword@host/x",
    "https://:s3cr3tword@host/x",
    "http://user%3As3cr3tword@host/x",
    "postgresql://user:s3cr3tword@host/db",
    "sftp://user:s3cr3tword@host/x",
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=SECRETID%2F2026&X-Amz-Signature=s3cr3tword",
    "https://b.s3.amazonaws.com/k?AWSAccessKeyId=SECRETID&Signature=s3cr3tword&Expires=1",
    "https://a.blob.core.windows.net/c/x?sv=2022&sig=s3cr3tword",
    "https://host/x?a=1&access_token=s3cr3tword",
]
PLAIN = [
    "s3://bucket/prefix/a@2x.jsonl",
    "s3://bucket/a:b@c",
    "abfs://container@account.dfs.core.windows.net/x",
    "sftp://user@host/x",
    "http://127.0.0.1:4200/api",
    "https://host:8443/a/@scope/b",
    "https://host/train?split=a&page=2",
    "/data/a:b@c/x?token=1",
    "file:///data/a:b@c",
    "Qwen/Qwen2.5-14B",
    "./train-?.jsonl",
]
SAID = [
    "<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>SECRETID</AWSAccessKeyId></Error>",
    "{'Code': 'SignatureDoesNotMatch', 'AWSAccessKeyId': 'SECRETID', 'SignatureProvided': 's3cr3tword'}",
    '{"StringToSign": "s3cr3tword", "secret_access_key":"s3cr3tword"}',
    "Authorization: AWS4-HMAC-SHA256 Credential=SECRETID/20260101/us-east-1, Signature=s3cr3tword",
    "Authorization: Bearer s3cr3tword.s3cr3tword",
    "The Access Key Id 'SECRETID' you provided does not exist",
    'no such access key: "SECRETID"',
    "key AKIASECRETID0000 is not active",
    "aws_secret_access_key=s3cr3tword aws_session_token = s3cr3tword",
    "password: s3cr3tword",
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_with_a_secret_is_known_and_never_shown(url: str) -> None:
    assert holds_credentials(url)
    if "%3A" not in url:
        shown = str(UserError(f"{url}: no such thing; correct it"))
        assert "s3cr3t" not in shown
        assert "SECRETID" not in shown
        assert "no such thing; correct it" in shown


@pytest.mark.parametrize("url", PLAIN)
def test_another_address_is_left_alone(url: str) -> None:
    assert not holds_credentials(url)
    assert redacted(url) == url or "?token=" in url


@pytest.mark.parametrize("text", SAID)
def test_what_a_service_repeats_is_hidden(text: str) -> None:
    assert "s3cr3t" not in redacted(text)
    assert "SECRETID" not in redacted(text)


def test_the_values_of_the_environment_and_of_blocks_are_hidden_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "garage-key-7")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_KEY", "the")
    monkeypatch.setenv("FSSPEC_S3_SECRET", "of/a+service")
    monkeypatch.setattr("ddk.redaction._learnt", set())
    hide("of a block", None, 3, "a")
    said = "Forbidden: no such key garage-key-7 (0123456789abcdef), the of/a+service of a block"
    assert redacted(said) == "Forbidden: no such key *** (***), the *** ***"


def test_a_terminal_obeys_nothing_of_a_message() -> None:
    text = redacted("a\x1b[2J\x9b31mb\r\u202ec\ud800\x00 d\n\te\N{NO-BREAK SPACE}数\u3000学")
    assert text == "a�[2J�31mb��c�� d\n\te\N{NO-BREAK SPACE}数\u3000学"


def test_remedies_stay_readable() -> None:
    for text in (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or name a Prefect block (storage_block: …)",
        "access denied (AccessDenied: Access Denied); check the credentials, or the rights on that place",
        "the S3 server refused the request (SignatureDoesNotMatch: The request signature we calculated does not match "
        "the signature you provided. Check your key and signing method.)",
        "token 5: id 7 is none of the tokenizer's 4",
    ):
        assert redacted(text) == text
