"""Chat templates of current model families, written for these tests after the formats that their makers document (none is copied).

Each `Case` holds a template and what one conversation must come to: where the prompt ends (boilerplate included) and what the labels are, for
the answer "I can't help." after the prompt "How?" . `end` is the end of turn that the model must learn to write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ANSWER = "I can't help."


@dataclass(frozen=True)
class Case:
    template: str
    prompt: str  # what the rendered prompt ends in
    end: str  # what labels end in, behind the answer
    options: dict[str, Any] = field(default_factory=dict)


def turns(user: str, assistant: str, generate: str, *, system: str = "", opening: str = "", closing: str = "") -> str:
    """A template whose turns are strings with a `%s` for the content."""

    def write(pattern: str) -> str:
        left, right = pattern.split("%s")
        return f"{{{{ {left!r} + m.content + {right!r} }}}}" if "|trim" not in pattern else ""

    told = f"{{% elif m.role == 'system' %}}{write(system)}" if system else ""
    return (
        f"{opening}{{% for m in messages %}}{{% if m.role == 'user' %}}{write(user)}{told}"
        f"{{% elif m.role == 'assistant' %}}{write(assistant)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {generate!r} }}}}{{% endif %}}{closing}"
    )


CHATML = turns(
    "<|im_start|>user\n%s<|im_end|>\n", "<|im_start|>assistant\n%s<|im_end|>\n", "<|im_start|>assistant\n",
    system="<|im_start|>system\n%s<|im_end|>\n",
)  # fmt: skip

QWEN3 = """\
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.last -%}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else -%}{{ content }}{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""

GLM45 = """\
[gMASK]<sop>
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|user|>\n' + m.content }}
{%- if enable_thinking is defined and not enable_thinking and not m.content.endswith('/nothink') -%}{{ '/nothink' }}{%- endif -%}
{%- elif m.role == 'system' -%}{{ '<|system|>\n' + m.content }}
{%- else -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{ '<|assistant|>\n<think>' + thought.strip() + '</think>' }}{%- if content.strip() -%}{{ '\n' + content.strip() }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '\n<think></think>' }}{%- endif -%}
{%- endif -%}"""

GPT_OSS = """\
{{- '<|start|>system<|message|>You are a large language model.\nCurrent date: ' + strftime_now('%Y-%m-%d') -}}
{{- '\n\nReasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') + '<|end|>' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'system' -%}{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}
{%- else -%}
{%- if '<|channel|>' in m.content -%}{{ raise_exception('channels belong into fields') }}{%- endif -%}
{%- if loop.last and not add_generation_prompt -%}
{%- if m.thinking -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""

DEEPSEEK_R1 = """\
{{- '<｜begin▁of▁sentence｜>' -}}
{%- for m in messages if m.role == 'system' -%}{{ m.content }}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' -%}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}"""

DEEPSEEK_V31 = """\
{%- if thinking is not defined -%}{%- set thinking = false -%}{%- endif -%}
{{- '<｜begin▁of▁sentence｜>' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' -%}{{ '<｜Assistant｜></think>' }}
{%- set content = m.content -%}{%- if '</think>' in content -%}{%- set content = content.split('</think>', 1)[1] -%}{%- endif -%}
{{ content + '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif -%}"""

LLAMA3 = """\
{{- bos_token -}}
{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' -}}
{%- if messages[0].role == 'system' -%}{{ messages[0].content | trim }}{%- endif -%}{{ '<|eot_id|>' }}
{%- for m in messages if m.role != 'system' -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""

LLAMA2 = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' -%}{{ ' ' + m.content | trim + ' </s>' }}{%- endif -%}
{%- endfor -%}"""

GEMMA = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

SMOLLM3 = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') -}}
{{- '\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- if enable_thinking -%}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n') }}{%- endif -%}"""

VISION = """\
{{- '<|im_start|>' -}}
{%- for m in messages -%}
{{ m.role | capitalize + (':' if m.content[0]['type'] == 'image' else ': ') }}
{%- for part in m.content -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- elif part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}
{%- endfor -%}
{{ '<end_of_utterance>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

GENERATION = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>assistant\n' }}{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

OLMO3 = turns(
    "<|im_start|>user\n%s<|im_end|>\n", "<|im_start|>assistant\n%s<|im_end|>\n", "<|im_start|>assistant\n<think>",
    opening="{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}",
)  # fmt: skip

CASES: dict[str, Case] = {
    "qwen2.5": Case("{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}" + CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "qwen3": Case(QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3 without thinking": Case(
        QWEN3, "assistant\n<think>\n\n</think>\n\n", "<|im_end|>", options={"enable_thinking": False}
    ),
    "glm-4.5": Case(GLM45, "<|assistant|>\n<think></think>\n", ""),
    "glm-4.5 without thinking": Case(
        GLM45, "How?/nothink<|assistant|>\n<think></think>\n", "", options={"enable_thinking": False}
    ),
    "glm-4": Case(
        turns("<|user|>\n%s", "<|assistant|>\n%s", "<|assistant|>", opening="[gMASK]<sop>"), "<|assistant|>\n", ""
    ),
    "gpt-oss": Case(GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    "gpt-oss high": Case(
        GPT_OSS, "<|channel|>final<|message|>", "<|return|>", options={"reasoning_effort": "high"}
    ),
    "deepseek-v3": Case(
        DEEPSEEK_R1.replace("<think>\\n", ""), "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
    ),
    "deepseek-r1": Case(DEEPSEEK_R1, "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-v3.1": Case(DEEPSEEK_V31, "<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    "deepseek-v3.1 thinking": Case(
        DEEPSEEK_V31, "<｜Assistant｜></think>", "<｜end▁of▁sentence｜>", options={"thinking": True}
    ),
    "llama-2": Case(LLAMA2, "How? [/INST] ", " </s>"),
    "llama-3": Case(LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama-3 of another day": Case(
        LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", options={"date_string": "26 Jul 2024"}
    ),
    "llama-4": Case(
        turns(
            "<|header_start|>user<|header_end|>\n\n%s<|eot|>", "<|header_start|>assistant<|header_end|>\n\n%s<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n", opening="<|begin_of_text|>",
        ),
        "<|header_start|>assistant<|header_end|>\n\n",
        "<|eot|>",
    ),
    "mistral": Case(turns("[INST] %s[/INST]", " %s</s>", "", opening="<s>"), "How?[/INST] ", "</s>"),
    "mistral-small-3": Case(
        turns(
            "[INST]%s[/INST]", "%s</s>", "", system="[SYSTEM_PROMPT]%s[/SYSTEM_PROMPT]",
            opening="<s>{{ '[SYSTEM_PROMPT]You are Mistral. Today is ' + strftime_now('%Y-%m-%d') + '[/SYSTEM_PROMPT]' }}",
        ),
        "[INST]How?[/INST]",
        "</s>",
    ),
    "gemma": Case(GEMMA, "<start_of_turn>model\n", "<end_of_turn>"),
    "phi-3": Case(
        turns(
            "<|user|>\n%s<|end|>\n", "<|assistant|>\n%s<|end|>\n", "<|assistant|>\n",
            closing="{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}",
        ),
        "<|assistant|>\n",
        "<|end|>",
    ),
    "phi-4": Case(
        turns(
            "<|im_start|>user<|im_sep|>%s<|im_end|>", "<|im_start|>assistant<|im_sep|>%s<|im_end|>", "<|im_start|>assistant<|im_sep|>"
        ),
        "<|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "command-r": Case(
        turns(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>%s<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>%s<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", opening="<BOS_TOKEN>",
        ),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "command-a": Case(
        turns(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>%s<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>%s<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", opening="<BOS_TOKEN>",
        ),
        "<|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "<|END_RESPONSE|>",
    ),
    "smollm3": Case(SMOLLM3, "/think<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "smollm3 without thinking": Case(
        SMOLLM3, "<think>\n\n</think>\n", "<|im_end|>", options={"enable_thinking": False}
    ),
    "olmo-2": Case(
        turns("<|user|>\n%s\n", "<|assistant|>\n%s<|endoftext|>", "<|assistant|>\n", opening="<|endoftext|>"),
        "<|user|>\nHow?\n<|assistant|>\n",
        "<|endoftext|>",
    ),
    "olmo-3 thinking": Case(OLMO3, "<|im_start|>assistant\n", "<|im_end|>"),
    "granite": Case(
        turns(
            "<|start_of_role|>user<|end_of_role|>%s<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>%s<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "kimi-k2": Case(
        turns(
            "<|im_user|>user<|im_middle|>%s<|im_end|>", "<|im_assistant|>assistant<|im_middle|>%s<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        "<|im_assistant|>assistant<|im_middle|>",
        "<|im_end|>",
    ),
    "minimax-m2": Case(
        turns("]~b]user\n%s[e~[\n", "]~b]ai\n%s[e~[\n", "]~b]ai\n<think>\n", opening="]~!b[]~b]system\nHelp.[e~[\n"),
        "]~b]ai\n",
        "[e~[",
    ),
    "ernie-4.5": Case(
        turns("User: %s\n", "Assistant: %s<|end_of_sentence|>", "Assistant: ", opening="<|begin_of_sentence|>"),
        "User: How?\nAssistant: ",
        "<|end_of_sentence|>",
    ),
    "hunyuan": Case(
        turns(
            "<｜hy_User｜>%s", "<｜hy_Assistant｜><think>\n\n</think>\n<answer>\n%s\n</answer><｜hy_place▁holder▁no▁2｜>", "<｜hy_Assistant｜>",
            opening="<｜hy_begin▁of▁sentence｜>",
        ),
        "<think>\n\n</think>\n<answer>\n",
        "\n</answer>",
    ),
    "falcon-3": Case(
        turns("<|user|>\n%s\n", "<|assistant|>\n%s<|endoftext|>", "<|assistant|>\n"), "<|assistant|>\n", "<|endoftext|>"
    ),
    "zephyr": Case(turns("<|user|>\n%s</s>\n", "<|assistant|>\n%s</s>\n", "<|assistant|>\n"), "<|assistant|>\n", "</s>"),
    "vicuna": Case(
        turns("USER: %s ", "ASSISTANT: %s</s>", "ASSISTANT:", opening="A chat. "), "USER: How? ASSISTANT: ", "</s>"
    ),
    "alpaca": Case(
        turns("### Instruction:\n%s\n\n", "### Response:\n%s\n\n", "### Response:\n"), "### Response:\n", ""
    ),
    "smolvlm": Case(VISION, "User: How?<end_of_utterance>\nAssistant: ", "<end_of_utterance>"),
    "generation marks": Case(GENERATION, "<|im_start|>assistant\n", "<|im_end|>"),
    "qwen3 thinking": Case(
        QWEN3.replace("{%- if enable_thinking is defined and enable_thinking is false -%}", "{%- if false -%}")
        + "{%- if add_generation_prompt -%}{{ '<think>\n' }}{%- endif -%}",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "header ignored": Case(
        turns("<|user|>%s<|end|>\n", "<|assistant|>%s<|end|>\n", ""), "<|user|>How?<|end|>\n<|assistant|>", "<|end|>"
    ),
}  # fmt: skip

# Tokens that the tokenizers of these models know, so that each is one token.
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>", "<|message|>", "<|channel|>",
    "<|return|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "</s>", "<s>", "[INST]", "[/INST]",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|begin_of_text|>",
    "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|USER_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<BOS_TOKEN>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
    "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "]~b]", "]~!b[", "[e~[", "<|end_of_sentence|>", "<|begin_of_sentence|>",
    "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
]  # fmt: skip
