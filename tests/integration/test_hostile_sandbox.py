"""What a sandbox whose agent is hostile can reach of the host and of other sandboxes: nothing, in either isolation.

Without bubblewrap only root can keep sandboxes apart; with it anybody can.
"""

import asyncio
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from services.sandbox.agent_server import AgentServer, Unreachable
from services.sandbox.http import Http
from services.sandbox.providers.base import Condition, ProviderError
from services.sandbox.providers.local import LocalProvider
from services.sandbox.providers.processes import is_root
from tests.integration.test_local_provider import a_provider, said
from tests.support.processes import execute
from tests.support.stack import Stack

BOTH = pytest.mark.parametrize("isolation", ["bubblewrap", *(["none"] if is_root() else [])])
as_root = pytest.mark.skipif(not is_root(), reason="users of their own are given only by root")


@pytest.fixture
def data() -> Iterator[Path]:
    """The services' data, with a secret in it, where other users could come by."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    (folder / "signing.key").write_text("secret")
    mask = os.umask(0o022)
    yield folder
    os.umask(mask)
    shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture
async def http() -> AsyncGenerator[Http, None]:
    client = Http()
    yield client
    await client.close()


@pytest_asyncio.fixture
async def provider(data: Path, isolation: str, http: Http) -> AsyncGenerator[LocalProvider, None]:
    made = a_local_provider(data, isolation, http)
    await made.start()
    yield made
    for sandbox_id in await made.known():
        await made.destroy(sandbox_id)


def a_local_provider(data: Path, isolation: str, http: Http, **given: object) -> LocalProvider:
    return a_provider(data / "local", http, isolation, hidden_paths=[data], agents={"mock": ["true"]}, **given)


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return those that have not ended; one that has may still wait for its parent to notice."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and process.uids():
                found.append(process)
    return found


def user_of(provider: LocalProvider, sandbox_id: str) -> int:
    (server,) = [one for one in alive(provider.processes.of(sandbox_id)) if "server" in one.cmdline()[1:2]]
    return server.uids().real


@BOTH
@as_root
async def test_it_reads_no_file_that_only_root_may_read(provider: LocalProvider, http: Http) -> None:
    for path in ("/etc/shadow", "/root/.bashrc", "/proc/1/environ"):
        seen = await said(provider, http, f"id -u; cat {path}")
        assert seen.stdout.strip() == str(user_of(provider, "sbx_1"))
        assert seen.end.exit_code != 0


@BOTH
async def test_it_reads_nothing_of_the_services_and_of_other_sandboxes(
    provider: LocalProvider, data: Path, http: Http
) -> None:
    other = await provider.create("sbx_2")
    await said(provider, http, "echo theirs > file; chmod 644 file", "sbx_2")

    seen = await said(
        provider, http, f"cat {data}/signing.key {other.home}/file; cat {data}/local/*/*; ls {other.home}"
    )

    assert seen.end.exit_code != 0
    assert not {"secret", "theirs", "token"} & set(seen.stdout.split())
    assert other.token not in seen.stdout + seen.stderr


@BOTH
async def test_it_finds_no_token_on_a_command_line_or_in_an_environment(provider: LocalProvider, http: Http) -> None:
    tokens = {(await provider.create(sandbox_id)).token for sandbox_id in ("sbx_1", "sbx_2")}

    seen = await said(provider, http, "cat /proc/[0-9]*/cmdline; env")
    environments = await said(provider, http, "cat /proc/[0-9]*/environ")
    lines = " ".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))

    assert "sandbox-agent" in seen.stdout
    assert not [token for token in tokens if token in seen.stdout + lines]
    assert (await provider.create("sbx_2")).token not in environments.stdout


@BOTH
async def test_it_ends_no_process_but_its_own(provider: LocalProvider, http: Http) -> None:
    await provider.create("sbx_2")
    others = [process.pid for process in alive(provider.processes.of("sbx_2"))]
    await said(provider, http, "for pid in " + " ".join(map(str, [*others, os.getpid()])) + "; do kill -9 $pid; done")
    if is_root():
        with pytest.raises(Exception, match="sandbox"):  # its own server is ended, too
            await said(provider, http, "test $(id -u) -ge 40000 && kill -9 -1; sleep 5")
        assert (await provider.probe("sbx_1")).condition is Condition.GONE

    assert (await provider.probe("sbx_2")).condition is Condition.ALIVE
    assert [process.pid for process in alive(provider.processes.of("sbx_2"))] == others


@BOTH
async def test_it_has_places_for_files_that_pass(provider: LocalProvider, http: Http) -> None:
    seen = await said(provider, http, "touch /tmp/$$ /var/tmp/$$ /dev/shm/$$ && rm /tmp/$$ /var/tmp/$$ /dev/shm/$$")
    assert seen.end.exit_code == 0, seen.stderr


THIEF = r"""
use IO::Socket::INET;
my ($port, $home, $id) = @ARGV;
if ($ENV{HOME} ne $home) {
    %ENV = (HOME => $home, BRANCHLINE_SANDBOX_ID => $id, SCRIPT => $ENV{SCRIPT});
    exec("perl", "-e", $ENV{SCRIPT}, @ARGV);
}
$| = 1;
my $server = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => $port, Listen => 5, ReuseAddr => 1);
print "listening\n";
while (my $caller = $server->accept()) {
    sysread($caller, my $said, 65536);
    print "heard $said\n";
    print $caller "HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"servers\":[]}";
}
"""
"""Says that it is another sandbox, and answers in its server's place. In Perl, which git brings along."""


@BOTH
async def test_it_is_told_nothing_at_the_port_of_another_whose_server_has_died(
    provider: LocalProvider, http: Http
) -> None:
    machine = await provider.create("sbx_1")
    for process in alive(provider.processes.of("sbx_1")):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    thief = f'export SCRIPT={shlex.quote(THIEF)}; perl -e "$SCRIPT"'
    where = f"{machine.url.rsplit(':', 1)[1]} {machine.home} sbx_1 > heard 2>&1 &"
    until = "for i in $(seq 50); do grep -q listening heard && exit; sleep 0.1; done"
    await said(provider, http, f"{thief} {where} {until}", "sbx_2")

    assert (await provider.probe("sbx_1")).condition is Condition.GONE
    with pytest.raises(Unreachable, match="another program listens") as refused:
        await AgentServer(machine, http).connections()
    assert not refused.value.sent
    assert (await said(provider, http, "echo mine")).stdout == "mine\n"
    assert (await said(provider, http, "cat heard", "sbx_2")).stdout == "listening\n"


@BOTH
@as_root
async def test_what_forks_and_ends_for_ever_is_ended_with_it(provider: LocalProvider, http: Http, data: Path) -> None:
    comet = "comet() { date > beat; (sleep 0.01; comet) & }; comet >/dev/null 2>&1 </dev/null"
    await said(provider, http, comet)
    beat = data / "local" / "sbx_1" / "home" / "beat"
    assert beat.exists()

    await provider.pause("sbx_1")

    before = beat.stat().st_mtime_ns
    await asyncio.sleep(0.5)
    assert beat.stat().st_mtime_ns == before


@BOTH
@as_root
async def test_a_link_in_its_home_leads_the_backend_nowhere(provider: LocalProvider, data: Path, http: Http) -> None:
    victim = data / "victim"
    victim.write_text("untouched")
    await said(provider, http, f"ln -sf {victim} .gitconfig; rm -rf .local; ln -s {data} .local")
    await provider.pause("sbx_1")

    with pytest.raises(ProviderError):  # it has closed its own way to its furniture
        await provider.resume("sbx_1")

    assert victim.read_text() == "untouched"
    assert victim.stat().st_uid == 0
    assert sorted(os.listdir(data)) == ["local", "signing.key", "victim"]  # noqa: PTH208
    (data / "local" / "sbx_1" / "home" / ".local").unlink()
    assert (await said(provider, http, "git config init.defaultBranch")).stdout == "main\n"


@BOTH
@as_root
async def test_each_has_a_user_of_its_own_that_outlives_a_restart_and_is_given_back(
    provider: LocalProvider, data: Path, isolation: str, http: Http
) -> None:
    await said(provider, http, "env -i setsid sleep 1000 >/dev/null 2>&1 & sleep 0.2; echo mine > file", "sbx_1")
    await provider.create("sbx_2")
    users = {user_of(provider, "sbx_1"), user_of(provider, "sbx_2")}
    assert len(users) == 2
    assert users <= set(range(40000, 60000))

    again = a_local_provider(data, isolation, http)
    await again.start()
    assert (await again.probe("sbx_1")).condition is Condition.ALIVE
    await again.pause("sbx_2")
    await again.resume("sbx_2")
    assert {user_of(again, "sbx_1"), user_of(again, "sbx_2")} == users
    await again.destroy("sbx_1")
    await again.destroy("sbx_2")

    assert await again.known() == set()
    assert not [process for process in alive(psutil.process_iter()) if process.uids().real in users]
    assert list((data / "local").iterdir()) == []


@BOTH
@as_root
async def test_a_range_of_users_that_is_used_up_is_told_and_a_returned_user_is_given_again(
    data: Path, isolation: str, http: Http
) -> None:
    small = a_local_provider(data, isolation, http, user_ids=[41000, 41000])
    await small.create("sbx_1")
    try:
        with pytest.raises(ProviderError, match="widen `user_ids`"):
            await small.create("sbx_2")
        await small.destroy("sbx_1")
        await small.create("sbx_2")
        assert user_of(small, "sbx_2") == 41000
    finally:
        await small.destroy("sbx_1")
        await small.destroy("sbx_2")


@BOTH
@as_root
async def test_two_push_to_a_repository_that_they_share(data: Path, isolation: str, http: Http) -> None:
    remote = data / "remotes" / "one.git"
    provider = a_local_provider(data, isolation, http, writable_paths=[remote.parent])
    remote.mkdir(parents=True)
    os.chown(remote.parent, 0, 40000)
    remote.parent.chmod(0o770)
    os.chown(remote, 0, 40000)
    remote.chmod(0o770)
    commit = "git -c user.name=A -c user.email=a@localhost commit -q --allow-empty -m x"
    try:
        first = await said(
            provider,
            http,
            f"git init -q --bare {remote}; git clone -q {remote} w; cd w; {commit}; git push origin HEAD:one",
        )
        assert first.end.exit_code == 0, first.stderr
        for _ in range(2):
            push = f"{commit}; git push origin HEAD:x"
            pushed = await said(provider, http, f"git clone -q {remote} w; cd w; {push}; {push}")
            assert pushed.end.exit_code == 0, pushed.stderr
    finally:
        await provider.destroy("sbx_1")
        await provider.destroy("sbx_2")


@BOTH
async def test_it_changes_nothing_that_git_runs_for_others_in_a_repository_that_they_share(
    data: Path, isolation: str, http: Http
) -> None:
    remote = data / "remotes" / "one.git"
    await asyncio.to_thread(
        subprocess.run, ["git", "init", "-q", "--bare", "--initial-branch=main", str(remote)], check=True
    )
    provider = a_local_provider(data, isolation, http, writable_paths=[remote.parent])
    commit = "git -c user.name=A -c user.email=a@localhost commit -q --allow-empty -m x"
    before = sorted(path.name for path in remote.iterdir())
    attempts = (
        *(f"echo x >> {remote}/{name}" for name in ("config", "hooks/pre-receive", "commondir", "config.worktree")),
        *(f"mv {remote}/hooks {remote}/away", f"mv {remote} {remote}.away", f"ln -s /tmp {remote}/worktrees"),
    )
    try:
        pushed = await said(
            provider,
            http,
            f"git clone -q {remote} w; cd w; {commit}; git push origin HEAD:x; {commit}; git push origin HEAD:x",
        )
        assert pushed.end.exit_code == 0, pushed.stderr
        for attempt in attempts:
            assert (await said(provider, http, attempt)).end.exit_code != 0, attempt
    finally:
        await provider.destroy("sbx_1")
    assert sorted(path.name for path in remote.iterdir()) == before


async def test_a_command_of_a_task_sees_neither_the_hosts_accounts_nor_the_data(stack: Stack) -> None:
    task = await stack.ready_task(await stack.add_repository())
    data_dir = stack.installation.settings.data_dir.resolve()
    script = f"cat /etc/shadow {data_dir}/signing.key {data_dir}/*/*.sqlite; kill -9 {os.getpid()}; echo still here"

    seen = await execute(stack.client, task.id, "sh", "-c", script)

    assert seen.stdout == "still here\n"
