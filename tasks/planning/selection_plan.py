"""Where the selection of each domain lies, and what determines it: its fingerprint, without choosing any block.

    scores      by the blocks, and the models whose losses on them they are
    selection   by the scores, the teacher's targets (where they are compared), and how much is kept

A domain without `select` (or with `by: field`, which packing decides) has neither. Other shares of the same scores are
other selections: the models are not asked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from storage.corpus.record_paths import store_name
from storage.corpus.selecting import BlockSelect, ByTrajectory
from storage.files import uri
from storage.files.digests import DigestCache
from storage.fingerprint import fingerprint
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.stores.layout import FORMAT_VERSION
from tasks.planning.models import check_same_tokenizer, local_folder, weight_digests
from tasks.planning.store_plan import Plan, StorePlan

SHARD_BLOCKS = 256
"""Of scores: what is lost at most when scoring is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPlan:
    """One domain's (one leaf's) scores and selection: where they lie, and what they are to hold."""

    domain: str
    select: BlockSelect
    models: tuple[str, ...]
    """Whose losses are the scores: a model's folder; or the steps of a run's checkpoints, as text."""
    scores_url: str
    scores_inputs: Mapping[str, Any]
    scores_dims: Mapping[str, int]
    selection_url: str
    selection_inputs: Mapping[str, Any]
    selection_dims: Mapping[str, int]


def plan_selections(root: str, plan: Plan, student: StudentConfig) -> dict[str, SelectionPlan]:
    """The plan of every domain whose blocks are chosen.

    Raises:
        UserError: a reference or a run is not there, or does not fit.
    """
    chosen = {domain: store for domain, store in plan.domains.items() if store.corpus.block_select is not None}
    digests = DigestCache(uri.join(root, "digests.json"))
    return {domain: _planned(root, plan, store, student, digests) for domain, store in chosen.items()}


def _planned(root: str, plan: Plan, store: StorePlan, student: StudentConfig, digests: DigestCache) -> SelectionPlan:
    select = store.corpus.block_select
    if select is None:
        raise ValueError(f"domain '{store.domain}' selects no blocks")
    field = f"domains.{store.domain}.select"
    if isinstance(select, ByTrajectory):
        models, described = _checkpoints(root, select.run, field)
    else:
        models, described = _reference(plan, select.reference, student, field, digests)
    scores_inputs = {
        "kind": "scores",
        "format": FORMAT_VERSION,
        "blocks": fingerprint(store.blocks_inputs),
        "models": described,
    }
    selection_inputs = {
        "kind": "selections",
        "format": FORMAT_VERSION,
        "scores": fingerprint(scores_inputs),
        # Only the difference is taken from what the teacher says.
        **({} if isinstance(select, ByTrajectory) else {"targets": fingerprint(store.targets_inputs)}),
        "select": select.model_dump(exclude={"reference", "run"}),
    }
    dims = {"seq_len": plan.seq_len, "vocab_size": plan.vocab_size, "shard_blocks": SHARD_BLOCKS}
    return SelectionPlan(
        domain=store.domain,
        select=select,
        models=models,
        scores_url=_url(root, "scores", scores_inputs, store.domain),
        scores_inputs=scores_inputs,
        scores_dims={**dims, "models": len(models)},
        selection_url=_url(root, "selections", selection_inputs, store.domain),
        selection_inputs=selection_inputs,
        selection_dims=dims,
    )


def _url(root: str, kind: str, inputs: Mapping[str, Any], domain: str) -> str:
    return uri.join(root, kind, fingerprint(inputs), store_name(domain))


def _reference(
    plan: Plan, reference: str | None, student: StudentConfig, field: str, digests: DigestCache
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The folder of the model that is compared with the teacher, and its weights' digests."""
    if reference is None:
        folder = local_folder(student.model, student.revision, "student.model")
    else:
        folder = local_folder(reference, None, f"{field}.reference")
        try:
            check_same_tokenizer(plan.teacher_folder, folder)
        except UserError as error:
            raise UserError(f"{field}.reference is '{reference}': {error}") from None
    return (folder,), {"reference": weight_digests(folder, digests, f"{field}.reference")}


def _checkpoints(root: str, run: str, field: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The steps of a finished run's checkpoints, and the digests of their files.

    Raises:
        UserError: there is no such finished run, or it kept too few.
    """
    folder = RunFolder(root, run)
    identity = folder.identity()
    if identity is None or folder.summary() is None:
        raise UserError(f"{field}.run is '{run}', which is not a finished run below {root}; train it first")
    checkpoints = CheckpointFolder(folder.url)
    steps = checkpoints.steps()
    if len(steps) < 2:
        raise UserError(
            f"{field}.run is '{run}', which has {len(steps)} checkpoint; trajectories need at least two: train it with "
            f"a larger train.keep_checkpoints"
        )
    files = {str(step): checkpoints.digests(step) for step in steps}
    return tuple(map(str, steps)), {"run": fingerprint(identity), "checkpoints": files}


def store_fingerprints(plan: Plan, selections: Mapping[str, SelectionPlan]) -> dict[str, dict[str, str]]:
    """Names of the folders of each domain's stores, by kind, as a run's identity has them."""
    urls = {
        domain: {
            "blocks": store.blocks_url,
            "targets": store.targets_url,
            **({"selections": selections[domain].selection_url} if domain in selections else {}),
        }
        for domain, store in plan.domains.items()
    }
    return {domain: {kind: url.split("/")[-2] for kind, url in of.items()} for domain, of in urls.items()}
