import json

import pytest

from common.errors import CheckpointError, InvalidRequest
from common.text.template import ChatTemplate

SOURCE = """{{ bos_token }}{% for m in messages %}
    {%- if m['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('unknown role ' + m['role']) }}
    {%- endif %}
<|{{ m['role'] }}|>{{ m['content'] }}
{% endfor %}
{% if tools %}{{ tools | tojson }}
{% endif %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [{"role": "user", "content": "a <b> & 'c' é"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]


def transformers_render(tmp_path, tools=None, add_generation_prompt=True):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=SOURCE,
    )
    return tokenizer.apply_chat_template(
        MESSAGES, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("generation", [True, False])
def test_rendering_equals_transformers(tmp_path, tools, generation):
    template = ChatTemplate(SOURCE, bos_token="<s>", eos_token="</s>")
    expected = transformers_render(tmp_path, tools, generation)
    assert template.render(MESSAGES, generation, tools) == expected


def test_the_template_file_wins_over_the_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "config", "bos_token": {"content": "<s>"}})
    )
    assert ChatTemplate.from_folder(tmp_path).render(MESSAGES) == "config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert ChatTemplate.from_folder(tmp_path).render(MESSAGES) == "<s>file"


def test_a_folder_without_a_template_has_none(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None


def test_a_role_the_template_refuses_is_the_callers_mistake():
    template = ChatTemplate(SOURCE)
    with pytest.raises(InvalidRequest, match="unknown role tool") as caught:
        template.render([{"role": "tool", "content": "x"}])
    assert caught.value.field == "messages"


def test_a_broken_template_names_the_folder(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="not valid Jinja2") as caught:
        ChatTemplate.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}"],
)
def test_a_template_cannot_leave_the_sandbox_or_change_the_messages(source):
    messages = [{"role": "user", "content": "x"}]
    try:
        text = ChatTemplate(source).render(messages)
    except InvalidRequest:
        text = ""
    assert "class" not in text
    assert messages == [{"role": "user", "content": "x"}]
