"""Chat templates that come with a checkpoint: programs of somebody else, tried once within bounds."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateSyntaxError

from himap_train.limits import UnboundedError, bounded

_MEMORY = 2**28


def check_template(processor: Any, source: str) -> None:
    """Render a question, as a list of parts and as text. What the template itself refuses is left to real data.

    Raises:
        ValueError: The template is no text, cannot be parsed, or does not end within time and memory.
    """
    template = processor.chat_template
    if template is None:
        return
    if not isinstance(template, str | dict):
        raise ValueError(f"the chat template in {source} is {type(template).__name__} {template!r:.60}; expected text")
    for content in ([{"type": "image"}, {"type": "text", "text": "?"}], "?"):
        try:
            with bounded(f"the chat template in {source}", memory=_MEMORY):
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except (TemplateSyntaxError, OverflowError) as error:
            raise ValueError(f"the chat template in {source} cannot be used: {error}") from error
        except UnboundedError:
            raise
        except Exception:  # noqa: S112  a template may want another kind of content, or more
            continue
