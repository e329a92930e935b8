"""A finished run for reports, gate and comparison: scored from real logits, not written by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from qmerge.measure import (
    TokenAccumulator,
    join,
    linear_survival,
    pair,
    pool_survival,
    relative_error,
    score_arms,
    worst_windows,
)
from qmerge.results import (
    ArmScore,
    Candidate,
    Corpora,
    CorpusRecord,
    Estimate,
    InputRecord,
    LayerResult,
    LinearResult,
    Remedy,
    RunResult,
    StrategyResult,
    WorstWindow,
)

WINDOWS, TARGETS, VOCABULARY = 16, 40, 90
DISTANCES = {
    "original": 0.5,
    "quantized_base": 0.8,
    "merged": 0.0,
    "release": 0.15,
    "previous": 0.3,
}
PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
ODD = "<script>alert(1)</script> & | `x` $y$ \x1b[31m"


@functools.cache
def finished(*, damage: float = 0.0, seed: int = 0, odd: bool = False) -> RunResult:
    """`damage` is added to the release and to the error of layer 2's down_proj; `odd` puts text
    that no report may take as markup wherever a user's text can appear."""
    name = ODD if odd else "plays"
    texts = {name: "in_domain", "encyclopedia": "general"}
    scored = {text: _scores(number, damage, seed) for number, text in enumerate(texts)}
    layers = tuple(_layer(number, damage, odd) for number in range(4))
    arms = {
        arm: {text: scores[arm] for text, (scores, _, _) in scored.items()}
        for arm in ("original", "quantized_base", "trained", "merged", "release", "previous")
    }
    changes = {text: arms["release"][text].change for text in texts}
    return RunResult(
        qmerge_version="0.1.0",
        recipe={"base": name, "bits": 4, "calibration": None, "eval": [name, "encyclopedia"]},
        strategy=StrategyResult(
            chosen="dequantize",
            why=f"lower KL on {name}",
            candidates=(Candidate(strategy="dequantize", kl=Estimate(mean=0.001)),),
        ),
        corpora=Corpora(
            calibration=_record("calibration", "calibration", "hub:org/texts@main/default/train"),
            evaluation={text: _record(text, role, text) for text, role in texts.items()},
        ),
        arms=arms,
        change={text: change for text, change in changes.items() if change is not None},
        change_from_previous={
            text: pair(arms["previous"][text], arms["release"][text]) for text in texts
        },
        noise_floor={text: floor for text, (_, floor, _) in scored.items()},
        survival=pool_survival(linear.survival for layer in layers for linear in layer.linears),
        remedies=(Remedy(option="--bits 8", where=(name,), survival=0.99, extra_bytes=4096),),
        layers=layers,
        worst={text: worst for text, (_, _, worst) in scored.items()},
        inputs={
            "base": InputRecord(
                path=f"folder/{name}",
                format="gptq",
                bytes=3_000_000,
                files={"model.safetensors": "1" * 64},
                model="org/base-4bit",
                license="apache-2.0",
            ),
            "adapter": InputRecord(path="adapter", format="lora", files={name: "2" * 64}),
        },
        release=InputRecord(
            path="made/release",
            format="gptq",
            bytes=3_000_000,
            details={"bits": 4, "group_size": 64, "symmetric": True, "format": "gptq"},
        ),
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        warnings=(f"calibration and {name} overlap",),
        timings={"plan": 0.5, "requantize": 75.0, "evaluate": 4000.0},
        memory={"requantize": 1 << 29},
        peak_rss_bytes=1 << 30,
    )


def without_adapter_figures(result: RunResult) -> RunResult:
    """As `qmerge evaluate` leaves it: scores, and nothing about a merge."""
    return dataclasses.replace(
        result, command="evaluate", subject=None, strategy=None, survival=None, remedies=(),
        layers=(), worst={}, release=None, change={}, change_from_previous={}, noise_floor={},
    )  # fmt: skip


def quantized() -> RunResult:
    """As `qmerge quantize` leaves it: nothing was merged."""
    made = finished()
    arms = {"dense": made.arms["trained"], "release": made.arms["release"]}
    return dataclasses.replace(
        made, command="quantize", reference="dense", arms=arms, survival=None, remedies=(),
        layers=(), inputs={"base": made.inputs["base"]}, change_from_previous={},
    )  # fmt: skip


def _scores(
    number: int, damage: float, seed: int
) -> tuple[dict[str, ArmScore], ArmScore, tuple[WorstWindow, ...]]:
    generator = torch.Generator().manual_seed(100 * seed + number)
    tokens = torch.randint(0, VOCABULARY, (WINDOWS, TARGETS + 1), generator=generator)
    targets = tokens[:, 1:].flatten()
    shape = (len(targets), VOCABULARY)
    trained = 2 * torch.randn(shape, generator=generator)
    trained[torch.arange(len(targets)), targets] += 4
    logits = {"trained": trained, "floor": trained.bfloat16().float()}
    for arm, distance in DISTANCES.items():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(7 + len(arm)))
        far = distance + (damage if arm == "release" else 0.0)
        logits[arm] = trained * (1 - 0.2 * (arm == "quantized_base")) + far * noise
    accumulator = TokenAccumulator(tuple(logits), "trained", targets)
    accumulator.add(0, logits)
    stats = {arm: join([part], TARGETS) for arm, part in accumulator.finish().items()}
    scores = score_arms(stats, "trained")
    floor = scores.pop("floor")
    worst = worst_windows(stats["release"], stats["trained"], tokens, _decode, count=2)
    return scores, floor, worst


def _decode(ids: Sequence[int]) -> str:
    words = ["the", "<b>", "&", "king", "\n", "中", "</p><script>x</script>"]
    return "".join(f" {words[i % len(words)]}" for i in ids)


def _layer(number: int, damage: float, odd: bool) -> LayerResult:
    linears = []
    for place, projection in enumerate(PROJECTIONS):
        generator = torch.Generator().manual_seed(10 * number + place)
        base = torch.randn(16, 12, generator=generator)
        update = 0.02 * torch.randn(16, 12, generator=generator)
        hurt = damage if (number, place) == (2, 2) else 0.0
        kept = 0.7 if (number, place) == (1, 1) else 0.97
        release = base + kept * update
        release += (0.006 + hurt) * torch.randn(16, 12, generator=generator)
        moment = torch.eye(12)
        codes = torch.randint(0, 16, (16, 12), generator=generator)
        linears.append(
            LinearResult(
                name=f"model.layers.{number}.{projection}" + (f"<i>{ODD}" if odd else ""),
                bits=4,
                group_size=64,
                grid="fresh",
                error=relative_error(base + update, release, moment),
                damping=0.01,
                fallback="damping raised" if place == 0 else None,
                survival=dataclasses.replace(
                    linear_survival(
                        base, base + update, release, moment, 0.1,
                        codes_OI=codes, base_codes_OI=codes.roll(1),
                    ),
                    error_ratio=0.1 * (number + 1),
                ),
            )
        )  # fmt: skip
    return LayerResult(
        name=f"model.layers.{number}",
        seconds=1.0,
        bytes=1000,
        linears=tuple(linears),
        survival=pool_survival(linear.survival for linear in linears),
        drift={"release": 0.002 * (number + 1), "original": 0.004 * (number + 1)},
        kl=0.001 * (number + 1) ** 2,
    )


def _record(name: str, role: str, source: str) -> CorpusRecord:
    tokens = WINDOWS * (TARGETS + 1)
    return CorpusRecord(
        name=name,
        source=source,
        role=role,
        windows=WINDOWS,
        sequence_length=TARGETS + 1,
        tokens=tokens,
        sha256=f"{len(name):064d}",
    )
