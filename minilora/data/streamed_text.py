"""Text that appears token by token."""

from minilora.data.tokenizer import Tokenizer


class StreamedText:
    """The text of the tokens so far. The bytes of an incomplete character are held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._grow(text)

    def rest(self) -> str:
        """The bytes that never became a character, as the tokenizer shows them."""
        return self._grow(self.tokenizer.decode(self.tokens))

    def _grow(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text = text
        return new
