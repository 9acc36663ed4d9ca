"""List the tasks of the first organization without `async`, then show what changes.

BRANCHLINE_TOKEN=$(cat data/token) python list_tasks.py [CHANGES]
"""

import os
import sys
from itertools import islice

from branchline import Client, all_pages
from branchline.v1.tasks_pb2 import ListTasksRequest, TaskActivity, TaskState, TaskSummary
from branchline.v1.users_pb2 import GetCurrentUserRequest
from branchline.v1.watches_pb2 import ChangeType

ADDRESS, TOKEN = os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700"), os.environ["BRANCHLINE_TOKEN"]


def show(task: TaskSummary) -> str:
    return f"{task.id} {TaskState.Name(task.state)} {TaskActivity.Name(task.activity)} {task.title}"


def main(changes: int = 0) -> None:
    with Client(ADDRESS, TOKEN) as client:
        organization_id = client.users.get_current_user(GetCurrentUserRequest()).memberships[0].organization_id
        request = ListTasksRequest(organization_id=organization_id, order_by="create_time desc", page_size=100)
        for task in all_pages(client.tasks.list_tasks, request, lambda page: page.tasks):
            print(show(task))
        with client.watch_organization(organization_id) as watched:
            for change in islice(watched.changes(), changes):
                if change.HasField("task"):
                    print(ChangeType.Name(change.type), show(change.task))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
