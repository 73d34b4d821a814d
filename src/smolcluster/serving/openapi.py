"""/openapi.json: what FastAPI knows of the requests, and what it cannot know of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from smolcluster.serving import answers

_SCHEMAS = "#/components/schemas/"
_STREAM = "text/event-stream"
# OpenAI's streams: the last event says so, and is no JSON.
_ENDED_BY_DONE = (answers.ChatCompletionEvent, answers.CompletionEvent)

# What each handler answers with 200, by its name: media type → what it looks like, None: text.
_ANSWERS: dict[str, dict[str, type[BaseModel] | None]] = {
    "chat_completions": {"application/json": answers.ChatCompletion, _STREAM: answers.ChatCompletionEvent},
    "completions": {"application/json": answers.Completion, _STREAM: answers.CompletionEvent},
    "models": {"application/json": answers.ModelList},
    "model": {"application/json": answers.ModelCard},
    "chat": {_STREAM: answers.ChatEvent},
    "events": {_STREAM: answers.ChatEvent},
    "cancel": {"application/json": answers.CancelledAnswer},
    "sessions": {"application/json": answers.SessionList},
    "session": {"application/json": answers.Session},
    "delete_session": {"application/json": answers.SessionDeleted},
    "config": {"application/json": answers.ServedConfig},
    "health": {"application/json": answers.Health},
    "metrics": {"text/plain": None},
    "reconnect": {"application/json": answers.Reconnecting},
}
_WHY = {
    400: "The request is wrong; `error.code` is `context_length_exceeded` if it has too many tokens.",
    401: "The API key is missing or wrong.",
    403: "The server is not called by this host name, or the page is of another origin.",
    404: "There is no such model, session or answer here.",
    409: "The session has an answer under way, or the request_id is in use.",
    413: "The body is too long.",
    415: "The body is not `application/json`.",
    500: "A conversation could not be read or written.",
    429: "Too many requests wait.",
    503: "Nobody computes at the moment.",
}
_GENERATING = {400, 413, 415, 429, 503}
_ERRORS: dict[str, set[int]] = {
    "chat_completions": {*_GENERATING, 404},
    "completions": {*_GENERATING, 404},
    "model": {404},
    "chat": {*_GENERATING, 409, 500},
    "events": {400, 404},
    "cancel": {404},
    "sessions": {400, 500},
    "session": {404, 500},
    "delete_session": {404, 409, 500},
    "reconnect": {413, 415},
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Let /openapi.json tell all paths' answers and errors; `bodies`: what requests have."""
    described: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not described:
            described.update(_described(app, bodies))
        return described

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to change it


def _described(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    for route in routes:
        route.operation_id = route.name
    found = get_openapi(title=app.title, version=app.version, routes=routes, summary="Language models over HTTP.")
    for methods in found["paths"].values():
        for operation in methods.values():
            _describe_operation(operation)
    # FastAPI's own schemas have floats where limits are integers, and its errors, which are not ours.
    found["components"] = {
        "schemas": _schemas(bodies),
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    found["security"] = [{}, {"key": []}]  # only a server with --api-key-file asks for one
    return found


def _schemas(bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    said: list[type[BaseModel]] = [answers.ErrorAnswer, answers.Unhealthy]
    said += [kind for kinds in _ANSWERS.values() for kind in kinds.values() if kind is not None]
    kinds: dict[str, tuple[type[BaseModel], Literal["validation", "serialization"]]] = {}
    for kind in said:
        kinds[kind.__name__] = kind, "serialization"
    for body in bodies:
        kinds[body.__name__] = body, "validation"
    _, found = models_json_schema(list(kinds.values()), ref_template=_SCHEMAS + "{model}")
    return dict(sorted(found["$defs"].items()))


def _describe_operation(operation: dict[str, Any]) -> None:
    name = operation["operationId"]
    first, _, rest = operation.pop("description", "").partition("\n\n")
    operation["summary"] = " ".join(first.split()).removesuffix(".")
    if rest:
        operation["description"] = rest
    responses = {"200": {"description": "The answer.", "content": _contents(_ANSWERS.get(name, {}))}}
    for status in sorted({401, 403} | _ERRORS.get(name, set())):
        responses[str(status)] = _error(status)
    if name == "events":
        responses["204"] = {"description": "It has ended, and no event is left: do not ask again."}
    if name == "health":  # which needs no key
        del responses["401"]
        operation["security"] = []
        responses["503"] = {"description": _WHY[503], "content": _contents({"application/json": answers.Unhealthy})}
    operation["responses"] = responses


def _contents(kinds: dict[str, type[BaseModel] | None]) -> dict[str, Any]:
    return {media: {"schema": _schema(kind, media)} for media, kind in kinds.items()}


def _schema(kind: type[BaseModel] | None, media: str) -> dict[str, Any]:
    if kind is None:
        return {"type": "string"}
    schema = {"$ref": _SCHEMAS + kind.__name__}
    if media != _STREAM:
        return schema
    # An event, as OpenAPI 3.2 has it: its data is a text, which in turn is JSON.
    text: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    if kind in _ENDED_BY_DONE:
        text = {"anyOf": [text, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": text}, "required": ["data"]}


def _error(status: int) -> dict[str, Any]:
    error: dict[str, Any] = {
        "description": _WHY[status],
        "content": _contents({"application/json": answers.ErrorAnswer}),
    }
    if status in (429, 503):
        error["headers"] = _RETRY_AFTER
    return error
