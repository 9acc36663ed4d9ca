"""Git, as it is run inside a sandbox: one script that can be repeated at any point. Pure."""

from urllib.parse import quote, urlsplit

from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import Task

OUTPUT_TAIL = 2000
CREDENTIALS_FILE = ".git-credentials"
CREDENTIALS_MODE = 0o600

CHECKOUT = """set -eu
cd "$HOME"
if [ ! -d workspace/.git ]; then
  rm -rf workspace workspace.part
  git clone --quiet -- "$REMOTE" workspace.part
  if [ -n "$SUFFIX" ] && git -C workspace.part show-ref --verify --quiet "refs/heads/$BRANCH"; then
    git -C workspace.part checkout --quiet --detach
    git -C workspace.part branch --quiet -D -- "$BRANCH"
  fi
  mv workspace.part workspace
fi
cd workspace
git config user.name "$GIT_NAME"
git config user.email "$GIT_EMAIL"
git fetch --quiet --prune origin
has() { git show-ref --verify --quiet "refs/$1"; }
if [ -n "$SUFFIX" ] && ! has "heads/$BRANCH"; then
  if has "heads/$BRANCH-$SUFFIX" || has "remotes/origin/$BRANCH"; then
    BRANCH="$BRANCH-$SUFFIX"
  fi
fi
if has "heads/$BRANCH"; then
  git checkout --quiet "$BRANCH" --
elif has "remotes/origin/$BRANCH"; then
  git checkout --quiet -b "$BRANCH" --track "origin/$BRANCH"
elif git rev-parse --verify --quiet "origin/$BASE^{commit}" >/dev/null; then
  git checkout --quiet --no-track -b "$BRANCH" "origin/$BASE"
elif [ -z "$(git for-each-ref refs/remotes)" ]; then
  git symbolic-ref HEAD "refs/heads/$BRANCH"
else
  echo "the remote has no branch $BASE to start from" >&2
  exit 1
fi
git symbolic-ref --short HEAD
"""
"""Clone once, fetch, and stand on the task's branch: ours, else the remote's, else new from the base. A branch whose
name was derived is not continued where the remote has it: it gets a suffix. Prints the branch it stands on."""

_SUFFIX_DIGITS = 6


def checkout_environment(
    task: Task, repository: Repository, name: str, email: str, *, derived: bool = False
) -> dict[str, str]:
    """Return the variables that the checkout script reads. `derived`: a branch that the remote has is not ours."""
    return {
        "REMOTE": repository.remote_url,
        "BRANCH": task.branch,
        "SUFFIX": task.id[-_SUFFIX_DIGITS:] if derived else "",
        "BASE": repository.default_branch or "HEAD",
        "GIT_NAME": name or "Branchline",
        "GIT_EMAIL": email or "branchline@localhost",
    }


def credentials_line(remote_url: str, host: str, username: str, secret: str) -> bytes:
    """Return the content of git's credential store for one host (git-credential-store)."""
    if not username:
        return b""
    scheme = urlsplit(remote_url).scheme or "https"
    return f"{scheme}://{quote(username, safe='')}:{quote(secret, safe='')}@{host}\n".encode()


def tail(text: str) -> str:
    """Return the end of a command's output."""
    text = text.strip()
    return text if len(text) <= OUTPUT_TAIL else "…" + text[-OUTPUT_TAIL:]
