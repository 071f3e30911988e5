"""The typed answer to a support ticket and its one canonical spelling as JSON."""

import json
from dataclasses import dataclass
from typing import Any

CATEGORIES = ("billing", "delivery", "defect", "account", "setup")
URGENCIES = ("low", "normal", "high")
ACTIONS = ("refund", "replace", "repair", "explain", "call")
KEYS = ("product", "category", "urgency", "action")


@dataclass(frozen=True)
class Triage:
    """What a clerk decides on a ticket: product (None when the ticket names none), category, urgency and action."""

    product: str | None
    category: str
    urgency: str
    action: str

    def __post_init__(self) -> None:
        for key, options in (("category", CATEGORIES), ("urgency", URGENCIES), ("action", ACTIONS)):
            if getattr(self, key) not in options:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(options)}")
        if self.product is not None and (not isinstance(self.product, str) or not self.product):
            raise ValueError(f"product is {self.product!r}; it must be a name, or null when the ticket names none")

    def to_json(self) -> str:
        """One line of JSON with the keys in their fixed order."""
        return json.dumps({key: getattr(self, key) for key in KEYS}, ensure_ascii=False)

    @classmethod
    def parse(cls, text: str) -> "Triage":
        """Read JSON with exactly the four keys, in any order and spacing; anything else is a ValueError that says
        what is wrong."""
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at character {error.pos} of {text!r}") from error
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object with the keys {', '.join(KEYS)}, got {type(data).__name__}")
        if set(data) != set(KEYS):
            missing = [key for key in KEYS if key not in data]
            extra = sorted(key for key in data if key not in KEYS)
            raise ValueError(f"expected the keys {', '.join(KEYS)}; missing {missing}, unexpected {extra}")
        return cls(**data)
