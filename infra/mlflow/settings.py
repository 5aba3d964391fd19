"""Where a stack stands: its folder, and the one file that holds its addresses and secrets."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

BUCKET = "mlflow"
"""Holds the artefacts; the database and its user bear this name, too."""
SETTINGS = "stack.env"
_SECRETS = ("POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY")
_PORTS = ("MLFLOW_PORT", "POSTGRES_PORT", "S3_PORT")


@dataclass(frozen=True)
class Settings:
    """What ``stack.env`` says, which ``docker compose --env-file`` reads as well.

    Attributes:
        data: the stack's folder, absolute.
        values: the file's variables. SeaweedFS takes the seven ports behind ``S3_PORT`` for itself.
    """

    data: Path
    values: dict[str, str]

    @property
    def host(self) -> str:
        """The address at which MLflow listens; PostgreSQL and S3 never leave the loopback."""
        return self.values["MLFLOW_HOST"]

    @property
    def mlflow_port(self) -> int:
        """The tracking server's port."""
        return int(self.values["MLFLOW_PORT"])

    @property
    def postgres_port(self) -> int:
        """PostgreSQL's port."""
        return int(self.values["POSTGRES_PORT"])

    @property
    def s3_port(self) -> int:
        """The port of the S3 server."""
        return int(self.values["S3_PORT"])

    @property
    def tracking_uri(self) -> str:
        """What ``tracking.uri`` says on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.mlflow_port}"

    @property
    def database_uri(self) -> str:
        """The database without its password, which libpq takes from :meth:`environment`."""
        return f"postgresql+psycopg2://{BUCKET}@127.0.0.1:{self.postgres_port}/{BUCKET}"

    @property
    def s3_url(self) -> str:
        """The S3 server."""
        return f"http://127.0.0.1:{self.s3_port}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that uses database and bucket: secrets stand in no argument, no URI."""
        return {
            **os.environ,
            "AWS_ACCESS_KEY_ID": self.values["AWS_ACCESS_KEY_ID"],
            "AWS_SECRET_ACCESS_KEY": self.values["AWS_SECRET_ACCESS_KEY"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven idle processes fewer
            "PGPASSWORD": self.values["POSTGRES_PASSWORD"],
        }


def make_settings(data: Path, host: str | None = None, port: int | None = None) -> Settings:
    """Return a stack's settings; on first use they are made, with passwords of their own.

    Args:
        data: the stack's folder.
        host: where MLflow listens, the loopback by default.
        port: MLflow's port, 5000 by default; PostgreSQL takes the next one, SeaweedFS the eight after it.

    Raises:
        InputError: a stack that is there already says otherwise, or others than its owner may read the file.
    """
    data = data.absolute()
    path = data / SETTINGS
    if not path.exists():
        first = 5000 if port is None else port
        values = {"MLFLOW_HOST": host or "127.0.0.1", "AWS_ACCESS_KEY_ID": BUCKET}
        values |= {name: str(first + number) for number, name in enumerate(_PORTS)}
        values |= {name: secrets.token_urlsafe(24) for name in _SECRETS}
        data.mkdir(parents=True, exist_ok=True)
        partial = data / f".{SETTINGS}.{os.getpid()}"
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("".join(f"{name}={value}\n" for name, value in values.items()))
        partial.rename(path)
    settings = read_settings(data)
    for name, given in (("MLFLOW_HOST", host), ("MLFLOW_PORT", port)):
        if given is not None and settings.values[name] != str(given):
            raise InputError(
                f"a stack keeps its addresses: {name} is {settings.values[name]} in {path}, got {given}; "
                "stop the stack, edit the file and start it again"
            )
    return settings


def read_settings(data: Path) -> Settings:
    """Return the settings of a stack that is there.

    Raises:
        InputError: there is none, a variable is missing, or others than the owner may read its file.
    """
    path = data.absolute() / SETTINGS
    if not path.is_file():
        raise InputError(f"{path.parent} must hold a stack, it has no {SETTINGS}; make one with: start --data {data}")
    if path.stat().st_mode & 0o077:
        raise InputError(
            f"{path} must be readable by its owner alone, got mode {path.stat().st_mode & 0o777:o}; chmod 600"
        )
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    missing = [name for name in ("MLFLOW_HOST", *_PORTS, "AWS_ACCESS_KEY_ID", *_SECRETS) if not values.get(name)]
    if missing:
        raise InputError(f"{path} must say {', '.join(missing)}")
    return Settings(path.parent, values)
