"""A folder of questions as `ddk eval --data` reads them: a few of every task, written for the tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

_ARC: Rows = [
    {"query": "Question: What do bees make?", "choices": ["honey", "milk", "wool", "iron"], "gold": 0},
    {"query": "Question: Which of these is hot?", "choices": ["ice", "snow", "the sun"], "gold": 2},
    {"query": "Question: What falls from clouds?", "choices": ["rain", "sand", "bread", "glass"], "gold": 0},
]
_ADD = 'def add(a, b):\n    """Sum of a and b."""\n'
_NEGATE = 'def negate(a):\n    """The number with the other sign."""\n'
FILES: dict[str, Rows] = {
    "arc_easy.jsonl": _ARC,
    # As on the hub.
    "arc_challenge_test.jsonl": [
        {
            "question": "Where do fish live?",
            "choices": {"text": ["in water", "in trees"], "label": ["1", "2"]},
            "answerKey": "1",
        },
    ],
    "commonsense_qa.jsonl": [
        {"query": "Where is bread baked?", "choices": ["lake", "oven", "field", "roof", "sky"], "gold": 1},
    ],
    "openbook_qa.jsonl": [
        {"query": "A magnet pulls", "choices": ["paper", "an iron nail", "wood", "glass"], "gold": 1},
    ],
    "piqa.jsonl": [
        {"query": "Question: How do I boil water?\n", "choices": ["Heat it.", "Freeze it."], "gold": 0},
    ],
    "winogrande.jsonl": [
        {
            "context_options": ["The cup fell off the table so the cup", "The cup fell off the table so the table"],
            "continuation": "broke.",
            "gold": 0,
        },
    ],
    "hellaswag_val_even.jsonl.gz": [
        {
            "query": "Baking: A man opens the oven. he",
            "choices": ["takes out bread.", "swims.", "sings.", "flies."],
            "gold": 0,
        },
    ],
    "mmlu_test.jsonl.gz": [
        {"subject": "anatomy", "query": "How many lungs?", "choices": ["1", "2", "3", "4"], "gold": 1},
        {"subject": "anatomy", "query": "How many hearts?", "choices": ["1", "2", "3", "4"], "gold": 0},
        {
            "subject": "astronomy",
            "query": "What is the sun?",
            "choices": ["a moon", "a star", "a rock", "a"],
            "gold": 1,
        },
    ],
    "mmlu_dev.jsonl": [
        {"subject": "anatomy", "query": "How many noses?", "choices": ["1", "2", "3", "4"], "gold": 0},
        {"subject": "astronomy", "query": "What is Mars?", "choices": ["a sea", "a star", "a planet", "a"], "gold": 2},
    ],
    "gsm8k_test.jsonl": [
        {"question": "Two and three?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        {"question": "Four and one?", "answer": "4+1=<<4+1=5>>5\n#### 5"},
        {"question": "Ten less one?", "answer": "10-1=<<10-1=9>>9\n#### 9"},
    ],
    "mgsm_zh.jsonl": [{"question": "三加四等于多少？", "answer": "7"}],
    "xcopa_zh_test.jsonl": [
        {"premise": "他很饿。", "choice1": "他吃了饭。", "choice2": "他睡了。", "question": "effect", "label": 0},
    ],
    "agieval_gaokao_physics.jsonl": [
        {"passage": None, "question": "力的单位是", "options": ["(A)牛顿", "(B)米", "(C)秒", "(D)克"], "label": "A"},
    ],
    "agieval_gaokao_mathqa.jsonl": [
        {"passage": "题：", "question": "偶数有", "options": ["(A)1", "(B)2", "(C)3", "(D)4"], "label": "B D"},
    ],
    "c3.jsonl": [
        {
            "context": ["男：你好。", "女：再见。"],
            "question": "谁先说话？",
            "choice": ["男的", "女的"],
            "answer": "男的",
        },
    ],
    "own_questions.jsonl": [
        {"query": "2 + 3 =", "choices": ["5", "6"], "gold": 0, "concept": "arithmetic/addition"},
        {"query": "2 + 4 =", "choices": ["5", "6"], "gold": 1, "concept": "arithmetic/addition"},
        {"query": "2 * 3 =", "choices": ["5", "6"], "gold": 1, "concept": "arithmetic/multiplication"},
        {"query": "After 3 comes", "choices": ["4", "2"], "gold": 0, "concept": "order"},
    ],
    "humaneval.jsonl": [
        {
            "task_id": "HumanEval/0",
            "prompt": _ADD,
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        },
        {
            "task_id": "HumanEval/1",
            "prompt": _NEGATE,
            "entry_point": "negate",
            "canonical_solution": "    return -a\n",
            "test": "def check(candidate):\n    assert candidate(1) == -1\n",
        },
    ],
    "mbpp.jsonl": [
        {
            "task_id": number,
            "text": f"Write a function that adds {number}.",
            "code": f"def add_{number}(x):\r\n    return x + {number}",
            "test_setup_code": "",
            "test_list": [f"assert add_{number}({i}) == {i + number}" for i in range(3)],
        }
        for number in (1, 2, 3, 4, 11, 510, 511)
    ],
}
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "长江很长。",
                    "qas": [{"id": "1", "question": "什么很长？", "answers": [{"text": "长江", "answer_start": 0}]}],
                }
            ]
        }
    ]
}


def write_files(folder: Path, *names: str) -> str:
    """Write those files, or all of them; returns the folder."""
    for name in names or (*FILES, "xquad_zh.json.gz"):
        # On several lines, as SQuAD's files are.
        text = (
            json.dumps(SQUAD, indent=1) if name.startswith("xquad") else "\n".join(map(json.dumps, FILES[name])) + "\n"
        )
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(folder)
