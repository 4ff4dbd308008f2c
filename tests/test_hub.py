"""Names and errors of the hub: what is refused before it is asked, and what its failures become."""

import contextlib

import pytest

from paragen.hub import errors


@pytest.mark.parametrize(
    "name",
    ["user/name", "u/n", "U-1.x_/n.4-b_", "a" * 96 + "/" + "b" * 96, "user.git/name"]
    + ["user/name.git", "user/name.", "user/name-", "user-/name", "user/na--me", "user/na..me", "user/" + "x" * 97]
    + ["user/-x", "user/.x", "us\u00e9r/name", "user/nam\u00e9", "user/", "/name", "user/na me", "a/b/c", "user/name\n"],
)
def test_a_name_is_one_if_huggingface_hub_takes_it(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    taken = contextlib.suppress() if errors.is_name(name) else pytest.raises(HFValidationError)
    with taken:
        validate_repo_id(name)
