"""One reader for flags and recipe files: what is taken, what is refused, in which words."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmerge.errors import RecipeError
from qmerge.options import (
    DEVICE,
    EVALS,
    FOLDER,
    FRACTION,
    INCREASE,
    LARGEST_RECIPE,
    NBYTES,
    PART,
    SURVIVAL,
    SWITCH,
    WINDOWS,
    Kind,
    build,
    choice,
    option,
    options,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int = option(3, whole(1), "Text", "How many.")
    bits: int | None = option(None, choice(2, 4), "Quantizer", "Bits.", unset="the base's")
    base: Path = option(Path(), FOLDER, "Models", "A folder.")
    again: bool = option(False, SWITCH, "Machine", "Start over.", transient=True)


def written(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (whole(1), "7", 7),
        (whole(-1), "-1", -1),
        (choice(-1, 32), "-1", -1),
        (choice(-1, 32), 32, 32),
        (choice("a", "b"), "b", "b"),
        (WINDOWS, "all", "all"),
        (WINDOWS, "12", 12),
        (FRACTION, "0.05", 0.05),
        (PART, "95%", 0.95),
        (PART, "1", 1.0),
        (SURVIVAL, 1.5, 1.5),
        (INCREASE, "1%", 0.01),
        (INCREASE, "150%", 1.5),
        (NBYTES, "4GiB", 4 << 30),
        (NBYTES, "1.5g", 3 << 29),
        (NBYTES, "800 MB", 800 << 20),
        (NBYTES, 12345678, 12345678),
        (EVALS, "a.txt", ("a.txt",)),
        (EVALS, ["a.txt", "b.txt"], ("a.txt", "b.txt")),
        (FOLDER, "models/base", Path("models/base")),
        (FOLDER, "~/base", Path.home() / "base"),
        (DEVICE, "cuda:1", "cuda:1"),
        (SWITCH, True, True),
    ],
)
def test_reads(kind: Kind, given: object, value: object) -> None:
    assert kind.read(given) == value


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (whole(1), "0"),
        (whole(1), "1.5"),
        (whole(1), 1.5),
        (whole(1), True),
        (whole(1), "9" * 5000),
        (choice(2, 4), 3),
        (choice(0, 1), True),
        (WINDOWS, "some"),
        (FRACTION, "nan"),
        (FRACTION, 0),
        (FRACTION, True),
        (FRACTION, 10**400),
        (NBYTES, "0"),
        (NBYTES, "-4GiB"),
        (NBYTES, "4 bananas"),
        (NBYTES, True),
        (EVALS, [["a.txt"]]),
        (EVALS, [""]),
        (FOLDER, 3),
        (FOLDER, "a\0b"),
        (FOLDER, "~nobody-has-this-name/x"),
        (DEVICE, "gpu"),
        (SWITCH, "yes"),
    ],
)
def test_refuses(kind: Kind, given: object) -> None:
    with pytest.raises(ValueError, match=r"^is |^.* is "):
        kind.read(given)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (PART, "95", "is 9500%; write 95% or 0.95"),
        (PART, 95, "is 9500%; write 95% or 0.95"),
        (PART, "101%", "is 101%, and 100% is the most there can be"),
        (SURVIVAL, "90", "is 9000%; write 90% or 0.9"),
        (SURVIVAL, "900%", "is 900%, and 200% is the most there can be"),
        (NBYTES, "4", "is 4 bytes; write 4GiB"),
        (NBYTES, 4096, "is 4096 bytes; write 4096MiB"),
        (NBYTES, "800KiB", "is 819200 bytes, less than 1MiB"),
        (INCREASE, "1", "is 100%: write 1% for 1 per cent, 100% for that"),
        (INCREASE, 5, "is 500%: write 5% for 5 per cent, 500% for that"),
    ],
)
def test_what_lacks_its_sign_or_unit_is_refused(kind: Kind, given: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        kind.read(given)


def test_options_come_by_section_with_their_flags() -> None:
    assert [each.flag for each in options(Sample)] == ["--base", "--count", "--bits", "--again"]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "count: 5\nbits: 2\n")
    assert build(Sample, {"bits": "4", "count": None}, file=file) == Sample(count=5, bits=4)


def test_null_is_the_default_where_that_is_none(tmp_path: Path) -> None:
    assert build(Sample, {}, file=written(tmp_path, "bits:\n")) == Sample()
    with pytest.raises(RecipeError, match="count: None"):
        build(Sample, {}, file=written(tmp_path, "count:\n"))


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    assert build(Sample, {}, file=written(tmp_path, " \n")) == Sample()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("bit: 4", "unknown key 'bit'", "did you mean 'bits'?"),
        ("BASE: x", "unknown key 'BASE'", "did you mean 'base'?"),
        ("xyzzy: 4", "unknown key 'xyzzy'", "known keys: base, count, bits"),
        ("again: true", "unknown key 'again'", None),  # a flag only
        ("count: many", "count: 'many' is not a whole number of at least 1", None),
        ("- a\n- b", "a recipe is a mapping", None),
        ("a: [", "not YAML: line 1", None),
        ("a: &x [*x]\nb: !!int ''", "not YAML", None),
        ("a: !!python/object:os.system x", "not YAML", None),
        (b"\xff\xfe\x00", "not YAML", None),
        ("[" * 1000, "not YAML", None),
        ("#" * (LARGEST_RECIPE + 1), "larger than a recipe can be", None),
    ],
)
def test_a_bad_file_is_one_clear_error(
    tmp_path: Path, text: str | bytes, message: str, hint: str | None
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        build(Sample, {}, file=file)
    assert caught.value.message.startswith(f"{file}: ")
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read: No such file"):
        build(Sample, {}, file=tmp_path / "gone.yaml")


def test_an_alias_bomb_stays_small(tmp_path: Path) -> None:
    levels = [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 9)]
    file = written(tmp_path, "k0: &k0 [x]\n" + "\n".join(levels) + "\ncount: *k8\n")
    with pytest.raises(RecipeError) as caught:
        build(Sample, {}, file=file)
    assert len(caught.value.message) < 1000


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
def test_any_bytes_are_a_recipe_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = written(tmp_path_factory.getbasetemp(), content)
    with contextlib.suppress(RecipeError):
        build(Sample, {}, file=file)
