"""Models and tokenizers from a folder, a hub repository or a GGUF file, by transformers.

Safetensors and GGUF files hold no code, and no other kind of file is opened. Weights of a GGUF file are
unpacked into the dtype that the model computes in: the file saves a download, not memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_gguf_available

from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

_MAGIC = b"GGUF"
# transformers drops these tensors, and with them the rotary scaling of Llama 3.1 and of long Phi 3 models.
_ROPE_TENSORS = ("rope_freqs", "rope_factors")
# Tokens that end an answer, in addition to the tokenizer's end-of-sequence token.
_END_KEYS = ("eot_token_id", "eom_token_id")


def load_model(
    source: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, without remote code.

    Args:
        source: Hub id, folder, or a file that ends in ``.gguf``.
        gguf_file: The GGUF file in the folder or repository; ``None`` loads safetensors files.
        dtype: ``"auto"``, ``"bfloat16"``, a torch dtype, …; ``None`` is float32 on a CPU and the checkpoint's
            dtype on an accelerator, which is float32 for most GGUF files.
        device_map: As in transformers; ``None`` puts the model on the accelerator if there is one.
        quantization_config: As in transformers. Not for a GGUF file.
        revision: Hub revision.
        local_files_only: Never contact the hub.

    Raises:
        ConfigurationError: The GGUF file is missing, damaged or not one, or ``gguf`` is not installed, or
            ``quantization_config`` is given for a GGUF file.
        UnsupportedModelError: transformers cannot load the GGUF file's architecture completely.
        OSError: From transformers, when the model is not found.
    """
    accelerated = torch.accelerator.is_available()
    if dtype is None:
        dtype = "auto" if accelerated else torch.float32
    if device_map is None and accelerated:
        device_map = {"": torch.accelerator.current_accelerator()}
    arguments = {"dtype": dtype, "device_map": device_map, "trust_remote_code": False}
    path = find_gguf(source, gguf_file, revision=revision, local_files_only=local_files_only)
    if path is not None:
        if quantization_config is not None:
            raise ConfigurationError(
                f"quantization_config was given for the GGUF file '{path}', whose weights are unpacked: "
                "leave it out, use 'int8' on a CPU, or load the model from safetensors files."
            )
        return _load_gguf(path, arguments)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(source),
        quantization_config=quantization_config,
        revision=revision or "main",
        local_files_only=local_files_only,
        use_safetensors=True,
        **arguments,
    )
    return model


def load_tokenizer(
    source: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and chat template, from the GGUF file if there is one.

    Args:
        source: As in :func:`load_model`.
        gguf_file: As in :func:`load_model`.
        revision: Hub revision.
        local_files_only: Never contact the hub.

    Raises:
        ConfigurationError: As in :func:`load_model`.
        UnsupportedModelError: The GGUF file has no tokenizer.
        OSError: From transformers, when there is none.
    """
    path = find_gguf(source, gguf_file, revision=revision, local_files_only=local_files_only)
    if path is None:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source),
            revision=revision or "main",
            local_files_only=local_files_only,
            trust_remote_code=False,
        )
        return tokenizer
    if "tokenizer.ggml.model" not in _checked_metadata(path):
        raise UnsupportedModelError(
            f"'{path}' contains no tokenizer: pass tokenizer=, for example that of the model that the file "
            "was made from, or use a file with one."
        )
    with _damage_named(path):
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=str(path), local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def find_gguf(
    source: str | Path, gguf_file: str | None, *, revision: str | None = None, local_files_only: bool = False
) -> Path | None:
    """The GGUF file that ``source`` and ``gguf_file`` name, on this machine; ``None`` if they name none.

    Args:
        source: As in :func:`load_model`.
        gguf_file: As in :func:`load_model`. A file of a hub repository is downloaded.
        revision: Hub revision.
        local_files_only: Never contact the hub.

    Raises:
        ConfigurationError: The file does not exist.
        OSError: From transformers, when the repository does not have it.
    """
    if gguf_file is None and Path(source).suffix.lower() != ".gguf":
        return None
    path = Path(source) / (gguf_file or "")
    if gguf_file is not None and not Path(source).is_dir():
        found = cached_file(
            str(source), gguf_file, revision=revision or "main", local_files_only=local_files_only
        )
        path = Path(str(found))
    if not path.is_file():
        others = ", ".join(sorted(file.name for file in path.parent.glob("*.gguf") if file.is_file()))
        raise ConfigurationError(
            f"there is no GGUF file '{path}'; its folder has {others or 'no GGUF file'}. For a file on the "
            "hub give the repository's id and the file's name as gguf_file."
        )
    return path.absolute()


def _load_gguf(path: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    metadata = _checked_metadata(path)
    with _damage_named(path):
        load: Any = AutoModelForCausalLM.from_pretrained  # its type knows no report
        # An absolute path, because transformers takes a file of that name in the working folder first.
        model, report = load(
            str(path.parent),
            gguf_file=str(path),
            # Makes ordinary weights, and leaves no trace in the configuration, so that the model has the same
            # fingerprint as its copy in safetensors files.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"'{path}' lacks {len(missing)} weights of a {type(model).__name__}, for example {missing[0]}: "
            "use a complete file, or safetensors files of the model."
        )
    ends = {metadata[f"tokenizer.ggml.{key}"] for key in _END_KEYS if f"tokenizer.ggml.{key}" in metadata}
    configured = model.generation_config.eos_token_id
    if ends and configured is not None:
        ends |= {configured} if isinstance(configured, int) else set(configured)
        model.generation_config.eos_token_id = sorted(ends)
    loaded: PreTrainedModel = model
    return loaded


def _checked_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file that transformers can load."""
    if not is_gguf_available():
        raise ConfigurationError(
            f"'{path}' is a GGUF file, and reading those takes a recent gguf package: pip install "
            "'rapid-integrations[gguf]'."
        )
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise ConfigurationError(
            f"'{path}' is not a GGUF file: it begins with {start!r} instead of {_MAGIC!r}. Download it "
            "again, or give a folder of safetensors files."
        )
    try:
        metadata, tensors = read_gguf_metadata(str(path))
    except (ValueError, IndexError, struct.error) as error:
        raise _damaged(path, error) from error
    _check_supported(path, metadata, tensors)
    return dict(metadata)


def _check_supported(path: Path, metadata: dict[str, Any], tensors: tuple[str, ...]) -> None:
    architecture = str(metadata["general.architecture"])
    # The two spell some names differently: qwen2moe and qwen2_moe, gpt-oss and gpt_oss.
    known = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"} | set(GGUF_CONFIG_ARCHS)
    if _letters(architecture) not in {_letters(name) for name in known}:
        raise UnsupportedModelError(
            f"'{path}' has the architecture {architecture!r}, which transformers cannot load from GGUF; it "
            f"supports {', '.join(sorted(known))}. Use safetensors files of the model, or another model."
        )
    if (count := metadata.get("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"'{path}' is one of {count} parts of a model: merge them first, with llama-gguf-split --merge."
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    dropped = [name for name in tensors if name.startswith(_ROPE_TENSORS)]
    if (dropped or scaling != "none") and _letters(architecture) != "gptoss":
        reason = f"the tensor {dropped[0]!r}" if dropped else f"rope.scaling.type {scaling!r}"
        raise UnsupportedModelError(
            f"'{path}' scales its rotary angles ({reason}), which transformers does not read from GGUF, so "
            "that the model would read long documents wrongly. Use safetensors files of the model."
        )


def _letters(architecture: str) -> str:
    return architecture.replace("-", "").replace("_", "")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """If loading fails because the file is incomplete, raise an error that says so."""
    try:
        yield
    except Exception:
        from gguf import GGUFReader

        try:
            GGUFReader(path)
        except Exception as damage:
            raise _damaged(path, damage) from damage
        raise


def _damaged(path: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the GGUF file '{path}' of {path.stat().st_size:,} bytes is incomplete or damaged ({error}): "
        "download it again."
    )
