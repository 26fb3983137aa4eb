import pytest

from paceline.bench import prompts
from paceline.bench.errors import BenchError


class Tokenizer:
    """A token per character; the template puts the message between angle brackets."""

    chat_template: str | None = "<>"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return f"<{messages[0]['content']}>"


def write(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    return path


def test_the_three_forms_are_read_and_other_keys_ignored(tmp_path):
    path = write(tmp_path, '{"prompt": "ab", "id": 1}\n\n{"turns": ["c", "d"]}\n{"prompt_ids": [5, 6]}\n')
    rendered = [prompt.render(Tokenizer()) for prompt in prompts.read(path)]
    assert rendered == [(97, 98), (60, 99, 62), (5, 6)]


def test_the_shipped_prompts_are_thirty_two_beginnings_of_code():
    shipped = prompts.read(prompts.SHIPPED)
    assert len(shipped) == 32
    assert all(prompt.text for prompt in shipped)


def test_a_limit_takes_the_first_prompts(tmp_path):
    path = write(tmp_path, '{"prompt": "a"}\n{"prompt": "b"}\n')
    assert prompts.read(path, 1) == [prompts.Prompt(text="a")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"text": "a"}', r"line 2: expected .*found the keys \['text'\]"),
        ('{"prompt": ""}', "line 2: expected"),
        ('{"turns": []}', "line 2: expected"),
        ('{"prompt_ids": [1, "a"]}', "line 2: expected"),
        ('{"prompt_ids": [1, true]}', "line 2: expected"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(BenchError, match=message):
        prompts.read(write(tmp_path, f'{{"prompt": "a"}}\n{line}\n'))


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"nowhere\.jsonl: cannot be read"):
        prompts.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(BenchError, match="holds no prompt"):
        prompts.read(write(tmp_path, "\n"))


def test_a_message_without_a_chat_template_says_what_to_use_instead():
    plain = Tokenizer()
    plain.chat_template = None
    with pytest.raises(BenchError, match="no chat template"):
        prompts.Prompt(message="a").render(plain)


def test_prompts_that_leave_no_room_are_counted_out():
    given = [prompts.Prompt(text="a" * length) for length in (3, 9)]
    kept, dropped = prompts.fit(given, Tokenizer(), max_tokens=8, max_context=12)
    assert [len(ids) for ids in kept] == [3]
    assert dropped == 1
    with pytest.raises(BenchError, match=r"--max-tokens is 10 .*context 12"):
        prompts.fit(given, Tokenizer(), max_tokens=10, max_context=12)
