"""The shipped base model, or any other: `model, tokenizer = base_model.load("shipped")`."""

from .loading import SHIPPED, load

__all__ = ["SHIPPED", "load"]
