"""One training run for each learning rate, each on a GPU of a Ray cluster. Not run here: ray is not installed."""

import argparse

import ray
from train import train


def main() -> None:
    """Start a run a rate, wait for all, and say what each registered. The numbers to compare are in MLflow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    options = parser.parse_args()
    ray.init()
    trial = ray.remote(num_gpus=1, max_retries=2)(train)
    runs = [trial.remote(options.model_id, device="cuda", companies=200, each=16, rate=rate) for rate in options.rates]
    for rate, versions in zip(options.rates, ray.get(runs), strict=True):
        print(rate, versions)


if __name__ == "__main__":
    main()
