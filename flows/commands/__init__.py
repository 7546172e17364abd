"""The `ddk` command's subcommands, which importing this package adds to `flows.commands.app.app`, in this order."""

from flows.commands import pipeline, new, judging, laws, students, doctor, operating, stores  # noqa: F401, I001 (the order of `ddk --help`)
