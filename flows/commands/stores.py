"""Commands for stores and runs: import, export, runs, inspect, verify."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from flows.commands.app import ConfigPath, Overrides, Root, app, load, loading_libraries, run_flow, say, show


@app.command("import", short_help="Make stores from files that hold a teacher's predictions.")
def import_caches(
    config: ConfigPath,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", metavar="NAME", help="Only this domain; may be repeated.")
    ] = None,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Make stores for the domains whose files already hold a teacher's predictions (targets: topk or distillkit).

    This runs `pack` and `cache` for these domains only. No engine is started, and only the tokenizer of teacher.model
    is read.
    """
    loaded = load(config, overrides, root, None)
    from flows.stores.exchange import imported_only

    for done in run_flow("import_caches", imported_only(loaded, domains or ()), module="flows.stores.exchange"):
        say(
            f"{done['domain']}: {done['shards_written']} shards written, teacher perplexity "
            f"{done['teacher_ppl']:.3f}, {100 * done['retained_mass']:.2f}% of its probability kept  {done['url']}"
        )


@app.command(short_help="Write a targets store as Parquet files.")
def export(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a targets store (<root>/targets/…/<domain>.zarr).")],
    folder: Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL for the Parquet files.")],
    row_format: Annotated[
        str, typer.Option("--format", help="'topk' (plain lists) or 'distillkit' (compressed).")
    ] = "topk",
    config: Annotated[
        str, typer.Option("--config", help="With distillkit: 'k50', 'k128' or a compression_config.yaml.")
    ] = "k50",
    split: Annotated[str, typer.Option("--split", help="Split to export: 'train' or 'validation'.")] = "train",
) -> None:
    """Write a targets store and its blocks as Parquet files with a data card; the same call resumes."""
    from flows.stores.exchange import export_targets

    export_targets(url, folder, row_format=row_format, config=config, split=split, say=say)


@app.command(short_help="Put a finished run's student on the Hugging Face hub.")
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of the run, <root>/runs/<name>.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Name of the repository, OWNER/NAME.")],
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence for the card, e.g. apache-2.0 or other.")
    ] = None,
    languages: Annotated[
        list[str] | None, typer.Option("--language", metavar="CODE", help="Language for the card; may be repeated.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Create a public repository; by default it is private.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and send nothing.")] = False,
) -> None:
    """Put the student of a finished run, with its card, on the hub, in one commit.

    Every byte is checked first. The token comes from HF_TOKEN; HF_ENDPOINT names another hub. A repository that is
    there keeps its visibility.
    """
    with loading_libraries():
        from tasks.reporting import push_student as pushing
    from tasks.showing.formats import size

    with pushing.prepared(run, repo, license_=license_, languages=languages or (), private=not public) as asked:
        for name, length in asked.files.items():
            say(f"{size(length):>9}  {name}")
        say(f"{size(sum(asked.files.values())):>9}  in all, to {asked.endpoint}/{asked.repo} ({_visibility(asked)})")
        say("card       " + ", ".join(f"{name}: {value}" for name, value in asked.front_matter.items()))
        if dry_run:
            say("nothing was sent")
            return
        say(f"pushed     {pushing.push(asked)}")


def _visibility(asked: Any) -> str:
    return "private" if asked.private else "public"


@app.command(short_help="List every run of a root.")
def runs(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Folder or URL that holds the stores and runs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every run of a root: state, date of the last step, steps, largest gap, speed, time, bytes, ancestry.

    A run whose files were changed or lost is listed as damaged, with the reason.
    """
    from flows.stores import runs as listed

    found = listed.runs_of(root)
    if as_json:
        say(json.dumps(listed.as_json(found), indent=2, ensure_ascii=False))
        return
    show(listed.table(found))
    for line in listed.notes(found):
        say(line)


@app.command(short_help="Show what a store or a run holds.")
def inspect(url: Annotated[str, typer.Argument(metavar="URL", help="URL of a store (….zarr) or of a run.")]) -> None:
    """Show what a store or a run holds: dimensions, blocks, bytes, inputs."""
    from flows.stores.describe import describe

    for line in describe(url):
        say(line)


@app.command(short_help="Check every byte of a store, a run or a whole root.")
def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a store (….zarr), a run or a root.")],
    fast: Annotated[
        bool, typer.Option("--fast", help="Check only that all objects exist and have the right size.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged shards, and restore lost manifests.")
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="CONFIG", help="Also capture a sample again with this file's teacher."),
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=2, help="With --replay: blocks per store.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --replay: seed that selects the blocks.")] = 0,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Read every byte of a store, a run or a whole root and name what is damaged; exits with 1 if anything is.

    With --repair, damaged shards are removed, so that the next `ddk pack` or `ddk cache` recreates only these. With
    --replay, the live teacher checks whether the stored numbers are its own.
    """
    from flows.stores.verify import verify_all

    if not verify_all(url, full=not fast, repair=repair, say=say):
        raise typer.Exit(1)
    if replay is not None:
        from flows.stores.replay import replay_all

        config = load(replay, overrides, root, None)
        if not replay_all(url, config, blocks=blocks, seed=seed, repair=repair, say=say):
            raise typer.Exit(1)
