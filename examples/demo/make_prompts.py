"""Writes prompts.jsonl: 480 short requests made from templates and topics, in a fixed order.

Sums carry an `answer`, so that the demo also reports an exact match; the rest is open text, on
which the student is compared with the teacher's distribution.
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
    "swimming", "a map", "birds", "a clock", "running", "a letter", "mountains", "a river",
    "football", "a camera", "honey", "a lighthouse", "dancing", "a kite", "apples", "the wind",
    "reading", "a market", "fishing", "a candle", "winter", "a castle", "fire", "a violin",
    "clouds", "painting", "a boat", "salt", "a school", "stars", "a dog", "glass",
)  # fmt: skip


def main() -> None:
    """Write the file beside this one."""
    rows = [{"prompt": t.format(topic)} for topic in TOPICS for t in TEMPLATES]
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(sums)
    rows += [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums[:80]]
    random.Random(1).shuffle(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name("prompts.jsonl").write_text(text)


if __name__ == "__main__":
    main()
