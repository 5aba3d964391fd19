"""Each alert and each exit code stands in the runbook, and what the runbook tells a person to type is there."""

from __future__ import annotations

import ast
import inspect
import json
import re
import signal
from pathlib import Path
from typing import Any

import typer
import yaml

from jobs import cli
from jobs.config_views import schema

INFRA = Path(__file__).resolve().parents[1] / "infra"
TEXT = (INFRA / "RUNBOOK.md").read_text()
ENTRIES = re.findall(r"^\| `(\w+)` \|(.*)\|$", TEXT, re.MULTILINE)


def test_each_alert_and_each_exit_code_has_one_entry_that_says_what_to_do() -> None:
    rules = yaml.safe_load((INFRA / "grafana" / "alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    codes = {"0", str(128 + signal.SIGTERM)}
    for node in ast.walk(ast.parse(inspect.getsource(cli.main))):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "sys.exit"
            and isinstance(node.args[0], ast.Constant)
        ):
            codes.add(str(node.args[0].value))
    assert codes >= {"0", "1", "2", "3", "143"}
    assert sorted(name for name, _ in ENTRIES) == sorted(alerts | codes)
    assert all(len(cell.strip()) > 5 for _, row in ENTRIES for cell in row.split(" | "))


def test_each_command_and_key_that_the_runbook_names_is_there() -> None:
    root: Any = typer.main.get_command(cli.app)
    commands = re.findall(r"`mtl-lora (\w+)((?: --[a-z-]+)?)", TEXT)
    assert len(commands) > 8
    for verb, option in commands:
        assert verb in root.commands
        assert not option or any(option.strip() in each.opts for each in root.commands[verb].params), (verb, option)
    panels = {panel["title"] for panel in json.loads((INFRA / "grafana" / "dashboard.json").read_text())["panels"]}
    assert {*re.findall(r"\*([A-Z][^*]+)\*", TEXT)} <= panels
    properties = schema()
    for section, key in re.findall(r"`(training|cache)\.(\w+)`", TEXT):
        kind = properties["properties"][section]["$ref"].rpartition("/")[2]
        assert key in properties["$defs"][kind]["properties"], f"{section}.{key}"
