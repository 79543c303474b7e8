"""The classes of LangChain and LlamaIndex for a transformers model, the alternatives to ``RapidLLM``.

No other module imports ``langchain-huggingface`` and ``llama-index-llms-huggingface``. The extra ``bench``
installs both.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.prompts import PromptParts


def huggingface_pipeline(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Callable[[str], str]:
    """A function from a prompt's text to the answer of LangChain's ``HuggingFacePipeline``.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        max_new_tokens: The maximum length of an answer.

    Raises:
        ConfigurationError: langchain-huggingface is not installed.
    """
    host = _imported("langchain_huggingface", "langchain-huggingface", "hf-pipeline")
    generator = pipeline(  # type: ignore[call-overload]  # it also takes the arguments of generate()
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_full_text=False,
    )
    llm = host.HuggingFacePipeline(pipeline=generator)

    def ask(prompt: str) -> str:
        return str(llm.invoke(prompt))

    return ask


def huggingface_llm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Callable[[str], str]:
    """A function from a prompt's text to the answer of LlamaIndex's ``HuggingFaceLLM``.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        max_new_tokens: The maximum length of an answer.

    Raises:
        ConfigurationError: llama-index-llms-huggingface is not installed.
    """
    host = _imported("llama_index.llms.huggingface", "llama-index-llms-huggingface", "hf-llm")
    llm = host.HuggingFaceLLM(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        context_window=getattr(model.config, "max_position_embeddings", None) or 2**31,
        generate_kwargs={"do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0},
        tokenizer_outputs_to_remove=["token_type_ids"],
    )

    def ask(prompt: str) -> str:
        return str(llm.complete(prompt, formatted=True).text)

    return ask


def prompt_text(prompt: PromptParts, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt with the chat template applied.

    It omits a begin-of-sequence token that the tokenizer adds itself.
    """
    if tokenizer.chat_template is None:
        return prompt.text
    rendered = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
        )
    )
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return rendered.removeprefix(tokenizer.bos_token) if adds_bos and tokenizer.bos_token else rendered


def _imported(module: str, package: str, baseline: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the baseline {baseline!r} needs {package} ({error}): pip install 'rapid-integrations[bench]', "
            "or leave it out of --baselines."
        ) from error
