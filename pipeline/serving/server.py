"""A model in front of traffic: a Ray Serve application that answers rows of mixed tasks over HTTP.

Each replica holds the model and asks the registry where the alias points. When it moves, forwards or by a rollback, the
replicas change over one after another: each loads the new version beside the old one, which answers until then.
"""

# Without deferred annotations: Ray Serve and FastAPI read the routes' own.
import contextlib
import hmac
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import Field
from ray import serve

from pipeline.answer import ANSWER, GENERATED
from pipeline.errors import InputError, masked
from pipeline.promotion.versions import RegistryUnavailable
from pipeline.serving.batching import Batcher, Overloaded, Version
from pipeline.serving.served_model import resolve
from pipeline.settings import Settings

TOKEN = "MTL_LORA_SERVE_TOKEN"
"""Variable of the environment with the token that clients must bring."""
_TURN_S = 300.0
"""A replica that has not changed over within this time has lost its turn."""
_log = logging.getLogger(__name__)


class ServerConfig(Settings):
    """What is served, and within which limits."""

    model: str
    """``models:/NAME@champion`` follows the alias; ``models:/NAME/NUMBER`` and a folder stay."""
    tracking_uri: str = ""
    """Registry of the model."""
    replicas: int = Field(default=1, ge=1)
    """Processes that hold the model; a GPU each where the cluster has as many."""
    batch_tokens: int = Field(default=2048, ge=1)
    """About so many tokens are answered together."""
    max_rows: int = Field(default=256, ge=1)
    """Most rows of a request."""
    max_bytes: int = Field(default=1 << 20, ge=1)
    """Longest body of a request."""
    max_waiting_rows: int = Field(default=1024, ge=1)
    """Rows that may wait in a replica; further requests are refused with 429."""
    timeout_s: float = Field(default=10.0, gt=0)
    """A request that is not answered by then ends with 503."""
    poll_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks at the registry."""
    needs_token: bool = False
    """Refuse to start where the environment has no token, and to answer whoever does not bring it."""


class ScoreRequest(Settings):
    """Body of ``POST /v1/score``."""

    rows: list[dict[str, Any]] = Field(min_length=1)
    """Each with its ``task`` and the fields that the task's template names."""


_COLUMNS = (*ANSWER, GENERATED)


class ScoredRow(Settings):
    """One answer."""

    task: str
    score: float | None
    """Binary: P(class 1); ordinal: expected value; else the probability of the predicted class. Null for a text."""
    label: int
    """Predicted class; -1 where what the model wrote is the word of none."""
    label_word: str
    probabilities: list[float]
    generated_text: str | None = None
    """What the model wrote; there where a task's answers are written."""


class ScoreResponse(Settings):
    """Answer of ``POST /v1/score``: one version has answered all rows, in their order."""

    model: str
    answers: list[ScoredRow]


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


@ray.remote(num_cpus=0)
class _Turns:
    """Lets one replica at a time change over."""

    def __init__(self) -> None:
        self._holder, self._since = "", 0.0

    def take(self, who: str) -> bool:
        """Whether the turn is this replica's now."""
        if self._holder in ("", who) or time.monotonic() - self._since > _TURN_S:
            self._holder, self._since = who, time.monotonic()
        return self._holder == who

    def give(self, who: str) -> None:
        """End the turn."""
        if self._holder == who:
            self._holder = ""


@contextlib.contextmanager
def _turn(who: str, wait_s: float) -> Iterator[None]:
    actor: Any = _Turns
    turns = actor.options(name="mtl-lora-turns", get_if_exists=True, lifetime="detached").remote()
    while not ray.get(turns.take.remote(who)):
        time.sleep(min(wait_s, 1.0))
    try:
        yield
    finally:
        ray.get(turns.give.remote(who))


@serve.deployment(
    name="scores",
    max_ongoing_requests=4096,
    health_check_timeout_s=60,
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
@serve.ingress(api)
class ScoreServer:
    """One replica.

    Args:
        config: of the server.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config, self._metrics, self._token = config, _Metrics(), os.environ.get(TOKEN, "")
        if config.needs_token and not self._token:
            raise InputError(f"the environment of a replica must hold {TOKEN}, it does not; set it where Ray starts")
        self._served = resolve(config.model, config.tracking_uri)
        first = Version(self._served.words, self._served.load(config.batch_tokens))
        self._batcher = Batcher(first, config.batch_tokens, config.max_waiting_rows)
        self._metrics.model.labels(first.words).set(1)
        self._name = serve.get_replica_context().replica_tag
        if "@" in config.model:  # a thread of its own, so that requests are answered while a version is loaded
            threading.Thread(target=self._follow, name="follow", daemon=True).start()

    @api.post(
        "/v1/score",
        response_model=ScoreResponse,
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}},
    )
    async def score(self, request: Request) -> Response:
        """Answer rows of any tasks, mixed."""
        begun = time.monotonic()
        try:
            self._authorize(request)
            asked = self._parsed(await self._body(request))
            self._metrics.waiting.set(self._batcher.waiting_rows)
            model, answers = await self._batcher.ask(asked.rows, self._config.timeout_s)
            found: Response = JSONResponse(
                {"model": model, "answers": [dict(zip(_COLUMNS, answer, strict=False)) for answer in answers]}
            )
            for task, *_ in answers:
                self._metrics.rows.labels(task, model).inc()
        except (_Refusal, InputError, Overloaded, TimeoutError) as error:
            found = self._refused(error)
        except Exception:  # noqa: BLE001 - told to the log, never to a client
            _log.exception("a request failed")
            found = JSONResponse({"error": "the server failed at this request; its log says why"}, 500)
        self._metrics.requests.labels(str(found.status_code)).inc()
        self._metrics.seconds.observe(time.monotonic() - begun)
        return found

    @api.get("/v1/tasks")
    async def tasks(self, request: Request) -> Response:
        """Return the tasks that are answered, each with its kind and the fields of its rows."""
        try:
            self._authorize(request)
        except _Refusal as error:
            return self._refused(error)
        version = self._batcher.version
        tasks = {
            spec.name: {
                "kind": spec.kind,
                "fields": [*spec.text_fields, *([spec.choices_field] if spec.kind == "choice" else [])],
                "label_words": list(spec.label_words),
            }
            for spec in version.predictor.spec.tasks
        }
        return JSONResponse({"model": version.words, "tasks": tasks})

    @api.get("/healthz")
    async def healthz(self) -> Response:
        """Say that the process lives."""
        return PlainTextResponse("ok")

    @api.get("/readyz")
    async def readyz(self) -> Response:
        """Say which version answers."""
        return JSONResponse({"model": self._batcher.version.words})

    @api.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        """Return this replica's counts in Prometheus' form."""
        try:
            self._authorize(request)
        except _Refusal as error:
            return self._refused(error)
        self._metrics.waiting.set(self._batcher.waiting_rows)
        return PlainTextResponse(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4")

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
            asked = ScoreRequest.model_validate(json.loads(body))
        except RecursionError as error:
            raise _Refusal(422, "a body must be JSON of a sane depth; send plain fields") from error
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

    def _follow(self) -> None:
        while True:
            time.sleep(self._config.poll_s)
            try:
                found = resolve(self._config.model, self._config.tracking_uri)
                if found == self._served:
                    continue
                with _turn(self._name, self._config.poll_s):
                    predictor = found.load(self._config.batch_tokens)
                    self._metrics.model.labels(self._served.words).set(0)
                    self._served, self._batcher.version = found, Version(found.words, predictor)
                self._metrics.model.labels(found.words).set(1)
                self._metrics.swaps.inc()
                _log.warning("%s answers now", found.words)
            except (InputError, RegistryUnavailable) as error:  # what answers now goes on answering
                _log.warning("%s stays: %s", self._served.words, masked(str(error)))
            except Exception:  # noqa: BLE001 - whatever it was, the next look may find better
                _log.exception("%s stays", self._served.words)


def application(config: ServerConfig) -> serve.Application:
    """Return the application; ``infra/kuberay/rayservice.yaml`` names this function."""
    gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= config.replicas else 0
    options = {"num_cpus": 0.5, "num_gpus": gpus}
    deployment: Any = ScoreServer
    return deployment.options(num_replicas=config.replicas, ray_actor_options=options).bind(config)


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
    resolve(config.model, config.tracking_uri).folder()  # what is wrong with it is said here, once
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(application(config), name="mtl-lora", route_prefix="/")
