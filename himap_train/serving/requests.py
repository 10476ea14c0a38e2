"""A chat request in OpenAI's form -> a prompt, and how its answer is searched for.

Its images are bytes, files of a folder that was allowed, or lie at public addresses.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from himap_train.analysis.answered import room_for_answer
from himap_train.data.encode import Encoder, Sample, SampleTooLongError
from himap_train.data.forms import turns_of
from himap_train.data.images import resolve_image_path
from himap_train.data.records import Conversation, ImageSource
from himap_train.evaluation.lmms_eval.requests import Answering
from himap_train.pruning.names import check_keys

MOST_BYTES = 32 * 2**20
_SECONDS = 20.0
_KEPT = "%/:?#[]@!$&'()*+,;=~"
"""What a URL may hold as it is; of all else the code is sent, as browsers do."""

logger = logging.getLogger(__name__)


def image_of(image: Any, where: str, folder: Path | None = None, private: bool = False) -> ImageSource:
    """What a request shows, not decoded yet.

    Args:
        image: the bytes of a file, `file://...` or `http(s)://...`.
        where: Names it in messages.
        folder: Where files may lie; None for no files.
        private: Addresses of this machine and of its network may be fetched too.

    Raises:
        ValueError: It must not be fetched, or cannot.
    """
    try:
        if isinstance(image, bytes):
            return image
        url = str(image)
        if url.startswith("file:"):
            if folder is None:
                raise ValueError("files are refused; the server reads those of a folder with --image-folder")
            try:
                return resolve_image_path(unquote(urlsplit(url).path), folder, where)
            except ValueError as error:  # says where links of this machine lead, which is no client's affair
                logger.warning("%s", error)
                raise ValueError(f"{url[:60]!r} is not in the folder that this server reads") from None
        return _fetched(url, private)
    except (ValueError, OSError, HTTPException) as error:
        raise ValueError(f"{where}: {error or type(error).__name__}") from error


def _fetched(url: str, private: bool) -> bytes:
    parts, too_much = urlsplit(url), f"more than {MOST_BYTES >> 20} MiB or {_SECONDS:g} s; send it as a data: URL"
    kind = {"http": HTTPConnection, "https": HTTPSConnection}.get(parts.scheme)
    if kind is None or not parts.hostname:
        raise ValueError(f"{url[:60]!r} is no data:, file:// or http(s):// URL")
    connection = kind(parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
    address = str(socket.getaddrinfo(parts.hostname, connection.port, type=socket.SOCK_STREAM)[0][4][0])
    if not private and not _public(address):
        raise ValueError(f"{parts.hostname} has no public address; the server asks others with --private-addresses")
    # The address that was judged is the one that is asked: a second look-up could give another.
    connection.sock = socket.create_connection((address, connection.port), timeout=_SECONDS / 2)
    # A timeout is of each read, and a site may send a byte at a time. TLS takes the socket away, not its duplicate.
    watched, late = connection.sock.dup(), Event()
    timer = Timer(_SECONDS, _cut, (watched, late))
    timer.start()
    try:
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=parts.hostname)
        path = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "himap-train"})
        answer = connection.getresponse()
        if answer.status != 200:
            to = answer.getheader("Location")
            raise ValueError(f"{parts.hostname} answered {answer.status}" + (f": ask for {to} itself" if to else ""))
        body = bytearray()
        while part := answer.read1(2**16):
            body += part
            if len(body) > MOST_BYTES:
                raise ValueError(too_much)
        if late.is_set():  # what has come so far may be half of it
            raise ValueError(too_much)
        return bytes(body)
    except (OSError, HTTPException) as error:
        if late.is_set():
            raise ValueError(too_much) from error
        raise
    finally:
        timer.cancel()
        watched.close()
        connection.close()


def _cut(asked: socket.socket, late: Event) -> None:
    late.set()
    with suppress(OSError):  # it is closed by now
        asked.shutdown(socket.SHUT_RDWR)


def _public(address: str) -> bool:
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        found = found.ipv4_mapped or found
    return found.is_global and not found.is_multicast


_READ = ("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
         "top_p", "stop", "seed")  # fmt: skip
_NAMES_ONLY = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
_ONE_VALUE = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0,
              "logit_bias": {}, "tools": [], "modalities": ["text"], "response_format": {"type": "text"}}  # fmt: skip
"""What is understood as long as it changes nothing: what would be ignored is refused instead."""

_COLDEST = 0.01
"""Below, logits over temperature are no numbers any more: the answer is greedy."""
_NARROWEST = 1e-6
"""The likeliest token alone, which 0 stands for."""


class UnknownModelError(ValueError):
    """A request for a model that is not served."""


@dataclass(frozen=True)
class Asked:
    """A prompt; `seed` is set where sampling must give the same again."""

    sample: Sample
    answering: Answering
    seed: int | None


class Reader:
    """Reads requests for one model.

    Args:
        name: The model's.
        encoder: From `prompt_encoder`, with room for one token.
        max_new_tokens: Where an answer is cut that names no length.
        folder: Where `file://` images may lie; None for no files.
        private: Images may be fetched from addresses that are not public.
    """

    def __init__(
        self, name: str, encoder: Encoder, max_new_tokens: int, folder: Path | None = None, private: bool = False
    ) -> None:
        self.name, self._encoder, self._max_new_tokens = name, encoder, max_new_tokens
        self._folder, self._private, self._lock = folder, private, Lock()

    def __call__(self, body: Any) -> Asked:
        """Read one; images are fetched here.

        Raises:
            UnknownModelError: It is for another model.
            ValueError: It cannot be answered; says why.
        """
        if not isinstance(body, Mapping):
            raise ValueError("the request is no JSON object")
        given = {key: value for key, value in body.items() if value is not None}
        if given.get("model", self.name) != self.name:
            raise UnknownModelError(f"the model {given['model']!r} is not served here; {self.name!r} is")
        check_keys("the request", given, (*_READ, *_NAMES_ONLY, *_ONE_VALUE))
        for key, only in _ONE_VALUE.items():
            if given.get(key, only) != only:
                raise ValueError(f"{key!r} can only be {only!r} here")
        if not isinstance(given.get("stream", False), bool):
            raise ValueError(f"'stream' is {given['stream']!r:.40}; expected true or false")
        if not isinstance(given.get("stream_options", {}), Mapping):
            raise ValueError(f"'stream_options' is {given['stream_options']!r:.40}; expected an object")
        length = number(given, "max_completion_tokens", 1, 2**31) or number(given, "max_tokens", 1, 2**31)
        temperature = number(given, "temperature", 0, 100, float) or 0
        top_p = number(given, "top_p", 0, 1, float)
        search: dict[str, Any] = {"do_sample": False}
        if temperature >= _COLDEST:  # whatever else the checkpoint's generation config narrows the choice by
            search = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "min_p": None, "typical_p": 1.0}
            search |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
            search["top_p"] = 1.0 if top_p is None else max(float(top_p), _NARROWEST)
        stop = given.get("stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"'stop' is {stop!r:.60}; expected a text or a list of texts")
        seed = number(given, "seed", -(2**63), 2**63 - 1)
        conversation = self._conversation(given.get("messages"))
        try:
            with self._lock:  # tokenizers are for one thread at a time
                sample = self._encoder.encode_prompt(conversation)
        except SampleTooLongError as error:
            said, _, _ = str(error).partition("; set a larger")  # a trainer's way out
            raise SampleTooLongError(f"{said}, the model's context less one token of an answer") from None
        room = room_for_answer(self._encoder, sample)
        return Asked(sample, Answering(min(length or self._max_new_tokens, room), search, tuple(stops)), seed)

    def _conversation(self, messages: Any) -> Conversation:
        if not isinstance(messages, list) or not messages:
            raise ValueError("'messages' is missing or empty")
        given = [_as_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
        turns, shown = turns_of({"messages": given}, "the request")
        if turns[-1].role != "user":
            raise ValueError("the last message is not the user's: there is nothing to answer")
        # a number is an `<image>` that somebody wrote, without an image
        values = [image for image in shown if not isinstance(image, int)]
        images = tuple(image_of(image, "the request", self._folder, self._private) for image in values)
        return Conversation("request", images, turns, place="the request")


def _as_turn(message: Any, where: str) -> Any:
    """A message, of the system where it is the developer's; what would be ignored is refused here too."""
    if not isinstance(message, Mapping):
        return message
    given = {key: value for key, value in message.items() if key in ("role", "content") or value not in (None, [])}
    check_keys(where, given, ("role", "content", "name", "refusal", "annotations", "weight"))
    given.pop("weight", None)  # of an answer that is learned
    return {**given, "role": "system"} if given.get("role") == "developer" else given


def number(given: Mapping[str, Any], key: str, least: float, most: float, kind: type = int) -> Any:
    """A value of a request where it is a number in range, None where there is none."""
    value = given.get(key)
    wanted = int if kind is int else int | float
    if value is not None and (isinstance(value, bool) or not isinstance(value, wanted) or not least <= value <= most):
        raise ValueError(f"{key!r} is {value!r:.40}; expected {kind.__name__} from {least} to {most}")
    return value
