"""Names and errors of the hub: what is refused before it is asked, and what its failures become."""

import contextlib
import errno

import httpx
import pytest
from hf_xet import XetAuthenticationError, XetObjectNotFoundError
from huggingface_hub.errors import XetDownloadError

from paragen.common.cli import UserError
from paragen.hub import errors

REPO = "user/toy"


@pytest.mark.parametrize(
    "name",
    ["user/name", "u/n", "U-1.x_/n.4-b_", "a" * 96 + "/" + "b" * 96, "user.git/name"]
    + ["user/name.git", "user/name.", "user/name-", "user-/name", "user/na--me", "user/na..me", "user/" + "x" * 97]
    + ["user/-x", "user/.x", "us\u00e9r/x", "user/\u00e9x", "user/", "/name", "user/na me", "a/b/c", "user/name\n"],
)
def test_a_name_is_one_if_huggingface_hub_takes_it(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    taken = contextlib.nullcontext() if errors.is_name(name) else pytest.raises(HFValidationError)
    with taken:
        validate_repo_id(name)


def line_of(error: BaseException, cause: BaseException | None = None, uploads: bool = True) -> str:
    """The one line that an error becomes."""

    def action():
        raise error from cause

    with pytest.raises(UserError) as raised:
        errors.translated(REPO, None, action, uploads)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("uploads", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Network error: error sending request for url (http://cas/x?X-Signature=secret)"),
        ConnectionError("Network error: tcp connect: Permission denied (os error 13)"),
        TimeoutError("Operation timed out"),
        XetObjectNotFoundError("gone"),
        XetDownloadError("gone"),
    ],
)
def test_a_failure_of_xet_is_one_of_the_network(error, uploads):
    line = line_of(error, uploads=uploads)
    assert line.startswith(f"{REPO}: the storage of https://") and "HF_HUB_DISABLE_XET=1; run it again" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    "error",
    [XetAuthenticationError("expired"), ConnectionError("Network error: HTTP status client error (401 Unauthorized)")],
)
def test_a_token_that_xet_refuses_is_like_a_missing_login(error):
    assert f"refuses the token ({error}); log in: {errors.LOG_IN}" in line_of(error)


def test_a_connection_that_may_not_be_made_is_no_fault_of_the_disk():
    refused = PermissionError(errno.EACCES, "Permission denied")
    line = line_of(httpx.ConnectError(str(refused)), refused)
    assert "cannot be reached ([Errno 13] Permission denied)" in line


def test_a_full_disk_stays_one_also_after_a_dropped_connection():
    with pytest.raises(OSError, match="No space"):
        line_of(OSError(errno.ENOSPC, "No space left"), httpx.ReadError("dropped"))
    with pytest.raises(BrokenPipeError):
        line_of(BrokenPipeError(errno.EPIPE, "Broken pipe"))
