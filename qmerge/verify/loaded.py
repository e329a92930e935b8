"""python -m qmerge.verify.loaded RUNTIME RELEASE TOKENS ANSWER [TRUSTED]: as users load a release.

RUNTIME is transformers or gptqmodel, TOKENS a file of int64 windows [W, S] by corpus. ANSWER gets
`nll`, the mean negative log-likelihood of each window by corpus; or `unfilled`, the parameters that
the release did not fill; or `error`, why it does not load. With TRUSTED code in the folder may run.
A process of its own, because gptqmodel changes the one it is imported in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

PLACE = "cuda" if torch.cuda.is_available() else "cpu"


def main(runtime: str, release: str, tokens: str, answer: str, trusted: str = "") -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer its worker pool does not start
    load = {"transformers": _by_transformers, "gptqmodel": _by_gptqmodel}[runtime]
    told: dict[str, Any]
    try:
        model, unfilled = load(release, bool(trusted))
    except Exception as error:
        told = {"error": str(error).strip() or type(error).__name__}
    else:
        told = {"unfilled": unfilled} if unfilled else {"nll": _scores(model, tokens)}
    Path(answer).write_text(json.dumps(told), encoding="utf-8")


def _by_transformers(release: str, trusted: bool) -> tuple[Any, list[str]]:
    from transformers import AutoConfig

    from qmerge.model.skeleton import auto_class

    # Kernels of 4-bit weights for CUDA compute in 16 bits; on a CPU 32 are the fastest.
    dtype: Any = "auto" if PLACE == "cuda" else torch.float32
    trust: Any = {"trust_remote_code": trusted}
    loader = auto_class(AutoConfig.from_pretrained(release, **trust))
    model, told = loader.from_pretrained(
        release, dtype=dtype, device_map=PLACE, output_loading_info=True, **trust
    )
    return model.eval(), sorted(told["missing_keys"])


def _by_gptqmodel(release: str, trusted: bool) -> tuple[Any, list[str]]:
    """It stops by itself where a packed weight is missing."""
    from gptqmodel import GPTQModel
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(release, trust_remote_code=trusted).quantization_config
    own = [each for each in (settings.get("dynamic") or {}).values() if each]
    bits = {each.get("bits", settings["bits"]) for each in (settings, *own)}
    # On a CPU only its kernel for 4 bits takes 32-bit activations.
    dtype = torch.float32 if PLACE == "cpu" and bits == {4} else torch.bfloat16
    loaded = GPTQModel.load(release, device=PLACE, dtype=dtype, trust_remote_code=trusted)
    return loaded.model.eval(), []


def _scores(model: Any, tokens: str) -> dict[str, list[float]]:
    windows = torch.load(tokens, weights_only=True)
    return {name: [_nll(model, each.to(PLACE)) for each in own] for name, own in windows.items()}


def _nll(model: Any, window_S: torch.Tensor) -> float:
    with torch.inference_mode():
        logits_SV = model(input_ids=window_S[None], use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits_SV, window_S[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
