"""Git, as it is run inside a sandbox: one script that can be repeated at any point. Pure."""

from urllib.parse import quote, urlsplit

from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.task_pb2 import Task

CLONE_SECONDS = 600
OUTPUT_TAIL = 2000
CREDENTIALS_FILE = ".git-credentials"
CREDENTIALS_MODE = 0o600

CHECKOUT = """set -eu
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
if git show-ref --verify --quiet "refs/heads/$BRANCH"; then
  git checkout --quiet "$BRANCH" --
elif git show-ref --verify --quiet "refs/remotes/origin/$BRANCH"; then
  git checkout --quiet -b "$BRANCH" --track "origin/$BRANCH"
elif git rev-parse --verify --quiet "origin/$BASE^{commit}" >/dev/null; then
  git checkout --quiet --no-track -b "$BRANCH" "origin/$BASE"
elif [ -z "$(git for-each-ref refs/remotes)" ]; then
  git symbolic-ref HEAD "refs/heads/$BRANCH"
else
  echo "the remote has no branch $BASE to start from" >&2
  exit 1
fi
git rev-parse --verify --quiet HEAD || true
"""
"""Clone once, fetch, and stand on the task's branch: ours, else the remote's, else new from the base. Prints the
commit at its tip, nothing in an empty repository."""

HEAD_COMMIT = ("git", "rev-parse", "--verify", "--quiet", "HEAD")


def checkout_environment(task: Task, repository: Repository, name: str, email: str) -> dict[str, str]:
    """Return the variables that the checkout script reads."""
    return {
        "REMOTE": repository.remote_url,
        "BRANCH": task.branch,
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
