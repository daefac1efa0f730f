"""Conversation → text → token ids: the tokenizer's chat template with its variables, or the prompt as it is."""

from __future__ import annotations

import inspect
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from difflib import get_close_matches
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.errors import UserError

TEMPLATE_TIMEOUT = 10.0  # seconds for one prompt
CHARACTERS_PER_TOKEN = 256  # at most, in any prompt that is worth a tokenizer's time
CLOCK = "strftime_now"  # transformers' name for today's date in a template
_FORMAT = re.compile(r"""(['"])((?:(?!\1)[^\\\n])*%(?:(?!\1)[^\\\n])*)\1""")  # a text in quotes with a % in it

Message = dict[str, str]  # {"role": …, "content": …}


class Renderer:
    """Renders conversations and tokenises the texts, as the settings say. Raises UserError for settings that cannot
    work with this tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: config.Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        self.templated = data.chat_template == "auto" and bool(tokenizer.chat_template)
        if not self.templated:
            for name in ("system_prompt", "chat_template_kwargs"):
                if getattr(data, name) not in (None, {}):
                    none = "data.chat_template is none; set it to auto"
                    why = none if tokenizer.chat_template else "the tokenizer has none"
                    raise UserError(f"data.{name}: needs a chat template, and {why}")
        for name in data.chat_template_kwargs:
            self._check_variable(name)
        self._date: date | None = None
        self._template: str | None = None  # instead of the tokenizer's
        if uses_clock(tokenizer, data):
            self._date = data.template_date or date.today()
            with suppress(ValueError):  # several templates and none the default, which rendering tells
                self._template = _dated(tokenizer.get_chat_template(), self._date)
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        self._characters = max(CHARACTERS_PER_TOKEN, longest)

    @property
    def identity(self) -> str:
        """What the texts depend on besides files and model; "" for the defaults."""
        given = self._data.chat_template_kwargs
        if not given and not self._date:
            return ""
        return json.dumps([given, str(self._date)], sort_keys=True, default=str)

    def __call__(self, conversation: list[Message], where: str) -> str:
        """The text to tokenise. `where` it was read, for errors. A last message of the assistant's is continued."""
        if not self.templated:
            if len(conversation) > 1:
                has_none = not self._tokenizer.chat_template
                why = "the tokenizer has no chat template" if has_none else "data.chat_template is none"
                raise UserError(f"{where}: has {len(conversation)} chat messages, but {why}")
            return conversation[0]["content"]
        if self._data.system_prompt is not None:
            own = [m for m in conversation if m["role"] != "system"]
            conversation = [{"role": "system", "content": self._data.system_prompt}, *own]
        begun = conversation[-1]["role"] == "assistant"
        try:
            with _within(TEMPLATE_TIMEOUT):
                text = self._tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=not begun,
                    continue_final_message=begun,
                    **self._data.chat_template_kwargs,
                )
        except Exception as e:  # a template is a program, and may raise anything
            kind = "" if isinstance(e, TemplateError) else f"{type(e).__name__}: "
            reason = f"{kind}{' '.join(str(e).split())}"
            raise UserError(f"{where}: the tokenizer's chat template refuses this prompt: {reason}") from None
        return str(text)

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts."""
        if not texts:
            return []
        # A chat template writes its own special tokens. To plain text the tokenizer adds the model's (Llama's first),
        # unless the text begins with it.
        special = not self.templated
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)[
            "input_ids"
        ]
        begin = self._tokenizer.bos_token_id
        if special and begin is not None:
            ids = [each[1:] if each[:2] == [begin, begin] else each for each in ids]
        return ids

    def is_beyond(self, texts: Sequence[str], tokens: int) -> bool:
        """Whether texts have so many characters that they cannot have as few as `tokens` tokens: known at once, where
        a tokenizer would take minutes for 100 MB."""
        return sum(map(len, texts)) > tokens * self._characters

    def _check_variable(self, name: str) -> None:
        words = set(re.findall(r"[A-Za-z_]\w*", template_of(self._tokenizer)))
        ours = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
        if name in ours:
            raise UserError(f"data.chat_template_kwargs: {name} is not the template's variable: megarl sets it")
        if name not in words:
            near = get_close_matches(name, words, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"data.chat_template_kwargs: {name}: the chat template does not use it{hint}")


def uses_clock(tokenizer: PreTrainedTokenizerBase, data: config.Data) -> bool:
    """Whether prompts contain today's date."""
    return data.chat_template == "auto" and CLOCK in template_of(tokenizer)


def _dated(template: str, day: date) -> str:
    """The template with a clock that stands still. Templates get data only and no functions, so the clock is a macro:
    a table of the formats that the template names."""
    table = {found[2]: day.strftime(found[2]) for found in _FORMAT.finditer(template)}
    words = json.dumps(table)
    unknown = f"raise_exception('{CLOCK} has a format that the template does not write out')"
    body = f"{{{{ {words}[format] if format in {words} else {unknown} }}}}"
    return f"{{%- macro {CLOCK}(format) -%}}{body}{{%- endmacro -%}}{{{{ '' }}}}{template}"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the chat template; "" without one."""
    template: Any = tokenizer.chat_template or ""
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `seconds`. Only in the main thread, which reads all data: elsewhere there
    are no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
