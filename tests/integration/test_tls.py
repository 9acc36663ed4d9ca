"""Services that run apart with the certificates of `branchline certs`: the main job, renewal, and who is not let in."""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline import AsyncClient
from branchline.v1.common_pb2 import Prompt
from branchline.v1.organizations_pb2 import WatchOrganizationRequest
from branchline.v1.organizations_pb2_grpc import OrganizationServiceStub
from branchline.v1.repositories_pb2 import CreateRepositoryRequest
from branchline.v1.sessions_pb2 import SendMessageRequest
from branchline.v1.tasks_pb2 import CreateTaskRequest, Task, UpdateTaskRequest
from branchline.v1.users_pb2 import GetCurrentUserRequest
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli import views
from cli.certificates import DOOR
from cli.installation import SERVICES
from services.runtime.client import open_channel
from services.runtime.config import certified_name
from services.runtime.principal import OPERATOR, Signer
from services.runtime.tls import Certificate
from services.sandbox.providers.ports import free_port
from tests.integration.test_command_line import run
from tests.support.certificates import certificates, replace, tls_settings
from tests.support.process import PROGRAM, Processes, own_processes, ports
from tests.support.stack import eventually, failure, git, make_remote

BIN = Path(sys.executable).parent
_READY_SECONDS = 90.0


class Certified:
    """An installation whose services are apart and speak TLS alone."""

    def __init__(self, folder: Path) -> None:
        self.certs = certificates(folder / "certs")
        self.ca = self.certs / "ca" / "ca.crt"
        self.processes: Processes = own_processes(folder)
        self.processes.environment.update(ports(), **tls_settings(self.certs))
        self.address = self.processes.address
        self.client: AsyncClient
        self.organization_id = ""

    def address_of(self, service: str) -> str:
        return self.processes.environment[f"BRANCHLINE_ADDRESSES__{service.upper()}"]

    @property
    def token(self) -> str:
        return (self.processes.folder / "data" / "token").read_text()

    def certificate(self, of: str) -> Certificate:
        place = self.certs / of
        return Certificate(place / "tls.crt", place / "tls.key", self.ca, certified_name(of))

    @asynccontextmanager
    async def admin(
        self, caller: str, service: str, *, audience: str = "", meant: str = "", signed: str = ""
    ) -> AsyncGenerator[Any, None]:
        """Give a call of a service as a caller makes it, who may mean another service, or sign for or as another."""
        signer = Signer(self.processes.environment["BRANCHLINE_SIGNING_KEY"], signed or caller)
        channel = open_channel(meant or service, self.address_of(service), signer, self.certificate(caller))
        stub: Any = AdminServiceStub(channel)  # pyright: ignore[reportArgumentType]
        metadata = signer.metadata(audience or service)
        try:
            yield lambda: stub.ListOutbox(admin_pb2.ListOutboxRequest(), metadata=metadata, timeout=10)
        finally:
            await channel.close()

    async def bare(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Run a command of the client."""
        given = {"BRANCHLINE_ADDRESS": self.address, "BRANCHLINE_TOKEN": self.token, **environment}
        return await run(str(PROGRAM), *arguments, **given)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def certified(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Certified, None]:
    installation = Certified(tmp_path_factory.mktemp("certified"))
    processes = installation.processes
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        async with asyncio.timeout(_READY_SECONDS):
            assert await processes.running["bootstrap"].wait() == 0
        connection = AsyncClient(installation.address, installation.token, ca=installation.ca)
        installation.client = (await stack.enter_async_context(connection)).session()
        me = await installation.client.users.get_current_user(GetCurrentUserRequest())
        installation.organization_id = me.memberships[0].organization_id
        yield installation


async def new_task(certified: Certified, text: str, remote: Path | None = None) -> Task:
    """Create a task and wait until its agent is done."""
    remote = remote or make_remote(certified.processes.folder / "remotes")
    creating = CreateRepositoryRequest(organization_id=certified.organization_id, remote_url=f"file://{remote}")
    repository = (await certified.client.repositories.create_repository(creating)).repository
    request = CreateTaskRequest(repository_id=repository.id, prompt=Prompt(text=text))
    created = (await certified.client.tasks.create_task(request)).task
    return await settled(certified, created.id)


async def settled(certified: Certified, task_id: str, *, head: bool = False) -> Task:
    async with certified.client.watch_task(task_id) as view:
        await view.wait_for(
            lambda view: views.is_settled(view.task) and (not head or bool(view.task.head_commit)), timeout_seconds=90
        )
        return view.task


@pytest.mark.timeout(300)
async def test_an_agents_work_is_pushed_and_shown_with_every_hop_encrypted(certified: Certified) -> None:
    remote = make_remote(certified.processes.folder / "remotes")

    task = await new_task(certified, "write NOTE.md: hello\ncommit Add a note\npush", remote)
    task = await settled(certified, task.id, head=True)

    assert git("ls-remote", str(remote), f"refs/heads/{task.branch}").split()[0] == task.head_commit
    for service in SERVICES:
        async with grpc.aio.insecure_channel(certified.address_of(service)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            refused = await failure(stub.Check(health_pb2.HealthCheckRequest(), timeout=5))
        assert refused.code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.timeout(300)
async def test_renewed_certificates_are_taken_up_while_a_watch_goes_on(certified: Certified) -> None:
    task = await new_task(certified, "say hello")
    roots = grpc.ssl_channel_credentials(certified.ca.read_bytes())
    async with grpc.aio.secure_channel(certified.address, roots) as channel:
        request = WatchOrganizationRequest(organization_id=certified.organization_id)
        bearer = (("authorization", f"Bearer {certified.token}"),)
        stub: Any = OrganizationServiceStub(channel)
        call = stub.WatchOrganization(request, metadata=bearer)
        assert await call.read()
        before = {name: await shown(certified, name) for name in (*SERVICES,)}
        for name in SERVICES:
            replace(certified.certs, name, [certified_name(name)])
        replace(certified.certs, DOOR, ["127.0.0.1", "localhost"])

        async def taken_up() -> bool | None:
            after = {name: await shown(certified, name) for name in before}
            return True if all(after[name] != before[name] for name in before) else None

        await eventually(taken_up)
        request = SendMessageRequest(task_id=task.id, session_id=task.sessions[0].id, prompt=Prompt(text="say again"))
        await certified.client.sessions.send_message(request)
        retitled = UpdateTaskRequest(task=Task(id=task.id, title="Renewed"))
        retitled.update_mask.paths.append("title")
        await certified.client.tasks.update_task(retitled)
        async with asyncio.timeout(60):
            while "Renewed" not in {change.task.title for change in (await call.read()).changes}:
                pass
        assert not call.done()
        call.cancel()
    await settled(certified, task.id)


async def shown(certified: Certified, service: str) -> bytes:
    """Return the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=certified.ca)
    context.set_alpn_protocols(["h2"])
    host, _, port = certified.address_of(service).rpartition(":")
    name = "localhost" if service == "gateway" else certified_name(service)
    operator = certified.certs / OPERATOR
    context.load_cert_chain(operator / "tls.crt", operator / "tls.key")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name)
    try:
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_the_operator_is_let_in_by_every_service(certified: Certified) -> None:
    for service in SERVICES[:-1]:
        async with certified.admin(OPERATOR, service) as ask:
            await ask()


async def test_a_service_is_let_in_only_by_those_next_to_it(certified: Certified) -> None:
    tree = {
        "organization": {"gateway", "user", "github_data", "history", "repository"},
        "user": {"gateway", "organization"},
        "github_data": {"organization"},
        "history": {"organization"},
        "repository": {"gateway", "organization", "task"},
        "task": {"gateway", "repository", "sandbox"},
        "sandbox": {"gateway", "task"},
    }
    let_in: dict[str, set[str]] = {service: set() for service in tree}
    for service in tree:
        for caller in SERVICES:
            async with certified.admin(caller, service) as ask:
                refused = await failure(ask())
            if refused.reason == "OPERATOR_REQUIRED":
                let_in[service].add(caller)
            else:
                assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "PRINCIPAL_INVALID")
                assert refused.message == f"{certified_name(caller)} may not call {service}"

    assert let_in == tree


async def test_a_service_that_signs_as_the_operator_is_none(certified: Certified) -> None:
    for caller, service in (("sandbox", "task"), ("gateway", "organization"), ("task", "repository")):
        async with certified.admin(caller, service, signed=OPERATOR) as ask:
            refused = await failure(ask())
        assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "OPERATOR_REQUIRED")


async def test_a_principal_for_one_service_is_refused_by_another(certified: Certified) -> None:
    async with certified.admin(OPERATOR, "sandbox", audience="task") as ask:
        refused = await failure(ask())

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "PRINCIPAL_INVALID")
    assert refused.message == "the call's principal is for task, not for sandbox"


async def test_a_caller_finds_out_that_it_reached_another_service(certified: Certified) -> None:
    async with certified.admin(OPERATOR, "user", meant="task") as ask:
        refused = await failure(ask())

    assert refused.code == grpc.StatusCode.UNAVAILABLE
    assert "Hostname Verification Check failed" in refused.message


async def test_who_shows_no_certificate_or_a_strangers_does_not_get_in(
    certified: Certified, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = certificates(tmp_path_factory.mktemp("other")) / OPERATOR
    name = certified_name("task")
    options = (("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1))
    strangers = ((other / "tls.key").read_bytes(), (other / "tls.crt").read_bytes())
    for pair in ((None, None), strangers):
        credentials = grpc.ssl_channel_credentials(certified.ca.read_bytes(), *pair)
        async with grpc.aio.secure_channel(certified.address_of("task"), credentials, options=options) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            refused = await failure(stub.Check(health_pb2.HealthCheckRequest(), timeout=10))
        assert refused.code == grpc.StatusCode.UNAVAILABLE


async def test_the_command_line_speaks_tls_and_says_what_is_wrong(
    certified: Certified, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wrong = str(certificates(tmp_path_factory.mktemp("other")) / "ca" / "ca.crt")
    listing = ("task", "list")

    done, _, errors = await certified.bare("--ca", str(certified.ca), *listing)
    by_environment, _, _ = await certified.bare(*listing, BRANCHLINE_CA=str(certified.ca))
    stranger, _, not_trusted = await certified.bare(*listing, BRANCHLINE_CA=wrong)
    plain, _, needs_tls = await certified.bare(*listing)
    missing, _, no_file = await certified.bare("--ca", "/nowhere/ca.crt", *listing)

    assert (done, by_environment, stranger, plain, missing) == (0, 0, 1, 1, 2), errors
    assert f"no safe connection to {certified.address}: its certificate is signed by an authority" in not_trusted
    assert f"no safe connection to {certified.address}: it speaks TLS, and this client plaintext" in needs_tls
    assert "/nowhere/ca.crt holds no certificates of authorities" in no_file


async def test_grpcurl_is_served_with_the_authority(certified: Certified) -> None:
    code, out, errors = await run(
        str(BIN / "grpcurl"),
        *("-cacert", str(certified.ca), "-H", f"authorization: Bearer {certified.token}", certified.address),
        "branchline.v1.UserService/GetCurrentUser",
    )

    assert code == 0, errors
    assert "organizationId" in out


async def test_operators_commands_reach_services_that_speak_tls(certified: Certified) -> None:
    folder = str(certified.processes.folder / "data")

    code, out, errors = await certified.bare(
        "outbox", "list", "--parked", "--data-dir", folder, **certified.processes.environment
    )

    assert code == 0, errors
    assert out == "nothing waits\n"


REFUSED_STARTS: dict[str, tuple[str, dict[str, Any] | None, dict[str, str], str]] = {
    "a key that others can read": (
        "task",
        {"key_mode": 0o644},
        {},
        "is a key that others can read or change: chmod 600",
    ),
    "an expired certificate": ("task", {"days": -0.001}, {}, "certificate has expired"),
    "the certificate of another service": ("task", {"names": ["user.branchline.internal"]}, {}, "Hostname mismatch"),
    "a door whose certificate has expired": ("gateway", {"of": DOOR, "days": -0.001}, {}, "certificate has expired"),
    "no certificate off the host": (
        "task",
        None,
        {"BRANCHLINE_ADDRESSES__TASK": "0.0.0.0:7706"},
        "task at 0.0.0.0:7706 would not be encrypted: set tls.ca",
    ),
    "a neighbour off the host without a certificate": (
        "task",
        None,
        {"BRANCHLINE_ADDRESSES__SANDBOX": "10.0.0.1:7707"},
        "calls of sandbox at 10.0.0.1:7707 would not be encrypted: set tls.ca",
    ),
    "a door off the host without a certificate": (
        "gateway",
        None,
        {"BRANCHLINE_ADDRESSES__GATEWAY": "0.0.0.0:7700"},
        "gateway at 0.0.0.0:7700 would not be encrypted: set gateway.certificate",
    ),
}


@pytest.mark.parametrize("what", REFUSED_STARTS)
async def test_a_start_that_would_not_be_safe_is_refused_with_words(tmp_path: Path, what: str) -> None:
    service, wrong, settings, words = REFUSED_STARTS[what]
    environment = {**own_processes(tmp_path).environment, **ports()}
    if wrong is not None:
        given: dict[str, Any] = {"of": service, "names": [certified_name(service)], **wrong}
        replace(certificates(tmp_path / "certs"), **given)
        environment |= tls_settings(tmp_path / "certs")

    code, _, errors = await run(
        str(PROGRAM), "serve", service, "--data-dir", str(tmp_path / "data"), **{**environment, **settings}
    )

    assert code == 1
    assert words in errors
    assert "Traceback" not in errors


async def test_plaintext_leaves_the_host_with_a_warning_when_the_configuration_says_so(tmp_path: Path) -> None:
    processes = own_processes(tmp_path)
    address = f"0.0.0.0:{free_port()}"
    processes.environment.update(
        {**ports(), "BRANCHLINE_ADDRESSES__HISTORY": address, "BRANCHLINE_TLS__INSECURE": "true"}
    )
    await processes.start("history", "serve", "history")
    try:

        async def warned() -> bool | None:
            text = (tmp_path / "history.log").read_text()
            return "service started" in text or None

        await eventually(warned)
    finally:
        await processes.stop()

    assert "plaintext leaves this host, as the configuration says" in (tmp_path / "history.log").read_text()
