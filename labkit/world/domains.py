"""The two domains by name, and how attributes link their kinds."""

from dataclasses import dataclass

from . import company, port
from .schema import Kind


@dataclass(frozen=True)
class Domain:
    """A vocabulary of kinds; `links` are (kind, attribute, kind of the value) for questions over two passages."""

    key: str
    kinds: tuple[Kind, ...]
    links: tuple[tuple[str, str, str], ...]
    places: str
    people: str

    def kind(self, key: str) -> Kind:
        """The kind called key; KeyError says which there are."""
        for kind in self.kinds:
            if kind.key == key:
                return kind
        raise KeyError(f"the domain {self.key!r} has no kind {key!r}; it has {[k.key for k in self.kinds]}")

    def pool(self, name: str) -> str:
        """The kind of entity that values of the pool "person" or "place" name."""
        return {"person": self.people, "place": self.places}[name]


DOMAINS = {
    "company": Domain("company", company.KINDS, company.LINKS, company.PLACES, company.PEOPLE),
    "port": Domain("port", port.KINDS, port.LINKS, port.PLACES, port.PEOPLE),
}


def domain(key: str) -> Domain:
    """The domain called key; ValueError says which there are."""
    if key not in DOMAINS:
        raise ValueError(f"unknown domain {key!r}; choose one of {sorted(DOMAINS)}")
    return DOMAINS[key]
