"""Short passes of a drafter as CUDA graphs: launched at once, instead of kernel by kernel.

A drafter reads a token or a few at a time, in hundreds of kernels of some microseconds: launching them takes
longer than running them. A graph replays recorded launches over the same memory, so that all that a pass
reads and writes has its place: tokens, positions, and a row of a common buffer for every sequence's keys and
values, into which its cache moves when it is first drafted for. How many keys there are the device reads.

A graph is recorded for each number of sequences and each power of two of new tokens when it is first met.
What a sequence lacks of them are tokens behind its own, which its own do not see and the next ones overwrite.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import LayerKV, SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.decoder import LeanDecoder
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

_logger = logging.getLogger(__name__)

MAX_SEQUENCES = 8
MAX_NEW_TOKENS = 16
# Rows begin with so many tokens, and have a multiple of a page of the kernel's.
_FIRST_TOKENS = 1024

# A process records one graph at a time.
_recording = threading.Lock()


class GraphedPasses:
    """Passes of a model over few tokens of short contexts, replayed as CUDA graphs. Not thread-safe.

    Args:
        model: A model that runs lean, in 16 bits, on an NVIDIA device.
        max_tokens: The longest contexts, new tokens included, rounded down to pages of 256 tokens. There are
            as many rows of keys and values as sequences were together, :data:`MAX_SEQUENCES` at most, each
            as long as the longest context; both rounded up to powers of two.

    Raises:
        ConfigurationError: The model or its device is another one.
        UnsupportedModelError: Recording fails, or a graph does not compute what the model does.
    """

    def __init__(self, model: CausalModel, max_tokens: int) -> None:
        if model.lean_decoder is None:
            raise ConfigurationError(
                f"cuda_graph_tokens={max_tokens} is for models that the engine runs by itself, but "
                f"'{model.name}' is run by its modelling code. Leave it at 0, or choose a model of the "
                "Llama, Mistral, Qwen 2 or Qwen 3 family, neither adapted nor quantised by bitsandbytes."
            )
        self._model = model
        self._decoder = model.lean_decoder
        self._max_tokens = max_tokens - max_tokens % cuda_kernels.PAGE_TOKENS
        self._rows: _Rows | None = None
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._recorder: _Recorder | None = None
        self._check()
        self._drop()

    def takes(self, steps: Sequence[Step]) -> bool:
        """Whether a pass over these sequences is replayed: few, with few new tokens behind short contexts."""
        if not 0 < len(steps) <= MAX_SEQUENCES:
            return False
        new = _new_tokens(steps)
        return new <= MAX_NEW_TOKENS and all(
            0 < step.cache.length <= self._max_tokens - new and step.num_logits for step in steps
        )

    @torch.inference_mode()
    def __call__(self, steps: Sequence[Step]) -> Tensor:
        """Read new tokens; the caches' lengths stay as they are.

        Args:
            steps: What :meth:`takes` takes.

        Returns:
            ``[sum of num_logits, vocab]``: for each step in order, the logits after its last ``num_logits``
            tokens.
        """
        new = _new_tokens(steps)
        caches = [step.cache for step in steps]
        try:
            rows = self._rows_for(caches, new).place(caches)
            logits = self._pass_for(len(steps), new)([
                [row, step.cache.length, *step.tokens, *[0] * (new - len(step.tokens))]
                for row, step in zip(rows, steps, strict=True)
            ])  # fmt: skip
        except torch.OutOfMemoryError:
            self._drop()
            self._max_tokens = 0
            _logger.warning(
                "memory ran out for CUDA graphs: passes of '%s' are launched kernel by kernel from now on. "
                "Lower cuda_graph_tokens or max_active_requests.",
                self._model.name,
            )
            raise
        # Copies: the next replay writes over them.
        ends = [index * new + len(step.tokens) for index, step in enumerate(steps)]
        return torch.cat([logits[end - step.num_logits : end] for end, step in zip(ends, steps, strict=True)])

    def _drop(self) -> None:
        """Let go of the buffer, which lives while caches are in it, and of the graphs that work on it."""
        self._passes.clear()
        self._rows = None

    def _rows_for(self, caches: Sequence[SequenceKV], new: int) -> _Rows:
        """The common buffer, made anew where its rows are too few or too short."""
        tokens = max(cache.length for cache in caches) + new
        rows = self._rows
        if rows is None or len(rows) < len(caches) or rows.tokens < tokens:
            known_rows, known_tokens = (1, _FIRST_TOKENS) if rows is None else (len(rows), rows.tokens)
            self._drop()
            rows = self._rows = _Rows(
                caches[0],
                rows=max(known_rows, _power_of_two(len(caches))),
                tokens=min(max(known_tokens, _power_of_two(tokens)), self._max_tokens),
            )
        return rows

    def _pass_for(self, sequences: int, new: int) -> _Pass:
        found = self._passes.get((sequences, new))
        if found is None:
            self._recorder = self._recorder or _Recorder(self._model.device)
            assert self._rows is not None
            found = self._passes[sequences, new] = _Pass(
                self._decoder, self._rows, self._recorder, self._model.kv_dtype, sequences=sequences, new=new
            )
        return found

    def _check(self) -> None:
        """Compare a graph's logits with those of the model's own pass."""
        model = self._model
        generator = torch.Generator().manual_seed(0)
        sample = torch.randint(0, model.vocab_size, (11,), generator=generator).tolist()
        caches = [SequenceKV(16), SequenceKV(16)]
        model.forward([Step(caches[0], sample[:7]), Step(caches[1], sample[:4])])
        for _, keys, values in caches[0].layers():
            if not cuda_kernels.takes(keys, keys, values):
                raise ConfigurationError(
                    "cuda_graph_tokens needs an NVIDIA device on which torch has flash attention, and keys "
                    f"and values in bfloat16 or float16, but '{model.name}' has {keys.dtype} on "
                    f"{keys.device}. Leave it at 0, or load the model there and so."
                )
        copies = [cache.copy_prefix(cache.length, 16) for cache in caches]
        # Keys and values are held in 16 bits, whatever the model computes in.
        eps = torch.finfo(next(caches[0].layers())[1].dtype).eps
        # Alone and together, each more than once: a replay must read what is new.
        for one, other in ((1, 0), (1, 0), (3, 0), (3, 0), (1, 1), (1, 1), (2, 1), (1, 2)):
            new = [sample[-one:], sample[-one - other : -one]]
            steps, plain = (
                [Step(cache, tokens, len(tokens)) for cache, tokens in zip(held, new, strict=True) if tokens]
                for held in (caches, copies)
            )
            assert self.takes(steps)
            expected = model.forward(plain)
            try:
                difference = float((model.forward(steps, self) - expected).abs().max())
            except (RuntimeError, ImportError, TypeError) as error:
                raise UnsupportedModelError(
                    f"a pass of '{model.name}' cannot be recorded as a CUDA graph by torch "
                    f"{torch.__version__}: {error}. Leave cuda_graph_tokens at 0, or try torch 2.13."
                ) from error
            sample = sample[1:] + sample[:1]
            allowed = min(1000 * eps, 0.5) * max(float(expected.std()), 1e-6)
            if not difference <= allowed:
                raise UnsupportedModelError(
                    f"a CUDA graph of '{model.name}' computes other logits than the model: they are off by "
                    f"{difference:.3g} (allowed {allowed:.3g}). Leave cuda_graph_tokens at 0."
                )


class _Rows:
    """A buffer of keys and values for several sequences, ``[rows, kv_heads, tokens, head_dim]`` a layer.

    Args:
        like: A cache: its layers have the shapes, dtypes and devices.
        rows: How many sequences.
        tokens: Of each, a multiple of a page.
    """

    def __init__(self, like: SequenceKV, *, rows: int, tokens: int) -> None:
        self.tokens = tokens
        self.layers: dict[int, LayerKV] = {}
        for layer, keys, values in like.layers():
            # Zeros: what lies behind a sequence's tokens is read, and weighed with nothing.
            buffers = (k.new_zeros(rows, k.shape[0], tokens, k.shape[2]) for k in (keys, values))
            self.layers[layer] = LayerKV(*buffers)
        self._rows = [
            {layer: LayerKV(held.keys[row], held.values[row]) for layer, held in self.layers.items()}
            for row in range(rows)
        ]
        # The owners, the one that was used last at the end.
        self._owners: dict[int, weakref.ref[SequenceKV]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, caches: Sequence[SequenceKV]) -> list[int]:
        """Each cache's row; one that has none moves into a free one, or into the least recently used."""
        # First those that have one, so that it is not taken from them.
        for cache in caches:
            if (row := self._row_of(cache)) is not None:
                self._own(row, cache)
        return [self._row_for(cache) for cache in caches]

    def _row_of(self, cache: SequenceKV) -> int | None:
        return next((row for row, layers in enumerate(self._rows) if cache.lies_in(layers)), None)

    def _row_for(self, cache: SequenceKV) -> int:
        row = self._row_of(cache)
        if row is None:
            row = self._freed_row()
            cache.move_to(self._rows[row])
            self._own(row, cache)
        return row

    def _own(self, row: int, cache: SequenceKV) -> None:
        self._owners.pop(row, None)
        self._owners[row] = weakref.ref(cache)

    def _freed_row(self) -> int:
        free = (row for row in range(len(self._rows)) if self._owner(row) is None)
        row = next(free, None)
        if row is None:
            row = next(iter(self._owners))
            owner = self._owner(row)
            assert owner is not None
            owner.move_out()
        return row

    def _owner(self, row: int) -> SequenceKV | None:
        """Whose keys and values are in a row."""
        reference = self._owners.get(row)
        owner = None if reference is None else reference()
        return owner if owner is not None and owner.lies_in(self._rows[row]) else None


class _Pass:
    """A pass over some sequences with equally many new tokens.

    It is the batch that the layers attend over, as :class:`PackedBatch` is elsewhere.
    """

    all_wanted = True

    def __init__(
        self,
        decoder: LeanDecoder,
        rows: _Rows,
        recorder: _Recorder,
        kv_dtype: torch.dtype | None,
        *,
        sequences: int,
        new: int,
    ) -> None:
        self._decoder = decoder
        self._rows = rows
        self._recorder = recorder
        self._kv_dtype = kv_dtype
        device = next(iter(rows.layers.values())).keys.device
        self._angles = decoder.angles([range(rows.tokens)])
        # Of each sequence: its row, the tokens before, the new tokens.
        self._inputs = torch.zeros(sequences, 2 + new, dtype=torch.int64, device=device)
        self._ahead = torch.arange(new, device=device)
        self._starts = torch.arange(0, sequences * new + 1, new, dtype=torch.int32, device=device)
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, inputs: list[list[int]]) -> Tensor:
        """Logits ``[sequences * new, vocab]``, in memory that the next call writes over.

        Args:
            inputs: For each sequence its row, how many tokens are before, and the new tokens.
        """
        self._inputs.copy_(torch.tensor(inputs))
        if self._replay is None:  # a pass may be repeated
            self._replay = self._recorder(self._run)
        return self._replay()

    def _run(self) -> Tensor:
        rows, before, tokens = self._inputs.tensor_split([1, 2], 1)
        positions = (before + self._ahead).flatten()
        # What the layers need of it.
        self._row_of_each, self._positions = rows.expand_as(tokens).flatten(), positions
        self._sequence_rows, self._lengths = rows.int(), (before + tokens.shape[1]).flatten().int()
        cos, sin = (table[positions] for table in self._angles)
        return self._decoder.run(tokens.flatten(), cos, sin, self)

    def of_wanted(self, tokens: Tensor) -> Tensor:
        """As :meth:`PackedBatch.of_wanted`: all."""
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
        """As :meth:`PackedBatch.attend`."""
        computed_in = query.dtype
        if self._kv_dtype is not None:
            query, key, value = (tensor.to(self._kv_dtype) for tensor in (query, key, value))
        held = self._rows.layers[layer]
        held.keys[self._row_of_each, :, self._positions] = key.transpose(0, 1)
        held.values[self._row_of_each, :, self._positions] = value.transpose(0, 1)
        output = cuda_kernels.attention_in_rows(
            query,
            held.keys,
            held.values,
            self._sequence_rows,
            self._lengths,
            scaling,
            starts=self._starts,
            window=sliding_window,
        )
        return output.to(computed_in)


class _Recorder:
    """Records passes as CUDA graphs, on a stream and in a pool of memory of their own.

    Args:
        device: Where the passes run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run a pass some times, so that its libraries are ready, and record it.

        Args:
            run: The pass; it may be repeated.

        Returns:
            Replays it; what comes back is the same memory every time.
        """
        with _recording, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # Around the recording, too: one that fails does not go back to the stream that was.
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    run()
                graph = torch.cuda.CUDAGraph()
                # Other threads, a host's embedding model perhaps, may use the device meanwhile.
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


def _new_tokens(steps: Sequence[Step]) -> int:
    """How many a pass has for each of its sequences."""
    return _power_of_two(max(len(step.tokens) for step in steps))


def _power_of_two(count: int) -> int:
    """The least one that is not less."""
    return 1 << max(count - 1, 0).bit_length()
