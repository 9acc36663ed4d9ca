"""Whether bubblewrap, which keeps agents from the rest of this host, works here."""

import asyncio
import shutil

from cli.settings import SettingsError

_TRIAL = ("bwrap", "--unshare-all", "--share-net", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true")


async def bubblewrap_fault() -> str | None:
    """Return why bubblewrap does not work here, or None if it does."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    trial = await asyncio.create_subprocess_exec(
        *_TRIAL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await trial.communicate()
    return (
        None if trial.returncode == 0 else f"bubblewrap does not work here: {errors.decode(errors='replace').strip()}"
    )


async def require_isolation(isolation: str) -> None:
    """Raise SettingsError where agents could not be isolated as they should."""
    fault = None if isolation == "none" else await bubblewrap_fault()
    if fault:
        raise SettingsError(
            f"{fault}. Without it agents can read and change whatever this user can, keys included. "
            "If they may, say so: --isolation none, or sandbox.local.isolation in the settings"
        )
