"""Bytes: folders of tensors read lazily, shards written atomically, an append-only journal."""

from __future__ import annotations
