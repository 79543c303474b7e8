"""A LangChain cache with keys that contain everything an answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.outputs import Generation

from rapid_integrations.hosts.call import Call
from rapid_integrations.hosts.prompt_text import PromptText


class ExactCache(BaseCache):
    """Wraps another cache; its keys also contain the call's options, retriever, query and context.

    LangChain's key is the prompt's text and the LLM's fields. It omits the arguments of ``bind`` or of a
    call, and it does not say which part of the text is the document, which the drafter's prompt depends on. A
    retriever is identified as an object: clear the cache after its index has changed.

    Args:
        cache: The cache that holds the answers.
        call: The call that is looked up or stored.
    """

    def __init__(self, cache: BaseCache, call: Call) -> None:
        self._cache = cache
        self._call_identity = call.identity()

    def _key(self, prompt: str, llm_string: str) -> str:
        prompt_identity = prompt.identity() if isinstance(prompt, PromptText) else None
        identity = json.dumps([self._call_identity, prompt_identity], sort_keys=True).encode()
        return f"{llm_string} {hashlib.sha256(identity).hexdigest()}"

    def lookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """The cached answer to exactly this call."""
        return self._cache.lookup(prompt, self._key(prompt, llm_string))

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Store the answer to exactly this call."""
        self._cache.update(prompt, self._key(prompt, llm_string), return_val)

    async def alookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """The cached answer to exactly this call."""
        return await self._cache.alookup(prompt, self._key(prompt, llm_string))

    async def aupdate(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Store the answer to exactly this call."""
        await self._cache.aupdate(prompt, self._key(prompt, llm_string), return_val)

    def clear(self, **kwargs: Any) -> None:
        """Clear the wrapped cache."""
        self._cache.clear(**kwargs)
