"""A domain whose records have paths: its leaves, what makes a leaf's stores anew, and whose records each holds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.student import load_tokenizer
from ddk.values import Split
from storage.blocks import open_blocks
from storage.corpus.documents import Text
from storage.corpus.domain import DomainConfig, domain_seed
from storage.corpus.leaves import in_leaf_validation
from storage.stores.manifest import StoreWriter
from tasks.packing.pack_corpus import pack_corpus
from tasks.planning import leaves as tasks_leaves
from tasks.planning import store_plan as tasks_plan
from tasks.planning.store_plan import Plan, plan_stores
from tasks.teachers.config import TeacherConfig

Record = dict[str, Any]
L = 10
TOPICS = ("algebra/linear", "algebra/Rings & fields", "geometry")


def records(count: int, seed: int = 0) -> list[Record]:
    """Every topic's records among the others', none alike."""
    random_ = random.Random(seed)
    return [
        {"text": f"{seed}.{n}: " + "so it is. " * random_.randint(1, 6), "topic": random_.choice(TOPICS)}
        for n in range(count)
    ]


TRAIN, VALIDATION = records(120), records(60, seed=1)


@dataclass
class Corpus:
    folder: Path
    teacher: str

    def write(self, name: str, lines: list[Record]) -> str:
        (self.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(self.folder / name)

    def plan(self, domains: Mapping[str, Any] | None = None, **math: Any) -> Plan:
        values = {"train": str(self.folder / "a*.jsonl"), "path_field": "topic", **math}
        if "validation_fraction" not in values:
            values.setdefault("validation", str(self.folder / "v.jsonl"))
        chosen = {"math": values} if domains is None else domains
        return plan_stores(
            str(self.folder / "root"),
            {name: DomainConfig.model_validate(one) for name, one in chosen.items()},
            PackingConfig(seq_len=L),
            TeacherConfig(model=self.teacher, k=4, dtype="float32"),
        )

    def blocks(self, texts: list[str]) -> np.ndarray:
        """[n, L + 1], by hand: each text and EOS, end to end, then cut."""
        tokenizer = load_tokenizer(self.teacher)
        tokens: list[int] = []
        for text in texts:
            tokens += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        count = len(tokens) // (L + 1)
        return np.array(tokens[: count * (L + 1)]).reshape(count, L + 1)


@pytest.fixture
def corpus(tmp_path: Path, teacher_folder: str, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(tasks_plan, "BLOCKS_PER_SHARD", 16)
    made = Corpus(tmp_path, teacher_folder)
    made.write("a.jsonl", TRAIN)
    made.write("v.jsonl", VALIDATION)
    return made


def tokens(url: str, split: Split) -> np.ndarray:
    view = open_blocks(url, split)
    return view.read(range(len(view)))


def texts(of: list[Record], topic: str) -> list[str]:
    return [record["text"] for record in of if record["topic"] == topic]


def urls(plan: Plan) -> dict[str, tuple[str, str]]:
    return {domain: (store.blocks_url, store.targets_url) for domain, store in plan.domains.items()}


def test_a_domain_falls_into_its_leaves(corpus: Corpus) -> None:
    plan = corpus.plan()
    assert list(plan.domains) == [f"math/{topic}" for topic in sorted(TOPICS)]
    store = plan["math/algebra/Rings & fields"]
    assert store.blocks_url.endswith("/math~algebra~Rings=20=26=20fields.zarr")
    assert store.targets_url.endswith("/math~algebra~Rings=20=26=20fields.zarr")
    assert len({url for both in urls(plan).values() for url in both}) == 6
    assert list(corpus.plan(path_depth=1).domains) == ["math/algebra", "math/geometry"]
    assert len(Path(store.blocks_url).relative_to(corpus.folder).parts) == 4, "root/blocks/fingerprint/name"


@pytest.mark.parametrize("depth", [None, 1])
def test_a_leafs_store_holds_its_records_and_no_others(corpus: Corpus, depth: int | None) -> None:
    plan = corpus.plan(path_depth=depth)
    for domain, store in plan.domains.items():
        pack_corpus.fn(plan, domain)
        for split, of in (("train", TRAIN), ("validation", VALIDATION)):
            own = [r["text"] for r in of if f"math/{r['topic']}/".startswith(f"{domain}/")]
            np.testing.assert_array_equal(tokens(store.blocks_url, split), corpus.blocks(own))
    assert sum(len(open_blocks(store.blocks_url)) for store in plan.domains.values()) > 3 * 16


def test_a_leaf_of_several_files_and_only_of_those_that_hold_it(corpus: Corpus) -> None:
    more = [record for record in records(40, seed=2) if record["topic"] != "geometry"]
    corpus.write("a2.jsonl", more)
    plan = corpus.plan()
    assert [len(store.train_files) for store in plan.domains.values()] == [2, 2, 1]
    for topic in TOPICS:
        pack_corpus.fn(plan, f"math/{topic}")
        found = tokens(plan[f"math/{topic}"].blocks_url, "train")
        np.testing.assert_array_equal(found, corpus.blocks(texts([*TRAIN, *more], topic)))


def test_held_out_records_of_a_leaf(corpus: Corpus) -> None:
    plan = corpus.plan(validation_fraction=0.3)
    for topic in TOPICS:
        domain = f"math/{topic}"
        pack_corpus.fn(plan, domain)
        every, seed = texts(TRAIN, topic), domain_seed(domain)
        held_out = [text for text in every if in_leaf_validation(seed, Text(0, text, ""), 0.3)]
        kept = [text for text in every if text not in held_out]
        assert min(len(held_out), len(kept)) > 3
        np.testing.assert_array_equal(tokens(plan[domain].blocks_url, "validation"), corpus.blocks(held_out))
        np.testing.assert_array_equal(tokens(plan[domain].blocks_url, "train"), corpus.blocks(kept))


@pytest.mark.parametrize("held_out", [{}, {"validation_fraction": 0.3}])
@pytest.mark.parametrize(
    ("change", "touched"),
    [
        (lambda r: [{"text": "something new", "topic": "geometry"}, *r], {"math/geometry"}),
        (lambda r: [one for one in r if one["topic"] != "geometry" or "0.1" not in one["text"]], {"math/geometry"}),
        (lambda r: [*r, {"text": "new", "topic": "algebra/new"}], {"math/algebra/new"}),
        (lambda r: [{**one, "source": "elsewhere"} for one in r], set()),
    ],
)
def test_only_a_leaf_that_changed_is_made_anew(
    corpus: Corpus, held_out: dict[str, float], change: Callable[[list[Record]], list[Record]], touched: set[str]
) -> None:
    corpus.write("v.jsonl", VALIDATION)
    before = urls(corpus.plan(**held_out))
    corpus.write("a.jsonl", change(TRAIN))
    if "math/algebra/new" in touched:
        corpus.write("v.jsonl", [*VALIDATION, {"text": "newer", "topic": "algebra/new"}])
    after = urls(corpus.plan(**held_out))
    assert {domain for domain in after if before.get(domain) != after[domain]} == touched


def test_settings_that_determine_a_leafs_blocks(corpus: Corpus) -> None:
    before = urls(corpus.plan())
    for same in ({"text_field": "text"}, {"train": str(corpus.folder / "a.jsonl")}):
        assert urls(corpus.plan(**same)) == before
    for other in ({"max_train_blocks": 3}, {"max_validation_blocks": 3}, {"validation_fraction": 0.3}):
        assert not set(urls(corpus.plan(**other)).values()) & set(before.values())


def test_planning_again_reads_no_record(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    before = urls(corpus.plan())
    monkeypatch.setattr(tasks_leaves, "read_leaves", None)
    assert urls(corpus.plan()) == before
    (corpus.folder / "root" / "paths.json").unlink()
    with pytest.raises(TypeError):
        corpus.plan()
    monkeypatch.undo()
    assert urls(corpus.plan()) == before


class _KilledError(Exception):
    pass


def test_a_killed_leaf_goes_on_though_other_leaves_have_changed(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the next shard begins is counted in the leaf's own documents: those between may come and go."""
    domain, topic = "math/geometry", "geometry"
    write, written = StoreWriter.write_shard, []

    def write_two(self: StoreWriter, *arguments: Any) -> Any:
        if len(written) == 2:
            raise _KilledError
        written.append(arguments)
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_shard", write_two)
        with pytest.raises(_KilledError):
            pack_corpus.fn(corpus.plan(), domain)
    shards = Path(corpus.plan()[domain].blocks_url) / "train" / "tokens" / "c"
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path.is_file()}
    assert len(before) == 2
    changed = [{"text": f"new {n}", "topic": "algebra/linear"} for n in range(7)]
    changed += [record for n, record in enumerate(TRAIN) if record["topic"] == topic or n % 3]
    corpus.write("a.jsonl", changed)
    done = pack_corpus.fn(corpus.plan(), domain)
    after = {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before, "not written a second time"
    assert len(after) > 2
    np.testing.assert_array_equal(tokens(done["url"], "train"), corpus.blocks(texts(TRAIN, topic)))
    np.testing.assert_array_equal(tokens(done["url"], "validation"), corpus.blocks(texts(VALIDATION, topic)))


def test_a_leaf_with_prompts(corpus: Corpus) -> None:
    for name, of in (("a.jsonl", TRAIN), ("v.jsonl", VALIDATION)):
        corpus.write(name, [{**record, "question": "What is so?"} for record in of])
    plan = corpus.plan(prompt_field="question")
    done = pack_corpus.fn(plan, "math/geometry")
    view = open_blocks(done["url"], "validation")
    mask = view.loss_mask(range(len(view)))
    assert mask is not None
    assert view.manifest.positions("validation") == mask.sum() < mask.size
    np.testing.assert_array_equal(
        view.read(range(len(view))), corpus.blocks([f"What is so?{text}" for text in texts(VALIDATION, "geometry")])
    )
    plain = open_blocks(pack_corpus.fn(corpus.plan(), "math/geometry")["url"], "validation")
    assert plain.manifest.positions("validation") == len(plain) * L


def test_domains_named_by_a_path(corpus: Corpus) -> None:
    plain = {"train": str(corpus.folder / "a.jsonl"), "validation": str(corpus.folder / "v.jsonl")}
    plan = corpus.plan({"web/news": plain, "math": {**plain, "path_field": "topic"}, "math/arithmetic": plain})
    assert list(plan.domains) == ["web/news", *(f"math/{topic}" for topic in sorted(TOPICS)), "math/arithmetic"]
    assert plan["web/news"].blocks_url.endswith("/web~news.zarr")
    done = pack_corpus.fn(plan, "web/news")
    np.testing.assert_array_equal(tokens(done["url"], "train"), corpus.blocks([record["text"] for record in TRAIN]))
    deeper = corpus.plan({"math/school": {**plain, "path_field": "topic", "path_depth": 1}})
    assert list(deeper.domains) == ["math/school/algebra", "math/school/geometry"]


def extra(*topics: str) -> list[Record]:
    return [{"text": "more", "topic": topic} for topic in topics]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            [*TRAIN, *extra("algebra/groups")],
            VALIDATION,
            r"domain 'math' has no validation records of the path 'algebra/groups', .*add some, set "
            r"domains.math.path_depth: 1 so that it is merged with its neighbours, or remove that path's records",
        ),
        (
            TRAIN,
            [*VALIDATION, *extra("v", "w", "x", "y", "z")],
            r"has no train records of the path 'v', 'w', 'x' and 2 more, and .*; add some, or remove that path's",
        ),
        (
            [*TRAIN, *extra("algebra")],
            VALIDATION,
            r"domain 'math': some records have the path 'algebra' and some 'algebra/Rings & fields', which lies below "
            r"it; give the former a further part \(such as 'algebra/other'\), or set domains.math.path_depth: 1",
        ),
        ([*TRAIN, *extra("x" * 300)], VALIDATION, "domain 'math': the path 'xxx.*' is too long to name a folder"),
        ([], [], "domain 'math': its files hold no document"),
        (
            TRAIN,
            [*VALIDATION, {"text": "no topic"}],
            r"v\.jsonl, line 61: no field 'topic'; set path_field to one that is there, or give the record one",
        ),
    ],
)
def test_leaves_that_cannot_be(corpus: Corpus, train: list[Record], validation: list[Record], message: str) -> None:
    corpus.write("a.jsonl", train)
    corpus.write("v.jsonl", validation)
    with pytest.raises(UserError, match=message):
        corpus.plan()


def test_leaves_of_two_domains_that_collide(corpus: Corpus) -> None:
    plain = {"train": str(corpus.folder / "a.jsonl"), "validation": str(corpus.folder / "v.jsonl")}
    filed = {**plain, "path_field": "topic"}
    with pytest.raises(UserError, match="two domains of the configuration have records of 'math/geometry'; rename one"):
        corpus.plan({"math": filed, "math/geometry": plain})
    with pytest.raises(UserError, match="'math/algebra' has documents of its own, and 'math/algebra/linear' lies"):
        corpus.plan({"math": filed, "math/algebra": plain})


def test_a_leaf_too_small_for_a_block_says_what_helps(corpus: Corpus) -> None:
    corpus.write("a.jsonl", [*TRAIN, *extra("algebra/groups", "groups")])
    corpus.write("v.jsonl", [*VALIDATION, *extra("algebra/groups", "groups")])
    plan = corpus.plan()
    with pytest.raises(
        UserError, match=r"'math/algebra/groups' has fewer train tokens than one block of 11 .*path_depth: 1, so that"
    ):
        pack_corpus.fn(plan, "math/algebra/groups")
    with pytest.raises(UserError, match=r"'math/groups' has fewer train tokens .*, or lower packing.seq_len$"):
        pack_corpus.fn(plan, "math/groups")
