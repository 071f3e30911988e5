"""The files of docs/production as data, for the tests that compare them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "docs" / "production"
PAGE = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
MONITORING = HERE / "monitoring"
KUBERNETES = "1.36"
Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    """Every Kubernetes object; the adapter's configuration is none."""
    files = [path for path in sorted((HERE / "kubernetes").glob("*.yaml")) if path.stem != "prometheus-adapter"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def name(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


ALL = manifests()
NAMED = {name(manifest): manifest for manifest in ALL}


def templates() -> Iterator[tuple[str, Manifest]]:
    """Every pod template with the name of its owner."""
    for manifest in ALL:
        spec = manifest["spec"]
        if manifest["kind"] == "RayJob":
            cluster = spec["rayClusterSpec"]
            yield name(manifest) + " head", cluster["headGroupSpec"]["template"]
            yield from ((f"{name(manifest)} {group['groupName']}", group["template"])
                        for group in cluster["workerGroupSpecs"])  # fmt: skip
        elif "template" in spec:
            yield name(manifest), spec["template"]


PODS = dict(templates())
DEPLOYMENTS = {owner: pod for owner, pod in PODS.items() if owner.startswith("Deployment/")}


def containers(pod: Manifest) -> list[Manifest]:
    return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


def ports(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in containers(pod) for port in c.get("ports", [])}


def option(args: list[str], wanted: str) -> str:
    (value,) = (arg.partition("=")[2] for arg in args if arg.startswith(f"--{wanted}="))
    return value


def selected(labels: dict[str, str]) -> list[Manifest]:
    return [pod for pod in PODS.values() if labels.items() <= pod["metadata"]["labels"].items()]


ENGINE = PODS["Deployment/engine"]
VLLM = ENGINE["spec"]["containers"][0]
