"""Words of the embedded world: proper names made of syllables, and the English of its stories."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Seeded choices that are the same on every Python: made of `Random.random()`, the one method that promises it.

    Args:
        key: what the choices depend on, such as ("story", 7).
    """

    def __init__(self, *key: str | int):
        self._random = Random("/".join(map(str, key)))

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order (Fisher and Yates)."""
        mixed = list(items)
        for i in range(len(mixed) - 1, 0, -1):
            j = self.below(i + 1)
            mixed[i], mixed[j] = mixed[j], mixed[i]
        return mixed

    def balanced(self, items: Sequence[T], count: int) -> list[T]:
        """`count` items in random order, each as often as any other (give or take one)."""
        return self.shuffled([items[i % len(items)] for i in range(count)])


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def _names(kind: str, onsets: str, middles: str, endings: str, count: int) -> tuple[str, ...]:
    parts = [group.split() for group in (onsets, middles, endings)]
    every = [(a + b + c).capitalize() for a in parts[0] for b in parts[1] for c in parts[2]]
    return tuple(Draw("names", kind).shuffled(every)[:count])


FIRST_NAMES = _names("first", "m t l k s b d n r v f h j p", "a e i o u", "ra lo mi na sto del vi ka", 48)
LAST_NAMES = _names("last", "tol bran hesk mor val quin dar fen gar ist", "a o e i", "van mund wick ster bury nell", 48)
TOWNS = _names("town", "os el ar tun gry hol mar pel sil wes", "tre ba lo ni ka du", "l n ford mouth stead gate", 360)
RIVERS = _names("river", "ith yss aul ebr oon", "a e o", "r sk ll wn", 12)
LANGUAGES = _names("language", "tar sev lon kip dru", "v m l z", "ic ese ish", 12)
DISEASE_NAMES = _names("disease", "br kl gl sp tr sn dr fl", "a e i o u", "ll nk rb sp tch mf", 60)
DISEASE_KINDS = listed(
    "fever palsy pox ague plague croup gout scurvy mange colic dropsy catarrh blight anemia dysentery cholera "
    "eczema asthma lupus sepsis rickets tetanus measles typhus"
)
WORK_ADJECTIVES = listed(
    "Amber Broken Crooked Distant Empty Frozen Gilded Hidden Iron Jealous Last Little Midnight Narrow Patient "
    "Quiet Restless Scarlet Second Silent Stolen Tall Velvet Wandering"
)
WORK_NOUNS = listed(
    "Anchor Bishop Candle Door Engine Feather Garden Hourglass Inn Kettle Lantern Mirror Needle Orchard Parade "
    "Quarrel Ribbon Shadow Thimble Umbrella Violin Wheel Window Yard"
)

# -- the words of stories ---------------------------------------------------------------------------------------------

PEOPLE = listed(
    "boy girl man woman uncle aunt grandmother grandfather neighbour stranger cousin brother sister guest waiter "
    "cook driver gardener porter clerk barber doctor lawyer captain poet jester beggar dancer carpenter mason"
)
ANIMALS = listed(
    "ant fox wolf bear deer lamb lynx moose raven rabbit squirrel mouse badger otter heron swan sparrow robin "
    "eagle hawk frog lizard turtle beetle bee butterfly cow horse sheep pig donkey rooster hen duck camel"
)
THINGS = listed(
    "anvil apron axe barrel basket bell blanket bottle box broom brush bucket button cane cart chair chest clock "
    "compass cradle coat cup curtain desk fan fork hammer hat jar key kite knife ladder lamp letter map mask nail "
    "napkin oar pan paddle pen pillow plate pocket purse ring rope sack saddle scarf shoe spoon stamp stool sword "
    "table ticket tool toy trunk vase wagon wallet whip"
)
FOODS = listed(
    "apple berry biscuit butter cake carrot cherry corn cream egg fig grape ham jam lemon melon milk muffin "
    "mushroom nut olive onion peach pear pepper plum potato pudding pumpkin radish sausage spinach tart tomato "
    "walnut"
)
PLACES = listed(
    "attic bakery barn bay beach camp cave cellar chapel church corner courtyard farm field gallery hall hill "
    "hospital hotel house kitchen lake lane meadow mill museum office park path pier pond porch road roof room "
    "school shop square stable station stairs street tavern temple trail tunnel wall warehouse wood workshop"
)
ADJECTIVES = listed(
    "angry bitter blunt bold brave bright busy calm careful cheap clean clever cold cruel curious damp dark dear "
    "deep dirty dry dull eager early easy fair faint famous fancy fat fine firm flat foolish fresh funny gentle "
    "glad grand great happy hard heavy honest huge humble idle kind large lazy light lonely loud lovely lucky "
    "mild modest neat new nice noisy odd old pale plain polite poor proud quick rare rich rough round rude sad "
    "safe sharp short shy sick simple sleepy slow small smooth soft sour steep stiff strange strong stubborn "
    "sudden sweet tame tender thick thin tidy tiny tired tough ugly warm weak wet wide wild wise wooden worn "
    "young"
)
ACTIONS = listed(
    "borrowed bought broke brought carried caught chose cleaned counted covered drew dropped dug fetched filled "
    "fixed followed forgot found gave grabbed guarded held hid kept kicked lifted lost loved measured mended "
    "moved needed noticed opened packed painted picked pulled pushed raised repaired returned sold sent shook "
    "showed stole swept threw tied took touched traded turned used wanted washed watched weighed wrapped"
)
MOVES = listed(
    "climbed crawled crept danced fell fled flew hurried jogged jumped limped marched paced raced ran rode rushed "
    "sailed skipped slipped stepped strolled swam tiptoed travelled trotted walked wandered"
)
SAYINGS = listed("answered cried explained joked laughed mumbled muttered replied said shouted sighed whispered")
MANNERS = listed(
    "again alone badly bravely brightly carefully cheerfully completely eagerly easily finally gently gladly "
    "happily honestly kindly loudly neatly nervously often openly patiently politely proudly quickly quietly "
    "rarely sadly safely secretly seriously slowly softly suddenly together twice warmly wisely"
)
FEELINGS = listed(
    "afraid amazed annoyed ashamed bored certain cheerful confused content grateful guilty hopeful hungry hurt "
    "jealous nervous pleased puzzled relieved restless satisfied sorry surprised thankful thirsty upset weary "
    "worried"
)
WEATHER = listed(
    "breeze cloud drizzle dust fog frost hail haze heat lightning mist moon rain rainbow shower sky sleet snow "
    "storm sun sunset thunder wind"
)
TIMES = listed(
    "afternoon birthday dawn day dusk evening harvest holiday hour midday minute morning night noon Sunday Monday "
    "Tuesday Wednesday Thursday Friday Saturday week weekend year"
)
NUMBERS = listed("two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty")
