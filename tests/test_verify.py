"""A sound release passes every check; each planted fault is named by the check that is for it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qmerge import cli, precision
from qmerge.errors import InputError
from qmerge.options import build
from qmerge.pipeline import run
from qmerge.recipe import Recipe
from qmerge.release import seal, unseal
from qmerge.reread import read_report
from qmerge.results import REPORT
from qmerge.verify import Against, Verification, proof, verify
from qmerge.verify.findings import Findings
from qmerge.verify.loading import text_at_hand

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00005.safetensors"
KEY, VALUE = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
GATE = "model.layers.0.mlp.gate_proj"
MADE_OF_FILES = ("report", "files-present", "digests", "strays", "index", "names-and-shapes")
MADE_OF_WEIGHTS = ("decoded", "codes", "scales", "zeros", "groups", "siblings", "claims")
MADE_OF_SETTINGS = ("settings", "tokenizer", "vllm-symmetric", "transformers-settings")
FROM_TEXT = ("error", "survival")
PROVED = ("inputs", "untouched", "requantized", "update", *FROM_TEXT)


@pytest.fixture(scope="module")
def against(tiny_nf4: Path, tiny_adapter: Path) -> Against:
    return Against(base=tiny_nf4, adapters=(tiny_adapter,), original=None)


@pytest.fixture(scope="module")
def sound(
    against: Against,
    calibration_text: Path,
    eval_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("verify") / "release"
    asked = {
        "base": str(against.base),
        "adapter": [str(against.adapters[0])],
        "out": str(out),
        "calibration": str(calibration_text),
        "calibration_samples": 16,
        "eval": [f"held_out={eval_text}"],
        "eval_windows": 6,
        "sequence_length": 64,
        "group_size": 32,
    }
    run(build(Recipe, asked))
    return out


@pytest.fixture
def release(sound: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "release"))


def outcomes(found: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in found.checks}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_sound_release_passes(sound: Path, against: Against) -> None:
    before = contents(sound)
    found = verify(sound, against=against)
    assert found.failed == ()
    told = outcomes(found)
    # Its linears are smaller than a tile of vLLM's fastest kernel.
    assert {name for name, outcome in told.items() if outcome != "pass"} == {"vllm-tiles"}
    assert {*MADE_OF_FILES, *MADE_OF_WEIGHTS, *MADE_OF_SETTINGS, *PROVED} <= told.keys()
    assert contents(sound) == before


# Damage that the report's digests show, and often another check as well.


def flip_a_bit(release: Path) -> None:
    data = bytearray((release / SHARD).read_bytes())
    data[-100] ^= 4
    (release / SHARD).write_bytes(data)


def swap_tensors(release: Path) -> None:
    tensors = load_file(release / SHARD)
    for suffix in ("qweight", "scales"):
        key, value = f"{KEY}.{suffix}", f"{VALUE}.{suffix}"
        tensors[key], tensors[value] = tensors[value], tensors[key]
    save_file(tensors, release / SHARD, {"format": "pt"})


def edit_json(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def edit_settings(release: Path, key: str, value: Any) -> None:
    edit_json(release / "config.json", "quantization_config", key, value=value)
    edit_json(release / "quantize_config.json", key, value=value)


def wrong_group_size(release: Path) -> None:
    edit_json(release / "config.json", "quantization_config", "group_size", value=64)


def lose_tokenizer(release: Path) -> None:
    (release / "tokenizer.json").unlink()


def stale_index(release: Path) -> None:
    edit_json(
        release / INDEX, "weight_map", f"{KEY}.qweight", value="model-00003-of-00005.safetensors"
    )


def index_lacks_a_tensor(release: Path) -> None:
    edit_json(release / INDEX, "weight_map", f"{KEY}.qweight", value=None)


def wrong_total(release: Path) -> None:
    edit_json(release / INDEX, "metadata", "total_size", value=5)


def second_weights(release: Path) -> None:
    shutil.copy(release / SHARD, release / "model-00006-of-00006.safetensors")


def torn_write(release: Path) -> None:
    (release / ".config.json.tmp").write_text("{")


def cut_a_shard(release: Path) -> None:
    (release / SHARD).write_bytes((release / SHARD).read_bytes()[:-1])


def better_figures(release: Path) -> None:
    text = (release / REPORT).read_text()
    (release / REPORT).write_text(text.replace('"perplexity": ', '"perplexity": 1', 1))


def other_recipe(release: Path) -> None:
    file = release / "qmerge_recipe.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (flip_a_bit, {"digests"}),
        (swap_tensors, {"digests"}),
        (wrong_group_size, {"digests", "names-and-shapes"}),
        (lose_tokenizer, {"files-present", "tokenizer"}),
        (stale_index, {"digests", "index", "names-and-shapes"}),
        (index_lacks_a_tensor, {"digests", "index"}),
        (wrong_total, {"digests", "index"}),
        (second_weights, {"strays", "index"}),
        (torn_write, {"strays"}),
        (cut_a_shard, {"digests", "index", "names-and-shapes"}),
        (better_figures, {"report"}),
        (other_recipe, {"digests"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(release: Path, harm: Callable[[Path], None], names: set[str]) -> None:
    harm(release)
    assert names <= set(verify(release).failed)


def test_a_folder_without_a_report_is_no_release(release: Path) -> None:
    (release / REPORT).unlink()
    with pytest.raises(InputError, match=f"holds no {REPORT}") as error:
        verify(release)
    assert "qmerge run" in (error.value.hint or "")


# The same with the report made to fit, so that the digests say nothing.


def edit_tensors(release: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change one shard's tensors, and the index where names have changed."""
    tensors = load_file(release / SHARD)
    change(tensors)
    save_file(tensors, release / SHARD, {"format": "pt"})
    index = json.loads((release / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != SHARD}
    index["weight_map"] |= dict.fromkeys(tensors, SHARD)
    total = [load_file(file) for file in release.glob("*.safetensors")]
    index["metadata"]["total_size"] = sum(t.nbytes for part in total for t in part.values())
    (release / INDEX).write_text(json.dumps(index))


def edit_report(release: Path, *keys: str, value: Any) -> None:
    report = unseal((release / REPORT).read_text())
    assert report is not None
    (release / REPORT).write_text(report)
    edit_json(release / REPORT, *keys, value=value)


def forge(release: Path) -> None:
    """Digests and seal as if the report had been written for what is there now."""
    text = (release / REPORT).read_text()
    report = json.loads(unseal(text) or text)
    files = report["release"]["files"]
    for name in files:
        files[name] = hashlib.sha256((release / name).read_bytes()).hexdigest()
    (release / REPORT).write_text(seal(json.dumps(report, indent=2) + "\n"))


def left_in_16_bits(release: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "g_idx", "scales"):
            shape = tensors.pop(f"{GATE}.{suffix}").shape
        tensors[f"{GATE}.weight"] = torch.zeros(shape[1], 64, dtype=torch.bfloat16)

    edit_tensors(release, change)


def set_tensor(name: str, change: Callable[[torch.Tensor], None]) -> Callable[[Path], None]:
    return lambda release: edit_tensors(release, lambda tensors: change(tensors[name]))


def assign(place: Any, value: Any) -> Callable[[torch.Tensor], None]:
    return lambda tensor: tensor.__setitem__(place, value)


def swap_columns(tensor: torch.Tensor) -> None:
    tensor[[0, 40]] = tensor[[40, 0]]


def asymmetric(release: Path) -> None:
    edit_settings(release, "sym", False)


def second_version(release: Path) -> None:
    edit_settings(release, "checkpoint_format", "gptq_v2")


def no_act_order_key(release: Path) -> None:
    edit_settings(release, "desc_act", None)


def settings_apart(release: Path) -> None:
    edit_json(release / "quantize_config.json", "desc_act", value=True)


def head_claimed(release: Path) -> None:
    edit_settings(release, "lm_head", True)


def keeps_out_too_much(release: Path) -> None:
    edit_settings(release, "dynamic", {f"-:^{KEY}$": {}})


def no_architecture(release: Path) -> None:
    edit_json(release / "config.json", "architectures", value=[])


def head_stored_twice(release: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(512, 64, dtype=torch.bfloat16)

    edit_tensors(release, change)


def no_format(release: Path) -> None:
    save_file(load_file(release / SHARD), release / SHARD)


def longer_tokenizer(release: Path) -> None:
    file = release / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 600, "content": "<more>"})
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (left_in_16_bits, {"claims", "siblings", "kept-modules"}),
        (set_tensor(f"{KEY}.scales", assign((0, 0), torch.nan)), {"decoded"}),
        (set_tensor(f"{KEY}.scales", assign((0, 0), 0)), {"scales"}),
        (set_tensor(f"{KEY}.qzeros", assign((0, 0), 5)), {"zeros"}),
        (set_tensor(f"{KEY}.g_idx", assign(0, 9)), {"decoded"}),
        (set_tensor(f"{KEY}.g_idx", assign(0, 1)), {"groups", "act-order", "siblings"}),
        (set_tensor(f"{KEY}.g_idx", swap_columns), {"act-order", "siblings"}),
        (set_tensor("model.layers.0.self_attn.k_norm.weight", assign(0, torch.inf)), {"dense"}),
        (asymmetric, {"settings", "vllm-symmetric"}),
        (second_version, {"zeros", "vllm-format"}),
        (no_act_order_key, {"vllm-keys"}),
        (settings_apart, {"settings-twice"}),
        (head_claimed, {"vllm-head"}),
        (keeps_out_too_much, {"names-and-shapes"}),
        (no_architecture, {"transformers-architectures"}),
        (head_stored_twice, {"transformers-tied-head"}),
        (no_format, {"safetensors-metadata"}),
        (longer_tokenizer, {"tokenizer", "tokenizer-files"}),
    ],
)
def test_a_forged_report_does_not_help(
    release: Path, harm: Callable[[Path], None], names: set[str]
) -> None:
    harm(release)
    forge(release)
    found = verify(release)
    assert names <= set(found.failed), found.failed
    assert not {"report", "digests", "files-present"} & set(found.failed)


@pytest.fixture(scope="module")
def others(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Releases in other forms."""
    made = {}
    for form, symmetric, order in (
        ("compressed-tensors", True, "group"),
        ("gptq_v2", False, "full"),
    ):
        made[form] = tmp_path_factory.mktemp("others") / form
        recipe = build(Recipe, {"out": str(made[form])}, file=sound / "qmerge_recipe.yaml")
        asked = {"format": form, "symmetric": symmetric, "act_order": order}
        run(Recipe(**{**vars(recipe), **asked}))
    return made


def test_releases_in_other_forms_pass(others: dict[str, Path], against: Against) -> None:
    found = {form: verify(release, against=against) for form, release in others.items()}
    assert [each.failed for each in found.values()] == [(), ()]
    # What vLLM does not take was asked for: no failure, and told.
    told = outcomes(found["gptq_v2"])
    assert told["vllm-symmetric"] == told["vllm-format"] == "note"
    assert told["act-order"] == "pass"
    told = outcomes(found["compressed-tensors"])
    assert {"compressed-format", "compressed-status", "kept-modules", "vllm-bits"} <= told.keys()


@pytest.mark.parametrize(
    ("keys", "value", "name"),
    [
        (("format",), "dense", "compressed-format"),
        (("quantization_status",), "frozen", "compressed-status"),
        (("config_groups", "group_0", "weights", "strategy"), "channel", "compressed-strategy"),
        (("ignore",), [], "kept-modules"),
    ],
)
def test_settings_of_compressed_tensors_are_demanded(
    others: dict[str, Path], tmp_path: Path, keys: tuple[str, ...], value: Any, name: str
) -> None:
    release = Path(shutil.copytree(others["compressed-tensors"], tmp_path / "release"))
    edit_json(release / "config.json", "quantization_config", *keys, value=value)
    forge(release)
    found = verify(release)
    assert {name, "names-and-shapes"} & set(found.failed), found.failed


def other_norm(release: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_norm.weight"][0] *= 1.01

    edit_tensors(release, change)


def one_code_less(release: Path) -> None:
    set_tensor(f"{KEY}.qweight", lambda t: t.__setitem__((0, 0), t[0, 0] ^ 15))(release)


def first_survival(release: Path, key: str) -> tuple[str, ...]:
    return ("layers", "0", "linears", "0", "survival", key)


def more_survival(release: Path) -> None:
    edit_report(release, *first_survival(release, "survival"), value=1.2)


def other_update(release: Path) -> None:
    edit_report(release, *first_survival(release, "update_rms"), value=1.0)


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (swap_tensors, {"requantized", "update", "survival"}),
        (other_norm, {"untouched"}),
        (one_code_less, {"error"}),
        (more_survival, {"survival"}),
        (other_update, {"update"}),
    ],
)
def test_a_proof_from_the_inputs_sees_what_no_digest_does(
    release: Path, against: Against, harm: Callable[[Path], None], names: set[str]
) -> None:
    harm(release)
    forge(release)
    assert verify(release).failed == ()
    assert names <= set(verify(release, against=against).failed)


def test_a_proof_from_other_inputs_fails(
    sound: Path, against: Against, tiny_original: Path, tmp_path: Path
) -> None:
    other = Against(base=tiny_original, adapters=against.adapters, original=None)
    found = verify(sound, against=other)
    assert {"inputs", "error", "survival"} <= set(found.failed)
    found = verify(sound, against=Against(base=against.base, adapters=(), original=None))
    assert "inputs" in found.failed


def test_a_plain_one_is_measured_again_in_the_precision_of_its_run(
    sound: Path, against: Against, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    monkeypatch.setattr(precision, "_backends", lambda: {"cpu": (matmul, "bf16")})
    asked = {"out": str(tmp_path / "plain"), "objective": "symmetric"}
    result = run(build(Recipe, asked, file=sound / "qmerge_recipe.yaml"))
    assert result.versions.get("matrix units") == "bf16"
    monkeypatch.setattr(proof, "FAR", 1e-4)
    assert verify(tmp_path / "plain", against=against).failed == ()


def test_what_was_merged_onto_the_original_is_proved_from_it(
    sound: Path, against: Against, tiny_original: Path, tmp_path: Path
) -> None:
    recipe = build(Recipe, {"out": str(tmp_path / "again")}, file=sound / "qmerge_recipe.yaml")
    asked = {**vars(recipe), "strategy": "substitute", "original": tiny_original}
    run(Recipe(**asked))
    (failed,) = [
        c for c in verify(tmp_path / "again", against=against).checks if c.outcome == "fail"
    ]
    assert failed.name == "inputs"
    assert "onto the original" in failed.text
    whole = Against(base=against.base, adapters=against.adapters, original=tiny_original)
    found = verify(tmp_path / "again", against=whole)
    assert found.failed == ()
    (untouched,) = [check for check in found.checks if check.name == "untouched"]
    assert "the original's" in untouched.text


def test_weights_that_training_replaced_are_proved(
    sound: Path, against: Against, tmp_path: Path
) -> None:
    """A norm that was trained as a whole is written as it was trained, rounded once."""
    state = tmp_path / "state.safetensors"
    save_file({"model.norm.weight": torch.linspace(0.5, 1.5, 64)}, state)
    recipe = build(Recipe, {"out": str(tmp_path / "again")}, file=sound / "qmerge_recipe.yaml")
    run(Recipe(**{**vars(recipe), "adapter": (), "partial_state": state}))
    alone = Against(base=against.base, adapters=(), original=None)
    found = verify(tmp_path / "again", against=alone)
    assert found.failed == ()
    (merged,) = [check for check in found.checks if check.name == "merged"]
    assert merged.text.startswith("1 tensors")
    last = tmp_path / "again" / "model-00005-of-00005.safetensors"
    tensors = load_file(last)
    tensors["model.norm.weight"][0] *= 1.01
    save_file(tensors, last, {"format": "pt"})
    forge(tmp_path / "again")
    assert verify(tmp_path / "again", against=alone).failed[:1] == ("merged",)


def test_a_merged_weight_may_be_an_ulp_off(sound: Path, against: Against, tmp_path: Path) -> None:
    """Merged on another device, a sum in float32 may fall on the other side of a rounding."""
    recipe = build(Recipe, {"out": str(tmp_path / "again")}, file=sound / "qmerge_recipe.yaml")
    run(Recipe(**{**vars(recipe), "override": ("*.layers.0.self_attn.o_proj=skip",)}))

    def next_larger(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors["model.layers.0.self_attn.o_proj.weight"].flatten()
        flat.view(torch.int16)[flat.abs().argmax()] += 1

    outcome = []
    for _ in range(2):
        edit_tensors(tmp_path / "again", next_larger)
        forge(tmp_path / "again")
        outcome.append(verify(tmp_path / "again", against=against).failed)
    assert outcome == [(), ("merged",)]


@pytest.mark.parametrize(("off", "same"), [(3e-7, True), (3e-6, False), (torch.nan, False)])
def test_where_sums_cancel_an_ulp_is_less_than_float32_tells(off: float, same: bool) -> None:
    merged, stored = (torch.tensor([-1.0, small]).bfloat16() for small in (1e-9, off))
    assert proof._same_but_for_sums(stored, merged) is same


def lose_text(release: Path, key: str, value: Any) -> None:
    """Name another text in the recipe, and in the digests."""
    file = release / "qmerge_recipe.yaml"
    asked = yaml.safe_load(file.read_text())
    assert key in asked
    file.write_text(yaml.safe_dump({**asked, key: value}))
    forge(release)


def test_without_the_text_survival_is_skipped_and_the_rest_is_proved(
    release: Path, against: Against, tmp_path: Path
) -> None:
    lose_text(release, "calibration", f"{tmp_path}/gone.txt")
    found = verify(release, against=against)
    told = outcomes(found)
    assert {told[name] for name in FROM_TEXT} == {"skip"}
    assert told["update"] == told["untouched"] == told["requantized"] == "pass"
    (skip,) = [check for check in found.checks if check.name == "survival"]
    assert "gone.txt: no such file" in skip.text


def test_what_only_a_run_needs_is_not_asked_of_a_proof(
    release: Path, against: Against, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither evaluation text, nor memory and disk for the run."""
    lose_text(release, "eval", [f"held_out={tmp_path}/gone.txt"])
    monkeypatch.setattr("qmerge.machine.memory_size", lambda _: 0)
    monkeypatch.setattr("qmerge.machine.disk_free", lambda _: 0)
    told = outcomes(verify(release, against=against))
    assert {told[name] for name in PROVED} == {"pass"}


needs_loader = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="loading a release needs the extra 'verify'",
)


@needs_loader
def test_loading_reproduces_the_perplexity(release: Path) -> None:
    """As reported, and on the same text under another name not as a forged report says."""
    report = json.loads((release / REPORT).read_text())
    score, text = report["arms"]["release"]["held_out"], report["corpora"]["evaluation"]["held_out"]
    edit_report(release, "corpora", "evaluation", "forged", value={**text, "name": "forged"})
    forged = {**score, "window_nll": [5.0] * 6}
    edit_json(release / REPORT, "arms", "release", "forged", value=forged)
    forge(release)
    found = {check.name: check for check in verify(release, load=True).checks}
    assert found["loads"].outcome == found["perplexity-held_out"].outcome == "pass"
    assert found["perplexity-forged"].outcome == "fail"
    assert "148.4 in the report" in found["perplexity-forged"].text  # e to the fifth


@pytest.mark.parametrize("other", [False, True], ids=["gone", "other"])
def test_text_that_is_not_at_hand_is_a_skip(
    release: Path, calibration_text: Path, other: bool
) -> None:
    source = str(calibration_text) if other else "gone.txt"
    edit_report(release, "corpora", "evaluation", "held_out", "source", value=source)
    findings = Findings()
    result = read_report(release)
    assert text_at_hand(release, result, findings, trust_remote_code=False) == []
    (check,) = findings.checks
    assert (check.name, check.outcome) == ("perplexity-held_out", "skip")
    assert ("another digest" if other else "gone.txt: no such file") in check.text


def test_commands(
    sound: Path, against: Against, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.status(["verify", str(sound)]) == 0
    told = capsys.readouterr()
    assert "pass  digests" in told.out
    assert "error" not in told.err
    pair = [str(against.base), str(against.adapters[0])]
    assert cli.status(["verify", str(sound), "--against", *pair]) == 0
    assert "pass  untouched" in capsys.readouterr().out
    assert cli.status(["verify", str(sound), "--against", *reversed(pair)]) == 1
    assert "error: failed: inputs" in capsys.readouterr().err
    lose_tokenizer(release)
    assert cli.status(["verify", str(release), "--json"]) == 1
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert answer["failed"][:1] == ["files-present"]
    assert {"name", "outcome", "text"} == answer["checks"][0].keys()
    assert told.err.splitlines()[-1].startswith("error: failed: files-present, ")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["verify", "nowhere"], "nowhere: no such folder"),
        (["verify", ".", "--against-adapter", "a"], "missing: --against-base"),
        (["verify", ".", "--against", "b", "a", "--against-base", "b"], "leave out --against-base"),
    ],
)
def test_bad_words(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(words) == 2
    assert error in capsys.readouterr().err


def test_loading_without_the_packages_is_told_before_any_work(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="gptqmodel and optimum"):
        verify(sound, load=True)
