"""Short passes of a drafter as CUDA graphs: one launch instead of hundreds.

A drafter reads one or a few tokens per pass, and launching the kernels takes longer than running them. A CUDA
graph records the launches once and replays them on the same memory. Tokens and positions are therefore inputs
in fixed device memory, and every sequence's keys and values are in one row of a common buffer.

The buffer and all graphs are made with the engine, one graph for each number of sequences and of new tokens,
and each is compared with the model's own pass. This module has only been run on a CPU, against replacements
of torch's CUDA kernels and recording (``tests/helpers/flash_kernel.py``); it was never run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import LayerKV, SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

MAX_SEQUENCES = 8
# A pass uses the graph of the next larger size. Padding tokens come after the sequence's own tokens, which do
# not see them, and the next pass overwrites them.
NEW_TOKENS = (1, 2, 4, 8, 16)

# A process can record only one graph at a time.
_recording = threading.Lock()


class GraphedPasses:
    """Passes of one model over few tokens, replayed as CUDA graphs. Not thread-safe.

    A cache moves to a free row of the buffer before its first replayed pass. It keeps the row until it is
    deleted, goes to the prefix cache, or outgrows the row.

    Args:
        model: A model that runs through ``LeanDecoder``, in 16 bits, on an NVIDIA device.
        max_tokens: The longest context, new tokens included, rounded down to a multiple of 256. The buffer
            has room for :data:`MAX_SEQUENCES` contexts of this length.

    Raises:
        ConfigurationError: The model or its device is not supported, or memory is too short.
        UnsupportedModelError: Recording fails, or a graph computes other logits than the model.
    """

    @torch.inference_mode()
    def __init__(self, model: CausalModel, max_tokens: int) -> None:
        if model.lean_decoder is None:
            raise ConfigurationError(
                f"cuda_graph_tokens={max_tokens} is for models that the engine runs by itself, but "
                f"'{model.name}' is run by its modelling code. Leave it at 0, or choose a model of the "
                "Llama, Mistral, Qwen 2 or Qwen 3 family, neither adapted nor quantised by bitsandbytes."
            )
        example = SequenceKV(1)
        model.forward([Step(example, [0], 0)])
        for _, keys, values in example.layers():
            if not cuda_kernels.supports(keys, keys, values):
                raise ConfigurationError(
                    "cuda_graph_tokens needs an NVIDIA device on which torch has flash attention, and keys "
                    f"and values in bfloat16 or float16, but '{model.name}' has {keys.dtype} on "
                    f"{keys.device}. Leave it at 0, or load the model in 16 bits on such a device."
                )
        self._max_tokens = max_tokens - max_tokens % cuda_kernels.PAGE_TOKENS
        self._row_of: WeakKeyDictionary[SequenceKV, int] = WeakKeyDictionary()
        try:
            # Zeros, because attention reads the memory after a sequence's tokens, with weight 0.
            self._buffers = {
                layer: LayerKV(*(
                    heads.new_zeros(MAX_SEQUENCES, len(heads), self._max_tokens, heads.shape[2])
                    for heads in both
                ))
                for layer, *both in example.layers()
            }  # fmt: skip
            recorder = _Recorder(model.device)
            sizes = product(range(1, MAX_SEQUENCES + 1), NEW_TOKENS)
            self._graphs = {size: _Graph(model, self._buffers, recorder, *size) for size in sizes}
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"cuda_graph_tokens={max_tokens} does not fit into the device's memory: {error}. Lower it."
            ) from error
        except (RuntimeError, ImportError, TypeError) as error:
            raise UnsupportedModelError(
                f"a pass of '{model.name}' cannot be recorded as a CUDA graph by torch {torch.__version__}: "
                f"{error}. Leave cuda_graph_tokens at 0, or try torch 2.13."
            ) from error
        self._check(model)

    def supports(self, steps: Sequence[Step]) -> bool:
        """Whether a pass is replayed: few sequences and new tokens, short contexts, and a row for each."""
        if not 0 < len(steps) <= MAX_SEQUENCES or max(len(step.tokens) for step in steps) > NEW_TOKENS[-1]:
            return False
        max_past = self._max_tokens - _padded_size(steps)
        rows = [self._row(step.cache) for step in steps]
        return rows.count(None) <= len(self._free_rows()) and all(
            step.num_logits and 0 < step.cache.length <= max_past for step in steps
        )

    @torch.inference_mode()
    def __call__(self, steps: Sequence[Step]) -> Tensor:
        """Run a supported pass. The lengths of the caches stay the same.

        Returns:
            ``[sum of num_logits, vocab]``: for each step in order, the logits after its last ``num_logits``
            tokens.
        """
        new = _padded_size(steps)
        inputs = [
            [self._place(step.cache), step.cache.length, *step.tokens, *[0] * (new - len(step.tokens))]
            for step in steps
        ]
        logits = torch.split(self._graphs[len(steps), new].replay(inputs), new)
        # A copy, because the next replay overwrites the graph's output.
        return torch.cat([
            rows[len(step.tokens) - step.num_logits : len(step.tokens)]
            for rows, step in zip(logits, steps, strict=True)
        ])  # fmt: skip

    def _row(self, cache: SequenceKV) -> int | None:
        """The row that holds a cache's tokens; ``None`` if the cache has its own buffers."""
        return None if cache.owns_buffers else self._row_of.get(cache)

    def _free_rows(self) -> set[int]:
        return set(range(MAX_SEQUENCES)).difference(self._row(cache) for cache in self._row_of)

    def _place(self, cache: SequenceKV) -> int:
        """The row of a cache, which moves to a free one if it has none."""
        row = self._row(cache)
        if row is None:
            row = self._row_of[cache] = min(self._free_rows())
            buffers = self._buffers.items()
            cache.move_to_buffers({layer: LayerKV(kv.keys[row], kv.values[row]) for layer, kv in buffers})
        return row

    def _check(self, model: CausalModel) -> None:
        """Compare the logits of every graph with the model's own, for sequences of different lengths."""
        generator = torch.Generator().manual_seed(0)
        shape = MAX_SEQUENCES, MAX_SEQUENCES + NEW_TOKENS[-1]
        samples = torch.randint(0, model.vocab_size, shape, generator=generator).tolist()
        graphed, plain = [SequenceKV(1) for _ in samples], [SequenceKV(1) for _ in samples]
        for caches in (graphed, plain):
            contexts = (sample[: index + 1] for index, sample in enumerate(samples))
            model.forward([Step(cache, tokens) for cache, tokens in zip(caches, contexts, strict=True)])
        # Keys and values may have fewer bits than the model's other numbers.
        eps = torch.finfo(next(plain[0].layers())[1].dtype).eps
        for sequences, new in self._graphs:
            results = []
            for caches, passes in ((graphed, self), (plain, None)):
                steps = []
                for index, cache in enumerate(caches[:sequences]):
                    cache.rollback(index + 1)
                    tokens = samples[index][-max(new - index, new // 2 + 1) :]
                    steps.append(Step(cache, tokens, len(tokens)))
                results.append(model.forward(steps, passes))
            difference = float((results[0] - results[1]).abs().max())
            allowed = min(1000 * eps, 0.5) * max(float(results[1].std()), 1e-6)
            if not difference <= allowed:
                raise UnsupportedModelError(
                    f"a CUDA graph of '{model.name}' computes other logits than the model: they are off by "
                    f"{difference:.3g} (allowed {allowed:.3g}). Leave cuda_graph_tokens at 0."
                )


class _Graph:
    """A recorded pass over sequences with the same number of new tokens; also the batch of its layers.

    Args:
        model: The model.
        buffers: Keys and values, ``[rows, kv_heads, tokens, head_dim]`` for each layer.
        recorder: Records the pass.
        sequences: The number of sequences.
        new: The number of new tokens of each.
    """

    all_wanted = True

    def __init__(
        self, model: CausalModel, buffers: dict[int, LayerKV], recorder: _Recorder, sequences: int, new: int
    ) -> None:
        assert model.lean_decoder is not None
        self._decoder, self._kv_dtype, self._buffers = model.lean_decoder, model.kv_dtype, buffers
        self._angles = self._decoder.angles([range(next(iter(buffers.values())).keys.shape[2])])
        # For each sequence its row, the number of tokens before, and the new tokens.
        self._inputs = torch.zeros(sequences, 2 + new, dtype=torch.int64, device=model.device)
        self._ahead = torch.arange(new, device=model.device)
        self._starts = torch.arange(0, sequences * new + 1, new, dtype=torch.int32, device=model.device)
        self._replay = recorder(self._run)

    def replay(self, inputs: list[list[int]]) -> Tensor:
        """Logits ``[sequences * new, vocab]``, in memory that the next replay overwrites."""
        self._inputs.copy_(torch.tensor(inputs))
        return self._replay()

    def _run(self) -> Tensor:
        rows, before, tokens = self._inputs.tensor_split([1, 2], 1)
        self._positions = (before + self._ahead).flatten()
        self._token_rows, self._rows = rows.expand_as(tokens).flatten(), rows.int()
        self._lengths = (before + tokens.shape[1]).flatten().int()
        cos, sin = (table[self._positions] for table in self._angles)
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
        model_dtype, dtype = query.dtype, self._kv_dtype or query.dtype
        kv = self._buffers[layer]
        kv.keys[self._token_rows, :, self._positions] = key.to(dtype).transpose(0, 1)
        kv.values[self._token_rows, :, self._positions] = value.to(dtype).transpose(0, 1)
        output = cuda_kernels.attention_in_rows(
            query.to(dtype), kv.keys, kv.values, self._rows, self._lengths, scaling,
            starts=self._starts, window=sliding_window,
        )  # fmt: skip
        return output.to(model_dtype)


class _Recorder:
    """Records passes as CUDA graphs, all on one stream and in one memory pool of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a pass; the result replays it and returns the same output tensor each time."""
        with _recording, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # Also around the recording, which does not restore the stream if it fails.
            with torch.cuda.stream(self._stream):
                run()  # initialises the libraries
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


def _padded_size(steps: Sequence[Step]) -> int:
    """The number of new tokens of the graph that runs a pass."""
    longest = max(len(step.tokens) for step in steps)
    return next(size for size in NEW_TOKENS if size >= longest)
