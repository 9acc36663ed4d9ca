from typing import Final

SERVICE_NAME: Final[str]
