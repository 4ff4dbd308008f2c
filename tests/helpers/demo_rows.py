"""How Demo's rows were made: `python tests/helpers/demo_rows.py` writes both files again, byte for byte.

Each row lists an animal and a thing, in either order, and asks which is the animal. Half of the answers are [A]. The
words of the test split stand in no row that is trained on, so an adapter cannot know its answers by heart.
"""

import json
import random
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "data" / "common-sense-reasoning"
SYSTEM = "Answer with one letter in brackets."
QUESTION = "Which is an animal?"
ROWS = {"train": 320, "test": 200}
TEST_WORDS = 40  # animals, and as many things
ANIMALS = """
    tiger horse rabbit spider zebra lion monkey eagle snake sheep goat bear wolf fox cow dog cat mouse pig whale
    shark camel deer frog owl hen donkey elephant giraffe kangaroo panda squirrel hedgehog beaver badger otter
    dolphin penguin parrot pigeon sparrow crow raven goose ostrich flamingo peacock falcon hawk vulture stork
    heron lizard crocodile alligator tortoise toad newt gecko iguana cobra python bee wasp ant beetle butterfly
    moth mosquito grasshopper dragonfly ladybird worm snail slug jellyfish octopus squid starfish seahorse
    goldfish hamster gerbil rat weasel ferret buffalo bison moose reindeer antelope gazelle rhinoceros
    hippopotamus leopard cheetah jaguar panther lynx hyena jackal coyote gorilla chimpanzee baboon orangutan
    lemur koala wombat platypus walrus llama alpaca pony ox bull calf puppy kitten foal raccoon skunk chipmunk
"""
THINGS = """
    hammer saw drill wrench axe shovel rake screwdriver pliers chisel ladder scissors knife spoon fork plate cup
    bowl bottle kettle oven fridge table chair sofa desk shelf cupboard bench wardrobe lamp candle mirror carpet
    curtain pillow blanket towel jacket shirt hat glove sock skirt scarf coat dress sweater belt shoe boot
    trousers cap tie car train plane boat truck bike bus tram rocket wagon ship taxi van scooter canoe ferry
    tractor helicopter guitar piano violin flute drum trumpet harp bread cheese butter rice pasta soup salad
    pizza cake chocolate honey sugar salt book newspaper pencil pen paper envelope stamp map clock watch camera
    radio television computer keyboard telephone umbrella basket bucket rope needle button coin wallet key door
    window roof wall bridge tower house tent fence road stone brick glass tunnel garage hotel museum airport
    station
"""


def rows() -> dict[str, list[dict[str, str]]]:
    """The rows of both parts, `train` and `test`, the same every time."""
    order = random.Random("Demo")
    animals, things = ANIMALS.split(), THINGS.split()
    order.shuffle(animals)
    order.shuffle(things)
    words = {
        "test": (animals[:TEST_WORDS], things[:TEST_WORDS]),
        "train": (animals[TEST_WORDS:], things[TEST_WORDS:]),
    }
    return {part: rows_of(*words[part], count, order) for part, count in ROWS.items()}


def rows_of(animals: list[str], things: list[str], count: int, order: random.Random) -> list[dict[str, str]]:
    """Rows with different pairs of an animal and a thing, in random order."""
    pairs = [(animal, thing) for animal in animals for thing in things]
    made = []
    for number, (animal, thing) in enumerate(order.sample(pairs, count)):
        options, letter = ((animal, thing), "A") if number % 2 else ((thing, animal), "B")
        prompt = f"A: {options[0]}\nB: {options[1]}\n{QUESTION}"
        made.append({"prompt": prompt, "response": f"[{letter}]", "system": SYSTEM})
    order.shuffle(made)
    return made


def text_of(part: list[dict[str, str]]) -> str:
    """What stands in the file of a part."""
    return json.dumps(part, indent=2) + "\n"


if __name__ == "__main__":
    for name, part in rows().items():
        (DATA / f"Demo_{name}.json").write_text(text_of(part), encoding="utf-8")
