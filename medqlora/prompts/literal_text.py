"""Encode texts in which a special token's name stands, such as "</s>" in a question, as text.

A tokenizer takes the names of its special tokens for the tokens wherever they stand. In a prompt
they are tokens where the chat template writes them, and text where a question or an answer does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from medqlora.prompts.styles import PromptError

if TYPE_CHECKING:  # Its import takes half a second.
    import tokenizers
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]  # a text, and whether it is the template's own


@dataclass(frozen=True)
class LiteralTokenizer:
    """A tokenizer that can leave special tokens in texts of others alone.

    Args:
        tokenizer: the model's own.
    """

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def special(self) -> dict[str, int]:
        """The ids of the special tokens, by the texts that stand for them."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        names = {token.content: number for number, token in added.items() if token.special}
        names |= dict(
            zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        )
        return {name: number for name, number in names.items() if name}

    @cached_property
    def pattern(self) -> re.Pattern:
        """Finds the text of a special token."""
        # Of two names that begin alike the longer one is the token.
        names = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """A copy of the Rust tokenizer that takes no text for a special token."""
        from tokenizers import Tokenizer

        # A copy keeps the setting away from other threads.
        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.no_truncation()
        copy.no_padding()
        return copy

    def needed(self, text: str) -> bool:
        """Whether a text of others has the name of a special token in it."""
        return self.pattern.search(text) is not None

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the token ids of joined texts, where only the template's own has special tokens.

        The text between two special tokens is encoded by itself. That this is what the tokenizer
        does is shown with the same texts without these names, which it can encode whole.

        Args:
            pieces: the texts, in order.

        Raises:
            PromptError: this tokenizer encodes the parts of a text otherwise than the whole.
        """
        harmless = [
            (text if ours else self.pattern.sub(lambda found: "#" * len(found[0]), text), ours)
            for text, ours in pieces
        ]
        whole = "".join(text for text, _ in harmless)
        expected = self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        if getattr(self.tokenizer, "backend_tokenizer", None) is not None:
            for behind_newline in (False, True):
                if self.join(harmless, behind_newline) != expected:
                    continue
                ids = self.join(pieces, behind_newline)
                # The vocabulary of some tokenizers makes the token out of plain text too.
                special = set(self.special.values())
                if sum(i in special for i in ids) == sum(i in special for i in expected):
                    return ids
        name = next(found[0] for text, ours in pieces if not ours for found in self.find(text))
        raise PromptError(
            f"a text has {name} in it, the name of a special token, which this tokenizer cannot"
            " encode as text; take it out of the row"
        )

    def find(self, text: str) -> list[re.Match]:
        """Return all special tokens in a text."""
        return list(self.pattern.finditer(text))

    def join(self, pieces: Sequence[Piece], behind_newline: bool) -> list[int]:
        """Return the token ids of the parts between special tokens, with these tokens.

        Args:
            pieces: see `encode`.
            behind_newline: whether parts behind a special token are encoded behind a newline, which
                some tokenizers need to see that the text has begun before.
        """
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        ids: list[int] = []
        text = ""
        strip_left = False

        def flush(strip_right: bool) -> None:
            """Encode the text since the last special token."""
            part = text.lstrip() if strip_left else text
            part = part.rstrip() if strip_right else part
            if part:
                ids.extend(self.encode_part(part, behind_newline and bool(ids)))

        for piece, ours in pieces:
            end = 0
            for found in self.find(piece) if ours else ():
                token = added.get(self.special[found[0]])
                text += piece[end : found.start()]
                # Some special tokens take the blanks beside them.
                flush(bool(token and token.lstrip))
                ids.append(self.special[found[0]])
                text = ""
                strip_left = bool(token and token.rstrip)
                end = found.end()
            text += piece[end:]
        flush(False)
        return ids

    def encode_part(self, text: str, behind_newline: bool) -> list[int]:
        """Return the token ids of a text without any special token."""
        if not behind_newline:
            return self.backend.encode(text, add_special_tokens=False).ids
        head = self.backend.encode("\n", add_special_tokens=False).ids
        return self.backend.encode(f"\n{text}", add_special_tokens=False).ids[len(head) :]
