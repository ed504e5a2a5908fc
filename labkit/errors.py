"""What labkit raises on purpose: each message says what is wrong and names the fix."""


class LabkitError(Exception):
    """A problem that the reader of its message can mend; never a programming error."""


class AssetError(LabkitError):
    """A model or data set could not be fetched, or what arrived is not what was pinned."""


class DataError(LabkitError, ValueError):
    """A training file or a single example cannot be used as it is."""


class ContextError(LabkitError, ValueError):
    """A prompt and its answer do not fit into the model's context window."""


class PriceError(LabkitError):
    """A price is not known; what is unknown is never taken for zero."""


class BudgetError(LabkitError):
    """A job was not started, because it would cost more than the budget allows, or its price is not known."""


class ServiceError(LabkitError):
    """The local service cannot be started, found or reached."""
