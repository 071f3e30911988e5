"""docs/production: the manifests agree with Kubernetes' schemas and with each other, the page with its arithmetic.

What a cluster, a GPU or a collector would show is not tested; docs/production.md says so, file by file.
"""

import copy
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from labkit import assistant

from .production import (
    ALL,
    DEPLOYMENTS,
    ENGINE,
    HERE,
    KUBERNETES,
    MONITORING,
    NAMED,
    PAGE,
    PODS,
    ROOT,
    VLLM,
    Manifest,
    containers,
    name,
    option,
    ports,
    selected,
)

# Kubernetes


def test_there_is_something_to_check() -> None:
    assert {manifest["kind"] for manifest in ALL} == {
        "Deployment", "HorizontalPodAutoscaler", "Job", "NetworkPolicy", "PersistentVolumeClaim",
        "PodDisruptionBudget", "RayJob", "Service",
    }  # fmt: skip
    assert len(NAMED) == len(ALL)
    assert {manifest["metadata"]["namespace"] for manifest in ALL} == {"assistant"}


@pytest.mark.parametrize("manifest", [m for m in ALL if m["kind"] != "RayJob"], ids=name)
def test_manifest_fits_the_schema(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("owner", [owner for owner in PODS if owner.startswith("RayJob/")])
def test_pod_of_a_custom_resource_fits_the_schema(owner: str) -> None:
    wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": PODS[owner]}
    kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


@pytest.mark.parametrize(("field", "value"), [("readynessProbe", {}), ("ports", [{"containerPort": "8000"}])])
def test_the_schema_refuses(field: str, value: object) -> None:
    broken = copy.deepcopy(NAMED["Deployment/engine"])
    broken["spec"]["template"]["spec"]["containers"][0][field] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


WORDS = {
    "accessModes": {"ReadOnlyMany"},
    "action": {"Ignore"},
    "effect": {"NoSchedule"},
    "medium": {"Memory"},
    "operator": {"Exists"},
    "policyTypes": {"Ingress"},
    "protocol": {"TCP"},
    "restartPolicy": {"Never"},
    "type": {"AverageValue", "External", "Pods", "Resource", "RuntimeDefault", "Utilization", "DisruptionTarget"},
    "whenUnsatisfiable": {"ScheduleAnyway"},
}
"""The schema takes any text where the API server takes some words; these are the ones that the manifests use."""


def words(node: object) -> Iterator[tuple[str, str]]:
    if isinstance(node, list):
        for each in node:
            yield from words(each)
    elif isinstance(node, dict):
        for field, value in node.items():
            texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
            yield from ((field, text) for text in texts)
            yield from words(value)


@pytest.mark.parametrize("manifest", ALL, ids=name)
def test_words_are_those_that_the_api_knows(manifest: Manifest) -> None:
    used = [(field, word) for field, word in words(manifest) if field in WORDS]
    assert [(field, word) for field, word in used if word not in WORDS[field]] == []


def test_every_word_is_used() -> None:
    used = {(field, word) for manifest in ALL for field, word in words(manifest)}
    assert {field for field, known in WORDS.items() if any((field, word) in used for word in known)} == WORDS.keys()


def test_a_finished_job_stays_finished() -> None:
    assert PODS["Job/train-assistant"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy works with no other"


@pytest.mark.parametrize("manifest", ALL, ids=name)
def test_selectors_find_their_pods(manifest: Manifest) -> None:
    spec = manifest["spec"]
    match manifest["kind"]:
        case "Deployment":
            labels = spec["selector"]["matchLabels"]
            assert labels.items() <= spec["template"]["metadata"]["labels"].items()
            spread = spec["template"]["spec"].get("topologySpreadConstraints", [])
            assert all(constraint["labelSelector"]["matchLabels"] == labels for constraint in spread)
        case "Service":
            (pod,) = selected(spec["selector"])
            for port in spec["ports"]:
                assert port["targetPort"] in ports(pod)
        case "PodDisruptionBudget":
            assert len(selected(spec["selector"]["matchLabels"])) == 1
        case "HorizontalPodAutoscaler":
            target = NAMED[f"{spec['scaleTargetRef']['kind']}/{spec['scaleTargetRef']['name']}"]
            assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
            assert "replicas" not in target["spec"], "applying the file would undo the autoscaler's choice"
            assert spec["minReplicas"] < spec["maxReplicas"]
        case "NetworkPolicy":
            (pod,) = selected(spec["podSelector"]["matchLabels"])
            for rule in spec["ingress"]:
                assert {port["port"] for port in rule["ports"]} <= ports(pod).keys()
                for peer in rule["from"]:
                    assert "podSelector" not in peer or selected(peer["podSelector"]["matchLabels"])


@pytest.mark.parametrize("budget", [m for m in ALL if m["kind"] == "PodDisruptionBudget"], ids=name)
def test_a_node_can_be_drained(budget: Manifest) -> None:
    target = budget["metadata"]["name"]
    scaler = NAMED.get(f"HorizontalPodAutoscaler/{target}")
    replicas = scaler["spec"]["minReplicas"] if scaler else NAMED[f"Deployment/{target}"]["spec"]["replicas"]
    assert 0 < budget["spec"]["minAvailable"] < replicas


@pytest.mark.parametrize("owner", list(DEPLOYMENTS))
def test_deployments_are_probed_and_end_in_order(owner: str) -> None:
    pod = DEPLOYMENTS[owner]["spec"]
    (container,) = pod["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
        assert container[probe]["httpGet"]["port"] in ports(DEPLOYMENTS[owner])
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    own = int(option(container["args"], "shutdown-timeout")) if owner == "Deployment/engine" else 0
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + own + 15
    surge = NAMED[owner]["spec"].get("strategy", {}).get("rollingUpdate", {"maxUnavailable": 0})
    assert surge["maxUnavailable"] == 0


def test_the_engine_may_start_slowly() -> None:
    startup = VLLM["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert int(option(VLLM["args"], "shutdown-timeout")) > 0


@pytest.mark.parametrize("owner", list(PODS))
def test_volumes_are_those_that_are_mounted(owner: str) -> None:
    volumes = {volume["name"]: volume for volume in PODS[owner]["spec"].get("volumes", [])}
    mounted = {mount["name"] for container in containers(PODS[owner]) for mount in container.get("volumeMounts", [])}
    assert mounted == volumes.keys()
    for volume in volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            assert f"PersistentVolumeClaim/{claim['claimName']}" in NAMED
    for container in containers(PODS[owner]):
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        assert len(paths) == len(set(paths))


@pytest.mark.parametrize("owner", list(PODS))
def test_containers_say_what_they_need_and_run(owner: str) -> None:
    for container in containers(PODS[owner]):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= requests.keys()
        assert limits["memory"] == requests["memory"], "memory cannot be taken back: what is over the request is killed"
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")
        image, _, tag = container["image"].rpartition(":")
        assert "/" in image
        assert re.fullmatch(r"v?\d+\.\d+\.\d+(-\d+)?", tag), f"{container['image']} is not pinned to a version"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert PODS[owner]["spec"]["automountServiceAccountToken"] is False
    assert PODS[owner]["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert PODS[owner]["spec"]["enableServiceLinks"] is False, "a Service's variables may be an option's (MLFLOW_PORT)"


def secrets() -> set[str]:
    """The names of the secrets that pods refer to."""
    variables = [variable for pod in PODS.values() for c in containers(pod) for variable in c.get("env", [])]
    sources = [variable["valueFrom"] for variable in variables if "valueFrom" in variable]
    return {source["secretKeyRef"]["name"] for source in sources if "secretKeyRef" in source}


def test_no_secret_is_written_down() -> None:
    for pod in PODS.values():
        for container in containers(pod):
            for variable in container.get("env", []):
                if re.search(r"KEY|TOKEN|PASSWORD|SECRET|STORE_URI", variable["name"]):
                    assert variable["valueFrom"].keys() == {"secretKeyRef"}
    for path in HERE.rglob("*.y*ml"):
        text = path.read_text(encoding="utf-8")
        assert "kind: Secret" not in text
        assert not re.search(r"://[^/\s]*:[^/\s]*@", text), f"{path.name} holds a password"
    told = re.findall(r"^  (?:.*_key|.*password|.*token):", (MONITORING / "alertmanager.yml").read_text(), re.M)
    assert told == [], "give the file that holds it, not the secret"
    assert secrets() == {"engine-api-key", "mlflow-database", "mlflow-object-storage"}
    assert all(f"`{secret}`" in PAGE for secret in secrets()), "the page lists the secrets to create"


def addresses() -> Iterator[tuple[str, str, int]]:
    for owner, pod in PODS.items():
        for container in containers(pod):
            for variable in container.get("env", []):
                if found := re.match(r"http://([\w.-]+):(\d+)", variable.get("value", "")):
                    yield owner, found[1], int(found[2])


@pytest.mark.parametrize(("owner", "host", "port"), list(addresses()))
def test_addresses_lead_to_a_service(owner: str, host: str, port: int) -> None:
    if host == "otel-collector.monitoring":
        collector = yaml.safe_load((MONITORING / "otel-collector.yaml").read_text())
        assert collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(f":{port}")
    else:
        assert port in [offered["port"] for offered in NAMED[f"Service/{host}"]["spec"]["ports"]]
    if host == "engine":
        allowed = NAMED["NetworkPolicy/engine"]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
        assert allowed.items() <= PODS[owner]["metadata"]["labels"].items()


def test_mlflow_is_the_version_that_lessons_use() -> None:
    (pinned,) = re.findall(r"^mlflow==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    images = {container["image"] for pod in PODS.values() for container in containers(pod)}
    (image,) = (image for image in images if "/mlflow:" in image)
    assert image.rpartition(":")[2] == f"{pinned}-1"


def test_the_engine_serves_the_adapters_that_it_fetches() -> None:
    args = VLLM["args"]
    start = args.index("--lora-modules") + 1
    served = dict(arg.split("=") for arg in args[start:] if not arg.startswith("--"))
    fetched = {}
    for container in ENGINE["spec"]["initContainers"]:
        uri = option(container["args"], "artifact-uri")
        found = re.fullmatch(r"models:/assistant-(\w+)/\d+", uri)
        assert found, f"{uri} is not a version of a registered adapter"
        fetched[found[1]] = option(container["args"], "dst-path")
    assert served == fetched
    assert tuple(served) == assistant.TASKS
    assert int(option(args, "max-loras")) == len(served)
    assert int(option(args, "max-lora-rank")) == assistant.RANK
    mounts = [mount["mountPath"] for mount in VLLM["volumeMounts"]]
    assert all(any(path.startswith(f"{mount}/") for mount in mounts) for path in [args[0], *served.values()])


def test_the_autoscaler_asks_for_what_the_adapter_gives() -> None:
    adapter = yaml.safe_load((HERE / "kubernetes" / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["externalRules"]
    (metric,) = NAMED["HorizontalPodAutoscaler/engine"]["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].partition("{")[0] in (MONITORING / "rules.yml").read_text()


# The page and its arithmetic


def module(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"production_{Path(file).stem}", HERE / file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


SIZING = module("sizing.py")


def qwen3(model: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.query_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_width,
        tie_word_embeddings=True,
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it
def test_weights_and_adapters_are_counted_right() -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3(SIZING.QWEN3_06B))
        assert model.num_parameters() == SIZING.QWEN3_06B.parameters()
        adapted = get_peft_model(model, LoraConfig(r=SIZING.RANK, target_modules="all-linear"))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert trained == SIZING.QWEN3_06B.adapter_parameters(SIZING.RANK)


def test_a_token_of_the_cache_is_counted_right() -> None:
    small = SIZING.Model(100, 32, 64, 3, 4, 2, 16, bytes_per_number=4)
    cache = Qwen3ForCausalLM(qwen3(small))(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == 5 * small.kv_bytes()


def test_the_page_has_the_numbers_of_the_arithmetic() -> None:
    found = SIZING.sizing()
    table = dict(re.findall(r"^\| .*? \| \*\*([\d,.]+)\*\* .*?<!-- (\w+) -->", PAGE, re.M))
    told = {quantity: number for number, quantity in table.items()}
    assert told.keys() == found.keys()
    for quantity, number in told.items():
        digits = len(number.partition(".")[2])
        assert number == f"{found[quantity]:,.{digits}f}", quantity


def test_the_manifest_is_the_one_that_was_sized() -> None:
    scaler = NAMED["HorizontalPodAutoscaler/engine"]["spec"]
    found = SIZING.sizing()
    assert scaler["minReplicas"] == found["replicas"] < scaler["maxReplicas"]
    assert int(option(VLLM["args"], "max-num-seqs")) == SIZING.SEQUENCES
    assert float(option(VLLM["args"], "gpu-memory-utilization")) == SIZING.SHARE
    assert (assistant.RANK, len(assistant.TASKS)) == (SIZING.RANK, SIZING.ADAPTERS)
    assert found["in_flight"] < SIZING.BUSY * SIZING.SEQUENCES, "more in flight than a replica should hold: add one"
    assert found["cache_requests"] > SIZING.SEQUENCES, "the cache is full before --max-num-seqs is reached"


def test_the_page_knows_every_file() -> None:
    files = {
        str(path.relative_to(ROOT / "docs")) for path in HERE.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE))
    assert files <= links
    assert all((ROOT / "docs" / link).exists() for link in links)
    assert "](docs/production.md)" in (ROOT / "README.md").read_text()


def test_the_page_names_the_versions_of_the_manifests() -> None:
    tags = dict(container["image"].rsplit(":", 1) for pod in PODS.values() for container in containers(pod))
    assert f"vLLM {tags['vllm/vllm-openai'].removeprefix('v')}" in PAGE
    assert f"mlflow {tags['registry.example.com/assistant/mlflow'].partition('-')[0]}" in PAGE
    ray = NAMED["RayJob/sweep-assistant"]["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"Ray {ray.rpartition('.')[0]}" in PAGE
    assert f"Kubernetes {KUBERNETES}" in PAGE
