"""docs/production, as far as it runs here: MLflow on PostgreSQL, training, the engine's fetch, the client."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from fastapi import FastAPI, Request
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from labkit import assistant, base_model, postgres, servers

HERE = Path(__file__).resolve().parents[2] / "docs" / "production"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}


def pod(file: str, kind: str) -> dict[str, Any]:
    documents = list(yaml.safe_load_all((HERE / "kubernetes" / file).read_text()))
    (found,) = (document["spec"]["template"]["spec"] for document in documents if document["kind"] == kind)
    return dict(found)


def program(name: str) -> str:
    """A program of this environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found
    return found


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The manifest's server on a database and a folder of this machine; its address."""
    (container,) = pod("mlflow.yaml", "Deployment")["containers"]
    port = servers.free_port()
    (allowed,) = (
        value for name, _, value in (a.partition("=") for a in container["args"]) if name == "--allowed-hosts"
    )
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--artifacts-destination": str(folder / "artifacts"),
        "--workers": "1",
        "--allowed-hosts": f"{allowed},127.0.0.1:{port}",
    }
    named = [argument.split("=", 1)[0] for argument in container["args"]]
    assert here.keys() <= set(named)
    args = [
        f"{name}={here[name]}" if name in here else given for name, given in zip(named, container["args"], strict=True)
    ]
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:  # as a probe asks: by the pod's address, which is in no list of allowed hosts
        try:
            return httpx.get(f"{url}/health", headers={"Host": "10.1.2.3:5000"}, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    with postgres.server() as uri:
        environment = {**QUIET, "MLFLOW_BACKEND_STORE_URI": uri.replace("postgresql://", "postgresql+psycopg://")}
        command = [program(container["command"][0]), *container["command"][1:], *args]
        with servers.process(command, ready=ready, seconds=300, env=environment, cwd=folder):
            yield url


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """An untrained Qwen3 of two layers with the shipped tokenizer, as a volume would hold it."""
    _, tokenizer = base_model.load("shipped")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "tiny-qwen3"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **QUIET, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_adapter_goes_from_training_through_the_registry_to_the_engine(tmp_path: Path, tiny_model: Path) -> None:
    (train,) = pod("train-job.yaml", "Job")["containers"]
    assert train["command"] == ["python", "/app/train.py"]
    here = {"--model-id": str(tiny_model), "--device": "cpu", "--companies": "1", "--each": "2"}
    given = [argument.split("=", 1) for argument in train["args"]]
    with mlflow_server(tmp_path) as url:
        own = {"Host": "mlflow:5000"}
        search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
        assert httpx.get(search, headers=own, trust_env=False).status_code == 200
        assert httpx.get(search, headers={"Host": "elsewhere.example"}, trust_env=False).status_code == 403

        environment = {"MLFLOW_TRACKING_URI": url}
        arguments = [f"{name}={here.get(name, value)}" for name, value in given]
        printed = run([sys.executable, str(HERE / "train.py"), *arguments], tmp_path, **environment)
        assert "{'triage': 1, 'handbook': 1}" in printed

        for container in pod("engine.yaml", "Deployment")["initContainers"]:
            command = [program(container["command"][0]), *container["command"][1:]]
            fetched = [
                argument.replace("/7", "/1").replace("=/adapters/", f"={tmp_path}/adapters/")
                for argument in container["args"]
            ]
            assert fetched != container["args"]
            run([*command, *fetched], tmp_path, **environment)

    weights = {}
    for task in assistant.TASKS:
        folder = tmp_path / "adapters" / task
        config = PeftConfig.from_pretrained(str(folder))
        assert (config.r, config.base_model_name_or_path) == (assistant.RANK, str(tiny_model))
        weights[task] = load_file(folder / "adapter_model.safetensors")
        assert any("lora_B" in key and tensor.abs().max() > 0 for key, tensor in weights[task].items())
    assert any(not torch.equal(weights["triage"][key], weights["handbook"][key]) for key in weights["triage"])


def test_one_client_for_every_server(tmp_path: Path) -> None:
    """Only the address differs: the gateway's manifest sets it by the variable that the client reads here."""
    (gateway,) = pod("gateway.yaml", "Deployment")["containers"]
    names = {variable["name"] for variable in gateway["env"]}
    seen: list[dict[str, Any]] = []
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        body = await request.json()
        seen.append({"key": request.headers["authorization"], "model": body["model"]})
        message = {"role": "assistant", "content": json.dumps(body["messages"])}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }

    with servers.serving(app) as running:
        environment = {"OPENAI_BASE_URL": f"{running.url}/v1", "OPENAI_API_KEY": "k", "NO_PROXY": "127.0.0.1"}
        assert environment.keys() - {"NO_PROXY"} <= names
        printed = run([sys.executable, str(HERE / "ask.py"), "triage", "It is broken."], tmp_path, **environment)
    assert json.loads(printed) == [{"role": "user", "content": "It is broken."}]
    assert seen == [{"key": "Bearer k", "model": "triage"}]
