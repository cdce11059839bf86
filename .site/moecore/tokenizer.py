"""Text to tokens and back: a model's tokenizer.json, and its text as it comes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moecore.chat_template import ChatTemplate, read_chat_template

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
# Tokens decoded before new ones, so that a decoder that looks back (spaces, bytes) sees enough.
_CONTEXT_TOKENS = 6
# A character of UTF-8 has at most 4 bytes: of unfinished ones, the last 3 tokens hold all.
_UNFINISHED_TOKENS = 3
_MOST_PENDING_TOKENS = 16
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model's tokenizer, as in its folder.

    Example:
        >>> tokenizer = Tokenizer.from_folder("path/to/model")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where they exist.

        Raises:
            FileNotFoundError: there is no tokenizer.json; the message says where it looked.
            ValueError: a file cannot be read as what its name says; the message names it.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"Tokenizer: no tokenizer.json in {folder.absolute()}; download it with the model,"
                " or make it from other tokenizer files with transformers:"
                " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"Tokenizer: {file} must be a tokenizer file, got: {error}") from None
        # A file may say to cut or pad texts, as training wants it.
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        named = _read_json(folder / "special_tokens_map.json") | config
        return cls(
            backend,
            special_tokens={
                name: content
                for name in _SPECIAL_TOKENS
                if (content := _content_of(named.get(name))) is not None
            },
            chat_template=read_chat_template(folder, config),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens`, as the model wants the text to begin."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, special tokens by their names."""
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, by the model's own template.

        It holds the special tokens as text: encode it with `add_special_tokens=False`.

        Args:
            messages: dicts with "role" and "content", oldest first.
            add_generation_prompt: end where the assistant's answer begins.
            variables: what else the template knows (`tools`, `enable_thinking`, ...).

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "Tokenizer: this model has no chat template (no chat_template.jinja in its folder,"
                " no chat_template in tokenizer_config.json); give it plain text with generate()"
            )
        return self.chat_template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **(self._special_tokens | variables),
        )

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the model names one."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the model names one."""
        return self._id_of("eos_token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones too; a model's embedding may have more rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


class TextStream:
    """The text of a completion, as its tokens come.

    Text is final once given: never half a character, never the beginning of a string that may yet
    become a stop string. The cost of a token does not grow with the text. Pieces add up to
    `decode` of all tokens, up to how bytes that are no UTF-8 are shown.

    Of several stop strings the one that is complete first ends the text (of two that end together,
    the longer), wherever the borders between tokens fall.

    Args:
        tokenizer: whose tokens come.
        stop: the text ends before the first of these strings.
        prompt_token_ids: what comes before; lets a tokenizer that drops the space before a text's
            first word keep it.

    Example:
        >>> stream = TextStream(tokenizer, stop=["END"])
        >>> "".join(stream.push(token_id) for token_id in tokenizer.encode("abc END def"))
        'abc '
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context, self._context_text = _context_of(tokenizer, prompt_token_ids)
        self._pending: list[int] = []  # tokens whose text is not final
        self._held = ""  # decoded text that may begin a stop string
        self._text: list[str] = []
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """All text given so far."""
        self._text = ["".join(self._text)]
        return self._text[0]

    def push(self, token_id: int) -> str:
        """Take the next token; returns what became final. After a stop string nothing does."""
        if self.stop_reason is not None:
            return ""
        self._pending.append(token_id)
        decoded = self._tokenizer.decode(self._context + self._pending)
        if not decoded.endswith(_REPLACEMENT) and decoded != self._context_text:
            return self._give(self._settle(len(self._pending), decoded))
        if len(self._pending) < _MOST_PENDING_TOKENS:
            return ""
        return self._give(self._settle(len(self._pending) - _UNFINISHED_TOKENS))

    def finish(self) -> str:
        """No more tokens come; returns the rest of the text."""
        if self.stop_reason is not None:
            return ""
        piece = self._give(self._settle(len(self._pending)))
        rest = "" if self.stop_reason is not None else self._held
        self._held = ""
        self._text.append(rest)
        return piece + rest

    def _settle(self, count: int, decoded: str | None = None) -> str:
        """Make the first pending tokens the context; returns their text."""
        tokens, self._pending = self._pending[:count], self._pending[count:]
        if decoded is None:
            decoded = self._tokenizer.decode(self._context + tokens)
        piece = _added(self._context_text, decoded)
        if piece:  # what has no text, as special tokens have none, says nothing on what follows
            self._context = tokens[-_CONTEXT_TOKENS:]
            self._context_text = self._tokenizer.decode(self._context)
        return piece

    def _give(self, piece: str) -> str:
        """Add decoded text; returns what no stop string can claim any more."""
        self._held += piece
        found = [(at + len(s), at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            _, keep, self.stop_reason = min(found)
        else:
            keep = len(self._held) - self._longest_beginning()
        final, self._held = self._held[:keep], self._held[keep:]
        self._text.append(final)
        return final

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stop), default=0)), 0, -1):
            end = self._held[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0


def _context_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens, from the beginning of a character on where there is one, and their text."""
    for count in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _UNFINISHED_TOKENS + 1):
        context = list(token_ids[-count:])
        text = tokenizer.decode(context)
        if not text.startswith(_REPLACEMENT):
            break
    return context, text


def _added(before: str, after: str) -> str:
    """What a text has beyond an earlier state of it, whose last characters it may replace."""
    if after.startswith(before):
        return after[len(before) :]
    pairs = enumerate(zip(before, after, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    return after[same:]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Tokenizer: {file} must be JSON, got: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"Tokenizer: {file} must hold an object, got {type(content).__name__}")
    return content


def _content_of(token: object) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
