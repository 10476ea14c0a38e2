"""A decoder's own view of its config, which names the collecting attention and shares all else.

transformers finds the attention function by a name in the config, and a config object belongs to whoever holds it:
other models, a checkpoint that is saved, `model.config.text_config`. They keep seeing the stock name; a change of it,
or of anything else, reaches the decoder.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from himap_train.models.attention import PREFIX


def give_own_config(decoder: nn.Module) -> None:
    """Let a decoder and its layers read their config through a view that names the collecting attention."""
    config: Any = decoder.config
    _hand_out(decoder, config, _restored(type(config), config.__dict__))


def give_back_config(decoder: nn.Module, stock: Any) -> None:
    """Undo `give_own_config` with the config that the decoder had; nothing happens where another was set since."""
    own: Any = decoder.config
    if isinstance(own, _Own):
        stock.__dict__.update(own.__dict__)  # the same, but in a copy of the model, where they are no longer shared
        _hand_out(decoder, own, stock)


def _hand_out(decoder: nn.Module, held: Any, given: Any) -> None:
    for module in decoder.modules():
        if module.__dict__.get("config") is held:
            module.config = given


class _Own:
    """Mixed into the class of a config."""

    stock_class: type

    @property
    def _attn_implementation(self) -> str | None:
        name = self._attn_implementation_internal  # type: ignore[attr-defined]
        return None if name is None else PREFIX + name

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        name = value.removeprefix(PREFIX) if isinstance(value, str) else value
        self.stock_class._attn_implementation.fset(self, name)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.stock_class, self.__dict__)


@cache
def _own_class(stock: type) -> type:
    return type(stock.__name__, (_Own, stock), {"stock_class": stock, "__module__": stock.__module__})


def _restored(stock: type, fields: dict[str, Any]) -> Any:
    """A view that shares the fields."""
    own: Any = object.__new__(_own_class(stock))
    object.__setattr__(own, "__dict__", fields)
    return own
