"""Merge a QLoRA adapter into its 4-bit base, requantize with GPTQ, and say what it cost."""

from __future__ import annotations

__version__ = "0.1.0"
