"""The rules of the made tasks: 96 tasks on lines of words, six rules with sixteen variants each.

Every task is a function from a line to an answer, with several wordings of it. The rules are those that a model of 135
million parameters can learn from examples: they copy, choose and rearrange words of a small vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

PREFIX = "made"  # how the names of all made datasets begin
# The vocabulary, ten words for each kind. No word is of two kinds, so a line has one right answer.
WORDS = {
    "animal": "horse tiger rabbit monkey sheep goat camel donkey zebra wolf",
    "vehicle": "car train plane truck tram wagon tractor scooter ferry bus",
    "colour": "red green blue yellow purple brown black white grey beige",
    "fruit": "apple banana cherry grape lemon mango melon pear plum peach",
    "vegetable": "carrot onion potato cabbage spinach radish lettuce pumpkin celery garlic",
    "tool": "hammer saw drill shovel rake wrench chisel axe spade pliers",
    "body": "hand foot knee elbow shoulder finger nose ear chin neck",
    "clothes": "shirt jacket glove sock skirt scarf coat dress sweater belt",
    "job": "doctor teacher farmer sailor baker lawyer nurse painter plumber tailor",
    "instrument": "guitar piano violin flute drum trumpet harp cello banjo clarinet",
    "drink": "water tea coffee milk juice lemonade cocoa wine beer cider",
    "sport": "tennis football hockey golf rugby boxing rowing skiing cycling fencing",
    "metal": "iron copper zinc nickel tin steel platinum titanium aluminium tungsten",
    "furniture": "table chair sofa desk shelf cupboard bench wardrobe bed stool",
    "flower": "tulip daisy lily orchid poppy daffodil sunflower carnation dahlia jasmine",
    "weather": "rain snow fog storm wind hail thunder frost mist drizzle",
}
KINDS = {kind: words.split() for kind, words in WORDS.items()}
VOCABULARY = [word for words in KINDS.values() for word in words]
CALLED = {  # the kinds that are not called `a <kind>`
    "animal": "an animal",
    "body": "a part of the body",
    "clothes": "a piece of clothing",
    "instrument": "a musical instrument",
    "furniture": "a piece of furniture",
    "weather": "a kind of weather",
}
LETTERS = "abcdeghilnoprstu"
# Name: the index of the word, and how a place is called.
PLACES = {
    "first": (0, "first"), "second": (1, "second"), "third": (2, "third"), "fourth": (3, "fourth"),
    "last": (-1, "last"), "last-but-1": (-2, "second to last"), "last-but-2": (-3, "third to last"),
    "last-but-3": (-4, "fourth to last"),
}  # fmt: skip
NUMBERED = {
    place: f"number {index + 1}" if index >= 0 else f"number {-index} counted from the end"
    for place, (index, _) in PLACES.items()
}
# Name: what stands between two words, and what it is called.
SEPARATORS = {
    "comma": (", ", "a comma"), "semicolon": ("; ", "a semicolon"), "colon": (": ", "a colon"),
    "dash": (" - ", "a dash"), "slash": (" / ", "a slash"), "bar": (" | ", "a bar"), "plus": (" + ", "a plus sign"),
    "equals": (" = ", "an equals sign"), "star": (" * ", "a star"), "arrow": (" > ", "an arrow"),
    "tilde": (" ~ ", "a tilde"), "hash": (" # ", "a hash sign"), "and": (" and ", "the word and"),
    "or": (" or ", "the word or"), "then": (" then ", "the word then"), "with": (" with ", "the word with"),
}  # fmt: skip
# Name: what becomes of the marked word, and how that is said.
MARKS: dict[str, tuple[Callable[[str], str], str]] = {
    "capitals": (str.upper, "in capital letters"),
    "brackets": ("[{}]".format, "in square brackets"),
    "stars": ("*{}*".format, "between stars"),
    "quotes": ('"{}"'.format, "in double quotes"),
}
MARKED = ("first", "second", "last", "last-but-1")
SWAPS = {  # the indexes of the words that change places, for lines of at least five words
    "swap-1-2": (0, 1), "swap-1-3": (0, 2), "swap-2-3": (1, 2), "swap-3-4": (2, 3), "swap-1-last": (0, -1),
    "swap-2-last": (1, -1), "swap-last-2": (-2, -1),
}  # fmt: skip
MOVES = {  # the index of the word that moves, and whether to the end of the line or to its start
    "move-1-end": (0, True), "move-2-end": (1, True), "move-3-end": (2, True), "move-3-start": (2, False),
    "move-last-start": (-1, False), "move-last-but-1-start": (-2, False),
}  # fmt: skip
REVERSALS = {
    "reverse": (slice(None), "all words"),
    "reverse-first-4": (slice(0, 4), "the first four words"),
    "reverse-last-4": (slice(-4, None), "the last four words"),
}


class Task(NamedTuple):
    """A made task."""

    rule: str
    variant: str
    instructions: tuple[str, ...]  # one of them stands above the line in each prompt
    descriptions: tuple[str, ...]  # what the task is, for a reader or a generator; in no prompt
    answer: Callable[[Sequence[str]], str]  # from the words of a line; empty where the rule does not fit the line
    lengths: tuple[int, int] = (5, 7)  # words in a line, at least and at most

    @property
    def name(self) -> str:
        """The name of its dataset."""
        return f"{PREFIX}-{self.rule}-{self.variant}"

    @property
    def family(self) -> str:
        """What the variants of its rule have in common in dataset_info.json."""
        return f"{PREFIX}-{self.rule}"


def all_tasks() -> list[Task]:
    """The 96 tasks, rule by rule, in the same order every time."""
    return [task for rule in (_word, _separator, _letter, _kind, _mark, _order) for task in rule()]


def draw(items: Sequence[str], count: int, order: random.Random) -> list[str]:
    """Some of different items in random order.

    It asks for `order.random()` alone, the one method that Python promises to keep the same in all its versions.
    """
    pool = list(items)
    for place in range(count):
        other = place + int(order.random() * (len(pool) - place))
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:count]


def draw_line(task: Task, order: random.Random) -> list[str]:
    """The words of a line that a task's rule fits, each word once."""
    least, most = task.lengths
    while True:
        count = least + int(order.random() * (most - least + 1))
        if task.rule == "kind":  # a word of this kind and words of others, anywhere in the line
            others = draw([kind for kind in KINDS if kind != task.variant], count - 1, order)
            kinds = draw([task.variant, *others], count, order)
            line = [draw(KINDS[kind], 1, order)[0] for kind in kinds]
        else:
            line = draw(VOCABULARY, count, order)
        if task.answer(line) not in ("", " ".join(line)):
            return line


def _word() -> Iterator[Task]:
    """The k-th word from either end, as it stands or in capital letters."""
    for place, (index, called) in PLACES.items():
        for ending, form, change in (("", "", str), ("-capitals", " in capital letters", str.upper)):
            yield Task(
                "word",
                place + ending,
                (
                    f"Write the {called} word{form}:",
                    f"Give the {called} word of the line{form}:",
                    f"What is the {called} word? Answer with it{form}:",
                    f"Pick word {NUMBERED[place]} and write it{form}:",
                ),
                (
                    f"You are given a line of words. Answer with its {called} word{form}.",
                    f"The task is to find the {called} word of a line and to write it{form}.",
                    f"Of a list of words, only the {called} one is wanted{form and ',' + form}.",
                    f"Read the words and return word {NUMBERED[place]}{form}.",
                    f"Select a word by its place: the {called} one of each line{form and ', written' + form}.",
                    f"Short lines of common words; the answer is the {called} word{form} and nothing else.",
                    f"Copy the {called} word out of the input{form and ' and put it' + form}.",
                    f"A single word is expected: whatever stands {called} in the line{form and ',' + form}.",
                ),
                partial(_nth, index, change),
            )


def _separator() -> Iterator[Task]:
    """The same words with something between them."""
    for variant, (sign, called) in SEPARATORS.items():
        yield Task(
            "separator",
            variant,
            (
                f"Put {called} between the words:",
                f"Separate the words by {called}, like this: one{sign}two",
                f'Join the words with "{sign.strip()}":',
                f"Write the words again with {called} after each but the last:",
            ),
            (
                f"You are given words with blanks between them. Write them with {called} between them.",
                f"The task is to repeat a line of words, separated by {called}.",
                f'Each two neighbours in a list of words are joined by "{sign.strip()}".',
                f"Rewrite lists of words so that {called} stands between any two of them.",
                f"Change the separator of a list: {called} instead of a blank.",
                f"The output has the words of the input in the same order, with {called} after all but the last.",
                f"Format words as a list whose items are divided by {called}.",
                f'Turn "one two three" into "one{sign}two{sign}three", for any words.',
            ),
            sign.join,
            (4, 6),
        )


def _letter() -> Iterator[Task]:
    """The same words without one letter."""
    for letter in LETTERS:
        yield Task(
            "letter",
            letter,
            (
                f"Leave out every letter {letter}:",
                f"Remove all {letter} from the words:",
                f"Write the words without the letter {letter}:",
                f'Delete "{letter}" wherever it stands:',
            ),
            (
                f"You are given a line of words. Write it without any letter {letter}.",
                f"The task is to repeat words and to skip the letter {letter}.",
                f"All other letters of the words are kept, and each {letter} is dropped.",
                f"Spell every word of a line without its {letter}.",
                f"Filter out one character, {letter}, and keep the rest of the line.",
                f"A line comes back with all its letters in place, except that {letter} never appears.",
                f"Write shortened words: wherever {letter} occurs, it is skipped.",
                f'Replace "{letter}" by nothing in each word of the input.',
            ),
            partial(_without, letter),
            (3, 5),
        )


def _kind() -> Iterator[Task]:
    """The one word of a kind, among words of other kinds."""
    for kind, members in KINDS.items():
        called = CALLED.get(kind, f"a {kind}")
        yield Task(
            "kind",
            kind,
            (
                f"Which word is {called}?",
                f"Find the word that names {called}:",
                f"One of these words is {called}. Write it:",
                f"Pick out {called}:",
            ),
            (
                f"You are given words of different kinds. Answer with the one that is {called}.",
                f"The task is to find {called} in a line of words.",
                f"Exactly one word of each line is {called}, and this word is the answer.",
                f"Choose the word in a list that belongs to this kind: {called}.",
                f"Several words are given; name the only one that is {called}.",
                f"Recognise {called} among unrelated words and write it alone.",
                f"Word classification: return the item of the list that is {called}.",
                f"Look for {called} in each line and ignore every other word.",
            ),
            partial(_of_kind, members),
        )


def _mark() -> Iterator[Task]:
    """The same words, of which one is marked."""
    for place in MARKED:
        index, called = PLACES[place]
        for mark, (change, form) in MARKS.items():
            yield Task(
                "mark",
                f"{place}-{mark}",
                (
                    f"Write the {called} word {form} and the others as they are:",
                    f"Repeat the line with its {called} word {form}:",
                    f"Put the {called} word {form}, and change nothing else:",
                    f"Copy the words, but word {NUMBERED[place]} {form}:",
                ),
                (
                    f"You are given a line of words. Repeat it with the {called} word {form}.",
                    f"The task is to copy words and to write the {called} one {form}.",
                    f"All words of a line stay as they are, but the {called} one is written {form}.",
                    f"Emphasise the {called} word of a line by writing it {form}.",
                    f"Copy the input exactly, apart from the {called} word, which appears {form}.",
                    f"Word {NUMBERED[place]} is written {form}; the rest is repeated as it is.",
                    f"Highlight one word by its place: the {called} one stands {form}.",
                    f"The output equals the input, but for its {called} word {form}.",
                ),
                partial(_marked, index, change),
            )


def _order() -> Iterator[Task]:
    """The same words in another order."""
    called = {index: f"the {name}" for index, name in PLACES.values()}
    for variant, (one, other) in SWAPS.items():
        both = f"{called[one]} and {called[other]} word"
        yield _reordered(variant, f"swap {both}", f"let {both} change places", partial(_swapped, one, other))
    for variant, (index, to_end) in MOVES.items():
        word, goal = f"{called[index]} word", "end" if to_end else "start"
        long = f"take {word} away and write it at the {goal} of the line"
        yield _reordered(variant, f"move {word} to the {goal}", long, partial(_moved, index, to_end))
    for variant, (part, which) in REVERSALS.items():
        long = f"write {which} in reversed order"
        yield _reordered(variant, f"reverse the order of {which}", long, partial(_reversed, part))


def _reordered(variant: str, short: str, long: str, change: Callable[[Sequence[str]], list[str]]) -> Task:
    """A task of the rule `order`, from two wordings of what is done with the words."""
    return Task(
        "order",
        variant,
        (
            f"{short.capitalize()}:",
            f"{long.capitalize()}:",
            f"Repeat the line, but {short}:",
            f"Keep all words, but {long}:",
        ),
        (
            f"You are given a line of words. Repeat it, but {short}.",
            f"The task is to write a line again and to {long}.",
            f"All words are kept, and only their order changes: {short}.",
            f"Rearrange the words of a line as follows: {short}.",
            f"A permutation of the input is the answer: {short}.",
            f"From a line of words, make another one in which you {long}.",
            f"Each answer has the same words as its line; to get it, {short}.",
            f"Change the order of words and nothing else: {long}.",
        ),
        partial(_in_order, change),
        (5, 6),
    )


# ---------------------------------------------------------------------------------------- from a line to its answer


def _nth(index: int, change: Callable[[str], str], words: Sequence[str]) -> str:
    return change(words[index])


def _without(letter: str, words: Sequence[str]) -> str:
    return " ".join(words).replace(letter, "")


def _of_kind(members: Sequence[str], words: Sequence[str]) -> str:
    return " ".join(word for word in words if word in members)


def _marked(index: int, change: Callable[[str], str], words: Sequence[str]) -> str:
    copy = list(words)
    copy[index] = change(copy[index])
    return " ".join(copy)


def _in_order(change: Callable[[Sequence[str]], list[str]], words: Sequence[str]) -> str:
    return " ".join(change(words))


def _swapped(one: int, other: int, words: Sequence[str]) -> list[str]:
    copy = list(words)
    copy[one], copy[other] = copy[other], copy[one]
    return copy


def _moved(index: int, to_end: bool, words: Sequence[str]) -> list[str]:
    copy = list(words)
    word = copy.pop(index)
    return [*copy, word] if to_end else [word, *copy]


def _reversed(part: slice, words: Sequence[str]) -> list[str]:
    copy = list(words)
    copy[part] = copy[part][::-1]
    return copy
