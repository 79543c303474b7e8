"""Short passes of a drafter as CUDA graphs: one launch instead of hundreds.

A drafter reads one or a few tokens per pass. Launching its kernels takes longer than running them. A CUDA
graph records the launches once and replays them on the same memory. Tokens, positions and lengths are
therefore inputs in fixed device memory, and the keys and values of every sequence are in a row of one buffer,
to which a cache moves before its first replayed pass.

Buffer and graphs are made with the engine: one graph for each number of sequences and of new tokens. Every
graph is then compared with the model's own pass. This module has only been run on a CPU, against replacements
of torch's CUDA kernels and of the recording (``tests/helpers/flash_kernel.py``); it was never run on a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import LayerKV, SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

MAX_SEQUENCES = 8
# The numbers of new tokens for which graphs are recorded. A pass uses the next larger one; the tokens that it
# lacks are padding after its own tokens, which these do not see and the next pass overwrites.
NEW_TOKENS = (1, 2, 4, 8, 16)

# CUDA records one graph of a process at a time.
_recording = threading.Lock()


class GraphedPasses:
    """Passes of one model over few tokens, replayed as CUDA graphs. Not thread-safe.

    A sequence keeps its row of the buffer until it ends, leaves the engine's batch for the prefix cache, or
    outgrows the row. Passes with a sequence for which no row is free are not supported.

    Args:
        model: A model that runs through ``LeanDecoder``, in 16 bits, on an NVIDIA device.
        max_tokens: The longest context, new tokens included, rounded down to a multiple of 256. The buffer
            holds keys and values of :data:`MAX_SEQUENCES` contexts of this length.

    Raises:
        ConfigurationError: The model or its device is unsupported, or the buffer does not fit into memory.
        UnsupportedModelError: Recording fails, or a graph's logits differ from the model's.
    """

    @torch.inference_mode()
    def __init__(self, model: CausalModel, max_tokens: int) -> None:
        if model.lean_decoder is None:
            raise ConfigurationError(
                f"cuda_graph_tokens={max_tokens} is for models that the engine runs by itself, but "
                f"'{model.name}' is run by its modelling code. Leave it at 0, or choose a model of the "
                "Llama, Mistral, Qwen 2 or Qwen 3 family, neither adapted nor quantised by bitsandbytes."
            )
        self._model = model
        self._max_tokens = max_tokens - max_tokens % cuda_kernels.PAGE_TOKENS
        example = model.identity().example
        for _, keys, values in example.layers():
            if not cuda_kernels.supports(keys, keys, values):
                raise ConfigurationError(
                    "cuda_graph_tokens needs an NVIDIA device on which torch has flash attention, and keys "
                    f"and values in bfloat16 or float16, but '{model.name}' has {keys.dtype} on "
                    f"{keys.device}. Leave it at 0, or load the model in 16 bits on such a device."
                )
        self._row_of: weakref.WeakKeyDictionary[SequenceKV, int] = weakref.WeakKeyDictionary()
        self._graphs: dict[tuple[int, int], _Graph] = {}
        try:
            # Zeros, because attention reads the memory after a sequence's tokens, with weight 0.
            self._buffers = {
                layer: LayerKV(*(
                    heads.new_zeros(MAX_SEQUENCES, len(heads), self._max_tokens, heads.shape[2])
                    for heads in (keys, values)
                ))
                for layer, keys, values in example.layers()
            }  # fmt: skip
            recorder = _Recorder(model.device)
            for size in product(range(1, MAX_SEQUENCES + 1), NEW_TOKENS):
                self._graphs[size] = _Graph(model, self._buffers, recorder, *size)
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"cuda_graph_tokens={max_tokens} does not fit into the device's memory: {error}. Lower it."
            ) from error
        except (RuntimeError, ImportError, TypeError) as error:
            raise UnsupportedModelError(
                f"a pass of '{model.name}' cannot be recorded as a CUDA graph by torch {torch.__version__}: "
                f"{error}. Leave cuda_graph_tokens at 0, or try torch 2.13."
            ) from error
        self._check()

    def supports(self, steps: Sequence[Step]) -> bool:
        """Whether a pass is replayed: few sequences and new tokens, short contexts, and a row for each."""
        if not 0 < len(steps) <= MAX_SEQUENCES or not all(step.num_logits for step in steps):
            return False
        new = max(len(step.tokens) for step in steps)
        if new > NEW_TOKENS[-1]:
            return False
        max_past = self._max_tokens - _padded(new)
        num_without_row = sum(self._row(step.cache) is None for step in steps)
        return num_without_row <= len(self._free_rows()) and all(
            0 < step.cache.length <= max_past for step in steps
        )

    @torch.inference_mode()
    def __call__(self, steps: Sequence[Step]) -> Tensor:
        """Run a supported pass. The lengths of the caches stay the same.

        Returns:
            ``[sum of num_logits, vocab]``: for each step in order, the logits after its last ``num_logits``
            tokens.
        """
        new = _padded(max(len(step.tokens) for step in steps))
        inputs = []
        for step in steps:
            padding = [0] * (new - len(step.tokens))
            inputs.append([self._place(step.cache), step.cache.length, *step.tokens, *padding])
        logits = self._graphs[len(steps), new].replay(inputs).view(len(steps), new, -1)
        # A copy, because the next replay overwrites the graph's output.
        return torch.cat([
            rows[len(step.tokens) - step.num_logits : len(step.tokens)]
            for rows, step in zip(logits, steps, strict=True)
        ])  # fmt: skip

    def _row(self, cache: SequenceKV) -> int | None:
        """The row that holds a cache's tokens; ``None`` if the cache has its own buffers."""
        return None if cache.owns_buffers else self._row_of.get(cache)

    def _free_rows(self) -> set[int]:
        return set(range(MAX_SEQUENCES)) - {self._row(cache) for cache in self._row_of}

    def _place(self, cache: SequenceKV) -> int:
        """The row of a cache, which moves to a free one if it has none."""
        row = self._row(cache)
        if row is None:
            row = min(self._free_rows())
            cache.move_to_buffers({
                layer: LayerKV(held.keys[row], held.values[row]) for layer, held in self._buffers.items()
            })  # fmt: skip
            self._row_of[cache] = row
        return row

    def _check(self) -> None:
        """Compare every graph's logits with the model's own pass."""
        model, num_tokens = self._model, NEW_TOKENS[-1]
        generator = torch.Generator().manual_seed(0)
        shape = MAX_SEQUENCES, MAX_SEQUENCES + num_tokens
        samples = torch.randint(0, model.vocab_size, shape, generator=generator).tolist()
        # Contexts of 1, 2, … tokens; in each pass the sequences have fewer and fewer new tokens.
        contexts = [sample[: index + 1] for index, sample in enumerate(samples)]
        graphed, plain = [SequenceKV(1) for _ in samples], [SequenceKV(1) for _ in samples]
        for caches in (graphed, plain):
            model.forward([Step(cache, tokens) for cache, tokens in zip(caches, contexts, strict=True)])
        eps = torch.finfo(next(plain[0].layers())[1].dtype).eps
        for sequences, new in self._graphs:
            logits = []
            for caches, passes in ((graphed, self), (plain, None)):
                steps = []
                for index, cache in enumerate(caches[:sequences]):
                    cache.rollback(index + 1)
                    tokens = samples[index][-max(new - index, new // 2 + 1) :]
                    steps.append(Step(cache, tokens, len(tokens)))
                logits.append(model.forward(steps, passes))
            difference = float((logits[0] - logits[1]).abs().max())
            allowed = min(1000 * eps, 0.5) * max(float(logits[1].std()), 1e-6)
            if not difference <= allowed:
                raise UnsupportedModelError(
                    f"a CUDA graph of '{model.name}' computes other logits than the model: they are off by "
                    f"{difference:.3g} (allowed {allowed:.3g}). Leave cuda_graph_tokens at 0."
                )


class _Graph:
    """A recorded pass over some sequences with the same number of new tokens.

    While it is recorded, it is the batch that the decoder's layers attend over, as :class:`PackedBatch` is in
    other passes.
    """

    all_wanted = True

    def __init__(
        self, model: CausalModel, buffers: dict[int, LayerKV], recorder: _Recorder, sequences: int, new: int
    ) -> None:
        assert model.lean_decoder is not None
        self._decoder = model.lean_decoder
        self._kv_dtype = model.kv_dtype
        self._buffers = buffers
        self._angles = self._decoder.angles([range(next(iter(buffers.values())).keys.shape[2])])
        # Of each sequence: its row, the number of tokens before, the new tokens.
        self._inputs = torch.zeros(sequences, 2 + new, dtype=torch.int64, device=model.device)
        self._ahead = torch.arange(new, device=model.device)
        self._starts = torch.arange(0, sequences * new + 1, new, dtype=torch.int32, device=model.device)
        self._replay = recorder(self._run)

    def replay(self, inputs: list[list[int]]) -> Tensor:
        """Logits ``[sequences * new, vocab]``, in memory that the next call overwrites.

        Args:
            inputs: For each sequence its row, the number of tokens before the new ones, and the new tokens.
        """
        self._inputs.copy_(torch.tensor(inputs))
        return self._replay()

    def _run(self) -> Tensor:
        rows, before, tokens = self._inputs.tensor_split([1, 2], 1)
        positions = (before + self._ahead).flatten()
        self._token_rows, self._token_positions = rows.expand_as(tokens).flatten(), positions
        self._rows, self._lengths = rows.int(), (before + tokens.shape[1]).flatten().int()
        cos, sin = (table[positions] for table in self._angles)
        return self._decoder.run(tokens.flatten(), cos, sin, self)

    def select_wanted(self, tokens: Tensor) -> Tensor:
        """All tokens."""
        return tokens

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Write keys and values and attend, as :meth:`PackedBatch.attend`."""
        model_dtype = query.dtype
        if self._kv_dtype is not None:
            query, key, value = (tensor.to(self._kv_dtype) for tensor in (query, key, value))
        keys, values = self._buffers[layer].keys, self._buffers[layer].values
        keys[self._token_rows, :, self._token_positions] = key.transpose(0, 1)
        values[self._token_rows, :, self._token_positions] = value.transpose(0, 1)
        output = cuda_kernels.attention_in_rows(
            query, keys, values, self._rows, self._lengths, scaling,
            starts=self._starts, window=sliding_window,
        )  # fmt: skip
        return output.to(model_dtype)


class _Recorder:
    """Records passes as CUDA graphs, on a stream of their own and in one pool of memory.

    Args:
        device: The device of the passes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run a pass once, so that its libraries are initialised, and record it.

        Returns:
            A function that replays the pass and returns the same output tensor each time.
        """
        with _recording, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # Also around the recording, which does not restore the stream if it fails.
            with torch.cuda.stream(self._stream):
                run()
                graph = torch.cuda.CUDAGraph()
                # Other threads, such as an embedding model's, may use the device at the same time.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    output = run()
            current.wait_stream(self._stream)

        def replay() -> Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return output

        return replay


def _padded(new_tokens: int) -> int:
    """The number of new tokens of the graph for a pass."""
    return next(size for size in NEW_TOKENS if size >= new_tokens)
