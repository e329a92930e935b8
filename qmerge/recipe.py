"""What was asked: one frozen dataclass per job, with the help text beside each option.

The fields are the keys of a recipe file and the flags of the command line. Whether paths exist and
models fit together is for the plan to find out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qmerge import specs
from qmerge.errors import Fault, RecipeError
from qmerge.names import matches
from qmerge.options import (
    ADAPTERS,
    BASE_QUANT,
    DEVICE,
    EVALS,
    FILE,
    FOLDER,
    FRACTION,
    INCREASE,
    NBYTES,
    OVERRIDES,
    PART,
    PATTERNS,
    SHARE,
    SPEC,
    SURVIVAL,
    SWITCH,
    TEXT,
    WINDOWS,
    choice,
    option,
    options,
    whole,
)
from qmerge.specs import Contestant, EvalText, Override, WeightedAdapter

# The words that an option takes, and all code that acts on them.
Strategy = Literal["dequantize", "substitute", "auto"]
ActOrder = Literal["none", "group", "full"]
GridChoice = Literal["fresh", "anchored", "auto"]
Objective = Literal["asymmetric", "symmetric"]
OutputFormat = Literal["gptq", "gptq_v2", "compressed-tensors"]
Combination = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""PEFT's names for the ways to combine LoRA adapters."""
Dtype = Literal["float32", "bfloat16", "float16"]


def _survival_limit(
    help: str = "Lowest survival of the adapter over the whole model.",
) -> Any:
    """The option of those jobs that know how much of an adapter is left."""
    return option(None, SURVIVAL, "Gate", help, unset="no limit")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What every job that scores models is told."""

    eval: tuple[str, ...] = option(
        (),
        EVALS,
        "Text",
        "Text to score on; may be repeated. SPEC is FILE.txt, FILE.jsonl[:COLUMN],"
        " FILE.parquet[:COLUMN], the name of a recipe in calibration/, or"
        " hub:ORG/NAME[@REV]/CONFIG/SPLIT[:COLUMN]. The first is the in-domain one unless another"
        " is named in_domain; one named general never is.",
        unset="the offline recipe",
    )
    eval_windows: int | Literal["all"] = option(
        256,
        WINDOWS,
        "Text",
        "Windows of each evaluation text that are scored, from its start; at most what it holds.",
    )
    sequence_length: int | None = option(
        None,
        whole(2),
        "Text",
        "Tokens in a window, of calibration and evaluation alike.",
        unset="2048, or the model's own limit if smaller",
    )
    device: str = option(
        "auto", DEVICE, "Machine", "Where layers are run: auto, cpu, cuda or cuda:N."
    )
    trust_remote_code: bool = option(
        False, SWITCH, "Machine", "Run model code that comes with the checkpoint."
    )

    max_ppl_increase: float | None = option(
        None,
        INCREASE,
        "Gate",
        "Highest increase of perplexity against the reference, on every corpus.",
        unset="no limit",
    )
    max_kl: float | None = option(
        None,
        SHARE,
        "Gate",
        "Highest mean KL from the reference, in nats per token, on every corpus.",
        unset="no limit",
    )
    min_same_top: float | None = option(
        None,
        PART,
        "Gate",
        "Lowest share of tokens on which the likeliest one is the reference's, on every corpus.",
        unset="no limit",
    )

    def eval_texts(self) -> tuple[EvalText, ...]:
        """The evaluation corpora with name and role, in the order given; names may collide."""
        return specs.eval_texts(self.eval)

    def faults(self) -> tuple[Fault, ...]:
        """Options that contradict one another, for the plan to list among its own."""
        return _repeated([text.name for text in self.eval_texts()], "--eval")

    def to_yaml(self) -> str:
        """The recipe as a file that `qmerge run` reads; equal recipes give equal text."""
        import yaml

        keys = [each for each in options(type(self)) if not each.transient]
        plain = {each.name: each.kind.write(_plain(getattr(self, each.name))) for each in keys}
        readable = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(readable) == plain:
            return readable
        return yaml.safe_dump(plain, sort_keys=False)  # a name holds what only escapes preserve


@dataclass(frozen=True, kw_only=True)
class Recipe(Scoring):
    """The main job. None for bits, group size and symmetry means as the base has them."""

    base: Path = option(
        MISSING, FOLDER, "Models", "The base that the adapter was trained on, 4-bit or dense."
    )
    adapter: tuple[str, ...] = option(
        (),
        ADAPTERS,
        "Models",
        "An adapter as PEFT saved it; may be repeated. Each is merged on the result of the one"
        " before, with its weight.",
        unset="none",
    )
    out: Path = option(MISSING, FOLDER, "Models", "The release; must not exist yet.")
    original: Path | None = option(
        None, FOLDER, "Models", "The 16-bit original of the base.", unset="none"
    )
    strategy: Strategy = option(
        "dequantize",
        choice(*get_args(Strategy)),
        "Models",
        "Merge onto the decoded base, onto the original, or make both and publish the one that is"
        " nearer to what was trained.",
    )
    previous: Path | None = option(
        None,
        FOLDER,
        "Models",
        "An earlier release, to be scored as an arm of its own and compared with the new one.",
        unset="none",
    )
    base_quant: str | None = option(
        None,
        BASE_QUANT,
        "Models",
        "How training quantized a dense base when it loaded it; none where it did not.",
        unset="what the files beside the adapter say, else none",
    )
    force: bool = option(
        False, SWITCH, "Models", "Take --original for the base's original whatever the weights say."
    )
    combine: Combination | None = option(
        None,
        choice(*get_args(Combination)),
        "Models",
        "Make one adapter of several first, as PEFT's add_weighted_adapter does.",
        unset="merge them one after another",
    )
    density: float | None = option(
        None,
        FRACTION,
        "Models",
        "Share of values that a pruning --combine keeps.",
        unset="none",
    )
    only: tuple[str, ...] = option(
        (),
        PATTERNS,
        "Models",
        "Merge the adapter into these modules only; may be repeated. PATTERN is a glob over module"
        " names, or a regular expression after re:.",
        unset="all that it targets",
    )
    exclude: tuple[str, ...] = option(
        (),
        PATTERNS,
        "Models",
        "Leave these modules as the base has them; may be repeated.",
        flag="--except",
        unset="none",
    )
    partial_state: Path | None = option(
        None,
        FILE,
        "Models",
        "A file of whole parameters that training saved, alone or beside an adapter, which is"
        " merged on them.",
        unset="none",
    )
    allow_noop: bool = option(
        False, SWITCH, "Models", "Go on with an adapter that changes nothing."
    )
    calibration: str | None = option(
        None,
        SPEC,
        "Text",
        "Text that the quantizer sees; SPEC as for --eval.",
        unset="the offline recipe; text of the adapter's own kind is better",
    )
    calibration_samples: int = option(
        128, whole(1), "Text", "Windows of calibration text; at most what it holds."
    )
    bits: int | None = option(
        None,
        choice(2, 3, 4, 8),
        "Quantizer",
        "Bits of a code.",
        unset="a GPTQ or compressed-tensors base's, else 4",
    )
    group_size: int | None = option(
        None,
        choice(-1, 32, 64, 128),
        "Quantizer",
        "Input columns that share a step; -1 is one group for all.",
        unset="a GPTQ or compressed-tensors base's, else 128",
    )
    symmetric: bool | None = option(
        None,
        SWITCH,
        "Quantizer",
        "Whether the zero point is fixed in the middle of the codes.",
        flag="--sym/--asym",
        unset="a GPTQ base's, else --sym",
    )
    act_order: ActOrder = option(
        "group",
        choice(*get_args(ActOrder)),
        "Quantizer",
        "Columns are rounded as they stand, by decreasing diagonal of the Hessian, or so and"
        " grouped in that order too (desc_act).",
    )
    grid: GridChoice = option(
        "auto",
        choice(*get_args(GridChoice)),
        "Quantizer",
        "Steps fitted anew, a GPTQ base's own, or for each row of a weight those that lose less.",
    )
    unit_survival: bool = option(
        True,
        SWITCH,
        "Quantizer",
        "Push the target out until the adapter's update survives rounding whole.",
        flag="--unit-survival/--no-unit-survival",
    )
    refine: bool = option(
        True,
        SWITCH,
        "Quantizer",
        "Refit steps once codes are chosen, and round again on them.",
        flag="--refine/--no-refine",
    )
    objective: Objective = option(
        "asymmetric",
        choice(*get_args(Objective)),
        "Quantizer",
        "Aim at what the merged model computes on its own inputs, or at its weights.",
    )
    damping: float = option(
        0.01,
        FRACTION,
        "Quantizer",
        "Share of the Hessian's mean diagonal added to it; rises by itself where it must.",
    )
    override: tuple[str, ...] = option(
        (),
        OVERRIDES,
        "Quantizer",
        "Other settings for the modules whose names PATTERN fits (as for --only); may be repeated,"
        " later ones win. SETTINGS is bits:N, group:N or both with a comma between, or skip, which"
        " leaves a module in 16 bits. A head that is not tied is quantized where PATTERN is its"
        " very name, as in lm_head=bits:8.",
        unset="none",
    )
    format: OutputFormat | None = option(
        None,
        choice(*get_args(OutputFormat)),
        "Quantizer",
        "How the release is written.",
        unset="gptq, or gptq_v2 with --asym",
    )
    min_survival: float | None = _survival_limit()
    memory: int = option(
        4 << 30,
        NBYTES,
        "Machine",
        "Memory to plan for, beside that of the imported libraries. What does not fit is worked in"
        " micro-batches and spilled to disk.",
    )
    seed: int = option(0, whole(0), "Machine", "Seed of everything that is drawn.")
    restart: bool = option(
        False,
        SWITCH,
        "Machine",
        "Throw away what an interrupted run left beside --out.",
        transient=True,
    )

    def adapters(self) -> tuple[WeightedAdapter, ...]:
        """The adapters in the order given, with their weights."""
        return tuple(map(specs.weighted, self.adapter))

    def folders(self) -> dict[str, Path]:
        """The folders that go in, by the roles that a report has for them."""
        single = {"base": self.base, "original": self.original, "previous": self.previous}
        found = {role: folder for role, folder in single.items() if folder is not None}
        several = len(self.adapter) > 1
        for number, each in enumerate(self.adapters(), start=1):
            found[f"adapter {number}" if several else "adapter"] = each.folder
        return found

    def trained(self) -> tuple[Path, ...]:
        """The folders that training saved what it changed in; a later one's tokenizer wins."""
        state = (self.partial_state.parent,) if self.partial_state is not None else ()
        return (*state, *(each.folder for each in self.adapters()))

    def overrides(self) -> tuple[Override, ...]:
        """The overrides in the order given; RecipeError for one that says nothing."""
        return tuple(map(specs.override, self.override))

    def faults(self) -> tuple[Fault, ...]:
        return super().faults() + tuple(self._unreadable())

    def _unreadable(self) -> Iterator[Fault]:
        """Overrides and patterns that cannot be read."""
        given = {"--only": self.only, "--except": self.exclude, "--override": self.override}
        for flag, texts in given.items():
            for text in texts:
                try:
                    matches(specs.override(text).pattern if flag == "--override" else text, "")
                except RecipeError as error:
                    yield Fault(where=flag, message=error.message, hint=error.hint)


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe(Scoring):
    """Checkpoints side by side on the same tokens; `models` are [NAME=]DIR[+ADAPTER]."""

    models: tuple[str, ...] = ()
    reference: str | None = option(
        None,
        TEXT,
        "Models",
        "Name of the checkpoint that the others are compared to.",
        unset="none, and no KL",
    )
    base_quant: str | None = option(
        None,
        BASE_QUANT,
        "Models",
        "How training quantized a dense folder under an adapter when it loaded it; none where it"
        " did not.",
        unset="what the files beside the adapter say, else none",
    )
    min_survival: float | None = _survival_limit(
        "Lowest survival of the adapter, as each release's own report has it."
    )

    def contestants(self) -> tuple[Contestant, ...]:
        """The checkpoints in the order given; names may collide."""
        return tuple(map(specs.contestant, self.models))

    def faults(self) -> tuple[Fault, ...]:
        names = [each.name for each in self.contestants()]
        found = super().faults() + _repeated(names, "checkpoints")
        if self.reference is not None and self.reference not in names:
            message = f"no checkpoint is named {self.reference!r}; there is {', '.join(names)}"
            hint = "give one of those, or a name of your own: NAME=DIR"
            found += (Fault(where="--reference", message=message, hint=hint),)
        return found + self._limits_without_a_reference()

    def _limits_without_a_reference(self) -> tuple[Fault, ...]:
        """A limit is about a checkpoint against another one; survival is of one alone."""
        gate = [each for each in options(Scoring) if each.section == "Gate"]
        if self.reference is None:
            message, hint = "a limit is kept against a reference", "name one with --reference"
        elif len(self.models) < 2:
            message, hint = "there is only the reference", "name the checkpoint to check as well"
        else:
            return ()
        return tuple(
            Fault(where=each.flag, message=message, hint=hint)
            for each in gate
            if getattr(self, each.name) is not None
        )


@dataclass(frozen=True, kw_only=True)
class CompareRecipe(Scoring):
    """Two releases side by side: `old` and `new` are releases or reports or, where there is text
    to score, DIR[+ADAPTER]."""

    old: str
    new: str
    eval: tuple[str, ...] = option(
        (),
        EVALS,
        "Text",
        "Score OLD and NEW side by side on this text, where there are no reports to compare; may"
        " be repeated. SPEC as for `qmerge evaluate`.",
        unset="none: the reports are compared",
    )
    min_survival: float | None = _survival_limit()

    def faults(self) -> tuple[Fault, ...]:
        found = self.scoring().faults() if self.eval else ()
        if self.eval and self.min_survival is not None:
            message = "survival stands in the reports of runs, scoring does not measure it"
            hint = "leave out --eval to compare the reports"
            found += (Fault(where="--min-survival", message=message, hint=hint),)
        return found

    def scoring(self) -> EvaluateRecipe:
        """The evaluation of both, OLD as the reference."""
        asked = {each.name: getattr(self, each.name) for each in options(Scoring)}
        models = (f"old={self.old}", f"new={self.new}")
        return EvaluateRecipe(**asked, models=models, reference="old")


def _repeated(names: Sequence[str], where: str) -> tuple[Fault, ...]:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    hint = "give each a name of its own: NAME=…"
    return tuple(
        Fault(where=where, message=f"the name {name!r} is given twice", hint=hint) for name in twice
    )


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
