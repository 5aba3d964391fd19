"""A team's tracking server on this machine: MLflow on PostgreSQL, its artefacts in S3.

    python -m infra.mlflow start --data FOLDER [--host 127.0.0.1] [--port 5000]

It is run in the repository's root. Exit codes: 0 done, 1 something does not answer (status), 2 refused with the remedy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infra.mlflow import backup, services
from infra.mlflow.settings import make_settings, read_settings
from pipeline.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run the named command; return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        return int(_run(given) or 0)
    except InputError as refusal:
        sys.stderr.write(f"{refusal}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m infra.mlflow", description="A team's tracking server on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("init", "write stack.env alone, with passwords of its own: for compose.yaml"),
        ("start", "start what does not run yet, and wait until all answers"),
        ("stop", "stop all; the data stays"),
        ("status", "what answers, and where"),
        ("migrate", "bring the database's schema to the installed MLflow's version"),
        ("backup", "write database and bucket into a new folder, whole or not at all"),
        ("restore", "fill an empty stack from a backup"),
    ):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("--data", type=Path, required=True, help="the stack's folder")
        if name in ("init", "start"):
            command.add_argument("--host", help="where MLflow listens; the loopback unless told")
            command.add_argument(
                "--port", type=int, help="MLflow's port, 5000 unless told; the next nine are taken too"
            )
        if name in ("backup", "restore"):
            command.add_argument("folder", type=Path, help="of the backup")
    return parser


def _run(given: argparse.Namespace) -> int | None:
    if given.command in ("init", "start"):
        settings = make_settings(given.data, given.host, given.port)
    elif given.command == "restore":
        settings = make_settings(given.data)
    else:
        settings = read_settings(given.data)
    with services.alone(settings):
        match given.command:
            case "start":
                services.start(settings)
                _say(f"tracking.uri: {settings.tracking_uri}")
            case "stop":
                services.stop(settings)
            case "migrate":
                _say("the schema went from {} to {}".format(*backup.migrate(settings)))
            case "backup":
                _say(f"{given.folder}: {backup.backup(settings, given.folder)}")
            case "restore":
                _say(f"restored {backup.restore(settings, given.folder)}; now: start --data {given.data}")
            case "status":
                answers = {name: ask(settings) for name, ask in services.ANSWERS.items()}
                for name, answer in answers.items():
                    _say(f"{name}: {'answers' if answer else 'does not answer'}")
                _say(f"tracking.uri: {settings.tracking_uri}")
                return 0 if all(answers.values()) else 1
    return None


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
