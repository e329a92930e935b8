"""Where inputs come from, as far as their folders tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmerge.provenance import folder_record, hub_name

FRONT = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n# A base\n"


def test_a_folder_of_the_hubs_cache_has_its_name() -> None:
    cache = Path("/cache/hub/models--org-x--base-4bit/snapshots/0123abc")
    assert hub_name(cache) == "org-x/base-4bit"
    assert hub_name(cache.parent.parent) is None
    assert hub_name(Path("/models/org/base")) is None


def test_a_licence_of_its_own_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(FRONT)
    record = folder_record(tmp_path)
    assert record.license == "other"
    assert record.details == {"license_name": "llama3", "license_link": "LICENSE"}


@pytest.mark.parametrize("card", ["", "# no front matter", "---\n[\n---\n", "---\n- a\n---\n"])
def test_a_card_without_front_matter_says_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    record = folder_record(tmp_path)
    assert (record.license, record.model, record.details) == (None, None, {})
