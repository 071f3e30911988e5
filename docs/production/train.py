"""Train both adapters, log them to MLflow, and register each as a version: what the training job runs."""

import argparse
import tempfile

import mlflow
from mlflow import MlflowClient

from labkit import assistant


def train(model_id: str, *, device: str, companies: int, each: int, rate: float) -> dict[str, int]:
    """The version that each task's adapter got in the registry, under the name `assistant-<task>`."""
    policy, _ = assistant.load(model_id, device=device, companies=companies, each=each, rate=rate)
    versions = {}
    with mlflow.start_run() as run, tempfile.TemporaryDirectory() as folder:
        mlflow.log_params({"model_id": model_id, "companies": companies, "each": each, "rate": rate})
        policy.save_pretrained(folder)  # a folder an adapter
        for task in assistant.TASKS:
            mlflow.log_artifacts(f"{folder}/{task}", task)
            versions[task] = register(f"assistant-{task}", mlflow.get_artifact_uri(task), run.info.run_id)
    return versions


def register(name: str, source: str, run_id: str) -> int:
    """A new version of the registered model `name`, which is made if it is not there."""
    client = MlflowClient()
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name)
    return int(client.create_model_version(name, source, run_id).version)


def main() -> None:
    """Read the arguments, train, and say which versions were registered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--companies", type=int, default=4)
    parser.add_argument("--each", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    print(train(**vars(options)))


if __name__ == "__main__":
    main()
