"""`ddk push` against a stand-in for the hub on loopback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_stand_in import HubStandIn
from made_runs import make_run
from small_run import Ddk

from storage.files import uri
from storage.runs.folder import RunFolder
from storage.runs.listing import records_of

TOKEN = "hf_not_a_real_token_0123456789"  # noqa: S105
CARD = "---\nlibrary_name: transformers\ntags:\n- ddk\n---\n\n# first\n\nWhat it is.\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # Large files by git's protocol, which the stand-in speaks; the hub has one of its own besides.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = make_run(str(tmp_path / "root"), "first")
    uri.write_bytes(f"{run.student_url}/README.md", CARD.encode())
    uri.write_bytes(f"{run.student_url}/config.json", b'{"model_type": "qwen2"}')
    run.student_listing.write(records_of(run.student_url))
    uri.write_bytes(f"{run.student_url}/notes.txt", b"put there by somebody; no file of the run")
    return run


def test_the_student_and_its_card_are_pushed_in_one_commit(
    hub: HubStandIn, run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ddk, called = Ddk(tmp_path), ("push", run.url, "owner/first", "--license", "apache-2.0", "--language", "en")
    dry = ddk(*called, "--dry-run")
    assert dry.code == 0, dry.err
    assert hub.asked == [], "nothing is sent, nothing is asked"
    for words in (
        "7 B  model.safetensors",
        f"{hub.url}/owner/first (private)",
        "license: apache-2.0",
        "nothing was sent",
    ):
        assert words in dry.out
    with caplog.at_level(logging.DEBUG):
        done = ddk(*called)
    assert done.code == 0, done.err
    assert f"pushed     {hub.url}/owner/first/commit/" in done.out
    files = hub.repositories["owner/first"]
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    assert files["model.safetensors"] == b"weights"
    _, matter, rest = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(matter) == {
        "library_name": "transformers",
        "tags": ["ddk"],
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert rest == "\n# first\n\nWhat it is.\n"
    assert hub.created[0]["visibility"] == "private"
    assert sum(path.endswith("/commit/main") for path in hub.asked) == 1
    assert TOKEN not in dry.out + dry.err + done.out + done.err + caplog.text
    assert uri.read_bytes(f"{run.student_url}/README.md") == CARD.encode(), "the run's own card stays"


def test_what_must_not_be_pushed_is_refused(hub: HubStandIn, run: RunFolder, tmp_path: Path) -> None:
    ddk, licence = Ddk(tmp_path), ("--license", "apache-2.0")
    going = make_run(str(tmp_path / "root"), "going", finished=False)
    assert "run 'going' is not finished" in ddk.refusal("push", going.url, "owner/x", *licence)
    assert "is no run" in ddk.refusal("push", str(tmp_path), "owner/x", *licence)
    assert "the card names no licence" in ddk.refusal("push", run.url, "owner/x")
    assert "names no owner" in ddk.refusal("push", run.url, "x", *licence)
    assert "is no name of a repository" in ddk.refusal("push", run.url, "a/b/c", *licence)
    uri.write_bytes(f"{run.student_url}/model.safetensors", b"weighty")
    refused = ddk.refusal("push", run.url, "owner/x", *licence, "--dry-run")
    assert "model.safetensors is not what was written (its digest differs), and nothing was sent" in refused
    uri.remove_file(f"{run.student_url}/model.safetensors")
    assert "model.safetensors is missing" in ddk.refusal("push", run.url, "owner/x", *licence)
    assert hub.asked == []


def test_a_hub_that_refuses_and_one_that_is_not_there(
    hub: HubStandIn, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddk, called = Ddk(tmp_path), ("push", run.url, "owner/first", "--license", "mit")
    monkeypatch.setenv("HF_TOKEN", "hf_another_token")
    refused = ddk.refusal(*called)
    assert "refuses (401): HF_TOKEN must be a token with the right to write to owner/first" in refused
    assert "hf_another_token" not in refused
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 did not take the push" in ddk.refusal(*called)
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN is not set" in ddk.refusal(*called)
