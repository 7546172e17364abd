"""The inputs that determine a run's student, and what is read of them from the stores. The student is not loaded.

inputs = RunInputs(settings, plan)     the models are looked at, the stores are not opened yet
inputs.identity                        what the run's folder is claimed with
inputs.job                             what a rank is started with
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

from ddk.concepts import Accuracies
from ddk.data import TrainData
from ddk.domain_tree import depth
from ddk.errors import UserError
from ddk.methods.registry import METHODS, check_method, effective_loss
from ddk.mixture import MixtureConfig
from ddk.train_config import StudentConfig
from storage.blocks import open_blocks
from storage.files.digests import DigestCache
from storage.files.uri import as_json, join
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from storage.targets import teacher_perplexity
from tasks.planning.models import weight_digests
from tasks.planning.preflight import StudentFacts, check_live_teacher, check_student
from tasks.planning.selection_plan import SelectionPlan, plan_selections, store_fingerprints
from tasks.planning.store_plan import Plan
from tasks.training.accuracies import as_identity, read_accuracies, say_what_does_not_match
from tasks.training.ancestry import Ancestry, find_ancestry
from tasks.training.job import TrainingJob, open_data
from tasks.training.run_settings import RunSettings

# What changes how a run goes but not which student comes out (on one machine).
_OPERATIONAL = {
    *("device", "keep_checkpoints", "log_every", "max_hours"),
    *("processes", "nodes", "rendezvous", "parallel", "compile"),
}
_FOLLOWED = {"follow", "accuracy_run", "accuracy_model", "accuracy_temperature"}
_RETAINED = {name for name in MixtureConfig.model_fields if name.startswith("retain_")}
# The same, where no more than words follows from an alarm.
_ALARMS = {"overtrained", "epoch_limit"}
_WSD = {"schedule", "decay_share"}
# In the identity by what they were resolved to.
_ANCESTRY = {"from_run", "from_optimizer"}


def check_leaves_of_mixture(settings: RunSettings, plan: Plan) -> None:
    """Check that every leaf has a weight, which needs the plan if the records give the paths; likewise that accuracies
    which the mixture follows are there, and of these leaves.

    Raises:
        UserError: `mixture.weights` are of other domains than the plan's, cut to `mixture.level`; or see
            `tasks.training.accuracies`.
    """
    try:
        check_method(settings.method, settings.mixture, settings.loss, plan.domains)
    except ValueError as error:
        raise UserError(str(error)) from None
    read_accuracies(settings.root, settings.mixture, plan.domains)


def check_run(settings: RunSettings, plan: Plan) -> StudentFacts:
    """That the run's models can be trained, saved and read by others; nothing need have been captured.

    Raises:
        UserError: they cannot; see `tasks.planning.preflight`.
    """
    if METHODS[settings.method].needs_teacher:
        check_live_teacher(plan)
    return check_student(settings.student, plan)


class RunInputs:
    """One run's configuration, its models and its stores.

    Args:
        settings: see there.
        plan: the stores, all complete.

    Raises:
        UserError: the student does not fit the teacher, or the mixture's weights not the domains.
    """

    def __init__(self, settings: RunSettings, plan: Plan) -> None:
        check_leaves_of_mixture(settings, plan)
        self.settings = settings
        self.plan = plan
        self.student = check_run(settings, plan)

    @cached_property
    def job(self) -> TrainingJob:
        settings, plan = self.settings, self.plan
        return TrainingJob(
            run_url=RunFolder(settings.root, settings.run).url,
            student=settings.student.model_copy(update={"model": self.student.folder, "revision": None}),
            context=self.student.context,
            seed=settings.seed,
            loss=effective_loss(settings.method, settings.loss),
            train=settings.train,
            vocab_size=self.student.vocab_size,
            separator=(plan.eos_id, *plan.bos_ids[-1:]),
            blocks={domain: store.blocks_url for domain, store in plan.domains.items()},
            targets={domain: store.targets_url for domain, store in plan.domains.items()},
            selections={domain: one.selection_url for domain, one in self.selections.items()},
            schedule_start=self.schedule_start,
            **self._live_teacher(),
        )

    def _live_teacher(self) -> dict[str, Any]:
        if not METHODS[self.settings.method].needs_teacher:
            return {}
        teacher = StudentConfig(model=self.plan.teacher_folder, trust_remote_code=self.settings.trust_teacher_code)
        return {"ted": self.settings.ted, "teacher": teacher}

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the trained student, as it is kept in the run's folder."""
        settings = self.settings
        ancestry = self.ancestry
        identity = {
            "method": settings.method,
            "seed": settings.seed,
            **self._trained,
            **({"from": ancestry.model_dump(mode="json")} if ancestry is not None else {}),
            "loss": effective_loss(settings.method, settings.loss).model_dump(),
            "train": settings.train.model_dump(
                exclude=_OPERATIONAL
                | ({"shuffle_mib"} if self._shuffled_whole else set())
                | (_ALARMS if settings.train.overtrained == "warn" else set())
                | (_WSD if settings.train.schedule == "cosine" else set())
                | _ANCESTRY
            ),
            # Where accuracies are not followed, a run is what it was before they could be; and so with what follows.
            "mixture": settings.mixture.model_dump(
                exclude=(_FOLLOWED if settings.mixture.follow == "gap" else set())
                | (_RETAINED if settings.method != "ddk_retain" else set())
                | ({"domain_stop_ratio"} if settings.mixture.domain_stop_ratio is None else set())
            ),
            **({"ted": settings.ted.model_dump()} if METHODS[settings.method].needs_teacher else {}),
            **({"context": asdict(context)} if (context := self.student.context) is not None else {}),
            **({"reference": reference} if (reference := self.reference_ppl) is not None else {}),
            **({"accuracies": as_identity(self.accuracies)} if self.accuracies is not None else {}),
            "stores": store_fingerprints(self.plan, self.selections),
        }
        return dict(as_json(identity))

    @cached_property
    def ancestry(self) -> Ancestry | None:
        """What the run goes on from; None where it begins with the student itself.

        Raises:
            UserError: see `tasks.training.ancestry`.
        """
        stores = store_fingerprints(self.plan, self.selections)
        return find_ancestry(self.settings, self._trained, stores, self.seq_len)

    @cached_property
    def _trained(self) -> dict[str, Any]:
        """Which model is trained."""
        digests = DigestCache(join(self.settings.root, "digests.json"))
        described = {
            "student": weight_digests(self.student.folder, digests, "student.model"),
            "attention": self.student.attention,
            "vocabulary": self.student.vocab_size,
        }
        return dict(as_json(described))

    @property
    def schedule_start(self) -> int:
        """Where the warm-up begins: a cosine begins anew, and so does whoever has no moments yet."""
        ancestry = self.ancestry
        if ancestry is None or (self.settings.train.schedule == "wsd" and ancestry.optimizer):
            return 0
        return ancestry.step

    @cached_property
    def selections(self) -> dict[str, SelectionPlan]:
        """Of the domains whose blocks are chosen."""
        return plan_selections(self.settings.root, self.plan, self.settings.student)

    @cached_property
    def teacher_ppl(self) -> dict[str, float]:
        """ℓ_T by domain, from the stored log-probabilities."""
        return {
            domain: teacher_perplexity(store.targets_url, store.marked_blocks_url)
            for domain, store in self.plan.domains.items()
        }

    @cached_property
    def reference_ppl(self) -> dict[str, float] | None:
        """ℓ by domain of `mixture.reference_run`'s student, as it was last measured; None where none is named.

        Raises:
            UserError: there is no such run, it is not complete, or it has other domains.
        """
        name = self.settings.mixture.reference_run
        if name is None:
            return None
        folder = RunFolder(self.settings.root, name)
        summary = folder.summary()
        records = MixtureHistory(folder.url).whole(summary)
        if not records or summary is None:
            raise UserError(
                f"mixture.reference_run '{name}' is not a complete run below {self.settings.root}; train it"
            )
        found = {domain: both.student for domain, both in records[-1].perplexities.items()}
        if set(found) != set(self.plan.domains):
            raise UserError(
                f"mixture.reference_run '{name}' has domains {sorted(found)}, this run {sorted(self.plan.domains)}"
            )
        return found

    @cached_property
    def accuracies(self) -> Accuracies | None:
        """What `mixture.accuracy_run` answered, by the questions' paths; None where the mixture follows the gap alone.

        Raises:
            UserError: see `tasks.training.accuracies`.
        """
        settings = self.settings
        found = read_accuracies(settings.root, settings.mixture, self.plan.domains)
        if found is not None:
            say_what_does_not_match(found, settings.mixture, self.plan.domains)
        return found

    @cached_property
    def positions(self) -> dict[str, int] | None:
        """Validation positions that carry loss, by domain; None where nothing is to be rolled up."""
        if self.settings.mixture.level is None and not any(depth(domain) > 1 for domain in self.plan.domains):
            return None
        return {
            domain: open_blocks(store.blocks_url, "validation").manifest.positions("validation")
            for domain, store in self.plan.domains.items()
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Train blocks by domain."""
        return self._data.sizes

    @property
    def seq_len(self) -> int:
        """Positions of a block."""
        return next(iter(self.plan.domains.values())).blocks_dims["seq_len"]

    @cached_property
    def _data(self) -> TrainData:
        return open_data(self.job)

    @property
    def _shuffled_whole(self) -> bool:
        """Whether every domain finds room in the shuffle, so that `train.shuffle_mib` makes no difference."""
        windows = self._data.windows(self.settings.train.shuffle_mib)
        return all(self.sizes[domain] <= one.shards * one.shard_blocks for domain, one in windows.items())
