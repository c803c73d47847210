"""The errors of Baton. Each is mapped once to HTTP (the gateway) and once to gRPC (common/rpc)."""


class BatonError(Exception):
    """Base of every error that Baton raises on purpose."""


class InvalidRequest(BatonError):
    """The caller's mistake; `field` names the part of the request, `code` refines it."""

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here."""


class RequestTooLarge(InvalidRequest):
    """The request's body is over the limit."""


class Unauthenticated(BatonError):
    """The caller gave no API key, or one that is not known."""


class Overloaded(BatonError):
    """Every queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(BatonError):
    """No worker can take this request now."""


class Leaving(Unavailable):
    """A worker that starts or ends: it is whole, and so is the request, for another one to take."""


class DeadlineExceeded(BatonError):
    """The request's time ran out."""


class Cancelled(BatonError):
    """The caller went away or asked to stop."""


class CheckpointError(BatonError):
    """A model folder that cannot be served: the message names the file and the remedy."""


class ConfigError(BatonError):
    """A setting that cannot work: the message names it, its value and the remedy."""


class UnusableLogits(BatonError):
    """The model gave a request logits that are no numbers: its weights' fault, or its input's."""


class HandoffError(BatonError):
    """KV that did not arrive whole, in time or from the right sender."""


class WireError(BatonError):
    """Bytes that are not what their header says."""
