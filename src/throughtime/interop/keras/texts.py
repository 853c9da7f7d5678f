"""JSON from files of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from throughtime.errors import InteropError


def as_json(place: str, read: Callable[[], bytes | str]) -> Mapping[str, Any]:
    """A JSON object. Raises InteropError, naming the place, for anything else."""
    try:
        found = json.loads(read())
    except OSError as error:
        raise InteropError(f"{place} cannot be read: {error.strerror or error}") from error
    except InteropError:
        raise
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{place} is not JSON ({type(error).__name__}: {error})") from error
    if not isinstance(found, Mapping):
        raise InteropError(f"{place} holds {type(found).__name__}, and a model's configuration is an object")
    return found
