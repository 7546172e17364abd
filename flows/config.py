"""One YAML file for a run: read, checked as a whole, and split into the sections that the components own.

    run: my-run                      # name of the run, below <root>/runs
    root: s3://bucket/ddk            # where everything is stored: a folder, or anything fsspec opens
    method: ddk                      # or ddk_retain, ddk_no_smoothing, ddk_equal, kd, cpt, minillm, cpt_doremi, ted
    seed: 0
    domains: {math: {train: [...], validation: [...]}, ...}
    packing: {seq_len: 1024}
    teacher: {model: ..., k: 64}
    student: {model: ...}
    loss: {gamma: 0.2}
    train: {steps: 30000, batch_size: 512}
    mixture: {interval: 1000, alpha: 0.5}
    tracking: {wandb_project: my-project}

Relative paths are relative to the file's own folder. Secrets have no place here: credentials come from the
environment, or from a Prefect block that `storage_block` names.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from ddk.domain_tree import check_leaves, depth
from ddk.errors import UserError
from ddk.methods.registry import METHODS, MethodName, check_method, effective_loss
from ddk.mixture import MixtureConfig
from ddk.packing import PackingConfig
from ddk.redaction import holds_credentials, redacted
from ddk.section import Section
from ddk.train_config import LossConfig, StudentConfig, TedConfig, TrainConfig
from storage.corpus.domain import DomainConfig
from storage.files.root import check_root
from storage.files.uri import NO_CREDENTIALS, absolute
from storage.files.yaml_text import MOST_CHARACTERS, parse_yaml
from tasks.teachers.config import TeacherConfig, target_format
from tasks.training.run_settings import RunSettings
from tasks.training.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from tasks.planning.complete_runs import RunSources

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
"""Of runs: they become names of files."""

DomainName = Annotated[str, Field(pattern=f"^{_NAME}(/{_NAME})*$", max_length=150)]
"""Of domains: parts like the name of a run, with '/' between them."""

_MOST_PROBLEMS = 8
"""Named in one line; the others are counted."""


def check_name(name: str) -> None:
    """That a comparison or a law, which is named on the command line, can be a folder's name.

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(_NAME, name):
        raise UserError(
            f"--name is '{name[:100]}'; it takes letters, digits, '.', '_' and '-', 100 at most, and begins with a "
            f"letter or a digit"
        )


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(hide_input_in_errors=True)

    run: Name
    """Name of the run. Another run in the same root reuses blocks and targets."""
    root: str
    """Where everything is stored: a folder, or a URL such as s3://bucket/prefix."""
    storage_block: str | None = Field(default=None, min_length=1)
    """Name of a Prefect block with the endpoint and credentials for S3: a Secret whose value is a JSON object of s3fs
    options, or a RemoteFileSystem. If empty, they come from the environment."""
    method: MethodName = "ddk"
    """Method, which sets the loss and the mixture: see docs/methods.md. 'ddk' is the paper's."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the sampler and of dropout."""
    domains: dict[DomainName, DomainConfig] = Field(min_length=1)
    """The corpora, by domain. A name may be a path, such as `math/algebra`: see docs/training.md."""
    packing: PackingConfig = PackingConfig()
    """How documents become blocks."""
    teacher: TeacherConfig
    """The teacher model, and how its predictions are captured."""
    student: StudentConfig
    """The model that is trained."""
    loss: LossConfig = LossConfig()
    """CE + γ·KL."""
    train: TrainConfig
    """Steps, batches, learning rate."""
    mixture: MixtureConfig = MixtureConfig()
    """How the sampling follows the gap between student and teacher."""
    ted: TedConfig = TedConfig()
    """Settings of the method `ted` only."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics are sent besides the run's own files."""

    @model_validator(mode="before")
    @classmethod
    def _no_address_holds_credentials(cls, data: Any) -> Any:
        # Before anything else is said of it: the configuration is stored with the run, and shown.
        for place, text in _texts(data):
            if place not in _CHECKED_THEMSELVES and holds_credentials(text):
                raise ValueError(f"{place}: {NO_CREDENTIALS}")
        return data

    @field_validator("root")
    @classmethod
    def _root_can_hold_files(cls, root: str) -> str:
        check_root(root)
        return root

    @model_validator(mode="after")
    def _names_differ_in_more_than_case(self) -> Config:
        # On a file system that ignores case, two such domains would share a store.
        folded = [name.casefold() for name in self.domains]
        if len(set(folded)) < len(folded):
            raise ValueError("two domains have names that differ in upper and lower case only; rename one")
        return self

    @model_validator(mode="after")
    def _no_domain_lies_below_another(self) -> Config:
        # One whose records have paths has none of its own; what they are is seen when the corpus is read.
        check_leaves([name for name, domain in self.domains.items() if domain.path_field is None])
        return self

    @model_validator(mode="after")
    def _method_and_sections_go_together(self) -> Config:
        check_method(self.method, self.mixture, self.loss, self._expected_leaves())
        if METHODS[self.method].needs_teacher:
            place = f"method {self.method} runs the teacher beside the student"
            if self.train.parallel == "fsdp":
                raise ValueError(f"{place}, whole on every device, and train.parallel is 'fsdp'; set it to 'ddp'")
            if self.teacher.source == "server":
                raise ValueError(f"{place}, and teacher.source is 'server'; set it to 'engine' and model to its folder")
        return self

    @model_validator(mode="after")
    def _targets_have_what_the_loss_reads(self) -> Config:
        loss = effective_loss(self.method, self.loss)
        temperature = loss.tail_temperature
        if temperature is not None and temperature not in self.teacher.tail_temperatures:
            raise ValueError(
                f"loss.temperature {temperature} with tail '{loss.tail}' needs the tail's mass at that temperature: "
                f"add it to teacher.tail_temperatures (the teacher is then captured again), or set loss.tail: "
                f"renormalise, or loss.temperature: 1.0"
            )
        if loss.needs_draws and not self.teacher.draws:
            raise ValueError(
                "loss.tail 'sampled' reads random draws, but teacher.draws is 0: set it, e.g. to 50 (the teacher is "
                "then captured again), or set loss.tail: bucket"
            )
        if loss.min_entropy:
            for name, domain in self.domains.items():
                if not target_format(self.teacher, imported=domain.imported).entropy:
                    raise ValueError(
                        f"loss.min_entropy reads the entropy of the teacher's distribution, and the targets of domain "
                        f"'{name}' do not hold it: only captures by teacher.source 'engine' do; set "
                        f"loss.min_entropy: 0"
                    )
        return self

    def _expected_leaves(self) -> list[str]:
        """The domains, and for one whose records have paths what `mixture.weights` says of its leaves."""
        level, given = self.mixture.level, self.mixture.weights
        weighted = list(given) if isinstance(given, Mapping) else []
        names: list[str] = []
        for name, domain in self.domains.items():
            seen_later = domain.path_field is not None and (level is None or level > depth(name))
            below = [one for one in weighted if one.startswith(f"{name}/")] if seen_later else []
            names += below or ([f"{name}/…"] if seen_later else [name])
        return names

    @property
    def settings(self) -> RunSettings:
        return RunSettings(
            root=self.root,
            run=self.run,
            method=self.method,
            seed=self.seed,
            student=self.student,
            loss=self.loss,
            train=self.train,
            mixture=self.mixture,
            ted=self.ted,
            tracking=self.tracking,
            trust_teacher_code=self.teacher.trust_remote_code,
        )

    @property
    def sources(self) -> RunSources:
        from tasks.planning.complete_runs import RunSources  # zarr, which reading a configuration does not need

        return RunSources(
            root=self.root,
            run=self.run,
            domains=self.domains,
            teacher=self.teacher,
            student=self.student,
            sections=self.model_dump(mode="json"),
        )


_CHECKED_THEMSELVES = {"teacher.server_url", "tracking.mlflow_uri"}
"""They name another place for the key."""


def _texts(data: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text of nested data, with its place: `domains.math.train.0`."""
    if isinstance(data, str):
        yield place, data
    elif isinstance(data, Mapping | list):
        for name, item in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _texts(item, f"{place}.{name}" if place else str(name))


def load_config(path: str, overrides: Sequence[str] = (), root: str | None = None, run: str | None = None) -> Config:
    """Read and check a configuration.

    Args:
        path: of the YAML file.
        overrides: `section.field=value` each, the value in YAML; they replace what the file says.
        root, run: replace the file's.

    Raises:
        UserError: the file is not there, not YAML, or a field is wrong; the place and what is wrong with it are
            named, for every field at once.
    """
    data = _read_yaml(path)
    for override in overrides:
        _apply(data, override)
    for key, value in (("root", root), ("run", run)):
        if value is not None:
            data[key] = _place(value, os.getcwd()) if key == "root" else value
    try:
        return Config.model_validate(_with_absolute_paths(data, os.path.dirname(os.path.abspath(path))))
    except ValidationError as error:
        raise UserError(_readable(error, path)) from None


def changed(config: Config, fields: Mapping[str, Any], folder: str, place: str) -> Config:
    """The configuration with other values.

    Args:
        fields: value by `section.field`; a relative path in one is relative to `folder`.
        place: what the error's line begins with.

    Raises:
        UserError: as `load_config`.
    """
    data = config.model_dump(mode="json")
    for field, value in fields.items():
        _put(data, field, value, f"{place}: {field}")
    try:
        return Config.model_validate(_with_absolute_paths(data, folder))
    except ValidationError as error:
        raise UserError(_readable(error, place)) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no text in UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); is it the right "
            f"file? Save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    data = parse_yaml(text, path)
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of sections (run, root, domains, teacher, …)")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    match = re.fullmatch(r"([\w./-]+)=(.*)", override, flags=re.DOTALL)
    if match is None:
        raise UserError(f"--set takes section.field=value, not '{shortened(override)}'")
    place = f"--set {shortened(override)}"
    _put(data, match[1], parse_yaml(match[2], place, lines=False), place)


def _put(data: dict[str, Any], field: str, value: Any, place: str) -> None:
    *path, last = field.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"{place}: '{part}' is not a section")
    data[last] = value


def _with_absolute_paths(data: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Relative paths of files, folders and models made absolute; what is wrongly typed is left to validation."""
    resolved = dict(data)
    if isinstance(root := data.get("root"), str):
        resolved["root"] = _place(root, folder)
    for section in ("teacher", "student"):
        part = data.get(section)
        if isinstance(part, dict) and isinstance(model := part.get("model"), str) and model:
            resolved[section] = {**part, "model": _model_path(model, folder)}
    if isinstance(domains := data.get("domains"), dict):
        resolved["domains"] = {name: _domain_paths(domain, folder) for name, domain in domains.items()}
    return resolved


def _place(url: str, folder: str) -> str:
    """Made absolute; what is empty stays so, and is refused where it is checked: it does not mean the folder."""
    return absolute(url, folder) if url.strip() else ""


def _beside(url: str, folder: str) -> str:
    """The same, of a file or model; what a copied quickstart.yaml names is found where the quickstart is installed."""
    place = _place(url, folder)
    if url.startswith("quickstart/") and not os.path.exists(place):
        import flows.presets

        installed = absolute(url, os.path.dirname(os.path.abspath(flows.presets.__file__)))
        return installed if os.path.exists(installed) else place
    return place


def _model_path(model: str, folder: str) -> str:
    """A folder beside the configuration where there is one; else a name on the hub is left as it is."""
    place = _beside(model, folder)
    return place if os.path.isdir(place) or model.startswith((".", "~")) else model


def _domain_paths(domain: Any, folder: str) -> Any:
    if not isinstance(domain, dict):
        return domain
    resolved = dict(domain)
    for split in ("train", "validation"):
        urls = domain.get(split)
        if isinstance(urls, str):
            urls = [urls]
        if isinstance(urls, list):
            resolved[split] = [_beside(url, folder) if isinstance(url, str) else url for url in urls]
    if isinstance(url := domain.get("compression_config"), str):
        resolved["compression_config"] = _place(url, folder)
    return resolved


def _readable(error: ValidationError, path: str) -> str:
    problems = error.errors(include_url=False)
    lines = [_problem(problem) for problem in problems[:_MOST_PROBLEMS]]
    more = f"; and {len(problems) - len(lines)} more" if len(problems) > len(lines) else ""
    return f"{path}: " + "; ".join(lines) + more


def _problem(problem: ErrorDetails) -> str:
    place = ".".join(shortened(str(part)) for part in problem["loc"] if part != "[key]") or "the configuration"
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "extra_forbidden":
        message = f"there is no such field{_similar(problem['loc'])}"
    elif problem["type"] == "missing":
        message = "this field is missing"
    elif problem["type"] in ("model_type", "dict_type"):
        message = "it must be a section with fields of its own" + (", and is empty" if given is None else "")
    elif isinstance(given, str | int | float | bool):
        message = f"{message} (it is {shortened(redacted(repr(given)))})"
        if problem["type"] == "string_type":
            message += "; write it in quotes if it is a name"
    elif given is None:
        message = f"{message} (it is empty)"
    return f"{place}: {message}"


def shortened(text: str, most: int = 80) -> str:
    """For a message of one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _similar(location: tuple[int | str, ...]) -> str:
    """' (did you mean …?)' for a misspelt field."""
    model: Any = Config
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        # A section that may be left out is a union with None.
        sections = [one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields")]
        model = DomainConfig if part == "domains" else next(iter(sections), model)
    close = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1)
    return f" (did you mean {close[0]}?)" if close else f"; there are {', '.join(model.model_fields)}"
