"""A PostgreSQL for Prefect's server, in a folder of one's own: `make postgres`.

    python -m flows.operating.postgres start [FOLDER]     sets it up at first; prints the URL to export
    python -m flows.operating.postgres stop [FOLDER]

It needs Debian's package (`apt-get install postgresql`), or any other that has initdb and pg_ctl, and no service of the
system. It is reached by a socket in the folder, which only its owner can open: there is no port and no password. As
PostgreSQL refuses to run as root, for root it runs as the user `postgres`, whom the package creates.

FOLDER is `postgres` in PREFECT_HOME (`~/.prefect`); for root `/var/lib/postgresql/prefect`, as root's home is closed to
others. After a restart of the machine, start it again: its content stays.
"""

from __future__ import annotations

import argparse
import glob
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from ddk.errors import UserError

USER = "postgres"
"""As whom it runs for root."""
_NAME = "prefect"
_LONGEST_SOCKET = 107 - len("/.s.PGSQL.5432")
_SECONDS = 60
"""To start or stop."""


class Postgres:
    """One database server, its data in a folder.

    Args:
        folder: need not be there yet; its parent must, if the caller is root.

    Raises:
        UserError: PostgreSQL is not installed, or the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._bin = _programs()
        self._data, self._socket = self.folder / "data", self.folder / "socket"
        if len(os.fsencode(self._socket)) > _LONGEST_SOCKET:
            raise UserError(f"{self.folder} is too long a path for a socket in it; choose a shorter folder")

    @property
    def url(self) -> str:
        """What PREFECT_API_DATABASE_CONNECTION_URL is to be."""
        return f"postgresql+asyncpg://{_NAME}@/{_NAME}?host={quote(str(self._socket))}"

    @property
    def runs(self) -> bool:
        return self._call("pg_ctl", "status", "-D", str(self._data), check=False).returncode == 0

    def start(self) -> None:
        """See that it runs; sets up what is not there yet. A second call changes nothing.

        Raises:
            UserError: it does not start; the message has the end of its log.
        """
        if not (self._data / "PG_VERSION").exists():
            self._set_up()
        if not self.runs:
            log = self.folder / "log"
            try:
                self._call("pg_ctl", "start", "-D", str(self._data), "-l", str(log), "-w", "-t", str(_SECONDS))
            except UserError as error:
                said = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
                raise UserError(" ".join([str(error), *said])) from None

    def stop(self) -> None:
        """Whoever is connected is cut off; nothing that was committed is lost."""
        if (self._data / "PG_VERSION").exists() and self.runs:
            self._call("pg_ctl", "stop", "-D", str(self._data), "-m", "fast", "-w", "-t", str(_SECONDS))

    def _set_up(self) -> None:
        if self._data.exists():
            raise UserError(f"{self._data} holds something else than PostgreSQL's data; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(self.folder, USER, USER)
        self.folder.chmod(0o700)
        if self._run("test", "-w", str(self.folder), check=False).returncode != 0:
            raise UserError(
                f"the user {USER}, as whom PostgreSQL runs for root, cannot reach {self.folder}; choose a folder below "
                f"/var/lib/postgresql, or call this as another user than root"
            )
        self._run("mkdir", "-p", "-m", "700", str(self._socket))
        new = self.folder / "data.new"
        self._run("rm", "-rf", str(new))  # of an earlier call that was interrupted
        # Whoever can open the socket is let in: that is who can enter the folder.
        login = ("--username", _NAME, "--auth-local", "trust", "--auth-host", "reject")
        self._call("initdb", "--pgdata", str(new), "--encoding", "UTF8", "--locale", "C", *login)
        settings = "".join(f"{name} = {value}\n" for name, value in self._settings().items())
        self._run("tee", "-a", str(new / "postgresql.conf"), given=settings)
        self._call("postgres", "--single", "-D", str(new), "postgres", given=f"CREATE DATABASE {_NAME}\n")
        self._run("mv", str(new), str(self._data))

    def _settings(self) -> dict[str, str]:
        return {
            "listen_addresses": "''",
            "unix_socket_directories": f"'{str(self._socket).replace(chr(39), 2 * chr(39))}'",
            "unix_socket_permissions": "0700",
            # A commit may be lost with the power, though never half of one, as in Prefect's SQLite.
            "synchronous_commit": "off",
            # Compiling a query of Prefect's takes seconds, and running it uncompiled milliseconds.
            "jit": "off",
        }

    def _call(
        self, program: str, *arguments: str, given: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return self._run(str(self._bin / program), *arguments, given=given, check=check)

    def _run(self, *command: str, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as whoever PostgreSQL runs as."""
        as_user = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []
        done = subprocess.run(  # noqa: S603
            [*as_user, *command], input=given, capture_output=True, text=True, cwd="/", check=False
        )
        if check and done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())[-500:]
            raise UserError(f"PostgreSQL in {self.folder}: {Path(command[0]).name} failed ({said})")
        return done


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """The URL of a database that runs as long as the `with`."""
    postgres = Postgres(folder)
    postgres.start()
    try:
        yield postgres.url
    finally:
        postgres.stop()


def installed() -> bool:
    """Whether PostgreSQL's programs can be found."""
    return _folder_of_programs() is not None


def default_folder() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/postgresql/prefect")
    return Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect") / "postgres"


def _programs() -> Path:
    found = _folder_of_programs()
    if found is None:
        raise UserError("PostgreSQL's initdb and pg_ctl are not installed; as root: apt-get install postgresql")
    if os.geteuid() == 0 and USER not in (user.pw_name for user in pwd.getpwall()):
        raise UserError(f"PostgreSQL refuses root, and there is no user '{USER}' to run it as; call this as another")
    return found


def _folder_of_programs() -> Path | None:
    """Debian has them on nobody's PATH; of several versions the newest."""
    on_path = shutil.which("initdb")
    if on_path:
        found = Path(on_path).resolve().parent
        return found if (found / "pg_ctl").exists() else None
    versions = [Path(path) for path in glob.glob("/usr/lib/postgresql/*/bin") if (Path(path) / "pg_ctl").exists()]
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", str(path))], default=None)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.operating.postgres", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    given = parser.parse_args()
    try:
        postgres = Postgres(given.folder)
        if given.action == "stop":
            postgres.stop()
            return 0
        postgres.start()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"# PostgreSQL runs in {postgres.folder}; for the shell that starts Prefect's server:", file=sys.stderr)
    print(f"export PREFECT_API_DATABASE_CONNECTION_URL='{postgres.url}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
