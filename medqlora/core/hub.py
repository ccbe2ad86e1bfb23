"""What it means that the Hugging Face hub does not give a model or a dataset, in one line."""

from __future__ import annotations

from collections.abc import Iterator

LOGIN = "`hf auth login`"


def explain_hub(error: BaseException, name: str, kind: str = "model") -> str | None:
    """Return why the hub does not give a repository, and what to do.

    Args:
        error: what a library raised. The hub's own error may be its cause.
        name: the hub id.
        kind: "model" or "dataset".

    Returns:
        A text that follows the name in a message, or None where the hub is not the reason.
    """
    from huggingface_hub import constants, errors

    chain = list(list_causes(error))

    def find(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in chain if isinstance(cause, kinds)), None)

    place = constants.ENDPOINT + ("/datasets/" if kind == "dataset" else "/") + name
    # The order matters. A gated repository is one that was not found, too.
    gated = find(errors.GatedRepoError)
    if gated is not None:
        if getattr(gated.response, "status_code", None) == 403:
            return (
                f"it is gated, and the account that is logged in here has no access; ask for it on"
                f" {place} and wait until it is given (`hf auth whoami` names the account)"
            )
        return (
            f"it is gated, and no account is logged in here; ask for access on {place}, then log in"
            f" with {LOGIN}"
        )
    if find(errors.RepositoryNotFoundError):
        return (
            f"the hub has no such {kind}, or it is private; check the name, and log in with"
            f" {LOGIN} if it is private"
        )
    if find(errors.RevisionNotFoundError):
        return f"the hub has no such revision of it; {place} lists its branches and tags"
    if not find(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return None
    if constants.HF_HUB_OFFLINE:
        return (
            "it is not in this machine's cache, and HF_HUB_OFFLINE forbids to ask the hub; unset"
            " it, or give a folder"
        )
    return (
        f"it is not in this machine's cache, and {constants.ENDPOINT} cannot be reached; connect"
        " this machine, or give a folder"
    )


def list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen = set()
    waiting = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, cause.__context__]
