"""Text from tokens as they come, piece by piece."""

from collections.abc import Sequence

from moejax.data.tokens import Tokenizer

_REPLACED = "\ufffd"  # what the tokenizers make of bytes that are no character, or not yet


class TextStream:
    """The pieces of one answer; put together they are the text of all of its tokens, up to a text that ends it.

    A piece ends where a character does, and waits while what follows may turn out to be a text that ends the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ended = False  # a text that ends the answer has come
        self.text = ""  # all that was given
        self._ids: list[int] = []
        self._begin = self._end = 0  # of the newest tokens whose text is known: they are the context of the next ones
        self._held = ""

    def add(self, ids: Sequence[int]) -> str:
        """The piece that these tokens complete; nothing once the answer has ended."""
        if self.ended:
            return ""
        self._ids += ids
        known = self.tokenizer.decode(self._ids[self._begin : self._end])
        more = self.tokenizer.decode(self._ids[self._begin :])
        if more.endswith(_REPLACED) or len(more) <= len(known):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return self._given(more[len(known) :], last=False)

    def finish(self) -> str:
        """The rest, where no more tokens come."""
        if self.ended:
            return ""
        known = self.tokenizer.decode(self._ids[self._begin : self._end])
        rest = self.tokenizer.decode(self._ids[self._begin :])[len(known) :]
        return self._given(rest, last=True)

    def _given(self, new: str, last: bool) -> str:
        text = self._held + new
        places = [text.find(stop) for stop in self.stops if stop in text]
        if places:
            self.ended, text, self._held = True, text[: min(places)], ""
        else:
            held = 0 if last else max((_may_begin(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _may_begin(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the first of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
