from __future__ import annotations

import numpy as np
import transformers

from tasks.evaluation.long_texts import long_sequences, passkeys
from tasks.packing.encoder import TextEncoder
from tasks.planning.text_ends import TextEnds

ENDS = TextEnds(bos_ids=(1,), eos_id=2, said="")


def documents(*lengths: int) -> list[np.ndarray]:
    return [np.arange(100 * number + 10, 100 * number + 10 + n, dtype=np.int32) for number, n in enumerate(lengths)]


def test_long_documents_come_first_and_short_ones_fill_sequences_from_their_beginnings() -> None:
    found = long_sequences(documents(3, 20, 4, 9, 2, 30), ENDS, 10, 8)
    assert found is not None
    assert found.whole == 3
    # BOS, then the document: of the second, the fourth (9 tokens with its two ends are 11) and the last.
    np.testing.assert_array_equal(found.tokens_NL1[0], [1, *range(110, 120)])
    np.testing.assert_array_equal(found.tokens_NL1[1], [1, *range(310, 319), 2])
    np.testing.assert_array_equal(found.tokens_NL1[2], [1, *range(510, 520)])
    # The first and the third, and what is left is too short for another.
    np.testing.assert_array_equal(found.tokens_NL1[3], [1, 10, 11, 12, 2, 1, 210, 211, 212, 213, 2])
    assert len(found.tokens_NL1) == 4

    fewer = long_sequences(documents(20, 20, 20), ENDS, 10, 2)
    assert fewer is not None
    assert (len(fewer.tokens_NL1), fewer.whole) == (2, 2)
    assert long_sequences(documents(3, 2), ENDS, 10, 8) is None


def test_a_passkey_lies_at_every_depth_of_a_text_of_that_length(teacher_folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_folder)
    encode = TextEncoder(tokenizer, control=False)
    found = passkeys(encode, (0,), 512, 5, seed=3)
    assert len(found) == 5
    depths = []
    for one in found:
        length = len(one.prompt) + len(one.answer)
        assert 440 < length <= 512
        prompt, answer = tokenizer.decode(one.prompt[1:]), tokenizer.decode(one.answer).strip()
        assert one.prompt[0] == 0
        assert len(answer) == 5
        assert prompt.count(answer) == 2
        assert (prompt + tokenizer.decode(one.answer)).endswith(f"What is the pass key? The pass key is {answer}")
        depths.append(prompt.index(answer) / len(prompt))
    assert depths == sorted(depths)
    assert depths[0] < 0.2
    assert depths[-1] > 0.75
    assert passkeys(encode, (0,), 512, 5, seed=3) == found
    assert passkeys(encode, (0,), 512, 5, seed=4) != found
    assert passkeys(encode, (0,), 96, 5, seed=3) == []
