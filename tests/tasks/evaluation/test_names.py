"""Which benchmarks are asked for, and what exactly a model is asked in each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import FILES, write_files

from ddk.errors import UserError
from tasks.evaluation.completions import Completion
from tasks.evaluation.local_files import FORMATS, DataFolder
from tasks.evaluation.names import PRESETS, Benchmark, EvaluationConfig, headline, parse, wanted_benchmarks
from tasks.evaluation.questions import CODE_TASKS, Measure, _manager, build_measures


def domains() -> list[str]:
    return ["python", "java", "shell/bash", "shell/zsh"]


# ---- names


def test_names_with_and_without_a_number_of_examples() -> None:
    assert parse(" gsm8k@5 ") == Benchmark("gsm8k", 5)
    assert parse("arc_easy") == Benchmark("arc_easy", None)
    assert str(Benchmark("gsm8k", 5)) == "gsm8k@5"
    for wrong in ("", "gsm8k@", "gsm8k@five", "a b", "../etc/passwd", "@5"):
        with pytest.raises(UserError, match="--tasks takes names"):
            parse(wrong)


def test_the_papers_list_is_the_default() -> None:
    shots = {benchmark.task: benchmark.shots for benchmark in wanted_benchmarks(EvaluationConfig(), domains)}
    assert shots == {
        **dict.fromkeys(("ceval-valid", "mmlu", "race", "c3", "winogrande", "gsm8k", "commonsense_qa"), 0),
        **dict.fromkeys(("arc_easy", "arc_challenge", "humaneval"), 0),
        "mbpp": 3,
    }
    few = wanted_benchmarks(EvaluationConfig(preset="paper-5shot"), domains)
    assert {benchmark.shots for benchmark in few} == {5}
    assert {benchmark.task for benchmark in few} == set(shots) - {"humaneval", "mbpp"}


def test_every_name_of_a_preset_is_one_of_the_harness_or_ours() -> None:
    manager = _manager()
    ours = {"c3", "completion"}
    for preset in PRESETS.values():
        for benchmark in preset:
            assert (benchmark.task in manager.all_tasks) != (benchmark.task in ours), benchmark
    for task, form in FORMATS.items():
        if not form.definition:
            assert task not in manager.all_tasks, task
        elif task != "mmlu":
            assert str(manager.task_index[task].yaml_path).endswith(f"tasks/{form.definition}"), task


def test_completion_stands_for_every_domain_with_texts() -> None:
    def names(*tasks: str) -> list[str]:
        return [str(benchmark) for benchmark in wanted_benchmarks(EvaluationConfig(tasks=tasks), domains)]

    every = [f"completion:{name}" for name in domains()]
    assert names("completion", "completion:java", "gsm8k", "gsm8k") == [*every, "gsm8k"]
    assert names("completion:shell/zsh") == ["completion:shell/zsh"]
    assert names("completion:shell") == ["completion:shell/bash", "completion:shell/zsh"]
    with pytest.raises(UserError, match="no domain 'rust' with texts; it has python, java"):
        names("completion:rust")
    with pytest.raises(UserError, match="completion tasks take no worked examples"):
        names("completion@2")


def test_domains_are_only_asked_for_completions() -> None:
    def asked() -> list[str]:
        raise AssertionError("reading the records' paths of a large corpus takes long")

    assert wanted_benchmarks(EvaluationConfig(tasks=("gsm8k",)), asked) == (Benchmark("gsm8k"),)


def test_presets_that_are_not_there() -> None:
    with pytest.raises(UserError, match="no preset 'papers'; there are paper, paper-5shot, code, local"):
        wanted_benchmarks(EvaluationConfig(preset="papers"), domains)
    with pytest.raises(UserError, match=r"needs a folder \(--data\)"):
        wanted_benchmarks(EvaluationConfig(preset="local"), domains)
    with pytest.raises(UserError, match="/x has no file that belongs to a task"):
        wanted_benchmarks(EvaluationConfig(data="/x"), domains)


def test_the_metric_that_stands_for_a_task() -> None:
    assert headline("arc_easy", ["acc_norm,none", "acc,none"]) == "acc,none"
    assert (
        headline("gsm8k", ["exact_match,strict-match", "exact_match,flexible-extract"])
        == "exact_match,flexible-extract"
    )
    assert headline("completion:java", ["exact_match,none", "edit_similarity,none"]) == "edit_similarity,none"
    assert headline("humaneval", []) is None
    assert headline("wikitext", ["word_perplexity,none"]) == "word_perplexity,none"


# ---- questions


def build(folder: str, *names: str, limit: int | None = None, seed: int = 1234) -> list[Measure]:
    return build_measures(
        [parse(name) for name in names], folder=DataFolder(folder), completions=lines, limit=limit, seed=seed
    )


def lines(domain: str) -> Sequence[Completion]:
    return [Completion(f"# {domain}\n", "x = 12345"), Completion("def f():\n", "    return 1")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_files(tmp_path_factory.mktemp("questions"))


def asked(measure: Measure) -> list[tuple[Any, ...]]:
    return [instance.args for part in measure.parts for instance in part.task.instances]


def test_every_file_is_found_by_its_name(folder: str) -> None:
    assert len(DataFolder(folder).tasks) == len(FILES) + 1 - 1  # SQuAD's besides; MMLU has two files
    assert set(DataFolder(folder).tasks) == set(FORMATS) - {
        f"agieval_gaokao_{subject}" for subject in ("biology", "chemistry", "geography", "history")
    }


MULTIPLE_CHOICE: dict[str, list[tuple[str, str]]] = {
    "arc_challenge": [
        ("Question: Where do fish live?\nAnswer:", " in water"),
        ("Question: Where do fish live?\nAnswer:", " in trees"),
    ],
    "commonsense_qa": [
        ("Question: Where is bread baked?\nA. lake\nB. oven\nC. field\nD. roof\nE. sky\nAnswer:", f" {letter}")
        for letter in "ABCDE"
    ],
    "openbookqa": [("A magnet pulls", f" {what}") for what in ("paper", "an iron nail", "wood", "glass")],
    "piqa": [("Question: How do I boil water?\nAnswer:", f" {how}") for how in ("Heat it.", "Freeze it.")],
    "winogrande": [
        ("The cup fell off the table so the cup", " broke."),
        ("The cup fell off the table so the table", " broke."),
    ],
    "hellaswag": [
        ("Baking: A man opens the oven. he", f" {what}") for what in ("takes out bread.", "swims.", "sings.", "flies.")
    ],
    "xcopa_zh": [("他很饿 所以", " 他吃了饭。"), ("他很饿 所以", " 他睡了。")],
    "agieval_gaokao_physics": [
        ("问题：力的单位是 选项：(A)牛顿 (B)米 (C)秒 (D)克\n答案：从A到D, 我们应选择", f" {option}")
        for option in ("(A)牛顿", "(B)米", "(C)秒", "(D)克")
    ],
    "c3": [("文章：男：你好。\n女：再见。\n问题：谁先说话？\n答案：", choice) for choice in ("男的", "女的")],
}


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_what_is_asked_of_choices(folder: str, name: str) -> None:
    (measure,) = build(folder, name)
    assert asked(measure) == MULTIPLE_CHOICE[name]
    assert not measure.parts[0].generates
    assert (measure.parts[0].asked, measure.parts[0].available) == (1, 1)


def test_a_perfect_and_a_wrong_answer_score_as_they_should(folder: str) -> None:
    # The right choice of every question, by hand.
    right = {"arc_challenge": 0, "commonsense_qa": 1, "openbookqa": 1, "piqa": 0, "winogrande": 0, "hellaswag": 0}
    right |= {"xcopa_zh": 0, "agieval_gaokao_physics": 0, "c3": 0}
    for name, gold in right.items():
        task = build(folder, name)[0].parts[0].task
        doc = task.eval_docs[0]
        for chosen in range(len(MULTIPLE_CHOICE[name])):
            answers = [(0.0 if i == chosen else -9.0, False) for i in range(len(MULTIPLE_CHOICE[name]))]
            assert task.process_results(doc, answers)["acc"] == float(chosen == gold), (name, chosen)


def test_several_right_answers(folder: str) -> None:
    task = build(folder, "agieval_gaokao_mathqa")[0].parts[0].task
    scores = [
        task.process_results(task.eval_docs[0], [(float(i == chosen), False) for i in range(4)])["acc"]
        for chosen in range(4)
    ]
    assert scores == [0.0, 1.0, 0.0, 1.0]


def test_mmlu_is_a_task_a_subject_with_examples_of_its_own(folder: str) -> None:
    (measure,) = build(folder, "mmlu@1")
    assert [part.name for part in measure.parts] == ["mmlu_anatomy", "mmlu_astronomy"]
    assert asked(measure)[0] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "How many noses?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
        "How many lungs?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        " A",
    )
    assert "What is Mars?" in asked(measure)[-1][0]
    # The mean over questions, not over subjects.
    metrics = {"mmlu_anatomy": {"acc,none": 0.5, "sample_len": 2}, "mmlu_astronomy": {"acc,none": 1.0, "sample_len": 1}}
    assert measure.group.aggregate(metrics)["acc,none"] == pytest.approx(2 / 3)


def test_gsm8k_reads_the_last_number(folder: str) -> None:
    (measure,) = build(folder, "gsm8k@0")
    prompt, options = asked(measure)[0]
    assert prompt == "Question: Two and three?\nAnswer:"
    assert "Question:" in options["until"]
    task = measure.parts[0].task
    for answer, strict, flexible in ((" So it is #### 5", 1, 1), (" It is 5.", 0, 1), (" 5 or 6", 0, 0)):
        for instance in task.instances[:1]:
            instance.resps, instance.filtered_resps = [answer], {}
        task._instances = task.instances[:1]
        task.apply_filters()
        for name, expected in (("strict-match", strict), ("flexible-extract", flexible)):
            read = [task.instances[0].filtered_resps[name]]
            assert task.process_results(task.eval_docs[0], read)["exact_match"] == expected, (answer, name)


def test_chinese_word_problems_and_passages(folder: str) -> None:
    (problems,), (passages,) = build(folder, "mgsm_direct_zh"), build(folder, "xquad_zh")
    assert asked(problems)[0][0] == "问题： 三加四等于多少？\nAnswer:"
    assert asked(passages)[0][0] == "语境: 长江很长。\n\n问题: 什么很长？\n\n回答:"
    task = passages.parts[0].task
    assert task.process_results(task.eval_docs[0], ["长江"]) == {"f1": 1.0, "exact_match": 1}


def test_examples_come_from_the_questions_and_are_never_the_question_itself(folder: str) -> None:
    (measure,) = build(folder, "arc_easy@2")
    for (prompt, _), doc in zip(asked(measure)[::4], FILES["arc_easy.jsonl"], strict=False):
        *examples, question = prompt.split("\n\n")
        assert question.startswith(doc["query"])
        assert len(examples) == 2
        assert not [example for example in examples if example.startswith(doc["query"])]
        assert all(example.partition("Answer: ")[2] for example in examples)


def test_more_examples_than_there_are_is_an_error(folder: str) -> None:
    with pytest.raises(UserError, match="task 'arc_easy@9': its questions cannot be assembled"):
        build(folder, "arc_easy@9")


def test_programs_are_only_written(folder: str) -> None:
    humaneval, mbpp = build(folder, "humaneval", "mbpp")
    assert asked(humaneval)[0][0] == FILES["humaneval.jsonl"][0]["prompt"]
    assert "\ndef" in asked(humaneval)[0][1]["until"]
    # Tasks 11 to 510 are asked; 2, 3 and 4 are the examples.
    assert mbpp.parts[0].shots == 3
    assert [part.asked for part in mbpp.parts] == [2]
    prompt = asked(mbpp)[0][0]
    assert prompt.count("[DONE]") == 3
    assert prompt.startswith(
        "You are an expert Python programmer, and here is your task: Write a function that adds 2."
    )
    assert prompt.endswith("assert add_11(2) == 13\n[BEGIN]\n")
    for measure in (humaneval, mbpp):
        task = measure.parts[0].task
        assert list(task.process_results(task.eval_docs[0], ["raise SystemExit"])) == ["bypass"], "nothing is executed"


def test_lines_to_complete(folder: str) -> None:
    (measure,) = build(folder, "completion:java")
    (prefix, options), _ = asked(measure)
    assert prefix == "# java\n"
    assert options["until"] == ["\n"]
    task = measure.parts[0].task
    assert task.process_results(task.eval_docs[0], ["x = 12346"]) == pytest.approx(
        {"exact_match": 0.0, "edit_similarity": 8 / 9}
    )
    assert task.process_results(task.eval_docs[1], ["\treturn 1"]) == {"exact_match": 1.0, "edit_similarity": 1.0}


def test_what_determines_a_score_is_in_the_digest(folder: str, tmp_path: Path) -> None:
    def digest(*arguments: Any, **options: Any) -> str:
        return build(*arguments, **options)[0].parts[0].requests

    first = digest(folder, "arc_easy@1")
    assert digest(folder, "arc_easy@1") == first
    # Of the three questions, the examples depend on the seed; some seed must give others.
    assert {digest(folder, "arc_easy@1", seed=seed) for seed in range(5)} != {first}
    assert digest(folder, "arc_easy@0") != first
    assert digest(folder, "arc_easy@1", limit=2) != first
    changed = write_files(tmp_path, "arc_easy.jsonl")
    assert digest(changed, "arc_easy@1") == first, "the same questions elsewhere are the same"
    text = (tmp_path / "arc_easy.jsonl").read_text()
    (tmp_path / "arc_easy.jsonl").write_text(text.replace('"gold": 2', '"gold": 1'))
    assert digest(changed, "arc_easy@1") != first, "another answer"


# ---- what goes wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "Q", "choices": ["a"]', r"arc_easy.jsonl, line 2: broken JSON"),
        ('{"query": "Q", "choices": ["a"]}', r"line 2: no field 'gold'; docs/evaluating.md says"),
        ('{"query": "Q", "choices": ["a"], "gold": 7}', r"line 2: not a question of this task"),
        ('["Q"]', r"line 2: not a question of this task"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "arc_easy.jsonl").write_text('{"query": "Q", "choices": ["a", "b"], "gold": 0}\n' + content + "\n")
    with pytest.raises(UserError, match=message):
        build(str(tmp_path), "arc_easy")


def test_an_empty_file_and_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        build(str(tmp_path), "arc_easy")
    with pytest.raises(UserError, match="there is no such folder, or nothing in it"):
        DataFolder(str(tmp_path / "nowhere"))


def test_an_unknown_name_and_its_neighbours(folder: str) -> None:
    with pytest.raises(UserError, match=r"no task 'arc_esay'; did you mean .*arc_easy"):
        build(folder, "arc_esay")


def test_a_task_that_executes_programs_by_itself_is_refused(folder: str) -> None:
    assert "humaneval_plus" not in CODE_TASKS
    for name in ("humaneval_plus", "mbpp_instruct"):
        with pytest.raises(UserError, match=f"task '{name}' executes what the model wrote within the harness's own"):
            build(folder, name)


def test_the_harness_does_not_talk_over_us() -> None:
    assert logging.getLogger("lm_eval").getEffectiveLevel() >= logging.ERROR


# ---- the hub, with its data sets in place of the network


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None], Any]:
    """Data sets by path and name; whatever else is asked for cannot be reached."""
    import datasets

    found: dict[tuple[str, str | None], Any] = {}

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        if (path, name) not in found:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)\nsecond line")
        return {split: datasets.Dataset.from_list(rows) for split, rows in found[path, name].items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


def from_hub(*names: str) -> list[Measure]:
    return build_measures([parse(name) for name in names], folder=None, completions=lines, limit=None, seed=1)


def test_a_task_of_the_hub_asks_what_a_file_would(hub: dict[Any, Any], folder: str) -> None:
    rows = [task.eval_docs[0] for task in (build(folder, "arc_challenge")[0].parts[0].task,)]
    hub["allenai/ai2_arc", "ARC-Challenge"] = dict.fromkeys(("train", "validation", "test"), rows)
    (remote,), (local,) = from_hub("arc_challenge"), build(folder, "arc_challenge")
    assert remote.parts[0].requests == local.parts[0].requests
    assert remote.parts[0].source == "allenai/ai2_arc"


def test_programs_of_the_hub_are_only_written_too(hub: dict[Any, Any], folder: str) -> None:
    rows = FILES["mbpp.jsonl"]
    hub["google-research-datasets/mbpp", "full"] = {
        "prompt": [row for row in rows if row["task_id"] <= 10],
        "test": [row for row in rows if 11 <= row["task_id"] <= 510],
    }
    hub["openai/openai_humaneval", None] = {"test": FILES["humaneval.jsonl"]}
    for name in CODE_TASKS:
        (remote,), (local,) = from_hub(name), build(folder, name)
        assert asked(remote) == asked(local)
        task = remote.parts[0].task
        assert list(task.process_results(task.eval_docs[0], ["raise SystemExit"])) == ["bypass"]


def test_where_the_harness_would_show_a_question_its_own_answer(hub: dict[Any, Any]) -> None:
    def problem(i: int) -> dict[str, str]:
        return {
            "article": f"Article number {i}.",
            "problems": str(
                [{"question": f"What is it ({i})?", "answer": "B", "options": ["a", f"the {i}", "c", "d"]}]
            ),
        }

    hub["EleutherAI/race", "high"] = {"test": [problem(i) for i in range(6)]}
    (measure,) = from_hub("race@3")
    prompts = {prompt for prompt, _ in asked(measure)}
    assert len(prompts) == 6
    for prompt in prompts:
        *examples, article, _ = [part for part in prompt.split("\n\n") if part.startswith("Article:")] + [""]
        assert len(examples) == 3
        assert article not in examples


def test_parts_and_groups_of_the_hub(hub: dict[Any, Any]) -> None:
    row = {"question": "一加一？", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
    index = _manager().task_index
    for name in index["ceval-valid"].cfg["task"]:
        config = index[name].cfg
        hub[config["dataset_path"], config["dataset_name"]] = {"val": [row], "dev": [row] * 5, "test": [row]}
    (measure,) = from_hub("ceval-valid@0")
    assert len(measure.parts) == 52
    assert measure.group.has_aggregation
    assert asked(measure)[0][0].endswith("一加一？\nA. 1\nB. 2\nC. 3\nD. 4\n答案：")


@pytest.mark.usefixtures("hub")
def test_a_hub_that_does_not_answer(folder: str) -> None:
    with pytest.raises(
        UserError, match=r"task 'arc_easy' .* \(allenai/ai2_arc\), which cannot be reached.*--data FOLDER"
    ) as told:
        from_hub("arc_easy")
    assert "second line" not in str(told.value)
    empty = DataFolder(write_files(Path(folder), "gsm8k_test.jsonl"))
    with pytest.raises(UserError, match=r"put hellaswag.jsonl into "):
        build_measures([parse("hellaswag")], folder=_without(empty, "hellaswag"), completions=lines, limit=None, seed=1)


def _without(folder: DataFolder, task: str) -> DataFolder:
    folder._names = [name for name in folder._names if not name.startswith(task)]
    return folder
