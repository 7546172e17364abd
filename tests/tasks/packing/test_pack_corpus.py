"""Packing of instruction data: which tokens carry loss, and that nothing of it depends on where packing was killed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizers import byte_tokenizer
from chat_templates import PLAIN, SHAPES, without_marks
from deaths import killed_at_each_rename
from tiny_model import make_tiny_model

from ddk.errors import UserError
from ddk.packing import Document, PackingConfig, pack
from ddk.student import load_tokenizer
from ddk.values import Split
from storage.blocks import open_blocks
from storage.checking.verify_store import uncommit, verify
from storage.corpus.domain import DomainConfig
from storage.files import uri
from storage.stores.manifest import read_manifest
from tasks.packing.pack_corpus import pack_corpus
from tasks.planning import store_plan as tasks_plan
from tasks.planning.store_plan import Plan, plan_stores
from tasks.teachers.config import TeacherConfig

L = 10
RECORDS: list[dict[str, Any]] = [
    {
        "question": [None, "", f"What is {n} plus {n}, and why? " * (n % 4), "Say it."][n % 4],
        "answer": f"{n} plus {n} is {2 * n}." + " Because." * (n % 5),
    }
    for n in range(60)
]


@dataclass
class Packer:
    folder: Path
    teacher: str

    def write(self, name: str, records: list[dict[str, Any]]) -> str:
        path = self.folder / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    def plan(self, root: str = "root", **domain: Any) -> Plan:
        values = {"text_field": "answer", "prompt_field": "question", **domain}
        return plan_stores(
            str(self.folder / root),
            {"chat": DomainConfig.model_validate(values)},
            PackingConfig(seq_len=L),
            TeacherConfig(model=self.teacher, k=4, dtype="float32"),
        )

    def expected(self, records: list[dict[str, Any]], size: int = L + 1) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and marks [blocks, L + 1], by hand: prompt, answer and EOS of each record, end to end, then cut."""
        tokenizer = load_tokenizer(self.teacher)
        tokens: list[int] = []
        marks: list[int] = []
        for record in records:
            prompt, answer = (
                tokenizer.encode(record[name] or "", add_special_tokens=False) for name in ("question", "answer")
            )
            tokens += [*prompt, *answer, tokenizer.eos_token_id]
            marks += [0] * len(prompt) + [1] * len(answer) + [1]
        blocks = len(tokens) // size
        cut = (np.array(values[: blocks * size]).reshape(blocks, size) for values in (tokens, marks))
        return next(cut), next(cut)


@pytest.fixture
def packer(tmp_path: Path, teacher_folder: str, monkeypatch: pytest.MonkeyPatch) -> Packer:
    monkeypatch.setattr(tasks_plan, "BLOCKS_PER_SHARD", 16)
    return Packer(tmp_path, teacher_folder)


@pytest.fixture
def domain(packer: Packer) -> dict[str, str]:
    return {"train": packer.write("a.jsonl", RECORDS), "validation": packer.write("v.jsonl", RECORDS[:9])}


def whole(url: str, split: Split = "train") -> tuple[np.ndarray, np.ndarray | None]:
    view = open_blocks(url, split)
    return view.read(range(len(view))), view.loss_mask(range(len(view)))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tokens_and_marks_are_those_of_the_records(packer: Packer, suffix: str) -> None:
    train = packer.write(f"a.{suffix}", RECORDS)
    validation = packer.write(f"v.{suffix}", RECORDS[20:50])
    plan = packer.plan(train=train, validation=validation)
    done = pack_corpus.fn(plan, "chat")
    manifest = read_manifest(done["url"])
    assert manifest is not None
    splits: dict[Split, list[dict[str, Any]]] = {"train": RECORDS, "validation": RECORDS[20:50]}
    for split, records in splits.items():
        wanted_tokens, wanted_marks = packer.expected(records)
        tokens, mask = whole(done["url"], split)
        np.testing.assert_array_equal(tokens, wanted_tokens)
        assert mask is not None
        for block, position in np.ndindex(mask.shape):
            assert mask[block, position] == (wanted_marks[block, position + 1] == 1)
        assert manifest.total("with_loss", split) == mask.sum()
    # Two blocks part within a prompt, at either end of one, and elsewhere.
    marks = packer.expected(RECORDS)[1]
    borders = {(int(before), int(behind)) for before, behind in zip(marks[:-1, -1], marks[1:, 0], strict=True)}
    assert borders == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert len(manifest.splits["train"].shards) >= 3
    assert pack_corpus.fn(plan, "chat")["done_before"]


def test_blocks_of_a_tokenizer_with_bos_and_of_texts_that_spell_it(packer: Packer, tmp_path: Path) -> None:
    """To predict BOS carries no loss; and gone on with behind a shard, they are the same."""
    packer.teacher = byte_tokenizer(tmp_path / "t", added=["<bos>", "<s>"], before=["<bos>"])
    make_tiny_model(tmp_path / "t", rows=259, context=16)
    texts = [{"answer": f"{n}<s>{n + 1}</s> <bos> <|endoftext|>!"} for n in range(60)]
    files = {"train": packer.write("a.jsonl", texts), "validation": packer.write("v.jsonl", texts[:9])}
    for kind in ("text", "control"):
        plan = packer.plan(**files, prompt_field=None, special_tokens=kind)
        done = pack_corpus.fn(plan, "chat")
        tokens, mask = whole(done["url"])
        encode = load_tokenizer(packer.teacher)
        options = {"add_special_tokens": False, "split_special_tokens": kind == "text"}
        documents = [
            Document((0, n), np.array(encode(one["answer"], **options)["input_ids"], dtype=np.int32))
            for n, one in enumerate(texts)
        ]
        wanted = list(pack(documents, L, 0, bos_ids=(257,)))
        np.testing.assert_array_equal(tokens, [block.tokens for block in wanted])
        assert mask is not None
        np.testing.assert_array_equal(mask, [block.loss[1:] for block in wanted])
        assert (tokens[:, 0] == 257).all()
        assert ((tokens == 0).sum() <= 60) == ((tokens == 258).sum() == 0) == (kind == "text")
        manifest = read_manifest(done["url"])
        assert manifest is not None
        uri.write_bytes(f"{done['url']}/train/tokens/c/1/0", b"rubbish")
        assert uncommit(done["url"], manifest, verify(done["url"], manifest, full=True))["train"][0] == 1
        pack_corpus.fn(plan, "chat")
        np.testing.assert_array_equal(whole(done["url"])[0], tokens)


def test_without_a_prompt_field_a_store_is_as_it_always_was(packer: Packer, domain: dict[str, str]) -> None:
    done = pack_corpus.fn(packer.plan(**domain, prompt_field=None), "chat")
    manifest = read_manifest(done["url"])
    assert manifest is not None
    assert manifest.format_version == 3
    assert manifest.dims == {"seq_len": L, "vocab_size": manifest.dims["vocab_size"], "shard_blocks": 16}
    for shard in manifest.splits["train"].shards:
        assert set(shard.objects) == {"tokens"}
        assert set(shard.facts) == {"next", "end"}
    tokens, mask = whole(done["url"])
    assert mask is None
    np.testing.assert_array_equal(tokens, packer.expected([{**record, "question": ""} for record in RECORDS])[0])
    assert sorted(uri.list_names(f"{done['url']}/train")) == ["tokens", "zarr.json"]


def test_a_split_within_prompts_is_refused_every_time(packer: Packer, domain: dict[str, str]) -> None:
    """The first block of 11 tokens lies within a long question, and no further one is asked for."""
    long = packer.write("long.jsonl", [{"question": "Why is that so? " * 20, "answer": "So it is. " * 9}])
    assert packer.expected([{"question": "Why is that so? " * 20, "answer": ""}])[1][:2].sum() == 0
    plan = packer.plan(**{**domain, "validation": long}, max_validation_blocks=2)
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=r"domain 'chat': no validation position carries loss, for all 2 validation blocks of 10 positions "
            r"lie within prompts \(field 'question'\); give it more validation records, raise domains",
        ):
            pack_corpus.fn(plan, "chat")
    assert pack_corpus.fn(packer.plan(**{**domain, "validation": long}), "chat")["validation_blocks"] > 2
    with pytest.raises(UserError, match="no train position carries loss, for all 1 train blocks"):
        pack_corpus.fn(packer.plan(**{**domain, "train": long}, max_train_blocks=1), "chat")


def test_a_missing_prompt_stops_packing_at_its_record(packer: Packer, domain: dict[str, str]) -> None:
    broken = packer.write("b.jsonl", [*RECORDS[:5], {"answer": "No question was asked."}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 6: no field 'question'; set prompt_field to one"):
        pack_corpus.fn(packer.plan(**{**domain, "train": broken}), "chat")


def test_a_repair_makes_tokens_and_marks_again(packer: Packer, domain: dict[str, str]) -> None:
    plan = packer.plan(**domain)
    url = pack_corpus.fn(plan, "chat")["url"]
    before, manifest = whole(url), read_manifest(url)
    assert manifest is not None
    uri.write_bytes(f"{url}/train/loss/c/1/0", b"rubbish")
    redone = uncommit(url, manifest, verify(url, manifest, full=True))
    assert redone["train"][0] == 1
    pack_corpus.fn(plan, "chat")
    again = read_manifest(url)
    assert again is not None
    assert again.splits == manifest.splits
    assert verify(url, again, full=True) == []
    for ours, theirs in zip(whole(url), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_killed_at_any_write_packing_ends_with_the_same_bytes(packer: Packer, domain: dict[str, str]) -> None:
    done = pack_corpus.fn(packer.plan(**domain), "chat")
    reference = _files(Path(done["url"]))
    code = f"""
from ddk.packing import PackingConfig
from storage.corpus.domain import DomainConfig
from tasks.planning import store_plan as tasks_plan
from tasks.packing.pack_corpus import pack_corpus
from tasks.teachers.config import TeacherConfig
tasks_plan.BLOCKS_PER_SHARD = 16
config = DomainConfig(text_field="answer", prompt_field="question", **{domain!r})
settings = TeacherConfig(model={packer.teacher!r}, k=4, dtype="float32")
pack_corpus.fn(tasks_plan.plan_stores(folder, {{"chat": config}}, PackingConfig(seq_len={L}), settings), "chat")
"""
    imports = ("tasks.packing.pack_corpus",)
    deaths = killed_at_each_rename(code, f"{packer.folder}/killed", imports=imports, first=3, every=11)
    assert len(deaths) >= 4
    resumed_at = set()
    for death in deaths:
        plan = packer.plan(root=f"killed/{death}", **domain)
        url = Path(plan["chat"].blocks_url)
        resumed_at.add(len(list(url.glob("commits/train-*.json"))))
        assert pack_corpus.fn(plan, "chat") == {**done, "url": str(url)}
        assert _files(url) == reference
    assert len(resumed_at) >= 3, "with none, some and more shards committed"


def _files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which says how long packing took; the digests in it are those of these files."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.pop("copy/manifest.json") == found["manifest.json"]
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["seal"]
    assert set(manifest.pop("facts")) == {"seconds"}
    return {**found, "": json.dumps(manifest, sort_keys=True).encode()}


def test_conversations_lie_whole_in_their_blocks(packer: Packer, tmp_path: Path) -> None:
    """By hand; gone on with behind a shard, the same; and another template gives another store."""
    packer.teacher = byte_tokenizer(tmp_path / "t", added=["<|im_start|>", "<|im_end|>"])
    make_tiny_model(tmp_path / "t", rows=259, context=300)
    records = [
        {
            "messages": [
                {"role": "user", "content": "x" * (7 * n % 31)},
                {"role": "assistant", "content": "y" * (1 + 11 * n % 23)},
            ]
        }
        for n in range(40)
    ]
    files = {"train": packer.write("a.jsonl", records), "validation": packer.write("v.jsonl", records[:9])}
    chat = {"text_field": "text", "prompt_field": None, "format": "messages"}

    def plan() -> Plan:
        teacher = TeacherConfig(model=packer.teacher, k=4, dtype="float32")
        domains = {"chat": DomainConfig.model_validate({**files, **chat})}
        return plan_stores(str(tmp_path / "root"), domains, PackingConfig(seq_len=99), teacher)

    with pytest.raises(
        UserError, match=r"'chat' has format: messages, and the tokenizer of teacher\.model has no chat"
    ):
        plan()
    template = tmp_path / "t" / "chat_template.jinja"
    template.write_text(without_marks(PLAIN))
    first = plan()
    template.write_text(without_marks(SHAPES["thoughts"]))
    second = plan()
    assert first["chat"].blocks_url != second["chat"].blocks_url
    done = pack_corpus.fn(second, "chat")
    tokens, mask = whole(done["url"])
    assert mask is not None
    tokenizer = load_tokenizer(packer.teacher)
    blocks: list[list[int]] = [[]]
    for record in records:
        ids = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=True)["input_ids"]
        if len(blocks[-1]) + len(ids) > 100:
            blocks.append([])
        blocks[-1] += ids
    np.testing.assert_array_equal(tokens, [block + [0] * (100 - len(block)) for block in blocks])
    said = tokens[:, 1:] == tokenizer.convert_tokens_to_ids("y")
    empty_thoughts = 40 * len(tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False))
    assert mask.sum() == said.sum() + empty_thoughts + 40  # and each turn's end
    assert mask[said].all()
    manifest = read_manifest(done["url"])
    assert manifest is not None
    assert manifest.total("with_loss", "train") == mask.sum()
    uri.write_bytes(f"{done['url']}/train/tokens/c/1/0", b"rubbish")
    uncommit(done["url"], manifest, verify(done["url"], manifest, full=True))
    pack_corpus.fn(second, "chat")
    np.testing.assert_array_equal(whole(done["url"])[0], tokens)
