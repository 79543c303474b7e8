"""Requests about one long document with questions of their own, for prefixes on disk."""

import random

from helpers.tiny_models import VOCAB

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.requests import Request


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def request(question: int) -> Request:
    tail = text(question, 12)
    return Request(
        text(100, 1400) + tail,
        text(200, 1100) + tail,
        SamplingParams(max_new_tokens=16, ignore_eos=True),
        SpeculationParams("lossless", num_draft_tokens=4),
    )
