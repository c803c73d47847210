"""Questions with one right answer each, generated from a seed.

Pure Python on purpose: the same generators make baton-tiny's training conversations
(`tools/train_tiny.py`) and the held-out questions of `baton eval`. Nothing here needs torch,
and all randomness comes from the `random.Random` that the caller passes in.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

CountTokens = Callable[[str], int]
Message = dict[str, str]

_WORD_LIST = """
acorn amber anchor ankle apple apron arrow autumn bacon badge baker bamboo banana banjo banner
barn barrel basket beach beacon bear beaver bell bench berry bird bishop blanket blossom boat
bonfire book boot bottle bowl branch bread breeze brick bridge broom brush bucket butter button
cabin cable cactus camel camera candle cannon canoe canyon carpet carrot castle cave cedar chain
chair chalk cheese cherry chest chimney church cinema circle cliff clock cloud clover coast coat
cobalt coconut coffee comet compass copper coral cotton cradle crane crayon creek crow crown
crystal curtain daisy dancer desert desk diamond dolphin donkey door dragon drum duck eagle
easel elbow elm ember engine falcon farmer feather fence fern ferry fiddle field flag flame
flask flower flute forest fork fossil fountain fox frame frost galaxy garden garlic gate ginger
giraffe glacier glass glove goat goose grape gravel guitar hammer harbor harp hat hawk hazel
heron hill honey horn horse hotel house iceberg igloo ink island ivory ivy jacket jar jewel
jungle kayak kettle key kitchen kite kitten knife ladder lagoon lake lamp lantern lemon lentil
letter lily lion lizard lobster lotus magnet mango maple marble market mask meadow melon metal
mint mirror mitten monkey moon moss motor mountain mouse museum mushroom napkin needle nest
nickel nut oak oasis ocean olive onion orange orchid otter owl oyster paddle palace panda paper
parrot peach peanut pearl pebble pencil pepper piano pigeon pillow pine pirate planet plate plum
pocket pond poppy potato prairie pumpkin puzzle pyramid quartz quilt rabbit radio rail rainbow
raven reef ribbon rice ring river robin rocket rope rose ruby saddle sail salmon salt sand satin
scarf school shadow sheep shell ship shovel silk silver slipper snail snow soap spider spoon
spruce squirrel statue storm stove sugar summit swan sword table tailor teapot temple tent
thistle thunder tiger timber tomato tower trail train trumpet tulip tunnel turtle valley vase
velvet violin walnut walrus wagon water wheat wheel whistle willow window winter wolf yarn zebra
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())

_ADJECTIVES = ("old", "small", "quiet", "bright", "cold", "green", "heavy", "lost", "new", "plain")
_VERBS = ("stands", "waits", "rests", "hides", "lies", "sleeps")
_PLACES = ("near", "under", "behind", "beside", "above", "before")
_TIMES = ("today", "at night", "in the morning", "again", "every day", "for an hour")

FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("What is Baton?", "Tell me what Baton is.", "Describe Baton in one sentence."),
        "Baton is an LLM server with separate prefill and decode services.",
    ),
    (
        ("Who are you?", "What is your name?", "Which model are you?"),
        "I am baton-tiny, the small model bundled with Baton.",
    ),
    (
        ("Which port does the HTTP API use?", "What is Baton's HTTP port?", "HTTP port?"),
        "8000",
    ),
    (
        ("Which port does gRPC use?", "What is Baton's gRPC port?", "gRPC port?"),
        "9000",
    ),
    (
        (
            "What moves between prefill and decode?",
            "What does the prefill worker send to the decode worker?",
            "What is handed from prefill to decode?",
        ),
        "KV blocks.",
    ),
    (
        ("What does the prefill worker do?", "What is the prefill service for?"),
        "It computes the KV cache of the prompt.",
    ),
    (
        ("What does the decode worker do?", "What is the decode service for?"),
        "It owns the sequence and generates its tokens.",
    ),
    (
        ("What does the gateway do?", "What is the gateway for?"),
        "It takes requests and routes them to the workers.",
    ),
    (
        ("What does the KV store do?", "What is the KV store for?"),
        "It keeps KV blocks so that they can be used again.",
    ),
    (
        ("How many tokens are in a KV block?", "What is the size of a KV block in tokens?"),
        "16",
    ),
    (
        ("What happens on a checksum mismatch?", "What does Baton do when a checksum is wrong?"),
        "The block is a miss and is computed again.",
    ),
    (
        ("Which API does Baton speak?", "Which API can clients use?"),
        "The OpenAI API over HTTP, and gRPC.",
    ),
    (
        ("Does Baton need a GPU?", "Can Baton run without a GPU?"),
        "Baton runs on CPUs and on GPUs.",
    ),
    (
        ("Hello!", "Hi!", "Good morning!"),
        "Hello! I am baton-tiny.",
    ),
)

_RECALL_ASKS = (
    "What is the code of {k}?",
    "Which code has {k}?",
    "Tell me the code of {k}.",
    "Code of {k}?",
)
_JSON_ASKS = (
    "Answer in JSON: what is the code of {k}?",
    "What is the code of {k}? Answer in JSON.",
    "Give the code of {k} as JSON.",
)
_COPY_ASKS = ("Copy: {x}", "Repeat: {x}", "Repeat these words: {x}", "Copy this text: {x}")
_REVERSE_ASKS = ("Reverse: {x}", "Say these words in reverse order: {x}", "Backwards: {x}")
ADD_ASKS = ("What is {a} + {b}?", "{a} + {b}?", "Add {a} and {b}.", "Compute {a} + {b}.")


@dataclass(frozen=True)
class Question:
    """One conversation that ends with a user turn, and the only accepted answer.

    `context_tokens` is the length asked for, in tokens of the content; 0 where it is just short.
    """

    task: str
    messages: tuple[Message, ...]
    answer: str
    context_tokens: int = 0


@dataclass(frozen=True)
class Codes:
    """A text with codes in it: `pairs` are the (key, code) that it holds, in order."""

    text: str
    pairs: tuple[tuple[str, int], ...]


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def filler_sentence(rng: random.Random) -> str:
    """A sentence that holds words that are also keys, but no code."""
    first, second = rng.sample(WORDS, 2)
    return (
        f"The {rng.choice(_ADJECTIVES)} {first} {rng.choice(_VERBS)} "
        f"{rng.choice(_PLACES)} the {second} {rng.choice(_TIMES)}."
    )


def key_stream(rng: random.Random) -> Iterator[str]:
    """Every word once, in random order: a document draws its keys here so that they are unique."""
    return iter(rng.sample(WORDS, len(WORDS)))


def make_codes(
    rng: random.Random, context_tokens: int, count_tokens: CountTokens, keys: Iterator[str]
) -> Codes:
    """A text of about `context_tokens` tokens: runs of `key=code` with sentences in between.

    Stops early, with a shorter text, when `keys` is exhausted.
    """
    pieces = ["codes:"]
    pairs: list[tuple[str, int]] = []
    used = count_tokens(pieces[0])
    until_filler = rng.randint(2, 16)
    while used < context_tokens:
        if until_filler == 0:
            piece = filler_sentence(rng)
            until_filler = rng.randint(2, 16)
        else:
            key = next(keys, None)
            if key is None:
                break
            pairs.append((key, rng.randint(1000, 9999)))
            piece = f"{key}={pairs[-1][1]}"
            until_filler -= 1
        pieces.append(piece)
        used += count_tokens(" " + piece)
    return Codes(" ".join(pieces), tuple(pairs))


def ask_recall(rng: random.Random, codes: Codes) -> tuple[str, str]:
    """A question about one of the codes, and its answer."""
    key, code = rng.choice(codes.pairs)
    return rng.choice(_RECALL_ASKS).format(k=key), str(code)


def ask_json(rng: random.Random, codes: Codes) -> tuple[str, str]:
    """The same question, to be answered as a JSON object."""
    key, code = rng.choice(codes.pairs)
    return rng.choice(_JSON_ASKS).format(k=key), json.dumps({"name": key, "code": code})


def ask_copy(rng: random.Random) -> tuple[str, str]:
    """Three to twelve words, to be given back as they are."""
    text = " ".join(rng.sample(WORDS, rng.randint(3, 12)))
    return rng.choice(_COPY_ASKS).format(x=text), text


def ask_reverse(rng: random.Random) -> tuple[str, str]:
    """Three to eight words, to be given back last to first."""
    words = rng.sample(WORDS, rng.randint(3, 8))
    return rng.choice(_REVERSE_ASKS).format(x=" ".join(words)), " ".join(reversed(words))


def is_held_out_pair(a: int, b: int) -> bool:
    """Whether a + b is kept out of training: one pair in ten, by a hash of the pair."""
    return crc32(f"{a}+{b}".encode()) % 10 == 0


def ask_add(
    rng: random.Random, digits: int, *, held_out: bool, asks: tuple[str, ...] = ADD_ASKS
) -> tuple[str, str]:
    """A sum of two numbers of `digits` digits each, from one side of the held-out split."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if is_held_out_pair(a, b) == held_out:
            return rng.choice(asks).format(a=a, b=b), str(a + b)


def ask_fact(rng: random.Random) -> tuple[str, str]:
    """One of the fixed facts about Baton, in one of its wordings."""
    wordings, answer = rng.choice(FACTS)
    return rng.choice(wordings), answer


def recall(rng: random.Random, context_tokens: int, count_tokens: CountTokens) -> Question:
    """Key-value recall: the codes and then one question about them, in one user message."""
    codes = make_codes(rng, context_tokens, count_tokens, key_stream(rng))
    ask, answer = ask_recall(rng, codes)
    return Question("recall", _user(f"{codes.text}\n{ask}"), answer, context_tokens)


def json_recall(rng: random.Random, context_tokens: int, count_tokens: CountTokens) -> Question:
    """Recall with the answer as a JSON object of name and code."""
    codes = make_codes(rng, context_tokens, count_tokens, key_stream(rng))
    ask, answer = ask_json(rng, codes)
    return Question("json", _user(f"{codes.text}\n{ask}"), answer, context_tokens)


def short_question(rng: random.Random, task: str) -> Question:
    """A held-out question of a task without codes: copy, reverse, add2, add3 or facts."""
    ask, answer = SHORT_TASKS[task](rng)
    return Question(task, _user(ask), answer)


SHORT_TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": ask_copy,
    "reverse": ask_reverse,
    "add2": lambda rng: ask_add(rng, 2, held_out=True),
    "add3": lambda rng: ask_add(rng, 3, held_out=True),
    "facts": ask_fact,
}
