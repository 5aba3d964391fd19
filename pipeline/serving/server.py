"""A model in front of traffic: a Ray Serve application that answers rows of mixed tasks over HTTP.

The server reads requests, and asks the models behind it, which stand in processes of their own (see
:mod:`pipeline.serving.model_server`): where one of them is lost, what it was asked is asked of another.
"""

# Without deferred annotations: Ray Serve and FastAPI read the routes' own.
import asyncio
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from pipeline.answer import ANSWER, GENERATED, Answer
from pipeline.errors import InputError, masked
from pipeline.json_text import parse_json
from pipeline.serving.batching import Batcher, Overloaded, Row
from pipeline.serving.live import LiveTraffic
from pipeline.serving.model_server import NoVersion, models
from pipeline.serving.served_model import resolve
from pipeline.serving.server_config import ScoreRequest, ScoreResponse, ServerConfig

TOKEN = "MTL_LORA_SERVE_TOKEN"
"""Variable of the environment with the token that clients must bring."""
_ANSWER = (*ANSWER, GENERATED)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRIES = 5
"""Models that a batch is asked of, each after the one before was lost."""
_DESCRIBED_S = 3.0
"""Longest time in which a model says which it is."""
_log = logging.getLogger(__name__)


class _Refusal(Exception):
    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class _Metrics:
    """What a replica counts, in Prometheus' form."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("mtl_lora_requests", "Requests by status.", ["status"], registry=self.registry)
        self.rows = Counter("mtl_lora_rows", "Rows answered.", ["task", "model"], registry=self.registry)
        self.seconds = Histogram("mtl_lora_request_seconds", "Time of a request.", registry=self.registry)
        self.waiting = Gauge("mtl_lora_waiting_rows", "Rows that wait.", registry=self.registry)
        self.swaps = Counter("mtl_lora_swaps", "Versions changed over to.", registry=self.registry)
        self.model = Gauge("mtl_lora_model", "1 for the version that answers.", ["model"], registry=self.registry)


api = FastAPI(title="mtl-lora", description="Scores for rows of mixed tasks.")


@api.exception_handler(404)
@api.exception_handler(405)
async def _not_there(request: Request, error: Any) -> JSONResponse:
    what = f"{request.method} {request.url.path}"
    return JSONResponse({"error": f"{what} is nothing that is answered here; see /docs"}, error.status_code)


def _asking(models: Any) -> Callable[[list[Sequence[Row]]], Any]:
    """Return what asks a batch of models: of another one where the first is lost."""

    async def ask(requests: list[Sequence[Row]]) -> tuple[str, list[list[Answer] | InputError]]:
        for turn in range(_TRIES):
            try:
                found: tuple[str, list[list[Answer] | InputError]] = await models.answer.remote(requests)
                return found
            except RayTaskError:  # the model itself failed
                raise
            except (RayActorError, DeploymentUnavailableError) as error:
                _log.warning("a model was lost, its batch is asked of another: %s", masked(repr(error)))
                await asyncio.sleep(0.1 * turn)
        raise TimeoutError

    return ask


@serve.deployment(
    name="server",
    max_ongoing_requests=4096,
    health_check_timeout_s=60,
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress(api)
class ScoreServer:
    """One replica.

    Args:
        config: of the server.
        champion: the models that answer.
        challenger: those that are tried.
    """

    def __init__(self, config: ServerConfig, champion: Any, challenger: Any = None) -> None:
        self._config, self._metrics, self._token = config, _Metrics(), os.environ.get(TOKEN, "")
        if config.needs_token and not self._token:
            raise InputError(f"the environment of a replica must hold {TOKEN}, it does not; set it where Ray starts")
        self._models, self._last = champion, ""
        limits = (config.batch_tokens, config.max_waiting_rows, config.replicas)
        self._batcher = Batcher(_asking(champion), *limits)
        if challenger is None:
            self._live = LiveTraffic(config, self._batcher)
            return

        async def describe() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = await challenger.describe.remote()
                return found
            except NoVersion:
                return None

        self._live = LiveTraffic(config, self._batcher, Batcher(_asking(challenger), *limits), describe)

    @api.post(
        "/v1/score",
        response_model=ScoreResponse,
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}},
    )
    async def score(self, request: Request) -> Response:
        """Answer rows of any tasks, mixed."""
        begun, name = time.monotonic(), request.headers.get("x-request-id", "")
        name = name if _REQUEST_ID.fullmatch(name) else uuid.uuid4().hex
        try:
            self._authorize(request)
            asked = self._parsed(await self._body(request))
            self._metrics.waiting.set(self._batcher.waiting_rows)
            model, answers = await self._live.answer(name, asked.key, asked.rows, self._config.timeout_s)
            rows = [dict(zip(_ANSWER, answer, strict=False)) for answer in answers]
            found: Response = JSONResponse({"request": name, "model": model, "answers": rows})
            self._count(model, answers)
        except (_Refusal, InputError, Overloaded, TimeoutError) as error:
            found = self._refused(error)
        except Exception:  # noqa: BLE001 - told to the log, never to a client
            _log.exception("a request failed")
            found = JSONResponse({"error": "the server failed at this request; its log says why"}, 500)
        self._metrics.requests.labels(str(found.status_code)).inc()
        self._metrics.seconds.observe(time.monotonic() - begun)
        return found

    def _count(self, model: str, answers: Sequence[Answer]) -> None:
        for task, *_ in answers:
            self._metrics.rows.labels(task, model).inc()
        if model not in (self._last, self._live.challenger):
            if self._last:
                self._metrics.model.labels(self._last).set(0)
                self._metrics.swaps.inc()
            self._last = model
            self._metrics.model.labels(model).set(1)

    @api.get("/v1/tasks")
    async def tasks(self, request: Request) -> Response:
        """Return the tasks that are answered, each with its kind and the fields of its rows."""
        try:
            self._authorize(request)
        except _Refusal as error:
            return self._refused(error)
        return await self._described(lambda found: found)

    @api.get("/healthz")
    async def healthz(self) -> Response:
        """Say that the process lives."""
        return PlainTextResponse("ok")

    @api.get("/readyz")
    async def readyz(self) -> Response:
        """Say which version answers."""
        return await self._described(lambda found: {"model": found["model"], "challenger": self._live.challenger})

    @api.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        """Return this replica's counts in Prometheus' form."""
        try:
            self._authorize(request)
        except _Refusal as error:
            return self._refused(error)
        self._metrics.waiting.set(self._batcher.waiting_rows)
        return PlainTextResponse(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4")

    async def _described(self, shown: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
        try:
            found = await asyncio.wait_for(self._models.describe.remote(), _DESCRIBED_S)
            return JSONResponse(shown(found))
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            return self._refused(_Refusal(503, "no model answers at the moment; try again in a second", 1))

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._config.needs_token and not hmac.compare_digest(given.encode(), self._token.encode()):
            raise _Refusal(401, "a request must bring the server's token in 'Authorization: Bearer …'; ask for it")

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._config.max_bytes:
                raise _Refusal(413, f"a body may have {self._config.max_bytes} bytes; send fewer rows at once")
        return body

    def _parsed(self, body: bytes) -> ScoreRequest:
        try:
            asked = ScoreRequest.model_validate(parse_json(body))
        except ValueError as error:
            raise _Refusal(
                422, 'a body must be JSON of the form {"rows": [{"task": …, field: text}]}, this one is not; see /docs'
            ) from error
        if len(asked.rows) > self._config.max_rows:
            raise _Refusal(
                413, f"a request may have {self._config.max_rows} rows, got {len(asked.rows)}; send them in parts"
            )
        return asked

    def _refused(self, error: Exception) -> JSONResponse:
        if isinstance(error, Overloaded):
            error = _Refusal(429, f"the server is overloaded: {error}; try again in a second", 1)
        elif isinstance(error, TimeoutError):
            error = _Refusal(503, f"no answer within {self._config.timeout_s:g} s; try again with fewer rows", 1)
        elif not isinstance(error, _Refusal):
            error = _Refusal(422, str(error))
        headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
        return JSONResponse({"error": masked(str(error))}, error.status, headers)


def application(config: ServerConfig) -> serve.Application:
    """Return the application; a cluster's ``rayservice.yaml`` names this function."""
    challenger = None
    if config.has_challenger:
        niceness = 0 if config.canary.share else 10  # a shadow computes with what the champion leaves
        challenger = models(config, "challenger", config.challenger, is_needed=False, niceness=niceness)
    front: Any = ScoreServer
    # More than one, where there are machines for it: a lost one is no outage.
    return front.options(num_replicas=min(config.replicas, 2)).bind(
        config, models(config, "scores", config.model), challenger
    )


def run_server(config: ServerConfig, host: str, port: int) -> None:
    """Serve on a cluster that is there, and return when the application answers.

    The token never travels: replicas take it from their own environment, which a local cluster has from this process.

    Raises:
        InputError: other machines could reach the server and no token is asked for, or there is no such model.
    """
    if host not in ("127.0.0.1", "localhost", "::1") and not config.needs_token:
        raise InputError(
            f"a server that other machines reach must ask for a token, got --host {host} and no {TOKEN}; set it in the "
            "environment of this command and of the cluster"
        )
    resolve(config.model, config.registry).folder()  # what is wrong with it is said here, once
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(application(config), name="mtl-lora", route_prefix="/")
