"""Conversations as the text that a chat model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TEMPLATES", "UNDERSTANDING_PROMPT", "ChatTemplate", "expand_images"]

UNDERSTANDING_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and "
    "assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class ChatTemplate:
    """How the turns of a conversation are written one after the other.

    Args:
        user, assistant: names of the two roles in the text.
        turn_end: behind a user's turn.
    """

    user: str
    assistant: str
    turn_end: str = "\n\n"

    def format(self, messages: Sequence[Mapping[str, Any]], system_prompt: str, end_of_sentence: str) -> str:
        """The text of `messages`, each `{"role": "user" or "assistant", "content": text}`, ending where the assistant speaks.

        Args:
            system_prompt: in front of everything; may be empty.
            end_of_sentence: the text of the token behind each turn of the assistant.
        """
        roles = {"user": self.user, "assistant": self.assistant, self.user: self.user, self.assistant: self.assistant}
        parts = [f"{system_prompt}{self.turn_end}"] if system_prompt else []
        for number, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in roles:
                raise ValueError(f"the `role` of a message must be 'user' or 'assistant', got {role!r}.")
            if not isinstance(content, str):
                raise TypeError(f"the `content` of a message must be a string, got {type(content).__name__}.")
            end = end_of_sentence if number % 2 else self.turn_end
            parts.append(f"{roles[role]}: {content.strip()}{end}" if content else f"{roles[role]}:")
        return "".join(parts).strip()


# Name in the authors' processor_config.json -> template (deepseek-ai/Janus; "deepseek" for Janus-Pro, "deepseek_old" for Janus).
TEMPLATES: dict[str, ChatTemplate] = {
    "deepseek": ChatTemplate("<|User|>", "<|Assistant|>"),
    "deepseek_old": ChatTemplate("User", "Assistant"),
}


def expand_images(ids: Sequence[int], image: int, begin: int, end: int, count: int) -> list[int]:
    """`ids` with every id `image` replaced by `begin`, `count` times `image`, `end`."""
    expanded: list[int] = []
    for value in ids:
        expanded += [begin, *[image] * count, end] if value == image else [value]
    return expanded
