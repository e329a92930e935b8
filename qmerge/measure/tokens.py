"""Per-token statistics of several models on the same tokens, logits given slice by slice.

R: tokens scored together, V: vocabulary, v: one slice of it, W: windows, T: targets per window.

Sums run in float64, because KL of near-identical models is a small difference of large numbers;
each sum is kept relative to the largest logit so far and rescaled when that grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Elements of a slice worked on at once: fits a core's cache on a CPU, fills a GPU.
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 23}
# Below any logit, and finite so that differences of two empty states are no NaN.
EMPTY = -1e300


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """One model on R tokens (or [W, T] after `join`), nats and probabilities.

    `nll_R` is NaN where `scored_R` is False: the target is not in this model's vocabulary.
    `probability_R` is that of the target, `confidence_R` that of the likeliest token. `kl_R` is
    KL(reference || model) and `same_top_R` whether the reference's likeliest token has the
    model's largest logit, both over the tokens that both vocabularies have; None without a
    reference.
    """

    nll_R: Tensor
    scored_R: Tensor
    probability_R: Tensor
    confidence_R: Tensor
    kl_R: Tensor | None = None
    same_top_R: Tensor | None = None


def join(parts: Sequence[TokenStats], tokens_per_window: int) -> TokenStats:
    """Consecutive parts of one model as [W, T] on the CPU, in float32 to halve what is kept."""

    def gather(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        moved = [t.cpu() if t.dtype == torch.bool else t.to("cpu", torch.float32) for t in tensors]
        return torch.cat(moved).view(-1, tokens_per_window)

    return TokenStats(**{f.name: gather(f.name) for f in fields(TokenStats)})  # type: ignore[arg-type]


class TokenAccumulator:
    """Online over vocabulary slices; nothing of size [R, V] is ever held.

    Slices come in any order and any width, each vocabulary entry once; a slice may have fewer
    columns for a model with a smaller vocabulary, or lack that model. Non-finite logits make the
    token's figures NaN and disturb no other token.
    """

    def __init__(self, arms: Sequence[str], reference: str | None, targets_R: Tensor) -> None:
        assert reference is None or reference in arms, "the reference is one of the arms"
        self._targets_R = targets_R
        self._reference = reference
        # Without a comparison nothing cancels, and float32 halves the cost.
        alone = reference is None or len(arms) == 1
        wide = not alone and targets_R.device.type != "mps"
        self._dtype = torch.float64 if wide else torch.float32
        self._arms = {arm: _State(targets_R, self._dtype) for arm in arms}

    def add(self, first_token: int, logits: Mapping[str, Tensor]) -> None:
        """Takes `logits[arm]` [R, v] of tokens `first_token` and on, in any floating dtype."""
        shapes = [tuple(values.shape) for values in logits.values()]
        rows, width = len(self._targets_R), max(shape[1] for shape in shapes)
        assert all(shape[0] == rows for shape in shapes), "every arm has the same tokens"
        device = self._targets_R.device
        step = max(1, BLOCK.get(device.type, BLOCK["cuda"]) // width)
        size = min(step, rows) * width
        scratch = [torch.empty(size, dtype=self._dtype, device=device) for _ in range(3)]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            block = {arm: values[part] for arm, values in logits.items()}
            self._add_rows(first_token, block, part, scratch)

    def _add_rows(
        self, first: int, logits: Mapping[str, Tensor], rows: slice, scratch: Sequence[Tensor]
    ) -> None:
        reference = self._reference if self._reference in logits else None
        base = None
        if reference is not None:
            base = _Base(logits[reference], scratch)
            added = self._arms[reference].advance(logits[reference], base.weight_Rv, rows)
            for arm, state in self._arms.items():
                if arm != reference:
                    state.scale_pair(added.scale_R, rows)
        for arm, values in logits.items():
            state = self._arms[arm]
            state.find_targets(self._targets_R[rows] - first, values, rows)
            if arm == reference:
                continue
            work_Rv = _filled(scratch[1], values)
            if base is not None:
                state.drift[rows] += base.toward(work_Rv)
            added = state.advance(values, work_Rv, rows)
            if base is not None:
                state.pair(base, values, work_Rv, added, rows)

    def finish(self) -> dict[str, TokenStats]:
        """The statistics of every model, tensors [R] in the accumulator's own precision."""
        if self._reference is None:
            return {arm: state.stats() for arm, state in self._arms.items()}
        base = self._arms[self._reference]
        found = {}
        for arm, state in self._arms.items():
            kl_R, same_R = base.identity() if state is base else state.divergence(base)
            found[arm] = state.stats(kl_R=kl_R, same_top_R=same_R)
        return found


def _filled(scratch: Tensor, values_Rv: Tensor) -> Tensor:
    """The values in the precision of sums, in memory that is reused from slice to slice."""
    return scratch[: values_Rv.numel()].view(values_Rv.shape).copy_(values_Rv)


def _argmax(values_Rv: Tensor) -> Tensor:
    """The place of each row's largest value. On a CPU numpy finds it in a thirtieth of the time
    that torch takes; it has no bfloat16."""
    if values_Rv.device.type == "cpu" and values_Rv.dtype != torch.bfloat16:
        return torch.from_numpy(values_Rv.numpy().argmax(axis=1))
    return values_Rv.argmax(dim=1)


@dataclass(frozen=True)
class _Added:
    """What a slice brought: its largest logit, its mass, and the factor for all older sums."""

    peak_R: Tensor
    mass_R: Tensor
    scale_R: Tensor


@dataclass(frozen=True)
class _Shared:
    """The reference over the columns that another model has too. `drift_R` is the sum of
    weight * logit, `place_R` where the largest logit `top_R` is."""

    drift_R: Tensor
    mass_R: Tensor
    top_R: Tensor
    place_R: Tensor


class _Base:
    """The reference's part of a slice. `weight_Rv` are its logits until its state has advanced,
    then exp(logit - peak)."""

    def __init__(self, logits_Rv: Tensor, scratch: Sequence[Tensor]) -> None:
        self.logits_Rv = logits_Rv
        self.weight_Rv = _filled(scratch[0], logits_Rv)
        self._scratch = scratch
        self._shared: dict[int, _Shared] = {}

    def toward(self, other_Rv: Tensor) -> Tensor:
        """Sum over the shared columns of weight * (logit - other's logit)."""
        columns = min(self.weight_Rv.shape[1], other_Rv.shape[1])
        return self.shared(columns).drift_R - self._product(other_Rv[:, :columns])

    def shared(self, columns: int) -> _Shared:
        if columns not in self._shared:
            own_Rv = _filled(self._scratch[2], self.logits_Rv[:, :columns])
            place_R = _argmax(self.logits_Rv[:, :columns])
            top_R = self.logits_Rv.gather(1, place_R[:, None])[:, 0]
            self._shared[columns] = _Shared(
                drift_R=self._product(own_Rv),
                mass_R=self.weight_Rv[:, :columns].sum(dim=1),
                top_R=top_R.to(own_Rv.dtype),
                place_R=place_R,
            )
        return self._shared[columns]

    def _product(self, values_Rv: Tensor) -> Tensor:
        out_Rv = self._scratch[2][: values_Rv.numel()].view(values_Rv.shape)
        weight_Rv = self.weight_Rv[:, : values_Rv.shape[1]]
        return torch.mul(weight_Rv, values_Rv, out=out_Rv).sum(dim=1)


class _State:
    """The running sums of one model. `mass` is of exp(logit - peak); what begins with `shared`
    or `reference` is over the columns that the reference has too, `drift` is the sum of
    exp(reference logit - reference peak) * (reference logit - logit)."""

    def __init__(self, targets_R: Tensor, dtype: torch.dtype) -> None:
        def full(value: float) -> Tensor:
            return torch.full(targets_R.shape, value, dtype=dtype, device=targets_R.device)

        lowest = max(EMPTY, torch.finfo(dtype).min)
        self.peak, self.mass = full(lowest), full(0.0)
        self.target, self.scored = full(float("nan")), torch.zeros_like(targets_R, dtype=torch.bool)
        self.shared_mass, self.shared_peak = full(0.0), full(lowest)
        self.reference_mass, self.reference_peak = full(0.0), full(lowest)
        self.drift, self.at_top = full(0.0), full(lowest)

    def advance(self, logits_Rv: Tensor, work_Rv: Tensor, rows: slice) -> _Added:
        """Adds a slice to the mass, turning `work_Rv` from logits into weights."""
        top_R = logits_Rv.amax(dim=1).to(work_Rv.dtype)
        peak_R = torch.maximum(self.peak[rows], top_R)
        scale_R = (self.peak[rows] - peak_R).exp()
        mass_R = work_Rv.sub_(peak_R[:, None]).exp_().sum(dim=1)
        self.peak[rows] = peak_R
        self.mass[rows] = self.mass[rows] * scale_R + mass_R
        self.shared_mass[rows] *= scale_R
        return _Added(peak_R=top_R, mass_R=mass_R, scale_R=scale_R)

    def find_targets(self, place_R: Tensor, logits_Rv: Tensor, rows: slice) -> None:
        width = logits_Rv.shape[1]
        inside_R = (place_R >= 0) & (place_R < width)
        value_R = logits_Rv.gather(1, place_R.clamp(0, width - 1)[:, None])[:, 0]
        self.target[rows] = torch.where(inside_R, value_R.to(self.target.dtype), self.target[rows])
        self.scored[rows] |= inside_R

    def scale_pair(self, scale_R: Tensor, rows: slice) -> None:
        self.reference_mass[rows] *= scale_R
        self.drift[rows] *= scale_R

    def pair(
        self, base: _Base, logits_Rv: Tensor, weight_Rv: Tensor, added: _Added, rows: slice
    ) -> None:
        columns = min(base.weight_Rv.shape[1], logits_Rv.shape[1])
        shared, peak_R, mass_R = base.shared(columns), added.peak_R, added.mass_R
        if columns < logits_Rv.shape[1]:
            peak_R = logits_Rv[:, :columns].amax(dim=1).to(peak_R.dtype)
            mass_R = weight_Rv[:, :columns].sum(dim=1)
        self.reference_mass[rows] += shared.mass_R
        self.shared_mass[rows] += mass_R
        here_R = logits_Rv.gather(1, shared.place_R[:, None])[:, 0].to(peak_R.dtype)
        better_R = shared.top_R > self.reference_peak[rows]
        self.at_top[rows] = torch.where(better_R, here_R, self.at_top[rows])
        self.reference_peak[rows] = torch.maximum(self.reference_peak[rows], shared.top_R)
        self.shared_peak[rows] = torch.maximum(self.shared_peak[rows], peak_R)

    def identity(self) -> tuple[Tensor, Tensor]:
        """Divergence and agreement of the reference with itself, NaN where its logits are."""
        return self.mass * 0.0, self.mass == self.mass

    def divergence(self, base: _State) -> tuple[Tensor, Tensor]:
        log_partition_p = base.peak + self.reference_mass.log()
        log_partition_q = self.peak + self.shared_mass.log()
        kl_R = self.drift / self.reference_mass - (log_partition_p - log_partition_q)
        # Never below zero in exact arithmetic; clamp keeps NaN.
        return kl_R.clamp(min=0.0), self.at_top == self.shared_peak

    def stats(self, kl_R: Tensor | None = None, same_top_R: Tensor | None = None) -> TokenStats:
        nll_R = (self.peak - self.target) + self.mass.log()
        return TokenStats(
            nll_R=nll_R,
            scored_R=self.scored,
            probability_R=(-nll_R).exp(),
            confidence_R=1.0 / self.mass,
            kl_R=kl_R,
            same_top_R=same_top_R,
        )
