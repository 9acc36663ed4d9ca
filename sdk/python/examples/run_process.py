"""Run a command in the sandbox of a task and show its output, however often the connection breaks.

BRANCHLINE_TOKEN=$(cat data/token) python run_process.py TASK_ID COMMAND [ARGUMENT ...]
"""

import asyncio
import os
import sys

import grpc
from branchline import AsyncClient, BranchlineError
from branchline.v1.processes_pb2 import (
    OUTPUT_STREAM_STDERR,
    ProcessSpec,
    StartProcessRequest,
    WatchProcessRequest,
)

ADDRESS, TOKEN = os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700"), os.environ["BRANCHLINE_TOKEN"]


async def main(task_id: str, *command: str) -> int:
    async with AsyncClient(ADDRESS, TOKEN) as client:
        starting = StartProcessRequest(task_id=task_id, spec=ProcessSpec(command=command))
        process = (await client.processes.start_process(starting)).process
        offset = 0  # of the first byte that has not come: the process and its output outlive every watch
        while True:
            watching = WatchProcessRequest(task_id=task_id, process_id=process.id, offset=offset)
            try:
                async for answer in client.processes.watch_process(watching):
                    match answer.WhichOneof("event"):
                        case "output":
                            stream = sys.stderr if answer.output.stream == OUTPUT_STREAM_STDERR else sys.stdout
                            stream.buffer.write(answer.output.data)
                            offset = answer.output.offset + len(answer.output.data)
                        case "gap":  # more was said than is kept
                            offset = answer.gap.next_offset
                        case "end":
                            return answer.end.exit_code
                        case _:
                            pass
            except BranchlineError as error:
                if error.code != grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
