"""`ddk doctor`: will this machine and this configuration work?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from typing import Annotated, Any

import typer

from flows.commands.app import Overrides, Root, app, load, loading_libraries, say

_MARKS = {"ok": ("ok  ", typer.colors.GREEN), "note": ("note", typer.colors.YELLOW), "fail": ("FAIL", typer.colors.RED)}


@app.command(short_help="Check whether this machine and a configuration will work.")
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A run's YAML file, to check it too.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON that holds no paths or keys, for a bug report.")
    ] = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Check this machine: versions, GPUs, memory, a capture by vLLM and a training step against references, services.

    With CONFIG, also check its root, its models and corpora, and whether what it needs is there. Nothing is trained or
    kept. Ends with 1 if any check fails.
    """
    made = []
    for one in _checks(config, overrides, root):
        made.append(one)
        if not as_json:
            _show(one)
    failed = sum(one.state == "fail" for one in made)
    if as_json:
        plain = {"ddk": metadata.version("ddk-distill"), "ok": not failed, "checks": [one.as_json() for one in made]}
        say(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        seconds = sum(one.seconds for one in made)
        say(f"{len(made) - failed} of {len(made)} checks passed in {seconds:.0f} s")
    if failed:
        raise typer.Exit(1)


def _show(one: Any) -> None:
    mark, color = _MARKS[one.state]
    shown = typer.style(mark, fg=color) if sys.stdout.isatty() else mark
    say(f"{shown}  {one.name:<16}  {one.said}")
    if one.remedy:
        say(f"{'':<24}{one.remedy}")


def _checks(config: str | None, overrides: list[str] | None, root: str | None) -> Iterator[Any]:
    with loading_libraries():
        from tasks.diagnosis import machine, numerics, services
        from tasks.diagnosis.result import check

    yield check("python", machine.python)
    yield check("packages", lambda: machine.locked_versions(_lock()))
    yield check("gpu", machine.gpus)
    yield check("memory", machine.memory)
    yield check("shared memory", machine.shared_memory)
    yield check("disk", lambda: machine.disk(os.getcwd()))
    yield check("open files", machine.open_files)
    yield check("training step", numerics.training_step)
    yield check("several devices", numerics.collectives)
    yield check("prefect", _prefect, private=True)
    yield check("hub", services.hub)
    with resources.as_file(resources.files("flows.presets.quickstart") / "teacher") as teacher:
        yield check("capture", lambda: numerics.capture(str(teacher)))
    if config is not None:
        yield from _of_config(config, overrides, root, check)


def _of_config(path: str, overrides: list[str] | None, root: str | None, check: Callable[..., Any]) -> Iterator[Any]:
    from tasks.diagnosis import services
    from tasks.diagnosis.result import Found

    loaded: list[Any] = []

    def read() -> Found:
        loaded.append(load(path, overrides, root, None))
        return Found("ok", f"run '{loaded[0].run}', {len(loaded[0].domains)} domains")

    yield check("configuration", read, private=True)
    if not loaded:
        return
    config = loaded[0]

    def stored() -> Found:
        from flows.commands.app import use_block

        use_block(config.storage_block)
        return services.storage(config.root)

    yield check("storage", stored, private=True)
    yield check("models and data", lambda: _preflight(config), private=True)
    yield check("what it needs", lambda: _needs(config))


def _lock() -> str | None:
    """The lock file of the checkout that this package lies in."""
    import torch

    import flows

    above = os.path.dirname(os.path.dirname(os.path.abspath(flows.__file__)))
    path = os.path.join(above, "requirements", "cuda.txt" if torch.version.cuda else "cpu.txt")
    return path if os.path.exists(path) else None


def _prefect() -> Any:
    import prefect
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from flows.operating.prefect_server import reach
    from tasks.diagnosis.result import Found

    if not PREFECT_API_URL.value():
        return Found("ok", f"Prefect {prefect.__version__}; no server is named, and each command starts its own")
    reach()
    with get_client(sync_client=True) as client:
        version = str(client.request("GET", "/admin/version").json())
        pools = {str(pool["name"]) for pool in client.request("POST", "/work_pools/filter", json={}).json()}
        idle = [
            name
            for name in sorted(pools & {"cpu", "gpu"})
            if not any(
                worker.get("status") == "ONLINE"
                for worker in client.request(
                    "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": name}, json={}
                ).json()
            )
        ]
    said = f"the server answers, version {version}"
    if version.split(".")[:2] != prefect.__version__.split(".")[:2]:
        remedy = f"install Prefect {prefect.__version__} on the server, or that version here"
        return Found("fail", f"{said}, and Prefect here is {prefect.__version__}", remedy)
    if missing := {"cpu", "gpu"} - pools:
        return Found(
            "note", f"{said}; it has no work pool {' or '.join(sorted(missing))}", "`prefect deploy --all` needs both"
        )
    if idle:
        remedy = f"start one: prefect worker start --pool {idle[0]} --limit 1"
        return Found("note", f"{said}; no worker is online in the pool {' or '.join(idle)}", remedy)
    return Found("ok", f"{said}; pools and workers are there")


def _preflight(config: Any) -> Any:
    from flows.stores.stage_states import plan_stages
    from tasks.diagnosis.result import Found

    stages = plan_stages(config)
    left = sum(one.state != "complete" for one in stages)
    return Found("ok", f"teacher, student and corpora fit; {left} of {len(stages)} stages are to be done")


def _needs(config: Any) -> Any:
    """Whether the memory and the disk space that are expected are there."""
    import shutil

    import psutil
    import torch

    from flows.costing.estimate import GIB, estimate
    from flows.costing.run_size import Assumptions
    from storage.files import uri
    from tasks.diagnosis.result import Found

    cuda = torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if cuda else (psutil.virtual_memory().available,) * 2
    count = torch.cuda.device_count() if cuda else 1
    cost = estimate(
        config, Assumptions(gpu="h100", gpu_memory=total / GIB, gpus=count, mfu=0.4, usd_per_hour=None, blocks=None)
    )
    student, teacher = (cost.value(section, "total") for section in ("student, one GPU", "teacher, one GPU"))
    where = "GPU" if cuda else "memory"
    said = f"student {student / GIB:.1f} GiB, teacher {teacher / GIB:.1f} GiB, of {free / GIB:.1f} GiB of {where} free"
    if student > free:
        remedy = "lower train.micro_batch_size, or set train.parallel: fsdp (see ddk plan --cost)"
        return Found("fail", said, remedy)
    if teacher > free:
        return Found("fail", said, "raise teacher.tensor_parallel_size, or quantise the teacher (see ddk plan --cost)")
    disk = cost.value("disk", "total, expected")
    said += f"; {disk / GIB:.1f} GiB of storage expected"
    if uri.is_local(config.root):
        above = config.root
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        have = shutil.disk_usage(above).free
        if disk > have:
            return Found(
                "fail",
                f"{said}, and {have / GIB:.1f} GiB are free",
                "set root to a larger disk, or lower teacher.k",
            )
    return Found("ok", said)
