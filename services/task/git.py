"""Git, as it is run inside a sandbox: one script that can be repeated at any point. Pure."""

from urllib.parse import quote, urlsplit

from branchline.v1 import common_pb2
from branchline.v1.common_pb2 import Failure
from branchline.v1.tasks_pb2 import BranchChoice
from branchline_internal.sandbox.v1.sandbox_pb2 import ExecuteResponse

from services.runtime.failures import failed
from services.task.open_task import TaskRow

CREDENTIALS_FILE = ".git-credentials"
CREDENTIALS_MODE = 0o600

DERIVED, NEW, EXISTING, OWN = "derived", "new", "existing", "own"
"""How a branch was chosen, in a word; OWN once it was checked out."""

CONFLICT = 3
"""Exit code of the script where the remote does not have, or has, what it should. Git has other ones."""

CHECKOUT = f"""set -eu
cd "$HOME"
if [ ! -d workspace/.git ]; then
  rm -rf workspace workspace.part
  git clone --quiet -- "$REMOTE" workspace.part
  mv workspace.part workspace
fi
cd workspace
git config user.name "$GIT_NAME"
git config user.email "$GIT_EMAIL"
git fetch --quiet --prune origin
has() {{ git show-ref --verify --quiet "refs/$1"; }}
is_folder() {{ [ -n "$(git for-each-ref --count=1 "refs/remotes/origin/$1/")" ]; }}
in_branch() {{
  parent="$1"
  while [ "$parent" != "${{parent%/*}}" ]; do
    parent="${{parent%/*}}"
    if has "remotes/origin/$parent"; then return 0; fi
  done
  return 1
}}
refuse() {{ echo "$1" >&2; exit {CONFLICT}; }}
began=$(git config --get branchline.branch || true)
if [ -n "$began" ]; then
  BRANCH="$began"
  CHOICE={OWN}
fi
case "$CHOICE" in
  {DERIVED})
    if in_branch "$BRANCH"; then BRANCH=$(echo "$BRANCH" | tr / -); fi
    name="$BRANCH"
    number=1
    while has "remotes/origin/$BRANCH" || is_folder "$BRANCH"; do
      number=$((number + 1))
      BRANCH="$name-$number"
    done
    ;;
  {NEW})
    if has "remotes/origin/$BRANCH"; then refuse "the remote has a branch $BRANCH already"; fi
    if in_branch "$BRANCH"; then refuse "the remote has a branch $parent, so there can be no $BRANCH"; fi
    if is_folder "$BRANCH"; then refuse "the remote has branches below $BRANCH/, so there can be no $BRANCH"; fi
    ;;
  {EXISTING})
    has "remotes/origin/$BRANCH" || refuse "the remote has no branch $BRANCH"
    ;;
esac
if has "heads/$BRANCH"; then
  git checkout --quiet "$BRANCH" --
elif has "remotes/origin/$BRANCH"; then
  git checkout --quiet -b "$BRANCH" --track "origin/$BRANCH"
elif git rev-parse --verify --quiet "origin/$BASE^{{commit}}" >/dev/null; then
  git checkout --quiet --no-track -b "$BRANCH" "origin/$BASE"
elif [ -z "$(git for-each-ref refs/remotes)" ]; then
  git symbolic-ref HEAD "refs/heads/$BRANCH"
else
  refuse "the remote has no branch $BASE to start from"
fi
git config branchline.branch "$BRANCH"
git symbolic-ref --short HEAD
"""
"""Clone once, fetch, and stand on the task's branch: ours, else the remote's, else new from the base. Prints its name.

A name that was derived gets a number where the remote has it; what was asked for is refused where the remote does not
have it, or has it, as it should. Once it stands there the branch is the task's own, and that is not asked again.
"""

_REFUSED = (
    "authentication failed",
    "could not read username",
    "could not read password",
    "error: 401",
    "error: 403",
    "invalid username or",
    "permission denied",
)
"""Words by which git and servers say that they do not take the credentials."""


def choice_of(choice: BranchChoice) -> str:
    """Return how a branch was chosen, in a word."""
    chosen = choice.WhichOneof("branch")
    if chosen == "new_branch":
        return NEW
    return EXISTING if chosen in ("existing_branch", "pull_request_number") else DERIVED


def checkout_environment(row: TaskRow) -> dict[str, str]:
    """Return the variables that the checkout script reads."""
    return {
        "REMOTE": row.repository.remote_url,
        "BRANCH": row.task.branch,
        "CHOICE": row.branch_choice,
        "BASE": row.branch_base or row.repository.default_branch or "HEAD",
        "GIT_NAME": row.git_name or "Branchline",
        "GIT_EMAIL": row.git_email or "branchline@localhost",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }


def checkout_failure(result: ExecuteResponse, seconds: int) -> Failure | None:
    """Return why the script failed, or None if it did not. `seconds` is the time that it had."""
    output = (result.stderr or result.stdout).strip()
    what = "the repository could not be checked out"
    if result.timed_out:
        return failed(common_pb2.FAILURE_REASON_TIMED_OUT, f"{what} within {seconds} s", output)
    if not result.exit_code:
        return None
    last_line = output.rpartition("\n")[2] or f"git ended with code {result.exit_code}"
    words = f"{what}: {last_line}"
    if result.exit_code == CONFLICT:
        return failed(common_pb2.FAILURE_REASON_BRANCH_CONFLICT, words, output, retryable=False)
    if any(sign in output.lower() for sign in _REFUSED):
        return failed(common_pb2.FAILURE_REASON_GIT_CREDENTIALS_REFUSED, words, output, retryable=False)
    return failed(common_pb2.FAILURE_REASON_CLONE_FAILED, words, output)


def credentials_line(remote_url: str, host: str, username: str, secret: str) -> bytes:
    """Return the content of git's credential store for one host (git-credential-store)."""
    if not username:
        return b""
    scheme = urlsplit(remote_url).scheme or "https"
    return f"{scheme}://{quote(username, safe='')}:{quote(secret, safe='')}@{host}\n".encode()
