"""One of everything in an organization, for tests that call every method."""

import hashlib
from typing import Any

from branchline.v1 import (
    blobs_pb2,
    common_pb2,
    history_pb2,
    organizations_pb2,
    processes_pb2,
    roles_pb2,
    secrets_pb2,
    sessions_pb2,
    tasks_pb2,
    transcripts_pb2,
    users_pb2,
)
from google.protobuf.field_mask_pb2 import FieldMask

from tests.support.client import Client
from tests.support.processes import start
from tests.support.stack import Stack, request_id


async def targets(stack: Stack, owner: Client, organization_id: str, word: str = "x") -> dict[str, Any]:
    """Make one of everything; return a good value of each field, by its name or that of the method before it.

    The word is said in all that has words.
    """
    data = word.encode()
    digest = hashlib.sha256(data).hexdigest()
    repository_id = await stack.add_repository()
    task = await stack.ready_task(repository_id, title=word, session=sessions_pb2.SessionOptions(agent="mock"))
    session = await stack.session(task.id)
    token = await owner.users.CreateApiToken(users_pb2.CreateApiTokenRequest(display_name=word))
    invitation = organizations_pb2.InviteMemberRequest(
        organization_id=organization_id, email=f"{word}-{request_id()}@example.com", role=roles_pb2.ROLE_VIEWER
    )
    invited = await owner.organizations.InviteMember(invitation)
    process = await start(stack.client, task.id, "cat", terminal=processes_pb2.TerminalSize(rows=20, columns=80))
    blob = await owner.blobs.CreateBlob(
        blobs_pb2.CreateBlobRequest(
            organization_id=organization_id, display_name=word, size_bytes=len(data), sha256=digest
        )
    )
    written = blobs_pb2.WriteBlobRequest(organization_id=organization_id, blob_id=blob.blob.id, data=data)
    await owner.blobs.WriteBlob(written)
    secret = secrets_pb2.Secret(
        description=word, git_credential=secrets_pb2.GitCredential(host="example.invalid", username="someone")
    )
    kept = await owner.secrets.CreateSecret(secrets_pb2.CreateSecretRequest(secret=secret, value=b"hidden"))
    second = await owner.sessions.CreateSession(sessions_pb2.CreateSessionRequest(task_id=task.id, display_name=word))
    await stack.send(task, f"ask May I {word}?", session_id=second.session.id)
    waiting = await stack.send(task, f"say {word}", session_id=second.session.id)
    queued = sessions_pb2.QueuedMessage(id=waiting.queued_message.id, task_id=task.id)
    excerpt = common_pb2.FileExcerpt(path="a", start_line=1, end_line=2, text="b")
    prompt = common_pb2.Prompt(
        text="say hi",
        attachments=[
            common_pb2.Attachment(file_excerpt=excerpt),
            common_pb2.Attachment(blob=common_pb2.BlobReference(blob_id=blob.blob.id)),
        ],
    )
    queued.prompt.CopyFrom(prompt)
    return {
        "request_id": request_id,
        "organization_id": organization_id,
        "repository_id": repository_id,
        "task_id": task.id,
        "session_id": session.id,
        "api_token_id": token.api_token.id,
        "invitation_id": invited.invitation.id,
        "code": invited.code,
        "process_id": process.id,
        "blob_id": blob.blob.id,
        "secret_id": kept.secret.id,
        "queued_message_id": queued.id,
        "input_request_id": "inp_x",
        "email": lambda: f"{request_id()}@example.com",
        "display_name": "Someone",
        "role": roles_pb2.ROLE_VIEWER,
        "slug": lambda: f"f{request_id()[:12]}",
        "kind": organizations_pb2.ORGANIZATION_KIND_TEAM,
        "remote_url": lambda: f"https://example.invalid/{request_id()}.git",
        "path": "README.md",
        "ListFiles.path": "",
        "new_path": "README.txt",
        "data": data,
        "value": b"hidden",
        "size_bytes": len(data),
        "sha256": digest,
        "turn": 1,
        "signal": processes_pb2.SIGNAL_HUP,
        "size": processes_pb2.TerminalSize(rows=10, columns=10),
        "spec": processes_pb2.ProcessSpec(command=["true"]),
        "answer": transcripts_pb2.InputAnswer(option_id="allow"),
        "hold_prompt": True,
        "when_busy": sessions_pb2.WHEN_BUSY_QUEUE,
        "agent": "mock",
        "prompt": prompt,
        "organization": organizations_pb2.Organization(id=organization_id, display_name="Fuzz"),
        "task": tasks_pb2.Task(id=task.id, title="Fuzz"),
        "user": users_pb2.User(display_name="Fuzz"),
        "draft": users_pb2.Draft(task_id=task.id, prompt=prompt),
        "user_task_state": users_pb2.UserTaskState(task_id=task.id, unread=True),
        "queued_message": queued,
        "secret": lambda: secrets_pb2.Secret(
            git_credential=secrets_pb2.GitCredential(host=f"{request_id()}.invalid", username="someone")
        ),
        "UpdateSecret.secret": secrets_pb2.Secret(id=kept.secret.id, description="Fuzz"),
        "UpdateSession.session": sessions_pb2.Session(id=session.id, task_id=task.id, display_name="Fuzz"),
        "task_ids": [task.id],
        "tasks": tasks_pb2.TaskFilter(repository_ids=[repository_id]),
        "ListTasks.filter": tasks_pb2.TaskFilter(repository_ids=[repository_id]),
        "ListHistoryEvents.filter": history_pb2.HistoryFilter(repository_ids=[repository_id], task_ids=[task.id]),
        "transcripts": tasks_pb2.TranscriptSelection(session_ids=[session.id]),
        "UpdateOrganization.update_mask": FieldMask(paths=["display_name", "settings"]),
        "CreateTask.session": sessions_pb2.SessionOptions(agent="mock"),
        "CreateTask.sandbox": tasks_pb2.SandboxOptions(provider="nowhere"),
        "CreateSession.agent": "nobody",
    }
