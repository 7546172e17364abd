"""What is made of several runs, as it is stored: data, sealed, and the pages and tables that are made of it.

<root>/comparisons/<name>/comparison.json     every run's numbers; all else is made from it
                          index.html, *.png, *.csv
                          files.json          what was written of these
<root>/laws/<name>/law.json, index.html, …    likewise, a fitted law
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.sealed import Sealed
from storage.runs.listing import Listing, records_of_contents

FORMAT_VERSION = 2


class ReportFolder:
    """One folder of a kind."""

    kind: ClassVar[Sealed]
    """`what` names the data's file and stands in its seal."""
    folder: ClassVar[str]
    """Below the root."""

    def __init__(self, root: str, name: str) -> None:
        self.name = name
        self.url = uri.join(root, self.folder, name)

    @property
    def data_name(self) -> str:
        return f"{self.kind.what}.json"

    @property
    def data_url(self) -> str:
        return uri.join(self.url, self.data_name)

    @property
    def listing(self) -> Listing:
        """The files that are made of the data."""
        return Listing(self.url, uri.join(self.url, "files.json"), f"the files of {self.kind.what} '{self.name}'")

    def write(self, data: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, str]:
        """Write the data, then what is made of it; each file in one atomic step.

        Returns:
            The URL of each by its name.
        """
        self.kind.write(self.data_url, data, self._of)
        for name, content in files.items():
            uri.write_bytes(uri.join(self.url, name), content)
        self.listing.write(records_of_contents(files))
        return {name: uri.join(self.url, name) for name in (self.data_name, *files)}

    def add(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """Write further files beside those that are there.

        Returns:
            The URL of each by its name.
        """
        for name, content in files.items():
            uri.write_bytes(uri.join(self.url, name), content)
        self.listing.add(records_of_contents(files))
        return {name: uri.join(self.url, name) for name in files}

    def data(self) -> dict[str, Any] | None:
        """What `write` was given; None where there is none.

        Raises:
            StoreDamagedError, FormatVersionError: it is not what was written.
        """
        content = self.kind.read(self.data_url, self._of)
        return None if content is None else {name: one for name, one in content.items() if name != "format_version"}

    def damaged(self, why: str) -> StoreDamagedError:
        """The error for data that do not fit the schema."""
        return self.kind.damaged(self.data_url, why)

    @property
    def _of(self) -> str:
        return f"the data of {self.kind.what} '{self.name}'"


class ComparisonFolder(ReportFolder):
    kind = Sealed(
        what="comparison",
        version=FORMAT_VERSION,
        remedy="remove it and run the same `ddk compare` with --report-only, which makes it of the runs",
    )
    folder = "comparisons"


class LawFolder(ReportFolder):
    kind = Sealed(
        what="law", version=1, remedy="remove it and run the same `ddk law` again, which fits it to the runs anew"
    )
    folder = "laws"
