"""docs/production/monitoring: the alerts fire when they should, and the configuration names what is there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from .production import DEPLOYMENTS, ENGINE, MONITORING, NAMED, PAGE, Manifest, ports


def tool(program: str, package: str) -> str:
    path = shutil.which(program)
    assert path, f"the tests of the monitoring files need {program}: `apt-get install {package}`"
    return path


def promtool(*arguments: str, cwd: Path = MONITORING) -> "subprocess.CompletedProcess[str]":
    command = [tool("promtool", "prometheus"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def amtool(*arguments: str) -> str:
    command = [tool("amtool", "prometheus-alertmanager"), *arguments]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


RULE_TESTS = ("rules_test.yml", "rules_days_test.yml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        *(("test", "rules", t) for t in RULE_TESTS),
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "seen_by"),
    [
        ("14.4 * 0.005", "28.8 * 0.005", "rules_test.yml"),  # a page comes late
        ("14.4 * 0.005", "6 * 0.005", "rules_test.yml"),  # a page comes for a short burst
        (" and assistant:errors:ratio_rate5m > 14.4 * 0.005", "", "rules_test.yml"),  # a page stays when all is well
        ('~"5.."', '~"[45].."', "rules_days_test.yml"),  # a client's mistake counts as ours
        ("absent(http_server", "0 > (http_server", "rules_test.yml"),  # silence is not noticed
        ("or absent(up", "or (up", "rules_test.yml"),  # nor that there is no engine
    ],
)
def test_the_unit_tests_see_a_wrong_rule(right: str, wrong: str, seen_by: str, tmp_path: Path) -> None:
    text = (MONITORING / "rules.yml").read_text()
    assert right in text
    (tmp_path / "rules.yml").write_text(text.replace(right, wrong))
    shutil.copy(MONITORING / seen_by, tmp_path)
    assert promtool("check", "rules", "rules.yml", cwd=tmp_path).returncode == 0
    assert promtool("test", "rules", seen_by, cwd=tmp_path).returncode != 0


def rules() -> list[Manifest]:
    groups = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_is_seen_to_fire() -> None:
    cases = [case for file in RULE_TESTS for case in yaml.safe_load((MONITORING / file).read_text())["tests"]]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == alerts
    quiet = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert quiet >= {alert for alert in alerts if "Burn" in alert}


HOURS = {"5m": 1 / 12, "30m": 0.5, "1h": 1.0, "6h": 6.0, "3d": 72.0}
MONTH = 30 * 24
BUDGETS = {"availability": ("errors", 0.005), "latency": ("slow", 0.01)}


def test_burn_rates_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| (page|ticket) \| (\w+) \| (\w+) \| (\d+) % \| ([\d.]+) \|", PAGE, re.M)
    assert len(rows) == 3
    for _, long, short, share, factor in rows:
        assert float(factor) == pytest.approx(float(share) / 100 * MONTH / HOURS[long])
        assert HOURS[short] == pytest.approx(HOURS[long] / 12)
    wanted = {
        (severity, slo, f"assistant:{record}:ratio_rate{long} > {factor} * {budget} and "
                        f"assistant:{record}:ratio_rate{short} > {factor} * {budget}")
        for severity, long, short, _, factor in rows
        for slo, (record, budget) in BUDGETS.items()
    }  # fmt: skip
    found = {(r["labels"]["severity"], r["labels"]["slo"], r["expr"]) for r in rules() if "Burn" in r.get("alert", "")}
    assert found == wanted
    for rule in rules():
        if "Burn" in rule.get("alert", ""):
            (long,) = re.findall(r"ratio_rate(\w+) >", rule["expr"])[:1]
            (share,) = (share for _, window, _, share, _ in rows if window == long)
            assert f"{share} % of the month's budget in {long}." in rule["annotations"]["summary"]
    for objective, budget in (("99.5 %", 0.005), ("99 %", 0.01)):
        assert objective in PAGE
        assert 1 - float(objective[:-2]) / 100 == pytest.approx(budget)


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("severity=page slo=latency", "pager"),
        ("severity=ticket slo=latency", "tickets"),
        ("severity=none alertname=Watchdog", "dead-mans-switch"),
    ],
)
def test_alerts_reach_their_receiver(labels: str, receiver: str) -> None:
    assert "SUCCESS" in amtool("check-config", "alertmanager.yml")
    assert amtool("config", "routes", "test", "--config.file=alertmanager.yml", *labels.split()) == receiver


def test_prometheus_scrapes_what_is_there() -> None:
    scraped = {
        job["job_name"]: job for job in yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    }
    (engine,) = scraped["engine"]["dns_sd_configs"]
    ((service, namespace),) = re.findall(r"^([\w-]+)\.(\w+)\.svc\.", engine["names"][0])
    found = NAMED[f"Service/{service}"]
    assert found["metadata"]["namespace"] == namespace
    assert found["spec"]["clusterIP"] == "None"
    assert engine["port"] == ports(ENGINE)["http"]
    collector = yaml.safe_load((MONITORING / "otel-collector.yaml").read_text())
    port = collector["exporters"]["prometheus"]["endpoint"].rpartition(":")[2]
    assert scraped["otel-collector"]["static_configs"] == [{"targets": [f"otel-collector:{port}"]}]
    assert scraped["otel-collector"]["honor_labels"] is True
    (gateway,) = DEPLOYMENTS["Deployment/gateway"]["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in gateway["env"]}
    assert f'job="{environment["OTEL_SERVICE_NAME"]}"' in (MONITORING / "rules.yml").read_text()


def test_the_collector_is_wired() -> None:
    collector = yaml.safe_load((MONITORING / "otel-collector.yaml").read_text())
    pipelines = collector["service"]["pipelines"]
    assert pipelines.keys() == {"metrics", "traces"}
    for part in ("receivers", "processors", "exporters"):
        used = {component for pipeline in pipelines.values() for component in pipeline[part]}
        assert used == collector[part].keys()
    assert set(collector["service"]["extensions"]) == collector["extensions"].keys()
    for pipeline in pipelines.values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"
    assert "attributes/private" in pipelines["traces"]["processors"]
    known = {getattr(gen_ai_attributes, constant) for constant in dir(gen_ai_attributes) if constant.isupper()}
    actions = collector["processors"]["attributes/private"]["actions"]
    assert {action["key"] for action in actions} <= known
    assert {action["action"] for action in actions} == {"delete"}


INSTRUMENTED = """
import json
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
app = FastAPI()
app.post("/v1/chat/completions")(lambda: {})
FastAPIInstrumentor.instrument_app(app, meter_provider=MeterProvider(metric_readers=[reader]))
TestClient(app).post("/v1/chat/completions")
metrics = [m for r in reader.get_metrics_data().resource_metrics for s in r.scope_metrics for m in s.metrics]
(duration,) = (m for m in metrics if m.name.endswith("duration"))
(point,) = duration.data.data_points
print(json.dumps([duration.name, duration.unit, dict(point.attributes), list(point.explicit_bounds)]))
"""


def test_the_rules_name_what_an_instrumented_application_reports() -> None:
    (gateway,) = DEPLOYMENTS["Deployment/gateway"]["spec"]["containers"]
    environment = {v["name"]: v["value"] for v in gateway["env"] if v["name"] == "OTEL_SEMCONV_STABILITY_OPT_IN"}
    done = subprocess.run([sys.executable, "-c", INSTRUMENTED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metric, unit, attributes, bounds = json.loads(done.stdout.splitlines()[-1])
    assert unit == "s"
    text = "\n".join(rule["expr"] for rule in rules() if "record" in rule)
    assert set(re.findall(r"http_server\w+", text)) == {
        f"{metric.replace('.', '_')}_seconds_{kind}" for kind in ("count", "bucket")
    }
    labels = set(re.findall(r"[{,](\w+)=", text)) - {"job", "le"}
    assert labels <= {attribute.replace(".", "_") for attribute in attributes}
    assert f'http_route="{attributes["http.route"]}"' in text
    (threshold,) = set(re.findall(r'le="([\d.]+)"', text))
    assert float(threshold) in bounds, "a threshold between two bounds cannot be read off a histogram"
    assert f"{threshold} s" in PAGE
