"""The endpoint: `/v1/models`, `/v1/chat/completions` and `/health`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import uuid4

from himap_train.data.encode import SampleTooLongError
from himap_train.serving.batches import Answer, Batches
from himap_train.serving.requests import MOST_BYTES, Reader, UnknownModelError


def build_app(reader: Reader, batches: Batches, about: Mapping[str, Any]) -> Any:
    """The application for an ASGI server.

    Args:
        reader: Of requests.
        batches: What answers them.
        about: What `/v1/models` says of the model beside its name.

    Raises:
        ImportError: Starlette is not installed.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    card = {"id": reader.name, "object": "model", "created": int(time.time()), "owned_by": "himap-train", **about}

    async def models(_: Any) -> Any:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Any) -> Any:
        if (name := request.path_params["name"]) != reader.name:
            raise UnknownModelError(f"model {name!r:.80} is not served here; this is {reader.name!r}")
        return JSONResponse(card)

    async def health(_: Any) -> Any:
        return JSONResponse({"status": "ok"})

    async def chat(request: Any) -> Any:
        body = await _body(request)
        answer = batches.ask(await asyncio.to_thread(reader, body))
        if body.get("stream"):
            usage = (body.get("stream_options") or {}).get("include_usage") is True
            return StreamingResponse(_events(answer, reader.name, usage), media_type="text/event-stream")
        message = {"role": "assistant", "content": await _whole(answer, request)}
        choices = [{"index": 0, "message": message, "finish_reason": answer.finish}]
        return JSONResponse(_reply("chat.completion", reader.name, choices=choices, usage=_usage(answer)))

    async def wrong(_: Any, error: Exception) -> Any:
        known = 404 if isinstance(error, UnknownModelError) else 400
        return JSONResponse(_told(error), 500 if isinstance(error, RuntimeError) else known)

    chats = Route("/v1/chat/completions", chat, methods=["POST"])
    named = Route("/v1/models/{name:path}", model)
    routes = [Route("/v1/models", models), named, Route("/health", health), chats]
    return Starlette(routes=routes, exception_handlers={ValueError: wrong, RuntimeError: wrong})


async def _body(request: Any) -> Any:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > 2 * MOST_BYTES:
            raise ValueError(f"the request has more than {2 * MOST_BYTES >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None


async def _whole(answer: Answer, request: Any) -> str:
    """The text of an answer, which ends, or is never begun, where nobody waits for it any more."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.leave()

    watching = asyncio.create_task(watch())
    try:
        return "".join([piece async for piece in answer])
    finally:
        watching.cancel()


async def _events(answer: Answer, model: str, usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events; an error on the way is the last."""
    head = _reply("chat.completion.chunk", model)

    def chunk(delta: Mapping[str, str], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in answer:
            yield chunk({"content": piece})
    except RuntimeError as error:
        yield _event(_told(error))
        return
    yield chunk({}, answer.finish)
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _reply(kind: str, model: str, **values: Any) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": model, **values}


def _usage(answer: Answer) -> dict[str, int]:
    prompt, new = len(answer.asked.sample["input_ids"]), len(answer.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _told(error: Exception) -> dict[str, Any]:
    kind = "server_error" if isinstance(error, RuntimeError) else "invalid_request_error"
    codes: dict[type, str] = {SampleTooLongError: "context_length_exceeded", UnknownModelError: "model_not_found"}
    return {"error": {"message": str(error), "type": kind, "param": None, "code": codes.get(type(error))}}
