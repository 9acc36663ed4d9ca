"""What an agent is given: a message and its attachments as ACP content blocks. Pure."""

from typing import Any

from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest


def prompt_blocks(request: StartTurnRequest) -> list[dict[str, Any]]:
    """Return the content blocks of a prompt. Attachments go as text, which every agent takes."""
    blocks = [{"type": "text", "text": request.text}]
    for attachment in request.attachments:
        place = f"{attachment.path}:{attachment.line}" if attachment.line else attachment.path
        blocks.append({"type": "text", "text": f"Attached from {place}:\n{attachment.content}"})
    return blocks
