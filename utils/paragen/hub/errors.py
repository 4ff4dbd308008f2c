"""Errors of the Hugging Face hub and of the network below it, as one line with the way out."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from paragen.common import cli
from paragen.common.cli import UserError

Result = TypeVar("Result")
HUB = "https://huggingface.co"
LOG_IN = ".venv/bin/hf auth login, or set HF_TOKEN"
REPOSITORY = re.compile(r"[A-Za-z0-9]([\w.-]{0,94}\w)?/[A-Za-z0-9]([\w.-]{0,94}\w)?", re.ASCII)
NAMING = "user/name, each of at most 96 letters, digits, _, - and ., with no - or . at an end, no -- or .., no .git"
ODD_TOKEN = f"has a character that no token has, such as a curly quote; copy it again from {HUB}/settings/tokens"
MIRROR = "check the network, or use a mirror: HF_ENDPOINT=https://hf-mirror.com"


def repository_of(text: str, target: str) -> str:
    """REPO= as the hub names a repository, user/name.

    Args:
        text: what the user gave.
        target: the command that the error names.

    Raises UserError for anything that is not such a name.
    """
    text = text.strip()
    if not is_name(text):
        what = f"REPO {text!r} is not a hub repository's name ({NAMING})" if text else "say which repository"
        raise UserError(f"{what}: {target} REPO=user/name")
    return text


def is_name(text: str) -> bool:
    """Whether the hub takes a text for a repository's name, as huggingface_hub's `validate_repo_id` does."""
    return bool(REPOSITORY.fullmatch(text)) and not (".." in text or "--" in text or text.endswith(".git"))


def translated(repository: str, revision: str | None, action: Callable[[], Result], uploads: bool = False) -> Result:
    """What `action` returns; its errors of the hub or the network become a UserError with the way out.

    Args:
        repository: org/name.
        revision: the requested commit, tag or branch; None for the newest.
        action: the download or the upload.
        uploads: whether it uploads.
    """
    try:
        return action()
    except Exception as error:
        if isinstance(error, UserError) or (cli.storage_fault(error) and not of_network(error)):
            raise
        line = (refused(error, repository) if uploads else None) or explain(error, repository, revision)
        if line is None:
            raise
        raise UserError(line) from error


def refused(error: BaseException, repository: str) -> str | None:
    """One line on why the hub refused an upload; None for an error that a download can have, too."""
    from huggingface_hub import errors

    kept = "run it again then, what has arrived is not sent again"
    for link in chain_of(error):
        if isinstance(link, ValueError) and "metadata in README.md" in str(link):
            return f"{repository}: the hub refuses the card: {' '.join(str(link).split())}"
        if not isinstance(link, errors.HfHubHTTPError) or link.response is None:
            continue
        status, reason = link.response.status_code, link.server_message or ""
        reason = f" ({' '.join(reason.split())})" if reason else ""
        if status == 402 or status == 413 or "storage" in reason.lower():
            way_out = f"free or buy storage at {HUB}/settings/billing"
            return f"{repository}: the hub has no room for it{reason}; {way_out}; {kept}"
        if status == 403:
            owner = repository.split("/")[0]
            return (
                f"{repository}: the token may not write there{reason}; give it write access to {owner} at "
                f"{HUB}/settings/tokens, or publish under your own name"
            )
        if status in (409, 412):
            return f"{repository}: somebody else changed it meanwhile{reason}; {kept}"
        if status == 404:
            return f"{repository}: is gone, or your account may not see it{reason}; check its name, or log in: {LOG_IN}"
        if status == 400:
            return f"{repository}: the hub refuses it{reason}"
    return None


def explain(error: BaseException, hub_id: str, revision: str | None) -> str | None:
    """One line on an error of huggingface_hub or of the network below it; None for any other error.

    Args:
        error: what was raised while the repository was looked up or downloaded.
        hub_id: org/name.
        revision: the requested commit, tag or branch; None for the newest.
    """
    import httpx
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    kept = "run it again then, what has arrived is kept"
    for link in chain_of(error):
        if isinstance(link, errors.GatedRepoError):
            return gated(hub_id)
        if isinstance(link, errors.RevisionNotFoundError):
            return f"{hub_id}: has no revision {revision!r}; its commits: {HUB}/{hub_id}/commits/main"
        if isinstance(link, errors.RepositoryNotFoundError):
            return f"{hub_id}: no such repository at {endpoint}, or a private one; check its name, or log in: {LOG_IN}"
        if isinstance(link, errors.HfHubHTTPError | httpx.HTTPStatusError):
            return f"{hub_id}: {answered(link.response.status_code, hub_id, endpoint)}"
        if isinstance(link, UnicodeEncodeError | httpx.LocalProtocolError) and token_is_odd():
            return f"the token (HF_TOKEN, or the login's) {ODD_TOKEN}"
        if isinstance(link, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.LocalProtocolError):
            return f"HF_ENDPOINT={endpoint}: is no address of a hub; the mirror's is https://hf-mirror.com"
        if isinstance(link, errors.FileMetadataError | json.JSONDecodeError):
            return no_hub()
        if isinstance(link, httpx.RequestError):
            why = str(link) or type(link).__name__
            return f"{hub_id}: {endpoint} cannot be reached ({why}); {MIRROR}; {kept}"
        if of_xet(link):
            return f"{hub_id}: {storage_failed(link, endpoint)}; {kept}"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"{hub_id}: a file did not arrive whole; {kept}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{hub_id}: {str(error).splitlines()[0]}; {kept}"
    return None


def no_hub() -> str:
    """The line for an answer that no hub gives."""
    from huggingface_hub import constants

    return f"HF_ENDPOINT={constants.ENDPOINT}: does not answer as a hub does; unset it, or name a mirror"


@contextlib.contextmanager
def read_as_of_a_hub() -> Iterator[None]:
    """Raise UserError where huggingface_hub does not find in an answer what a hub's has: it raises what it may be."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(no_hub()) from error


def token_is_odd() -> bool:
    """Whether the token cannot be sent, since it has characters that are not printable ASCII."""
    from huggingface_hub import get_token

    token = get_token() or ""
    return not (token.isascii() and token.isprintable())


def of_xet(link: BaseException) -> bool:
    """Whether an exception is one of Xet, the hub's storage: its client raises Python's own, too, without a number."""
    from huggingface_hub import errors

    own = type(link).__module__ == "hf_xet" or isinstance(link, errors.XetDownloadError)
    return own or (isinstance(link, ConnectionError | TimeoutError) and link.errno is None)


def storage_failed(link: BaseException, endpoint: str) -> str:
    """What an exception of Xet means for the user, without the signatures that addresses in its text may have."""
    why = re.sub(r"\?[^\s)]*", "", " ".join(str(link).split())) or type(link).__name__
    if type(link).__name__ == "XetAuthenticationError" or re.search(r"\(40[13] ", why):
        return f"the storage of {endpoint} refuses the token ({why}); log in: {LOG_IN}"
    return f"the storage of {endpoint} fails ({why}); check the network, or do without Xet: HF_HUB_DISABLE_XET=1"


def of_network(error: BaseException) -> bool:
    """Whether the network failed, not the disk: a connection can be refused with a number of STORAGE_ERRORS, too."""
    import httpx

    for link in chain_of(error):
        if isinstance(link, httpx.RequestError) or of_xet(link):
            return True
        if isinstance(link, OSError) and link.errno in cli.STORAGE_ERRORS:
            return False
    return False


def chain_of(error: BaseException) -> list[BaseException]:
    """An exception and those that it was raised from, the last one first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def gated(hub_id: str) -> str:
    """The line for a repository whose terms this account has not accepted."""
    from huggingface_hub import get_token

    who = "the account of your token has no access yet" if get_token() else "no token was sent"
    return f"{hub_id}: is gated and {who}; ask for access at {HUB}/{hub_id}, then: {LOG_IN}, and run it again"


def answered(status: int, hub_id: str, endpoint: str) -> str:
    """What an HTTP status of the hub means for the user."""
    if status == 401:
        return f"the token is not valid; make another at {HUB}/settings/tokens and: {LOG_IN} (or unset HF_TOKEN)"
    if status == 403:
        return (
            "the token may not read it; give it read access to gated repositories at "
            f"{HUB}/settings/tokens, and ask for access at {HUB}/{hub_id} where it is gated"
        )
    if status == 404:
        return f"{endpoint} knows no such address; is HF_ENDPOINT a hub or a mirror of it?"
    if status == 429:
        return f"{endpoint} has had too many requests from here; wait some minutes and run it again, or: {LOG_IN}"
    return f"{endpoint} answered with HTTP status {status}; run it again later, what has arrived is kept"
