"""Whether links of a stated speed can be made here."""

from experiments.common import namespaces


def reason_not_to():
    """Why they cannot, or nothing."""
    try:
        namespaces.require()
    except OSError as error:
        return str(error)
    return ""
