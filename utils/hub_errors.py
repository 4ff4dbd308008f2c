"""Why the Hugging Face hub did not give a model, in one line with the way out. Imported by fetch_model.py."""

import json

HUB = "https://huggingface.co"
LOG_IN = ".venv/bin/hf auth login, or set HF_TOKEN"
MIRROR = "check the network, or use a mirror: HF_ENDPOINT=https://hf-mirror.com"


def explain(error: BaseException, hub_id: str, revision: str | None) -> str | None:
    """One line on an error of huggingface_hub or of the network below it; None for any other error.

    Args:
        error: what was raised while `hub_id` (org/name) was looked up or downloaded.
        revision: the commit, tag or branch that was asked for; None for the newest.
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
        if isinstance(link, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.LocalProtocolError):
            return f"HF_ENDPOINT={endpoint}: is no address of a hub; the mirror's is https://hf-mirror.com"
        if isinstance(link, errors.FileMetadataError | json.JSONDecodeError):
            return f"HF_ENDPOINT={endpoint}: does not answer as a hub does; unset it, or name a mirror"
        if isinstance(link, httpx.RequestError):
            why = str(link) or type(link).__name__
            return f"{hub_id}: {endpoint} cannot be reached ({why}); {MIRROR}; {kept}"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"{hub_id}: a file did not arrive whole; {kept}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{hub_id}: {str(error).splitlines()[0]}; {kept}"
    return None


def chain_of(error: BaseException) -> list[BaseException]:
    """An exception and those it was raised from, from the last to the first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def gated(hub_id: str) -> str:
    """The line for a model whose terms this account has not accepted."""
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
