"""Shows the first training prompt as the model gets it: what the chat template and the tokenizer made of it."""

from __future__ import annotations

from collections.abc import Iterator

from megarl.config import Settings
from megarl.data.files import expand
from megarl.data.prompts import first_prompt
from megarl.doctor.finding import Finding, fail, ok, warn
from megarl.errors import UserError
from megarl.models import hub
from megarl.models.tokenizer import load_tokenizer
from megarl.view.prompt import text_of, tokens_of


def prompt(settings: Settings) -> Iterator[Finding]:
    """The first prompt's text, tokens and answer."""
    try:
        tokenizer = load_tokenizer(hub.model(settings.model.path, weights=False))
        files = [file for each in settings.data.train for file in hub.data(each, "data.train")]
        first = first_prompt(expand(files, "data.train"), tokenizer, settings.data)
    except UserError as e:
        yield fail("prompt", str(e), "data.train, or data.chat_template")
        return
    yield ok("prompt", f"{first.source}: {text_of(first.text)}; answer {text_of(first.answer)}")
    yield ok("its tokens", tokens_of(first.token_ids, tokenizer))
    begin = tokenizer.bos_token_id
    if begin is not None and first.token_ids[:2] == (begin, begin):
        yield warn("its tokens", f"begin twice with {tokenizer.bos_token}", "look at the chat template")
