"""How much of an adapter is left after requantizing.

O: outputs, I: inputs. H_II is the second moment of a linear's input; the product of two weights
is <A, B>_H = trace(A H B^T), the mean product of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qmerge.gptq import output_squares
from qmerge.results import Survival

# Rows worked on at once, so that nothing of the weight's size is held beside the weights.
ROWS = 1024


def linear_survival(
    base_OI: Tensor,
    merged_OI: Tensor,
    release_OI: Tensor,
    H_II: Tensor,
    mean_step: float,
    *,
    codes_OI: Tensor | None = None,
    base_codes_OI: Tensor | None = None,
) -> Survival:
    """Survival, noise, step ratio and codes changed of one linear.

    Weights in fp32 (a 16-bit `merged` would round the update away); `mean_step` in units of the
    weight. Codes are compared where both are given with one shape. All figures are None where the
    adapter changed nothing, survival and noise also where its change is invisible to H.
    """
    kept = energy = error = 0.0
    for part in _parts(base_OI):
        update = merged_OI[part].float() - base_OI[part].float()
        left = release_OI[part].float() - base_OI[part].float()
        kept += inner(left, update, H_II)
        energy += output_power(update, H_II)
        error += output_power(left - update, H_II)
    return survival_of(
        base_OI,
        merged_OI,
        mean_step,
        energy=energy,
        kept=kept,
        error=error,
        codes_OI=codes_OI,
        base_codes_OI=base_codes_OI,
    )


def survival_of(
    base_OI: Tensor,
    merged_OI: Tensor,
    mean_step: float,
    *,
    energy: float,
    kept: float,
    error: float,
    codes_OI: Tensor | None = None,
    base_codes_OI: Tensor | None = None,
) -> Survival:
    """As `linear_survival`, from products that are known: <D, D>_H, <E, D>_H and ||E - D||^2_H for
    the update D and what the release has of it, E."""
    if torch.equal(base_OI, merged_OI):
        return Survival()
    squares = sum(
        float((merged_OI[part].double() - base_OI[part].double()).square().sum())
        for part in _parts(base_OI)
    )
    rms = math.sqrt(squares / base_OI.numel())
    changed_OI = None
    if codes_OI is not None and base_codes_OI is not None and codes_OI.shape == base_codes_OI.shape:
        changed_OI = codes_OI != base_codes_OI
    return Survival(
        survival=kept / energy if energy > 0 else None,
        noise=error / energy if energy > 0 else None,
        step_ratio=rms / mean_step if mean_step > 0 else None,
        codes_changed=None if changed_OI is None else float(changed_OI.double().mean()),
        energy=max(energy, 0.0),
        update_rms=rms,
        step=mean_step,
        elements=base_OI.numel(),
        codes=0 if changed_OI is None else changed_OI.numel(),
    )


def error_ratio(
    original_OI: Tensor, quantized_OI: Tensor, H_II: Tensor, energy: float
) -> float | None:
    """||(W - Wq) X|| / ||D X||: what quantizing the base cost this linear, in units of what the
    adapter does to it. `energy` is that of the adapter's change D; None where it has none."""
    error = 0.0
    for part in _parts(original_OI):
        difference = original_OI[part].float() - quantized_OI[part].float()
        error += output_power(difference, H_II)
    return math.sqrt(max(error, 0.0) / energy) if energy > 0 else None


def relative_error(merged_OI: Tensor, release_OI: Tensor, H_II: Tensor) -> float | None:
    """||(W - Q) X||^2 / ||W X||^2, None for a linear without output on the calibration text."""
    error = 0.0
    for part in _parts(merged_OI):
        difference = merged_OI[part].float() - release_OI[part].float()
        error += output_power(difference, H_II)
    power = output_power(merged_OI, H_II)
    return error / power if power > 0 else None


def output_power(weight_OI: Tensor, H_II: Tensor) -> float:
    """||W X||^2, the mean squared output over tokens, summed over outputs."""
    return float(output_squares(weight_OI, H_II).double().sum())


def pool_survival(parts: Iterable[Survival | None]) -> Survival | None:
    """One figure for several linears: sums of the products, so that each linear counts by the
    effect its update has. None where no part has a figure."""
    found = [part for part in parts if part is not None and part.elements > 0]
    if not found:
        return None
    seen = [part for part in found if part.survival is not None and part.noise is not None]
    energy = sum(part.energy for part in seen)
    elements = sum(part.elements for part in found)
    codes = sum(part.codes for part in found)
    rms = math.sqrt(sum(part.update_rms**2 * part.elements for part in found) / elements)
    step = sum(part.step * part.elements for part in found) / elements
    changed = sum((part.codes_changed or 0.0) * part.codes for part in found)
    known = [part for part in seen if part.error_ratio is not None]
    effect = sum(part.energy for part in known)
    cost = sum((part.error_ratio or 0.0) ** 2 * part.energy for part in known)
    return Survival(
        survival=sum((p.survival or 0.0) * p.energy for p in seen) / energy if energy > 0 else None,
        noise=sum((p.noise or 0.0) * p.energy for p in seen) / energy if energy > 0 else None,
        step_ratio=rms / step if step > 0 else None,
        codes_changed=changed / codes if codes else None,
        energy=energy,
        update_rms=rms,
        step=step,
        elements=elements,
        codes=codes,
        error_ratio=math.sqrt(cost / effect) if effect > 0 else None,
    )


def inner(A_OI: Tensor, B_OI: Tensor, H_II: Tensor) -> float:
    """trace(A H B^T), product in H's dtype, sum in float64."""
    product_OI = A_OI.to(H_II.dtype) @ H_II
    return float((product_OI.double() * B_OI.double()).sum())


def _parts(weight_OI: Tensor) -> Iterator[slice]:
    for start in range(0, len(weight_OI), ROWS):
        yield slice(start, start + ROWS)
