"""`branchline member`: the people of your first organization."""

from enum import StrEnum
from typing import Annotated

import typer
from branchline.client import Client
from branchline.v1 import organizations_pb2
from branchline.v1.organizations_pb2 import Role

from cli.calls import request_id, run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console

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
def add(
    email: str,
    name: Annotated[str, typer.Option(help="Name shown to people; the address when not given.")] = "",
    role: RoleName = RoleName.MEMBER,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Add a person. An operator issues their first token: `branchline token issue`."""

    async def job(client: Client, organization_id: str) -> None:
        request = organizations_pb2.AddMemberRequest(
            request_id=request_id(),
            organization_id=organization_id,
            email=email,
            display_name=name or email,
            role=role.role,
        )
        answer = await client.organizations.AddMember(request)
        console.print(f"{email} added as [bold]{answer.member.user_id}[/bold]", highlight=False)

    run_as_client(data_dir, job)


@app.command("list")
def list_members(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List the members."""

    async def job(client: Client, organization_id: str) -> None:
        request = organizations_pb2.ListMembersRequest(organization_id=organization_id)
        for member in (await client.organizations.ListMembers(request)).members:
            role = Role.Name(member.role).removeprefix("ROLE_").lower()
            console.print(f"{member.user_id}  {role:<6}  {member.display_name}", highlight=False, markup=False)

    run_as_client(data_dir, job)


@app.command("role")
def change_role(user_id: str, role: RoleName, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Change what a member may do."""

    async def job(client: Client, organization_id: str) -> None:
        request = organizations_pb2.UpdateMemberRequest(
            request_id=request_id(), organization_id=organization_id, user_id=user_id, role=role.role
        )
        await client.organizations.UpdateMember(request)
        console.print(f"{user_id} is {role} now")

    run_as_client(data_dir, job)


@app.command()
def remove(user_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Remove a member."""

    async def job(client: Client, organization_id: str) -> None:
        request = organizations_pb2.RemoveMemberRequest(
            request_id=request_id(), organization_id=organization_id, user_id=user_id
        )
        await client.organizations.RemoveMember(request)
        console.print(f"{user_id} removed")

    run_as_client(data_dir, job)
