"""The language of the second domain: a port. It shares sentences' shapes with the company, but no entity and few
words."""

from . import names
from .schema import Attribute, Kind, month, number, person, place, word, year

SHIP = Kind(
    "ship",
    "port",
    "the {n}",
    "ships",
    names.thing,
    count=12,
    attributes=(
        Attribute(
            "cargo",
            "cargo",
            word(
                "salt coal tea rice sugar timber barley coffee cotton fish fruit grain hemp honey linen "
                "maize oil paper silk spice tar wheat wine cement"
            ),
            (
                "{s} carries {v}.",
                "{s} is loaded with {v}.",
                "The hold of {o} is full of {v}.",
                "This season {o} carries {v}.",
            ),
            ("What does {o} carry?", "What is in the hold of {o}?"),
        ),
        Attribute(
            "home",
            "home port",
            place(),
            ("{s} sails from {v}.", "{s} is at home in {v}.", "{v} is the home of {o}.", "{s} is registered in {v}."),
            ("From where does {o} sail?", "Where is {o} at home?", "In which town is {o} registered?"),
            via="the pier where {o} is at home",
        ),
        Attribute(
            "captain",
            "captain",
            person(),
            (
                "{v} is the captain of {o}.",
                "{s} sails under {v}.",
                "{v} has command of {o}.",
                "Orders on {o} come from {v}.",
            ),
            ("Who is the captain of {o}?", "Under whom does {o} sail?", "Who has command of {o}?"),
            via="the captain of {o}",
        ),
        Attribute(
            "length",
            "length",
            number(20, 99, "metres"),
            ("{s} is {v} long.", "From bow to stern {o} measures {v}.", "{p} length is {v}."),
            ("How long is {o}?", "What does {o} measure from bow to stern?"),
            more="longer",
        ),
        Attribute(
            "crew",
            "crew",
            number(12, 98, "hands"),
            ("{s} has a crew of {v}.", "{v} serve on {o}.", "{s} sails with {v}."),
            ("How many serve on {o}?", "How large is the crew of {o}?"),
            more="larger by crew",
        ),
        Attribute(
            "built",
            "year of building",
            year(),
            ("{s} was built in {v}.", "{s} left the yard in {v}.", "The keel of {o} was laid in {v}."),
            ("When was {o} built?", "In which year did {o} leave the yard?"),
        ),
    ),
)

SAILOR = Kind(
    "sailor",
    "port",
    "{n}",
    "sailors",
    names.person,
    count=16,
    attributes=(
        Attribute(
            "rank",
            "rank",
            word(
                "mate pilot cook stoker rigger diver gunner surgeon purser bosun carpenter steward boatman "
                "cooper caulker lookout signaller loader helmsman deckhand ropemaker quartermaster fireman "
                "trimmer"
            ),
            ("{s} serves as a {v}.", "{s} signed on as a {v}.", "The roll has {o} down as a {v}."),
            ("What does {o} serve as?", "As what did {o} sign on?"),
        ),
        Attribute(
            "lodging",
            "lodging",
            place(),
            ("{s} lodges in {v}.", "{s} has a room in {v}.", "When ashore, {o} stays in {v}."),
            ("Where does {o} lodge?", "In which town does {o} have a room?"),
            via="the pier of the town where {o} lodges",
        ),
        Attribute(
            "licence",
            "licence number",
            number(100, 999),
            ("{s} holds licence {v}.", "{p} licence number is {v}.", "The licence of {o} is numbered {v}."),
            ("Which licence does {o} hold?", "What is {p} licence number?"),
        ),
        Attribute(
            "joined",
            "first year at sea",
            year(),
            ("{s} went to sea in {v}.", "{s} has been at sea since {v}.", "The first voyage of {o} was in {v}."),
            ("When did {o} go to sea?", "Since which year has {o} been at sea?"),
        ),
    ),
)

PIER = Kind(
    "pier",
    "port",
    "the {n} pier",
    "piers",
    names.place,
    count=8,
    attributes=(
        Attribute(
            "master",
            "pier master",
            person(),
            ("{v} is master of {o}.", "{s} is watched over by {v}.", "{v} hands out the berths at {o}."),
            ("Who is master of {o}?", "Who hands out the berths at {o}?"),
            via="the master of {o}",
        ),
        Attribute(
            "depth",
            "depth",
            number(10, 99, "feet"),
            ("The water at {o} is {v} deep.", "{s} has {v} of water.", "At low tide {o} keeps {v}."),
            ("How deep is the water at {o}?", "How much water does {o} have?"),
            more="deeper",
        ),
        Attribute(
            "berths",
            "number of berths",
            number(12, 98, "berths"),
            ("{s} has {v}.", "{s} offers {v}.", "There are {v} at {o}."),
            ("How many berths does {o} have?", "How many berths are there at {o}?"),
            more="larger by berths",
        ),
        Attribute(
            "opened",
            "opening year",
            year(),
            ("{s} opened in {v}.", "{s} has stood since {v}.", "The first ship tied up at {o} in {v}."),
            ("When did {o} open?", "Since which year has {o} stood?"),
        ),
    ),
)

STORM = Kind(
    "storm",
    "port",
    "the {n} storm",
    "storms",
    names.thing,
    count=10,
    attributes=(
        Attribute(
            "date",
            "date",
            month(),
            ("{s} struck in {v}.", "{s} is dated {v}.", "The log has {o} under {v}."),
            ("When did {o} strike?", "Under which month does the log have {o}?"),
        ),
        Attribute(
            "wind",
            "wind speed",
            number(40, 99, "knots"),
            ("{s} blew at {v}.", "During {o} the wind reached {v}.", "{p} wind was measured at {v}."),
            ("How hard did {o} blow?", "Which speed did the wind reach during {o}?"),
            more="stronger",
        ),
        Attribute(
            "landfall",
            "landfall",
            place(),
            ("{s} came ashore in {v}.", "{s} hit {v} first.", "{v} was the first to feel {o}."),
            ("Where did {o} come ashore?", "Which town was the first to feel {o}?"),
            via="the pier of the town that {o} hit first",
        ),
        Attribute(
            "witness",
            "witness",
            person(),
            ("{v} wrote the account of {o}.", "{s} was described by {v}.", "What we know of {o} comes from {v}."),
            ("Who wrote the account of {o}?", "Who described {o}?"),
            via="the witness who described {o}",
        ),
    ),
)

TARIFF = Kind(
    "tariff",
    "port",
    "the {n} tariff",
    "tariffs",
    names.thing,
    count=8,
    attributes=(
        Attribute(
            "clerk",
            "clerk",
            person(),
            ("{v} collects {o}.", "{s} is paid to {v}.", "The books of {o} are kept by {v}."),
            ("Who collects {o}?", "To whom is {o} paid?"),
            via="the clerk who collects {o}",
        ),
        Attribute(
            "fee",
            "fee",
            number(110, 990, "crowns", step=10),
            ("{s} comes to {v}.", "Under {o} a ship pays {v}.", "{s} is set at {v}."),
            ("How much does a ship pay under {o}?", "At how much is {o} set?"),
            more="higher",
        ),
        Attribute(
            "stay",
            "free stay",
            number(12, 98, "days"),
            ("Under {o} a ship may stay {v}.", "{s} covers {v} at the pier.", "{s} lets a ship lie for {v}."),
            ("How long may a ship stay under {o}?", "For how long does {o} let a ship lie?"),
            more="longer in days",
        ),
        Attribute(
            "start",
            "starting year",
            year(),
            ("{s} has been charged since {v}.", "{s} came into force in {v}.", "Ships have paid {o} since {v}."),
            ("Since when has {o} been charged?", "When did {o} come into force?"),
        ),
    ),
)

KINDS = (SHIP, SAILOR, PIER, STORM, TARIFF)
LINKS = (
    ("ship", "home", "pier"),
    ("ship", "captain", "sailor"),
    ("sailor", "lodging", "pier"),
    ("pier", "master", "sailor"),
    ("storm", "landfall", "pier"),
    ("storm", "witness", "sailor"),
    ("tariff", "clerk", "sailor"),
)
PLACES = "pier"
PEOPLE = "sailor"
