"""Chat templates by name, in Jinja, for models that come without one."""

from __future__ import annotations

from typing import NamedTuple


class Template(NamedTuple):
    """A chat template that comes with jaxspec."""

    text: str
    tokens: tuple[str, ...] = ()
    """Control tokens that it writes besides `bos_token` and `eos_token`; the last one ends an answer."""


BARE = (
    "{% for m in messages %}"
    "{% if m.role != ('user', 'assistant')[loop.index0] %}"
    "{{ raise_exception('without a chat template a conversation is one user turn, and its answer') }}"
    "{% endif %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
)
"""The template of base models, which have none: raw text that is continued."""

# FastChat's v1.1, of Vicuna 1.1 to 1.5: a separator behind the question is a space, behind the answer the end token.
_VICUNA = """\
{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the user's questions." -%}
{%- for message in messages -%}
  {%- if loop.first -%}
    {{- bos_token -}}
    {{- (message['content'] if message['role'] == 'system' else system) + ' ' -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + message['content'] + ' ' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'ASSISTANT: ' + message['content'] + eos_token -}}
  {%- elif not (loop.first and message['role'] == 'system') -%}
    {{- raise_exception('vicuna has no place for a message of role ' + message['role'] + ' here') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if not messages -%}
    {{- bos_token -}}
    {{- system + ' ' -}}
  {%- endif -%}
  {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

# Meta's: begin and end tokens stand around each question with its answer, the system prompt inside the first question.
_LLAMA_2_CHAT = """\
{%- set told = messages[0]['content'] if messages and messages[0]['role'] == 'system' else none -%}
{%- for message in (messages if told is none else messages[1:]) -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('llama-2-chat has the roles user and assistant in turn, behind at most one system message') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {%- set ask = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' if loop.first and told is not none else '' -%}
    {{- bos_token -}}
    {{- '[INST] ' + (ask + message['content']) | trim + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

_LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

TEMPLATES = {
    "vicuna": Template(_VICUNA),
    "llama-2-chat": Template(_LLAMA_2_CHAT),
    "llama-3": Template(_LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": Template(_CHATML, ("<|im_start|>", "<|im_end|>")),
}
