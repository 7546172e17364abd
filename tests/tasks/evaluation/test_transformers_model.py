"""A model's answers against a plain forward pass of transformers: one sequence at a time, no padding, no batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmark_files import FILES, write_files
from lm_eval.api.instance import Instance
from tiny_model import make_tiny_model

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from tasks.evaluation.evaluate_model import _answers
from tasks.evaluation.local_files import DataFolder
from tasks.evaluation.names import Benchmark, EvaluationConfig
from tasks.evaluation.questions import build_measures
from tasks.evaluation.transformers_model import TransformersModel

TOKENS = 4090
"""Of the quickstart's tokenizer; its teacher predicts 4,160 rows, of which the last 70 are padding. The harness counts
them among the tokens."""


@pytest.fixture(scope="module")
def lm(teacher_folder: str) -> Iterator[TransformersModel]:
    model = TransformersModel(
        StudentConfig(model=teacher_folder), tokenizer=teacher_folder, dtype=torch.float32, device="cpu", field="x"
    )
    yield model
    model.close()


class Plain:
    """transformers as anybody would use it."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens) − 1, rows] float64: of the tokens after the first."""
        logits = self.model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        return logits.double().log_softmax(-1)

    def loglikelihood(self, context: str, continuation: str) -> float:
        whole = self.tokenizer(context + continuation)["input_ids"]
        first = len(self.tokenizer(context)["input_ids"])
        logprobs = self.logprobs(whole)
        return sum(float(logprobs[i - 1, whole[i]]) for i in range(first, len(whole)))

    @torch.no_grad()
    def greedy(self, prompt: str, until: str, most: int) -> str:
        tokens = list(self.tokenizer(prompt)["input_ids"])
        begun = len(tokens)
        while len(tokens) - begun < most:
            following = int(self.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            if following == self.tokenizer.eos_token_id:
                break
            tokens.append(following)
            if until in self.tokenizer.decode(tokens[begun:]):
                break
        return str(self.tokenizer.decode(tokens[begun:])).partition(until)[0]


@pytest.fixture(scope="module")
def plain(teacher_folder: str) -> Plain:
    return Plain(teacher_folder)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("test", 0, 1))


def test_the_score_of_local_files_is_that_of_a_plain_forward_pass(
    lm: TransformersModel, plain: Plain, tmp_path: Path
) -> None:
    names = ("arc_easy", "commonsense_qa", "winogrande", "c3", "agieval_gaokao_physics", "hellaswag")
    measures = build_measures(
        [Benchmark(name, 0) for name in names],
        folder=DataFolder(write_files(tmp_path)),
        completions=lambda _: [],
        limit=None,
        seed=1,
    )
    for measure in measures:
        (part,) = measure.parts
        metrics, samples = _answers(part, lm, EvaluationConfig())
        requests: dict[int, list[tuple[str, str]]] = {}
        for instance in part.task.instances:
            requests.setdefault(instance.doc_id, []).append(instance.args)
        scores = []
        for sample in samples:
            expected = [plain.loglikelihood(*one) for one in requests[sample["question"]]]
            assert [answer[0] for answer in sample["answer"]] == pytest.approx(expected, abs=1e-3), measure.name
            gold = _gold(measure.name, sample["question"])
            scores.append(float(expected.index(max(expected)) == gold))
        assert metrics["acc,none"]["value"] == pytest.approx(sum(scores) / len(scores)), measure.name


def _gold(name: str, question: int) -> int:
    """The right choice, as the file has it."""
    file = next(file for file in FILES if file.startswith(name))
    row = FILES[file][question]
    if "gold" in row:
        return int(row["gold"])
    return int(row["choice"].index(row["answer"])) if "choice" in row else "ABCD".index(row["label"])


def test_batches_and_shared_contexts_change_nothing(lm: TransformersModel, plain: Plain) -> None:
    pairs = [
        ("Question: 2 + 2?\nAnswer:", " 4"),
        ("Question: 2 + 2?\nAnswer:", " 5"),
        ("Question: 2 + 2?\nAnswer:", " four, I think"),
        ("def add(a, b):", " return a + b"),
        ("x " * 200, "y"),
        ("你好", "，世界"),
        ("ends with blanks   ", "and goes on"),
    ]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    # Blanks at the end of a context are counted to what follows.
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    expected = [plain.loglikelihood(*pair) for pair in moved]
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize(("tokens", "logits"), [(1, 2**30), (40, 2**30), (4096, 24 * 4 * 4160), (4096, 2**30)])
def test_the_size_of_batches_changes_nothing(
    lm: TransformersModel, keeps_logits: bool, tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(f"{'word ' * (7 * i % 5)}Question {i}:", f" answer {i}{' or' * (i % 3)}") for i in range(12)]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    expected = lm.loglikelihood(requests)
    made: list[tuple[int, int, int]] = []
    """Of each forward pass: requests, positions, and those with logits."""
    forward = lm._model_call

    def watched(inputs: torch.Tensor) -> torch.Tensor:
        found = forward(inputs)
        made.append((*inputs.shape, found.shape[1]))
        return found

    monkeypatch.setattr(lm, "_model_call", watched)
    monkeypatch.setattr(lm, "_keeps_logits", keeps_logits)
    monkeypatch.setattr(lm, "_batch_tokens", tokens)
    monkeypatch.setattr("tasks.evaluation.transformers_model.LOGITS_BYTES", logits)
    found = lm.loglikelihood(requests)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(rows for rows, _, _ in made) == len(pairs)
    assert (len(made) == 1) == (tokens == 4096 and logits == 2**30)
    for rows, positions, kept in made:
        assert rows == 1 or (rows * positions <= tokens and 4 * rows * kept * 4160 <= logits)
        assert kept == positions if not keeps_logits else kept < positions


def test_greedy_says_whether_the_model_would_have_written_it(lm: TransformersModel, plain: Plain) -> None:
    prompt = "def add(a, b):\n    return"
    best = int(plain.logprobs([*plain.tokenizer(prompt)["input_ids"], 0])[-1].argmax())
    text = plain.tokenizer.decode([best])
    answers = lm.loglikelihood([request("loglikelihood", prompt, text), request("loglikelihood", prompt, " zebra")])
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_context_longer_than_the_model_loses_its_beginning(lm: TransformersModel, plain: Plain) -> None:
    words = " ".join(str(i) for i in range(700))
    whole = plain.tokenizer(words + " end")["input_ids"]
    assert len(whole) > lm.max_length + 1
    continuation = len(whole) - len(plain.tokenizer(words)["input_ids"])
    cut = whole[-(lm.max_length + 1) :]
    logprobs = plain.logprobs(cut)
    expected = sum(float(logprobs[i - 1, cut[i]]) for i in range(len(cut) - continuation, len(cut)))
    ((found, _),) = lm.loglikelihood([request("loglikelihood", words, " end")])
    assert found == pytest.approx(expected, abs=1e-3)


def test_whole_texts_in_windows(lm: TransformersModel, plain: Plain) -> None:
    short, long = "The quick brown fox.", " ".join(str(i) for i in range(700))
    start = plain.tokenizer.eos_token_id
    expected = []
    for text in (short, long):
        tokens = plain.tokenizer(text)["input_ids"]
        total, context = 0.0, [start]
        for first in range(0, len(tokens), lm.max_length):
            part = tokens[first : first + lm.max_length]
            # The last window reaches back, so that it is full.
            before = (context + tokens[:first])[-(lm.max_length - len(part) + 1) :] if first else context
            logprobs = plain.logprobs([*before, *part])
            total += sum(float(logprobs[len(before) - 1 + i, token]) for i, token in enumerate(part))
        expected.append(total)
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in (short, long)])
    assert found == pytest.approx(expected, rel=1e-4)


def test_text_is_the_greedy_one_whatever_runs_beside_it(lm: TransformersModel, plain: Plain) -> None:
    prompts = ["def add(a, b):\n    return", "Question: What is 3 + 4?\nAnswer:", "It was the best of", "你"]
    options = {"until": ["\n\n", "."], "max_gen_toks": 24, "do_sample": False}
    found = lm.generate_until([request("generate_until", prompt, dict(options)) for prompt in prompts])
    for prompt, text in zip(prompts, found, strict=True):
        expected = plain.greedy(prompt, "\n\n", 24).partition(".")[0]
        assert text == expected, prompt


def test_requests_with_other_options_keep_their_places(lm: TransformersModel, plain: Plain) -> None:
    requests = [
        request("generate_until", "One, two,", {"until": [","], "max_gen_toks": 9}),
        request("generate_until", "Once upon a", {"until": ["\n"], "max_gen_toks": 3}),
        request("generate_until", "One, two,", {"until": ["\n"], "max_gen_toks": 3}),
    ]
    found = lm.generate_until(requests)
    assert found == [
        plain.greedy("One, two,", ",", 9),
        plain.greedy("Once upon a", "\n", 3),
        plain.greedy("One, two,", "\n", 3),
    ]
    assert requests[0].args[1]["until"] == [","], "what was asked stays as it is"


def test_padded_rows_count_as_they_do_for_everybody_who_takes_the_harness(tmp_path: Path, teacher_folder: str) -> None:
    folder = make_tiny_model(tmp_path, rows=TOKENS + 64, context=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[TOKENS:] = 5 * model.get_output_embeddings().weight[:64]
    model.save_pretrained(folder)
    lm = TransformersModel(
        StudentConfig(model=folder), tokenizer=teacher_folder, dtype=torch.float32, device="cpu", field="x"
    )
    inputs = torch.tensor([lm.tok_encode("Hello")])
    written = model.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, inputs.shape[1] :]
    assert int(written.max()) >= TOKENS
    (text,) = lm.generate_until([request("generate_until", "Hello", {"until": [], "max_gen_toks": 12})])
    assert text == lm.tokenizer.decode(written), "they are written, and are no text"
    ((logprob, _),) = lm.loglikelihood([request("loglikelihood", "Hello", " you")])
    whole = lm.tok_encode("Hello you")
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, :-1].double()
    first = len(lm.tok_encode("Hello"))
    expected, without = (
        sum(float(rows.log_softmax(-1)[i - 1, whole[i]]) for i in range(first, len(whole)))
        for rows in (logits, logits[:, :TOKENS])
    )
    assert logprob == pytest.approx(expected, abs=1e-3)
    assert logprob < without - 1.0, "they take probability"
    lm.close()


def test_a_prompt_has_half_of_the_model_at_least(lm: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []

    def generate(context: torch.Tensor, max_length: int, **_: Any) -> torch.Tensor:
        given.append((context.shape[1], max_length - context.shape[1]))
        return context

    monkeypatch.setattr(lm, "_model_generate", generate)
    assert lm.max_length == 1024
    for count, most in ((3000, 2000), (3, 2000), (3, 20)):
        lm.generate_until([request("generate_until", "word " * count, {"until": [], "max_gen_toks": most})])
    short = len(lm.tok_encode("word " * 3))
    assert given == [(512, 512), (short, 512), (short, 20)]


def test_what_the_harness_would_stop_at(lm: TransformersModel, plain: Plain) -> None:
    """No continuation, a context of blanks alone, and a continuation longer than the model."""
    words = " ".join(str(i) for i in range(700))
    tokens = plain.tokenizer(words)["input_ids"]
    assert len(tokens) > lm.max_length
    start = plain.tokenizer.eos_token_id
    answers = lm._loglikelihood_tokens(
        [(("a", ""), [17], []), (("  ", "b"), [], tokens[:3]), (("a", words), [start], list(tokens))]
    )
    blank = plain.logprobs([start, *tokens[:3]])
    cut = tokens[-lm.max_length - 1 :]
    logprobs = plain.logprobs(cut)
    assert answers[0] == (0.0, True)
    assert answers[1][0] == pytest.approx(sum(float(blank[i, token]) for i, token in enumerate(tokens[:3])), abs=1e-3)
    expected = sum(float(logprobs[i, token]) for i, token in enumerate(cut[1:]))
    assert answers[2][0] == pytest.approx(expected, rel=1e-5)


def test_the_same_text_split_at_several_places(lm: TransformersModel, plain: Plain) -> None:
    """It shares a forward pass; of each split its own continuation is judged."""
    tokens = plain.tokenizer("def add(a, b):\n    return a + b")["input_ids"]
    splits = (2, 3, len(tokens) - 1)
    found = lm._loglikelihood_tokens([(("a", "b"), tokens[:split], tokens[split:]) for split in splits])
    logprobs = plain.logprobs(tokens)
    expected = [sum(float(logprobs[i - 1, tokens[i]]) for i in range(split, len(tokens))) for split in splits]
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-3)


def test_text_is_greedy_whatever_the_models_folder_asks_for(tmp_path: Path, teacher_folder: str) -> None:
    folder = Path(make_tiny_model(tmp_path / "model", rows=TOKENS, context=64))
    asked = {"do_sample": True, "temperature": 9.0, "top_k": 50, "max_new_tokens": 3, "eos_token_id": None}
    texts = []
    for settings in ({}, asked):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        lm = TransformersModel(
            StudentConfig(model=str(folder)), tokenizer=teacher_folder, dtype=torch.float32, device="cpu", field="x"
        )
        texts.append(lm.generate_until([request("generate_until", "Hello", {"until": [], "max_gen_toks": 12})]))
        lm.close()
    assert texts[0] == texts[1]
    assert len(texts[0][0]) > 12


def test_progress_is_told_of_every_request(teacher_folder: str) -> None:
    heard: list[int] = []
    lm = TransformersModel(
        StudentConfig(model=teacher_folder),
        tokenizer=teacher_folder,
        dtype=torch.float32,
        device="cpu",
        field="x",
        on_progress=heard.append,
    )
    lm.loglikelihood([request("loglikelihood", "2 + 2 =", f" {i}") for i in range(5)])
    lm.generate_until([request("generate_until", "One", {"until": ["\n"], "max_gen_toks": 2})] * 2)
    lm.loglikelihood_rolling([request("loglikelihood_rolling", "One, two")])
    lm.close()
    assert sum(heard) == 8


def test_threads_are_given_back(teacher_folder: str) -> None:
    before = torch.get_num_threads()
    lm = TransformersModel(
        StudentConfig(model=teacher_folder), tokenizer=teacher_folder, dtype=torch.float32, device="cpu", field="x"
    )
    lm.close()
    assert torch.get_num_threads() == before


def test_pickled_weights_are_not_loaded(tmp_path: Path, teacher_folder: str) -> None:
    folder = Path(make_tiny_model(tmp_path / "model", rows=TOKENS, context=64))
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"the student '.*' cannot be loaded"):
        TransformersModel(
            StudentConfig(model=str(folder)),
            tokenizer=teacher_folder,
            dtype=torch.float32,
            device="cpu",
            field="the student",
        )
