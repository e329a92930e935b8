"""Arms on the evaluation text: one layer onward, and at the end what each makes of each token.

W: windows, S: tokens of a window, H: hidden width, R: rows (tokens scored together).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qmerge.corpus import Corpus
from qmerge.measure.tokens import TokenAccumulator, TokenStats, join
from qmerge.model.frame import ROWS_AT_ONCE, Frame
from qmerge.model.layer import Call, Hidden, run
from qmerge.model.streams import Streams, batches
from qmerge.progress import Progress
from qmerge.texts import LENS_TOKENS, LENS_WINDOWS, LOGIT_BYTES

FEW = 4
"""Arms whose running figures are all shown."""


def key_of(arm: str, corpus: str) -> str:
    """The stream of one arm on one corpus."""
    return f"{arm}.{corpus}"


def advance(
    layer: nn.Module,
    streams: Streams,
    key: str,
    call: Call,
    at_once: int,
    reference: str | None,
    round_to: torch.dtype | None = None,
) -> tuple[float, float]:
    """Run a stream through one layer, a few windows at a time.

    `round_to` rounds what comes out, as a runtime of that dtype would. Returns the squared distance
    of the new hidden states from those of the stream `reference`,
    which has been advanced before, and the squared norm of the latter.
    """
    distance = norm = 0.0
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    for start, stop in batches(streams.stream(key).windows, at_once):
        hidden = run(layer, streams.read(key, start, stop).to(device), call).cpu()
        if round_to is not None:
            hidden = hidden.to(round_to).float()
        streams.append(key, hidden)
        if reference is not None:
            expected = streams.fresh(reference, start, stop)
            distance += float((hidden - expected).square().sum(dtype=torch.float64))
            norm += float(expected.square().sum(dtype=torch.float64))
    return distance, norm


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square distance."""
    far, size = (found - expected).double().square().sum(), expected.double().square().sum()
    return float((far / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


ReadWindows = Callable[[str, str, int, int], Hidden]
"""Last hidden states of an arm on a corpus, windows [start, stop)."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What is kept of one corpus: per-token statistics [W, T] of every arm."""

    corpus: Corpus
    stats: Mapping[str, TokenStats]


def score(
    frames: Mapping[str, Frame],
    read: ReadWindows,
    corpora: Sequence[Corpus],
    reference: str | None,
    progress: Progress,
    device: torch.device,
) -> tuple[Scored, ...]:
    """Final norm and head of every arm on the same tokens, side by side, logits on `device`.

    Memory is a block of rows times a slice of the vocabulary for each arm, whatever the size of
    either.
    """
    found = []
    for corpus in corpora:
        length = corpus.tokens.shape[1]
        parts: dict[str, list[TokenStats]] = {arm: [] for arm in frames}
        shown = _Shown(tuple(frames), reference)
        at_once = _windows_at_once(frames, length)
        for start, stop in batches(corpus.tokens.shape[0], at_once):
            progress.doing(f"{corpus.name}: window {start + 1} of {len(corpus.tokens)}")
            rows = {
                arm: frame.leave(read(arm, corpus.name, start, stop))[:, :-1].to(device)
                for arm, frame in frames.items()
            }
            targets = corpus.tokens[start:stop, 1:].reshape(-1).to(device)
            for arm, part in _score_rows(frames, rows, targets, reference).items():
                parts[arm].append(part)
                shown.add(arm, part)
            progress.figures(shown.figures())
        stats = {arm: join(own, length - 1) for arm, own in parts.items()}
        found.append(Scored(corpus=corpus, stats=stats))
    return tuple(found)


class _Shown:
    """Perplexity of the reference and of the releases, or of every arm where there are few, and how
    far the others are from the reference, as far as has been scored."""

    def __init__(self, arms: Sequence[str], reference: str | None) -> None:
        alone = sum(arm.startswith("release") for arm in arms) == 1
        self._names = {
            arm: arm.partition("@")[0] if alone else arm.replace("@", " by ")
            for arm in arms
            if len(arms) <= FEW or arm == reference or arm.startswith("release")
        }
        self._reference = reference
        self._nll: dict[str, _Mean] = defaultdict(_Mean)
        self._kl: dict[str, _Mean] = defaultdict(_Mean)

    def add(self, arm: str, part: TokenStats) -> None:
        if arm not in self._names:
            return
        self._nll[arm].add(part.nll_R[part.scored_R])
        if part.kl_R is not None and arm != self._reference:
            self._kl[arm].add(part.kl_R)

    def figures(self) -> dict[str, float]:
        found = {}
        for arm, mean in self._nll.items():
            found[f"{self._names[arm]} perplexity"] = float(torch.tensor(mean.value).exp())
            if arm in self._kl:
                found[f"{self._names[arm]} KL"] = self._kl[arm].value
        return found


class _Mean:
    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, values: torch.Tensor) -> None:
        self._total += float(values.sum())
        self._count += values.numel()

    @property
    def value(self) -> float:
        return self._total / max(self._count, 1)


def _windows_at_once(frames: Mapping[str, Frame], length: int) -> int:
    widest = min(ROWS_AT_ONCE, max(frame.vocabulary for frame in frames.values()))
    return max(1, LOGIT_BYTES // (4 * widest * length * len(frames)))


def _score_rows(
    frames: Mapping[str, Frame],
    hidden: Mapping[str, Hidden],
    targets_R: torch.Tensor,
    reference: str | None,
) -> dict[str, TokenStats]:
    accumulator = TokenAccumulator(tuple(frames), reference, targets_R)
    for first, slices in _head_slices(frames, targets_R.device):
        logits = {
            arm: frames[arm].logits(hidden[arm].flatten(0, 1), first, weight)
            for arm, weight in slices.items()
        }
        accumulator.add(first, logits)
    return accumulator.finish()


def lens(
    frames: Mapping[str, Frame],
    streams: Streams,
    corpus: str,
    reference: str,
    device: torch.device,
) -> dict[str, float]:
    """Mean KL of each arm from the reference if the model ended here: final norm and head on the
    hidden states that have just been written (a logit lens), for LENS_TOKENS tokens of a corpus.
    """
    rows = {
        arm: frame.leave(_sample(streams, key_of(arm, corpus))).to(device)
        for arm, frame in frames.items()
    }
    targets_R = torch.zeros(rows[reference].shape[:2].numel(), dtype=torch.long, device=device)
    found = _score_rows(frames, rows, targets_R, reference)
    return {arm: float(part.kl_R.mean()) for arm, part in found.items() if part.kl_R is not None}


def _sample(streams: Streams, key: str) -> Hidden:
    """Tokens at even distances in the first windows; a window's first is like no other."""
    stream = streams.stream(key)
    windows = min(stream.windows, LENS_WINDOWS)
    step = max(1, windows * stream.length // LENS_TOKENS)
    return torch.cat([streams.fresh(key, w, w + 1)[:, step // 2 :: step] for w in range(windows)])


def _head_slices(
    frames: Mapping[str, Frame], device: torch.device
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Slices of every arm's head at the same place; arms that share a frame share the slice."""
    vocabulary = max(frame.vocabulary for frame in frames.values())
    for first in range(0, vocabulary, ROWS_AT_ONCE):
        decoded: dict[int, torch.Tensor] = {}
        slices: dict[str, torch.Tensor] = {}
        for arm, frame in frames.items():
            if first >= frame.vocabulary:
                continue
            if id(frame) not in decoded:
                decoded[id(frame)] = frame.head_rows(first, first + ROWS_AT_ONCE).to(device)
            slices[arm] = decoded[id(frame)]
        yield first, slices
