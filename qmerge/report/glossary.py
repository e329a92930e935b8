"""What reports call things, for those who did not write them."""

from __future__ import annotations

from qmerge.report.figures import base_is_plain, corpora
from qmerge.report.verdict import gain_kept
from qmerge.results import RunResult, Survival

LEGEND = {
    "original": "`original` is the 16-bit model that the base was quantized from",
    "quantized_base": "`quantized base` the base that training ran on, without adapter",
    "trained": "`trained` the base with the adapter live on top, as it was trained and validated",
    "dense": "`dense` the model that was quantized",
    "merged": "`merged` the merged model before it was quantized",
    "release": "`release` what is on disk, decoded from its packed codes",
    "previous": "`previous` an earlier release",
    "noise_floor": "`noise floor` the reference itself in 16 bits",
}
PLAIN_BASE = {"quantized_base": "`base` the base as it is stored, without adapter"}
OTHER_STRATEGY = "merged (substitute), release (dequantize), …"
WORDS = {
    "±": "a standard error over windows; for a change, that of the differences window by window",
    "change": "perplexity over the reference's on the same windows, less one",
    "KL": "mean of KL(reference ‖ arm) over tokens, in nats",
    "same top token": "share of tokens after which arm and reference find the same token likeliest",
    "adapter's gain kept": "ln(base / release) / ln(base / trained), of perplexities",
    OTHER_STRATEGY: "what the strategy that was not published came"
    " to: substitute merges onto the original, dequantize onto the decoded base",
    "survival": "share of what merging changed in a linear's output that the release still has, on"
    " the calibration text: ⟨E, D⟩ / ⟨D, D⟩, for the merged weight D and the released one E, both"
    " less the weight before the merge; 1 is whole, 0 erased; of several linears, products are"
    " summed first",
    "noise": "how far the release is from that change, in power over the change's own: ‖E − D‖² /"
    " ‖D‖²",
    "update of a step": "root mean square of D over the release's mean quantization step",
    "codes changed": "share of codes that differ from the base's, in linears that the adapter"
    " changed and whose base has such codes",
    "base's error / adapter's effect": "‖W − B‖ / ‖D‖ in a linear's output, for the original's"
    " weight W and the base's B",
    "error": "‖M − Q‖² / ‖M‖² in a linear's output, for the weight M that was to be quantized and"
    " the released one Q",
    "grid": "steps and zero points: fresh, or anchored (the base's own), by share of rows",
    "damping": "what was added to the Hessian's diagonal, as a share of its mean",
}
"""What tables and lines call things, for those who did not write them."""
OF_LINEARS = ("error", "grid", "damping")


def legend(result: RunResult) -> str:
    """What the arms of the tables are, in a sentence; empty where they have names of their own."""
    if result.command == "evaluate":
        return ""
    present = {*result.arms, *(["noise_floor"] if result.noise_floor else [])}
    others = [arm for arm in present if arm not in LEGEND]
    known = LEGEND | (PLAIN_BASE if base_is_plain(result) else {})
    told = [text for arm, text in known.items() if arm in present]
    rest = (
        " Arms that name a strategy were merged in that way, and not published." if others else ""
    )
    return f"{', '.join(told)}.{rest}" if told else ""


def words(result: RunResult, *, linears: bool) -> dict[str, str]:
    """Those that a report of this result has; of `linears` where it lists them."""
    names = corpora(result)
    kept = result.survival or Survival()
    known = {
        "±": bool(names),
        **dict.fromkeys(("change", "KL", "same top token"), result.reference is not None),
        "adapter's gain kept": bool(names) and gain_kept(result, names[0]) is not None,
        OTHER_STRATEGY: result.strategy is not None and len(result.strategy.candidates) > 1,
        "survival": kept.survival is not None,
        "noise": kept.noise is not None,
        "update of a step": kept.step_ratio is not None,
        "codes changed": kept.codes_changed is not None,
        "base's error / adapter's effect": kept.error_ratio is not None,
        **dict.fromkeys(OF_LINEARS, linears),
    }
    return {word: meaning for word, meaning in WORDS.items() if known[word]}
