"""What the benchmarks share: models to work on, and processes whose time and memory is taken.

A contender is a function that runs in a process of its own, so that its peak memory is its own. It
comes back with seconds and with the peak of resident memory above what its imports alone took.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

VOCABULARY = 8192
MARK = "taken: "


@dataclass(frozen=True)
class Taken:
    """What one contender took; memory in bytes. `core_seconds` is the processor's time over all
    cores, in which threads that wait for one another spin."""

    seconds: float
    core_seconds: float
    process_seconds: float
    memory: int
    imports: int


def peak() -> int:
    """The most memory that this process has had resident, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("no VmHWM in /proc/self/status")


@contextmanager
def taking() -> Iterator[None]:
    """Around a contender's work, once all it needs has been imported; told to `contend`."""
    imports, began, cores = peak(), time.perf_counter(), time.process_time()
    yield
    taken = {
        "seconds": time.perf_counter() - began,
        "core_seconds": time.process_time() - cores,
        "memory": peak() - imports,
        "imports": imports,
    }
    print(MARK + json.dumps(taken), flush=True)


def import_early() -> None:
    """What qmerge imports only where it is needed; other engines have imported theirs by then."""
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401


def contend(script: Path, name: str, *arguments: str, python: str = sys.executable) -> Taken:
    """Run `script --contender NAME ARGUMENTS` under an interpreter of the contender's."""
    command = [python, str(script), "--contender", name, *arguments]
    began = time.perf_counter()
    # gptqmodel's worker pool does not start with fewer than two.
    environment = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - began
    told = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not told:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Taken(process_seconds=seconds, **json.loads(told[-1].removeprefix(MARK)))


def median(taken: Sequence[Taken]) -> Taken:
    """The median of each figure of several runs of one contender."""
    each = zip(*map(astuple, taken), strict=True)
    return Taken(*map(statistics.median, each))


def dispatch(contenders: Mapping[str, Callable[..., None]]) -> bool:
    """Whether this process is a contender; its function is called with the other arguments."""
    if sys.argv[1:2] != ["--contender"]:
        return False
    contenders[sys.argv[2]](*sys.argv[3:])
    return True


def table(rows: Mapping[str, Taken], ours: str) -> Iterator[str]:
    """Seconds and MiB of each; unless it is a part of another (indented), what ours is of it."""
    own = rows[ours]
    yield f"{'':<28}{'work':>9}{'on cores':>10}{'process':>10}{'memory':>11}{'imports':>11}"
    for name, took in rows.items():
        line = (
            f"{name:<28}{took.seconds:>7.1f} s{took.core_seconds:>8.1f} s"
            f"{took.process_seconds:>8.1f} s"
            f"{took.memory / 2**20:>7.0f} MiB{took.imports / 2**20:>7.0f} MiB"
        )
        if took is not own and not name.startswith(" "):
            line += (
                f"   {ours} takes {own.seconds / took.seconds:.2f} of the time,"
                f" {own.core_seconds / took.core_seconds:.2f} of the cores' time,"
                f" {own.memory / took.memory:.2f} of the memory"
            )
        yield line


def record(rows: Mapping[str, Taken]) -> str:
    return json.dumps({name: asdict(took) for name, took in rows.items()}, indent=2)


def layer_inputs(model: Path) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Layers of a model of Qwen3's make; each distinct input of the linears of one, its width and
    the out features that read it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = ((hidden, queries + 2 * keys), (queries, hidden))
    return config.num_hidden_layers, (*attention, (hidden, 2 * inner), (inner, hidden))


def matmul_rate() -> float:
    """Floating-point operations a second of a large fp32 product on this machine."""
    import torch

    matrix = torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def topics() -> list[str]:
    """English text that every Python has."""
    from qmerge.demo import reference_topics

    return list(reference_topics().values())


def write_text(file: Path) -> Path:
    file.write_text("\n\n".join(topics()), encoding="utf-8")
    return file


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of the interpreter's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(topics(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="!").save_pretrained(folder)


def write_model(folder: Path, layers: int) -> None:
    """The shape of Qwen3-0.6B with random weights, fewer layers and a small vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")


def write_adapter(folder: Path, model: Path) -> None:
    """A LoRA on every linear of a dense model, whose update is about a 4-bit step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=5e-2)
    tuned.save_pretrained(folder)


def write_tokens(file: Path, model: Path, text: Path, role: str, windows: int, length: int) -> None:
    """The windows of a text that qmerge would take, for others to take too."""
    from safetensors.torch import save_file

    from qmerge.corpus import load_corpus
    from qmerge.texts import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=False)
    corpus = load_corpus(
        str(text),
        tokenizer,
        sequence_length=length,
        role="calibration" if role == "calibration" else "in_domain",
        name=role,
        windows=windows,
    )
    save_file({"tokens": corpus.tokens}, file)


def read_tokens(file: Path) -> list[list[int]]:
    from safetensors.torch import load_file

    found: list[list[int]] = load_file(file)["tokens"].tolist()
    return found
