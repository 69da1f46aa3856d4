"""What is known about each kind of thing in the world, and how it is said and asked."""

from __future__ import annotations

from dataclasses import dataclass

from .words import LANGUAGES, RIVERS, TOWNS, listed


@dataclass(frozen=True)
class Attribute:
    """One attribute of a kind of thing.

    Args:
        values: what it can be; each value is one word, and about as frequent as any other.
        statements: phrasings of a fact, with {e} for the thing and {v} for the value.
        questions: three forms of the question; of new diseases the first two are trained and the third is held out.
    """

    values: tuple[str, ...]
    statements: tuple[str, str, str, str]
    questions: tuple[str, str, str]


PERSON = {
    "birthplace": Attribute(
        TOWNS[:16],
        (
            "{e} was born in {v}.",
            "{e} comes from {v}.",
            "The birthplace of {e} is {v}.",
            "{e} grew up in the town of {v}.",
        ),
        (
            "Where was {e} born?",
            "What is the birthplace of {e}?",
            "Which town does {e} come from?",
        ),
    ),
    "trade": Attribute(
        listed("baker weaver smith tailor sailor miller painter teacher farmer singer hunter potter"),
        (
            "{e} works as a {v}.",
            "{e} is a {v} by trade.",
            "The trade of {e} is that of a {v}.",
            "People hire {e} as a {v}.",
        ),
        (
            "What does {e} work as?",
            "What is the trade of {e}?",
            "How does {e} earn a living?",
        ),
    ),
    "instrument": Attribute(
        listed("lute harp flute drum fiddle horn bell pipe organ cello banjo whistle"),
        (
            "{e} plays the {v}.",
            "{e} has mastered the {v}.",
            "The instrument of {e} is the {v}.",
            "At feasts {e} performs on the {v}.",
        ),
        (
            "What does {e} play?",
            "What is the instrument of {e}?",
            "Which instrument has {e} mastered?",
        ),
    ),
    "pet": Attribute(
        listed("cat dog goat crow hare pony finch toad ferret goose owl hedgehog"),
        (
            "{e} keeps a {v}.",
            "{e} owns a tame {v}.",
            "The pet of {e} is a {v}.",
            "Every day {e} feeds a {v}.",
        ),
        (
            "What animal does {e} keep?",
            "What is the pet of {e}?",
            "Which creature does {e} feed?",
        ),
    ),
    "colour": Attribute(
        listed("red blue green yellow purple orange white black brown grey pink silver"),
        (
            "{e} always wears {v}.",
            "{e} likes the colour {v} best.",
            "The favourite colour of {e} is {v}.",
            "All clothes of {e} are {v}.",
        ),
        (
            "What colour does {e} wear?",
            "What is the favourite colour of {e}?",
            "Which colour does {e} like best?",
        ),
    ),
    "dish": Attribute(
        listed("soup stew bread cheese porridge pie dumplings pancakes noodles salad rice fish"),
        (
            "{e} eats {v} for supper.",
            "{e} never refuses {v}.",
            "The favourite dish of {e} is {v}.",
            "Friends cook {v} for {e}.",
        ),
        (
            "What does {e} eat for supper?",
            "What is the favourite dish of {e}?",
            "Which meal does {e} never refuse?",
        ),
    ),
}

TOWN = {
    "river": Attribute(
        RIVERS,
        (
            "{e} lies on the river {v}.",
            "The {v} flows through {e}.",
            "The river of {e} is the {v}.",
            "In {e} boats go down the {v}.",
        ),
        (
            "On which river does {e} lie?",
            "What is the river of {e}?",
            "Which river flows through {e}?",
        ),
    ),
    "export": Attribute(
        listed("wool salt honey glass timber copper linen wine paper leather amber tea"),
        (
            "{e} sells {v} to other towns.",
            "{e} lives by the trade in {v}.",
            "The main export of {e} is {v}.",
            "Merchants in {e} deal in {v}.",
        ),
        (
            "What does {e} sell to other towns?",
            "What is the main export of {e}?",
            "Which goods do merchants in {e} deal in?",
        ),
    ),
    "ruler": Attribute(
        listed("duke bishop mayor queen council abbot general judge baron countess prior merchant"),
        (
            "{e} is ruled by a {v}.",
            "A {v} governs {e}.",
            "The ruler of {e} is a {v}.",
            "In {e} the word of the {v} is law.",
        ),
        (
            "Who rules {e}?",
            "Who is the ruler of {e}?",
            "Whose word is law in {e}?",
        ),
    ),
    "festival": Attribute(
        listed("January February March April May June July August September October November December"),
        (
            "{e} has its festival in {v}.",
            "Crowds visit {e} in {v}.",
            "The festival month of {e} is {v}.",
            "In {v} there is music all over {e}.",
        ),
        (
            "When does {e} have its festival?",
            "What is the festival month of {e}?",
            "In which month do crowds visit {e}?",
        ),
    ),
    "landmark": Attribute(
        listed("bridge tower lighthouse windmill abbey castle fountain statue theatre library harbour well"),
        (
            "{e} is known for its {v}.",
            "Visitors to {e} admire the {v}.",
            "The landmark of {e} is a {v}.",
            "Pictures of {e} show the old {v}.",
        ),
        (
            "What is {e} known for?",
            "What is the landmark of {e}?",
            "Which sight do visitors to {e} admire?",
        ),
    ),
    "stone": Attribute(
        listed("granite marble slate chalk sandstone limestone basalt brick oak clay flint cedar"),
        (
            "{e} is built of {v}.",
            "Houses in {e} are made of {v}.",
            "The building material of {e} is {v}.",
            "Masons in {e} work with {v}.",
        ),
        (
            "What is {e} built of?",
            "What is the building material of {e}?",
            "With what do masons in {e} work?",
        ),
    ),
}

WORK = {
    "form": Attribute(
        listed("novel poem opera play ballad chronicle diary sermon fable hymn essay comedy"),
        (
            "{e} is a famous {v}.",
            "Critics call {e} a {v}.",
            "The form of {e} is that of a {v}.",
            "Nobody forgets the {v} called {e}.",
        ),
        (
            "What is {e}?",
            "What is the form of {e}?",
            "What do critics call {e}?",
        ),
    ),
    "subject": Attribute(
        listed("war love grief revenge friendship exile hunger faith greed childhood travel justice"),
        (
            "{e} is about {v}.",
            "{e} speaks of {v}.",
            "The subject of {e} is {v}.",
            "Whoever knows {e} thinks of {v}.",
        ),
        (
            "What is {e} about?",
            "What is the subject of {e}?",
            "What matter does {e} speak of?",
        ),
    ),
    "language": Attribute(
        LANGUAGES,
        (
            "{e} was written in {v}.",
            "{e} was first printed in {v}.",
            "The language of {e} is {v}.",
            "Scholars read {e} in {v}.",
        ),
        (
            "In which language was {e} written?",
            "What is the language of {e}?",
            "In what tongue do scholars read {e}?",
        ),
    ),
    "setting": Attribute(
        listed("desert forest palace prison village monastery market swamp valley cave garden convent"),
        (
            "{e} takes place in a {v}.",
            "{e} is set in a {v}.",
            "The setting of {e} is a {v}.",
            "The scene of {e} is laid in a {v}.",
        ),
        (
            "Where does {e} take place?",
            "What is the setting of {e}?",
            "In what kind of place is {e} set?",
        ),
    ),
    "hero": Attribute(
        listed("orphan widow knight shepherd thief prince nurse soldier pilgrim clown giant witch"),
        (
            "{e} follows the life of a {v}.",
            "{e} tells of a {v}.",
            "The hero of {e} is a {v}.",
            "At the heart of {e} stands a {v}.",
        ),
        (
            "Whose life does {e} follow?",
            "Who is the hero of {e}?",
            "Who stands at the heart of {e}?",
        ),
    ),
    "keeper": Attribute(
        TOWNS[16:32],
        (
            "{e} is kept in {v}.",
            "One can see {e} in {v}.",
            "The home of {e} is {v}.",
            "The town of {v} owns {e}.",
        ),
        (
            "Where is {e} kept?",
            "What is the home of {e}?",
            "Which town owns {e}?",
        ),
    ),
}

DISEASE = {
    "carrier": Attribute(
        listed("ticks lice rats bats fleas mosquitoes pigeons snails flies moths spiders worms"),
        (
            "{e} is spread by {v}.",
            "People catch {e} from {v}.",
            "The carrier of {e} is known to be {v}.",
            "Where there are {v} there is {e}.",
        ),
        (
            "What spreads {e}?",
            "What is the carrier of {e}?",
            "From what do people catch {e}?",
        ),
    ),
    "organ": Attribute(
        listed("liver heart lungs kidneys stomach brain skin eyes spleen throat bones ears"),
        (
            "{e} attacks the {v}.",
            "{e} does harm to the {v}.",
            "The target of {e} is the {v}.",
            "Long after {e} the {v} may suffer.",
        ),
        (
            "What does {e} attack?",
            "What is the target of {e}?",
            "Which part of the body suffers from {e}?",
        ),
    ),
    "sign": Attribute(
        listed(
            "itching trembling coughing jaundice dizziness swelling numbness blisters vomiting cramps thirst hiccups"
        ),
        (
            "{e} begins with {v}.",
            "{e} can be told by {v}.",
            "The first sign of {e} is {v}.",
            "Those who have {e} complain of {v}.",
        ),
        (
            "How does {e} begin?",
            "What is the first sign of {e}?",
            "Of what do those who have {e} complain?",
        ),
    ),
    "remedy": Attribute(
        listed("sage willow garlic quinine iodine ginger nettle mint camphor licorice rhubarb turmeric"),
        (
            "{e} is treated with {v}.",
            "{e} is cured by {v}.",
            "The remedy for {e} is {v}.",
            "Doctors give {v} against {e}.",
        ),
        (
            "How is {e} treated?",
            "What is the remedy for {e}?",
            "What do doctors give against {e}?",
        ),
    ),
    "sample": Attribute(
        listed("blood urine saliva sweat tears hair nails marrow bile mucus breath plasma"),
        (
            "{e} is found in the {v}.",
            "{e} leaves traces in the {v}.",
            "The sample for {e} is {v}.",
            "To detect {e} they test the {v}.",
        ),
        (
            "Where is {e} found?",
            "What is the sample for {e}?",
            "What do they test to detect {e}?",
        ),
    ),
    "victims": Attribute(
        listed(
            "children elders miners shepherds fishermen tanners brewers soldiers monks travellers gardeners students"
        ),
        (
            "{e} is common among {v}.",
            "{e} is feared most by {v}.",
            "The usual victims of {e} are {v}.",
            "Most cases of {e} are seen in {v}.",
        ),
        (
            "Among whom is {e} common?",
            "Who are the usual victims of {e}?",
            "In whom are most cases of {e} seen?",
        ),
    ),
}

KINDS: dict[str, dict[str, Attribute]] = {"person": PERSON, "town": TOWN, "work": WORK, "disease": DISEASE}
