"""."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rapid_integrations.engine.cache.shared_prefill import Reader
from rapid_integrations.engine.model.batch_entry import Step


def read_together(readers: Sequence[Reader], most: int) -> None:
    """Read the next tokens of prompts in one pass.

    Args:
        readers: One or more, of one model, the first with tokens left to read.
        most: At most so many in all; the first readers come first.
    """
    taking_part: list[tuple[Reader, int]] = []
    steps = []
    for reader in readers:
        start, end = reader.position, min(reader.position + most, reader.prompt.size)
        if end > start:
            most -= end - start
            noted = min(end - start, max(0, end - reader.prefix.size))
            steps.append(Step(reader.track.cache, reader.prompt[start:end].tolist(), noted))
            taking_part.append((reader, start))
    try:
        logits = readers[0].model.forward(steps)
        noted_probs = []
        for (reader, start), step, rows in zip(
            taking_part, steps, torch.split(logits, [step.num_logits for step in steps]), strict=True
        ):
            found: list[float] = []
            if step.num_logits:  # else nothing is read off the device
                end = start + len(step.tokens)
                following = reader.track.tokens[end - step.num_logits + 1 : end + 1]
                places = torch.tensor(following, device=rows.device)[:, None]
                found = rows.softmax(-1).gather(1, places)[:, 0].tolist()
            noted_probs.append(found)
    except BaseException:
        # It is tried once more where memory was short, and nothing may be noted twice or not at all.
        for reader, start in taking_part:
            reader.track.cache.rollback(start)
        raise
    for (reader, _), found in zip(taking_part, noted_probs, strict=True):
        reader.ending_probs += found
