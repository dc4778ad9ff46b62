"""What the model sees is what its chat template writes, in every style; what is dropped is said."""

import json
from datetime import datetime

import pytest

from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import DataError, ModelError
from npd.types import Message, Prompt
from tiny_model import make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% for m in messages if m['role'] in ('user', 'assistant') %}"
TOOLS = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLS = (
    TOOLS + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.content %}{{ m.content }}"
    "{% endif %}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ (s if loop.first else '') + "
    "m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else "
    "m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system message goes to the last turn, so it is gone once the answer is there.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}<s>{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ c }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
R1 = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COMMAND_R = (
    "<s>{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else "
    "m.role | upper }}_TOKEN|>{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STYLES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (LLAMA2, "</s>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "qwen3-thinking": (THINKING, "<|im_end|>"),
    "phi3": (PHI3, "<|end|>"),
    "zephyr": (ZEPHYR, "</s>"),
    "command-r": (COMMAND_R, "<|END_OF_TURN_TOKEN|>"),
    "no system": (CHATML.replace("{% for m in messages %}", NO_SYSTEM), "<|im_end|>"),
    "tools": (CALLS, "<|im_end|>"),
}
USER_2 = ("user", "and 3+3?")
USER, ANSWER = " what is two plus two?\n", "it is four. "


@pytest.fixture(scope="module")
def chat_of():
    """Makes a chat of a template, whose markers are special tokens."""
    ends = ["<s>", *dict.fromkeys(end for _, end in STYLES.values() if end != "<|im_end|>")]

    def make(template, **kwargs):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(ends, special_tokens=True)
        tokenizer.chat_template = template
        return ChatTokenizer(tokenizer, **kwargs)

    return make


def read(chat, ids):
    return chat.tokenizer.decode([int(i) for i in ids])


def whole(chat, prompt, answer=None, **args):
    """The template's own rendering; with an answer, up to the end token it writes last."""
    turns = [{"role": m.role, "content": m.content, **m.extra} for m in prompt.messages]
    if answer is not None:
        turns.append({"role": "assistant", **answer})
    generate = answer is None
    text = chat.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=generate, **args
    )
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_id)
    before, found, _ = text.rpartition(end)
    return text if generate else before + found


def asking(*turns, completion=ANSWER, **args):
    return Prompt(
        0,
        messages=tuple(Message(*turn) for turn in turns or (("user", USER),)),
        completion=completion,
        template_args=args,
        place="data.jsonl:7",
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "turns",
    [[("user", USER)], [("user", "hi"), ("assistant", "what?"), ("user", USER)]],
    ids=["one", "several"],
)
def test_prompt_and_completion_are_the_template_s_own_text(chat_of, style, turns):
    template, end = STYLES[style]
    chat, prompt = chat_of(template), asking(*turns)
    encoded = chat.encode(prompt)
    assert read(chat, encoded.prompt_ids) == whole(chat, prompt)
    both = [*encoded.prompt_ids.tolist(), *encoded.completion_ids.tolist()]
    assert read(chat, both) == whole(chat, prompt, {"content": ANSWER})
    assert read(chat, encoded.completion_ids[-1:]) == end
    assert encoded.completion_ids.tolist().count(chat.end_id) == 1
    assert chat.notices == ()


@pytest.mark.parametrize("style", ["chatml", "llama2", "zephyr", "qwen3"])
def test_end_token_that_a_completion_brings_along_is_there_once(chat_of, style):
    template, end = STYLES[style]
    chat = chat_of(template)
    bare, ended = (chat.encode(asking(completion=f"four{more}")) for more in ("", f"{end}\n"))
    assert ended.completion_ids.tolist() == bare.completion_ids.tolist()


@pytest.mark.parametrize("template", [CHATML, None])
def test_end_token_within_a_completion_is_refused(chat_of, template):
    prompt = Prompt(0, text="hi", completion="four<|im_end|>five", place="data.jsonl:7")
    with pytest.raises(DataError, match=r"prompt 0 \(data\.jsonl:7\) has the end token <\|im_end"):
        chat_of(template).encode(prompt)


def test_text_in_capitals_is_there(chat_of):
    chat = chat_of(CHATML.replace("m['content']", "m['content'] | upper"))
    assert "WHAT" in read(chat, chat.encode(asking(completion=None)).prompt_ids)
    assert len(chat.notices) == 1


def test_template_without_end_tokens_gets_one(chat_of):
    chat = chat_of(PLAIN)
    assert read(chat, chat.encode(asking()).completion_ids) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>\nadd them\n</think>\n\nfour", "add them\n</think>\n\nfour</s>"),
        ("add them\n</think>\n\nfour", "add them\n</think>\n\nfour</s>"),
        ("four", "\n</think>\n\nfour</s>"),
    ],
)
def test_header_that_opens_a_block_which_finished_turns_lack(chat_of, answer, expected):
    chat = chat_of(R1)
    encoded = chat.encode(asking(completion=answer))
    assert read(chat, encoded.prompt_ids).endswith("<|Assistant|><think>\n")
    assert read(chat, encoded.completion_ids) == expected
    assert any("begins a finished turn differently" in notice for notice in chat.notices)


def test_template_that_drops_the_system_message_once_answered(chat_of):
    chat = chat_of(MISTRAL)
    encoded = chat.encode(asking(("system", "be brief"), ("user", "hi")))
    assert read(chat, encoded.prompt_ids) == "<s>[INST] be brief\n\nhi[/INST]"
    assert read(chat, encoded.completion_ids) == f" {ANSWER}</s>"
    assert any("1 prompt" in notice for notice in chat.notices)


def test_reasoning_of_the_answer_is_written_and_that_of_earlier_turns_is_told(chat_of):
    chat = chat_of(QWEN3)
    answer = Message("assistant", "four", {"reasoning_content": "add them"})
    earlier = ("assistant", "one", {"reasoning_content": "count it"})
    prompt = asking(("user", "1?"), earlier, ("user", "2?"), completion=answer)
    encoded = chat.encode(prompt)
    assert read(chat, encoded.completion_ids) == "<think>\nadd them\n</think>\n\nfour<|im_end|>"
    assert chat.notices == (
        "the chat template drops `reasoning_content` of assistant turns (1 prompt)",
    )


CALL = {"function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds numbers"}}


def test_tools_and_calls_go_to_the_template_as_they_are(chat_of):
    chat = chat_of(CALLS)
    called = ("assistant", None, {"tool_calls": [CALL]})
    answer = Message("assistant", None, {"tool_calls": [CALL, CALL]})
    prompt = asking(("user", "2+2?"), called, ("tool", "4"), completion=answer, tools=[TOOL])
    encoded = chat.encode(prompt)
    assert read(chat, encoded.prompt_ids) == whole(chat, prompt, tools=[TOOL])
    assert json.dumps(TOOL) in read(chat, encoded.header_ids)
    both = [*encoded.prompt_ids.tolist(), *encoded.completion_ids.tolist()]
    own = {"content": None, **answer.extra}
    assert read(chat, both) == whole(chat, prompt, own, tools=[TOOL])


XML_CALLS = CALLS.replace(
    "{{ call.function | tojson }}",
    "{% for k, v in call.function.arguments.items() %}<arg {{ k }}>{{ v }}</arg>{% endfor %}",
)
PASTED_CALLS = CALLS.replace(
    "{{ call.function | tojson }}", "{{ call.function.name + ' ' + call.function.arguments }}"
)
NAMED_CALLS = CALLS.replace(
    "{{ call.function | tojson }}",
    "{{ call.function.name }}({{ call.function.arguments if call.function.arguments is string "
    "else call.function.arguments | tojson }})",
)


@pytest.mark.parametrize("given", [{"a": 2}, '{"a": 2}'], ids=["object", "text"])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (CALLS, '<call>{"name": "add", "arguments": {"a": 2}}</call>'),
        (XML_CALLS, "<call><arg a>2</arg></call>"),
        (PASTED_CALLS, '<call>add {"a": 2}</call>'),
        (NAMED_CALLS, '<call>add({"a": 2})</call>'),
    ],
    ids=["as JSON", "one by one", "pasted", "either"],
)
def test_arguments_of_calls_are_written_once_whatever_their_form(chat_of, template, written, given):
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": given}}
    answer = Message("assistant", None, {"tool_calls": [call]})
    chat = chat_of(template)
    encoded = chat.encode(asking(("user", "2+2?"), completion=answer))
    assert read(chat, encoded.completion_ids) == f"{written}<|im_end|>"


@pytest.mark.parametrize("given", ["", "{oops", "[1]", "2"])
def test_arguments_that_are_no_object_stay_as_they_are(chat_of, given):
    call = {"function": {"name": "add", "arguments": given}}
    answer = Message("assistant", None, {"tool_calls": [call]})
    chat = chat_of(CALLS)
    encoded = chat.encode(asking(("user", "2+2?"), completion=answer))
    assert json.dumps(given) in read(chat, encoded.completion_ids)


def test_null_content_is_empty_text_where_the_template_takes_no_null(chat_of):
    adding = CHATML.replace("{{ m['content'] }}", "{{ m['content'] + '' }}{{ m.tool_calls or '' }}")
    turns = [("user", "2+2?"), ("assistant", None, {"tool_calls": [CALL]}), ("tool", "4")]
    filled = [turns[0], ("assistant", "", {"tool_calls": [CALL]}), turns[2]]
    found, expected = (chat_of(adding).encode(asking(*each)) for each in (turns, filled))
    assert found.prompt_ids.tolist() == expected.prompt_ids.tolist()


def test_what_one_record_loses_is_not_taken_from_another_of_its_roles(chat_of):
    """A template that writes `reasoning_content` beside `tool_calls` only."""
    template = CALLS.replace(
        "{% for call", "{% if m.tool_calls %}{{ m.reasoning_content }}{% endif %}{% for call"
    )
    reasoned = {"reasoning_content": "two and two"}
    both = asking(("user", "2+2?"), ("assistant", "a", {**reasoned, "tool_calls": [CALL]}), USER_2)
    alone = asking(("user", "2+2?"), ("assistant", "a", reasoned), USER_2)
    chat = chat_of(template)
    chat.encode(both)
    assert chat.notices == ()
    chat.encode(alone)
    assert chat.notices == (
        "the chat template drops `reasoning_content` of assistant turns (1 prompt)",
    )


def test_long_conversations_are_rendered_a_few_times_only(chat_of):
    """Records of agents: dozens of calls, each conversation of another length."""
    chat = chat_of(CALLS)
    counting = Counting(chat.tokenizer.apply_chat_template)
    chat.tokenizer.apply_chat_template = counting
    step = [("assistant", None, {"tool_calls": [CALL]}), ("tool", "4", {"tool_call_id": "x"})]
    for length in range(10, 40):
        chat.encode(asking(("user", "2+2?"), *(step * length), completion=None))
    assert counting.calls <= 5 * 30
    assert chat.notices == ("the chat template drops `tool_call_id` of tool turns (30 prompts)",)


class Counting:
    """A function that counts its calls."""

    def __init__(self, function):
        self._function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._function(*args, **kwargs)


def test_prompts_that_were_rendered_before_are_told(chat_of):
    chat = chat_of(CHATML)
    chat.encode(asking(completion=None))
    assert chat.notices == ()
    rendered = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    chat.encode(Prompt(0, text=rendered))
    assert chat.notices == (
        "the chat template is applied to text that already contains its end token <|im_end|>, as "
        "if the text had been rendered before (1 prompt)",
    )


LOST = [
    (CHATML, asking(("user", "a"), tools=[TOOL]), "drops `tools`", "[tools]"),
    (CHATML, asking(("user", "a"), documents=[TOOL]), "drops `documents`", "[documents]"),
    (
        CHATML,
        asking(completion=Message("assistant", "b", {"reasoning_content": "hm"})),
        "drops `reasoning_content` of assistant turns",
        "[reasoning_content]",
    ),
    (
        CHATML,
        asking(("user", "a", {"thoughts": "a long story"})),
        "drops `thoughts` of user turns",
        "[thoughts]",
    ),
    (
        CHATML.replace("{% for m in messages %}", NO_SYSTEM),
        asking(("system", "be brief"), ("user", "be")),
        "drops the text of system turns",
        "data.system_as: user",
    ),
    (
        CHATML.replace("{% for m in messages %}", NO_SYSTEM),
        asking(("user", "a"), ("tool", "4")),
        "drops the text of tool turns",
        "remove such turns",
    ),
    (
        CHATML,
        asking(("user", "a"), ("assistant", None, {"name": "ann"}), ("user", "b")),
        "writes the word None",
        "give the message a text",
    ),
    (GEMMA, asking(("system", "s"), ("user", "a")), "System role not supported", "system_as: user"),
    ("{{ messages[0].content + 1 }}", asking(), "refuses prompt 0", "must be str|concatenate"),
]


@pytest.mark.parametrize(("template", "prompt", "says", "remedy"), LOST)
def test_text_that_would_vanish_is_refused_with_its_place(chat_of, template, prompt, says, remedy):
    with pytest.raises(DataError) as caught:
        chat_of(template).encode(prompt)
    text = str(caught.value)
    assert says in text
    assert "data.jsonl:7" in text
    assert any(part in text for part in remedy.split("|"))
    assert "\n" not in text


def test_keys_that_hold_no_text_are_told_with_a_count(chat_of):
    chat = chat_of(CHATML)
    prompts = [asking(("user", "a", {"name": "ann", "weight": 1}), enable_thinking=False)] * 3
    chat.encode_all(prompts)
    assert chat.notices == (
        "the chat template drops `enable_thinking` (3 prompts)",
        "the chat template drops `name` of user turns (3 prompts)",
        "the chat template drops `weight` of user turns (3 prompts)",
    )


def test_switches_that_the_template_knows_reach_it(chat_of):
    chat = chat_of(CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}")
    encoded = chat.encode(asking(completion=None, enable_thinking=False))
    assert read(chat, encoded.prompt_ids).endswith("</think>")
    assert chat.notices == ()


def test_text_that_the_template_wants_in_parts(chat_of):
    parts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoded, expected = (chat_of(t).encode(asking()) for t in (parts, CHATML))
    assert encoded.prompt_ids.tolist() == expected.prompt_ids.tolist()
    assert encoded.completion_ids.tolist() == expected.completion_ids.tolist()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML.replace("{% for m in messages %}", NO_SYSTEM), "would have no effect"),
        (GEMMA, "refuses data.system: System role not supported"),
    ],
)
def test_system_message_without_effect_is_refused_or_goes_to_the_user(chat_of, template, says):
    with pytest.raises(ModelError, match=rf"{says}.*data\.system_as: user"):
        chat_of(template, system="Answer in French.")
    chat = chat_of(template, system="Answer in French.", system_as="user")
    encoded = chat.encode(asking(("user", "hi")))
    plain = chat_of(template)
    alone, both = (
        plain.encode(asking(("user", text)))
        for text in ("Answer in French.", "Answer in French.\n\nhi")
    )
    assert encoded.prompt_ids.tolist() == both.prompt_ids.tolist()
    assert encoded.header_ids.tolist() == alone.prompt_ids.tolist()


def test_system_turns_of_the_data_go_to_the_next_user_turn(chat_of):
    chat = chat_of(GEMMA, system_as="user")
    turns = (("system", "S"), ("user", "a"), ("assistant", "b"), ("system", "T"), ("user", "c"))
    folded = (("user", "S\n\na"), ("assistant", "b"), ("user", "T\n\nc"))
    one, other = chat.encode(asking(*turns)), chat.encode(asking(*folded))
    assert one.prompt_ids.tolist() == other.prompt_ids.tolist()


NO_EMPTY = CHATML.replace(
    "<|im_start|>{{ m",
    "{% if not m['content'] %}{{ raise_exception('empty message') }}{% endif %}<|im_start|>{{ m",
    1,
)


def test_template_that_refuses_the_emptied_user_text(chat_of):
    chat = chat_of(NO_EMPTY)
    says = r"refuses the answer-alone context of Δ-IFD.*data\.jsonl:7.*empty message.*filter\.name"
    with pytest.raises(ModelError, match=says):
        chat.encode(asking())
    with pytest.raises(ModelError, match=r"filter\.name delta_ifd.*empty message"):
        chat.check_alone("filter.name delta_ifd")
    (encoded,) = chat.encode_all([asking()], needs_alone=False)
    assert len(encoded.header_ids) == 1
    chat_of(CHATML).check_alone("filter.name delta_ifd")


@pytest.mark.parametrize(
    "clock",
    [
        "{{ strftime_now('%d %b %Y %H:%M') }}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}",
    ],
)
def test_the_clock_of_a_template_is_the_one_it_was_given(chat_of, clock):
    then = datetime(2001, 2, 3, 4, 5)
    chat = chat_of(clock + CHATML, clock=then)
    assert read(chat, chat.encode(asking()).prompt_ids).startswith("03 Feb 2001")
    assert (chat.clock, chat_of(CHATML).clock) == (then, None)
    assert chat_of(clock + CHATML).clock.year >= 2024


def test_templates_are_compared_by_what_they_write(chat_of):
    chat, same = chat_of(CHATML), chat_of("{# a comment #}" + CHATML)
    assert chat.writes_like(same)
    assert not chat.writes_like(chat_of(ZEPHYR))
    bare = chat_of(None)
    assert not chat.writes_like(bare)
    assert bare.writes_like(chat_of(None))


@pytest.mark.parametrize(
    ("front", "ids"),
    [("<|im_start|>", [1]), ("<|endoftext|> <|im_start|>", [0, 1]), ("", [])],
)
def test_what_the_tokenizer_puts_in_front_without_a_template(front, ids):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = None, None
    names = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{front} $A <|im_end|>".strip(), special_tokens=list(names.items())
    )
    encoded = ChatTokenizer(tokenizer).encode(Prompt(0, text="two", completion="it"))
    body = tokenizer("two", add_special_tokens=False)["input_ids"]
    assert encoded.prompt_ids.tolist() == [*ids, *body]
    assert encoded.header_ids.tolist() == (ids or [2])
    led = ChatTokenizer(tokenizer).encode(Prompt(0, text=f"{front.replace(' ', '')}two"))
    assert led.prompt_ids.tolist() == [*ids, *body], "once, where the text has it already"
