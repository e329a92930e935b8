"""python -m qmerge.verify.loaded RELEASE TOKENS ANSWER [TRUSTED]: the release as users load it.

TOKENS is a file of int64 windows [W, S] by corpus; ANSWER gets the mean negative log-likelihood of
each window, by corpus. With TRUSTED code in the folder may run. A process of its own, because
gptqmodel changes the one it is imported in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main(release: str, tokens: str, answer: str, trusted: str = "") -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer its worker pool does not start
    from transformers import AutoConfig

    from qmerge.model.skeleton import auto_class

    placed = "cuda" if torch.cuda.is_available() else "cpu"
    # Kernels of 4-bit weights for CUDA compute in 16 bits; on a CPU 32 are the fastest.
    dtype: Any = "auto" if placed == "cuda" else torch.float32
    trust: Any = {"trust_remote_code": bool(trusted)}
    loader = auto_class(AutoConfig.from_pretrained(release, **trust))
    model = loader.from_pretrained(release, dtype=dtype, device_map=placed, **trust).eval()
    windows = torch.load(tokens, weights_only=True)
    found = {
        name: [_nll(model, window.to(placed)) for window in own] for name, own in windows.items()
    }
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def _nll(model: Any, window_S: torch.Tensor) -> float:
    with torch.inference_mode():
        logits_SV = model(input_ids=window_S[None], use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits_SV, window_S[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
