"""Chat templates of models that think, shortened: what concerns their thoughts is as they have it."""

from __future__ import annotations

QWEN3 = """\
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set parts = content.split('</think>') %}
            {%- set reasoning_content = parts[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = parts[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last or reasoning_content %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
DEEPSEEK_R1 = """\
{%- for message in messages %}{% set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + content + '<|im_end|>' }}
    {%- else %}{{ '<|User|>' + content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""
MAGISTRAL = """\
[SYSTEM_PROMPT]First draft your thinking process: [THINK]Your thoughts[/THINK]Here, provide a response.\
[/SYSTEM_PROMPT]{% for message in messages %}
    {%- if message.role == 'user' %}[INST]{{ message.content }}[/INST]
    {%- else %}{{ message.content }}{% endif %}
{%- endfor %}"""
GPT_OSS = """\
Reasoning: {{ reasoning_effort }}{% for m in messages %}{{ m.thinking }}|{{ m.content }}{% endfor %}"""
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
