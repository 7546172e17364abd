"""Benchmarks from files on this machine: which file belongs to which task, and its rows as the hub's data set has them.

A data folder (or URL) holds JSON lines, plain, `.gz` or `.zst`. A file is found by its name: `<task>.jsonl`, or one of
the other stems in `FORMATS`, each also with `_test`, `_validation`, `_dev` or `_train` behind it. A row is either as
the hub's data set has it, or in the form of MosaicML's llm-foundry (`query`, `choices`, `gold`), or in the benchmark's
own. It becomes a row as on the hub, so that the harness's own definition of the task can be used on it as it is: the
same prompt, the same scoring.

Worked examples come from `<stem>_train` or `<stem>_dev`; where there is neither, from the questions themselves, never
the one that is asked.

A line may say in a further field which concept its question is of, as a path such as `arithmetic/addition`. Its row has
it in the column `CONCEPT`, which no model is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ddk.errors import UserError
from storage.corpus.file_bytes import opened, stored_lines
from storage.corpus.files import CorpusFile, file_format
from storage.corpus.record_paths import record_path
from storage.files import uri
from storage.files.digests import digest

Row = dict[str, Any]
T = TypeVar("T")
OWN = "own_questions"
"""The task of questions that are no benchmark's: `query`, `choices` and `gold`."""
LETTERS = "ABCDEFGHIJ"
CONCEPT = "ddk_concept"
"""Column of a row with the path of its question."""
_TEST_SUFFIXES = ("", "_test", "_validation", "_val", "_valid")
_SHOT_SUFFIXES = ("_train", "_dev")
_KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFormat:
    """How a task's file is read."""

    definition: str
    """The harness's definition of the task, below its folder `tasks`; empty where there is none."""
    to_row: Callable[[Row], Row]
    """A line's object → a row as on the hub. A KeyError says that a field is missing."""
    records: Callable[[Row], list[Row]] | None = None
    """Of a file that is one JSON document: that document → what would be its lines."""
    stems: tuple[str, ...] = ()
    """Names of the file besides the task's own."""
    changes: Mapping[str, Any] | None = None
    """Fields of the definition that differ, as the rows are processed further than the hub's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalData:
    """One task's rows."""

    test: list[Row]
    shots: list[Row]
    """For worked examples; empty where there is no file for them."""
    source: str
    """Name and digest of the file, for the reader of a result."""


class DataFolder:
    """What a folder holds for the tasks.

    Args:
        concept_field: name of the field with a question's path; of several, separated by commas, its parts. Empty:
            no questions have paths.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, url: str, concept_field: str = "") -> None:
        self.url = url
        self._fields = tuple(name.strip() for name in concept_field.split(",") if name.strip())
        self._names = uri.list_names(url)
        if not self._names:
            raise UserError(f"--data {url}: there is no such folder, or nothing in it; correct the path")

    @property
    def tasks(self) -> list[str]:
        """The tasks that there is a file for, in the order of `FORMATS`."""
        return [task for task in FORMATS if self._file(task, _TEST_SUFFIXES) is not None]

    def load(self, task: str) -> LocalData | None:
        """The task's rows; None if there is no file, or if files of this task cannot be read.

        Raises:
            UserError: a file is not as it should be; line and cause are named.
        """
        if task not in FORMATS or (file := self._file(task, _TEST_SUFFIXES)) is None:
            return None
        shots = self._file(task, _SHOT_SUFFIXES)
        return LocalData(
            test=_rows(file, FORMATS[task], self._fields),
            shots=_rows(shots, FORMATS[task]) if shots is not None else [],
            source=f"{file.name} (sha256 {digest(file.url)[:12]}…)",
        )

    def _file(self, task: str, suffixes: tuple[str, ...]) -> CorpusFile | None:
        for stem in (task, *FORMATS[task].stems):
            for name in (stem + suffix + kind for suffix in suffixes for kind in _KINDS):
                if name in self._names:
                    return CorpusFile(url=uri.join(self.url, name), name=name, size=0)
        return None


def _rows(file: CorpusFile, form: LocalFormat, concept_fields: tuple[str, ...] = ()) -> list[Row]:
    _, compression = file_format(file)
    with opened(file) as stored:
        lines = list(stored_lines(stored, file, compression))
    if form.records is not None:
        document = _parsed(b"".join(line for _, line in lines), file.url)
        records = [(file.url, record) for record in _read(form.records, document, file.url)]
    else:
        places = [(f"{file.url}, line {number + 1}", line) for number, line in lines if not line.isspace()]
        records = [(place, _parsed(line, place)) for place, line in places]
    if not records:
        raise UserError(f"{file.url} holds no question; fetch it again")
    rows = [_read(form.to_row, record, place) for place, record in records]
    paths = [_path(record, concept_fields, place) for place, record in records]
    if not any(paths):
        return rows
    for (place, _), path in zip(records, paths, strict=True):
        if path is None:
            raise UserError(
                f"{place}: no field '{', '.join(concept_fields)}', which other lines of the file have; give every "
                f"question its path, or name another field (--concept-field)"
            )
    return [{**row, CONCEPT: path} for row, path in zip(rows, paths, strict=True)]


def _path(record: Any, fields: tuple[str, ...], place: str) -> str | None:
    """The path of a line's question; None where it has none of the fields."""
    given = [record[field] for field in fields if isinstance(record, dict) and field in record]
    if not given or len(given) < len(fields):
        return None
    try:
        if wrong := [value for value in given if not isinstance(value, str | int) or isinstance(value, bool)]:
            raise ValueError(f"it is {str(wrong[0])[:60]!r}, and no text")
        return record_path("/".join(map(str, given)))
    except ValueError as error:
        raise UserError(
            f"{place}: the field '{', '.join(fields)}' holds no path ({error}); write one such as "
            f"'arithmetic/addition', or name another field (--concept-field)"
        ) from None


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: broken JSON ({error}); each line must be one JSON object") from None


def _read(convert: Callable[[Any], T], record: Any, place: str) -> T:
    try:
        return convert(record)
    except KeyError as error:
        raise UserError(f"{place}: no field {error}; docs/evaluating.md says what a file of this task holds") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{place}: not a question of this task ({error}); see docs/evaluating.md") from None


# ---- rows as on the hub, from llm-foundry's form or the benchmark's own


def _lettered(question: str, row: Row) -> Row:
    """ARC, OpenBookQA, CommonsenseQA: choices by letter."""
    if "answerKey" in row:
        return {question: row[question], "choices": row["choices"], "answerKey": row["answerKey"]}
    choices = list(row["choices"])
    labels = list(LETTERS[: len(choices)])
    asked = str(row["query"]).removeprefix("Question: ")
    return {question: asked, "choices": {"text": choices, "label": labels}, "answerKey": labels[row["gold"]]}


def _question(row: Row) -> Row:
    return _lettered("question", row)


def _question_stem(row: Row) -> Row:
    return _lettered("question_stem", row)


def _own(row: Row) -> Row:
    choices, gold = [str(choice) for choice in row["choices"]], row["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"'gold' is {gold!r}; it must be the number of a choice, from 0")
    return {"query": str(row["query"]), "choices": choices, "gold": gold}


def _piqa(row: Row) -> Row:
    if "goal" in row:
        return {name: row[name] for name in ("goal", "sol1", "sol2", "label")}
    first, second = row["choices"]
    goal = str(row["query"]).removeprefix("Question: ").rstrip("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    if "sentence" in row:
        return {name: row[name] for name in ("sentence", "option1", "option2", "answer")}
    first, second = row["context_options"]
    # The whole beginning is taken as the option: the harness puts it in front of what follows the blank.
    answer = str(int(row["gold"]) + 1)
    return {"sentence": f"_ {row['continuation']}", "option1": first, "option2": second, "answer": answer}


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


def _hellaswag(row: Row) -> Row:
    return {"query": row["query"], "choices": list(row["choices"]), "label": int(row["gold"])}


def _mmlu(row: Row) -> Row:
    choices = list(row["choices"])
    question = row["question"] if "question" in row else row["query"]
    answer = int(row["answer"] if "answer" in row else row["gold"])
    return {"subject": row["subject"], "question": question, "choices": choices, "answer": answer}


def _mgsm(row: Row) -> Row:
    # As the hub's test rows are: without the reasoning.
    return {"question": row["question"], "answer": None, "answer_number": str(row.get("answer_number", row["answer"]))}


def _xcopa(row: Row) -> Row:
    return {name: row[name] for name in ("premise", "choice1", "choice2", "question", "label")}


def _squad_records(document: Row) -> list[Row]:
    """SQuAD's own nesting of articles, paragraphs and questions → one record a question."""
    return [
        {"context": paragraph["context"], "question": asked["question"], "answers": asked["answers"]}
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def _squad(row: Row) -> Row:
    answers = {"text": [answer["text"] for answer in row["answers"]]}
    return {"context": row["context"], "question": row["question"], "answers": answers}


def _agieval_zh(row: Row) -> Row:
    if "query" in row:
        return {name: row[name] for name in ("query", "choices", "gold")}
    options = list(row["options"])
    query = (
        f"{row['passage'] or ''}问题：{row['question']} 选项：{' '.join(options)}\n"
        f"答案：从A到{LETTERS[len(options) - 1]}, 我们应选择"
    )
    gold = [LETTERS.index(letter) for letter in row["label"] if letter != " "]
    return {"query": query, "choices": options, "gold": gold}


def _c3(row: Row) -> Row:
    return {name: row[name] for name in ("context", "question", "choice", "answer")}


def _humaneval(row: Row) -> Row:
    return {name: row[name] for name in ("task_id", "prompt", "test", "entry_point")}


def _mbpp(row: Row) -> Row:
    return {"task_id": int(row["task_id"]), **{name: row[name] for name in ("text", "code", "test_list")}}


FORMATS: Mapping[str, LocalFormat] = {
    "arc_easy": LocalFormat(definition="arc/arc_easy.yaml", to_row=_question),
    "arc_challenge": LocalFormat(definition="arc/arc_challenge.yaml", to_row=_question),
    "commonsense_qa": LocalFormat(definition="commonsense_qa/default.yaml", to_row=_question),
    "openbookqa": LocalFormat(definition="openbookqa/openbookqa.yaml", to_row=_question_stem, stems=("openbook_qa",)),
    "piqa": LocalFormat(definition="piqa/piqa.yaml", to_row=_piqa),
    "winogrande": LocalFormat(definition="winogrande/default.yaml", to_row=_winogrande),
    "hellaswag": LocalFormat(
        definition="hellaswag/hellaswag.yaml",
        to_row=_hellaswag,
        stems=("hellaswag_val_even",),
        changes={"process_docs": None},
    ),
    "mmlu": LocalFormat(definition="mmlu/default", to_row=_mmlu),
    "gsm8k": LocalFormat(definition="gsm8k/gsm8k.yaml", to_row=_gsm8k),
    "c3": LocalFormat(definition="", to_row=_c3),
    "mgsm_direct_zh": LocalFormat(definition="mgsm/direct/mgsm_direct_zh.yaml", to_row=_mgsm, stems=("mgsm_zh",)),
    "xcopa_zh": LocalFormat(definition="xcopa/default_zh.yaml", to_row=_xcopa),
    "xquad_zh": LocalFormat(definition="xquad/xquad_zh.yaml", to_row=_squad, records=_squad_records),
    **{
        f"agieval_gaokao_{subject}": LocalFormat(definition=f"agieval/gaokao-{subject}.yaml", to_row=_agieval_zh)
        for subject in ("biology", "chemistry", "geography", "history", "mathqa", "physics")
    },
    OWN: LocalFormat(definition="", to_row=_own),
    "humaneval": LocalFormat(definition="humaneval/humaneval.yaml", to_row=_humaneval),
    "mbpp": LocalFormat(definition="mbpp/mbpp.yaml", to_row=_mbpp),
}
"""The tasks that can be read from files."""
