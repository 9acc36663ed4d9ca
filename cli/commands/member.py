"""`branchline member`: the people of your first organization."""

from enum import StrEnum
from typing import Annotated

import typer
from branchline import AsyncClient, pages
from branchline.v1 import organizations_pb2
from branchline.v1.roles_pb2 import Role

from cli.calls import address, run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console, run

app = typer.Typer(no_args_is_help=True, help="Members.")


class RoleName(StrEnum):
    """What a member may do."""

    VIEWER = "viewer"
    MEMBER = "member"
    ADMIN = "admin"
    OWNER = "owner"

    @property
    def role(self) -> Role.ValueType:
        """The contract's word for it."""
        return Role.Value(f"ROLE_{self.name}")


@app.command()
def invite(
    email: str,
    role: RoleName = RoleName.MEMBER,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Invite a person; the code is shown this once: `branchline member accept CODE`."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        request = organizations_pb2.InviteMemberRequest(organization_id=organization_id, email=email, role=role.role)
        answer = await client.organizations.invite_member(request)
        console.print(f"{answer.invitation.id}: [bold]{answer.code}[/bold]", soft_wrap=True, highlight=False)

    run_as_client(data_dir, job)


@app.command()
def accept(
    code: str,
    name: Annotated[str, typer.Option(help="Your name, shown to people.")],
    email: Annotated[str, typer.Option(help="Your address; the invitation's when not given.")] = "",
) -> None:
    """Accept an invitation as somebody new; your first API token is shown this once."""

    async def job() -> None:
        async with AsyncClient(address()) as client:
            request = organizations_pb2.AcceptInvitationRequest(code=code, display_name=name, email=email)
            answer = await client.organizations.accept_invitation(request)
            console.print(f"you are {answer.member.user_id} in {answer.organization.display_name}", highlight=False)
            console.print(f"token  [bold]{answer.secret}[/bold]", soft_wrap=True, highlight=False)

    run(job())


@app.command("list")
def list_members(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List the members."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        request = organizations_pb2.ListMembersRequest(organization_id=organization_id)
        async for member in pages(client.organizations.list_members, request, lambda page: page.members):
            role = Role.Name(member.role).removeprefix("ROLE_").lower()
            console.print(f"{member.user_id}  {role:<6}  {member.display_name}", highlight=False, markup=False)

    run_as_client(data_dir, job)


@app.command("role")
def change_role(user_id: str, role: RoleName, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Change what a member may do."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        member = organizations_pb2.Member(organization_id=organization_id, user_id=user_id, role=role.role)
        await client.organizations.update_member(organizations_pb2.UpdateMemberRequest(member=member))
        console.print(f"{user_id} is {role} now")

    run_as_client(data_dir, job)


@app.command()
def remove(user_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Remove a member."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        request = organizations_pb2.RemoveMemberRequest(organization_id=organization_id, user_id=user_id)
        await client.organizations.remove_member(request)
        console.print(f"{user_id} removed")

    run_as_client(data_dir, job)
