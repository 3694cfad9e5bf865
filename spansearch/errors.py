"""What bad input gets: every error says what was expected, what came, why it matters and what to do."""


class SpanSearchError(Exception):
    """Base of everything spansearch raises on purpose; the command line prints it without a traceback."""


class TaskError(SpanSearchError, ValueError):
    """The task cannot be used: a wrong callable, empty batches, a batch that does not fit the model."""


class DataError(SpanSearchError, ValueError):
    """The data cannot be used: NaN or infinite activations, a score that is not a finite number."""


class SpanError(SpanSearchError, ValueError):
    """A span is not legal, does not exist, or does not survive verification; the message is the reason."""


class FamilyError(SpanSearchError, ValueError):
    """A family of students is unknown, refuses the span, or was given a width out of (0, 1]."""


class StudyError(SpanSearchError, RuntimeError):
    """A study cannot be created, resumed or read: another study's storage, changed settings, a full disk."""
