"""An answer's text, piece by piece: only whole characters, and nothing that may turn out to begin a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders give for bytes that are no character, or not yet.
_BROKEN = "�"
# A character has at most 4 bytes, so at most 4 tokens that are bytes.
_LONGEST_WAIT = 4


class TextStream:
    """Tokens in, text out."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        """Begin an answer.

        Args:
            decode: the text of ids.
            context: the prompt's last tokens: some tokenizers write a token otherwise when it is the first.
            stops: strings that end the answer, and do not appear in it.
        """
        self._decode = decode
        if decode(list(context)).endswith(_BROKEN):  # the prompt ends within a character
            context = ()
        self._stops = [stop for stop in stops if stop]
        self._tokens = list(context)
        self._shown = len(self._tokens)  # tokens whose text has been given
        self._before = 0  # tokens that are decoded besides, so that those after them are written as they are
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token; the text that is sure by now, perhaps none."""
        self._tokens.append(token)
        context = self._decode(self._tokens[self._before : self._shown])
        whole = self._decode(self._tokens[self._before :])
        if whole.endswith(_BROKEN) and len(self._tokens) - self._shown < _LONGEST_WAIT:
            return ""
        self._before, self._shown = self._shown, len(self._tokens)
        return self._release(whole[len(context) :])

    def end(self) -> str:
        """No token follows: the text that is left."""
        if self.is_stopped:
            return ""
        context = self._decode(self._tokens[self._before : self._shown])
        rest = self._decode(self._tokens[self._before :])[len(context) :]
        self._before = self._shown = len(self._tokens)
        sure = self._release(rest)
        if not self.is_stopped:
            sure += self._held
            self.text += self._held
            self._held = ""
        return sure

    def _release(self, piece: str) -> str:
        """Of what is held back and a new piece: what no stop string can begin in."""
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            self.is_stopped = True
            self._held = ""
            sure = text[: min(found)[0]]
        else:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            sure, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += sure
        return sure


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the first ones of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
