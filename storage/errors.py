"""What can be wrong with something stored, each naming the place and the remedy."""

from ddk.errors import UserError


class StoreError(UserError):
    """A store cannot be used as it is."""


class StoreMissingError(StoreError):
    """There is no complete store at the URL."""


class StoreDamagedError(StoreError):
    """Bytes of a store are missing, or are not those that were written."""


class FormatVersionError(StoreError):
    """Written by a newer version of the project than this one reads."""


class RunMismatchError(StoreError):
    """A run's folder holds another run than the one that is asked for."""
