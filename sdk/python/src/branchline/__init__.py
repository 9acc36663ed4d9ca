"""Branchline: the multiplayer backend for coding agents.

`AsyncClient` and `Client` speak to a server; `branchline.v1` holds the messages. What fails raises `BranchlineError`:
`TlsError` where client and server cannot talk in safety.
"""

from branchline.client import AsyncClient, Client, all_pages, pages
from branchline.errors import BranchlineError
from branchline.tls import TlsError, TlsFault
from branchline.views import HistoryView, OrganizationView, TaskView

__all__ = [
    "AsyncClient",
    "BranchlineError",
    "Client",
    "HistoryView",
    "OrganizationView",
    "TaskView",
    "TlsError",
    "TlsFault",
    "all_pages",
    "pages",
]
