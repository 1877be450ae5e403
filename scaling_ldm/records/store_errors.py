"""What a request to a store failed with: an OSError with its URL, as for a file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from scaling_ldm.records.errors import ConfigError

# What gcsfs, s3fs and tensorstore say where the exception has no status of HTTP.
_DENIED = re.compile(r"^Forbidden\b|\b(PERMISSION_DENIED|UNAUTHENTICATED)\b")
_NO_CREDENTIALS = (
    *("DefaultCredentialsError", "RefreshError"),
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"),
    *("TokenRetrievalError", "UnauthorizedSSOTokenError", "CredentialRetrievalError"),
)
# What botocore refuses before it asks, such as an impossible name of a bucket.
_REFUSED_HERE = ("ParamValidationError", "InvalidBucketNameError")
# s3:// answers so where a condition does not hold, or two conditional writes meet.
_CONDITIONS = ("PreconditionFailed", "ConditionalRequestConflict")
# Statuses of HTTP that another attempt may change: timeout, too many requests.
_PASSING = (408, 429)
# Errors of this program, and of this machine: no store has said them.
_OURS = (TypeError, AttributeError, NameError, NotImplementedError)
_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)


@contextlib.contextmanager
def asking(url: object, doing: str = "read") -> Iterator[None]:
    """Around requests to a store: every failure of it is an OSError that names the URL.

    Args:
      url: an `ObjectPath`, or the text of a URL.
      doing: "read", "write", "remove" or "copy". Only a write needs no object that is
        there, so what it does not find is the bucket.

    Raises:
      FileNotFoundError: no such object; or no such bucket, in a write.
      FileExistsError: there is one, or it is another one than was expected.
      PermissionError: the store refuses it to this account.
      OSError: the store cannot be reached, has failed, or refuses the request. EINVAL
        if it refuses; no attempt will change that.
    """
    url = str(url)
    try:
        yield
    except FileNotFoundError as e:
        said = "No such bucket" if doing == "write" else os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, said, url) from e
    except FileExistsError as e:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url) from e
    except (ConfigError, *_OURS):
        raise
    except Exception as e:  # each backend has exceptions of its own
        if _code(e) in _CONDITIONS:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url) from e
        if isinstance(e, OSError) and e.errno in _HERE:
            raise
        said = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        status = _status(e)
        if _denied(e, status):
            raise PermissionError(
                errno.EACCES, f"No permission to {doing} there ({said})", url
            ) from e
        refused = status in range(400, 500) and status not in _PASSING
        if refused or type(e).__name__ in _REFUSED_HERE:
            raise OSError(
                errno.EINVAL, f"The store refuses the request ({said})", url
            ) from e
        raise OSError(
            errno.EHOSTUNREACH, f"The store does not answer ({said})", url
        ) from e


def _status(error: BaseException | None) -> int | None:
    """The status of HTTP with which the store answered; None: it is not known."""
    while error is not None:
        for name in ("code", "status"):  # of gcsfs and google, of aiohttp
            with contextlib.suppress(TypeError, ValueError):
                return int(getattr(error, name, None))  # pyrefly: ignore
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # of botocore
            return error.response["ResponseMetadata"]["HTTPStatusCode"]  # pyrefly: ignore
        # gcsfs makes this of status 400.
        if isinstance(error, ValueError) and str(error).startswith("Bad Request"):
            return 400
        error = error.__cause__
    return None


def _code(error: BaseException | None) -> str:
    """S3's name for what it answered; "": another store, or no answer."""
    while error is not None:
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            return error.response["Error"]["Code"]  # pyrefly: ignore
        error = error.__cause__
    return ""


def _denied(error: Exception, status: int | None) -> bool:
    """Whether this account may not do it, or there is none."""
    if status is not None:
        return status in (401, 403)
    if type(error).__name__ in _NO_CREDENTIALS:
        return not getattr(error, "retryable", False)
    return isinstance(error, PermissionError) or bool(_DENIED.search(str(error)))
