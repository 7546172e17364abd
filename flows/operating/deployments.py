"""The stages as prefect.yaml deploys them, and the configuration that it fills in.

    prefect deploy --all                          the quickstart
    DDK_CONFIG=my.yaml prefect deploy --all       a run of your own, every field of it spelt out

Overriding a parameter of a deployment replaces it as a whole: `{"train": {"steps": 100, "batch_size": 8}}` would set
every other field of `train` to its default, not to the deployment's value. Therefore the schema of these deployments
requires every field of a section that is given; Prefect's server refuses an incomplete section before anything starts.
(The flows themselves accept an incomplete section; only the deployment's schema is stricter.)
"""

from __future__ import annotations

import copy
import importlib.resources
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from inspect import Parameter
from typing import Annotated, Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Crashed
from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ddk.errors import UserError
from flows.config import Config, load_config
from flows.operating.schedules import warn_of_schedules
from tasks.evaluation.names import EvaluationConfig
from tasks.running.descendants import end_with_parent
from tasks.running.uncollected import uncollected

with uncollected():  # a worker's process has loaded neither torch nor transformers yet
    from flows import clean as cleaning
    from flows import evaluate as evaluating
    from flows import stages


class EveryField:
    """Marks a parameter: the JSON schema of each model in it requires all of that model's fields."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        unseen, seen = list(_references(schema)), set[str]()
        while unseen:
            reference = unseen.pop()
            if reference in seen:
                continue
            seen.add(reference)
            # The definition itself, not a copy: what is changed here stands in the finished schema.
            definition = handler.resolve_ref_schema({"$ref": reference})
            if "properties" in definition:
                definition["required"] = list(definition["properties"])
            unseen.extend(_references(definition))
        return schema


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


FORM = (
    *("run", "force", "delete", "method", "train", "mixture", "loss", "seed", "evaluation"),
    *("older", "keep_runs", "remove_runs", "ted", "tracking"),
    *("domains", "teacher", "student", "packing", "part", "root", "storage_block"),
)
"""Order of a form: what people change from run to run, then what belongs to one run, then what decides the stores.
Prefect's form can neither collapse a section nor leave one out."""


def deployable(stage: Flow[..., Any]) -> Flow[..., Any]:
    """The same flow (hooks, retries, names), with a form that asks for whole sections.

    The description is the docstring's first paragraph.
    """
    flow = copy.copy(stage)
    signature = inspect.signature(stage.fn, eval_str=True)
    # Prefect makes the schema of a deployment from the signature of the flow, and runs its `fn`, which is as it was.
    flow.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            parameter.replace(annotation=Annotated[parameter.annotation, EveryField()], kind=Parameter.KEYWORD_ONLY)
            for parameter in sorted(signature.parameters.values(), key=lambda one: FORM.index(one.name))
        ]
    )
    flow.__module__ = __name__  # an entrypoint is made of module and name
    flow.on_running_hooks = [*flow.on_running_hooks, end_with_worker]
    flow.description = (flow.description or "").partition("\n\n")[0]
    flow.__doc__ = _documented(flow.description, signature.parameters)
    return flow


def _documented(description: str, parameters: Iterable[str]) -> str:
    """A docstring from which Prefect takes what its form says of a section."""
    said = {name: field.description or "" for name, field in Config.model_fields.items()} | stages.OPTIONS
    lines = [f"    {name}: {' '.join(said[name].split())}" for name in parameters]
    return "\n".join([description, "", "Args:", *lines])


def end_with_worker(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A run whose worker was killed is nobody's: it could not be cancelled any more, and would hold its GPU against the
    next worker's. It ends too, and says so."""
    if os.environ.get("PREFECT__FLOW_RUN_ID") == str(flow_run.id):
        # Within 30 s in all, as docs/recovering.md has it; most of them for a server that is slow to answer.
        end_with_parent(seconds=8.0, last_words=lambda: say_that_it_crashed(flow_run.id), seconds_for_words=18.0)


def say_that_it_crashed(run: UUID) -> None:
    """Where Prefect's engine has not come to it, the run would be Running for ever. One that has ended stays so."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
        if state is not None and not state.is_final():
            crashed: State[Any] = Crashed(message="Its worker died, and the run did not end in time.")
            client.set_flow_run_state(run, crashed, force=True)


pack_corpus = deployable(stages.pack_corpus)
cache_teacher = deployable(stages.cache_teacher)
select_blocks = deployable(stages.select_blocks)
train_student = deployable(stages.train_student)
rebalance = deployable(stages.rebalance)
distill = deployable(stages.distill)
report = deployable(stages.report)
evaluate = deployable(evaluating.evaluate)
clean = deployable(cleaning.clean)

DEPLOYABLE: Mapping[str, Flow[..., Any]] = {
    "pack-corpus": pack_corpus,
    "cache-teacher": cache_teacher,
    "select-blocks": select_blocks,
    "train-student": train_student,
    "rebalance": rebalance,
    "distill": distill,
    "report": report,
    "evaluate": evaluate,
    "clean": clean,
}
"""By the name of the deployment, which is the flow's."""


def configuration(config: str = "", root: str = "") -> dict[str, Any]:
    """A build step of prefect.yaml: a run's configuration, as parameters for `{{ config.<section> }}`.

    Args:
        config: the run's YAML file; empty: the quickstart's.
        root: replaces the file's. Empty: the file's, and for the quickstart the folder `quickstart-run` below the
            current one.

    Returns:
        Every section as plain data, every field spelt out: a later version with other defaults changes nothing of
        what is deployed, and the form of a run is filled in. Besides `evaluation`, what `ddk eval` asks for where it
        is told nothing.

    Raises:
        SystemExit: the file is not there, or a field is wrong. (Of any other error Prefect shows three tracebacks.)
    """
    try:
        with importlib.resources.as_file(importlib.resources.files("flows.presets")) as presets:
            path = config or os.path.join(presets, "quickstart.yaml")
            loaded = load_config(path, (), root or (None if config else "quickstart-run"))
        warn_of_schedules()
        return parameters(loaded)
    except UserError as error:
        raise SystemExit(f"ddk: {error}") from None


def parameters(config: Config) -> dict[str, Any]:
    """What the stages take, as plain data."""
    return {**config.model_dump(mode="json"), "evaluation": EvaluationConfig().model_dump(mode="json")}


def parameters_for(flow: Flow[..., Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a configuration's sections that a flow takes."""
    taken = inspect.signature(flow.fn).parameters
    return {name: value for name, value in sections.items() if name in taken}
