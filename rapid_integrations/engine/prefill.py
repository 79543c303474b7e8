"""Reading prompts: the next chunk of one or several of them in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rapid_integrations.engine.cache.shared_prefill import Reader
from rapid_integrations.engine.model.batch_entry import Step


def prefill_together(readers: Sequence[Reader], max_tokens: int) -> None:
    """Read the next tokens of several prompts in one pass.

    Args:
        readers: At least one, all of one model; the first has tokens left to read.
        max_tokens: Upper limit on the tokens of the pass. The first readers come first.

    Raises:
        Exception: Any error of the model; the caches are as they were.
    """
    parts: list[tuple[Reader, int]] = []
    steps = []
    for reader in readers:
        start, end = reader.position, min(reader.position + max_tokens, reader.prompt.size)
        if end > start:
            max_tokens -= end - start
            # Only the tokens of the prompt's ending need logits.
            num_logits = min(end - start, max(0, end - reader.prefix.size))
            steps.append(Step(reader.state.cache, reader.prompt[start:end].tolist(), num_logits))
            parts.append((reader, start))
    try:
        logits = readers[0].model.forward(steps)
        ending_probs = []
        for (reader, start), step, rows in zip(
            parts, steps, torch.split(logits, [step.num_logits for step in steps]), strict=True
        ):
            probs: list[float] = []
            if step.num_logits:  # avoids a transfer from the device
                end = start + len(step.tokens)
                next_tokens = reader.state.tokens[end - step.num_logits + 1 : end + 1]
                indices = torch.tensor(next_tokens, device=rows.device)[:, None]
                probs = rows.softmax(-1).gather(1, indices)[:, 0].tolist()
            ending_probs.append(probs)
    except BaseException:
        # The pass may be repeated when memory was short: no probability may be noted twice or lost.
        for reader, start in parts:
            reader.state.cache.rollback(start)
        raise
    for (reader, _), probs in zip(parts, ending_probs, strict=True):
        reader.ending_probs += probs
