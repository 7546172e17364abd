"""A comparison as it is stored: the data of its runs, and the pages and tables that are made of it.

<root>/comparisons/<name>/comparison.json     every run's numbers, sealed; all else is made from it
                          index.html, *.png, *.csv
                          files.json          what was written of these
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.sealed import Sealed
from storage.runs.listing import Listing, records_of_contents

FORMAT_VERSION = 2
DATA = "comparison.json"
_DATA = Sealed(
    what="comparison",
    version=FORMAT_VERSION,
    remedy="remove it and run the same `ddk compare` with --report-only, which makes it of the runs",
)


class ComparisonFolder:
    """One comparison's folder."""

    def __init__(self, root: str, name: str) -> None:
        self.name = name
        self.url = uri.join(root, "comparisons", name)

    @property
    def data_url(self) -> str:
        return uri.join(self.url, DATA)

    @property
    def listing(self) -> Listing:
        """The files that are made of the data."""
        return Listing(self.url, uri.join(self.url, "files.json"), f"the files of comparison '{self.name}'")

    def write(self, data: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, str]:
        """Write the data, then what is made of it; each file in one atomic step.

        Returns:
            The URL of each by its name.
        """
        _DATA.write(self.data_url, data, self._of)
        for name, content in files.items():
            uri.write_bytes(uri.join(self.url, name), content)
        self.listing.write(records_of_contents(files))
        return {name: uri.join(self.url, name) for name in (DATA, *files)}

    def data(self) -> dict[str, Any] | None:
        """What `write` was given; None where there is none.

        Raises:
            StoreDamagedError, FormatVersionError: it is not what was written.
        """
        content = _DATA.read(self.data_url, self._of)
        return None if content is None else {name: one for name, one in content.items() if name != "format_version"}

    def damaged(self, why: str) -> StoreDamagedError:
        """The error for data that is no comparison."""
        return _DATA.damaged(self.data_url, why)

    @property
    def _of(self) -> str:
        return f"the data of comparison '{self.name}'"
