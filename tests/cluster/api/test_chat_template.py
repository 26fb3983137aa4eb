"""The same templates, rendered by transformers and by us."""

from __future__ import annotations

import json

import pytest

from cluster.api.chat_template import ChatTemplate
from cluster.errors import ConfigError, RequestError

MESSAGES = [{"role": "user", "content": "<b> & 'é'"}, {"role": "assistant", "content": "two\nlines"}]
TEMPLATES = {
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "variables": "{{ bos_token }}{{ thinking }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name):
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<s>", "thinking": False}
    expected, _ = reference.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **variables
    )
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"})
    assert template.render(MESSAGES, {"thinking": False}) == expected[0]


def test_a_template_may_refuse_messages_in_its_own_words():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render(MESSAGES, {})
    assert caught.value.field == "messages"


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 + 'a' }}"])
def test_what_a_template_may_not_do_is_the_requests_error(source):
    with pytest.raises(RequestError):
        ChatTemplate(source, {}).render(MESSAGES, {})


def test_messages_cannot_be_overridden_by_variables():
    assert ChatTemplate("{{ messages | length }}", {}).render(MESSAGES, {"messages": []}) == "2"


def test_a_template_that_is_no_jinja_stops_the_start():
    with pytest.raises(ConfigError, match="no valid Jinja"):
        ChatTemplate("{% for %}", {})


def test_the_default_of_several_templates_is_used(tmp_path):
    settings = {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    assert template.render(MESSAGES, {}) == "d"


def test_several_templates_without_a_default_are_named(tmp_path):
    settings = {"chat_template": [{"name": "rag", "template": "r"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: chat_template names 'rag' but no 'default'"):
        ChatTemplate.load(tmp_path, {})


def test_a_multimodal_checkpoints_own_file_is_read(tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages | length }}"}))
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    assert template.render(MESSAGES, {}) == "2"


def test_a_template_file_that_is_no_jinja_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is no valid Jinja"):
        ChatTemplate.load(tmp_path, {})


HARMONY = """{%- macro briefing(effort) -%}
{{- "Knowledge cutoff: 2024-06\n" -}}{{- "Year: " + strftime_now("%Y") + "\n\nReasoning: " + effort -}}
{%- endmacro -%}
{%- if reasoning_effort is not defined -%}{%- set reasoning_effort = "medium" -%}{%- endif -%}
{{- "<|start|>system<|message|>" -}}{{- briefing(reasoning_effort) -}}{{- "<|end|>" -}}
{%- set state = namespace(tool=none) -%}
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}
    {%- if "content" in message and "<|channel|>" in message.content -%}
      {{- raise_exception("pass the final message only") -}}
    {%- endif -%}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" -}}
    {%- set state.tool = none -%}
  {%- else -%}
    {{- "<|start|>" ~ message.role ~ "<|message|>" ~ (message.content if message.content is string else "") -}}
    {{- "<|end|>" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


def test_a_template_of_channels_is_rendered_from_its_file_as_transformers_renders_it(tmp_path):
    """The constructs of gpt-oss's."""
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    (tmp_path / "chat_template.jinja").write_text(HARMONY)
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    for variables in ({}, {"reasoning_effort": "high"}):
        expected, _ = reference.render_jinja_template(
            [MESSAGES], chat_template=HARMONY, add_generation_prompt=True, **variables
        )
        assert template.render(MESSAGES, variables) == expected[0]
    with pytest.raises(RequestError, match="pass the final message only"):
        template.render([{"role": "assistant", "content": "<|channel|>analysis"}], {})
