"""Names of git branches."""

import re

from branchline.v1.errors_pb2 import ERROR_REASON_BRANCH_NAME_INVALID

from services.runtime.errors import InvalidArgument

MOST_BYTES = 200
"""Most bytes of a name that is given: git keeps it as a file's."""

# Rules of git-check-ref-format(1) for a branch, as far as they concern a name without "refs/heads/".
_REFUSED = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^/|/$|\.$|(^|/)\.|\.lock(/|$)|^-|^@$|^HEAD$")


def check_branch(name: str, field: str = "branch") -> None:
    """Raise InvalidArgument for a name that git would refuse (git-check-ref-format), or that is too long for a file."""
    if len(name.encode()) > MOST_BYTES:
        words = f"a branch name has at most {MOST_BYTES} bytes"
        raise InvalidArgument(field, words, ERROR_REASON_BRANCH_NAME_INVALID, branch=name)
    if _REFUSED.search(name):
        words = f'git refuses the branch name "{name}"'
        raise InvalidArgument(field, words, ERROR_REASON_BRANCH_NAME_INVALID, branch=name)
