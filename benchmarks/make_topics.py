"""Writes topics.jsonl: 496 short requests made from templates and topics, in a fixed order.

The `answer` is the thing asked about: exact match is the share of greedy responses that name it, a
plain measure of staying on topic.
"""

import json
import random
from pathlib import Path

TEMPLATES = (
    "Write one sentence about {}.",
    "What is {}?",
    "Why do people like {}?",
    "Tell me one fact about {}.",
    "Explain {} to a child.",
    "Describe {} in a few words.",
    "Give me one tip about {}.",
    "How would you draw {}?",
)
TOPICS = (
    "the moon", "rain", "a bicycle", "bread", "the sea", "a library", "chess", "coffee", "a garden",
    "music", "snow", "a bridge", "tea", "a forest", "cooking", "the sun", "a train", "sleep",
    "swimming", "a map", "a bird", "a clock", "running", "a letter", "a mountain", "a river",
    "football", "a camera", "honey", "a lighthouse", "dancing", "a kite", "an apple", "the wind",
    "reading", "a market", "fishing", "a candle", "winter", "a castle", "fire", "a violin",
    "a cloud", "painting", "a boat", "salt", "a school", "a star", "a dog", "glass", "a horse",
    "paper", "a robot", "the desert", "milk", "a lamp", "summer", "a wheel", "gold", "a drum",
    "an island", "a tree",
)  # fmt: skip


def main() -> None:
    """Write the file beside this one."""
    rows = [
        {"prompt": template.format(topic), "answer": topic.split()[-1]}
        for topic in TOPICS
        for template in TEMPLATES
    ]
    random.Random(1).shuffle(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name("topics.jsonl").write_text(text)


if __name__ == "__main__":
    main()
