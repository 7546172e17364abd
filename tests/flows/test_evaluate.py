"""`ddk eval` as a user calls it: the quickstart's models as teacher and students, questions from files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from benchmark_files import FILES, write_files
from lm_eval.api.instance import Instance
from small_run import ASSETS, Ddk, Finished, SmallRun, write_config

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from flows.config import load_config
from flows.evaluate import evaluate, evaluation_config
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.listing import records_of
from tasks.evaluation.models import EvaluatedModel, running
from tasks.evaluation.transformers_model import TransformersModel
from tasks.evaluation.validation_texts import ValidationTexts
from tasks.teachers.config import TeacherConfig

TASKS = "arc_easy,mmlu,mbpp@1,completion:code,completion:math"
NAMES = {"arc_easy", "mmlu", "mbpp", "completion:code", "completion:math"}

pytestmark = pytest.mark.usefixtures("prefect_server")


class Case:
    """A finished run, and questions."""

    def __init__(self, folder: Path) -> None:
        (folder / "questions").mkdir()
        self.data = write_files(folder / "questions")
        self.config = write_config(folder)
        self.root = folder / "root"
        self.run = finished_run(self.root, "small")

    def arguments(self, *further: str) -> list[str]:
        """Of the command."""
        return ["eval", self.config, "--data", self.data, "--limit", "2", *further]

    def evaluate(self, tasks: str, models: str = "before,student,teacher", run: str = "small", **options: Any) -> Any:
        """The flow in this process; how many parts of each model were asked and found."""
        config = load_config(self.config, (), None, run)
        asked = evaluation_config(tasks=tasks, models=models, **{"data": self.data, "limit": 2, **options})
        done = evaluate(config.run, config.root, config.domains, config.teacher, config.student, asked)
        return [(model["asked"], model["found"]) for model in done["models"]]

    def records(self) -> dict[str, dict[str, Any]]:
        """By the file's path below the run's evaluations."""
        folder = self.run / "evaluations"
        return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("*.json")}


def finished_run(root: Path, name: str) -> Path:
    """What `ddk distill` leaves, with the quickstart's student as if it had been trained."""
    folder = RunFolder(str(root), name)
    shutil.copytree(ASSETS / "student", root / "runs" / name / "student")
    folder.claim({"seed": 0}, {"method": "ddk", "student": {"model": "s"}, "teacher": {"model": "t"}})
    folder.student_listing.write(records_of(folder.student_url))
    folder.finish({"tokens_seen": 0})
    return root / "runs" / name


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def output(case: Case, ddk: Ddk) -> Finished:
    """Of the command."""
    output = ddk(*case.arguments("--tasks", TASKS, "--allow-code"))
    assert output.code == 0, output.err
    return output


def test_every_model_answers_every_benchmark(case: Case, output: Finished) -> None:
    whole = {(r["model"], r["task"]): r for path, r in case.records().items() if path.count("/") == 1}
    assert set(whole) == {(model, task) for model in ("before", "student", "teacher") for task in NAMES}
    for (model, task), record in whole.items():
        assert record["metrics"], (model, task)
        assert record["limit"] == 2
        assert record["asked"] == (3 if task == "mmlu" else 2), "two of each subject at most"
    # Its parts lie below it.
    assert sum(path.startswith("teacher/mmlu/") for path in case.records()) == 2
    # The student before and the one called trained are the same model here: equal answers show that roles do not mix.
    for task in NAMES:
        assert whole["before", task]["metrics"] == whole["student", task]["metrics"]
    assert whole["teacher", "arc_easy"]["identity"]["model"] != whole["student", "arc_easy"]["identity"]["model"]
    assert whole["student", "mbpp"]["executed"] == "isolated"


def test_the_terminal_the_page_and_the_table_show_them(case: Case, output: Finished) -> None:
    page = (case.run / "report" / "evaluation.html").read_text()
    rows = list(csv.DictReader(io.StringIO((case.run / "report" / "evaluation.csv").read_text())))
    assert {row["task"] for row in rows} == NAMES
    assert not [row for row in rows if not row["teacher"]]
    for name in ("arc_easy", "mmlu", "mbpp", "code", "math"):
        assert name in page
        assert name in output.out
    assert "Benchmarks, in %" in output.out
    assert str(case.run / "report" / "evaluation.html") in output.out


def test_what_is_answered_is_not_asked_again_here_or_in_another_run(
    case: Case, output: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = case.records()
    assert case.evaluate(TASKS, allow_code="isolated") == [(0, 6)] * 3
    assert case.records() == before
    finished_run(case.root, "second")
    assert case.evaluate(TASKS, run="second") == [(0, 6)] * 3
    # Other examples, other questions, another engine: another evaluation.
    assert case.evaluate("arc_easy@1", models="teacher") == [(1, 0)]
    assert case.evaluate("arc_easy", models="teacher", limit=1) == [(1, 0)]
    assert case.evaluate("arc_easy", models="teacher,student") == [(0, 1), (0, 1)]
    # And another way of asking, as that before the harness's own models did.
    monkeypatch.setattr("tasks.evaluation.evaluate_model.ASKING_VERSION", 1)
    assert case.evaluate("arc_easy", models="teacher", limit=1) == [(1, 0)]


def test_accuracies_by_path_are_kept_and_shown_and_other_paths_ask_nothing_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    tasks, models = "own_questions,mmlu", "before,teacher"
    assert case.evaluate(tasks, models, limit=None) == [(3, 0), (3, 0)]  # MMLU has two subjects

    def asked(task: str) -> dict[str, int]:
        (record,) = [one for path, one in case.records().items() if path.startswith(f"teacher/{task}-")]
        return {path: tallies["acc,none"]["asked"] for path, tallies in record.get("concepts", {}).items()}

    assert asked("own_questions") == {"arithmetic/addition": 2, "arithmetic/multiplication": 1, "order": 1}
    assert asked("mmlu") == {}
    page = (case.run / "report" / "evaluation.html").read_text()
    assert "Concepts of own_questions" in page
    with (case.run / "report" / "evaluation.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "own_questions" and row["metric"] == "acc,none"]
    tree = {"arithmetic", "arithmetic/addition", "arithmetic/multiplication", "order"}
    assert (rows[0]["concept"], {row["concept"] for row in rows[1:]}) == ("", tree)
    # Another field holds other paths: the answers are counted anew, and no model is asked. Of a group likewise.
    assert case.evaluate("mmlu", models, limit=None, concept_field="subject") == [(0, 2), (0, 2)]
    assert asked("mmlu") == {"anatomy": 2, "astronomy": 1}


def test_programs_are_executed_only_when_that_is_allowed_and_later_without_asking_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert case.evaluate("mbpp@1", models="student") == [(1, 0)]
    ((path, record),) = case.records().items()
    assert record["metrics"] == {}
    samples = (case.run / "evaluations" / path).with_suffix(".samples.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    assert ["outcome" in answer for answer in answers] == [False, False]
    assert "not executed" in (case.run / "report" / "evaluation.html").read_text()
    # In place of the model's programs a right and a wrong one: what is stored is what is executed.
    right = "def add_11(x):\n    return x + 11\n" + "\n".join(FILES["mbpp.jsonl"][4]["test_list"])
    changed = [{**answer, "program": program} for answer, program in zip(answers, (right, "1 / 0"), strict=True)]
    folder = EvaluationFolder(str(case.run.parents[1]), "small")
    name = path.removeprefix("student/").removesuffix(".json")
    folder.write("student", name, record, changed)
    assert case.evaluate("mbpp@1", models="student", allow_code="isolated") == [(0, 1)]
    record = case.records()[path]
    assert record["metrics"]["pass@1"]["value"] == 0.5
    assert record["executed"] == "isolated"
    outcomes = [json.loads(line)["outcome"] for line in samples.read_text().splitlines()]
    assert outcomes == ["passed", "ZeroDivisionError"]


def test_long_contexts_are_measured_once_and_shown(tmp_path: Path) -> None:
    case = Case(tmp_path)
    asked = {"data": None, "limit": 2, "context": 512, "passkey": "1,2"}
    assert case.evaluate("", "before,student", **asked) == [(4, 0), (4, 0)]
    found = {(one["model"], one["task"]): one for one in case.records().values()}
    assert {task for _, task in found} == {"context:math", "context:code", "context:zh_books", "passkey"}
    one = found["before", "context:code"]
    assert one["trained"] == 256  # as the student's config says
    assert set(one["metrics"]) == {"ppl,0-256", "ppl_to,256", "ppl,256-512", "ppl_to,512"}
    assert one["metrics"] == found["student", "context:code"]["metrics"]  # the same weights
    assert set(found["before", "passkey"]["metrics"]) == {"acc,256", "acc,512"}

    # The first two documents that are long enough, by transformers alone.
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "teacher")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32).eval()
    config = load_config(case.config)
    texts = ValidationTexts(config.root, config.domains).read("code", 2_000)
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] + [0] for text in texts]
    long = [ids[:513] for ids in tokens if len(ids) > 512][:2]
    assert len(long) == 2
    losses = []
    for ids in long:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, :, : max(tokenizer.get_vocab().values()) + 1]
        losses.append(torch.nn.functional.cross_entropy(logits[256:], torch.tensor(ids[257:])).item())
    assert one["metrics"]["ppl,256-512"]["value"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)

    assert case.evaluate("", "before,student", **asked) == [(0, 4), (0, 4)]
    assert "Perplexity by position" in (case.run / "report" / "evaluation.html").read_text()
    assert case.evaluate("arc_easy", "before", **{**asked, "data": case.data}) == [(1, 0), (0, 4)]


def test_a_kill_costs_what_was_being_asked_and_no_more(tmp_path: Path, ddk: Ddk) -> None:
    case = Case(tmp_path)
    tasks, models = "arc_easy,commonsense_qa,completion:code", "teacher,student"
    ddk.kill_when(lambda: len(case.records()) >= 2, *case.arguments("--tasks", tasks, "--models", models))
    kept = {path: (case.run / "evaluations" / path).stat().st_mtime_ns for path in case.records()}
    assert 2 <= len(kept) < 6
    done = case.evaluate(tasks, models)
    assert sum(found for _, found in done) == len(kept)
    assert sum(asked for asked, _ in done) == 6 - len(kept)
    assert len(case.records()) == 6
    assert {path: (case.run / "evaluations" / path).stat().st_mtime_ns for path in kept} == kept


def test_offline_a_task_of_the_hub_is_named_and_nothing_is_written_to_the_home(
    tmp_path: Path, prefect_server: str
) -> None:
    case = Case(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment |= {
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "OMP_NUM_THREADS": "1",
    }

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            env=environment,
            capture_output=True,
            check=False,
            text=True,
            timeout=300,
        )

    done = call(*case.arguments("--tasks", "arc_easy", "--models", "before"))
    assert done.returncode == 0, done.stderr
    assert not [path for path in home.rglob("*") if path.is_file() and "huggingface" in str(path)]
    done = call("eval", case.config, "--tasks", "arc_easy,hellaswag", "--models", "before")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ddk: ")]
    assert "task 'arc_easy' takes its questions from the hub (allenai/ai2_arc), which cannot be reached" in line
    assert "HF_HUB_OFFLINE is set, and the cache has none; put arc_easy.jsonl into a folder (--data FOLDER" in line
    assert "Traceback" not in done.stderr


# ---- what a user gets wrong


def test_a_run_without_a_student_names_the_way_out(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run 'other' has no final student yet.*--models before,teacher"):
        case.evaluate("arc_easy", run="other")


def test_a_teacher_on_a_server_is_not_evaluated(case: Case) -> None:
    config = load_config(
        case.config, ["teacher.source=server", "teacher.server_url=http://localhost:8000/v1"], None, "small"
    )
    asked = evaluation_config(tasks="arc_easy", models="teacher", data=case.data)
    with pytest.raises(UserError, match=r"teacher.source is 'server'.*--models before,student"):
        evaluate(config.run, config.root, config.domains, config.teacher, config.student, asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "students"], "--models: Input should be 'before', 'student' or 'teacher' (it is 'students')"),
        (["--backend", "tgi"], "--backend: Input should be 'auto', 'hf' or 'vllm' (it is 'tgi')"),
        (["--preset", "leaderboard"], "there is no preset 'leaderboard'; there are paper, paper-5shot, code, local"),
        (["--context", "8"], "--context: Input should be greater than or equal to 16 (it is 8)"),
        (["--context", "64", "--passkey", "two"], "--passkey: Input should be a valid integer"),
        (["--data", "/no/such/folder"], "--data /no/such/folder: there is no such folder, or nothing in it"),
        (["--tasks", "completion:rust"], "the run has no domain 'rust' with texts; it has code, math, zh_books"),
    ],
)
def test_options_that_are_wrong(case: Case, arguments: list[str], message: str, ddk_error: Any) -> None:
    assert message in ddk_error("eval", case.config, *arguments)


def test_without_the_harness_the_extra_is_named(case: Case, monkeypatch: pytest.MonkeyPatch, ddk_error: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ddk-distill[eval]'" in ddk_error("eval", case.config)


def test_help_stays_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom flows.__main__ import app\n"
        "try:\n    app(['eval', '--help'])\nexcept SystemExit:\n    pass\n"
        "import flows.config\n"  # reading a file takes a moment, and no longer
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'vllm', 'prefect', 'zarr'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--allow-code" in done.stdout


@pytest.mark.filterwarnings("default")  # vLLM's own warnings are not ours to mend
def test_vllm_answers_as_transformers_does_and_leaves_nothing_running(small_run: SmallRun) -> None:
    """The student that was saved, so that vLLM is seen to load it. The same questions, the same answers."""
    engine = TeacherConfig(model=str(small_run.run / "student"), dtype="float32", max_batch_tokens=512)
    model = EvaluatedModel(role="student", engine=engine, tokenizer=engine.model, digests={"weights": {}})
    choices = [
        ("Question: What is 2 + 2?\nAnswer:", " 4"),
        ("Question: What is 2 + 2?\nAnswer:", " five"),
        ("def add(a, b):", " return a + b"),
        ("word " * 900, "end"),
        ("  ", "blanks alone go before this"),
        ("a", " word" * 900),
    ]
    prompts = ["def add(a, b):\n    return", "Once upon a time", "x = 1\n" * 400]
    options = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    unsaid = {"until": ["\n\n"], "max_gen_toks": 16}
    requests = {
        "loglikelihood_rolling": [_request("loglikelihood_rolling", "Once upon a time there was a")],
        "loglikelihood": [_request("loglikelihood", *pair) for pair in choices],
        "generate_until": [_request("generate_until", prompt, how) for prompt in prompts for how in (options, unsaid)],
    }
    heard: list[int] = []
    with running(model, "vllm", seed=1, on_progress=heard.append) as lm:
        found = {kind: getattr(lm, kind)(asked) for kind, asked in requests.items()}
        engines = [child for child in psutil.Process().children(recursive=True) if "VLLM::" in _command(child)]
        assert engines
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive
    plain = TransformersModel(
        StudentConfig(model=engine.model), tokenizer=engine.model, dtype=torch.float32, device="cpu", field="x"
    )
    expected = {kind: getattr(plain, kind)(asked) for kind, asked in requests.items()}
    plain.close()
    assert sum(heard) == sum(len(asked) for asked in requests.values())
    assert found["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=1e-2)
    for (logprob, greedy), (other, same) in zip(found["loglikelihood"][:5], expected["loglikelihood"][:5], strict=True):
        assert logprob == pytest.approx(other, abs=1e-2)
        assert greedy == same
    # Of a continuation longer than the model, vLLM reads two tokens less.
    assert found["loglikelihood"][5][0] == pytest.approx(expected["loglikelihood"][5][0], rel=0.02)
    assert found["generate_until"] == expected["generate_until"]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("test", 0, 1))
