"""A PromptEmbedder behind OpenAI's `/v1/embeddings`, whose body names the task as well.

`instruction` is a sentence, `prompt_name` one of training's; without either the side's default. Requests that arrive
within a few milliseconds are one packed batch, in which a text that is asked for under several instructions is read
once. Every error is OpenAI's object with one sentence.

Legend: D embedding size.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pe.bulk.columns import Embeddings, shortened
from pe.data.instructions import as_prompts
from pe.method.encoder import Floats
from pe.method.requests import Instruction, Requests, Side, Truncation, check_arguments
from pe.runs.batcher import Batcher, Busy

logger = logging.getLogger(__name__)
PATH = "/v1/embeddings"
JSON = "application/json"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes.

    Attributes:
        window: seconds that a first request waits for others.
        batch_texts: texts of a batch; a larger request runs alone.
        texts: texts of a request.
        body: bytes of a request.
        instruction: characters of an instruction, which is read whole.
        waiting: requests that may wait for a batch.
        seconds: after which a request is given up.
    """

    window: float = 0.005
    batch_texts: int = 256
    texts: int = 2048
    body: int = 2 << 20
    instruction: int = 4096
    waiting: int = 256
    seconds: float = 60.0


class Served(Protocol):
    """What is served: all that a server asks of an embedder."""

    @property
    def instructions(self) -> Mapping[str, str]:
        """The instructions of training, by name."""

    @property
    def truncation(self) -> Truncation:
        """How many texts were cut."""

    @property
    def dimensions(self) -> int:
        """Size of an embedding."""

    def tokenized(self, requests: Requests) -> Requests:
        """The requests with what is read of each text, whose length counts as its tokens."""

    def encode_each(self, requests: Requests) -> Floats:
        """Embeddings `[N, D]`, each text under its own instruction."""


class Refused(Exception):
    """A request that gets OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class EmbeddingsBody(BaseModel):
    """What a client posts; a key that would change nothing is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | list[str] = Field(description="a text, or a list of texts")
    model: str | None = Field(None, description="the name that the server goes by")
    instruction: str | None = Field(None, description="the task, in a sentence")
    prompt_name: str | None = Field(None, description="in its place: the name of an instruction of training")
    side: Literal["query", "document"] | None = Field(None, description="whose templates and whose default are used")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32")
    dimensions: int | None = Field(None, description="the first numbers that stay, of length one again")

    @field_validator("input", mode="before")
    @classmethod
    def texts_alone(cls, given: Any) -> Any:
        """Raise ValueError for what is no text."""
        items = given if isinstance(given, list) else [given]
        wrong = next((item for item in items if not isinstance(item, str)), None)
        if wrong is not None:
            raise ValueError(
                f"expected a text or a list of texts, got {wrong!r:.80}; token ids are another model's (LangChain:"
                " check_embedding_ctx_length=False)"
            )
        if not items:
            raise ValueError("expected at least one text, got none")
        return given

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Job(NamedTuple):
    """Texts under one instruction."""

    texts: list[str]
    instruction: Instruction


class Done(NamedTuple):
    """Embeddings `[N, D]` float32 of a job, and how many tokens its texts have."""

    embeddings: Embeddings
    tokens: int


class Meters:
    """What `/metrics` shows."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("pe_requests", "Requests for embeddings.", ["status"], registry=self.registry)
        self.seconds = Histogram("pe_request_seconds", "Time of a request.", registry=self.registry)
        self.texts = Counter("pe_texts", "Texts embedded.", registry=self.registry)
        self.tokens = Counter("pe_tokens", "Tokens of these texts.", registry=self.registry)
        self.cut = Counter("pe_truncated_texts", "Texts cut to the model's max_length.", registry=self.registry)
        sizes = [2**n for n in range(12)]
        self.batch = Histogram("pe_batch_texts", "Texts of a batch.", buckets=sizes, registry=self.registry)
        self.running = Histogram("pe_batch_seconds", "Time of a batch.", registry=self.registry)
        gauge = Gauge("pe_waiting_requests", "Requests that wait for a batch.", registry=self.registry)
        gauge.set_function(waiting)


class Service:
    """The embedder, what waits for it, and what it counts.

    Attributes:
        name: what clients call the model.
        prompts: the instructions of training, by name.
    """

    def __init__(self, model: Served, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.prompts = as_prompts(model.instructions)
        self.started = int(time.time())
        self.batcher = Batcher[Job, Done](
            self.run,
            lambda job: len(job.texts),
            window=limits.window,
            most=limits.batch_texts,
            waiting=limits.waiting,
        )
        self.meters = Meters(lambda: self.batcher.waiting)

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        """Embed the texts of all jobs together."""
        wanted = {found: place for place, found in enumerate(dict.fromkeys(job.instruction for job in jobs))}
        texts = [text for job in jobs for text in job.texts]
        index = [wanted[job.instruction] for job in jobs for _ in job.texts]
        cut, meters = self.model.truncation.cut, self.meters
        with meters.running.time():
            requests = self.model.tokenized(Requests(texts, list(wanted), index))
            embeddings = self.model.encode_each(requests)
        lengths = [len(read) for read in requests.read or ()]
        meters.batch.observe(len(texts))
        meters.texts.inc(len(texts))
        meters.tokens.inc(sum(lengths))
        meters.cut.inc(self.model.truncation.cut - cut)
        done, first = [], 0
        for job in jobs:
            part = slice(first, first + len(job.texts))
            done.append(Done(embeddings[part], sum(lengths[part])))
            first = part.stop
        return done

    def instruction(self, body: EmbeddingsBody) -> Instruction:
        """What a request's texts are embedded under.

        Raises:
            Refused: both an instruction and a name, a name that is unknown, or neither and no default.
        """
        given, name = body.instruction, body.prompt_name
        side: Side = body.side or ("document" if name == "document" else "query")
        if given is not None and name is not None:
            raise Refused(400, "prompt_name: expected none beside an instruction, got both", "prompt_name")
        if given is not None:
            if len(given) > self.limits.instruction:
                most = self.limits.instruction
                raise Refused(413, f"instruction: expected at most {most} characters, got {len(given)}", "instruction")
            return Instruction(given, side)
        found = self.prompts.get(side if name is None else name)
        if found is None and name is not None:
            known = ", ".join(map(repr, self.prompts)) or "none, the model has no prompts"
            raise Refused(400, f"prompt_name: expected one of {known}, got {name!r:.80}", "prompt_name")
        if found is None:
            raise Refused(
                400, f"instruction: expected a sentence, got none, and {side} texts have no default", "instruction"
            )
        return Instruction(found, side)

    def job(self, body: EmbeddingsBody) -> Job:
        """What a request asks for.

        Raises:
            Refused: another model, more than is taken, or what cannot be embedded.
        """
        if body.model not in (None, self.name):
            message = f"model: expected {self.name!r}, got {body.model!r:.80}"
            raise Refused(404, message, "model", "model_not_found")
        texts, wanted = body.texts, self.instruction(body)
        if len(texts) > self.limits.texts:
            raise Refused(413, f"input: expected at most {self.limits.texts} texts, got {len(texts)}", "input")
        if body.dimensions is not None and not 1 <= body.dimensions <= self.model.dimensions:
            message = f"dimensions: expected 1 to {self.model.dimensions}, got {body.dimensions}"
            raise Refused(400, message, "dimensions")
        try:
            check_arguments(texts, [wanted.text], wanted.side)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        return Job(texts, wanted)

    async def answer(self, request: Request) -> Response:
        """The embeddings that a request asks for.

        Raises:
            Refused: what cannot be read or is too much, a full queue, or no result in time.
        """
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = parsed(await read_body(request, self.limits.body))
                done = await self.batcher.submit(self.job(body))
                content = await asyncio.to_thread(self.rendered, body, done)
        except Busy as busy:
            raise Refused(503, f"the server is busy: {busy}; try again later", code="busy") from busy
        except TimeoutError as late:
            message = f"expected an answer within {self.limits.seconds:g} s, got none; send fewer or shorter texts"
            raise Refused(504, message, code="timeout") from late
        return Response(content, media_type=JSON)

    def rendered(self, body: EmbeddingsBody, done: Done) -> str:
        """OpenAI's list of embeddings, as JSON."""
        rows = shortened(done.embeddings, body.dimensions)
        as_text = body.encoding_format == "base64"
        shown = [base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist() for row in rows]
        data = [{"object": "embedding", "index": place, "embedding": item} for place, item in enumerate(shown)]
        usage = {"prompt_tokens": done.tokens, "total_tokens": done.tokens}
        return json.dumps({"object": "list", "data": data, "model": self.name, "usage": usage})

    def models(self) -> dict[str, Any]:
        """OpenAI's list of models, with the prompts of the one that there is."""
        shown = {"id": self.name, "object": "model", "created": self.started, "owned_by": "promptembedder"}
        known = {"dimensions": self.model.dimensions, "prompts": self.prompts}
        return {"object": "list", "data": [shown | known]}


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request; Refused where it has more than `most` bytes, of which no more are kept."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise Refused(413, f"body: expected at most {most} bytes, got more; send fewer texts at a time")
    except ClientDisconnect as gone:
        raise Refused(400, f"body: expected all of it, got {len(body)} bytes and no more") from gone
    return bytes(body)


def parsed(body: bytes) -> EmbeddingsBody:
    """A request's JSON, checked.

    Raises:
        Refused: no JSON, or keys or values that are not expected; the first of them.
    """
    try:
        return EmbeddingsBody.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "body"
        message = first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{name}: {message}", None if name == "body" else name) from error


def error_response(refused: Refused) -> Response:
    """OpenAI's error object."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}
    headers = {"Retry-After": "1"} if refused.status == 503 else None
    return Response(json.dumps({"error": error}), refused.status, headers, media_type=JSON)


def build_app(model: Served, name: str, limits: Limits | None = None) -> FastAPI:
    """The server of one embedder, which clients call `name`."""
    service = Service(model, name, limits or Limits())

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield

    app = FastAPI(title="PromptEmbedder", lifespan=running)
    schema = {"requestBody": {"content": {"application/json": {"schema": EmbeddingsBody.model_json_schema()}}}}
    app.add_api_route(PATH, service.answer, methods=["POST"], openapi_extra=schema, response_class=Response)
    app.add_api_route("/v1/models", service.models)

    @app.get("/health")
    def health() -> Response:
        running = service.batcher.running
        return Response(
            json.dumps({"status": "ok" if running else "stopped"}), 200 if running else 503, media_type=JSON
        )

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.middleware("http")
    async def measured(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Count requests for embeddings, and give what failed inside them a sentence and the log its traceback."""
        begin = time.perf_counter()
        try:
            response = await go_on(request)
        except Exception:
            logger.exception("a request failed")
            response = error_response(Refused(500, "the server failed; its log says how"))
        if request.url.path == PATH:
            service.meters.requests.labels(response.status_code).inc()
            service.meters.seconds.observe(time.perf_counter() - begin)
        return response

    @app.exception_handler(Refused)
    async def refuse(_: Request, refused: Refused) -> Response:
        return error_response(refused)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; expected POST {PATH}"
        return error_response(Refused(error.status_code, message))

    return app
