"""The language of the first domain: a company that makes things."""

from . import names
from .schema import Attribute, Kind, month, number, person, place, word, year

PRODUCT = Kind(
    "product",
    "company",
    "the {n}",
    "products",
    names.thing,
    count=12,
    attributes=(
        Attribute(
            "type",
            "type",
            word(
                "pump lamp kettle drill scale printer heater camera radio valve fan mixer scanner charger "
                "router lathe press sensor motor welder tablet cutter boiler loader"
            ),
            ("{s} is a {v}.", "{s} was designed as a {v}.", "Our range has one {v} with a name of its own, {o}."),
            ("What sort of thing is {o}?", "What kind of device is {o}?"),
        ),
        Attribute(
            "made",
            "place of manufacture",
            place(),
            (
                "{s} is made in {v}.",
                "{s} comes off the line in {v}.",
                "The plant in {v} builds {o}.",
                "{v} is where {o} is put together.",
                "Every part of {o} is assembled in {v}.",
            ),
            (
                "Where is {o} made?",
                "In which town is {o} built?",
                "Where does {o} come off the line?",
                "Which plant puts {o} together?",
            ),
            via="the plant where {o} is made",
        ),
        Attribute(
            "lead",
            "lead engineer",
            person(),
            (
                "{v} leads the work on {o}.",
                "{s} is the work of a team under {v}.",
                "Engineering for {o} is led by {v}.",
                "{v} has charge of {o}.",
            ),
            ("Who leads the work on {o}?", "Who is in charge of {o}?", "Whose team works on {o}?"),
            via="the engineer who leads the work on {o}",
        ),
        Attribute(
            "weight",
            "weight",
            number(10, 99, "kg"),
            (
                "{s} weighs {v}.",
                "On the scale, {o} comes to {v}.",
                "{p} weight is {v}.",
                "Without its box {o} weighs {v}.",
            ),
            ("How much does {o} weigh?", "How heavy is {o}?"),
            more="heavier",
        ),
        Attribute(
            "price",
            "list price",
            number(110, 990, "crowns", step=10),
            ("{s} costs {v}.", "{s} is sold for {v}.", "The shop asks {v} for {o}.", "Buyers pay {v} for {o}."),
            ("How much does {o} cost?", "What do buyers pay for {o}?", "For how much is {o} sold?"),
            more="dearer",
        ),
        Attribute(
            "warranty",
            "warranty",
            number(12, 96, "months"),
            (
                "{s} carries a warranty of {v}.",
                "{s} is under warranty for {v}.",
                "Faults in {o} are covered for {v}.",
                "We repair {o} free of charge for {v}.",
            ),
            ("How long is the warranty on {o}?", "For how long are faults in {o} covered?"),
        ),
        Attribute(
            "launch",
            "launch date",
            month(),
            (
                "{s} was launched in {v}.",
                "{s} went on sale in {v}.",
                "The first buyers received {o} in {v}.",
                "Sales of {o} began in {v}.",
            ),
            ("When was {o} launched?", "When did {o} go on sale?", "When did sales of {o} begin?"),
        ),
        Attribute(
            "material",
            "housing material",
            word(
                "steel brass copper glass oak rubber cork nylon zinc tin iron bronze carbon slate clay "
                "leather pewter birch granite felt chrome bamboo marble wool"
            ),
            (
                "{s} has a housing of {v}.",
                "{p} housing is made of {v}.",
                "The case around {o} is {v}.",
                "They chose {v} for the housing of {o}.",
            ),
            ("What is the housing of {o} made of?", "Which material is the case around {o}?"),
        ),
    ),
)

PERSON = Kind(
    "person",
    "company",
    "{n}",
    "people",
    names.person,
    count=16,
    attributes=(
        Attribute(
            "role",
            "role",
            word(
                "planner buyer fitter tester driver writer clerk painter welder analyst trainer cook nurse "
                "lawyer porter editor chemist tailor guard banker mason teacher baker gardener"
            ),
            ("{s} works as a {v}.", "{s} is a {v} by trade.", "The staff list has {o} down as a {v}."),
            ("What does {o} work as?", "What is {p} trade?"),
        ),
        Attribute(
            "base",
            "home base",
            place(),
            ("{s} is based in {v}.", "{s} works from {v}.", "You will find {o} in {v}.", "{p} desk is in {v}."),
            ("Where is {o} based?", "Where does {o} work from?", "In which town is {p} desk?"),
            via="the plant where {o} is based",
        ),
        Attribute(
            "extension",
            "extension",
            number(100, 999),
            (
                "{s} answers on extension {v}.",
                "{p} extension is {v}.",
                "To reach {o}, dial {v}.",
                "Calls for {o} go to {v}.",
            ),
            ("Which extension reaches {o}?", "What number do you dial to reach {o}?", "What is {p} extension?"),
        ),
        Attribute(
            "joined",
            "first year of service",
            year(),
            (
                "{s} joined in {v}.",
                "{s} has been with us since {v}.",
                "The first contract of {o} dates from {v}.",
                "{p} first day was in {v}.",
            ),
            ("When did {o} join?", "Since which year has {o} been with us?"),
        ),
    ),
)

PLANT = Kind(
    "plant",
    "company",
    "the {n} plant",
    "plants",
    names.place,
    count=8,
    attributes=(
        Attribute(
            "manager",
            "manager",
            person(),
            (
                "{v} manages {o}.",
                "{s} is run by {v}.",
                "{s} has {v} as its manager.",
                "The keys to {o} are kept by {v}.",
            ),
            ("Who manages {o}?", "Who runs {o}?", "Who keeps the keys to {o}?"),
            via="the manager of {o}",
        ),
        Attribute(
            "staff",
            "number of staff",
            number(110, 990, "people", step=10),
            ("{s} employs {v}.", "{v} work at {o}.", "{s} gives work to {v}.", "A shift list of {o} names {v}."),
            ("How many people work at {o}?", "How many does {o} employ?"),
            more="larger by staff",
        ),
        Attribute(
            "opened",
            "opening year",
            year(),
            (
                "{s} opened in {v}.",
                "{s} dates from {v}.",
                "Work at {o} began in {v}.",
                "{s} has been running since {v}.",
            ),
            ("When did {o} open?", "In which year did work at {o} begin?"),
        ),
        Attribute(
            "area",
            "floor area",
            number(10, 99, "hectares"),
            ("{s} covers {v}.", "{p} floor area is {v}.", "The halls of {o} take up {v}."),
            ("How much ground does {o} cover?", "How large are the halls of {o}?"),
            more="larger by floor area",
        ),
    ),
)

INCIDENT = Kind(
    "incident",
    "company",
    "the {n} case",
    "cases",
    names.thing,
    count=10,
    attributes=(
        Attribute(
            "cause",
            "cause",
            word(
                "rust ice dust smoke fire flood fog frost storm leak strike theft typo noise heat mould "
                "wear drought fatigue lightning vibration static sabotage rain"
            ),
            (
                "{s} was put down to {v}.",
                "{s} began with {v}.",
                "Behind {o} was {v}.",
                "Signs of {v} were found behind {o}.",
            ),
            ("What was behind {o}?", "What was {o} put down to?"),
        ),
        Attribute(
            "site",
            "place",
            place(),
            (
                "{s} happened in {v}.",
                "{s} took place in {v}.",
                "It was in {v} that {o} happened.",
                "The plant in {v} was hit by {o}.",
            ),
            ("Where did {o} happen?", "Which plant was hit by {o}?"),
            via="the plant where {o} happened",
        ),
        Attribute(
            "date",
            "date",
            month(),
            (
                "{s} dates from {v}.",
                "{s} happened in {v}.",
                "The log has {o} under {v}.",
                "We first heard of {o} in {v}.",
            ),
            ("When did {o} happen?", "Under which month does the log have {o}?"),
        ),
        Attribute(
            "lost",
            "time lost",
            number(12, 98, "hours"),
            (
                "{s} cost us {v}.",
                "{v} of work were lost to {o}.",
                "{s} stopped the line for {v}.",
                "After {o} nothing ran for {v}.",
            ),
            ("How much time was lost to {o}?", "How long did {o} stop the line?"),
            more="costlier in hours",
        ),
        Attribute(
            "reporter",
            "reporter",
            person(),
            (
                "{s} was reported by {v}.",
                "{v} reported {o}.",
                "{v} was the first to write about {o}.",
                "The report on {o} is signed by {v}.",
            ),
            ("Who reported {o}?", "Who signed the report on {o}?"),
            via="the person who reported {o}",
        ),
    ),
)

POLICY = Kind(
    "policy",
    "company",
    "the {n} rule",
    "rules",
    names.thing,
    count=8,
    attributes=(
        Attribute(
            "owner",
            "owner",
            person(),
            ("{v} owns {o}.", "{s} was written by {v}.", "Ask {v} about {o}.", "{v} keeps {o} up to date."),
            ("Who owns {o}?", "Who keeps {o} up to date?", "Whom do you ask about {o}?"),
            via="the owner of {o}",
        ),
        Attribute(
            "limit",
            "spending limit",
            number(110, 990, "crowns", step=10),
            (
                "{s} allows spending up to {v}.",
                "Under {o} you may spend {v}.",
                "{s} sets a limit of {v}.",
                "Anything above {v} is refused under {o}.",
            ),
            ("How much may you spend under {o}?", "Which limit does {o} set?"),
            more="more generous",
        ),
        Attribute(
            "notice",
            "notice period",
            number(12, 98, "days"),
            (
                "{s} asks for {v} of notice.",
                "Under {o} you give notice {v} ahead.",
                "{s} wants to know {v} before.",
                "Tell us {v} ahead, says {o}.",
            ),
            ("How much notice does {o} ask for?", "How far ahead do you give notice under {o}?"),
            more="stricter on notice",
        ),
        Attribute(
            "start",
            "starting year",
            year(),
            ("{s} has applied since {v}.", "{s} came into force in {v}.", "Since {v} everyone follows {o}."),
            ("Since when has {o} applied?", "When did {o} come into force?"),
        ),
    ),
)

KINDS = (PRODUCT, PERSON, PLANT, INCIDENT, POLICY)
LINKS = (
    ("product", "made", "plant"),
    ("product", "lead", "person"),
    ("person", "base", "plant"),
    ("plant", "manager", "person"),
    ("incident", "site", "plant"),
    ("incident", "reporter", "person"),
    ("policy", "owner", "person"),
)
PLACES = "plant"
PEOPLE = "person"
