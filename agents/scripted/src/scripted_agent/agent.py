"""The agent: takes prompts over ACP, does what they say, and reports as real agents do."""

import asyncio
import base64
import json
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import acp
from acp.helpers import update_current_mode
from acp.interfaces import Agent, Client
from acp.schema import (
    AcceptElicitationResponse,
    AgentCapabilities,
    AllowedOutcome,
    ConfigOptionUpdate,
    ElicitationFormSessionMode,
    ElicitationSchema,
    ElicitationStringPropertySchema,
    ImageContentBlock,
    Implementation,
    InitializeResponse,
    NewSessionResponse,
    PermissionOption,
    PromptCapabilities,
    PromptResponse,
    ResourceContentBlock,
    SessionConfigOptionSelect,
    SessionConfigSelectOption,
    SessionMode,
    SessionModeState,
    SetSessionConfigOptionResponse,
    SetSessionModeResponse,
    TextContentBlock,
    ToolCallLocation,
    ToolCallUpdate,
    Usage,
)

from scripted_agent.script import Instruction, read_plan, read_script, split_file

MODELS = ("steady", "swift")
MODES = ("code", "plan")
_PAUSE_SECONDS = {"steady": 0.05, "swift": 0.0}
_COMMAND_SECONDS = 600


class _Refused(Exception):
    """A member refused permission."""


class ScriptedAgent(Agent):
    """One agent process; each session has a directory, a model and a mode."""

    def __init__(self) -> None:
        self._directories: dict[str, Path] = {}
        self._models: dict[str, str] = {}
        self._modes: dict[str, str] = {}
        self._ends: dict[str, PromptResponse] = {}
        self._turns: dict[str, asyncio.Task[None]] = {}
        self._client: Client | None = None

    def on_connect(self, conn: Client) -> None:
        """Keep the connection to report on."""
        self._client = conn

    async def initialize(self, protocol_version: int, *_: Any, **__: Any) -> InitializeResponse:
        """Say what the agent can do."""
        return InitializeResponse(
            protocol_version=protocol_version,
            agent_capabilities=AgentCapabilities(
                load_session=False, prompt_capabilities=PromptCapabilities(image=True)
            ),
            agent_info=Implementation(name="scripted", version="0.1.0"),
        )

    async def new_session(self, cwd: str, *_: Any, **__: Any) -> NewSessionResponse:
        """Open a session in a directory."""
        session_id = uuid.uuid4().hex
        self._directories[session_id] = Path(cwd)
        self._models[session_id] = MODELS[0]
        self._modes[session_id] = MODES[0]
        modes = [SessionMode(id=mode, name=mode.title()) for mode in MODES]
        return NewSessionResponse(
            session_id=session_id,
            config_options=[self._model_option(session_id)],
            modes=SessionModeState(current_mode_id=MODES[0], available_modes=modes),
        )

    async def set_session_mode(self, session_id: str, mode_id: str, **kwargs: Any) -> SetSessionModeResponse:
        """Choose the mode."""
        if mode_id not in MODES:
            raise acp.RequestError.invalid_params({"message": f"no such mode: {mode_id}"})
        self._modes[session_id] = mode_id
        await self._update(session_id, update_current_mode(mode_id))
        return SetSessionModeResponse()

    async def set_config_option(
        self, config_id: str, session_id: str, value: str | bool, **kwargs: Any
    ) -> SetSessionConfigOptionResponse:
        """Choose the model."""
        if config_id != "model" or not isinstance(value, str) or value not in MODELS:
            raise acp.RequestError.invalid_params({"message": f"no such option: {config_id}={value}"})
        self._models[session_id] = value
        return SetSessionConfigOptionResponse(config_options=[self._model_option(session_id)])

    async def prompt(self, session_id: str, prompt: list[Any], **kwargs: Any) -> PromptResponse:
        """Do what the prompt says, line by line."""
        text = "\n".join(block.text for block in prompt if isinstance(block, TextContentBlock))
        self._ends[session_id] = PromptResponse(stop_reason="end_turn")
        for block in prompt:
            await self._name(session_id, block)
        turn = self._turns[session_id] = asyncio.create_task(self._work(session_id, read_script(text)))
        try:
            await turn
        except asyncio.CancelledError:
            return PromptResponse(stop_reason="cancelled")
        except _Refused:
            return PromptResponse(stop_reason="refusal")
        finally:
            self._turns.pop(session_id, None)
        return self._ends[session_id]

    async def _name(self, session_id: str, block: Any) -> None:
        """Say what came with a prompt."""
        if isinstance(block, ImageContentBlock):
            size = len(base64.b64decode(block.data))
            await self._say(session_id, f"I see an image, {block.mime_type}, {size} bytes.")
        elif isinstance(block, ResourceContentBlock):
            size = _size(unquote(block.uri.removeprefix("file://")))
            await self._say(session_id, f"I see the file {block.name}, {size} bytes.")

    async def cancel(self, session_id: str, **_: Any) -> None:
        """Stop the turn."""
        turn = self._turns.get(session_id)
        if turn is not None:
            turn.cancel()

    def _model_option(self, session_id: str) -> SessionConfigOptionSelect:
        options = [SessionConfigSelectOption(value=model, name=model.title()) for model in MODELS]
        return SessionConfigOptionSelect(
            id="model",
            name="Model",
            category="model",
            type="select",
            current_value=self._models[session_id],
            options=options,
        )

    async def _work(self, session_id: str, script: list[Instruction]) -> None:
        for instruction in script:
            await self._do(session_id, instruction)
        await self._say(session_id, "Done." if script else "There is nothing to do.")

    async def _do(self, session_id: str, instruction: Instruction) -> None:
        argument = instruction.argument
        match instruction.verb:
            case "write" | "append":
                await self._write(session_id, *split_file(argument), append=instruction.verb == "append")
            case "run":
                await self._run(session_id, argument)
            case "commit":
                quoted = (argument or "Work").replace("'", "'\\''")
                await self._run(
                    session_id, f"git add --all && git commit --quiet -m '{quoted}' && git log -1 --oneline"
                )
            case "push":
                await self._run(session_id, "git push --quiet origin HEAD && git status -sb | head -1")
            case "ask":
                await self._ask(session_id, argument)
            case "question":
                await self._question(session_id, argument)
            case "plan":
                steps = [
                    acp.plan_entry(step.text, priority=step.priority, status=step.status)
                    for step in read_plan(argument)
                ]
                await self._update(session_id, acp.update_plan(steps))
            case "image":
                data = base64.b64encode(bytes(int(argument or 100))).decode()
                await self._update(session_id, acp.update_agent_message(acp.image_block(data, "image/png")))
            case "mode" | "model":
                await self._go_on_with(session_id, instruction.verb, argument)
            case "usage":
                used = [int(word) for word in argument.split()]
                usage = Usage(input_tokens=used[0], output_tokens=used[1], total_tokens=sum(used))
                self._ends[session_id].usage = usage
            case "stop":
                self._ends[session_id] = self._ends[session_id].model_copy(update={"stop_reason": argument})
            case "update":
                await self._send_as_it_is(session_id, json.loads(argument))
            case "think":
                await self._update(session_id, acp.update_agent_thought_text(argument))
            case "repeat":
                count, _, text = argument.partition(" ")
                for number in range(int(count)):
                    await self._update(session_id, acp.update_agent_message_text(f"{text} {number + 1}\n"))
            case "wait":
                await asyncio.sleep(float(argument or 1))
            case "fail":
                raise acp.RequestError(-32000, argument or "told to fail")
            case "die":
                os._exit(int(argument or 1))
            case "say":
                await self._say(session_id, argument)
            case _:
                await self._say(session_id, f"I read: {argument}")

    async def _say(self, session_id: str, text: str) -> None:
        """Say something word by word, as a model would."""
        for word in f"{text}\n".split(" "):
            await self._update(session_id, acp.update_agent_message_text(word if word.endswith("\n") else f"{word} "))
            await asyncio.sleep(_PAUSE_SECONDS.get(self._models[session_id], 0.0))

    async def _write(self, session_id: str, path: str, text: str, *, append: bool) -> None:
        call_id = uuid.uuid4().hex
        target = self._directories[session_id] / path
        start = acp.start_edit_tool_call(call_id, f"write {path}", str(target), text)
        await self._update(session_id, start)
        before = target.read_text() if target.exists() else None
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a" if append else "w") as file:
            file.write(f"{text}\n")
        diff = acp.tool_diff_content(str(target), target.read_text(), before)
        await self._update(session_id, acp.update_tool_call(call_id, status="completed", content=[diff]))

    async def _run(self, session_id: str, command: str) -> None:
        call_id = uuid.uuid4().hex
        given = {"command": command}
        start = acp.start_tool_call(call_id, command, kind="execute", status="in_progress", raw_input=given)
        await self._update(session_id, start)
        process = await asyncio.create_subprocess_shell(
            command,
            cwd=self._directories[session_id],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _COMMAND_SECONDS)
        except (TimeoutError, asyncio.CancelledError):
            process.kill()
            raise
        failed = process.returncode != 0
        content = [acp.tool_content(acp.text_block(output.decode(errors="replace")))]
        status = "failed" if failed else "completed"
        end = {"exit_code": process.returncode}
        update = acp.update_tool_call(call_id, status=status, content=content, raw_output=end)
        await self._update(session_id, update)
        if failed:
            raise acp.RequestError(-32000, f"{command} ended with {process.returncode}")

    async def _ask(self, session_id: str, question: str) -> None:
        assert self._client is not None
        answer = await self._client.request_permission(
            session_id=session_id,
            tool_call=ToolCallUpdate(
                tool_call_id=uuid.uuid4().hex,
                title=question,
                kind="execute",
                raw_input={"question": question},
                locations=[ToolCallLocation(path=str(self._directories[session_id]))],
            ),
            options=[
                PermissionOption(option_id="allow", name="Allow", kind="allow_once"),
                PermissionOption(option_id="always", name="Always allow", kind="allow_always"),
                PermissionOption(option_id="reject", name="Reject", kind="reject_once"),
            ],
        )
        if not isinstance(answer.outcome, AllowedOutcome) or answer.outcome.option_id == "reject":
            await self._say(session_id, "Permission refused.")
            raise _Refused

    async def _question(self, session_id: str, text: str) -> None:
        """Ask for words and say them."""
        assert self._client is not None
        schema = ElicitationSchema(
            type="object",
            properties={"answer": ElicitationStringPropertySchema(type="string")},
            required=["answer"],
        )
        form = ElicitationFormSessionMode(session_id=session_id, requested_schema=schema)
        answer = await self._client.create_elicitation(text, form)
        if isinstance(answer, AcceptElicitationResponse):
            await self._say(session_id, f"The answer is {(answer.content or {}).get('answer')}.")
        else:
            await self._say(session_id, "There is no answer.")

    async def _go_on_with(self, session_id: str, kind: str, chosen: str) -> None:
        """Change the mode or the model by itself, and say so."""
        if kind == "mode":
            self._modes[session_id] = chosen
            await self._update(session_id, update_current_mode(chosen))
            return
        self._models[session_id] = chosen
        option = self._model_option(session_id)
        await self._update(
            session_id, ConfigOptionUpdate(session_update="config_option_update", config_options=[option])
        )

    async def _send_as_it_is(self, session_id: str, update: dict[str, Any]) -> None:
        """Send what the library's own types may not know."""
        connection: Any = self._client
        await connection._conn.send_notification("session/update", {"sessionId": session_id, "update": update})

    async def _update(self, session_id: str, update: Any) -> None:
        assert self._client is not None
        await self._client.session_update(session_id, update)


def _size(path: str) -> int:
    """Return a file's size; -1 if it is not there."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1
