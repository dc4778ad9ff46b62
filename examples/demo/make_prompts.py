"""Writes prompts.jsonl and heldout.jsonl: a sentence and a question about it, in a fixed order.

The `answer` is one word of the sentence. No sentence of heldout.jsonl is in prompts.jsonl; their
words are.
"""

import json
import random
from pathlib import Path

NAMES = """
    Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mary Noah Olga Paul Rosa Sam
    Tina Victor Oscar Lucy Hugo Simon
"""
PLACES = """
    Paris London Rome Berlin Lima Oslo Havana Naples Geneva Boston Denver Dublin Lisbon Cairo
    Prague Nairobi
"""
ANIMALS = """
    rabbit parrot turtle lizard pony snake pigeon goat duck spider hamster goldfish donkey beaver
"""
THINGS = """
    lamp carpet basket hammer blanket key glove scarf watch ring book chair mirror bottle pencil
    ladder candle spoon
"""
KINDS = (
    ("{name} lives in {word}.", "Where does {name} live?", PLACES),
    ("{name} was born in {word}.", "Where was {name} born?", PLACES),
    ("{name} has a pet {word}.", "What pet does {name} have?", ANIMALS),
    ("{name} saw a {word} at the zoo.", "What animal did {name} see?", ANIMALS),
    ("{name} bought a {word} at the market.", "What did {name} buy?", THINGS),
    ("{name} lost a {word} in the park.", "What did {name} lose?", THINGS),
    ("{name} is married to {word}.", "Who is {name} married to?", NAMES),
    ("{name} met {word} at the station.", "Who did {name} meet?", NAMES),
)
TRAIN_EACH, HELDOUT_EACH = 80, 20


def main() -> None:
    """Write both files beside this one."""
    generator = random.Random(1)
    groups = [generator.sample(rows(*kind), TRAIN_EACH + HELDOUT_EACH) for kind in KINDS]
    mixed = [row for group in zip(*groups, strict=True) for row in group]
    at = HELDOUT_EACH * len(KINDS)
    for name, part in (("heldout", mixed[:at]), ("prompts", mixed[at:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        Path(__file__).with_name(f"{name}.jsonl").write_text(text)


def rows(sentence: str, question: str, words: str) -> list[dict[str, str]]:
    """Every prompt of a kind."""
    return [
        {"prompt": f"{sentence} {question}".format(name=name, word=word), "answer": word}
        for name in NAMES.split()
        for word in words.split()
        if name != word
    ]


if __name__ == "__main__":
    main()
