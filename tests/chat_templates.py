"""Chat templates of models, shortened: what concerns their thoughts, or their calls, is as they have it."""

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
MINISTRAL = """\
{%- for message in messages %}{% if message['role'] == 'user' %}[INST]{{ message['content'] }}[/INST]
    {%- elif message['content'] is string and message['content'] != '' %}{{ message['content'] + '</s>' }}
    {%- else %}{% for block in message['content'] %}
        {%- if block['type'] == 'text' %}{{ block['text'] }}
        {%- elif block['type'] == 'thinking' %}{{ '[THINK]' + block['thinking'] + '[/THINK]' }}{% endif %}
    {%- endfor %}{{ '</s>' }}{% endif %}
{%- endfor %}"""
LLAMA_3 = """\
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content']|trim %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- date_string + system_message }}{{ '"parameters": ' + (tools | tojson) + 'ipython' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '\n<' + message.role + '>' + message['content'] }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '\n{"name": "' + tool_call.name + '", "parameters": ' + (tool_call.arguments | tojson) + '}' }}
    {%- else %}{{ '\n<ipython>' + message.content }}{% endif %}
{%- endfor %}"""
MISTRAL_NEMO = """\
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {{- "[AVAILABLE_TOOLS]" + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {{- "[INST]" + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined %}{{ "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}{{ (tool_call.function|tojson)[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' + ("]" if loop.last else ", ") }}
        {%- endfor %}
    {%- elif message["role"] == "tool" %}
        {%- if message.tool_call_id|length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}{{ message["content"] }}{% endif %}
{%- endfor %}"""
FUNCTIONARY = """\
{{ tools | tojson }}{% for m in messages %}{% for call in m.tool_calls or [] %}
    {{- '>>>' + call.function.name + '\n' + call.function.arguments }}{% endfor %}{{ m.content }}
{%- endfor %}"""
GRANITE_3 = """\
{%- if tools and not available_tools -%}{%- set available_tools = tools -%}{%- endif -%}
{{ "respond only with <|tool_call|> followed by a JSON list of tools used. " }}
{%- if available_tools %}{{ available_tools | tojson }}{% endif %}
{%- if documents %}{{ documents[0].text }}{% endif %}
{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"""
QWEN3_CODER = """\
{%- if tools %}{{ '<tool_call>\\n<function=example>\\n<parameter=x>\\nvalue\\n</parameter>' }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content is string and message.content | trim | length > 0 %}
            {{- '\\n' + message.content | trim + '\\n' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}{% set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
            {%- for args_name, args_value in tool_call.arguments|items %}
                {{- '<parameter=' + args_name + '>\\n' }}
                {%- set listed = args_value is sequence and args_value is not string %}
                {%- set nested = listed or args_value is mapping %}
                {{- args_value | tojson | safe if nested else args_value | string }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}"""
SEED_OSS = """\
{%- if tools %}{{ tools }}<seed:tool_call>\\n<function=example>{% endif %}
{%- for message in messages %}{{ '<seed:bos>' + message.role }}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}{% set tool_call = tool_call.function %}
            {{- "\\n<seed:tool_call>\\n<function=" + tool_call.name + ">\\n" }}
            {%- for arg_name, arg_value in tool_call.arguments | items %}
                {{- "<parameter=" + arg_name + ">" }}
                {%- set arg_value = arg_value if arg_value is string else arg_value | string %}
                {{- arg_value+"</parameter>\\n" }}
            {%- endfor %}
            {{- "</function>\\n</seed:tool_call>" }}
        {%- endfor %}
    {%- else %}{{ '\\n' + message.content }}{% endif %}{{ '<seed:eos>' }}
{%- endfor %}"""
GLM_45 = """\
{%- if tools %}
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
</tool_call>{% endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content }}
    {%- for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}
        {{- '\\n<tool_call>' + tool_call.name + '\\n' }}
        {%- for k, v in tool_call.arguments.items() %}
            {{- '<arg_key>' ~ k ~ '</arg_key>\\n<arg_value>' }}
            {{- (v | tojson(ensure_ascii=False) if v is not string else v) ~ '</arg_value>\\n' }}
        {%- endfor %}
        {{- '</tool_call>' }}
    {%- endfor %}
{%- endfor %}<|user|>"""
GLM_47 = """\
{%- if tools %}<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>...</tool_call>{% endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content }}
    {%- for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}
        {{- '<tool_call>' + tool_call.name }}
        {%- for k, v in tool_call.arguments.items() %}
            {{- '<arg_key>' ~ k ~ '</arg_key><arg_value>' }}
            {{- (v | tojson(ensure_ascii=False) if v is not string else v) ~ '</arg_value>' }}
        {%- endfor %}
        {{- '</tool_call>' }}
    {%- endfor %}
{%- endfor %}<|user|>"""
OLMO_3 = """\
{%- if tools %}<function_calls></function_calls>{% endif %}
{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message.get('content', none) is not none -%}{{- message['content'] -}}{%- endif -%}
    {%- if message.get('tool_calls', none) is not none %}{{- '<function_calls>' -}}
        {%- for tool_call in message['tool_calls'] %}{%- set args = tool_call['function']['arguments'] -%}
            {%- set ns = namespace(arguments_list=[]) -%}
            {%- for key, value in args.items() -%}
                {%- set ns.arguments_list = ns.arguments_list + [key ~ '=' ~ (value | tojson)] -%}
            {%- endfor -%}
            {{- tool_call['function']['name'] + '(' + ns.arguments_list | join(', ') + ')' -}}
            {%- if not loop.last -%}{{ '\\n' }}{%- endif -%}
        {%- endfor %}{{- '</function_calls>' -}}
    {%- endif -%}{{- '<|im_end|>\\n' -}}
{%- endfor %}"""
DEEPSEEK_V31 = """\
{%- if tools %}<｜tool▁calls▁begin｜>{% endif %}
{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + message['content'] -}}
    {%- for tool in message['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' if loop.first }}
        {{- '<｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' }}
        {{- tool['function']['arguments']|tojson + '<｜tool▁call▁end｜>'}}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' if loop.last }}
    {%- endfor %}
{%- endfor %}"""
DEEPSEEK_R1_WITH_TOOLS = """\
{%- if tools %}{{ '<｜tool▁calls▁begin｜>\\n```json\\n' }}{% endif %}
{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + message['content'] -}}
    {%- for tool in message['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' }}
        {{- tool['function']['arguments']|tojson + '\\n' + '```' + '<｜tool▁call▁end｜>' }}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' if loop.last }}
    {%- endfor %}
{%- endfor %}"""
HARMONY = """\
{{- "<|start|>system<|message|>Reasoning: " + (reasoning_effort | default("medium")) + "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set developer_message = messages[0].content %}{% set loop_messages = messages[1:] %}
{%- else %}{% set developer_message = "" %}{% set loop_messages = messages %}{% endif %}
{%- if developer_message or tools %}{{ "<|start|>developer<|message|>" + developer_message }}
    {%- for tool in tools or [] %}{% set tool = tool.function %}
        {{- "// " + tool.description + "\\n" + "type "+ tool.name }}
    {%- endfor %}{{ "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' and "tool_calls" in message %}
        {%- set future_final_message = namespace(found=false) %}
        {%- for future_message in loop_messages[loop.index:] %}
            {%- if future_message.role == 'assistant' and "tool_calls" not in future_message %}
                {%- set future_final_message.found = true %}
            {%- endif %}
        {%- endfor %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if message.content and message.thinking %}
            {{- raise_exception("Cannot pass both content and thinking in a message with tool calls!") }}
        {%- elif message.content and not future_final_message.found %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>" }}
        {%- elif message.thinking and not future_final_message.found %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant to=functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}
        {{- tool_call.arguments|tojson + "<|call|>" }}
        {%- set last_tool_call.name = tool_call.name %}
    {%- elif message.role == 'assistant' and loop.last and not add_generation_prompt %}
        {%- if "thinking" in message %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
    {%- elif message.role == 'assistant' %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- set last_tool_call.name = none %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}
            {{- raise_exception("Message has tool role, but there was no previous call!") }}
        {%- endif %}
        {{- "<|start|>functions." + last_tool_call.name }}
        {{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
