"""A release, opened again and proved: every check has a name, and none is skipped in silence."""

from __future__ import annotations

from pathlib import Path

from qmerge.errors import InputError
from qmerge.model.opening import open_model
from qmerge.progress import Progress, Silent
from qmerge.results import REPORT, RunResult
from qmerge.verify.files import check_files, check_index, check_report
from qmerge.verify.findings import Check, Findings, Verification
from qmerge.verify.loaders import Opened, check_settings, check_tokenizer
from qmerge.verify.loading import check_loading, require_loader
from qmerge.verify.proof import Against, check_against
from qmerge.verify.weights import WeightChecks, check_claims

__all__ = ["Against", "Check", "Verification", "verify"]


def verify(
    release: Path,
    *,
    against: Against | None = None,
    load: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Look at everything that a release claims; nothing in it is changed.

    `against` proves the weights from the inputs; `load` loads it in transformers or gptqmodel and
    scores a sample. Raises `InputError` where there is no folder with a report, and where what
    `load` needs is not installed.
    """
    progress = progress or Silent()
    if not (release / REPORT).is_file():
        why = f" holds no {REPORT}" if release.is_dir() else ": no such folder"
        why = ": is a file" if release.is_file() else why
        raise InputError(f"{release}{why}", hint="give the folder of a `qmerge run` release")
    findings = Findings()
    progress.stage("verify", 1)
    progress.step("files")
    result = check_report(release, findings)
    if result is not None and load:
        require_loader(str(_details(result).get("quant_method")))
    if result is not None and result.release is not None:
        check_files(release, result.release.files, findings)
    check_index(release, findings)
    opened = None
    with findings.at("names-and-shapes"):
        opened = _open(release, result, findings, trust_remote_code=trust_remote_code)
    if opened is not None:
        checks = WeightChecks(opened.skeleton, opened.weights)
        with findings.at("weights"):
            checks.run(progress)
            checks.tell(findings, opened.result)
            check_claims(opened.result, checks, findings)
        check_settings(opened, findings)
        check_tokenizer(opened, findings, trust_remote_code=trust_remote_code)
        if against is not None:
            check_against(release, opened.weights, opened.result, against, findings, progress)
        if load:
            progress.stage("load", 1)
            progress.step("transformers or gptqmodel")
            check_loading(opened, findings, trust_remote_code=trust_remote_code)
    return Verification(release=str(release), checks=tuple(findings.checks))


def _open(
    release: Path, result: RunResult | None, findings: Findings, *, trust_remote_code: bool
) -> Opened:
    """The release as a model, if it is one and can be held against a report."""
    skeleton, weights = open_model(release, trust_remote_code=trust_remote_code)
    count = len(weights.names.stored)
    text = f"{count} tensors have the names and shapes that config.json asks for"
    findings.add("names-and-shapes", "pass", text)
    if result is None or result.release is None:
        raise InputError("without a report of the release there is nothing to check it against")
    settings = weights.checkpoint.config.get("quantization_config") or {}
    return Opened(
        folder=release, result=result, skeleton=skeleton, weights=weights, settings=settings
    )


def _details(result: RunResult) -> dict[str, object]:
    return dict(result.release.details) if result.release is not None else {}
