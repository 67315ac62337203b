"""``qsvft generate ADAPTER``: talk with what was trained, in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import bad_input
from .library import library

if TYPE_CHECKING:
    from ..chat import Chat


def generate(
    adapter: Annotated[str, typer.Argument(help="A directory with an adapter, or a hub id.")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end; left out, one line after the other is answered.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time; above, tokens are drawn.")
    ] = 0.0,
    device_map: Annotated[str | None, typer.Option(help="Where the base goes: cpu, cuda, auto.")] = None,
) -> None:
    """Chat with an adapter on its base; the answer appears as it comes. /new begins anew, /quit or Ctrl-D ends."""
    with library(), bad_input():
        from ..chat import Chat
        from ..loading import load
        from ..training.plan import base_tokenizer

        model = load(adapter, base=base, device_map=device_map)
        model.config.use_cache = True
        tokenizer = base_tokenizer(adapter, otherwise=model.get_base_model().name_or_path)
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        chat = Chat(model, tokenizer, max_new_tokens=max_new_tokens, **drawn)
        if prompt is not None:
            _answer(chat, prompt)
        else:
            _converse(chat)


def _answer(chat: Chat, text: str) -> None:
    chat.say(text, lambda piece: typer.echo(piece, nl=False))
    typer.echo()


def _converse(chat: Chat) -> None:
    asked = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asked)
        except EOFError:
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/new":
            chat.turns.clear()
        elif line.strip():
            _answer(chat, line)
