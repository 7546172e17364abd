"""Chat templates in the shapes that public models have, written here, each also with marks of what is generated.

`{G}` and `{/G}` stand where `{% generation %}` and `{% endgeneration %}` would: without them a template is as most
models ship it, with them transformers itself says which tokens the assistant wrote.
"""

from __future__ import annotations

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\n# Tools\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{G}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>{/G}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'system' %}Today is {{ strftime_now('%d %b %Y') }}.\n\n{% endif %}"
    "{% if m.role == 'assistant' %}{G}{{ m.content | trim }}<|eot_id|>{/G}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set said = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {% if loop.first %}{{ said }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{G} {{ m.content }}{{ eos_token }}{/G}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}{G}{{ m.content | trim }}<end_of_turn>{/G}{{ '\n' }}"
    "{% else %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THOUGHTS = (  # an empty thought before the last answer, none before others; and thoughts that were had are dropped
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{G}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ said }}<|im_end|>{/G}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (  # no control tokens at all
    "{% for m in messages %}### {{ m.role }}:\n{% if m.role == 'assistant' %}{G}{{ m.content }}\n\n{/G}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
COUNTED = (  # the turns before depend on how many come after
    "{% for m in messages %}{{ messages | length }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length }} assistant: {% endif %}"
)
DROPPED = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)

TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "headers": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "inst": ["<s>", "</s>", "[INST]", "[/INST]"],
    "turns": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "thoughts": ["<|im_start|>", "<|im_end|>"],
    "plain": [],
}
"""Special tokens of each shape; the first is BOS where the template writes one."""
SHAPES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "inst": INST,
    "turns": TURNS,
    "thoughts": THOUGHTS,
    "plain": PLAIN,
}


def without_marks(template: str) -> str:
    return template.replace("{G}", "").replace("{/G}", "")


def with_marks(template: str) -> str:
    return template.replace("{G}", "{% generation %}").replace("{/G}", "{% endgeneration %}")
