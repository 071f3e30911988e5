"""Names that nobody has heard of: two syllables, drawn anew, cheap to spell for a BPE tokenizer.

Every first syllable is three or four letters and starts with a capital, every second one is lower case; no first
syllable is the beginning of another, so a name has one spelling into syllables and its surprisal is exact.
"""

from .draw import Draw

THING_STARTS = (
    "Bal", "Bren", "Cal", "Cor", "Dal", "Dor", "Fal", "Fen", "Gal", "Gor", "Hal", "Hes", "Jar", "Jul", "Kal", "Kes",
    "Lan", "Lor", "Mal", "Mer", "Nal", "Nor", "Pal", "Per", "Quin", "Ral", "Ros", "Sal", "Sor", "Tal", "Tol", "Val",
    "Vel", "Vor", "Wen", "Wil", "Xan", "Yar", "Zel", "Zor",
)  # fmt: skip
THING_ENDS = (
    "abon", "adix", "amar", "andis", "arix", "avel", "ebra", "edon", "elis", "emon", "enta", "eris", "etta", "ibar",
    "idan", "igon", "ilux", "imar", "inox", "iris", "itan", "ivex", "obel", "odar", "ogen", "olin", "onex", "opal",
    "orin", "otis", "ovan", "ubra", "udel", "umar", "unix", "uris", "usal", "utan", "uvel", "yron",
)  # fmt: skip
PLACE_STARTS = (
    "Alder", "Birch", "Black", "Brook", "Clay", "Cliff", "Cold", "Crow", "Deer", "East", "Elm", "Fair", "Fern", "Fox",
    "Glen", "Grey", "Hare", "Hazel", "High", "Kings", "Lake", "Long", "Maple", "Marsh", "Mill", "Moor", "North", "Oak",
    "Pine", "Red", "Ridge", "Salt", "Sand", "Shell", "South", "Stone", "Swan", "Thorn", "West", "White",
)  # fmt: skip
PLACE_ENDS = (
    "bank", "bay", "bridge", "burn", "bury", "cliffe", "cote", "dale", "den", "field", "ford", "gate", "ham", "haven",
    "hill", "holm", "hurst", "land", "ley", "low", "mere", "minster", "mouth", "ness", "port", "rock", "ry", "sey",
    "side", "stead", "stoke", "stow", "thorpe", "ton", "wall", "water", "well", "wick", "wood", "worth",
)  # fmt: skip
HER_NAMES = (
    "Ada", "Alma", "Anna", "Bella", "Cara", "Clara", "Dina", "Edith", "Ella", "Emma", "Greta", "Helen", "Ida", "Irene",
    "Julia", "Karin", "Laura", "Lena", "Maria", "Nina", "Olga", "Paula", "Rita", "Vera",
)  # fmt: skip
HIS_NAMES = (
    "Adam", "Anton", "Bruno", "Carl", "David", "Emil", "Erik", "Felix", "Georg", "Hugo", "Ivan", "Jakob", "Karl", "Leo",
    "Lukas", "Martin", "Noah", "Oskar", "Paul", "Robert", "Simon", "Theo", "Viktor", "Walter",
)  # fmt: skip
FAMILY_STARTS = (
    "Ahl", "Ander", "Berg", "Blom", "Brand", "Dahl", "Eck", "Ehren", "Engel", "Falk", "Feld", "Frank", "Grim", "Gruen",
    "Hag", "Hart", "Heim", "Holt", "Jans", "Kamp", "Klein", "Kron", "Lind", "Lund", "Mey", "Mohr", "Neu", "Nord",
    "Oster", "Rein", "Roth", "Sand", "Schon", "Stein", "Strom", "Tann", "Vogel", "Wald", "Weiss", "Wolf",
)  # fmt: skip
FAMILY_ENDS = (
    "aker", "arsen", "aus", "bach", "baum", "beck", "berger", "bo", "brook", "burger", "dorf", "eby", "er", "feldt",
    "gaard", "gren", "hagen", "hauser", "heimer", "hof", "hoff", "holm", "ing", "kvist", "lund", "mann", "marck",
    "meier", "mark", "quist", "rup", "scher", "sen", "skog", "son", "stad", "stedt", "strand", "strup", "thal",
)  # fmt: skip


def thing(draw: Draw) -> str:
    """A name for a product, ship, case, rule: one of 1,600."""
    return draw.pick(THING_STARTS) + draw.pick(THING_ENDS)


def place(draw: Draw) -> str:
    """A town: one of 1,600."""
    return draw.pick(PLACE_STARTS) + draw.pick(PLACE_ENDS)


def person(draw: Draw) -> str:
    """A full name: one of 76,800."""
    return f"{draw.pick(HER_NAMES + HIS_NAMES)} {draw.pick(FAMILY_STARTS)}{draw.pick(FAMILY_ENDS)}"


def is_her(name: str) -> bool:
    """Whether a person is referred to as she."""
    return name.split()[0] in HER_NAMES
