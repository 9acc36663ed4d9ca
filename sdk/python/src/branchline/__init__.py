"""Branchline: the multiplayer backend for coding agents.

`AsyncClient` and `Client` speak to a server; `branchline.v1` holds the messages. What fails raises `BranchlineError`.
"""

from branchline.client import AsyncClient, Client, all_pages, pages
from branchline.errors import BranchlineError
from branchline.views import HistoryView, OrganizationView, TaskView

__all__ = [
    "AsyncClient",
    "BranchlineError",
    "Client",
    "HistoryView",
    "OrganizationView",
    "TaskView",
    "all_pages",
    "pages",
]
