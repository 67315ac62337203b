"""String tasks for the examples: the ones the small base model was pretrained on, and a new one.

Every example is a prompt such as ``"reverse: banana\\n"`` and its completion, ``"ananab"``.
The base model knows every task in `KNOWN`.  It has never seen `shift`, which moves each letter one
place along the alphabet (``banana`` becomes ``cbobob``): that is what ``finetune.py`` teaches it.
"""

import random
import string

LETTERS = string.ascii_lowercase
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in LETTERS if letter not in VOWELS)
SHORTEST, LONGEST = 3, 8


def after(letter):
    """The next letter of the alphabet; ``a`` follows ``z``."""
    return LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]


def shift(word):
    """The task to fine-tune on: every letter moved one place along the alphabet."""
    return "".join(after(letter) for letter in word)


KNOWN = {
    "copy": lambda word: word,
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "spell": " ".join,
    "double": lambda word: "".join(2 * letter for letter in word),
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "length": lambda word: str(len(word)),
    "after": after,
    "alphabet": lambda span: LETTERS[LETTERS.index(span[0]) : LETTERS.index(span[-1]) + 1],
}


def example(task, word, completion):
    return {"prompt": f"{task}: {word}\n", "completion": completion}


def made_up_word(rng):
    """A pronounceable word such as ``barutem``: consonants and vowels take turns."""
    kinds = rng.choice([(CONSONANTS, VOWELS), (VOWELS, CONSONANTS)])
    length = rng.randint(SHORTEST, LONGEST)
    return "".join(rng.choice(kinds[place % 2]) for place in range(length))


def known_example(rng, words):
    """One example of a task in `KNOWN`, about a word of `words`, a made-up one or random letters."""
    task = rng.choice(list(KNOWN))
    if task == "after":
        subject = rng.choice(LETTERS)
    elif task == "alphabet":
        start = rng.randrange(len(LETTERS) - 1)
        end = rng.randint(start + 1, min(start + 9, len(LETTERS) - 1))
        subject = f"{LETTERS[start]}-{LETTERS[end]}"
    else:
        kind = rng.random()
        if kind < 0.3:
            subject = rng.choice(words)
        elif kind < 0.6:
            subject = made_up_word(rng)
        else:
            subject = "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))
    return example(task, subject, KNOWN[task](subject))


def shift_examples(count, seed=0):
    """`count` examples of the new task, each about a different made-up word."""
    rng = random.Random(seed)
    words = {}
    while len(words) < count:
        words[made_up_word(rng)] = None
    return [example("shift", word, shift(word)) for word in words]
