"""Which source a configuration opens, and which ones contradict themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ddk.packing import PackingConfig
from storage.corpus.domain import DomainConfig
from storage.files.remembered import remember
from tasks.planning.store_plan import Plan, plan_stores
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher
from tasks.teachers.prompt_teacher import PortableTeacher
from tasks.teachers.server_teacher import ServerTeacher
from tasks.teachers.sources import open_teacher

URL = "http://127.0.0.1:9/v1"
"""Nobody listens there."""


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, VllmTeacher),
        ({"source": "prompt_logprobs"}, PortableTeacher),
        ({"source": "server", "server_url": URL}, ServerTeacher),
    ],
)
def test_the_source_names_the_teacher(teacher_folder: str, changes: dict[str, Any], kind: type) -> None:
    config = TeacherConfig(model=teacher_folder, **changes)
    with open_teacher(config, seq_len=64, vocab_size=4090) as teacher:
        assert type(teacher) is kind


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "server"}, "source: server needs server_url"),
        ({"source": "server", "server_url": "localhost:8000"}, "must look like http://localhost:8000/v1"),
        ({"source": "server", "server_url": "http://me:secret@host/v1"}, "set DDK_TEACHER_API_KEY instead"),
        ({"server_url": URL}, "server_url and server_model need source: server"),
        ({"source": "prompt_logprobs", "server_model": "a"}, "need source: server .source is 'prompt_logprobs'"),
        ({"source": "prompt_logprobs", "draws": 5}, "draws is 5, .* set source: engine, or leave draws out"),
        (
            {"source": "server", "server_url": URL, "tail_temperatures": [2.0]},
            r"tail_temperatures is \[2.0\], and teacher.source 'server' cannot give that; set source: engine",
        ),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TeacherConfig.model_validate({"model": "m", **fields})


def plan(root: Path, corpus: str, **teacher: Any) -> Plan:
    domains = {"math": DomainConfig(train=[corpus], validation_fraction=0.5)}
    return plan_stores(str(root), domains, PackingConfig(seq_len=32), TeacherConfig(k=4, **teacher))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.jsonl").write_text('{"text": "one and one is two"}\n' * 20)
    return str(tmp_path / "corpus.jsonl")


def test_each_source_has_stores_of_its_own(tmp_path: Path, corpus: str, teacher_folder: str) -> None:
    by_engine = plan(tmp_path, corpus, model=teacher_folder)["math"]
    portable = plan(tmp_path, corpus, model=teacher_folder, source="prompt_logprobs")["math"]
    assert by_engine.targets_url != portable.targets_url
    assert by_engine.blocks_url == portable.blocks_url
    assert "source" not in by_engine.targets_inputs["teacher"], "stores captured before there were sources stay valid"


def test_a_servers_store_needs_no_weights_and_follows_the_revision(
    tmp_path: Path, corpus: str, teacher_folder: str
) -> None:
    folder = tmp_path / "tokenizer-only"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(teacher_folder) / name, folder)
    teacher = {"model": str(folder), "source": "server", "server_url": URL}
    urls = set()
    for server, revision in (("0.32.0", None), ("0.33.0", None), ("0.33.0", "second weights")):
        remember(str(tmp_path / "servers.json"), {URL: {"name": "tiny", "version": server}})
        urls.add(plan(tmp_path, corpus, **teacher, revision=revision)["math"].targets_url)
    assert len(urls) == 3
    with open_teacher(TeacherConfig(k=4, **teacher), seq_len=32, vocab_size=4090) as opened:
        assert type(opened) is ServerTeacher
