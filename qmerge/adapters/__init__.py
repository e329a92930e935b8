"""Adapters of every kind that PEFT can merge, without the model's weights in memory."""

from qmerge.adapters.chain import Chain, Change
from qmerge.adapters.combine import combine
from qmerge.adapters.inject import inject
from qmerge.adapters.injection import Injection
from qmerge.adapters.overlay import Overlay, overlay
from qmerge.adapters.rowwise import MergeRows
from qmerge.adapters.source import Adapter, open_adapter

__all__ = [
    "Adapter",
    "Chain",
    "Change",
    "Injection",
    "MergeRows",
    "Overlay",
    "combine",
    "inject",
    "open_adapter",
    "overlay",
]
