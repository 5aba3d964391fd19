"""What dashboard and alerts ask for is exported, and what is exported is read by Prometheus' own parser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from urllib.request import urlopen

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeline.orchestration import metric_names
from pipeline.orchestration.environment import OWN_CLUSTER, is_on_lasting_cluster
from pipeline.orchestration.metric_names import OF_MODELS, OF_TRAINING, RESTARTS, MetricName

GRAFANA = Path(__file__).resolve().parents[3] / "infra" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboard.json").read_text())
ALERTS = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NAMES = {each.exported for each in (*OF_TRAINING, *OF_MODELS)}
ROW = {"step": 4, "num_steps": 8, "samples": 64, "loss": 0.5, "task_loss": {"spam": 0.25}}
ROW |= {"tokens_per_s": 1000.0, "data_wait_share": 0.125}


def _of_the_server() -> set[str]:
    from pipeline.serving.server import _Metrics

    made = _Metrics()
    made.requests.labels("200").inc()
    made.rows.labels("spam", "3").inc()
    made.seconds.observe(0.1)
    made.model.labels("3").set(1)
    return {sample.name for family in made.registry.collect() for sample in family.samples}


def _asked(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?mtl_lora_\w+", expression))


def test_every_metric_of_dashboard_and_alerts_is_exported() -> None:
    known = NAMES | _of_the_server()
    for expression in (*QUERIES, *(rule["expr"] for rule in RULES)):
        assert _asked(expression)
        assert _asked(expression) <= known, expression


def test_every_metric_that_ray_exports_is_on_the_dashboard() -> None:
    assert set().union(*map(_asked, QUERIES)) >= NAMES


def test_queries_group_by_tags_that_the_metrics_have() -> None:
    tags = {each.exported: set(each.tags) for each in (*OF_TRAINING, *OF_MODELS)}
    for expression in (*QUERIES, *(rule["expr"] for rule in RULES)):
        for grouping, rest in re.findall(r"by \(([^)]*)\) \(([^)]*)", expression):
            for name in _asked(rest) & NAMES:
                assert set(grouping.split(", ")) <= tags[name], expression


@pytest.mark.parametrize("expression", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_every_query_is_promql(expression: str) -> None:
    promql_parser.parse(re.sub(r"\$__\w*interval", "5m", expression))


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if "increase(" in rule["expr"]], ids=lambda rule: rule["alert"]
)
def test_the_first_event_of_a_series_raises_its_alert(rule: dict[str, str]) -> None:
    """The series begins at 1, which is no increase: a series that is new within the window counts whole."""
    either = promql_parser.parse(rule["expr"])
    assert isinstance(either, promql_parser.BinaryExpr)
    assert str(either.op) == "or"
    grown, begun = (" ".join(str(side).split()) for side in (either.lhs, either.rhs))
    selector, window = re.findall(r"increase\((\w+\{[^}]*\})\[(\w+)\]\)", grown)[0]
    assert begun == grown.replace(f"increase({selector}[{window}])", f"{selector} unless {selector} offset {window}")


def test_no_alert_asks_how_a_series_changes_that_each_start_begins_anew() -> None:
    assert [rule["alert"] for rule in RULES if re.search(rf"(delta|changes)\({RESTARTS.exported}", rule["expr"])] == []


def test_every_alert_says_what_to_do_and_names_are_unique() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert {"summary", "remedy"} <= set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
    every = [each for each in vars(metric_names).values() if isinstance(each, MetricName)]
    assert sorted(each.name for each in every) == sorted(each.name for each in (*OF_TRAINING, *OF_MODELS))


def test_models_are_told_of_only_where_the_cluster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", OWN_CLUSTER):
        monkeypatch.delenv(name, raising=False)
    assert [is_on_lasting_cluster(a) for a in ("", "local", "http://h:8265", "h:6379", "auto")] == [False] * 3 + [
        True
    ] * 2
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert is_on_lasting_cluster("")
    monkeypatch.setenv(OWN_CLUSTER, "1")
    assert not is_on_lasting_cluster("")


@pytest.mark.slow
def test_ray_exports_what_rank_zero_and_the_models_tell(tmp_path: Path) -> None:
    import ray

    from pipeline.orchestration.config import RayConfig
    from pipeline.orchestration.metrics import TrainingMetrics, tell_of_model

    ray.init(address="local", num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        for _ in range(2):  # the second is a start after the first
            metrics = TrainingMetrics("weekly", tmp_path / "checkpoints")
        metrics.log(ROW)
        tell_of_model(RayConfig(), "ads", verdict="HOLD", outcome="HOLD", champion_since=1e9)
        tell_of_model(RayConfig(), "ads", verdict="HOLD")
        url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
        deadline, found = time.monotonic() + 400, dict[str, dict[tuple[str, ...], float]]()
        while not found.keys() >= NAMES and time.monotonic() < deadline:
            time.sleep(1)
            with urlopen(url, timeout=10) as answer:
                families = text_string_to_metric_families(answer.read().decode())
                samples = [sample for family in families for sample in family.samples]
            found = {}
            for sample in samples:
                if "mtl_lora" in sample.name:
                    of = tuple(
                        sample.labels[t] for t in ("run", "model", "task", "verdict", "outcome") if t in sample.labels
                    )
                    found.setdefault(sample.name, {})[of] = sample.value
    finally:
        ray.shutdown()
    assert found.keys() >= NAMES, sorted(found)
    assert found[metric_names.SAMPLES.exported] == {("weekly",): 64}
    assert found[metric_names.TASK_LOSS.exported] == {("weekly", "spam"): 0.25}
    assert found[metric_names.RESTARTS.exported] == {("weekly",): 1}
    assert found[metric_names.VERDICTS.exported] == {("ads", "HOLD"): 2}
    assert found[metric_names.CHAMPION_SINCE.exported] == {("ads",): 1e9}
